/* A run-time compiler that compiles nothing: it writes down what it was asked, answers with bytes,
 * and fails in the way that FAKE_RTC names. Build with -DP(x)=nvrtc##x or hiprtc##x. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef struct {
    char names[16][256], lowered[16][300];
    int count;
    char log[4096];
} program;

static int mode(const char *word) {
    const char *asked = getenv("FAKE_RTC");
    return asked && !strncmp(asked, word, strlen(word));
}

static void note(const char *what, const char *text) {
    FILE *file = fopen(getenv("FAKE_RTC_SEEN"), "a");
    fprintf(file, "%s\t%s\n", what, text);
    fclose(file);
}

const char *P(GetErrorString)(int code) {
    return code == 6 ? "COMPILATION" : code ? "SOMETHING" : "SUCCESS";
}

#ifdef NVIDIA
int P(Version)(int *major, int *minor) {
    *major = MAJOR;
    *minor = MINOR;
    return 0;
}
#ifdef TELLS
int P(GetNumSupportedArchs)(int *count) { *count = 2; return 0; }
int P(GetSupportedArchs)(int *archs) { archs[0] = 70; archs[1] = 90; return 0; }
#endif
#endif

int P(CreateProgram)(program **made, const char *text, const char *name, int count,
                     const char **headers, const char **files) {
    *made = calloc(1, sizeof **made);
    note("name", name);
    note("text", text);
    for (int i = 0; i < count; i++) {
        if (!headers[i][0]) return 3;
        note("header", files[i]);
    }
    return 0;
}

int P(AddNameExpression)(program *p, const char *name) {
    snprintf(p->names[p->count], 256, "%s", name);
    snprintf(p->lowered[p->count++], 300, "_Z_%s", name);
    return 0;
}

int P(CompileProgram)(program *p, int count, const char **options) {
    for (int i = 0; i < count; i++) note("option", options[i]);
    for (int i = 0; i < p->count; i++) note("expression", p->names[i]);
    if (mode("abort")) abort();
    if (mode("hang")) for (;;) pause();
    if (mode("exit")) exit(3);
    if (mode("log")) {
        snprintf(p->log, sizeof p->log, "user.cu(7): warning: something\n");
        return 0;
    }
    if (mode("fail")) return atoi(getenv("FAKE_RTC") + 4);
    if (mode("unnamed") && p->count) return 6;
    return 0;
}

int P(GetLoweredName)(program *p, const char *name, const char **lowered) {
    for (int i = 0; i < p->count; i++)
        if (!strcmp(p->names[i], name)) {
            *lowered = p->lowered[i];
            return 0;
        }
    return 4;
}

int P(GetProgramLogSize)(program *p, size_t *size) { *size = strlen(p->log) + 1; return 0; }
int P(GetProgramLog)(program *p, char *log) { strcpy(log, p->log); return 0; }

#define BLOB(NAME, TEXT) \
    int P(Get##NAME##Size)(program *p, size_t *size) { (void)p; *size = mode("empty") ? 0 : sizeof TEXT; return 0; } \
    int P(Get##NAME)(program *p, char *out) { (void)p; memcpy(out, TEXT, sizeof TEXT); return 0; }
#ifdef NVIDIA
BLOB(PTX, ".visible .entry _Z_add(\n\t.param .u64 a,\n\t.param .u32 b\n)\n{}\n")
#ifdef REAL
BLOB(CUBIN, "\177ELF cubin")
#endif
#else
BLOB(Code, "\177ELF hsaco")
#endif

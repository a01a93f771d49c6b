/* NVRTC and hiprtc as the fakes have them: the project's own translation for the cpu, asked for in a
 * process of its own. RTC(Name) is the vendor's name of a function, RTC_SIZE and RTC_CODE those that give the code,
 * REAL the beginning of the architectures that it knows. */

typedef struct Program { char *text, *name, *log, *code; size_t size; char *names[64]; char *lowered[64]; int count; } Program;

int RTC(Version)(int *major, int *minor) { *major = RTC_MAJOR, *minor = 0; return 0; }
const char *RTC(GetErrorString)(int code) { return code == 6 ? "RTC_ERROR_COMPILATION" : code ? "RTC_ERROR" : "RTC_SUCCESS"; }
int RTC(CreateProgram)(Program **out, const char *text, const char *name, int n, const char **headers, const char **names) {
    (void)n, (void)headers, (void)names;
    *out = calloc(1, sizeof **out);
    (*out)->text = strdup(text), (*out)->name = strdup(name ? name : ""), (*out)->log = strdup("");
    return 0;
}
int RTC(AddNameExpression)(Program *p, const char *expression) {
    if (p->count >= 64) return 1;
    p->names[p->count++] = strdup(expression);
    return 0;
}
static char *whole_file(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    fseek(file, 0, SEEK_END);
    *size = (size_t)ftell(file), rewind(file);
    char *text = calloc(1, *size + 1);
    if (fread(text, 1, *size, file) != *size) *size = 0;
    fclose(file);
    return text;
}
/* -D and -U, however they are written. */
static const char *as_macro(const char *option) {
    static char made[64][512];
    static int count;
    const char *rest = option;
    int define = !strncmp(option, "--define-macro=", 15);
    if (define || !strncmp(option, "--undefine-macro=", 17)) {
        if (count >= 64) return NULL;
        snprintf(made[count], sizeof made[count], "-%c%s", define ? 'D' : 'U', rest + (define ? 15 : 17));
        return made[count++];
    }
    return !strncmp(option, "-D", 2) || !strncmp(option, "-U", 2) ? option : NULL;
}
int RTC(CompileProgram)(Program *p, int count, const char **options) {
    const char *arguments[128] = {PYTHON, COMPILER, "fake.cu", "fake.out", "fake.log"};
    int n = 5;
    for (int i = 0; i < count; i++) {
        if (!strncmp(options[i], "--gpu-architecture=", 19) && strncmp(options[i] + 19, REAL, strlen(REAL)))
            abort(); /* as hiprtc does for one that it does not know */
        const char *macro = as_macro(options[i]);
        if (n < 120 && macro) arguments[n++] = macro;
    }
    FILE *file = fopen("fake.cu", "wb");
    if (!file) return 1;
    fwrite(p->text, 1, strlen(p->text), file), fclose(file);
    pid_t child = fork();
    if (!child) { execv(PYTHON, (char *const *)arguments); _exit(127); }
    int status = 0;
    waitpid(child, &status, 0);
    size_t log_bytes;
    char *log = whole_file("fake.log", &log_bytes);
    if (log) free(p->log), p->log = log;
    if (status) return 6;
    p->code = whole_file("fake.out", &p->size);
    /* A line "names ..." before the object: what each expression was lowered to. */
    for (int i = 0; i < p->count; i++) {
        char wanted[300];
        snprintf(wanted, sizeof wanted, "\n%s ", p->names[i]);
        const char *at = strstr(p->log, wanted);
        if (!at) return 10;
        at += strlen(wanted);
        p->lowered[i] = strndup(at, strcspn(at, "\n"));
    }
    return 0;
}
int RTC(GetLoweredName)(Program *p, const char *expression, const char **out) {
    for (int i = 0; i < p->count; i++)
        if (!strcmp(p->names[i], expression)) { *out = p->lowered[i]; return *out ? 0 : 10; }
    return 10;
}
int RTC(GetProgramLogSize)(Program *p, size_t *size) { *size = strlen(p->log) + 1; return 0; }
int RTC(GetProgramLog)(Program *p, char *out) { strcpy(out, p->log); return 0; }
int RTC_SIZE(Program *p, size_t *size) { *size = p->size; return 0; }
int RTC_CODE(Program *p, char *out) { memcpy(out, p->code, p->size); return 0; }

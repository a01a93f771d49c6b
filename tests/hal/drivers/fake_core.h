/* What the stand-ins for vendors' libraries share: devices whose memory the host cannot touch, streams
 * that are threads, kernels that are shared objects of the cpu driver, and faults on demand. They are
 * there for the order of calls and for faults; they show nothing about a vendor's results.
 *
 * Each fake names itself before it includes this file: FAKE is the beginning of its variables.
 *   FAKE_DEVICES, FAKE_MEMORY (bytes each), FAKE_VERSION, FAKE_DELAY_US (before each piece of work)
 *   FAKE_FAULT="SYMBOL:N:CODE,..."  the N-th call of a symbol (0: each) returns CODE, or with the
 *                                   word `hang` does not return until fake_forgive(); a code that
 *                                   stands for a lost device also loses it for good
 * and the functions fake_fail, fake_forgive, fake_live, ... do the same in a process.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#pragma GCC diagnostic ignored "-Wunused-function" /* not every fake needs all of it */

#define MOST_DEVICES 4
#define MOST_PARAMS 32
#define ARENA ((size_t)1 << 37)
#define PAGE 4096u
#define HANG (-1)

enum { DEVICE, PINNED, MANAGED, POOLED, REGION, KINDS };
enum { COPY, SET, KERNEL, RECORD, RESET, WAIT, FREE, RUN };

/* The tag by which the conformance kit knows that nothing here is more than a fake. */
const char drivetrain_fake[] = FAKE;

typedef struct Device { int index, sticky; unsigned peers, shared; uint64_t plain, reserved, used, threshold; } Device;
typedef struct Allocation {
    uint64_t ptr; size_t bytes; int kind; Device *device; struct Allocation *next; const void *context;
} Allocation;
/* One recording of an event: waits are for it, whatever is recorded later. */
typedef struct Mark { int refs, left, done; double at; } Mark;
typedef struct { uint32_t grid[3], block[3], shared, reserved; uint64_t first, count; } Range;
typedef int (*Entry)(const Range *, void **);
/* A kernel: code that was loaded, or one that the fake knows by its name and runs under its lock. */
typedef struct Function {
    char name[128]; Entry entry; int (*known)(Device *, void **);
    int count, sizes[MOST_PARAMS], dynamic; Device *device;
} Function;
typedef struct Module {
    Device *device; void *object; char *table; Function *functions[64]; int count, users;
} Module;
typedef struct Op {
    int what, width; uint64_t dst, src, bytes, pitch, rows; unsigned char pattern[16];
    void *staged; Function *function; Range range; unsigned char *params;
    Mark *mark; Allocation *memory; struct Exec *exec; struct Op *next;
} Op;
typedef struct Stream {
    Device *device; Op *head, *tail; int destroyed; struct Capture *capture;
    struct Node **deps; int count; struct Stream *next;
} Stream;

static int run_ops(Device *device, struct Exec *exec); /* a fake's graphs */
static void drop_exec(struct Exec *exec);

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static Device devices[MOST_DEVICES];
static int unified, device_count, configured, version, logging, open_count, at_work;
static uint64_t memory_bytes = (uint64_t)1 << 30;
static unsigned delay_us;
static Allocation *allocations;
static Stream *streams;
static char *outside, *inside; /* the same memory: as the host sees it, and as we do */
static int arena_file;
static size_t arena_used;
static struct { char name[64]; int nth, code; } faults[32];
static int fault_count;
static struct { char name[64]; int count; } counts[160];
static char *call_log;
static size_t log_size, log_room;
static int fired; /* faults */
static int live_things; /* streams, events, modules, graphs */

/* -- settings and faults --------------------------------------------------------------------------- */

static int is_lost(int code);

static void add_fault(const char *name, int nth, int code) {
    if (fault_count >= 32) return;
    snprintf(faults[fault_count].name, 64, "%s", name);
    faults[fault_count].nth = nth, faults[fault_count++].code = code;
}
static void configure(void) {
    if (configured) return;
    configured = 1;
    const char *text;
    char copy[2048], *save = NULL;
    if ((text = getenv(FAKE "_MEMORY"))) memory_bytes = strtoull(text, NULL, 10);
    if ((text = getenv(FAKE "_DELAY_US"))) delay_us = (unsigned)atoi(text);
    if ((text = getenv(FAKE "_VERSION"))) version = atoi(text);
    device_count = (text = getenv(FAKE "_DEVICES")) ? atoi(text) : 2;
    if (device_count > MOST_DEVICES) device_count = MOST_DEVICES;
    for (int i = 0; i < MOST_DEVICES; i++) devices[i].index = i;
    if ((text = getenv(FAKE "_FAULT"))) {
        snprintf(copy, sizeof copy, "%s", text);
        for (char *p = strtok_r(copy, ",", &save); p; p = strtok_r(NULL, ",", &save)) {
            char name[64], what[32];
            int nth;
            if (sscanf(p, "%63[^:]:%d:%31s", name, &nth, what) == 3)
                add_fault(name, nth, strcmp(what, "hang") ? (int)strtol(what, NULL, 0) : HANG);
        }
    }
}

void fake_fail(const char *name, int nth, int code) {
    pthread_mutex_lock(&lock);
    configure();
    add_fault(name, nth, code);
    memset(counts, 0, sizeof counts);
    pthread_mutex_unlock(&lock);
}
void fake_forgive(void) {
    pthread_mutex_lock(&lock);
    fault_count = 0;
    for (int i = 0; i < MOST_DEVICES; i++) devices[i].sticky = 0;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}
void fake_log(int on) {
    pthread_mutex_lock(&lock);
    logging = on, log_size = 0;
    if (call_log) call_log[0] = 0;
    pthread_mutex_unlock(&lock);
}
const char *fake_calls(void) { return call_log ? call_log : ""; }
int fake_live(void) {
    int found = 0;
    pthread_mutex_lock(&lock);
    for (Allocation *a = allocations; a; a = a->next) found += a->kind != REGION;
    pthread_mutex_unlock(&lock);
    return found;
}
int fake_fired(void) { return fired; }
/* Memory of a device is the host's, too, from now on, as where the two share one. */
void fake_unified(int on) { unified = on; }
int fake_things(void) {
    pthread_mutex_lock(&lock);
    int found = live_things;
    pthread_mutex_unlock(&lock);
    return found;
}

static void note(const char *name, uint64_t a, uint64_t b) {
    if (!logging) return;
    if (log_room < log_size + 128) call_log = realloc(call_log, log_room = log_room ? log_room * 2 : 1 << 16);
    log_size += (size_t)snprintf(call_log + log_size, 128, "%s %llx %llx\n", name,
                                 (unsigned long long)a, (unsigned long long)b);
}

/* Every call begins here: noted with two of its arguments, counted, perhaps failed or held. The lock
 * is held on 0. */
static int enter_with(const char *name, Device *device, uint64_t a, uint64_t b) {
    pthread_mutex_lock(&lock);
    configure();
    note(name, a, b);
    int n = 0, code = 0;
    for (int i = 0; i < 160; i++) {
        if (!counts[i].name[0]) snprintf(counts[i].name, sizeof counts[i].name, "%s", name);
        if (!strcmp(counts[i].name, name)) { n = ++counts[i].count; break; }
    }
    for (int i = 0; i < fault_count; i++)
        if (!strcmp(faults[i].name, name) && (!faults[i].nth || faults[i].nth == n)) code = faults[i].code;
    fired += code != 0;
    if (code == HANG) {
        while (fault_count) pthread_cond_wait(&changed, &lock);
        code = 0;
    }
    if (code && is_lost(code)) {
        for (int i = 0; i < MOST_DEVICES; i++) if (!device || device == &devices[i]) devices[i].sticky = code;
        pthread_cond_broadcast(&changed);
    }
    if (!code && device && device->sticky) code = device->sticky;
    if (code) pthread_mutex_unlock(&lock);
    return code;
}
static int enter(const char *name, Device *device) { return enter_with(name, device, 0, 0); }
static int leave(int code) { pthread_mutex_unlock(&lock); return code; }

/* -- memory ------------------------------------------------------------------------------------------ */

static int is_outside(uint64_t ptr) {
    return outside && ptr >= (uint64_t)outside && ptr < (uint64_t)outside + ARENA;
}
static void *here(uint64_t ptr) {
    return is_outside(ptr) ? inside + (ptr - (uint64_t)outside) : (void *)ptr;
}
static Allocation *owner(uint64_t ptr) {
    for (Allocation *a = allocations; a; a = a->next)
        if (ptr >= a->ptr && ptr < a->ptr + a->bytes) return a;
    return NULL;
}
static Allocation *whole(uint64_t ptr) {
    Allocation *a = owner(ptr);
    return a && a->ptr == ptr ? a : NULL;
}
static uint64_t room(Device *d) { return memory_bytes - d->plain - d->reserved; }

/* A process has addresses for some hundred libraries that were never told their end. */
static void no_room(void) {
    perror("a fake library has no addresses left for device memory: call fake_end() of those in use no more");
    abort();
}
static uint64_t take(Device *device, size_t bytes, int kind) {
    if (!outside) {
        arena_file = memfd_create("fake", MFD_CLOEXEC);
        if (arena_file < 0 || ftruncate(arena_file, (off_t)ARENA)) no_room();
        outside = mmap(NULL, ARENA, PROT_NONE, MAP_SHARED | MAP_NORESERVE, arena_file, 0);
        inside = mmap(NULL, ARENA, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, arena_file, 0);
        if (outside == MAP_FAILED || inside == MAP_FAILED) no_room();
    }
    if (arena_used + bytes + 2 * PAGE > ARENA) no_room();
    Allocation *a = calloc(1, sizeof *a);
    char *base = kind == PINNED || kind == MANAGED || unified ? inside : outside;
    *a = (Allocation){(uint64_t)(base + arena_used), bytes, kind, device, allocations, NULL};
    memset(inside + arena_used, 0xAB, bytes < PAGE ? bytes : PAGE);
    arena_used += (bytes + PAGE - 1) / PAGE * PAGE + PAGE; /* addresses are never used again */
    allocations = a;
    if (kind == DEVICE || kind == MANAGED) device->plain += bytes;
    return a->ptr;
}
static void drop(Allocation *a) {
    for (Allocation **p = &allocations; *p; p = &(*p)->next)
        if (*p == a) { *p = a->next; break; }
    if (a->kind == POOLED) a->device->used -= a->bytes;
    if (a->kind == DEVICE || a->kind == MANAGED) a->device->plain -= a->bytes;
    if (a->kind != REGION) {
        off_t at = (char *)here(a->ptr) - inside;
        fallocate(arena_file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at,
                  (off_t)((a->bytes + PAGE - 1) / PAGE * PAGE));
    }
    free(a);
}
/* Whether the device may touch all of it now; memory of nobody is the host's. */
static int reaches(Device *d, uint64_t ptr, uint64_t bytes, int host_too) {
    Allocation *a = owner(ptr);
    if (!a) return host_too && !is_outside(ptr);
    if (bytes && ptr + bytes > a->ptr + a->bytes) return 0;
    if (a->kind == PINNED || a->kind == MANAGED || a->kind == REGION || a->device == d) return 1;
    if (!(d->peers >> a->device->index & 1)) return 0;
    return a->kind != POOLED || (a->device->shared >> d->index & 1);
}
static int is_here(uint64_t ptr) { Allocation *a = owner(ptr); return a && (a->kind == PINNED || a->kind == REGION); }

/* The library is not used any more: its memory and its threads go. */
void fake_end(void) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < MOST_DEVICES; i++) devices[i].sticky = 1; /* what is queued is dropped */
    for (Stream *s = streams; s; s = s->next) s->destroyed = 1;
    fault_count = 0;
    pthread_cond_broadcast(&changed);
    for (int i = 0; i < 100 && at_work; i++) { /* a kernel that never ends keeps its memory */
        pthread_mutex_unlock(&lock);
        usleep(20000);
        pthread_mutex_lock(&lock);
    }
    if (outside && !at_work) {
        munmap(outside, ARENA), munmap(inside, ARENA), close(arena_file);
        outside = inside = NULL, arena_used = 0;
    }
    pthread_mutex_unlock(&lock);
}

/* -- kernels: shared objects of the cpu driver, behind which the sizes of the arguments stand ----------- */

static size_t object_size(const void *image) {
    const Elf64_Ehdr *head = image;
    if (memcmp(head->e_ident, ELFMAG, SELFMAG) || head->e_ident[EI_CLASS] != ELFCLASS64) return 0;
    return head->e_shoff + (size_t)head->e_shnum * head->e_shentsize;
}
/* What the fake compiler and the tests write behind an object: "DTFAKE", a line for each kernel with
 * its name and the bytes of its arguments, and a 0. */
static Module *load_object(Device *device, const char *image) {
    size_t size = object_size(image);
    const Elf64_Ehdr *head = (const void *)image;
    if (!size || head->e_machine != EM_X86_64 || memcmp(image + size, "DTFAKE", 6)) return NULL;
    char path[] = "/tmp/fake-kernel-XXXXXX"; /* a name of its own: the loader goes by it */
    int file = mkstemp(path);
    if (file < 0) return NULL;
    for (size_t done = 0; done < size;) {
        ssize_t n = write(file, image + done, size - done);
        if (n <= 0) { close(file), unlink(path); return NULL; }
        done += (size_t)n;
    }
    close(file);
    void *object = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    unlink(path);
    if (!object) return NULL;
    Module *m = calloc(1, sizeof *m);
    m->device = device, m->object = object, m->table = strdup(image + size + 6);
    live_things++;
    return m;
}
static Function *find_function(Module *m, const char *name) {
    char symbol[256], line[512];
    for (int i = 0; i < m->count; i++)
        if (!strcmp(m->functions[i]->name, name)) return m->functions[i];
    snprintf(symbol, sizeof symbol, "dt_cpu_%s", name);
    Entry entry = (Entry)dlsym(m->object, symbol);
    if (!entry || m->count >= 64) return NULL;
    Function *f = calloc(1, sizeof *f);
    snprintf(f->name, sizeof f->name, "%s", name);
    f->entry = entry, f->device = m->device, f->count = -1;
    for (const char *at = m->table; *at; at += strcspn(at, "\n"), at += *at == '\n') {
        snprintf(line, sizeof line, "%.*s", (int)strcspn(at, "\n"), at);
        char *save = NULL, *word = strtok_r(line, " ", &save);
        if (!word || strcmp(word, name)) continue;
        f->count = 0;
        while ((word = strtok_r(NULL, " ", &save)) && f->count < MOST_PARAMS) f->sizes[f->count++] = atoi(word);
    }
    if (f->count < 0) { free(f); return NULL; }
    return m->functions[m->count++] = f;
}
static void drop_module(Module *m) {
    /* What was queued still runs: neither the object nor its functions go. */
    live_things--;
    m->device = NULL;
}
/* The arguments, copied: all is read before the call returns. */
static unsigned char *pack(Function *f, void **params) {
    unsigned char *out = malloc((size_t)f->count * 64 + 1);
    size_t room_left = 0;
    for (int i = 0; i < f->count; i++) room_left += ((size_t)f->sizes[i] + 15) / 16 * 16;
    out = realloc(out, room_left + 16);
    size_t at = 0;
    for (int i = 0; i < f->count; i++) {
        memcpy(out + at, params[i], (size_t)f->sizes[i]);
        at += ((size_t)f->sizes[i] + 15) / 16 * 16;
    }
    return out;
}
/* What takes long is done without the lock, as a device would; the memory stays until it is done. */
static void unlocked(void) { at_work++; pthread_mutex_unlock(&lock); }
static void locked(void) { pthread_mutex_lock(&lock); at_work--; }
static void shut(int open) {
    if (arena_used) mprotect(outside, arena_used, open ? PROT_READ | PROT_WRITE : PROT_NONE);
}
static int illegal(void);
static int run_kernel(Device *d, Op *op) {
    void *table[MOST_PARAMS];
    size_t at = 0;
    for (int i = 0; i < op->function->count; i++) {
        table[i] = op->params + at;
        at += ((size_t)op->function->sizes[i] + 15) / 16 * 16;
    }
    if (op->function->known) return op->function->known(d, table);
    shut(1), open_count++; /* device memory is open while a kernel runs */
    unlocked();
    int code = op->function->entry(&op->range, table);
    locked();
    if (!--open_count) shut(0);
    return code ? illegal() : 0;
}

/* -- what streams do ------------------------------------------------------------------------------------- */

static double now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}
static void unmark(Mark *m) { if (m && !--m->refs) free(m); }
static Mark *remark(Mark *m) { if (m) m->refs++; return m; }

static int run_op(Device *d, Op *op) {
    switch (op->what) {
    case COPY: {
        void *src = op->staged ? op->staged : here(op->src);
        if (!reaches(d, op->dst, op->bytes, 1) || (!op->staged && !reaches(d, op->src, op->bytes, 1)))
            return illegal();
        unlocked();
        memcpy(here(op->dst), src, op->bytes);
        locked();
        return 0;
    }
    case SET:
        if (!reaches(d, op->dst, op->pitch * (op->rows - 1) + op->bytes * (unsigned)op->width, 0)) return illegal();
        unlocked();
        for (uint64_t row = 0; row < op->rows; row++) {
            char *to = (char *)here(op->dst) + row * op->pitch;
            if (op->width == 1) memset(to, op->pattern[0], op->bytes);
            else for (uint64_t i = 0; i < op->bytes; i++) memcpy(to + i * (unsigned)op->width, op->pattern, (size_t)op->width);
        }
        locked();
        return 0;
    case KERNEL: return run_kernel(d, op);
    case FREE: drop(op->memory); return 0;
    case RUN: return run_ops(d, op->exec);
    case RESET: op->mark->done = 0; return 0;
    case RECORD:
        if (--op->mark->left > 0) return 0;
        op->mark->done = 1, op->mark->at = now_s();
        if (op->dst) *(uint64_t *)here(op->dst) = (uint64_t)(op->mark->at * 1e9);
        return 0;
    }
    return 0;
}
static void drop_op(Op *op) {
    free(op->staged), free(op->params), unmark(op->mark);
    if (op->exec) drop_exec(op->exec);
    free(op);
}
static Op *copied(const Op *from) {
    Op *made = malloc(sizeof *made);
    *made = *from, made->next = NULL, remark(made->mark);
    if (from->params) {
        size_t bytes = 16;
        for (int i = 0; i < from->function->count; i++) bytes += ((size_t)from->function->sizes[i] + 15) / 16 * 16;
        made->params = memcpy(malloc(bytes), from->params, bytes);
    }
    return made;
}
static void *work(void *argument) {
    Stream *s = argument;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (!s->head && !s->destroyed) pthread_cond_wait(&changed, &lock);
        if (!s->head) break;
        Op *op = s->head;
        if (delay_us) {
            pthread_mutex_unlock(&lock);
            usleep(delay_us);
            pthread_mutex_lock(&lock);
        }
        while (op->what == WAIT && op->mark && !op->mark->done && !s->device->sticky)
            pthread_cond_wait(&changed, &lock);
        if (!s->device->sticky) {
            int code = run_op(s->device, op);
            if (code) s->device->sticky = code;
        }
        s->head = op->next;
        if (!s->head) s->tail = NULL;
        drop_op(op);
        pthread_cond_broadcast(&changed);
    }
    for (Stream **p = &streams; *p; p = &(*p)->next)
        if (*p == s) { *p = s->next; break; }
    free(s->deps), free(s);
    pthread_mutex_unlock(&lock);
    return NULL;
}
static Stream *new_stream(Device *device) {
    Stream *s = calloc(1, sizeof *s);
    pthread_t thread;
    s->device = device, s->next = streams, streams = s;
    pthread_create(&thread, NULL, work, s);
    pthread_detach(thread);
    live_things++;
    return s;
}
static Stream *known(Stream *s) {
    for (Stream *each = streams; each; each = each->next) if (each == s && !s->destroyed) return s;
    return NULL;
}
static void end_stream(Stream *s) {
    s->destroyed = 1, live_things--;
    pthread_cond_broadcast(&changed);
}
static void queue(Stream *s, Op *op) {
    if (s->tail) s->tail->next = op; else s->head = op;
    s->tail = op;
    pthread_cond_broadcast(&changed);
}

/* A stand-in for libcuda on a machine without a GPU: the symbols that the cuda driver binds, and no
 * other of the vendor's. It is strict about who calls what when (contexts, captures, memory that was
 * given back) and fails on demand. Its "device memory" is host memory, its streams are threads, and of
 * kernels it knows only a few names, so that order can be seen. It proves nothing about results.
 *
 * Faults: FAKE_CUDA_FAULT="SYMBOL:N:CODE,..." makes the N-th call of a symbol (0: each) return CODE;
 * fake_fail() does the same. FAKE_CUDA_DELAY_US delays each piece of queued work.
 * FAKE_CUDA_DEVICES, FAKE_CUDA_MEMORY (bytes each), FAKE_CUDA_VERSION.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <sys/mman.h>
#include <unistd.h>

enum { OK = 0, INVALID = 1, OOM = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, NO_CONTEXT = 201,
       NO_BINARY = 209, BAD_PTX = 218, BAD_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600,
       ILLEGAL_ADDRESS = 700, PEER_ALREADY = 704, ASSERT = 710, REGISTERED = 712,
       NOT_REGISTERED = 713, UNSUPPORTED = 801, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALID = 901,
       CAPTURE_MERGE = 902, CAPTURE_UNMATCHED = 903, CAPTURE_UNJOINED = 904,
       CAPTURE_ISOLATION = 905, CAPTURED_EVENT = 907, WRONG_THREAD = 908 };
enum { DEVICE, PINNED, MANAGED, POOLED, REGION };
#define MOST_DEVICES 4
#define MOST_DEPS 64
#define MOST_PARAMS 16
#define ARENA ((size_t)1 << 38)

typedef struct Device Device;
typedef struct Graph Graph;
typedef struct Node Node;

typedef struct Pool { Device *device; uint64_t reserved, used, threshold; unsigned shared; } Pool;
struct Device { int index, retained, sticky; unsigned peers; uint64_t plain; Pool pool; };
typedef struct Allocation {
    uint64_t ptr; size_t bytes; int kind, live; Device *device; struct Allocation *next;
} Allocation;
typedef struct Capture { Graph *graph; struct Stream *origin; int invalid, mode; pthread_t thread; } Capture;
/* One recording of an event: waits are for it, whatever is recorded later. */
typedef struct Mark { int left, done; double at; } Mark;
typedef struct Event {
    Mark *mark; int timing, destroyed; Device *device;
    Capture *capture; Node *deps[MOST_DEPS]; int count;
} Event;
typedef struct Function {
    Device *device; char name[64]; int count, sizes[MOST_PARAMS], dynamic, loaded;
} Function;
typedef struct Module { Device *device; char *text; Function *functions[32]; int count; } Module;
enum { COPY, SET, KERNEL, RECORD, WAIT, FREE, RUN };
typedef struct Op {
    int what; uint64_t dst, src, bytes, pitch, rows; uint32_t value; int width; void *staged;
    Function *function; unsigned dims[6], shared; unsigned char params[MOST_PARAMS][64];
    Mark *mark; Allocation *memory; struct Exec *exec; struct Op *next;
} Op;
struct Node { Op op; int index; };
struct Graph { Node *nodes[1024]; int count; Node *from[4096], *to[4096]; int edges; };
typedef struct Exec { Device *device; Graph *template; Op ops[1024]; int count; } Exec;
typedef struct Stream {
    Device *device; Op *head, *tail; int destroyed; pthread_t thread;
    Capture *capture; Node *deps[MOST_DEPS]; int count; struct Stream *next;
} Stream;
typedef struct Fault { char name[64]; int nth, code; } Fault;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static Device devices[MOST_DEVICES];
static int released, device_count, initialised, driver_version = 13000, reversed, attributes_off[256];
static uint64_t memory_bytes = (uint64_t)1 << 30;
static unsigned delay_us;
static Allocation *allocations;
static Stream *streams;
static char *arena;
static size_t arena_used;
static Fault faults[32];
static int fault_count;
static struct { char name[64]; int count; } counts[128];
static char *call_log;
static size_t log_size, log_room;
static __thread Device *stack[64];
static __thread int depth;

/* -- control, for tests ------------------------------------------------------------------------- */

void fake_fail(const char *name, int nth, int code) {
    pthread_mutex_lock(&lock);
    Fault *f = &faults[fault_count++ % 32];
    snprintf(f->name, sizeof f->name, "%s", name);
    f->nth = nth, f->code = code;
    for (int i = 0; i < 128; i++) /* counted from now on */
        if (!strcmp(counts[i].name, name)) counts[i].count = 0;
    pthread_mutex_unlock(&lock);
}
void fake_forgive(void) {
    pthread_mutex_lock(&lock);
    fault_count = 0;
    pthread_mutex_unlock(&lock);
}
void fake_release(int on) {
    pthread_mutex_lock(&lock);
    released = on;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}
int fake_retained(int index) { return devices[index].retained; }
int fake_streams(void) {
    int found = 0;
    pthread_mutex_lock(&lock);
    for (Stream *s = streams; s; s = s->next) found += !s->destroyed;
    pthread_mutex_unlock(&lock);
    return found;
}
void fake_version(int version) { driver_version = version; }
void fake_reverse(int on) { reversed = on; }
void fake_attribute_off(int number) { attributes_off[number] = 1; }
int fake_depth(void) { return depth; }
/* The calls so far, one a line: symbol and first arguments. */
const char *fake_calls(void) { return call_log ? call_log : ""; }
void fake_calls_clear(void) {
    pthread_mutex_lock(&lock);
    log_size = 0;
    if (call_log) call_log[0] = 0;
    pthread_mutex_unlock(&lock);
}
int fake_live(int kind) {
    int found = 0;
    pthread_mutex_lock(&lock);
    for (Allocation *a = allocations; a; a = a->next) found += a->live && a->kind == kind;
    pthread_mutex_unlock(&lock);
    return found;
}

/* -- each call begins here: noted, counted, perhaps failed. The lock is held on OK ---------------- */

static void note(const char *name, uint64_t a, uint64_t b) {
    if (log_room < log_size + 128) {
        log_room = log_room ? log_room * 2 : 1 << 16;
        call_log = realloc(call_log, log_room);
    }
    log_size += (size_t)snprintf(call_log + log_size, 128, "%s %llx %llx\n", name,
                                 (unsigned long long)a, (unsigned long long)b);
}

static int fault(const char *name) {
    int n = 0;
    for (int i = 0; i < 128; i++) {
        if (!counts[i].name[0]) snprintf(counts[i].name, sizeof counts[i].name, "%s", name);
        if (!strcmp(counts[i].name, name)) { n = ++counts[i].count; break; }
    }
    for (int i = 0; i < fault_count && i < 32; i++)
        if (!strcmp(faults[i].name, name) && (!faults[i].nth || faults[i].nth == n))
            return faults[i].code;
    return OK;
}

static int leave(int code) { pthread_mutex_unlock(&lock); return code; }

static int enter(const char *name, uint64_t a, uint64_t b) {
    pthread_mutex_lock(&lock);
    note(name, a, b);
    int code = fault(name);
    if (!code && !initialised) code = NOT_INITIALIZED;
    if (code) pthread_mutex_unlock(&lock);
    return code;
}
#define BARE(a, b) do { int f_ = enter(__func__, (uint64_t)(a), (uint64_t)(b)); if (f_) return f_; } while (0)
#define CURRENT (depth ? stack[depth - 1] : NULL)
/* The same, for what needs a context; a lost device answers everything with its error. */
#define CALL(a, b) BARE(a, b); Device *device = CURRENT; \
    if (!device || !device->retained) return leave(NO_CONTEXT); \
    if (device->sticky) return leave(device->sticky)

static Stream *known(Stream *s) {
    for (Stream *each = streams; each; each = each->next) if (each == s && !s->destroyed) return s;
    return NULL;
}
#define STREAM(s) do { if (!known(s) || (s)->device != device) return leave(BAD_HANDLE); } while (0)

/* -- memory ---------------------------------------------------------------------------------------- */

static Allocation *owner(uint64_t ptr) {
    for (Allocation *a = allocations; a; a = a->next)
        if (ptr >= a->ptr && ptr < a->ptr + a->bytes && (a->live || a->kind != REGION)) return a;
    return NULL;
}

static uint64_t take(Device *device, size_t bytes, int kind) {
    if (!arena) arena = mmap(NULL, ARENA, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    size_t size = (bytes + 4607) / 512 * 512; /* addresses are never used again */
    Allocation *a = calloc(1, sizeof *a);
    *a = (Allocation){(uint64_t)(arena + arena_used), bytes, kind, 1, device, allocations};
    arena_used += size;
    allocations = a;
    memset((void *)a->ptr, 0xAB, bytes < 4096 ? bytes : 4096);
    return a->ptr;
}

static uint64_t room(Device *d) { return memory_bytes - d->plain - d->pool.reserved; }

static void drop(Allocation *a) {
    a->live = 0;
    if (a->kind == POOLED) a->device->pool.used -= a->bytes;
    if (a->kind == DEVICE || a->kind == MANAGED) a->device->plain -= a->bytes;
    if (a->kind != REGION) memset((void *)a->ptr, 0xDD, a->bytes < 4096 ? a->bytes : 4096);
}

/* Whether the device may touch all of it now; memory of nobody is the host's. */
static int reaches(Device *d, uint64_t ptr, uint64_t bytes, int host_too) {
    Allocation *a = owner(ptr);
    if (!a) return host_too;
    if (!a->live || ptr + bytes > a->ptr + a->bytes) return 0;
    if (a->kind == PINNED || a->kind == MANAGED || a->kind == REGION || a->device == d) return 1;
    if (!(d->peers >> a->device->index & 1)) return 0;
    return a->kind != POOLED || (a->device->pool.shared >> d->index & 1);
}

/* -- what streams do ------------------------------------------------------------------------------- */

static int run_kernel(Device *d, Op *op) {
    const char *name = op->function->name;
    uint64_t ptr;
    int32_t value;
    memcpy(&ptr, op->params[0], 8);
    memcpy(&value, op->params[1], 4);
    if (!strcmp(name, "spin")) {
        pthread_mutex_unlock(&lock);
        usleep((useconds_t)(ptr / 1000));
        pthread_mutex_lock(&lock);
        return OK;
    }
    if (!strcmp(name, "hold")) { /* until the test lets it go */
        while (!released) pthread_cond_wait(&changed, &lock);
        return OK;
    }
    if (!strcmp(name, "stray")) return ILLEGAL_ADDRESS;
    if (!strcmp(name, "claim")) return ASSERT;
    if (strcmp(name, "add") && strcmp(name, "times") && strcmp(name, "store")) return OK;
    if (!reaches(d, ptr, 4, 0)) return ILLEGAL_ADDRESS;
    int32_t *p = (int32_t *)ptr;
    if (!strcmp(name, "add")) *p += value;
    else if (!strcmp(name, "times")) *p *= value;
    else if (!strcmp(name, "store")) *p = value;
    return OK;
}

static int run_op(Device *d, Op *op) {
    switch (op->what) {
    case COPY: {
        uint64_t src = op->staged ? (uint64_t)op->staged : op->src;
        if (!reaches(d, op->dst, op->bytes, 1) || (!op->staged && !reaches(d, src, op->bytes, 1)))
            return ILLEGAL_ADDRESS;
        memcpy((void *)op->dst, (void *)src, op->bytes);
        free(op->staged);
        op->staged = NULL;
        return OK;
    }
    case SET:
        if (!reaches(d, op->dst, op->pitch * (op->rows - 1) + op->bytes * (unsigned)op->width, 0))
            return ILLEGAL_ADDRESS;
        for (uint64_t row = 0; row < op->rows; row++)
            for (uint64_t i = 0; i < op->bytes; i++)
                memcpy((char *)op->dst + row * op->pitch + i * (unsigned)op->width, &op->value,
                       (size_t)op->width);
        return OK;
    case KERNEL: return run_kernel(d, op);
    case FREE: drop(op->memory); return OK;
    case RUN:
        for (int i = 0; i < op->exec->count; i++) {
            int code = run_op(d, &op->exec->ops[i]);
            if (code) return code;
        }
        return OK;
    case RECORD:
        if (--op->mark->left > 0) return OK;
        op->mark->done = 1;
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        op->mark->at = (double)now.tv_sec + (double)now.tv_nsec / 1e9;
        return OK;
    }
    return OK;
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
        free(op);
        pthread_cond_broadcast(&changed);
    }
    pthread_mutex_unlock(&lock);
    return NULL;
}

static Op *queue(Stream *s, Op op) {
    Op *made = malloc(sizeof *made);
    *made = op;
    made->next = NULL;
    if (s->tail) s->tail->next = made; else s->head = made;
    s->tail = made;
    pthread_cond_broadcast(&changed);
    return made;
}

/* Queued, or noted when the stream is being captured. */
static int submit(Stream *s, Op op) {
    if (!s->capture) { queue(s, op); return OK; }
    if (s->capture->invalid) return CAPTURE_INVALID;
    Graph *g = s->capture->graph;
    if (g->count >= 1024) return OOM;
    Node *node = calloc(1, sizeof *node);
    node->op = op;
    node->index = g->count;
    g->nodes[g->count++] = node;
    for (int i = 0; i < s->count; i++) g->from[g->edges] = s->deps[i], g->to[g->edges++] = node;
    s->deps[0] = node, s->count = 1;
    return OK;
}

/* Asking for what is only noted breaks the capture. */
static int broken(Stream *s) {
    if (!s->capture) return OK;
    s->capture->invalid = 1;
    return CAPTURE_UNSUPPORTED;
}

static int finish(Stream *s) {
    while (s->head && !s->device->sticky) pthread_cond_wait(&changed, &lock);
    return s->device->sticky;
}

/* -- the driver and its devices -------------------------------------------------------------------- */

static void uuid_of(int index, unsigned char *out) {
    for (int i = 0; i < 16; i++) out[i] = (unsigned char)(i * 17);
    out[15] = (unsigned char)index;
}

static int order[MOST_DEVICES];

int cuInit(unsigned flags) {
    pthread_mutex_lock(&lock);
    note("cuInit", flags, 0);
    if (!initialised) {
        const char *text;
        char copy[1024], *save = NULL;
        if ((text = getenv("FAKE_CUDA_MEMORY"))) memory_bytes = strtoull(text, NULL, 10);
        if ((text = getenv("FAKE_CUDA_DELAY_US"))) delay_us = (unsigned)atoi(text);
        if ((text = getenv("FAKE_CUDA_VERSION"))) driver_version = atoi(text);
        int all = (text = getenv("FAKE_CUDA_DEVICES")) ? atoi(text) : 2;
        for (int i = 0; i < MOST_DEVICES; i++) devices[i].index = i, devices[i].pool.device = &devices[i];
        if ((text = getenv("CUDA_VISIBLE_DEVICES"))) {
            snprintf(copy, sizeof copy, "%s", text);
            for (char *p = strtok_r(copy, ",", &save); p; p = strtok_r(NULL, ",", &save))
                for (int i = 0; i < all && i < MOST_DEVICES; i++) {
                    unsigned char u[16];
                    char name[64];
                    uuid_of(i, u);
                    snprintf(name, sizeof name, "GPU-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x",
                             u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9], u[10], u[11],
                             u[12], u[13], u[14], u[15]);
                    if (!strcmp(name, p) && device_count < MOST_DEVICES) order[device_count++] = i;
                }
        } else
            for (int i = 0; i < all && i < MOST_DEVICES; i++) order[device_count++] = i;
        if ((text = getenv("FAKE_CUDA_FAULT"))) {
            snprintf(copy, sizeof copy, "%s", text);
            for (char *p = strtok_r(copy, ",", &save); p && fault_count < 32; p = strtok_r(NULL, ",", &save)) {
                Fault *f = &faults[fault_count];
                if (sscanf(p, "%63[^:]:%d:%d", f->name, &f->nth, &f->code) == 3) fault_count++;
            }
        }
    }
    int code = fault("cuInit");
    if (!code && !device_count) code = NO_DEVICE;
    if (!code) initialised = 1;
    return leave(code);
}

int cuDriverGetVersion(int *version) { *version = driver_version; return OK; }

int cuGetErrorName(int code, const char **out) {
    static __thread char text[32];
    static const struct { int code; const char *name; } names[] = {
        {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"},
        {201, "CUDA_ERROR_INVALID_CONTEXT"}, {400, "CUDA_ERROR_INVALID_HANDLE"},
        {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {710, "CUDA_ERROR_ASSERT"}, {719, "CUDA_ERROR_LAUNCH_FAILED"},
        {801, "CUDA_ERROR_NOT_SUPPORTED"}, {218, "CUDA_ERROR_INVALID_PTX"}};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (names[i].code == code) { *out = names[i].name; return OK; }
    snprintf(text, sizeof text, "FAKE_ERROR_%d", code);
    *out = text;
    return OK;
}
int cuGetErrorString(int code, const char **out) { (void)code; *out = "of the fake"; return OK; }

int cuDeviceGetCount(int *count) { BARE(0, 0); *count = device_count; return leave(OK); }
int cuDeviceGet(int *device, int ordinal) {
    BARE(ordinal, 0);
    if (ordinal < 0 || ordinal >= device_count) return leave(101);
    *device = ordinal;
    return leave(OK);
}
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { BARE(device, 0); uuid_of(order[device], uuid); return leave(OK); }
int cuDeviceGetUuid(unsigned char *uuid, int device) { BARE(device, 0); uuid_of(order[device], uuid); return leave(OK); }
int cuDeviceGetAttribute(int *out, int number, int device) {
    BARE(number, device);
    if (attributes_off[number & 255]) return leave(INVALID);
    switch (number) {
    case 1: case 2: case 3: *out = 1024; break;
    case 4: *out = 64; break;
    case 5: *out = 2147483647; break;
    case 6: case 7: *out = 65535; break;
    case 8: *out = 49152; break;
    case 75: *out = 9; break;
    case 76: *out = 0; break;
    case 83: case 89: case 115: *out = 1; break;
    case 97: *out = 232448; break;
    case 100: *out = 0; break;
    default: return leave(INVALID);
    }
    return leave(OK);
}

/* -- contexts: a device is its own context ----------------------------------------------------------- */

int cuDevicePrimaryCtxRetain(Device **context, int device) {
    BARE(device, 0);
    Device *d = &devices[order[device]];
    if (d->sticky) return leave(d->sticky);
    d->retained++;
    *context = d;
    return leave(OK);
}
int cuDevicePrimaryCtxRelease_v2(int device) {
    BARE(device, 0);
    Device *d = &devices[order[device]];
    if (!d->retained) return leave(NO_CONTEXT);
    d->retained--;
    return leave(OK);
}
int cuCtxGetCurrent(Device **context) { *context = CURRENT; return OK; }
int cuCtxSetCurrent(Device *context) {
    BARE(context, 0);
    if (!depth) depth = 1;
    stack[depth - 1] = context;
    if (!context) depth--;
    return leave(OK);
}
int cuCtxPushCurrent_v2(Device *context) { BARE(context, 0); stack[depth++] = context; return leave(OK); }
int cuCtxPopCurrent_v2(Device **context) {
    BARE(0, 0);
    if (!depth) return leave(NO_CONTEXT);
    *context = stack[--depth];
    return leave(OK);
}
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { CALL(0, 0); *least = 0, *greatest = -5; return leave(OK); }

static int captures_in(Device *device) {
    for (Stream *s = streams; s; s = s->next) if (s->device == device && s->capture) return s->capture->invalid = 1;
    return 0;
}
int cuCtxSynchronize(void) {
    CALL(0, 0);
    if (captures_in(device)) return leave(CAPTURE_UNSUPPORTED);
    for (Stream *s = streams; s; s = s->next)
        if (s->device == device && finish(s)) return leave(device->sticky);
    return leave(OK);
}

/* -- allocation ---------------------------------------------------------------------------------------- */

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    CALL(0, 0);
    *free_bytes = room(device), *total = memory_bytes;
    return leave(OK);
}
int cuMemAlloc_v2(uint64_t *out, size_t bytes) {
    CALL(bytes, 0);
    if (!bytes) return leave(INVALID);
    if (bytes > room(device)) return leave(OOM);
    device->plain += bytes;
    *out = take(device, bytes, DEVICE);
    return leave(OK);
}
static int give(Device *device, uint64_t ptr, int host) {
    Allocation *a = owner(ptr);
    (void)device;
    if (!a || a->ptr != ptr || !a->live || (a->kind == PINNED) != host || a->kind == REGION) return INVALID;
    drop(a);
    return OK;
}
/* As on hardware, memory that is no pool's is given back when all that was queued is done. */
int cuMemFree_v2(uint64_t ptr) {
    CALL(ptr, 0);
    for (Stream *s = streams; s; s = s->next) if (s->device == device) finish(s);
    return leave(give(device, ptr, 0));
}
int cuMemAllocAsync(uint64_t *out, size_t bytes, Stream *s) {
    CALL(bytes, s);
    STREAM(s);
    if (s->capture) { s->capture->invalid = 1; return leave(CAPTURE_UNSUPPORTED); }
    Pool *p = &device->pool;
    if (p->used + bytes > p->reserved) {
        if (bytes > room(device) + p->reserved - p->used) return leave(OOM);
        p->reserved = p->used + bytes;
    }
    p->used += bytes;
    *out = take(device, bytes, POOLED);
    return leave(OK);
}
int cuMemFreeAsync(uint64_t ptr, Stream *s) {
    CALL(ptr, s);
    STREAM(s);
    Allocation *a = owner(ptr);
    if (!a || a->ptr != ptr || !a->live || a->kind != POOLED) return leave(INVALID);
    if (s->capture) { s->capture->invalid = 1; return leave(INVALID); }
    return leave(submit(s, (Op){.what = FREE, .memory = a}));
}
int cuDeviceGetMemPool(Pool **pool, int device) { BARE(device, 0); *pool = &devices[order[device]].pool; return leave(OK); }
static uint64_t *pool_value(Pool *p, int name) {
    return name == 4 ? &p->threshold : name == 5 ? &p->reserved : name == 7 ? &p->used : NULL;
}
int cuMemPoolSetAttribute(Pool *p, int name, uint64_t *value) {
    BARE(name, *value);
    if (name != 4) return leave(INVALID);
    p->threshold = *value;
    return leave(OK);
}
int cuMemPoolGetAttribute(Pool *p, int name, uint64_t *value) {
    BARE(p, name);
    if (!pool_value(p, name)) return leave(INVALID);
    *value = *pool_value(p, name);
    return leave(OK);
}
int cuMemPoolTrimTo(Pool *p, size_t keep) {
    BARE(p, keep);
    uint64_t least = p->used > keep ? p->used : keep;
    if (p->reserved > least) p->reserved = least;
    return leave(OK);
}
struct Access { int type, id, flags; };
int cuMemPoolSetAccess(Pool *p, const struct Access *access, size_t count) {
    BARE(access->id, access->flags);
    for (size_t i = 0; i < count; i++) {
        if (access[i].type != 1 || access[i].id < 0 || access[i].id >= device_count) return leave(INVALID);
        unsigned bit = 1u << order[access[i].id];
        p->shared = access[i].flags == 3 ? p->shared | bit : p->shared & ~bit;
    }
    return leave(OK);
}
int cuMemHostAlloc(uint64_t *out, size_t bytes, unsigned flags) {
    CALL(bytes, flags);
    if (bytes > memory_bytes) return leave(OOM);
    *out = take(device, bytes, PINNED);
    return leave(OK);
}
int cuMemFreeHost(uint64_t ptr) { CALL(ptr, 0); return leave(give(device, ptr, 1)); }
int cuMemHostRegister_v2(uint64_t ptr, size_t bytes, unsigned flags) {
    CALL(ptr, flags);
    if (owner(ptr) || owner(ptr + bytes - 1)) return leave(REGISTERED);
    Allocation *a = calloc(1, sizeof *a);
    *a = (Allocation){ptr, bytes, REGION, 1, device, allocations};
    allocations = a;
    return leave(OK);
}
int cuMemHostUnregister(uint64_t ptr) {
    CALL(ptr, 0);
    Allocation *a = owner(ptr);
    if (!a || a->kind != REGION || a->ptr != ptr) return leave(NOT_REGISTERED);
    a->live = 0;
    return leave(OK);
}
int cuMemAllocManaged(uint64_t *out, size_t bytes, unsigned flags) {
    CALL(bytes, flags);
    if (flags != 1) return leave(INVALID);
    if (bytes > room(device)) return leave(OOM);
    device->plain += bytes;
    *out = take(device, bytes, MANAGED);
    return leave(OK);
}
int cuPointerGetAttribute(void *out, int name, uint64_t ptr) {
    CALL(ptr, name);
    Allocation *a = owner(ptr);
    if (name != 2 || !a || !a->live) return leave(INVALID);
    *(unsigned *)out = a->kind == PINNED || a->kind == REGION ? 1 : 2;
    return leave(OK);
}

/* -- copies and fills ------------------------------------------------------------------------------------ */

static int copy(Stream *s, uint64_t dst, uint64_t src, size_t bytes, int must_dst, int must_src) {
    if ((must_dst && !owner(dst)) || (must_src && !owner(src))) return INVALID;
    Op op = {.what = COPY, .dst = dst, .src = src, .bytes = bytes};
    int from_pageable = !owner(src), to_pageable = !owner(dst);
    if (s->capture) return submit(s, op);
    if (from_pageable && !to_pageable) {
        op.staged = malloc(bytes);
        memcpy(op.staged, (void *)src, bytes);
    }
    int code = submit(s, op);
    return code || !to_pageable ? code : finish(s);
}
int cuMemcpyAsync(uint64_t dst, uint64_t src, size_t n, Stream *s) { CALL(dst, src); STREAM(s); return leave(copy(s, dst, src, n, 0, 0)); }
int cuMemcpyHtoDAsync_v2(uint64_t dst, uint64_t src, size_t n, Stream *s) { CALL(dst, src); STREAM(s); return leave(copy(s, dst, src, n, 1, 0)); }
int cuMemcpyDtoHAsync_v2(uint64_t dst, uint64_t src, size_t n, Stream *s) { CALL(dst, src); STREAM(s); return leave(copy(s, dst, src, n, 0, 1)); }
int cuMemcpyDtoDAsync_v2(uint64_t dst, uint64_t src, size_t n, Stream *s) { CALL(dst, src); STREAM(s); return leave(copy(s, dst, src, n, 1, 1)); }
int cuMemcpyPeerAsync(uint64_t dst, Device *to, uint64_t src, Device *from, size_t n, Stream *s) {
    CALL(dst, src);
    STREAM(s);
    Allocation *a = owner(dst), *b = owner(src);
    if (!a || !b || a->device != to || b->device != from) return leave(INVALID);
    return leave(copy(s, dst, src, n, 1, 1));
}
int cuMemcpyPeer(uint64_t dst, Device *to, uint64_t src, Device *from, size_t n) {
    CALL(dst, src);
    Allocation *a = owner(dst), *b = owner(src);
    if (!a || !b || a->device != to || b->device != from) return leave(INVALID);
    memcpy((void *)dst, (void *)src, n);
    return leave(OK);
}
static int set(Stream *s, uint64_t dst, uint32_t value, int width, size_t count, size_t pitch, size_t rows) {
    if (!owner(dst) || dst % (unsigned)width || pitch % (unsigned)width) return INVALID;
    if (rows > 1 && pitch < count * (unsigned)width) return INVALID;
    return submit(s, (Op){.what = SET, .dst = dst, .value = value, .width = width, .bytes = count,
                          .pitch = pitch, .rows = rows});
}
int cuMemsetD8Async(uint64_t dst, unsigned char v, size_t n, Stream *s) { CALL(dst, n); STREAM(s); return leave(set(s, dst, v, 1, n, 0, 1)); }
int cuMemsetD16Async(uint64_t dst, unsigned short v, size_t n, Stream *s) { CALL(dst, n); STREAM(s); return leave(set(s, dst, v, 2, n, 0, 1)); }
int cuMemsetD32Async(uint64_t dst, unsigned v, size_t n, Stream *s) { CALL(dst, n); STREAM(s); return leave(set(s, dst, v, 4, n, 0, 1)); }
int cuMemsetD2D32Async(uint64_t dst, size_t pitch, unsigned v, size_t width, size_t rows, Stream *s) {
    CALL(dst, rows);
    STREAM(s);
    return leave(set(s, dst, v, 4, width, pitch, rows));
}

/* -- streams and events ------------------------------------------------------------------------------------ */

int cuStreamCreateWithPriority(Stream **out, unsigned flags, int priority) {
    CALL(flags, (unsigned)priority);
    if (flags != 1 || priority > 0 || priority < -5) return leave(INVALID);
    Stream *s = calloc(1, sizeof *s);
    s->device = device, s->next = streams, streams = s;
    pthread_create(&s->thread, NULL, work, s);
    pthread_detach(s->thread);
    *out = s;
    return leave(OK);
}
int cuStreamDestroy_v2(Stream *s) {
    CALL(s, 0);
    STREAM(s);
    s->destroyed = 1;
    pthread_cond_broadcast(&changed);
    return leave(OK);
}
int cuStreamQuery(Stream *s) {
    CALL(s, 0);
    STREAM(s);
    int code = broken(s);
    if (!code && !s->head && device->pool.reserved > device->pool.threshold)
        device->pool.reserved = device->pool.used > device->pool.threshold ? device->pool.used : device->pool.threshold;
    return leave(code ? code : s->head ? NOT_READY : OK);
}
int cuStreamIsCapturing(Stream *s, int *status) {
    CALL(s, 0);
    STREAM(s);
    *status = !s->capture ? 0 : s->capture->invalid ? 2 : 1;
    return leave(OK);
}
int cuStreamWaitEvent(Stream *s, Event *e, unsigned flags) {
    CALL(s, e);
    (void)flags;
    STREAM(s);
    if (e->destroyed) return leave(BAD_HANDLE);
    if (e->capture) {
        if (s->capture && s->capture != e->capture) return leave(CAPTURE_MERGE);
        s->capture = e->capture;
        for (int i = 0; i < e->count && s->count < MOST_DEPS; i++) s->deps[s->count++] = e->deps[i];
        return leave(OK);
    }
    if (s->capture) { s->capture->invalid = 1; return leave(CAPTURE_ISOLATION); }
    return leave(submit(s, (Op){.what = WAIT, .mark = e->mark}));
}
int cuEventCreate(Event **out, unsigned flags) {
    CALL(flags, 0);
    Event *e = calloc(1, sizeof *e);
    e->device = device, e->timing = flags == 0;
    *out = e;
    return leave(OK);
}
int cuEventDestroy_v2(Event *e) {
    CALL(e, 0);
    if (e->destroyed) return leave(BAD_HANDLE);
    e->destroyed = 1; /* what waits for it still does */
    return leave(OK);
}
int cuEventRecord(Event *e, Stream *s) {
    CALL(e, s);
    STREAM(s);
    if (e->device != device || e->destroyed) return leave(BAD_HANDLE);
    if (s->capture) {
        e->capture = s->capture, e->count = s->count;
        memcpy(e->deps, s->deps, sizeof e->deps);
        return leave(OK);
    }
    e->capture = NULL, e->mark = calloc(1, sizeof *e->mark), e->mark->left = 1;
    return leave(submit(s, (Op){.what = RECORD, .mark = e->mark}));
}
int cuCtxRecordEvent(Device *context, Event *e) {
    CALL(context, e);
    if (e->device != context || e->destroyed) return leave(BAD_HANDLE);
    if (captures_in(context)) return leave(CAPTURE_UNSUPPORTED);
    e->mark = calloc(1, sizeof *e->mark);
    for (Stream *s = streams; s; s = s->next) if (s->device == context && s->head) e->mark->left++;
    if (!e->mark->left) e->mark->done = 1;
    for (Stream *s = streams; s; s = s->next)
        if (s->device == context && s->head) queue(s, (Op){.what = RECORD, .mark = e->mark});
    return leave(OK);
}
int cuEventQuery(Event *e) {
    CALL(e, 0);
    if (e->destroyed) return leave(BAD_HANDLE);
    if (e->capture) { e->capture->invalid = 1; return leave(CAPTURED_EVENT); } /* seen on an H100 */
    return leave(!e->mark || e->mark->done ? OK : NOT_READY);
}
static int elapsed(float *out, Event *a, Event *b) {
    if (!a->timing || !b->timing || !a->mark || !b->mark) return BAD_HANDLE;
    if (!a->mark->done || !b->mark->done) return NOT_READY;
    *out = (float)((b->mark->at - a->mark->at) * 1e3);
    return OK;
}
int cuEventElapsedTime(float *out, Event *a, Event *b) { CALL(a, b); return leave(elapsed(out, a, b)); }
int cuEventElapsedTime_v2(float *out, Event *a, Event *b) { CALL(a, b); return leave(elapsed(out, a, b)); }

/* -- modules and kernels: PTX text, of which the entries and the sizes of their parameters are read ---------- */

int cuModuleLoadDataEx(Module **out, const char *image, unsigned count, int *options, void **values) {
    CALL(count, 0);
    if (!memcmp(image, "\177ELF", 4)) image += 4;
    if (!strstr(image, ".entry")) {
        for (unsigned i = 0; i < count; i++)
            if (options[i] == 5) snprintf(values[i], 64, "line 3: a word that the fake does not know");
        return leave(strstr(image, "sm_99") ? NO_BINARY : BAD_PTX);
    }
    Module *m = calloc(1, sizeof *m);
    m->device = device, m->text = strdup(image);
    *out = m;
    return leave(OK);
}
int cuModuleUnload(Module *m) { CALL(m, 0); m->text[0] = 0; return leave(OK); }
int cuModuleGetFunction(Function **out, Module *m, const char *name) {
    CALL(m, 0);
    char entry[80];
    snprintf(entry, sizeof entry, ".entry %s(", name);
    const char *at = strstr(m->text, entry);
    if (!at) return leave(NOT_FOUND);
    for (int i = 0; i < m->count; i++)
        if (!strcmp(m->functions[i]->name, name)) { *out = m->functions[i]; return leave(OK); }
    Function *f = calloc(1, sizeof *f);
    f->device = m->device, f->dynamic = 49152;
    snprintf(f->name, sizeof f->name, "%s", name);
    const char *end = strchr(at, ')');
    while ((at = strstr(at, ".param .")) && at < end) {
        at += 8;
        f->sizes[f->count++] = atoi(at + 1) / 8;
    }
    m->functions[m->count++] = f;
    *out = f;
    return leave(OK);
}
int cuFuncGetAttribute(int *out, int name, Function *f) {
    CALL(f, name);
    *out = name == 0 ? 1024 : name == 4 ? 16 : name == 8 ? f->dynamic : 0;
    return leave(OK);
}
int cuFuncSetAttribute(Function *f, int name, int value) {
    CALL(f, value);
    if (name != 8 || value > 232448) return leave(INVALID);
    f->dynamic = value;
    return leave(OK);
}
int cuFuncLoad(Function *f) { CALL(f, 0); f->loaded = 1; return leave(OK); }
int cuFuncGetParamInfo(Function *f, size_t index, size_t *offset, size_t *size) {
    CALL(f, index);
    if (index >= (size_t)f->count) return leave(INVALID);
    *offset = 8 * index, *size = (size_t)f->sizes[index];
    return leave(OK);
}
static int kernel(Op *op, Device *device, Function *f, const unsigned *dims, unsigned shared, void **params) {
    if (f->device != device) return BAD_HANDLE;
    for (int i = 0; i < 6; i++) if (!dims[i]) return INVALID;
    if ((int)shared > f->dynamic || dims[3] * dims[4] * dims[5] > 1024) return INVALID;
    *op = (Op){.what = KERNEL, .function = f, .shared = shared};
    memcpy(op->dims, dims, sizeof op->dims);
    for (int i = 0; i < f->count; i++) memcpy(op->params[i], params[i], (size_t)f->sizes[i]);
    return OK;
}
int cuLaunchKernel(Function *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, Stream *s, void **params, void **extra) {
    CALL(f, s);
    (void)extra;
    STREAM(s);
    Op op;
    int code = kernel(&op, device, f, (unsigned[]){gx, gy, gz, bx, by, bz}, shared, params);
    return leave(code ? code : submit(s, op));
}

/* -- capture and graphs ---------------------------------------------------------------------------------------- */

int cuStreamBeginCapture_v2(Stream *s, int mode) {
    CALL(s, mode);
    STREAM(s);
    if (s->capture) return leave(903);
    Capture *c = calloc(1, sizeof *c);
    c->graph = calloc(1, sizeof *c->graph);
    c->origin = s, c->mode = mode, c->thread = pthread_self();
    s->capture = c, s->count = 0;
    return leave(OK);
}
static int behind(Graph *g, Node *node, Node **ends, int count, int *seen) {
    for (int i = 0; i < count; i++) if (ends[i] == node) return 1;
    for (int i = 0; i < g->edges; i++)
        if (g->from[i] == node && !seen[g->to[i]->index] && (seen[g->to[i]->index] = 1) &&
            behind(g, g->to[i], ends, count, seen)) return 1;
    return 0;
}
int cuStreamEndCapture(Stream *s, Graph **out) {
    CALL(s, 0);
    STREAM(s);
    *out = NULL;
    Capture *c = s->capture;
    if (!c) return leave(CAPTURE_UNMATCHED);
    if (c->mode != 2 && !pthread_equal(c->thread, pthread_self())) return leave(WRONG_THREAD);
    int code = c->invalid ? CAPTURE_INVALID : OK;
    for (Stream *each = streams; each; each = each->next) {
        if (each->capture != c) continue;
        for (int i = 0; each != s && i < each->count; i++) {
            int seen[1024] = {0};
            if (!behind(c->graph, each->deps[i], s->deps, s->count, seen) && !code) code = CAPTURE_UNJOINED;
        }
        if (each != s) each->capture = NULL, each->count = 0;
    }
    s->capture = NULL, s->count = 0;
    if (!code) *out = c->graph;
    return leave(code);
}
static int instantiate(Exec **out, Graph *g, Device *device) {
    Exec *e = calloc(1, sizeof *e);
    e->device = device, e->template = g, e->count = g->count;
    for (int i = 0; i < g->count; i++) e->ops[i] = g->nodes[i]->op;
    *out = e;
    return OK;
}
int cuGraphInstantiate_v2(Exec **out, Graph *g, Node **node, char *text, size_t n) {
    CALL(g, 0);
    (void)node, (void)text, (void)n;
    return leave(instantiate(out, g, device));
}
int cuGraphInstantiateWithFlags(Exec **out, Graph *g, unsigned long long flags) { CALL(g, flags); return leave(instantiate(out, g, device)); }
int cuGraphLaunch(Exec *e, Stream *s) {
    CALL(e, s);
    STREAM(s);
    Exec *now = malloc(sizeof *now); /* later changes do not reach it */
    *now = *e;
    return leave(submit(s, (Op){.what = RUN, .exec = now}));
}
int cuGraphExecDestroy(Exec *e) { CALL(e, 0); free(e); return leave(OK); }
int cuGraphDestroy(Graph *g) { CALL(g, 0); g->count = -1; return leave(OK); }
int cuGraphGetNodes(Graph *g, Node **nodes, size_t *count) {
    CALL(g, 0);
    if (nodes)
        for (int i = 0; i < g->count; i++) nodes[i] = g->nodes[reversed ? g->count - 1 - i : i];
    *count = (size_t)g->count;
    return leave(OK);
}
int cuGraphGetEdges(Graph *g, Node **from, Node **to, size_t *count) {
    CALL(g, 0);
    if (from)
        for (int i = 0; i < g->edges; i++) from[i] = g->from[i], to[i] = g->to[i];
    *count = (size_t)g->edges;
    return leave(OK);
}
int cuGraphNodeGetType(Node *node, int *type) { CALL(node, 0); *type = node->op.what == KERNEL ? 0 : 1; return leave(OK); }
typedef struct { Function *func; unsigned dims[6], shared; void **params, **extra; void *kern, *ctx; } Params;
static int node_params(Node *node, Params *out, size_t size) {
    if (node->op.what != KERNEL) return INVALID;
    memset(out, 0, size);
    out->func = node->op.function;
    return OK;
}
int cuGraphKernelNodeGetParams(Node *node, Params *out) { CALL(node, 0); return leave(node_params(node, out, 56)); }
int cuGraphKernelNodeGetParams_v2(Node *node, Params *out) { CALL(node, 0); return leave(node_params(node, out, sizeof *out)); }
static int change(Exec *e, Node *node, const Params *p) {
    if (e->template->count <= node->index || e->template->nodes[node->index] != node) return INVALID;
    return kernel(&e->ops[node->index], e->device, p->func, p->dims, p->shared, p->params);
}
int cuGraphExecKernelNodeSetParams(Exec *e, Node *node, const Params *p) { CALL(e, node->index); return leave(change(e, node, p)); }
int cuGraphExecKernelNodeSetParams_v2(Exec *e, Node *node, const Params *p) { CALL(e, node->index); return leave(change(e, node, p)); }

/* -- peers ------------------------------------------------------------------------------------------------------- */

int cuDeviceCanAccessPeer(int *able, int device, int peer) { BARE(device, peer); *able = device != peer; return leave(OK); }
int cuCtxEnablePeerAccess(Device *peer, unsigned flags) {
    CALL(peer, flags);
    if (peer == device || !peer->retained) return leave(101);
    if (device->peers >> peer->index & 1) return leave(PEER_ALREADY);
    device->peers |= 1u << peer->index;
    return leave(OK);
}

/* -- other processes: here the same one, so that a handle is an address -------------------------------------------- */

int cuMemGetAddressRange_v2(uint64_t *base, size_t *bytes, uint64_t ptr) {
    CALL(ptr, 0);
    Allocation *a = owner(ptr);
    if (!a || !a->live) return leave(INVALID);
    *base = a->ptr, *bytes = a->bytes;
    return leave(OK);
}
typedef struct { unsigned char reserved[64]; } Handle;
int cuIpcGetMemHandle(Handle *handle, uint64_t ptr) {
    CALL(ptr, 0);
    Allocation *a = owner(ptr);
    if (!a || !a->live || a->ptr != ptr || a->kind != DEVICE) return leave(INVALID);
    memset(handle, 0x5A, sizeof *handle);
    memcpy(handle->reserved, &ptr, sizeof ptr);
    return leave(OK);
}
int cuIpcOpenMemHandle_v2(uint64_t *out, Handle handle, unsigned flags) {
    CALL(flags, 0);
    uint64_t ptr;
    memcpy(&ptr, handle.reserved, sizeof ptr);
    Allocation *a = owner(ptr);
    if (!a || !a->live || handle.reserved[63] != 0x5A) return leave(BAD_HANDLE);
    if (a->device != device) {
        if (flags != 1) return leave(INVALID);
        device->peers |= 1u << a->device->index;
    }
    *out = ptr;
    return leave(OK);
}
int cuIpcCloseMemHandle(uint64_t ptr) { CALL(ptr, 0); return leave(owner(ptr) ? OK : INVALID); }

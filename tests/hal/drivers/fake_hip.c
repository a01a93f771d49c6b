/* A stand-in for libamdhip64 (and hiprtc, which ROCm 5.2 has in the same library) on a machine without
 * a GPU: the symbols that the hip driver binds. See fake_core.h for what it is and how it is told to
 * fail. With -DR0000 it is a library of ROCm 5.7: no R0600 symbols, the older hipDeviceProp_t.
 */
#define FAKE "FAKE_HIP"
#include "fake_core.h"

enum { OK = 0, INVALID = 1, OOM = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
       INVALID_IMAGE = 200, NO_BINARY = 209, BAD_HANDLE = 400, NOT_FOUND = 500, NOT_READY = 600,
       ILLEGAL_ADDRESS = 700, PEER_ALREADY = 704, REGISTERED = 712, NOT_REGISTERED = 713,
       CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALID = 901, CAPTURE_MERGE = 902, CAPTURE_UNMATCHED = 903,
       CAPTURE_UNJOINED = 904, CAPTURE_ISOLATION = 905, CAPTURED_EVENT = 907 };

typedef struct Node { Op *op; int index; } Node;
typedef struct Graph { Node **nodes; int count, room; Node **from, **to; int edges, edge_room; } Graph;
typedef struct Capture { Graph *graph; int invalid, refs; } Capture;
typedef struct Exec { int refs; Device *device; Graph *template; Op **ops; int count; } Exec;
typedef struct Event {
    Mark *mark; int timing, destroyed; Device *device; Capture *capture; Node **deps; int count;
} Event;

static int is_lost(int code) { return code == 214 || code == 700 || code == 709 || code == 710 || code == 719; }
static int illegal(void) { return ILLEGAL_ADDRESS; }

static int initialised, visible[MOST_DEVICES];
static __thread int current, last_error;

/* Each result is also the thread's last error, as in HIP: torch looks at it after its own launches. */
static int result(int code) { if (code) last_error = code; return code; }
#define DONE(code) return result(leave(code))
#define BARE(device) do { int f_ = enter(__func__, device); if (f_) return result(f_); \
    if (!initialised) DONE(NOT_INITIALIZED); } while (0)
#define CALL Device *device = &devices[visible[current]]; BARE(device)
/* HIP's functions go by the stream's device, most of them; ours insist that it is the current one. */
#define STREAM(s) do { if (!known(s) || (s)->device != device) DONE(BAD_HANDLE); } while (0)

/* -- the library and its devices ------------------------------------------------------------------------ */

static void name_of(int index, char *out) { snprintf(out, 17, "fa4e%012x", index); }

static void see(void) {
    int all = device_count, seen[MOST_DEVICES], count = 0;
    for (int i = 0; i < all; i++) seen[count++] = i;
    const char *names[] = {"ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"};
    for (int n = 0; n < 2; n++) {
        const char *text = getenv(names[n]);
        if (!text) continue;
        char copy[512], *save = NULL;
        int next[MOST_DEVICES], kept = 0;
        snprintf(copy, sizeof copy, "%s", text);
        for (char *p = strtok_r(copy, ",", &save); p; p = strtok_r(NULL, ",", &save)) {
            int found = -1;
            if (!strncmp(p, "GPU-", 4)) {
                for (int i = 0; i < count; i++) {
                    char uuid[17];
                    name_of(seen[i], uuid);
                    if (!strcmp(uuid, p + 4)) found = seen[i];
                }
            } else if (*p >= '0' && *p <= '9' && atoi(p) < count)
                found = seen[atoi(p)];
            if (found < 0 || kept == MOST_DEVICES) break;
            next[kept++] = found;
        }
        memcpy(seen, next, sizeof seen), count = kept;
    }
    memcpy(visible, seen, sizeof visible), device_count = count;
}
int hipInit(unsigned flags) {
    (void)flags;
    int code = enter(__func__, NULL);
    if (code) return result(code);
    if (!initialised) see();
    if (!device_count) DONE(INVALID_DEVICE); /* as ROCm 5.2 says it */
    initialised = 1;
    DONE(OK);
}
int hipGetDeviceCount(int *count) {
    int code = enter(__func__, NULL);
    if (code) return result(code);
    *count = device_count;
    DONE(device_count ? OK : NO_DEVICE);
}
int hipDriverGetVersion(int *out) {
    configure();
    *out = version ? version : 70125424;
    return OK;
}
int hipGetLastError(void) { int code = last_error; last_error = OK; return code; }
int fake_last_error(void) { return last_error; }
const char *hipGetErrorName(int code) {
    static __thread char text[32];
    switch (code) {
    case INVALID: return "hipErrorInvalidValue";
    case OOM: return "hipErrorOutOfMemory";
    case NO_DEVICE: return "hipErrorNoDevice";
    case INVALID_DEVICE: return "hipErrorInvalidDevice";
    case NOT_READY: return "hipErrorNotReady";
    case ILLEGAL_ADDRESS: return "hipErrorIllegalAddress";
    case 719: return "hipErrorLaunchFailure";
    case 801: return "hipErrorNotSupported";
    }
    snprintf(text, sizeof text, "fakeError%d", code);
    return text;
}
const char *hipGetErrorString(int code) { (void)code; return "of the fake"; }

int hipGetDevice(int *out) { *out = current; return OK; }
int hipSetDevice(int index) {
    BARE(NULL);
    if (index < 0 || index >= device_count) DONE(INVALID_DEVICE);
    current = index;
    DONE(OK);
}
int hipCtxGetCurrent(Device **out) { *out = &devices[visible[current]]; return OK; }
int hipCtxSetCurrent(Device *device) {
    BARE(NULL);
    for (int i = 0; i < device_count; i++) if (device == &devices[visible[i]]) current = i;
    DONE(OK);
}
#define WHICH(index) BARE(NULL); if ((index) < 0 || (index) >= device_count) DONE(INVALID_DEVICE)
int hipDeviceGetUuid(char *uuid, int index) {
    char text[17];
    WHICH(index);
    name_of(visible[index], text);
    memcpy(uuid, text, 16);
    DONE(OK);
}
int hipDeviceGetName(char *name, int n, int index) { WHICH(index); snprintf(name, (size_t)n, "Fake Instinct %d", visible[index]); DONE(OK); }
int hipDeviceGetPCIBusId(char *out, int n, int index) { WHICH(index); snprintf(out, (size_t)n, "0000:f%x:00.0", visible[index]); DONE(OK); }
int hipDeviceTotalMem(size_t *bytes, int index) { WHICH(index); *bytes = memory_bytes; DONE(OK); }
int hipDeviceGetAttribute(int *out, int number, int index) {
    WHICH(index);
    switch (number) {
    case 5: *out = 1700000; break;
    case 9: case 24: case 88: *out = 1; break;
    case 26: case 27: case 28: case 56: *out = 1024; break;
    case 29: *out = 2147483647; break;
    case 30: case 31: *out = 65536; break;
    case 60: *out = 1600000; break;
    case 63: *out = 104; break;
    case 74: *out = 65536; break;
    case 87: *out = getenv("FAKE_HIP_WAVE") ? atoi(getenv("FAKE_HIP_WAVE")) : 64; break;
    default: DONE(INVALID);
    }
    DONE(OK);
}
static void describe(char *prop, size_t bytes, size_t arch) {
    const char *named = getenv("FAKE_HIP_ARCH");
    memset(prop, 0, bytes);
    snprintf(prop, 64, "Fake Instinct");
    snprintf(prop + arch, 64, "%s", named ? named : "gfx90a:sramecc+:xnack-");
}
#ifndef R0000
int hipGetDevicePropertiesR0600(char *prop, int index) { WHICH(index); describe(prop, 1472, 1160); DONE(OK); }
#endif
int hipGetDeviceProperties(char *prop, int index) { WHICH(index); describe(prop, 792, 396); DONE(OK); }
int hipDeviceGetStreamPriorityRange(int *least, int *greatest) { CALL; *least = 1, *greatest = -1; DONE(OK); }

static int captures_in(Device *device) {
    for (Stream *s = streams; s; s = s->next)
        if (s->device == device && s->capture) return s->capture->invalid = 1;
    return 0;
}
int hipDeviceSynchronize(void) {
    CALL;
    if (captures_in(device)) DONE(CAPTURE_UNSUPPORTED);
again:
    for (Stream *s = streams; s; s = s->next)
        if (s->device == device && s->head) {
            if (device->sticky) DONE(device->sticky);
            pthread_cond_wait(&changed, &lock);
            goto again; /* the list may have changed */
        }
    DONE(device->sticky);
}

/* -- memory ------------------------------------------------------------------------------------------------ */

int hipMemGetInfo(size_t *left, size_t *total) { CALL; *left = room(device), *total = memory_bytes; DONE(OK); }
int hipMalloc(uint64_t *out, size_t bytes) {
    CALL;
    if (!bytes) DONE(INVALID);
    if (bytes > room(device)) DONE(OOM);
    *out = take(device, bytes, DEVICE);
    DONE(OK);
}
static int give(uint64_t ptr, int host) {
    Allocation *a = whole(ptr);
    if (!a || (a->kind == PINNED) != host || a->kind == REGION) return INVALID;
    drop(a);
    return OK;
}
int hipFree(uint64_t ptr) { CALL; DONE(give(ptr, 0)); }
int hipHostFree(uint64_t ptr) { CALL; DONE(give(ptr, 1)); }
int hipMallocAsync(uint64_t *out, size_t bytes, Stream *s) {
    CALL;
    STREAM(s);
    if (s->capture) { s->capture->invalid = 1; DONE(CAPTURE_UNSUPPORTED); }
    if (device->used + bytes > device->reserved) {
        if (bytes > room(device) + device->reserved - device->used) DONE(OOM);
        device->reserved = device->used + bytes;
    }
    device->used += bytes;
    *out = take(device, bytes, POOLED);
    DONE(OK);
}
static void let(Capture *c) { if (c && !--c->refs) free(c); }
static Capture *hold(Capture *c) { if (c) c->refs++; return c; }
static int submit(Stream *s, Op op);
int hipFreeAsync(uint64_t ptr, Stream *s) {
    CALL;
    STREAM(s);
    Allocation *a = whole(ptr);
    if (!a || a->kind != POOLED) DONE(INVALID);
    if (s->capture) { s->capture->invalid = 1; DONE(INVALID); }
    DONE(submit(s, (Op){.what = FREE, .memory = a}));
}
int hipDeviceGetMemPool(Device **pool, int index) { WHICH(index); *pool = &devices[visible[index]]; DONE(OK); }
static uint64_t *pool_value(Device *p, int name) {
    return name == 4 ? &p->threshold : name == 5 ? &p->reserved : name == 7 ? &p->used : NULL;
}
int hipMemPoolSetAttribute(Device *p, int name, uint64_t *value) {
    BARE(NULL);
    if (name != 4) DONE(INVALID);
    p->threshold = *value;
    DONE(OK);
}
int hipMemPoolGetAttribute(Device *p, int name, uint64_t *value) {
    BARE(NULL);
    if (!pool_value(p, name)) DONE(INVALID);
    *value = *pool_value(p, name);
    DONE(OK);
}
int hipMemPoolTrimTo(Device *p, size_t keep) {
    BARE(NULL);
    uint64_t least = p->used > keep ? p->used : keep;
    if (p->reserved > least) p->reserved = least;
    DONE(OK);
}
struct Access { int type, id, flags; };
int hipMemPoolSetAccess(Device *p, const struct Access *access, size_t count) {
    BARE(NULL);
    for (size_t i = 0; i < count; i++) {
        if (access[i].type != 1 || access[i].id < 0 || access[i].id >= device_count) DONE(INVALID);
        unsigned bit = 1u << visible[access[i].id];
        p->shared = access[i].flags == 3 ? p->shared | bit : p->shared & ~bit;
    }
    DONE(OK);
}
int hipHostMalloc(uint64_t *out, size_t bytes, unsigned flags) {
    CALL;
    (void)flags;
    if (bytes > memory_bytes) DONE(OOM);
    *out = take(device, bytes, PINNED);
    DONE(OK);
}
int hipHostRegister(uint64_t ptr, size_t bytes, unsigned flags) {
    CALL;
    (void)flags;
    if (owner(ptr) || owner(ptr + bytes - 1)) DONE(REGISTERED);
    Allocation *a = calloc(1, sizeof *a);
    *a = (Allocation){ptr, bytes, REGION, device, allocations};
    allocations = a;
    DONE(OK);
}
int hipHostUnregister(uint64_t ptr) {
    CALL;
    Allocation *a = whole(ptr);
    if (!a || a->kind != REGION) DONE(NOT_REGISTERED);
    drop(a);
    DONE(OK);
}
int hipHostGetFlags(unsigned *flags, uint64_t ptr) {
    CALL;
    if (!is_here(ptr)) DONE(INVALID);
    *flags = 1;
    DONE(OK);
}
int hipMallocManaged(uint64_t *out, size_t bytes, unsigned flags) {
    CALL;
    if (flags != 1) DONE(INVALID);
    if (bytes > room(device)) DONE(OOM);
    *out = take(device, bytes, MANAGED);
    DONE(OK);
}

/* -- copies and fills: queued, or noted when the stream is being captured ---------------------------------- */

static int is_bad(Stream *s) { return s->capture && s->capture->invalid ? CAPTURE_INVALID : OK; }

static int submit(Stream *s, Op op) {
    op.mark = remark(op.mark);
    if (!s->capture) {
        Op *made = malloc(sizeof *made);
        *made = op, made->next = NULL;
        queue(s, made);
        return OK;
    }
    if (is_bad(s)) return CAPTURE_INVALID;
    Graph *g = s->capture->graph;
    if (g->count == g->room) g->nodes = realloc(g->nodes, (size_t)(g->room = g->room * 2 + 16) * sizeof *g->nodes);
    Node *node = calloc(1, sizeof *node);
    node->op = malloc(sizeof op);
    *node->op = op, node->index = g->count;
    g->nodes[g->count++] = node;
    for (int i = 0; i < s->count; i++) {
        if (g->edges == g->edge_room) {
            g->edge_room = g->edge_room * 2 + 16;
            g->from = realloc(g->from, (size_t)g->edge_room * sizeof *g->from);
            g->to = realloc(g->to, (size_t)g->edge_room * sizeof *g->to);
        }
        g->from[g->edges] = s->deps[i], g->to[g->edges++] = node;
    }
    s->deps = realloc(s->deps, sizeof *s->deps);
    s->deps[0] = node, s->count = 1;
    return OK;
}
static int copy(Stream *s, uint64_t dst, uint64_t src, size_t n, int to, int from) {
    Allocation *a = owner(dst), *b = owner(src);
    if ((to && !a) || (from && !b)) return INVALID;
    return submit(s, (Op){.what = COPY, .dst = dst, .src = src, .bytes = n});
}
int hipMemcpyAsync(uint64_t dst, uint64_t src, size_t n, int kind, Stream *s) { CALL; STREAM(s); if (kind != 4) DONE(INVALID); DONE(copy(s, dst, src, n, 0, 0)); }
/* Nothing is copied aside here: HIP does not promise it. */
int hipMemcpyHtoDAsync(uint64_t dst, uint64_t src, size_t n, Stream *s) { CALL; STREAM(s); DONE(copy(s, dst, src, n, 1, 0)); }
int hipMemcpyDtoHAsync(uint64_t dst, uint64_t src, size_t n, Stream *s) { CALL; STREAM(s); DONE(copy(s, dst, src, n, 0, 1)); }
int hipMemcpyDtoDAsync(uint64_t dst, uint64_t src, size_t n, Stream *s) { CALL; STREAM(s); DONE(copy(s, dst, src, n, 1, 1)); }
int hipMemcpyPeerAsync(uint64_t dst, int to, uint64_t src, int from, size_t n, Stream *s) {
    CALL;
    STREAM(s);
    Allocation *a = owner(dst), *b = owner(src);
    if (!a || !b || a->device != &devices[visible[to]] || b->device != &devices[visible[from]]) DONE(INVALID);
    DONE(copy(s, dst, src, n, 1, 1));
}
static int set(Stream *s, uint64_t dst, uint32_t value, int width, size_t count, size_t pitch, size_t rows) {
    if (!owner(dst) || dst % (unsigned)width || pitch % (unsigned)width) return INVALID;
    if (rows > 1 && pitch < count * (unsigned)width) return INVALID;
    Op op = {.what = SET, .dst = dst, .width = width, .bytes = count, .pitch = pitch, .rows = rows};
    memcpy(op.pattern, &value, 4);
    return submit(s, op);
}
int hipMemsetD8Async(uint64_t dst, unsigned char v, size_t n, Stream *s) { CALL; STREAM(s); DONE(set(s, dst, v, 1, n, 0, 1)); }
int hipMemsetD16Async(uint64_t dst, unsigned short v, size_t n, Stream *s) { CALL; STREAM(s); DONE(set(s, dst, v, 2, n, 0, 1)); }
int hipMemsetD32Async(uint64_t dst, int v, size_t n, Stream *s) { CALL; STREAM(s); DONE(set(s, dst, (uint32_t)v, 4, n, 0, 1)); }
int hipMemset2DAsync(uint64_t dst, size_t pitch, int v, size_t width, size_t rows, Stream *s) { CALL; STREAM(s); DONE(set(s, dst, (uint32_t)v & 255, 1, width, pitch, rows)); }
#ifndef R0000
int hipMemsetD2D32Async(uint64_t dst, size_t pitch, unsigned v, size_t width, size_t rows, Stream *s) { CALL; STREAM(s); DONE(set(s, dst, v, 4, width, pitch, rows)); }
#endif

/* -- streams and events ----------------------------------------------------------------------------------------- */

int hipStreamCreateWithPriority(Stream **out, unsigned flags, int priority) {
    CALL;
    if (flags != 1 || priority > 1 || priority < -1) DONE(INVALID);
    *out = new_stream(device);
    DONE(OK);
}
int hipStreamDestroy(Stream *s) { CALL; STREAM(s); end_stream(s); DONE(OK); }
int hipStreamQuery(Stream *s) {
    CALL;
    STREAM(s);
    if (s->capture) { s->capture->invalid = 1; DONE(CAPTURE_UNSUPPORTED); }
    if (!s->head && device->reserved > device->threshold)
        device->reserved = device->used > device->threshold ? device->used : device->threshold;
    DONE(s->head ? NOT_READY : OK);
}
int hipStreamIsCapturing(Stream *s, int *status) {
    CALL;
    STREAM(s);
    *status = !s->capture ? 0 : s->capture->invalid ? 2 : 1;
    DONE(OK);
}
int hipStreamWaitEvent(Stream *s, Event *e, unsigned flags) {
    CALL;
    (void)flags;
    STREAM(s);
    if (e->destroyed) DONE(BAD_HANDLE);
    if (e->capture) {
        if (s->capture && s->capture != e->capture) DONE(CAPTURE_MERGE);
        if (!s->capture) s->capture = hold(e->capture);
        s->deps = realloc(s->deps, (size_t)(s->count + e->count + 1) * sizeof *s->deps);
        for (int i = 0; i < e->count; i++) s->deps[s->count++] = e->deps[i];
        DONE(OK);
    }
    if (s->capture) { s->capture->invalid = 1; DONE(CAPTURE_ISOLATION); }
    DONE(submit(s, (Op){.what = WAIT, .mark = e->mark}));
}
int hipEventCreateWithFlags(Event **out, unsigned flags) {
    CALL;
    Event *e = calloc(1, sizeof *e);
    e->device = device, e->timing = flags == 0;
    live_things++;
    *out = e;
    DONE(OK);
}
int hipEventDestroy(Event *e) {
    CALL;
    unmark(e->mark), let(e->capture), free(e->deps), free(e); /* what waits for it still does */
    live_things--;
    DONE(OK);
}
int hipEventRecord(Event *e, Stream *s) {
    CALL;
    STREAM(s);
    if (e->device != device) DONE(BAD_HANDLE);
    if (s->capture) {
        let(e->capture);
        e->capture = hold(s->capture), e->count = s->count;
        e->deps = realloc(e->deps, (size_t)(s->count + 1) * sizeof *e->deps);
        if (s->count) memcpy(e->deps, s->deps, (size_t)s->count * sizeof *e->deps);
        DONE(OK);
    }
    unmark(e->mark), let(e->capture);
    e->capture = NULL, e->mark = calloc(1, sizeof *e->mark), e->mark->left = e->mark->refs = 1;
    DONE(submit(s, (Op){.what = RECORD, .mark = e->mark}));
}
int hipEventQuery(Event *e) {
    CALL;
    if (e->capture) { e->capture->invalid = 1; DONE(CAPTURED_EVENT); }
    DONE(!e->mark || e->mark->done ? OK : NOT_READY);
}
int hipEventElapsedTime(float *out, Event *a, Event *b) {
    CALL;
    if (!a->timing || !b->timing || !a->mark || !b->mark) DONE(BAD_HANDLE);
    if (!a->mark->done || !b->mark->done) DONE(NOT_READY);
    *out = (float)((b->mark->at - a->mark->at) * 1e3);
    DONE(OK);
}

/* -- modules and kernels ------------------------------------------------------------------------------------------ */

int hipModuleLoadData(Module **out, const char *image) {
    CALL;
    if (!object_size(image)) DONE(INVALID_IMAGE);
    *out = load_object(device, image);
    DONE(*out ? OK : NO_BINARY);
}
int hipModuleUnload(Module *m) { CALL; drop_module(m); DONE(OK); }
int hipModuleGetFunction(Function **out, Module *m, const char *name) {
    CALL;
    if (m->device != device) DONE(BAD_HANDLE);
    *out = find_function(m, name);
    DONE(*out ? OK : NOT_FOUND);
}
int hipFuncGetAttribute(int *out, int name, Function *f) {
    CALL;
    (void)f;
    *out = name == 0 ? 1024 : name == 4 ? 32 : 0;
    DONE(OK);
}
static int kernel(Op *op, Function *f, const unsigned *dims, unsigned shared, void **params) {
    for (int i = 0; i < 6; i++) if (!dims[i]) return INVALID;
    for (int i = 0; i < 3; i++) if ((uint64_t)dims[i] * dims[3 + i] > 0xFFFFFFFFu) return 9;
    if (shared > 65536 || (uint64_t)dims[3] * dims[4] * dims[5] > 1024) return INVALID;
    *op = (Op){.what = KERNEL, .function = f, .params = pack(f, params)};
    memcpy(op->range.grid, dims, 12), memcpy(op->range.block, dims + 3, 12);
    op->range.shared = shared, op->range.count = (uint64_t)dims[0] * dims[1] * dims[2];
    return OK;
}
int hipModuleLaunchKernel(Function *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                          unsigned bz, unsigned shared, Stream *s, void **params, void **extra) {
    CALL;
    (void)extra;
    STREAM(s);
    Op op;
    int code = kernel(&op, f, (unsigned[]){gx, gy, gz, bx, by, bz}, shared, params);
    DONE(code ? code : submit(s, op));
}

/* -- capture and graphs ------------------------------------------------------------------------------------------- */

int hipStreamBeginCapture(Stream *s, int mode) {
    CALL;
    STREAM(s);
    (void)mode;
    if (s->capture) DONE(CAPTURE_UNMATCHED);
    Capture *c = calloc(1, sizeof *c);
    c->graph = calloc(1, sizeof *c->graph), c->refs = 1;
    live_things++;
    s->capture = c, s->count = 0;
    DONE(OK);
}
static int behind(Graph *g, Node *node, Node **ends, int count, char *seen) {
    for (int i = 0; i < count; i++) if (ends[i] == node) return 1;
    for (int i = 0; i < g->edges; i++)
        if (g->from[i] == node && !seen[g->to[i]->index] && (seen[g->to[i]->index] = 1) &&
            behind(g, g->to[i], ends, count, seen)) return 1;
    return 0;
}
static void drop_graph(Graph *g) {
    for (int i = 0; i < g->count; i++) drop_op(g->nodes[i]->op), free(g->nodes[i]);
    free(g->nodes), free(g->from), free(g->to);
    free(g);
    live_things--;
}
int hipStreamEndCapture(Stream *s, Graph **out) {
    CALL;
    STREAM(s);
    *out = NULL;
    Capture *c = s->capture;
    if (!c) DONE(CAPTURE_UNMATCHED);
    int code = c->invalid ? CAPTURE_INVALID : OK;
    for (Stream *each = streams; each; each = each->next) {
        if (each->capture != c) continue;
        for (int i = 0; each != s && i < each->count; i++) {
            char *seen = calloc(1, (size_t)c->graph->count + 1);
            if (!behind(c->graph, each->deps[i], s->deps, s->count, seen) && !code) code = CAPTURE_UNJOINED;
            free(seen);
        }
        if (each != s) each->capture = NULL, each->count = 0, let(c);
    }
    s->capture = NULL, s->count = 0;
    if (code) drop_graph(c->graph); else *out = c->graph;
    let(c);
    DONE(code);
}
int hipGraphInstantiateWithFlags(Exec **out, Graph *g, unsigned long long flags) {
    CALL;
    (void)flags;
    Exec *e = calloc(1, sizeof *e);
    e->refs = 1, e->device = device, e->template = g, e->count = g->count;
    e->ops = malloc((size_t)(g->count + 1) * sizeof *e->ops);
    for (int i = 0; i < g->count; i++) e->ops[i] = copied(g->nodes[i]->op);
    live_things++;
    *out = e;
    DONE(OK);
}
static int run_ops(Device *device, Exec *exec) {
    for (int i = 0; i < exec->count; i++) {
        int code = run_op(device, exec->ops[i]);
        if (code) return code;
    }
    return OK;
}
static void drop_exec(Exec *e) {
    if (--e->refs) return;
    for (int i = 0; i < e->count; i++) drop_op(e->ops[i]);
    free(e->ops), free(e);
}
int hipGraphLaunch(Exec *e, Stream *s) {
    CALL;
    STREAM(s);
    Exec *now = malloc(sizeof *now); /* later changes do not reach it */
    *now = *e, now->refs = 1;
    now->ops = malloc((size_t)(e->count + 1) * sizeof *now->ops);
    for (int i = 0; i < e->count; i++) now->ops[i] = copied(e->ops[i]);
    int code = submit(s, (Op){.what = RUN, .exec = now});
    if (code) drop_exec(now);
    DONE(code);
}
int hipGraphUpload(Exec *e, Stream *s) { (void)e, (void)s; return OK; }
int hipGraphExecDestroy(Exec *e) { CALL; drop_exec(e); live_things--; DONE(OK); }
int hipGraphDestroy(Graph *g) { CALL; drop_graph(g); DONE(OK); }
int hipGraphGetNodes(Graph *g, Node **nodes, size_t *count) {
    CALL;
    if (nodes) for (int i = 0; i < g->count; i++) nodes[i] = g->nodes[g->count - 1 - i];
    *count = (size_t)g->count;
    DONE(OK);
}
int hipGraphGetEdges(Graph *g, Node **from, Node **to, size_t *count) {
    CALL;
    if (from) for (int i = 0; i < g->edges; i++) from[i] = g->from[i], to[i] = g->to[i];
    *count = (size_t)g->edges;
    DONE(OK);
}
int hipGraphNodeGetType(Node *node, int *type) { CALL; *type = node->op->what == KERNEL ? 0 : 1; DONE(OK); }
typedef struct { unsigned block[3]; void **extra; Function *func; unsigned grid[3]; void **params; unsigned shared; } Params;
int hipGraphKernelNodeGetParams(Node *node, Params *out) {
    CALL;
    if (node->op->what != KERNEL) DONE(INVALID);
    memset(out, 0, sizeof *out);
    out->func = node->op->function;
    DONE(OK);
}
int hipGraphExecKernelNodeSetParams(Exec *e, Node *node, const Params *p) {
    CALL;
    if (e->template->count <= node->index || e->template->nodes[node->index] != node) DONE(INVALID);
    Op op;
    int code = kernel(&op, p->func, (unsigned[]){p->grid[0], p->grid[1], p->grid[2], p->block[0], p->block[1], p->block[2]}, p->shared, p->params);
    if (!code) {
        drop_op(e->ops[node->index]);
        *(e->ops[node->index] = malloc(sizeof op)) = op;
    }
    DONE(code);
}

/* -- peers ----------------------------------------------------------------------------------------------------------- */

int hipDeviceCanAccessPeer(int *able, int index, int peer) { WHICH(index); *able = index != peer; DONE(OK); }
int hipDeviceEnablePeerAccess(int peer, unsigned flags) {
    CALL;
    (void)flags;
    if (peer < 0 || peer >= device_count || &devices[visible[peer]] == device) DONE(INVALID_DEVICE);
    if (device->peers >> visible[peer] & 1) DONE(PEER_ALREADY);
    device->peers |= 1u << visible[peer];
    DONE(OK);
}

/* -- hiprtc: the project's own translation for the cpu, asked for in a process of its own --------------------------- */

#ifdef COMPILER
typedef struct Program { char *text, *name, *log, *code; size_t size; char *names[64]; char *lowered[64]; int count; } Program;

int hiprtcVersion(int *major, int *minor) { *major = 9, *minor = 0; return 0; }
const char *hiprtcGetErrorString(int code) { return code == 6 ? "HIPRTC_ERROR_COMPILATION" : code ? "HIPRTC_ERROR" : "HIPRTC_SUCCESS"; }
int hiprtcCreateProgram(Program **out, const char *text, const char *name, int n, const char **headers, const char **names) {
    (void)n, (void)headers, (void)names;
    *out = calloc(1, sizeof **out);
    (*out)->text = strdup(text), (*out)->name = strdup(name ? name : ""), (*out)->log = strdup("");
    return 0;
}
int hiprtcAddNameExpression(Program *p, const char *expression) {
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
int hiprtcCompileProgram(Program *p, int count, const char **options) {
    const char *arguments[128] = {PYTHON, COMPILER, "fake.cu", "fake.out", "fake.log"};
    int n = 5;
    for (int i = 0; i < count; i++) {
        if (!strncmp(options[i], "--gpu-architecture=", 19) && strncmp(options[i] + 19, "gfx90a", 6))
            abort(); /* as hiprtc does for one that it does not know */
        if (n < 120 && (!strncmp(options[i], "-D", 2) || !strncmp(options[i], "-U", 2))) arguments[n++] = options[i];
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
int hiprtcGetLoweredName(Program *p, const char *expression, const char **out) {
    for (int i = 0; i < p->count; i++)
        if (!strcmp(p->names[i], expression)) { *out = p->lowered[i]; return *out ? 0 : 10; }
    return 10;
}
int hiprtcGetProgramLogSize(Program *p, size_t *size) { *size = strlen(p->log) + 1; return 0; }
int hiprtcGetProgramLog(Program *p, char *out) { strcpy(out, p->log); return 0; }
int hiprtcGetCodeSize(Program *p, size_t *size) { *size = p->size; return 0; }
int hiprtcGetCode(Program *p, char *out) { memcpy(out, p->code, p->size); return 0; }
#endif

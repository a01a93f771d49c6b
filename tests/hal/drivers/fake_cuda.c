/* A stand-in for libcuda (and NVRTC) on a machine without a GPU: the symbols that the cuda driver binds.
 * See fake_core.h for what it is and how it is told to fail. It is strict about who calls what when:
 * contexts, captures, memory that was given back.
 *
 * Kernels are shared objects of the cpu driver, as its own NVRTC makes them, or PTX text, of which only
 * the entries are read: a few names do something, so that order can be seen, and others nothing.
 */
#define FAKE "FAKE_CUDA"
#include "fake_capture.h"

static int initialised, released, retained[MOST_DEVICES], attributes_off[256];
static __thread Device *stack[64];
static __thread int depth;

/* -- control, for tests ------------------------------------------------------------------------- */

void fake_release(int on) {
    pthread_mutex_lock(&lock);
    released = on;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}
int fake_retained(int index) { return retained[index]; }
int fake_streams(void) {
    int found = 0;
    pthread_mutex_lock(&lock);
    for (Stream *s = streams; s; s = s->next) found += !s->destroyed;
    pthread_mutex_unlock(&lock);
    return found;
}
void fake_version(int number) { version = number; }
void fake_reverse(int on) { reversed = on; }
void fake_attribute_off(int number) { attributes_off[number] = 1; }
int fake_depth(void) { return depth; }

/* -- calls: the lock is held after each ---------------------------------------------------------- */

#define BEGIN(device, a, b) do { \
    int f_ = enter_with(__func__, device, (uint64_t)(a), (uint64_t)(b)); if (f_) return f_; \
    if (!initialised) return leave(NOT_INITIALIZED); } while (0)
#define BARE(a, b) BEGIN(NULL, a, b)
#define CURRENT (depth ? stack[depth - 1] : NULL)
/* The same, for what needs a context; a lost device answers everything with its error. */
#define CALL(a, b) Device *device = CURRENT; BEGIN(device, a, b); \
    if (!device || !retained[device->index]) return leave(NO_CONTEXT)
#define STREAM(s) do { if (!known(s) || (s)->device != device) return leave(BAD_HANDLE); } while (0)
#define WHICH(number) do { if (!numbered(number)) return leave(INVALID_DEVICE); } while (0)

static int finish(Stream *s) {
    while (s->head && !s->device->sticky) pthread_cond_wait(&changed, &lock);
    return s->device->sticky;
}

/* -- the driver and its devices -------------------------------------------------------------------- */

static void uuid_of(int index, unsigned char *out) {
    for (int i = 0; i < 16; i++) out[i] = (unsigned char)(i * 17);
    out[15] = (unsigned char)index;
}
static void name_of(int index, char *out) {
    unsigned char u[16];
    uuid_of(index, u);
    out += sprintf(out, "GPU-");
    for (int i = 0; i < 16; i++) out += sprintf(out, i == 4 || i == 6 || i == 8 || i == 10 ? "-%02x" : "%02x", u[i]);
}
int cuInit(unsigned flags) {
    int code = enter_with(__func__, NULL, flags, 0);
    if (code) return code;
    static const char *const variables[] = {"CUDA_VISIBLE_DEVICES"};
    if (!initialised) see(variables, 1, name_of);
    if (!device_count) return leave(NO_DEVICE);
    initialised = 1;
    return leave(OK);
}
int cuDriverGetVersion(int *out) {
    configure();
    *out = version ? version : 13000;
    return OK;
}
int cuGetErrorName(int code, const char **out) {
    static __thread char text[32];
    static const struct { int code; const char *name; } names[] = {
        {1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"},
        {201, "CUDA_ERROR_INVALID_CONTEXT"}, {400, "CUDA_ERROR_INVALID_HANDLE"}, {600, "CUDA_ERROR_NOT_READY"},
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
int cuDeviceGet(int *device, int ordinal) { BARE(ordinal, 0); WHICH(ordinal); *device = ordinal; return leave(OK); }
int cuDeviceGetUuid_v2(unsigned char *uuid, int device) { BARE(device, 0); WHICH(device); uuid_of(visible[device], uuid); return leave(OK); }
int cuDeviceGetUuid(unsigned char *uuid, int device) { BARE(device, 0); WHICH(device); uuid_of(visible[device], uuid); return leave(OK); }
int cuDeviceGetName(char *name, int n, int device) { BARE(device, n); WHICH(device); snprintf(name, (size_t)n, "Fake Hopper %d", visible[device]); return leave(OK); }
int cuDeviceGetPCIBusId(char *out, int n, int device) { BARE(device, n); WHICH(device); snprintf(out, (size_t)n, "0000:f%x:00.0", visible[device]); return leave(OK); }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { BARE(device, 0); WHICH(device); *bytes = memory_bytes; return leave(OK); }
int cuDeviceGetAttribute(int *out, int number, int device) {
    BARE(number, device);
    WHICH(device);
    if (attributes_off[number & 255]) return leave(INVALID);
    switch (number) {
    case 1: case 2: case 3: *out = 1024; break;
    case 4: *out = 64; break;
    case 5: *out = 2147483647; break;
    case 6: case 7: *out = 65535; break;
    case 8: *out = 49152; break;
    case 13: *out = 1980000; break;
    case 16: *out = 132; break;
    case 36: *out = 2619000; break;
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
    BEGIN(numbered(device), device, 0);
    WHICH(device);
    retained[visible[device]]++;
    *context = numbered(device);
    return leave(OK);
}
int cuDevicePrimaryCtxRelease_v2(int device) {
    BARE(device, 0);
    WHICH(device);
    if (!retained[visible[device]]) return leave(NO_CONTEXT);
    retained[visible[device]]--;
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
int cuCtxSynchronize(void) { CALL(0, 0); return leave(captures_in(device) ? CAPTURE_UNSUPPORTED : drained(device)); }

/* -- memory ---------------------------------------------------------------------------------------------- */

int cuMemGetInfo_v2(size_t *left, size_t *total) { CALL(0, 0); *left = room(device), *total = memory_bytes; return leave(OK); }
int cuMemAlloc_v2(uint64_t *out, size_t bytes) { CALL(bytes, 0); return leave(allocate(device, out, bytes, DEVICE)); }
/* As on hardware, memory that is no pool's is given back when all that was queued is done. */
int cuMemFree_v2(uint64_t ptr) { CALL(ptr, 0); drained(device); return leave(give(ptr, 0)); }
int cuMemAllocAsync(uint64_t *out, size_t bytes, Stream *s) { CALL(bytes, s); STREAM(s); return leave(pool_allocate(device, out, bytes, s)); }
int cuMemFreeAsync(uint64_t ptr, Stream *s) { CALL(ptr, s); STREAM(s); return leave(pool_free(ptr, s)); }
int cuDeviceGetMemPool(Device **pool, int device) { BARE(device, 0); WHICH(device); *pool = numbered(device); return leave(OK); }
int cuMemPoolSetAttribute(Device *p, int name, uint64_t *value) { BARE(name, *value); return leave(pool_set(p, name, *value)); }
int cuMemPoolGetAttribute(Device *p, int name, uint64_t *value) { BARE(p, name); return leave(pool_get(p, name, value)); }
int cuMemPoolTrimTo(Device *p, size_t keep) { BARE(p, keep); return leave(pool_trim(p, keep)); }
int cuMemPoolSetAccess(Device *p, const struct Access *access, size_t count) {
    BARE(access->id, access->flags);
    return leave(pool_share(p, access, count));
}
int cuMemHostAlloc(uint64_t *out, size_t bytes, unsigned flags) { CALL(bytes, flags); return leave(allocate(device, out, bytes, PINNED)); }
int cuMemFreeHost(uint64_t ptr) { CALL(ptr, 0); return leave(give(ptr, 1)); }
int cuMemHostRegister_v2(uint64_t ptr, size_t bytes, unsigned flags) { CALL(ptr, flags); return leave(pin(device, ptr, bytes)); }
int cuMemHostUnregister(uint64_t ptr) { CALL(ptr, 0); return leave(unpin(ptr)); }
int cuMemAllocManaged(uint64_t *out, size_t bytes, unsigned flags) {
    CALL(bytes, flags);
    return leave(flags == 1 ? allocate(device, out, bytes, MANAGED) : INVALID);
}
int cuPointerGetAttribute(void *out, int name, uint64_t ptr) {
    CALL(ptr, name);
    Allocation *a = owner(ptr);
    if (name != 2 || !a) return leave(INVALID);
    *(unsigned *)out = is_here(ptr) ? 1 : 2;
    return leave(OK);
}

/* -- copies and fills ------------------------------------------------------------------------------------ */

/* Pageable memory is copied aside before the call returns, and copies to it are waited for. */
static int copy(Stream *s, uint64_t dst, uint64_t src, size_t bytes, int must_dst, int must_src) {
    if ((must_dst && !owner(dst)) || (must_src && !owner(src))) return INVALID;
    Op op = {.what = COPY, .dst = dst, .src = src, .bytes = bytes};
    int from_pageable = !owner(src), to_pageable = !owner(dst);
    if (s->capture) return submit(s, op);
    if (from_pageable && !to_pageable) op.staged = memcpy(malloc(bytes + 1), (void *)src, bytes);
    int code = submit(s, op);
    return code || !to_pageable ? code : finish(s);
}
int cuMemcpyAsync(uint64_t dst, uint64_t src, size_t n, Stream *s) { CALL(dst, src); STREAM(s); return leave(copy(s, dst, src, n, 0, 0)); }
int cuMemcpyHtoDAsync_v2(uint64_t dst, uint64_t src, size_t n, Stream *s) { CALL(dst, src); STREAM(s); return leave(copy(s, dst, src, n, 1, 0)); }
int cuMemcpyDtoHAsync_v2(uint64_t dst, uint64_t src, size_t n, Stream *s) { CALL(dst, src); STREAM(s); return leave(copy(s, dst, src, n, 0, 1)); }
int cuMemcpyDtoDAsync_v2(uint64_t dst, uint64_t src, size_t n, Stream *s) { CALL(dst, src); STREAM(s); return leave(copy(s, dst, src, n, 1, 1)); }
static int are_of(uint64_t dst, Device *to, uint64_t src, Device *from) {
    Allocation *a = owner(dst), *b = owner(src);
    return a && b && a->device == to && b->device == from;
}
int cuMemcpyPeerAsync(uint64_t dst, Device *to, uint64_t src, Device *from, size_t n, Stream *s) {
    CALL(dst, src);
    STREAM(s);
    return leave(are_of(dst, to, src, from) ? copy(s, dst, src, n, 1, 1) : INVALID);
}
int cuMemcpyPeer(uint64_t dst, Device *to, uint64_t src, Device *from, size_t n) {
    CALL(dst, src);
    if (!are_of(dst, to, src, from)) return leave(INVALID);
    memcpy(here(dst), here(src), n);
    return leave(OK);
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
    *out = new_stream(device);
    return leave(OK);
}
int cuStreamDestroy_v2(Stream *s) { CALL(s, 0); STREAM(s); end_stream(s); return leave(OK); }
int cuStreamQuery(Stream *s) { CALL(s, 0); STREAM(s); return leave(stream_state(s)); }
int cuStreamIsCapturing(Stream *s, int *status) { CALL(s, 0); STREAM(s); *status = capture_state(s); return leave(OK); }
int cuStreamWaitEvent(Stream *s, Event *e, unsigned flags) { CALL(s, e); (void)flags; STREAM(s); return leave(wait_event(s, e)); }
int cuEventCreate(Event **out, unsigned flags) { CALL(flags, 0); return leave(new_event(device, out, flags)); }
int cuEventDestroy_v2(Event *e) { CALL(e, 0); return leave(drop_event(e)); }
int cuEventRecord(Event *e, Stream *s) { CALL(e, s); STREAM(s); return leave(record_event(e, s)); }
int cuCtxRecordEvent(Device *context, Event *e) {
    CALL(context, e);
    if (e->device != context) return leave(BAD_HANDLE);
    if (captures_in(context)) return leave(CAPTURE_UNSUPPORTED);
    unrecord(e);
    for (Stream *s = streams; s; s = s->next) if (s->device == context && s->head) e->mark->left++;
    if (!e->mark->left) e->mark->done = 1, e->mark->at = now_s();
    for (Stream *s = streams; s; s = s->next)
        if (s->device == context && s->head) submit(s, (Op){.what = RECORD, .mark = e->mark});
    return leave(OK);
}
int cuEventQuery(Event *e) { CALL(e, 0); return leave(event_state(e)); }
int cuEventElapsedTime(float *out, Event *a, Event *b) { CALL(a, b); return leave(elapsed(out, a, b)); }
int cuEventElapsedTime_v2(float *out, Event *a, Event *b) { CALL(a, b); return leave(elapsed(out, a, b)); }

/* -- modules and kernels ------------------------------------------------------------------------------------- */

static int on_number(Device *d, void **table, int what) {
    uint64_t ptr = *(uint64_t *)table[0];
    int32_t value = *(int32_t *)table[1];
    if (!reaches(d, ptr, 4, 0)) return ILLEGAL_ADDRESS;
    int32_t *p = here(ptr);
    *p = what == '+' ? *p + value : what == '*' ? *p * value : value;
    return OK;
}
static int add(Device *d, void **table) { return on_number(d, table, '+'); }
static int times(Device *d, void **table) { return on_number(d, table, '*'); }
static int store(Device *d, void **table) { return on_number(d, table, '='); }
static int spin(Device *d, void **table) {
    (void)d;
    pthread_mutex_unlock(&lock);
    usleep((useconds_t)(*(uint64_t *)table[0] / 1000));
    pthread_mutex_lock(&lock);
    return OK;
}
static int wait_released(Device *d, void **table) { /* until the test lets it go */
    (void)table;
    while (!released && !d->sticky) pthread_cond_wait(&changed, &lock);
    return OK;
}
static int stray(Device *d, void **table) { (void)d, (void)table; return ILLEGAL_ADDRESS; }
static int claim(Device *d, void **table) { (void)d, (void)table; return ASSERT; }
static int nothing(Device *d, void **table) { (void)d, (void)table; return OK; }
static const struct { const char *name; int (*known)(Device *, void **); } kernels[] = {
    {"add", add}, {"times", times}, {"store", store}, {"spin", spin}, {"hold", wait_released},
    {"stray", stray}, {"claim", claim}};

static Function *find_entry(Module *m, const char *name) {
    char entry[160];
    snprintf(entry, sizeof entry, ".entry %.120s(", name);
    for (int i = 0; i < m->count; i++) if (!strcmp(m->functions[i]->name, name)) return m->functions[i];
    const char *at = strstr(m->table, entry);
    if (!at || m->count >= 64) return NULL;
    Function *f = calloc(1, sizeof *f);
    f->device = m->device, f->known = nothing;
    snprintf(f->name, sizeof f->name, "%s", name);
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if (!strcmp(kernels[i].name, name)) f->known = kernels[i].known;
    const char *end = strchr(at, ')');
    while ((at = strstr(at, ".param .")) && at < end && f->count < MOST_PARAMS)
        at += 8, f->sizes[f->count++] = atoi(at + 1) / 8;
    return m->functions[m->count++] = f;
}
int cuModuleLoadDataEx(Module **out, const char *image, unsigned count, int *options, void **values) {
    CALL(count, 0);
    if (!memcmp(image, ELFMAG, SELFMAG)) {
        *out = load_object(device, image);
        return leave(*out ? OK : NO_BINARY);
    }
    if (!strstr(image, ".entry")) {
        for (unsigned i = 0; i < count; i++)
            if (options[i] == 5) snprintf(values[i], 64, "line 3: a word that the fake does not know");
        return leave(strstr(image, "sm_99") ? NO_BINARY : BAD_PTX);
    }
    *out = calloc(1, sizeof **out);
    (*out)->device = device, (*out)->table = strdup(image);
    live_things++;
    return leave(OK);
}
int cuModuleUnload(Module *m) { CALL(m, 0); drop_module(m); return leave(OK); }
int cuModuleGetFunction(Function **out, Module *m, const char *name) {
    CALL(m, 0);
    if (m->device != device) return leave(BAD_HANDLE);
    *out = m->object ? find_function(m, name) : find_entry(m, name);
    if (*out && !(*out)->dynamic) (*out)->dynamic = 49152;
    return leave(*out ? OK : NOT_FOUND);
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
int cuFuncLoad(Function *f) { CALL(f, 0); return leave(OK); }
int cuFuncGetParamInfo(Function *f, size_t index, size_t *offset, size_t *size) {
    CALL(f, index);
    if (index >= (size_t)f->count) return leave(INVALID);
    *offset = 8 * index, *size = (size_t)f->sizes[index];
    return leave(OK);
}
int cuLaunchKernel(Function *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, Stream *s, void **params, void **extra) {
    CALL(f, s);
    (void)extra;
    STREAM(s);
    if (f->device != device) return leave(BAD_HANDLE);
    Op op;
    int code = kernel_op(&op, f, (unsigned[]){gx, gy, gz, bx, by, bz}, shared, params);
    return leave(code ? code : submit(s, op));
}

/* -- capture and graphs ---------------------------------------------------------------------------------------- */

int cuStreamBeginCapture_v2(Stream *s, int mode) { CALL(s, mode); STREAM(s); return leave(begin_capture(s, mode)); }
int cuStreamEndCapture(Stream *s, Graph **out) { CALL(s, 0); STREAM(s); return leave(end_capture(s, out)); }
int cuGraphInstantiate_v2(Exec **out, Graph *g, Node **node, char *text, size_t n) {
    CALL(g, 0);
    (void)node, (void)text, (void)n;
    return leave(instantiate(device, out, g));
}
int cuGraphInstantiateWithFlags(Exec **out, Graph *g, unsigned long long flags) { CALL(g, flags); return leave(instantiate(device, out, g)); }
int cuGraphLaunch(Exec *e, Stream *s) { CALL(e, s); STREAM(s); return leave(launch_graph(e, s)); }
int cuGraphExecDestroy(Exec *e) { CALL(e, 0); return leave(destroy_exec(e)); }
int cuGraphDestroy(Graph *g) { CALL(g, 0); return leave(drop_graph(g)); }
int cuGraphGetNodes(Graph *g, Node **nodes, size_t *count) { CALL(g, 0); return leave(list_nodes(g, nodes, count)); }
int cuGraphGetEdges(Graph *g, Node **from, Node **to, size_t *count) { CALL(g, 0); return leave(list_edges(g, from, to, count)); }
int cuGraphNodeGetType(Node *node, int *type) { CALL(node, 0); *type = node->op->what == KERNEL ? 0 : 1; return leave(OK); }
typedef struct { Function *func; unsigned dims[6], shared; void **params, **extra; void *kern, *ctx; } Params;
static int node_params(Node *node, Params *out, size_t size) {
    if (node->op->what != KERNEL) return INVALID;
    memset(out, 0, size);
    out->func = node->op->function;
    return OK;
}
int cuGraphKernelNodeGetParams(Node *node, Params *out) { CALL(node, 0); return leave(node_params(node, out, 56)); }
int cuGraphKernelNodeGetParams_v2(Node *node, Params *out) { CALL(node, 0); return leave(node_params(node, out, sizeof *out)); }
static int change(Exec *e, Node *node, const Params *p) {
    Op op;
    int code = kernel_op(&op, p->func, p->dims, p->shared, p->params);
    return code ? code : replace_kernel(e, node, op);
}
int cuGraphExecKernelNodeSetParams(Exec *e, Node *node, const Params *p) { CALL(e, node); return leave(change(e, node, p)); }
int cuGraphExecKernelNodeSetParams_v2(Exec *e, Node *node, const Params *p) { CALL(e, node); return leave(change(e, node, p)); }

/* -- peers ------------------------------------------------------------------------------------------------------- */

int cuDeviceCanAccessPeer(int *able, int device, int peer) { BARE(device, peer); *able = device != peer; return leave(OK); }
int cuCtxEnablePeerAccess(Device *peer, unsigned flags) {
    CALL(peer, flags);
    if (peer == device || !retained[peer->index]) return leave(INVALID_DEVICE);
    if (device->peers >> peer->index & 1) return leave(PEER_ALREADY);
    device->peers |= 1u << peer->index;
    return leave(OK);
}

/* -- other processes: here the same one, so that a handle is an address -------------------------------------------- */

int cuMemGetAddressRange_v2(uint64_t *base, size_t *bytes, uint64_t ptr) {
    CALL(ptr, 0);
    Allocation *a = owner(ptr);
    if (!a) return leave(INVALID);
    *base = a->ptr, *bytes = a->bytes;
    return leave(OK);
}
typedef struct { unsigned char reserved[64]; } Handle;
int cuIpcGetMemHandle(Handle *handle, uint64_t ptr) {
    CALL(ptr, 0);
    Allocation *a = whole(ptr);
    if (!a || a->kind != DEVICE) return leave(INVALID);
    memset(handle, 0x5A, sizeof *handle);
    memcpy(handle->reserved, &ptr, sizeof ptr);
    return leave(OK);
}
int cuIpcOpenMemHandle_v2(uint64_t *out, Handle handle, unsigned flags) {
    CALL(flags, 0);
    uint64_t ptr;
    memcpy(&ptr, handle.reserved, sizeof ptr);
    Allocation *a = owner(ptr);
    if (!a || handle.reserved[63] != 0x5A) return leave(BAD_HANDLE);
    if (a->device != device) {
        if (flags != 1) return leave(INVALID);
        device->peers |= 1u << a->device->index;
    }
    *out = ptr;
    return leave(OK);
}
int cuIpcCloseMemHandle(uint64_t ptr) { CALL(ptr, 0); return leave(owner(ptr) ? OK : INVALID); }

/* -- NVRTC --------------------------------------------------------------------------------------------------------- */

#ifdef COMPILER
#define RTC(name) nvrtc##name
#define RTC_SIZE nvrtcGetCUBINSize
#define RTC_CODE nvrtcGetCUBIN
#define RTC_MAJOR 13
#define REAL "sm_90"
#include "fake_rtc.h"
int nvrtcGetNumSupportedArchs(int *count) { *count = 1; return 0; }
int nvrtcGetSupportedArchs(int *out) { *out = 90; return 0; }
#endif

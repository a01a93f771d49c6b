/* A stand-in for libamdhip64 (and hiprtc, which ROCm 5.2 has in the same library) on a machine without
 * a GPU: the symbols that the hip driver binds. See fake_core.h for what it is and how it is told to
 * fail. With -DR0000 it is a library of ROCm 5.7: no R0600 symbols, the older hipDeviceProp_t.
 */
#define FAKE "FAKE_HIP"
#include "fake_capture.h"

static int initialised;
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

static void bytes_of(int index, char *out) { snprintf(out, 17, "fa4e%012x", index); }
static void name_of(int index, char *out) { snprintf(out, 32, "GPU-fa4e%012x", index); }

int hipInit(unsigned flags) {
    (void)flags;
    int code = enter(__func__, NULL);
    if (code) return result(code);
    if (!initialised) {
        static const char *const variables[] = {"ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"};
        see(variables, 2, name_of), reversed = 1;
    }
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
    bytes_of(visible[index], text);
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

int hipDeviceSynchronize(void) { CALL; DONE(captures_in(device) ? CAPTURE_UNSUPPORTED : drained(device)); }

/* -- memory ------------------------------------------------------------------------------------------------ */

int hipMemGetInfo(size_t *left, size_t *total) { CALL; *left = room(device), *total = memory_bytes; DONE(OK); }
int hipMalloc(uint64_t *out, size_t bytes) { CALL; DONE(allocate(device, out, bytes, DEVICE)); }
int hipFree(uint64_t ptr) { CALL; DONE(give(ptr, 0)); }
int hipHostFree(uint64_t ptr) { CALL; DONE(give(ptr, 1)); }
int hipMallocAsync(uint64_t *out, size_t bytes, Stream *s) { CALL; STREAM(s); DONE(pool_allocate(device, out, bytes, s)); }
int hipFreeAsync(uint64_t ptr, Stream *s) { CALL; STREAM(s); DONE(pool_free(ptr, s)); }
int hipDeviceGetMemPool(Device **pool, int index) { WHICH(index); *pool = numbered(index); DONE(OK); }
int hipMemPoolSetAttribute(Device *p, int name, uint64_t *value) { BARE(NULL); DONE(pool_set(p, name, *value)); }
int hipMemPoolGetAttribute(Device *p, int name, uint64_t *value) { BARE(NULL); DONE(pool_get(p, name, value)); }
int hipMemPoolTrimTo(Device *p, size_t keep) { BARE(NULL); DONE(pool_trim(p, keep)); }
int hipMemPoolSetAccess(Device *p, const struct Access *access, size_t count) { BARE(NULL); DONE(pool_share(p, access, count)); }
int hipHostMalloc(uint64_t *out, size_t bytes, unsigned flags) { CALL; (void)flags; DONE(allocate(device, out, bytes, PINNED)); }
int hipHostRegister(uint64_t ptr, size_t bytes, unsigned flags) { CALL; (void)flags; DONE(pin(device, ptr, bytes)); }
int hipHostUnregister(uint64_t ptr) { CALL; DONE(unpin(ptr)); }
int hipHostGetFlags(unsigned *flags, uint64_t ptr) {
    CALL;
    if (!is_here(ptr)) DONE(INVALID);
    *flags = 1;
    DONE(OK);
}
int hipMallocManaged(uint64_t *out, size_t bytes, unsigned flags) {
    CALL;
    DONE(flags == 1 ? allocate(device, out, bytes, MANAGED) : INVALID);
}

/* -- copies and fills ---------------------------------------------------------------------------------------- */

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
    if (!a || !b || a->device != numbered(to) || b->device != numbered(from)) DONE(INVALID);
    DONE(copy(s, dst, src, n, 1, 1));
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
int hipStreamQuery(Stream *s) { CALL; STREAM(s); DONE(stream_state(s)); }
int hipStreamIsCapturing(Stream *s, int *status) { CALL; STREAM(s); *status = capture_state(s); DONE(OK); }
int hipStreamWaitEvent(Stream *s, Event *e, unsigned flags) { CALL; (void)flags; STREAM(s); DONE(wait_event(s, e)); }
int hipEventCreateWithFlags(Event **out, unsigned flags) { CALL; DONE(new_event(device, out, flags)); }
int hipEventDestroy(Event *e) { CALL; DONE(drop_event(e)); }
int hipEventRecord(Event *e, Stream *s) { CALL; STREAM(s); DONE(record_event(e, s)); }
int hipEventQuery(Event *e) { CALL; DONE(event_state(e)); }
int hipEventElapsedTime(float *out, Event *a, Event *b) { CALL; DONE(elapsed(out, a, b)); }

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
    if (*out) (*out)->dynamic = 65536;
    DONE(*out ? OK : NOT_FOUND);
}
int hipFuncGetAttribute(int *out, int name, Function *f) {
    CALL;
    (void)f;
    *out = name == 0 ? 1024 : name == 4 ? 32 : 0;
    DONE(OK);
}
static int kernel(Op *op, Function *f, const unsigned *dims, unsigned shared, void **params) {
    for (int i = 0; i < 3; i++) if ((uint64_t)dims[i] * dims[3 + i] > 0xFFFFFFFFu) return 9;
    return kernel_op(op, f, dims, shared, params);
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

int hipStreamBeginCapture(Stream *s, int mode) { CALL; STREAM(s); DONE(begin_capture(s, mode)); }
int hipStreamEndCapture(Stream *s, Graph **out) { CALL; STREAM(s); DONE(end_capture(s, out)); }
int hipGraphInstantiateWithFlags(Exec **out, Graph *g, unsigned long long flags) { CALL; (void)flags; DONE(instantiate(device, out, g)); }
int hipGraphLaunch(Exec *e, Stream *s) { CALL; STREAM(s); DONE(launch_graph(e, s)); }
int hipGraphUpload(Exec *e, Stream *s) { (void)e, (void)s; return OK; }
int hipGraphExecDestroy(Exec *e) { CALL; DONE(destroy_exec(e)); }
int hipGraphDestroy(Graph *g) { CALL; DONE(drop_graph(g)); }
int hipGraphGetNodes(Graph *g, Node **nodes, size_t *count) { CALL; DONE(list_nodes(g, nodes, count)); }
int hipGraphGetEdges(Graph *g, Node **from, Node **to, size_t *count) { CALL; DONE(list_edges(g, from, to, count)); }
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
    Op op;
    int code = kernel(&op, p->func, (unsigned[]){p->grid[0], p->grid[1], p->grid[2], p->block[0], p->block[1], p->block[2]}, p->shared, p->params);
    DONE(code ? code : replace_kernel(e, node, op));
}

/* -- peers ----------------------------------------------------------------------------------------------------------- */

int hipDeviceCanAccessPeer(int *able, int index, int peer) { WHICH(index); *able = index != peer; DONE(OK); }
int hipDeviceEnablePeerAccess(int peer, unsigned flags) {
    CALL;
    (void)flags;
    if (!numbered(peer) || numbered(peer) == device) DONE(INVALID_DEVICE);
    if (device->peers >> visible[peer] & 1) DONE(PEER_ALREADY);
    device->peers |= 1u << visible[peer];
    DONE(OK);
}

/* -- hiprtc ---------------------------------------------------------------------------------------------------------- */

#ifdef COMPILER
#define RTC(name) hiprtc##name
#define RTC_SIZE hiprtcGetCodeSize
#define RTC_CODE hiprtcGetCode
#define RTC_MAJOR 9
#define REAL "gfx90a"
#include "fake_rtc.h"
#endif

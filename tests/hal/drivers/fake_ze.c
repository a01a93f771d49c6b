/* A stand-in for libze_loader with a driver and devices behind it: the functions that the level_zero
 * driver binds. See fake_core.h for what it is and how it is told to fail. It is strict: a command that
 * could overtake the one before it (no barrier between), a signal that was not reset, a list, a module
 * or an event that is destroyed while something needs it, memory of another context, are errors.
 *
 * Its SPIR-V is a header of five words with a shared object of the cpu driver behind it.
 */
#define FAKE "FAKE_ZE"
#include "fake_core.h"

enum { OK = 0, NOT_READY = 1, LOST = 0x70000001, OOM = 0x70000003, UNINITIALIZED = 0x78000001,
       INVALID = 0x78000004, UNSUPPORTED_SIZE = 0x78000009, BUILD_FAILURE = 0x70000004, UNSUPPORTED_ENUM = 0x7800000d,
       NO_SUCH_KERNEL = 0x78000011 };
enum { DRIVER_PROPERTIES = 0x1, DEVICE_PROPERTIES = 0x3, COMPUTE_PROPERTIES = 0x4, GROUP_PROPERTIES = 0x6, MEMORY_PROPERTIES = 0x7,
       ACCESS_PROPERTIES = 0x8, CONTEXT_DESC = 0xd, QUEUE_DESC = 0xe, POOL_DESC = 0x10, EVENT_DESC = 0x11,
       MODULE_DESC = 0x1b, KERNEL_DESC = 0x1d, KERNEL_PROPERTIES = 0x1e, DEVICE_MEM_DESC = 0x15, HOST_MEM_DESC = 0x16, PCI_PROPERTIES = 0x10008 };

typedef struct Head { int stype; void *next; } Head;
typedef struct Context { Device *used; } Context;
typedef struct List { Stream *stream; int ordered; Context *context; } List;
typedef struct Pool { int left; uint32_t count; } Pool;
typedef struct Kernel {
    Module *module; Function *function; uint32_t group[3]; unsigned char values[MOST_PARAMS][64]; int set;
} Kernel;
typedef struct Event { Mark *mark; Pool *pool; int queued; Device *device; } Event;

static int is_lost(int code) { return code == LOST || code == 0x70000006; }
static int illegal(void) { return LOST; }
static int run_ops(Device *device, struct Exec *exec) { (void)device, (void)exec; return OK; }
static void drop_exec(struct Exec *exec) { (void)exec; }

static int initialised, visible[MOST_DEVICES], driver;

#define BARE(device) do { int f_ = enter(__func__, device); if (f_) return f_; \
    if (!initialised) return leave(UNINITIALIZED); } while (0)
#define IS(pointer, type) do { if (!(pointer) || ((Head *)(pointer))->stype != (type)) return leave(INVALID); } while (0)

int zeInit(uint32_t flags) {
    (void)flags;
    int code = enter(__func__, NULL);
    if (code) return code;
    if (!initialised) {
        int all = device_count, count = 0;
        const char *mask = getenv("ZE_AFFINITY_MASK");
        char copy[256], *save = NULL;
        if (mask && *mask) {
            snprintf(copy, sizeof copy, "%s", mask);
            for (char *p = strtok_r(copy, ",", &save); p; p = strtok_r(NULL, ",", &save))
                if (atoi(p) < all && count < MOST_DEVICES) visible[count++] = atoi(p);
        } else
            for (int i = 0; i < all; i++) visible[count++] = i;
        device_count = count;
        for (int i = 0; i < MOST_DEVICES; i++) devices[i].peers = getenv("FAKE_ZE_NO_PEERS") ? 0 : 0xF;
        if (getenv("FAKE_ZE_NO_DRIVER")) return leave(UNINITIALIZED); /* a loader with nothing behind it */
        initialised = 1;
    }
    return leave(OK);
}
int zeDriverGet(uint32_t *count, void **out) {
    BARE(NULL);
    if (out && *count) out[0] = &driver;
    *count = 1;
    return leave(OK);
}
struct DriverProperties { Head head; unsigned char uuid[16]; uint32_t version; };
int zeDriverGetProperties(void *d, struct DriverProperties *out) {
    BARE(NULL);
    IS(out, DRIVER_PROPERTIES);
    if (d != &driver) return leave(INVALID);
    out->version = version ? (uint32_t)version : 0x1030000;
    return leave(OK);
}
int zeDeviceGet(void *d, uint32_t *count, Device **out) {
    BARE(NULL);
    if (d != &driver) return leave(INVALID);
    for (int i = 0; out && i < (int)*count && i < device_count; i++) out[i] = &devices[visible[i]];
    *count = (uint32_t)device_count;
    return leave(OK);
}
struct DeviceProperties {
    Head head; int type; uint32_t vendor, device, flags, subdevice, clock; uint64_t most;
    uint32_t contexts, priority, threads, simd, eus, subslices, slices; uint64_t resolution;
    uint32_t bits, kernel_bits; unsigned char uuid[16]; char name[256];
};
int zeDeviceGetProperties(Device *device, struct DeviceProperties *out) {
    BARE(device);
    IS(out, DEVICE_PROPERTIES);
    out->type = 1, out->vendor = 0x8086, out->device = 0x56a0, out->flags = 0, out->clock = 2400;
    out->most = memory_bytes, out->eus = 16, out->subslices = 4, out->slices = 8;
    out->resolution = 1, out->bits = 36, out->kernel_bits = 32;
    for (int i = 0; i < 16; i++) out->uuid[i] = (unsigned char)(0xf0 + i);
    out->uuid[15] = (unsigned char)device->index;
    snprintf(out->name, sizeof out->name, "Fake Arc %d", device->index);
    return leave(OK);
}
struct MemoryProperties { Head head; uint32_t flags, clock, width; uint64_t total; char name[256]; };
int zeDeviceGetMemoryProperties(Device *device, uint32_t *count, struct MemoryProperties *out) {
    BARE(device);
    if (out && *count) {
        IS(out, MEMORY_PROPERTIES);
        out->total = memory_bytes;
    }
    *count = 1;
    return leave(OK);
}
struct Access { Head head; uint32_t host, device, shared, cross, system; };
int zeDeviceGetMemoryAccessProperties(Device *device, struct Access *out) {
    BARE(device);
    IS(out, ACCESS_PROPERTIES);
    out->host = out->device = 7, out->shared = getenv("FAKE_ZE_SLOW_SHARED") ? 1 : 7;
    return leave(OK);
}
struct Group { Head head; uint32_t flags; size_t pattern; uint32_t queues; };
static size_t longest(void) { return getenv("FAKE_ZE_PATTERN") ? (size_t)atoi(getenv("FAKE_ZE_PATTERN")) : 128; }
int zeDeviceGetCommandQueueGroupProperties(Device *device, uint32_t *count, struct Group *out) {
    BARE(device);
    if (out && *count >= 2) { /* the first copies only */
        IS(out, GROUP_PROPERTIES);
        IS(out + 1, GROUP_PROPERTIES);
        out[0].flags = 2, out[0].pattern = 4, out[0].queues = 1;
        out[1].flags = 3, out[1].pattern = longest(), out[1].queues = 1;
    }
    *count = 2;
    return leave(OK);
}
struct Pci { Head head; uint32_t domain, bus, device, function; int32_t generation, width; int64_t bandwidth; };
int zeDevicePciGetPropertiesExt(Device *device, struct Pci *out) {
    BARE(device);
    IS(out, PCI_PROPERTIES);
    out->domain = 0, out->bus = 0xf8 + (uint32_t)device->index, out->device = out->function = 0;
    const char *at = getenv("FAKE_ZE_PCI"); /* of the first device */
    if (at && !device->index) sscanf(at, "%x:%x:%x.%x", &out->domain, &out->bus, &out->device, &out->function);
    return leave(OK);
}

int zeDeviceCanAccessPeer(Device *device, Device *peer, unsigned char *out) {
    BARE(device);
    *out = device == peer || (device->peers >> peer->index & 1);
    return leave(OK);
}
struct Compute { Head head; uint32_t total, size[3], count[3], shared, sizes, simd[8]; };
int zeDeviceGetComputeProperties(Device *device, struct Compute *out) {
    BARE(device);
    IS(out, COMPUTE_PROPERTIES);
    out->total = 1024, out->shared = 65536, out->sizes = 1, out->simd[0] = 16;
    for (int i = 0; i < 3; i++) out->size[i] = 1024, out->count[i] = 0xFFFFFFFFu;
    return leave(OK);
}

/* -- contexts and lists -------------------------------------------------------------------------------- */

int zeContextCreate(void *d, void *desc, Context **out) {
    BARE(NULL);
    IS(desc, CONTEXT_DESC);
    if (d != &driver) return leave(INVALID);
    *out = calloc(1, sizeof **out);
    live_things++;
    return leave(OK);
}
int zeContextDestroy(Context *c) { BARE(NULL); free(c), live_things--; return leave(OK); }
struct QueueDesc { Head head; uint32_t ordinal, index, flags; int mode, priority; };
int zeCommandListCreateImmediate(Context *c, Device *device, struct QueueDesc *desc, List **out) {
    BARE(device);
    IS(desc, QUEUE_DESC);
    if (!c || desc->ordinal != 1 || desc->index || desc->mode != 2 || desc->priority < 0 || desc->priority > 2)
        return leave(INVALID);
    *out = calloc(1, sizeof **out);
    (*out)->stream = new_stream(device), (*out)->ordered = 1, (*out)->context = c;
    return leave(OK);
}
int zeCommandListDestroy(List *l) {
    BARE(l->stream->device);
    if (l->stream->head) return leave(INVALID);
    end_stream(l->stream), free(l);
    return leave(OK);
}
static void put(List *l, Op op) {
    Op *made = malloc(sizeof *made);
    *made = op, made->next = NULL, remark(made->mark);
    queue(l->stream, made);
}
/* 0 when the signal may be set by a command; it then will be. */
static int sign(Event *e) {
    if (!e) return OK;
    if (e->queued || e->mark->done) return INVALID;
    e->queued = 1, e->mark->left = 1;
    return OK;
}
int zeCommandListAppendBarrier(List *l, Event *signal, uint32_t count, Event **waits) {
    BARE(l->stream->device);
    if (sign(signal)) return leave(INVALID);
    for (uint32_t i = 0; i < count; i++) put(l, (Op){.what = WAIT, .mark = waits[i]->mark});
    if (signal) put(l, (Op){.what = RECORD, .mark = signal->mark});
    l->ordered = 1;
    return leave(OK);
}
#define ORDERED(l) do { if (!(l)->ordered || signal || count || waits) return leave(INVALID); (l)->ordered = 0; } while (0)
int zeCommandListAppendMemoryCopy(List *l, uint64_t dst, uint64_t src, size_t bytes, Event *signal, uint32_t count, Event **waits) {
    BARE(l->stream->device);
    Allocation *a = owner(dst), *b = owner(src);
    if ((a && a->context != l->context) || (b && b->context != l->context)) return leave(INVALID);
    ORDERED(l);
    put(l, (Op){.what = COPY, .dst = dst, .src = src, .bytes = bytes});
    return leave(OK);
}
int zeCommandListAppendMemoryFill(List *l, uint64_t dst, const void *pattern, size_t width, size_t bytes, Event *signal, uint32_t count, Event **waits) {
    BARE(l->stream->device);
    if (width > longest() || width > 16) return leave(UNSUPPORTED_SIZE);
    if (!width || width & (width - 1) || bytes % width || dst % width) return leave(INVALID);
    ORDERED(l);
    Op op = {.what = SET, .dst = dst, .width = (int)width, .bytes = bytes / width, .pitch = bytes, .rows = 1};
    memcpy(op.pattern, pattern, width);
    put(l, op);
    return leave(OK);
}
int zeCommandListAppendWriteGlobalTimestamp(List *l, uint64_t dst, Event *signal, uint32_t count, Event **waits) {
    BARE(l->stream->device);
    if (!l->ordered || count || waits || !signal || sign(signal)) return leave(INVALID);
    put(l, (Op){.what = RECORD, .mark = signal->mark, .dst = dst});
    l->ordered = 0;
    return leave(OK);
}

/* -- events ------------------------------------------------------------------------------------------------ */

struct PoolDesc { Head head; uint32_t flags, count; };
int zeEventPoolCreate(Context *c, struct PoolDesc *desc, uint32_t count, Device **of, Pool **out) {
    BARE(NULL);
    IS(desc, POOL_DESC);
    if (!c || count || of || !(desc->flags & 1)) return leave(INVALID); /* for every device */
    *out = calloc(1, sizeof **out);
    (*out)->count = desc->count;
    live_things++;
    return leave(OK);
}
int zeEventPoolDestroy(Pool *p) {
    BARE(NULL);
    if (p->left) return leave(INVALID);
    free(p), live_things--;
    return leave(OK);
}
struct EventDesc { Head head; uint32_t index, signal, wait; };
int zeEventCreate(Pool *p, struct EventDesc *desc, Event **out) {
    BARE(NULL);
    IS(desc, EVENT_DESC);
    if (desc->index >= p->count || !(desc->signal & 4)) return leave(INVALID);
    *out = calloc(1, sizeof **out);
    (*out)->mark = calloc(1, sizeof(Mark)), (*out)->mark->refs = 1, (*out)->pool = p;
    p->left++, live_things++;
    return leave(OK);
}
int zeEventDestroy(Event *e) {
    BARE(NULL);
    for (Stream *s = streams; s; s = s->next)
        for (Op *op = s->head; op; op = op->next)
            if (op->what == WAIT && op->mark == e->mark) return leave(INVALID); /* it will look at it */
    e->pool->left--, live_things--;
    unmark(e->mark), free(e);
    return leave(OK);
}
int zeEventQueryStatus(Event *e) {
    BARE(NULL);
    for (int i = 0; i < MOST_DEVICES; i++) if (devices[i].sticky) return leave(devices[i].sticky);
    return leave(e->mark->done ? OK : NOT_READY);
}
int zeEventHostReset(Event *e) {
    BARE(NULL);
    if (e->queued && !e->mark->done) return leave(INVALID);
    e->queued = 0, e->mark->done = 0;
    return leave(OK);
}

/* -- memory --------------------------------------------------------------------------------------------------- */

int zeMemAllocDevice(Context *c, void *desc, size_t bytes, size_t alignment, Device *device, uint64_t *out) {
    BARE(device);
    IS(desc, DEVICE_MEM_DESC);
    (void)alignment;
    if (!c || !bytes) return leave(INVALID);
    if (bytes > room(device)) return leave(OOM);
    *out = take(device, bytes, DEVICE), owner(*out)->context = c;
    return leave(OK);
}
int zeMemAllocShared(Context *c, void *desc, void *host, size_t bytes, size_t alignment, Device *device, uint64_t *out) {
    BARE(device);
    IS(desc, DEVICE_MEM_DESC);
    IS(host, HOST_MEM_DESC);
    (void)alignment;
    if (!c || !bytes) return leave(INVALID);
    if (bytes > room(device)) return leave(OOM);
    *out = take(device, bytes, MANAGED), owner(*out)->context = c;
    return leave(OK);
}
int zeMemAllocHost(Context *c, void *desc, size_t bytes, size_t alignment, uint64_t *out) {
    BARE(NULL);
    IS(desc, HOST_MEM_DESC);
    (void)alignment;
    if (!c || !bytes || bytes > memory_bytes) return leave(bytes > memory_bytes ? 0x70000002 : INVALID);
    *out = take(&devices[0], bytes, PINNED), owner(*out)->context = c;
    return leave(OK);
}
int zeMemFree(Context *c, uint64_t ptr) {
    BARE(NULL);
    Allocation *a = whole(ptr);
    if (!c || !a) return leave(INVALID);
    drop(a);
    return leave(OK);
}

/* -- modules and kernels --------------------------------------------------------------------------------------- */

struct ModuleDesc { Head head; int format; size_t bytes; const char *code, *flags; const void *constants; };
int zeModuleCreate(Context *c, Device *device, struct ModuleDesc *desc, Module **out, char **log) {
    BARE(device);
    IS(desc, MODULE_DESC);
    if (!c) return leave(INVALID);
    if (desc->format) return leave(UNSUPPORTED_ENUM);
    const char *object = desc->code + 20;
    *out = desc->bytes > 84 && object_size(object) < desc->bytes - 20 ? load_object(device, object) : NULL;
    if (log) *log = strdup(*out ? "" : "line 3: a word that the fake does not know"), live_things++;
    return leave(*out ? OK : BUILD_FAILURE);
}
int zeModuleBuildLogGetString(char *log, size_t *bytes, char *out) {
    BARE(NULL);
    size_t room_for = *bytes;
    *bytes = strlen(log) + 1;
    if (out) snprintf(out, room_for, "%s", log);
    return leave(OK);
}
int zeModuleBuildLogDestroy(char *log) { BARE(NULL); free(log), live_things--; return leave(OK); }
static int is_running(const Module *m) {
    for (Stream *s = streams; s; s = s->next)
        for (Op *op = s->head; op; op = op->next)
            for (int i = 0; i < m->count; i++) if (op->function == m->functions[i]) return 1;
    return 0;
}
int zeModuleDestroy(Module *m) {
    BARE(m->device);
    if (m->users || is_running(m)) return leave(INVALID);
    drop_module(m);
    return leave(OK);
}
struct KernelDesc { Head head; uint32_t flags; const char *name; };
int zeKernelCreate(Module *m, struct KernelDesc *desc, Kernel **out) {
    BARE(m->device);
    IS(desc, KERNEL_DESC);
    Function *f = find_function(m, desc->name);
    if (!f) return leave(NO_SUCH_KERNEL);
    f->dynamic = 65536;
    *out = calloc(1, sizeof **out);
    **out = (Kernel){.module = m, .function = f};
    m->users++, live_things++;
    return leave(OK);
}
int zeKernelDestroy(Kernel *k) {
    BARE(k->module->device);
    if (is_running(k->module)) return leave(INVALID);
    k->module->users--, live_things--, free(k);
    return leave(OK);
}
struct KernelProperties { Head head; uint32_t count, group[3], groups, simd, most_simd, most_groups, local, private, spill; unsigned char uuid[32]; };
int zeKernelGetProperties(Kernel *k, struct KernelProperties *out) {
    BARE(k->module->device);
    IS(out, KERNEL_PROPERTIES);
    out->count = (uint32_t)k->function->count, out->most_simd = 16;
    return leave(OK);
}
int zeKernelSetGroupSize(Kernel *k, uint32_t x, uint32_t y, uint32_t z) {
    BARE(k->module->device);
    if (!x || !y || !z || (uint64_t)x * y * z > 1024) return leave(INVALID);
    k->group[0] = x, k->group[1] = y, k->group[2] = z;
    return leave(OK);
}
int zeKernelSetArgumentValue(Kernel *k, uint32_t index, size_t bytes, const void *value) {
    BARE(k->module->device);
    if ((int)index >= k->function->count || (int)bytes != k->function->sizes[index]) return leave(INVALID);
    if (value) memcpy(k->values[index], value, bytes);
    k->set |= 1 << index;
    return leave(OK);
}
int zeCommandListAppendLaunchKernel(List *l, Kernel *k, const uint32_t *groups, Event *signal, uint32_t count, Event **waits) {
    BARE(l->stream->device);
    Function *f = k->function;
    void *params[MOST_PARAMS];
    if (k->module->device != l->stream->device || !k->group[0] || k->set != (1 << f->count) - 1) return leave(INVALID);
    for (int i = 0; i < 3; i++) if (!groups[i]) return leave(INVALID);
    ORDERED(l);
    for (int i = 0; i < f->count; i++) params[i] = k->values[i];
    Op op = {.what = KERNEL, .function = f, .params = pack(f, params)};
    memcpy(op.range.grid, groups, 12), memcpy(op.range.block, k->group, 12);
    op.range.count = (uint64_t)groups[0] * groups[1] * groups[2];
    put(l, op);
    return leave(OK);
}

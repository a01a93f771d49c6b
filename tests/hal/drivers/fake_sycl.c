/* A stand-in for dpctl's libDPCTLSyclInterface: the functions that the sycl driver binds, less kernels,
 * which it gets through OpenCL only. See fake_core.h for what it is and how it is told to fail: a call
 * that fails gives null, as dpctl's do. Whatever is given has to be deleted, which fake_things() counts.
 *   FAKE_SYCL_LIST="BACKEND/PLATFORM/NAME,..."  what is listed; BACKEND is opencl, level_zero or cpu
 *   FAKE_SYCL_WITHOUT=N                         an aspect that no device has
 */
#define FAKE "FAKE_SYCL"
#include "fake_core.h"
#include <stdbool.h>

enum { LOST = 99 };
enum { UNKNOWN, SUBMITTED, RUNNING, COMPLETE };
enum { LEVEL_ZERO = 1 << 17, OPENCL = 1 << 18, CPU = 1 << 2, GPU = 1 << 4 };

typedef struct Sycl { Device *device; int backend, type; char platform[64], name[64]; } Sycl;
typedef struct { int count; Sycl all[MOST_DEVICES]; } Vector;
typedef struct { Mark *mark; Device *device; } Event;
typedef struct { Device *device; } Context;

static int is_lost(int code) { return code == LOST; }
static int illegal(void) { return LOST; }
static int run_ops(Device *device, struct Exec *exec) { (void)device, (void)exec; return 0; }
static void drop_exec(struct Exec *exec) { (void)exec; }

#define BEGIN(device, failed) do { if (enter(__func__, device)) return failed; } while (0)
#define GIVE(value) do { live_things++; pthread_mutex_unlock(&lock); return value; } while (0)
#define TELL(value) do { pthread_mutex_unlock(&lock); return value; } while (0)

static void *gone(void *given) { /* of what was given; under the lock */
    if (given) live_things--;
    free(given);
    return NULL;
}

/* -- devices ------------------------------------------------------------------------------------------- */

Vector *DPCTLDeviceMgr_GetDevices(int wanted) {
    BEGIN(NULL, NULL);
    Vector *v = calloc(1, sizeof *v);
    char copy[1024], *save = NULL;
    const char *list = getenv("FAKE_SYCL_LIST");
    snprintf(copy, sizeof copy, "%s", list ? list : "level_zero/Fake/Fake Arc 0,level_zero/Fake/Fake Arc 1");
    for (char *p = strtok_r(copy, ",", &save); wanted && p && v->count < MOST_DEVICES; p = strtok_r(NULL, ",", &save)) {
        Sycl *s = &v->all[v->count];
        char backend[32];
        if (sscanf(p, "%31[^/]/%63[^/]/%63[^\n]", backend, s->platform, s->name) != 3) continue;
        s->backend = strcmp(backend, "level_zero") ? OPENCL : LEVEL_ZERO;
        s->type = strcmp(backend, "cpu") ? GPU : CPU;
        s->device = &devices[v->count++];
    }
    GIVE(v);
}
size_t DPCTLDeviceVector_Size(Vector *v) { BEGIN(NULL, 0); TELL((size_t)v->count); }
Sycl *DPCTLDeviceVector_GetAt(Vector *v, size_t at) {
    BEGIN(NULL, NULL);
    if (at >= (size_t)v->count) TELL(NULL);
    Sycl *s = malloc(sizeof *s);
    *s = v->all[at];
    GIVE(s);
}
void DPCTLDeviceVector_Delete(Vector *v) { BEGIN(NULL, ); gone(v); TELL(); }
void DPCTLDevice_Delete(Sycl *s) { BEGIN(NULL, ); gone(s); TELL(); }

static char *words(const char *text) { live_things++; pthread_mutex_unlock(&lock); return strdup(text); }
char *DPCTLDevice_GetName(Sycl *s) { BEGIN(NULL, NULL); return words(s->name); }
char *DPCTLDevice_GetVendor(Sycl *s) { BEGIN(NULL, NULL); (void)s; return words("Intel(R) Corporation"); }
char *DPCTLDevice_GetDriverVersion(Sycl *s) { BEGIN(NULL, NULL); (void)s; return words("1.2.3"); }
Sycl *DPCTLDevice_GetPlatform(Sycl *s) {
    BEGIN(NULL, NULL);
    Sycl *copy = malloc(sizeof *copy);
    *copy = *s;
    GIVE(copy);
}
char *DPCTLPlatform_GetName(Sycl *s) { BEGIN(NULL, NULL); return words(s->platform); }
void DPCTLPlatform_Delete(Sycl *s) { BEGIN(NULL, ); gone(s); TELL(); }
void DPCTLCString_Delete(char *text) { BEGIN(NULL, ); gone(text); TELL(); }
void DPCTLSize_t_Array_Delete(size_t *all) { BEGIN(NULL, ); gone(all); TELL(); }
int DPCTLDevice_GetBackend(Sycl *s) { BEGIN(NULL, 0); TELL(s->backend); }
int DPCTLDevice_GetDeviceType(Sycl *s) { BEGIN(NULL, 0); TELL(s->type); }
uint64_t DPCTLDevice_GetGlobalMemSize(Sycl *s) { BEGIN(NULL, 0); (void)s; TELL(memory_bytes); }
uint64_t DPCTLDevice_GetLocalMemSize(Sycl *s) { BEGIN(NULL, 0); (void)s; TELL(65536); }
uint32_t DPCTLDevice_GetMaxComputeUnits(Sycl *s) { BEGIN(NULL, 0); (void)s; TELL(8); }
uint32_t DPCTLDevice_GetMaxClockFrequency(Sycl *s) { BEGIN(NULL, 0); (void)s; TELL(2400); }
size_t DPCTLDevice_GetMaxWorkGroupSize(Sycl *s) { BEGIN(NULL, 0); (void)s; TELL(1024); }
size_t *DPCTLDevice_GetMaxWorkItemSizes3d(Sycl *s) {
    BEGIN(NULL, NULL);
    (void)s;
    size_t *all = malloc(3 * sizeof *all);
    all[0] = 64, all[1] = 512, all[2] = 1024; /* the slowest first */
    GIVE(all);
}
bool DPCTLDevice_HasAspect(Sycl *s, int aspect) {
    BEGIN(NULL, false);
    (void)s;
    const char *without = getenv("FAKE_SYCL_WITHOUT");
    TELL(!without || atoi(without) != aspect);
}

/* -- contexts, queues, events ---------------------------------------------------------------------------- */

Context *DPCTLContext_Create(Sycl *s, void (*handler)(int), int properties) {
    BEGIN(s->device, NULL);
    if (!handler || properties) TELL(NULL);
    Context *c = malloc(sizeof *c);
    c->device = s->device;
    GIVE(c);
}
void DPCTLContext_Delete(Context *c) { BEGIN(NULL, ); gone(c); TELL(); }
Stream *DPCTLQueue_Create(Context *c, Sycl *s, void (*handler)(int), int properties) {
    BEGIN(s->device, NULL);
    if (!c || c->device != s->device || !handler || !(properties & 2)) TELL(NULL); /* in order */
    Stream *made = new_stream(s->device);
    TELL(made);
}
void DPCTLQueue_Delete(Stream *s) { BEGIN(NULL, ); end_stream(s); TELL(); }

static Event *put(Stream *s, Op *ops, int count) { /* and an event behind; the lock goes */
    Event *e = malloc(sizeof *e);
    e->mark = calloc(1, sizeof *e->mark);
    e->mark->refs = 1, e->mark->left = 1, e->device = s->device;
    for (int i = 0; i <= count; i++) {
        Op *made = malloc(sizeof *made);
        *made = i < count ? ops[i] : (Op){.what = RECORD, .mark = e->mark};
        made->next = NULL, remark(made->mark);
        queue(s, made);
    }
    GIVE(e);
}
Event *DPCTLQueue_SubmitBarrier(Stream *s) { BEGIN(s->device, NULL); return put(s, NULL, 0); }
Event *DPCTLQueue_SubmitBarrierForEvents(Stream *s, Event **waits, size_t count) {
    BEGIN(s->device, NULL);
    Op ops[8];
    if (count > 8) TELL(NULL);
    for (size_t i = 0; i < count; i++) ops[i] = (Op){.what = WAIT, .mark = waits[i]->mark};
    return put(s, ops, (int)count);
}
Event *DPCTLQueue_Memcpy(Stream *s, uint64_t dst, uint64_t src, size_t bytes) {
    BEGIN(s->device, NULL);
    Op op = {.what = COPY, .dst = dst, .src = src, .bytes = bytes};
    return put(s, &op, 1);
}
static Event *fill(Stream *s, uint64_t dst, const void *pattern, int width, size_t count) {
    if (dst % (unsigned)width) TELL(NULL);
    Op op = {.what = SET, .dst = dst, .width = width, .bytes = count, .pitch = count * (unsigned)width, .rows = 1};
    memcpy(op.pattern, pattern, (size_t)width);
    return put(s, &op, 1);
}
#define FILL(bits) Event *DPCTLQueue_Fill##bits(Stream *s, uint64_t dst, uint##bits##_t value, size_t count) { \
    BEGIN(s->device, NULL); return fill(s, dst, &value, bits / 8, count); }
FILL(8)
FILL(16)
FILL(32)
FILL(64)
Event *DPCTLQueue_Fill128(Stream *s, uint64_t dst, const void *value, size_t count) {
    BEGIN(s->device, NULL);
    return fill(s, dst, value, 16, count);
}
int DPCTLEvent_GetCommandExecutionStatus(Event *e) {
    BEGIN(e->device, UNKNOWN);
    TELL(e->mark->done ? COMPLETE : RUNNING);
}
uint64_t DPCTLEvent_GetProfilingInfoEnd(Event *e) {
    BEGIN(e->device, 0);
    TELL(e->mark->done ? (uint64_t)(e->mark->at * 1e9) : 0);
}
Event *DPCTLEvent_Copy(Event *e) {
    BEGIN(NULL, NULL);
    Event *copy = malloc(sizeof *copy);
    *copy = *e, remark(e->mark);
    GIVE(copy);
}
void DPCTLEvent_Delete(Event *e) { BEGIN(NULL, ); unmark(e->mark), gone(e); TELL(); }

/* -- memory --------------------------------------------------------------------------------------------------- */

static uint64_t give(Stream *s, size_t alignment, size_t bytes, int kind) {
    uint64_t found = bytes && bytes <= room(s->device) && alignment <= PAGE ? take(s->device, bytes, kind) : 0;
    TELL(found);
}
uint64_t DPCTLaligned_alloc_device(size_t a, size_t n, Stream *s) { BEGIN(s->device, 0); return give(s, a, n, DEVICE); }
uint64_t DPCTLaligned_alloc_host(size_t a, size_t n, Stream *s) { BEGIN(s->device, 0); return give(s, a, n, PINNED); }
uint64_t DPCTLaligned_alloc_shared(size_t a, size_t n, Stream *s) { BEGIN(s->device, 0); return give(s, a, n, MANAGED); }
void DPCTLfree_with_context(uint64_t ptr, Context *c) {
    BEGIN(NULL, );
    Allocation *a = whole(ptr);
    if (a && c) drop(a);
    TELL();
}

/* -- kernels: none ---------------------------------------------------------------------------------------------- */

#define NONE(name) void *name(void) { BEGIN(NULL, NULL); TELL(NULL); }
NONE(DPCTLQueue_SubmitNDRange)
NONE(DPCTLKernelBundle_CreateFromOCLSource)
NONE(DPCTLKernelBundle_CreateFromSpirv)
NONE(DPCTLKernelBundle_GetKernel)
NONE(DPCTLKernelBundle_Delete)
NONE(DPCTLKernel_GetWorkGroupSize)
NONE(DPCTLKernel_GetPrivateMemSize)
NONE(DPCTLKernel_Delete)

/* A stand-in for an OpenCL platform, behind the machine's own loader. It is strict: what a version
 * lacks aborts, queued work happens only once its queue was flushed, a queue waits for no event of a
 * queue that was not, and what is used after its release aborts. Of kernels it knows a few names, so
 * that order can be seen. It proves nothing about results.
 *
 * FAKE_CL_NAME, FAKE_CL_VERSION (120, 200, 300), FAKE_CL_TYPE (cpu, gpu), FAKE_CL_DEVICES,
 * FAKE_CL_SVM (capability bits), FAKE_CL_USM=1, FAKE_CL_EXTENSIONS, FAKE_CL_MEMORY (bytes),
 * FAKE_CL_COMPILER=0, FAKE_CL_IL=1 (a "SPIR-V" of four bytes and text). FAKE_CL_HANG=load|devices|build, FAKE_CL_ABORT likewise, FAKE_CL_NO_BINARY=1,
 * FAKE_CL_REFUSE_BINARY=1. FAKE_CL_FAULT="FUNCTION:N:CODE,..." makes the N-th call of a function
 * (0: each) return CODE; fake_cl_fail() does the same.
 */
#define _GNU_SOURCE
#define CL_TARGET_OPENCL_VERSION 300
#define CL_USE_DEPRECATED_OPENCL_1_1_APIS
#define CL_USE_DEPRECATED_OPENCL_1_2_APIS
#include <CL/cl.h>
#include <CL/cl_ext.h>
#include <CL/cl_icd.h>
#include <ctype.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define MAGIC "FAKECL01"
enum { MOST_ARGUMENTS = 16, MOST_DEVICES = 4 };
enum { CONTEXTS, QUEUES, EVENTS, MEMORY, PROGRAMS, KERNELS, KINDS };
enum { COPY, FILL, RUN, MARK };

#define HEAD const cl_icd_dispatch *dispatch; int kind, references
struct _cl_platform_id { const cl_icd_dispatch *dispatch; };
struct _cl_device_id { const cl_icd_dispatch *dispatch; int index; };
struct _cl_context { HEAD; };
struct _cl_event { HEAD; int status; cl_command_queue queue; uint64_t at; };
struct _cl_mem { HEAD; char *bytes; size_t size; cl_mem parent; int mapped; };
struct _cl_program { HEAD; char *text; int built, from_source; };
typedef struct { char type; size_t size; } parameter; /* 'p'ointer, 'l'ocal, 'v'alue */
struct _cl_kernel {
    HEAD; char name[64]; unsigned count; parameter parameters[MOST_ARGUMENTS];
    int set[MOST_ARGUMENTS]; unsigned char values[MOST_ARGUMENTS][64]; size_t local[MOST_ARGUMENTS];
};
typedef struct command {
    int what, flushed, code; char *dst; const char *src; size_t size, width; unsigned char pattern[128];
    char name[64]; unsigned char values[MOST_ARGUMENTS][64]; size_t threads;
    cl_event event; cl_event waits[8]; unsigned waiting; struct command *next;
} command;
struct _cl_command_queue { HEAD; command *head, *tail; int profiling, priority; };

static cl_icd_dispatch table;
static struct _cl_platform_id platform = {&table};
static struct _cl_device_id devices[MOST_DEVICES];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int live[KINDS], released, priorities[64], queues_made;
static struct { char *start; size_t size; int live; } spans[65536];
static int spans_used;
static size_t used_bytes;
static cl_command_queue every[4096];
static char faults[1024];

static void die(const char *why) {
    fprintf(stderr, "fake_opencl: %s\n", why);
    abort();
}

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text && *text ? strtol(text, NULL, 0) : otherwise;
}

static int is(const char *name, const char *word) {
    const char *text = getenv(name);
    return text && !strcmp(text, word);
}

static void trouble(const char *where) {
    if (is("FAKE_CL_ABORT", where)) die(where);
    while (is("FAKE_CL_HANG", where)) sleep(1);
}

/* The code that this call of a function must return; 0: none. */
static cl_int fault(const char *function) {
    static struct { char name[48]; int nth, code; } known[32];
    static int count, read;
    if (!read) {
        read = 1;
        const char *given = getenv("FAKE_CL_FAULT");
        if (given) snprintf(faults, sizeof faults, "%s", given);
    }
    if (*faults) {
        char *rest = faults, *part;
        while ((part = strtok_r(rest, ",", &rest)) && count < 32)
            if (sscanf(part, "%47[^:]:%d:%d", known[count].name, &known[count].nth,
                       &known[count].code) == 3)
                count++;
        *faults = 0;
    }
    for (int i = 0; i < count; i++) {
        if (strcmp(known[i].name, function) || known[i].nth < 0) continue;
        if (known[i].nth == 0) return known[i].code;
        if (--known[i].nth == 0) {
            known[i].nth = -1;
            return known[i].code;
        }
    }
    return 0;
}

#define FAULT(name) do { cl_int f = fault(name); if (f) return f; } while (0)
#define FAULT_TO(name, where) \
    do { cl_int f = fault(name); if (f) { if (where) *(where) = f; return NULL; } } while (0)
#define OK(where) do { if (where) *(where) = CL_SUCCESS; } while (0)

void fake_cl_fail(const char *function, int nth, int code) {
    pthread_mutex_lock(&lock);
    snprintf(faults, sizeof faults, "%s:%d:%d", function, nth, code);
    pthread_mutex_unlock(&lock);
    fault("");
}
int fake_cl_live(int kind) { return live[kind]; }
int fake_cl_spans(void) {
    int count = 0;
    for (int i = 0; i < spans_used; i++) count += spans[i].live;
    return count;
}
int fake_cl_priority(int nth) { return nth < queues_made ? priorities[nth] : -1; }

static void *make(size_t size, int kind) {
    struct _cl_context *made = calloc(1, size);
    made->dispatch = &table;
    made->kind = kind;
    made->references = 1;
    live[kind]++;
    return made;
}

static void alive(void *object, int kind) {
    struct _cl_context *it = object;
    if (!it || it->dispatch != &table || it->kind != kind || it->references < 1)
        die("a handle that is none, or was released");
}

/* 1: it was the last reference. The memory is never given back, so that a later use is seen. */
static int drop(void *object, int kind) {
    alive(object, kind);
    struct _cl_context *it = object;
    if (--it->references) return 0;
    live[kind]--;
    return 1;
}

/* -- memory that has an address -------------------------------------------------------------- */

static char *span_new(size_t size, size_t room) {
    if (size > room || used_bytes + size > (size_t)setting("FAKE_CL_MEMORY", 1 << 30)) return NULL;
    char *start = aligned_alloc(4096, (size + 8191) / 4096 * 4096);
    if (!start || spans_used == 65536) return NULL;
    memset(start, 0xEE, size);
    spans[spans_used].start = start;
    spans[spans_used].size = size;
    spans[spans_used++].live = 1;
    used_bytes += size;
    return start;
}

static int span_of(const void *at) {
    for (int i = spans_used; i--;)
        if ((const char *)at >= spans[i].start && (const char *)at < spans[i].start + spans[i].size)
            return i;
    return -1;
}

static void span_free(void *start) {
    int i = span_of(start);
    if (i < 0 || spans[i].start != start || !spans[i].live) die("a free of no allocation");
    spans[i].live = 0;
    used_bytes -= spans[i].size;
}

static void in_a_span(const void *at, size_t size) {
    int i = span_of(at);
    if (i < 0 || !spans[i].live || (const char *)at + size > spans[i].start + spans[i].size)
        die("memory that is not allocated");
}

static void not_freed(const void *at) {
    int i = span_of(at);
    if (i >= 0 && !spans[i].live) die("memory that was freed");
}

/* -- queues: nothing happens before a flush -------------------------------------------------- */

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void run(command *c) {
    if (c->what == COPY) {
        not_freed(c->dst);
        not_freed(c->src);
        memcpy(c->dst, c->src, c->size);
    } else if (c->what == FILL) {
        not_freed(c->dst);
        for (size_t i = 0; i < c->size; i++) c->dst[i] = (char)c->pattern[i % c->width];
    } else if (c->what == RUN && !strcmp(c->name, "add")) {
        int *out;
        int by;
        memcpy(&out, c->values[0], sizeof out);
        memcpy(&by, c->values[1], sizeof by);
        not_freed(out);
        for (size_t i = 0; out && i < c->threads; i++) out[i] += by;
    }
}

static int queue_step(cl_command_queue q) {
    command *c = q->head;
    if (!c || !c->flushed) return 0;
    if (c->what == RUN && !strcmp(c->name, "hold") && !released) return 0;
    int code = c->code;
    for (unsigned i = 0; i < c->waiting; i++) {
        if (c->waits[i]->status > 0) return 0;
        if (c->waits[i]->status < 0) code = CL_EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST;
    }
    if (!code) run(c);
    if (c->event) {
        c->event->status = code ? code : CL_COMPLETE;
        c->event->at = now();
        if (drop(c->event, EVENTS)) {}
    } else if (code && c->next) {
        c->next->code = code; /* told by whatever comes next and can tell */
    }
    for (unsigned i = 0; i < c->waiting; i++) drop(c->waits[i], EVENTS);
    q->head = c->next;
    if (!q->head) q->tail = NULL;
    free(c);
    return 1;
}

static char *dying[1024]; /* memory of buffers that were released, while commands may need it */
static int dying_count;

static void step(void) {
    for (int again = 1; again;) {
        again = 0;
        for (int i = 0; i < queues_made; i++)
            while (every[i] && queue_step(every[i])) again = 1;
    }
    for (int i = 0; i < queues_made; i++)
        if (every[i] && every[i]->head) return;
    while (dying_count) span_free(dying[--dying_count]);
}

void fake_cl_release(int on) {
    pthread_mutex_lock(&lock);
    released = on;
    step();
    pthread_mutex_unlock(&lock);
}

static cl_int push(cl_command_queue q, command *c, cl_uint waiting, const cl_event *waits,
                   cl_event *event) {
    alive(q, QUEUES);
    for (cl_uint i = 0; i < waiting; i++) {
        alive(waits[i], EVENTS);
        waits[i]->references++;
        c->waits[i] = waits[i];
    }
    c->waiting = waiting;
    if (event) {
        *event = c->event = make(sizeof **event, EVENTS);
        c->event->references = 2; /* the caller's and ours */
        c->event->status = CL_QUEUED;
        c->event->queue = q;
    }
    if (q->tail) q->tail->next = c;
    else q->head = c;
    q->tail = c;
    return CL_SUCCESS;
}

static command *new_command(int what) {
    command *c = calloc(1, sizeof *c);
    c->what = what;
    return c;
}

#define LOCKED(expression) \
    do { \
        pthread_mutex_lock(&lock); \
        cl_int r = (expression); \
        pthread_mutex_unlock(&lock); \
        return r; \
    } while (0)

static cl_int CL_API_CALL flush(cl_command_queue q) {
    FAULT("clFlush");
    pthread_mutex_lock(&lock);
    alive(q, QUEUES);
    for (command *c = q->head; c; c = c->next) c->flushed = 1;
    step();
    pthread_mutex_unlock(&lock);
    return CL_SUCCESS;
}

static cl_command_queue queue_new(cl_context context, uint64_t flags, int priority, cl_int *code) {
    alive(context, CONTEXTS);
    if (queues_made == 4096) die("too many queues");
    cl_command_queue q = make(sizeof *q, QUEUES);
    q->profiling = !!(flags & CL_QUEUE_PROFILING_ENABLE);
    if (queues_made < 64) priorities[queues_made] = priority;
    every[queues_made++] = q;
    OK(code);
    return q;
}

static cl_command_queue CL_API_CALL create_queue(cl_context context, cl_device_id device,
                                                 cl_command_queue_properties flags, cl_int *code) {
    (void)device;
    FAULT_TO("clCreateCommandQueue", code);
    return queue_new(context, flags, 0, code);
}

static cl_command_queue CL_API_CALL create_queue_2(cl_context context, cl_device_id device,
                                                   const cl_queue_properties *p, cl_int *code) {
    (void)device;
    FAULT_TO("clCreateCommandQueueWithProperties", code);
    uint64_t flags = 0;
    int priority = 0;
    for (; p && *p; p += 2) {
        if (*p == CL_QUEUE_PROPERTIES) flags = p[1];
        else if (*p == CL_QUEUE_PRIORITY_KHR) priority = (int)p[1];
        else die("an unknown property of a queue");
    }
    return queue_new(context, flags, priority, code);
}

static cl_int CL_API_CALL release_queue(cl_command_queue q) {
    flush(q);
    pthread_mutex_lock(&lock);
    drop(q, QUEUES);
    pthread_mutex_unlock(&lock);
    return CL_SUCCESS;
}

static cl_int CL_API_CALL marker(cl_command_queue q, cl_uint n, const cl_event *w, cl_event *e) {
    FAULT("clEnqueueMarkerWithWaitList");
    cl_int status = fault("status");
    command *c = new_command(MARK);
    c->code = status;
    LOCKED(push(q, c, n, w, e));
}

static cl_int CL_API_CALL barrier(cl_command_queue q, cl_uint n, const cl_event *w, cl_event *e) {
    FAULT("clEnqueueBarrierWithWaitList");
    LOCKED(push(q, new_command(MARK), n, w, e));
}

static cl_int CL_API_CALL retain_event(cl_event e) {
    pthread_mutex_lock(&lock);
    alive(e, EVENTS);
    e->references++;
    pthread_mutex_unlock(&lock);
    return CL_SUCCESS;
}
static cl_int CL_API_CALL release_event(cl_event e) {
    pthread_mutex_lock(&lock);
    drop(e, EVENTS);
    pthread_mutex_unlock(&lock);
    return CL_SUCCESS;
}

/* -- answers --------------------------------------------------------------------------------- */

static cl_int answer(const void *data, size_t size, size_t room, void *out, size_t *told) {
    if (told) *told = size;
    if (out && room < size) return CL_INVALID_VALUE;
    if (out) memcpy(out, data, size);
    return CL_SUCCESS;
}
#define TEXT(t) answer(t, strlen(t) + 1, room, out, told)
#define VALUE(type, v) do { type x = (type)(v); return answer(&x, sizeof x, room, out, told); } while (0)

static int version(void) { return (int)setting("FAKE_CL_VERSION", 300); }

static const char *version_text(const char *what) {
    static char text[2][64];
    int c = !!strstr(what, " C");
    snprintf(text[c], 64, "OpenCL %s%d.%d fake", c ? "C " : "", version() / 100, version() % 100 / 10);
    return text[c];
}

static cl_int CL_API_CALL event_info(cl_event e, cl_event_info what, size_t room, void *out,
                                     size_t *told) {
    FAULT("clGetEventInfo");
    if (what != CL_EVENT_COMMAND_EXECUTION_STATUS) return CL_INVALID_VALUE;
    pthread_mutex_lock(&lock);
    alive(e, EVENTS);
    cl_int status = e->status;
    pthread_mutex_unlock(&lock);
    VALUE(cl_int, status);
}

static cl_int CL_API_CALL profiling_info(cl_event e, cl_profiling_info what, size_t room, void *out,
                                         size_t *told) {
    FAULT("clGetEventProfilingInfo");
    if (!e->queue->profiling || e->status != CL_COMPLETE) return CL_PROFILING_INFO_NOT_AVAILABLE;
    if (what != CL_PROFILING_COMMAND_END) return CL_INVALID_VALUE;
    VALUE(cl_ulong, e->at);
}

CL_API_ENTRY cl_int CL_API_CALL clGetPlatformInfo(cl_platform_id p, cl_platform_info what,
                                                  size_t room, void *out, size_t *told) {
    (void)p;
    const char *name = getenv("FAKE_CL_NAME");
    switch (what) {
    case CL_PLATFORM_NAME: return TEXT(name ? name : "Fake");
    case CL_PLATFORM_VENDOR: return TEXT("Drivetrain's tests");
    case CL_PLATFORM_VERSION: return TEXT(version_text("OpenCL"));
    case CL_PLATFORM_PROFILE: return TEXT("FULL_PROFILE");
    case CL_PLATFORM_EXTENSIONS: return TEXT("cl_khr_icd");
    case CL_PLATFORM_ICD_SUFFIX_KHR: return TEXT("FAKE");
    }
    return CL_INVALID_VALUE;
}

static cl_int CL_API_CALL get_devices(cl_platform_id p, cl_device_type type, cl_uint room,
                                      cl_device_id *out, cl_uint *told) {
    (void)p;
    trouble("devices");
    FAULT("clGetDeviceIDs");
    cl_uint count = (cl_uint)setting("FAKE_CL_DEVICES", 1);
    cl_device_type ours = is("FAKE_CL_TYPE", "cpu") ? CL_DEVICE_TYPE_CPU : CL_DEVICE_TYPE_GPU;
    if (!count || !(type & ours)) return CL_DEVICE_NOT_FOUND;
    for (cl_uint i = 0; out && i < count && i < room; i++) {
        devices[i] = (struct _cl_device_id){&table, (int)i};
        out[i] = &devices[i];
    }
    if (told) *told = count;
    return CL_SUCCESS;
}

static cl_int CL_API_CALL device_info(cl_device_id d, cl_device_info what, size_t room, void *out,
                                      size_t *told) {
    const char *extensions = getenv("FAKE_CL_EXTENSIONS");
    char text[512];
    int cpu = is("FAKE_CL_TYPE", "cpu");
    switch (what) {
    case CL_DEVICE_TYPE: VALUE(cl_device_type, cpu ? CL_DEVICE_TYPE_CPU : CL_DEVICE_TYPE_GPU);
    case CL_DEVICE_NAME: return TEXT("Fake   device");
    case CL_DEVICE_VENDOR: return TEXT("NVIDIA Corporation");
    case CL_DEVICE_VENDOR_ID: VALUE(cl_uint, 0x8086);
    case CL_DRIVER_VERSION: return TEXT("1.2.3");
    case CL_DEVICE_VERSION: return TEXT(version_text("OpenCL"));
    case CL_DEVICE_OPENCL_C_VERSION: return TEXT(version_text("OpenCL C"));
    case CL_DEVICE_EXTENSIONS:
        snprintf(text, sizeof text, "cl_khr_byte_addressable_store %s%s",
                 setting("FAKE_CL_USM", 0) ? "cl_intel_unified_shared_memory " : "",
                 extensions ? extensions : "");
        return TEXT(text);
    case CL_DEVICE_IL_VERSION: return TEXT(setting("FAKE_CL_IL", 0) ? "SPIR-V_1.2" : "");
    case CL_DEVICE_AVAILABLE: VALUE(cl_bool, setting("FAKE_CL_AVAILABLE", 1));
    case CL_DEVICE_COMPILER_AVAILABLE: VALUE(cl_bool, setting("FAKE_CL_COMPILER", 1));
    case CL_DEVICE_MAX_COMPUTE_UNITS: VALUE(cl_uint, 4);
    case CL_DEVICE_MAX_CLOCK_FREQUENCY: VALUE(cl_uint, 1000);
    case CL_DEVICE_MAX_WORK_GROUP_SIZE: VALUE(size_t, 256);
    case CL_DEVICE_MAX_WORK_ITEM_SIZES: {
        size_t most[3] = {256, 256, 64};
        return answer(most, sizeof most, room, out, told);
    }
    case CL_DEVICE_MAX_MEM_ALLOC_SIZE: VALUE(cl_ulong, setting("FAKE_CL_MEMORY", 1 << 30) / 2);
    case CL_DEVICE_GLOBAL_MEM_SIZE: VALUE(cl_ulong, setting("FAKE_CL_MEMORY", 1 << 30));
    case CL_DEVICE_LOCAL_MEM_SIZE: VALUE(cl_ulong, 32768);
    case CL_DEVICE_MEM_BASE_ADDR_ALIGN: VALUE(cl_uint, 1024);
    case CL_DEVICE_HOST_UNIFIED_MEMORY: VALUE(cl_bool, cpu);
    case CL_DEVICE_DOUBLE_FP_CONFIG: VALUE(cl_ulong, setting("FAKE_CL_FP64", 0));
    case CL_DEVICE_SINGLE_FP_CONFIG: VALUE(cl_ulong, 0);
    case CL_DEVICE_SVM_CAPABILITIES:
        if (version() < 200 && !getenv("FAKE_CL_SVM")) return CL_INVALID_VALUE;
        VALUE(cl_ulong, setting("FAKE_CL_SVM", 1));
    case CL_DEVICE_OPENCL_C_ALL_VERSIONS: {
        cl_name_version all[2] = {{CL_MAKE_VERSION(1, 2, 0), "OpenCL C"},
                                  {CL_MAKE_VERSION(3, 0, 0), "OpenCL C"}};
        return version() < 300 ? CL_INVALID_VALUE : answer(all, sizeof all, room, out, told);
    }
    case CL_DEVICE_HOST_MEM_CAPABILITIES_INTEL:
    case CL_DEVICE_DEVICE_MEM_CAPABILITIES_INTEL: VALUE(cl_ulong, 1);
    case CL_DEVICE_SINGLE_DEVICE_SHARED_MEM_CAPABILITIES_INTEL: VALUE(cl_ulong, 5);
    case CL_DEVICE_UUID_KHR: {
        unsigned char uuid[16] = {0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 9, 10, 11, 12, 13, 14, 15};
        uuid[15] = (unsigned char)d->index;
        return answer(uuid, sizeof uuid, room, out, told);
    }
    case CL_DEVICE_PCI_BUS_INFO_KHR: {
        cl_device_pci_bus_info_khr at = {1, 0x18, (cl_uint)d->index, 0};
        const char *given = getenv("FAKE_CL_PCI");
        if (given && !d->index)
            sscanf(given, "%x:%x:%x.%x", &at.pci_domain, &at.pci_bus, &at.pci_device, &at.pci_function);
        return answer(&at, sizeof at, room, out, told);
    }
    case 0x4008: VALUE(cl_uint, 0x3b);            /* NVIDIA: bus */
    case 0x4009: VALUE(cl_uint, d->index << 3);   /* NVIDIA: device and function */
    case 0x400A: VALUE(cl_uint, 0);               /* NVIDIA: domain */
    case CL_DEVICE_TOPOLOGY_AMD: {
        cl_device_topology_amd at = {0};
        at.pcie.type = CL_DEVICE_TOPOLOGY_TYPE_PCIE_AMD;
        at.pcie.bus = 0x41;
        at.pcie.device = (cl_char)d->index;
        return answer(&at, sizeof at, room, out, told);
    }
    case CL_DEVICE_GLOBAL_FREE_MEMORY_AMD: {
        size_t free[2] = {4096, 4096}; /* KiB */
        return answer(free, sizeof free, room, out, told);
    }
    }
    return CL_INVALID_VALUE;
}

static cl_context CL_API_CALL create_context(const cl_context_properties *p, cl_uint count,
                                             const cl_device_id *d,
                                             void(CL_CALLBACK *f)(const char *, const void *, size_t,
                                                                  void *),
                                             void *user, cl_int *code) {
    (void)p, (void)count, (void)d, (void)f, (void)user;
    FAULT_TO("clCreateContext", code);
    OK(code);
    return make(sizeof(struct _cl_context), CONTEXTS);
}
static cl_int CL_API_CALL release_context(cl_context c) { drop(c, CONTEXTS); return CL_SUCCESS; }

/* -- buffers --------------------------------------------------------------------------------- */

static cl_mem CL_API_CALL create_buffer(cl_context context, cl_mem_flags flags, size_t size,
                                        void *host, cl_int *code) {
    (void)flags, (void)host;
    FAULT_TO("clCreateBuffer", code);
    alive(context, CONTEXTS);
    pthread_mutex_lock(&lock);
    char *bytes = span_new(size, (size_t)setting("FAKE_CL_MEMORY", 1 << 30) / 2);
    cl_mem m = NULL;
    if (bytes) {
        m = make(sizeof *m, MEMORY);
        m->bytes = bytes;
        m->size = size;
    }
    pthread_mutex_unlock(&lock);
    if (code) *code = m ? CL_SUCCESS : CL_MEM_OBJECT_ALLOCATION_FAILURE;
    return m;
}

static cl_mem CL_API_CALL create_sub_buffer(cl_mem m, cl_mem_flags flags, cl_buffer_create_type type,
                                            const void *info, cl_int *code) {
    (void)flags, (void)type;
    alive(m, MEMORY);
    const cl_buffer_region *region = info;
    if (m->parent || region->origin + region->size > m->size) die("a part of what is none");
    if (region->origin % 128) {
        if (code) *code = CL_MISALIGNED_SUB_BUFFER_OFFSET;
        return NULL;
    }
    cl_mem made = make(sizeof *made, MEMORY);
    made->parent = m;
    made->bytes = m->bytes + region->origin;
    made->size = region->size;
    OK(code);
    return made;
}

static cl_int CL_API_CALL release_mem(cl_mem m) {
    pthread_mutex_lock(&lock);
    int last = drop(m, MEMORY);
    if (last && !m->parent) dying[dying_count++ % 1024] = m->bytes;
    step();
    pthread_mutex_unlock(&lock);
    return CL_SUCCESS;
}

static command *moving(char *dst, const char *src, size_t size) {
    command *c = new_command(COPY);
    c->dst = dst;
    c->src = src;
    c->size = size;
    return c;
}

static char *within(cl_mem m, size_t offset, size_t size) {
    alive(m, MEMORY);
    if (offset + size > m->size) die("a range beyond its buffer");
    if (m->mapped) die("a command on a buffer that is mapped");
    return m->bytes + offset;
}

static cl_int CL_API_CALL read_buffer(cl_command_queue q, cl_mem m, cl_bool b, size_t o, size_t s,
                                      void *p, cl_uint n, const cl_event *w, cl_event *e) {
    FAULT("clEnqueueReadBuffer");
    if (b) die("a blocking copy");
    LOCKED(push(q, moving(p, within(m, o, s), s), n, w, e));
}
static cl_int CL_API_CALL write_buffer(cl_command_queue q, cl_mem m, cl_bool b, size_t o, size_t s,
                                       const void *p, cl_uint n, const cl_event *w, cl_event *e) {
    FAULT("clEnqueueWriteBuffer");
    if (b) die("a blocking copy");
    LOCKED(push(q, moving(within(m, o, s), p, s), n, w, e));
}
static cl_int CL_API_CALL copy_buffer(cl_command_queue q, cl_mem a, cl_mem b, size_t from, size_t to,
                                      size_t s, cl_uint n, const cl_event *w, cl_event *e) {
    FAULT("clEnqueueCopyBuffer");
    LOCKED(push(q, moving(within(b, to, s), within(a, from, s), s), n, w, e));
}

static command *filling(void *dst, const void *pattern, size_t width, size_t size) {
    if (width > 128 || width & (width - 1) || size % width || (uintptr_t)dst % width)
        die("a fill that OpenCL does not allow");
    command *c = new_command(FILL);
    c->dst = dst;
    c->width = width;
    c->size = size;
    memcpy(c->pattern, pattern, width);
    return c;
}
static cl_int CL_API_CALL fill_buffer(cl_command_queue q, cl_mem m, const void *p, size_t width,
                                      size_t o, size_t s, cl_uint n, const cl_event *w, cl_event *e) {
    FAULT("clEnqueueFillBuffer");
    LOCKED(push(q, filling(within(m, o, s), p, width, s), n, w, e));
}
static void *CL_API_CALL map_buffer(cl_command_queue q, cl_mem m, cl_bool b, cl_map_flags f, size_t o,
                                    size_t s, cl_uint n, const cl_event *w, cl_event *e, cl_int *code) {
    (void)q, (void)f, (void)n, (void)w, (void)e, (void)s;
    FAULT_TO("clEnqueueMapBuffer", code);
    alive(m, MEMORY);
    if (!b || m->mapped) die("a second map, or one that does not wait");
    m->mapped = 1;
    OK(code);
    return m->bytes + o;
}
static cl_int CL_API_CALL unmap(cl_command_queue q, cl_mem m, void *p, cl_uint n, const cl_event *w,
                                cl_event *e) {
    (void)q, (void)n, (void)w, (void)e;
    alive(m, MEMORY);
    if (!m->mapped || p != m->bytes) die("an unmap of what is not mapped");
    m->mapped = 0;
    return CL_SUCCESS;
}

/* -- addresses ------------------------------------------------------------------------------- */

static void at_least_2(void) {
    if (version() < 200 || !setting("FAKE_CL_SVM", 1)) die("shared virtual memory, which it lacks");
}

static void *CL_API_CALL svm_alloc(cl_context c, cl_svm_mem_flags flags, size_t size, cl_uint align) {
    (void)align;
    at_least_2();
    alive(c, CONTEXTS);
    if (flags & CL_MEM_SVM_FINE_GRAIN_BUFFER && !(setting("FAKE_CL_SVM", 1) & 2)) return NULL;
    pthread_mutex_lock(&lock);
    void *p = fault("clSVMAlloc") ? NULL : span_new(size, (size_t)setting("FAKE_CL_MEMORY", 1 << 30) / 2);
    pthread_mutex_unlock(&lock);
    return p;
}
static void CL_API_CALL svm_free(cl_context c, void *p) {
    at_least_2();
    alive(c, CONTEXTS);
    pthread_mutex_lock(&lock);
    span_free(p);
    pthread_mutex_unlock(&lock);
}
static cl_int CL_API_CALL svm_copy(cl_command_queue q, cl_bool b, void *dst, const void *src, size_t s,
                                   cl_uint n, const cl_event *w, cl_event *e) {
    at_least_2();
    FAULT("clEnqueueSVMMemcpy");
    if (b) die("a blocking copy");
    LOCKED(push(q, moving(dst, src, s), n, w, e));
}
static cl_int CL_API_CALL svm_fill(cl_command_queue q, void *p, const void *pattern, size_t width,
                                   size_t s, cl_uint n, const cl_event *w, cl_event *e) {
    at_least_2();
    FAULT("clEnqueueSVMMemFill");
    in_a_span(p, s);
    LOCKED(push(q, filling(p, pattern, width, s), n, w, e));
}

static void *usm_alloc(cl_context c, size_t size, cl_int *code, const char *name) {
    FAULT_TO(name, code);
    alive(c, CONTEXTS);
    pthread_mutex_lock(&lock);
    void *p = span_new(size, (size_t)setting("FAKE_CL_MEMORY", 1 << 30) / 2);
    pthread_mutex_unlock(&lock);
    if (code) *code = p ? CL_SUCCESS : CL_OUT_OF_RESOURCES;
    return p;
}
static void *CL_API_CALL usm_host(cl_context c, const cl_mem_properties_intel *p, size_t size,
                                  cl_uint a, cl_int *code) {
    (void)p, (void)a;
    return usm_alloc(c, size, code, "clHostMemAllocINTEL");
}
static void *CL_API_CALL usm_device(cl_context c, cl_device_id d, const cl_mem_properties_intel *p,
                                    size_t size, cl_uint a, cl_int *code) {
    (void)d, (void)p, (void)a;
    return usm_alloc(c, size, code, "clDeviceMemAllocINTEL");
}
static void *CL_API_CALL usm_shared(cl_context c, cl_device_id d, const cl_mem_properties_intel *p,
                                    size_t size, cl_uint a, cl_int *code) {
    (void)d, (void)p, (void)a;
    return usm_alloc(c, size, code, "clSharedMemAllocINTEL");
}
static cl_int CL_API_CALL usm_free(cl_context c, void *p) {
    alive(c, CONTEXTS);
    pthread_mutex_lock(&lock);
    span_free(p);
    pthread_mutex_unlock(&lock);
    return CL_SUCCESS;
}
static cl_int CL_API_CALL usm_copy(cl_command_queue q, cl_bool b, void *dst, const void *src, size_t s,
                                   cl_uint n, const cl_event *w, cl_event *e) {
    if (b) die("a blocking copy");
    LOCKED(push(q, moving(dst, src, s), n, w, e));
}
static cl_int CL_API_CALL usm_fill(cl_command_queue q, void *p, const void *pattern, size_t width,
                                   size_t s, cl_uint n, const cl_event *w, cl_event *e) {
    in_a_span(p, s);
    LOCKED(push(q, filling(p, pattern, width, s), n, w, e));
}

/* -- programs -------------------------------------------------------------------------------- */

static cl_program program_new(const char *text, size_t size, cl_int *code) {
    cl_program p = make(sizeof *p, PROGRAMS);
    p->text = strndup(text, size);
    OK(code);
    return p;
}
static cl_program CL_API_CALL with_source(cl_context c, cl_uint n, const char **texts,
                                          const size_t *sizes, cl_int *code) {
    (void)n;
    FAULT_TO("clCreateProgramWithSource", code);
    if (!setting("FAKE_CL_COMPILER", 1)) die("source for a platform without a compiler");
    alive(c, CONTEXTS);
    cl_program p = program_new(texts[0], sizes[0], code);
    p->from_source = 1;
    return p;
}
static cl_program CL_API_CALL with_binary(cl_context c, cl_uint n, const cl_device_id *d,
                                          const size_t *sizes, const unsigned char **data,
                                          cl_int *loaded, cl_int *code) {
    (void)n, (void)d;
    alive(c, CONTEXTS);
    int taken = sizes[0] > 8 && !memcmp(data[0], MAGIC, 8) && !setting("FAKE_CL_REFUSE_BINARY", 0);
    if (loaded) *loaded = taken ? CL_SUCCESS : CL_INVALID_BINARY;
    if (code) *code = taken ? CL_SUCCESS : CL_INVALID_BINARY;
    return taken ? program_new((const char *)data[0] + 8, sizes[0] - 8, code) : NULL;
}
static cl_program CL_API_CALL with_il(cl_context c, const void *il, size_t size, cl_int *code) {
    FAULT_TO("clCreateProgramWithIL", code);
    if (!setting("FAKE_CL_IL", 0)) die("SPIR-V, which it lacks");
    alive(c, CONTEXTS);
    return program_new((const char *)il + 4, size - 4, code);
}
static cl_int CL_API_CALL build(cl_program p, cl_uint n, const cl_device_id *d, const char *options,
                                void(CL_CALLBACK *f)(cl_program, void *), void *user) {
    (void)n, (void)d, (void)f, (void)user, (void)options;
    alive(p, PROGRAMS);
    if (p->from_source) {
        trouble("build");
        if (strstr(p->text, "hang the compiler")) sleep(3600);
        if (strstr(p->text, "crash the compiler")) die("the compiler crashes");
    }
    FAULT("clBuildProgram");
    if (strstr(p->text, "wrong here")) return CL_BUILD_PROGRAM_FAILURE;
    p->built = 1;
    return CL_SUCCESS;
}
static cl_int CL_API_CALL build_info(cl_program p, cl_device_id d, cl_program_build_info what,
                                     size_t room, void *out, size_t *told) {
    (void)d;
    alive(p, PROGRAMS);
    if (what != CL_PROGRAM_BUILD_LOG) return CL_INVALID_VALUE;
    const char *at = strstr(p->text, "wrong here"), *start = strstr(p->text, "#line 1 ");
    char log[128] = "";
    int line = 0;
    for (start = start ? start : p->text; at && start < at; start++) line += *start == '\n';
    if (at) snprintf(log, sizeof log, "<kernel>:%d:7: error: something is wrong here\n", line);
    return TEXT(log);
}
static cl_int CL_API_CALL program_info(cl_program p, cl_program_info what, size_t room, void *out,
                                       size_t *told) {
    alive(p, PROGRAMS);
    size_t size = setting("FAKE_CL_NO_BINARY", 0) ? 0 : strlen(p->text) + 8;
    if (what == CL_PROGRAM_BINARY_SIZES) VALUE(size_t, size);
    if (what != CL_PROGRAM_BINARIES) return CL_INVALID_VALUE;
    memcpy(*(char **)out, MAGIC, 8);
    memcpy(*(char **)out + 8, p->text, size - 8);
    return CL_SUCCESS;
}
static cl_int CL_API_CALL release_program(cl_program p) {
    drop(p, PROGRAMS);
    return CL_SUCCESS;
}

static cl_kernel CL_API_CALL create_kernel(cl_program p, const char *name, cl_int *code) {
    FAULT_TO("clCreateKernel", code);
    alive(p, PROGRAMS);
    if (!p->built) die("a kernel of a program that is not built");
    char wanted[96];
    snprintf(wanted, sizeof wanted, "void %s(", name);
    const char *at = strstr(p->text, wanted);
    if (!at) {
        if (code) *code = CL_INVALID_KERNEL_NAME;
        return NULL;
    }
    cl_kernel k = make(sizeof *k, KERNELS);
    snprintf(k->name, sizeof k->name, "%s", name);
    at += strlen(wanted);
    const char *end = strchr(at, ')');
    while (at < end) {
        const char *comma = memchr(at, ',', (size_t)(end - at));
        char part[128];
        snprintf(part, sizeof part, "%.*s", (int)((comma ? comma : end) - at), at);
        parameter *q = &k->parameters[k->count++];
        if (strstr(part, "__local")) *q = (parameter){'l', 0};
        else if (strchr(part, '*')) *q = (parameter){'p', 8};
        else *q = (parameter){'v', strstr(part, "long") || strstr(part, "double") ? 8 : 4};
        at = comma ? comma + 1 : end;
    }
    OK(code);
    return k;
}
static cl_int CL_API_CALL release_kernel(cl_kernel k) { drop(k, KERNELS); return CL_SUCCESS; }

static cl_int CL_API_CALL set_arg(cl_kernel k, cl_uint i, size_t size, const void *value) {
    FAULT("clSetKernelArg");
    alive(k, KERNELS);
    if (i >= k->count) return CL_INVALID_ARG_INDEX;
    parameter p = k->parameters[i];
    if (p.type == 'l' ? !size || value : size != p.size) return CL_INVALID_ARG_SIZE;
    if (p.type == 'v' && !value) return CL_INVALID_ARG_VALUE;
    memset(k->values[i], 0, sizeof k->values[i]);
    if (p.type == 'p' && value && *(cl_mem *)value) {
        cl_mem m = *(cl_mem *)value;
        alive(m, MEMORY);
        if (m->mapped) die("a kernel's argument that is mapped");
        memcpy(k->values[i], &m->bytes, sizeof m->bytes);
    } else if (value) {
        memcpy(k->values[i], value, size);
    }
    k->local[i] = p.type == 'l' ? size : 0;
    k->set[i] = 1;
    return CL_SUCCESS;
}
static cl_int CL_API_CALL set_address(cl_kernel k, cl_uint i, const void *value) {
    alive(k, KERNELS);
    if (i >= k->count) return CL_INVALID_ARG_INDEX;
    if (k->parameters[i].type != 'p') return CL_INVALID_ARG_VALUE;
    if (!value) return CL_INVALID_ARG_VALUE; /* some platforms say so */
    in_a_span(value, 1);
    memcpy(k->values[i], &value, sizeof value);
    k->set[i] = 1;
    return CL_SUCCESS;
}
static cl_int CL_API_CALL set_svm(cl_kernel k, cl_uint i, const void *value) {
    at_least_2();
    return set_address(k, i, value);
}
static cl_int CL_API_CALL kernel_info(cl_kernel k, cl_kernel_info what, size_t room, void *out,
                                      size_t *told) {
    if (what != CL_KERNEL_NUM_ARGS) return CL_INVALID_VALUE;
    VALUE(cl_uint, k->count);
}
static cl_int CL_API_CALL arg_info(cl_kernel k, cl_uint i, cl_kernel_arg_info what, size_t room,
                                   void *out, size_t *told) {
    (void)k, (void)i, (void)what, (void)room, (void)out, (void)told;
    return CL_KERNEL_ARG_INFO_NOT_AVAILABLE; /* as of many binaries */
}
static cl_int CL_API_CALL group_info(cl_kernel k, cl_device_id d, cl_kernel_work_group_info what,
                                     size_t room, void *out, size_t *told) {
    (void)k, (void)d;
    if (what == CL_KERNEL_WORK_GROUP_SIZE) VALUE(size_t, 128);
    VALUE(cl_ulong, 0);
}
static cl_int CL_API_CALL launch(cl_command_queue q, cl_kernel k, cl_uint dims, const size_t *offset,
                                 const size_t *whole, const size_t *local, cl_uint n,
                                 const cl_event *w, cl_event *e) {
    FAULT("clEnqueueNDRangeKernel");
    alive(k, KERNELS);
    if (offset) die("an offset");
    command *c = new_command(RUN);
    c->threads = 1;
    for (cl_uint i = 0; i < dims; i++) {
        if (whole[i] % local[i]) die("a grid of no whole blocks");
        c->threads *= whole[i];
    }
    for (unsigned i = 0; i < k->count; i++)
        if (!k->set[i]) {
            free(c);
            return CL_INVALID_KERNEL_ARGS;
        }
    snprintf(c->name, sizeof c->name, "%s", k->name);
    memcpy(c->values, k->values, sizeof c->values);
    c->code = !strcmp(k->name, "fail") ? CL_OUT_OF_RESOURCES : !strcmp(k->name, "stray") ? -9999 : 0;
    LOCKED(push(q, c, n, w, e));
}

static void *CL_API_CALL extension(cl_platform_id p, const char *name) {
    (void)p;
    static const struct { const char *name; void *function; } known[] = {
        {"clHostMemAllocINTEL", (void *)usm_host},     {"clDeviceMemAllocINTEL", (void *)usm_device},
        {"clSharedMemAllocINTEL", (void *)usm_shared}, {"clMemFreeINTEL", (void *)usm_free},
        {"clEnqueueMemcpyINTEL", (void *)usm_copy},    {"clEnqueueMemFillINTEL", (void *)usm_fill},
        {"clSetKernelArgMemPointerINTEL", (void *)set_address},
    };
    if (!strcmp(name, "clCreateProgramWithILKHR") && setting("FAKE_CL_IL", 0)) return (void *)with_il;
    for (size_t i = 0; setting("FAKE_CL_USM", 0) && i < sizeof known / sizeof *known; i++)
        if (!strcmp(name, known[i].name)) return known[i].function;
    return NULL;
}

/* -- what the loader asks for ---------------------------------------------------------------- */

static cl_int CL_API_CALL platforms(cl_uint room, cl_platform_id *out, cl_uint *told) {
    trouble("load");
    if (!setting("FAKE_CL_PLATFORMS", 1)) return CL_PLATFORM_NOT_FOUND_KHR;
    if (out && room) out[0] = &platform;
    if (told) *told = 1;
    return CL_SUCCESS;
}

CL_API_ENTRY void *CL_API_CALL clGetExtensionFunctionAddress(const char *name) {
    return strcmp(name, "clIcdGetPlatformIDsKHR") ? NULL : (void *)platforms;
}

__attribute__((constructor)) static void fill_in(void) {
    if (is("FAKE_CL_ABORT", "open")) die("open");
    table.clGetPlatformIDs = platforms;
    table.clGetPlatformInfo = clGetPlatformInfo;
    table.clGetDeviceIDs = get_devices;
    table.clGetDeviceInfo = device_info;
    table.clCreateContext = create_context;
    table.clReleaseContext = release_context;
    table.clCreateCommandQueue = create_queue;
    table.clReleaseCommandQueue = release_queue;
    table.clCreateBuffer = create_buffer;
    table.clReleaseMemObject = release_mem;
    table.clCreateProgramWithSource = with_source;
    table.clCreateProgramWithBinary = with_binary;
    table.clReleaseProgram = release_program;
    table.clBuildProgram = build;
    table.clGetProgramInfo = program_info;
    table.clGetProgramBuildInfo = build_info;
    table.clCreateKernel = create_kernel;
    table.clReleaseKernel = release_kernel;
    table.clSetKernelArg = set_arg;
    table.clGetKernelInfo = kernel_info;
    table.clGetKernelWorkGroupInfo = group_info;
    table.clGetEventInfo = event_info;
    table.clRetainEvent = retain_event;
    table.clReleaseEvent = release_event;
    table.clGetEventProfilingInfo = profiling_info;
    table.clFlush = flush;
    table.clEnqueueReadBuffer = read_buffer;
    table.clEnqueueWriteBuffer = write_buffer;
    table.clEnqueueCopyBuffer = copy_buffer;
    table.clEnqueueMapBuffer = map_buffer;
    table.clEnqueueUnmapMemObject = unmap;
    table.clEnqueueNDRangeKernel = launch;
    table.clGetExtensionFunctionAddress = clGetExtensionFunctionAddress;
    table.clCreateSubBuffer = create_sub_buffer;
    table.clGetKernelArgInfo = arg_info;
    table.clEnqueueFillBuffer = fill_buffer;
    table.clEnqueueMarkerWithWaitList = marker;
    table.clEnqueueBarrierWithWaitList = barrier;
    table.clGetExtensionFunctionAddressForPlatform = extension;
    table.clCreateCommandQueueWithProperties = create_queue_2;
    if (version() >= 210) table.clCreateProgramWithIL = with_il;
    table.clSVMAlloc = svm_alloc;
    table.clSVMFree = svm_free;
    table.clEnqueueSVMMemcpy = svm_copy;
    table.clEnqueueSVMMemFill = svm_fill;
    table.clSetKernelArgSVMPointer = set_svm;
}

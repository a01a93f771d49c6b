/* Drivetrain's hot calls. Plain C11 without Python, so that any language can stand on it.
 *
 * Chunk hash. A state image is cut in chunks of DT_CHUNK_BYTES. With w_i the little-endian 32-bit
 * words of a chunk (i = index within the chunk, bytes missing from the last word count as zero):
 *
 *     hash = sum of w_i * a_i mod 2^64,   a_i = (((i + 1) * 0x9E3779B97F4A7C15) mod 2^64) | 1
 *
 * The hash is additive: hash a piece alone, giving the index of its first word, and add the parts
 * mod 2^64. A piece starts at a multiple of 4 bytes of its chunk and lies in one chunk; its address
 * may have any alignment. All functions are safe to call from any thread and never allocate.
 */
#ifndef DRIVETRAIN_HAL_H
#define DRIVETRAIN_HAL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DT_CHUNK_BYTES ((size_t)4 << 20)
#define DT_CHUNK_WORDS ((uint64_t)1 << 20)

/* The hash of nbytes at src, whose first word has index first_word in its chunk. */
uint64_t dt_checksum(const void *src, size_t nbytes, uint64_t first_word);

/* Copies nbytes; the two ranges may overlap. */
void dt_copy(void *dst, const void *src, size_t nbytes);

/* Copies nbytes and returns what dt_checksum says of the bytes that were written, in one pass:
 * each byte is read once. The ranges must not overlap. */
uint64_t dt_copy_checksum(void *dst, const void *src, size_t nbytes, uint64_t first_word);

/* -- the cpu device -------------------------------------------------------------------------
 *
 * Streams of commands, done in order by threads that belong to the device and run on its cores.
 * Kernels and large copies and fills are cut in parts that all threads take. Linux only.
 *
 * Any thread may call any function. Each returns a dt_cpu_status; nothing is queued unless it is
 * DT_CPU_OK (or, of dt_cpu_copy, DT_CPU_LATE). Times are nanoseconds of CLOCK_MONOTONIC, a limit
 * below 0 counts as none. Handles of streams and events stay safe to pass after they were
 * destroyed or their device was closed: the call is refused. After fork the child has no threads;
 * there each call answers DT_CPU_FORKED, and handles are never given back.
 */
typedef enum {
    DT_CPU_OK = 0,
    DT_CPU_LATE = 1,      /* the time limit passed; the work goes on */
    DT_CPU_FAILED = 2,    /* queued work failed; told once, in dt_cpu_failure */
    DT_CPU_NO_MEMORY = 3,
    DT_CPU_INVALID = 4,   /* an argument cannot be meant */
    DT_CPU_FORKED = 5,
    DT_CPU_CLOSED = 6,    /* the device or the handle was closed */
    DT_CPU_ALLOWANCE = 7, /* dt_cpu_alloc: more than dt_cpu_allow allows */
    DT_CPU_DAMAGED = 8,   /* dt_cpu_check: guard bytes were overwritten */
    DT_CPU_REJECTED = 9,  /* dt_cpu_module_load: the loader does not take it */
} dt_cpu_status;

typedef struct dt_cpu dt_cpu;
typedef struct dt_cpu_stream dt_cpu_stream;
typedef struct dt_cpu_event dt_cpu_event;
typedef struct dt_cpu_module dt_cpu_module;
typedef struct dt_cpu_function dt_cpu_function;

typedef struct {
    int code;       /* what the kernel returned */
    char text[232]; /* which kernel, which blocks */
} dt_cpu_failure;

/* `threads` workers on the `count` cores of `cores` (count 0: wherever the caller may run). With
 * `guards`, allocations lie between guard bytes. NULL when no thread can be started. */
dt_cpu *dt_cpu_open(const int *cores, size_t count, unsigned threads, int guards);

/* Wait up to limit_ns for what is queued, drop what has not begun, and free everything. When work
 * still runs then, it is left to itself with all that it may touch: DT_CPU_LATE. */
int dt_cpu_close(dt_cpu *device, int64_t limit_ns);

/* Wait until all that was queued so far on any stream is done. */
int dt_cpu_synchronize(dt_cpu *device, int64_t limit_ns, dt_cpu_failure *failure);

/* Memory, aligned to 64 bytes. dt_cpu_allow: how many bytes may be allocated before somebody who
 * knows the machine's limits must be asked again; none at first. */
int dt_cpu_alloc(dt_cpu *device, size_t nbytes, void **address);
void dt_cpu_allow(dt_cpu *device, uint64_t nbytes);
/* Bytes that were allocated in mappings of their own and never touched: not yet taken from the
 * machine. */
uint64_t dt_cpu_untouched(dt_cpu *device);
/* Free once what is queued on the stream so far is done. */
int dt_cpu_free(dt_cpu *device, void *address, dt_cpu_stream *stream);
/* Wait until no free is queued. */
int dt_cpu_freed(dt_cpu *device, int64_t limit_ns);
/* DT_CPU_DAMAGED when a guard byte of the allocation changed: its size, and where the first one
 * lies, counted from the address. */
int dt_cpu_check(dt_cpu *device, void *address, size_t *nbytes, int64_t *offset);

/* Queue a copy of ranges that do not overlap. host_free: the source may be reused on return, or,
 * after DT_CPU_LATE, once the copy is done. */
int dt_cpu_copy(dt_cpu_stream *stream, void *dst, const void *src, size_t nbytes, int host_free,
                int64_t limit_ns);
/* Queue `count` repetitions of `width` (1, 2, 4, 8, 16) bytes. */
int dt_cpu_fill(dt_cpu_stream *stream, void *dst, const void *pattern, size_t width, size_t count);

/* Streams. Lower priorities go first. */
int dt_cpu_stream_new(dt_cpu *device, int priority, dt_cpu_stream **stream);
int dt_cpu_stream_destroy(dt_cpu_stream *stream);
/* DT_CPU_LATE while something is queued. */
int dt_cpu_stream_done(dt_cpu_stream *stream, dt_cpu_failure *failure);
int dt_cpu_stream_synchronize(dt_cpu_stream *stream, int64_t limit_ns, dt_cpu_failure *failure);
/* Wait for the event as last recorded; it may be another device's. */
int dt_cpu_stream_wait(dt_cpu_stream *stream, dt_cpu_event *event);

/* Events. DT_CPU_LATE while not done. */
int dt_cpu_event_new(dt_cpu *device, int timing, dt_cpu_event **event);
int dt_cpu_event_destroy(dt_cpu_event *event);
int dt_cpu_event_record(dt_cpu_event *event, dt_cpu_stream *stream);
int dt_cpu_event_done(dt_cpu_event *event);
int dt_cpu_event_synchronize(dt_cpu_event *event, int64_t limit_ns);
/* DT_CPU_INVALID unless it was made for timing, recorded, and is done. */
int dt_cpu_event_time(dt_cpu_event *event, int64_t *at_ns);

/* Kernels. Blocks first .. first + count - 1 of the grid, counted with x fastest, are to be run;
 * arguments[i] is the address of the i-th argument. 0 or a positive code, 1 for out of memory. */
typedef struct {
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t shared; /* bytes of dynamic shared memory */
    uint32_t reserved;
    uint64_t first;
    uint64_t count;
} dt_cpu_range;
typedef int (*dt_cpu_kernel)(const dt_cpu_range *range, void **arguments);

/* Load a shared object. DT_CPU_REJECTED: the loader's words are in `message`. */
int dt_cpu_module_load(dt_cpu *device, const void *code, size_t nbytes, dt_cpu_module **module,
                       char *message, size_t room);
/* What was queued still runs. */
int dt_cpu_module_unload(dt_cpu *device, dt_cpu_module *module);
/* The kernel that the module exports as dt_cpu_SYMBOL; DT_CPU_INVALID when it exports none. The
 * same symbol gives the same function, which lives as long as the module. */
int dt_cpu_function_find(dt_cpu *device, dt_cpu_module *module, const char *symbol,
                         dt_cpu_function **function);
/* The bytes of each argument, negative for pointers; before the first launch. DT_CPU_INVALID when
 * other sizes were told before. */
int dt_cpu_function_arguments(dt_cpu_function *function, const int32_t *sizes, size_t count);
/* Queue a kernel; everything is read before the call returns. */
int dt_cpu_launch(void *function, const uint32_t grid[3], const uint32_t block[3], uint32_t shared,
                  void *stream, void **arguments);

/* -- a driver that is one shared library ------------------------------------------------------
 *
 * It exports `const dt_driver_v1 *drivetrain_driver_v1(void)`. The table is the driver interface of
 * `drivetrain.hal.driver` with C types; the rules there hold here too. Any thread may call any
 * function. Each returns a dt_status; when that is neither DT_OK nor DT_LATE, `failure` tells more
 * to the thread that made the call. Strings end with a zero byte and are UTF-8.
 *
 * Sizes: a table or struct begins with its size in bytes as its writer knows it. New members are
 * added at the end only; who finds a smaller size takes the missing members for zero, and writes no
 * member that the size leaves out. A member that is NULL is a call that the driver does not have:
 * right for those of a group that `groups` does not name.
 */
typedef enum {
    DT_OK = 0,
    DT_LATE = 1,          /* not done yet, or the time limit passed; the work goes on */
    DT_FAILED = 2,
    DT_OUT_OF_MEMORY = 3,
    DT_INVALID = 4,       /* an argument cannot be meant */
    DT_UNSUPPORTED = 5,
    DT_LOST = 6,          /* the device is gone for this process */
    DT_MISSING = 7,       /* what the driver needs is not installed: it is absent */
    DT_REJECTED = 8,      /* module_load: the code is not taken; the log is the failure's text */
    DT_NO_SUCH_KERNEL = 9,
} dt_status;

typedef struct {
    uint32_t size;
    int32_t native;       /* the vendor's code, 0 for none */
    char native_name[60]; /* and its name */
    char text[512];       /* what happened; for people */
    uint64_t requested, free, total; /* bytes, of DT_OUT_OF_MEMORY; 0: not known */
} dt_failure;

/* One device, as discovery tells it. Empty strings and zeros: not told. */
typedef struct {
    uint32_t size;
    uint32_t index;
    uint64_t memory_bytes;
    char name[128];
    char vendor[32];
    char uuid[64];           /* unique on the machine, the same after a reboot */
    char pci[24];            /* 00000000:18:00.0 */
    char driver_version[64];
    char compute[32];        /* the vendor's word for the instruction set */
    char memory_domain[64];  /* devices of one domain share one memory; "host" is the host's */
    char visible[128];       /* NAME=value: the environment in which a process sees it alone */
    char torch_device[32];   /* its name in that process's torch; empty: torch has none */
    char features[128];      /* words with a space between */
} dt_device_facts;

/* Sensors. NaN, and -1 in counts of bytes and errors: there is none. */
typedef struct {
    uint32_t size;
    uint32_t reserved;
    double utilisation; /* 0 to 1 */
    int64_t memory_used_bytes, memory_total_bytes;
    double power_w, power_limit_w, temperature_c, memory_temperature_c, clock_mhz, memory_clock_mhz;
    int64_t ecc_corrected, ecc_uncorrected;
    char throttle[128]; /* words with a space between */
    char health[128];   /* ok, or "degraded: why", "lost: why", "unknown: why" */
} dt_readings;

typedef struct {
    uint32_t size;
    uint32_t alignment;      /* of addresses from alloc: a power of two, at least 16 */
    uint32_t grid[3];        /* most blocks in x, y, z */
    uint32_t block[3];       /* most threads of a block in x, y, z */
    uint32_t threads;        /* and in all */
    uint32_t shared_bytes;   /* most shared memory of a block */
    char target_kind[16];    /* cuda, hip, opencl or cpu: which compiler makes its kernels */
    char target_arch[64];
    char target_features[128];
} dt_device_limits;

typedef struct {
    uint32_t size;
    uint32_t version;    /* 1 */
    const char *name;    /* the driver's: small letters, as in its entry point */
    const char *vendor;
    const char *groups;  /* optional groups that it has, with a space between: compute timing ... */
    const char *install; /* what to install when it is absent */

    int (*failure)(dt_failure *failure); /* of this thread's last call that failed */

    /* Without a context. discover: at most *count devices into `facts`, each with its size set;
     * *count becomes how many there are. */
    int (*discover)(dt_device_facts *facts, uint32_t *count);
    int (*telemetry)(uint32_t index, dt_readings *readings);

    int (*open)(uint32_t index, void **device);
    int (*close)(void *device);
    int (*limits)(void *device, dt_device_limits *limits);
    int (*memory)(void *device, uint64_t *free_bytes, uint64_t *total_bytes);
    int (*synchronize)(void *device, int64_t limit_ns); /* DT_LATE at the limit */

    /* kind: 0 device, 1 pinned, 2 managed. way: 0 host to host, 1 host to device, 2 device to
     * host, 3 device to device. host_free: the host memory it reads may be reused on return. */
    int (*alloc)(void *device, uint64_t nbytes, uint32_t kind, void *stream, uint64_t *address);
    int (*free)(void *device, uint64_t address, uint32_t kind, void *stream);
    int (*copy)(void *device, uint64_t dst, uint64_t src, uint64_t nbytes, uint32_t way,
                void *stream, int host_free);
    int (*fill)(void *device, uint64_t address, const void *pattern, uint32_t width,
                uint64_t count, void *stream);

    int (*stream_create)(void *device, int32_t priority, void **stream);
    int (*stream_destroy)(void *stream);
    int (*stream_done)(void *stream); /* DT_LATE: not yet */
    int (*stream_synchronize)(void *stream, int64_t limit_ns);
    int (*stream_wait)(void *stream, void *event);
    int (*event_create)(void *device, int timing, void **event);
    int (*event_destroy)(void *event);
    int (*event_record)(void *event, void *stream);
    int (*event_done)(void *event); /* DT_LATE: not yet */
    int (*event_synchronize)(void *event, int64_t limit_ns);

    int (*event_seconds)(void *start, void *end, double *seconds); /* group timing */

    /* group compute; see dt_plain_launch: a launch is called from C, without Python */
    int (*module_load)(void *device, const void *code, uint64_t nbytes, const char *form,
                       void **module);
    int (*module_unload)(void *module);
    int (*function_find)(void *module, const char *symbol, void **function);
    int (*function_arguments)(void *function, const int32_t *sizes, uint32_t count);
    int (*launch)(void *function, const uint32_t grid[3], const uint32_t block[3],
                  uint32_t shared, void *stream, void **arguments);
} dt_driver_v1;

#ifdef __cplusplus
}
#endif

#endif

/* A caching pool of device memory that frameworks can allocate from: plain C11 without Python, so no
 * thread that asks it for memory ever waits for Python's lock. Any thread may call any function.
 *
 * The rules are those of drivetrain.hal.pool: segments of 2 MiB for requests up to 1 MiB, 20 MiB for
 * those below 10 MiB, else the request rounded up to 2 MiB; best fit on the stream itself, then what
 * another stream let go, behind an event; neighbours that are free on one stream are merged.
 */
#ifndef DRIVETRAIN_NATIVE_POOL_H
#define DRIVETRAIN_NATIVE_POOL_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Addresses of functions of libcuda, all `int (...)` with 0 for success, and the device's context. */
typedef struct {
    uintptr_t context;
    uintptr_t push;         /* cuCtxPushCurrent */
    uintptr_t pop;          /* cuCtxPopCurrent */
    uintptr_t alloc;        /* cuMemAlloc: memory that other processes can open */
    uintptr_t free;         /* cuMemFree */
    uintptr_t event_create; /* cuEventCreate */
    uintptr_t event_destroy;
    uintptr_t event_record;
    uintptr_t event_query;
    uintptr_t stream_wait;  /* cuStreamWaitEvent */
    uintptr_t is_capturing; /* cuStreamIsCapturing */
} dt_pool_calls;

typedef enum {
    DT_POOL_OK = 0,
    DT_POOL_NO_MEMORY = 1, /* the device has no more, also after all that was free went back */
    DT_POOL_LIMIT = 2,     /* the pool's own limit */
    DT_POOL_CAPTURING = 3, /* the stream is being captured: its graph would use the memory for ever */
    DT_POOL_UNKNOWN = 4,   /* no memory of this pool begins there */
    DT_POOL_DRIVER = 5,    /* another call of the driver failed; see `native` of the counts */
    DT_POOL_HOST = 6,      /* no host memory */
} dt_pool_status;

#define DT_POOL_LARGEST 5

typedef struct {
    uint64_t live, requested, allocated, reserved;
    uint64_t peak_requested, peak_allocated, peak_reserved;
    uint64_t retries, failures;
    uint64_t largest[DT_POOL_LARGEST]; /* bytes of the largest blocks that are in use */
    int64_t native;                    /* the driver's last error */
} dt_pool_counts;

typedef struct dt_pool dt_pool;

/* NULL: no host memory. limit: most bytes reserved; UINT64_MAX for what there is. */
dt_pool *dt_pool_new(const dt_pool_calls *calls, uint64_t limit);
/* Gives all memory back, used or not; nothing may run on it any more. */
void dt_pool_close(dt_pool *pool);

/* Memory that work queued on the stream may use from here on; at least 512-byte aligned. */
int dt_pool_alloc(dt_pool *pool, uint64_t nbytes, uint64_t stream, uint64_t *ptr);
/* It is used again only after what is queued on the stream so far, and on those it was used by. */
int dt_pool_free(dt_pool *pool, uint64_t ptr, uint64_t stream);
/* Work on another stream uses the memory too. */
int dt_pool_used_by(dt_pool *pool, uint64_t ptr, uint64_t stream);
/* The stream is about to end and heir waits for it: what it let go is heir's. */
void dt_pool_forget_stream(dt_pool *pool, uint64_t stream, uint64_t heir);
/* Give unused segments back until at most `keep` bytes are reserved; the bytes given back. What was
 * let go is waited for first. */
uint64_t dt_pool_trim(dt_pool *pool, uint64_t keep);
void dt_pool_read(dt_pool *pool, dt_pool_counts *counts);

/* -- for torch.cuda.memory.CUDAPluggableAllocator ---------------------------------------------- */

/* From now on the three below serve torch's device `index` from the pool; NULL: no more. 0, or -1
 * for an index that is too large. */
int dt_torch_serve(int index, dt_pool *pool);

/* Throws std::runtime_error when there is no memory, as torch expects of an allocator. */
void *dt_torch_alloc(ssize_t nbytes, int index, void *stream);
void dt_torch_free(void *ptr, ssize_t nbytes, int index, void *stream);
void dt_torch_record_stream(void *ptr, void *stream);
void dt_torch_empty_cache(void);

#ifdef __cplusplus
}
#endif

#endif

/* The calls that happen most: memory that was free a moment ago, and launches. Plain C11 without
 * Python.
 */
#ifndef DRIVETRAIN_HOT_H
#define DRIVETRAIN_HOT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* -- lists of free blocks, by stream and size ------------------------------------------------ */

#define DT_GRAIN UINT64_C(512) /* sizes are rounded up to it */
#define DT_BIN 64              /* most blocks of one stream and size */

typedef struct dt_lists dt_lists;

typedef struct {
    uint64_t stream, nbytes, ptr;
} dt_block;

typedef struct {
    uint64_t live, requested, allocated, peak_requested, peak_allocated, listed;
} dt_counts;

dt_lists *dt_lists_new(void); /* NULL: no memory */
void dt_lists_free(dt_lists *lists);

/* The address of a block for nbytes that the stream let go, and counts it as used; 0: none. */
uint64_t dt_lists_take(dt_lists *lists, uint64_t nbytes, uint64_t stream);

/* Keeps a block that was used for nbytes. 0 when there is no room for it: it is the caller's. It
 * counts as free in both cases. */
int dt_lists_put(dt_lists *lists, uint64_t ptr, uint64_t nbytes, uint64_t stream);

/* Counts a block that came from, or went, elsewhere. */
void dt_lists_count(dt_lists *lists, uint64_t nbytes, int used);

/* Moves up to room blocks of at least that many bytes into blocks: those of one stream, or with all
 * set of every stream. */
size_t dt_lists_drain(dt_lists *lists, uint64_t stream, int all, uint64_t least, dt_block *blocks,
                      size_t room);

void dt_lists_counts(dt_lists *lists, dt_counts *counts);

/* -- launches -------------------------------------------------------------------------------- */

enum { DT_ABI_NONE = 0, DT_ABI_CUDA = 1, DT_ABI_PLAIN = 2, DT_ABI_OPENCL = 3 };

/* How a device's driver is called. Addresses of C functions; 0 where it has none. */
typedef struct {
    int abi;
    uintptr_t launch;      /* cuLaunchKernel; dt_plain_launch; clEnqueueNDRangeKernel */
    uintptr_t set_value;   /* OpenCL: clSetKernelArg */
    uintptr_t set_pointer; /* OpenCL: clSetKernelArgSVMPointer */
    uintptr_t record;      /* int (void *event, void *stream) */
    uintptr_t context;     /* made current around each call where get and set are given */
    uintptr_t get_context; /* int (void **) */
    uintptr_t set_context; /* int (void *) */
    uintptr_t graph_launch; /* int (void *graph, void *stream) */
} dt_calls;

typedef int (*dt_plain_launch)(void *function, const uint32_t grid[3], const uint32_t block[3],
                               uint32_t shared, void *stream, void **arguments);

/* Queue a kernel; the driver's own code, 0 for success. sizes: bytes of each argument, negative
 * for pointers to memory of the device. */
int dt_launch(const dt_calls *calls, void *function, const uint32_t grid[3],
              const uint32_t block[3], uint32_t shared, void *stream, void **arguments,
              const int32_t *sizes, unsigned count);

int dt_record(const dt_calls *calls, void *event, void *stream);

/* A driver's own graph. */
int dt_graph_launch(const dt_calls *calls, void *graph, void *stream);

/* Launches that dt_launch made through OpenCL, of the whole process: while it stays the same,
 * nothing was queued behind a driver's back. */
uint64_t dt_opencl_launches(void);

#ifdef __cplusplus
}
#endif

#endif

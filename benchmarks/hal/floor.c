/* The same driver calls from a C loop: what no Python can be faster than. Each function calls n
 * times and returns the seconds of one call; negative when a call failed. */
#define _POSIX_C_SOURCE 199309L
#include <stddef.h>
#include <stdint.h>
#include <time.h>

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

/* -- one launch ---------------------------------------------------------------------------------- */

typedef int (*cuda_launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                           unsigned, void *, void **, void **);

double floor_cuda_launch(void *call, void *function, unsigned grid, unsigned block, void *stream,
                         void **arguments, int n) {
    double began = now();
    for (int i = 0; i < n; i++)
        if (((cuda_launch)call)(function, grid, 1, 1, block, 1, 1, 0, stream, arguments, NULL))
            return -1;
    return (now() - began) / n;
}

typedef int (*plain_launch)(void *, const uint32_t *, const uint32_t *, uint32_t, void *, void **);

double floor_plain_launch(void *call, void *function, unsigned grid, unsigned block, void *stream,
                          void **arguments, int n) {
    uint32_t blocks[3] = {grid, 1, 1}, threads[3] = {block, 1, 1};
    double began = now();
    for (int i = 0; i < n; i++)
        if (((plain_launch)call)(function, blocks, threads, 0, stream, arguments)) return -1;
    return (now() - began) / n;
}

typedef int (*opencl_launch)(void *, void *, unsigned, const size_t *, const size_t *,
                             const size_t *, unsigned, const void *, void *);

typedef int (*opencl_set)(void *, unsigned, size_t, const void *);
typedef int (*opencl_set_pointer)(void *, unsigned, const void *);

/* The addresses are those of clEnqueueNDRangeKernel and of what sets values and pointers; negative
 * sizes are those of pointers. Arguments are set each time: they lie in the kernel, which others launch. */
double floor_opencl_launch(const void *const calls[3], void *function, unsigned grid, unsigned block,
                           void *stream, void **arguments, const int *sizes, int count, int n) {
    opencl_launch launch = (opencl_launch)calls[0];
    opencl_set set = (opencl_set)calls[1];
    opencl_set_pointer set_pointer = (opencl_set_pointer)calls[2];
    size_t whole = (size_t)grid * block, local = block;
    double began = now();
    for (int i = 0; i < n; i++) {
        for (int a = 0; a < count; a++) {
            int code = sizes[a] < 0 ? set_pointer(function, (unsigned)a, *(void **)arguments[a])
                                    : set(function, (unsigned)a, (size_t)sizes[a], arguments[a]);
            if (code) return -1;
        }
        if (launch(stream, function, 1, NULL, &whole, &local, 0, NULL, NULL)) return -1;
    }
    return (now() - began) / n;
}

/* -- a workload of many launches: seconds to queue `repeats` times all of them --------------------- */

typedef struct {
    void *function;
    uint32_t grid[3], block[3];
    void **arguments;
} step;

double floor_cuda_steps(void *call, const step *steps, int count, int repeats, void *stream) {
    double began = now();
    for (int r = 0; r < repeats; r++)
        for (int i = 0; i < count; i++) {
            const step *s = &steps[i];
            if (((cuda_launch)call)(s->function, s->grid[0], s->grid[1], s->grid[2], s->block[0],
                                    s->block[1], s->block[2], 0, stream, s->arguments, NULL))
                return -1;
        }
    return now() - began;
}

double floor_plain_steps(void *call, const step *steps, int count, int repeats, void *stream) {
    double began = now();
    for (int r = 0; r < repeats; r++)
        for (int i = 0; i < count; i++) {
            const step *s = &steps[i];
            if (((plain_launch)call)(s->function, s->grid, s->block, 0, stream, s->arguments)) return -1;
        }
    return now() - began;
}

/* -- anything that takes two handles: cuGraphLaunch, cuEventRecord --------------------------------- */

typedef int (*two)(void *, void *);

double floor_two(void *call, void *first, void *second, int n) {
    double began = now();
    for (int i = 0; i < n; i++)
        if (((two)call)(first, second)) return -1;
    return (now() - began) / n;
}

double floor_record(void *call, void *event, void *stream, int n) {
    return floor_two(call, event, stream, n);
}

/* -- cuBLAS: c = a b, a = c b, ... with cublasGemmEx in half precision ----------------------------- */

typedef int (*gemm_ex)(void *, int, int, int, int, int, const void *, const void *, int, int,
                       const void *, int, int, const void *, void *, int, int, int, int);

enum { CUDA_R_16F = 2, CUBLAS_COMPUTE_32F = 68, CUBLAS_GEMM_DEFAULT = -1 };

double floor_gemm_chain(void *call, void *handle, int n, void *a, void *b, void *c, int count) {
    const float one = 1, zero = 0;
    double began = now();
    for (int i = 0; i < count; i++) {
        void *from = i % 2 ? c : a, *to = i % 2 ? a : c;
        if (((gemm_ex)call)(handle, 0, 0, n, n, n, &one, b, CUDA_R_16F, n, from, CUDA_R_16F, n, &zero,
                            to, CUDA_R_16F, n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT))
            return -1;
    }
    return now() - began;
}

/* -- cuMemcpyPeer, and then cuCtxSynchronize: the seconds of one copy ------------------------------ */

typedef int (*peer)(uint64_t, void *, uint64_t, void *, size_t);
typedef int (*none)(void);

double floor_peer(void *call, void *synchronize, uint64_t dst, void *dst_context, uint64_t src,
                  void *src_context, size_t nbytes) {
    double began = now();
    if (((peer)call)(dst, dst_context, src, src_context, nbytes) || ((none)synchronize)()) return -1;
    return now() - began;
}

/* The same driver calls from a C loop: what no Python can be faster than. Each function calls n
 * times and returns the seconds of one call. */
#define _POSIX_C_SOURCE 199309L
#include <stddef.h>
#include <stdint.h>
#include <time.h>

static double now(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (double)at.tv_sec + 1e-9 * (double)at.tv_nsec;
}

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

double floor_opencl_launch(void *call, void *function, unsigned grid, unsigned block, void *stream,
                           void **arguments, int n) {
    size_t whole = (size_t)grid * block, local = block;
    double began = now();
    (void)arguments; /* they were set before */
    for (int i = 0; i < n; i++)
        if (((opencl_launch)call)(stream, function, 1, NULL, &whole, &local, 0, NULL, NULL)) return -1;
    return (now() - began) / n;
}

typedef int (*two)(void *, void *);

double floor_two(void *call, void *first, void *second, int n) {
    double began = now();
    for (int i = 0; i < n; i++)
        if (((two)call)(first, second)) return -1;
    return (now() - began) / n;
}

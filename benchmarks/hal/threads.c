/* The kernels' work in plain C over OpenMP's threads: what the processor can do with it. */
#include <math.h>
#include <omp.h>
#include <stddef.h>

void threads_use(int count) { omp_set_num_threads(count); }

void threads_saxpy(int n, float a, const float *restrict x, float *restrict y) {
#pragma omp parallel for simd schedule(static)
    for (int i = 0; i < n; i++) y[i] = a * x[i] + y[i];
}

void threads_stencil(int w, int h, const float *restrict in, float *restrict out) {
#pragma omp parallel for schedule(static)
    for (int y = 1; y < h - 1; y++) {
        const float *row = in + (size_t)y * w;
        float *to = out + (size_t)y * w;
#pragma omp simd
        for (int x = 1; x < w - 1; x++)
            to[x] = 0.5f * row[x] + 0.125f * (row[x - 1] + row[x + 1] + row[x - w] + row[x + w]);
    }
}

void threads_chain(int n, const float *restrict x, float *restrict y) {
#pragma omp parallel for simd schedule(static)
    for (int i = 0; i < n; i++) {
        float v = x[i] * 1.5f + 0.25f;
        v = v * v - x[i];
        v = sqrtf(fabsf(v) + 1.0f);
        y[i] = v / (1.0f + v);
    }
}

void threads_matmul(int n, const float *restrict a, const float *restrict b, float *restrict c) {
    enum { TILE = 64 };
#pragma omp parallel for schedule(static)
    for (int i0 = 0; i0 < n; i0 += TILE) {
        int rows = i0 + TILE < n ? i0 + TILE : n;
        for (int i = i0; i < rows; i++)
            for (int j = 0; j < n; j++) c[(size_t)i * n + j] = 0;
        for (int k0 = 0; k0 < n; k0 += TILE) {
            int last = k0 + TILE < n ? k0 + TILE : n;
            for (int i = i0; i < rows; i++)
                for (int k = k0; k < last; k++) {
                    float v = a[(size_t)i * n + k];
#pragma omp simd
                    for (int j = 0; j < n; j++) c[(size_t)i * n + j] += v * b[(size_t)k * n + j];
                }
        }
    }
}

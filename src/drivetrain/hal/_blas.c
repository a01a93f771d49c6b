/* Matrix products of a BLAS of the host, as a kernel of the cpu device: it runs in a stream's order
 * on the device's own threads. Each block is one tile of the product, by the library's function on
 * the one thread that runs the block.
 *
 * The file is loaded a second time by the cpu backend, as the shared object of a kernel.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>

#include "drivetrain_hal.h"

enum { ROW_MAJOR = 101, PLAIN = 111, TURNED = 112 };

/* As `cblas.py` packs it. Sizes and strides are in elements. */
typedef struct {
    void *gemm;        /* cblas_sgemm or cblas_dgemm */
    int (*threads)(int); /* called with 1 before, where it is not NULL */
    int64_t wide;      /* the library counts in 64 bits */
    int64_t doubles;
    int64_t m, n, k;
    int64_t turned_a, turned_b;
    int64_t lda, ldb, ldc;
    int64_t at_a, at_b, at_c;
    int64_t step_a, step_b, step_c; /* from one product of the batch to the next */
    int64_t tile_m, tile_n;
} product;

typedef void (*sgemm32)(int, int, int, int, int, int, float, const float *, int, const float *,
                        int, float, float *, int);
typedef void (*dgemm32)(int, int, int, int, int, int, double, const double *, int, const double *,
                        int, double, double *, int);
typedef void (*sgemm64)(int, int, int, int64_t, int64_t, int64_t, float, const float *, int64_t,
                        const float *, int64_t, float, float *, int64_t);
typedef void (*dgemm64)(int, int, int, int64_t, int64_t, int64_t, double, const double *, int64_t,
                        const double *, int64_t, double, double *, int64_t);

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static void tile(const product *p, char *c, const char *a, const char *b, int64_t x, int64_t y,
                 int64_t z) {
    int64_t size = p->doubles ? 8 : 4;
    int64_t row = y * p->tile_m, column = x * p->tile_n;
    int64_t m = least(p->tile_m, p->m - row), n = least(p->tile_n, p->n - column), k = p->k;
    if (m <= 0 || n <= 0) return;
    a += size * (p->at_a + z * p->step_a + row * (p->turned_a ? 1 : p->lda));
    b += size * (p->at_b + z * p->step_b + column * (p->turned_b ? p->ldb : 1));
    c += size * (p->at_c + z * p->step_c + row * p->ldc + column);
    int ta = p->turned_a ? TURNED : PLAIN, tb = p->turned_b ? TURNED : PLAIN;
    const void *va = a, *vb = b;
    void *vc = c;
    if (p->doubles && p->wide)
        ((dgemm64)p->gemm)(ROW_MAJOR, ta, tb, m, n, k, 1.0, va, p->lda, vb, p->ldb, 0.0, vc,
                           p->ldc);
    else if (p->doubles)
        ((dgemm32)p->gemm)(ROW_MAJOR, ta, tb, (int)m, (int)n, (int)k, 1.0, va, (int)p->lda, vb,
                           (int)p->ldb, 0.0, vc, (int)p->ldc);
    else if (p->wide)
        ((sgemm64)p->gemm)(ROW_MAJOR, ta, tb, m, n, k, 1.0f, va, p->lda, vb, p->ldb, 0.0f, vc,
                           p->ldc);
    else
        ((sgemm32)p->gemm)(ROW_MAJOR, ta, tb, (int)m, (int)n, (int)k, 1.0f, va, (int)p->lda, vb,
                           (int)p->ldb, 0.0f, vc, (int)p->ldc);
}

__attribute__((visibility("default"))) int dt_cpu_blas_gemm(const dt_cpu_range *range,
                                                           void **arguments) {
    char *c = *(char **)arguments[0];
    const char *a = *(const char **)arguments[1], *b = *(const char **)arguments[2];
    const product *p = arguments[3];
    uint64_t wide = range->grid[0], high = range->grid[1];
    if (p->threads) p->threads(1);
    for (uint64_t i = range->first; i < range->first + range->count; i++)
        tile(p, c, a, b, (int64_t)(i % wide), (int64_t)(i / wide % high),
             (int64_t)(i / wide / high));
    return 0;
}

static PyModuleDef_Slot slots[] = {
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT,
    .m_slots = slots,
    .m_name = "drivetrain.hal._blas",
    .m_doc = "The kernel behind drivetrain.hal.blas.cblas; its file is what counts.",
    .m_size = 0,
};

PyMODINIT_FUNC PyInit__blas(void) { return PyModuleDef_Init(&module); }

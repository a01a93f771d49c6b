"""Matrix products for OpenCL runtimes whose device is the host's processor.

One thread a block, so that nothing depends on how such a runtime turns threads into loops. It packs
a panel of b and strips of a, which any strides and ragged edges are gone from, and multiplies them
in vector registers; blocking as in Goto, van de Geijn, "Anatomy of high-performance matrix
multiplication" (2008). OpenCL C, because CUDA C has no vectors of such widths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.hal.kernel import I32, PTR, struct_of
from drivetrain.hal.kernels import text
from drivetrain.hal.kernels.family import Launch, blocks, kernel
from drivetrain.hal.language.source import Source

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.dtype import DType
    from drivetrain.hal.kernel import Kernel

TILE, SMALL_TILE = 128, 64
"""A block makes so many rows and columns at most; small ones where large ones would be too few."""
_ENOUGH = 64
_BATCH = 12
"""Fields before the batch, as in `gemm`."""
_COMPUTED = {"float": "float", "double": "double", "int": "uint", "unsigned int": "uint"}
_COMPUTED |= {"long long": "ulong", "unsigned long long": "ulong"}
"""Whole numbers wrap, which C promises of unsigned ones only."""

PANELS = """
#define TILE 128
#define DEEP (1024 / SIZE)
#ifdef __AVX512F__
#define ROWS 8
#define LANES WHOLE_LANES
#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
#else
#define ROWS 4
#define LANES HALF_LANES
#define EACH_ROW(DO) DO(0) DO(1) DO(2) DO(3)
#endif
#define JOIN(a, b) a##b
#define NAME(a, b) JOIN(a, b)
#define V NAME(T, LANES)
#define WIDE (2 * LANES)
#define STRIPS (TILE / WIDE)

typedef struct { long n[FIELDS]; } Product;

__kernel __attribute__((reqd_work_group_size(1, 1, 1)))
void gemm_panels(__global STORED *out, __global const STORED *a, __global const STORED *b,
                 Product w, int tile) {
    __private V panel[STRIPS * DEEP * 2];
    __private V sums[TILE * STRIPS * 2];
    __private T lines[DEEP * ROWS];
    long k = w.n[2], at_out = w.n[3], at_a = w.n[4], at_b = w.n[5], batch = get_group_id(2);
    long down = w.n[6], along = w.n[7], next = w.n[8], across = w.n[9];
    WALK
    long row = (long)get_group_id(0) * tile, column = (long)get_group_id(1) * tile;
    int rows = (int)min((long)tile, w.n[0] - row), columns = (int)min((long)tile, w.n[1] - column);
    int strips = (columns + WIDE - 1) / WIDE;
    a += at_a + row * down;
    b += at_b + column * across;
    out += at_out + row * w.n[10] + column * w.n[11];
    for (int i = 0; i < TILE * STRIPS * 2; ++i) sums[i] = (V)(0);
    for (long from = 0; from < k; from += DEEP) {
        int deep = (int)min((long)DEEP, k - from);
        for (int s = 0; s < strips; ++s) {
            __private T *to = (__private T *)(panel + s * DEEP * 2);
            __global const STORED *strip = b + from * next + (long)s * WIDE * across;
            int inside = min(WIDE, columns - s * WIDE);
            if (inside == WIDE && across == 1) {
                for (int p = 0; p < deep; ++p)
                    for (int j = 0; j < WIDE; ++j) to[p * WIDE + j] = LOAD(strip, p * next + j);
            } else {
                for (int j = 0; j < WIDE; ++j)
                    for (int p = 0; p < deep; ++p)
                        to[p * WIDE + j] = j < inside ? LOAD(strip, p * next + j * across) : (T)0;
            }
        }
        for (int r = 0; r < rows; r += ROWS) {
            __global const STORED *mine = a + r * down + from * along;
            int inside = min(ROWS, rows - r);
            for (int i = 0; i < ROWS; ++i)
                for (int p = 0; p < deep; ++p)
                    lines[p * ROWS + i] = i < inside ? LOAD(mine, i * down + p * along) : (T)0;
            for (int s = 0; s < strips; ++s) {
                __private V *at = sums + (r * STRIPS + s) * 2;
                __private const V *line = panel + s * DEEP * 2;
#define TAKE(i) V x##i = at[i * STRIPS * 2], y##i = at[i * STRIPS * 2 + 1];
#define ADD(i) { V f = (V)(lines[p * ROWS + i]); x##i = FMA(f, u, x##i); y##i = FMA(f, v, y##i); }
#define PUT(i) at[i * STRIPS * 2] = x##i; at[i * STRIPS * 2 + 1] = y##i;
                EACH_ROW(TAKE)
                for (int p = 0; p < deep; ++p) {
                    V u = line[p * 2], v = line[p * 2 + 1];
                    EACH_ROW(ADD)
                }
                EACH_ROW(PUT)
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        __private const T *made = (__private const T *)(sums + r * STRIPS * 2);
        __global STORED *to = out + r * w.n[10];
        if (w.n[11] == 1)
            for (int j = 0; j < columns; ++j) STORE(to, j, made[j]);
        else
            for (int j = 0; j < columns; ++j) STORE(to, j * w.n[11], made[j]);
    }
}
"""

_PLAIN = ("(T)(p)[i]", "(p)[i] = (STORED)(x)")
_ELEMENTS = {
    "float16": (
        "vload_half(i, (__global const half *)(p))",
        "vstore_half_rte(x, i, (__global half *)(p))",
    ),
    "bfloat16": ("as_float((uint)(p)[i] << 16)", "(p)[i] = rounded(x)"),
}
_ROUNDED = """
ushort rounded(float x) {
    uint bits = as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (ushort)((bits >> 16) | 0x40u);
    return (ushort)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
"""


def source(dtype: DType, batch: int = 0) -> Source:
    """``gemm_panels(out, a, b, product, tile)`` with ``batch`` batch dimensions; ``product`` is
    `gemm.product`, ``tile`` at most `TILE`."""
    fields = [("at_out", _BATCH + batch), ("at_a", _BATCH + 2 * batch)]
    fields.append(("at_b", _BATCH + 3 * batch))
    walk = text.walk("w", "batch", batch, _BATCH, fields).replace("long long", "long")
    computed = _COMPUTED[dtype.computed]
    size = 8 if computed in ("double", "ulong") else 4
    load, store = _ELEMENTS.get(dtype.name, _PLAIN)
    lines = {
        "STORED": dtype.stored.replace("long long", "long"),
        "T": computed,
        "SIZE": size,
        "WHOLE_LANES": 64 // size,
        "HALF_LANES": 32 // size,
        "FIELDS": _BATCH + 4 * batch,
        "LOAD(p, i)": load,
        "STORE(p, i, x)": store,
        "FMA(x, y, z)": "fma(x, y, z)" if dtype.kind == "float" else "((x) * (y) + (z))",
    }
    head = "".join(f"#define {name} {value}\n" for name, value in lines.items())
    fp64 = "#pragma OPENCL EXTENSION cl_khr_fp64 : enable\n" if computed == "double" else ""
    rounded = _ROUNDED if dtype.name == "bfloat16" else ""
    return Source.opencl(fp64 + head + rounded + PANELS.replace("WALK", walk), name="gemm.cl")


def rule(m: int, n: int, batch: int = 1) -> tuple[Launch, int]:
    """How it is launched, and the tile."""
    tile = TILE
    if blocks(m, TILE) * blocks(n, TILE) * batch < _ENOUGH:
        tile = SMALL_TILE
    return Launch((blocks(m, tile), blocks(n, tile), batch), (1,)), tile


def kernel_for(device: Device, dtype: DType, batch: int) -> Kernel:
    """The kernel, compiled once a process. Raises BadInput for bool."""
    types = (PTR, PTR, PTR, struct_of(8 * (_BATCH + 4 * batch)), I32)
    return kernel(device, "gemm_panels", source, dtype, batch, args=types)


def serves(device: Device) -> bool:
    """Whether it is one that this is for: chosen by name only, as such runtimes are."""
    info = device.info
    return info.driver in ("opencl", "sycl") and info.memory_domain == "host" and info.by_name_only

"""Matrix products: tiles through shared memory for GPUs, strips of registers for the cpu driver;
for OpenCL on a processor there is `gemm_panels`.

Operands have any strides, so a transposed matrix needs no copy, and any number of batch dimensions.
float16 and bfloat16 are summed in float32.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from drivetrain.hal.dtype import DTYPES, DType
from drivetrain.hal.kernels import gemm_panels, text
from drivetrain.hal.kernels.family import (
    Family,
    Launch,
    agree,
    blocks,
    generator,
    get,
    kernel,
    launch,
    numpy,
    put,
    room,
)
from drivetrain.hal.language.source import Source

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.kernel import Kernel
    from drivetrain.hal.layout import Shape
    from drivetrain.hal.stream import Stream

TILE, STEP, EACH = 64, 16, 4
ROWS, COLUMNS, STRIPS = 4, 16, 8
_BATCH = 12
"""Fields before the batch: m n k, offsets of out a b, row and column strides of a, b and out."""

TILED = """
#define TILE 64
#define STEP 16
#define EACH 4

/* A block makes TILE x TILE elements, a thread EACH x EACH of them. Loads follow whichever
   dimension is contiguous in memory. */
extern "C" __global__ void gemm(OUT *out, const IN *a, const IN *b, Product w) {
    __shared__ T left[STEP * (TILE + 4)];
    __shared__ T right[STEP * (TILE + 4)];
    int t = threadIdx.x, tx = t % 16, ty = t / 16;
    long long m = w.n[0], n = w.n[1], k = w.n[2];
    long long at_out = w.n[3], at_a = w.n[4], at_b = w.n[5];
    long long batch = blockIdx.z;
    WALK
    long long row = (long long)blockIdx.x * TILE, column = (long long)blockIdx.y * TILE;
    T sum[EACH * EACH];
    for (int i = 0; i < EACH * EACH; ++i) sum[i] = 0;
    for (long long from = 0; from < k; from += STEP) {
        for (int i = 0; i < EACH; ++i) {
#if A_ALONG_K
            int deep = t % STEP, at = t / STEP + i * 16;
#else
            int deep = t / TILE + i * 4, at = t % TILE;
#endif
            bool inside = row + at < m && from + deep < k;
            left[deep * (TILE + 4) + at] =
                inside ? (T)LOAD(a[at_a + (row + at) * w.n[6] + (from + deep) * w.n[7]]) : (T)0;
        }
        for (int i = 0; i < EACH; ++i) {
#if B_ALONG_K
            int deep = t % STEP, at = t / STEP + i * 16;
#else
            int deep = t / TILE + i * 4, at = t % TILE;
#endif
            bool inside = column + at < n && from + deep < k;
            right[deep * (TILE + 4) + at] =
                inside ? (T)LOAD(b[at_b + (from + deep) * w.n[8] + (column + at) * w.n[9]]) : (T)0;
        }
        __syncthreads();
        for (int deep = 0; deep < STEP; ++deep) {
            T mine[EACH], other[EACH];
            for (int i = 0; i < EACH; ++i) {
                mine[i] = left[deep * (TILE + 4) + ty * EACH + i];
                other[i] = right[deep * (TILE + 4) + tx * EACH + i];
            }
            for (int i = 0; i < EACH; ++i)
                for (int j = 0; j < EACH; ++j) sum[i * EACH + j] += mine[i] * other[j];
        }
        __syncthreads();
    }
    for (int i = 0; i < EACH; ++i)
        for (int j = 0; j < EACH; ++j) {
            long long y = row + ty * EACH + i, x = column + tx * EACH + j;
            if (y < m && x < n) out[at_out + y * w.n[10] + x * w.n[11]] = STORE(sum[i * EACH + j]);
        }
}
"""

STRIPS_OF_REGISTERS = """
#define ROWS 4
#define COLUMNS 16

/* A thread makes ROWS x COLUMNS elements in registers; b's rows are contiguous. */
extern "C" __global__ void gemm(OUT *out, const IN *a, const IN *b, Product w) {
    long long m = w.n[0], n = w.n[1], k = w.n[2];
    long long row = ((long long)blockIdx.x * blockDim.x + threadIdx.x) * ROWS;
    if (row >= m) return;
    long long column = (long long)blockIdx.y * COLUMNS;
    long long at_out = w.n[3], at_a = w.n[4], at_b = w.n[5];
    long long batch = blockIdx.z;
    WALK
    T sum[ROWS * COLUMNS];
    for (int i = 0; i < ROWS * COLUMNS; ++i) sum[i] = 0;
    long long rows = m - row < ROWS ? m - row : ROWS, columns = n - column;
    const IN *lines = a + at_a + row * w.n[6];
    const IN *strip = b + at_b + column;
    long long down = w.n[6], along = w.n[7], next = w.n[8];
    if (rows == ROWS && columns >= COLUMNS) {
        for (long long deep = 0; deep < k; ++deep) {
            T first = LOAD(lines[deep * along]), second = LOAD(lines[down + deep * along]);
            T third = LOAD(lines[2 * down + deep * along]);
            T fourth = LOAD(lines[3 * down + deep * along]);
            const IN *line = strip + deep * next;
            for (int j = 0; j < COLUMNS; ++j) {
                T other = LOAD(line[j]);
                sum[j] += first * other;
                sum[COLUMNS + j] += second * other;
                sum[2 * COLUMNS + j] += third * other;
                sum[3 * COLUMNS + j] += fourth * other;
            }
        }
        columns = COLUMNS;
    } else {
        if (columns > COLUMNS) columns = COLUMNS;
        for (long long deep = 0; deep < k; ++deep)
            for (long long i = 0; i < rows; ++i) {
                T mine = LOAD(lines[i * down + deep * along]);
                for (long long j = 0; j < columns; ++j)
                    sum[i * COLUMNS + j] += mine * LOAD(strip[deep * next + j]);
            }
    }
    for (long long i = 0; i < rows; ++i)
        for (long long j = 0; j < columns; ++j)
            out[at_out + (row + i) * w.n[10] + (column + j) * w.n[11]] =
                STORE(sum[i * COLUMNS + j]);
}
"""


def source(
    dtype: DType,
    batch: int = 0,
    *,
    strips: bool = False,
    a_along_k: bool = True,
    b_along_k: bool = False,
) -> Source:
    """``gemm(out, a, b, product)`` with ``batch`` batch dimensions.

    ``strips`` is for CPUs; b's column stride must be 1 there. Else ``a_along_k`` and ``b_along_k``
    say which of their dimensions is the contiguous one.
    """
    width = batch
    strides = [("at_out", _BATCH + width), ("at_a", _BATCH + 2 * width)]
    strides.append(("at_b", _BATCH + 3 * width))
    body = (STRIPS_OF_REGISTERS if strips else TILED).replace(
        "WALK", text.walk("w", "batch", batch, _BATCH, strides)
    )
    return Source.cuda(
        text.prelude(dtype)
        + f"#define T {dtype.computed}\n#define IN {dtype.stored}\n#define OUT {dtype.stored}\n"
        + f"#define LOAD(x) {text.load(dtype, 'x')}\n#define STORE(x) {text.store(dtype, 'x')}\n"
        + f"#define A_ALONG_K {int(a_along_k)}\n#define B_ALONG_K {int(b_along_k)}\n"
        + text.record("Product", _BATCH + 4 * batch)
        + body,
        name="gemm.cu",
    )


def chosen(dtype: DType, batch: int, strips: bool, a_along_k: bool, b_along_k: bool) -> Source:
    """`source`, with all choices in order."""
    return source(dtype, batch, strips=strips, a_along_k=a_along_k, b_along_k=b_along_k)


MOST_COLUMNS = 65535 * COLUMNS
"""Of one launch."""


def rule(m: int, n: int, batch: int = 1, *, strips: bool = False) -> Launch:
    if strips:
        return Launch((blocks(m, ROWS * STRIPS), blocks(n, COLUMNS), batch), (STRIPS,))
    return Launch((blocks(m, TILE), blocks(n, TILE), batch), (256,))


def product(
    sizes: tuple[int, int, int],
    offsets: tuple[int, int, int],
    strides: tuple[int, ...],
    batch: Shape = (),
    steps: tuple[Shape, Shape, Shape] = ((), (), ()),
) -> bytes:
    """The structure: (m, n, k), offsets of out, a, b; row and column strides of a, b, out; extents
    of the batch and the strides of out, a, b over it."""
    flat = [step for each in steps for step in each]
    return text.packed([*sizes, *offsets, *strides, *batch, *flat])


def declared(found: Kernel, dtype: DType) -> Kernel:
    """The kernel, with what one launch of it moves and computes told to profiles."""

    def sizes(grid: tuple[int, ...], arguments: tuple[Any, ...]) -> tuple[int, int, int, int]:
        m, n, k = struct.unpack_from("3q", arguments[3])
        return m, n, k, grid[2]

    def nbytes(grid: tuple[int, ...], block: Any, arguments: tuple[Any, ...]) -> float:
        m, n, k, count = sizes(grid, arguments)
        return float(dtype.nbytes * count * (m * k + k * n + m * n))

    def operations(grid: tuple[int, ...], block: Any, arguments: tuple[Any, ...]) -> float:
        m, n, k, count = sizes(grid, arguments)
        return 2.0 * m * n * k * count

    return found.work(bytes=nbytes, flops=operations, dtype=dtype.name)


def reference(a: Any, b: Any) -> Any:
    """In double precision where the type is floating."""
    np = numpy()
    if a.dtype.kind != "f":
        return np.matmul(a, b)
    return np.matmul(a.astype(np.float64), b.astype(np.float64)).astype(a.dtype)


_SIZES = {33: (33, 17, 5), 256: (64, 128, 32), 1000: (100, 70, 130)}


def _check(device: Device, stream: Stream, size: int) -> None:
    """Each kernel, plain and transposed, floats and integers."""
    np, random = numpy(), generator(size)
    m, n, k = _SIZES.get(size, (size, size, size))
    for name, strips, turned in (
        ("float32", False, False), ("float32", False, True), ("float32", True, False),
        ("float16", True, False), ("int32", False, False),
    ):  # fmt: skip
        dtype = DTYPES[name]
        if dtype.kind == "float":
            a, b = (random.standard_normal(s).astype(name) for s in ((m, k), (k, n)))
        else:
            a, b = (random.integers(-99, 99, s, dtype=name) for s in ((m, k), (k, n)))
        wanted = reference(a, b)
        a_steps, b_steps = (k, 1), (n, 1)
        if turned:
            a, b, a_steps, b_steps = (
                np.ascontiguousarray(a.T),
                np.ascontiguousarray(b.T),
                (1, m),
                (1, k),
            )
        made = room(device, stream, wanted.nbytes)
        found = kernel(device, "gemm", chosen, dtype, 0, strips, not turned, turned)
        packed = product((m, n, k), (0, 0, 0), (*a_steps, *b_steps, n, 1))
        where = (put(device, stream, a), put(device, stream, b))
        launch(found, stream, rule(m, n, strips=strips), made, *where, packed)
        loose = {"float32": (1e-5, 1e-5), "float16": (2e-3, 2e-3)}.get(name, (0.0, 0.0))
        what = f"gemm of {name}{', transposed' * turned}{', strips' * strips}"
        near = {"rtol": loose[0], "atol": loose[1] * float(np.sqrt(k))}
        agree(what, get(made, stream, (m, n), name), wanted, **near)
        if gemm_panels.serves(device):
            made = room(device, stream, wanted.nbytes)
            found = gemm_panels.kernel_for(device, dtype, 0)
            way, tile = gemm_panels.rule(m, n)
            launch(found, stream, way, made, *where, packed, tile)
            agree(f"{what}, panels", get(made, stream, (m, n), name), wanted, **near)


FAMILIES = (
    Family("gemm", "tiled and strip-wise matrix products", source, rule, reference, _check),
)

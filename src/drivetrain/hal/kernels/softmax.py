"""Softmax and its logarithm over rows: exp(x - max) over its sum, so that nothing overflows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain.hal.dtype import DTYPES, DType
from drivetrain.hal.kernels import text
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
    from drivetrain.hal.stream import Stream

BLOCK = 128
SHORT = 64
"""Up to so many columns a thread does a row by itself."""
_MOST = 65535

BY_BLOCK = """
#define BLOCK 128

/* A block does one row. */
extern "C" __global__ void softmax(E *out, const E *in, Rows w) {
    __shared__ T joined[BLOCK];
    long long row = (long long)blockIdx.y * gridDim.x + blockIdx.x, columns = w.n[1];
    if (row >= w.n[0]) return;
    const E *mine = in + w.n[2] + row * w.n[3];
    long long along = w.n[4];
    int t = threadIdx.x;
    T most = LEAST;
    for (long long i = t; i < columns; i += BLOCK) {
        T x = LOAD(mine[i * along]);
        most = most != most || most > x ? most : x;
    }
    joined[t] = most;
    __syncthreads();
    for (int half = BLOCK / 2; half > 0; half >>= 1) {
        if (t < half) {
            T a = joined[t], b = joined[t + half];
            joined[t] = a != a || a > b ? a : b;
        }
        __syncthreads();
    }
    most = joined[0];
    __syncthreads();
    T sum = 0;
    for (long long i = t; i < columns; i += BLOCK) sum += exp(LOAD(mine[i * along]) - most);
    joined[t] = sum;
    __syncthreads();
    for (int half = BLOCK / 2; half > 0; half >>= 1) {
        if (t < half) joined[t] += joined[t + half];
        __syncthreads();
    }
    sum = joined[0];
#if LOGARITHM
    sum = log(sum);
#endif
    for (long long i = t; i < columns; i += BLOCK) {
        T x = LOAD(mine[i * along]) - most;
        out[row * columns + i] = STORE(LAST);
    }
}
"""

BY_THREAD = """
/* A thread does one short row. */
extern "C" __global__ void softmax(E *out, const E *in, Rows w) {
    long long row = (long long)blockIdx.x * blockDim.x + threadIdx.x, columns = w.n[1];
    if (row >= w.n[0]) return;
    const E *mine = in + w.n[2] + row * w.n[3];
    long long along = w.n[4];
    T most = LEAST, sum = 0;
    for (long long i = 0; i < columns; ++i) {
        T x = LOAD(mine[i * along]);
        most = most != most || most > x ? most : x;
    }
    for (long long i = 0; i < columns; ++i) sum += exp(LOAD(mine[i * along]) - most);
#if LOGARITHM
    sum = log(sum);
#endif
    for (long long i = 0; i < columns; ++i) {
        T x = LOAD(mine[i * along]) - most;
        out[row * columns + i] = STORE(LAST);
    }
}
"""


def source(dtype: DType, logarithm: bool = False, short: bool = False) -> Source:
    """``softmax(out, in, rows)``; out has no gaps. ``short``: a thread a row."""
    least = "__longlong_as_double(0xfff0000000000000LL)"
    if dtype.computed == "float":
        least = "__int_as_float(0xff800000)"
    return Source.cuda(
        text.prelude(dtype)
        + f"#define E {dtype.stored}\n#define T {dtype.computed}\n#define LEAST {least}\n"
        + f"#define LOAD(x) {text.load(dtype, 'x')}\n#define STORE(x) {text.store(dtype, 'x')}\n"
        + f"#define LOGARITHM {int(logarithm)}\n"
        + f"#define LAST {'x - sum' if logarithm else 'exp(x) / sum'}\n"
        + text.record("Rows", 5)
        + (BY_THREAD if short else BY_BLOCK),
        name="softmax.cu",
    )


def rule(rows: int, short: bool) -> Launch:
    if short:
        return Launch((blocks(rows, BLOCK),), (BLOCK,))
    wide = min(rows, _MOST)
    return Launch((wide, blocks(rows, wide)), (BLOCK,))


def rows_of(rows: int, columns: int, offset: int, down: int, along: int) -> bytes:
    """The structure: extents, the first element, strides from row to row and within a row."""
    return text.packed([rows, columns, offset, down, along])


def reference(array: Any, logarithm: bool = False) -> Any:
    np = numpy()
    wide = array.astype(np.float64)
    wide = wide - wide.max(axis=-1, keepdims=True)
    total = np.exp(wide).sum(axis=-1, keepdims=True)
    return (wide - np.log(total) if logarithm else np.exp(wide) / total).astype(array.dtype)


def _check(device: Device, stream: Stream, size: int) -> None:
    np, random = numpy(), generator(size)
    f32 = DTYPES["float32"]
    for rows, columns, short, logarithm in (
        (5, size, False, False), (size, 10, True, False), (3, size, False, True),
    ):  # fmt: skip
        array = (random.standard_normal((rows, columns)) * 20).astype(np.float32)
        wanted = reference(array, logarithm)
        made = room(device, stream, wanted.nbytes)
        found = kernel(device, "softmax", source, f32, logarithm, short)
        where = put(device, stream, array)
        packed = rows_of(rows, columns, 0, columns, 1)
        launch(found, stream, rule(rows, short), made, where, packed)
        got = get(made, stream, (rows, columns), np.float32)
        agree(f"softmax of {rows} x {columns}", got, wanted, rtol=2e-5, atol=1e-6)


FAMILIES = (
    Family(
        "softmax", "long rows by blocks, short ones by threads", source, rule, reference, _check
    ),
)

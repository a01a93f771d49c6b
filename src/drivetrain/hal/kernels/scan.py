"""Inclusive prefix sums: within blocks, then over the blocks' totals, then both together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain.hal.dtype import DTYPES, DType
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
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.stream import Stream

BLOCK = 256

TEXT = """
#define BLOCK 256

/* Hillis and Steele, "Data Parallel Algorithms" (1986): in each round a thread adds what lies
   twice as far to its left. totals gets each block's sum. */
extern "C" __global__ void scan_blocks(T *out, const T *in, T *totals, long long n) {
    __shared__ T lines[2 * BLOCK];
    int t = threadIdx.x, from = 0;
    long long i = (long long)blockIdx.x * BLOCK + t;
    lines[t] = i < n ? in[i] : (T)0;
    __syncthreads();
    for (int reach = 1; reach < BLOCK; reach *= 2) {
        int to = BLOCK - from;
        lines[to + t] = t >= reach ? lines[from + t] + lines[from + t - reach] : lines[from + t];
        from = to;
        __syncthreads();
    }
    if (i < n) out[i] = lines[from + t];
    if (t == BLOCK - 1) totals[blockIdx.x] = lines[from + t];
}

/* To each block but the first, all that lies before it. */
extern "C" __global__ void add_before(T *out, const T *totals, long long n) {
    long long i = (long long)blockIdx.x * BLOCK + threadIdx.x;
    if (i < n && blockIdx.x > 0) out[i] += totals[blockIdx.x - 1];
}
"""


def source(dtype: DType) -> Source:
    """``scan_blocks(out, in, totals, n)`` and ``add_before(out, totals, n)``, for numbers of 32 or
    64 bits."""
    return Source.cuda(f"#define T {dtype.stored}\n{TEXT}", name="scan.cu")


def rule(n: int) -> Launch:
    return Launch((blocks(n, BLOCK),), (BLOCK,))


def run(stream: Stream, dtype: DType, out: Buffer, values: Buffer, n: int) -> None:
    """Queue the prefix sums of ``n`` numbers; ``out`` may be ``values``."""
    device = stream.device
    count = blocks(n, BLOCK)
    totals = device.alloc(count * dtype.nbytes, stream=stream)
    launch(kernel(device, "scan_blocks", source, dtype), stream, rule(n), out, values, totals, n)
    if count > 1:
        run(stream, dtype, totals, totals, count)
        launch(kernel(device, "add_before", source, dtype), stream, rule(n), out, totals, n)
    totals.close()


def reference(array: Any) -> Any:
    np = numpy()
    wide = array.astype(np.float64) if array.dtype.kind == "f" else array
    return np.cumsum(wide, dtype=wide.dtype).astype(array.dtype)


def _check(device: Device, stream: Stream, size: int) -> None:
    np, random = numpy(), generator(size)
    for name, array in (
        ("int32", random.integers(-1000, 1000, size, dtype=np.int32)),
        ("int64", random.integers(-(1 << 40), 1 << 40, size, dtype=np.int64)),
        ("float32", random.standard_normal(size).astype(np.float32)),
        ("int32", random.integers(-9, 9, size * size, dtype=np.int32)),
    ):
        wanted = reference(array)
        made = room(device, stream, wanted.nbytes)
        run(stream, DTYPES[name], made, put(device, stream, array), array.size)
        loose = 1e-5 * float(np.sqrt(size)) if name == "float32" else 0.0
        found = get(made, stream, array.size, array.dtype)
        agree(f"scan of {array.size} {name}", found, wanted, rtol=loose, atol=loose)


FAMILIES = (
    Family("scan", "prefix sums over one and many blocks", source, rule, reference, _check),
)

"""Histograms of integers: counted in shared memory where the bins fit, then added up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
)
from drivetrain.hal.language.source import Source

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.stream import Stream

BLOCK = 256
EACH = 16
"""Values a thread counts."""
SHARED_BINS = 4096

TEXT = """
/* bins counts in unsigned ints; values outside of [0, bins) count nowhere. */
extern "C" __global__ void histogram(unsigned int *counts, const int *values, long long n,
                                     int bins) {
    extern __shared__ unsigned int mine[];
    for (int i = threadIdx.x; i < bins; i += blockDim.x) mine[i] = 0;
    __syncthreads();
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        int value = values[i];
        if (value >= 0 && value < bins) atomicAdd(&mine[value], 1u);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < bins; i += blockDim.x)
        if (mine[i]) atomicAdd(&counts[i], mine[i]);
}

/* The same without shared memory, for more bins than fit there. */
extern "C" __global__ void histogram_far(unsigned int *counts, const int *values, long long n,
                                         int bins) {
    long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
        int value = values[i];
        if (value >= 0 && value < bins) atomicAdd(&counts[value], 1u);
    }
}
"""


def source() -> Source:
    """``histogram(counts, values, n, bins)`` and ``histogram_far``; counts begin at 0."""
    return Source.cuda(TEXT, name="histogram.cu")


def rule(n: int, bins: int) -> Launch:
    grid = min(1024, blocks(n, BLOCK * EACH))
    return Launch((grid,), (BLOCK,), bins * 4 if bins <= SHARED_BINS else 0)


def run(stream: Stream, counts: Buffer, values: Buffer, n: int, bins: int) -> None:
    """Queue: count ``n`` int32 values into ``bins`` unsigned 32-bit counts, from 0."""
    counts.view(0, bins * 4).fill(b"\0\0\0\0", stream=stream)
    name = "histogram" if bins <= SHARED_BINS else "histogram_far"
    found = kernel(stream.device, name, source)
    launch(found, stream, rule(n, bins), counts, values, n, bins)


def reference(values: Any, bins: int) -> Any:
    np = numpy()
    inside = values[(values >= 0) & (values < bins)]
    return np.bincount(inside, minlength=bins).astype(np.uint32)


def _check(device: Device, stream: Stream, size: int) -> None:
    np, random = numpy(), generator(size)
    for bins in (7, size, SHARED_BINS + size):
        values = random.integers(-3, bins + 3, 40 * size, dtype=np.int32)
        wanted = reference(values, bins)
        counts = device.alloc(wanted.nbytes, stream=stream)
        run(stream, counts, put(device, stream, values), values.size, bins)
        agree(f"histogram of {bins} bins", get(counts, stream, bins, np.uint32), wanted)


FAMILIES = (
    Family("histogram", "counts in shared memory and past it", source, rule, reference, _check),
)

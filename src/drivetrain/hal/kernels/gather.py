"""Rows picked by their positions (``take``)."""

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
    from drivetrain.hal.stream import Stream

BLOCK = 256
_STORED = {
    1: "unsigned char", 2: "unsigned short", 4: "unsigned int", 8: "unsigned long long",
}  # fmt: skip

TEXT = """
/* out[o][j][i] = in[o][positions[j]][i] over outer x count x inner; in has `extent` positions.
   Negative positions count from the end; those beyond either end are taken to the nearest. */
extern "C" __global__ void gather(E *out, const E *in, const P *positions, long long at_in,
                                  long long at_positions, long long outer, long long extent,
                                  long long count, long long inner) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= outer * count * inner) return;
    long long within = i % inner, j = i / inner % count, o = i / inner / count;
    long long position = (long long)positions[at_positions + j];
    if (position < 0) position += extent;
    if (position < 0) position = 0;
    if (position >= extent) position = extent - 1;
    out[i] = in[at_in + (o * extent + position) * inner + within];
}
"""


def source(nbytes: int, positions: DType) -> Source:
    """``gather(out, in, positions, at_in, at_positions, outer, extent, count, inner)``."""
    defines = f"#define E {_STORED[nbytes]}\n#define P {positions.stored}\n"
    return Source.cuda(defines + TEXT, name="gather.cu")


def rule(elements: int) -> Launch:
    return Launch((blocks(elements, BLOCK),), (BLOCK,))


def reference(array: Any, positions: Any, axis: int) -> Any:
    return numpy().take(array, positions, axis=axis, mode="clip")


def _check(device: Device, stream: Stream, size: int) -> None:
    np, random = numpy(), generator(size)
    array = random.standard_normal((3, size, 5)).astype(np.float32)
    positions = random.integers(0, size, 2 * size, dtype=np.int32)
    wanted = reference(array, positions, 1)
    made = room(device, stream, wanted.nbytes)
    found = kernel(device, "gather", source, 4, DTYPES["int32"])
    where = (put(device, stream, array), put(device, stream, positions))
    sizes = (0, 0, 3, size, 2 * size, 5)
    launch(found, stream, rule(wanted.size), made, *where, *sizes)
    agree("gather", get(made, stream, wanted.shape, np.float32), wanted)


FAMILIES = (Family("gather", "rows picked by position", source, rule, reference, _check),)

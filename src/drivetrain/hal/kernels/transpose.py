"""Transposition of matrices through tiles in shared memory: reads and writes run along rows."""

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
    room,
)
from drivetrain.hal.language.source import Source

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.stream import Stream

TILE, HEIGHT = 32, 8
_STORED = {
    1: "unsigned char", 2: "unsigned short", 4: "unsigned int", 8: "unsigned long long",
}  # fmt: skip

TEXT = """
#define TILE 32
#define HEIGHT 8

/* in has rows x columns with `pitch` elements from row to row, out columns x rows without gaps. One
   column more than the tile needs keeps a warp's reads of a column in different banks. */
extern "C" __global__ void transpose(T *out, const T *in, int rows, int columns, long long pitch,
                                     long long at_in) {
    __shared__ T tile[TILE * (TILE + 1)];
    int x = blockIdx.x * TILE + threadIdx.x, y = blockIdx.y * TILE + threadIdx.y;
    for (int i = 0; i < TILE; i += HEIGHT)
        if (x < columns && y + i < rows)
            tile[(threadIdx.y + i) * (TILE + 1) + threadIdx.x] =
                in[at_in + (long long)(y + i) * pitch + x];
    __syncthreads();
    x = blockIdx.y * TILE + threadIdx.x;
    y = blockIdx.x * TILE + threadIdx.y;
    for (int i = 0; i < TILE; i += HEIGHT)
        if (x < rows && y + i < columns)
            out[(long long)(y + i) * rows + x] =
                tile[threadIdx.x * (TILE + 1) + threadIdx.y + i];
}
"""


def source(nbytes: int) -> Source:
    """``transpose(out, in, rows, columns, pitch, at_in)`` of elements of 1, 2, 4 or 8 bytes."""
    return Source.cuda(f"#define T {_STORED[nbytes]}\n{TEXT}", name="transpose.cu")


MOST_ROWS = 65535 * TILE
"""Of one launch."""


def rule(rows: int, columns: int) -> Launch:
    return Launch((blocks(columns, TILE), blocks(rows, TILE)), (TILE, HEIGHT))


def reference(array: Any) -> Any:
    return numpy().ascontiguousarray(array.T)


def _check(device: Device, stream: Stream, size: int) -> None:
    np, random = numpy(), generator(size)
    for shape, dtype in (((size, 70), np.float32), ((31, size), np.uint8), ((size, 33), np.int64)):
        array = random.integers(0, 255, shape).astype(dtype)
        wanted = reference(array)
        made = room(device, stream, wanted.nbytes)
        found = kernel(device, "transpose", source, array.itemsize)
        where = put(device, stream, array)
        launch(found, stream, rule(*shape), made, where, *shape, shape[1], 0)
        agree(f"transpose of {shape}", get(made, stream, wanted.shape, dtype), wanted)


FAMILIES = (
    Family(
        "transpose", "tiles whole and cut, elements of any size", source, rule, reference, _check
    ),
)

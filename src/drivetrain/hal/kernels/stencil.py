"""A five-point stencil over a grid, tiles of it in shared memory: one step of Jacobi's method."""

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

WIDTH, HEIGHT = 32, 8

TEXT = """
#define WIDTH 32
#define HEIGHT 8
#define PITCH (WIDTH + 2)

/* out = centre * in + around * (the four neighbours); the border is copied. */
extern "C" __global__ void stencil(float *out, const float *in, int rows, int columns,
                                   float centre, float around) {
    __shared__ float tile[(HEIGHT + 2) * PITCH];
    int tx = threadIdx.x, ty = threadIdx.y;
    int left = (int)blockIdx.x * WIDTH - 1, top = (int)blockIdx.y * HEIGHT - 1;
    for (int y = ty; y < HEIGHT + 2; y += HEIGHT)
        for (int x = tx; x < PITCH; x += WIDTH) {
            int row = top + y, column = left + x;
            if (row >= 0 && row < rows && column >= 0 && column < columns)
                tile[y * PITCH + x] = in[(long long)row * columns + column];
        }
    __syncthreads();
    int row = top + 1 + ty, column = left + 1 + tx;
    if (row >= rows || column >= columns) return;
    const float *at = tile + (ty + 1) * PITCH + tx + 1;
    float value = at[0];
    if (row > 0 && row < rows - 1 && column > 0 && column < columns - 1)
        value = centre * value + around * ((at[-PITCH] + at[PITCH]) + (at[-1] + at[1]));
    out[(long long)row * columns + column] = value;
}
"""


def source() -> Source:
    """``stencil(out, in, rows, columns, centre, around)``."""
    return Source.cuda(TEXT, name="stencil.cu")


def rule(rows: int, columns: int) -> Launch:
    return Launch((blocks(columns, WIDTH), blocks(rows, HEIGHT)), (WIDTH, HEIGHT))


def reference(array: Any, centre: float, around: float) -> Any:
    np = numpy()
    wide, out = array.astype(np.float64), array.copy()
    middle = (wide[:-2, 1:-1] + wide[2:, 1:-1]) + (wide[1:-1, :-2] + wide[1:-1, 2:])
    out[1:-1, 1:-1] = centre * wide[1:-1, 1:-1] + around * middle
    return out


def _check(device: Device, stream: Stream, size: int) -> None:
    np, random = numpy(), generator(size)
    for shape in ((size, 50), (9, size), (1, size), (2, 3)):
        array = random.standard_normal(shape).astype(np.float32)
        wanted = reference(array, 0.5, 0.125)
        made = room(device, stream, wanted.nbytes)
        found = kernel(device, "stencil", source)
        where = put(device, stream, array)
        launch(found, stream, rule(*shape), made, where, *shape, 0.5, 0.125)
        got = get(made, stream, shape, np.float32)
        agree(f"stencil of {shape}", got, wanted, rtol=1e-6, atol=1e-6)


FAMILIES = (
    Family("stencil", "grids whole and cut, down to one row", source, rule, reference, _check),
)

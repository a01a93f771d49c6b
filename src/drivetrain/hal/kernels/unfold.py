"""Convolution's windows as columns of a matrix, and back: with matrix products, all of convolution.

``unfold`` writes for each image and group a matrix with a row for each (channel, place in the
window) and a column for each place of the window in the image. Weights times that matrix are the
convolution; its transpose gives the weights' gradient. ``fold`` is its transpose: each
element sums what the windows over it hold, in the order of the places in the window, so that the
sum is the same in every run. It gives the gradient of the input, and transposed convolution.
"""

from __future__ import annotations

from dataclasses import dataclass
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

BLOCK = 256
Pair = tuple[int, int]


@dataclass(frozen=True)
class Windows:
    """A window's places over an image; pairs are (down, across)."""

    images: int
    """Images times channels: planes."""
    size: Pair
    window: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @property
    def places(self) -> Pair:
        """How many places the window has."""
        down, across = (
            (self.size[i] + 2 * self.padding[i] - self.dilation[i] * (self.window[i] - 1) - 1)
            // self.stride[i]
            + 1
            for i in (0, 1)
        )
        return down, across

    @property
    def columns(self) -> int:
        """Elements of all the columns."""
        (down, across), (high, wide) = self.places, self.window
        return self.images * high * wide * down * across

    def packed(self, offset: int = 0) -> bytes:
        values = [self.images, *self.size, *self.window, *self.stride, *self.padding]
        return text.packed([*values, *self.dilation, *self.places, offset])


TEXT = """
/* Element i of the columns: plane, place in the window, place of the window. */
extern "C" __global__ void unfold(E *out, const E *in, Windows w) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long rows = w.n[1], columns = w.n[2];
    long long across = w.n[12], places = w.n[11] * w.n[12], window = w.n[3] * w.n[4];
    if (i >= w.n[0] * window * places) return;
    long long place = i % places, rest = i / places;
    long long within = rest % window, plane = rest / window;
    long long y = place / across * w.n[5] - w.n[7] + within / w.n[4] * w.n[9];
    long long x = place % across * w.n[6] - w.n[8] + within % w.n[4] * w.n[10];
    E value = 0;
    if (y >= 0 && y < rows && x >= 0 && x < columns)
        value = in[w.n[13] + (plane * rows + y) * columns + x];
    out[i] = value;
}

/* Element i of the image sums what the columns have for it. */
extern "C" __global__ void fold(E *out, const E *in, Windows w) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long rows = w.n[1], columns = w.n[2];
    if (i >= w.n[0] * rows * columns) return;
    long long down = w.n[11], across = w.n[12], places = down * across;
    long long x = i % columns + w.n[8], y = i / columns % rows + w.n[7], plane = i / columns / rows;
    T sum = 0;
    for (long long high = 0; high < w.n[3]; ++high) {
        long long from = y - high * w.n[9];
        if (from < 0 || from % w.n[5] || from / w.n[5] >= down) continue;
        for (long long wide = 0; wide < w.n[4]; ++wide) {
            long long beside = x - wide * w.n[10];
            if (beside < 0 || beside % w.n[6] || beside / w.n[6] >= across) continue;
            long long row = (plane * w.n[3] + high) * w.n[4] + wide;
            sum += LOAD(in[row * places + from / w.n[5] * across + beside / w.n[6]]);
        }
    }
    out[w.n[13] + i] = STORE(sum);
}
"""


def source(dtype: DType) -> Source:
    """``unfold(out, in, windows)`` and ``fold(out, in, windows)``; neither array has gaps."""
    return Source.cuda(
        text.prelude(dtype)
        + f"#define E {dtype.stored}\n#define T {dtype.computed}\n"
        + f"#define LOAD(x) {text.load(dtype, 'x')}\n#define STORE(x) {text.store(dtype, 'x')}\n"
        + text.record("Windows", 14)
        + TEXT,
        name="unfold.cu",
    )


def rule(elements: int) -> Launch:
    return Launch((blocks(elements, BLOCK),), (BLOCK,))


def reference(array: Any, windows: Windows) -> Any:
    """`unfold` of planes (images, rows, columns): (images, window, places)."""
    np = numpy()
    (top, left), (down, across) = windows.padding, windows.places
    wide = np.pad(array, ((0, 0), (top, top), (left, left)))
    found = []
    for y in range(windows.window[0]):
        for x in range(windows.window[1]):
            from_y, from_x = y * windows.dilation[0], x * windows.dilation[1]
            to_y = from_y + (down - 1) * windows.stride[0] + 1
            to_x = from_x + (across - 1) * windows.stride[1] + 1
            part = wide[:, from_y : to_y : windows.stride[0], from_x : to_x : windows.stride[1]]
            found.append(part.reshape(len(array), -1))
    return np.stack(found, axis=1)


def _check(device: Device, stream: Stream, size: int) -> None:
    """Both, with strides, padding and dilation; ``fold`` by what makes it the transpose."""
    np, random = numpy(), generator(size)
    f32 = DTYPES["float32"]
    for windows in (
        Windows(3, (size // 8 + 3, 9), (3, 3), (1, 1), (1, 1), (1, 1)),
        Windows(2, (11, size // 8 + 5), (2, 3), (2, 1), (0, 2), (1, 2)),
    ):
        array = random.standard_normal((windows.images, *windows.size)).astype(np.float32)
        wanted = reference(array, windows)
        made = room(device, stream, wanted.nbytes)
        packed = windows.packed()
        unfold = kernel(device, "unfold", source, f32)
        launch(unfold, stream, rule(wanted.size), made, put(device, stream, array), packed)
        agree("unfold", get(made, stream, wanted.shape, np.float32), wanted)
        columns = random.standard_normal(wanted.shape).astype(np.float32)
        image = np.zeros(array.shape)
        each = np.arange(array[0].size, dtype=np.float64).reshape(1, *windows.size) + 1
        where = reference(each, windows)[0].astype(np.int64)
        for plane in range(windows.images):
            total = np.bincount(where.reshape(-1), columns[plane].reshape(-1), each.size + 1)
            image[plane] = total[1:].reshape(windows.size)
        back = room(device, stream, array.nbytes)
        fold = kernel(device, "fold", source, f32)
        launch(fold, stream, rule(array.size), back, put(device, stream, columns), packed)
        got = get(back, stream, array.shape, np.float32)
        agree("fold", got, image.astype(np.float32), rtol=1e-5, atol=1e-5)


FAMILIES = (
    Family(
        "unfold",
        "windows of a convolution as columns, and the sums back",
        source,
        rule,
        reference,
        _check,
    ),
)

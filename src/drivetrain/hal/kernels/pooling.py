"""Pooling over windows: the largest and the mean, with gradients, and adaptive windows.

A window is given by its size, stride, padding and dilation; an adaptive one covers for place ``i``
of ``n`` the elements from ``floor(i size / n)`` to before ``ceil((i + 1) size / n)``. Gradients are
sums over the windows that cover an element, in the order of places, so the same in every run.
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
class Pool:
    """Windows over planes; pairs are (down, across). ``adaptive`` windows need only ``places``."""

    planes: int
    size: Pair
    places: Pair
    window: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    adaptive: bool = False
    counts_padding: bool = True
    """Whether padding counts in the mean."""
    divisor: int = 0
    """What sums are divided by for the mean, when not by the window's elements."""

    def packed(self) -> bytes:
        values = [self.planes, *self.size, *self.places, *self.window, *self.stride]
        values += [*self.padding, *self.dilation, int(self.adaptive), int(self.counts_padding)]
        return text.packed([*values, self.divisor])

    def bounds(self, axis: int, at: int) -> range:
        """The elements along an axis under place ``at`` of the window; some may lie outside."""
        if self.adaptive:
            size, places = self.size[axis], self.places[axis]
            return range(at * size // places, -(-(at + 1) * size // places))
        start = at * self.stride[axis] - self.padding[axis]
        return range(start, start + self.window[axis] * self.dilation[axis], self.dilation[axis])


TEXT = """
#define SIZE(axis) w.n[1 + axis]
#define PLACES(axis) w.n[3 + axis]

__device__ long long start_of(long long at, int axis, Pool w) {
    if (w.n[13]) return at * SIZE(axis) / PLACES(axis);
    return at * w.n[7 + axis] - w.n[9 + axis];
}
__device__ long long stop_of(long long at, int axis, Pool w) {
    if (w.n[13]) return ((at + 1) * SIZE(axis) + PLACES(axis) - 1) / PLACES(axis);
    return at * w.n[7 + axis] - w.n[9 + axis] + w.n[5 + axis] * w.n[11 + axis];
}
/* The first place whose window may reach element at, and one after the last. */
__device__ long long first_of(long long at, int axis, Pool w) {
    if (w.n[13]) return at * PLACES(axis) / SIZE(axis);
    long long reach = at + w.n[9 + axis] - (w.n[5 + axis] - 1) * w.n[11 + axis];
    return reach <= 0 ? 0 : (reach + w.n[7 + axis] - 1) / w.n[7 + axis];
}
__device__ long long last_of(long long at, int axis, Pool w) {
    long long last = ((at + 1) * PLACES(axis) + SIZE(axis) - 1) / SIZE(axis);
    if (!w.n[13]) last = (at + w.n[9 + axis]) / w.n[7 + axis] + 1;
    return last < PLACES(axis) ? last : PLACES(axis);
}

/* The largest element of each window, NaN where there is one, and where in the plane it lies. */
extern "C" __global__ void largest(E *out, long long *where, const E *in, Pool w) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= w.n[0] * PLACES(0) * PLACES(1)) return;
    long long x = i % PLACES(1), y = i / PLACES(1) % PLACES(0), plane = i / PLACES(1) / PLACES(0);
    const E *mine = in + plane * SIZE(0) * SIZE(1);
    long long left = start_of(x, 1, w), right = stop_of(x, 1, w);
    long long top = start_of(y, 0, w), bottom = stop_of(y, 0, w);
    long long best = -1;
    T most = 0;
    for (long long row = top; row < bottom; row += w.n[11]) {
        if (row < 0 || row >= SIZE(0)) continue;
        for (long long column = left; column < right; column += w.n[12]) {
            if (column < 0 || column >= SIZE(1)) continue;
            T value = LOAD(mine[row * SIZE(1) + column]);
            if (best < 0 || value > most || value != value) {
                most = value;
                best = row * SIZE(1) + column;
            }
        }
    }
    out[i] = STORE(most);
    where[i] = best;
}

/* Each element gets what came to the windows whose largest it is. */
extern "C" __global__ void largest_slope(E *out, const E *slope, const long long *where, Pool w) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long area = SIZE(0) * SIZE(1);
    if (i >= w.n[0] * area) return;
    long long x = i % SIZE(1), y = i / SIZE(1) % SIZE(0), plane = i / area, me = i % area;
    long long left = first_of(x, 1, w), right = last_of(x, 1, w);
    long long top = first_of(y, 0, w), bottom = last_of(y, 0, w);
    T sum = 0;
    for (long long row = top; row < bottom; ++row)
        for (long long column = left; column < right; ++column) {
            long long place = (plane * PLACES(0) + row) * PLACES(1) + column;
            if (where[place] == me) sum += LOAD(slope[place]);
        }
    out[i] = STORE(sum);
}

__device__ long long clipped(long long value, long long most) {
    return value < 0 ? 0 : value > most ? most : value;
}

/* What the sum over the window at (y, x) is divided by. */
__device__ long long divisor_of(long long y, long long x, Pool w) {
    if (w.n[15]) return w.n[15];
    long long left = start_of(x, 1, w), right = stop_of(x, 1, w);
    long long top = start_of(y, 0, w), bottom = stop_of(y, 0, w);
    if (!w.n[14] || w.n[13]) {
        right = clipped(right, SIZE(1));
        bottom = clipped(bottom, SIZE(0));
        left = clipped(left, SIZE(1));
        top = clipped(top, SIZE(0));
    } else {
        if (right > SIZE(1) + w.n[10]) right = SIZE(1) + w.n[10];
        if (bottom > SIZE(0) + w.n[9]) bottom = SIZE(0) + w.n[9];
    }
    return (right - left) * (bottom - top);
}

extern "C" __global__ void mean(E *out, const E *in, Pool w) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= w.n[0] * PLACES(0) * PLACES(1)) return;
    long long x = i % PLACES(1), y = i / PLACES(1) % PLACES(0), plane = i / PLACES(1) / PLACES(0);
    const E *mine = in + plane * SIZE(0) * SIZE(1);
    long long left = clipped(start_of(x, 1, w), SIZE(1));
    long long right = clipped(stop_of(x, 1, w), SIZE(1));
    long long top = clipped(start_of(y, 0, w), SIZE(0));
    long long bottom = clipped(stop_of(y, 0, w), SIZE(0));
    T sum = 0;
    for (long long row = top; row < bottom; ++row)
        for (long long column = left; column < right; ++column)
            sum += LOAD(mine[row * SIZE(1) + column]);
    out[i] = STORE(sum / (T)divisor_of(y, x, w));
}

extern "C" __global__ void mean_slope(E *out, const E *slope, Pool w) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long area = SIZE(0) * SIZE(1);
    if (i >= w.n[0] * area) return;
    long long x = i % SIZE(1), y = i / SIZE(1) % SIZE(0), plane = i / area;
    long long left = first_of(x, 1, w), right = last_of(x, 1, w);
    long long top = first_of(y, 0, w), bottom = last_of(y, 0, w);
    T sum = 0;
    for (long long row = top; row < bottom; ++row)
        for (long long column = left; column < right; ++column) {
            long long place = (plane * PLACES(0) + row) * PLACES(1) + column;
            sum += LOAD(slope[place]) / (T)divisor_of(row, column, w);
        }
    out[i] = STORE(sum);
}
"""


def source(dtype: DType) -> Source:
    """``largest(out, where, in, pool)``, ``largest_slope(out, slope, where, pool)``,
    ``mean(out, in, pool)``, ``mean_slope(out, slope, pool)``; no array has gaps, ``where`` is
    int64. Windows of the mean have no dilation."""
    return Source.cuda(
        text.prelude(dtype)
        + f"#define E {dtype.stored}\n#define T {dtype.computed}\n"
        + f"#define LOAD(x) {text.load(dtype, 'x')}\n#define STORE(x) {text.store(dtype, 'x')}\n"
        + text.record("Pool", 16)
        + TEXT,
        name="pooling.cu",
    )


def rule(elements: int) -> Launch:
    return Launch((blocks(elements, BLOCK),), (BLOCK,))


def reference(array: Any, slope: Any, pool: Pool) -> tuple[Any, ...]:
    """(largest, where, its gradient, mean, its gradient) for planes (planes, rows, columns)."""
    np = numpy()
    shape = (pool.planes, *pool.places)
    most, mean = np.empty(shape, array.dtype), np.empty(shape, np.float64)
    where = np.empty(shape, np.int64)
    most_slope, mean_slope = np.zeros(array.shape), np.zeros(array.shape)
    for plane, y, x in np.ndindex(*shape):
        both = [pool.bounds(0, y), pool.bounds(1, x)]
        rows, columns = (
            [at for at in bounds if 0 <= at < size]
            for bounds, size in zip(both, pool.size, strict=True)
        )
        part = array[plane][np.ix_(rows, columns)]
        at = int(part.argmax())
        row, column = rows[at // len(columns)], columns[at % len(columns)]
        most[plane, y, x], where[plane, y, x] = part.max(), row * pool.size[1] + column
        most_slope[plane, row, column] += slope[plane, y, x]
        inside = [
            sum(at < size + pad for at in bounds)
            for bounds, size, pad in zip(both, pool.size, pool.padding, strict=True)
        ]
        whole = pool.counts_padding and not pool.adaptive
        count = pool.divisor or (inside[0] * inside[1] if whole else part.size)
        mean[plane, y, x] = part.sum(dtype=np.float64) / count
        mean_slope[plane][np.ix_(rows, columns)] += slope[plane, y, x] / count
    floats = (each.astype(array.dtype) for each in (most_slope, mean, mean_slope))
    return (most, where, *floats)


def _check(device: Device, stream: Stream, size: int) -> None:
    np, random = numpy(), generator(size)
    f32, wide = DTYPES["float32"], size // 16 + 5
    for pool in (
        Pool(3, (8, wide), (4, wide // 2), (2, 2), (2, 2)),
        Pool(2, (9, wide), (5, (wide - 1) // 2 + 1), (3, 3), (2, 2), (1, 1), counts_padding=False),
        Pool(2, (9, wide), (5, (wide - 1) // 2 + 1), (3, 3), (2, 2), (1, 1)),
        Pool(2, (7, wide), (3, 4), adaptive=True),
    ):
        array = random.standard_normal((pool.planes, *pool.size)).astype(np.float32)
        slope = random.standard_normal((pool.planes, *pool.places)).astype(np.float32)
        wanted = reference(array, slope, pool)
        made = [room(device, stream, each.nbytes) for each in wanted]
        x, g, packed = put(device, stream, array), put(device, stream, slope), pool.packed()
        for name, elements, *arguments in (
            ("largest", slope.size, made[0], made[1], x),
            ("largest_slope", array.size, made[2], g, made[1]),
            ("mean", slope.size, made[3], x),
            ("mean_slope", array.size, made[4], g),
        ):
            found = kernel(device, name, source, f32)
            launch(found, stream, rule(elements), *arguments, packed)
        for word, buffer, each in zip(
            ("largest", "where", "its gradient", "mean", "its gradient"), made, wanted, strict=True
        ):
            got = get(buffer, stream, each.shape, each.dtype)
            agree(f"pooling, {word}", got, each, rtol=1e-5, atol=1e-5)


FAMILIES = (
    Family(
        "pooling",
        "largest and mean of windows, plain and adaptive, and their gradients",
        source,
        rule,
        reference,
        _check,
    ),
)

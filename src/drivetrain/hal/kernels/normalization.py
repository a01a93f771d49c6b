"""Layer, batch, group and instance normalisation, forward and backward.

Elements lie in order and fall into *sets* that are normalised each by its own mean and deviation:
element ``p`` is of set ``p / inner % sets`` and has the weight ``p / each % channels``.

=============  ==========  =======  ====  ========
of             inner       sets     each  channels
=============  ==========  =======  ====  ========
layer          columns     rows     1     columns
batch          H W         C        H W   C
group          C H W / G   N G      H W   C
instance       H W         N C      H W   C
=============  ==========  =======  ====  ========

A block sums one set; so the order of a sum depends on the shape alone.
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

BLOCK = 128
WIDE = 256
_MOST = 65535


@dataclass(frozen=True)
class Sets:
    """How elements fall into sets and channels; see the module's table."""

    total: int
    inner: int
    sets: int
    each: int
    channels: int

    @property
    def count(self) -> int:
        """Elements of one set."""
        return self.total // self.sets

    def packed(self) -> bytes:
        return text.packed([self.total, self.inner, self.sets, self.each, self.channels])


def layer(rows: int, columns: int) -> Sets:
    return Sets(rows * columns, columns, rows, 1, columns)


def batch(count: int, channels: int, inner: int) -> Sets:
    """Of an array of (count, channels, inner)."""
    return Sets(count * channels * inner, inner, channels, inner, channels)


def group(count: int, channels: int, inner: int, groups: int) -> Sets:
    """The same, in ``groups`` of neighbouring channels for each of ``count``."""
    each = channels // groups * inner
    return Sets(count * channels * inner, each, count * groups, inner, channels)


JOIN = """
#define JOIN(values) \\
    __syncthreads(); \\
    for (int half = BLOCK / 2; half > 0; half >>= 1) { \\
        if (t < half) values[t] += values[t + half]; \\
        __syncthreads(); \\
    }
"""

TEXT = """
#define BLOCK 128
#define PLACE(e) ((e) / w.n[1] * (w.n[1] * w.n[2]) + set * w.n[1] + (e) % w.n[1])

/* A block finds the mean and the variance (in 1/N) of one set, in two passes. */
extern "C" __global__ void moments(T *mean, T *variance, const E *in, Sets w) {
    __shared__ T sums[BLOCK];
    long long set = (long long)blockIdx.y * gridDim.x + blockIdx.x, count = w.n[0] / w.n[2];
    if (set >= w.n[2]) return;
    int t = threadIdx.x;
    T sum = 0;
    for (long long e = t; e < count; e += BLOCK) sum += LOAD(in[PLACE(e)]);
    sums[t] = sum;
    JOIN(sums)
    T middle = sums[0] / (T)count;
    __syncthreads();
    sum = 0;
    for (long long e = t; e < count; e += BLOCK) {
        T far = LOAD(in[PLACE(e)]) - middle;
        sum += far * far;
    }
    sums[t] = sum;
    JOIN(sums)
    if (t == 0) {
        mean[set] = middle;
        variance[set] = sums[0] / (T)count;
    }
}

/* 1 / sqrt(variance + least), for each set. */
extern "C" __global__ void scale(T *out, const T *variance, T least, long long count) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) out[i] = (T)1 / sqrt(variance[i] + least);
}

/* out = (in - mean) scale weight + bias */
extern "C" __global__ void normalize(E *out, const E *in, const T *mean, const T *scale,
                                     const E *weight, const E *bias, int parts, Sets w) {
    long long p = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (p >= w.n[0]) return;
    long long set = p / w.n[1] % w.n[2], channel = p / w.n[3] % w.n[4];
    T x = (LOAD(in[p]) - mean[set]) * scale[set];
    if (parts & 1) x *= LOAD(weight[channel]);
    if (parts & 2) x += LOAD(bias[channel]);
    out[p] = STORE(x);
}

/* The sums over one set of slope weight, and of that times the normalised element. */
extern "C" __global__ void slopes(T *plain, T *along, const E *slope, const E *in, const T *mean,
                                  const T *scale, const E *weight, int parts, Sets w) {
    __shared__ T first[BLOCK];
    __shared__ T second[BLOCK];
    long long set = (long long)blockIdx.y * gridDim.x + blockIdx.x, count = w.n[0] / w.n[2];
    if (set >= w.n[2]) return;
    int t = threadIdx.x;
    T one = 0, two = 0, middle = mean[set], by = scale[set];
    for (long long e = t; e < count; e += BLOCK) {
        long long p = PLACE(e);
        T g = LOAD(slope[p]);
        if (parts & 1) g *= LOAD(weight[p / w.n[3] % w.n[4]]);
        one += g;
        two += g * (LOAD(in[p]) - middle) * by;
    }
    first[t] = one;
    second[t] = two;
    JOIN(first)
    JOIN(second)
    if (t == 0) {
        plain[set] = first[0];
        along[set] = second[0];
    }
}

/* The gradient of in. Without bit 2 of parts mean and scale are constants, and there are no sums */
extern "C" __global__ void input_slope(E *out, const E *slope, const E *in, const T *mean,
                                       const T *scale, const E *weight, const T *plain,
                                       const T *along, int parts, Sets w) {
    long long p = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (p >= w.n[0]) return;
    long long set = p / w.n[1] % w.n[2], count = w.n[0] / w.n[2];
    T g = LOAD(slope[p]);
    if (parts & 1) g *= LOAD(weight[p / w.n[3] % w.n[4]]);
    if (parts & 2) {
        T x = (LOAD(in[p]) - mean[set]) * scale[set];
        g -= (plain[set] + x * along[set]) / (T)count;
    }
    out[p] = STORE(g * scale[set]);
}

/* The gradients of weight and bias: a block sums one channel. */
extern "C" __global__ void weight_slope(E *weight, E *bias, const E *slope, const E *in,
                                        const T *mean, const T *scale, Sets w) {
    __shared__ T first[BLOCK];
    __shared__ T second[BLOCK];
    long long channel = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    long long count = w.n[0] / w.n[4];
    if (channel >= w.n[4]) return;
    int t = threadIdx.x;
    T one = 0, two = 0;
    for (long long e = t; e < count; e += BLOCK) {
        long long p = e / w.n[3] * (w.n[3] * w.n[4]) + channel * w.n[3] + e % w.n[3];
        long long set = p / w.n[1] % w.n[2];
        T g = LOAD(slope[p]);
        one += g * (LOAD(in[p]) - mean[set]) * scale[set];
        two += g;
    }
    first[t] = one;
    second[t] = two;
    JOIN(first)
    JOIN(second)
    if (t == 0) {
        weight[channel] = STORE(first[0]);
        bias[channel] = STORE(second[0]);
    }
}
"""


def source(dtype: DType) -> Source:
    """Elements of ``dtype``; moments and scales in the type that it is calculated in.

    ``moments(mean, variance, in, sets)``, ``scale(out, variance, least, count)``,
    ``normalize(out, in, mean, scale, weight, bias, parts, sets)``,
    ``slopes(plain, along, slope, in, mean, scale, weight, parts, sets)``,
    ``input_slope(out, slope, in, mean, scale, weight, plain, along, parts, sets)``,
    ``weight_slope(weight, bias, slope, in, mean, scale, sets)``. ``parts``: 1, there is a weight;
    2, there is a bias, or mean and scale come from the elements. What there is not is any pointer.
    """
    return Source.cuda(
        text.prelude(dtype)
        + f"#define E {dtype.stored}\n#define T {dtype.computed}\n"
        + f"#define LOAD(x) {text.load(dtype, 'x')}\n#define STORE(x) {text.store(dtype, 'x')}\n"
        + text.record("Sets", 5)
        + JOIN
        + TEXT,
        name="normalization.cu",
    )


def rule(name: str, sets: Sets) -> Launch:
    if name in ("normalize", "input_slope"):
        return Launch((blocks(sets.total, WIDE),), (WIDE,))
    if name == "scale":
        return Launch((blocks(sets.sets, WIDE),), (WIDE,))
    count = sets.channels if name == "weight_slope" else sets.sets
    wide = min(max(count, 1), _MOST)
    return Launch((wide, blocks(count, wide)), (BLOCK,))


def reference(array: Any, weight: Any, bias: Any, slope: Any, sets: Sets, least: float) -> Any:
    """(result, mean, scale, gradients of array, weight and bias) in double precision."""
    np = numpy()
    p = np.arange(sets.total)
    of, channel = p // sets.inner % sets.sets, p // sets.each % sets.channels
    x, g = array.reshape(-1).astype(np.float64), slope.reshape(-1).astype(np.float64)

    def total(values: Any, where: Any, length: int) -> Any:
        return np.bincount(where, values, length)

    mean = total(x, of, sets.sets) / sets.count
    variance = total((x - mean[of]) ** 2, of, sets.sets) / sets.count
    scale = 1 / np.sqrt(variance + least)
    normal = (x - mean[of]) * scale[of]
    by = g * weight.astype(np.float64)[channel]
    plain, along = total(by, of, sets.sets), total(by * normal, of, sets.sets)
    found = (
        normal * weight[channel] + bias[channel],
        mean,
        scale,
        scale[of] * (by - (plain[of] + normal * along[of]) / sets.count),
        total(g * normal, channel, sets.channels),
        total(g, channel, sets.channels),
    )
    return tuple(each.astype(array.dtype) for each in found)


def _check(device: Device, stream: Stream, size: int) -> None:
    np, random = numpy(), generator(size)
    f32 = DTYPES["float32"]
    for name, sets in (
        ("layer", layer(5, size)),
        ("batch", batch(4, 6, size // 8)),
        ("group", group(2, 6, 9, 3)),
    ):
        weight, bias = (random.standard_normal(sets.channels).astype(np.float32) for _ in range(2))
        array, slope = (
            (random.standard_normal(sets.total) * 2 + 3).astype(np.float32) for _ in range(2)
        )
        wanted = reference(array, weight, bias, slope, sets, 1e-5)
        x, w, b, g = (put(device, stream, each) for each in (array, weight, bias, slope))
        mean, variance, scale, plain, along = (room(device, stream, 4 * sets.sets) for _ in "12345")
        made = [room(device, stream, each.nbytes) for each in wanted]
        packed = sets.packed()
        for step, *arguments in (
            ("moments", mean, variance, x, packed),
            ("scale", scale, variance, 1e-5, sets.sets),
            ("normalize", made[0], x, mean, scale, w, b, 3, packed),
            ("slopes", plain, along, g, x, mean, scale, w, 1, packed),
            ("input_slope", made[3], g, x, mean, scale, w, plain, along, 3, packed),
            ("weight_slope", made[4], made[5], g, x, mean, scale, packed),
        ):
            launch(kernel(device, step, source, f32), stream, rule(step, sets), *arguments)
        made[1:3] = mean, scale
        loose = 1e-5 * float(np.sqrt(sets.total / sets.channels))
        for word, buffer, each in zip(
            ("result", "mean", "scale", "slope of the input", "slope of the weight", "of the bias"),
            made, wanted, strict=True,
        ):  # fmt: skip
            got = get(buffer, stream, each.shape, np.float32)
            agree(f"{name} norm, {word}", got, each, rtol=loose, atol=loose)


FAMILIES = (
    Family(
        "normalization",
        "layer, batch and group normalisation and their gradients",
        source,
        rule,
        reference,
        _check,
    ),
)

"""Gradients of softmax, and the negative log-likelihood with its gradient: cross entropy.

Classes are the middle of (outer, classes, inner): a row is what lies along them.
"""

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
WIDE = 256
_MOST = 65535

SLOPE = """
#define BLOCK 128

/* A block does one row without gaps. For softmax: out = y (g - sum of g y); for its logarithm:
   out = g - exp(y) (sum of g). */
extern "C" __global__ void softmax_slope(E *out, const E *slope, const E *result, long long rows,
                                         long long columns) {
    __shared__ T joined[BLOCK];
    long long row = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    if (row >= rows) return;
    const E *g = slope + row * columns;
    const E *y = result + row * columns;
    int t = threadIdx.x;
    T sum = 0;
    for (long long i = t; i < columns; i += BLOCK)
        sum += PART(LOAD(g[i]), LOAD(y[i]));
    joined[t] = sum;
    __syncthreads();
    for (int half = BLOCK / 2; half > 0; half >>= 1) {
        if (t < half) joined[t] += joined[t + half];
        __syncthreads();
    }
    sum = joined[0];
    for (long long i = t; i < columns; i += BLOCK) {
        T mine = LOAD(g[i]), value = LOAD(y[i]);
        out[row * columns + i] = STORE(FOUND(mine, value));
    }
}
"""

TEXT = """
/* For each row the weight of its class and minus that times what the class has; both are 0 where
   the class is the one to ignore, or none. */
extern "C" __global__ void likelihood(T *loss, T *weights, const E *in, const long long *classes,
                                      const E *by_class, int weighted, long long ignored, Rows w) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= w.n[0] * w.n[2]) return;
    long long class_of = classes[i], outer = i / w.n[2], inner = i % w.n[2];
    T weight = 0, value = 0;
    if (class_of != ignored && class_of >= 0 && class_of < w.n[1]) {
        weight = weighted ? LOAD(by_class[class_of]) : (T)1;
        value = -weight * LOAD(in[(outer * w.n[1] + class_of) * w.n[2] + inner]);
    }
    loss[i] = value;
    weights[i] = weight;
}

/* out[row, class] = -weight slope / total at the row's class, else 0. each: slope has an element
   for each row. divided: total counts. */
extern "C" __global__ void likelihood_slope(E *out, const E *slope, const long long *classes,
                                            const E *by_class, const E *total, int weighted,
                                            int each, int divided, long long ignored, Rows w) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= w.n[0] * w.n[1] * w.n[2]) return;
    long long inner = i % w.n[2], at = i / w.n[2] % w.n[1], outer = i / w.n[2] / w.n[1];
    long long row = outer * w.n[2] + inner;
    T value = 0;
    if (classes[row] == at && at != ignored) {
        value = -LOAD(slope[each ? row : 0]);
        if (weighted) value *= LOAD(by_class[at]);
        if (divided) value /= LOAD(total[0]);
    }
    out[i] = STORE(value);
}
"""


def slope_source(dtype: DType, logarithm: bool) -> Source:
    """``softmax_slope(out, slope, result, rows, columns)`` for softmax, or for its logarithm. Not
    by an argument: PoCL 3.1 lets threads through a loop's condition when it turns such an ``if``
    inside out, and they write beyond the row."""
    part, found = ("g", "g - exp(y) * sum") if logarithm else ("g * y", "y * (g - sum)")
    return Source.cuda(
        _elements(dtype) + f"#define PART(g, y) ({part})\n#define FOUND(g, y) ({found})\n" + SLOPE,
        name="softmax_slope.cu",
    )


def source(dtype: DType) -> Source:
    """``likelihood(loss, weights, in, classes, by_class, weighted, ignored, rows)`` and
    ``likelihood_slope(out, slope, classes, by_class, total, weighted, each, divided, ignored,
    rows)``. Classes are int64; loss and weights in the type that ``dtype`` is calculated in."""
    return Source.cuda(_elements(dtype) + text.record("Rows", 3) + TEXT, name="loss.cu")


def _elements(dtype: DType) -> str:
    return (
        text.prelude(dtype)
        + f"#define E {dtype.stored}\n#define T {dtype.computed}\n"
        + f"#define LOAD(x) {text.load(dtype, 'x')}\n#define STORE(x) {text.store(dtype, 'x')}\n"
    )


def rule(name: str, outer: int, classes: int, inner: int = 1) -> Launch:
    if name == "softmax_slope":
        wide = min(max(outer, 1), _MOST)
        return Launch((wide, blocks(outer, wide)), (BLOCK,))
    count = outer * inner * (classes if name == "likelihood_slope" else 1)
    return Launch((blocks(count, WIDE),), (WIDE,))


def reference(logits: Any, classes: Any, weight: Any, ignored: int) -> tuple[Any, Any]:
    """(mean cross entropy, its gradient by the logits) of (rows, columns), in double precision."""
    np = numpy()
    wide = logits.astype(np.float64)
    wide = wide - wide.max(axis=1, keepdims=True)
    logarithm = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    rows = np.arange(len(logits))
    each = np.where(classes == ignored, 0.0, weight.astype(np.float64)[classes])
    loss = -(each * logarithm[rows, classes]).sum() / each.sum()
    slope = np.exp(logarithm) * each[:, None]
    slope[rows, classes] -= each
    return np.float32(loss), (slope / each.sum()).astype(np.float32)


def _check(device: Device, stream: Stream, size: int) -> None:
    """The log-likelihood's gradient through log-softmax, and softmax's own, which leaves alone what
    lies behind it."""
    from drivetrain.hal.kernels import softmax

    np, random = numpy(), generator(size)
    f32, rows, columns = DTYPES["float32"], 7, size
    logits = (random.standard_normal((rows, columns)) * 3).astype(np.float32)
    weight = (random.random(columns) + 0.5).astype(np.float32)
    classes = random.integers(0, columns, rows)
    classes[2] = ignored = 1
    wanted, wanted_slope = reference(logits, classes, weight, ignored)
    x, c, by_class = (put(device, stream, each) for each in (logits, classes, weight))
    result, one, out = (room(device, stream, logits.nbytes) for _ in range(3))
    made = kernel(device, "softmax", softmax.source, f32, True, False)
    packed = softmax.rows_of(rows, columns, 0, columns, 1)
    launch(made, stream, softmax.rule(rows, False), result, x, packed)
    loss, weights = (room(device, stream, 4 * rows) for _ in range(2))
    shape = text.packed([rows, columns, 1])

    def run(name: str, *arguments: Any) -> None:
        launch(kernel(device, name, source, f32), stream, rule(name, rows, columns), *arguments)

    run("likelihood", loss, weights, result, c, by_class, 1, ignored, shape)
    each, total = (get(b, stream, rows, np.float32) for b in (loss, weights))
    agree("loss", np.float32(each.sum() / total.sum()).reshape(1), wanted.reshape(1), rtol=1e-5)
    slope = put(device, stream, np.ones(1, np.float32))
    whole = put(device, stream, total.sum().reshape(1))
    run("likelihood_slope", one, slope, c, by_class, whole, 1, 0, 1, ignored, shape)
    slope_rule = rule("softmax_slope", rows, columns)
    by = kernel(device, "softmax_slope", slope_source, f32, True)
    launch(by, stream, slope_rule, out, one, result, rows, columns)
    got = get(out, stream, logits.shape, np.float32)
    agree("gradient of cross entropy", got, wanted_slope, rtol=1e-4, atol=1e-6)
    y = softmax.reference(logits)
    wide = logits.astype(np.float64)
    plain = (y * (wide - (wide * y).sum(axis=1, keepdims=True))).astype(np.float32)
    behind = np.full(BLOCK, 7, np.float32)
    out = put(device, stream, np.concatenate([logits.reshape(-1), behind]))
    by = kernel(device, "softmax_slope", slope_source, f32, False)
    launch(by, stream, slope_rule, out, x, put(device, stream, y), rows, columns)
    got = get(out, stream, logits.size + BLOCK, np.float32)
    whole = np.concatenate([plain.reshape(-1), behind])
    agree("gradient of softmax", got, whole, rtol=1e-4, atol=1e-6)


FAMILIES = (
    Family("loss", "cross entropy and the gradients of softmax", source, rule, reference, _check),
)

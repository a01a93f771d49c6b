"""Elementwise kernels over strided arrays of any rank, and saxpy.

The innermost dimension runs along x, one thread an element, so that neighbours read neighbours;
all others run along y and z. Strides of the innermost dimension that are 1 or 0 are written into
the source: on a CPU the compiler turns the threads of a block into vector instructions then.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from drivetrain.hal.dtype import DTYPES, DType
from drivetrain.hal.kernels import activations, expressions, text
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
from drivetrain.hal.layout import padded, rank_class

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.layout import Shape
    from drivetrain.hal.stream import Stream

BLOCK = 256
_MOST = 65535
OPERATIONS = {**expressions.OPERATIONS, **activations.FUNCTIONS}
_HELPERS = {**expressions.HELPERS, **activations.HELPERS}


@dataclass(frozen=True)
class Operand:
    """One operand as the source sees it."""

    dtype: DType
    step: str = "any"
    """Elements from one to the next along the innermost dimension: ``1``, ``0`` or ``any``;
    ``value`` for a number that is an argument."""


def fields(operands: int, outer: int) -> int:
    """64-bit integers of the structure: two extents, offsets, inner strides, outer extents and
    strides."""
    return 2 + 2 * operands + outer * (1 + operands)


def kernel_name(operation: str, common: DType) -> str:
    """What timelines call the kernel."""
    return f"{operation}_{common}"


def elementwise(
    name: str, common: DType, out: Operand, inputs: tuple[Operand, ...], outer: int
) -> Source:
    """The kernel ``NAME(out, inputs..., walk)`` of one of `OPERATIONS`; NAME is `kernel_name`.

    ``outer`` counts the dimensions besides the innermost one. Each input is a pointer, or a number
    where its step is ``value``; ``where`` takes its condition first.
    """
    operation = OPERATIONS[name]
    arrays = [out, *(each for each in inputs if each.step != "value")]
    count = len(arrays)
    names = ["condition", "a", "b"] if name == "where" else ["a", "b", "c", "d"]
    parameters = [f"{out.dtype.stored} *out"]
    loads: list[str] = []
    variables = ["at_out"]
    for label, each in zip(names, inputs, strict=False):
        kind = "int" if label == "condition" else "T"
        if each.step == "value":
            parameters.append(f"{each.dtype.computed} value_{label}")
            loads.append(f"{kind} {label} = ({kind})value_{label};")
        else:
            parameters.append(f"const {each.dtype.stored} *in_{label}")
            element = text.load(each.dtype, f"in_{label}[at_{label}]")
            if name == "astype" and each.dtype.name == "float64" and out.dtype.nbytes == 2:
                element = f"odd({element})" if out.dtype.kind == "float" else element
            loads.append(f"{kind} {label} = ({kind}){element};")
            variables.append(f"at_{label}")
    first = 2 + 2 * count
    steps = []
    for at, each in enumerate(arrays):
        by = {"1": " + x", "0": ""}.get(each.step, f" + x * w.n[{2 + count + at}]")
        steps.append(f"long long {variables[at]} = w.n[{2 + at}]{by};")
    strides = [(variable, first + outer * (1 + at)) for at, variable in enumerate(variables)]
    result = text.store(out.dtype, operation.expression(common))
    body = "\n    ".join([*steps, text.walk("w", "y", outer, first, strides), *loads])
    computed = "float" if "odd(" in body else common.computed
    return Source.cuda(
        text.prelude(out.dtype, *(each.dtype for each in inputs))
        + f"#define T {computed}\n#define BYTES {common.nbytes}\n"
        + f"#define WHOLE {int(common.kind != 'float')}\n#define SIGNED {int(common.kind == 'int')}"
        + ("\n" + ODD if "odd(" in body else "\n")
        + _HELPERS.get(operation.helper, "")
        + text.record("Walk", fields(count, outer))
        + f"""
extern "C" __global__ void {kernel_name(name, common)}({", ".join(parameters)}, Walk w) {{
    long long x = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    long long y = ((long long)blockIdx.z * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y;
    if (x >= w.n[0] || y >= w.n[1]) return;
    {body}
    out[at_out] = {result};
}}
""",
        name=f"{name}.cu",
    )


ODD = """
/* Rounded to odd: what is rounded once more after it comes out as if rounded once. */
__device__ float odd(double value) {
    float near = (float)value;
    unsigned int bits = __float_as_uint(near);
    if ((double)near == value || (bits & 0x7f800000u) == 0x7f800000u) return near;
    if (fabs((double)near) > fabs(value)) bits -= 1u;
    return __uint_as_float(bits | 1u);
}
"""


def rule(inner: int, outer: int) -> Launch:
    """For ``outer`` rows of ``inner`` elements: wide blocks where rows are long."""
    width = 1
    while width < inner and width < BLOCK:
        width *= 2
    height = BLOCK // width
    rows = blocks(outer, height)
    high = min(rows, _MOST)
    return Launch((blocks(inner, width), high, blocks(rows, high)), (width, height))


def walk(
    shape: Shape, offsets: tuple[int, ...], strides: list[Shape]
) -> tuple[int, int, int, tuple[str, ...], bytes]:
    """(elements of a row, rows, `elementwise`'s ``outer``, the arrays' inner steps, the structure)
    of a walk over ``shape``, which `layout.joined` has made. Walks with odd steps are all done by
    one kernel, so that few are compiled."""
    inner = shape[-1] if shape else 1
    inner_steps = [each[-1] if each else 0 for each in strides]
    words = tuple({1: "1", 0: "0"}.get(step, "any") for step in inner_steps)
    least = 0
    if "any" in words:
        words, least = ("any",) * len(words), 3
    rank = rank_class(max(len(shape) - 1, 0), least)
    outer, steps = padded(shape[:-1], [each[:-1] for each in strides], rank)
    rows = prod(outer)
    values = [inner, rows, *offsets, *inner_steps, *outer]
    for each in steps:
        values += each
    return inner, rows, rank, words, text.packed(values)


# -- saxpy -----------------------------------------------------------------------------------------

SAXPY = """
extern "C" __global__ void saxpy(float *y, const float *x, float a, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = fmaf(a, x[i], y[i]);
}

/* Four at once: n counts fours; both arrays start at a multiple of 16 bytes. */
extern "C" __global__ void saxpy4(float4 *y, const float4 *x, float a, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        float4 mine = x[i], sum = y[i];
        sum.x = fmaf(a, mine.x, sum.x);
        sum.y = fmaf(a, mine.y, sum.y);
        sum.z = fmaf(a, mine.z, sum.z);
        sum.w = fmaf(a, mine.w, sum.w);
        y[i] = sum;
    }
}
"""


def saxpy_source() -> Source:
    """``saxpy(y, x, a, n)`` and ``saxpy4``, which counts in fours: y = a x + y."""
    return Source.cuda(SAXPY, name="saxpy.cu")


def saxpy_rule(n: int) -> Launch:
    return Launch((blocks(n, BLOCK),), (BLOCK,))


def saxpy_reference(a: float, x: Any, y: Any) -> Any:
    np = numpy()
    return (np.float64(a) * x.astype(np.float64) + y).astype(np.float32)


def _check_saxpy(device: Device, stream: Stream, size: int) -> None:
    np, random = numpy(), generator(size)
    x, y = (random.standard_normal(size).astype(np.float32) for _ in range(2))
    a = float(np.float32(1.5 / 7))
    wanted = saxpy_reference(a, x, y)
    source = put(device, stream, x)
    for name, count in (("saxpy", size), ("saxpy4", size // 4)):
        target = put(device, stream, y)
        found = kernel(device, name, saxpy_source)
        launch(found, stream, saxpy_rule(count), target, source, a, count)
        done = count if name == "saxpy" else 4 * count
        whole = np.concatenate([wanted[:done], y[done:]])
        agree(name, get(target, stream, size, np.float32), whole, rtol=2e-7, atol=1e-7)


def elementwise_reference(name: str, *arrays: Any) -> Any:
    """The operation's result by numpy, whose ufuncs have the standard's names."""
    np = numpy()
    if name == "where":
        return np.where(*arrays)
    return getattr(np, name)(*arrays)


def _check_elementwise(device: Device, stream: Stream, size: int) -> None:
    """A row over a column, a slice, three operands, and half precision."""
    np, random = numpy(), generator(size)
    f32, f16, truth = DTYPES["float32"], DTYPES["float16"], DTYPES["bool"]
    row = random.standard_normal(size).astype(np.float32)
    column = random.standard_normal(3).astype(np.float32)
    mask = random.integers(0, 2, size).astype(np.bool_)
    small = random.standard_normal(size).astype(np.float16)
    buffers = {
        "row": put(device, stream, row),
        "column": put(device, stream, column),
        "mask": put(device, stream, mask),
        "small": put(device, stream, small),
    }
    half = size // 2
    cases: list[tuple[str, DType, DType, list[tuple[str, DType, Shape, int]], Shape, Any]] = [
        (
            "add", f32, f32,
            [("row", f32, (0, 1), 0), ("column", f32, (1, 0), 0)],
            (3, size), row[None, :] + column[:, None],
        ),
        (
            "multiply", f32, f32,
            [("row", f32, (2,), 1), ("row", f32, (-1,), size - 1)],
            (half,), row[1::2] * row[::-1][:half],
        ),
        (
            "where", f32, f32,
            [("mask", truth, (1,), 0), ("row", f32, (1,), 0), ("row", f32, (-1,), size - 1)],
            (size,), np.where(mask, row, row[::-1]),
        ),
        (
            "add", f16, f16,
            [("small", f16, (1,), 0), ("small", f16, (-1,), size - 1)],
            (size,), small + small[::-1],
        ),
        (
            "less", f32, truth,
            [("row", f32, (1,), 0), ("row", f32, (-1,), size - 1)],
            (size,), row < row[::-1],
        ),
    ]  # fmt: skip
    for name, common, out, inputs, shape, wanted in cases:
        made = room(device, stream, wanted.nbytes)
        strides = [tuple(s // wanted.itemsize for s in wanted.strides)] + [i[2] for i in inputs]
        inner, rows, outer, words, packed = walk(shape, (0, *(i[3] for i in inputs)), strides)
        found = kernel(
            device, kernel_name(name, common), elementwise, name, common, Operand(out, words[0]),
            tuple(Operand(i[1], w) for i, w in zip(inputs, words[1:], strict=True)),
            outer,
        )  # fmt: skip
        launch(found, stream, rule(inner, rows), made, *(buffers[i[0]] for i in inputs), packed)
        agree(f"{name} of {common}", get(made, stream, wanted.shape, wanted.dtype), wanted)


FAMILIES = (
    Family(
        "saxpy",
        "y = a x + y, one and four at once",
        saxpy_source,
        saxpy_rule,
        saxpy_reference,
        _check_saxpy,
    ),
    Family(
        "elementwise",
        "strided, broadcast and reversed operands of several types",
        elementwise,
        rule,
        elementwise_reference,
        _check_elementwise,
    ),
)

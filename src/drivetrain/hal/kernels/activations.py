"""Functions of networks, element by element: activations, their gradients, steps of optimizers.

They are `expressions.Operation` like those of the array API standard and run through the same
kernels (`elementwise.elementwise`). Gradients take the gradient of the result first, then what it
came from. Operands that are numbers in a network's code (slopes, bounds, factors) come last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from drivetrain.hal.dtype import DTYPES
from drivetrain.hal.kernels.expressions import FLOATS, NUMBERS, Operation
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
_PLAIN = "exp2 rsqrt asin acos atan asinh acosh atanh erf erfc".split()  # noqa: SIM905

HELPERS: Mapping[str, str] = {
    "silu_gradient": """
__device__ T silu_gradient(T a, T b) {
    T s = (T)1 / ((T)1 + exp(-b));
    return a * s * ((T)1 + b * ((T)1 - s));
}
""",
    "gelu_gradient": """
__device__ T gelu_gradient(T a, T b) {
    T below = (T)0.5 * ((T)1 + erf(b * (T)0.7071067811865475));
    return a * (below + b * exp((T)-0.5 * b * b) * (T)0.3989422804014327);
}
""",
    "gelu_tanh_gradient": """
__device__ T gelu_tanh_gradient(T a, T b) {
    T square = b * b;
    T t = tanh((T)0.7978845608028654 * b * ((T)1 + (T)0.044715 * square));
    T slope = (T)0.7978845608028654 * ((T)1 + (T)0.134145 * square);
    return a * (T)0.5 * ((T)1 + t + b * ((T)1 - t * t) * slope);
}
""",
    "mish_gradient": """
__device__ T mish_gradient(T a, T b) {
    T s = (T)1 / ((T)1 + exp(-b));
    T t = tanh(b > 20 ? b : log1p(exp(b)));
    return a * (t + b * s * ((T)1 - t * t));
}
""",
}


def _floats(text: str, helper: str = "") -> Operation:
    return Operation(FLOATS, {"*": text}, helper=helper)


def _numbers(text: str) -> Operation:
    return Operation(NUMBERS, {"*": text})


FUNCTIONS: Mapping[str, Operation] = {
    **{name: _floats(f"{name}(a)") for name in _PLAIN},
    "atan2": _floats("atan2(a, b)"),
    "fmod": Operation(NUMBERS, {"float": "fmod(a, b)", "*": "b == 0 || b == (T)-1 ? 0 : a % b"}),
    "trunc_divide": _floats("trunc(a / b)"),
    "isposinf": Operation(FLOATS, {"*": "a > 0 && a - a != a - a"}, to_bool=True),
    "isneginf": Operation(FLOATS, {"*": "a < 0 && a - a != a - a"}, to_bool=True),
    "relu": _numbers("a < 0 ? (T)0 : a"),
    "clamp": _numbers("a < b ? b : a > c ? c : a"),
    "sigmoid": _floats("(T)1 / ((T)1 + exp(-a))"),
    "silu": _floats("a / ((T)1 + exp(-a))"),
    "gelu": _floats("(T)0.5 * a * ((T)1 + erf(a * (T)0.7071067811865475))"),
    "gelu_tanh": _floats(
        "(T)0.5 * a * ((T)1 + tanh((T)0.7978845608028654 * a * ((T)1 + (T)0.044715 * a * a)))"
    ),
    "mish": _floats("a * tanh(a > 20 ? a : log1p(exp(a)))"),
    "log_sigmoid": _floats("(a < 0 ? a : (T)0) - log1p(exp(-fabs(a)))"),
    "softplus": _floats("a * b > c ? a : log1p(exp(a * b)) / b"),
    "elu": _floats("a > 0 ? a * c : expm1(a * d) * b * c"),
    "leaky_relu": _floats("a > 0 ? a : a * b"),
    "hardsigmoid": _floats("a != a ? a : fmin(fmax(a + (T)3, (T)0), (T)6) / (T)6"),
    "hardswish": _floats("a != a ? a : a * fmin(fmax(a + (T)3, (T)0), (T)6) / (T)6"),
    "sigmoid_gradient": _floats("a * ((T)1 - b) * b"),
    "tanh_gradient": _floats("a * ((T)1 - b * b)"),
    "threshold_gradient": _numbers("b <= c ? (T)0 : a"),
    "silu_gradient": _floats("silu_gradient(a, b)", "silu_gradient"),
    "gelu_gradient": _floats("gelu_gradient(a, b)", "gelu_gradient"),
    "gelu_tanh_gradient": _floats("gelu_tanh_gradient(a, b)", "gelu_tanh_gradient"),
    "mish_gradient": _floats("mish_gradient(a, b)", "mish_gradient"),
    "log_sigmoid_gradient": _floats("a / ((T)1 + exp(b))"),
    "softplus_gradient": _floats("b * c > d ? a : a / ((T)1 + exp(-b * c))"),
    "leaky_relu_gradient": _floats("b > 0 ? a : a * c"),
    "hardtanh_gradient": _floats("b <= c || b >= d ? (T)0 : a"),
    "mse_gradient": _floats("d * (b - c) * a"),
    "add_scaled": _numbers("a + b * c"),
    "addcmul": _numbers("a + d * b * c"),
    "addcdiv": _floats("a + d * (b / c)"),
    "lerp": _floats("fabs(c) < (T)0.5 ? a + c * (b - a) : b - (b - a) * ((T)1 - c)"),
}


def every() -> Source:
    """``activations(out, a, b, n)``: each of `FUNCTIONS` in its turn over n floats, with 0.75 and
    1.5 for third and fourth operands. One kernel, so that a check compiles one."""
    steps = [
        f"if (turn == {turn}) value = {operation.expression(DTYPES['float32'])};"
        for turn, operation in enumerate(FUNCTIONS.values())
    ]
    body = "\n    ".join(steps)
    return Source.cuda(
        "#define T float\n"
        + "".join(HELPERS.values())
        + f"""
extern "C" __global__ void activations(float *out, const float *in_a, const float *in_b, int n) {{
    int i = blockIdx.x * blockDim.x + threadIdx.x, turn = blockIdx.y;
    if (i >= n) return;
    float a = in_a[i], b = in_b[i], c = 0.75f, d = 1.5f, value = 0.0f;
    {body}
    out[turn * n + i] = value;
}}
""",
        name="activations.cu",
    )


def rule(n: int) -> Launch:
    return Launch((blocks(n, BLOCK), len(FUNCTIONS)), (BLOCK,))


def _error_function(x: Any) -> Any:
    return numpy().vectorize(math.erf, otypes=[float])(x)


def _wide(name: str, a: Any, b: Any, c: Any, d: Any) -> Any:
    np = numpy()
    plain = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "atan2": "arctan2"}
    plain |= {"asinh": "arcsinh", "acosh": "arccosh", "atanh": "arctanh"}
    unary: dict[str, Callable[[Any], Any]] = {
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "erf": _error_function,
        "erfc": lambda x: 1 - _error_function(x),
        "relu": lambda x: np.maximum(x, 0),
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "silu": lambda x: x / (1 + np.exp(-x)),
        "gelu": lambda x: x * (1 + _error_function(x / math.sqrt(2))) / 2,
        "gelu_tanh": lambda x: (
            x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        ),
        "mish": lambda x: x * np.tanh(np.log1p(np.exp(x))),
        "log_sigmoid": lambda x: -np.log1p(np.exp(-x)),
        "softplus": lambda x: np.where(x * b > c, x, np.log1p(np.exp(x * b)) / b),
        "elu": lambda x: np.where(x > 0, x * c, np.expm1(x * d) * b * c),
        "leaky_relu": lambda x: np.where(x > 0, x, x * b),
        "hardsigmoid": lambda x: np.clip(x + 3, 0, 6) / 6,
        "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    }
    if name in unary:
        return unary[name](a)
    others: dict[str, Callable[[], Any]] = {
        "trunc_divide": lambda: np.trunc(a / b),
        "clamp": lambda: np.where(a < b, b, np.where(a > c, c, a)),
        "sigmoid_gradient": lambda: a * (1 - b) * b,
        "tanh_gradient": lambda: a * (1 - b * b),
        "threshold_gradient": lambda: np.where(b <= c, 0, a),
        "leaky_relu_gradient": lambda: np.where(b > 0, a, a * c),
        "hardtanh_gradient": lambda: np.where((b <= c) | (b >= d), 0, a),
        "mse_gradient": lambda: d * (b - c) * a,
        "add_scaled": lambda: a + b * c,
        "addcmul": lambda: a + d * b * c,
        "addcdiv": lambda: a + d * b / c,
        "lerp": lambda: a + c * (b - a),
    }
    if name in others:
        return others[name]()
    if name.endswith("_gradient"):  # by its definition: the slope times what comes from above
        near, stem = 1e-6, name.removesuffix("_gradient")
        sides = [_wide(stem, b + at, c, d, 0) for at in (near, -near)]
        return a * (sides[0] - sides[1]) / (2 * near)
    found = getattr(np, plain.get(name, name))
    return found(a, b) if name in ("atan2", "fmod") else found(a)


def reference(name: str, a: Any, b: Any, c: float = 0.75, d: float = 1.5) -> Any:
    """One of `FUNCTIONS` in double precision."""
    np = numpy()
    with np.errstate(all="ignore"):
        return _wide(name, a.astype(np.float64), b.astype(np.float64), c, d).astype(np.float32)


def _check(device: Device, stream: Stream, size: int) -> None:
    np, random = numpy(), generator(size)
    a, b = (random.standard_normal(size).astype(np.float32) for _ in range(2))
    made = room(device, stream, 4 * size * len(FUNCTIONS))
    found = kernel(device, "activations", every)
    where = (put(device, stream, a), put(device, stream, b))
    launch(found, stream, rule(size), made, *where, size)
    got = get(made, stream, (len(FUNCTIONS), size), np.float32)
    for name, row in zip(FUNCTIONS, got, strict=True):
        agree(name, row, reference(name, a, b), rtol=2e-5, atol=2e-6)


FAMILIES = (
    Family(
        "activations",
        "activations, their gradients and the arithmetic of optimizers",
        every,
        rule,
        reference,
        _check,
    ),
)

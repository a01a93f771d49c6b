"""Steps of optimizers, one launch a tensor: SGD with momentum, Adam and AdamW.

Formulas and their order are torch's (``torch.optim.SGD``, ``Adam``, ``AdamW``).
"""

from __future__ import annotations

import struct
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
)
from drivetrain.hal.language.source import Source

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.stream import Stream

BLOCK = 256
NESTEROV, FIRST, MAXIMIZE, DECOUPLED, LARGEST = 1, 2, 4, 8, 16
"""Flags: Nesterov's momentum; the first step, whose momentum is the gradient; climb; weight decay
apart from the gradient (AdamW); the largest second moment so far (AMSGrad)."""

TEXT = """
struct Factors { T f[8]; };

/* f: rate, momentum, dampening, decay */
extern "C" __global__ void sgd(E *weight, const E *slope, E *momentum, int flags, Factors w,
                               long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    T x = LOAD(weight[i]), g = LOAD(slope[i]);
    if (flags & 4) g = -g;
    g += w.f[3] * x;
    if (w.f[1] != 0) {
        T m = flags & 2 ? g : w.f[1] * LOAD(momentum[i]) + ((T)1 - w.f[2]) * g;
        momentum[i] = STORE(m);
        g = flags & 1 ? g + w.f[1] * m : m;
    }
    weight[i] = STORE(x - w.f[0] * g);
}

/* f: rate, 1 - beta1, beta2, 1 - beta2, decay, epsilon, 1 - beta1^t, sqrt(1 - beta2^t) */
extern "C" __global__ void adam(E *weight, const E *slope, E *first, E *second, E *largest,
                                int flags, Factors w, long long n) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    T x = LOAD(weight[i]), g = LOAD(slope[i]);
    if (flags & 4) g = -g;
    if (flags & 8) x -= w.f[0] * w.f[4] * x;
    else g += w.f[4] * x;
    T m = LOAD(first[i]);
    m += w.f[1] * (g - m);
    T v = w.f[2] * LOAD(second[i]) + w.f[3] * g * g;
    first[i] = STORE(m);
    second[i] = STORE(v);
    if (flags & 16) {
        T most = LOAD(largest[i]);
        v = most > v ? most : v;
        largest[i] = STORE(v);
    }
    weight[i] = STORE(x - w.f[0] / w.f[6] * m / (sqrt(v) / w.f[7] + w.f[5]));
}
"""


def source(dtype: DType) -> Source:
    """``sgd(weight, slope, momentum, flags, factors, n)`` and
    ``adam(weight, slope, first, second, largest, flags, factors, n)``; a buffer that is not used
    may be any."""
    return Source.cuda(
        text.prelude(dtype)
        + f"#define E {dtype.stored}\n#define T {dtype.computed}\n"
        + f"#define LOAD(x) {text.load(dtype, 'x')}\n#define STORE(x) {text.store(dtype, 'x')}\n"
        + TEXT,
        name="optimizers.cu",
    )


def rule(n: int) -> Launch:
    return Launch((blocks(n, BLOCK),), (BLOCK,))


def sgd_factors(
    dtype: DType, rate: float, momentum: float, dampening: float, decay: float
) -> bytes:
    return _packed(dtype, rate, momentum, dampening, decay, 0.0, 0.0, 0.0, 0.0)


def adam_factors(
    dtype: DType, rate: float, betas: tuple[float, float], decay: float, epsilon: float, step: float
) -> bytes:
    """``step`` counts from 1."""
    one, two = betas
    corrections = 1 - one**step, (1 - two**step) ** 0.5
    return _packed(dtype, rate, 1 - one, two, 1 - two, decay, epsilon, *corrections)


def _packed(dtype: DType, *values: float) -> bytes:
    return struct.pack("8d" if dtype.computed == "double" else "8f", *values)


def reference(
    name: str, weight: Any, slopes: Any, rate: float, decay: float, flags: int = 0
) -> Any:
    """The weights after a step for each of ``slopes``, momentum 0.9 and betas 0.9 and 0.999, in
    double precision."""
    np = numpy()
    x = weight.astype(np.float64)
    m, v, most = (np.zeros_like(x) for _ in range(3))
    for step, slope in enumerate(slopes, 1):
        g = slope.astype(np.float64) * (-1 if flags & MAXIMIZE else 1)
        if flags & DECOUPLED:
            x = x - rate * decay * x
        else:
            g = g + decay * x
        if name == "sgd":
            m = g if step == 1 else 0.9 * m + g
            x = x - rate * (g + 0.9 * m if flags & NESTEROV else m)
            continue
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        most = np.maximum(most, v)
        by = np.sqrt((most if flags & LARGEST else v) / (1 - 0.999**step)) + 1e-8
        x = x - rate * m / (1 - 0.9**step) / by
    return x.astype(weight.dtype)


def _check(device: Device, stream: Stream, size: int) -> None:
    np, random = numpy(), generator(size)
    f32 = DTYPES["float32"]
    weight, *slopes = (random.standard_normal(size).astype(np.float32) for _ in range(4))
    for name, flags in (
        ("sgd", 0),
        ("sgd", NESTEROV | MAXIMIZE),
        ("adam", 0),
        ("adam", DECOUPLED | LARGEST),
    ):
        x, m, v, most = (put(device, stream, each) for each in (weight, *[weight * 0] * 3))
        found = kernel(device, name, source, f32)
        for step, slope in enumerate(slopes, 1):
            g = put(device, stream, slope)
            if name == "sgd":
                now = flags | (FIRST if step == 1 else 0)
                factors = sgd_factors(f32, 0.1, 0.9, 0.0, 0.01)
                launch(found, stream, rule(size), x, g, m, now, factors, size)
            else:
                factors = adam_factors(f32, 0.1, (0.9, 0.999), 0.01, 1e-8, step)
                launch(found, stream, rule(size), x, g, m, v, most, flags, factors, size)
        wanted = reference(name, weight, slopes, 0.1, 0.01, flags)
        got = get(x, stream, weight.shape, np.float32)
        agree(f"{name}, flags {flags}", got, wanted, rtol=1e-4, atol=1e-4)


FAMILIES = (
    Family(
        "optimizers",
        "steps of SGD, Adam and AdamW",
        source,
        rule,
        reference,
        _check,
    ),
)

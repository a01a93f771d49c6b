"""Random numbers from counters: Philox4x32-10, so that number i is the same on every device.

Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3" (2011). One counter gives
four words. The counter's low half counts, its high half is the sequence; the key is the seed.

Floats in [0, 1) are a word's upper bits. Normal ones are by Box and Muller, their logarithm, root,
sine and cosine as polynomials in single additions, products and ``fmaf``, which IEEE 754 rounds
alike everywhere: they are the same to the last bit, too. (double's normal numbers use the
device's own functions and agree to its rounding.)
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
    get,
    kernel,
    launch,
    numpy,
    room,
)
from drivetrain.hal.language.source import Source

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.stream import Stream

BLOCK = 256
M0, M1, W0, W1 = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85
LOGARITHM = (
    0.3333333134651184, -0.24999989569187164, 0.20000708103179932, -0.1666848063468933,
    0.14249937236309052, -0.12411050498485565, 0.11661510914564133, -0.115712009370327,
    0.07149753719568253,
)  # fmt: skip
"""(log(1 + f) - f + f^2 / 2) / f^3 on [sqrt(1/2) - 1, sqrt(2) - 1], a Chebyshev fit."""
SINE = (
    1.5707963705062866, -0.6459640860557556, 0.07969257980585098, -0.004681266378611326,
    0.00015820653061382473,
)  # fmt: skip
"""sin(pi/2 f) / f in powers of f^2 on [-1/2, 1/2], likewise."""
COSINE = (
    1.0, -1.2337005138397217, 0.25366920232772827, -0.02086007036268711, 0.00090362987248227,
)  # fmt: skip
LN2 = 0.6931471824645996

_PER = {"words": 4, "float64": 2, "normal64": 2}
"""Numbers that one counter gives, where not four."""

ROUNDS = """
#define ROUND \\
    high = __umulhi(0xD2511F53u, a); low = 0xD2511F53u * a; \\
    other = __umulhi(0xCD9E8D57u, c); last = 0xCD9E8D57u * c; \\
    a = other ^ b ^ k0; b = last; c = high ^ d ^ k1; d = low; \\
    k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
"""

NORMAL = """
__device__ float scaled_log(float x) {
    /* -2 log(x) for x in (0, 1]: x = 2^e (1 + f) */
    int bits = __float_as_int(x);
    int e = (bits - 0x3f3504f3) >> 23;
    float f = __int_as_float(bits - e * 8388608) - 1.0f;
    float sum = LOG8;
    float square = f * f;
    float cube = square * f;
    float tail = cube * sum;
    tail = fmaf(square, -0.5f, tail);
    return -2.0f * fmaf((float)e, LN2, tail + f);
}
__device__ float root(float x) {
    float half = 0.5f * x;
    float y = __int_as_float(0x5f3759df - (__float_as_int(x) >> 1));
    for (int i = 0; i < 4; ++i) {
        float square = y * y;
        y = y * fmaf(-half, square, 1.5f);
    }
    float r = x * y;
    return fmaf(fmaf(-r, r, x), 0.5f * y, r);
}
__device__ float wave(unsigned int word, unsigned int shift) {
    /* cos(2 pi word / 2^24) for shift 0, sin for shift 3 */
    unsigned int quarter = (word + (1u << 21)) >> 22;
    float f = (float)((int)word - (int)(quarter << 22)) * 2.384185791015625e-7f;
    float z = f * f;
    unsigned int turn = (quarter + shift) & 3u;
    float sine = f * (SIN4);
    float cosine = COS4;
    float value = (turn & 1u) ? sine : cosine;
    return (turn == 1u || turn == 2u) ? -value : value;
}
"""

KERNEL = """
/* Thread i makes the numbers of counter first + i. */
extern "C" __global__ void philox(E *out, long long n, unsigned long long seed,
                                  unsigned long long first, unsigned long long sequence) {
    long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i * PER >= n) return;
    unsigned long long counter = first + (unsigned long long)i;
    unsigned int a = (unsigned int)counter, b = (unsigned int)(counter >> 32);
    unsigned int c = (unsigned int)sequence, d = (unsigned int)(sequence >> 32);
    unsigned int k0 = (unsigned int)seed, k1 = (unsigned int)(seed >> 32);
    unsigned int high, low, other, last;
    ROUND ROUND ROUND ROUND ROUND ROUND ROUND ROUND ROUND ROUND
    E *mine = out + i * PER;
    long long left = n - i * PER;
    NUMBERS
}
"""

_WORD = "((float)({0} >> 8) * 5.9604644775390625e-8f)"
_DOUBLE = "((double)({0} >> 5) * 67108864.0 + (double)({1} >> 6)) * 1.1102230246251565e-16"
_NUMBERS = {
    "words": ("{0}",),
    "float16": ("store_float16((float)({0} >> 21) * 4.8828125e-4f)",),
    "bfloat16": ("store_bfloat16((float)({0} >> 24) * 3.90625e-3f)",),
    "float32": (_WORD,),
}


def _poly(variable: str, coefficients: tuple[float, ...]) -> str:
    """Horner's rule in ``fmaf``."""
    found = f"{coefficients[-1]!r}f"
    for each in reversed(coefficients[:-1]):
        found = f"fmaf({found}, {variable}, {each!r}f)"
    return found


def _stores(values: list[str]) -> str:
    first, *rest = values
    return " ".join(
        [f"mine[0] = {first};"]
        + [f"if (left > {at}) mine[{at}] = {value};" for at, value in enumerate(rest, 1)]
    )


def _numbers(kind: str) -> str:
    words = ["a", "b", "c", "d"]
    if kind == "float64":
        return _stores([_DOUBLE.format("a", "b"), _DOUBLE.format("c", "d")])
    if kind == "normal64":
        return (
            f"double u = {_DOUBLE.format('a', 'b')}, v = {_DOUBLE.format('c', 'd')};\n"
            "    double far = sqrt(-2.0 * log(1.0 - u));\n    "
            + _stores(["far * cospi(2.0 * v)", "far * sinpi(2.0 * v)"])
        )
    if kind.startswith("normal"):
        store = {"normal16": "store_float16", "normalb16": "store_bfloat16"}.get(kind, "")
        radius = "root(scaled_log((float)(({0} >> 8) + 1u) * 5.9604644775390625e-8f))"
        made = [
            f"{store}({far} * wave({word} >> 8, {shift}u))"
            for far, word in (("far", "b"), ("further", "d"))
            for shift in (0, 3)
        ]
        return f"float far = {radius.format('a')}, further = {radius.format('c')};\n    " + _stores(
            made
        )
    return _stores([_NUMBERS[kind][0].format(word) for word in words])


_STORED = {
    "words": "unsigned int", "float16": "unsigned short", "bfloat16": "unsigned short",
    "normal16": "unsigned short", "normalb16": "unsigned short", "float64": "double",
    "normal64": "double",
}  # fmt: skip


def source(kind: str) -> Source:
    """``philox(out, n, seed, first, sequence)``. ``kind`` is ``words``, or for numbers in [0, 1)
    ``float16``, ``bfloat16``, ``float32``, ``float64``, or for normal ones ``normal16``,
    ``normalb16``, ``normal32``, ``normal64``."""
    small = [DTYPES["float16"]] if "float16" in _numbers(kind) else []
    small += [DTYPES["bfloat16"]] if "bfloat16" in _numbers(kind) else []
    normal = NORMAL if kind.startswith("normal") and kind != "normal64" else ""
    for name, value in (
        ("LOG8", _poly("f", LOGARITHM)), ("SIN4", _poly("z", SINE)), ("COS4", _poly("z", COSINE)),
        ("LN2", f"{LN2!r}f"),
    ):  # fmt: skip
        normal = normal.replace(name, value)
    return Source.cuda(
        text.prelude(*small)
        + f"#define E {_STORED.get(kind, 'float')}\n#define PER {_PER.get(kind, 4)}\n"
        + ROUNDS
        + normal
        + KERNEL.replace("NUMBERS", _numbers(kind)),
        name="philox.cu",
    )


def kind_of(dtype: DType, normal: bool) -> str:
    """`source`'s word for floats of this type."""
    if not normal:
        return dtype.name
    return "normalb16" if dtype.name == "bfloat16" else f"normal{dtype.bits}"


def rule(n: int, kind: str = "words") -> Launch:
    return Launch((blocks(blocks(n, _PER.get(kind, 4)), BLOCK),), (BLOCK,))


def run(
    stream: Stream, out: Buffer, kind: str, n: int, seed: int, first: int = 0, sequence: int = 0
) -> None:
    """Queue ``n`` numbers to ``out``; ``seed``, ``first`` and ``sequence`` are 64-bit unsigned."""
    found = kernel(stream.device, "philox", source, kind)
    launch(found, stream, rule(n, kind), out, n, seed, first, sequence)


# -- the reference --------------------------------------------------------------------------------


def words(n: int, seed: int, first: int = 0, sequence: int = 0) -> Any:
    """The first ``n`` words from counter ``first`` on, as numpy's uint32."""
    np = numpy()
    count = blocks(n, 4)
    mask, low = np.uint64(0xFFFFFFFF), np.uint64(32)
    counter = np.arange(count, dtype=np.uint64) + np.uint64(first)
    a, b = counter & mask, counter >> low
    c = np.full(count, sequence & 0xFFFFFFFF, np.uint64)
    d = np.full(count, sequence >> 32, np.uint64)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p, q = a * np.uint64(M0), c * np.uint64(M1)
        a, b, c, d = (
            (q >> low) ^ b ^ np.uint64(k0), q & mask, (p >> low) ^ d ^ np.uint64(k1), p & mask,
        )  # fmt: skip
        k0, k1 = (k0 + W0) & 0xFFFFFFFF, (k1 + W1) & 0xFFFFFFFF
    return np.stack([a, b, c, d], axis=1).reshape(-1)[:n].astype(np.uint32)


def _fma(a: Any, b: Any, c: Any) -> Any:
    """a b + c rounded once to single precision: the sum in double precision is rounded to odd
    first (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008)."""
    np = numpy()
    product = a.astype(np.float64) * np.asarray(b, np.float64)
    c = np.broadcast_to(np.asarray(c, np.float64), product.shape)
    total = product + c
    back = total - product
    lost = (product - (total - back)) + (c - back)
    bits = total.view(np.int64)
    grows = (lost > 0) == (total > 0)
    odd = np.where((lost != 0) & (bits & 1 == 0), bits + np.where(grows, 1, -1), bits)
    return odd.view(np.float64).astype(np.float32)


def _horner(x: Any, coefficients: tuple[float, ...]) -> Any:
    np = numpy()
    found = np.full(x.shape, np.float32(coefficients[-1]))
    for each in reversed(coefficients[:-1]):
        found = _fma(found, x, np.float32(each))
    return found


def _scaled_log(x: Any) -> Any:
    np = numpy()
    bits = x.view(np.int32)
    e = (bits - 0x3F3504F3) >> 23
    f = (bits - e * 8388608).astype(np.int32).view(np.float32) - np.float32(1)
    square = f * f
    tail = _fma(square, np.float32(-0.5), (square * f) * _horner(f, LOGARITHM))
    return np.float32(-2) * _fma(e.astype(np.float32), np.float32(LN2), tail + f)


def _root(x: Any) -> Any:
    np = numpy()
    half = np.float32(0.5) * x
    y = (0x5F3759DF - (x.view(np.int32) >> 1)).astype(np.int32).view(np.float32)
    for _ in range(4):
        y = y * _fma(-half, y * y, np.float32(1.5))
    r = x * y
    return _fma(_fma(-r, r, x), np.float32(0.5) * y, r)


def _wave(word: Any, shift: int) -> Any:
    np = numpy()
    quarter = (word + np.uint32(1 << 21)) >> np.uint32(22)
    f = (word.astype(np.int64) - (quarter.astype(np.int64) << 22)).astype(np.float32)
    f = f * np.float32(2.384185791015625e-7)
    z = f * f
    turn = (quarter + np.uint32(shift)) & np.uint32(3)
    value = np.where(turn & 1 == 1, f * _horner(z, SINE), _horner(z, COSINE))
    return np.where((turn == 1) | (turn == 2), -value, value)


def reference(kind: str, n: int, seed: int, first: int = 0, sequence: int = 0) -> Any:
    """The numbers of `source`, in numpy; bit for bit but for ``normal64``."""
    np = numpy()
    every = words(4 * blocks(n, _PER.get(kind, 4)), seed, first, sequence)
    if kind == "words":
        return every[:n]
    if kind in ("float16", "float32"):
        digits = 11 if kind == "float16" else 24
        return ((every >> np.uint32(32 - digits)).astype(kind) * np.float64(2.0**-digits)).astype(
            kind
        )[:n]
    a, b, c, d = every.reshape(-1, 4).T
    if kind in ("float64", "normal64"):
        u, v = (
            ((x >> np.uint32(5)) * np.float64(67108864) + (y >> np.uint32(6))) * 2.0**-53
            for x, y in ((a, b), (c, d))
        )
        if kind == "float64":
            return np.stack([u, v], axis=1).reshape(-1)[:n]
        far = np.sqrt(-2 * np.log(1 - u))
        pair = [far * np.cos(2 * np.pi * v), far * np.sin(2 * np.pi * v)]
        return np.stack(pair, axis=1).reshape(-1)[:n]
    made = []
    for x, y in ((a, b), (c, d)):
        unit = ((x >> np.uint32(8)) + np.uint32(1)).astype(np.float32) * np.float32(2.0**-24)
        far = _root(_scaled_log(unit))
        made += [far * _wave(y >> np.uint32(8), shift) for shift in (0, 3)]
    found = np.stack(made, axis=1).reshape(-1)[:n]
    return found.astype(np.float16) if kind == "normal16" else found


def _check(device: Device, stream: Stream, size: int) -> None:
    seed = 0x1234_5678_9ABC_DEF0 + size
    for kind in ("words", "float32", "normal32", "float16"):
        wanted = reference(kind, size, seed, (1 << 32) - 3, 5)
        made = room(device, stream, wanted.nbytes)
        run(stream, made, kind, size, seed, (1 << 32) - 3, 5)
        agree(f"philox, {kind}", get(made, stream, size, wanted.dtype), wanted)


FAMILIES = (
    Family(
        "philox",
        "Philox4x32-10: words, floats and normal floats to the last bit",
        source,
        rule,
        reference,
        _check,
    ),
)

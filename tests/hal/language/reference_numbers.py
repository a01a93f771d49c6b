"""Numbers of C++ as CUDA has them, written down once more: types, conversions, arithmetic.

Nothing here comes from the compilers. `Rules` are there to be broken: each is one that a test
switches to a wrong one, to see that it would be noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Kind:
    """A number's type."""

    name: str
    c: str
    bits: int
    signed: bool = True
    real: bool = False

    @property
    def rank(self) -> int:
        return self.bits + (100 if self.real else 0)

    @property
    def numpy(self) -> np.dtype:
        letter = "f" if self.real else "i" if self.signed else "u"
        return np.dtype(f"{letter}{max(self.bits, 8) // 8}")


BOOL = Kind("bool", "bool", 1, False)
I8, U8 = Kind("i8", "signed char", 8), Kind("u8", "unsigned char", 8, False)
I16, U16 = Kind("i16", "short", 16), Kind("u16", "unsigned short", 16, False)
I32, U32 = Kind("i32", "int", 32), Kind("u32", "unsigned int", 32, False)
I64, U64 = Kind("i64", "long long", 64), Kind("u64", "unsigned long long", 64, False)
F32, F64 = Kind("f32", "float", 32, real=True), Kind("f64", "double", 64, real=True)
WHOLE = (I8, U8, I16, U16, I32, U32, I64, U64)
NUMBERS = (*WHOLE, F32, F64)


@dataclass(frozen=True)
class Record:
    """A struct, or one of CUDA's vector types."""

    name: str
    fields: tuple[tuple[str, Kind], ...]
    vector: bool = False

    @property
    def c(self) -> str:
        return self.name


VECTORS = tuple(
    Record(f"{stem}{count}", tuple((axis, kind) for axis in "xyzw"[:count]), True)
    for stem, kind in (("int", I32), ("uint", U32), ("float", F32), ("uchar", U8), ("short", I16))
    for count in (2, 3, 4)
)


@dataclass(frozen=True)
class Rules:
    """How the interpreter calculates; every field but its default is wrong."""

    wraps: bool = True
    right_shift_keeps_sign: bool = True
    large_shift_is_zero: bool = True
    division_to_zero: bool = True
    unsigned_wins: bool = True
    narrow_is_promoted: bool = True
    float_saturates: bool = True
    single_precision: bool = True
    short_circuits: bool = True
    barrier_waits: bool = True
    shuffle_stays_in_group: bool = True
    structs_are_copied: bool = True
    case_falls_through: bool = True
    continue_steps: bool = True
    atomics_count: bool = True


RIGHT = Rules()


# -- numbers


def promoted(kind: Kind, rules: Rules = RIGHT) -> Kind:
    return I32 if kind.bits < 32 and rules.narrow_is_promoted else kind


def common(a: Kind, b: Kind, rules: Rules = RIGHT) -> Kind:
    """The usual arithmetic conversions."""
    a, b = promoted(a, rules), promoted(b, rules)
    if a.rank != b.rank:
        return a if a.rank > b.rank else b
    if rules.unsigned_wins:
        return a if not a.signed else b
    return a if a.signed else b


def wrap(value: int, kind: Kind) -> int:
    if kind is BOOL:
        return int(value != 0)
    value &= (1 << kind.bits) - 1
    return value - (1 << kind.bits) if kind.signed and value >> (kind.bits - 1) else value


def _to_single(value: int) -> np.float32:
    """A whole number as the nearest float: rounded once, however large."""
    size = abs(value)
    extra = max(size.bit_length() - 26, 0)
    kept = size >> extra | (size & ((1 << extra) - 1) != 0)
    rounded = np.float32(np.ldexp(float(kept), extra))
    return -rounded if value < 0 else rounded


def to_whole(value: float, wide: bool, kind: Kind, rules: Rules) -> int:
    kind = kind if kind.bits >= 32 else I32
    if value != value:
        # NaN: 0, but the lowest or the middle where one of the types has 8 bytes.
        special = wide or kind.bits == 64
        return (-(1 << (kind.bits - 1)) if kind.signed else 1 << (kind.bits - 1)) if special else 0
    low = -(1 << (kind.bits - 1)) if kind.signed else 0
    high = (1 << (kind.bits - kind.signed)) - 1
    if not rules.float_saturates:
        return wrap(int(value), kind) if abs(value) < 1e300 else 0
    return high if value >= high else low if value <= low else int(value)


def converted(value: Any, have: Kind, kind: Kind, rules: Rules = RIGHT) -> Any:
    if kind is BOOL:
        return int(value != 0)
    if kind is F64:
        return np.float64(value)
    if kind is F32:
        if not rules.single_precision:
            return np.float64(value)
        return np.float32(value) if have.real else _to_single(value)
    if have.real:
        return wrap(to_whole(float(value), have is F64, kind, rules), kind)
    return wrap(value, kind) if rules.wraps else value


def calculated(op: str, kind: Kind, a: Any, b: Any, rules: Rules) -> Any:
    """``a op b`` where both are of one type."""
    if kind.real:
        return {"+": a + b, "-": a - b, "*": a * b}[op] if op != "/" else a / b
    if op in ("/", "%"):
        if b == 0:
            return (-1 if kind.signed else (1 << kind.bits) - 1) if op == "/" else a
        quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        if not rules.division_to_zero:
            quotient = a // b
        value = quotient if op == "/" else a - quotient * b
    else:
        value = {
            "+": a + b, "-": a - b, "*": a * b, "&": a & b, "|": a | b, "^": a ^ b,
        }[op]  # fmt: skip
    return wrap(value, kind) if rules.wraps else value


def shifted(op: str, kind: Kind, a: int, b: int, count: Kind, rules: Rules) -> int:
    b %= 1 << (64 if count.bits == 64 else 32)
    if not rules.large_shift_is_zero:
        b %= kind.bits
    if op == "<<":
        return 0 if b >= kind.bits else wrap(a << b, kind)
    if not rules.right_shift_keeps_sign:
        a %= 1 << kind.bits
        return wrap(a >> b, kind)
    return a >> min(b, 200)


# -- CUDA's own functions


def _clz(x: int, bits: int) -> int:
    return bits - (x % (1 << bits)).bit_length()


def _fmin(a: Any, b: Any) -> Any:
    if a != a or b != b:
        return b if a != a else a
    return a if a < b or (a == b and np.signbit(a)) else b


INTRINSICS: dict[str, tuple[Kind, tuple[Kind, ...], Callable[..., Any]]] = {
    "__popc": (I32, (U32,), lambda x: bin(x).count("1")),
    "__popcll": (I32, (U64,), lambda x: bin(x).count("1")),
    "__clz": (I32, (I32,), lambda x: _clz(x, 32)),
    "__clzll": (I32, (I64,), lambda x: _clz(x, 64)),
    "__ffs": (I32, (I32,), lambda x: (x & -x).bit_length()),
    "__brev": (U32, (U32,), lambda x: int(f"{x:032b}"[::-1], 2)),
    "__mulhi": (I32, (I32, I32), lambda a, b: (a * b) >> 32),
    "__umulhi": (U32, (U32, U32), lambda a, b: (a * b) >> 32),
    "__umul64hi": (U64, (U64, U64), lambda a, b: (a * b) >> 64),
    "__byte_perm": (U32, (U32, U32, U32), lambda x, y, s: sum(
        ((x | y << 32) >> (8 * (s >> (4 * i) & 7)) & 255) << (8 * i) for i in range(4))),
    "__funnelshift_l": (U32, (U32, U32, U32),
                        lambda lo, hi, n: ((hi << 32 | lo) << (n & 31)) >> 32 & 0xFFFFFFFF),
    "llabs": (I64, (I64,), lambda x: wrap(abs(x), I64)),
    "umin": (U32, (U32, U32), min),
    "llmax": (I64, (I64, I64), max),
    "fabsf": (F32, (F32,), abs),
    "floorf": (F32, (F32,), np.floor),
    "ceilf": (F32, (F32,), np.ceil),
    "truncf": (F32, (F32,), np.trunc),
    "rintf": (F32, (F32,), np.rint),
    "fminf": (F32, (F32, F32), _fmin),
    "fmaxf": (F32, (F32, F32), lambda a, b: -_fmin(-a, -b)),
    "__float2int_rd": (I32, (F32,), lambda x: to_whole(float(np.floor(x)), False, I32, RIGHT)),
}  # fmt: skip

"""What elementwise kernels calculate: a C expression for each operation of the array API standard.

``a``, ``b`` and ``c`` are operands as numbers of the operation's common type ``T``. Integers wrap;
division by zero gives 0 there, as the standard leaves it open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from drivetrain.errors import BadInput
from drivetrain.hal.dtype import DType

NUMBERS = ("int", "uint", "float")
WHOLE = ("int", "uint")
BITS = ("bool", "int", "uint")
ALL = ("bool", "int", "uint", "float")
FLOATS = ("float",)


@dataclass(frozen=True)
class Operation:
    """One operation: ``texts`` by kind of the common type, ``*`` for those not named."""

    kinds: tuple[str, ...]
    texts: Mapping[str, str]
    to_bool: bool = False
    """The result is of type bool, else of the common type."""
    helper: str = ""
    """Key of `HELPERS`."""

    def expression(self, dtype: DType) -> str:
        return self.texts.get(dtype.kind, self.texts.get("*", ""))

    def check(self, name: str, dtype: DType) -> None:
        """Raises BadInput where the operation is not for arrays of this type."""
        if dtype.kind not in self.kinds:
            words = {"bool": "bool", "int": "signed", "uint": "unsigned", "float": "floating-point"}
            takes = ", ".join(words[kind] for kind in self.kinds)
            raise BadInput(f"{name} is for {takes} arrays, not for {dtype}; convert with astype")


def _same(text: str, kinds: tuple[str, ...] = NUMBERS, helper: str = "") -> Operation:
    return Operation(kinds, {"*": text}, helper=helper)


def _truth(text: str, kinds: tuple[str, ...] = ALL) -> Operation:
    return Operation(kinds, {"*": text}, to_bool=True)


def _of_floats(text: str, whole: str) -> Operation:
    """For numbers; integers have a text of their own."""
    return Operation(NUMBERS, {"float": text, "*": whole})


HELPERS: Mapping[str, str] = {
    "floor_divide": """
__device__ T floor_divide(T a, T b) {
#if WHOLE
    if (b == 0) return 0;
#if SIGNED
    if (b == -1) return (T)(0 - a);
    T whole = a / b;
    return whole * b != a && ((a < 0) != (b < 0)) ? whole - 1 : whole;
#else
    return a / b;
#endif
#else
    if (b == 0) return a / b;
    T rest = fmod(a, b);
    T whole = (a - rest) / b;
    if (rest != 0 && ((b < 0) != (rest < 0))) whole -= 1;
    if (whole == 0) return copysign((T)0, a / b);
    T low = floor(whole);
    return whole - low > (T)0.5 ? low + 1 : low;
#endif
}
""",
    "remainder": """
__device__ T remainder_of(T a, T b) {
#if WHOLE
    if (b == 0) return 0;
#if SIGNED
    if (b == -1) return 0;
    T rest = a % b;
    return rest != 0 && ((rest < 0) != (b < 0)) ? rest + b : rest;
#else
    return a % b;
#endif
#else
    T rest = fmod(a, b);
    if (rest == 0) return copysign((T)0, b);
    return (b < 0) != (rest < 0) ? rest + b : rest;
#endif
}
""",
    "power": """
__device__ T power(T a, T b) {
#if WHOLE
#if SIGNED
    if (b < 0) return a == 1 ? 1 : a == -1 ? (b % 2 ? -1 : 1) : 0;
#endif
    T out = 1;
    while (b > 0) {
        if (b & 1) out *= a;
        a *= a;
        b >>= 1;
    }
    return out;
#else
    return pow(a, b);
#endif
}
""",
}

OPERATIONS: Mapping[str, Operation] = {
    "add": _same("a + b"),
    "subtract": _same("a - b"),
    "multiply": _same("a * b"),
    "divide": _same("a / b", FLOATS),
    "floor_divide": _same("floor_divide(a, b)", helper="floor_divide"),
    "remainder": _same("remainder_of(a, b)", helper="remainder"),
    "pow": _same("power(a, b)", helper="power"),
    "maximum": _same("a != a || a > b ? a : b"),
    "minimum": _same("a != a || a < b ? a : b"),
    "positive": _same("a"),
    "negative": _of_floats("-a", "(T)(0 - a)"),
    "abs": Operation(NUMBERS, {"float": "fabs(a)", "uint": "a", "*": "a < 0 ? (T)(0 - a) : a"}),
    "sign": Operation(NUMBERS, {"uint": "a > 0 ? 1 : 0", "*": "a > 0 ? (T)1 : a < 0 ? (T)-1 : a"}),
    "square": _same("a * a"),
    "reciprocal": _same("(T)1 / a", FLOATS),
    **{
        name: _same(f"{name}(a)", FLOATS)
        for name in ("sqrt", "exp", "expm1", "log", "log1p", "log2", "log10")
    },
    **{name: _same(f"{name}(a)", FLOATS) for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh")},
    **{name: _of_floats(f"{name}(a)", "a") for name in ("floor", "ceil", "trunc")},
    "round": _of_floats("rint(a)", "a"),
    "equal": _truth("a == b"),
    "not_equal": _truth("a != b"),
    "less": _truth("a < b", NUMBERS),
    "less_equal": _truth("a <= b", NUMBERS),
    "greater": _truth("a > b", NUMBERS),
    "greater_equal": _truth("a >= b", NUMBERS),
    "isnan": _truth("a != a", NUMBERS),
    "isinf": Operation(NUMBERS, {"float": "a == a && a - a != a - a", "*": "a != a"}, to_bool=True),
    "isfinite": _truth("a - a == a - a", NUMBERS),
    "logical_and": _truth("a && b", ("bool",)),
    "logical_or": _truth("a || b", ("bool",)),
    "logical_xor": _truth("(a != 0) != (b != 0)", ("bool",)),
    "logical_not": _truth("!a", ("bool",)),
    "bitwise_and": _same("a & b", BITS),
    "bitwise_or": _same("a | b", BITS),
    "bitwise_xor": _same("a ^ b", BITS),
    "bitwise_invert": Operation(BITS, {"bool": "!a", "*": "~a"}),
    "bitwise_left_shift": _same("b >= (T)(BYTES * 8) ? (T)0 : (T)(a << b)", WHOLE),
    "bitwise_right_shift": Operation(
        WHOLE,
        {
            "int": "a >> (b >= (T)(BYTES * 8) ? (T)(BYTES * 8 - 1) : b)",
            "uint": "b >= (T)(BYTES * 8) ? (T)0 : (T)(a >> b)",
        },
    ),
    "where": Operation(ALL, {"*": "condition ? a : b"}),
    "astype": Operation(ALL, {"*": "a"}),
}

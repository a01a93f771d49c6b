"""Conversions between types, and the value of constant expressions."""

from __future__ import annotations

import math
import struct

from drivetrain.hal.language.tokens import wrong
from drivetrain.hal.language.tree import (
    AddressOf,
    Binary,
    Cast,
    Cond,
    Construct,
    Decay,
    Deref,
    Expr,
    Intrinsic,
    Lit,
    Member,
    Ref,
    Subscript,
    Unary,
)
from drivetrain.hal.language.types import (
    BOOL,
    F32,
    I32,
    VOID,
    Array,
    Pointer,
    Scalar,
    Struct,
    Type,
    common,
    is_float,
    is_integer,
    is_scalar,
    promoted,
    shown,
)

__all__ = [
    "balance", "constant", "convert", "cost", "decayed", "is_lvalue", "is_read_only", "wrap",
]  # fmt: skip


def wrap(value: int, kind: Scalar) -> int:
    """A whole number as the type holds it: modulo 2^bits."""
    if kind == BOOL:
        return int(value != 0)
    value &= (1 << kind.bits) - 1
    if kind.kind == "int" and value >> (kind.bits - 1):
        value -= 1 << kind.bits
    return value


def to_f32(value: float) -> float:
    """The nearest float; infinity beyond its range."""
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


def cast_value(value: int | float, kind: Scalar) -> int | float:
    """What CUDA's conversion of a number gives: saturating from float to int."""
    if kind == BOOL:
        return int(value != 0)
    if is_float(kind):
        try:
            return to_f32(float(value)) if kind == F32 else float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if isinstance(value, float):
        if math.isnan(value):
            return 0
        if kind.size < I32.size:
            # Devices convert to 32 bits and keep the lowest of them.
            return wrap(int(cast_value(value, I32)), kind)
        low = -(1 << (kind.bits - 1)) if kind.kind == "int" else 0
        high = (1 << (kind.bits - (kind.kind == "int"))) - 1
        return high if value >= high else low if value <= low else int(value)
    return wrap(value, kind)


def constant(expr: Expr) -> int | float | None:
    """The value of a constant expression; None when it is none."""
    if isinstance(expr, Lit):
        return expr.value
    if isinstance(expr, Ref):
        var = expr.var
        return constant(var.init) if var.const and var.init and is_scalar(var.type) else None
    if isinstance(expr, Cast) and is_scalar(expr.type) and is_scalar(expr.of.type):
        value = constant(expr.of)
        assert isinstance(expr.type, Scalar)
        return None if value is None else cast_value(value, expr.type)
    if isinstance(expr, Cond):
        test = constant(expr.test)
        return None if test is None else constant(expr.yes if test else expr.no)
    if isinstance(expr, Unary):
        value = constant(expr.operand)
        if value is None or not isinstance(expr.type, Scalar):
            return None
        if expr.op == "!":
            return int(not value)
        if expr.op == "-":
            return -value if isinstance(value, float) else wrap(-value, expr.type)
        return wrap(~int(value), expr.type)
    if isinstance(expr, Binary):
        return _binary(expr)
    if isinstance(expr, Intrinsic) and expr.name in _BITS:
        # ``INFINITY`` and its kin are made of bits.
        bits, code = constant(expr.arguments[0]), _BITS[expr.name]
        if isinstance(bits, int):
            made: float = struct.unpack(
                code, bits.to_bytes(8, "little", signed=bits < 0)[: struct.calcsize(code)]
            )[0]
            return made
    return None


_BITS = {"int_as_float": "<f", "uint_as_float": "<f", "longlong_as_double": "<d"}


def _binary(expr: Binary) -> int | float | None:
    a, b = constant(expr.left), constant(expr.right)
    if expr.op in ("&&", "||") and a is not None:
        if bool(a) == (expr.op == "||"):
            return int(bool(a))
        return None if b is None else int(bool(b))
    if a is None or b is None or not isinstance(expr.type, Scalar):
        return None
    compared = {
        "<": a < b, ">": a > b, "<=": a <= b, ">=": a >= b, "==": a == b, "!=": a != b,
    }  # fmt: skip
    if expr.op in compared:
        return int(compared[expr.op])
    if isinstance(a, float) or isinstance(b, float):
        if expr.op == "/" and b == 0:
            return None
        made = {"+": a + b, "-": a - b, "*": a * b}.get(expr.op)
        return cast_value(float(a / b if made is None else made), expr.type)
    if expr.op in ("/", "%"):
        if b == 0:
            return None
        quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        return wrap(quotient if expr.op == "/" else a - quotient * b, expr.type)
    if expr.op in ("<<", ">>"):
        if not 0 <= b < expr.type.bits:
            return None
        return wrap(a << b if expr.op == "<<" else a >> b, expr.type)
    return wrap(
        {"+": a + b, "-": a - b, "*": a * b, "&": a & b, "|": a | b, "^": a ^ b}[expr.op],
        expr.type,
    )


def is_lvalue(expr: Expr) -> bool:
    if isinstance(expr, Member):
        return is_lvalue(expr.of)
    return isinstance(expr, Ref | Deref | Subscript)


def is_read_only(expr: Expr) -> bool:
    """An lvalue that the user declared ``const``."""
    if isinstance(expr, Ref):
        return expr.var.const
    if isinstance(expr, Member):
        return is_read_only(expr.of)
    if isinstance(expr, Deref):
        return isinstance(expr.operand.type, Pointer) and expr.operand.type.const
    if isinstance(expr, Subscript):
        return isinstance(expr.of.type, Pointer) and expr.of.type.const
    return False


def decayed(expr: Expr) -> Expr:
    """An array as the pointer to its first element; anything else as it is."""
    if not isinstance(expr.type, Array):
        return expr
    if not is_lvalue(expr):
        raise wrong(expr.line, "this array has no place in memory to point to")
    return Decay(Pointer(expr.type.of, is_read_only(expr)), expr.line, expr)


def cost(given: Expr, wanted: Type) -> int | None:
    """How far an argument is from a parameter: 0 the same, 1 promoted, 2 converted, None no way."""
    kind = given.type
    if isinstance(kind, Array):
        kind = Pointer(kind.of, is_read_only(given))
    if kind == wanted:
        if isinstance(kind, Pointer) and isinstance(wanted, Pointer) and kind.const:
            return 0 if wanted.const else None
        return 0
    if isinstance(kind, Scalar) and isinstance(wanted, Scalar):
        if VOID in (kind, wanted):
            return None
        if promoted(kind) == wanted or (is_float(kind) and is_float(wanted) and wanted != F32):
            return 1
        return 2
    if isinstance(wanted, Pointer) and isinstance(given, Lit) and given.value == 0:
        return 2
    if isinstance(kind, Pointer) and isinstance(wanted, Pointer) and wanted.to == VOID:
        return 2
    if isinstance(kind, Pointer) and wanted == BOOL:
        return 2
    return None


def convert(expr: Expr, kind: Type, line: int = 0, *, explicit: bool = False) -> Expr:
    """The expression as another type. Raises CompileError where C++ has no such conversion."""
    line = line or expr.line
    expr = decayed(expr) if not isinstance(kind, Array) else expr
    have = expr.type
    if have == kind:
        drops_const = (
            isinstance(have, Pointer) and isinstance(kind, Pointer) and have.const > kind.const
        )
        if drops_const and not explicit:
            raise wrong(line, f"a {shown(have)} cannot become a {shown(kind)}: it is const")
        if isinstance(have, Pointer) and have.const != kind.const:  # type: ignore[union-attr]
            return Cast(kind, line, expr)
        return expr
    if isinstance(kind, Scalar) and kind == VOID and explicit:
        return Cast(VOID, line, expr)
    if isinstance(have, Scalar) and isinstance(kind, Scalar) and VOID not in (have, kind):
        if isinstance(expr, Lit):
            value = cast_value(expr.value, kind)
            keep = expr.text if is_float(kind) and is_float(have) and value == expr.value else ""
            return Lit(kind, line, value, keep if kind == have else "")
        return Cast(kind, line, expr)
    if isinstance(kind, Pointer):
        if isinstance(expr, Lit) and expr.value == 0:
            return Cast(kind, line, expr)
        if isinstance(have, Pointer) and (explicit or kind.to == VOID):
            return Cast(kind, line, expr)
        if explicit and is_integer(have):
            return Cast(kind, line, expr)
    if isinstance(have, Pointer) and (
        kind == BOOL or (explicit and is_integer(kind) and isinstance(kind, Scalar))
    ):
        if isinstance(kind, Scalar) and kind != BOOL and kind.size < 8:
            raise wrong(line, f"a pointer does not fit into {shown(kind)}")
        return Cast(kind, line, expr)
    if isinstance(kind, Struct) and isinstance(expr, Construct):
        return expr
    raise wrong(line, f"a {shown(have)} cannot become a {shown(kind)}")


def balance(left: Expr, right: Expr, op: str, line: int) -> tuple[Expr, Expr, Scalar]:
    """Both sides of an arithmetic operator in their common type."""
    for side in (left, right):
        if not is_scalar(side.type):
            raise wrong(line, f"{op!r} does not work on {shown(side.type)}")
    assert isinstance(left.type, Scalar)
    assert isinstance(right.type, Scalar)
    kind = common(left.type, right.type)
    return convert(left, kind), convert(right, kind), kind


def address(expr: Expr) -> Expr:
    """``&expr``."""
    if not is_lvalue(expr):
        raise wrong(expr.line, "& needs something that lies in memory")
    if isinstance(expr, Deref):
        return expr.operand
    return AddressOf(Pointer(expr.type, is_read_only(expr)), expr.line, expr)


def zero(kind: Type, line: int) -> Expr:
    if isinstance(kind, Scalar):
        return Lit(kind, line, 0)
    if isinstance(kind, Pointer):
        return Cast(kind, line, Lit(I32, line, 0))
    return Construct(kind, line, [])

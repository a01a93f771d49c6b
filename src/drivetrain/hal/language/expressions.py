"""Expressions: read by precedence with the names in scope at hand, typed as they are read.

C++ cannot be read without knowing what a name means: ``(a) - b`` is a cast when ``a`` is a type,
and ``f<a>(b)`` is a call when ``f`` is a template. So the parser's tree says where an expression
starts and ends, and its tokens are read here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.hal.language.convert import (
    address,
    balance,
    constant,
    convert,
    decayed,
    is_lvalue,
    is_read_only,
    to_f32,
    wrap,
    zero,
)
from drivetrain.hal.language.declare import starts_type, type_name
from drivetrain.hal.language.intrinsics import REFUSED
from drivetrain.hal.language.scope import Constant, Cursor, Overloads, Scope
from drivetrain.hal.language.tokens import Token, wrong
from drivetrain.hal.language.tree import (
    Assign,
    Binary,
    Cast,
    Comma,
    Compound,
    Cond,
    Construct,
    Deref,
    Expr,
    Index3,
    Lit,
    Member,
    PointerAdd,
    PointerDiff,
    Ref,
    Step,
    Subscript,
    Unary,
    Var,
    truth,
    writes,
)
from drivetrain.hal.language.types import (
    BOOL,
    F32,
    F64,
    I8,
    I32,
    I64,
    U32,
    U64,
    VECTORS,
    VOID,
    Array,
    Pointer,
    Scalar,
    Struct,
    Type,
    common,
    is_integer,
    is_scalar,
    promoted,
    shown,
    size_of,
)

if TYPE_CHECKING:
    from drivetrain.hal.language.check import Unit

__all__ = ["Reader"]

_LEVELS: tuple[tuple[str, ...], ...] = (
    ("||",), ("&&",), ("|",), ("^",), ("&",), ("==", "!="), ("<", ">", "<=", ">="),
    ("<<", ">>"), ("+", "-"), ("*", "/", "%"),
)  # fmt: skip
_ASSIGNS = frozenset(["=", "+=", "-=", "*=", "/=", "%=", "&=", "|=", "^=", "<<=", ">>="])
_INDICES = ("threadIdx", "blockIdx", "blockDim", "gridDim")
_CASTS = ("static_cast", "reinterpret_cast", "const_cast")
_REFUSED = {
    "new": "memory cannot be allocated in a kernel",
    "delete": "memory cannot be freed in a kernel",
    "throw": "exceptions are not part of the subset",
    "this": "member functions are not part of the subset",
    "asm": "assembly is not part of the subset",
    "__asm__": "assembly is not part of the subset",
    "dynamic_cast": "dynamic_cast is not part of the subset",
    "typeid": "typeid is not part of the subset",
    "operator": "operators of the user's own are not part of the subset: write a function",
}


class Reader:
    """Reads one expression after another off a cursor."""

    def __init__(self, cursor: Cursor, scope: Scope, unit: Unit) -> None:
        self.cursor, self.scope, self.unit = cursor, scope, unit
        self.in_template_argument = False

    # -- operators

    def expression(self) -> Expr:
        left = self.assignment()
        while self.cursor.skip(","):
            right = self.assignment()
            left = Comma(right.type, left.line, left, right)
        return left

    def assignment(self) -> Expr:
        left = self.conditional()
        op = self.cursor.peek()
        if op not in _ASSIGNS:
            return left
        line = self.cursor.take().line
        self._must_be_writable(left, op)
        value = self.initializer(left.type) if op == "=" else self.assignment()
        return self.assigned(left, op, value, line)

    def assigned(self, target: Expr, op: str, value: Expr, line: int) -> Expr:
        kind = target.type
        if op == "=":
            return Assign(kind, line, target, convert(value, kind, line))
        op = op[:-1]
        if isinstance(kind, Pointer) and op in ("+", "-"):
            if not is_integer(value.type):
                raise wrong(line, f"{op}= on a pointer needs a whole number")
            return Compound(kind, line, op, target, value, kind)
        if not is_scalar(kind) or not is_scalar(value.type):
            raise wrong(line, f"{op}= does not work on {shown(kind)} and {shown(value.type)}")
        assert isinstance(kind, Scalar)
        assert isinstance(value.type, Scalar)
        self._check_operator(op, kind, value.type, line)
        if op in ("<<", ">>"):
            return Compound(kind, line, op, target, _shift_count(value), promoted(kind))
        within = common(kind, value.type)
        return Compound(kind, line, op, target, convert(value, within), within)

    def _must_be_writable(self, expr: Expr, op: str) -> None:
        if not is_lvalue(expr) or isinstance(expr.type, Array):
            raise wrong(expr.line, f"{op!r} needs something that can be written on its left")
        if is_read_only(expr):
            raise wrong(expr.line, f"{op!r} writes to something that is const")

    def conditional(self) -> Expr:
        test = self.binary(0)
        if not self.cursor.skip("?"):
            return test
        line = test.line
        guarded, self.in_template_argument = self.in_template_argument, False
        yes = self.expression()
        self.in_template_argument = guarded
        self.cursor.expect(":")
        no = self.assignment()
        test = truth(self._condition(test))
        yes, no = decayed(yes), decayed(no)
        kind: Type
        if is_scalar(yes.type) and is_scalar(no.type) and yes.type != no.type:
            yes, no, kind = balance(yes, no, "?:", line)
        elif isinstance(yes.type, Pointer) and isinstance(no, Lit | Cast) and constant(no) == 0:
            kind = yes.type
            no = convert(no, kind)
        elif isinstance(no.type, Pointer) and isinstance(yes, Lit | Cast) and constant(yes) == 0:
            kind = no.type
            yes = convert(yes, kind)
        elif yes.type == no.type:
            kind = yes.type
            if isinstance(kind, Pointer) and isinstance(no.type, Pointer):
                kind = Pointer(kind.to, kind.const or no.type.const)
        else:
            raise wrong(line, f"?: between {shown(yes.type)} and {shown(no.type)}")
        return Cond(kind, line, test, yes, no)

    def _condition(self, expr: Expr) -> Expr:
        expr = decayed(expr)
        if not is_scalar(expr.type) and not isinstance(expr.type, Pointer):
            raise wrong(expr.line, f"a {shown(expr.type)} is neither true nor false")
        return expr

    def condition(self) -> Expr:
        """An expression as a bool."""
        return convert(self._condition(self.expression()), BOOL)

    def binary(self, level: int) -> Expr:
        if level == len(_LEVELS):
            return self.unary()
        left = self.binary(level + 1)
        while True:
            op = self.cursor.peek()
            if op not in _LEVELS[level] or self.cursor.kind() != "op":
                return left
            if self.in_template_argument and op in (">", ">>", ">="):
                return left
            line = self.cursor.take().line
            right = self.binary(level + 1)
            left = self.operation(op, left, right, line)

    def operation(self, op: str, left: Expr, right: Expr, line: int) -> Expr:
        left, right = decayed(left), decayed(right)
        if op in ("&&", "||"):
            sides = (truth(self._condition(left)), truth(self._condition(right)))
            return Binary(BOOL, line, op, *sides)
        pointers = isinstance(left.type, Pointer), isinstance(right.type, Pointer)
        if any(pointers):
            return self._pointers(op, left, right, line, pointers)
        if op in ("<<", ">>"):
            if not is_integer(left.type) or not is_integer(right.type):
                raise wrong(line, f"{op!r} works on whole numbers only")
            assert isinstance(left.type, Scalar)
            kind = promoted(left.type)
            return Binary(kind, line, op, convert(left, kind), _shift_count(right))
        left, right, kind = balance(left, right, op, line)
        if op in ("==", "!=", "<", ">", "<=", ">="):
            return Binary(BOOL, line, op, left, right)
        self._check_operator(op, kind, kind, line)
        return Binary(kind, line, op, left, right)

    def _check_operator(self, op: str, left: Scalar, right: Scalar, line: int) -> None:
        whole = is_integer(left) and is_integer(right)
        if op in ("%", "&", "|", "^", "<<", ">>") and not whole:
            raise wrong(line, f"{op!r} works on whole numbers only")

    def _pointers(
        self, op: str, left: Expr, right: Expr, line: int, pointers: tuple[bool, bool]
    ) -> Expr:
        if op in ("==", "!=", "<", ">", "<=", ">="):
            if not pointers[0]:
                left = convert(left, right.type)
            if not pointers[1]:
                right = convert(right, left.type)
            if left.type != right.type and VOID not in (
                getattr(left.type, "to", None), getattr(right.type, "to", None),
            ):  # fmt: skip
                raise wrong(line, f"{shown(left.type)} compared with {shown(right.type)}")
            return Binary(BOOL, line, op, left, right)
        if all(pointers) and op == "-" and left.type == right.type:
            return PointerDiff(I64, line, left, right)
        if op == "+" and pointers[1] and is_integer(left.type):
            left, right, pointers = right, left, (True, False)
        if op in ("+", "-") and pointers == (True, False) and is_integer(right.type):
            if isinstance(left.type, Pointer) and left.type.to == VOID:
                raise wrong(line, "arithmetic on a void pointer")
            return PointerAdd(left.type, line, left, right, op)
        raise wrong(line, f"{op!r} between {shown(left.type)} and {shown(right.type)}")

    def unary(self) -> Expr:
        cursor = self.cursor
        op, line = cursor.peek(), cursor.line
        if cursor.kind() == "op":
            if op in ("++", "--"):
                cursor.take()
                return self._step(op, True, self.unary(), line)
            if op in ("-", "+", "~", "!", "*", "&"):
                cursor.take()
                return self._prefixed(op, self.unary(), line)
            if op == "(" and starts_type(cursor, self.scope, 1):
                return self._cast(line)
        if op == "sizeof":
            return self._sizeof(line)
        return self.postfix()

    def _cast(self, line: int) -> Expr:
        inside = Cursor(self.cursor.balanced(), line)
        kind = type_name(inside, self.scope, self.unit.constant_of)
        inside.finish("this cast")
        if self.cursor.peek() == "{":
            return self.initializer(kind)
        guarded, self.in_template_argument = self.in_template_argument, False
        operand = self.unary()
        self.in_template_argument = guarded
        return convert(operand, kind, line, explicit=True)

    def _prefixed(self, op: str, operand: Expr, line: int) -> Expr:
        if op == "&":
            return address(operand)
        operand = decayed(operand)
        kind = operand.type
        if op == "*":
            if not isinstance(kind, Pointer) or kind.to == VOID:
                raise wrong(line, f"* needs a pointer to something, not {shown(kind)}")
            return Deref(kind.to, line, operand)
        if op == "!":
            return Unary(BOOL, line, "!", truth(self._condition(operand)))
        if not is_scalar(kind) or (op == "~" and not is_integer(kind)):
            raise wrong(line, f"{op!r} does not work on {shown(kind)}")
        assert isinstance(kind, Scalar)
        operand = convert(operand, promoted(kind))
        if op == "+":
            return operand
        if isinstance(operand, Lit) and isinstance(operand.value, float) and op == "-":
            text = f"-{operand.text}" if operand.text and operand.text[0] != "-" else ""
            return Lit(operand.type, line, -operand.value, text)
        return Unary(operand.type, line, op, operand)

    def _step(self, op: str, prefix: bool, target: Expr, line: int) -> Expr:
        self._must_be_writable(target, op)
        if target.type == BOOL or not (is_scalar(target.type) or isinstance(target.type, Pointer)):
            raise wrong(line, f"{op!r} does not work on {shown(target.type)}")
        return Step(target.type, line, op, prefix, target)

    def _sizeof(self, line: int) -> Expr:
        self.cursor.take()
        if self.cursor.peek() == "(":
            inside = Cursor(self.cursor.balanced(), line)
            if starts_type(inside, self.scope):
                kind = type_name(inside, self.scope, self.unit.constant_of)
            else:
                kind = Reader(inside, self.scope, self.unit).expression().type
            inside.finish("this sizeof")
        else:
            kind = self.unary().type
        if isinstance(kind, Array) and kind.count < 0:
            raise wrong(line, "the size of extern shared memory is known at the launch only")
        return Lit(U64, line, size_of(kind))

    # -- postfix and primary

    def postfix(self) -> Expr:
        expr = self.primary()
        cursor = self.cursor
        while cursor.kind() == "op":
            op, line = cursor.peek(), cursor.line
            if op == "[":
                inside = Cursor(cursor.balanced(), line)
                index = Reader(inside, self.scope, self.unit).expression()
                inside.finish("this index")
                expr = self.subscript(expr, index, line)
            elif op in (".", "->"):
                cursor.take()
                name = cursor.name().text
                if op == "->":
                    expr = self._prefixed("*", expr, line)
                expr = self._member(expr, name, line)
            elif op in ("++", "--"):
                cursor.take()
                expr = self._step(op, False, expr, line)
            elif op == "(":
                raise wrong(line, "only functions can be called; pointers to them are refused")
            elif op == "<<<":
                raise wrong(line, "a kernel cannot launch a kernel here")
            else:
                break
        return expr

    def subscript(self, of: Expr, index: Expr, line: int) -> Expr:
        of, index = decayed(of), decayed(index)
        if is_integer(of.type) and isinstance(index.type, Pointer):
            of, index = index, of
        if not isinstance(of.type, Pointer) or of.type.to == VOID:
            raise wrong(line, f"[] needs an array or a pointer, not {shown(of.type)}")
        if not is_integer(index.type):
            raise wrong(line, f"an index is a whole number, not {shown(index.type)}")
        return Subscript(of.type.to, line, of, index)

    def _member(self, of: Expr, name: str, line: int) -> Expr:
        if isinstance(of, Construct) and of.parts and isinstance(of.parts[0], Index3):
            # ``threadIdx.x``: the three were taken together until the axis was known.
            first = of.parts[0]
            if name in "xyz":
                return Index3(U32, line, first.name, name)
        if not isinstance(of.type, Struct):
            raise wrong(line, f"{shown(of.type)} has no members, {name!r} was asked for")
        kind = of.type.field_type(name)
        if kind is None:
            raise wrong(line, f"{shown(of.type)} has no member {name!r}")
        return Member(kind, line, of, name)

    def primary(self) -> Expr:
        cursor = self.cursor
        if cursor.done:
            raise wrong(cursor.line, "an expression is missing here")
        line, word = cursor.line, cursor.peek()
        if cursor.kind() == "number":
            return number(cursor.take())
        if cursor.kind() == "char":
            return character(cursor.take())
        if cursor.kind() == "string":
            raise wrong(line, "strings are not part of the subset")
        if word == "(":
            inside = Cursor(cursor.balanced(), line)
            expr = Reader(inside, self.scope, self.unit).expression()
            inside.finish("this expression")
            return expr
        if word == "[":
            raise wrong(line, "lambdas are not part of the subset")
        if cursor.kind() != "name" and word != "::":
            raise wrong(line, f"an expression cannot start with {word!r}")
        if word in ("true", "false"):
            cursor.take()
            return Lit(BOOL, line, int(word == "true"))
        if word == "nullptr":
            cursor.take()
            return Lit(I32, line, 0)
        if word in _CASTS:
            cursor.take()
            cursor.expect("<")
            kind = type_name(cursor, self.scope, self.unit.constant_of)
            cursor.split_shift()
            cursor.expect(">")
            inside = Cursor(cursor.balanced(), line)
            expr = Reader(inside, self.scope, self.unit).expression()
            inside.finish("this cast")
            return convert(expr, kind, line, explicit=True)
        if word in _REFUSED:
            raise wrong(line, _REFUSED[word])
        if starts_type(cursor, self.scope):
            return self._made(line)
        return self._named(line)

    def _made(self, line: int) -> Expr:
        """``float(x)``, ``S{1, 2}``."""
        kind = type_name(self.cursor, self.scope, self.unit.constant_of)
        if self.cursor.peek() == "{":
            return self.initializer(kind)
        if self.cursor.peek() != "(":
            raise wrong(line, f"a type ({shown(kind)}) where a value is meant")
        inside = Cursor(self.cursor.balanced(), line)
        if inside.done:
            return zero(kind, line)
        reader = Reader(inside, self.scope, self.unit)
        if isinstance(kind, Struct) and kind is VECTORS["dim3"]:
            parts = [convert(reader.assignment(), U32)]
            while inside.skip(","):
                parts.append(convert(reader.assignment(), U32))
            parts += [Lit(U32, line, 1) for _ in range(3 - len(parts))]
            inside.finish("this dim3")
            return Construct(kind, line, parts)
        expr = reader.expression()
        inside.finish("this conversion")
        return convert(expr, kind, line, explicit=True)

    def _named(self, line: int) -> Expr:
        cursor = self.cursor
        if cursor.peek() == "::":
            cursor.take()
        name = cursor.name().text
        while cursor.peek() == "::":
            cursor.take()
            following = cursor.name().text
            name = following if name == "std" else f"{name}::{following}"
        symbol = self.scope.find(name)
        if isinstance(symbol, Var):
            return self.variable(symbol, line)
        if isinstance(symbol, Constant):
            return Lit(symbol.type, line, symbol.value)
        if symbol is None and name in _INDICES:
            parts: list[Expr] = [Index3(U32, line, name, axis) for axis in "xyz"]
            return Construct(VECTORS["uint3"], line, parts)
        if symbol is None and name == "warpSize":
            return Lit(I32, line, 32)
        from drivetrain.hal.language.calls import call

        explicit: list[Type | int] | None = None
        generic = isinstance(symbol, Overloads) and any(t.params for t in symbol.templates)
        if generic and cursor.peek() == "<":
            explicit = self.template_arguments()
        if cursor.peek() != "(":
            if isinstance(symbol, Overloads):
                raise wrong(line, f"the function {name} is not called: pointers to it are refused")
            raise wrong(line, f"{name!r} is not known here")
        if symbol is None and name in REFUSED:
            raise wrong(line, f"{name}: {REFUSED[name]}")
        inside = Cursor(cursor.balanced(), line)
        reader = Reader(inside, self.scope, self.unit)
        arguments: list[Expr] = []
        while not inside.done:
            if inside.peek() == "{":
                raise wrong(line, "{...} as an argument: write the type before it")
            arguments.append(reader.assignment())
            if not inside.skip(","):
                break
        inside.finish(f"the call of {name}")
        return call(self.unit, symbol, name, explicit, arguments, line)

    def variable(self, var: Var, line: int) -> Expr:
        if var.reference:
            assert isinstance(var.type, Pointer)
            return Deref(var.type.to, line, Ref(var.type, line, var))
        return Ref(var.type, line, var)

    def template_arguments(self) -> list[Type | int]:
        cursor = self.cursor
        cursor.expect("<")
        out: list[Type | int] = []
        while cursor.peek() not in (">", ">>"):
            if starts_type(cursor, self.scope):
                out.append(type_name(cursor, self.scope, self.unit.constant_of))
            else:
                reader = Reader(cursor, self.scope, self.unit)
                reader.in_template_argument = True
                value = constant(reader.conditional())
                if not isinstance(value, int):
                    raise wrong(cursor.line, "a template's argument is a type or a whole number")
                out.append(value)
            if not cursor.skip(","):
                break
        cursor.split_shift()
        cursor.expect(">")
        return out

    # -- initial values

    def initializer(self, kind: Type) -> Expr:
        """``{...}`` for the type, or an expression."""
        cursor = self.cursor
        line = cursor.line
        if cursor.peek() != "{":
            return self.assignment()
        inside = Cursor(cursor.balanced(), line)
        reader = Reader(inside, self.scope, self.unit)
        if is_scalar(kind) or isinstance(kind, Pointer):
            if inside.done:
                return zero(kind, line)
            expr = convert(reader.initializer(kind), kind, line)
            inside.skip(",")
            inside.finish("this value")
            return expr
        wanted: list[Type]
        if isinstance(kind, Array):
            wanted = [kind.of] * (kind.count if kind.count >= 0 else 1 << 20)
        elif isinstance(kind, Struct):
            wanted = [part for _, part in kind.fields]
        else:
            raise wrong(line, f"{shown(kind)} has no value")
        parts: list[Expr] = []
        while not inside.done:
            if inside.peek() == "." or inside.peek() == "[":
                raise wrong(inside.line, "designated initializers are not part of the subset")
            if len(parts) == len(wanted):
                raise wrong(inside.line, f"too many values for {shown(kind)}")
            part = wanted[len(parts)]
            value = reader.initializer(part)
            if isinstance(part, Array) and value.type != part:
                raise wrong(inside.line, "an array inside needs braces of its own")
            parts.append(convert(value, part))
            if not inside.skip(","):
                break
        inside.finish("this list of values")
        if isinstance(kind, Array) and kind.count < 0:
            if not parts:
                raise wrong(line, "an array without a size and without values")
            kind = Array(kind.of, len(parts))
        if sum(writes(part) for part in parts) > 1:
            raise wrong(
                line, "more than one value of this list has effects: their order may differ"
            )
        return Construct(kind, line, parts)


def _shift_count(expr: Expr) -> Expr:
    """The right side of a shift: 32 bits, where too much stays too much."""
    if not is_scalar(expr.type) or not is_integer(expr.type):
        raise wrong(expr.line, "a shift counts in whole numbers")
    assert isinstance(expr.type, Scalar)
    if expr.type.size == 8:
        return convert(expr, U64)
    return convert(expr, U32)


def number(token: Token) -> Lit:
    """A number as written."""
    text = token.text.replace("'", "").lower()
    line = token.line
    hexadecimal = text.startswith("0x")
    floating = ("p" in text) if hexadecimal else any(mark in text for mark in ".e")
    try:
        if floating or (text.endswith("f") and not hexadecimal):
            single = text.endswith("f")
            digits = text.rstrip("f") if single else text
            value = float.fromhex(digits) if hexadecimal else float(digits)
            if single:
                plain = digits if hexadecimal else _pointed(digits)
                return Lit(F32, line, to_f32(value), plain + "f")
            return Lit(F64, line, value, digits if hexadecimal else _pointed(digits))
        digits = text.rstrip("ul")
        suffix = text[len(digits) :]
        if suffix not in ("", "u", "l", "ul", "lu", "ll", "ull", "llu"):
            raise ValueError
        octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
        whole = int(digits, 8 if octal else 0)
    except ValueError:
        raise wrong(line, f"{token.text!r} is no number") from None
    if whole >= 1 << 64:
        raise wrong(line, f"{token.text} has more than 64 bits")
    decimal = digits.isdigit() and not octal
    unsigned, long = "u" in suffix, "l" in suffix
    if whole < 1 << 31 and not unsigned and not long:
        return Lit(I32, line, whole)
    if whole < 1 << 32 and not long and (unsigned or not decimal):
        return Lit(U32, line, whole)
    if whole < 1 << 63 and not unsigned:
        return Lit(I64, line, whole)
    return Lit(U64, line, whole)


def _pointed(digits: str) -> str:
    """C wants a point or an exponent in a float."""
    return digits if any(mark in digits for mark in ".e") else digits + ".0"


_ESCAPES = {"n": 10, "t": 9, "r": 13, "0": 0, "\\": 92, "'": 39, '"': 34}


def character(token: Token) -> Lit:
    inner = token.text[1:-1]
    if len(inner) == 1 and ord(inner) < 128:
        return Lit(I8, token.line, ord(inner))
    if len(inner) == 2 and inner[0] == "\\" and inner[1] in _ESCAPES:
        return Lit(I8, token.line, _ESCAPES[inner[1]])
    if inner.startswith("\\x"):
        try:
            return Lit(I8, token.line, wrap(int(inner[2:], 16), I8))
        except ValueError:
            pass
    raise wrong(token.line, f"the character {token.text} is not known")

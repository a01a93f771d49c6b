"""Expressions and statements as C, for both targets.

What the targets say differently is in the few methods that they replace. Every operation that C
leaves open is printed as a call of the prelude: division by what may be zero, shifts by what may
be too much, float to int. See ``docs`` in `cpp` and `opencl` for what each promises of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from drivetrain.hal.language.convert import to_f32
from drivetrain.hal.language.tokens import wrong
from drivetrain.hal.language.tree import (
    AddressOf,
    Assign,
    Binary,
    Block,
    Break,
    Call,
    Case,
    Cast,
    Comma,
    Compound,
    Cond,
    Construct,
    Continue,
    Decay,
    Decl,
    Deref,
    Do,
    Expr,
    Function,
    If,
    Index3,
    Intrinsic,
    Lit,
    Loop,
    Member,
    PointerAdd,
    PointerDiff,
    Ref,
    Return,
    Step,
    Stmt,
    Subscript,
    Switch,
    Sync,
    Unary,
    Var,
    has_effects,
    walk,
)
from drivetrain.hal.language.types import (
    BOOL,
    F32,
    F64,
    I32,
    I64,
    U32,
    U64,
    VOID,
    WORDS,
    Array,
    Pointer,
    Scalar,
    Struct,
    Type,
    is_float,
    is_integer,
    promoted,
)

__all__ = ["Lines", "Printer", "function_name", "struct_names", "structs_of"]

SPELLED = {
    "bool": "bool", "char": "char", "unsigned char": "uchar", "short": "short",
    "unsigned short": "ushort", "int": "int", "unsigned int": "uint", "long long": "long",
    "unsigned long long": "ulong", "float": "float", "double": "double", "void": "void",
}  # fmt: skip


class Lines:
    """Text with the user's line behind each of its lines."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int]] = []
        self.depth = 0

    def add(self, text: str, line: int = 0) -> None:
        for part in text.split("\n"):
            self.rows.append(("  " * self.depth + part if part else "", line))

    def text(self) -> str:
        return "\n".join(row for row, _ in self.rows) + "\n"

    def lines(self) -> tuple[int, ...]:
        return tuple(line for _, line in self.rows)


class Printer:
    """Prints one function at a time; names are unique in it."""

    wraps = True
    """Signed arithmetic of the target's language wraps around by itself."""

    def __init__(self, structs: Mapping[Struct, str]) -> None:
        self.structs = structs
        self.out = Lines()
        self.names: dict[Var, str] = {}
        self.used: set[str] = set()

    # -- names and types

    def name(self, var: Var) -> str:
        """A name that no language and no prelude knows, one for each variable."""
        if var not in self.names:
            plain = f"v_{var.name}"
            name, count = plain, 2
            while name in self.used:
                name, count = f"{plain}_{count}", count + 1
            self.used.add(name)
            self.names[var] = name
        return self.names[var]

    def space(self, var: Var | None, kind: Type, line: int) -> str:
        """What stands before the type that a pointer points to."""
        return ""

    def spelled(self, kind: Type, line: int) -> str:
        if isinstance(kind, Scalar):
            return SPELLED[kind.name]
        if isinstance(kind, Struct):
            return self.structs[kind]
        raise AssertionError(kind)

    def declared(
        self, kind: Type, name: str, line: int, *, space: str = "", restrict: bool = False
    ) -> str:
        """``float (*name)[4]``."""
        while isinstance(kind, Pointer | Array):
            if isinstance(kind, Array):
                name = f"{name}[{kind.count}]"
                kind = kind.of
            else:
                name = f"*{'__restrict ' if restrict else ''}{name}"
                restrict = False
                if isinstance(kind.to, Array):
                    name = f"({name})"
                kind = kind.to
        return f"{space}{self.spelled(kind, line)} {name}".rstrip()

    # -- expressions

    def expr(self, e: Expr) -> str:
        if isinstance(e, _Printed):
            return e.text
        if isinstance(e, Lit):
            return self.literal(e)
        if isinstance(e, Ref):
            return self.reference(e)
        if isinstance(e, Index3):
            return self.index3(e)
        if isinstance(e, Unary):
            return self.unary(e)
        if isinstance(e, Binary):
            return self.binary(e)
        if isinstance(e, Cast):
            return self.cast(e)
        if isinstance(e, Deref):
            return f"(*{self.expr(e.operand)})"
        if isinstance(e, AddressOf):
            return f"(&{self.expr(e.operand)})"
        if isinstance(e, Decay):
            return self.expr(e.of)
        if isinstance(e, Subscript):
            return f"{self.expr(e.of)}[{self.expr(e.index)}]"
        if isinstance(e, Member):
            return f"{self.expr(e.of)}.{self.field(e)}"
        if isinstance(e, PointerAdd):
            return f"({self.expr(e.pointer)} {e.op} {self.expr(e.index)})"
        if isinstance(e, PointerDiff):
            return f"((long)({self.expr(e.left)} - {self.expr(e.right)}))"
        if isinstance(e, Assign):
            return f"({self.expr(e.target)} = {self.expr(e.value)})"
        if isinstance(e, Compound):
            return self.compound(e)
        if isinstance(e, Step):
            return self.step(e)
        if isinstance(e, Cond):
            return f"({self.expr(e.test)} ? {self.expr(e.yes)} : {self.expr(e.no)})"
        if isinstance(e, Comma):
            return f"({self.expr(e.left)}, {self.expr(e.right)})"
        if isinstance(e, Call):
            return self.call(e)
        if isinstance(e, Intrinsic):
            return self.intrinsic(e)
        if isinstance(e, Construct):
            return self.construct(e)
        raise AssertionError(e)

    def reference(self, e: Ref) -> str:
        return self.name(e.var)

    def index3(self, e: Index3) -> str:
        raise NotImplementedError

    def field(self, e: Member) -> str:
        assert isinstance(e.of.type, Struct)
        return e.name if e.of.type.vector else f"m_{e.name}"

    def literal(self, e: Lit) -> str:
        kind = e.type
        assert isinstance(kind, Scalar)
        if is_float(kind):
            return self.float_literal(e)
        value = int(e.value)
        if kind == BOOL:
            return str(value)
        if kind in (I32, I64):
            mark = "L" if kind == I64 else ""
            least = -(1 << (kind.bits - 1))
            text = f"{value}{mark}" if value > least else f"{value + 1}{mark}-1"
            # In brackets, for a minus may stand before it.
            return f"({text})" if value < 0 else text
        if kind == U32:
            return f"{value}u"
        if kind == U64:
            return f"{value}UL"
        return f"(({self.spelled(kind, e.line)}){value})"

    def float_literal(self, e: Lit) -> str:
        value = float(e.value)
        single = e.type == F32
        if not single:
            self.spelled(F64, e.line)
        if math.isnan(value):
            return "dt_nan_f32()" if single else "dt_nan_f64()"
        if math.isinf(value):
            text = "dt_inf_f32()" if single else "dt_inf_f64()"
            return text if value > 0 else f"(-{text})"
        if e.text:
            return e.text if value >= 0 and e.text[0] != "-" else f"({e.text})"
        text = (to_f32(value) if single else value).hex() + ("f" if single else "")
        return text if text[0] != "-" else f"({text})"

    def unary(self, e: Unary) -> str:
        inner = self.expr(e.operand)
        if e.op == "-" and not self.wraps and e.type in (I32, I64):
            word, zero = ("uint", "0u") if e.type == I32 else ("ulong", "0UL")
            return f"(({self.spelled(e.type, e.line)})({zero} - ({word}){inner}))"
        return f"({e.op}{inner})"

    def binary(self, e: Binary) -> str:
        if e.op in ("&&", "||"):
            return f"({self.expr(e.left)} {e.op} {self.expr(e.right)})"
        return self.arithmetic(e.op, e.type, self.expr(e.left), e.right, e.left.type)

    def arithmetic(self, op: str, kind: Type, left: str, right_expr: Expr, within: Type) -> str:
        """``left op right`` where both are of type ``within`` (a shift's right side apart)."""
        right = self.expr(right_expr)
        if isinstance(within, Scalar) and is_integer(within):
            word = WORDS[within]
            if op in ("/", "%"):
                if isinstance(right_expr, Lit) and right_expr.value not in (0, -1):
                    return f"({left} {op} {right})"
                return f"dt_{'div' if op == '/' else 'mod'}_{word}({left}, {right})"
            if op in ("<<", ">>"):
                return self.shift(op, within, left, right_expr, right)
            if op in ("+", "-", "*") and not self.wraps and within in (I32, I64):
                spelled = self.spelled(within, right_expr.line)
                return f"(({spelled})((u{spelled}){left} {op} (u{spelled}){right}))"
        return f"({left} {op} {right})"

    def shift(self, op: str, kind: Scalar, left: str, right_expr: Expr, right: str) -> str:
        if isinstance(right_expr, Lit) and 0 <= right_expr.value < kind.bits:
            if op == "<<" and kind in (I32, I64):
                spelled = self.spelled(kind, right_expr.line)
                return f"(({spelled})((u{spelled}){left} << {int(right_expr.value)}))"
            return f"({left} {op} {int(right_expr.value)})"
        if right_expr.type == U64:
            right = f"dt_count({right})"
        return f"dt_{'shl' if op == '<<' else 'shr'}_{WORDS[kind]}({left}, {right})"

    def cast(self, e: Cast) -> str:
        inner, have, kind = self.expr(e.of), e.of.type, e.type
        if kind == VOID:
            return f"((void){inner})"
        if kind == BOOL:
            return f"({inner} != 0)"
        if isinstance(have, Scalar) and isinstance(kind, Scalar):
            if is_float(have) and is_integer(kind):
                word = WORDS[kind if kind.size >= 4 else I32]
                made = f"dt_{WORDS[have]}_to_{word}({inner})"
                return made if kind.size >= 4 else f"(({self.spelled(kind, e.line)}){made})"
            return f"(({self.spelled(kind, e.line)}){inner})"
        return self.pointer_cast(e, inner)

    def pointer_cast(self, e: Cast, inner: str) -> str:
        if isinstance(e.type, Pointer) and isinstance(e.of.type, Pointer) and e.type == e.of.type:
            return inner
        return f"(({self.declared(e.type, '', e.line)}){inner})"

    def compound(self, e: Compound) -> str:
        kind, target = e.type, self.expr(e.target)
        if isinstance(kind, Pointer):
            return f"({target} {e.op}= {self.expr(e.value)})"
        plain = e.op in ("&", "|", "^") or is_float(kind) or self.wraps or kind in (U32, U64)
        open_ended = e.op in ("<<", ">>", "%") or (e.op == "/" and is_integer(kind))
        if kind == e.within and plain and not open_ended:
            return f"({target} {e.op}= {self.expr(e.value)})"
        if has_effects(e.target):
            raise wrong(
                e.line,
                f"{e.op}= to a place that is calculated with effects, inside an expression: "
                "make it a statement of its own",
            )
        return f"({target} = {self.updated(e, target)})"

    def updated(self, e: Compound, target: str) -> str:
        """The value that ``target op= value`` stores."""
        place = _Printed(e.type, e.line, target)
        left = self.expr(place if e.type == e.within else Cast(e.within, e.line, place))
        made = _Printed(e.within, e.line, self.arithmetic(e.op, e.within, left, e.value, e.within))
        return self.expr(made if e.type == e.within else Cast(e.type, e.line, made))

    def step(self, e: Step, *, value_used: bool = True) -> str:
        target, kind = self.expr(e.target), e.type
        unsigned = isinstance(kind, Scalar) and kind.kind == "uint"
        if self.wraps or isinstance(kind, Pointer) or is_float(kind) or unsigned:
            return f"({e.op}{target})" if e.prefix else f"({target}{e.op})"
        if has_effects(e.target):
            raise wrong(
                e.line,
                f"{e.op} of a place that is calculated with effects, inside an expression: make "
                "it a statement of its own",
            )
        assert isinstance(kind, Scalar)
        wide = promoted(kind)
        spelled, sign = self.spelled(wide, e.line), e.op[0]
        stored = f"({target} = ({self.spelled(kind, e.line)})((u{spelled}){target} {sign} 1u))"
        if e.prefix or not value_used:
            return stored
        back = "-" if sign == "+" else "+"
        return f"(({self.spelled(kind, e.line)})((u{spelled}){stored} {back} 1u))"

    def call(self, e: Call) -> str:
        raise NotImplementedError

    def intrinsic(self, e: Intrinsic) -> str:
        return f"dt_{e.name}({', '.join(self.expr(argument) for argument in e.arguments)})"

    def construct(self, e: Construct) -> str:
        raise NotImplementedError

    def braces(self, e: Expr) -> str:
        """A value inside ``{...}``, where arrays have no other form."""
        if isinstance(e, Construct) and isinstance(e.type, Array):
            return "{" + (", ".join(self.braces(part) for part in e.parts) or self.nothing) + "}"
        return self.expr(e)

    nothing = "0"

    # -- statements

    def switch(self, s: Switch) -> None:
        self.out.add(f"switch ({self.expr(s.test)})", s.line)
        self.block(s.body)

    def block(self, block: Block) -> None:
        self.out.add("{", block.line)
        self.out.depth += 1
        for stmt in block.body:
            self.stmt(stmt)
        self.out.depth -= 1
        self.out.add("}")

    def stmt(self, s: Stmt) -> None:
        out = self.out
        if isinstance(s, Block):
            self.block(s)
        elif isinstance(s, Decl):
            self.decl(s)
        elif isinstance(s, Do):
            self.do(s.expr)
        elif isinstance(s, If):
            out.add(f"if ({self.expr(s.test)})", s.line)
            self.block(s.yes)
            if s.no is not None:
                out.add("else")
                self.block(s.no)
        elif isinstance(s, Loop):
            self.loop(s)
        elif isinstance(s, Switch):
            self.switch(s)
        elif isinstance(s, Case):
            out.add("default: ;" if s.value is None else f"case {s.value}: ;", s.line)
        elif isinstance(s, Break):
            out.add("break;", s.line)
        elif isinstance(s, Continue):
            out.add("continue;", s.line)
        elif isinstance(s, Return):
            self.returns(s)
        elif isinstance(s, Sync):
            self.sync(s)
        else:
            raise AssertionError(s)

    def loop(self, s: Loop) -> None:
        test = self.expr(s.test) if s.test is not None else ""
        if s.post:
            self.out.add("do", s.line)
            self.block(s.body)
            self.out.add(f"while ({test});", s.line)
            return
        step = "" if s.step is None else self.discarded(s.step)
        self.out.add(f"for (; {test}; {step})", s.line)
        self.block(s.body)

    def discarded(self, e: Expr) -> str:
        """An expression whose value nobody reads."""
        if isinstance(e, Step):
            return self.step(e, value_used=False)
        if isinstance(e, Comma):
            return f"{self.discarded(e.left)}, {self.discarded(e.right)}"
        return self.expr(e)

    def do(self, e: Expr) -> None:
        if isinstance(e, Compound | Step) and has_effects(e.target):
            # The place is calculated once.
            pointer = self.place(e.target)
            self.out.add("{", e.line)
            self.out.add(f"  {pointer} = &{self.expr(e.target)};", e.line)
            same = replace(e, target=_Printed(e.type, e.line, "(*dt_place)"))
            self.out.add(f"  {self.discarded(same)};", e.line)
            self.out.add("}")
            return
        self.out.add(f"{self.discarded(e)};", e.line)

    def place(self, target: Expr) -> str:
        return self.declared(Pointer(target.type), "dt_place", target.line)

    def returns(self, s: Return) -> None:
        value = "" if s.value is None else f" {self.expr(s.value)}"
        self.out.add(f"return{value};", s.line)

    def decl(self, s: Decl) -> None:
        init = "" if s.init is None else f" = {self.braces(s.init)}"
        self.out.add(f"{self.declaration(s.var)}{init};", s.line)

    def declaration(self, var: Var) -> str:
        return self.declared(var.type, self.name(var), var.line, space=self.space_of(var))

    def space_of(self, var: Var) -> str:
        return self.space(var, var.type, var.line)

    def sync(self, s: Sync) -> None:
        raise NotImplementedError


class _Printed(Expr):
    """Text that stands for an expression."""

    def __init__(self, kind: Type, line: int, text: str) -> None:
        super().__init__(kind, line)
        self.text = text


def structs_of(functions: list[Function], constants: list[Var]) -> list[Struct]:
    """The structs that functions name, each after those it holds."""
    out: dict[Struct, None] = {}

    def add(kind: Type | None) -> None:
        if isinstance(kind, Pointer):
            add(kind.to)
        elif isinstance(kind, Array):
            add(kind.of)
        elif isinstance(kind, Struct) and kind not in out:
            for _, part in kind.fields:
                if not isinstance(part, Pointer):
                    add(part)
            out[kind] = None
            for _, part in kind.fields:
                add(part)

    for var in constants:
        add(var.type)
    for function in functions:
        add(function.result)
        for param in function.params:
            add(param.type)
        for node in walk(function.body) if function.body is not None else ():
            if isinstance(node, Decl):
                add(node.var.type)
            elif isinstance(node, Expr):
                add(node.type)
    return list(out)


def struct_names(structs: list[Struct]) -> dict[Struct, str]:
    """A name for each struct, of its own even where two have the same in the source."""
    out: dict[Struct, str] = {}
    used: set[str] = set()
    for struct in structs:
        plain = (
            f"dt_{struct.name.strip('_')}" if struct.vector else f"s_{struct.name or 'nameless'}"
        )
        name, count = plain, 2
        while name in used:
            name, count = f"{plain}_{count}", count + 1
        used.add(name)
        out[struct] = name
    return out


def function_name(function: Function) -> str:
    number = f"_{function.number}" if function.number else ""
    return f"d_{function.name}{number}"

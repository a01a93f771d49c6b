"""The checked program: every expression has its type and every conversion is written out.

Both targets are printed from this tree, so that what C leaves to the implementation (division by
zero, shifts by too much, float to int) is decided in one place.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

from drivetrain.hal.language.types import BOOL, U32, Struct, Type

_numbers = itertools.count(1)


@dataclass(eq=False)
class Var:
    name: str
    type: Type
    line: int
    role: str = "local"
    """``local``, ``param``, ``shared``, ``dynamic`` (extern shared), ``const`` (of the file)."""
    const: bool = False
    restrict: bool = False
    init: Expr | None = None
    """Of a constant."""
    number: int = field(default_factory=lambda: next(_numbers))
    reference: bool = False
    """A C++ reference: a pointer here, read through wherever it is named."""


# -- expressions


@dataclass(eq=False)
class Expr:
    type: Type
    line: int


@dataclass(eq=False)
class Lit(Expr):
    value: int | float
    text: str = ""
    """As the user wrote it, when it says more than ``value``: a float's digits."""


@dataclass(eq=False)
class Ref(Expr):
    var: Var


@dataclass(eq=False)
class Index3(Expr):
    """``threadIdx.x`` and its kin: a u32."""

    name: str
    axis: str


@dataclass(eq=False)
class Unary(Expr):
    """``-``, ``~`` on a promoted number, ``!`` on a bool."""

    op: str
    operand: Expr


@dataclass(eq=False)
class Deref(Expr):
    operand: Expr


@dataclass(eq=False)
class AddressOf(Expr):
    operand: Expr


@dataclass(eq=False)
class Binary(Expr):
    """Both sides have one type, shifts apart; comparisons and ``&& ||`` make a bool."""

    op: str
    left: Expr
    right: Expr


@dataclass(eq=False)
class PointerAdd(Expr):
    pointer: Expr
    index: Expr
    op: str = "+"


@dataclass(eq=False)
class PointerDiff(Expr):
    left: Expr
    right: Expr


@dataclass(eq=False)
class Assign(Expr):
    target: Expr
    value: Expr


@dataclass(eq=False)
class Compound(Expr):
    """``target op= value``, calculated in ``within``; a pointer's is ``PointerAdd``."""

    op: str
    target: Expr
    value: Expr
    within: Type


@dataclass(eq=False)
class Step(Expr):
    """``++`` and ``--``."""

    op: str
    prefix: bool
    target: Expr


@dataclass(eq=False)
class Cond(Expr):
    test: Expr
    yes: Expr
    no: Expr


@dataclass(eq=False)
class Call(Expr):
    function: Function
    arguments: list[Expr]


@dataclass(eq=False)
class Intrinsic(Expr):
    """A function that the prelude of each target has, as ``dt_NAME``."""

    name: str
    arguments: list[Expr]


@dataclass(eq=False)
class Member(Expr):
    of: Expr
    name: str


@dataclass(eq=False)
class Subscript(Expr):
    of: Expr
    """A pointer; an array is decayed first."""
    index: Expr


@dataclass(eq=False)
class Decay(Expr):
    """An array turned into the pointer to its first element."""

    of: Expr


@dataclass(eq=False)
class Cast(Expr):
    of: Expr


@dataclass(eq=False)
class Construct(Expr):
    """A struct or an array from its parts, in order; fewer parts leave zeros."""

    parts: list[Expr]


@dataclass(eq=False)
class Comma(Expr):
    left: Expr
    right: Expr


# -- statements


@dataclass(eq=False)
class Stmt:
    line: int


@dataclass(eq=False)
class Block(Stmt):
    body: list[Stmt]


@dataclass(eq=False)
class Decl(Stmt):
    var: Var
    init: Expr | None = None


@dataclass(eq=False)
class Do(Stmt):
    """An expression for what it does."""

    expr: Expr


@dataclass(eq=False)
class If(Stmt):
    test: Expr
    yes: Block
    no: Block | None = None


@dataclass(eq=False)
class Loop(Stmt):
    """``for`` and ``while``; with ``post``, ``do while``. ``init`` stands before it, in a block."""

    test: Expr | None
    step: Expr | None
    body: Block
    post: bool = False
    unroll: str = ""


@dataclass(eq=False)
class Switch(Stmt):
    test: Expr
    body: Block


@dataclass(eq=False)
class Case(Stmt):
    """A label in a switch's body; None is ``default``."""

    value: int | None


@dataclass(eq=False)
class Break(Stmt):
    pass


@dataclass(eq=False)
class Continue(Stmt):
    pass


@dataclass(eq=False)
class Return(Stmt):
    value: Expr | None = None


@dataclass(eq=False)
class Sync(Stmt):
    """Threads wait for one another: ``block`` or ``warp``."""

    scope: str
    mask: Expr | None = None
    """Of a warp: the lanes that wait; None for all."""


# -- declarations


@dataclass(eq=False)
class Function:
    name: str
    line: int
    params: list[Var]
    result: Type
    body: Block | None = None
    kernel: bool = False
    number: int = 0
    """Which of the instances of its name it is, from 0."""
    launch_bounds: int = 0
    user_name: str = ""
    """``scale<float>`` for an instance of a template."""


@dataclass
class Program:
    kernels: dict[str, Function] = field(default_factory=dict)
    functions: list[Function] = field(default_factory=list)
    """Callees before callers, kernels apart."""
    structs: list[Struct] = field(default_factory=list)
    constants: list[Var] = field(default_factory=list)


# -- walks


@cache
def _names(kind: type) -> tuple[str, ...]:
    return tuple(item.name for item in fields(kind))


def parts(node: Any) -> Iterator[Any]:
    """The expressions and statements directly below one."""
    for name in _names(node.__class__):
        value = getattr(node, name)
        if isinstance(value, (Expr, Stmt)):
            yield value
        elif isinstance(value, list):
            for entry in value:
                if isinstance(entry, (Expr, Stmt)):
                    yield entry


def walk(node: Any) -> Iterator[Any]:
    """The node and all below it, in the order of the source."""
    stack = [node]
    while stack:
        node = stack.pop()
        yield node
        below = list(parts(node))
        below.reverse()
        stack += below


def root_var(expr: Expr) -> Var | None:
    """The variable whose own memory an lvalue lies in; None when it is behind a pointer."""
    while True:
        if isinstance(expr, Ref):
            return expr.var
        if isinstance(expr, Member):
            expr = expr.of
        elif isinstance(expr, Subscript) and isinstance(expr.of, Decay):
            expr = expr.of.of
        else:
            return None


def has_effects(expr: Expr) -> bool:
    """Whether evaluating it twice differs from once: it writes, calls, or waits."""
    return any(
        isinstance(part, (Assign, Compound, Step, Call))
        or (isinstance(part, Intrinsic) and part.name.startswith(("atomic", "shfl", "vote")))
        for part in walk(expr)
    )


def writes(expr: Expr) -> bool:
    """Whether it changes something itself; what it calls is not looked at."""
    return any(
        isinstance(part, (Assign, Compound, Step))
        or (isinstance(part, Intrinsic) and part.name.startswith("atomic"))
        for part in walk(expr)
    )


def truth(expr: Expr) -> Expr:
    """The expression as a bool."""
    if expr.type == BOOL:
        return expr
    return Cast(BOOL, expr.line, expr)


def u32(expr: Expr) -> Expr:
    return expr if expr.type == U32 else Cast(U32, expr.line, expr)


__all__ = [
    "AddressOf", "Assign", "Binary", "Block", "Break", "Call", "Case", "Cast", "Comma",
    "Compound", "Cond", "Construct", "Continue", "Decay", "Decl", "Deref", "Do", "Expr",
    "Function", "If", "Index3", "Intrinsic", "Lit", "Loop", "Member", "PointerAdd",
    "PointerDiff", "Program", "Ref", "Return", "Step", "Stmt", "Subscript", "Switch",
    "Sync", "Unary", "Var", "has_effects", "parts", "root_var", "truth", "u32", "walk", "writes",
]  # fmt: skip

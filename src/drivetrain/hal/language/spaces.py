"""Which memory each pointer points to, found out for OpenCL C 1.2, where that is part of a type.

Every type that holds pointers gets a *shape*: the same tree of types with a *space* at each
pointer, known or not yet. Statements make shapes equal; a space that would have to be two things
is an error. A function is read once in general, so that each call takes a fresh copy of what it
demands and gives (let-polymorphism, Damas and Milner 1982, over spaces instead of types), and then
once for each combination that is really called.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from drivetrain.hal.language.inline import recursive
from drivetrain.hal.language.tokens import wrong
from drivetrain.hal.language.tree import (
    AddressOf,
    Assign,
    Binary,
    Call,
    Cast,
    Comma,
    Compound,
    Cond,
    Construct,
    Decay,
    Decl,
    Deref,
    Expr,
    Function,
    Intrinsic,
    Lit,
    Member,
    PointerAdd,
    PointerDiff,
    Ref,
    Return,
    Stmt,
    Subscript,
    Var,
    parts,
)
from drivetrain.hal.language.types import Array, Pointer, Struct, Type

__all__ = ["Places", "Scheme", "Shape", "Space", "Spaces", "shape_of", "signature"]

SHOWN = {
    "private": "a thread's own variables", "local": "shared memory", "global": "global memory",
    "constant": "__constant__ memory",
}  # fmt: skip

ROOTS = {"shared": "local", "dynamic": "local", "const": "constant"}
"""The space of a variable by its role; all others are a thread's own."""


@dataclass(eq=False)
class Space:
    """One pointer's memory; an OpenCL address space once it is known."""

    word: str = ""
    same: Space | None = None

    def found(self) -> Space:
        here = self
        while here.same is not None:
            here = here.same
        return here

    @property
    def name(self) -> str:
        """Where nothing says which, no memory is ever reached."""
        return self.found().word or "private"


@dataclass(eq=False)
class Shape:
    """Of a pointer: its space, and under ``*`` the shape of what it points to; of a struct: its
    fields' shapes. Arrays have their element's."""

    space: Space | None = None
    inside: dict[str, Shape] = field(default_factory=dict)
    same: Shape | None = None

    def found(self) -> Shape:
        here = self
        while here.same is not None:
            here = here.same
        return here

    def part(self, name: str) -> Shape | None:
        inner = self.found().inside.get(name)
        return inner.found() if inner is not None else None


def _holds_pointer(kind: Type) -> bool:
    if isinstance(kind, Array):
        return _holds_pointer(kind.of)
    if isinstance(kind, Struct):
        return any(_holds_pointer(inner) for _, inner in kind.fields)
    return isinstance(kind, Pointer)


def shape_of(kind: Type, within: dict[Struct, Shape] | None = None) -> Shape | None:
    """A fresh shape; None for a type without pointers. A struct inside itself is one shape."""
    within = {} if within is None else within
    if isinstance(kind, Array):
        return shape_of(kind.of, within)
    if not _holds_pointer(kind):
        return None
    if isinstance(kind, Pointer):
        inner = shape_of(kind.to, within)
        return Shape(Space(), {"*": inner} if inner is not None else {})
    assert isinstance(kind, Struct)
    if kind in within:
        return within[kind]
    made = within[kind] = Shape()
    for name, part in kind.fields:
        inner = shape_of(part, within)
        if inner is not None:
            made.inside[name] = inner
    return made


def signature(shapes: Iterable[Shape | None]) -> tuple[str, ...]:
    """The spaces in the shapes, in a fixed order: equal for equal types."""
    out: list[str] = []
    seen: set[Shape] = set()

    def visit(shape: Shape | None) -> None:
        if shape is None:
            return
        shape = shape.found()
        if shape in seen:
            return
        seen.add(shape)
        if shape.space is not None:
            out.append(shape.space.name)
        for name in sorted(shape.inside):
            visit(shape.inside[name])

    for shape in shapes:
        visit(shape)
        out.append("")
        seen.clear()
    return tuple(out)


def _join_spaces(a: Space, b: Space, line: int) -> None:
    a, b = a.found(), b.found()
    if a is b:
        return
    if a.word and b.word and a.word != b.word:
        one, other = (text for word, text in SHOWN.items() if word in (a.word, b.word))
        raise wrong(
            line,
            f"a pointer would point to both {one} and {other}: OpenCL C has no such pointer, use "
            "one for each",
        )
    b.same = a
    a.word = a.word or b.word


def join(a: Shape | None, b: Shape | None, line: int) -> None:
    """Make two shapes one. Raises CompileError."""
    if a is None or b is None:
        return
    a, b = a.found(), b.found()
    if a is b:
        return
    b.same = a
    if a.space is not None and b.space is not None:
        _join_spaces(a.space, b.space, line)
    for name, inner in b.inside.items():
        if name in a.inside:
            join(a.inside[name], inner, line)
        else:
            a.inside[name] = inner


@dataclass(frozen=True)
class Scheme:
    """What a function demands of its arguments' spaces, and what it gives."""

    params: tuple[Shape | None, ...]
    result: Shape | None

    def fresh(self, fixed: set[Shape]) -> Scheme:
        """A copy with spaces of its own, where they are not known or belong to ``fixed``."""
        spaces: dict[Space, Space] = {}
        shapes: dict[Shape, Shape] = {}

        def copy(shape: Shape | None) -> Shape | None:
            if shape is None:
                return None
            shape = shape.found()
            if shape in fixed:
                return shape
            if shape not in shapes:
                made = shapes[shape] = Shape()
                if shape.space is not None:
                    space = shape.space.found()
                    made.space = spaces.setdefault(space, Space(space.word))
                for name, inner in shape.inside.items():
                    part = copy(inner)
                    if part is not None:
                        made.inside[name] = part
            return shapes[shape]

        return Scheme(tuple(copy(param) for param in self.params), copy(self.result))


class Spaces:
    """All that one kernel calls."""

    def __init__(self) -> None:
        self.shared: dict[Var, Shape | None] = {}
        self._schemes: dict[Function, Scheme] = {}

    def variable(self, var: Var) -> Shape | None:
        """The shape of a variable that more than one function may name."""
        if var not in self.shared:
            self.shared[var] = shape_of(var.type)
        return self.shared[var]

    def scheme(self, function: Function) -> Scheme:
        if function not in self._schemes:
            self._schemes[function] = Places(function, self).scheme
        return self._schemes[function].fresh(self._fixed())

    def _fixed(self) -> set[Shape]:
        out: set[Shape] = set()
        todo = [shape for shape in self.shared.values() if shape is not None]
        while todo:
            shape = todo.pop().found()
            if shape not in out:
                out.add(shape)
                todo += shape.inside.values()
        return out


class Places:
    """The shapes of everything in one function.

    ``given``: the spaces of the parameters and of the result, for one combination of them.
    """

    def __init__(self, function: Function, spaces: Spaces, given: Scheme | None = None) -> None:
        self.spaces = spaces
        self.function = function
        self.vars: dict[Var, Shape | None] = {}
        self.exprs: dict[Expr, Shape | None] = {}
        self.calls: dict[Call, Scheme] = {}
        if given is None:
            params = tuple(shape_of(param.type) for param in function.params)
            given = Scheme(params, shape_of(function.result))
        self.scheme = given
        for param, shape in zip(function.params, given.params, strict=True):
            self.vars[param] = shape
        if function.kernel:
            self._kernel(function)
        assert function.body is not None
        self._statement(function.body)

    def _kernel(self, function: Function) -> None:
        for param, shape in zip(function.params, self.scheme.params, strict=True):
            if shape is None:
                continue
            if shape.space is None or shape.inside:
                raise wrong(
                    param.line,
                    f"the kernel's parameter {param.name} holds pointers inside memory: an OpenCL "
                    "device gives its buffers no addresses to put there; pass each as a parameter",
                )
            _join_spaces(shape.space, Space("global"), param.line)

    def variable(self, var: Var) -> Shape | None:
        if var.role in ROOTS:
            return self.spaces.variable(var)
        if var not in self.vars:
            self.vars[var] = shape_of(var.type)
        return self.vars[var]

    def _statement(self, stmt: Stmt) -> None:
        if isinstance(stmt, Decl):
            shape = self.variable(stmt.var)
            if stmt.init is not None:
                join(shape, self.of(stmt.init), stmt.line)
            return
        for part in parts(stmt):
            if isinstance(part, Expr):
                shape = self.of(part)
                if isinstance(stmt, Return):
                    join(self.scheme.result, shape, stmt.line)
            else:
                self._statement(part)

    # -- expressions

    def of(self, e: Expr) -> Shape | None:
        """The shape of a value. Each expression is read once, its parts with it."""
        if e not in self.exprs:
            self.exprs[e] = self._read(e)
        return self.exprs[e]

    def place(self, e: Expr) -> Space:
        """The memory that an lvalue lies in."""
        if isinstance(e, Ref):
            return Space(ROOTS.get(e.var.role, "private"))
        if isinstance(e, Deref | Subscript):
            shape = self.of(e.operand if isinstance(e, Deref) else e.of)
            assert shape is not None
            space = shape.found().space
            assert space is not None
            return space.found()
        if isinstance(e, Member | Decay):
            return self.place(e.of)
        return Space("private")

    def _pointer(self, place: Space, to: Shape | None) -> Shape:
        return Shape(place, {"*": to} if to is not None else {})

    def _read(self, e: Expr) -> Shape | None:
        if isinstance(e, Ref):
            return self.variable(e.var)
        if isinstance(e, Deref | Subscript):
            shape = self.of(e.operand if isinstance(e, Deref) else e.of)
            if isinstance(e, Subscript):
                self.of(e.index)
            return shape.part("*") if shape is not None else None
        if isinstance(e, Member):
            shape = self.of(e.of)
            return shape.part(e.name) if shape is not None else None
        if isinstance(e, AddressOf | Decay):
            inner = e.operand if isinstance(e, AddressOf) else e.of
            to = self.of(inner)
            return self._pointer(self.place(inner), to)
        if isinstance(e, PointerAdd):
            self.of(e.index)
            return self.of(e.pointer)
        if isinstance(e, Cast):
            return self._cast(e)
        if isinstance(e, Assign | Compound):
            target, value = self.of(e.target), self.of(e.value)
            if isinstance(e, Assign):
                join(target, value, e.line)
            return target
        if isinstance(e, Cond):
            self.of(e.test)
            yes, no = self.of(e.yes), self.of(e.no)
            join(yes, no, e.line)
            return yes
        if isinstance(e, Comma):
            self.of(e.left)
            return self.of(e.right)
        if isinstance(e, Call):
            return self._call(e)
        if isinstance(e, Construct):
            return self._construct(e)
        if isinstance(e, Binary | PointerDiff):
            left, right = self.of(e.left), self.of(e.right)
            join(left, right, e.line)
            return None
        shapes = [self.of(part) for part in parts(e)]
        if isinstance(e, Intrinsic) or not isinstance(e.type, Pointer):
            return None
        # ``++`` and ``--`` of a pointer.
        return shapes[0]

    def _cast(self, e: Cast) -> Shape | None:
        inner = self.of(e.of)
        if not isinstance(e.type, Pointer):
            return None
        if isinstance(e.of.type, Pointer):
            if e.type == e.of.type:
                return inner
            assert inner is not None
            made = shape_of(e.type)
            assert made is not None
            made.space = inner.found().space
            return made
        if isinstance(e.of, Lit) and e.of.value == 0:
            return shape_of(e.type)
        raise wrong(
            e.line, "a number cannot become a pointer here: OpenCL C must know to which memory"
        )

    def _call(self, e: Call) -> Shape | None:
        if recursive(e.function):
            raise wrong(e.line, f"{e.function.name} calls itself: OpenCL C has no recursion")
        scheme = self.spaces.scheme(e.function)
        self.calls[e] = scheme
        for argument, shape in zip(e.arguments, scheme.params, strict=True):
            join(self.of(argument), shape, e.line)
        return scheme.result

    def _construct(self, e: Construct) -> Shape | None:
        shape = shape_of(e.type)
        for position, part in enumerate(e.parts):
            inner = self.of(part)
            if shape is None:
                continue
            if isinstance(e.type, Struct):
                join(shape.part(e.type.fields[position][0]), inner, part.line)
            else:
                join(shape, inner, part.line)
        return shape

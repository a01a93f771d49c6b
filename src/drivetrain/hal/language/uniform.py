"""Which values are the same in all threads of a block, and who reaches each place to wait.

Three levels: ``UNIFORM`` (from the kernel's parameters, blockIdx, blockDim, gridDim, constants),
``UNKNOWN`` (read from memory: it may be the same or not) and ``DIVERGENT`` (from threadIdx, from
what an atomic or a shuffle gave). A variable has the level of all that is ever stored in it, and of
the conditions under which it is stored; so the answer errs to the safe side.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from drivetrain.hal.language.inline import inlined, waits_for
from drivetrain.hal.language.tokens import wrong
from drivetrain.hal.language.tree import (
    AddressOf,
    Assign,
    Binary,
    Block,
    Break,
    Call,
    Compound,
    Cond,
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
    Ref,
    Return,
    Step,
    Stmt,
    Subscript,
    Switch,
    Sync,
    Var,
    parts,
    root_var,
    walk,
)
from drivetrain.hal.language.types import VOID

__all__ = [
    "DIVERGENT", "UNIFORM", "UNKNOWN", "Control", "Uniformity", "Wait", "refuse_divergent",
    "uniformity",
    "uniformity_of_row",
    "with_waits",
]  # fmt: skip

UNIFORM, UNKNOWN, DIVERGENT = 0, 1, 2


@dataclass(frozen=True)
class Control:
    """Under what condition a place is reached."""

    level: int = UNIFORM
    line: int = 0
    what: str = ""

    def over(self, other: Control) -> Control:
        return other if other.level > self.level else self


FREE = Control()


@dataclass(frozen=True)
class Wait:
    """A place where threads wait for one another, and who reaches it."""

    line: int
    scope: str
    """``block``, ``warp``, or ``call``: inside a function that could not be made a part."""
    control: Control


@dataclass
class Uniformity:
    levels: dict[Var, int] = field(default_factory=dict)
    waits: list[Wait] = field(default_factory=list)
    loops: dict[Stmt, Control] = field(default_factory=dict)
    row: bool = False
    """The threads are one row along ``threadIdx.x``."""

    def of(self, expr: Expr) -> int:
        """The level of a value."""
        if isinstance(expr, Lit):
            return UNIFORM
        if isinstance(expr, Ref):
            if expr.var.role in ("shared", "dynamic"):
                return UNKNOWN
            return self.levels.get(expr.var, UNIFORM)
        if isinstance(expr, Index3):
            if expr.name != "threadIdx" or (self.row and expr.axis != "x"):
                return UNIFORM
            return DIVERGENT
        if isinstance(expr, AddressOf | Decay):
            inner = expr.operand if isinstance(expr, AddressOf) else expr.of
            return self._address(inner)
        if isinstance(expr, Subscript | Deref | Member):
            var = root_var(expr)
            if var is not None and var.role in ("local", "param"):
                return max(self.levels.get(var, UNIFORM), self._indices(expr))
            if var is not None and var.role == "const":
                return self._indices(expr)
            if isinstance(expr, Member) and not isinstance(expr.of, Deref | Subscript | Member):
                return self.of(expr.of)
            return max([UNKNOWN, *(self.of(part) for part in parts(expr))])
        if isinstance(expr, Call):
            given = [self.of(argument) for argument in expr.arguments]
            return max([_inside(expr.function, set()), *given])
        if isinstance(expr, Intrinsic):
            if expr.name.startswith(("atomic", "shfl", "vote", "read_")):
                return DIVERGENT
            if expr.name == "any_thread":
                return UNIFORM
            return max([UNIFORM, *(self.of(argument) for argument in expr.arguments)])
        return max([UNIFORM, *(self.of(part) for part in parts(expr))])

    def _address(self, lvalue: Expr) -> int:
        var = root_var(lvalue)
        if var is not None and var.role in ("local", "param"):
            return DIVERGENT
        if isinstance(lvalue, Deref):
            return self.of(lvalue.operand)
        if isinstance(lvalue, Ref):
            return UNIFORM
        return max([UNIFORM, *(self._address_part(part) for part in parts(lvalue))])

    def _address_part(self, part: Expr) -> int:
        if isinstance(part, Decay | Member | Subscript):
            return self._address(part.of if isinstance(part, Decay) else part)
        return self.of(part)

    def _indices(self, lvalue: Expr) -> int:
        level = UNIFORM
        while isinstance(lvalue, Member | Subscript | Decay):
            if isinstance(lvalue, Subscript):
                level = max(level, self.of(lvalue.index))
            lvalue = lvalue.of
        return level


def _inside(function: Function, seen: set[Function]) -> int:
    """The level that a function's body adds to its result."""
    if function in seen or function.body is None:
        return UNIFORM
    seen.add(function)
    level = UNIFORM
    for node in walk(function.body):
        if (isinstance(node, Index3) and node.name == "threadIdx") or (
            isinstance(node, Intrinsic) and node.name.startswith(("atomic", "shfl", "vote"))
        ):
            return DIVERGENT
        if isinstance(node, Deref | Subscript):
            var = root_var(node)
            if var is None or var.role in ("shared", "dynamic"):
                level = max(level, UNKNOWN)
        elif isinstance(node, Call):
            level = max(level, _inside(node.function, seen))
    return level


@dataclass
class _Exits:
    """How control leaves a statement other than by its end."""

    returns: Control = FREE
    breaks: Control = FREE
    continues: Control = FREE

    def join(self, other: _Exits) -> None:
        self.returns = self.returns.over(other.returns)
        self.breaks = self.breaks.over(other.breaks)
        self.continues = self.continues.over(other.continues)

    @property
    def any(self) -> Control:
        return self.returns.over(self.breaks).over(self.continues)


class _Walk:
    def __init__(self, function: Function, agreed: bool, levels: dict[Var, int] | None) -> None:
        self.facts = Uniformity(row=levels is not None)
        self.facts.levels.update(levels or {})
        self.agreed = agreed
        self.changed = True
        assert function.body is not None
        for node in walk(function.body):
            if isinstance(node, AddressOf):
                var = root_var(node.operand)
                if var is not None and var.role in ("local", "param"):
                    # Written through a pointer, by who knows whom.
                    self.facts.levels[var] = DIVERGENT
        while self.changed:
            self.changed = False
            self.facts.waits.clear()
            self.statement(function.body, FREE)

    def store(self, target: Expr, level: int, control: Control) -> None:
        var = root_var(target)
        if var is None or var.role not in ("local", "param"):
            return
        level = max(level, control.level, self.facts._indices(target))
        if level > self.facts.levels.get(var, UNIFORM):
            self.facts.levels[var] = level
            self.changed = True

    def expression(self, expr: Expr, control: Control) -> None:
        if isinstance(expr, Cond) or (isinstance(expr, Binary) and expr.op in ("&&", "||")):
            test, *rest = list(parts(expr))
            self.expression(test, control)
            inner = control.over(self.test(test, "condition"))
            for part in rest:
                self.expression(part, inner)
            return
        for part in parts(expr):
            self.expression(part, control)
        if isinstance(expr, Assign):
            self.store(expr.target, self.facts.of(expr.value), control)
        elif isinstance(expr, Compound):
            level = max(self.facts.of(expr.value), self.facts.of(expr.target))
            self.store(expr.target, level, control)
        elif isinstance(expr, Step):
            self.store(expr.target, self.facts.of(expr.target), control)
        elif isinstance(expr, Intrinsic) and expr.name.startswith(("shfl", "vote")):
            self.facts.waits.append(Wait(expr.line, "warp", control))
        elif isinstance(expr, Call) and waits_for(expr.function):
            self.facts.waits.append(Wait(expr.line, "call", control))

    def test(self, expr: Expr, what: str) -> Control:
        level = self.facts.of(expr)
        if self.agreed and level == UNKNOWN:
            level = UNIFORM
        return Control(level, expr.line, what)

    def statement(self, stmt: Stmt, control: Control) -> _Exits:
        exits = _Exits()
        if isinstance(stmt, Block):
            for inner in stmt.body:
                exits.join(self.statement(inner, control.over(exits.any)))
        elif isinstance(stmt, Decl):
            if stmt.init is not None:
                self.expression(stmt.init, control)
                target = Ref(stmt.var.type, stmt.line, stmt.var)
                self.store(target, self.facts.of(stmt.init), control)
        elif isinstance(stmt, Do):
            self.expression(stmt.expr, control)
        elif isinstance(stmt, If):
            self.expression(stmt.test, control)
            inner_control = control.over(self.test(stmt.test, "if"))
            exits.join(self.statement(stmt.yes, inner_control))
            if stmt.no is not None:
                exits.join(self.statement(stmt.no, inner_control))
        elif isinstance(stmt, Loop):
            self.loop(stmt, control, exits)
        elif isinstance(stmt, Switch):
            self.expression(stmt.test, control)
            inner_exits = self.statement(stmt.body, control.over(self.test(stmt.test, "switch")))
            exits.returns, exits.continues = inner_exits.returns, inner_exits.continues
        elif isinstance(stmt, Sync):
            self.facts.waits.append(Wait(stmt.line, stmt.scope, control))
        elif isinstance(stmt, Return):
            if stmt.value is not None:
                self.expression(stmt.value, control)
            exits.returns = _leaving(control, stmt.line, "return")
        elif isinstance(stmt, Break):
            exits.breaks = _leaving(control, stmt.line, "break")
        elif isinstance(stmt, Continue):
            exits.continues = _leaving(control, stmt.line, "continue")
        return exits

    def loop(self, stmt: Loop, control: Control, exits: _Exits) -> None:
        known = self.facts.loops.get(stmt, FREE)
        inner = control.over(known)
        if stmt.test is not None:
            self.expression(stmt.test, inner)
            known = known.over(self.test(stmt.test, "loop"))
        body = self.statement(stmt.body, inner)
        known = known.over(body.breaks).over(body.returns)
        if stmt.step is not None:
            self.expression(stmt.step, inner)
        if known.level > self.facts.loops.get(stmt, FREE).level:
            self.facts.loops[stmt] = known
            self.changed = True
        exits.returns = body.returns


def _leaving(control: Control, line: int, what: str) -> Control:
    if control.level == UNIFORM:
        return FREE
    return Control(control.level, line, what)


def uniformity(function: Function, *, agreed: bool = False) -> Uniformity:
    """Levels of all variables of a kernel, and its places to wait.

    ``agreed``: UNKNOWN conditions count as the same for all threads, since the target checks at
    run time that they are.
    """
    return _Walk(function, agreed, None).facts


def uniformity_of_row(body: Block, levels: dict[Var, int]) -> Uniformity:
    """Levels within one row of threads; ``levels`` are known of variables from outside."""
    function = Function("", body.line, [], VOID, body)
    return _Walk(function, False, levels).facts


def refuse_divergent(facts: Uniformity) -> None:
    """Raise CompileError for a barrier that only some threads of a block would reach.

    CUDA leaves it undefined, and devices hang or go on with half-written shared memory. A condition
    that is read from memory may be the same for all, and is left to the user.
    """
    for wait in facts.waits:
        if wait.scope == "block" and wait.control.level == DIVERGENT:
            what, line = wait.control.what, wait.control.line
            how = f"behind the {what} of" if what in _LEAVING else f"under the {what} of"
            raise wrong(
                wait.line,
                f"__syncthreads() is not reached by all threads of the block: it stands {how} "
                f"line {line}, which depends on the thread",
            )


_LEAVING = ("return", "break", "continue")


def with_waits(kernel: Function) -> tuple[Function, Uniformity]:
    """The kernel with all its places to wait in its own body, and who reaches them.

    What every target does first with a kernel. Functions that wait are a part of the kernel then
    (`inline.inlined`); kernels that do not wait come back as they are. Raises CompileError, with
    the user's lines, for a ``__syncthreads()`` that is known to be reached by some threads of a
    block only. Waits under an UNKNOWN condition are left to the target: it accepts them if it can
    tell at run time that threads are missing, or refuses them.
    """
    made = inlined(kernel)
    facts = uniformity(made)
    refuse_divergent(facts)
    return made, facts

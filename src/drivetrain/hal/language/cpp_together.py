"""Loops that all lanes of a row go around together, so that each turn is one vector instruction.

``for (k = 0; k < n; k++) sum += a[row * n + k] * b[k * n + column]`` is done by each thread alone
in CUDA. Nothing orders threads between barriers, so here all lanes do turn 0, then all do turn 1:
``b`` is read side by side then. What a thread keeps from turn to turn gets an element for each
lane (`fission`, once more, with the loop in place of a barrier). A loop that starts at the
thread's own index and strides over the grid is turned so that its count is the same for all
lanes, under a guard.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass

from drivetrain.hal.language.cpp_lanes import Lanes, unsteady
from drivetrain.hal.language.fission import NotSplittable, Plan, Planner
from drivetrain.hal.language.inline import clone
from drivetrain.hal.language.tree import (
    Binary,
    Block,
    Call,
    Cast,
    Compound,
    Decay,
    Decl,
    Deref,
    Expr,
    If,
    Index3,
    Intrinsic,
    Lit,
    Loop,
    PointerAdd,
    Ref,
    Step,
    Stmt,
    Subscript,
    Var,
    root_var,
    walk,
)
from drivetrain.hal.language.types import BOOL, I32, I64, U32, U64, Scalar, size_of
from drivetrain.hal.language.uniform import (
    DIVERGENT,
    UNIFORM,
    Uniformity,
    uniformity_of_row,
)

__all__ = ["STRIP", "Together", "together"]

STRIP = 32
"""Lanes that go around together when they keep something: four vectors of the usual width."""
MOST_OF_STRIP = 64 << 10
"""Bytes that the lanes of a strip keep."""

SHORT = 16
SMALL = 300
"""Turns of a loop of known length, and nodes of all its turns, that compilers unroll themselves."""


@dataclass
class Together:
    """A region as a plan for the lanes of a row."""

    plan: Plan
    unsteady: set[Var]


def together(lanes: Lanes, expanded: Set[Var], block: Set[Var]) -> Together | None:
    """How the rest of a region is done by all lanes together; None: by each alone."""
    body = list(_flat(lanes.body))
    if not any(isinstance(stmt, Loop) for stmt in body):
        return None
    turned = _Turner(lanes, body).turned()
    known: dict[Var, int] = dict.fromkeys(expanded, DIVERGENT)
    facts = uniformity_of_row(Block(0, turned), known)
    changed = unsteady(Block(0, turned))
    judge = _Judge(lanes, facts, changed)
    chosen = frozenset(judge.loops(turned))
    if not chosen:
        return None
    try:
        plan = Planner(Block(0, turned), facts, chosen, frozenset({*lanes.row, *block})).plan()
    except NotSplittable:
        return None
    if STRIP * sum(size_of(var.type) for var in plan.expanded) > MOST_OF_STRIP:
        return None
    return Together(plan, changed)


def _flat(body: list[Stmt]) -> Iterator[Stmt]:
    for stmt in body:
        if isinstance(stmt, Block):
            yield from _flat(stmt.body)
        else:
            yield stmt


class _Turner:
    """Loops that start at the thread's own index, turned into loops that all go around."""

    def __init__(self, lanes: Lanes, body: list[Stmt]) -> None:
        self.lanes, self.body = lanes, body
        self.linear = dict(lanes.linear)

    def turned(self) -> list[Stmt]:
        out: list[Stmt] = []
        for position, stmt in enumerate(self.body):
            before = out[-1] if out else None
            made = None
            if isinstance(stmt, Loop) and isinstance(before, Decl):
                made = self.loop(before, stmt, self.body[position + 1 :])
            if made is None:
                out.append(stmt)
            else:
                out[-1:] = made
        return out

    def loop(self, decl: Decl, loop: Loop, rest: list[Stmt]) -> list[Stmt] | None:
        var, init, line = decl.var, decl.init, loop.line
        kind = var.type
        if init is None or loop.post or loop.step is None or kind not in (I32, U32, I64, U64):
            return None
        step = self.lanes.step(init)
        if step is None or step <= 0 or not self._strides(loop.step, var):
            return None
        if var in self.lanes.expanded or _writes(var, loop.body):
            return None
        if any(_names(var, stmt) for stmt in rest):
            return None
        if not self._bounded(loop.test, var):
            return None
        assert loop.test is not None
        first = Var(var.name, kind, var.line)
        lane: Expr = Index3(U32, line, "threadIdx", "x")
        if kind != U32:
            lane = Cast(kind, line, lane)
        if step != 1:
            lane = Binary(kind, line, "*", lane, Lit(kind, line, step))
        start = Ref(kind, line, first)
        own = Decl(line, var, Binary(kind, line, "+", start, lane))
        mine = Ref(kind, line, var)
        # A lane whose index wraps around has ended.
        guard = Binary(BOOL, line, "&&", Binary(BOOL, line, ">=", mine, start), loop.test)
        body = Block(line, [own, If(line, guard, loop.body)])
        renamed = {var: first}
        return [
            Decl(decl.line, first, self.at_lane_0(init)),
            Loop(line, _renamed(loop.test, renamed), _renamed(loop.step, renamed), body),
        ]

    def _strides(self, step: Expr, var: Var) -> bool:
        """It adds the same positive number for every lane."""
        if isinstance(step, Step):
            return step.op == "++" and _is(step.target, var)
        if not isinstance(step, Compound) or not _is(step.target, var) or step.op != "+":
            return False
        return self.lanes.same(step.value) and self._positive(step.value)

    def _positive(self, e: Expr) -> bool:
        if isinstance(e, Lit):
            return e.value > 0
        if isinstance(e, Index3):
            return e.name in ("blockDim", "gridDim")
        if isinstance(e, Cast):
            return isinstance(e.type, Scalar) and e.type.size >= 4 and self._positive(e.of)
        if isinstance(e, Binary) and e.op in ("*", "+"):
            return self._positive(e.left) and self._positive(e.right)
        if isinstance(e, Ref) and e.var in self.lanes.row:
            init = self.lanes.row[e.var].init
            return init is not None and self._positive(init)
        return False

    def _bounded(self, test: Expr | None, var: Var) -> bool:
        """``var < bound`` where the bound is the same for every lane."""
        if not isinstance(test, Binary):
            return False
        small, large = test.left, test.right
        if test.op in (">", ">="):
            small, large = large, small
        elif test.op not in ("<", "<="):
            return False
        while isinstance(small, Cast) and small.type in (I32, U32, I64, U64):
            small = small.of
        return _is(small, var) and self.lanes.same(large)

    def at_lane_0(self, e: Expr) -> Expr:
        if isinstance(e, Index3) and e.name == "threadIdx" and e.axis == "x":
            return Lit(U32, e.line, 0)
        if isinstance(e, Ref) and e.var in self.linear:
            init = self.linear[e.var].init
            assert init is not None
            return self.at_lane_0(init)
        if isinstance(e, Binary):
            return Binary(e.type, e.line, e.op, self.at_lane_0(e.left), self.at_lane_0(e.right))
        if isinstance(e, Cast):
            return Cast(e.type, e.line, self.at_lane_0(e.of))
        return e


def _is(e: Expr, var: Var) -> bool:
    return isinstance(e, Ref) and e.var is var


def _names(var: Var, stmt: Stmt) -> bool:
    return any(isinstance(node, Ref) and node.var is var for node in walk(stmt))


def _writes(var: Var, body: Block) -> bool:
    return var in unsteady(body)


def _renamed(e: Expr, variables: dict[Var, Var]) -> Expr:
    made: Expr = clone(e, dict(variables))
    return made


class _Judge:
    """Which loops are worth it: their memory lies side by side for the lanes, or is shared."""

    def __init__(self, lanes: Lanes, facts: Uniformity, changed: set[Var]) -> None:
        self.facts = facts
        self.lanes = Lanes(
            lambda var: lanes.fixed(var)
            or (
                var.role == "local"
                and var not in lanes.expanded
                and facts.levels.get(var, UNIFORM) == UNIFORM
            ),
            changed, lanes.expanded, dict(lanes.row), dict(lanes.linear),
        )  # fmt: skip

    def loops(self, body: list[Stmt]) -> Iterator[Loop]:
        for stmt in body:
            if isinstance(stmt, Loop) and not self._short(stmt) and self.good(stmt):
                yield stmt
                yield from self.loops(list(_flat(stmt.body.body)))

    def _short(self, loop: Loop) -> bool:
        if any(isinstance(node, Loop) for node in walk(loop.body)):
            return False
        test = loop.test
        return (
            isinstance(test, Binary)
            and isinstance(test.right, Lit)
            and 0 <= test.right.value <= SHORT
            and test.right.value * sum(1 for _ in walk(loop.body)) <= SMALL
        )

    def good(self, loop: Loop) -> bool:
        inner = [loop, *(node for node in walk(loop.body) if isinstance(node, Loop))]
        for each in inner:
            control = self.facts.loops.get(each)
            if control is not None and control.level != UNIFORM:
                return False
        for stmt in _flat(loop.body.body):
            if (
                isinstance(stmt, Decl)
                and stmt.init is not None
                and stmt.var.type in (I32, U32)
                and stmt.var not in self.lanes.unsteady
                and self.lanes.step(stmt.init)
            ):
                self.lanes.linear[stmt.var] = stmt
        return all(self._side_by_side(node) for node in walk(loop))

    def _side_by_side(self, node: object) -> bool:
        if isinstance(node, Call):
            body = node.function.body
            return body is not None and not any(
                isinstance(inner, Deref | Subscript | Call | Loop) for inner in walk(body)
            )
        if isinstance(node, Intrinsic):
            return not node.name.startswith(("atomic", "fence", "read_"))
        if isinstance(node, Subscript):
            var = root_var(node)
            if var is not None and var.role == "local":
                return False
            if self.facts.of(node.of) != UNIFORM and not isinstance(node.of, Decay | Subscript):
                return False
            return self._step(node.index) in (0, 1, -1)
        if isinstance(node, Deref):
            place = node.operand
            if isinstance(place, PointerAdd) and self.facts.of(place.pointer) == UNIFORM:
                return self._step(place.index) in (0, 1, -1)
            return self.facts.of(place) == UNIFORM
        return True

    def _step(self, e: Expr) -> int | None:
        if self.facts.of(e) == UNIFORM:
            return 0
        known = self.lanes.step(e)
        if known is not None:
            return known
        if isinstance(e, Cast) and e.type in (I32, U32, I64, U64):
            return self._step(e.of)
        if isinstance(e, Binary) and e.op in ("+", "-"):
            left, right = self._step(e.left), self._step(e.right)
            if left is None or right is None:
                return None
            return left + right if e.op == "+" else left - right
        return None

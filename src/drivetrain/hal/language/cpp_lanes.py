"""Threads side by side: what a compiler must be told to make one vector instruction of many.

The innermost loop of a region runs along ``threadIdx.x``, called the lane here. CUDA's indices have
32 bits and may wrap, so ``x[blockIdx.x * blockDim.x + threadIdx.x]`` lies beside its neighbour's
only where nothing wraps. A value that is *linear* in the lane modulo 2^32 is exactly ``w + c *
lane`` as long as it does not leave its type's range: the loop over lanes is cut at the lane where
it would (``dt_linear``), so that inside each cut the addresses are plain 64-bit sums. A guard such
as ``if (i < n)`` becomes the loop's bounds (``dt_below``).

Signed arithmetic in an index is calculated in 64 bits, since C++ leaves its overflow undefined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from drivetrain.hal.language.tree import (
    AddressOf,
    Assign,
    Binary,
    Block,
    Cast,
    Compound,
    Cond,
    Continue,
    Decl,
    Expr,
    If,
    Index3,
    Intrinsic,
    Lit,
    PointerAdd,
    Ref,
    Return,
    Step,
    Stmt,
    Unary,
    Var,
    has_effects,
    parts,
    root_var,
    walk,
)
from drivetrain.hal.language.types import (
    BOOL,
    I32,
    I64,
    U32,
    U64,
    Pointer,
    is_integer,
    is_scalar,
)

__all__ = ["Guard", "Lanes", "unsteady"]

MOST_STEP = 1 << 16
NEGATED = {"<": ">=", ">=": "<", ">": "<=", "<=": ">"}
SWAPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "==": "=="}


def unsteady(body: Block) -> set[Var]:
    """Variables that are stored to after their declaration, or whose address is taken."""
    out: set[Var] = set()
    for node in walk(body):
        target: Expr | None = None
        if isinstance(node, Assign | Compound | Step):
            target = node.target
        elif isinstance(node, AddressOf):
            target = node.operand
        var = root_var(target) if target is not None else None
        if var is not None:
            out.add(var)
    return out


@dataclass(frozen=True)
class Guard:
    """``linear op bound``: only lanes for which it holds do anything."""

    linear: Expr
    op: str
    bound: Expr


@dataclass
class Lanes:
    """What is known of a region's values along the lane."""

    fixed: Callable[[Var], bool]
    """Whether a variable has one value for the whole row of lanes, known outside of it."""
    unsteady: set[Var]
    expanded: set[Var]
    row: dict[Var, Decl] = field(default_factory=dict)
    """Variables of the region that are the same for the whole row."""
    linear: dict[Var, Decl] = field(default_factory=dict)
    guards: list[Guard] = field(default_factory=list)
    tests: list[Expr] = field(default_factory=list)
    """Conditions that hold for the whole row or not at all."""
    body: list[Stmt] = field(default_factory=list)

    # -- what a value is

    def same(self, e: Expr) -> bool:
        """It is calculated from what is the same for the row; without memory and effects."""
        if isinstance(e, Lit):
            return True
        if isinstance(e, Index3):
            return e.name != "threadIdx" or e.axis != "x"
        if isinstance(e, Ref):
            return e.var in self.row or self.fixed(e.var)
        if isinstance(e, Intrinsic):
            return e.name.startswith(("min_", "max_")) and all(map(self.same, e.arguments))
        if isinstance(e, Binary | Unary | Cast | Cond | PointerAdd):
            return all(self.same(part) for part in parts(e))
        return False

    def step(self, e: Expr) -> int | None:
        """How much a 32-bit value grows from lane to lane, modulo 2^32; None: not linear."""
        if self.same(e):
            return 0
        if e.type not in (I32, U32):
            return None
        found: int | None = None
        if isinstance(e, Index3):
            found = 1
        elif isinstance(e, Ref):
            found = self._step_of(e.var)
        elif isinstance(e, Cast) and e.of.type in (I32, U32):
            found = self.step(e.of)
        elif isinstance(e, Unary) and e.op == "-":
            inner = self.step(e.operand)
            found = -inner if inner is not None else None
        elif isinstance(e, Binary) and e.op in ("+", "-", "*"):
            left, right = self.step(e.left), self.step(e.right)
            if left is None or right is None:
                return None
            if e.op == "+":
                found = left + right
            elif e.op == "-":
                found = left - right
            elif isinstance(e.right, Lit):
                found = left * int(e.right.value)
            elif isinstance(e.left, Lit):
                found = right * int(e.left.value)
        return found if found and abs(found) <= MOST_STEP else None

    def _step_of(self, var: Var) -> int | None:
        decl = self.linear.get(var)
        return self.step(decl.init) if decl is not None and decl.init is not None else None

    def is_lane(self, e: Expr) -> bool:
        """It is ``threadIdx.x`` itself, under any name: it cannot wrap."""
        if isinstance(e, Index3):
            return e.name == "threadIdx" and e.axis == "x"
        if isinstance(e, Cast) and e.type in (I32, U32, I64, U64):
            return self.is_lane(e.of)
        if isinstance(e, Ref) and e.var in self.linear:
            init = self.linear[e.var].init
            return init is not None and self.is_lane(init)
        return False

    # -- reading a region

    def read(self, again: list[Decl], body: list[Stmt]) -> None:
        """Sort the region's statements: what is done once a row, which lanes do the rest."""
        todo: list[Stmt] = [*again, *body]
        while todo:
            stmt = todo.pop(0)
            if isinstance(stmt, Block):
                todo[:0] = stmt.body
            elif isinstance(stmt, Decl) and self._may_be_skipped(stmt):
                if not self._note(stmt):
                    self.body.append(stmt)
            elif isinstance(stmt, If) and stmt.no is None and (not todo or _only_leaves(stmt.yes)):
                leaves = bool(todo) or _only_leaves(stmt.yes)
                rest = todo if leaves else stmt.yes.body
                kept = self._take(_conjuncts(stmt.test, negated=leaves))
                if kept is None:
                    self.body += [stmt, *todo]
                    return
                todo = list(rest)
                if kept:
                    test = kept[0]
                    for other in kept[1:]:
                        test = Binary(BOOL, stmt.line, "&&", test, other)
                    self.body.append(If(stmt.line, test, Block(stmt.line, todo)))
                    return
            else:
                self.body += [stmt, *todo]
                return

    def _may_be_skipped(self, decl: Decl) -> bool:
        return (
            decl.var not in self.expanded
            and decl.var.role == "local"
            and (decl.init is None or not has_effects(decl.init))
        )

    def _note(self, decl: Decl) -> bool:
        """Whether the declaration is done once for the row."""
        var, init = decl.var, decl.init
        if init is None or var in self.unsteady:
            return False
        if self.same(init) and (is_scalar(var.type) or isinstance(var.type, Pointer)):
            self.row[var] = decl
            return True
        if var.type in (I32, U32) and self.step(init):
            self.linear[var] = decl
        return False

    def _take(self, conjuncts: list[Expr] | None) -> list[Expr] | None:
        """Note what can be said before the loop; the rest comes back. None: nothing can."""
        if conjuncts is None:
            return None
        guards, tests, kept = [], [], []
        for test in conjuncts:
            guard = self._guard(test)
            if guard is not None:
                guards.append(guard)
            elif self.same(test):
                tests.append(test)
            else:
                kept.append(test)
        if not guards and not tests:
            return None
        self.guards += guards
        self.tests += tests
        return kept

    def _guard(self, test: Expr) -> Guard | None:
        if not isinstance(test, Binary) or test.op not in SWAPPED:
            return None
        for linear, bound, op in (
            (test.left, test.right, test.op),
            (test.right, test.left, SWAPPED[test.op]),
        ):
            inner = linear
            if (
                isinstance(inner, Cast)
                and inner.type in (I64, U64)
                and (inner.of.type == U32 or (inner.type == I64 and inner.of.type == I32))
            ):
                inner = inner.of
            step = self.step(inner)
            if step and self.same(bound) and (op != "==" or abs(step) == 1):
                return Guard(inner, op, bound)
        return None


def _only_leaves(block: Block) -> bool:
    return len(block.body) == 1 and isinstance(block.body[0], Return | Continue)


def _conjuncts(test: Expr, *, negated: bool) -> list[Expr] | None:
    """The conditions that must all hold; None when the negation cannot be written."""
    if isinstance(test, Unary) and test.op == "!":
        return _conjuncts(test.operand, negated=not negated)
    if isinstance(test, Binary) and test.op == ("||" if negated else "&&"):
        left = _conjuncts(test.left, negated=negated)
        right = _conjuncts(test.right, negated=negated)
        return None if left is None or right is None else left + right
    if has_effects(test):
        return None
    if not negated:
        return [test]
    if (
        isinstance(test, Binary)
        and test.op in NEGATED
        and is_integer(test.left.type)
        and is_integer(test.right.type)
    ):
        return [Binary(BOOL, test.line, NEGATED[test.op], test.left, test.right)]
    return [Unary(BOOL, test.line, "!", test)]

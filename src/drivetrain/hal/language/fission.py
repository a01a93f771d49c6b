"""A kernel that waits, split into loops over the block's threads with nothing to wait for inside.

Each stretch of code between two places to wait becomes a *region*: a loop over all threads. What
holds a place to wait (a loop, an ``if``) has the same condition in all threads, and is done once
for the block around its regions. A thread's variables are

* of the block, when they are the same in all threads and are set outside regions,
* calculated again at the start of a region, when they are cheap (``int tx = threadIdx.x``),
* inside the loop, when only one region knows them,
* an array with an element for each thread otherwise.

After MCUDA (Stratton, Stone, Hwu: *MCUDA: An Efficient Implementation of CUDA Kernels for
Multi-core CPUs*, LCPC 2008), which calls the splitting "deep fission".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field, fields, replace
from typing import Any

from drivetrain.hal.language.lowering import Lowering, NotSplittable
from drivetrain.hal.language.tree import (
    AddressOf,
    Assign,
    Block,
    Break,
    Call,
    Comma,
    Compound,
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
    Loop,
    Ref,
    Return,
    Step,
    Stmt,
    Subscript,
    Switch,
    Sync,
    Var,
    has_effects,
    parts,
    root_var,
    walk,
)
from drivetrain.hal.language.types import Pointer, is_scalar
from drivetrain.hal.language.uniform import UNIFORM, UNKNOWN, Uniformity, uniformity

__all__ = [
    "Agreement", "NotSplittable", "Once", "Plan", "Planner", "Region", "Repeat", "Way",
    "split",
]  # fmt: skip


@dataclass(eq=False)
class Region:
    """Statements that every thread does, with nothing to wait for."""

    body: list[Stmt]
    again: list[Decl] = field(default_factory=list)
    """Variables to calculate first."""


@dataclass(eq=False)
class Once:
    """A statement that is done once for the block."""

    stmt: Stmt


@dataclass(eq=False)
class Way:
    test: Expr | Agreement
    line: int
    yes: list[Item]
    no: list[Item]


@dataclass(eq=False)
class Repeat:
    loop: Loop
    test: Expr | Agreement | None
    body: list[Item]


@dataclass(eq=False)
class Agreement:
    """A condition that each thread calculates.

    Since it reads memory, and all must find the same; or, with ``any``, to know whether it holds
    for some thread.
    """

    test: Expr
    any: bool = False
    again: list[Decl] = field(default_factory=list)


Item = Region | Once | Way | Repeat


@dataclass
class Plan:
    items: list[Item]
    block: set[Var] = field(default_factory=set)
    """Of the block."""
    expanded: list[Var] = field(default_factory=list)
    """An element for each thread."""


def split(kernel: Function) -> Plan:
    """The plan of a kernel whose places to wait are reached by all threads or by none.

    Raises NotSplittable.
    """
    assert kernel.body is not None
    before = uniformity(kernel, agreed=True)
    if any(wait.scope == "call" for wait in before.waits):
        raise NotSplittable
    body = _own_params(kernel, before)
    body = Block(body.line, Lowering(before).block(body))
    facts = uniformity(replace(kernel, body=body), agreed=True)
    if any(wait.control.level != UNIFORM for wait in facts.waits):
        raise NotSplittable
    return Planner(body, facts).plan()


def _own_params(kernel: Function, facts: Uniformity) -> Block:
    """Parameters that the kernel writes to become variables of its own."""
    assert kernel.body is not None
    written = set(_written(kernel.body))
    for node in walk(kernel.body):
        if isinstance(node, AddressOf):
            var = root_var(node.operand)
            if var is not None:
                written.add(var)
    changed = [param for param in kernel.params if param in written]
    if not changed:
        return kernel.body
    variables: dict[Var, Var] = {}
    first: list[Stmt] = []
    for param in changed:
        fresh = Var(param.name, param.type, param.line, restrict=param.restrict)
        variables[param] = fresh
        facts.levels[fresh] = facts.levels.get(param, UNIFORM)
        first.append(Decl(param.line, fresh, Ref(param.type, param.line, param)))
    # The declarations inside keep their variables: the levels are known by them.
    own = {n.var: n.var for n in walk(kernel.body) if isinstance(n, Decl)}
    copied: Block = _renamed(kernel.body, {**own, **variables})
    return Block(kernel.body.line, first + copied.body)


def _renamed(node: Any, variables: dict[Var, Var]) -> Any:
    if isinstance(node, Ref):
        return Ref(node.type, node.line, variables.get(node.var, node.var))
    values = []
    for item in fields(node):
        value = getattr(node, item.name)
        if isinstance(value, (Expr, Stmt)):
            value = _renamed(value, variables)
        elif isinstance(value, list):
            value = [_renamed(v, variables) if isinstance(v, (Expr, Stmt)) else v for v in value]
        values.append(value)
    return type(node)(*values)


def _written(node: Any) -> Iterator[Var]:
    """Variables whose own memory is stored to, declarations apart."""
    for part in walk(node):
        if isinstance(part, Assign | Compound | Step):
            var = root_var(part.target)
            if var is not None:
                yield var


class Planner:
    """Makes the plan of a body.

    ``together`` are loops without waits that all threads go around together, for the sake of
    vectors; ``known`` are variables from outside that are the same for all. With either, the
    threads are one row of lanes: ``threadIdx.y`` is the same for all of them.
    """

    def __init__(
        self,
        body: Block,
        facts: Uniformity,
        together: frozenset[Stmt] = frozenset(),
        known: Set[Var] = frozenset(),
    ) -> None:
        self.body, self.facts, self.together, self.known = body, facts, together, known
        self.pointed: set[Var] = set()
        for node in walk(body):
            if isinstance(node, AddressOf):
                var = root_var(node.operand)
                if var is not None:
                    self.pointed.add(var)
        self.kept_pointers = _kept_pointers(body)
        self.stores: dict[Var, int] = {}
        for var in _written(body):
            self.stores[var] = self.stores.get(var, 0) + 1
        self.declared = {n.var for n in walk(body) if isinstance(n, Decl)}
        self.block_vars = self._of_the_block()
        self.pending: list[Stmt] = []
        self.regions: list[Region | Agreement] = []
        self.tests: list[Expr] = []

    # -- which statements are done once for the block

    def structured(self, stmt: Stmt) -> bool:
        """It holds a place to wait, or leaves for all threads at once."""
        if any(isinstance(node, Sync) for node in walk(stmt)):
            return True
        if isinstance(stmt, Return | Break | Continue) or stmt in self.together:
            return True
        if isinstance(stmt, Block):
            return any(self.structured(inner) for inner in stmt.body)
        most = UNIFORM if self.together else UNKNOWN
        if isinstance(stmt, If) and self.facts.of(stmt.test) <= most:
            branches = [stmt.yes, stmt.no] if stmt.no is not None else [stmt.yes]
            return any(_leaves(b) for b in branches) and all(self._all_leave(b) for b in branches)
        return False

    def _all_leave(self, block: Block) -> bool:
        """Every exit inside is one that all threads take together."""
        return all(self.structured(stmt) or not _leaves(stmt) for stmt in block.body)

    def lists(self, body: list[Stmt]) -> Iterator[list[Stmt]]:
        """The rows of statements that are split."""
        yield body
        for stmt in body:
            if not self.structured(stmt):
                continue
            if isinstance(stmt, Block):
                yield from self.lists(stmt.body)
            elif isinstance(stmt, If):
                yield from self.lists(stmt.yes.body)
                if stmt.no is not None:
                    yield from self.lists(stmt.no.body)
            elif isinstance(stmt, Loop):
                yield from self.lists(stmt.body.body)

    # -- variables of the block

    def _of_the_block(self) -> set[Var]:
        once: list[tuple[Any, set[Var]]] = []
        outside: set[Var] = set()
        counted: set[int] = set()

        def note(expr: Any) -> None:
            counted.update(id(node) for node in walk(expr))
            once.append((expr, set(_written(expr))))

        for row in self.lists(self.body.body):
            for stmt in row:
                if isinstance(stmt, Decl):
                    if stmt.init is None:
                        continue
                    counted.update(id(node) for node in walk(stmt.init))
                    once.append((stmt.init, {stmt.var, *_written(stmt.init)}))
                elif isinstance(stmt, Do) and _only_stores(stmt.expr):
                    note(stmt.expr)
                elif isinstance(stmt, If) and self.structured(stmt):
                    note(stmt.test)
                elif isinstance(stmt, Loop) and self.structured(stmt):
                    for expr in (stmt.test, stmt.step):
                        if expr is not None:
                            note(expr)
        for node in walk(self.body):
            if isinstance(node, Assign | Compound | Step) and id(node) not in counted:
                var = root_var(node.target)
                if var is not None:
                    outside.add(var)
        inner = {
            node.var
            for node in walk(self.body)
            if isinstance(node, Decl) and node.init is not None and id(node.init) not in counted
        }
        found = {
            var
            for var in self.declared
            if self.facts.levels.get(var, UNIFORM) == UNIFORM
            and var.role == "local"
            and (is_scalar(var.type) or isinstance(var.type, Pointer))
            and var not in outside
            and var not in inner
            and var not in self.pointed
        }
        while True:
            drop: set[Var] = set()
            for expr, stored in once:
                if not stored & found:
                    continue
                if not stored <= found or not self._known_to_block(expr, found):
                    drop |= stored & found
            if not drop:
                return found
            found -= drop

    def _known_to_block(self, expr: Any, found: set[Var]) -> bool:
        known = found | self.known
        for node in walk(expr):
            if isinstance(node, Call | Deref | AddressOf):
                return False
            if isinstance(node, Intrinsic) and node.name.startswith(("atomic", "read_", "fence")):
                return False
            if isinstance(node, Index3) and node.name == "threadIdx" and not self._of_row(node):
                return False
            if isinstance(node, Ref) and node.var.role == "local" and node.var not in known:
                return False
            if isinstance(node, Ref) and node.var.role == "exchange":
                return False
            if isinstance(node, Subscript):
                var = root_var(node)
                if var is None or var.role != "const":
                    return False
        return True

    def _of_row(self, index: Index3) -> bool:
        return bool(self.together) and index.axis != "x"

    # -- the plan

    def plan(self) -> Plan:
        items = self.row(self.body.body, last=True, loop_body=False)
        plan = Plan(items, self.block_vars)
        self._place_variables(plan)
        return plan

    def flush(self, items: list[Item]) -> None:
        if self.pending:
            region = Region(self.pending)
            self.regions.append(region)
            items.append(region)
            self.pending = []

    def row(self, body: list[Stmt], *, last: bool, loop_body: bool) -> list[Item]:
        """``last``: nothing of the kernel follows. ``loop_body``: the row is a loop's own."""
        items: list[Item] = []
        for position, stmt in enumerate(body):
            ends = last and position == len(body) - 1
            if isinstance(stmt, Sync):
                self.flush(items)
            elif isinstance(stmt, Decl) and stmt.var in self.block_vars:
                items.append(Once(stmt))
            elif (
                isinstance(stmt, Do)
                and _only_stores(stmt.expr)
                and set(_written(stmt.expr)) <= self.block_vars
                and set(_written(stmt.expr))
            ):
                stored = set(_written(stmt.expr))
                if any(_mentions(waiting, stored) for waiting in self.pending):
                    self.flush(items)
                items.append(Once(stmt))
            elif self.structured(stmt):
                self.flush(items)
                self._structure(stmt, items, ends, loop_body and position == len(body) - 1)
            elif _leaves(stmt):
                # Some threads leave here: the rest of the row is one region, and ends it all.
                rest = body[position:]
                whole = any(isinstance(n, Sync) for s in rest for n in walk(s))
                returns = any(isinstance(node, Return) for node in walk(stmt))
                if whole or (returns and not last) or (not returns and not loop_body):
                    raise NotSplittable
                if any(isinstance(s, Break) for s in _loose(stmt)):
                    raise NotSplittable
                self.pending += rest
                for inner in rest:
                    self._not_of_block(inner)
                break
            else:
                self.pending.append(stmt)
        self.flush(items)
        return items

    def _not_of_block(self, stmt: Stmt) -> None:
        """A region declares and stores these itself."""
        for node in walk(stmt):
            if isinstance(node, Decl):
                self.block_vars.discard(node.var)
        if set(_written(stmt)) & self.block_vars:
            raise NotSplittable

    def _structure(self, stmt: Stmt, items: list[Item], last: bool, ends_loop: bool) -> None:
        if isinstance(stmt, Block):
            items += self.row(stmt.body, last=last, loop_body=ends_loop)
        elif isinstance(stmt, If):
            test = self._test(stmt.test)
            yes = self.row(stmt.yes.body, last=last, loop_body=ends_loop)
            no = (
                self.row(stmt.no.body, last=last, loop_body=ends_loop)
                if stmt.no is not None
                else []
            )
            items.append(Way(test, stmt.line, yes, no))
        elif isinstance(stmt, Loop):
            checked = self._test(stmt.test) if stmt.test is not None else None
            if stmt.step is not None and isinstance(self._test(stmt.step), Agreement):
                raise NotSplittable
            body = self.row(stmt.body.body, last=False, loop_body=True)
            items.append(Repeat(stmt, checked, body))
        elif isinstance(stmt, Return | Break | Continue):
            items.append(Once(stmt))
        else:
            raise NotSplittable

    def _test(self, expr: Expr) -> Expr | Agreement:
        stored = set(_written(expr))
        if isinstance(expr, Intrinsic) and expr.name == "any_thread":
            some = Agreement(expr.arguments[0], any=True)
            self.regions.append(some)
            return some
        if self.facts.of(expr) == UNKNOWN and not has_effects(expr):
            if self.together:
                raise NotSplittable
            agreement = Agreement(expr)
            self.regions.append(agreement)
            return agreement
        if not stored <= self.block_vars or any(
            isinstance(node, Call)
            or (isinstance(node, Intrinsic) and node.name.startswith("read_"))
            for node in walk(expr)
        ):
            raise NotSplittable
        self.tests.append(expr)
        return expr

    # -- where each variable lives

    def _place_variables(self, plan: Plan) -> None:
        seen: dict[Var, set[int]] = {}
        declared_in: dict[Var, int] = {}
        again: dict[Var, Decl] = {}
        for number, region in enumerate(self.regions):
            for stmt in _inside(region):
                for node in walk(stmt):
                    if isinstance(node, Ref):
                        seen.setdefault(node.var, set()).add(number)
                    elif isinstance(node, Decl):
                        seen.setdefault(node.var, set()).add(number)
                        declared_in[node.var] = number
        for expr in self.tests:
            for node in walk(expr):
                if isinstance(node, Ref):
                    seen.setdefault(node.var, set()).add(-1)
        for region in self.regions:
            for stmt in _inside(region):
                if isinstance(stmt, Decl) and self._cheap(stmt, again):
                    again[stmt.var] = stmt
        forced = {var for var, where in seen.items() if -1 in where}
        for var, where in seen.items():
            if var not in self.declared or var in plan.block:
                continue
            if var.role in ("shared", "dynamic", "const"):
                continue
            if (
                var.role != "exchange"
                and var not in self.kept_pointers
                and where == {declared_in.get(var, -2)}
            ):
                continue
            if var in again and var not in forced:
                continue
            plan.expanded.append(var)
        kept = {var: decl for var, decl in again.items() if var not in plan.expanded}
        for number, region in enumerate(self.regions):
            self._calculate_again(region, number, kept, declared_in)

    def _cheap(self, decl: Decl, again: dict[Var, Decl]) -> bool:
        """Its value can be calculated anywhere again: from indices and what never changes."""
        var, init = decl.var, decl.init
        if (
            init is None
            or var.role != "local"
            or not (is_scalar(var.type) or isinstance(var.type, Pointer))
            or self.stores.get(var, 0)
            or var in self.pointed
        ):
            return False
        for node in walk(init):
            if isinstance(
                node, Deref | Subscript | Call | AddressOf | Decay | Assign | Compound | Step
            ):
                return False
            if isinstance(node, Intrinsic) and not node.name.startswith(("min_", "max_")):
                return False
            if isinstance(node, Ref):
                fixed = (
                    node.var.role == "param"
                    or node.var in self.known
                    or (
                        node.var in self.block_vars
                        and not self.stores.get(node.var, 0)
                        and self._at_top(node.var)
                    )
                )
                if not fixed and node.var not in again:
                    return False
        return sum(1 for _ in walk(init)) <= 24 and self._at_top(var)

    def _at_top(self, var: Var) -> bool:
        """Declared in the kernel's outermost row, so never with another value."""
        return any(isinstance(stmt, Decl) and stmt.var is var for stmt in self.body.body)

    def _calculate_again(
        self,
        region: Region | Agreement,
        number: int,
        kept: dict[Var, Decl],
        declared_in: dict[Var, int],
    ) -> None:
        wanted: set[Var] = set()
        todo = [n.var for part in _inside(region) for n in walk(part) if isinstance(n, Ref)]
        while todo:
            var = todo.pop()
            if var in kept and var not in wanted and declared_in.get(var) != number:
                wanted.add(var)
                init = kept[var].init
                assert init is not None
                todo += [node.var for node in walk(init) if isinstance(node, Ref)]
        region.again = [decl for var, decl in kept.items() if var in wanted]


def _inside(region: Region | Agreement) -> Sequence[Stmt | Expr]:
    return region.body if isinstance(region, Region) else [region.test]


def _kept_pointers(body: Block) -> set[Var]:
    """Variables whose address is stored somewhere: another region may read through it."""
    out: set[Var] = set()
    for node in walk(body):
        value: Expr | None = None
        if isinstance(node, Decl) and not is_scalar(node.var.type):
            value = node.init
        elif isinstance(node, Assign) and not is_scalar(node.type):
            value = node.value
        for part in walk(value) if value is not None else ():
            if isinstance(part, AddressOf | Decay):
                var = root_var(part.operand if isinstance(part, AddressOf) else part.of)
                if var is not None:
                    out.add(var)
    return out


def _only_stores(expr: Expr) -> bool:
    """``a = b``, ``a += b``, ``a++`` of variables, also in a row; nothing else with effects."""
    if isinstance(expr, Comma):
        return _only_stores(expr.left) and _only_stores(expr.right)
    if not isinstance(expr, Assign | Compound | Step) or not isinstance(expr.target, Ref):
        return False
    rest = [] if isinstance(expr, Step) else [expr.value]
    return not any(isinstance(n, Assign | Compound | Step) for e in rest for n in walk(e))


def _mentions(stmt: Stmt, variables: set[Var]) -> bool:
    return any(isinstance(node, Ref) and node.var in variables for node in walk(stmt))


def _loose(stmt: Stmt) -> Iterator[Stmt]:
    """Exits that leave the statement itself."""

    def inside(node: Any, loops: bool, switches: bool) -> Iterator[Stmt]:
        if isinstance(node, Return):
            yield node
        elif isinstance(node, Break):
            if not loops and not switches:
                yield node
        elif isinstance(node, Continue):
            if not loops:
                yield node
        elif isinstance(node, Stmt):
            for part in parts(node):
                yield from inside(
                    part, loops or isinstance(node, Loop), switches or isinstance(node, Switch)
                )

    yield from inside(stmt, False, False)


def _leaves(stmt: Stmt) -> bool:
    return next(_loose(stmt), None) is not None

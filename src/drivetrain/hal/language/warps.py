"""Shuffles, votes and ``__syncwarp`` through local memory, for OpenCL C 1.2, which has no warps.

A shuffle becomes: each thread puts its value into its word of local memory, all wait, each thread
reads another's word, all wait. So every thread of the block must come along, also those that would
not be there: the code that leads to a shuffle is run by all threads, under *masks*. A mask is a
variable that says whether this thread takes part; ``if`` narrows it, ``break``, ``continue`` and
``return`` clear it, and a loop goes on while any thread of the block is in it. Stretches that wait
for nobody stay as they are, behind one ``if (mask)``; conditions that are the same for the whole
block stay conditions.

A lane that takes no part gives what it put last to a shuffle, which CUDA leaves undefined, and does
not count in a vote.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from drivetrain.hal.language.convert import decayed, zero
from drivetrain.hal.language.inline import waits_for
from drivetrain.hal.language.tokens import wrong
from drivetrain.hal.language.tree import (
    AddressOf,
    Assign,
    Binary,
    Block,
    Break,
    Call,
    Case,
    Comma,
    Compound,
    Cond,
    Construct,
    Continue,
    Decl,
    Do,
    Expr,
    Function,
    If,
    Intrinsic,
    Lit,
    Loop,
    Ref,
    Return,
    Step,
    Stmt,
    Subscript,
    Switch,
    Sync,
    Unary,
    Var,
    parts,
    root_var,
    walk,
)
from drivetrain.hal.language.types import BOOL, I32, U32, VOID, Array, Type
from drivetrain.hal.language.uniform import DIVERGENT, UNIFORM, Uniformity

__all__ = ["LANES", "lowered", "uses_warps"]

LANES = 1024
"""The most threads of a block that shuffles."""


def uses_warps(function: Function) -> int:
    """How many bytes a thread needs for its shuffles and votes: 0, 4 or 8."""
    assert function.body is not None
    most = 0
    for node in walk(function.body):
        if isinstance(node, Intrinsic) and node.name.startswith(("shfl", "vote")):
            most = max(most, 8 if getattr(node.type, "size", 4) == 8 else 4)
        elif (isinstance(node, Sync) and node.scope == "warp") or (
            isinstance(node, Call) and waits_for(node.function)
        ):
            most = max(most, 4)
    return most


def lowered(kernel: Function, facts: Uniformity) -> Function:
    """The kernel with barriers and `lane_` intrinsics in place of all that a warp does."""
    assert kernel.body is not None
    made = Function(
        kernel.name, kernel.line, kernel.params, kernel.result, kernel=True,
        number=kernel.number, launch_bounds=kernel.launch_bounds, user_name=kernel.user_name,
    )  # fmt: skip
    made.body = _Lowering(facts).kernel(kernel.body)
    return made


def _warps_in(node: Any) -> bool:
    return any(
        (isinstance(n, Intrinsic) and n.name.startswith(("shfl", "vote")))
        or (isinstance(n, Sync) and n.scope == "warp")
        for n in walk(node)
    )


def _waits_in(node: Any) -> bool:
    return _warps_in(node) or any(isinstance(n, Sync) for n in walk(node))


def _exits(stmt: Stmt, *, loop: bool = True, switch: bool = True) -> set[type[Stmt]]:
    """How control leaves a statement: by return, or by break and continue of a loop around it."""
    if isinstance(stmt, Return):
        return {Return}
    if isinstance(stmt, Break):
        return {Break} if loop and switch else set()
    if isinstance(stmt, Continue):
        return {Continue} if loop else set()
    out: set[type[Stmt]] = set()
    for part in parts(stmt):
        if isinstance(part, Stmt):
            out |= _exits(
                part,
                loop=loop and not isinstance(stmt, Loop),
                switch=switch and not isinstance(stmt, Switch),
            )
    return out


@dataclass
class _Frame:
    """A mask, and what it belongs to: exits clear masks on their way out, up to their own."""

    mask: Var
    of: str
    """``kernel``, ``loop``, ``turn`` (one round of a loop) or ``branch``."""


class _Lowering:
    def __init__(self, facts: Uniformity) -> None:
        self.facts = facts
        self.frames: list[_Frame] = []

    # -- pieces of tree

    def fresh(self, name: str, kind: Type, line: int) -> Var:
        var = Var(name, kind, line)
        self.facts.levels[var] = DIVERGENT
        return var

    def declare(self, name: str, line: int, value: Expr) -> tuple[Var, Decl]:
        var = self.fresh(name, BOOL, line)
        return var, Decl(line, var, value)

    def set(self, var: Var, value: Expr, line: int) -> Stmt:
        return Do(line, Assign(var.type, line, Ref(var.type, line, var), value))

    def under(self, mask: Var | None, body: list[Stmt], line: int) -> list[Stmt]:
        if mask is None or not body:
            return body
        return [If(line, Ref(BOOL, line, mask), Block(line, body))]

    @property
    def mask(self) -> Var | None:
        return self.frames[-1].mask if self.frames else None

    def uniform(self, expr: Expr | None) -> bool:
        return expr is None or self.facts.of(expr) == UNIFORM

    # -- statements

    def kernel(self, body: Block) -> Block:
        if not self.leaves_unevenly(body, Return):
            return Block(body.line, self.all(body.body))
        alive, decl = self.declare("alive", body.line, Lit(BOOL, body.line, 1))
        self.frames.append(_Frame(alive, "kernel"))
        out = [decl, *self.all(body.body)]
        self.frames.pop()
        return Block(body.line, out)

    def leaves_unevenly(self, stmt: Stmt, *exits: type[Stmt], even: bool = True) -> bool:
        """Whether an exit stands under a condition that may differ between threads."""
        if type(stmt) in exits:
            return not even
        if isinstance(stmt, If | Switch):
            even = even and self.uniform(stmt.test)
        elif isinstance(stmt, Loop):
            even = even and self.loop_is_even(stmt)
        if isinstance(stmt, Loop):
            exits = tuple(kind for kind in exits if kind is Return)
        elif isinstance(stmt, Switch):
            exits = tuple(kind for kind in exits if kind is not Break)
        return any(
            self.leaves_unevenly(part, *exits, even=even)
            for part in parts(stmt)
            if isinstance(part, Stmt)
        )

    def loop_is_even(self, loop: Loop) -> bool:
        """Whether all threads go round it equally often."""
        return self.uniform(loop.test) and not self.leaves_unevenly(loop.body, Break, Continue)

    def all(self, body: list[Stmt]) -> list[Stmt]:
        out: list[Stmt] = []
        counted: Loop | None = None
        for stmt, after in zip(body, [*body[1:], None], strict=True):
            if stmt is counted and counted is not None:
                inner = Block(counted.body.line, self.all(counted.body.body))
                out.append(Loop(stmt.line, counted.test, counted.step, inner))
            elif isinstance(stmt, Decl) and isinstance(after, Loop) and self.counts(stmt, after):
                counted = after
                out.append(stmt)
            else:
                out += self.statement(stmt)
        return out

    def counts(self, decl: Decl, loop: Loop) -> bool:
        """``for (int i = 16; i > 0; i /= 2)``: threads that take no part can count along, so that
        nobody has to ask who is still in the loop."""
        if self.mask is None or loop.post or not _waits_in(loop) or _exits(loop.body):
            return False
        parts_of_it = [e for e in (decl.init, loop.test, loop.step) if e is not None]
        if len(parts_of_it) < 3 or any(_warps_in(e) for e in parts_of_it):
            return False
        var = decl.var
        for node in walk(loop.body):
            place = getattr(node, "target", None) or (
                node.operand if isinstance(node, AddressOf) else None
            )
            if isinstance(place, Expr) and root_var(place) is var:
                return False
        targets = [n.target for n in walk(loop.step) if isinstance(n, Assign | Compound | Step)]
        if [root_var(target) for target in targets] != [var]:
            return False
        level = self.facts.levels.get(var, UNIFORM)
        self.facts.levels[var] = UNIFORM
        even = all(self.uniform(e) for e in parts_of_it)
        self.facts.levels[var] = level
        return even

    def plain(self, stmt: Stmt) -> bool:
        """Whether it may stay as it is, behind the mask."""
        if self.mask is None:
            return not _warps_in(stmt)
        return not _waits_in(stmt) and not _exits(stmt)

    def statement(self, stmt: Stmt) -> list[Stmt]:
        if isinstance(stmt, Decl):
            return self.decl(stmt)
        if self.plain(stmt):
            return self.under(self.mask, [stmt], stmt.line)
        if isinstance(stmt, Block):
            return [Block(stmt.line, self.all(stmt.body))]
        if isinstance(stmt, Sync):
            return [Sync(stmt.line, "block")]
        if isinstance(stmt, Do):
            before, expr = self.lifted(stmt.expr)
            return [*before, *self.under(self.mask, [Do(stmt.line, expr)], stmt.line)]
        if isinstance(stmt, If):
            return self.branch(stmt)
        if isinstance(stmt, Loop):
            return self.loop(stmt)
        if isinstance(stmt, Switch):
            return self.switch(stmt)
        if isinstance(stmt, Return | Break | Continue):
            return self.exit(stmt)
        raise AssertionError(stmt)

    def decl(self, stmt: Decl) -> list[Stmt]:
        if stmt.init is None or stmt.var.role in ("shared", "dynamic"):
            return [stmt]
        before, init = self.lifted(stmt.init)
        if self.mask is None:
            return [*before, Decl(stmt.line, stmt.var, init)]
        body = self.filled(Ref(stmt.var.type, stmt.line, stmt.var), init)
        return [Decl(stmt.line, stmt.var), *before, *self.under(self.mask, body, stmt.line)]

    def filled(self, target: Expr, value: Expr) -> list[Stmt]:
        """Assignments of a value to a place; an array's one by one."""
        line = value.line
        if not isinstance(target.type, Array):
            return [Do(line, Assign(target.type, line, target, value))]
        assert isinstance(value, Construct)
        out: list[Stmt] = []
        for position in range(target.type.count):
            index = Lit(I32, line, position)
            place = Subscript(target.type.of, line, decayed(target), index)
            part = (
                value.parts[position] if position < len(value.parts) else zero(target.type.of, line)
            )
            out += self.filled(place, part)
        return out

    def exit(self, stmt: Stmt) -> list[Stmt]:
        if self.mask is None:
            return [stmt]
        line = stmt.line
        last = {Return: "kernel", Break: "loop", Continue: "turn"}[type(stmt)]
        cleared: list[Stmt] = []
        for frame in reversed(self.frames):
            cleared.append(self.set(frame.mask, Lit(BOOL, line, 0), line))
            if frame.of == last:
                break
        # The innermost goes last: it is the condition that all are cleared under.
        return self.under(self.mask, [*cleared[1:], *cleared[:1]], line)

    def branch(self, stmt: If) -> list[Stmt]:
        line = stmt.line
        before, test = self.lifted(stmt.test)
        if self.mask is None and self.uniform(stmt.test):
            yes = Block(stmt.yes.line, self.all(stmt.yes.body))
            no = Block(stmt.no.line, self.all(stmt.no.body)) if stmt.no is not None else None
            return [*before, If(line, test, yes, no)]
        outer = self.mask
        here: Expr = test
        if outer is not None:
            here = Binary(BOOL, line, "&&", Ref(BOOL, line, outer), test)
        taken, decl = self.declare("taken", line, here)
        out: list[Stmt] = [*before, decl]
        other: Var | None = None
        if stmt.no is not None:
            rest: Expr = Unary(BOOL, line, "!", Ref(BOOL, line, taken))
            if outer is not None:
                rest = Binary(BOOL, line, "&&", Ref(BOOL, line, outer), rest)
            other, decl = self.declare("other", line, rest)
            out.append(decl)
        for mask, block in ((taken, stmt.yes), (other, stmt.no)):
            if mask is not None and block is not None:
                self.frames.append(_Frame(mask, "branch"))
                out.append(Block(block.line, self.all(block.body)))
                self.frames.pop()
        return [Block(line, out)]

    def loop(self, stmt: Loop) -> list[Stmt]:
        line = stmt.line
        even = self.mask is None and self.loop_is_even(stmt)
        simple = not _warps_in(stmt.test or Lit(BOOL, line, 1)) and not (
            stmt.step is not None and _warps_in(stmt.step)
        )
        if even and simple:
            body = Block(stmt.body.line, self.all(stmt.body.body))
            return [Loop(line, stmt.test, stmt.step, body, stmt.post, stmt.unroll)]
        outer = self.mask
        start: Expr = Lit(BOOL, line, 1) if outer is None else Ref(BOOL, line, outer)
        running, decl = self.declare("running", line, start)
        out: list[Stmt] = [decl]
        round_ = Block(line, [])
        self.frames.append(_Frame(running, "loop"))
        test: list[Stmt] = []
        if stmt.test is not None:
            before, expr = self.lifted(stmt.test)
            test = [*before, *self.under(running, [self.set(running, expr, line)], line)]
        if not stmt.post:
            round_.body += test
        round_.body += self.while_any(running, line)
        turn, decl = self.declare("turn", line, Ref(BOOL, line, running))
        round_.body.append(decl)
        self.frames.append(_Frame(turn, "turn"))
        round_.body.append(Block(line, self.all(stmt.body.body)))
        self.frames.pop()
        if stmt.step is not None:
            before, expr = self.lifted(stmt.step)
            round_.body += [*before, *self.under(running, [Do(line, expr)], line)]
        if stmt.post:
            round_.body += test
        self.frames.pop()
        out.append(Loop(line, None, None, round_))
        return [Block(line, out)]

    def while_any(self, running: Var, line: int) -> list[Stmt]:
        """Leave the loop when no thread of the block is in it."""

        def lane(name: str, kind: Type = VOID) -> Expr:
            return Intrinsic(kind, line, f"lane_{name}", [])

        left = self.fresh("left", BOOL, line)
        first = If(line, lane("first", BOOL), Block(line, [Do(line, lane("any_clear"))]))
        mine = If(line, Ref(BOOL, line, running), Block(line, [Do(line, lane("any_set"))]))
        none = Unary(BOOL, line, "!", Ref(BOOL, line, left))
        return [
            first, Sync(line, "block"), mine, Sync(line, "block"),
            Decl(line, left, lane("any", BOOL)), Sync(line, "block"),
            If(line, none, Block(line, [Break(line)])),
        ]  # fmt: skip

    def switch(self, stmt: Switch) -> list[Stmt]:
        uneven = self.leaves_unevenly(stmt.body, Break)
        if self.mask is not None or uneven or not self.uniform(stmt.test):
            raise wrong(
                stmt.line,
                "a shuffle or an exit inside a switch that may differ between threads: use if",
            )
        before, test = self.lifted(stmt.test)
        body: list[Stmt] = []
        for inner in stmt.body.body:
            body += [inner] if isinstance(inner, Case) else self.statement(inner)
        return [*before, Switch(stmt.line, test, Block(stmt.body.line, body))]

    # -- expressions

    def lifted(self, expr: Expr) -> tuple[list[Stmt], Expr]:
        """The expression without shuffles and votes, and the statements that go before it."""
        if not _warps_in(expr):
            return [], expr
        line = expr.line
        if isinstance(expr, Cond) or (isinstance(expr, Binary) and expr.op in ("&&", "||")):
            return self.chosen(expr)
        if isinstance(expr, Comma) and _warps_in(expr.right):
            before, left = self.lifted(expr.left)
            after, right = self.lifted(expr.right)
            return [*before, *self.under(self.mask, [Do(line, left)], line), *after], right
        out: list[Stmt] = []
        values: list[Any] = []
        for item in fields(expr):
            value = getattr(expr, item.name)
            if isinstance(value, Expr):
                before, value = self.lifted(value)
                out += before
            elif isinstance(value, list):
                kept = []
                for entry in value:
                    before, entry = self.lifted(entry)
                    out += before
                    kept.append(entry)
                value = kept
            values.append(value)
        made: Expr = type(expr)(*values)
        if isinstance(made, Intrinsic) and made.name.startswith("shfl"):
            return self.shuffle(made, out)
        if isinstance(made, Intrinsic) and made.name.startswith("vote"):
            return self.vote(made, out)
        return out, made

    def chosen(self, expr: Expr) -> tuple[list[Stmt], Expr]:
        """``?:``, ``&&`` and ``||`` with shuffles inside, as an ``if``."""
        line = expr.line
        test, *rest = list(parts(expr))
        if not any(_warps_in(part) for part in rest):
            before, test = self.lifted(test)
            if isinstance(expr, Cond):
                return before, Cond(expr.type, line, test, expr.yes, expr.no)
            assert isinstance(expr, Binary)
            return before, Binary(expr.type, line, expr.op, test, expr.right)
        result = self.fresh("result", expr.type, line)
        place = Ref(expr.type, line, result)

        def gives(value: Expr) -> Block:
            return Block(line, [Do(line, Assign(expr.type, line, place, value))])

        if isinstance(expr, Cond):
            branch = If(line, test, gives(expr.yes), gives(expr.no))
        else:
            assert isinstance(expr, Binary)
            done = gives(Lit(BOOL, line, int(expr.op == "||")))
            more = gives(expr.right)
            branch = If(line, test, *((done, more) if expr.op == "||" else (more, done)))
        return [Decl(line, result), *self.branch(branch)], place

    def shuffle(self, e: Intrinsic, before: list[Stmt]) -> tuple[list[Stmt], Expr]:
        line = e.line
        _, value, other, width = e.arguments
        result = self.fresh("moved", e.type, line)
        put = Do(line, Intrinsic(VOID, line, "lane_put", [value]))
        read = Intrinsic(e.type, line, f"lane_{e.name.removeprefix('shfl_')}", [other, width])
        got: list[Stmt] = [self.set(result, read, line)]
        return [
            *before, Decl(line, result), *self.under(self.mask, [put], line),
            Sync(line, "block"), *self.under(self.mask, got, line), Sync(line, "block"),
        ], Ref(e.type, line, result)  # fmt: skip

    def vote(self, e: Intrinsic, before: list[Stmt]) -> tuple[list[Stmt], Expr]:
        line = e.line
        mask, value = e.arguments
        result = self.fresh("voted", e.type, line)
        yes, no, away = (Lit(U32, line, number) for number in (1, 0, 2))
        mine: Expr = Cond(U32, line, value, yes, no)
        if self.mask is not None:
            mine = Cond(U32, line, Ref(BOOL, line, self.mask), mine, away)
        put = Do(line, Intrinsic(VOID, line, "lane_put", [mine]))
        read = Intrinsic(e.type, line, f"lane_{e.name}", [mask])
        got: list[Stmt] = [self.set(result, read, line)]
        return [
            *before, Decl(line, result), put, Sync(line, "block"),
            *self.under(self.mask, got, line), Sync(line, "block"),
        ], Ref(e.type, line, result)  # fmt: skip

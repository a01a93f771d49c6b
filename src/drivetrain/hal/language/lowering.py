"""Shuffles and votes as what loops over threads can do: store, wait, read what others stored.

A branch of some threads that holds such a wait (``if (warp == 0) v = warp_sum(v)``) is taken apart:
its condition becomes a variable of each thread, its statements are done under that condition, and
the waits in between are done by all.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from drivetrain.hal.language.tree import (
    Assign,
    Binary,
    Block,
    Break,
    Case,
    Cast,
    Compound,
    Cond,
    Continue,
    Decl,
    Do,
    Expr,
    If,
    Index3,
    Intrinsic,
    Lit,
    Loop,
    Ref,
    Return,
    Step,
    Stmt,
    Switch,
    Sync,
    Unary,
    Var,
    parts,
    walk,
)
from drivetrain.hal.language.types import BOOL, U8, Array, Pointer
from drivetrain.hal.language.uniform import DIVERGENT, Uniformity

__all__ = ["Lowering", "NotSplittable"]


class NotSplittable(Exception):
    """The kernel needs a stack for each thread."""


class Lowering:
    def __init__(self, facts: Uniformity) -> None:
        self.facts = facts

    def block(self, block: Block) -> list[Stmt]:
        out: list[Stmt] = []
        for stmt in block.body:
            out += self.statement(stmt)
        return out

    def statement(self, stmt: Stmt) -> list[Stmt]:
        if not any(_waits(node) for node in walk(stmt)):
            return [stmt]
        line = stmt.line
        if isinstance(stmt, Sync):
            return [stmt]
        if isinstance(stmt, Block):
            return [Block(line, self.block(stmt))]
        if isinstance(stmt, If):
            before, test = self.lifted(stmt.test)
            yes = Block(stmt.yes.line, self.block(stmt.yes))
            no = Block(line, self.block(stmt.no)) if stmt.no is not None else None
            branches = [branch for branch in (yes, no) if branch is not None]
            apart = self.facts.of(stmt.test) == DIVERGENT or before
            if apart and any(isinstance(n, Sync) for branch in branches for n in walk(branch)):
                return [*before, *self.taken_apart(test, yes, no, line)]
            return [*before, If(line, test, yes, no)]
        if isinstance(stmt, Loop):
            for expr in (stmt.test, stmt.step):
                if expr is not None and any(_exchanges(node) for node in walk(expr)):
                    raise NotSplittable
            body = Block(stmt.body.line, self.block(stmt.body))
            return [Loop(line, stmt.test, stmt.step, body, stmt.post, stmt.unroll)]
        if isinstance(stmt, Do):
            before, expr = self.lifted(stmt.expr)
            return [*before, Do(line, expr)]
        if isinstance(stmt, Decl) and stmt.init is not None:
            before, init = self.lifted(stmt.init)
            return [*before, Decl(line, stmt.var, init)]
        raise NotSplittable

    def lifted(self, expr: Expr) -> tuple[list[Stmt], Expr]:
        if not any(_exchanges(node) for node in walk(expr)):
            return [], expr
        if isinstance(expr, Cond) or (isinstance(expr, Binary) and expr.op in ("&&", "||")):
            raise NotSplittable
        before: list[Stmt] = []
        values: list[Any] = []
        for item in fields(expr):
            value = getattr(expr, item.name)
            if isinstance(value, Expr):
                more, value = self.lifted(value)
                before += more
            elif isinstance(value, list):
                kept = []
                for entry in value:
                    more, entry = self.lifted(entry)
                    before += more
                    kept.append(entry)
                value = kept
            values.append(value)
        made: Expr = type(expr)(*values)
        if not isinstance(made, Intrinsic) or not _exchanges(made):
            return before, made
        given = made.arguments[1]
        vote = made.name.startswith("vote")
        kind = U8 if vote else given.type
        stored = Var("given", kind, made.line, role="exchange")
        before.append(Decl(made.line, stored, Cast(U8, made.line, given) if vote else given))
        before.append(Sync(made.line, "warp"))
        place = Ref(Pointer(kind), made.line, stored)
        rest = [made.arguments[0]] if vote else made.arguments[2:]
        return before, Intrinsic(made.type, made.line, f"read_{made.name}", [place, *rest])

    # -- branches of some threads

    def taken_apart(self, test: Expr, yes: Block, no: Block | None, line: int) -> list[Stmt]:
        taken = Var("taken", BOOL, line)
        reference = Ref(BOOL, line, taken)
        out: list[Stmt] = [Decl(line, taken, test)]
        out += self.if_any(reference, yes.body)
        if no is not None:
            out += self.if_any(Unary(BOOL, line, "!", reference), no.body)
        return out

    def if_any(self, taken: Expr, body: list[Stmt]) -> list[Stmt]:
        """Nobody enters where no thread of the block would: a loop there might not end."""
        line = taken.line
        inside = Block(line, self.under(taken, body))
        if any(isinstance(node, Sync) for node in walk(inside)):
            return [If(line, Intrinsic(BOOL, line, "any_thread", [taken]), inside)]
        return [inside]

    def under(self, taken: Expr, body: list[Stmt]) -> list[Stmt]:
        """The statements, done by threads for which ``taken`` holds; waits by all."""
        out: list[Stmt] = []
        for stmt in body:
            line = stmt.line
            if isinstance(stmt, Decl):
                out += self.declared_under(taken, stmt)
            elif isinstance(stmt, Block):
                out += self.under(taken, stmt.body)
            elif isinstance(stmt, Sync):
                if stmt.scope == "block":
                    raise NotSplittable
                out.append(stmt)
            elif not any(isinstance(node, Sync) for node in walk(stmt)):
                if any(isinstance(n, Return | Break | Continue | Case) for n in _own(stmt)):
                    raise NotSplittable
                out.append(If(line, taken, Block(line, [stmt])))
            elif isinstance(stmt, If) and _any_thread(stmt.test):
                inside = Block(stmt.yes.line, self.under(taken, stmt.yes.body))
                out.append(If(line, stmt.test, inside))
            elif isinstance(stmt, If):
                inner = Var("taken", BOOL, line)
                both = Binary(BOOL, line, "&&", taken, stmt.test)
                out.append(Decl(line, inner, both))
                reference = Ref(BOOL, line, inner)
                out += self.if_any(reference, stmt.yes.body)
                if stmt.no is not None:
                    other = Unary(BOOL, line, "!", reference)
                    out += self.if_any(Binary(BOOL, line, "&&", taken, other), stmt.no.body)
            elif isinstance(stmt, Loop):
                for expr in (stmt.test, stmt.step):
                    if expr is not None and not self.same_for_all(expr):
                        raise NotSplittable
                inside = Block(stmt.body.line, self.under(taken, stmt.body.body))
                out.append(Loop(line, stmt.test, stmt.step, inside, stmt.post, stmt.unroll))
            else:
                raise NotSplittable
        return out

    def declared_under(self, taken: Expr, stmt: Decl) -> list[Stmt]:
        var, init, line = stmt.var, stmt.init, stmt.line
        if init is None:
            return [stmt]
        if isinstance(var.type, Array):
            raise NotSplittable
        if var.role != "exchange" and _plain(init):
            return [stmt]
        first: Expr | None = Lit(U8, line, 0) if var.role == "exchange" and var.type == U8 else None
        store = Do(line, Assign(var.type, line, Ref(var.type, line, var), init))
        return [Decl(line, var, first), If(line, taken, Block(line, [store]))]

    def same_for_all(self, expr: Expr) -> bool:
        """Not counting that only some threads get there: a loop's count is kept by all."""
        return not any(
            not isinstance(node, Lit | Ref | Binary | Unary | Cast | Assign) and not _counts(node)
            for node in walk(expr)
        )


def _counts(node: Any) -> bool:
    return isinstance(node, Compound | Step) or (
        isinstance(node, Index3) and node.name != "threadIdx"
    )


def _plain(expr: Expr) -> bool:
    """It can be calculated by threads that do not need it: no memory, no effects."""
    return all(isinstance(node, Lit | Ref | Binary | Unary | Cast | Index3) for node in walk(expr))


def _own(stmt: Stmt) -> list[Any]:
    """The nodes that may leave what the statement stands in."""
    found: list[Any] = []
    stack: list[Any] = [stmt]
    while stack:
        node = stack.pop()
        found.append(node)
        if isinstance(node, Loop | Switch):
            found += [n for n in walk(node) if isinstance(n, Return)]
            continue
        stack += parts(node)
    return found


def _any_thread(test: Expr) -> bool:
    return isinstance(test, Intrinsic) and test.name == "any_thread"


def _exchanges(node: Any) -> bool:
    return isinstance(node, Intrinsic) and node.name.startswith(("shfl", "vote"))


def _waits(node: Any) -> bool:
    return isinstance(node, Sync) or _exchanges(node)

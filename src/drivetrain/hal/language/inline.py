"""Functions that wait for other threads become a part of the kernel that calls them.

Then all places to wait stand in the kernel's own body, where it can be seen who reaches them.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from drivetrain.hal.language.tokens import wrong
from drivetrain.hal.language.tree import (
    Assign,
    Binary,
    Block,
    Call,
    Case,
    Cond,
    Decl,
    Do,
    Expr,
    Function,
    If,
    Intrinsic,
    Loop,
    Ref,
    Return,
    Stmt,
    Switch,
    Sync,
    Var,
    parts,
    walk,
)
from drivetrain.hal.language.types import VOID

__all__ = ["clone", "inlined", "recursive", "waits_for"]

MOST_STATEMENTS = 20_000


def waits_for(function: Function, seen: frozenset[Function] = frozenset()) -> str:
    """``block``, ``warp`` or "": what the function or one that it calls waits for."""
    if function in seen or function.body is None:
        return ""
    found = ""
    for node in walk(function.body):
        scope = ""
        if isinstance(node, Sync):
            scope = node.scope
        elif isinstance(node, Intrinsic) and node.name.startswith(("shfl", "vote")):
            scope = "warp"
        elif isinstance(node, Call):
            scope = waits_for(node.function, seen | {function})
        if scope == "block":
            return "block"
        found = found or scope
    return found


def recursive(function: Function) -> bool:
    """Whether it calls itself, through others too."""
    seen: set[Function] = set()
    todo = [function]
    while todo:
        here = todo.pop()
        if here.body is None:
            continue
        for node in walk(here.body):
            if isinstance(node, Call):
                if node.function is function:
                    return True
                if node.function not in seen:
                    seen.add(node.function)
                    todo.append(node.function)
    return False


def clone(node: Any, variables: dict[Var, Var]) -> Any:
    """A copy with its own variables: those it declares, and those that ``variables`` names."""
    if isinstance(node, Decl):
        fresh = Var(
            node.var.name, node.var.type, node.var.line, node.var.role, node.var.const,
            node.var.restrict, node.var.init, reference=node.var.reference,
        )  # fmt: skip
        if node.var.role in ("shared", "dynamic"):
            # Shared memory is one for the block, however often the function is copied.
            fresh = node.var
        init = clone(node.init, variables) if node.init is not None else None
        variables[node.var] = fresh
        return Decl(node.line, fresh, init)
    if isinstance(node, Ref):
        return Ref(node.type, node.line, variables.get(node.var, node.var))
    values = []
    for item in fields(node):
        value = getattr(node, item.name)
        if isinstance(value, (Expr, Stmt)):
            value = clone(value, variables)
        elif isinstance(value, list):
            value = [
                clone(entry, variables) if isinstance(entry, (Expr, Stmt)) else entry
                for entry in value
            ]
        values.append(value)
    return type(node)(*values)


def inlined(kernel: Function) -> Function:
    """The kernel with every call of a function that waits replaced by its body."""
    assert kernel.body is not None
    if not any(isinstance(n, Call) and waits_for(n.function) for n in walk(kernel.body)):
        return kernel
    made = Function(
        kernel.name, kernel.line, kernel.params, kernel.result, kernel=True,
        number=kernel.number, launch_bounds=kernel.launch_bounds, user_name=kernel.user_name,
    )  # fmt: skip
    made.body = _Inliner().block(kernel.body, 0)
    return made


class _Inliner:
    def __init__(self) -> None:
        self.count = 0

    def block(self, block: Block, depth: int) -> Block:
        out = Block(block.line, [])
        for stmt in block.body:
            out.body += self.statement(stmt, depth)
        self.count += len(out.body)
        if self.count > MOST_STATEMENTS or depth > 40:
            raise wrong(block.line, "the functions that wait for other threads call too deeply")
        return out

    def statement(self, stmt: Stmt, depth: int) -> list[Stmt]:
        if isinstance(stmt, Block):
            return [self.block(stmt, depth)]
        if isinstance(stmt, If):
            before, test = self.lifted(stmt.test, depth)
            no = self.block(stmt.no, depth) if stmt.no is not None else None
            return [*before, If(stmt.line, test, self.block(stmt.yes, depth), no)]
        if isinstance(stmt, Loop):
            self.keep(stmt.test)
            self.keep(stmt.step)
            body = self.block(stmt.body, depth)
            return [Loop(stmt.line, stmt.test, stmt.step, body, stmt.post, stmt.unroll)]
        if isinstance(stmt, Switch):
            before, test = self.lifted(stmt.test, depth)
            return [*before, Switch(stmt.line, test, self.block(stmt.body, depth))]
        if isinstance(stmt, Do):
            before, expr = self.lifted(stmt.expr, depth)
            return [*before, Do(stmt.line, expr)] if not isinstance(expr, Ref) else before
        if isinstance(stmt, Decl) and stmt.init is not None:
            before, init = self.lifted(stmt.init, depth)
            return [*before, Decl(stmt.line, stmt.var, init)]
        if isinstance(stmt, Return) and stmt.value is not None:
            before, value = self.lifted(stmt.value, depth)
            return [*before, Return(stmt.line, value)]
        return [stmt]

    def keep(self, expr: Expr | None) -> None:
        """What cannot be lifted out must not wait for the block."""
        for node in walk(expr) if expr is not None else ():
            if isinstance(node, Call) and waits_for(node.function) == "block":
                raise wrong(
                    node.line,
                    f"{node.function.name} has __syncthreads() and is called in a condition: "
                    "call it in a statement of its own",
                )

    def lifted(self, expr: Expr, depth: int) -> tuple[list[Stmt], Expr]:
        """The expression without calls that wait, and the statements that go before it."""
        if isinstance(expr, Cond) or (isinstance(expr, Binary) and expr.op in ("&&", "||")):
            test, *rest = list(parts(expr))
            for part in rest:
                self.keep(part)
            before, test = self.lifted(test, depth)
            if isinstance(expr, Cond):
                return before, Cond(expr.type, expr.line, test, expr.yes, expr.no)
            return before, Binary(expr.type, expr.line, expr.op, test, expr.right)
        before = []
        values: list[Any] = []
        for item in fields(expr):
            value = getattr(expr, item.name)
            if isinstance(value, Expr):
                more, value = self.lifted(value, depth)
                before += more
            elif isinstance(value, list):
                kept = []
                for entry in value:
                    more, entry = self.lifted(entry, depth)
                    before += more
                    kept.append(entry)
                value = kept
            values.append(value)
        made: Expr = type(expr)(*values)
        if isinstance(made, Call) and waits_for(made.function):
            more, made = self.body_of(made, depth)
            before += more
        return before, made

    def body_of(self, call: Call, depth: int) -> tuple[list[Stmt], Expr]:
        function = call.function
        assert function.body is not None
        waits = waits_for(function)
        if recursive(function):
            raise wrong(call.line, f"{function.name} waits for other threads and calls itself")
        if _returns_in_loop(function.body):
            if waits == "warp":
                return [], call
            raise wrong(
                call.line,
                f"{function.name} has __syncthreads() and returns from inside a loop",
            )
        out: list[Stmt] = []
        variables: dict[Var, Var] = {}
        for param, argument in zip(function.params, call.arguments, strict=True):
            fresh = Var(param.name, param.type, param.line, reference=param.reference)
            variables[param] = fresh
            out.append(Decl(call.line, fresh, argument))
        result: Var | None = None
        if function.result != VOID:
            result = Var("result", function.result, call.line)
            out.append(Decl(call.line, result))
        copied: Block = clone(function.body, variables)
        single = _single_exit(copied.body, result)
        out.append(self.block(Block(copied.line, single), depth + 1))
        if result is None:
            # Nothing is left of the call; the caller drops a statement that is only a name.
            return out, Ref(VOID, call.line, Var("nothing", VOID, call.line))
        return out, Ref(result.type, call.line, result)


def _returns_in_loop(block: Block) -> bool:
    for node in walk(block):
        if isinstance(node, Loop | Switch) and any(isinstance(n, Return) for n in walk(node)):
            return True
    return False


def _has_return(stmt: Stmt) -> bool:
    return any(isinstance(node, Return) for node in walk(stmt))


def _single_exit(body: list[Stmt], result: Var | None) -> list[Stmt]:
    """The statements with every return at the end of its branch."""
    out: list[Stmt] = []
    for position, stmt in enumerate(body):
        if isinstance(stmt, Return):
            if stmt.value is not None and result is not None:
                target = Ref(result.type, stmt.line, result)
                out.append(Do(stmt.line, Assign(result.type, stmt.line, target, stmt.value)))
            return out
        rest = body[position + 1 :]
        if isinstance(stmt, Block) and _has_return(stmt):
            return [*out, *_single_exit([*stmt.body, *rest], result)]
        if isinstance(stmt, If) and _has_return(stmt):
            yes = [*stmt.yes.body, *rest]
            no = [*(stmt.no.body if stmt.no is not None else []), *rest]
            copy: list[Stmt] = clone(Block(stmt.line, no), {}).body
            out.append(
                If(
                    stmt.line,
                    stmt.test,
                    Block(stmt.line, _single_exit(yes, result)),
                    Block(stmt.line, _single_exit(copy, result)),
                )
            )
            return out
        out.append(stmt)
    return out


def without_early_return(body: list[Stmt]) -> list[Stmt]:
    """``if (c) return; rest`` as ``if (!c) { rest }``, where that needs no copy of the rest."""
    from drivetrain.hal.language.tree import Unary
    from drivetrain.hal.language.types import BOOL

    out: list[Stmt] = []
    for position, stmt in enumerate(body):
        rest = body[position + 1 :]
        if (
            isinstance(stmt, If)
            and stmt.no is None
            and stmt.yes.body
            and isinstance(stmt.yes.body[-1], Return)
            and not any(isinstance(s, Case) for s in rest)
        ):
            first = stmt.yes.body[:-1]
            if any(_has_return(s) for s in first):
                out.append(stmt)
                continue
            remaining = Block(stmt.line, without_early_return(rest))
            if first:
                out.append(If(stmt.line, stmt.test, Block(stmt.line, first), remaining))
            else:
                negated = Unary(BOOL, stmt.line, "!", stmt.test)
                out.append(If(stmt.line, negated, remaining))
            return out
        if isinstance(stmt, Return):
            return out
        out.append(stmt)
    return out

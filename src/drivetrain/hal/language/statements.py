"""Statements of a function's body."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.hal.language.convert import address, constant, convert, decayed, is_lvalue
from drivetrain.hal.language.declare import (
    Declarator,
    Specifiers,
    declarator,
    specifiers,
    starts_type,
)
from drivetrain.hal.language.expressions import Reader
from drivetrain.hal.language.scope import Cursor, Scope, TypeName
from drivetrain.hal.language.syntax import children, line_of, tokens_between, tokens_of
from drivetrain.hal.language.tokens import Token, wrong
from drivetrain.hal.language.tree import (
    Block,
    Break,
    Call,
    Case,
    Continue,
    Decl,
    Do,
    Expr,
    If,
    Intrinsic,
    Loop,
    Return,
    Stmt,
    Switch,
    Sync,
    Var,
    walk,
)
from drivetrain.hal.language.types import (
    VOID,
    Array,
    Pointer,
    Struct,
    Type,
    is_integer,
    is_scalar,
    shown,
    size_of,
)

if TYPE_CHECKING:
    from tree_sitter import Node

    from drivetrain.hal.language.check import Unit

__all__ = ["Body"]

MOST_OF_ONE_VARIABLE = 512 << 10
"""Bytes: what CUDA gives a thread of local memory."""

_REFUSED = {
    "goto_statement": "goto is not part of the subset",
    "labeled_statement": "labels are not part of the subset",
    "try_statement": "exceptions are not part of the subset",
    "throw_statement": "exceptions are not part of the subset",
    "for_range_loop": "for over a range is not part of the subset: use an index",
    "co_return_statement": "coroutines are not part of the subset",
}


class Body:
    """Reads the statements of one function."""

    def __init__(self, unit: Unit, scope: Scope, result: Type, *, kernel: bool) -> None:
        self.unit, self.scope, self.result, self.kernel = unit, scope, result, kernel
        self.loops = 0
        self.switches = 0

    def read(self, node: object) -> Block:
        body: Node = node  # type: ignore[assignment]
        block = Block(line_of(body), [])
        for child in children(body)[1:-1]:
            block.body += self.statement(child)
        return block

    def inner(self, node: Node) -> Block:
        """A statement of its own scope, as a block."""
        outside, self.scope = self.scope, Scope(self.scope)
        block = Block(line_of(node), self.statement(node, own_scope=True))
        self.scope = outside
        return block

    def statement(self, node: Node, *, own_scope: bool = False) -> list[Stmt]:
        kind, line = node.type, line_of(node)
        if kind in _REFUSED:
            raise wrong(line, _REFUSED[kind])
        if kind == "compound_statement":
            if own_scope:
                return self.read(node).body
            return [self.inner(node)]
        if kind in (
            "declaration", "expression_statement", "type_definition", "alias_declaration",
            "static_assert_declaration", "struct_specifier", "enum_specifier",
            "using_declaration", ";",
        ):  # fmt: skip
            return self.simple(tokens_of(node), line)
        if kind == "if_statement":
            return [self.if_statement(node)]
        if kind in ("while_statement", "do_statement"):
            return [self.while_loop(node)]
        if kind == "for_statement":
            return [self.for_loop(node)]
        if kind == "switch_statement":
            return [self.switch(node)]
        if kind == "break_statement":
            if not self.loops and not self.switches:
                raise wrong(line, "break outside a loop")
            return [Break(line)]
        if kind == "continue_statement":
            if not self.loops:
                raise wrong(line, "continue outside a loop")
            return [Continue(line)]
        if kind == "return_statement":
            return [self.return_statement(node)]
        raise wrong(line, f"{kind.replace('_', ' ')}: it is not part of the subset")

    # -- simple statements

    def simple(self, tokens: list[Token], line: int) -> list[Stmt]:
        cursor = Cursor(tokens, line)
        if cursor.skip(";") and cursor.done:
            return []
        from drivetrain.hal.language.check import declares_alias

        if declares_alias(cursor, self.scope, self.unit):
            return []
        out = self.declaration_or_expression(cursor)
        cursor.expect(";")
        if not cursor.done:
            raise wrong(cursor.line, f"this cannot be read at {cursor.peek()!r}")
        return out

    def declaration_or_expression(self, cursor: Cursor) -> list[Stmt]:
        line = cursor.line
        if cursor.peek() == "asm" or cursor.peek() == "__asm__":
            raise wrong(line, "assembly is not part of the subset")
        if starts_type(cursor, self.scope) and not self._is_conversion(cursor):
            return self.declaration(cursor)
        if cursor.kind() == "name" and cursor.kind(1) == "name":
            raise wrong(line, f"the type {cursor.peek()!r} is not known")
        return self.effect(Reader(cursor, self.scope, self.unit).expression())

    def _is_conversion(self, cursor: Cursor) -> bool:
        """``float(x);`` as against ``float (*p)[4];``."""
        after = 1
        return cursor.peek(after) == "{" or (
            cursor.peek(after) == "("
            and cursor.peek(after + 1) != "*"
            and cursor.peek() not in ("__attribute__", "__align__", "alignas")
        )

    def effect(self, expr: Expr) -> list[Stmt]:
        """An expression as a statement. What waits is a statement of its own."""
        if isinstance(expr, Intrinsic) and expr.name in ("sync_block", "sync_warp"):
            mask = expr.arguments[0] if expr.arguments else None
            if mask is not None:
                self.no_sync(mask)
            return [Sync(expr.line, expr.name.removeprefix("sync_"), mask)]
        self.no_sync(expr)
        return [Do(expr.line, expr)]

    def no_sync(self, expr: Expr) -> Expr:
        for part in walk(expr):
            if isinstance(part, Intrinsic) and part.name.startswith("sync_"):
                raise wrong(part.line, "__syncthreads() must stand as a statement of its own")
        return expr

    def declaration(self, cursor: Cursor) -> list[Stmt]:
        unit = self.unit
        parts = specifiers(cursor, self.scope, unit.constant_of)
        out: list[Stmt] = []
        if cursor.peek() == ";":
            return out
        while True:
            item = declarator(cursor, parts, self.scope, unit.constant_of)
            if "typedef" in parts.flags:
                assert item.type is not None
                if isinstance(item.type, Struct) and not item.type.name:
                    item.type.name = item.name
                self.scope.add(item.name, TypeName(item.type), item.line)
            else:
                out += self.variable(item, parts, cursor)
            if not cursor.skip(","):
                return out

    def variable(self, item: Declarator, parts: Specifiers, cursor: Cursor) -> list[Stmt]:
        line, kind = item.line, item.type
        if parts.flags & {"shared"}:
            return self.shared(item, parts, cursor)
        if "extern" in parts.flags:
            raise wrong(line, f"extern {item.name}: only __shared__ arrays can be extern here")
        if "static" in parts.flags and not item.const:
            raise wrong(line, f"static {item.name}: a variable that outlives its call is refused")
        init = self.initial(item, kind, cursor)
        if item.reference:
            if init is None:
                raise wrong(line, f"the reference {item.name} refers to nothing")
            if (kind is not None and init.type != kind) or not is_lvalue(init):
                if not item.const:
                    raise wrong(line, f"{item.name} must refer to a {shown(kind or init.type)}")
                item.reference = False
            else:
                pointer = address(init)
                kind = Pointer(init.type, item.const)
                pointer = convert(pointer, kind)
                var = Var(item.name, kind, line, reference=True)
                self.scope.add(item.name, var, line)
                return [Decl(line, var, pointer)]
        if kind is None:
            if init is None:
                raise wrong(line, f"auto {item.name} has no value")
            init = decayed(init)
            kind = init.type
        if isinstance(kind, Array) and kind.count < 0:
            if init is None:
                raise wrong(line, f"the array {item.name} has no size")
            kind = init.type
        self.complete(kind, line)
        if size_of(kind) > MOST_OF_ONE_VARIABLE:
            raise wrong(
                line,
                f"{item.name} has {size_of(kind)} bytes; a thread's variable has at most "
                f"{MOST_OF_ONE_VARIABLE}",
            )
        if isinstance(kind, Array) and init is not None and init.type != kind:
            raise wrong(line, f"an array cannot be made of a {shown(init.type)}")
        if init is not None:
            init = convert(init, kind, line)
        elif item.const:
            raise wrong(line, f"the constant {item.name} has no value")
        var = Var(item.name, kind, line, const=item.const, restrict=item.restrict)
        if item.const and init is not None and is_scalar(kind) and constant(init) is not None:
            var.init = init
        self.scope.add(item.name, var, line)
        return [Decl(line, var, init)]

    def initial(self, item: Declarator, kind: Type | None, cursor: Cursor) -> Expr | None:
        reader = Reader(cursor, self.scope, self.unit)
        if cursor.skip("="):
            if cursor.peek() == "{" and kind is None:
                raise wrong(item.line, "auto from {...}: write the type")
            return self.no_sync(reader.initializer(kind) if kind else reader.assignment())
        if cursor.peek() == "{":
            if kind is None:
                raise wrong(item.line, "auto from {...}: write the type")
            return self.no_sync(reader.initializer(kind))
        if cursor.peek() == "(":
            inside = Cursor(cursor.balanced(), item.line)
            made = Reader(inside, self.scope, self.unit)
            if isinstance(kind, Struct) and kind.name in ("uint3", "dim3"):
                raise wrong(item.line, f"write {kind.name} {item.name} = {{x, y, z}}")
            expr = made.expression()
            inside.finish("this value")
            return self.no_sync(expr)
        return None

    def complete(self, kind: Type, line: int) -> None:
        inner = kind
        while isinstance(inner, Array):
            if inner.count < 0:
                raise wrong(line, "an array without a size")
            inner = inner.of
        if isinstance(inner, Struct) and not inner.complete:
            raise wrong(line, f"the struct {inner.name} is not complete here")
        if inner == VOID:
            raise wrong(line, "a variable of type void")

    def shared(self, item: Declarator, parts: Specifiers, cursor: Cursor) -> list[Stmt]:
        line, kind = item.line, item.type
        if cursor.peek() in ("=", "{", "("):
            raise wrong(line, f"shared memory starts without values: set {item.name} by code")
        if kind is None or item.reference:
            raise wrong(line, f"__shared__ {item.name} needs a type of its own")
        dynamic = isinstance(kind, Array) and kind.count < 0
        if dynamic != ("extern" in parts.flags):
            raise wrong(line, f"__shared__ {item.name}: extern goes with [] and only with it")
        if dynamic:
            assert isinstance(kind, Array)
            self.complete(kind.of, line)
        else:
            self.complete(kind, line)
        var = Var(item.name, kind, line, role="dynamic" if dynamic else "shared")
        self.scope.add(item.name, var, line)
        return [Decl(line, var)]

    # -- control

    def test(self, tokens: list[Token], line: int) -> Expr:
        cursor = Cursor(tokens, line)
        if starts_type(cursor, self.scope) and not self._is_conversion(cursor):
            raise wrong(line, "a declaration as a condition is not part of the subset")
        expr = self.no_sync(Reader(cursor, self.scope, self.unit).condition())
        cursor.finish("this condition")
        return expr

    def header(self, node: Node) -> list[Token]:
        """The tokens in the brackets of ``if (...)`` and its kin."""
        condition = node.child_by_field_name("condition")
        assert condition is not None
        return tokens_of(condition)[1:-1]

    def if_statement(self, node: Node) -> Stmt:
        line = line_of(node)
        if any(child.type == "constexpr" for child in node.children):
            return self.if_constexpr(node)
        test = self.test(self.header(node), line)
        yes_node = node.child_by_field_name("consequence")
        assert yes_node is not None
        yes = self.inner(yes_node)
        no: Block | None = None
        other = node.child_by_field_name("alternative")
        if other is not None:
            no = self.inner(children(other)[-1])
        return If(line, test, yes, no)

    def if_constexpr(self, node: Node) -> Stmt:
        """Only the branch that is taken is read, as in a template it must be."""
        line = line_of(node)
        value = constant(self.test(self.header(node), line))
        if value is None:
            raise wrong(line, "if constexpr needs a condition that is known when it is compiled")
        taken = node.child_by_field_name("consequence" if value else "alternative")
        if taken is None:
            return Block(line, [])
        if not value:
            taken = children(taken)[-1]
        return self.inner(taken)

    def body(self, node: Node | None) -> Block:
        assert node is not None
        self.loops += 1
        switches, self.switches = self.switches, 0
        block = self.inner(node)
        self.switches = switches
        self.loops -= 1
        return block

    def while_loop(self, node: Node) -> Stmt:
        line = line_of(node)
        test = self.test(self.header(node), line)
        body = self.body(node.child_by_field_name("body"))
        return Loop(line, test, None, body, post=node.type == "do_statement")

    def for_loop(self, node: Node) -> Stmt:
        line = line_of(node)
        parts = node.children
        opened = next(child for child in parts if child.type == "(")
        closed = [child for child in parts if child.type == ")"][-1]
        pieces: list[list[Token]] = [[]]
        depth = 0
        for token in tokens_between(node, opened, closed):
            if token.kind == "op":
                depth += (token.text in "([{") - (token.text in ")]}")
            if token.text == ";" and depth == 0:
                pieces.append([])
            else:
                pieces[-1].append(token)
        if len(pieces) != 3:
            raise wrong(line, "for needs (start; condition; step)")
        outside, self.scope = self.scope, Scope(self.scope)
        block = Block(line, [])
        if pieces[0]:
            cursor = Cursor(pieces[0], line)
            block.body += self.declaration_or_expression(cursor)
            cursor.finish("the start of this for")
        test = self.test(pieces[1], line) if pieces[1] else None
        step: Expr | None = None
        if pieces[2]:
            cursor = Cursor(pieces[2], line)
            step = self.no_sync(Reader(cursor, self.scope, self.unit).expression())
            cursor.finish("the step of this for")
        body = self.body(node.child_by_field_name("body"))
        block.body.append(Loop(line, test, step, body))
        self.scope = outside
        return block

    def switch(self, node: Node) -> Stmt:
        line = line_of(node)
        cursor = Cursor(self.header(node), line)
        test = self.no_sync(Reader(cursor, self.scope, self.unit).expression())
        cursor.finish("this switch")
        if not is_integer(test.type):
            raise wrong(line, "switch needs a whole number")
        inside = node.child_by_field_name("body")
        assert inside is not None
        outside, self.scope = self.scope, Scope(self.scope)
        self.switches += 1
        block = Block(line, [])
        for child in children(inside)[1:-1]:
            if child.type != "case_statement":
                if child.type == "preproc_call":
                    continue
                raise wrong(line_of(child), "a statement of a switch before its first case")
            parts = children(child)
            colon = next(at for at, part in enumerate(parts) if part.type == ":")
            value: int | None = None
            if parts[0].type == "case":
                tokens = tokens_between(child, parts[0], parts[colon])
                value = self.unit.constant_of(tokens, self.scope)
            block.body.append(Case(line_of(child), value))
            for part in parts[colon + 1 :]:
                made = self.statement(part)
                if any(isinstance(stmt, Decl) for stmt in made):
                    raise wrong(line_of(part), "a declaration in a case needs braces around it")
                block.body += made
        self.switches -= 1
        self.scope = outside
        values = [stmt.value for stmt in block.body if isinstance(stmt, Case)]
        if len(values) != len(set(values)):
            raise wrong(line, "two cases of this switch are the same")
        return Switch(line, test, block)

    def return_statement(self, node: Node) -> Stmt:
        line = line_of(node)
        tokens = tokens_of(node)[1:]
        cursor = Cursor(tokens, line)
        if cursor.skip(";"):
            if self.result != VOID:
                raise wrong(line, f"this return needs a {shown(self.result)}")
            return Return(line)
        expr = self.no_sync(Reader(cursor, self.scope, self.unit).initializer(self.result))
        cursor.expect(";")
        if self.result == VOID:
            if isinstance(expr, Call) and expr.type == VOID:
                raise wrong(line, "return of a call that gives nothing: call it, then return")
            raise wrong(line, "this function returns nothing")
        return Return(line, convert(expr, self.result, line))

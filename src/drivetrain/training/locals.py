"""Numbers that a training loop keeps in local names, and that therefore do not move.

``best = min(best, loss)`` in the body of ``for step in run:`` lives in the frame of the script,
not in the job's state. Such names are found in the source (read in an iteration before they are
written in it, and written), and told only when their number changes while the loop runs.
"""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType

Number = int | float


def loop_carried(
    source: str | Sequence[str] | ast.AST, target: str | None = None, line: int | None = None
) -> dict[str, int]:
    """The names that a loop carries from one iteration to the next: name -> first line it is read.

    ``source`` is text, lines, or a tree of ``ast``. The loop is the one whose header is on
    ``line``, else the first whose target is the name ``target``, else the first. Attributes and
    subscripts are not names. Without such a loop, or for text that does not parse, nothing.
    """
    loop = _find(source, target, line)
    if loop is None:
        return {}
    flow = _Flow()
    defined = flow.bind(loop.target, set())
    flow.block(loop.body, defined)
    found = {name: at for name, at in flow.read.items() if name in flow.written}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def changing_numbers(frame: FrameType, before: dict[str, Number]) -> set[str]:
    """The names whose int, float or bool in the frame is not the one in ``before``, which is
    brought up to date. A name that is new, or was none of these types, does not count."""
    now = _numbers(frame)
    # Same value and type, or both NaN.
    changed = {
        name for name, value in now.items() if name in before and repr(value) != repr(before[name])
    }
    before.clear()
    before.update(now)
    return changed


class Watcher:
    """Watches the frame that runs ``for step in run:``. Make it when the loop asks for its first
    step, ``observe`` whenever it asks for the next, ``close`` it at the end."""

    def __init__(self, frame: FrameType) -> None:
        lines = linecache.getlines(frame.f_code.co_filename, frame.f_globals)
        self._carried = loop_carried(lines, line=frame.f_lineno) if lines else {}
        self._frame: FrameType | None = frame if self._carried else None
        self._before: dict[str, Number] = {}
        self._told: set[str] = set()
        if self._frame is not None:
            changing_numbers(self._frame, self._before)

    def observe(self) -> list[tuple[str, int]]:
        """The numbers that the loop carries and that changed since the last look, with their
        lines; each name once."""
        if self._frame is None:
            return []
        changed = changing_numbers(self._frame, self._before)
        new = [
            (name, line)
            for name, line in self._carried.items()
            if name in changed and name not in self._told
        ]
        self._told.update(name for name, _ in new)
        if len(self._told) == len(self._carried):
            self.close()
        return new

    def close(self) -> None:
        """Lets go of the frame."""
        self._frame = None
        self._before.clear()


def _numbers(frame: FrameType) -> dict[str, Number]:
    names: Mapping[str, object] = frame.f_locals
    found = {n: v for n, v in names.items() if isinstance(v, (int, float))}
    if frame.f_locals is not frame.f_globals:
        for name in frame.f_code.co_names:  # names that the function declares global
            value = frame.f_globals.get(name)
            if name not in names and isinstance(value, (int, float)):
                found[name] = value
    return found


def _find(
    source: str | Sequence[str] | ast.AST, target: str | None, line: int | None
) -> ast.For | ast.AsyncFor | None:
    if isinstance(source, (ast.For, ast.AsyncFor)) and target is None and line is None:
        return source
    if not isinstance(source, ast.AST):
        text = source if isinstance(source, str) else "".join(_with_ends(source))
        try:
            source = ast.parse(text)
        except (SyntaxError, ValueError):
            return None
    loops = [node for node in ast.walk(source) if isinstance(node, (ast.For, ast.AsyncFor))]
    loops.sort(key=lambda node: (node.lineno, node.col_offset))
    for loop in loops:
        if line is not None:
            if loop.lineno <= line <= (loop.iter.end_lineno or loop.lineno):
                return loop
        elif target is None or (isinstance(loop.target, ast.Name) and loop.target.id == target):
            return loop
    return None


def _with_ends(lines: Sequence[str]) -> Iterator[str]:
    return (line if line.endswith("\n") else line + "\n" for line in lines)


_Names = set[str]


class _Flow:
    """One walk through a body in the order it runs, with the names that are surely written."""

    def __init__(self) -> None:
        self.read: dict[str, int] = {}  # read while not surely written in this iteration
        self.written: set[str] = set()

    def block(self, body: Iterable[ast.stmt], defined: _Names | None) -> _Names | None:
        """The names surely written after the statements; None where they are never passed."""
        for statement in body:
            if defined is None:
                return None
            defined = self.statement(statement, defined)
        return defined

    def statement(self, node: ast.stmt, defined: _Names) -> _Names | None:
        match node:
            case ast.Assign(targets=targets, value=value):
                defined = self.look(value, defined)
                for target in targets:
                    defined = self.bind(target, defined)
            case ast.AugAssign(target=target, value=value):
                if isinstance(target, ast.Name):
                    self._reads(target.id, target.lineno, defined)
                else:
                    defined = self.look(target, defined)
                defined = self.look(value, defined)
                defined = self.bind(target, defined)
            case ast.AnnAssign(target=target):
                if node.value is not None:
                    defined = self.bind(target, self.look(node.value, defined))
            case ast.If(test=test, body=body, orelse=orelse):
                defined = self.look(test, defined)
                return _both(self.block(body, set(defined)), self.block(orelse, set(defined)))
            case ast.For() | ast.AsyncFor():
                defined = self.look(node.iter, defined)
                self.block(node.body, self.bind(node.target, set(defined)))
                return self.block(node.orelse, defined)
            case ast.While(test=test, body=body, orelse=orelse):
                defined = self.look(test, defined)
                self.block(body, set(defined))
                return self.block(orelse, defined)
            case ast.With(items=items, body=body) | ast.AsyncWith(items=items, body=body):
                for item in items:
                    defined = self.look(item.context_expr, defined)
                    if item.optional_vars is not None:
                        defined = self.bind(item.optional_vars, defined)
                return self.block(body, defined)
            case ast.Try() | ast.TryStar():
                return self._try(node, defined)
            case ast.Match(subject=subject, cases=cases):
                return self._match(cases, self.look(subject, defined))
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                outer = [*node.decorator_list, *node.args.defaults]
                for part in [*outer, *(d for d in node.args.kw_defaults if d is not None)]:
                    defined = self.look(part, defined)
                self._function(node.args, node.body, defined)
                defined = self._write(node.name, defined)
            case ast.ClassDef():
                for part in [*node.decorator_list, *node.bases, *(k.value for k in node.keywords)]:
                    defined = self.look(part, defined)
                inner = _Flow()
                inner.block(node.body, set())
                self._free(inner.read, defined)
                defined = self._write(node.name, defined)
            case ast.Import(names=names) | ast.ImportFrom(names=names):
                for alias in names:
                    name = alias.asname or alias.name.split(".")[0]
                    defined = self._write(name, defined)
            case ast.Delete(targets=targets):
                for target in targets:
                    if isinstance(target, ast.Name):
                        self._reads(target.id, target.lineno, defined)
                        defined = defined - {target.id}
                    else:
                        defined = self.look(target, defined)
            case ast.Return():
                if node.value is not None:
                    self.look(node.value, defined)
                return None
            case ast.Raise():
                for raised in (node.exc, node.cause):
                    if raised is not None:
                        defined = self.look(raised, defined)
                return None
            case ast.Break() | ast.Continue():
                return None
            case _:
                defined = self.look(node, defined)
        return defined

    def look(self, node: ast.AST, defined: _Names) -> _Names:
        """Reads an expression, in the order it is evaluated; assignment expressions write."""
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                self._reads(name, node.lineno, defined)
            case ast.NamedExpr(target=target, value=value):
                defined = self.bind(target, self.look(value, defined))
            case ast.BoolOp(values=values):
                defined = self.look(values[0], defined)
                inner = set(defined)
                for value in values[1:]:  # these may not be evaluated: they surely write nothing
                    inner = self.look(value, inner)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                defined = self.look(test, defined)
                one, other = self.look(body, set(defined)), self.look(orelse, set(defined))
                defined = one & other
            case ast.Lambda(args=args, body=body):
                for part in [*args.defaults, *(d for d in args.kw_defaults if d is not None)]:
                    defined = self.look(part, defined)
                self._function(args, [ast.Expr(body)], defined)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                defined = self._comprehension(node, defined)
            case _:
                for child in ast.iter_child_nodes(node):
                    defined = self.look(child, defined)
        return defined

    def bind(self, target: ast.AST, defined: _Names) -> _Names:
        """Writes an assignment's target; in attributes and subscripts the object is read."""
        match target:
            case ast.Name(id=name):
                return self._write(name, defined)
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                for part in parts:
                    defined = self.bind(part, defined)
                return defined
            case ast.Starred(value=value):
                return self.bind(value, defined)
        return self.look(target, defined)

    def _reads(self, name: str, line: int, defined: _Names) -> None:
        if name not in defined:
            self.read[name] = min(line, self.read.get(name, line))

    def _write(self, name: str, defined: _Names) -> _Names:
        self.written.add(name)
        return defined | {name}

    def _free(self, names: Mapping[str, int], defined: _Names) -> None:
        for name, line in names.items():
            self._reads(name, line, defined)

    def _try(self, node: ast.Try | ast.TryStar, defined: _Names) -> _Names | None:
        after = self.block(node.orelse, self.block(node.body, set(defined)))
        for handler in node.handlers:
            inner = set(defined)
            if handler.type is not None:
                inner = self.look(handler.type, inner)
            if handler.name is not None:
                inner = self._write(handler.name, inner)
            after = _both(after, self.block(handler.body, inner))
        final = self.block(node.finalbody, set(defined))
        if final is None or after is None:
            return None
        return after | final

    def _match(self, cases: list[ast.match_case], defined: _Names) -> _Names | None:
        after: _Names | None = set(defined)  # no case may match
        for case in cases:
            inner = set(defined)
            for part in ast.walk(case.pattern):
                name = getattr(part, "name", None) or getattr(part, "rest", None)
                if isinstance(part, ast.expr):
                    inner = self.look(part, inner)
                elif isinstance(name, str):
                    inner = self._write(name, inner)
            if case.guard is not None:
                inner = self.look(case.guard, inner)
            after = _both(after, self.block(case.body, inner))
        return after

    def _function(self, args: ast.arguments, body: list[ast.stmt], defined: _Names) -> None:
        """A function's free names are read where it is made; what it declares nonlocal or global
        and writes is written."""
        inner = _Flow()
        every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
        parameters = {arg.arg for arg in every if arg is not None}
        inner.block(body, set(parameters))
        outer = {
            name
            for statement in body
            for part in ast.walk(statement)
            if isinstance(part, (ast.Global, ast.Nonlocal))
            for name in part.names
        }
        own = (inner.written - outer) | parameters
        self._free({n: line for n, line in inner.read.items() if n not in own}, defined)
        self.written |= inner.written & outer

    def _comprehension(
        self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp, defined: _Names
    ) -> _Names:
        inner, targets = _Flow(), set()
        seen: _Names = set()
        for generator in node.generators:
            seen = inner.look(generator.iter, seen)
            names = {n.id for n in ast.walk(generator.target) if isinstance(n, ast.Name)}
            targets |= names
            seen = seen | names
            for condition in generator.ifs:
                seen = inner.look(condition, seen)
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        for part in parts:
            seen = inner.look(part, seen)
        self._free(inner.read, defined)
        self.written |= inner.written - targets  # assignment expressions write outside
        return defined


def _both(one: _Names | None, other: _Names | None) -> _Names | None:
    """Names surely written after either of two ways; a way that is never passed does not count."""
    if one is None:
        return other
    return one if other is None else one & other

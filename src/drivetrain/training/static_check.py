"""Read a training script without running it, and name what two copies of it would do wrong.

A job that moves runs the script a second time on the target, so what stands before the loop is
done twice and what is in the loop is also done by a copy that does not own the job yet. The walk
follows the file in the order of execution, into functions that it defines; it knows three
phases, *before*, *in* and *after* the loop, and whether ``run.owner`` or ``run.once`` guards a
line. What it cannot see (other modules, computed paths) is left to the rehearsal.

Codes: ``no-loop``, ``hard-coded-device``, ``set-order``, ``unseeded``, ``truncates``,
``deletes``, ``binds``, ``unguarded-output``.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drivetrain.errors import BadInput
from drivetrain.training import static_rules as rules

_BEFORE, _LOOP, _AFTER, _UNREACHED = "before", "loop", "after", "unreached"
_MEMORY = "memory"
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_EXITS = (ast.Return, ast.Continue, ast.Break, ast.Raise)


@dataclass(frozen=True, order=True)
class Finding:
    """One line of a script that would go wrong in a move, why, and what to write instead."""

    line: int
    code: str
    message: str
    remedy: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def findings(path: str | os.PathLike[str]) -> list[Finding]:
    """All findings in a script, by line; at most one of each code on a line.

    Raises BadInput when the file cannot be read or is not Python.
    """
    file = Path(path)
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except OSError as error:
        raise BadInput(f"cannot read the script {file}: {error.strerror}") from error
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise BadInput(f"{file}, line {line}: not valid Python: {error}") from error
    walk = _Walk(tree)
    walk.file()
    return sorted(walk.found.values())


class _Walk:
    def __init__(self, tree: ast.Module) -> None:
        self.found: dict[tuple[int, str], Finding] = {}
        self._tree = tree
        self._names = rules.Names(tree)
        self._sets = rules.Sets(tree, self._names)
        nodes = list(ast.walk(tree))
        self._runs = self._named(nodes, self._makes_a_job)
        self._owners = self._named(nodes, self._says_owner)
        # By the name it is called under: f, Class (its __init__), Class.method, object.method.
        self._functions: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = {}
        for node in nodes:
            if isinstance(node, _FUNCTIONS):
                self._functions.setdefault(node.name, node)
            elif isinstance(node, ast.ClassDef):
                for part in node.body:
                    if isinstance(part, _FUNCTIONS):
                        suffix = "" if part.name == "__init__" else f".{part.name}"
                        self._functions[f"{node.name}{suffix}"] = part
                        self._functions[f"self.{part.name}"] = part
        self._classes = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
        self._objects: dict[str, str] = {}
        self._phase = _BEFORE
        self._loops = 0
        self._handles: dict[str, str] = {}  # an open file's name -> the phase it was opened in
        self._entered: set[tuple[int, bool, str]] = set()
        self._reached: set[int] = set()

    def file(self) -> None:
        self._block(self._tree.body, guarded=False)
        self._phase = _UNREACHED
        for node in ast.walk(self._tree):  # called by others: a data set's __getitem__, hooks
            if isinstance(node, _FUNCTIONS) and id(node) not in self._reached:
                self._block(node.body, guarded=False)
        if not self._loops:
            self._add(
                self._tree,
                "no-loop",
                "no loop over a TrainingJob was found in this file",
                "write `run = drivetrain.TrainingJob(...)` and `for step in run:`",
            )
        for node in ast.walk(self._tree):
            if rules.hard_coded_device(node, self._names):
                self._add(
                    node,
                    "hard-coded-device",
                    "names one vendor's device; on a target of another kind this fails",
                    "TrainingJob places models and batches; drivetrain.device_for_this_job() is "
                    "the device for everything else",
                )
            if self._sets.order_used(node):
                self._add(
                    node,
                    "set-order",
                    "takes the order of a set, which differs between two processes",
                    "sorted(...) it first",
                )

    def _named(self, nodes: list[ast.AST], fits: Callable[[ast.AST], bool]) -> set[str]:
        found: set[str] = set()
        for node in nodes:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if fits(node.value):
                    found.update(filter(None, map(self._names.dotted, targets)))
        return found

    def _makes_a_job(self, value: ast.AST) -> bool:
        return (
            isinstance(value, ast.Call)
            and self._names.dotted(value.func).rpartition(".")[2] == "TrainingJob"
        )

    # -- statements, in the order of execution --------------------------------------------

    def _block(self, body: list[ast.stmt], *, guarded: bool) -> None:
        for statement in body:
            guarded = self._statement(statement, guarded) or guarded

    def _statement(self, node: ast.stmt, guarded: bool) -> bool:
        """Walk one statement; true when only the owner gets past it."""
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            for outer in [*node.decorator_list, *getattr(node, "bases", [])]:
                self._expression(outer, guarded)
            if isinstance(node, ast.ClassDef):
                inner = [part for part in node.body if not isinstance(part, _FUNCTIONS)]
                self._block(inner, guarded=guarded)
            return False
        if isinstance(node, ast.If):
            self._expression(node.test, guarded)
            self._block(node.body, guarded=guarded or self._only_owner(node.test, true=True))
            others = self._only_owner(node.test, true=False)
            self._block(node.orelse, guarded=guarded or others)
            return others and bool(node.body) and isinstance(node.body[-1], _EXITS)
        if isinstance(node, (ast.For, ast.AsyncFor)):
            self._expression(node.iter, guarded)
            self._loop(node, guarded)
            return False
        if isinstance(node, (ast.With, ast.AsyncWith)):
            for item in node.items:
                self._expression(item.context_expr, guarded)
                self._remember_handle(item.optional_vars, item.context_expr)
            self._block(node.body, guarded=guarded)
            return False
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._remember_handle(target, node.value)
                if self._class_of(node.value):
                    self._objects[self._names.dotted(target)] = self._class_of(node.value)
        for _, value in ast.iter_fields(node):
            parts = value if isinstance(value, list) else [value]
            self._block([part for part in parts if isinstance(part, ast.stmt)], guarded=guarded)
            for part in parts:
                if isinstance(part, (ast.ExceptHandler, ast.match_case)):
                    self._block(part.body, guarded=guarded)
                elif isinstance(part, ast.expr):
                    self._expression(part, guarded)
        return False

    def _loop(self, node: ast.For | ast.AsyncFor, guarded: bool) -> None:
        if not self._is_the_loop(node):
            self._block([*node.body, *node.orelse], guarded=guarded)
            return
        self._loops += 1
        before, self._phase = self._phase, _LOOP
        self._block(node.body, guarded=guarded)
        self._phase = _UNREACHED if before == _UNREACHED else _AFTER
        self._block(node.orelse, guarded=guarded)

    def _is_the_loop(self, node: ast.For | ast.AsyncFor) -> bool:
        """True for ``for step in run``, also as ``tqdm(run)``, and for ``with step as batch``."""
        for part in ast.walk(node.iter):
            if self._makes_a_job(part) or self._names.dotted(part) in self._runs:
                return True
        enters = (
            self._names.dotted(item.context_expr)
            for part in node.body
            if isinstance(part, ast.With)
            for item in part.items
        )
        return isinstance(node.target, ast.Name) and node.target.id in enters

    # -- expressions ----------------------------------------------------------------------

    def _expression(self, node: ast.AST, guarded: bool) -> None:
        if isinstance(node, ast.IfExp):
            self._expression(node.test, guarded)
            self._expression(node.body, guarded or self._only_owner(node.test, true=True))
            self._expression(node.orelse, guarded or self._only_owner(node.test, true=False))
            return
        if isinstance(node, ast.BoolOp):
            for value in node.values:
                self._expression(value, guarded)
                guarded |= self._only_owner(value, true=isinstance(node.op, ast.And))
            return
        if isinstance(node, ast.Call):
            once = isinstance(node.func, ast.Attribute) and node.func.attr == "once"
            for part in (*node.args, *(k.value for k in node.keywords)):
                self._expression(part, guarded or once)
                if once:
                    self._follow(self._names.dotted(part), True)
            self._expression(node.func, guarded)
            self._call(node, guarded)
            called = self._names.dotted(node.func)
            if isinstance(node.func, ast.Attribute):
                owner = self._class_of(node.func.value)
                called = f"{owner}.{node.func.attr}" if owner else called
            self._follow(called, guarded)
            return
        for child in ast.iter_child_nodes(node):
            self._expression(child, guarded)

    def _follow(self, name: str, guarded: bool) -> None:
        """Into a function of this file, once for each phase and guard."""
        function = self._functions.get(name)
        if function is None or (id(function), guarded, self._phase) in self._entered:
            return
        self._entered.add((id(function), guarded, self._phase))
        self._reached.add(id(function))
        self._block(function.body, guarded=guarded)

    def _class_of(self, value: ast.AST) -> str:
        """The class of this file that a value is an object of, as far as can be seen."""
        if isinstance(value, ast.Call):
            called = self._names.dotted(value.func)
            return called if called in self._classes else ""
        return self._objects.get(self._names.dotted(value), "")

    def _says_owner(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and node.attr == "owner"

    def _only_owner(self, test: ast.expr, *, true: bool) -> bool:
        """True when the test's being true (or false) means that this copy owns the job."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return self._only_owner(test.operand, true=not true)
        if isinstance(test, ast.BoolOp):
            parts = [self._only_owner(value, true=true) for value in test.values]
            return any(parts) if isinstance(test.op, ast.And) == true else all(parts)
        return true and (self._says_owner(test) or self._names.dotted(test) in self._owners)

    # -- calls ----------------------------------------------------------------------------

    def _call(self, node: ast.Call, guarded: bool) -> None:
        if guarded or self._phase == _AFTER:
            return
        entropy = rules.unseeded_entropy(node, self._names)
        if entropy:
            self._add(
                node,
                "unseeded",
                f"{entropy} gives each copy of the script something else",
                "give it a fixed seed, or keep one result for the whole job: run.once(...)",
            )
        if self._phase == _BEFORE:
            self._before_the_loop(node)
        elif self._phase == _LOOP:
            self._in_the_loop(node)

    def _before_the_loop(self, node: ast.Call) -> None:
        mode = rules.write_mode(node, self._names)
        saved = rules.saves(node, self._names)
        if any(handle in self._handles for handle in rules.written_handle(node, self._names)):
            saved = ""  # named where it was opened, or kept in memory
        if saved or any(letter in mode for letter in "wx"):
            how = saved or ("refuses a file that exists" if "x" in mode else f"mode {mode!r}")
            self._add(
                node,
                "truncates",
                f"opens a file anew ({how}) before the loop: a second copy of the script empties "
                "what the first one wrote",
                "guard it with `if run.owner:`, do it in run.once(...), or append",
            )
        deleted = rules.deletes(node, self._names)
        if deleted:
            self._add(
                node,
                "deletes",
                f"{deleted} before the loop: a second copy of the script removes what the first "
                "one uses",
                "do it in run.once(...)",
            )
        self._binding(node)

    def _in_the_loop(self, node: ast.Call) -> None:
        mode = rules.write_mode(node, self._names)
        what = rules.saves(node, self._names) or rules.deletes(node, self._names)
        if mode:
            what = f"a file opened with mode {mode!r}"
        for handle in rules.written_handle(node, self._names):
            opened = self._handles.get(handle)
            if opened in {_LOOP, _MEMORY}:
                what = ""  # named where it was opened, or kept in memory
            elif opened is not None:
                what = f"writing to {handle}"
        if what:
            self._add(
                node,
                "unguarded-output",
                f"{what} in the loop: warm-up steps and copies that do not own the job do it too",
                "guard it with `if run.owner:`, or use step.log(...)",
            )
        self._binding(node)

    def _binding(self, node: ast.Call) -> None:
        bound = rules.binds(node, self._names)
        if bound:
            self._add(
                node,
                "binds",
                f"{bound} takes a port that the other copy of the script holds",
                "guard it with `if run.owner:`, or take a free port",
            )

    def _remember_handle(self, target: ast.AST | None, value: ast.expr) -> None:
        name = self._names.dotted(target) if target is not None else ""
        opens = any(
            isinstance(part, ast.Call) and rules.write_mode(part, self._names)
            for part in ast.walk(value)
        )
        if name and opens:
            self._handles[name] = self._phase
        elif name and isinstance(value, ast.Call):
            called = self._names.dotted(value.func)
            if called in {"io.BytesIO", "io.StringIO"}:
                self._handles[name] = _MEMORY

    def _add(self, node: ast.AST, code: str, message: str, remedy: str) -> None:
        # A file has no line of its own (1), nor has a function's list of arguments (its first's).
        inner = (getattr(part, "lineno", 0) for part in ast.walk(node))
        line = 1 if node is self._tree else next(filter(None, inner), 1)
        self.found.setdefault((line, code), Finding(line, code, message, remedy))

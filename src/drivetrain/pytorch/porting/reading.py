"""One file read in order: which lines are one vendor's, and which of them ask before they are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from drivetrain.pytorch.porting import rules
from drivetrain.pytorch.porting.names import Names, text_of
from drivetrain.pytorch.porting.rules import Tie

__all__ = ["Finding", "needed_devices", "read"]

_ASKS = re.compile(
    r"torch\.(cuda|xpu|mps|npu|mlu|hpu)\.(is_available|device_count|is_bf16_supported)$"
    r"|torch\.backends\.mps\.is_available$|torch\.distributed\.is_(nccl|xccl)_available$"
    r"|torch\.version\.(cuda|hip|xpu)$"
)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_LEAVES = (ast.Return, ast.Raise, ast.Continue, ast.Break)
_ABSENT = {"ImportError", "ModuleNotFoundError", "AttributeError", "FileNotFoundError"}
_BROAD = {"Exception", "BaseException", "RuntimeError", "AssertionError", "OSError"}
_BROAD |= {"NotImplementedError", "subprocess.CalledProcessError", "subprocess.SubprocessError"}
_SHORT = 3
"""Statements of a ``try`` that is about one thing."""
_LEAVING_CALLS = {"exit", "quit", "sys.exit", "os._exit"}


@dataclass(frozen=True, order=True)
class Finding:
    """One line that ties a program to a vendor."""

    path: str
    line: int
    code: str
    """``device``, ``device-method``, ``device-module``, ``device-test``, ``capability-test``,
    ``collectives``, ``import``, ``extension``, ``kernel``, ``fp8-switch``, ``tf32-switch``,
    ``cuda-switch``, ``visible-devices``, ``tuning``, ``vendor-tool``, ``cuda-source``."""
    vendor: str
    """Whose hardware it names."""
    effect: Literal["fails", "skips", "differs"]
    """Elsewhere the line fails; or it asks first, and the device there is not used; or it runs, and
    does nothing or something else."""
    text: str
    """The words of the program."""
    portable: str
    """What to write instead."""
    device_type: str = ""
    """torch's kind of device that the line cannot do without; empty when it is not the line's."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def read(tree: ast.Module, path: str) -> list[Finding]:
    """The findings of one parsed file, by line; one of each code and text on a line."""
    reader = _Reader(tree, path)
    reader.block(tree.body, asked=False)
    return sorted(reader.found.values())


def needed_devices(findings: list[Finding]) -> frozenset[str]:
    """Kinds of torch devices that the program names without asking whether they are there."""
    return frozenset(f.device_type for f in findings if f.effect == "fails" and f.device_type)


class _Reader:
    def __init__(self, tree: ast.Module, path: str) -> None:
        self.found: dict[tuple[int, str, str], Finding] = {}
        self._path = path
        nodes = list(ast.walk(tree))
        self._names = Names(nodes)
        self._flags: frozenset[str] = frozenset()
        self._flags = frozenset(self._named_after_asking(nodes))

    def _named_after_asking(self, nodes: list[ast.AST]) -> Iterator[str]:
        """Names that hold whether a device is there: ``use_cuda = torch.cuda.is_available()``."""
        for node in nodes:
            if isinstance(node, ast.Assign) and self._asks(node.value):
                for target in node.targets:
                    name = self._names.dotted(target)
                    # device = "cuda" if ... else "cpu" holds a device, and is no answer.
                    if name and not isinstance(node.value, ast.IfExp):
                        yield name

    # -- what asks ----------------------------------------------------------------------------

    def _asks(self, test: ast.AST) -> bool:
        """True when a test looks whether a vendor's device is there."""
        for node in ast.walk(test):
            dotted = self._names.dotted(node)
            if dotted and (_ASKS.search(dotted) or dotted in self._flags):
                return True
            if isinstance(node, ast.Attribute) and node.attr in ("is_cuda", "is_xpu"):
                return True
            if isinstance(node, ast.Compare) and any(map(_is_device_type, ast.walk(node))):
                return True
            if isinstance(node, ast.Call):
                called = self._names.dotted(node.func)
                of = self._names.dotted(node.args[0]) if node.args else ""
                if called == "importlib.util.find_spec" or (
                    called == "hasattr" and of.partition(".")[0] == "torch"
                ):
                    return True
        return False

    def _denied(self, test: ast.expr) -> bool:
        """True for ``not torch.cuda.is_available()`` and its kin: the body is for the others."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return self._asks(test.operand)
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            (op,), (right,) = test.ops, test.comparators
            none = isinstance(right, ast.Constant) and right.value in (None, 0, 1)
            few = none and isinstance(op, (ast.Eq, ast.Is, ast.Lt, ast.LtE))
            other = isinstance(op, ast.NotEq) and not none
            return (few or other) and self._asks(test)
        return False

    # -- statements, in order -----------------------------------------------------------------

    def block(self, body: list[ast.stmt], *, asked: bool) -> None:
        for statement in body:
            asked = self._statement(statement, asked) or asked

    def _statement(self, node: ast.stmt, asked: bool) -> bool:
        """Read one statement; true when only a program that has asked gets past it."""
        if isinstance(node, ast.If):
            self._expression(node.test, asked)
            asks, denied = self._asks(node.test), self._denied(node.test)
            self.block(node.body, asked=asked or (asks and not denied))
            self.block(node.orelse, asked=asked or denied)
            if denied and self._leaves_the_program(node.body):
                self._demand(node.test, asked)
            # `if not available: return` guards what follows; `raise` and `exit` mean: needed.
            return denied and bool(node.body) and isinstance(node.body[-1], _LEAVES[:1])
        if isinstance(node, ast.Assert) and self._asks(node.test) and not self._denied(node.test):
            self._demand(node.test, asked)
        if isinstance(node, ast.Try):
            tolerant = any(self._tolerates(each, len(node.body)) for each in node.handlers)
            self.block(node.body, asked=asked or tolerant)
            for handler in node.handlers:
                self.block(handler.body, asked=asked)
            self.block([*node.orelse, *node.finalbody], asked=asked or tolerant)
            return False
        for tie in rules.ties_of_statement(node, self._names):
            self._add(node, tie, asked)
        for _, value in ast.iter_fields(node):
            parts = value if isinstance(value, list) else [value]
            self.block([part for part in parts if isinstance(part, ast.stmt)], asked=asked)
            for part in parts:
                if isinstance(part, ast.stmt):
                    continue
                if isinstance(part, ast.match_case):
                    self.block(part.body, asked=asked)
                elif isinstance(part, ast.AST):
                    self._expression(part, asked)
        return False

    def _leaves_the_program(self, body: list[ast.stmt]) -> bool:
        last = body[-1] if body else None
        if isinstance(last, ast.Expr) and isinstance(last.value, ast.Call):
            return self._names.dotted(last.value.func) in _LEAVING_CALLS
        return isinstance(last, ast.Raise)

    def _demand(self, test: ast.expr, asked: bool) -> None:
        tie = rules.demand(test, self._names)
        if tie is not None:
            self._add(test, tie, asked)

    def _tolerates(self, handler: ast.ExceptHandler, length: int) -> bool:
        """True for ``except ImportError`` and its kin, that do not raise again. A long body under
        ``except Exception`` is a program under its last guard, which asks nothing."""
        kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
        names = {"Exception" if k is None else self._names.dotted(k) for k in kinds}
        if not names & _ABSENT and not (names & _BROAD and length <= _SHORT):
            return False
        if any(isinstance(part, ast.Raise) for part in ast.walk(handler)):
            return False
        calls = (part for part in ast.walk(handler) if isinstance(part, ast.Call))
        return not any(self._names.dotted(call.func) in _LEAVING_CALLS for call in calls)

    # -- expressions --------------------------------------------------------------------------

    def _expression(self, node: ast.AST, asked: bool) -> None:
        if isinstance(node, ast.IfExp):
            asks, denied = self._asks(node.test), self._denied(node.test)
            self._expression(node.test, asked)
            self._expression(node.body, asked or (asks and not denied))
            self._expression(node.orelse, asked or denied)
            return
        if isinstance(node, ast.BoolOp):
            for value in node.values:
                self._expression(value, asked)
                asked = asked or (
                    self._denied(value) if isinstance(node.op, ast.Or) else self._asks(value)
                )
            return
        skipped: set[int] = set()
        for tie in rules.ties_of_expression(node, self._names):
            if tie.code:
                self._add(node, tie, asked)
            skipped.update(id(part) for part in tie.covers)
        for child in ast.iter_child_nodes(node):
            if id(child) not in skipped:
                self._expression(child, asked)

    def _add(self, node: ast.AST, tie: Tie, asked: bool) -> None:
        line = next(filter(None, (getattr(part, "lineno", 0) for part in ast.walk(node))), 1)
        effect = "skips" if asked and tie.effect == "fails" else tie.effect
        finding = Finding(
            self._path, line, tie.code, tie.vendor, effect, tie.text, tie.portable, tie.device_type
        )
        self.found.setdefault((line, tie.code, tie.text), finding)


def _is_device_type(node: ast.AST) -> bool:
    return rules.device_type(text_of(node)) not in ("", "cpu")

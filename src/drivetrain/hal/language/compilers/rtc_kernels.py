"""The kernels of a CUDA C source that another compiler reads: names, and parameters where known.

A scan of the words finds them, whatever else the source has in it; the front end tells their
parameters where it can read them. Neither refuses anything: that is for the compiler to do.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import takewhile
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from drivetrain.errors import CompileError, DrivetrainError
from drivetrain.hal.language.facts import KernelFacts, Param
from drivetrain.hal.language.preprocess import preprocess
from drivetrain.hal.language.tokens import Token, scan

if TYPE_CHECKING:
    from drivetrain.hal.language.check import Bound, Unit
    from drivetrain.hal.language.scope import Template

__all__ = ["Written", "entry_sizes", "written_kernels"]

_WAITS = re.compile(r"__syncthreads\w*|__syncwarp|__barrier_sync\w*|sync|arrive_and_wait")


@dataclass
class Written:
    """A kernel as it is written; the compiler is asked for its symbol by ``expression``."""

    expression: str
    name: str
    """As the user calls it."""
    facts: KernelFacts


def written_kernels(text: str, defines: Mapping[str, str]) -> list[Written]:
    """The kernels of ``text``; those that cannot be made out are left away."""
    try:
        plain = preprocess(text, defines, any_include=True)
        found = _Scan(scan(plain))
    except (CompileError, RecursionError):
        return []
    unit = _unit(plain)
    out: list[Written] = []
    for kernel in found.kernels:
        reached = found.reached(kernel.base)
        facts = KernelFacts(
            kernel.expression,
            None,
            dynamic_shared=_EXTERN_SHARED in reached,
            barriers=any(_WAITS.fullmatch(word) for word in reached),
        )
        name = kernel.expression
        header = _header(unit, kernel)
        if header is not None:
            facts = replace(facts, params=header.params, launch_bounds=header.bounds)
            if header.name not in [other.name for other in out]:
                name = header.name
        out.append(Written(kernel.expression, name, facts))
    return out


# -- what the front end tells ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    name: str
    params: tuple[Param, ...]
    bounds: int


def _unit(plain: str) -> Unit:
    """The source as far as the front end can read it; without its parser, what CUDA C has."""
    from drivetrain.hal.language.check import Unit
    from drivetrain.hal.language.syntax import parse

    empty: Any = SimpleNamespace(children=())
    try:
        return Unit(parse(plain).root_node, lenient=True)
    except (DrivetrainError, RecursionError):
        return Unit(empty, lenient=True)


def _header(unit: Unit, kernel: _Kernel) -> _Header | None:
    from drivetrain.hal.language.expressions import Reader
    from drivetrain.hal.language.scope import Cursor, Overloads

    try:
        if not kernel.arguments:
            template = _written(kernel)
            return _filled(unit, template, (), kernel.expression)
        known = unit.scope.find(kernel.base)
        if kernel.path or not isinstance(known, Overloads):
            return None
        line = kernel.arguments[0].line
        cursor = Cursor(list(kernel.arguments), line)
        explicit = Reader(cursor, unit.scope, unit).template_arguments()
        for template in known.templates:
            bound = unit.deduce(template, explicit, None, line) if template.kernel else None
            if bound is not None and len(bound) == len(template.params) > 0:
                return _filled(unit, template, bound, template.name)
    except (DrivetrainError, RecursionError):
        pass  # a part of the language that it does not know
    return None


def _written(kernel: _Kernel) -> Template:
    from drivetrain.hal.language.scope import Template

    head = kernel.head
    words = [token.text for token in head]
    bounds: tuple[Token, ...] = ()
    if "__launch_bounds__" in words:
        start = words.index("__launch_bounds__") + 2
        bounds = tuple(takewhile(lambda token: token.text not in (",", ")"), head[start:]))
    return Template(kernel.base, head[0].line, head, None, (), True, bounds)


def _filled(unit: Unit, template: Template, bound: Bound, name: str) -> _Header:
    from drivetrain.hal.language.signature import kernel_params
    from drivetrain.hal.language.tree import Function, Var
    from drivetrain.hal.language.types import shown

    header = unit.header(template, bound)
    words = ",".join(str(v) if isinstance(v, int) else shown(v) for v in bound)
    variables = [Var(p.name or f"arg{i}", p.type, p.line) for i, p in enumerate(header.params)]
    params = kernel_params(Function(template.name, template.line, variables, header.result))
    bounds = 0
    if template.launch_bounds:
        bounds = unit.constant_of(list(template.launch_bounds), header.scope)
    return _Header(name + (f"<{words}>" if bound else ""), params, bounds)


# -- the scan --------------------------------------------------------------------------------------

_EXTERN_SHARED = "extern __shared__"
_ATTRIBUTES = ("__launch_bounds__", "__attribute__", "__align__", "alignas", "__cluster_dims__")


@dataclass(frozen=True)
class _Kernel:
    expression: str
    base: str
    path: str = field(default="", compare=False)
    """``a::b::`` of the namespaces around it."""
    arguments: tuple[Token, ...] = field(default=(), compare=False)
    """Of an instance of a template: ``<float, 4>``."""
    head: tuple[Token, ...] = field(default=(), compare=False)
    """Its words before the body."""


@dataclass
class _Scan:
    """Goes through namespaces and ``extern "C"`` blocks, and looks at what stands in them."""

    tokens: list[Token]
    kernels: list[_Kernel] = field(default_factory=list)
    bodies: dict[str, set[str]] = field(default_factory=dict)
    """The words in each function's body; under "" those that stand in none."""

    def __post_init__(self) -> None:
        self.bodies[""] = set()
        self._block(0, ())

    def reached(self, name: str) -> set[str]:
        """The words of a function and of all that it may call."""
        out = set(self.bodies[""])
        work, seen = [name], set()
        while work:
            here = work.pop()
            if here in seen or here not in self.bodies:
                continue
            seen.add(here)
            out |= self.bodies[here]
            work += self.bodies[here] & self.bodies.keys()
        return out

    def _block(self, at: int, inside: tuple[str, ...]) -> int:
        """Read declarations from ``at`` to the end of the block; the place after it."""
        scopes: list[tuple[str, ...]] = [inside]
        start = at
        while at < len(self.tokens):
            word = self.tokens[at].text
            if word == "}":
                if len(scopes) > 1:
                    scopes.pop()
                at += 1
                start = at
            elif word == ";":
                self._declared(self.tokens[start:at], scopes[-1])
                at += 1
                start = at
            elif word == "{":
                head = self.tokens[start:at]
                words = [token.text for token in head]
                if words[:1] == ["extern"] and len(words) == 2:
                    scopes.append(scopes[-1])
                    at += 1
                    start = at
                elif "namespace" in words[:2]:
                    names = [t.text for t in head if t.kind == "name"]
                    names = [n for n in names if n not in ("inline", "namespace")]
                    scopes.append((*scopes[-1], *names))
                    at += 1
                    start = at
                else:
                    end = self._end(at)
                    body = self.tokens[at:end]
                    at = end
                    if self._defined(head, body, scopes[-1]):
                        start = at
            else:
                at += 1
        return at

    def _end(self, at: int) -> int:
        depth = 0
        while at < len(self.tokens):
            depth += {"{": 1, "}": -1}.get(self.tokens[at].text, 0)
            at += 1
            if depth == 0:
                break
        return at

    def _defined(self, head: list[Token], body: list[Token], scope: tuple[str, ...]) -> bool:
        """Note a function with its body; whether it was one."""
        brackets = _parameters_at(head)
        if brackets is None:
            return False
        place = _name_at(head, brackets)
        if place is None:
            return True  # an operator
        name, after = head[place].text, place + 1
        self.bodies.setdefault(name, set()).update(_words(body))
        words = [token.text for token in head]
        if "__global__" not in words:
            return True
        if words[0] == "template" and words[1:3] != ["<", ">"]:
            return True  # a template: its instances are named elsewhere
        arguments = head[after : _closing(head, after)] if words[0] == "template" else []
        self._note(scope, name, arguments, head)
        return True

    def _declared(self, tokens: list[Token], scope: tuple[str, ...]) -> None:
        words = [token.text for token in tokens]
        self.bodies[""] |= _words(tokens) & {_EXTERN_SHARED}
        if words[:1] != ["template"] or words[1:2] == ["<"] or "__global__" not in words:
            return
        brackets = _parameters_at(tokens)
        place = None if brackets is None else _name_at(tokens, brackets)
        if place is None or words[place + 1 : place + 2] != ["<"]:
            return
        arguments = tokens[place + 1 : _closing(tokens, place + 1)]
        before: list[str] = []
        while place >= 2 and words[place - 1] == "::":
            before.insert(0, words[place - 2])
            place -= 2
        self._note((*scope, *before), words[place + 2 * len(before)], arguments, tokens)

    def _note(
        self, scope: tuple[str, ...], name: str, arguments: list[Token], head: list[Token]
    ) -> None:
        path = "".join(f"{part}::" for part in scope)
        expression = path + name + _joined(arguments)
        kernel = _Kernel(expression, name, path, tuple(arguments), tuple(head))
        if kernel not in self.kernels:
            self.kernels.append(kernel)


def _words(tokens: list[Token]) -> set[str]:
    found = {token.text for token in tokens if token.kind == "name"}
    if {"extern", "__shared__"} <= found:
        found.add(_EXTERN_SHARED)
    return found


def _parameters_at(head: list[Token]) -> int | None:
    """Where the bracket before a function's parameters stands; None when it is no function."""
    depth = angles = 0
    for at, token in enumerate(head):
        if depth == 0 and angles == 0 and at:
            if token.text == "=":
                return None
            if token.text == "(" and head[at - 1].text not in _ATTRIBUTES:
                return at
        if depth == 0 and token.text in ("<", ">", ">>"):
            angles = max(0, angles + {"<": 1, ">": -1, ">>": -2}[token.text])
        depth += {"(": 1, ")": -1}.get(token.text, 0)
    return None


def _name_at(head: list[Token], brackets: int) -> int | None:
    """Where the name before ``(`` or ``<...>(`` stands."""
    back = brackets - 1
    if head[back].text in (">", ">>"):
        level = 0
        while back >= 0:
            level += {">": 1, ">>": 2, "<": -1}.get(head[back].text, 0)
            back -= 1
            if level <= 0:
                break
    return back if back >= 0 and head[back].kind == "name" else None


def _closing(tokens: list[Token], at: int) -> int:
    """The place after the ``>`` that belongs to the ``<`` at ``at``."""
    level = 0
    for here in range(at, len(tokens)):
        level += {"<": 1, ">": -1, ">>": -2}.get(tokens[here].text, 0)
        if level <= 0:
            return here + 1
    return len(tokens)


def _joined(tokens: list[Token]) -> str:
    """``<float,unsigned int>``: blanks only where two words would become one."""
    out = ""
    for token in tokens:
        apart = out[-1:].isalnum() and (token.text[0].isalnum() or token.text[0] == "_")
        out += (" " if apart else "") + token.text
    return out


# -- what PTX tells --------------------------------------------------------------------------------

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+\d+\s+)?\.([a-z]+)(\d+)\b[^,]*?(?:\[(\d+)\])?\s*(?:,|$)"
)


def entry_sizes(ptx: str) -> dict[str, list[int]]:
    """The bytes of each parameter of each kernel in PTX."""
    out: dict[str, list[int]] = {}
    for symbol, params in _ENTRY.findall(ptx):
        sizes = []
        for _, bits, count in _PARAM.findall(params or ""):
            sizes.append(int(bits) // 8 * (int(count) if count else 1))
        out[symbol] = sizes
    return out

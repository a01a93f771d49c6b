"""A Python function as text that stands alone: what it names comes along, nothing else does.

The text is a module. It holds the function, the functions that it calls, and the constants and
Triton names that they read, each under one name. It is made here, where the function lives, and
read by a compiler in another process.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import linecache
import math
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import Any

from drivetrain.errors import BadInput

__all__ = ["FunctionText", "function_text"]

_OWN = "_drivetrain_triton"
"""The name of ``triton`` in the text; a kernel's own names cannot be it."""
_HEAD = ("from __future__ import annotations", "", f"import triton as {_OWN}")
_WRAPPED = ("JITFunction", "InterpretedFunction", "ConstexprFunction")
_MOST_THINGS = 1000


@dataclass(frozen=True)
class FunctionText:
    """A module's text with one function, and all that it needs, in it."""

    name: str
    """The function's."""
    entry: str
    """Its name in the text: another one where its own means something else there."""
    text: str
    parameters: tuple[str, ...]
    lines: tuple[int, ...]
    """``lines[i]`` is the line of the function's file that line ``i + 1`` of the text came from;
    0 for what is ours or of another file."""


def function_text(fn: Callable[..., Any]) -> FunctionText:
    """The text of a Triton function, decorated or not. Raises BadInput for what it cannot hold."""
    read = _read(fn)
    arguments = read.tree.args
    if arguments.vararg or arguments.kwarg:
        raise BadInput(f"{read.name}: a kernel takes no *args and no **kwargs")
    module = _Module(read.file)
    entry, out = module.finish(module.add(read))
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    parameters = tuple(argument.arg for argument in every)
    text = "".join(f"{line}\n" for line, _ in out)
    return FunctionText(read.name, entry, text, parameters, tuple(line for _, line in out))


@dataclass
class _Thing:
    """A function or a value of the module."""

    name: str
    """As it is first called."""
    shadowed: set[str] = field(default_factory=set)
    """Names that are local to functions that use it."""


@dataclass(frozen=True)
class _Read:
    """One function as it is written."""

    name: str
    function: FunctionType
    decorator: str
    text: tuple[str, ...]
    first: int
    """The line of ``text[0]`` in the file."""
    file: str
    tree: ast.FunctionDef


def _is_triton(module: object) -> bool:
    return isinstance(module, str) and (module == "triton" or module.startswith("triton."))


def _unwrapped(fn: object) -> tuple[object, str]:
    """The Python function inside ``fn``, and the decorator that it has or gets."""
    kind = type(fn)
    if not _is_triton(kind.__module__):
        return fn, f"@{_OWN}.jit"
    if kind.__name__ not in _WRAPPED:
        raise BadInput(
            f"a {kind.__name__} is no kernel: give the function under it; alternatives are "
            "hal.Variants"
        )
    inner = getattr(fn, "fn", None)
    if kind.__name__ == "ConstexprFunction":
        return inner, f"@{_OWN}.constexpr_function"
    return inner, f"@{_OWN}.jit" + ("(noinline=True)" if getattr(fn, "noinline", False) else "")


def _read(fn: object) -> _Read:
    inner, decorator = _unwrapped(fn)
    if not isinstance(inner, FunctionType):
        raise BadInput(f"a {type(fn).__name__} is no kernel; give a function")
    name = inner.__name__
    if name == "<lambda>":
        raise BadInput("a lambda is no kernel; give a function made by def")
    if inner.__code__.co_freevars:
        raise BadInput(
            f"{name} uses {', '.join(inner.__code__.co_freevars)} of the function around it; a "
            "kernel may name its parameters and its module's constants and functions"
        )
    linecache.checkcache(inner.__code__.co_filename)
    try:
        lines, first = inspect.getsourcelines(inner)
    except (OSError, TypeError) as error:
        raise BadInput(
            f"the source of {name} is not known ({error}); define it in a file"
        ) from None
    try:
        parsed = ast.parse(textwrap.dedent("".join(lines))).body
    except SyntaxError as error:
        raise BadInput(f"the source of {name} cannot be read: {error}") from None
    tree = parsed[0] if len(parsed) == 1 else None
    if not isinstance(tree, ast.FunctionDef) or not _same(tree, inner):
        raise BadInput(
            f"{inner.__code__.co_filename} no longer holds {name} as it was imported; start anew"
        )
    text = textwrap.dedent("".join(lines)).split("\n")[tree.lineno - 1 : tree.end_lineno]
    start = first + tree.lineno - 1
    tree = ast.increment_lineno(tree, 1 - tree.lineno)
    file = inner.__code__.co_filename
    return _Read(name, inner, decorator, tuple(text), start, file, tree)


def _same(tree: ast.FunctionDef, function: FunctionType) -> bool:
    """Whether the file's text is still the function's: parameters and the names that it uses.

    Not bytecode: pytest and debuggers change that.
    """
    bare = ast.FunctionDef(**{**dict(ast.iter_fields(tree)), "decorator_list": []})
    module = ast.fix_missing_locations(ast.Module([ast.copy_location(bare, tree)], []))
    made = compile(module, "<kernel>", "exec", dont_inherit=True)
    code = next(
        (c for c in made.co_consts if isinstance(c, CodeType) and c.co_name == tree.name), None
    )
    if code is None or tree.name != function.__name__:
        return False
    own = function.__code__
    count = code.co_argcount + code.co_kwonlyargcount
    return (
        code.co_varnames[:count] == own.co_varnames[:count]
        and set(code.co_names) <= {*own.co_names, *own.co_freevars, *own.co_cellvars}
        and {c for c in code.co_consts if isinstance(c, (int, float))}
        <= {c for c in own.co_consts if isinstance(c, (int, float))}
    )


class _Module:
    """The module in the making: one name for each thing.

    First everything is collected, each thing with the functions that use it; then each is named so
    that it is no local of a function that uses it; then the text is written.
    """

    def __init__(self, file: str) -> None:
        self._file = file
        self._reads: list[_Read] = []
        """A function stands after those that it names: their values are read as it is defined."""
        self._things: dict[object, _Thing] = {}
        """A function by its identity, a value by the text that makes it."""
        self._uses: dict[int, list[tuple[ast.Name, object]]] = {}

    def add(self, read: _Read) -> object:
        """What it is in the module; it and all that it names are there from then on."""
        key = id(read.function)
        if key in self._things:
            return key
        if len(self._things) >= _MOST_THINGS:
            raise BadInput(f"{read.name}: a kernel that names more than {_MOST_THINGS} things")
        self._things[key] = _Thing(read.name)
        uses = self._uses[key] = []
        names, local = _names(read.tree)
        for node in names:
            used = self._used(read, node.id, required=not isinstance(node, _Note))
            if used is not None:
                uses.append((node, used))
                self._things[used].shadowed |= local
        self._reads.append(read)
        return key

    def _used(self, read: _Read, name: str, *, required: bool) -> object | None:
        """The thing that ``name`` means in the function; None for a builtin."""
        scope = read.function.__globals__
        if name not in scope:
            if hasattr(builtins, name) or not required:
                return None
            raise BadInput(f"{read.name} uses {name!r}, which its module does not have")
        value = scope[name]
        if _is_users(value):
            return self.add(_read(value))
        text = _value_text(value)
        if text:
            self._things.setdefault(text, _Thing(name))
            return text
        if not required:
            return None
        raise BadInput(
            f"{read.name} uses {name!r}, a {type(value).__name__}; a kernel may name Triton's "
            "modules and functions, other such functions, numbers, strings, bools and tl.constexpr"
        )

    def finish(self, main: object) -> tuple[str, list[tuple[str, int]]]:
        """The name of the thing ``main``, and (text, the user's line) of each line."""
        taken = {_OWN, "annotations", *dir(builtins)}
        for thing in self._things.values():
            number, wanted = 1, thing.name
            while thing.name in taken or thing.name in thing.shadowed:
                number += 1
                thing.name = f"{wanted}_{number}"
            taken.add(thing.name)
        out = [(text, 0) for text in _HEAD]
        for key, thing in self._things.items():
            if isinstance(key, str):
                out.append((key.replace("\0", thing.name), 0))
        for read in self._reads:
            here = read.file == self._file
            out += [("", 0), ("", 0), (read.decorator, 0)]
            for index, line in enumerate(self._renamed(read)):
                out.append((line, read.first + index if here else 0))
        return self._things[main].name, out

    def _renamed(self, read: _Read) -> list[str]:
        key = id(read.function)
        text = list(read.text)
        places = {(node.lineno, node.col_offset, node.id): used for node, used in self._uses[key]}
        for (line, start, old), used in sorted(places.items(), reverse=True, key=lambda p: p[0]):
            data = text[line - 1].encode()
            end = start + len(old.encode())
            text[line - 1] = (data[:start] + self._things[used].name.encode() + data[end:]).decode()
        return [re.sub(r"^def\s+\w+", f"def {self._things[key].name}", text[0], count=1), *text[1:]]


def _is_users(value: object) -> bool:
    """Whether it is a function whose source is to come along; Triton's own are imported."""
    if type(value).__name__ in _WRAPPED and _is_triton(type(value).__module__):
        value = getattr(value, "fn", None)
    return isinstance(value, FunctionType) and not _is_triton(value.__module__)


def _value_text(value: object) -> str:
    """A statement that gives NUL the value of a module's name; empty when it may not have it."""
    if isinstance(value, ModuleType):
        return f"import {value.__name__} as \0" if _is_triton(value.__name__) else ""
    kind = type(value)
    if kind.__name__ == "constexpr" and _is_triton(kind.__module__):
        value = getattr(value, "value", None)
        kind = type(value)
    if kind.__name__ == "dtype" and _is_triton(kind.__module__):
        return f"\0 = {_OWN}.language.dtype({str(getattr(value, 'name', ''))!r})"
    if value is None or isinstance(value, (bool, int, str, float)):
        finite = not isinstance(value, float) or math.isfinite(value)
        word = repr(value) if finite else f"float({str(value)!r})"
        return f"\0 = {_OWN}.language.constexpr({word})"
    inner = getattr(value, "fn", value) if kind.__name__ in _WRAPPED else value
    module, name = getattr(inner, "__module__", None), getattr(inner, "__name__", None)
    if not _is_triton(module) or not isinstance(name, str) or not name.isidentifier():
        return ""
    known = getattr(sys.modules.get(str(module)), name, None)
    return f"from {module} import {name} as \0" if known is value else ""


class _Note(ast.Name):
    """A name in an annotation: it need not have a value."""


def _names(tree: ast.FunctionDef) -> tuple[list[ast.Name], set[str]]:
    """The names of its module that a function reads, in order, and its own."""
    every = list(ast.walk(tree.args))
    local = {node.arg for node in every if isinstance(node, ast.arg)}
    found: list[ast.Name] = []
    for statement in tree.body:
        for node in ast.walk(statement):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
                raise BadInput(f"{tree.name}: a kernel defines no functions and no classes")
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                found.append(node)
            elif isinstance(node, ast.Name):
                local.add(node.id)
    found = [node for node in found if node.id not in local]
    for default in (*tree.args.defaults, *tree.args.kw_defaults):
        if default is not None:
            found += [node for node in ast.walk(default) if isinstance(node, ast.Name)]
    notes = [node.annotation for node in every if isinstance(node, ast.arg)]
    for note in (*notes, tree.returns):
        for node in ast.walk(note) if note is not None else ():
            if isinstance(node, ast.Name):
                found.append(ast.copy_location(_Note(node.id, node.ctx), node))
    return found, local

"""The front end as one call: text of CUDA C in, checked program out."""

from __future__ import annotations

from typing import Any

from drivetrain.hal.language.check import Unit
from drivetrain.hal.language.options import Options
from drivetrain.hal.language.preprocess import preprocess
from drivetrain.hal.language.source import Source
from drivetrain.hal.language.syntax import check_errors, parse
from drivetrain.hal.language.tokens import wrong
from drivetrain.hal.language.tree import Function, Program, parts
from drivetrain.hal.language.types import Array, Pointer, Type

__all__ = ["program"]


def program(source: Source, options: Options) -> Program:
    """The checked program of a CUDA C source. Raises CompileError with the user's line."""
    text = preprocess(source.text, options.defines)
    tree = parse(text)
    check_errors(tree.root_node)
    made = Unit(tree.root_node).build()
    for function in (*made.functions, *made.kernels.values()):
        _refuse_depth(function)
    return made


DEEPEST = 240
"""Expressions, statements and pointers inside one another: what prints them calls itself."""


def _refuse_depth(function: Function) -> None:
    for kind in (function.result, *(var.type for var in function.params)):
        _refuse_deep_type(kind, function.line)
    stack: list[tuple[Any, int]] = [(function.body, 0)] if function.body is not None else []
    while stack:
        node, depth = stack.pop()
        if depth > DEEPEST:
            raise wrong(node.line, f"more than {DEEPEST} things inside one another: use variables")
        if hasattr(node, "type"):
            _refuse_deep_type(node.type, node.line)
        stack += [(part, depth + 1) for part in parts(node)]


def _refuse_deep_type(kind: Type, line: int) -> None:
    depth = 0
    while isinstance(kind, Pointer | Array):
        kind = kind.to if isinstance(kind, Pointer) else kind.of
        depth += 1
        if depth > 30:
            raise wrong(line, "pointers and arrays inside one another, more than 30 deep")

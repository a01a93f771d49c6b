"""The front end as one call: text of CUDA C in, checked program out."""

from __future__ import annotations

from drivetrain.hal.language.check import Unit
from drivetrain.hal.language.options import Options
from drivetrain.hal.language.preprocess import preprocess
from drivetrain.hal.language.source import Source
from drivetrain.hal.language.syntax import check_errors, parse
from drivetrain.hal.language.tree import Program

__all__ = ["program"]


def program(source: Source, options: Options) -> Program:
    """The checked program of a CUDA C source. Raises CompileError with the user's line."""
    text = preprocess(source.text, options.defines)
    tree = parse(text)
    check_errors(tree.root_node)
    return Unit(tree.root_node).build()

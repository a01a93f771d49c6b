"""The parse: tree-sitter's CUDA grammar gives functions and statements, errors name the line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain.errors import Unsupported
from drivetrain.hal.language.tokens import Token, scan, wrong

if TYPE_CHECKING:
    from tree_sitter import Node, Tree

__all__ = ["children", "line_of", "parse", "tokens_between", "tokens_of"]

MOST_BYTES = 4 << 20
"""Of the source after its macros."""
DEEPEST = 200
"""Statements and brackets inside one another: what reads them calls itself."""


def parse(text: str) -> Tree:
    """The tree. Raises CompileError with the first line that is not of the language."""
    try:
        import tree_sitter
        import tree_sitter_cuda
    except ImportError as missing:
        raise Unsupported(
            f"translating CUDA C needs tree-sitter and tree-sitter-cuda ({missing}): "
            "install drivetrain[kernels]",
            code="unsupported",
            op="compile",
        ) from missing
    data = text.encode()
    if len(data) > MOST_BYTES:
        raise wrong(1, f"the source has {len(data)} bytes after its macros, at most {MOST_BYTES}")
    parser: Any = tree_sitter.Parser(tree_sitter.Language(tree_sitter_cuda.language()))
    tree: Tree = parser.parse(data)
    depth = 0
    for token in scan(text):
        if token.kind == "op":
            depth += (token.text in "([{") - (token.text in ")]}")
        if depth > DEEPEST:
            raise wrong(token.line, f"more than {DEEPEST} brackets inside one another")
    return tree


def check_errors(node: Node) -> None:
    """Raise for the first part of the tree that the grammar did not take."""
    if not node.has_error:
        return
    stack = [node]
    while stack:
        here = stack.pop()
        if here.is_missing:
            raise wrong(line_of(here), f"{here.type!r} is missing")
        if here.is_error:
            text = (here.text or b"").decode(errors="replace").strip().splitlines()
            shown = text[0][:40] if text else ""
            if _assigns_before_a_comma(here):
                raise wrong(
                    line_of(here),
                    f"an assignment before a comma in brackets cannot be read, near {shown!r}: "
                    "give it brackets of its own, ((a = 1), b)",
                )
            raise wrong(line_of(here), f"this is not CUDA C: {shown!r}")
        stack.extend(child for child in reversed(here.children) if child.has_error)


def _assigns_before_a_comma(error: Node) -> bool:
    """``(a = 1, b)``: the grammar takes it for a fold over ``=``, and drops a part of it."""
    inside = error.parent
    if inside is None or inside.type not in ("comma_expression", "assignment_expression"):
        return False
    if inside.parent is None or inside.parent.type != "parenthesized_expression":
        return False
    before = [token.text for token in tokens_of(inside)]
    before = before[: before.index(",")] if "," in before else []
    return any(text.endswith("=") and text not in ("==", "!=", "<=", ">=") for text in before)


def line_of(node: Node) -> int:
    return int(node.start_point[0]) + 1


def children(node: Node) -> list[Node]:
    """All but comments."""
    return [child for child in node.children if child.type != "comment"]


def tokens_of(node: Node) -> list[Token]:
    return scan((node.text or b"").decode(), line_of(node))


def tokens_between(root: Node, first: Node, last: Node) -> list[Token]:
    """The tokens after one child of ``root`` and before another."""
    data = root.text or b""
    start = first.end_byte - root.start_byte
    end = last.start_byte - root.start_byte
    return scan(data[start:end].decode(), int(first.end_point[0]) + 1)

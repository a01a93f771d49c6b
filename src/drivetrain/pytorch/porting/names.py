"""What a file's names stand for: imports, and plain assignments of what was imported."""

from __future__ import annotations

import ast
from collections.abc import Sequence


class Names:
    """So that ``tc.synchronize`` is known as ``torch.cuda.synchronize``, however it is imported."""

    def __init__(self, nodes: Sequence[ast.AST]) -> None:
        self._aliases: dict[str, str] = {}
        others: dict[str, str] = {}
        for node in nodes:
            if isinstance(node, ast.Import):
                for name in node.names:
                    if name.asname:
                        self._aliases[name.asname] = name.name
                    else:
                        head = name.name.partition(".")[0]
                        self._aliases[head] = head
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for name in node.names:
                    self._aliases[name.asname or name.name] = f"{node.module}.{name.name}"
        for node in nodes:
            if isinstance(node, ast.Assign) and len(node.targets) == 1:
                (target,) = node.targets
                value = self.dotted(node.value)
                if isinstance(target, ast.Name) and value.startswith("torch."):
                    others[target.id] = value
        self._aliases = {**others, **self._aliases}
        self._heads = {value.partition(".")[0] for value in self._aliases.values()}

    def dotted(self, node: ast.AST | None) -> str:
        """``torch.cuda.synchronize`` for ``tc.synchronize``; "" for what has no name."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        parts.append(self._aliases.get(node.id, node.id))
        return ".".join(reversed(parts))

    def imported(self, dotted: str) -> bool:
        """True when the first word of a dotted name is a module that the file imports."""
        return dotted.partition(".")[0] in self._heads


def text_of(node: ast.AST | None) -> str:
    """A string literal's text, else ""."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return ""

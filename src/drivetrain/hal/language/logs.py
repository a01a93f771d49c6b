"""What compilers say, in the user's lines: ``NAME:LINE: message``."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["GENERATED", "explain", "first_error", "with_lines"]

GENERATED = "<drivetrain>"
"""The file that emitted code without a line of the user's belongs to."""

_LARGEST_LOG = 64 << 10
# kernel.cu(12): error: ... | kernel.cu:12:5: error: ... | <kernel>:12:5: error: ... |
# 12:5: error: ...
_PLACE = re.compile(
    r"^[ \t]*(?:(?P<file>[^\s():][^():\n]*)(?:\((?P<nvrtc>\d+)\)|:(?P<line>\d+):\d+)"
    r"|(?P<bare>\d+):\d+)"
    r":\s*(?P<message>(?:fatal |catastrophic )?(?:error|warning|note|remark)\b.*)$",
    re.IGNORECASE | re.ASCII,
)

_MADE = re.compile(r"(?:^|/)(?:tempfile[^/]*|CompilerSource|comgr-[^/]*/(?:input/)?[^/]*)$")


def explain(log: str, name: str, lines: Sequence[int] = ()) -> str:
    """The log with each place written as ``NAME:LINE: message``.

    ``lines[i]`` is the user's line of emitted line ``i + 1`` (0: none), for a text that carries no
    ``#line`` directives; empty when the lines are the user's already. Places in other files (a
    header's) keep their file.
    """
    out = []
    for text in log[:_LARGEST_LOG].replace("\r", "").splitlines():
        match = _PLACE.match(text)
        if match is None:
            out.append(text.rstrip())
            continue
        file, line = match["file"] or "", int(match["nvrtc"] or match["line"] or match["bare"])
        ours = file in ("", name) or file.startswith("<") or _temporary(file)
        if file == GENERATED:
            where = f"{GENERATED}:{line}"
        elif not ours:
            where = f"{file}:{line}"
        elif lines:
            mapped = lines[line - 1] if 0 < line <= len(lines) else 0
            where = f"{name}:{mapped}" if mapped else f"{GENERATED}:{line}"
        else:
            where = f"{name}:{line}"
        out.append(f"{where}: {match['message']}")
    return "\n".join(out).strip()


def _temporary(file: str) -> bool:
    """OpenCL platforms build from files of their own making."""
    return bool(_MADE.search(file)) or (file.endswith((".cl", "source", "input")) and "/" in file)


def first_error(log: str) -> str:
    """The first line of an explained log that tells an error, else its first line."""
    texts = [text for text in log.splitlines() if text.strip()]
    for text in texts:
        if re.search(r"\berror\b", text, re.IGNORECASE):
            return text.strip()
    return texts[0].strip() if texts else ""


def with_lines(text: str, name: str, lines: Sequence[int]) -> str:
    """``text`` with ``#line`` directives, so that a compiler itself tells the user's lines."""
    out: list[str] = []
    expected: int | None = None
    continued = False
    for index, content in enumerate(text.split("\n")):
        line = lines[index] if index < len(lines) else 0
        if not continued and line != expected:
            file, number = (name, line) if line else (GENERATED, index + 1)
            out.append(f'#line {number} "{file}"')
        told = not continued or line == expected
        out.append(content)
        # A directive in the middle of a continued line would be a part of it.
        continued = content.endswith("\\")
        expected = (line + 1 if line else 0) if told else None
    return "\n".join(out)

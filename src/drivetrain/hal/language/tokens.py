"""Words of C source: one scanner for the preprocessor and for expressions."""

from __future__ import annotations

import re
from dataclasses import dataclass

from drivetrain.errors import CompileError

__all__ = ["Token", "scan", "wrong"]


def wrong(line: int, message: str) -> CompileError:
    """The `CompileError` that names the user's line."""
    text = f"line {line}: {message}"
    return CompileError(text, code="compile", op="compile", log=text)


@dataclass(frozen=True, slots=True)
class Token:
    kind: str
    """``name``, ``number``, ``string``, ``char``, ``op``."""
    text: str
    line: int
    space: bool = False
    """White space came before it."""
    start: bool = False
    """It is the first of its line."""
    hidden: frozenset[str] = frozenset()
    """Macros that made it: they are not expanded in it again."""


_PATTERN = re.compile(
    r"""
    (?P<space>[ \t\r\f\v]+|\\\r?\n)
  | (?P<newline>\n)
  | (?P<comment>//(?:\\\r?\n|[^\n])*|/\*.*?\*/)
  | (?P<endless>/\*)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<number>(?:0[xX][0-9A-Fa-f.']+(?:[pP][+-]?\d+)?|(?:\d|\.\d)(?:[\d.']|[eE][+-]?\d)*)\w*)
  | (?P<string>(?:L|u8|u|U)?"(?:\\.|[^"\\\n])*")
  | (?P<char>'(?:\\.|[^'\\\n])+')
  | (?P<op><<<|>>>|<<=|>>=|\.\.\.|->\*|<=>|\#\#|::|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\|
        |\+=|-=|\*=|/=|%=|&=|\|=|\^=|[-+*/%&|^~!<>=?:;,.(){}\[\]\#@$`\\])
    """,
    re.VERBOSE | re.DOTALL,
)


def scan(text: str, line: int = 1) -> list[Token]:
    """The tokens of ``text``, whose first line is ``line``. Raises CompileError."""
    out: list[Token] = []
    position, space, start = 0, False, True
    while position < len(text):
        match = _PATTERN.match(text, position)
        if match is None:
            raise wrong(line, f"the character {text[position]!r} does not belong to the language")
        kind = match.lastgroup or ""
        if kind == "endless":
            raise wrong(line, "this comment has no end")
        word = match.group()
        if kind == "newline":
            start, space = True, False
        elif kind in ("space", "comment"):
            space = True
        else:
            out.append(Token(kind, word, line, space, start))
            space = start = False
        line += word.count("\n")
        position = match.end()
    return out

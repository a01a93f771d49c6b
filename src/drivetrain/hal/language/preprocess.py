"""The preprocessor: macros, conditions and known includes; every token keeps its line.

The output has the same lines as the input: what a macro makes stands on the line of its call. So
the line map from the parsed text to the user's file is the identity.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from drivetrain.hal.language.predefined import PREDEFINED
from drivetrain.hal.language.tokens import Token, scan, wrong

__all__ = ["preprocess"]

MOST_TOKENS = 400_000
"""Made by macros between two directives: nested ones can grow without bound."""

INCLUDES = frozenset(
    """cuda.h cuda_runtime.h cuda_runtime_api.h device_launch_parameters.h math.h cmath
    math_constants.h stdint.h cstdint stddef.h cstddef float.h cfloat limits.h climits
    vector_types.h vector_functions.h cuda_fp16.h device_functions.h device_atomic_functions.h
    stdbool.h""".split()  # noqa: SIM905 - a list of words reads better
)
"""They declare what every kernel has here anyway."""


@dataclass(frozen=True)
class Macro:
    name: str
    body: tuple[Token, ...]
    params: tuple[str, ...] | None = None
    variadic: bool = False


def preprocess(text: str, defines: Mapping[str, str] = {}, *, any_include: bool = False) -> str:
    """The text after macros and conditions, line for line.

    ``any_include``: do not refuse an include that is not known (its contents stay unknown).
    Raises CompileError with the line.
    """
    macros: dict[str, Macro] = {}
    for name, value in {**PREDEFINED, **defines}.items():
        if not name.isidentifier() or name == "defined":
            raise wrong(0, f"cannot define {name!r}: a macro's name is a C identifier")
        macros[name] = Macro(name, tuple(scan(value)))
    tokens = scan(text)
    out: list[Token] = []
    pending: list[Token] = []
    # A condition: (its line, this branch is live, some branch was live, all around are live).
    conditions: list[tuple[int, bool, bool, bool]] = []
    at = 0
    while at < len(tokens):
        token = tokens[at]
        live = all(entry[1] for entry in conditions)
        if not (token.start and token.text == "#"):
            if live:
                pending.append(token)
            at += 1
            continue
        end = at + 1
        while end < len(tokens) and not tokens[end].start:
            end += 1
        directive = tokens[at + 1 : end]
        at = end
        if not directive:
            continue
        word, rest, line = directive[0].text, directive[1:], token.line
        if word in ("if", "ifdef", "ifndef"):
            taken = live and _holds(word, rest, macros, line)
            conditions.append((line, taken, taken, live))
        elif word in ("elif", "else", "endif"):
            if not conditions:
                raise wrong(line, f"#{word} without #if")
            opened, _, taken, around = conditions.pop()
            if word == "elif":
                live = around and not taken and _holds("if", rest, macros, line)
                conditions.append((opened, live, taken or live, around))
            elif word == "else":
                conditions.append((opened, around and not taken, True, around))
        elif live:
            out += _expand(pending, macros)
            pending = []
            _directive(word, rest, macros, line, any_include)
    if conditions:
        raise wrong(conditions[-1][0], "this #if has no #endif")
    out += _expand(pending, macros)
    return _lay_out(out, text.count("\n") + 1)


def _directive(
    word: str, rest: list[Token], macros: dict[str, Macro], line: int, any_include: bool
) -> None:
    if word == "define":
        macro = _definition(rest, line)
        macros[macro.name] = macro
    elif word == "undef":
        if len(rest) != 1:
            raise wrong(line, "#undef takes one name")
        macros.pop(rest[0].text, None)
    elif word == "include":
        name = "".join(token.text for token in rest).strip('<>"')
        if name not in INCLUDES and not any_include:
            raise wrong(line, f"#include of {name!r}: only CUDA's and C's own headers are known")
    elif word == "error":
        raise wrong(line, "#error " + " ".join(token.text for token in rest))
    elif word not in ("pragma", "warning"):
        raise wrong(line, f"the directive #{word} is not known")


def _definition(rest: list[Token], line: int) -> Macro:
    if not rest or rest[0].kind != "name":
        raise wrong(line, "#define needs a name")
    name, rest = rest[0].text, rest[1:]
    if not (rest and rest[0].text == "(" and not rest[0].space):
        return Macro(name, tuple(rest))
    params: list[str] = []
    at, variadic = 1, False
    while at < len(rest) and rest[at].text != ")":
        token = rest[at]
        if token.text == "...":
            variadic = True
            params.append("__VA_ARGS__")
        elif token.kind == "name":
            params.append(token.text)
        elif token.text != ",":
            raise wrong(line, f"the parameters of the macro {name} cannot be read")
        at += 1
    if at == len(rest):
        raise wrong(line, f"the parameters of the macro {name} have no end")
    return Macro(name, tuple(rest[at + 1 :]), tuple(params), variadic)


def _expand(tokens: Iterable[Token], macros: Mapping[str, Macro]) -> list[Token]:
    """Expand all macros. A macro is not expanded in what it made itself (C11 6.10.3.4)."""
    work = list(reversed(list(tokens)))
    out: list[Token] = []
    count = 0
    while work:
        token = work.pop()
        if count > MOST_TOKENS:
            raise wrong(token.line, f"the macros make more than {MOST_TOKENS} tokens")
        macro = macros.get(token.text) if token.kind == "name" else None
        if token.kind == "name" and token.text == "__LINE__":
            out.append(replace(token, kind="number", text=str(token.line)))
            continue
        if token.text in ("_Pragma", "__pragma") and work and work[-1].text == "(":
            _arguments(work, token)
            continue
        if macro is None or token.text in token.hidden:
            out.append(token)
            continue
        hidden = token.hidden | {macro.name}
        if macro.params is None:
            made = _paste(macro, macro.body, token.line)
        else:
            if not (work and work[-1].text == "("):
                out.append(token)
                continue
            arguments = _arguments(work, token)
            made = _substitute(macro, arguments, macros, token.line)
        for index, piece in enumerate(made):
            made[index] = Token(
                piece.kind,
                piece.text,
                token.line,
                piece.space or index == 0,
                piece.start,
                piece.hidden | hidden if piece.hidden else hidden,
            )
        count += len(made)
        work.extend(reversed(made))
    return out


def _arguments(work: list[Token], name: Token) -> list[list[Token]]:
    """Take ``( a, b )`` off the work, split at its own commas."""
    work.pop()
    arguments: list[list[Token]] = [[]]
    depth = 1
    while work:
        token = work.pop()
        if token.text in "([{" and token.kind == "op":
            depth += 1
        elif token.text in ")]}" and token.kind == "op":
            depth -= 1
            if depth == 0:
                return arguments
        if token.text == "," and depth == 1:
            arguments.append([])
        else:
            arguments[-1].append(token)
    raise wrong(name.line, f"the call of the macro {name.text} has no end")


def _substitute(
    macro: Macro, arguments: list[list[Token]], macros: Mapping[str, Macro], line: int
) -> list[Token]:
    params = macro.params or ()
    if macro.variadic and len(arguments) > len(params):
        rest = arguments[len(params) - 1 :]
        joined = rest[0]
        for piece in rest[1:]:
            joined = [*joined, Token("op", ",", line), *piece]
        arguments = [*arguments[: len(params) - 1], joined]
    if macro.variadic and len(arguments) == len(params) - 1:
        arguments.append([])
    if not params and arguments == [[]]:
        arguments = []
    if len(arguments) != len(params):
        raise wrong(
            line, f"the macro {macro.name} takes {len(params)} arguments, {len(arguments)} given"
        )
    given = dict(zip(params, arguments, strict=True))
    expanded = {name: _expand(value, macros) for name, value in given.items()}
    out: list[Token] = []
    body = macro.body
    for index, token in enumerate(body):
        before = body[index - 1].text if index else ""
        after = body[index + 1].text if index + 1 < len(body) else ""
        if token.text == "#" and after in given:
            continue
        if before == "#" and token.text in given:
            words = "".join((" " if t.space else "") + t.text for t in given[token.text])
            escaped = words.strip().replace("\\", "\\\\").replace('"', '\\"')
            out.append(Token("string", f'"{escaped}"', line, True))
        elif token.text in given:
            value = given if "##" in (before, after) else expanded
            pieces = value[token.text]
            out += [replace(pieces[0], space=True), *pieces[1:]] if pieces else []
            if not pieces and "##" in (before, after):
                out.append(Token("op", "", line))
        else:
            out.append(token)
    return _paste(macro, tuple(out), line)


def _paste(macro: Macro, body: tuple[Token, ...], line: int) -> list[Token]:
    """Do ``##``: the tokens on its two sides become one."""
    out: list[Token] = []
    at = 0
    while at < len(body):
        token = body[at]
        if token.text == "##" and out and at + 1 < len(body):
            left = out.pop()
            joined = left.text + body[at + 1].text
            made = scan(joined, line)
            if len(made) > 1:
                raise wrong(
                    line, f"## in the macro {macro.name} makes {joined!r}, which is no one token"
                )
            hidden = left.hidden | body[at + 1].hidden
            out += [replace(piece, space=left.space, hidden=hidden) for piece in made] or [
                Token("op", "", line)
            ]
            at += 2
            continue
        out.append(token)
        at += 1
    return [token for token in out if token.text]


def _holds(word: str, rest: list[Token], macros: Mapping[str, Macro], line: int) -> bool:
    if word in ("ifdef", "ifndef"):
        if not rest:
            raise wrong(line, f"#{word} needs a name")
        return (rest[0].text in macros) == (word == "ifdef")
    plain: list[Token] = []
    at = 0
    while at < len(rest):
        token = rest[at]
        if token.text in ("defined", "__has_include"):
            inside = rest[at + 1 :]
            wrapped = bool(inside) and inside[0].text == "("
            if len(inside) <= wrapped:
                raise wrong(line, f"{token.text} needs a name")
            name = inside[1 if wrapped else 0].text
            known = name in macros if token.text == "defined" else False
            plain.append(Token("number", "1" if known else "0", line))
            at += 2
            if wrapped:
                while at < len(rest) and rest[at].text != ")":
                    at += 1
                at += 1
            continue
        plain.append(token)
        at += 1
    value = _Condition(_expand(plain, macros), line)
    result = value.binary(0)
    if value.at != len(value.tokens):
        raise wrong(line, f"the condition cannot be read at {value.tokens[value.at].text!r}")
    return result != 0


_LEVELS = (
    ("||",), ("&&",), ("|",), ("^",), ("&",), ("==", "!="), ("<", ">", "<=", ">="),
    ("<<", ">>"), ("+", "-"), ("*", "/", "%"),
)  # fmt: skip


class _Condition:
    """A constant integer expression of ``#if``."""

    def __init__(self, tokens: list[Token], line: int) -> None:
        self.tokens, self.line, self.at = tokens, line, 0

    def peek(self) -> str:
        return self.tokens[self.at].text if self.at < len(self.tokens) else ""

    def binary(self, level: int) -> int:
        if level == len(_LEVELS):
            return self.unary()
        left = self.binary(level + 1)
        while self.peek() in _LEVELS[level] and self.peek():
            op = self.peek()
            self.at += 1
            right = self.binary(level + 1)
            left = self.apply(op, left, right)
        if level == 0 and self.peek() == "?":
            self.at += 1
            yes = self.binary(0)
            if self.peek() != ":":
                raise wrong(self.line, "the condition has ? without :")
            self.at += 1
            no = self.binary(0)
            return yes if left else no
        return left

    def apply(self, op: str, a: int, b: int) -> int:
        if op in ("/", "%"):
            if b == 0:
                # The other side of || and && may be there to guard it.
                return 0
            quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
            return quotient if op == "/" else a - quotient * b
        if op in ("<<", ">>") and not 0 <= b < 64:
            raise wrong(self.line, f"the condition shifts by {b}")
        table: dict[str, Callable[[int, int], int]] = {
            "||": lambda a, b: bool(a) or bool(b), "&&": lambda a, b: bool(a) and bool(b),
            "|": operator.or_, "^": operator.xor, "&": operator.and_, "==": operator.eq,
            "!=": operator.ne, "<": operator.lt, ">": operator.gt, "<=": operator.le,
            ">=": operator.ge, "<<": operator.lshift, ">>": operator.rshift, "+": operator.add,
            "-": operator.sub, "*": operator.mul,
        }  # fmt: skip
        return int(table[op](a, b))

    def unary(self) -> int:
        if self.at >= len(self.tokens):
            raise wrong(self.line, "the condition ends too early")
        token = self.tokens[self.at]
        self.at += 1
        if token.text == "!":
            return int(not self.unary())
        if token.text in ("-", "+", "~"):
            value = self.unary()
            return {"-": -value, "+": value, "~": ~value}[token.text]
        if token.text == "(":
            value = self.binary(0)
            if self.peek() != ")":
                raise wrong(self.line, "the condition has ( without )")
            self.at += 1
            return value
        if token.kind == "number":
            digits = token.text.lower().replace("'", "").rstrip("ul")
            try:
                octal = len(digits) > 1 and digits.startswith("0") and digits.isdigit()
                return int(digits, 8 if octal else 0)
            except ValueError:
                raise wrong(
                    self.line, f"{token.text!r} in a condition is no whole number"
                ) from None
        if token.kind == "name":
            return int(token.text == "true")
        raise wrong(self.line, f"the condition cannot be read at {token.text!r}")


def _lay_out(tokens: list[Token], count: int) -> str:
    lines: list[list[str]] = [[] for _ in range(count)]
    for token in tokens:
        row = lines[min(max(token.line, 1), count) - 1]
        if row and (token.space or _would_join(row[-1], token.text)):
            row.append(" ")
        row.append(token.text)
    return "\n".join("".join(row) for row in lines) + "\n"


def _would_join(left: str, right: str) -> bool:
    a, b = left[-1:], right[:1]
    if (a.isalnum() or a in "_'\"") and (b.isalnum() or b in "_'\"."):
        return True
    return a in "+-*/%&|^<>=!:.#" and b in "+-*/%&|^<>=!:.#0123456789"

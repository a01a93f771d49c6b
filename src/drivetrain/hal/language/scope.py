"""What names mean where: scopes, and a cursor over the tokens that are read."""

from __future__ import annotations

from dataclasses import dataclass, field

from drivetrain.hal.language.tokens import Token, wrong
from drivetrain.hal.language.tree import Var
from drivetrain.hal.language.types import Type

__all__ = ["Constant", "Cursor", "Overloads", "Scope", "Symbol", "Template", "TypeName"]


@dataclass(frozen=True)
class TypeName:
    type: Type


@dataclass(frozen=True)
class Constant:
    """An enumerator or a template's number."""

    type: Type
    value: int


@dataclass(frozen=True)
class TemplateParam:
    name: str
    is_type: bool
    default: tuple[Token, ...] = ()
    kind: Type | None = None


@dataclass(eq=False)
class Template:
    """A function as written: read anew for each instance."""

    name: str
    line: int
    header: tuple[Token, ...]
    """From the first specifier to the closing parenthesis."""
    body: object = None
    """The parser's node; None for a declaration without a body."""
    params: tuple[TemplateParam, ...] = ()
    kernel: bool = False
    launch_bounds: tuple[Token, ...] = ()
    special: tuple[Token, ...] | None = None
    """Of ``template <> f<int>``: its arguments."""


@dataclass(frozen=True)
class Overloads:
    templates: list[Template] = field(default_factory=list)


Symbol = Var | TypeName | Constant | Overloads


class Scope:
    """Names, innermost first."""

    def __init__(self, parent: Scope | None = None) -> None:
        self.parent = parent
        self.names: dict[str, Symbol] = {}

    def find(self, name: str) -> Symbol | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names:
                return scope.names[name]
            scope = scope.parent
        return None

    def add(self, name: str, symbol: Symbol, line: int) -> None:
        known = self.names.get(name)
        if known is not None and not (isinstance(known, TypeName) and known == symbol):
            raise wrong(line, f"{name!r} is declared twice in the same block")
        self.names[name] = symbol


class Cursor:
    """Where one is in a row of tokens."""

    def __init__(self, tokens: list[Token], line: int) -> None:
        self.tokens, self.at, self._line = tokens, 0, line

    @property
    def line(self) -> int:
        if self.at < len(self.tokens):
            return self.tokens[self.at].line
        return self.tokens[-1].line if self.tokens else self._line

    @property
    def done(self) -> bool:
        return self.at >= len(self.tokens)

    def peek(self, ahead: int = 0) -> str:
        """The text of a token, "" behind the end. A string's text keeps its quotes."""
        at = self.at + ahead
        return self.tokens[at].text if at < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        at = self.at + ahead
        return self.tokens[at].kind if at < len(self.tokens) else ""

    def take(self) -> Token:
        if self.done:
            raise wrong(self.line, "the source ends too early here")
        token = self.tokens[self.at]
        self.at += 1
        return token

    def skip(self, text: str) -> bool:
        """Take the token if it is this one."""
        if self.peek() != text:
            return False
        self.at += 1
        return True

    def expect(self, text: str) -> Token:
        if self.peek() != text:
            found = self.peek() or "the end"
            raise wrong(self.line, f"expected {text!r}, found {found!r}")
        return self.take()

    def name(self) -> Token:
        if self.kind() != "name":
            raise wrong(self.line, f"expected a name, found {self.peek() or 'the end'!r}")
        return self.take()

    def balanced(self) -> list[Token]:
        """The tokens inside the brackets that start here, which are taken too."""
        pairs = {"(": ")", "[": "]", "{": "}"}
        opened = self.take()
        if opened.text not in pairs:
            raise wrong(opened.line, f"expected a bracket, found {opened.text!r}")
        closes = [pairs[opened.text]]
        inside: list[Token] = []
        while closes:
            token = self.take()
            if token.kind == "op" and token.text in pairs:
                closes.append(pairs[token.text])
            elif token.text == closes[-1]:
                closes.pop()
            if closes:
                inside.append(token)
        return inside

    def split_shift(self) -> None:
        """Make one ``>`` of ``>>``: the end of two lists of template arguments."""
        token = self.tokens[self.at]
        if token.text in (">>", ">>>"):
            single = Token("op", ">", token.line)
            rest = Token("op", token.text[1:], token.line)
            self.tokens[self.at : self.at + 1] = [single, rest]

    def finish(self, what: str) -> None:
        if not self.done:
            raise wrong(self.line, f"{what} cannot be read at {self.peek()!r}")

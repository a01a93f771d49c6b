"""Declarations: specifiers, declarators, structs, enums, parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from drivetrain.hal.language.scope import Constant, Cursor, Scope, TypeName
from drivetrain.hal.language.tokens import Token, wrong
from drivetrain.hal.language.types import (
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    VOID,
    Array,
    Pointer,
    Scalar,
    Struct,
    Type,
    shown,
)

__all__ = ["Declarator", "Specifiers", "declarator", "specifiers", "starts_type", "type_name"]

ConstantOf = Callable[[list[Token], Scope], int]
"""Reads a constant expression: array sizes, enumerators."""

_NUMBER_WORDS = frozenset(
    ["void", "bool", "char", "short", "int", "long", "float", "double", "signed", "unsigned"]
)
_FLAGS = {
    "const": "const", "constexpr": "constexpr", "static": "static", "extern": "extern",
    "inline": "inline", "__inline__": "inline", "__forceinline__": "inline",
    "__noinline__": "inline", "__device__": "device", "__global__": "global", "__host__": "host",
    "__shared__": "shared", "__constant__": "constant", "typedef": "typedef",
    "__restrict__": "restrict", "__restrict": "restrict", "register": "inline",
}  # fmt: skip
_REFUSED = {
    "volatile": "volatile is not part of the subset: threads that share memory use __syncthreads, "
    "__syncwarp or atomics",
    "virtual": "virtual functions are not part of the subset",
    "class": "classes are not part of the subset: use a struct",
    "union": "unions are not part of the subset: use __float_as_int and its kin",
    "thread_local": "thread_local is not part of the subset",
    "__managed__": "__managed__ variables are not part of the subset: pass a pointer",
    "operator": "operators of the user's own are not part of the subset: write a function",
    "decltype": "decltype is not part of the subset",
    "mutable": "mutable is not part of the subset",
    "template": "a template stands at the top of the file",
    "explicit": "constructors are not part of the subset",
    "friend": "friend is not part of the subset",
    "_Float16": "_Float16 is not part of the subset: use __half and __half2float",
    "__nv_bfloat16": "bfloat16 is not part of the subset",
    "__half2": "__half2 is not part of the subset",
    "half2": "half2 is not part of the subset",
}


@dataclass
class Specifiers:
    type: Type | None
    """None for ``auto``."""
    flags: frozenset[str]
    line: int


@dataclass
class Declarator:
    name: str
    type: Type | None
    line: int
    reference: bool = False
    const: bool = False
    restrict: bool = False
    tokens: list[Token] = field(default_factory=list)


def starts_type(cursor: Cursor, scope: Scope, ahead: int = 0) -> bool:
    """Whether a type, or a word that comes before one, stands here."""
    word = cursor.peek(ahead)
    if cursor.kind(ahead) != "name":
        return False
    if word in _NUMBER_WORDS or word in _FLAGS or word in _REFUSED:
        return True
    if word in ("struct", "enum", "auto", "typename", "alignas", "__align__", "__attribute__"):
        return True
    if word == "std" and cursor.peek(ahead + 1) == "::":
        return isinstance(scope.find(cursor.peek(ahead + 2)), TypeName)
    if cursor.peek(ahead + 1) == "::":
        return False  # an enumerator
    return isinstance(scope.find(word), TypeName)


def specifiers(cursor: Cursor, scope: Scope, constant_of: ConstantOf) -> Specifiers:
    line = cursor.line
    words: list[str] = []
    flags: set[str] = set()
    found: Type | None = None
    automatic = False
    align = 0
    while cursor.kind() == "name":
        word = cursor.peek()
        if word in _REFUSED:
            raise wrong(cursor.line, _REFUSED[word])
        if word in _FLAGS:
            flags.add(_FLAGS[word])
            cursor.take()
            if word == "extern" and cursor.kind() == "string":
                cursor.take()
        elif word in _NUMBER_WORDS:
            words.append(word)
            cursor.take()
        elif word in ("alignas", "__align__", "__attribute__"):
            align = max(align, _alignment(cursor, scope, constant_of))
        elif word == "__launch_bounds__":
            cursor.take()
            cursor.balanced()
        elif word == "typename":
            cursor.take()
        elif word == "auto" and not words and found is None:
            automatic = True
            cursor.take()
        elif words or found is not None or automatic:
            break
        elif word == "struct":
            found = _struct(cursor, scope, constant_of)
        elif word == "enum":
            found = _enum(cursor, scope, constant_of)
        else:
            if word == "std" and cursor.peek(1) == "::":
                cursor.take()
                cursor.take()
            symbol = scope.find(cursor.peek())
            if not isinstance(symbol, TypeName):
                break
            found = symbol.type
            cursor.take()
    if words:
        found = _number(words, line)
    if found is None and not automatic:
        what = cursor.peek() or "the end"
        raise wrong(line, f"a type is missing before {what!r}, or it is not known")
    if align and isinstance(found, Struct) and not found.vector:
        found.align = max(found.align, align)
    return Specifiers(found, frozenset(flags), line)


def _number(words: list[str], line: int) -> Type:
    unsigned, signed = "unsigned" in words, "signed" in words
    longs = words.count("long")
    rest = [word for word in words if word not in ("unsigned", "signed", "long", "int")]
    if "long" in words and rest == ["double"]:
        raise wrong(line, "long double is not part of the subset")
    if longs and not rest and longs < 3:
        return U64 if unsigned else I64
    if not rest and (unsigned or signed or words == ["int"]):
        return U32 if unsigned else I32
    plain: dict[str, tuple[Type, Type]] = {"char": (I8, U8), "short": (I16, U16)}
    if len(rest) == 1 and not longs:
        if rest[0] in plain:
            return plain[rest[0]][unsigned]
        named: dict[str, Type] = {"void": VOID, "bool": BOOL, "float": F32, "double": F64}
        if rest[0] in named and len(words) == 1:
            return named[rest[0]]
    raise wrong(line, f"{' '.join(words)!r} is no type")


def _alignment(cursor: Cursor, scope: Scope, constant_of: ConstantOf) -> int:
    word = cursor.take().text
    line = cursor.line
    inside = cursor.balanced()
    if word == "__attribute__":
        texts = [token.text for token in inside]
        if not texts or (texts[1:3] != ["aligned", "("] and texts[1:3] != ["__aligned__", "("]):
            raise wrong(line, "this attribute is not known: only aligned(n) is")
        inside = inside[3:-2]
    value = constant_of(inside, scope)
    if value < 1 or value & (value - 1) or value > 128:
        raise wrong(line, f"an alignment of {value} bytes: it must be a power of two up to 128")
    return value


def _struct(cursor: Cursor, scope: Scope, constant_of: ConstantOf) -> Struct:
    line = cursor.take().line
    align = 0
    while cursor.peek() in ("alignas", "__align__", "__attribute__"):
        align = max(align, _alignment(cursor, scope, constant_of))
    name = cursor.take().text if cursor.kind() == "name" else ""
    if cursor.peek() == ":":
        raise wrong(line, f"the struct {name} inherits: that is not part of the subset")
    if cursor.peek() != "{":
        symbol = scope.find(name)
        if isinstance(symbol, TypeName) and isinstance(symbol.type, Struct):
            return symbol.type
        if symbol is not None:
            raise wrong(line, f"{name!r} is no struct")
        made = Struct(name, line=line, complete=False)
        scope.add(name, TypeName(made), line)
        return made
    known = scope.names.get(name)
    if isinstance(known, TypeName) and isinstance(known.type, Struct) and not known.type.complete:
        made = known.type
    else:
        made = Struct(name, line=line, complete=False)
        if name:
            scope.add(name, TypeName(made), line)
    made.align = align
    inside = Cursor(cursor.balanced(), line)
    while not inside.done:
        if inside.skip(";"):
            continue
        if inside.peek() in ("public", "private", "protected"):
            raise wrong(inside.line, f"{inside.peek()}: is not part of the subset")
        if inside.peek() in (name, "~") and inside.peek(1) == "(":
            raise wrong(inside.line, f"the struct {name} has a constructor: use {{...}} instead")
        parts = specifiers(inside, scope, constant_of)
        if parts.flags & {"static", "constexpr"}:
            raise wrong(parts.line, "static members are not part of the subset")
        while True:
            item = declarator(inside, parts, scope, constant_of)
            if inside.peek() == "(":
                raise wrong(
                    item.line, f"{name}::{item.name} is a member function: write a function"
                )
            if inside.peek() == ":":
                raise wrong(item.line, f"{name}::{item.name} is a bit field: use shifts and masks")
            if inside.peek() in ("=", "{"):
                raise wrong(item.line, f"{name}::{item.name} has a value of its own: set it later")
            if item.reference or item.type is None:
                raise wrong(item.line, f"{name}::{item.name} cannot be a member")
            if made.field_type(item.name) is not None:
                raise wrong(item.line, f"{name}::{item.name} is declared twice")
            _must_be_complete(item.type, item.line)
            made.fields.append((item.name, item.type))
            if not inside.skip(","):
                break
        inside.expect(";")
    made.complete = True
    return made


def _must_be_complete(kind: Type, line: int) -> None:
    inner = kind
    while isinstance(inner, Array):
        if inner.count < 0:
            raise wrong(line, "an array without a size")
        inner = inner.of
    if isinstance(inner, Struct) and not inner.complete:
        raise wrong(line, f"the struct {inner.name} is not complete here")
    if inner == VOID:
        raise wrong(line, "nothing can be of type void")


def _enum(cursor: Cursor, scope: Scope, constant_of: ConstantOf) -> Type:
    line = cursor.take().line
    scoped = cursor.skip("class") or cursor.skip("struct")
    name = cursor.take().text if cursor.kind() == "name" else ""
    kind: Type = I32
    if cursor.skip(":"):
        found = specifiers(cursor, scope, constant_of).type
        if not isinstance(found, Scalar) or found.kind not in ("int", "uint"):
            raise wrong(line, f"the enum {name} lies over no whole number")
        kind = found
    if cursor.peek() != "{":
        symbol = scope.find(name)
        if isinstance(symbol, TypeName):
            return symbol.type
        raise wrong(line, f"the enum {name} is not known")
    if name:
        scope.add(name, TypeName(kind), line)
    inside = Cursor(cursor.balanced(), line)
    value = -1
    while not inside.done:
        token = inside.name()
        value += 1
        if inside.skip("="):
            tokens: list[Token] = []
            depth = 0
            while not inside.done and not (inside.peek() == "," and depth == 0):
                depth += (inside.peek() in ("(", "{")) - (inside.peek() in (")", "}"))
                tokens.append(inside.take())
            value = constant_of(tokens, scope)
        if not scoped:
            scope.add(token.text, Constant(kind, value), token.line)
        if name:
            scope.names[f"{name}::{token.text}"] = Constant(kind, value)
        if not inside.skip(","):
            break
    inside.finish(f"the enum {name}")
    return kind


def declarator(
    cursor: Cursor,
    parts: Specifiers,
    scope: Scope,
    constant_of: ConstantOf,
    *,
    nameless: bool = False,
) -> Declarator:
    """One name with what stands around it: ``*p``, ``(*p)[4]``, ``&r``, ``a[2][3]``."""
    kind = parts.type
    const = bool(parts.flags & {"const", "constexpr"})
    out = Declarator("", kind, cursor.line, restrict="restrict" in parts.flags)
    kind, const = _stars(cursor, kind, const, out)
    grouped: list[Token] | None = None
    if cursor.peek() == "(" and cursor.peek(1) in ("*", "&"):
        grouped = cursor.balanced()
        if cursor.peek() == "(":
            raise wrong(out.line, "pointers to functions are not part of the subset")
    elif cursor.kind() == "name":
        out.name = cursor.take().text
    elif not nameless:
        raise wrong(cursor.line, f"expected a name, found {cursor.peek() or 'the end'!r}")
    sizes: list[int] = []
    while cursor.peek() == "[":
        inside = cursor.balanced()
        sizes.append(constant_of(inside, scope) if inside else -1)
        if inside and sizes[-1] < 1:
            raise wrong(out.line, f"an array of {sizes[-1]} elements")
    for position, count in reversed(list(enumerate(sizes))):
        if kind is None:
            raise wrong(out.line, "an array of auto")
        if count < 0 and position:
            raise wrong(out.line, "only the first size of an array may be left out")
        kind = Array(kind, count)
    if grouped is not None:
        inner = Cursor(grouped, out.line)
        made = declarator(
            inner,
            Specifiers(kind, frozenset({"const"} if const else ()), out.line),
            scope,
            constant_of,
            nameless=nameless,
        )
        inner.finish("this declarator")
        return made
    out.type, out.const = kind, const
    return out


def _stars(
    cursor: Cursor, kind: Type | None, const: bool, out: Declarator
) -> tuple[Type | None, bool]:
    while cursor.peek() in ("*", "&", "&&"):
        word = cursor.take().text
        if word == "&&":
            raise wrong(cursor.line, "references to values that end (&&) are not of the subset")
        if word == "&":
            out.reference = True
            while cursor.peek() in ("__restrict__", "__restrict"):
                cursor.take()
            continue
        if kind is None:
            # ``auto *p``: the star is a part of what is inferred.
            continue
        if out.reference:
            raise wrong(cursor.line, "a pointer to a reference")
        kind, const = Pointer(kind, const), False
        while cursor.kind() == "name" and cursor.peek() in (
            "const", "__restrict__", "__restrict", "volatile",
        ):  # fmt: skip
            word = cursor.take().text
            if word == "volatile":
                raise wrong(cursor.line, _REFUSED["volatile"])
            const = const or word == "const"
            out.restrict = out.restrict or word != "const"
    return kind, const


def type_name(cursor: Cursor, scope: Scope, constant_of: ConstantOf) -> Type:
    """A type without a name, as in a cast."""
    parts = specifiers(cursor, scope, constant_of)
    made = declarator(cursor, parts, scope, constant_of, nameless=True)
    if made.type is None or made.name or made.reference:
        raise wrong(made.line, "expected a type")
    return made.type


def as_parameter(item: Declarator) -> Type:
    """The type of a parameter: an array is a pointer."""
    if item.type is None:
        raise wrong(item.line, f"the parameter {item.name} is auto: use a template")
    if isinstance(item.type, Array) and not item.reference:
        return Pointer(item.type.of, item.const)
    if item.type == VOID:
        raise wrong(item.line, f"the parameter {item.name} is of type {shown(item.type)}")
    return item.type

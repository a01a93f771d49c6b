"""Calls: which function is meant, and CUDA's own functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.hal.language.convert import address, convert, cost, decayed, is_lvalue
from drivetrain.hal.language.intrinsics import (
    ATOMICS,
    INTRINSICS,
    LETTERS,
    REFUSED,
    SHUFFLES,
    VOTES,
    Signature,
)
from drivetrain.hal.language.scope import Overloads, Symbol
from drivetrain.hal.language.tokens import wrong
from drivetrain.hal.language.tree import (
    Assign,
    Call,
    Comma,
    Construct,
    Deref,
    Expr,
    Function,
    Intrinsic,
    Lit,
    has_effects,
    truth,
)
from drivetrain.hal.language.types import (
    BOOL,
    F32,
    F64,
    I32,
    U32,
    VECTORS,
    VOID,
    WORDS,
    Pointer,
    Scalar,
    Struct,
    Type,
    is_scalar,
    shown,
)

if TYPE_CHECKING:
    from drivetrain.hal.language.check import Unit
    from drivetrain.hal.language.scope import Template

__all__ = ["call"]


def call(
    unit: Unit,
    symbol: Symbol | None,
    name: str,
    explicit: list[Type | int] | None,
    arguments: list[Expr],
    line: int,
) -> Expr:
    if isinstance(symbol, Overloads):
        found = _chosen(unit, symbol, name, explicit, arguments, line)
        if found is not None:
            return _called(unit, found, arguments, line)
    if symbol is not None and not isinstance(symbol, Overloads):
        raise wrong(line, f"{name!r} is no function")
    own = _special(name, arguments, line)
    if own is not None:
        return own
    if name in INTRINSICS:
        signature = _overload(INTRINSICS[name], name, arguments, line)
        given = [
            convert(argument, kind)
            for argument, kind in zip(arguments, signature.params, strict=True)
        ]
        return Intrinsic(signature.result, line, signature.word, given)
    if name in REFUSED:
        raise wrong(line, f"{name}: {REFUSED[name]}")
    if isinstance(symbol, Overloads):
        kinds = ", ".join(shown(argument.type) for argument in arguments)
        raise wrong(line, f"no function {name} takes ({kinds})")
    raise wrong(
        line, f"the function {name!r} is not known: it is neither CUDA's nor in this source"
    )


def _overload(
    signatures: list[Signature], name: str, arguments: list[Expr], line: int
) -> Signature:
    best: list[Signature] = []
    least = 1 << 30
    for signature in signatures:
        if len(signature.params) != len(arguments):
            continue
        costs = [
            cost(decayed(a), kind) for a, kind in zip(arguments, signature.params, strict=True)
        ]
        if any(value is None for value in costs):
            continue
        total = sum(value or 0 for value in costs)
        if total < least:
            best, least = [signature], total
        elif total == least:
            best.append(signature)
    if len(best) > 1:
        mixed = _by_common_type(best, arguments)
        if mixed is not None:
            return mixed
    if not best:
        kinds = ", ".join(shown(argument.type) for argument in arguments)
        raise wrong(line, f"{name} does not take ({kinds})")
    return best[0]


def _by_common_type(signatures: list[Signature], arguments: list[Expr]) -> Signature | None:
    """``max(int, unsigned)``: the one in the arguments' common type, as CUDA's headers do."""
    from drivetrain.hal.language.types import common

    kinds = [argument.type for argument in arguments if isinstance(argument.type, Scalar)]
    if not kinds:
        return None
    wanted = kinds[0]
    for kind in kinds[1:]:
        wanted = common(wanted, kind)
    for signature in signatures:
        if all(kind == wanted for kind in signature.params):
            return signature
    # sqrt(int) is sqrt(double), as in C++.
    return next((s for s in signatures if all(kind == F64 for kind in s.params)), None)


def _chosen(
    unit: Unit,
    symbol: Overloads,
    name: str,
    explicit: list[Type | int] | None,
    arguments: list[Expr],
    line: int,
) -> Function | None:
    """The function of the user's that fits best."""
    best: list[tuple[Template, tuple[Type | int, ...]]] = []
    least = 1 << 30
    for template in symbol.templates:
        bound = unit.deduce(template, explicit, arguments, line)
        if bound is None:
            continue
        header = unit.header(template, bound)
        if len(arguments) > len(header.params) or any(
            not parameter.default for parameter in header.params[len(arguments) :]
        ):
            continue
        total = 0 if not template.params else 1
        for argument, parameter in zip(arguments, header.params, strict=False):
            if parameter.reference and not parameter.const_reference:
                same = argument.type == parameter.type and is_lvalue(argument)
                value = 0 if same else None
            elif isinstance(parameter.type, Struct):
                value = 0 if argument.type == parameter.type else None
            else:
                value = cost(argument, parameter.type)
            if value is None:
                total = -1
                break
            total += 4 * value
        if total < 0:
            continue
        if total < least:
            best, least = [(template, bound)], total
        elif total == least:
            best.append((template, bound))
    complete = [entry for entry in best if entry[0].body is not None]
    if len(complete) > 1:
        raise wrong(line, f"the call of {name} fits more than one function")
    if not best:
        return None
    template, bound = complete[0] if complete else best[0]
    return unit.instance(template, bound, line)


def _called(unit: Unit, function: Function, arguments: list[Expr], line: int) -> Expr:
    if function.kernel:
        raise wrong(line, f"{function.name} is a kernel: it is launched, not called")
    given: list[Expr] = []
    for position, parameter in enumerate(function.params):
        if position >= len(arguments):
            argument = unit.default_argument(function, position, line)
        else:
            argument = arguments[position]
        if parameter.reference:
            assert isinstance(parameter.type, Pointer)
            if argument.type == parameter.type.to and is_lvalue(argument):
                given.append(convert(address(argument), parameter.type))
                continue
            # A constant reference to a value: it gets a place of its own.
            value = convert(argument, parameter.type.to)
            place = unit.temporary(parameter.type.to, line)
            fill = Assign(place.type, line, place, value)
            pointer = Comma(parameter.type, line, fill, address(place))
            given.append(pointer)
            continue
        given.append(convert(argument, parameter.type))
    return Call(function.result, line, function, given)


def _special(name: str, arguments: list[Expr], line: int) -> Expr | None:
    if name == "__syncthreads" or name == "__syncwarp":
        _count(name, arguments, (0,) if name == "__syncthreads" else (0, 1), line)
        scope = "block" if name == "__syncthreads" else "warp"
        lanes = [convert(argument, U32) for argument in arguments]
        return Intrinsic(VOID, line, f"sync_{scope}", lanes)
    if name in ("__threadfence", "__threadfence_block", "__threadfence_system"):
        _count(name, arguments, (0,), line)
        return Intrinsic(VOID, line, "fence", [])
    if name in ("__stwb", "__stcg", "__stcs", "__stwt"):
        _count(name, arguments, (2,), line)
        pointer = decayed(arguments[0])
        if not isinstance(pointer.type, Pointer) or pointer.type.const:
            raise wrong(line, f"{name} needs a pointer to what may be written")
        kind = pointer.type.to
        return Assign(VOID, line, Deref(kind, line, pointer), convert(arguments[1], kind, line))
    if name in ("__ldg", "__ldca", "__ldcg", "__ldcs", "__ldlu", "__ldcv"):
        _count(name, arguments, (1,), line)
        pointer = decayed(arguments[0])
        if not isinstance(pointer.type, Pointer):
            raise wrong(line, f"{name} needs a pointer")
        return Deref(pointer.type.to, line, pointer)
    if name.startswith("make_") and name[5:] in VECTORS and name[5:] != "dim3":
        kind = VECTORS[name[5:]]
        _count(name, arguments, (len(kind.fields),), line)
        parts = [
            convert(argument, part)
            for argument, (_, part) in zip(arguments, kind.fields, strict=True)
        ]
        return Construct(kind, line, parts)
    if name in ("sincosf", "__sincosf"):
        return _sincos(name, arguments, line)
    base = name.removesuffix("_block").removesuffix("_system")
    if base in ATOMICS:
        return _atomic(base, arguments, line)
    if name in SHUFFLES:
        return _shuffle(name, arguments, line)
    if name in VOTES:
        _count(name, arguments, (2,), line)
        mask, vote = convert(arguments[0], U32), truth(decayed(arguments[1]))
        result = U32 if name == "__ballot_sync" else I32
        return Intrinsic(result, line, f"vote_{VOTES[name]}", [mask, vote])
    return None


def _count(name: str, arguments: list[Expr], counts: tuple[int, ...], line: int) -> None:
    if len(arguments) not in counts:
        wanted = " or ".join(map(str, counts))
        raise wrong(line, f"{name} takes {wanted} arguments, {len(arguments)} given")


def _sincos(name: str, arguments: list[Expr], line: int) -> Expr:
    _count(name, arguments, (3,), line)
    angle = convert(arguments[0], F32)
    if any(has_effects(argument) for argument in arguments):
        raise wrong(line, f"an argument of {name} has effects: give it a name first")
    stores: list[Expr] = []
    for word, place in (("sin_f32", arguments[1]), ("cos_f32", arguments[2])):
        pointer = decayed(place)
        if pointer.type != Pointer(F32):
            raise wrong(line, f"{name} needs pointers to float")
        value = Intrinsic(F32, line, word, [angle])
        stores.append(Assign(F32, line, Deref(F32, line, pointer), value))
    return Comma(F32, line, stores[0], stores[1])


def _atomic(name: str, arguments: list[Expr], line: int) -> Expr:
    _count(name, arguments, (3,) if name == "atomicCAS" else (2,), line)
    pointer = decayed(arguments[0])
    if not isinstance(pointer.type, Pointer):
        raise wrong(line, f"{name} needs a pointer, not {shown(pointer.type)}")
    if pointer.type.const:
        raise wrong(line, f"{name} writes to something that is const")
    kind = pointer.type.to
    allowed = [LETTERS[letter] for letter in ATOMICS[name]]
    if kind not in allowed:
        raise wrong(line, f"{name} does not work on {shown(kind)}")
    assert isinstance(kind, Scalar)
    values = [convert(argument, kind) for argument in arguments[1:]]
    word = "atomic" + name.removeprefix("atomic") + f"_{WORDS[kind]}"
    return Intrinsic(kind, line, word, [pointer, *values])


def _shuffle(name: str, arguments: list[Expr], line: int) -> Expr:
    _count(name, arguments, (3, 4), line)
    value = decayed(arguments[1])
    if not is_scalar(value.type) or value.type == BOOL:
        raise wrong(line, f"{name} moves numbers, not {shown(value.type)}")
    assert isinstance(value.type, Scalar)
    if value.type.size < 4:
        value = convert(value, I32)
    mask, other = convert(arguments[0], U32), convert(arguments[2], I32)
    width = convert(arguments[3], I32) if len(arguments) > 3 else Lit(I32, line, 32)
    word = f"shfl_{SHUFFLES[name]}"
    return Intrinsic(value.type, line, word, [mask, value, other, width])

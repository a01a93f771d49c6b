"""Types of an array's elements, and how they mix: the rules of the Python array API standard.

Types of one kind mix by the standard's lattice (2024.12, "Type promotion rules"). What the standard
leaves open (int with float arrays, uint64 with a signed type, float16 with bfloat16) is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

from drivetrain.errors import BadInput
from drivetrain.hal.kernel import (
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
    ArgType,
    packed,
)

__all__ = ["DTYPES", "DType", "dtype_of", "isdtype", "promoted", "scalar_dtype"]


@dataclass(frozen=True, repr=False)
class DType:
    """The type of an array's elements; compares equal to its name and to numpy's dtype."""

    name: str
    kind: str
    """``bool``, ``int``, ``uint`` or ``float``."""
    nbytes: int
    format: str
    """``struct``'s letter, ``bf16`` for bfloat16, which it does not have."""
    stored: str
    """C's type for an element in memory."""
    computed: str
    """C's type that kernels calculate with."""
    arg: ArgType
    """How an element is passed to a kernel by value: as what is calculated with."""

    def __repr__(self) -> str:
        return self.name

    def __str__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        if isinstance(other, DType):
            return self.name == other.name
        if isinstance(other, str):
            return self.name == other
        return self.name == getattr(other, "name", None)

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def bits(self) -> int:
        return self.nbytes * 8

    @property
    def limits(self) -> tuple[int, int]:
        """(least, most) of an integer type, or of bool."""
        if self.kind == "bool":
            return 0, 1
        if self.kind == "uint":
            return 0, (1 << self.bits) - 1
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1

    def packed(self, value: Any) -> bytes:
        """A Python number as an element's bytes. Raises BadInput where it does not fit."""
        if self.name in _STORED_AS:
            return packed(_STORED_AS[self.name], value)
        return packed(self.arg, value)


def _dtypes() -> dict[str, DType]:
    rows = [
        ("bool", "bool", 1, "?", "unsigned char", "int", U8),
        ("int8", "int", 1, "b", "signed char", "int", I8),
        ("int16", "int", 2, "h", "short", "int", I16),
        ("int32", "int", 4, "i", "int", "int", I32),
        ("int64", "int", 8, "q", "long long", "long long", I64),
        ("uint8", "uint", 1, "B", "unsigned char", "unsigned int", U8),
        ("uint16", "uint", 2, "H", "unsigned short", "unsigned int", U16),
        ("uint32", "uint", 4, "I", "unsigned int", "unsigned int", U32),
        ("uint64", "uint", 8, "Q", "unsigned long long", "unsigned long long", U64),
        ("float16", "float", 2, "e", "unsigned short", "float", F32),
        ("bfloat16", "float", 2, "bf16", "unsigned short", "float", F32),
        ("float32", "float", 4, "f", "float", "float", F32),
        ("float64", "float", 8, "d", "double", "double", F64),
    ]
    return {row[0]: DType(*row) for row in rows}


DTYPES: Mapping[str, DType] = _dtypes()


def _stored_as() -> dict[str, ArgType]:
    from drivetrain.hal.kernel import BF16, F16

    return {"float16": F16, "bfloat16": BF16}


_STORED_AS = _stored_as()


def dtype_of(value: Any) -> DType:
    """The type that ``value`` names: a DType, its name, numpy's or torch's dtype, or Python's
    ``bool``, ``int``, ``float``. Raises BadInput."""
    if isinstance(value, DType):
        return value
    if value in (bool, int, float):
        return scalar_dtype(value())
    name = value if isinstance(value, str) else getattr(value, "name", None)
    if name is None:
        name = getattr(value, "__name__", "") if isinstance(value, type) else str(value)
    found = DTYPES.get(str(name).rpartition(".")[2].removesuffix("_"))
    if found is None:
        raise BadInput(f"{value!r} is no type of elements; there are {', '.join(DTYPES)}")
    return found


def scalar_dtype(value: object) -> DType:
    """The default type of a Python number: bool, int64 or float32."""
    if isinstance(value, bool):
        return DTYPES["bool"]
    if isinstance(value, int):
        return DTYPES["int64"]
    if isinstance(value, float):
        return DTYPES["float32"]
    raise BadInput(f"{value!r} is no bool, int or float")


def promoted(*types: DType) -> DType:
    """The type that arrays of these types have in common. Raises BadInput where there is none."""
    if not types:
        raise BadInput("promotion needs one type at least")
    return reduce(_pair, types)


def _pair(a: DType, b: DType) -> DType:
    if a is b:
        return a
    kinds = {a.kind, b.kind}
    if len(kinds) == 1:
        if a.bits != b.bits:
            return a if a.bits > b.bits else b
        if a.kind == "float":  # float16 and bfloat16
            raise _unmixed(a, b)
        return a
    if kinds == {"int", "uint"}:
        signed, unsigned = (a, b) if a.kind == "int" else (b, a)
        if signed.bits > unsigned.bits:
            return signed
        if unsigned.bits < 64:
            return DTYPES[f"int{unsigned.bits * 2}"]
    raise _unmixed(a, b)


def _unmixed(a: DType, b: DType) -> BadInput:
    return BadInput(
        f"arrays of {a} and {b} do not mix: the array API standard gives them no common type; "
        "convert one with astype"
    )


_KINDS = {
    "bool": ("bool",),
    "signed integer": ("int",),
    "unsigned integer": ("uint",),
    "integral": ("int", "uint"),
    "real floating": ("float",),
    "complex floating": (),
    "numeric": ("int", "uint", "float"),
}


def isdtype(dtype: Any, kind: Any) -> bool:
    """Whether ``dtype`` is ``kind``: a type, a word of the standard, or a tuple of them."""
    found = dtype_of(dtype)
    if isinstance(kind, tuple):
        return any(isdtype(found, each) for each in kind)
    if isinstance(kind, str) and kind in _KINDS:
        return found.kind in _KINDS[kind]
    return found == dtype_of(kind)


def scalar_for(dtype: DType, value: Any, op: str) -> Any:
    """A Python number as it takes part in an operation with an array of ``dtype``.

    Bools go with bool, ints with integers and floats, floats with floats. Raises BadInput.
    """
    if isinstance(value, bool):
        if dtype.kind == "bool":
            return value
    elif isinstance(value, int):
        if dtype.kind == "float":
            return float(value)
        if dtype.kind != "bool":
            least, most = dtype.limits
            if not least <= value <= most:
                raise BadInput(f"{op}: {value} does not lie in [{least}, {most}], as {dtype} does")
            return value
    elif isinstance(value, float):
        if dtype.kind == "float":
            return value
    else:
        try:
            return scalar_for(dtype, operator.index(value), op)
        except TypeError:
            raise BadInput(
                f"{op} takes arrays and Python numbers, not {type(value).__name__}"
            ) from None
    raise BadInput(f"{op}: a Python {type(value).__name__} does not mix with an array of {dtype}")

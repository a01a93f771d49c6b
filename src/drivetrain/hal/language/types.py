"""The types of CUDA C: what they are, how large, and which numbers they turn into.

``long`` has 64 bits, as CUDA has it on Linux. Vector types (``float4``) are structs with CUDA's own
sizes and alignments: ``float3`` has 12 bytes here, unlike OpenCL's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = [
    "BOOL", "F32", "F64", "HALF", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "VOID",
    "Array", "Pointer", "Scalar", "Struct", "Type", "align_of", "common", "is_float",
    "is_integer", "is_scalar", "named_types", "promoted", "shown", "size_of",
]  # fmt: skip


@dataclass(frozen=True)
class Scalar:
    name: str
    kind: str
    """``void``, ``bool``, ``int``, ``uint``, ``float``."""
    size: int
    rank: int = 0

    @property
    def bits(self) -> int:
        return self.size * 8


VOID = Scalar("void", "void", 0)
BOOL = Scalar("bool", "bool", 1, 0)
I8 = Scalar("char", "int", 1, 1)
U8 = Scalar("unsigned char", "uint", 1, 1)
I16 = Scalar("short", "int", 2, 2)
U16 = Scalar("unsigned short", "uint", 2, 2)
I32 = Scalar("int", "int", 4, 3)
U32 = Scalar("unsigned int", "uint", 4, 3)
I64 = Scalar("long long", "int", 8, 4)
U64 = Scalar("unsigned long long", "uint", 8, 4)
F32 = Scalar("float", "float", 4, 5)
F64 = Scalar("double", "float", 8, 6)

WORDS = {
    BOOL: "u8", I8: "i8", U8: "u8", I16: "i16", U16: "u16", I32: "i32", U32: "u32",
    I64: "i64", U64: "u64", F32: "f32", F64: "f64",
}  # fmt: skip
"""The word of `facts.Param` for each."""


@dataclass(frozen=True)
class Pointer:
    to: Type
    const: bool = field(default=False, compare=False)
    """What it points to is not written through it."""


@dataclass(frozen=True)
class Array:
    of: Type
    count: int
    """-1 for ``extern __shared__ T name[]``."""


@dataclass(eq=False)
class Struct:
    name: str
    fields: list[tuple[str, Type]] = field(default_factory=list)
    align: int = 0
    """Asked for by the user; 0 for what the fields need."""
    vector: bool = False
    """One of CUDA's own, such as ``float4``."""
    line: int = 0
    complete: bool = True

    def field_type(self, name: str) -> Type | None:
        return next((kind for key, kind in self.fields if key == name), None)


Type = Scalar | Pointer | Array | Struct


HALF = Struct("__half", [("bits", U16)], vector=True)
"""A storage type: it is converted to float and back, never calculated with."""


def is_scalar(kind: Type) -> bool:
    return isinstance(kind, Scalar) and kind.kind != "void"


def is_integer(kind: Type) -> bool:
    return isinstance(kind, Scalar) and kind.kind in ("int", "uint", "bool")


def is_float(kind: Type) -> bool:
    return isinstance(kind, Scalar) and kind.kind == "float"


def promoted(kind: Scalar) -> Scalar:
    """What arithmetic makes of one operand: ``int`` from all that is narrower."""
    return I32 if kind.rank < I32.rank else kind


def common(a: Scalar, b: Scalar) -> Scalar:
    """The usual arithmetic conversions."""
    a, b = promoted(a), promoted(b)
    if a.rank != b.rank:
        return a if a.rank > b.rank else b
    return a if a.kind == "uint" else b


def size_of(kind: Type) -> int:
    if isinstance(kind, Scalar):
        return kind.size
    if isinstance(kind, Pointer):
        return 8
    if isinstance(kind, Array):
        return size_of(kind.of) * max(kind.count, 0)
    end = 0
    for _, part in kind.fields:
        align = align_of(part)
        end = -(-end // align) * align + size_of(part)
    align = align_of(kind)
    return max(-(-end // align) * align, 1)


def align_of(kind: Type) -> int:
    if isinstance(kind, Scalar):
        return max(kind.size, 1)
    if isinstance(kind, Pointer):
        return 8
    if isinstance(kind, Array):
        return align_of(kind.of)
    return max([kind.align, *(align_of(part) for _, part in kind.fields), 1])


def shown(kind: Type) -> str:
    """As the user would write it."""
    if isinstance(kind, Pointer):
        return f"{'const ' if kind.const else ''}{shown(kind.to)}*"
    if isinstance(kind, Array):
        return f"{shown(kind.of)}[{kind.count if kind.count >= 0 else ''}]"
    return kind.name


def _vectors() -> dict[str, Struct]:
    made: dict[str, Struct] = {}
    # CUDA C++ Programming Guide, "Built-in Vector Types": alignment in bytes for 1, 2, 3, 4.
    table = {
        "char": (I8, (1, 2, 1, 4)), "uchar": (U8, (1, 2, 1, 4)),
        "short": (I16, (2, 4, 2, 8)), "ushort": (U16, (2, 4, 2, 8)),
        "int": (I32, (4, 8, 4, 16)), "uint": (U32, (4, 8, 4, 16)),
        "long": (I64, (8, 16, 8, 16)), "ulong": (U64, (8, 16, 8, 16)),
        "longlong": (I64, (8, 16, 8, 16)), "ulonglong": (U64, (8, 16, 8, 16)),
        "float": (F32, (4, 8, 4, 16)), "double": (F64, (8, 16, 8, 16)),
    }  # fmt: skip
    for stem, (kind, aligns) in table.items():
        for count in (1, 2, 3, 4):
            name = f"{stem}{count}"
            fields: list[tuple[str, Type]] = [(axis, kind) for axis in "xyzw"[:count]]
            made[name] = Struct(name, fields, aligns[count - 1], vector=True)
    made["dim3"] = made["uint3"]
    return made


def named_types() -> dict[str, Type]:
    """Type names of one word that need no declaration."""
    return {
        "int8_t": I8, "uint8_t": U8, "int16_t": I16, "uint16_t": U16, "int32_t": I32,
        "uint32_t": U32, "int64_t": I64, "uint64_t": U64, "size_t": U64, "ptrdiff_t": I64,
        "intptr_t": I64, "uintptr_t": U64, "uint": U32, "uchar": U8, "ushort": U16, "ulong": U64,
        "__half": HALF, "half": HALF, **VECTORS,
    }  # fmt: skip


VECTORS: dict[str, Struct] = _vectors()

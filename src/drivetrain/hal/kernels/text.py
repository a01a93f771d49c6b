"""C text that families share: elements in memory, numbers to calculate with, walks over strides.

Elements of half precision are stored as 16 bits and calculated with as ``float``: by instructions
of the device where its own compiler reads the text, else by integer arithmetic that rounds as IEEE
754 does.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from drivetrain.errors import Unsupported

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.driver import Target
    from drivetrain.hal.dtype import DType

HALF = """
#if defined(__CUDACC_RTC__) && !defined(__HIPCC_RTC__)
__device__ __forceinline__ float load_float16(unsigned short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}
__device__ __forceinline__ unsigned short store_float16(float value) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#else
__device__ float load_float16(unsigned short bits) {
    unsigned int sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
    if (magnitude >= 0x7c00u)
        return __uint_as_float(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    if (magnitude >= 0x400u) return __uint_as_float(sign | ((magnitude + 0x1c000u) << 13));
    float small = (float)magnitude * 5.9604644775390625e-8f;
    return sign ? -small : small;
}
__device__ unsigned short store_float16(float value) {
    unsigned int bits = __float_as_uint(value);
    unsigned int sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return (unsigned short)(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return (unsigned short)(sign | 0x7c00u);
    if (rest < 0x33000001u) return (unsigned short)sign;
    unsigned int shift = 13u, whole = rest - 0x38000000u;
    if (rest < 0x38800000u) {
        shift = 126u - (rest >> 23);
        whole = (rest & 0x7fffffu) | 0x800000u;
    }
    unsigned int kept = whole >> shift, lost = whole & ((1u << shift) - 1u);
    unsigned int middle = 1u << (shift - 1u);
    if (lost > middle || (lost == middle && (kept & 1u))) kept += 1u;
    return (unsigned short)(sign | kept);
}
#endif
"""

BFLOAT16 = """
__device__ float load_bfloat16(unsigned short bits) {
    return __uint_as_float((unsigned int)bits << 16);
}
__device__ unsigned short store_bfloat16(float value) {
    unsigned int bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (unsigned short)((bits >> 16) | 0x40u);
    return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
"""

_SMALL = {"float16": HALF, "bfloat16": BFLOAT16}


def prelude(*dtypes: DType) -> str:
    """What kernels over elements of these types need first."""
    names = {dtype.name for dtype in dtypes}
    return "".join(text for name, text in _SMALL.items() if name in names)


def load(dtype: DType, element: str) -> str:
    """An element as a number to calculate with."""
    if dtype.name in _SMALL:
        return f"load_{dtype.name}({element})"
    return element if dtype.stored == dtype.computed else f"({dtype.computed})({element})"


def store(dtype: DType, value: str) -> str:
    """A number that is calculated with, or any that C converts to it, as an element."""
    if dtype.name in _SMALL:
        return f"store_{dtype.name}((float)({value}))"
    if dtype.kind == "bool":
        return f"(unsigned char)(({value}) != 0)"
    return f"({dtype.stored})({value})"


def walk(name: str, index: str, rank: int, shape: int, strides: Sequence[tuple[str, int]]) -> str:
    """Statements that take ``index`` apart over ``rank`` extents, from ``shape`` on in the
    structure ``name``, and add to each of the variables its strides, from that field on."""
    lines = []
    for at in reversed(range(rank)):
        part = index
        if at:
            lines.append(f"long long axis{at} = {index} % {name}.n[{shape + at}];")
            lines.append(f"{index} /= {name}.n[{shape + at}];")
            part = f"axis{at}"
        lines += [f"{variable} += {part} * {name}.n[{first + at}];" for variable, first in strides]
    return "\n    ".join(lines)


def record(name: str, count: int) -> str:
    """A structure of ``count`` 64-bit integers, by value."""
    return f"struct {name} {{ long long n[{count}]; }};\n"


def packed(values: Sequence[int]) -> bytes:
    """The bytes of such a structure."""
    return struct.pack(f"{len(values)}q", *values)


def require(device: Device, target: Target, *dtypes: DType) -> None:
    """Raises Unsupported where a device cannot calculate with one of the types."""
    if target.kind != "opencl" or "fp64" in target.features:
        return
    for dtype in dtypes:
        if dtype.name == "float64":
            raise Unsupported(
                f"float64: {device.address} ({device.name}) calculates in single precision only; "
                "use float32 (astype)",
                code="unsupported",
                driver=device.driver,
                op="float64",
                device=device.address,
            )

"""Random arrays by Philox: the same numbers on every device (``ops.random``).

There is no hidden state: the same seed, sequence and shape give the same numbers. ``sequence``
tells apart what has the same seed, such as the steps of a run.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput
from drivetrain.hal import layout, strided
from drivetrain.hal.dtype import DTYPES, DType, dtype_of
from drivetrain.hal.kernels import philox

if TYPE_CHECKING:
    from drivetrain.hal.array import Array
    from drivetrain.hal.device import Device
    from drivetrain.hal.stream import Stream

__all__ = ["bits", "normal", "uniform"]


def uniform(
    shape: Any,
    *,
    seed: int,
    sequence: int = 0,
    low: float = 0.0,
    high: float = 1.0,
    dtype: Any = "float32",
    device: Device | str | None = None,
    stream: Stream | None = None,
) -> Array:
    """Floats in [low, high), spread evenly."""
    found = _made(shape, dtype, False, seed, sequence, device, stream)
    if (low, high) == (0.0, 1.0):
        return found
    from drivetrain.hal import ops

    return ops.add(ops.multiply(found, float(high - low)), float(low))


def normal(
    shape: Any,
    *,
    seed: int,
    sequence: int = 0,
    mean: float = 0.0,
    std: float = 1.0,
    dtype: Any = "float32",
    device: Device | str | None = None,
    stream: Stream | None = None,
) -> Array:
    """Normal floats of a mean and a standard deviation."""
    found = _made(shape, dtype, True, seed, sequence, device, stream)
    if (mean, std) == (0.0, 1.0):
        return found
    from drivetrain.hal import ops

    return ops.add(ops.multiply(found, float(std)), float(mean))


def bits(
    shape: Any,
    *,
    seed: int,
    sequence: int = 0,
    device: Device | str | None = None,
    stream: Stream | None = None,
) -> Array:
    """Whole random words, uint32."""
    return _made(shape, DTYPES["uint32"], False, seed, sequence, device, stream)


def _made(
    shape: Any,
    dtype: Any,
    is_normal: bool,
    seed: int,
    sequence: int,
    device: Device | str | None,
    stream: Stream | None,
) -> Array:
    from drivetrain.hal.creation import stream_of

    kind = dtype_of(dtype)
    for name, value in (("seed", seed), ("sequence", sequence)):
        if not isinstance(value, int) or not 0 <= value < 1 << 64:
            raise BadInput(f"random: the {name} {value!r} is no int of 0 to 2^64 - 1")
    if kind.kind != "float" and kind.name != "uint32":
        raise BadInput(f"random numbers are floats, or words of uint32; {kind} is neither")
    on = stream_of(device, stream, "random")
    out = strided.new(layout.shape_of(shape, "random"), kind, on)
    if out.size:
        word = "words" if kind.name == "uint32" else philox.kind_of(kind, is_normal)
        philox.run(on, out.memory.buffer, word, out.size, seed, 0, sequence)
    return out


def rounded(value: float, dtype: DType) -> float:
    """A Python float as an element of a smaller type holds it; infinite beyond its range."""
    from drivetrain.hal.kernel import BF16, packed

    number = float(value)
    try:
        if dtype.name == "bfloat16":
            word = struct.unpack("<H", packed(BF16, number))[0]
            return float(struct.unpack("<f", struct.pack("<I", word << 16))[0])
        letter = dtype.format
        return float(struct.unpack(letter, struct.pack(letter, number))[0])
    except (OverflowError, BadInput):
        return float("inf") if number > 0 else float("-inf")

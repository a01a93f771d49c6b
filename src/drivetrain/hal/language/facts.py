"""What a compiled kernel is to the rest of the house: plain facts, no code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Compiled", "KernelFacts", "Param", "Translated"]

SCALARS = {
    "i8": 1,
    "i16": 2,
    "i32": 4,
    "i64": 8,
    "u8": 1,
    "u16": 2,
    "u32": 4,
    "u64": 8,
    "f16": 2,
    "f32": 4,
    "f64": 8,
}
"""Words of `Param.type` for numbers, and their bytes. ``bool`` is ``u8``, an enum ``i32``."""


@dataclass(frozen=True)
class Param:
    """One parameter of a kernel."""

    type: str
    """``ptr``, ``struct`` or a key of `SCALARS`. CUDA's vector types (``float4``) are structs."""
    nbytes: int
    """As the caller passes it: a pointer is 8, a struct has the size that C gives it."""
    name: str


@dataclass(frozen=True)
class KernelFacts:
    """What must be known of a kernel to launch it."""

    symbol: str
    """What `Backend.function` is asked for. On ``cpu`` the shared object exports it with
    ``dt_cpu_`` in front. It differs from the name in the source for templates (``scale<float>``
    is ``scale_float``), for C++ names on CUDA, and where a name is a word of the target."""
    params: tuple[Param, ...] | None
    """None where the source could not tell: then whoever takes the kernel gives the types."""
    dynamic_shared: bool = False
    """It declares ``extern __shared__``. In OpenCL a ``__local`` pointer comes last then."""
    barriers: bool = False
    """Its threads wait for one another."""
    launch_bounds: int = 0
    """Most threads of a block, from ``__launch_bounds__``; 0 when not given."""
    block: tuple[int, int, int] | None = None
    """The only block it runs with; None where the caller chooses."""
    shared_bytes: int = 0
    """Dynamic shared memory that each launch needs beside what the caller asks for."""
    hidden: int = 0
    """Pointers behind the parameters that the compiler added; null is what they are given."""


@dataclass(frozen=True)
class Translated:
    """A translation unit in the target's language."""

    text: str
    kernels: Mapping[str, KernelFacts]
    """By the name that the user writes."""
    lines: tuple[int, ...] = ()
    """``lines[i]`` is the user's line that line ``i + 1`` of ``text`` came from, 0 for none."""

    def line(self, emitted: int) -> int:
        """The user's line behind a line of ``text``, both counted from 1; 0 when there is none."""
        return self.lines[emitted - 1] if 0 < emitted <= len(self.lines) else 0


@dataclass(frozen=True)
class Compiled:
    """What a compiler made, ready for `Backend.module_load`."""

    form: str
    """``ptx``, ``cubin``, ``cl``, ``spirv``, ``so``, ``hsaco``."""
    code: bytes
    kernels: Mapping[str, KernelFacts] = field(default_factory=dict)
    log: str = ""
    """What the compiler said, warnings included, in the user's lines."""

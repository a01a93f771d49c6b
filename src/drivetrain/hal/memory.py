"""Memory of a device."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryInfo:
    """Bytes; ``free_bytes`` is what a new allocation may hope for."""

    total_bytes: int
    used_bytes: int
    free_bytes: int

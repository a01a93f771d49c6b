"""Kinds of memory and ways of copying: the words that the core and every driver share."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Kind(IntEnum):
    """What sort of memory an allocation is."""

    DEVICE = 0
    """The device's own. The host does not touch it."""
    PINNED = 1
    """Host memory that the device reaches and copies fast. Group ``pinned``."""
    MANAGED = 2
    """Memory that both sides touch and that moves by itself. Group ``managed``."""


class Way(IntEnum):
    """Which side each end of a copy lies on. ``HOST`` is any host memory of this process."""

    HOST_TO_HOST = 0
    HOST_TO_DEVICE = 1
    DEVICE_TO_HOST = 2
    DEVICE_TO_DEVICE = 3

    @property
    def words(self) -> str:
        """``host to device`` and so on."""
        return self.name.replace("_", " ").lower()


@dataclass(frozen=True)
class MemoryInfo:
    """Bytes; ``free_bytes`` is what a new allocation may hope for."""

    total_bytes: int
    used_bytes: int
    free_bytes: int

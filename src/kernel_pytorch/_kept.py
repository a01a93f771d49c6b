"""Names that are kept for code written against the guide, and what they are called now."""

from __future__ import annotations

import warnings

_told: set[str] = set()


def kept(name: str, instead: str, *, level: int = 3) -> None:
    """A DeprecationWarning, once for each name in a process, shown at the caller's line."""
    if name in _told:
        return
    _told.add(name)
    warnings.warn(
        f"{name} is kept for code written against the Hardware Abstraction Guide; new code uses "
        f"{instead} (docs/kernel_pytorch.md has the table)",
        DeprecationWarning,
        stacklevel=level,
    )

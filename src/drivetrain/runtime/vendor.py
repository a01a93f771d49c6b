"""Scripts that name one vendor's devices: where they are placed, and what they may not undo.

A script that says ``.cuda()`` runs unchanged on a job's NVIDIA or AMD device, which is ``cuda:0``
in its worker and the only one there. Which kinds of devices it cannot do without is read from its
text (`drivetrain.pytorch.porting`); nothing is run.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from drivetrain.pytorch.porting import read, tables
from drivetrain.pytorch.porting.reading import Finding

__all__ = ["FEATURE", "keep_devices", "named_device", "warning"]

FEATURE = "torch:"
"""Before torch's kind of device: a feature of candidates that placement can ask for."""

_MOST_BYTES = 1 << 20
_KEPT = frozenset(name for name in tables.ENVIRONMENT if name != "CUDA_DEVICE_ORDER")


def named_device(script: str) -> Finding | None:
    """The first line of a script that names a kind of device and does not ask whether it is there;
    None where there is none, or the script cannot be read."""
    try:
        path = Path(script)
        if path.stat().st_size > _MOST_BYTES:
            return None
        found = read(ast.parse(path.read_bytes()), path.name)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return None  # the script says so itself when it is run
    return next((f for f in found if f.effect == "fails" and f.device_type), None)


def warning(finding: Finding, address: str, torch_device: str) -> str:
    """What is said when a script gets a device of another kind than it names."""
    return (
        f"line {finding.line} of {finding.path} says {finding.text}, which is {finding.vendor}; on "
        f"{address} torch has {torch_device}, and that line fails when it is reached. `drivetrain "
        "port` names the portable form of each such line"
    )


def keep_devices(tell: Callable[[str], None]) -> None:
    """From here on the variables that pick devices stay as the runtime set them.

    Scripts write ``os.environ["CUDA_VISIBLE_DEVICES"] = "0"`` for machines where they pick; in a
    job that would be a device that the job does not hold. Writing one is told, once, and ignored.
    """
    told: set[str] = set()

    def ignored(name: Any, what: str) -> bool:
        if name not in _KEPT:
            return False
        if name not in told:
            told.add(name)
            tell(f"the script {what} {name}; a job keeps the device that it was given")
        return True

    class Environment(type(os.environ)):  # type: ignore[misc]
        def __setitem__(self, name: Any, value: Any) -> None:
            if self.get(name) == value or not ignored(name, "sets"):
                super().__setitem__(name, value)

        def __delitem__(self, name: Any) -> None:
            if not ignored(name, "deletes"):
                super().__delitem__(name)

    os.environ.__class__ = Environment

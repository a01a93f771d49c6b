"""Lists of devices that a child process made, kept until something changes that they depend on."""

from __future__ import annotations

import time
from typing import Any

from drivetrain.hal import config, wire
from drivetrain.hal.device import DeviceInfo

_MOST = 8
"""Lists in a file: workers see other devices than who starts them."""


def read(file: str, fingerprint: str) -> tuple[DeviceInfo, ...] | None:
    """What was found under this fingerprint; None when nothing was."""
    kept = config.read_json(config.state_folder() / file).get(fingerprint)
    try:
        return tuple(wire.info_from_json(value) for value in kept["found"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return None  # nothing was kept, or another version wrote it


def write(file: str, fingerprint: str, found: tuple[DeviceInfo, ...]) -> None:
    path = config.state_folder() / file
    own = {"at": time.time(), "found": [wire.info_to_json(info) for info in found]}

    def change(others: dict[str, Any]) -> dict[str, Any]:
        dated = [key for key, each in others.items() if isinstance(each, dict) and "at" in each]
        newest = sorted(dated, key=lambda key: str(others[key]["at"]))[-_MOST + 1 :]
        return {**{key: others[key] for key in newest}, fingerprint: own}

    try:
        config.change_json(path, change)
    except OSError:
        pass  # the next one asks the loader again

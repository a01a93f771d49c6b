"""Reading sensors that the Linux kernel shows as small files. Nothing here raises."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path("/")
SHORTEST_S = 0.05
"""Between two looks at a counter: anything shorter tells more of the counter's grain than of it."""

_MOST = 1 << 16
_MOST_COUNTERS = 4096


def pci_folder(pci: str, root: Path = ROOT) -> Path | None:
    """The kernel's folder of the card at this PCI address; None when there is none."""
    match = re.fullmatch(r"(?:([0-9a-f]{4,8}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", pci.lower())
    if match is None:
        return None
    domain = int(match[1] or "0", 16)
    folder = root / "sys/bus/pci/devices" / f"{domain:04x}:{match[2]}"
    return folder if folder.is_dir() else None


def gone(pci: str, folder: Path | None) -> str:
    """Why the card at ``pci`` does not answer; empty when it does."""
    if folder is None:
        return f"there is no PCI device {pci}"
    if (content(folder / "config") or b"")[:4] == b"\xff\xff\xff\xff":  # how an empty bus reads
        return f"PCI device {pci} fell off the bus"
    return ""


def text(path: Path) -> str | None:
    """The file's text without the space around it; None when it cannot be read.

    A sensor of a card that is asleep answers with an error: it is as good as absent.
    """
    found = content(path)
    return None if found is None else found.decode(errors="replace").strip()


def content(path: Path) -> bytes | None:
    """At most 64 KiB of the file; None when it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(_MOST)
    except OSError:
        return None


def number(path: Path) -> int | None:
    """The whole number in the file."""
    found = text(path)
    try:
        return None if found is None else int(found)
    except ValueError:
        return None


def scaled(path: Path, divisor: float) -> float | None:
    """The number in the file over ``divisor``: hwmon counts in thousandths and millionths."""
    found = number(path)
    return None if found is None else found / divisor


def first(values: Iterable[float | None]) -> float | None:
    """The first that is there."""
    return next((value for value in values if value is not None), None)


def hwmon(device: Path, name: str) -> Path | None:
    """The hwmon folder of that name below a device."""
    for folder in sorted(device.glob("hwmon/hwmon*")):
        if text(folder / "name") == name:
            return folder
    return None


def labelled(folder: Path, kind: str, unit: float, item: str = "input") -> dict[str, float]:
    """hwmon channels of a kind (``temp``, ``power``, ``energy``): label, or the channel's number,
    -> reading over ``unit``."""
    found: dict[str, float] = {}
    for path in sorted(folder.glob(f"{kind}[0-9]*_{item}")):
        channel = path.name.removesuffix(f"_{item}")
        value = scaled(path, unit)
        if value is not None:
            found[text(folder / f"{channel}_label") or channel.removeprefix(kind)] = value
    return found


Counters = dict[tuple[str, ...], tuple[float, float]]
"""Key of a counter -> (count, seconds on some clock)."""


class Rates:
    """Turns counters into rates between one look and the next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: Counters = {}
        self._known: dict[tuple[str, ...], float] = {}

    def over(self, counters: Callable[[], Counters]) -> dict[tuple[str, ...], float]:
        """Counts a second of each of ``counters()``. One that was not seen before is looked at
        twice, 50 ms apart; one that went back (a reset) has no rate this time."""
        with self._lock:
            seen = counters()
            if not seen.keys() <= self._last.keys():
                self._look(seen)
                time.sleep(SHORTEST_S * 1.1)
                seen = counters()
            self._look(seen)
            return {key: self._known[key] for key in seen if key in self._known}

    def _look(self, seen: Counters) -> None:
        if len(self._last) > _MOST_COUNTERS:
            self._last.clear()
            self._known.clear()
        for key, (count, at) in seen.items():
            before = self._last.get(key)
            if before is not None and at - before[1] < SHORTEST_S:
                continue  # the rate of the last look still holds
            self._last[key] = (count, at)
            self._known.pop(key, None)
            if before is not None and count >= before[0]:
                self._known[key] = (count - before[0]) / (at - before[1])


def reading_name(label: str) -> str:
    """A name for ``vendor_specific`` made of a sensor's label."""
    words = re.sub(r"[^a-z0-9]+", "_", label.lower()).strip("_")
    return words[:32] if words[:1].isalpha() else f"sensor_{words[:32]}".rstrip("_")

"""What a check is, and the list of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from drivetrain.hal.device import Device

TOPICS = (
    "discovery",
    "memory",
    "copies",
    "ordering",
    "events",
    "timing",
    "limits",
    "peer",
    "graphs",
    "kernels",
    "families",
    "errors",
    "faults",
    "leaks",
    "threads",
    "lifecycle",
)
"""Each is a module of ``checks`` and runs in a process of its own, in this order."""

TWO_DEVICES = "two devices"
INJECTION = "injection"
CHECKED_ADDRESSES = "checked addresses"
OWN_MEMORY = "memory of its own"
NOT_OPENED = "no open device"
"""What a check may need besides the driver's groups."""
_WORDS = frozenset({TWO_DEVICES, INJECTION, CHECKED_ADDRESSES, OWN_MEMORY, NOT_OPENED})


class Failed(AssertionError):
    """What a check found. Its text says what was expected and what happened."""


def expect(condition: object, otherwise: str) -> None:
    """Raises Failed unless ``condition``."""
    if not condition:
        raise Failed(otherwise)


@dataclass(frozen=True)
class Check:
    """One promise of a driver."""

    name: str
    """``topic.promise``."""
    proves: str
    function: Callable[[Device], None]
    """Raises Failed or any error; Unsupported means that the device does not have it, or that it
    cannot be shown here."""
    needs: frozenset[str] = frozenset()
    """Groups of the driver, or one of the words above; without them it is "not declared"."""
    limit_s: float = 60.0
    long: bool = False
    """Runs with ``--long`` only."""
    optional: str = ""
    """What a device may lack (``double precision``): skipping is no gap then."""

    @property
    def topic(self) -> str:
        return self.name.partition(".")[0]

    @property
    def groups(self) -> frozenset[str]:
        """The groups among what it needs."""
        return self.needs - _WORDS


_found: dict[str, Check] = {}


def check(
    *needs: str, limit_s: float = 60.0, long: bool = False, optional: str = ""
) -> Callable[[Callable[[Device], None]], Callable[[Device], None]]:
    """Add a function of a module of ``checks`` to the kit; its first line says what it proves."""

    def added(function: Callable[[Device], None]) -> Callable[[Device], None]:
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        proves = " ".join((function.__doc__ or "").partition("\n\n")[0].split())
        _found[name] = Check(name, proves, function, frozenset(needs), limit_s, long, optional)
        return function

    return added


def add(each: Check) -> None:
    """Add a check that is no plain function."""
    _found[each.name] = each


@cache
def checks() -> tuple[Check, ...]:
    """All checks, by topic."""
    for topic in TOPICS:
        import_module(f"drivetrain.hal.conformance.checks.{topic}")
    order = {topic: at for at, topic in enumerate(TOPICS)}
    return tuple(sorted(_found.values(), key=lambda each: order[each.topic]))

"""Who is told of the work that this process queues: profiles and recordings, usually nobody.

The core asks ``active`` before it tells anything, and the C path asks one flag, so that nobody
pays for what nobody watches. While somebody does, launches take the slow path through Python.
"""

from __future__ import annotations

import os
import threading
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from drivetrain.hal import hot

if TYPE_CHECKING:
    from drivetrain.hal.graph import Graph
    from drivetrain.hal.kernel import Launch
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.opened import Opened

LAUNCHES = 1
"""Launches are told of."""
ALL = 2
"""So are allocations, their ends, and events."""


@dataclass(slots=True)
class Work:
    """One call that queues work, or waits for it."""

    kind: str
    """``kernel``, ``copy``, ``fill``, ``graph``, ``wait``, or ``link``: all of a copy between
    devices."""
    name: str
    """The kernel's; of a copy its direction; what waits."""
    opened: Opened | None
    """Whose stream it is queued on; None: it happens on the host alone."""
    stream: int = 0
    """That stream's handle; 0: the host alone."""
    nbytes: int = 0
    """Moved by a copy or a fill."""
    launch: Launch | None = None
    graph: Graph | None = None
    buffers: tuple[Buffer, ...] = ()
    """Destination first."""
    facts: tuple[Any, ...] = ()
    """Of a fill the pattern; of a copy with the host (address, what keeps it alive)."""
    captured: bool = False
    """It is noted in a graph and does not happen now."""
    part: bool = False
    """It is one step of a ``link``."""
    flops: float | None = None
    """Of work that is no kernel of ours (a vendor's library): operations, where they are known."""
    dtype: str = ""
    """Of those operations."""


class Watcher(Protocol):
    """Is told of each call; must not raise, and must not queue anything that watchers see."""

    level: int
    """`LAUNCHES` or `ALL`."""

    def begins(self, work: Work) -> Any:
        """Before the call. What it returns comes back in `ends`."""

    def ends(self, work: Work, token: Any, error: BaseException | None) -> None:
        """After the call, which ``error`` ended, if any."""

    def told(self, what: str, *facts: Any) -> None:
        """Of what is not queued: ``alloc``, ``close``, ``record``, ``compile``, ..."""

    def closing(self, opened: Opened) -> None:
        """The device closes; what it knows must be read now."""


active: tuple[Watcher, ...] = ()
NOBODY = nullcontext()
"""``with around(work) if active else NOBODY: ...``"""
_lock = threading.Lock()


def _change(watchers: tuple[Watcher, ...]) -> None:
    global active
    active = watchers
    hot.watch(max((each.level for each in watchers), default=0))


def add(watcher: Watcher) -> None:
    with _lock:
        _change((*active, watcher))


def remove(watcher: Watcher) -> None:
    with _lock:
        _change(tuple(each for each in active if each is not watcher))


class around:
    """``with around(work): ...``: the call that queues it."""

    __slots__ = ("_tokens", "_work")

    def __init__(self, work: Work) -> None:
        self._work = work

    def __enter__(self) -> None:
        self._tokens = [(each, each.begins(self._work)) for each in active]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for each, token in reversed(self._tokens):
            each.ends(self._work, token, error)


def tell(what: str, *facts: Any) -> None:
    for each in active:
        each.told(what, *facts)


def closing(opened: Opened) -> None:
    for each in active:
        each.closing(opened)


def _after_fork() -> None:
    """The child has no device, so nothing to watch."""
    global _lock
    _lock = threading.Lock()
    _change(())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

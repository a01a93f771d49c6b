"""The twin of ``_hot``: the same classes without C. What is fast there is simply done here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

from drivetrain.errors import BadInput

GRAIN = 512
BIN = 64

_slow: dict[str, Callable[..., Any]] = {}
_taking = threading.RLock()


def bind(buffer: type, kind: object, alloc: Callable[..., Any], launch: Callable[..., Any]) -> None:
    """Tells the classes what to call for all that is not usual."""
    _slow.update(alloc=alloc, launch=launch)


def alloc_method(device: Any, nbytes: int, **options: Any) -> Any:
    return _slow["alloc"](device, nbytes, **options)


def bind_event(event: type) -> None:
    """Tells what `record` makes."""


def watch(level: int) -> None:
    """From 1 on launches go through Python, from 2 on allocations and events too, as they do here
    always."""


def _rounded(nbytes: int) -> int:
    return (max(nbytes, 1) + GRAIN - 1) // GRAIN * GRAIN


class FreeLists:
    """Free blocks by stream and size, and counts of the used ones."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finaliser may come in between
        self._lists: dict[tuple[int, int], list[int]] = {}
        self._live = self._requested = self._allocated = self._listed = 0
        self._peak_requested = self._peak_allocated = 0

    def count(self, nbytes: int, used: bool) -> None:
        """A block came from elsewhere, or went there."""
        with self._lock:
            sign = 1 if used else -1
            self._live += sign
            self._requested += sign * nbytes
            self._allocated += sign * _rounded(nbytes)
            self._peak_requested = max(self._peak_requested, self._requested)
            self._peak_allocated = max(self._peak_allocated, self._allocated)

    def take(self, nbytes: int, stream: int) -> int:
        """The address of a free block, counted as used; 0: none."""
        with self._lock:
            found = self._lists.get((stream, _rounded(nbytes)))
            if not found:
                return 0
            self._listed -= 1
            self.count(nbytes, True)
            return found.pop()

    def put(self, ptr: int, nbytes: int, stream: int) -> bool:
        """Whether it was kept; it counts as free in both cases."""
        with self._lock:
            self.count(nbytes, False)
            found = self._lists.setdefault((stream, _rounded(nbytes)), [])
            if len(found) >= BIN:
                return False
            found.append(ptr)
            self._listed += 1
            return True

    def drain(self, stream: int | None = None, least: int = 0) -> list[tuple[int, int, int]]:
        """[(stream, bytes, ptr)] of one stream or all, of that size or larger, no longer kept."""
        with self._lock:
            keys = [k for k in self._lists if stream in (None, k[0]) and k[1] >= least]
            blocks = [(*key, ptr) for key in keys for ptr in self._lists.pop(key)]
            self._listed -= len(blocks)
            return blocks

    def counts(self) -> tuple[int, int, int, int, int, int]:
        """(live, requested, allocated, peak requested, peak allocated, listed)"""
        with self._lock:
            return (
                self._live,
                self._requested,
                self._allocated,
                self._peak_requested,
                self._peak_allocated,
                self._listed,
            )


class StreamCore:
    """The part of a Stream that launches read."""

    __slots__ = ("_events", "_graph", "_lists", "_opened", "_pool", "_timing", "device", "handle")

    handle: int
    _graph: Any
    _lists: Any
    _opened: Any
    _pool: Any
    _events: Any
    _timing: bool
    device: Any

    def __new__(cls, *_: object, **__: object) -> Any:
        self: Any = super().__new__(cls)
        self.handle = 0
        self._graph = self._lists = self._opened = self._pool = self._events = self.device = None
        self._timing = False
        return self

    def _set_calls(self, calls: tuple[int, ...]) -> None:
        pass

    def _record(self, event: int) -> bool:
        return False

    def record(self) -> Any:
        """An event that is done when all that is queued on the stream so far is done."""
        return self._new_record()  # type: ignore[attr-defined]


class EventCore:
    """The part of an Event that is made and let go."""

    __slots__ = ("_free", "_handle", "_opened", "_timing", "device")

    _handle: int
    _opened: Any
    _free: Any
    _timing: bool
    device: Any

    def __new__(cls, *_: object, **__: object) -> Any:
        self: Any = super().__new__(cls)
        self._handle, self._timing = 0, False
        self._opened = self._free = self.device = None
        return self

    def __del__(self) -> None:
        handle, self._handle = self._handle, 0
        if handle:
            try:
                self._opened.give_event(handle, self._timing)
            except Exception:
                pass  # the device is closed


class BufferCore:
    """The part of a Buffer that launches read."""

    __slots__ = (
        "_home",
        "_opened",
        "_resource",
        "_root",
        "_users",
        "_waits",
        "device",
        "kind",
        "nbytes",
        "ptr",
    )

    ptr: int
    nbytes: int
    kind: Any
    device: Any
    _home: Any
    _opened: Any
    _resource: Any
    _root: Any
    _users: Any
    _waits: Any

    def __new__(cls, *_: object, **__: object) -> Any:
        self: Any = super().__new__(cls)
        self.ptr = self.nbytes = 0
        self._home = self._opened = self._resource = self._root = self._users = self._waits = None
        return self

    @property
    def closed(self) -> bool:
        """Whether it, or what it is a view of, was closed."""
        at: Any = self
        while at.ptr:
            if not isinstance(at._root, BufferCore):
                return False
            at = at._root
        return True

    def close(self, stream: Any = None) -> None:
        """Give the memory back, after the work queued so far on the buffer's stream, on ``stream``
        and on every stream that used it. Closing twice does nothing."""
        if self.ptr:
            self._close(stream)  # type: ignore[attr-defined]

    def _last_user(self, stream: Any) -> None:
        pass

    def _take(self) -> tuple[int, Any]:
        """(address, resource), of which the buffer has none from here on; (0, None) when another
        thread has taken them."""
        with _taking:
            ptr, self.ptr = self.ptr, 0
            resource, self._resource = self._resource, None
            root, self._root = self._root, None
        del root  # outside of the lock: it may be the last that keeps something
        return ptr, resource

    def __del__(self) -> None:
        if self.ptr and self._resource is not None:
            try:
                self._close()  # type: ignore[attr-defined]
            except Exception:
                pass  # the device is closed or lost: there is nobody left to give it back to


class KernelCore:
    """The part of a Kernel that launches."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return super().__new__(cls)

    def _bind(self, *_: object) -> bool:
        return False

    def __call__(self, *arguments: Any, **options: Any) -> None:
        _slow["launch"](self, *arguments, **options)


class GraphCore:
    """The part of a Graph that launches."""

    def __new__(cls, *_: object, **__: object) -> Any:
        return super().__new__(cls)

    def _arm(self, *_: object) -> bool:
        return False

    def _disarm(self) -> None:
        pass

    def launch(self, stream: Any) -> None:
        """Queue all of it. Raises BadInput when one of its buffers is closed."""
        self._launch_from(stream, 0)  # type: ignore[attr-defined]


class PlanCore:
    """The part of a Plan that launches."""

    __slots__ = ("_launch", "_stream")

    _launch: Any
    _stream: Any

    def __new__(cls, launch: Any, stream: Any, *_: object) -> Any:
        self: Any = super().__new__(cls)
        self._launch, self._stream = launch, stream
        return self

    def _uses(self, buffers: tuple[Any, ...]) -> None:
        pass

    def __call__(self) -> None:
        self._launch.on(self._stream)


def launch_all(plans: Iterable[Any]) -> None:
    """Queue the launches of an iterable of plans in their order, as calling one after the other
    does, without the interpreter's share of each call. Raises BadInput, before anything is queued,
    for what is no plan; where a plan raises, those before it are queued."""
    try:
        every = tuple(plans)
    except TypeError:
        raise BadInput("launch_all takes plans") from None
    if not all(isinstance(each, PlanCore) for each in every):
        raise BadInput("launch_all takes plans")
    for each in every:
        each()

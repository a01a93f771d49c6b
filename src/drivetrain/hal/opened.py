"""Devices that are open in this process: one backend each, shared by all that use the device.

A device is opened by its first buffer, stream or module and stays open until the process ends or
`close_all` is called. After ``fork`` the child has none: its first use raises a HalError.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from drivetrain.errors import HalError, Unsupported
from drivetrain.hal import loading, watch
from drivetrain.hal.driver import Backend, Target
from drivetrain.hal.kinds import Kind
from drivetrain.hal.resource import DriverMemory, MemoryResource

if TYPE_CHECKING:
    from drivetrain.hal.copies import Staging
    from drivetrain.hal.device import Device
    from drivetrain.hal.stream import Stream

_WAIT_LIMIT = "DRIVETRAIN_WAIT_LIMIT_S"
_DEFAULT_WAIT_S = 600.0


def wait_limit_s() -> float:
    """Seconds that a wait without a limit of its own may take: 600, or DRIVETRAIN_WAIT_LIMIT_S."""
    text = os.environ.get(_WAIT_LIMIT, "")
    if not text:
        return _DEFAULT_WAIT_S
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        from drivetrain.errors import BadInput

        raise BadInput(f"{_WAIT_LIMIT}={text!r} must be a number of seconds above 0")
    return limit


def _calls(backend: Backend) -> tuple[int, ...]:
    if not hasattr(backend, "calls"):
        return (0,) * 9
    found = backend.calls()
    return (
        int(found.abi),
        found.launch,
        found.set_value,
        found.set_pointer,
        found.record,
        found.context,
        found.get_context,
        found.set_context,
        found.graph_launch,
    )


class KeepsByStream(Protocol):
    """Keeps something for each stream and must hand it on when the stream ends."""

    def forget_stream(self, stream: int, heir: int, *, wait: bool = True) -> bool: ...


class Opened:
    """A device's backend in this process, and what the core keeps beside it."""

    def __init__(self, device: Device, backend: Backend) -> None:
        self.device = device
        self.backend = backend
        self.pid = os.getpid()
        self.lock = threading.RLock()
        self._pools: dict[int, MemoryResource] = {}
        self._events: dict[bool, list[int]] = {False: [], True: []}
        self._inner: dict[str, Stream] = {}
        self.peers: dict[str, bool] = {}
        """Address of another device -> whether this one reads its memory."""
        self.calls = _calls(backend)
        """What C calls directly; see ``hot.h``."""
        self.stagings: dict[Opened, Staging] = {}
        self.kernels: dict[object, Any] = {}
        """Modules and kernels of ``hal.kernels`` that are loaded, by what they were made from."""
        self.capturing: set[int] = set()
        """Streams of which the driver captures a graph: nothing else may be queued there."""
        self.closed = False
        self.streams: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._keepers: weakref.WeakSet[KeepsByStream] = weakref.WeakSet()
        self._ending: deque[tuple[int, int, bool]] = deque()

    def close(self) -> None:
        """Close the backend. What was made from it is dead from here on: streams are closed, and
        buffers have nobody to go back to."""
        with self.lock:
            if self.closed:
                return
            if watch.active:
                watch.closing(self)
            self.closed = True
            for stream in list(self.streams):
                stream.handle = 0
        self.kernels.clear()
        self.backend.close()

    def require(self, group: str, op: str) -> None:
        """Raises Unsupported when the backend does not declare ``group``."""
        if group not in self.backend.groups:
            raise Unsupported(
                f"{op}: {self.device.address} ({self.device.name}) has no {group}; it has "
                f"{', '.join(sorted(self.backend.groups)) or 'no optional group'}",
                code="unsupported",
                driver=self.device.driver,
                op=op,
                device=self.device.address,
            )

    def target_of(self, source: object) -> Target:
        """What ``source`` is compiled for here; a Triton function where the driver says."""
        target = self.backend.target
        if getattr(source, "language", "") == "triton" and "triton" in self.backend.groups:
            named: Any = self.backend
            return replace(target, triton=named.triton_target())
        return target

    def pool(self, kind: Kind) -> MemoryResource:
        """The device's own pool for memory of ``kind``."""
        with self.lock:
            found = self._pools.get(kind)
            if found is None:
                from drivetrain.hal.pool import Pool

                found = self._pools[kind] = Pool(DriverMemory(self, kind))
            return found

    def use_pool(self, pool: MemoryResource) -> None:
        """From here on ``pool`` is the device's own for memory of its kind. Raises BadInput when
        something came from another one already."""
        from drivetrain.errors import BadInput

        if pool.opened is not self:
            raise BadInput(
                f"use_pool: the pool is of {pool.opened.device.address}, not {self.device.address}"
            )
        with self.lock:
            found = self._pools.setdefault(pool.kind, pool)
        if found is not pool:
            raise BadInput(
                f"{self.device.address} has its pool of {pool.kind.name.lower()} memory already; "
                "name another one before the first buffer is made"
            )

    def inner_stream(self, purpose: str) -> Stream:
        """A stream of the core's own, made once for each purpose."""
        from drivetrain.hal.stream import Stream

        with self.lock:
            found = self._inner.get(purpose)
            if found is None:
                found = self._inner[purpose] = Stream(self, self.backend.stream_create(0))
            return found

    def end_stream(self, stream: int, heir: int, owned: bool, *, wait: bool) -> None:
        """Pools hand what they keep for a stream that ends to ``heir``, which waits for it; then
        it is destroyed, if it is ``owned``. A finaliser may have come in between a pool's own
        work: it does not ``wait``, and the stream ends when the next one is made."""
        with self.lock:
            keepers = list(self._keepers)
        if not all(keeper.forget_stream(stream, heir, wait=wait) for keeper in keepers):
            self._ending.append((stream, heir, owned))
        elif owned:
            self.backend.stream_destroy(stream)

    def end_streams(self) -> None:
        """End those that could not end when they were forgotten."""
        for _ in range(len(self._ending)):
            try:
                stream, heir, owned = self._ending.popleft()
            except IndexError:
                return  # another thread does it
            self.end_stream(stream, heir, owned, wait=False)

    def tell_of_streams(self, keeper: KeepsByStream) -> None:
        """From now on ``keeper`` is told of each stream that ends."""
        with self.lock:
            self._keepers.add(keeper)

    def wait_for(self, event: int, op: str) -> None:
        """Wait, on the host, for an event of the backend. Raises Timeout."""
        from drivetrain.hal.stream import late

        limit = wait_limit_s()
        if not self.backend.event_synchronize(event, limit):
            raise late(self, op, limit)

    def take_event(self, timing: bool = False) -> int:
        """An event of the backend, from those given back or new."""
        free = self._events[timing]
        try:
            return free.pop()
        except IndexError:
            return self.backend.event_create(timing)

    def free_events(self, timing: bool) -> list[int]:
        """The events that were given back; the C path takes from them and adds to them."""
        return self._events[timing]

    def give_event(self, event: int, timing: bool = False) -> None:
        free = self._events[timing]
        if len(free) < 256:
            free.append(event)
        else:
            self.backend.event_destroy(event)


_lock = threading.RLock()
_open: dict[tuple[str, str], Opened] = {}
_forked = False


def opened(device: Device) -> Opened:
    """The device, open. Raises HalError when it cannot be opened, Unsupported when its driver
    only serves torch."""
    key = (device.address, device.uuid)
    found = _open.get(key)
    if found is not None:
        return found
    with _lock:
        found = _open.get(key)
        if found is not None:
            return found
        if _forked:
            raise HalError(
                f"{device.address} cannot be opened: this process was forked from one that had "
                "devices open, and a driver does not survive that; start it anew (the start method "
                "`spawn` of multiprocessing)",
                code="forked",
                driver=device.driver,
                op="open",
                device=device.address,
            )
        from drivetrain.hal import kernel  # noqa: F401  (tells C whom to call for the unusual)

        driver = loading.load(device.driver)
        if driver.open is None:
            raise Unsupported(
                f"{device.address}: driver {device.driver} serves PyTorch only; it opens no device "
                "for kernels and buffers",
                code="unsupported",
                driver=device.driver,
                op="open",
                device=device.address,
            )
        found = _open[key] = Opened(device, _watched(driver.open(device.info), device))
        return found


def _watched(backend: Backend, device: Device) -> Backend:
    """With DRIVETRAIN_DEBUG=1, the backend behind one that explains failures."""
    if os.environ.get("DRIVETRAIN_DEBUG", "") != "1":
        return backend
    from drivetrain.hal.debug import Debug

    made: Any = Debug(backend, device)  # it passes on what it does not watch
    behind: Backend = made
    return behind


def close_all() -> None:
    """Close every open device. Objects that are left are dead; the devices may be opened anew."""
    with _lock:
        left = list(_open.values())
        _open.clear()
    for each in left:
        if each.pid == os.getpid():
            each.close()


class _LeftBehind:
    """Stands for a backend in a forked child: a wait there would be for the parent's threads."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def __getattr__(self, name: str) -> NoReturn:
        raise HalError(
            f"{name}: {self._device.address} was opened before this process was forked, and a "
            "driver does not survive that; start the process anew (the start method `spawn` of "
            "multiprocessing)",
            code="forked",
            driver=self._device.driver,
            op=name,
            device=self._device.address,
        )


def _after_fork() -> None:
    global _lock, _forked
    _lock = threading.RLock()
    _forked = _forked or bool(_open)
    for each in _open.values():
        each.lock = threading.RLock()  # another thread of the parent may have held it
        left: Any = _LeftBehind(each.device)
        each.backend = left
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(close_all)

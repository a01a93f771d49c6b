"""Streams and events: what happens in which order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput, DeviceLost, HalError, Timeout
from drivetrain.hal import hot, watch
from drivetrain.hal.hot import EventCore, StreamCore
from drivetrain.hal.kinds import Way
from drivetrain.hal.opened import wait_limit_s

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.graph import Graph
    from drivetrain.hal.hot import FreeLists
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.opened import Opened
    from drivetrain.hal.pool import Pool

_MOST_KEPT = 256


def wait_limit(timeout: float | None) -> float:
    """Seconds that a wait may take; None is the default. Raises BadInput."""
    if timeout is None:
        return wait_limit_s()
    if not timeout >= 0:
        raise BadInput(f"a wait of {timeout} seconds: give 0 or more")
    return timeout


class Event(EventCore):
    """A point in a stream's order. Made by `Stream.record`. A forgotten one is used again."""

    __slots__ = ("__weakref__",)

    if TYPE_CHECKING:  # they are in the core, in C or its twin
        _opened: Opened
        device: Device

    def __init__(self, opened: Opened, handle: int, timing: bool) -> None:
        self._opened = opened
        self.device = opened.device
        self._handle = handle
        self._timing = timing
        self._free = opened.free_events(timing)

    @property
    def done(self) -> bool:
        """Whether all that was queued before it has happened."""
        return self._opened.backend.event_done(self._handle)

    def synchronize(self, timeout: float | None = None) -> None:
        """Wait until it is done. Raises Timeout after ``timeout`` seconds (None: the default of
        DRIVETRAIN_WAIT_LIMIT_S, 600)."""
        limit = wait_limit(timeout)
        with (
            watch.around(watch.Work("wait", "event.synchronize", self._opened))
            if watch.active
            else watch.NOBODY
        ):
            if not self._opened.backend.event_synchronize(self._handle, limit):
                raise late(self._opened, "event.synchronize", limit)

    def seconds_since(self, start: Event) -> float:
        """Seconds on the device between ``start`` and this event; both must be done."""
        if not isinstance(start, Event):
            raise BadInput(f"seconds_since takes an Event, not {type(start).__name__}")
        if start._opened is not self._opened:
            raise BadInput(
                f"seconds_since: the events are of {start.device.address} and {self.device.address}"
            )
        self._opened.require("timing", "seconds_since")
        for name, event in (("start", start), ("end", self)):
            if not event.done:
                raise BadInput(f"seconds_since: the {name} event is not done; synchronize first")
        return self._opened.backend.event_seconds(start._handle, self._handle)

    def __repr__(self) -> str:
        return f"<Event on {self.device.address}>"


hot.bind_event(Event)


class Stream(StreamCore):
    """Work of one device in order. Made by ``Device.stream`` and ``Device.wrap_stream``."""

    __slots__ = ("__weakref__", "_heir", "_held", "_keeping", "_kept", "_owner")

    if TYPE_CHECKING:  # they are in the core, in C or its twin
        _opened: Opened
        device: Device
        handle: int
        _graph: Graph | None
        _pool: Pool | None
        _lists: FreeLists | None

    def __init__(self, opened: Opened, handle: int, *, owner: object = None) -> None:
        self._opened = opened
        self.device = opened.device
        self.handle = handle
        self._set_calls(opened.calls)
        opened.streams.add(self)
        self._owner = owner
        self._heir: Stream | None = None
        self._kept: list[object] = []
        self._held: deque[tuple[int, object]] = deque()
        self._keeping = threading.RLock()  # a finaliser may come in between
        self._timing = "timing" in opened.backend.groups
        self._events = opened.free_events(self._timing)

    # -- life --------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the stream. What was queued still happens; buffers of the stream live on."""
        handle = self.handle
        if not handle or self._opened.closed:
            return
        if self._graph is not None:
            raise BadInput("close: the stream is being captured; leave the `with` block first")
        self._end(handle, wait=True)

    def _end(self, handle: int, *, wait: bool) -> None:
        opened = self._opened
        if watch.active:
            watch.tell("stream closed", self)
        try:
            heir = opened.inner_stream("heir")
            heir.wait(self)
            heir._keep(self._take_kept())
            with heir._keeping:
                heir._held += self._held
            self._heir, self.handle = heir, 0
            opened.end_stream(handle, heir.handle, self._owner is None, wait=wait)
        except DeviceLost:
            self._kept, self.handle = [], 0  # nothing of it is left to let go of
        self._owner = None

    def __del__(self) -> None:
        handle = getattr(self, "handle", 0)
        if handle and not self._opened.closed:
            try:
                self._end(handle, wait=False)
            except Exception:
                pass  # the device is closed or lost

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"{self.handle:#x}" if self.handle else "closed"
        return f"<Stream {state} on {self.device.address}>"

    def _alive(self, op: str) -> int:
        if not self.handle:
            raise BadInput(f"{op}: the stream is closed")
        return self.handle

    # -- order -------------------------------------------------------------------------------

    if TYPE_CHECKING:

        def record(self) -> Event:
            """An event that is done when all that is queued on the stream so far is done."""

    def _new_record(self) -> Event:
        """`record` when it is not the usual case."""
        handle = self._alive("record")
        opened = self._opened
        if self._graph is not None:
            self._graph._no_events("record")
        event = opened.take_event(self._timing)
        try:
            if not self._record(event):
                opened.backend.event_record(event, handle)
        except BaseException:
            opened.give_event(event, self._timing)
            raise
        if self._graph is not None:
            self._graph._recorded.add(event)
        made = Event(opened, event, self._timing)
        if watch.active:
            watch.tell("record", made, self)
        return made

    def wait(self, other: Event | Stream) -> None:
        """What is queued here from now on waits for an event, or for all queued on a stream so
        far. Between drivers that share no events the caller waits."""
        handle = self._alive("wait")
        if isinstance(other, Stream):
            if other is self:
                return
            event = other.record()
        elif isinstance(other, Event):
            event = other
        else:
            raise BadInput(f"wait takes an Event or a Stream, not {type(other).__name__}")
        if event._opened is self._opened or (
            event.device.driver == self.device.driver and "peer" in self._opened.backend.groups
        ):
            if self._graph is not None:
                self._graph._takes_wait(event._handle)
            self._opened.backend.stream_wait(handle, event._handle)
            if watch.active:
                watch.tell("wait", event, self)
        else:
            event.synchronize()

    def synchronize(self, timeout: float | None = None) -> None:
        """Wait until all that was queued is done. Raises Timeout after ``timeout`` seconds (None:
        the default of DRIVETRAIN_WAIT_LIMIT_S, 600), and what failed of that work."""
        limit = wait_limit(timeout)
        if self._graph is not None:
            raise BadInput("synchronize: the stream is being captured; nothing has happened yet")
        handle = self._alive("synchronize")
        kept = self._take_kept()  # not what other threads queue while this one waits
        finished = False
        try:
            with self._watched("wait", "stream.synchronize") if watch.active else watch.NOBODY:
                finished = self._opened.backend.stream_synchronize(handle, limit)
        finally:
            if not finished:
                self._put_kept(kept)
        if not finished:
            raise late(self._opened, "stream.synchronize", limit)
        self._let_held_go()

    @property
    def done(self) -> bool:
        """Whether all that was queued so far has happened."""
        handle = self._alive("done")
        if self._graph is not None:
            raise BadInput("done: the stream is being captured; nothing has happened yet")
        kept = self._take_kept()
        finished = False
        try:
            finished = self._opened.backend.stream_done(handle)
        finally:
            if not finished:
                self._put_kept(kept)
        if finished:
            self._let_held_go()
        return finished

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Within the block, what is queued on this stream goes into a graph and does not happen.

        Buffers and host arrays of a graph are read and written when it is launched; the graph
        keeps them. Drivers without graphs keep a list of the commands.
        """
        from drivetrain.hal.graph import Graph

        self._alive("capture")
        if self._graph is not None:
            raise BadInput("capture: the stream is being captured already")
        graph = Graph(self._opened)
        graph._begin(self)
        handle = self.handle
        if graph.native:
            self._opened.capturing.add(handle)
        self._graph = graph
        if watch.active:
            watch.tell("capture", graph, self)
        try:
            yield graph
        except BaseException:
            self._graph = None
            graph._abandon(self)
            if watch.active:
                watch.tell("abandoned", graph, self)
            raise
        else:
            self._graph = None
            graph._end(self)
            if watch.active:
                watch.tell("captured", graph, self)
        finally:
            self._opened.capturing.discard(handle)

    # -- what buffers and kernels queue --------------------------------------------------------

    def _watched(
        self,
        kind: str,
        name: str,
        nbytes: int = 0,
        buffers: tuple[Buffer, ...] = (),
        facts: tuple[Any, ...] = (),
    ) -> watch.around:
        """Tell those who watch of work that is queued here."""
        work = watch.Work(kind, name, self._opened, self.handle, nbytes, buffers=buffers)
        work.facts, work.captured = facts, self._graph is not None
        return watch.around(work)

    def _fill(self, buffer: Buffer, pattern: bytes) -> None:
        """Queue repetitions of ``pattern`` over a buffer of the device."""
        handle = self._alive("fill")
        ptr, count = buffer.ptr, buffer.nbytes // len(pattern)
        with (
            self._watched("fill", "fill", buffer.nbytes, (buffer,), (pattern,))
            if watch.active
            else watch.NOBODY
        ):
            graph = self._graph
            if graph is None or not graph._takes("fill", (buffer,), (ptr, pattern, count)):
                self._opened.backend.fill(ptr, pattern, count, handle)

    def _do_host(
        self, buffer: Buffer, dst: int, src: int, nbytes: int, way: Way, keep: object
    ) -> None:
        """Queue a copy from or to memory of the host, which ``keep`` keeps alive."""
        handle = self._alive("copy")
        graph = self._graph
        reads = way is Way.HOST_TO_DEVICE
        with (
            self._watched(
                "copy", way.words, nbytes, (buffer,), (src if reads else dst, keep, int(way))
            )
            if watch.active
            else watch.NOBODY
        ):
            if graph is not None:
                graph._keeps(keep)
                if not graph._takes("copy", (buffer,), (dst, src, nbytes, int(way))):
                    self._opened.backend.copy(dst, src, nbytes, int(way), handle, False)
                return
            self._opened.backend.copy(dst, src, nbytes, int(way), handle, reads)
            if not reads:
                self._keep([keep])

    def _do_copy(
        self, buffers: tuple[Buffer, ...], dst: int, src: int, nbytes: int, way: Way
    ) -> None:
        """Queue a copy between two buffers of the device."""
        handle = self._alive("copy")
        graph = self._graph
        with self._watched("copy", way.words, nbytes, buffers) if watch.active else watch.NOBODY:
            if graph is None or not graph._takes("copy", buffers, (dst, src, nbytes, int(way))):
                self._opened.backend.copy(dst, src, nbytes, int(way), handle, False)

    def _keep(self, things: list[object]) -> None:
        """Keep things alive until what is queued so far is done."""
        with self._keeping:
            self._kept += things
        if len(self._kept) > _MOST_KEPT and self._graph is None and not self.done:
            self.synchronize()

    def _hold(self, thing: object) -> None:
        """The same for finalisers: it never waits."""
        at = self if self.handle or self._heir is None else self._heir
        if not at.handle:
            return
        if at._graph is not None:  # no event can be recorded now
            with at._keeping:
                at._kept.append(thing)
            return
        event = at._opened.take_event()
        at._opened.backend.event_record(event, at.handle)
        with at._keeping:
            at._held.append((event, thing))
        at._let_held_go()

    def _let_held_go(self) -> None:
        """Forget what is held for work that is done."""
        backend = self._opened.backend
        with self._keeping:
            while self._held and backend.event_done(self._held[0][0]):
                event, thing = self._held.popleft()
                self._opened.give_event(event)
                del thing

    def _take_kept(self) -> list[object]:
        with self._keeping:
            kept, self._kept = self._kept, []
            return kept

    def _put_kept(self, things: list[object]) -> None:
        with self._keeping:
            self._kept = things + self._kept

    def _give_back(self, users: set[Stream] | None) -> tuple[int, tuple[int, ...]]:
        """(the handle to free on, events that must be done first) for a buffer of this stream."""
        handle = self._behind()
        if not users:
            return handle, ()
        waits: dict[int, int] = {}
        for user in tuple(users):
            if user._opened is not self._opened:
                continue
            if user._graph is not None and user._graph.native:
                user._graph._wait_before()
                continue
            behind = user._behind()
            if behind and behind != handle and behind not in waits:
                event = waits[behind] = self._opened.take_event()
                self._opened.backend.event_record(event, behind)
        return handle, tuple(waits.values())

    def _behind(self) -> int:
        """The handle behind which all that was queued here is done: its own, or its heir's; 0 when
        the device is gone."""
        if self.handle or self._heir is None:
            return self.handle
        return self._heir.handle


def late(opened: Opened, op: str, limit_s: float) -> Timeout:
    device = opened.device
    return Timeout(
        f"{op}: the work queued on {device.address} was not done within {limit_s:g} s; it goes on. "
        "Wait again, or raise the limit",
        code="timeout",
        driver=device.driver,
        op=op,
        device=device.address,
    )


def check_capturing(stream: Stream, op: str) -> None:
    """Raises HalError for what cannot be done on a stream that is being captured."""
    if stream._graph is not None:
        raise HalError(
            f"{op}: the stream is being captured; do it before the capture begins",
            code="capturing",
            driver=stream.device.driver,
            op=op,
            device=stream.device.address,
        )

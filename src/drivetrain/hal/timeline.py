"""Times of queued work: events around each call on the device, the host's clock around the call.

One `Collector` serves all profiles that run, so that work is timed once however they nest. Where
the driver declares ``timing``, a span's device time is the time between two events; elsewhere the
collector waits for each call, and the time is the host's from the call to its end.

A device's clock is put on the host's by what must be true: nothing begins before it was queued, and
nothing ends after it was seen done. The first bound is used; the room between the two is reported.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from drivetrain.errors import HalError
from drivetrain.hal import nvtx, watch
from drivetrain.hal.opened import wait_limit_s

if TYPE_CHECKING:
    from drivetrain.hal.opened import Opened
    from drivetrain.hal.profile import Profile
    from drivetrain.hal.watch import Work

_SEGMENT_S = 4.0
"""The device's clock is compared with the host's anew after this long: clocks drift, and CUDA
tells times in single precision."""
_FLUSH = 256
_MOST_PENDING = 8192
"""Spans whose events are not read yet; beyond it a span gets no device time."""
_HURRY_S = 1.0
_MOST_THREADS = 1024


@dataclass(slots=True)
class Span:
    """One call: when it was made, and when its work ran."""

    kind: str
    """``kernel``, ``copy``, ``fill``, ``graph``, ``link`` (a whole copy between devices), ``wait``
    or ``range``."""
    name: str
    device: str = ""
    """Address; empty for what happens on the host alone."""
    stream: int = 0
    """Handle."""
    thread: int = 0
    called_at: float = 0.0
    """Seconds of the host's clock (``time.perf_counter``)."""
    call_s: float = 0.0
    """Until the call returned."""
    at: float | None = None
    """When the work began on the device, on the host's clock; None: not known."""
    seconds: float | None = None
    """What the work took; None: not known."""
    clock: str = ""
    """``device``, ``host``, or empty where the work's time is not known."""
    nbytes: float | None = None
    """Read and written by a kernel; moved by a copy or fill."""
    bytes_are: str = ""
    """``exact``, ``declared`` or ``estimated``."""
    flops: float | None = None
    dtype: str = ""
    failed: bool = False


@dataclass(slots=True)
class Segment:
    """Some seconds of one device's clock, counted from an event."""

    anchor: int
    made_at: float
    earliest: float = float("-inf")
    """The anchor's time on the host's clock lies between this and ``latest``."""
    latest: float = float("inf")
    spans: int = 0


@dataclass(slots=True)
class _Pending:
    opened: Opened
    segment: Segment
    start: int
    end: int
    span: Span
    profiles: tuple[Profile, ...]
    link: _Link | None


@dataclass(slots=True)
class _Link:
    """A copy between devices: it lasts from its first part's begin to its last part's end."""

    span: Span
    profiles: tuple[Profile, ...]
    parts: int = 0
    ended: bool = False
    first: float = float("inf")
    last: float = float("-inf")


@dataclass(slots=True)
class _Token:
    span: Span
    profiles: tuple[Profile, ...]
    start: int = 0
    segment: Segment | None = None
    link: _Link | None = None
    waits: bool = False
    ranged: bool = False


@dataclass(frozen=True, slots=True)
class _Seen:
    """A wait for a stream (0: for none in particular) began and ended then."""

    opened: Opened | None
    stream: int
    began: float
    ended: float

    def at(self, each: _Pending) -> float:
        """When the span was seen to be done."""
        span = each.span
        waited = each.opened is self.opened and span.stream == self.stream
        if waited and span.called_at + span.call_s <= self.began:
            return self.ended
        return time.perf_counter()


@dataclass(slots=True)
class _Device:
    segment: Segment | None = None
    old: list[Segment] = field(default_factory=list)


class Collector:
    """The watcher behind all profiles of the process."""

    level = watch.LAUNCHES

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._profiles: tuple[Profile, ...] = ()
        self._pending: deque[_Pending] = deque()
        self._devices: dict[Opened, _Device] = {}
        self._here = threading.local()
        self._since = 0
        self.threads: dict[int, str] = {}
        """Names of the threads that made calls, by our number."""
        self._numbers = itertools.count(1)

    @property
    def active(self) -> bool:
        return bool(self._profiles)

    def begin(self, profile: Profile) -> None:
        with self._lock:
            first = not self._profiles
            self._profiles = (*self._profiles, profile)
            if first:
                self.threads = {}
                watch.add(self)

    def end(self, profile: Profile, hurry: bool) -> None:
        """Wait for the profile's work and read its times; ``hurry`` waits for a second only."""
        with self._lock:
            self._profiles = tuple(each for each in self._profiles if each is not profile)
            last = not self._profiles
            if last:
                watch.remove(self)
        self._wait(profile, _HURRY_S if hurry else wait_limit_s())
        with self._lock:
            self._flush()
            devices = [(o, d.segment) for o, d in self._devices.items() if d.segment is not None]
        for opened, segment in devices:
            self._compare(opened, segment, profile)
        with self._lock:
            left = [each for each in self._pending if profile in each.profiles]
            for each in left:  # not done in time: their times will not be known
                each.profiles = tuple(p for p in each.profiles if p is not profile)
                profile.add(each.span)
            if last and not self._profiles:
                self._forget()

    def _wait(self, profile: Profile, limit_s: float) -> None:
        with self._lock:
            mine = [each for each in self._pending if profile in each.profiles]
        _await(mine, limit_s)

    def _compare(self, opened: Opened, segment: Segment, profile: Profile) -> None:
        """An event of now, seen as soon as it is done: how late the clock may lie at most."""
        event = 0
        try:
            event = opened.take_event(True)
            opened.backend.event_record(event, opened.inner_stream("profile").handle)
            if opened.backend.event_synchronize(event, _HURRY_S):
                now = time.perf_counter()
                since = opened.backend.event_seconds(segment.anchor, event)
                segment.latest = min(segment.latest, now - since)
                profile.clock(opened.device.address, segment.latest - segment.earliest)
        except HalError:
            pass  # the device is lost or closed
        if event:
            self._give(opened, event)

    def _forget(self) -> None:
        """Nobody profiles: give back every event."""
        for each in self._pending:
            self._give(each.opened, each.start, each.end)
        self._pending.clear()
        for opened, device in self._devices.items():
            for segment in (*device.old, device.segment):
                if segment is not None:
                    self._give(opened, segment.anchor)
        self._devices.clear()

    @staticmethod
    def _give(opened: Opened, *events: int) -> None:
        if opened.closed:
            return
        for event in events:
            try:
                opened.give_event(event, True)
            except HalError:
                return  # the device is lost

    # -- what the core tells -------------------------------------------------------------------

    def begins(self, work: Work) -> _Token | None:
        profiles = self._profiles
        if not profiles or work.captured:
            return None
        span = Span(work.kind, work.name, thread=self.thread())
        token = _Token(span, profiles)
        if work.opened is not None:
            span.device, span.stream = work.opened.device.address, work.stream
        if work.kind == "link":
            dst, src = work.buffers
            span.name = f"{src.device.address} to {dst.device.address}, {work.name}"
            span.nbytes, span.bytes_are = work.nbytes, "exact"
            self._here.link = token.link = _Link(span, profiles)
        elif work.kind != "wait":
            self._describe(work, span)
            self._start(work, token)
        pushed = nvtx.calls() if any(each.nvtx for each in profiles) else None
        if pushed is not None:
            pushed[0](f"{work.kind} {span.name}" if work.kind != "kernel" else span.name)
            token.ranged = True
        span.called_at = time.perf_counter()
        return token

    def thread(self) -> int:
        """The calling thread's number, its name noted; idents of the system come again."""
        number: int | None = getattr(self._here, "thread", None)
        if number is None:
            number = self._here.thread = next(self._numbers)
        if number not in self.threads and len(self.threads) < _MOST_THREADS:
            self.threads[number] = threading.current_thread().name
        return number

    @staticmethod
    def _describe(work: Work, span: Span) -> None:
        if work.launch is not None:
            told = work.launch.work()
            span.nbytes, span.bytes_are = told.nbytes, told.bytes_are
            span.flops, span.dtype = told.flops, told.dtype
        elif work.kind in ("copy", "fill") or work.nbytes:
            span.nbytes, span.bytes_are = work.nbytes, "exact"
        if work.flops is not None:
            span.flops, span.dtype, span.bytes_are = work.flops, work.dtype, "declared"

    def _start(self, work: Work, token: _Token) -> None:
        opened = work.opened
        if opened is None or not work.stream:
            return
        token.link = getattr(self._here, "link", None) if work.part else None
        if "timing" not in opened.backend.groups:
            token.waits = True
            return
        with self._lock:
            if len(self._pending) >= _MOST_PENDING:
                self._since += 1
                if self._since >= _FLUSH:
                    self._flush()
                if len(self._pending) >= _MOST_PENDING:
                    return
        try:
            token.segment = self._segment(opened)
            token.start = opened.take_event(True)
            opened.backend.event_record(token.start, work.stream)
        except HalError:  # the call itself will say so, if it is not for want of events
            if token.start:
                self._give(opened, token.start)
            token.start = 0

    def _segment(self, opened: Opened) -> Segment:
        now = time.perf_counter()
        with self._lock:
            device = self._devices.setdefault(opened, _Device())
            found = device.segment
            if found is not None and now - found.made_at < _SEGMENT_S:
                return found
        stream = opened.inner_stream("profile")
        anchor = opened.take_event(True)
        before = time.perf_counter()
        opened.backend.event_record(anchor, stream.handle)
        made = Segment(anchor, now, earliest=before)
        with self._lock:
            if device.segment is not None:
                device.old.append(device.segment)
            device.segment = made
            for segment in [s for s in device.old if not s.spans]:
                device.old.remove(segment)
                self._give(opened, segment.anchor)
        return made

    def ends(self, work: Work, token: _Token | None, error: BaseException | None) -> None:
        if token is None:
            return
        span, opened = token.span, work.opened
        now = time.perf_counter()
        span.call_s, span.failed = now - span.called_at, error is not None
        if token.ranged:
            found = nvtx.calls()
            if found is not None:
                found[1]()
        if work.kind == "link":
            self._end_link(token)
            return
        if work.kind == "wait" and error is None:
            with self._lock:
                self._flush(_Seen(opened, work.stream, span.called_at, now))
        if token.start and opened is not None:
            if error is None and self._end_event(work, opened, token):
                return
            self._give(opened, token.start)
        elif token.waits and error is None and opened is not None:
            # What failed of the work is the caller's to know, here as it would be later.
            done = opened.backend.stream_synchronize(work.stream, wait_limit_s())
            if done:
                span.at, span.clock = span.called_at, "host"
                span.seconds = time.perf_counter() - span.called_at
        self._add(span, token.profiles)
        if token.link is not None:
            self._part(token.link, span)

    def _end_event(self, work: Work, opened: Opened, token: _Token) -> bool:
        end = 0
        try:
            end = opened.take_event(True)
            opened.backend.event_record(end, work.stream)
        except HalError:
            if end:
                self._give(opened, end)
            return False
        segment = token.segment
        assert segment is not None
        with self._lock:
            segment.spans += 1
            if token.link is not None:
                token.link.parts += 1
            self._pending.append(
                _Pending(opened, segment, token.start, end, token.span, token.profiles, token.link)
            )
            self._since += 1
            if self._since >= _FLUSH:
                self._flush()
        return True

    def _end_link(self, token: _Token) -> None:
        self._here.link = None
        link = token.link
        assert link is not None
        with self._lock:
            link.ended = True
            if not link.parts:
                self._link_done(link)

    def _part(self, link: _Link, span: Span) -> None:
        if span.at is not None and span.seconds is not None:
            link.first = min(link.first, span.at)
            link.last = max(link.last, span.at + span.seconds)
            link.span.clock = span.clock

    def _link_done(self, link: _Link) -> None:
        span = link.span
        if link.first < link.last and not span.failed:
            span.at, span.seconds = link.first, link.last - link.first
        self._add(span, link.profiles)

    def told(self, what: str, *facts: Any) -> None:
        """Nothing of that is timed."""

    def closing(self, opened: Opened) -> None:
        """Read what can be read of a device that closes."""
        with self._lock:
            here = [each for each in self._pending if each.opened is opened]
        _await(here, _HURRY_S)
        with self._lock:
            self._flush()
            for each in [each for each in self._pending if each.opened is opened]:
                self._pending.remove(each)
                self._resolve(each, None, 0.0)
            self._devices.pop(opened, None)

    def span(self, span: Span, profiles: tuple[Profile, ...]) -> None:
        """A range of the user's own has ended."""
        self._add(span, profiles)

    @property
    def profiles(self) -> tuple[Profile, ...]:
        return self._profiles

    # -- reading times -------------------------------------------------------------------------

    def _flush(self, seen: _Seen | None = None) -> None:
        """Read the times of all that is done. The lock is held."""
        self._since = 0
        kept: deque[_Pending] = deque()
        waiting: set[tuple[Opened, int]] = set()
        for each in self._pending:
            key = (each.opened, each.span.stream)
            if each.opened.closed:
                self._resolve(each, None, 0.0)
            elif key in waiting or not self._done(each):
                waiting.add(key)
                kept.append(each)
            else:
                self._read(each, seen.at(each) if seen is not None else time.perf_counter())
        self._pending = kept

    @staticmethod
    def _done(each: _Pending) -> bool:
        try:
            return each.opened.backend.event_done(each.end) and each.opened.backend.event_done(
                each.segment.anchor
            )
        except HalError:
            return True  # its times cannot be read; see _read

    def _read(self, each: _Pending, now: float) -> None:
        segment, backend = each.segment, each.opened.backend
        try:
            begins = backend.event_seconds(segment.anchor, each.start)
            seconds = backend.event_seconds(each.start, each.end)
        except HalError:
            self._resolve(each, None, 0.0)
            return
        # Nothing begins before it was queued, nor ends after it was seen done.
        segment.earliest = max(segment.earliest, each.span.called_at - begins)
        segment.latest = min(segment.latest, now - (begins + seconds))
        self._resolve(each, begins, max(seconds, 0.0))

    def _resolve(self, each: _Pending, begins: float | None, seconds: float) -> None:
        each.segment.spans -= 1
        self._give(each.opened, each.start, each.end)
        if begins is not None:
            span = each.span
            span.at, span.seconds, span.clock = (
                each.segment.earliest + begins,
                seconds,
                "device",
            )
        if each.link is not None:
            each.link.parts -= 1
            self._part(each.link, each.span)
            if each.link.ended and not each.link.parts:
                self._link_done(each.link)
        self._add(each.span, each.profiles)

    @staticmethod
    def _add(span: Span, profiles: tuple[Profile, ...]) -> None:
        for profile in profiles:
            profile.add(span)


def _await(pending: list[_Pending], limit_s: float) -> None:
    """Wait until these are done, and the events that their times are counted from."""
    last = {(each.opened, each.span.stream): each.end for each in pending}
    last |= {(each.opened, -each.segment.anchor): each.segment.anchor for each in pending}
    deadline = time.monotonic() + limit_s
    for (opened, _), event in last.items():
        if opened.closed:
            continue
        try:
            opened.backend.event_synchronize(event, max(0.0, deadline - time.monotonic()))
        except HalError:
            continue  # who waits for the work is told why it failed


collector = Collector()

"""``with hal.profile() as p: ...``: what ran when, for how long, and how near the peaks it came.

Off, a profile costs nothing: launches do not pass here. On, each launch, copy, fill and graph gets
two events, where the driver declares ``timing``, and some microseconds of the calling thread;
elsewhere each call is waited for. Reports are in ``drivetrain.hal.profile_report``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput

if TYPE_CHECKING:
    from types import TracebackType

    from drivetrain.hal.device import Device
    from drivetrain.hal.timeline import Span

__all__ = ["Line", "Peaks", "Profile", "profile"]

_MOST_LINES = 4096
_OTHERS = "(others)"


@dataclass(frozen=True)
class Peaks:
    """What a device can do at best, as it was measured: the roofline."""

    memory_gbps: float = 0.0
    """GB/s (1e9 bytes) read and written together; 0: not known."""
    flops: Mapping[str, float] = field(default_factory=dict)
    """dtype (``float32``, ...) -> operations/s."""


PeaksOf = Mapping[str, Peaks] | Callable[["Device"], Peaks | None]


@dataclass(slots=True)
class Line:
    """All calls of one name on one device."""

    kind: str
    name: str
    device: str
    calls: int = 0
    timed: int = 0
    """Calls whose work's time is known; the sums below are of those."""
    seconds: float = 0.0
    least_s: float = float("inf")
    most_s: float = 0.0
    nbytes: float | None = None
    bytes_are: str = ""
    """``exact``, ``declared`` (by ``Kernel.work``), or ``estimated``: each buffer among the
    arguments counted once, whole."""
    flops: float | None = None
    dtype: str = ""
    call_s: float = 0.0
    """Seconds of the calling threads, over all calls."""
    failed: int = 0
    clock: str = ""
    """``device`` or ``host``: whose clock told the times."""

    def add(self, span: Span) -> None:
        self.calls += 1
        self.call_s += span.call_s
        self.failed += span.failed
        if span.seconds is None:
            return
        first = not self.timed
        self.timed += 1
        self.seconds += span.seconds
        self.least_s, self.most_s = (
            min(self.least_s, span.seconds),
            max(self.most_s, span.seconds),
        )
        self.clock = span.clock
        self.nbytes = _sum(self.nbytes, span.nbytes, first)
        self.flops = _sum(self.flops, span.flops, first)
        self.dtype = span.dtype or self.dtype
        if span.bytes_are != self.bytes_are:
            self.bytes_are = span.bytes_are if first else "estimated"

    @property
    def gbps(self) -> float | None:
        """GB/s (1e9 bytes) while it ran."""
        return self.nbytes / self.seconds / 1e9 if self.nbytes and self.seconds else None

    @property
    def flops_per_s(self) -> float | None:
        return self.flops / self.seconds if self.flops and self.seconds else None


def _sum(total: float | None, value: float | None, first: bool) -> float | None:
    """None as soon as one value is not known."""
    if value is None or (total is None and not first):
        return None
    return (total or 0.0) + value


class Profile:
    """Spans and sums of what the process queued on devices while the ``with`` block ran.

    ``peaks`` are the roofline: by address, or a function of the device, as
    ``drivetrain.placement.calibration.peaks`` is. At most ``limit`` spans are kept for the
    timeline, the first ones; the sums are of all. Profiles nest and run side by side; each has the
    work of all threads. What is noted in a graph is not work; each launch of the graph is one span.
    ``nvtx`` marks launches, copies and ranges for NVIDIA's and AMD's tools where a library for
    them is present.
    """

    def __init__(
        self, *, peaks: PeaksOf | None = None, limit: int = 100_000, nvtx: bool = True
    ) -> None:
        if limit < 0:
            raise BadInput(f"profile: at most {limit} spans; give 0 or more")
        self.nvtx = nvtx
        self.started = self.ended = 0.0
        self.spans: list[Span] = []
        """In the order in which their times became known."""
        self.dropped = 0
        """Spans beyond ``limit``; they are in the sums, not in the timeline."""
        self.clocks: dict[str, float] = {}
        """Device -> seconds by which its row may lie too early against the host's rows."""
        self.threads: dict[int, str] = {}
        self._peaks = peaks
        self._limit = limit
        self._lock = threading.RLock()  # a finaliser may come in between
        self._lines: dict[tuple[str, str, str], Line] = {}
        self._state = "new"

    # -- the block -----------------------------------------------------------------------------

    def __enter__(self) -> Profile:
        from drivetrain.hal.timeline import collector

        if self._state != "new":
            raise BadInput("profile: this profile has run already; make another one")
        self._state = "running"
        self.started = time.perf_counter()
        collector.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        from drivetrain.hal.timeline import collector

        threads = collector.threads
        collector.end(self, hurry=error is not None)
        with self._lock:
            self._state = "done"
            self.ended = time.perf_counter()
            self.threads = dict(threads)

    @staticmethod
    @contextmanager
    def range(name: str) -> Iterator[None]:
        """A named stretch of the calling thread, on the host's row of the profiles that run, and
        for the vendors' tools where they have a library here. Without either it does nothing."""
        from drivetrain.hal import nvtx
        from drivetrain.hal.timeline import Span, collector

        calls = nvtx.calls()
        profiles = collector.profiles
        span = Span("range", name, thread=collector.thread() if profiles else 0)
        if calls is not None:
            calls[0](name)
        began = span.called_at = time.perf_counter()
        try:
            yield
        except BaseException:
            span.failed = True
            raise
        finally:
            span.call_s = time.perf_counter() - began
            if calls is not None:
                calls[1]()
            if profiles:
                collector.span(span, profiles)

    # -- what the collector tells ----------------------------------------------------------------

    def add(self, span: Span) -> None:
        with self._lock:
            if self._state == "done":
                return
            key = (span.kind, span.device, span.name)
            line = self._lines.get(key)
            if line is None:
                if len(self._lines) >= _MOST_LINES:
                    key = (span.kind, span.device, _OTHERS)
                line = self._lines.setdefault(key, Line(span.kind, key[2], span.device))
            line.add(span)
            if len(self.spans) < self._limit:
                self.spans.append(span)
            else:
                self.dropped += 1

    def clock(self, device: str, uncertainty_s: float) -> None:
        with self._lock:
            self.clocks[device] = max(uncertainty_s, 0.0)

    # -- what is asked -------------------------------------------------------------------------

    def lines(self, kind: str) -> tuple[Line, ...]:
        """Sums of one kind (``kernel``, ``copy``, ``link``, ``fill``, ``graph``, ``wait``,
        ``range``), the longest first."""
        with self._lock:
            found = [line for line in self._lines.values() if line.kind == kind]
        return tuple(sorted(found, key=lambda line: (-line.seconds, -line.call_s)))

    @property
    def kernels(self) -> tuple[Line, ...]:
        return self.lines("kernel")

    @property
    def copies(self) -> tuple[Line, ...]:
        """Each direction on each device; the parts of copies between devices are among them."""
        return self.lines("copy")

    def peaks(self, address: str) -> Peaks | None:
        """The roofline of a device, if it was given."""
        if self._peaks is None:
            return None
        if isinstance(self._peaks, Mapping):
            return self._peaks.get(address)
        from drivetrain.hal.registry import device

        return self._peaks(device(address))

    def _ready(self) -> None:
        if self._state != "done":
            raise BadInput("profile: read it after its `with` block")

    def table(self) -> str:
        """The sums as text, with what the numbers mean. Raises BadInput inside the block."""
        from drivetrain.hal import profile_report

        self._ready()
        return profile_report.table(self)

    def as_json(self) -> dict[str, Any]:
        """The sums as numbers and words; times in seconds."""
        from drivetrain.hal import profile_report

        self._ready()
        return profile_report.as_json(self)

    def chrome_trace(self) -> dict[str, Any]:
        """The timeline in Chrome's trace format, for chrome://tracing and Perfetto."""
        from drivetrain.hal import profile_report

        self._ready()
        return profile_report.chrome_trace(self)

    def write_trace(self, path: str | Path) -> None:
        """`chrome_trace` into a file. Raises OSError."""
        import json

        text = json.dumps(self.chrome_trace())
        Path(path).write_text(text, encoding="utf-8")

    def __str__(self) -> str:
        return self.table() if self._state == "done" else f"<Profile, {self._state}>"


profile = Profile
"""``hal.profile()`` makes one, ``hal.profile.range(name)`` marks a stretch of the host."""

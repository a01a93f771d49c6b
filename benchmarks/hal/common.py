"""Interleaved rounds of several ways to do the same thing, and what every line of them tells."""

from __future__ import annotations

import ctypes
import importlib.metadata
import itertools
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.common import Gate, Report, machine

QUICK = "--quick" in sys.argv
"""Three short rounds: shows that everything runs, and decides nothing."""
ROUNDS = 3 if QUICK else 11


class Statement:
    """A line of Python that is timed inside its loop, so that no function around it is, and by a
    clock that is read beside the loop, as that of the C loops is."""

    def __init__(self, text: str, **names: object) -> None:
        scope: dict[str, Any] = {}
        given = ", ".join(names)
        exec(
            f"def loop(repeat, clock, {given}):\n    began = clock()\n    for _ in repeat:\n"
            f"        {text}\n    return clock() - began\n",
            scope,
        )
        self._loop, self._names = scope["loop"], names

    def seconds(self, count: int) -> float:
        """Of so many in a row."""
        found: float = self._loop(itertools.repeat(None, count), time.perf_counter, **self._names)
        return found


Call = Callable[[], object]
Way = Call | Statement
Measure = Callable[[], float]
"""Seconds of one call."""
Found = Mapping[str, list[float]]
"""Name -> seconds of each round."""


@dataclass(frozen=True)
class Span:
    """What the lines of one table measure, and what they are held against."""

    start: str
    end: str
    floor: str = "none"
    """The name of the line that is the floor, or why there is none."""
    peer: str = "none"
    """The name of the line that is the peer, or what is not installed."""

    def __str__(self) -> str:
        return f"start: {self.start}; end: {self.end}; peer: {self.peer}; floor: {self.floor}"


QUEUED = Span("before the call", "its return, the work queued and not done")


class Narrow(Gate):
    """A gate that cannot say more than the control lets it: where the control spreads wider than
    the gate is, or the value lies over the limit by less than that, nothing is decided."""

    @property
    def verdict(self) -> str:
        if QUICK:
            return "quick"
        if self.value > self.limit + self.spread:
            return "MISS"
        if self.spread > self.room or self.value > self.limit:
            return "undecided"
        return "ok"


@dataclass
class HalReport(Report):
    """Parts that run and fail one by one, each line with its start, end, peer and floor."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def part(self, name: str, run: Callable[[], None]) -> None:
        """Run one part; what goes wrong there is told and does not hide the others."""
        print(f" {name}", flush=True)
        try:
            run()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a peer may end the interpreter, or raise anything
            traceback.print_exc()
            self.failed.append(f"{name}: {type(error).__name__}: {error}")
            print(f"  FAILED    {name}: {type(error).__name__}: {error}", flush=True)

    def missing(self, name: str, why: object) -> None:
        """A peer or a device that is not here."""
        first = (str(why).splitlines() or [""])[0]
        self.absent.append(f"{name}: {first}")
        print(f"    ({name} is not here: {first})", flush=True)

    def show(self, title: str, found: Found, span: Span, unit: str = "us") -> dict[str, float]:
        """Print and keep medians; the medians in seconds."""
        print(f"  {title}")
        scale = {"us": 1e6, "ms": 1e3}[unit]
        medians = {name: statistics.median(values) for name, values in found.items()}
        for name, value in medians.items():
            low, high = min(found[name]) * scale, max(found[name]) * scale
            against = "; ".join(
                f"{what}: {other} {medians[other] * scale:.3f} {unit}"
                if other in medians
                else f"{what}: {other}"
                for what, other in (("peer", span.peer), ("floor", span.floor))
                if other != name
            )
            print(
                f"    {name:36} {value * scale:10.3f} {unit}  ({low:.3f} to {high:.3f}); start: "
                f"{span.start}; end: {span.end}; {against}",
                flush=True,
            )
            self.rows.append(
                {"table": title, "line": name, "seconds": value, "rounds": found[name]}
                | asdict(span)
            )
        return medians

    def gate(
        self,
        name: str,
        measured: tuple[float, float],
        limit: float,
        unit: str,
        span: Span,
        room: float = float("inf"),
    ) -> None:
        """Hold (value, the control's spread) against a limit."""
        value, spread = measured
        self.add(Narrow(name, value, limit, unit, spread, room, str(span)))

    def finish(self) -> int:
        print(machine())
        print(versions())
        for each in self.absent:
            print(f"not here: {each}")
        if "--json" in sys.argv:
            print(json.dumps(self.as_json()))
        if self.failed:
            print(f"failed: {'; '.join(self.failed)}")
        return 1 if self.failed or any(g.verdict == "MISS" for g in self.gates) else 0

    def as_json(self) -> dict[str, Any]:
        return {
            "benchmark": self.title,
            "quick": QUICK,
            "machine": machine(),
            "versions": versions(),
            "rows": self.rows,
            "gates": [{**vars(g), "room": str(g.room), "verdict": g.verdict} for g in self.gates],
            "absent": self.absent,
            "failed": self.failed,
        }


def versions() -> str:
    """The peers' and the drivers' versions."""
    from drivetrain import __version__, hal

    found = [f"drivetrain {__version__}"]
    for name in ("numpy", "pyopencl", "cupy-cuda12x", "cupy-cuda13x", "cuda-core", "triton"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    found += [f"{d.address} {d.name}, driver {d.info.driver_version}" for d in hal.devices()]
    return "; ".join(found)


def words() -> list[str]:
    """The parts or drivers that the command line names."""
    return [word for word in sys.argv[1:] if not word.startswith("-")]


def calls(way: Way, count: int, before: Call | None = None) -> Measure:
    """A measurement: seconds of one of ``count`` calls in a row, after ``before``."""
    way = way if isinstance(way, Statement) else Statement("way()", way=way)

    def measure() -> float:
        if before is not None:
            before()
        return way.seconds(count) / count

    return measure


def whole(way: Call, settle: Call, times: int = 1) -> Measure:
    """A measurement: seconds of one of ``times`` calls until all of their work is done."""

    def measure() -> float:
        began = time.perf_counter()
        for _ in range(times):
            way()
        settle()
        return (time.perf_counter() - began) / times

    return measure


def interleaved(
    measures: Mapping[str, Measure], settle: Call, rounds: int | None = None
) -> dict[str, list[float]]:
    """Seconds of each measurement, round by round, in alternating order; ``settle`` empties the
    queues in between. One round before the first is not counted."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for measure in measures.values():
        measure()
        settle()
    for number in range(ROUNDS if rounds is None else rounds):
        names: Iterable[str] = list(measures)
        for name in names if number % 2 else reversed(list(names)):
            found[name].append(measures[name]())
            settle()
    return found


@contextmanager
def on_one_core() -> Iterator[None]:
    """This thread stays on the core that it is on: a wait ends on whichever core is free, where the
    caches are another's, and the calls after it would show that. Threads made inside stay there
    too: make those that work before."""
    before = os.sched_getaffinity(0)
    here = ctypes.CDLL(None).sched_getcpu()
    os.sched_setaffinity(0, {here} & before or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def difference(found: Found, name: str, base: str) -> tuple[float, float]:
    """(median of what ``name`` costs above ``base`` round by round, us; how far the base itself
    varies, us)."""
    above = [(a - b) * 1e6 for a, b in zip(found[name], found[base], strict=True)]
    ordered = sorted(found[base])
    quarter = len(ordered) // 4
    return statistics.median(above), (ordered[-1 - quarter] - ordered[quarter]) / 2 * 1e6


def ratio(found: Found, name: str, base: str) -> tuple[float, float]:
    """(median of ``name`` over ``base`` round by round, the base's own spread as a share)."""
    shares = [a / b for a, b in zip(found[name], found[base], strict=True)]
    ordered = sorted(found[base])
    quarter = len(ordered) // 4
    spread = (ordered[-1 - quarter] - ordered[quarter]) / 2 / statistics.median(ordered)
    return statistics.median(shares), spread

"""Interleaved rounds of several ways to do the same thing, and the C floor of each."""

from __future__ import annotations

import ctypes
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROUNDS = 11

Way = Callable[[], object]


@cache
def floor() -> Any:
    """The C loops, built anew. Ends the program when there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise SystemExit("the floors need a C compiler")
    folder = tempfile.mkdtemp(prefix="drivetrain-floor-")
    path = Path(folder) / "floor.so"
    command = [compiler, "-O2", "-shared", "-fPIC", str(HERE / "floor.c"), "-o", str(path)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(path))
    shutil.rmtree(folder)
    pointer, number = ctypes.c_void_p, ctypes.c_int
    for name in ("cuda", "plain", "opencl"):
        function = getattr(library, f"floor_{name}_launch")
        function.restype = ctypes.c_double
        function.argtypes = (pointer, pointer, number, number, pointer, pointer, number)
    library.floor_two.restype = ctypes.c_double
    library.floor_two.argtypes = (pointer, pointer, pointer, number)
    return library


def calls(way: Way, count: int) -> Callable[[], float]:
    """A measurement: seconds of one of ``count`` calls in a row."""

    def measure() -> float:
        repeat = range(count)
        began = time.perf_counter()
        for _ in repeat:
            way()
        return (time.perf_counter() - began) / count

    return measure


def interleaved(
    measures: Mapping[str, Callable[[], float]], settle: Way, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Seconds of each measurement, round by round; ``settle`` empties the queues in between."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for measure in measures.values():
        measure()
        settle()
    for number in range(rounds):
        names = list(measures)
        for name in names if number % 2 else reversed(names):
            found[name].append(measures[name]())
            settle()
    return found


def show(title: str, found: Mapping[str, list[float]]) -> dict[str, float]:
    """Print medians in microseconds; the medians in seconds."""
    print(f"  {title}")
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, value in medians.items():
        low, high = min(found[name]) * 1e6, max(found[name]) * 1e6
        print(f"    {name:34} {value * 1e6:9.3f} us  ({low:.3f} to {high:.3f})", flush=True)
    return medians


def difference(found: Mapping[str, list[float]], name: str, base: str) -> tuple[float, float]:
    """(median of what ``name`` costs above ``base`` round by round, us; how far the base itself
    varies, us)."""
    above = [(a - b) * 1e6 for a, b in zip(found[name], found[base], strict=True)]
    ordered = sorted(found[base])
    quarter = len(ordered) // 4
    return statistics.median(above), (ordered[-1 - quarter] - ordered[quarter]) / 2 * 1e6


def ratio(found: Mapping[str, list[float]], name: str, base: str) -> tuple[float, float]:
    """(median of ``name`` over ``base`` round by round, the base's own spread as a share)."""
    shares = [a / b for a, b in zip(found[name], found[base], strict=True)]
    ordered = sorted(found[base])
    quarter = len(ordered) // 4
    spread = (ordered[-1 - quarter] - ordered[quarter]) / 2 / statistics.median(ordered)
    return statistics.median(shares), spread

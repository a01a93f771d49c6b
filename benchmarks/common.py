"""What every benchmark prints: the machine, medians of interleaved rounds, and a verdict."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROUNDS = 9


def machine() -> str:
    """One line: processor, cores, versions, date."""
    import torch

    name = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    gpus = ""
    if torch.cuda.is_available():
        gpus = f", {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}"
    return (
        f"{name}, {len(os.sched_getaffinity(0))} cores{gpus}; Python "
        f"{platform.python_version()}, torch {torch.__version__}; {dt.date.today()}"
    )


@dataclass
class Gate:
    """One promise: ``value`` must not exceed ``limit``.

    ``spread`` is the control's own: where it is wider than the room between 1 (or 0) and the
    limit, nothing can be decided on this machine.
    """

    name: str
    value: float
    limit: float
    unit: str = ""
    spread: float = 0.0
    room: float = float("inf")
    detail: str = ""

    @property
    def verdict(self) -> str:
        if self.value <= self.limit:
            return "ok"
        return "undecided" if self.spread > self.room else "MISS"

    def __str__(self) -> str:
        text = (
            f"{self.verdict:9} {self.name}: {self.value:.4g} {self.unit} (limit {self.limit:.4g})"
        )
        if self.spread:
            text += f", control's spread {self.spread:.2g}"
        return text + (f"; {self.detail}" if self.detail else "")


@dataclass
class Report:
    """Gates of one benchmark; ``finish`` prints them and gives the exit code."""

    title: str
    gates: list[Gate] = field(default_factory=list)

    def add(self, gate: Gate) -> None:
        self.gates.append(gate)
        print(f"  {gate}", flush=True)

    def finish(self) -> int:
        print(machine())
        if "--json" in sys.argv:
            print(json.dumps([{**vars(g), "verdict": g.verdict} for g in self.gates]))
        return 1 if any(g.verdict == "MISS" for g in self.gates) else 0


def spread(values: list[float]) -> float:
    """Half the distance between the quartiles, relative to the median."""
    if len(values) < 4:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / statistics.median(values)

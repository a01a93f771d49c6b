"""How long steps take, what the loop adds, and the completed step as the runtime sees it."""

from __future__ import annotations

import resource
import statistics
from collections import deque
from typing import Any

import torch

from drivetrain.pytorch import on_chip
from drivetrain.runtime.agent import Agent
from drivetrain.runtime.status import HIGH, MEDIAN, STEP, STEP_END

_RECENT_STEPS = 32


class Pace:
    """The recent steps of this copy. Runs every step: what it costs is part of ``loop_s``."""

    def __init__(self) -> None:
        self.median_ns = 0
        self._count = 0
        self._took = 0
        self._durations: deque[int] = deque(maxlen=_RECENT_STEPS)
        self._loop_ns: deque[int] = deque(maxlen=_RECENT_STEPS)
        self._announced = False

    @property
    def loop_s(self) -> float:
        """What the loop itself costs a step, in seconds (median)."""
        return statistics.median(self._loop_ns) / 1e9

    def completed(self, took_ns: int, loop_ns: int) -> None:
        """A step was completed, which took so long, and the loop itself before it so long."""
        self._count += 1
        self._took = took_ns
        self._durations.append(took_ns)
        self._loop_ns.append(loop_ns)
        if self._count % 16 == 0 or self._count < 8:
            self.median_ns = sorted(self._durations)[len(self._durations) // 2]

    def publish(
        self, agent: Agent, step: int, ended: int, logged: dict[str, Any], device: torch.device
    ) -> None:
        """The completed step on the status page and in the step log."""
        page, words = agent.page, agent.page.words
        if not self._announced:
            page.first_step_end_ns = ended
        words[MEDIAN] = self.median_ns
        words[STEP_END] = ended
        words[STEP] = step
        if step > words[HIGH]:
            words[HIGH] = step
        agent.log_step(step, ended, self._took, logged)
        if not self._announced:
            self._announced = True
            agent.state = "running"
            page.peak_bytes = _peak_bytes(device)
            agent.event("running", step=step, peak=page.peak_bytes)


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    there = on_chip.peak_bytes(device) if on_chip.is_custom(device) else 0
    if there:
        return there
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

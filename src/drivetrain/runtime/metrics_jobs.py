"""What the exporter tells of jobs, moves, failovers and leases."""

from __future__ import annotations

import bisect
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drivetrain.migration.moves import STRATEGIES
from drivetrain.runtime.exposition import Metric
from drivetrain.runtime.jobs import JobRecord
from drivetrain.runtime.view import STATES
from drivetrain.store.database import Lease

MOST_JOBS = 200
"""Jobs told one by one, the newest; the rest is in the sums."""

_EDGES = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass
class Histogram:
    counts: list[int] = field(default_factory=lambda: [0] * (len(_EDGES) + 1))
    total: float = 0.0

    def take(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(_EDGES, seconds)] += 1
        self.total += seconds


class Counts:
    """Sums over all jobs that never go back while this process lives, whatever is pruned."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, int]] = {}  # job -> moves and failovers counted
        self.moves = {(strategy, ok): 0 for strategy in STRATEGIES for ok in (True, False)}
        self.downtime = Histogram()
        self.moved_bytes = 0
        self.failovers = 0
        self.resumed = Histogram()
        self.repeated = 0

    def take(self, jobs: Sequence[JobRecord]) -> None:
        """Count what the journals tell beyond the last call."""
        for job in jobs:
            moves, losses = self._seen.get(job.id, (0, 0))
            for move in job.view.moves[moves:]:
                self._move(move)
            for loss in job.view.failovers[losses:]:
                self._failover(loss)
            self._seen[job.id] = (
                max(moves, len(job.view.moves)),
                max(losses, len(job.view.failovers)),
            )
        there = {job.id for job in jobs}
        self._seen = {name: seen for name, seen in self._seen.items() if name in there}

    def _move(self, move: dict[str, Any]) -> None:
        strategy = str(move.get("strategy"))
        key = (strategy if strategy in STRATEGIES else "other", bool(move.get("ok")))
        self.moves[key] = self.moves.get(key, 0) + 1
        if key[1]:
            self.moved_bytes += int(move.get("state_bytes") or 0)
        if move.get("downtime_ms") is not None:
            self.downtime.take(move["downtime_ms"] / 1e3)

    def _failover(self, loss: dict[str, Any]) -> None:
        self.failovers += 1
        self.repeated += int(loss.get("steps_repeated") or 0)
        if loss.get("resumed_ms") is not None:
            self.resumed.take(loss["resumed_ms"] / 1e3)

    def metrics(self) -> Iterable[Metric]:
        moves = Metric("drivetrain_moves_total", "counter", "Moves of jobs that ended.")
        for (strategy, ok), count in self.moves.items():
            moves.add(count, strategy=strategy, result="ok" if ok else "failed")
        downtime = Metric(
            "drivetrain_move_downtime_seconds",
            "histogram",
            "Between the source's last step and the target's first, less one step.",
        )
        downtime.add_histogram(_EDGES, self.downtime.counts, self.downtime.total)
        nbytes = Metric("drivetrain_moved_bytes_total", "counter", "State that moves carried.")
        nbytes.add(self.moved_bytes)
        failovers = Metric("drivetrain_failovers_total", "counter", "Workers lost and replaced.")
        failovers.add(self.failovers)
        repeated = Metric(
            "drivetrain_failover_steps_repeated_total", "counter", "Steps done again after a loss."
        )
        repeated.add(self.repeated)
        resumed = Metric(
            "drivetrain_failover_resume_seconds",
            "histogram",
            "Between a worker's death and the next completed step.",
        )
        resumed.add_histogram(_EDGES, self.resumed.counts, self.resumed.total)
        return (moves, downtime, nbytes, failovers, repeated, resumed)


def jobs(found: Sequence[JobRecord]) -> Iterable[Metric]:
    """How many jobs are in each state, and each that has not ended."""
    states = Metric("drivetrain_jobs", "gauge", "Jobs in the state folder, by state.")
    info = Metric("drivetrain_job_info", "gauge", "1; what the job is and where it runs.")
    steps = Metric("drivetrain_job_step", "gauge", "Completed steps.")
    median = Metric("drivetrain_job_step_seconds", "gauge", "Median time of a step.")
    age = Metric(
        "drivetrain_job_step_age_seconds", "gauge", "Since the last step of a running job ended."
    )
    state_bytes = Metric("drivetrain_job_state_bytes", "gauge", "Bytes of the job's state.")
    replica = Metric("drivetrain_job_replica_lag_steps", "gauge", "Steps that no replica has yet.")
    count = dict.fromkeys(STATES, 0)
    living: list[tuple[JobRecord, str]] = []
    for job in found:
        state = "lost" if job.damage else job.view.present_state()
        count[state] = count.get(state, 0) + 1
        if not job.view.ended:
            living.append((job, state))
    for state, number in count.items():
        states.add(number, state=state)
    for job, state in living[-MOST_JOBS:]:
        spec, page = job.view.spec, job.page
        info.add(
            1,
            job_id=job.id,
            name=str(spec.get("name", "")),
            script=Path(str(spec.get("script", ""))).name,
            device=job.view.device,
            state=state,
        )
        if page is None:
            continue
        steps.add(page.step, job_id=job.id)
        median.add(page.median_ns / 1e9 if page.median_ns else None, job_id=job.id)
        state_bytes.add(page.state_bytes or None, job_id=job.id)
        if page.replicate_every:
            replica.add(max(0, page.step - page.replica_step), job_id=job.id)
        if state == "running" and page.step_end_ns:
            waited = (time.monotonic_ns() - page.step_end_ns) / 1e9
            age.add(max(0.0, waited), job_id=job.id)
    return (states, info, steps, median, age, state_bytes, replica)


def leases(found: Sequence[Lease]) -> Iterable[Metric]:
    """Memory that living runtimes hold for jobs, by what shares one memory."""
    held: dict[str, list[Lease]] = {}
    for lease in found:
        held.setdefault(lease.domain, []).append(lease)
    count = Metric("drivetrain_leases", "gauge", "Leases of living runtimes.")
    nbytes = Metric("drivetrain_leased_bytes", "gauge", "Bytes under lease.")
    for domain, of_it in held.items():
        count.add(len(of_it), domain=domain)
        nbytes.add(sum(lease.nbytes for lease in of_it), domain=domain)
    return (count, nbytes)

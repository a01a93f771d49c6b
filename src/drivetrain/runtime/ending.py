"""Ending workers, and the job with them; nothing of theirs is left behind."""

from __future__ import annotations

import contextlib
import time

from drivetrain.errors import DrivetrainError
from drivetrain.migration.checkpoint import tidy
from drivetrain.runtime.hosted import HostedJob
from drivetrain.runtime.process import Worker
from drivetrain.runtime.watching import pump


def end_worker(job: HostedJob, worker: Worker, *, grace_s: float = 0.0) -> None:
    """Kill a worker that has not ended by itself ``grace_s`` seconds from now."""
    deadline = time.monotonic() + grace_s
    while not worker.gone and time.monotonic() < deadline:
        pump(job, 0.1)
    if not worker.kill():
        job.lost_devices.add(worker.address)
        job.notice(
            f"the worker {worker.process.pid} on {worker.address} does not die: its device "
            "counts as lost, and the journal fences it off"
        )
    discard(job, worker)


def discard(job: HostedJob, worker: Worker) -> None:
    """Let go of a dead worker: its children, lease, channel and empty logs."""
    worker.sweep()
    job.placer.release(worker.lease)
    worker.close()
    if worker in job.workers:
        job.workers.remove(worker)
    for name in ("out", "err"):
        path = job.directory / "logs" / f"{worker.log_prefix or '-'}{name}"
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()


def finish(job: HostedJob, state: str, code: int, reason: str) -> None:
    """The job has ended in order: record it, if nobody has, and remember how it ran."""
    for worker in list(job.workers):
        if worker is not job.owner:
            end_worker(job, worker)
    if not job.view.ended:
        job.record("exit", {"state": state, "code": code, "reason": reason, "step": job.page.step})
    job.placer.remember(job.device, job.page)


def give_up(job: HostedJob, reason: str) -> None:
    """The runtime ends the job as failed."""
    job.event("gave_up", reason=reason)
    job.notices.append(reason)
    for worker in list(job.workers):
        end_worker(job, worker)
    job.owner = None
    with contextlib.suppress(DrivetrainError):
        job.record("exit", {"state": "failed", "code": 1, "reason": reason, "step": job.page.step})
    if not job.view.ended:
        job.view.state = "failed"
        job.view.exit = {"state": "failed", "code": 1, "reason": reason}


def clean_up(job: HostedJob) -> None:
    """End what still runs and let go of what this runtime holds of the job."""
    for worker in list(job.workers):
        end_worker(job, worker)
    tidy(job.directory / "checkpoints")
    job.drop_replica()

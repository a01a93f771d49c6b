"""Taking over a job whose runtime is gone: adopt what lives, else go on from what was saved."""

from __future__ import annotations

import contextlib
import os

from drivetrain import hal
from drivetrain.errors import JobError
from drivetrain.runtime.channel import Message
from drivetrain.runtime.ending import end_worker
from drivetrain.runtime.hosted import HostedJob
from drivetrain.runtime.losing import samples
from drivetrain.runtime.process import Worker, kill_marked
from drivetrain.runtime.restoring import NothingSaved, restore_into, restore_on
from drivetrain.runtime.starting import place, start_standby
from drivetrain.store.home import socket_path
from drivetrain.store.process import ProcessId


def take_over(job: HostedJob, *, on: str = "") -> None:
    """Adopt the living worker, else a living standby's replica, else the newest checkpoint.

    ``on`` is where to go on when nothing lives; empty lets the placement choose.
    """
    adopted = _adopted_owner(job)
    if job.view.ended:
        return
    if adopted is not None:
        _adopt(job, *adopted)
        return
    last, lost = job.page.step, job.view.device
    waiting = _living_copy(job)
    if waiting is not None:
        worker, answer = waiting
        job.workers.append(worker)
        job.keep_replica(answer.fds)
        worker.ready = {}
        job.write_state("recovering", by="resume")
        device = hal.device(worker.address)
        worker.lease = job.placer.adopt(device, worker.process, job.job_id)
        try:
            restore_into(job, worker, device, "resume")
        except NothingSaved:
            end_worker(job, worker)
            restore_on(job, device, "resume")
        _sweep_others(job, {w.key for w in job.workers})
    else:
        _sweep_others(job, set())
        device = place(job, on=on or None)
        job.write_state("recovering", by="resume")
        restore_on(job, device, "resume")
    _tell_resumed(job, lost, last)
    start_standby(job)


def _adopt(job: HostedJob, worker: Worker, answer: Message) -> None:
    """The living owner works for this runtime from here on."""
    job.workers.append(worker)
    worker.role = "owner"
    job.owner = worker
    job.page.epoch = job.view.epoch
    if answer.fds:
        job.keep_replica(answer.fds)
    worker.lease = job.placer.adopt(hal.device(worker.address), worker.process, job.job_id)
    state = "paused" if answer.body.get("state") == "paused" else "running"
    job.write_state(state, adopted=worker.process.pid)
    job.notice(f"adopted the running worker {worker.process.pid} on {worker.address}")
    _sweep_others(job, {worker.key})
    start_standby(job)


def _tell_resumed(job: HostedJob, lost: str, last: int) -> None:
    """Report a start from what was saved, when the runtime and the worker were both gone."""
    restored = job.page.restored_step
    repeated = max(0, last - restored)
    job.notice(f"resumed at step {restored}; {repeated} steps are repeated")
    if job.owner is None or not lost or job.view.released is not None:
        return
    report = {
        "from": lost,
        "to": job.owner.address,
        "error": "the runtime and the worker were gone",
        "detected_ms": None,
        "resumed_ms": None,
        "step": restored,
        "steps_repeated": repeated,
        **samples(job.owner),
        "ok": True,
    }
    job.record("failover", report)
    job.event("failover", **report)


def _adopted_owner(job: HostedJob) -> tuple[Worker, Message] | None:
    """The living owner; None when there is none (any more)."""
    process = job.view.worker
    if process is None:
        return None
    try:
        if process.alive:
            return Worker.adopt(job.view.worker_key, process, ProcessId.of())
        return None
    except JobError as error:
        if ProcessId.from_json(process.to_json()).alive:
            raise JobError(
                f"{error}; it holds the job, which is left to it. If it hangs, end it with "
                f"`kill -9 {process.pid}` and resume again"
            ) from error
        job.catch_up()  # it ended just now, and perhaps said so
        return None


def _living_copy(job: HostedJob) -> tuple[Worker, Message] | None:
    standby = job.view.standby
    if not standby:
        return None
    process = ProcessId.from_json(standby["process"])
    if not process.alive:
        return None
    try:
        worker, answer = Worker.adopt(standby["key"], process, ProcessId.of())
    except JobError:
        return None
    if not answer.fds:
        worker.close()
        return None
    return worker, answer


def _sweep_others(job: HostedJob, keep: set[str]) -> None:
    """End what earlier runtimes left of this job: copies that never came to own it."""
    keys = {
        r.data["key"] for r in job.journal.records() if r.kind in ("commit", "standby") and r.data
    }
    for key in keys - keep:
        kill_marked(key)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(socket_path(f"w-{key}"))
    for path in (job.directory / "logs").glob("*-*.???"):
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0 and not any(key in path.name for key in keep):
                path.unlink()

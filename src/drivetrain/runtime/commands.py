"""What somebody may want of a running job, one command after another."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from drivetrain.errors import BadInput, DrivetrainError, MigrationError
from drivetrain.runtime.ending import end_worker, finish
from drivetrain.runtime.hosted import HostedJob
from drivetrain.runtime.moving import migrate
from drivetrain.runtime.process import WorkerGone
from drivetrain.runtime.remote import RemoteEndpoint
from drivetrain.runtime.restoring import restore_on
from drivetrain.runtime.starting import place, start_standby
from drivetrain.runtime.watching import endpoint_of, pump
from drivetrain.store.crash import crash_point

_STOP_S = 5.0


@dataclass
class Command:
    """What somebody wants of the job; ``future`` gets the result or the error."""

    op: str
    body: dict[str, Any]
    future: Future[dict[str, Any]] = field(default_factory=Future)
    on_phase: Callable[[str, dict[str, Any]], None] = lambda name, facts: None


def obey(job: HostedJob, command: Command) -> dict[str, Any]:
    """Do what a command asks; its result. BadInput for what cannot be meant."""
    if command.op == "migrate":
        try:
            return migrate(job, command.body, command.on_phase)
        finally:
            job.interruptible = False
    if command.op == "pause":
        return _pause(job, command.body)
    if command.op == "resume":
        return _resume_paused(job, command.body)
    if command.op == "stop":
        return _stop(job, command.body)
    if command.op == "leave":
        job.left = True
        return {}
    if command.op == "checkpoint":
        owner = job.owning("checkpoint")
        return endpoint_of(job, owner).save(to_disk=True)
    raise BadInput(f"a job cannot {command.op!r}")


def _pause(job: HostedJob, body: dict[str, Any]) -> dict[str, Any]:
    owner = job.owning("pause")
    job.request("pause", body)
    endpoint = endpoint_of(job, owner)
    was_paused = job.view.state == "paused"
    if not was_paused:
        try:
            endpoint.ask("pause", why="user").result(float(body.get("limit_s") or 600.0))
        except MigrationError:
            with contextlib.suppress(MigrationError):
                owner.send("resume")  # it would stop later, when nobody expects it
            raise
        job.write_state("paused")
    if not body.get("release"):
        return {"state": "paused", "step": job.page.step}
    try:
        saved = _save_for_release(job, endpoint, to_disk=bool(body.get("to_disk")))
    except WorkerGone:
        if not was_paused:  # a loss, after which it goes on
            job.write_state("running")
        raise
    except DrivetrainError:
        if not was_paused:  # as if it had never been asked
            endpoint.ask("resume").result(30.0)
            job.write_state("running")
        raise
    crash_point("pause.saved")
    job.record("released", {"step": saved["step"], "hash": saved["hash"], "path": saved["path"]})
    crash_point("pause.released")
    job.page.epoch = 0  # nobody owns it now
    with contextlib.suppress(MigrationError):
        endpoint.release()
    end_worker(job, owner)
    job.owner = None
    if body.get("to_disk"):
        job.drop_replica()
    if job.standby is not None:
        end_worker(job, job.standby)
        job.standby = None
    job.event("state", state="paused", released=True)
    return {"state": "paused", **{k: saved[k] for k in ("step", "hash", "path")}}


def _save_for_release(job: HostedJob, endpoint: RemoteEndpoint, *, to_disk: bool) -> dict[str, Any]:
    """The paused state into a checkpoint, or into the replica that this process keeps.

    The latter goes to disk too: this process may die, and then nobody has the replica.
    """
    if to_disk:
        return endpoint.save(to_disk=True)
    saved = endpoint.save(to_disk=False)
    try:
        on_disk = endpoint.save(to_disk=True)
    except WorkerGone:
        raise
    except DrivetrainError as error:
        job.notice(f"the paused state is kept in memory only: {error}")
        return saved
    return {**saved, "path": on_disk["path"]}


def _resume_paused(job: HostedJob, body: dict[str, Any]) -> dict[str, Any]:
    if job.view.state != "paused":
        raise BadInput(f"job {job.job_id} is {job.view.state}, not paused: nothing to resume")
    job.request("resume", body)
    where = str(body.get("on") or "")
    if job.owner is not None:
        if where and where not in ("auto", job.owner.address):
            raise BadInput(
                f"job {job.job_id} is only paused and holds {job.owner.address}: "
                "resume it there and migrate, or pause it with --release first"
            )
        try:
            endpoint_of(job, job.owner).ask("resume").result(30.0)
        except WorkerGone:
            job.write_state("running")  # a loss, after which it goes on
            raise
        job.write_state("running")
        return {"state": "running", "device": job.owner.address}
    job.baseline = job.view.seq
    device = place(job, on=where or None)
    worker = restore_on(job, device, "resume")
    start_standby(job)
    return {"state": "running", "device": worker.address, "step": job.page.step}


def _stop(job: HostedJob, body: dict[str, Any]) -> dict[str, Any]:
    job.request("stop", body)
    owner = job.owner
    if owner is not None:
        with contextlib.suppress(MigrationError):
            owner.send("interrupt" if body.get("interrupt") else "stop")
        deadline = time.monotonic() + float(body.get("grace_s") or _STOP_S)
        while not owner.gone and time.monotonic() < deadline:
            pump(job, 0.1)
        end_worker(job, owner)
        job.owner = None
    finish(job, "stopped", 130 if body.get("interrupt") else 0, "stopped on request")
    return {"state": "stopped", "step": job.page.step}

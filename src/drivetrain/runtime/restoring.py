"""Giving a job to a fresh copy of its script: filled from the best that was saved."""

from __future__ import annotations

from typing import Any

from drivetrain.errors import DrivetrainError, MigrationError
from drivetrain.hal.device import Device
from drivetrain.migration.checkpoint import newest_valid
from drivetrain.runtime.ending import end_worker
from drivetrain.runtime.hosted import HostedJob
from drivetrain.runtime.process import Worker, WorkerGone
from drivetrain.runtime.remote import RemoteEndpoint
from drivetrain.runtime.starting import start_waiting, until_ready
from drivetrain.runtime.watching import endpoint_of
from drivetrain.store.crash import crash_point

_RESTORE_S = 600.0


class NothingSaved(MigrationError):
    """The job can only start over, and this copy is no longer as its script has built it."""


def restore_on(job: HostedJob, device: Device, reason: str) -> Worker:
    """Give the job to a new copy on ``device``, and to one more if it is to start over."""
    try:
        return _restore_on(job, device, reason)
    except NothingSaved:
        return _restore_on(job, device, reason, anew=True)


def _restore_on(job: HostedJob, device: Device, reason: str, *, anew: bool = False) -> Worker:
    worker = start_waiting(job, "target", device, warm="build")
    if job.replica_fds:
        job.record(
            "standby",
            {"key": worker.key, "process": worker.process.to_json(), "device": worker.address},
        )
    try:
        return restore_into(job, worker, device, reason, anew=anew)
    except DrivetrainError:
        end_worker(job, worker)
        raise


def restore_into(
    job: HostedJob, worker: Worker, device: Device, reason: str, *, anew: bool = False
) -> Worker:
    """Give the job to a waiting copy, from the replica or else a checkpoint; with ``anew`` from
    step 0. Raises NothingSaved where that is all that is left and the copy is not a fresh one."""
    until_ready(job, worker)
    endpoint = endpoint_of(job, worker)
    found = {"step": 0} if anew else _restored(job, endpoint)
    if "hash" not in found:
        job.notice("no replica and no checkpoint: the job starts over from step 0")
    crash_point("failover.restored")
    epoch = job.commit(worker, reason, int(found["step"]))
    job.page.restored_step = int(found["step"])
    job.page.step = int(found["step"])
    worker.role = "owner"
    worker.in_loop = True
    job.owner = worker
    job.device = device
    endpoint.commit(epoch)
    job.write_state("running", on=device.address, step=found["step"])
    return worker


def _restored(job: HostedJob, endpoint: RemoteEndpoint) -> dict[str, Any]:
    """Fill a waiting copy from the best that there is; the step and hash of it."""
    released = job.view.released or {}
    fresh = endpoint.worker.role != "standby"  # which has warmed up with steps of its own
    if job.replica_fds:
        try:
            found = endpoint.restore_replica(job.replica_fds)
        except WorkerGone:
            raise
        except MigrationError as error:
            job.notice(f"the replica cannot be used: {error}")
            fresh = False  # some of it may be in the copy already
        else:
            if found.get("hash") == released.get("hash", found.get("hash")):
                return found
    path = str(released.get("path") or "") or _newest_checkpoint(job)
    if path:
        found = endpoint.ask("restore_checkpoint", path=path).result(_RESTORE_S)
        if found.get("hash") != released.get("hash", found.get("hash")):
            raise MigrationError("what was restored is not what the pause had saved")
        return found
    if released:
        raise MigrationError("the paused state was in the memory of a process that is gone")
    if not fresh:
        raise NothingSaved("there is no replica and no checkpoint to fill this copy with")
    return {"step": 0}


def _newest_checkpoint(job: HostedJob) -> str:
    found = newest_valid(job.directory / "checkpoints")
    for path, reason in found.skipped:
        job.notice(f"the checkpoint {path.name} is passed over: {reason}")
    return "" if found.path is None else str(found.path)

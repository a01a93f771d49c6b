"""Starting a job's workers: placed, isolated, leased; owners, targets and standbys."""

from __future__ import annotations

import contextlib
from typing import Any

from drivetrain import hal
from drivetrain.errors import DrivetrainError, JobError, MigrationError
from drivetrain.hal.device import Device
from drivetrain.runtime.ending import discard, end_worker
from drivetrain.runtime.hosted import HostedJob
from drivetrain.runtime.process import Worker, WorkerGone
from drivetrain.runtime.watching import wait_until
from drivetrain.store.crash import crash_point

_HELLO_S = 120.0
_READY_S = 600.0
_MAX_STANDBY_LOSSES = 3


def place(job: HostedJob, on: str | None = None) -> Device:
    """The device to run on, chosen (unless the submission had) and recorded."""
    placement, device = job.placed or job.placer.choose(on=on)
    job.placed = None
    job.record("placement", placement)
    job.placer.remember_choice(job.job_id, placement)
    for warning in placement.get("warnings", ()):
        job.notice(warning)
    job.event("placement", **placement)
    return device


def spawn(job: HostedJob, role: str, device: Device) -> Worker:
    """Start a worker process on ``device`` with its lease; it waits for its start frame. Raises
    JobError for a device that torch cannot use."""
    reason = job.placer.support(device).reason
    if reason:
        raise JobError(f"no worker can be started on {device.address}: {reason}")
    lease = job.placer.lease(device, job.job_id)
    try:
        worker = Worker.spawn(
            role=role,
            address=device.address,
            python=job.view.spec["python"],
            environment=_environment(job, device),
            # A rehearsal gives the second copy another one: the order of sets must not count.
            hash_seed=job.options.get(f"{role}_hash_seed", job.view.spec["hash_seed"]),
            logs=job.directory / "logs",
        )
    except BaseException:
        job.placer.release(lease)
        raise
    worker.lease = job.placer.give(lease, worker.process)
    job.workers.append(worker)
    return worker


def _environment(job: HostedJob, device: Device) -> dict[str, str]:
    """What a worker on ``device`` has over this process's environment. Which device becomes
    torch's custom one is the worker's affair, not that of a package in its environment."""
    custom = job.placer.support(device).custom
    autoload = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"} if custom else {}
    return {**device.isolation().environment, "DRIVETRAIN_AUTOLOAD": "", **autoload}


def _hand_over_start(
    job: HostedJob, worker: Worker, device: Device, *, epoch: int, **more: Any
) -> None:
    isolation, torch = device.isolation(), job.placer.support(device)
    options = {"warm": "step", **more.pop("options", {})}
    worker.send(
        "start",
        job=job.job_id,
        directory=str(job.directory),
        role=worker.role,
        worker=worker.key,
        epoch=epoch,
        device=device.address,
        torch_device=torch.torch_device,
        custom=device.uuid if torch.custom else "",
        cpus=list(isolation.cpus or ()),
        seed=job.view.spec["seed"],
        spec=job.view.spec,
        once=job.view.once,
        options=options,
        **more,
    )


def start_fresh(job: HostedJob) -> None:
    """Start a new job's owner."""
    device = place(job)
    worker = spawn(job, "owner", device)
    epoch = job.commit(worker, "start", 0)
    worker.role = "owner"
    job.owner = worker
    job.device = device
    with contextlib.suppress(WorkerGone):  # its end is seen as any other
        _hand_over_start(job, worker, device, epoch=epoch)
    _wait_or_end(job, worker)
    start_standby(job)


def _wait_or_end(job: HostedJob, worker: Worker) -> None:
    """Wait for the first sign of life; what a fresh worker says is handled by the supervisor."""
    try:
        wait_until(job, worker, lambda: worker.hello, "start", _HELLO_S)
    except WorkerGone:
        return
    except MigrationError as error:
        raise JobError(str(error)) from error


def start_waiting(job: HostedJob, role: str, device: Device, *, warm: str) -> Worker:
    """A copy that does not own the job yet: started, not waited for."""
    worker = spawn(job, role, device)
    source = job.owner.process.pid if job.owner is not None else 0
    _hand_over_start(
        job,
        worker,
        device,
        epoch=job.view.epoch,
        source_pid=source,
        options={"warm": warm, **job.view.spec.get("options", {})},
    )
    crash_point("runtime.target_started")
    return worker


def until_ready(job: HostedJob, worker: Worker) -> None:
    """Wait until a waiting copy has warmed up."""
    wait_until(job, worker, lambda: worker.ready is not None, "get ready", _READY_S)


def start_standby(job: HostedJob) -> None:
    """Keep a warm copy where one is wanted, but never beside the owner on one device."""
    wanted = job.view.spec.get("standby")
    standby, owner = job.standby, job.owner
    if standby is not None and owner is not None and standby.address == owner.address:
        end_worker(job, standby)
        job.standby = None
    if not wanted or job.standby is not None or job.view.ended:
        return
    if job.standby_losses > _MAX_STANDBY_LOSSES:
        return
    try:
        device = hal.device(wanted)
        if job.owner is not None and device.address == job.owner.address:
            others = [a for a in [*job.view.spec.get("backup", ()), _start_address(job)] if a]
            others = [a for a in others if a != device.address]
            if not others:
                return
            device = hal.device(others[0])
        worker = start_waiting(job, "standby", device, warm="step")
    except DrivetrainError as error:
        job.notice(f"no standby on {wanted}: {error}")
        return
    job.standby = worker
    job.record(
        "standby",
        {"key": worker.key, "process": worker.process.to_json(), "device": worker.address},
    )
    if job.replica_fds:
        with contextlib.suppress(MigrationError):
            worker.send("replica", fds=job.replica_fds)


def _start_address(job: HostedJob) -> str:
    return str((job.view.placement or {}).get("device", ""))


def replace_standby(job: HostedJob, standby: Worker) -> None:
    """Start another standby for one that died, but not for ever."""
    job.standby = None
    job.standby_losses += 1
    why = (standby.ending or {}).get("error") or "it died"
    discard(job, standby)
    if job.standby_losses > _MAX_STANDBY_LOSSES:
        job.notice(f"the standby on {standby.address} is given up: {why}")
        return
    job.notice(f"the standby on {standby.address} is gone ({why}); starting another")
    start_standby(job)

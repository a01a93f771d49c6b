"""When the owner's process is gone: the script's own end, or a loss after which the job goes on."""

from __future__ import annotations

import contextlib
import time

from drivetrain import hal
from drivetrain.errors import DrivetrainError, JobError, MigrationError
from drivetrain.hal.device import Device
from drivetrain.hal.probe import probe
from drivetrain.runtime.ending import discard, end_worker, finish
from drivetrain.runtime.hosted import HostedJob
from drivetrain.runtime.process import Worker
from drivetrain.runtime.restoring import restore_into, restore_on
from drivetrain.runtime.starting import start_standby
from drivetrain.runtime.watching import endpoint_of, wait_until

_FIRST_STEP_S = 600.0


def owner_gone(job: HostedJob, worker: Worker) -> None:
    """The owner's process ended: was it the script's own end, or a loss?"""
    status = worker.reap()
    ending = worker.ending
    job.owner = None
    discard(job, worker)
    job.catch_up()
    if job.view.ended:  # by its own word
        finish(job, job.view.state, 0, "")
        return
    if ending is not None and ending["kind"] in ("user", "error", "interrupted"):
        code = int(ending["code"])
        state = "done" if code == 0 else "failed"
        finish(job, state, code, str(ending.get("error", "")))
        return
    if ending is None and status is not None and status >= 0:
        # os._exit or the like: the script's own way to end
        finish(job, "done" if status == 0 else "failed", status, "the script ended itself")
        return
    device_failed = ending is not None and ending["kind"] == "device"
    error = "the worker died"
    if ending is not None:
        error = str(ending.get("error", ""))
    elif status is not None:
        error = f"the worker died by signal {-status}"
    _fail_over(job, worker, status, error, device_failed)


def _fail_over(
    job: HostedJob, worker: Worker, status: int | None, error: str, device_failed: bool
) -> None:
    """Bring the job back somewhere, or raise JobError when it is past help."""
    died_ns = worker.died_ns
    last_step = job.page.step
    was_paused = job.view.state == "paused"
    job.baseline = job.view.seq
    job.write_state("recovering", error=error, device=worker.address)
    job.notice(f"lost the worker on {worker.address} after step {last_step}: {error}")
    if device_failed:
        job.lost_devices.add(worker.address)
    hopeless = job.losses.verdict(
        last_step,
        worker.address,
        error,
        killed=status in (None, -9) and not device_failed,
        restored=job.page.restored_step,
        furthest=job.page.high_step,
    )
    if hopeless:
        raise JobError(hopeless)
    detected_ms = (time.monotonic_ns() - died_ns) / 1e6
    new = _next_owner(job, worker.address, error)
    if new is not None:
        _tell_failover(job, worker, new, error, last_step, detected_ms)
        if was_paused:
            _pause_again(job, new)
        start_standby(job)


def _pause_again(job: HostedJob, new: Worker) -> None:
    """Nobody has let the job go on: it stops again after the step that shows it is well."""
    with contextlib.suppress(MigrationError):  # when it dies again, that is one more loss
        endpoint_of(job, new).ask("pause", why="user").result(_FIRST_STEP_S)
        job.write_state("paused")


def _next_owner(job: HostedJob, lost: str, error: str) -> Worker | None:
    """The copy that owns the job from here on; None when it is to be stopped meanwhile."""
    problem = ""
    standby = job.standby
    if standby is not None and not standby.gone and standby.ready is not None:
        job.standby = None
        try:
            return restore_into(job, standby, hal.device(standby.address), "failover")
        except DrivetrainError as failure:
            problem = str(failure)
            end_worker(job, standby)
    for device in _refuges(job, lost):
        if job.stop_asked:
            return None
        if device.address == lost and not probe([device])[device].usable:
            job.lost_devices.add(device.address)
            job.notice(f"{device.address} fails its probe and is not used again")
            continue
        try:
            return restore_on(job, device, "failover")
        except DrivetrainError as failure:
            problem = str(failure)
            job.notice(f"cannot go on on {device.address}: {failure}")
    raise JobError(f"no device left to go on with after {error}: {problem}")


def _tell_failover(
    job: HostedJob, lost: Worker, new: Worker, error: str, last_step: int, detected_ms: float
) -> None:
    """Wait for the new owner's first step and record what the loss cost."""
    restored = job.page.restored_step
    report = {
        "from": lost.address,
        "to": new.address,
        "error": error,
        "detected_ms": round(detected_ms, 3),
        "resumed_ms": None,
        "step": restored,
        "steps_repeated": max(0, last_step - restored),
        "ok": True,
    }
    with contextlib.suppress(MigrationError):
        wait_until(job, new, lambda: job.page.step > restored, "complete a step", _FIRST_STEP_S)
        resumed = (job.page.first_step_end_ns - lost.died_ns) / 1e6
        report["resumed_ms"] = round(resumed, 3)
    report.update(samples(new))
    job.record("failover", report)
    job.event("failover", **report)


def _refuges(job: HostedJob, lost: str) -> list[Device]:
    """Where to go on, best first: backups, other devices like the lost one, the same device
    if its probe passes, then devices of other kinds."""
    found = job.placer.ranked(exclude=tuple(job.lost_devices), named=(lost,))
    backups = [str(a) for a in job.view.spec.get("backup", ())]
    kind = lost.split(":")[0]

    def order(device: Device) -> tuple[int, int]:
        if device.address in backups:
            return (0, backups.index(device.address))
        if device.address == lost:
            return (2, 0)
        return (1 if device.driver == kind else 3, 0)

    return sorted(found, key=order)


def samples(worker: Worker) -> dict[str, int | None]:
    """Samples lost and doubled, as far as the copy's two records of its position tell (None
    before it has said so). The proof from inside the state is the script's own affair."""
    if worker.drift is None:
        return {"samples_lost": None, "samples_doubled": None}
    return {"samples_lost": max(0, worker.drift), "samples_doubled": max(0, -worker.drift)}

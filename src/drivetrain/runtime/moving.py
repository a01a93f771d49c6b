"""A job's move as its runtime sees it: the target started and warmed, the move, what follows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

from drivetrain import hal
from drivetrain.errors import BadInput, DrivetrainError, MigrationError
from drivetrain.hal.device import Device
from drivetrain.migration.endpoint import Cut
from drivetrain.migration.moves import Move, MoveReport, check_strategy
from drivetrain.runtime.ending import end_worker
from drivetrain.runtime.hosted import HostedJob
from drivetrain.runtime.peer import PeerCopier, reachable
from drivetrain.runtime.placing import copy_gbps, past_moves
from drivetrain.runtime.process import Worker, WorkerGone
from drivetrain.runtime.remote import RemoteEndpoint
from drivetrain.runtime.starting import start_standby, start_waiting, until_ready
from drivetrain.runtime.watching import pump, wait_until
from drivetrain.store.crash import crash_point
from drivetrain.store.database import Move as PastMove

_READY_S = 600.0
_FIRST_STEP_S = 600.0
_STOP_S = 5.0
_UNDISTURBED_S = 1.0

Phase = Callable[[str, dict[str, Any]], None]


def migrate(job: HostedJob, body: dict[str, Any], on_phase: Phase) -> dict[str, Any]:
    """Move the job; the move's report. MigrationError when it stays where it is."""
    owner = job.owning("move")
    strategy = check_strategy(str(body.get("strategy") or "immediate"))
    device = hal.device(str(body["to"]))
    if device.address == owner.address:
        raise BadInput(f"job {job.job_id} is on {device.address} already")
    if job.view.state == "paused":
        raise BadInput(f"job {job.job_id} is paused: resume it before moving it")
    if not owner.in_loop:
        wait_until(job, owner, lambda: owner.in_loop, "reach its loop", _READY_S)
    job.placer.check_fits(device, job.page.state_bytes, job.page.peak_bytes)
    job.request("migrate", body)
    job.baseline = job.view.seq
    job.interruptible = True
    report = MoveReport(f"m{len(job.view.moves) + 1}", strategy, owner.address, device.address)

    def phase(name: str, facts: dict[str, Any]) -> None:
        job.event("phase", move=report.id, phase=name, **facts)
        on_phase(name, facts)

    phase("warm", {"from": report.source, "to": report.target, "strategy": strategy})
    job.write_state("moving", to=device.address)
    target: Worker | None = None
    began = time.monotonic()
    move: Move | None = None
    try:
        target = start_waiting(job, "target", device, warm=str(body.get("warm") or "step"))
        until_ready(job, target)
        report.phases_ms["warm"] = round((time.monotonic() - began) * 1e3, 3)
        move = _prepared_move(job, report, owner, target, phase, body)
        move.run()
    except DrivetrainError as error:
        report.reason = str(error)
        if move is None or not move.committed:
            _move_failed(job, report, owner, target)
            raise MigrationError(f"the job stays on {report.source}: {error}") from error
    assert target is not None
    assert move is not None
    _after_commit(job, report, move, owner, target, device)
    return report.to_json()


def _prepared_move(
    job: HostedJob,
    report: MoveReport,
    owner: Worker,
    target: Worker,
    phase: Phase,
    body: dict[str, Any],
) -> Move:
    job.record("state", {"state": "moving", "to": report.target, "by": "move"})
    limit = body.get("max_downtime")
    dry_ms = float((target.ready or {}).get("dry_ms", 0.0))

    def commit(cut: Cut) -> int:
        report.steps_repeated = max(0, job.page.high_step - cut.step)
        return job.commit(target, "move", cut.step)

    pair = (owner.address, target.address, report.strategy)
    watching = _pump_watching(job, owner, target)
    return Move(
        report,
        RemoteEndpoint(owner, watching),
        RemoteEndpoint(target, watching),
        commit=commit,
        on_phase=phase,
        write_s=job.append_s,
        copy_gbps=copy_gbps(job.database, *pair),
        target_step_s=dry_ms / 1e3,
        max_downtime_s=None if limit is None else float(limit),
        past=past_moves(job.database, *pair, job.job_id),
        peer=_peer_copier(job, owner, target, report.strategy),
    )


def _pump_watching(job: HostedJob, *workers: Worker) -> Callable[[float], None]:
    """``pump`` that raises, once, when one of the workers died: whichever of them is asked,
    it may wait for the other."""
    watched = list(workers)

    def watching(limit_s: float) -> None:
        pump(job, limit_s)
        gone = [worker for worker in watched if worker.gone]
        if gone:
            watched.clear()
            raise WorkerGone(gone[0], f"the worker on {gone[0].address} died during the move")

    return watching


def _peer_copier(job: HostedJob, owner: Worker, target: Worker, strategy: str) -> PeerCopier | None:
    source, goal = hal.device(owner.address), hal.device(target.address)
    if strategy != "immediate" or not reachable(source, goal):
        return None
    return PeerCopier(source, goal, target.key)


def _move_failed(job: HostedJob, report: MoveReport, owner: Worker, target: Worker | None) -> None:
    job.record("move", report.to_json())
    if target is not None:
        end_worker(job, target)
    if not owner.gone:
        job.write_state("running")
    job.event("move_failed", **report.to_json())


def _after_commit(
    job: HostedJob, report: MoveReport, move: Move, owner: Worker, target: Worker, device: Device
) -> None:
    cut = move.cut
    assert cut is not None
    report.ok = True
    target.role = "owner"
    target.in_loop = True
    job.owner = target
    job.device = device
    crash_point("move.switched")
    with contextlib.suppress(MigrationError):
        # The source is left alone meanwhile: its end would take time from the target's first step.
        wait_until(job, target, lambda: job.page.step > cut.step, "complete a step", _UNDISTURBED_S)
    job.write_state("running", on=device.address)
    end_worker(job, owner, grace_s=_STOP_S + 1.0)
    try:
        wait_until(job, target, lambda: job.page.step > cut.step, "complete a step", _FIRST_STEP_S)
    except MigrationError:
        job.record("move", report.to_json())
        return
    report.steps_lost = max(0, cut.step - job.page.restored_step)
    after = max(0, job.page.first_step_end_ns - cut.step_end_ns - cut.median_ns)
    report.downtime_ms = round(after / 1e6, 3)
    job.record("move", report.to_json())
    job.database.add_move(
        PastMove(
            job=job.job_id,
            source=report.source,
            target=report.target,
            nbytes=report.state_bytes,
            predicted_s=move.explained_s,
            real_s=report.downtime_ms / 1e3,
            bandwidth=report.state_bytes / move.copied_s / 1e9 if move.copied_s else None,
            strategy=report.strategy,
        )
    )
    job.event("moved", **report.to_json())
    start_standby(job)

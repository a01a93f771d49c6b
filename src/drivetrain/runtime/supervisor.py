"""One thread a job: starts its workers, serves commands, moves it, brings it back after a loss.

Everything about a job happens in this thread, one thing after another, so there is no state to
lock. While it waits for an answer it goes on seeing exits, frames and commands (``_pump``).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from drivetrain import hal
from drivetrain.errors import (
    BadInput,
    DrivetrainError,
    JobError,
    MigrationError,
)
from drivetrain.hal.device import Device
from drivetrain.hal.probe import probe
from drivetrain.migration.checkpoint import newest_valid, tidy
from drivetrain.migration.endpoint import Cut
from drivetrain.migration.moves import History, Move, MoveReport, check_strategy
from drivetrain.runtime.channel import Message
from drivetrain.runtime.peer import PeerCopier, reachable
from drivetrain.runtime.placing import Placer, copy_gbps, past_moves
from drivetrain.runtime.process import Worker, WorkerGone
from drivetrain.runtime.remote import RemoteEndpoint
from drivetrain.runtime.status import StatusPage
from drivetrain.runtime.view import JobView
from drivetrain.store.crash import crash_point
from drivetrain.store.database import Database
from drivetrain.store.database import Move as PastMove
from drivetrain.store.home import socket_path
from drivetrain.store.journal import Journal
from drivetrain.store.process import ProcessId

_HELLO_S = 120.0
_READY_S = 600.0
_FIRST_STEP_S = 600.0
_STOP_S = 5.0
_RESTORE_S = 600.0
_LEASES_S = 2.0
_MAX_FRUITLESS = 3
_MAX_STALE = 10
_TOLD = ("held", "carried", "entropy")  # what workers tell a rehearsal


@dataclass
class Command:
    """What somebody wants of the job; ``future`` gets the result or the error."""

    op: str
    body: dict[str, Any]
    future: Future[dict[str, Any]] = field(default_factory=Future)
    on_phase: Callable[[str, dict[str, Any]], None] = lambda name, facts: None


class Supervisor(threading.Thread):
    """Runs one job until it ends; ``view`` mirrors the journal, ``page`` the worker's progress."""

    def __init__(
        self,
        job_id: str,
        directory: Path,
        journal: Journal,
        database: Database,
        *,
        on_event: Callable[[dict[str, Any]], None],
        resume: bool = False,
    ) -> None:
        super().__init__(name=f"drivetrain-job-{job_id}", daemon=True)
        self.job_id = job_id
        self.directory = directory
        self.journal = journal
        self.database = database
        self.view = JobView.of(journal.records())
        self.page = StatusPage.create(directory / "status")
        self.ended = threading.Event()
        self.busy = ""
        self.notices: deque[str] = deque(maxlen=200)
        self._resume = resume
        self.resume_on = ""
        self.placed: tuple[dict[str, Any], Device] | None = None  # chosen at the submission
        self._tell = on_event
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._workers: list[Worker] = []
        self._owner: Worker | None = None
        self._standby: Worker | None = None
        self._replica_fds: list[int] = []
        self._placer = Placer(database, self.view.spec)
        self._options: dict[str, Any] = self.view.spec.get("options") or {}
        self._fruitless = 0
        self._stale = 0
        self._high_step = -1
        self._standby_losses = 0
        self._baseline = self.view.seq
        self._interruptible = False
        self._stop_asked = False
        self._renewed = time.monotonic()
        self._step_errors: list[tuple[int, str, str]] = []
        self._lost_devices: set[str] = set()
        self._device: Device | None = None
        self._me = ProcessId.of()
        self._left = False
        self.problem = ""  # why this runtime does not host the job (which is left as it is)

    # -- from other threads -------------------------------------------------------------

    def submit(self, command: Command) -> None:
        """Queue a command; a second move while one runs is refused at once."""
        if self.ended.is_set():
            command.future.set_exception(
                BadInput(
                    f"job {self.job_id} has ended ({self.view.state}): nothing to {command.op}"
                )
            )
            return
        if self.busy and command.op == "migrate":
            command.future.set_exception(
                BadInput(f"job {self.job_id} is busy ({self.busy}): wait until that has ended")
            )
            return
        if command.op == "migrate":
            self.busy = "moving"
        if command.op == "stop":
            self._stop_asked = True
        self._commands.put(command)
        os.eventfd_write(self._wake, 1)

    # -- the thread ------------------------------------------------------------------------

    def run(self) -> None:
        try:
            self._begin()
            while not self.view.ended and not self._left:
                self._pump(1.0)
                self._look()
                self._keep_leases()
        except DrivetrainError as error:
            self._give_up(str(error))
        except BaseException as error:
            self._give_up(f"internal error: {type(error).__name__}: {error}")
            raise
        finally:
            self._clean_up()
            self.ended.set()
            self._event("ended", **(self.view.exit or {}))

    def _begin(self) -> None:
        if not self._resume:
            self._start_fresh()
            return
        try:
            self._take_over()
        except DrivetrainError as error:
            # It was lost before and is no worse now: leave it to a later attempt.
            self.problem = str(error)
            self._left = True

    def _keep_leases(self) -> None:
        """Put leases back that a deleted database has lost."""
        if time.monotonic() - self._renewed < _LEASES_S:
            return
        self._renewed = time.monotonic()
        for worker in self._workers:
            self._placer.keep(worker.lease)

    def _look(self) -> None:
        """Handle exits and one command."""
        owner = self._owner
        if owner is not None and owner.gone:
            self._owner_gone(owner)
            return
        standby = self._standby
        if standby is not None and standby.gone:
            self._standby = None
            self._standby_losses += 1
            why = (standby.ending or {}).get("error") or "it died"
            self._discard(standby)
            if self._standby_losses > _MAX_FRUITLESS:
                self._notice(f"the standby on {standby.address} is given up: {why}")
                return
            self._notice(f"the standby on {standby.address} is gone ({why}); starting another")
            self._start_standby()
            return
        try:
            command = self._commands.get_nowait()
        except queue.Empty:
            return
        try:
            result = self._obey(command)
        except Exception as error:
            command.future.set_exception(error)
            if not isinstance(error, DrivetrainError):
                raise
        else:
            command.future.set_result(result)
        os.eventfd_write(self._wake, 1)  # there may be another one

    def _pump(self, limit_s: float) -> None:
        """Wait for something to happen and note it: frames, exits, commands."""
        if self._stop_asked and self._interruptible:
            self._interruptible = False
            raise MigrationError("the job is to be stopped")
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        by_fd: dict[int, Worker] = {}
        for worker in self._workers:
            if worker.channel is not None:
                poller.register(worker.channel.fileno(), select.POLLIN)
                by_fd[worker.channel.fileno()] = worker
            if not worker.gone:
                poller.register(worker.pidfd, select.POLLIN)
                by_fd[worker.pidfd] = worker
        for fd, _ in poller.poll(max(0, int(limit_s * 1000))):
            if fd == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
                continue
            worker = by_fd[fd]
            if fd == worker.pidfd:
                worker.died_ns = time.monotonic_ns()
                worker.receive(self._on_event)
                worker.gone = True
            else:
                worker.receive(self._on_event)

    def _wait_until(
        self, worker: Worker, true: Callable[[], bool], what: str, limit_s: float
    ) -> None:
        deadline = time.monotonic() + limit_s
        while not true():
            if worker.gone:
                raise WorkerGone(worker, self._why_gone(worker, what))
            left = deadline - time.monotonic()
            if left <= 0:
                raise MigrationError(
                    f"the worker on {worker.address} did not {what} in {limit_s:g} s"
                )
            self._pump(min(left, 1.0))

    # -- what workers tell --------------------------------------------------------------------

    def _on_event(self, worker: Worker, message: Message) -> None:
        op, body = message.op, message.body
        if op == "hello":
            worker.hello = True
        elif op == "loop":
            worker.in_loop = True
            worker.drift = int(body.get("drift", 0))
        elif op == "ready":
            worker.ready = body.get("timings", {})
        elif op == "replica":
            if worker is self._owner or self._owner is None:
                self._keep_replica(message.fds)
                message.fds = []
        elif op == "running":
            self._on_running(worker, body)
        elif op == "exit":
            worker.ending = body
        elif op == "notice":
            self._notice(str(body.get("text", ""))[:2000])
        elif op == "touched":
            if len(worker.touched) < 200:
                worker.touched.append(body)
            if worker.role != "owner" or self._options.get("watch"):
                told = ("action", "path", "line", "role", "phase")
                self._event("touched", **{k: body.get(k) for k in told})
        elif op == "told" and body.get("kind") in _TOLD:
            facts = {k: v for k, v in body.items() if k not in ("op", "kind")}
            self._event(body["kind"], **facts)
        message.close_fds()

    def _keep_replica(self, fds: Sequence[int]) -> None:
        self._drop_replica()
        self._replica_fds = list(fds)
        if self._standby is not None and not self._standby.gone:
            with contextlib.suppress(MigrationError):
                self._standby.send("replica", fds=self._replica_fds)

    def _drop_replica(self) -> None:
        for fd in self._replica_fds:
            os.close(fd)
        self._replica_fds = []

    def _on_running(self, worker: Worker, body: dict[str, Any]) -> None:
        if worker is not self._owner:
            return
        worker.in_loop = True
        self._placer.measured(worker, int(body.get("peak", 0)))
        if self.view.state == "starting":
            self._write_state("running")
        self._event("running", step=body.get("step"), device=worker.address)

    # -- the journal ------------------------------------------------------------------------

    def _record(self, kind: str, data: dict[str, Any], *, epoch: int | None = None) -> None:
        """One more record; the runtime's own copy of the view follows."""
        self.journal.append(kind, data, epoch=self.view.epoch if epoch is None else epoch)
        self._catch_up()

    def _catch_up(self) -> None:
        self.view = JobView.of(self.journal.records())

    def _write_state(self, state: str, **facts: Any) -> None:
        self._record("state", {"state": state, **facts})
        self._event("state", state=state, **facts)

    def _commit(self, worker: Worker, reason: str, step: int) -> int:
        """Make ``worker`` the owner: the one durable record that decides. Its epoch."""
        self._catch_up()
        self._check_nobody_else_acted()
        epoch = self.view.epoch + 1
        crash_point("commit.before")
        record = self.journal.append(
            "commit",
            {
                "worker": worker.process.to_json(),
                "key": worker.key,
                "device": worker.address,
                "reason": reason,
                "step": step,
            },
            epoch=epoch,
            expect_seq=self.view.seq,
        )
        self._baseline = record.seq
        crash_point("commit.after")
        self._catch_up()
        self.page.epoch = epoch
        crash_point("commit.fenced")
        return epoch

    def _check_nobody_else_acted(self) -> None:
        """Refuse to commit when ownership changed, or was claimed back, behind this runtime."""
        for record in self.journal.records():
            if record.seq <= self._baseline:
                continue
            claimed = record.kind == "state" and record.data.get("by") == "worker"
            if claimed or record.kind in ("commit", "exit", "released", "runtime"):
                raise MigrationError(
                    f"the job was taken on by another process meanwhile (record {record.seq}, "
                    f"{record.kind})"
                )

    # -- starting ------------------------------------------------------------------------------

    def _start_fresh(self) -> None:
        device = self._place()
        worker = self._spawn("owner", device)
        epoch = self._commit(worker, "start", 0)
        worker.role = "owner"
        self._owner = worker
        self._device = device
        with contextlib.suppress(WorkerGone):  # its end is seen as any other
            self._hand_over_start(worker, device, epoch=epoch)
        self._wait_or_end(worker)
        self._start_standby()

    def _wait_or_end(self, worker: Worker) -> None:
        """Wait for the first sign of life; what a fresh worker says is handled by ``_look``."""
        try:
            self._wait_until(worker, lambda: worker.hello, "start", _HELLO_S)
        except WorkerGone:
            return
        except MigrationError as error:
            raise JobError(str(error)) from error

    def _place(self, on: str | None = None) -> Device:
        placement, device = self.placed or self._placer.choose(on=on)
        self.placed = None
        self._record("placement", placement)
        for warning in placement.get("warnings", ()):
            self._notice(warning)
        self._event("placement", **placement)
        return device

    def _spawn(self, role: str, device: Device) -> Worker:
        """Start a worker process on ``device`` with its lease; it waits for its start frame."""
        isolation = device.isolation()
        lease = self._placer.lease(device, self.job_id)
        try:
            worker = Worker.spawn(
                role=role,
                address=device.address,
                python=self.view.spec["python"],
                environment=isolation.environment,
                # A rehearsal gives the second copy another one: the order of sets must not count.
                hash_seed=self._options.get(f"{role}_hash_seed", self.view.spec["hash_seed"]),
                logs=self.directory / "logs",
            )
        except BaseException:
            self._placer.release(lease)
            raise
        worker.lease = self._placer.give(lease, worker.process)
        self._workers.append(worker)
        return worker

    def _hand_over_start(self, worker: Worker, device: Device, *, epoch: int, **more: Any) -> None:
        isolation = device.isolation()
        options = {"warm": "step", **more.pop("options", {})}
        worker.send(
            "start",
            job=self.job_id,
            directory=str(self.directory),
            role=worker.role,
            worker=worker.key,
            epoch=epoch,
            device=device.address,
            torch_device=isolation.torch_device,
            cpus=list(isolation.cpus or ()),
            seed=self.view.spec["seed"],
            spec=self.view.spec,
            once=self.view.once,
            options=options,
            **more,
        )

    def _start_waiting(self, role: str, device: Device, *, warm: str) -> Worker:
        """A copy that does not own the job yet: started, not waited for."""
        worker = self._spawn(role, device)
        source = self._owner.process.pid if self._owner is not None else 0
        self._hand_over_start(
            worker,
            device,
            epoch=self.view.epoch,
            source_pid=source,
            options={"warm": warm, **self.view.spec.get("options", {})},
        )
        crash_point("runtime.target_started")
        return worker

    def _until_ready(self, worker: Worker) -> None:
        self._wait_until(worker, lambda: worker.ready is not None, "get ready", _READY_S)

    def _why_gone(self, worker: Worker, what: str) -> str:
        ending = worker.ending or {}
        error = ending.get("error")
        if error:
            return f"the script failed on {worker.address} before it could {what}: {error}"
        if ending.get("kind") == "user":
            return (
                f"the script ended on {worker.address} before it could {what}: it has no "
                "`for step in run` loop that is reached"
            )
        return f"the worker on {worker.address} died before it could {what}"

    def _start_standby(self) -> None:
        wanted = self.view.spec.get("standby")
        standby, owner = self._standby, self._owner
        if standby is not None and owner is not None and standby.address == owner.address:
            self._end_worker(standby)
            self._standby = None
        if not wanted or self._standby is not None or self.view.ended:
            return
        if self._standby_losses > _MAX_FRUITLESS:
            return
        try:
            device = hal.device(wanted)
            if self._owner is not None and device.address == self._owner.address:
                others = [
                    a for a in [*self.view.spec.get("backup", ()), self._start_address()] if a
                ]
                others = [a for a in others if a != device.address]
                if not others:
                    return
                device = hal.device(others[0])
            worker = self._start_waiting("standby", device, warm="step")
        except DrivetrainError as error:
            self._notice(f"no standby on {wanted}: {error}")
            return
        self._standby = worker
        self._record(
            "standby",
            {"key": worker.key, "process": worker.process.to_json(), "device": worker.address},
        )
        if self._replica_fds:
            with contextlib.suppress(MigrationError):
                worker.send("replica", fds=self._replica_fds)

    def _start_address(self) -> str:
        return str((self.view.placement or {}).get("device", ""))

    # -- commands --------------------------------------------------------------------------------

    def _obey(self, command: Command) -> dict[str, Any]:
        if command.op == "migrate":
            try:
                return self._migrate(command)
            finally:
                self.busy = ""
                self._interruptible = False
        if command.op == "pause":
            return self._pause(command.body)
        if command.op == "resume":
            return self._resume_paused(command.body)
        if command.op == "stop":
            return self._stop(command.body)
        if command.op == "leave":
            self._left = True
            return {}
        if command.op == "checkpoint":
            owner = self._owning("checkpoint")
            return RemoteEndpoint(owner, self._pump).save(to_disk=True)
        raise BadInput(f"a job cannot {command.op!r}")

    def _owning(self, op: str) -> Worker:
        if self._owner is None:
            raise BadInput(
                f"job {self.job_id} is {self.view.state}: nothing runs to {op}; resume it"
            )
        return self._owner

    def _request(self, command: str, body: dict[str, Any]) -> None:
        self._record(
            "request",
            {
                "command": command,
                "uid": int(body.get("uid", os.getuid())),
                "reason": str(body.get("reason", ""))[:500],
                "to": body.get("to", ""),
            },
        )

    def _pause(self, body: dict[str, Any]) -> dict[str, Any]:
        owner = self._owning("pause")
        self._request("pause", body)
        endpoint = RemoteEndpoint(owner, self._pump)
        was_paused = self.view.state == "paused"
        if not was_paused:
            try:
                endpoint.ask("pause", why="user").result(float(body.get("limit_s") or 600.0))
            except MigrationError:
                with contextlib.suppress(MigrationError):
                    owner.send("resume")  # it would stop later, when nobody expects it
                raise
            self._write_state("paused")
        if not body.get("release"):
            return {"state": "paused", "step": self.page.step}
        try:
            saved = self._save_for_release(endpoint, to_disk=bool(body.get("to_disk")))
        except WorkerGone:
            raise
        except DrivetrainError:
            if not was_paused:  # as if it had never been asked
                endpoint.ask("resume").result(30.0)
                self._write_state("running")
            raise
        crash_point("pause.saved")
        self._record(
            "released", {"step": saved["step"], "hash": saved["hash"], "path": saved["path"]}
        )
        crash_point("pause.released")
        self.page.epoch = 0  # nobody owns it now
        with contextlib.suppress(MigrationError):
            endpoint.release()
        self._end_worker(owner)
        self._owner = None
        if body.get("to_disk"):
            self._drop_replica()
        if self._standby is not None:
            self._end_worker(self._standby)
            self._standby = None
        self._event("state", state="paused", released=True)
        return {"state": "paused", **{k: saved[k] for k in ("step", "hash", "path")}}

    def _save_for_release(self, endpoint: RemoteEndpoint, *, to_disk: bool) -> dict[str, Any]:
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
            self._notice(f"the paused state is kept in memory only: {error}")
            return saved
        return {**saved, "path": on_disk["path"]}

    def _resume_paused(self, body: dict[str, Any]) -> dict[str, Any]:
        if self.view.state != "paused":
            raise BadInput(f"job {self.job_id} is {self.view.state}, not paused: nothing to resume")
        self._request("resume", body)
        where = str(body.get("on") or "")
        if self._owner is not None:
            if where and where not in ("auto", self._owner.address):
                raise BadInput(
                    f"job {self.job_id} is only paused and holds {self._owner.address}: "
                    "resume it there and migrate, or pause it with --release first"
                )
            RemoteEndpoint(self._owner, self._pump).ask("resume").result(30.0)
            self._write_state("running")
            return {"state": "running", "device": self._owner.address}
        self._baseline = self.view.seq
        device = self._place(on=where or None)
        worker = self._restore_on(device, "resume")
        self._start_standby()
        return {"state": "running", "device": worker.address, "step": self.page.step}

    def _stop(self, body: dict[str, Any]) -> dict[str, Any]:
        self._request("stop", body)
        owner = self._owner
        if owner is not None:
            with contextlib.suppress(MigrationError):
                owner.send("interrupt" if body.get("interrupt") else "stop")
            deadline = time.monotonic() + float(body.get("grace_s") or _STOP_S)
            while not owner.gone and time.monotonic() < deadline:
                self._pump(0.1)
            self._end_worker(owner)
            self._owner = None
        self._finish("stopped", 130 if body.get("interrupt") else 0, "stopped on request")
        return {"state": "stopped", "step": self.page.step}

    # -- moving ----------------------------------------------------------------------------------

    def _migrate(self, command: Command) -> dict[str, Any]:
        body = command.body
        owner = self._owning("move")
        strategy = check_strategy(str(body.get("strategy") or "immediate"))
        device = hal.device(str(body["to"]))
        if device.address == owner.address:
            raise BadInput(f"job {self.job_id} is on {device.address} already")
        if self.view.state == "paused":
            raise BadInput(f"job {self.job_id} is paused: resume it before moving it")
        if not owner.in_loop:
            self._wait_until(owner, lambda: owner.in_loop, "reach its loop", _READY_S)
        self._placer.check_fits(device, self.page.state_bytes, self.page.peak_bytes)
        self._request("migrate", body)
        self._baseline = self.view.seq
        self._interruptible = True
        report = MoveReport(f"m{len(self.view.moves) + 1}", strategy, owner.address, device.address)

        def phase(name: str, facts: dict[str, Any]) -> None:
            self._event("phase", move=report.id, phase=name, **facts)
            command.on_phase(name, facts)

        phase("warm", {"from": report.source, "to": report.target, "strategy": strategy})
        self._write_state("moving", to=device.address)
        target: Worker | None = None
        began = time.monotonic()
        move: Move | None = None
        try:
            target = self._start_waiting("target", device, warm=str(body.get("warm") or "step"))
            self._until_ready(target)
            report.phases_ms["warm"] = round((time.monotonic() - began) * 1e3, 3)
            move = self._prepared_move(report, owner, target, phase, body)
            move.run()
        except DrivetrainError as error:
            report.reason = str(error)
            if move is None or not move.committed:
                self._move_failed(report, owner, target)
                raise MigrationError(f"the job stays on {report.source}: {error}") from error
        assert target is not None
        assert move is not None
        self._after_commit(report, move, owner, target, device)
        return report.to_json()

    def _prepared_move(
        self,
        report: MoveReport,
        owner: Worker,
        target: Worker,
        phase: Callable[[str, dict[str, Any]], None],
        body: dict[str, Any],
    ) -> Move:
        write_began = time.monotonic()
        self._record("state", {"state": "moving", "to": report.target, "by": "move"})
        write_s = time.monotonic() - write_began
        limit = body.get("max_downtime")
        dry_ms = float((target.ready or {}).get("dry_ms", 0.0))

        def commit(cut: Cut) -> int:
            report.steps_repeated = max(0, self.page.high_step - cut.step)
            return self._commit(target, "move", cut.step)

        pair = (owner.address.split(":")[0], target.address.split(":")[0], report.strategy)
        pump = self._pump_watching(owner, target)
        return Move(
            report,
            RemoteEndpoint(owner, pump),
            RemoteEndpoint(target, pump),
            commit=commit,
            on_phase=phase,
            write_s=write_s,
            copy_gbps=copy_gbps(self.database, *pair),
            target_step_s=dry_ms / 1e3,
            max_downtime_s=None if limit is None else float(limit),
            history=History(past_moves(self.database, *pair)),
            peer=self._peer_copier(owner, target, report.strategy),
        )

    def _pump_watching(self, *workers: Worker) -> Callable[[float], None]:
        """``_pump`` that raises, once, when one of the workers died: whichever of them is asked,
        it may wait for the other."""
        watched = list(workers)

        def pump(limit_s: float) -> None:
            self._pump(limit_s)
            gone = [worker for worker in watched if worker.gone]
            if gone:
                watched.clear()
                raise WorkerGone(gone[0], f"the worker on {gone[0].address} died during the move")

        return pump

    def _peer_copier(self, owner: Worker, target: Worker, strategy: str) -> PeerCopier | None:
        source, goal = hal.device(owner.address), hal.device(target.address)
        if strategy != "immediate" or not reachable(source, goal):
            return None
        return PeerCopier(source, goal, target.key)

    def _move_failed(self, report: MoveReport, owner: Worker, target: Worker | None) -> None:
        self._record("move", report.to_json())
        if target is not None:
            self._end_worker(target)
        if not owner.gone:
            self._write_state("running")
        self._event("move_failed", **report.to_json())

    def _after_commit(
        self, report: MoveReport, move: Move, owner: Worker, target: Worker, device: Device
    ) -> None:
        cut = move.cut
        assert cut is not None
        report.ok = True
        target.role = "owner"
        target.in_loop = True
        self._owner = target
        self._device = device
        crash_point("move.switched")
        self._write_state("running", on=device.address)
        self._end_worker(owner, grace_s=_STOP_S + 1.0)
        try:
            self._wait_until(
                target, lambda: self.page.step > cut.step, "complete a step", _FIRST_STEP_S
            )
        except MigrationError:
            self._record("move", report.to_json())
            return
        report.steps_lost = max(0, cut.step - self.page.restored_step)
        after = max(0, self.page.first_step_end_ns - cut.step_end_ns - cut.median_ns)
        report.downtime_ms = round(after / 1e6, 3)
        self._record("move", report.to_json())
        self.database.add_move(
            PastMove(
                job=self.job_id,
                source=report.source,
                target=report.target,
                nbytes=report.state_bytes,
                predicted_s=move.explained_s,
                real_s=report.downtime_ms / 1e3,
                bandwidth=report.state_bytes / move.copied_s / 1e9 if move.copied_s else None,
                strategy=report.strategy,
            )
        )
        self._event("moved", **report.to_json())
        self._start_standby()

    # -- losing and finding ------------------------------------------------------------------------

    def _owner_gone(self, worker: Worker) -> None:
        """The owner's process ended: was it the script's own end, or a loss?"""
        status = worker.reap()
        ending = worker.ending
        self._owner = None
        self._discard(worker)
        self._catch_up()
        if self.view.ended:  # by its own word
            self._finish(self.view.state, 0, "")
            return
        if ending is not None and ending["kind"] in ("user", "error", "interrupted"):
            code = int(ending["code"])
            state = "done" if code == 0 else "failed"
            self._finish(state, code, str(ending.get("error", "")))
            return
        if ending is None and status is not None and status >= 0:
            # os._exit or the like: the script's own way to end
            self._finish("done" if status == 0 else "failed", status, "the script ended itself")
            return
        device_failed = ending is not None and ending["kind"] == "device"
        error = "the worker died"
        if ending is not None:
            error = str(ending.get("error", ""))
        elif status is not None:
            error = f"the worker died by signal {-status}"
        self._fail_over(worker, status, error, device_failed)

    def _fail_over(
        self, worker: Worker, status: int | None, error: str, device_failed: bool
    ) -> None:
        died_ns = worker.died_ns
        last_step = self.page.step
        self._baseline = self.view.seq
        self._write_state("recovering", error=error, device=worker.address)
        self._notice(f"lost the worker on {worker.address} after step {last_step}: {error}")
        killed = status in (None, -9) and not device_failed
        if device_failed:
            self._lost_devices.add(worker.address)
        self._judge(last_step, worker.address, error, killed)
        detected_ms = (time.monotonic_ns() - died_ns) / 1e6
        standby = self._standby
        new: Worker | None = None
        problem = ""
        if standby is not None and not standby.gone and standby.ready is not None:
            self._standby = None
            try:
                new = self._restore_into(standby, hal.device(standby.address), "failover")
            except DrivetrainError as failure:
                problem = str(failure)
                self._end_worker(standby)
        for device in self._refuges(worker.address) if new is None else ():
            if self._stop_asked:
                return
            if device.address == worker.address and not probe([device])[device].usable:
                self._lost_devices.add(device.address)
                self._notice(f"{device.address} fails its probe and is not used again")
                continue
            try:
                new = self._restore_on(device, "failover")
                break
            except DrivetrainError as failure:
                problem = str(failure)
                self._notice(f"cannot go on on {device.address}: {failure}")
        if new is None:
            raise JobError(f"no device left to go on with after {error}: {problem}")
        restored = self.page.restored_step
        report = {
            "from": worker.address,
            "to": new.address,
            "error": error,
            "detected_ms": round(detected_ms, 3),
            "resumed_ms": None,
            "step": restored,
            "steps_repeated": max(0, last_step - restored),
            "samples_lost": None,
            "samples_doubled": None,
            "ok": True,
        }
        fresh = new
        with contextlib.suppress(MigrationError):
            self._wait_until(
                fresh, lambda: self.page.step > restored, "complete a step", _FIRST_STEP_S
            )
            resumed = (self.page.first_step_end_ns - died_ns) / 1e6
            report["resumed_ms"] = round(resumed, 3)
        report.update(_samples(fresh))
        self._record("failover", report)
        self._event("failover", **report)
        self._start_standby()

    def _judge(self, step: int, address: str, error: str, killed: bool) -> None:
        """Stop a job that is past help: one step failing on two devices, or no progress."""
        if step > self.page.restored_step:
            self._fruitless = 0
        self._fruitless += 1
        if self.page.high_step > self._high_step:
            self._high_step = self.page.high_step
            self._stale = 0
        self._stale += 1
        if self._stale > _MAX_STALE:
            raise JobError(f"{_MAX_STALE} failovers without coming further than before: {error}")
        if not killed:
            self._step_errors.append((step, address, error))
            same = {a for s, a, _ in self._step_errors if s == step}
            if len(same) >= 2:
                errors = "; ".join(f"{a}: {e}" for s, a, e in self._step_errors if s == step)
                raise JobError(f"step {step + 1} failed on two devices: {errors}")
        if self._fruitless > _MAX_FRUITLESS:
            raise JobError(f"{_MAX_FRUITLESS} failovers without a completed step between: {error}")

    def _refuges(self, lost: str) -> list[Device]:
        """Where to go on, best first: backups, other devices like the lost one, the same device
        if its probe passes, then devices of other kinds."""
        found = self._placer.ranked(exclude=tuple(self._lost_devices))
        backups = [str(a) for a in self.view.spec.get("backup", ())]
        kind = lost.split(":")[0]

        def order(device: Device) -> tuple[int, int]:
            if device.address in backups:
                return (0, backups.index(device.address))
            if device.address == lost:
                return (2, 0)
            return (1 if device.driver == kind else 3, 0)

        return sorted(found, key=order)

    def _restore_on(self, device: Device, reason: str) -> Worker:
        worker = self._start_waiting("target", device, warm="build")
        if self._replica_fds:
            self._record(
                "standby",
                {"key": worker.key, "process": worker.process.to_json(), "device": worker.address},
            )
        try:
            return self._restore_into(worker, device, reason)
        except DrivetrainError:
            self._end_worker(worker)
            raise

    def _restore_into(self, worker: Worker, device: Device, reason: str) -> Worker:
        """Give the job to a waiting copy, from the replica or else a checkpoint."""
        self._until_ready(worker)
        endpoint = RemoteEndpoint(worker, self._pump)
        found = self._restored(endpoint)
        crash_point("failover.restored")
        epoch = self._commit(worker, reason, int(found["step"]))
        self.page.restored_step = int(found["step"])
        self.page.step = int(found["step"])
        worker.role = "owner"
        worker.in_loop = True
        self._owner = worker
        self._device = device
        endpoint.commit(epoch)
        self._write_state("running", on=device.address, step=found["step"])
        return worker

    def _restored(self, endpoint: RemoteEndpoint) -> dict[str, Any]:
        """Fill a waiting copy from the best that there is; the step and hash of it."""
        released = self.view.released or {}
        if self._replica_fds:
            try:
                found = endpoint.restore_replica(self._replica_fds)
            except WorkerGone:
                raise
            except MigrationError as error:
                self._notice(f"the replica cannot be used: {error}")
            else:
                if found.get("hash") == released.get("hash", found.get("hash")):
                    return found
        path = str(released.get("path") or "") or self._newest_checkpoint()
        if path:
            found = endpoint.ask("restore_checkpoint", path=path).result(_RESTORE_S)
            if found.get("hash") != released.get("hash", found.get("hash")):
                raise MigrationError("what was restored is not what the pause had saved")
            return found
        if released:
            raise MigrationError("the paused state was in the memory of a process that is gone")
        self._notice("no replica and no checkpoint: the job starts over from step 0")
        return {"step": 0}

    def _newest_checkpoint(self) -> str:
        found = newest_valid(self.directory / "checkpoints")
        for path, reason in found.skipped:
            self._notice(f"the checkpoint {path.name} is passed over: {reason}")
        return "" if found.path is None else str(found.path)

    # -- taking over a job of a dead runtime -------------------------------------------------------

    def _take_over(self) -> None:
        """Adopt the living worker, else a living standby's replica, else the newest checkpoint."""
        view = self.view
        adopted = self._adopted_owner()
        if self.view.ended:
            return
        if adopted is not None:
            worker, answer = adopted
            self._workers.append(worker)
            worker.role = "owner"
            self._owner = worker
            self.page.epoch = view.epoch
            if answer.fds:
                self._keep_replica(answer.fds)
            worker.lease = self._placer.adopt(
                hal.device(worker.address), worker.process, self.job_id
            )
            state = "paused" if answer.body.get("state") == "paused" else "running"
            self._write_state(state, adopted=worker.process.pid)
            self._notice(f"adopted the running worker {worker.process.pid} on {worker.address}")
            self._sweep_others({worker.key})
            self._start_standby()
            return
        last = self.page.step
        waiting = self._living_copy()
        lost = view.device
        if waiting is not None:
            worker, answer = waiting
            self._workers.append(worker)
            self._keep_replica(answer.fds)
            worker.ready = {}
            self._write_state("recovering", by="resume")
            device = hal.device(worker.address)
            worker.lease = self._placer.adopt(device, worker.process, self.job_id)
            self._restore_into(worker, device, "resume")
            self._sweep_others({worker.key})
        else:
            self._sweep_others(set())
            device = self._place(on=self.resume_on or None)
            self._write_state("recovering", by="resume")
            self._restore_on(device, "resume")
        self._tell_resumed(lost, last)
        self._start_standby()

    def _tell_resumed(self, lost: str, last: int) -> None:
        """Report a start from what was saved, when the runtime and the worker were both gone."""
        restored = self.page.restored_step
        repeated = max(0, last - restored)
        self._notice(f"resumed at step {restored}; {repeated} steps are repeated")
        if self._owner is None or not lost or self.view.released is not None:
            return
        report = {
            "from": lost,
            "to": self._owner.address,
            "error": "the runtime and the worker were gone",
            "detected_ms": None,
            "resumed_ms": None,
            "step": restored,
            "steps_repeated": repeated,
            **_samples(self._owner),
            "ok": True,
        }
        self._record("failover", report)
        self._event("failover", **report)

    def _adopted_owner(self) -> tuple[Worker, Message] | None:
        """The living owner; None when there is none (any more)."""
        process = self.view.worker
        if process is None:
            return None
        try:
            if process.alive:
                return Worker.adopt(self.view.worker_key, process, self._me)
            return None
        except JobError as error:
            if ProcessId.from_json(process.to_json()).alive:
                raise JobError(
                    f"{error}; it holds the job, which is left to it. If it hangs, end it with "
                    f"`kill -9 {process.pid}` and resume again"
                ) from error
            self._catch_up()  # it ended just now, and perhaps said so
            return None

    def _living_copy(self) -> tuple[Worker, Message] | None:
        standby = self.view.standby
        if not standby:
            return None
        process = ProcessId.from_json(standby["process"])
        if not process.alive:
            return None
        try:
            worker, answer = Worker.adopt(standby["key"], process, self._me)
        except JobError:
            return None
        if not answer.fds:
            worker.close()
            return None
        return worker, answer

    def _sweep_others(self, keep: set[str]) -> None:
        """End what earlier runtimes left of this job: copies that never came to own it."""
        from drivetrain.runtime.process import kill_marked

        keys = {
            r.data["key"]
            for r in self.journal.records()
            if r.kind in ("commit", "standby") and r.data
        }
        for key in keys - keep:
            kill_marked(key)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(socket_path(f"w-{key}"))
        for path in (self.directory / "logs").glob("*-*.???"):
            with contextlib.suppress(OSError):
                if path.stat().st_size == 0 and not any(key in path.name for key in keep):
                    path.unlink()

    # -- ending ----------------------------------------------------------------------------------

    def _finish(self, state: str, code: int, reason: str) -> None:
        for worker in list(self._workers):
            if worker is not self._owner:
                self._end_worker(worker)
        if not self.view.ended:
            self._record(
                "exit", {"state": state, "code": code, "reason": reason, "step": self.page.step}
            )
        self._placer.remember(self._device, self.page)

    def _give_up(self, reason: str) -> None:
        self._event("gave_up", reason=reason)
        self.notices.append(reason)
        for worker in list(self._workers):
            self._end_worker(worker)
        self._owner = None
        with contextlib.suppress(DrivetrainError):
            self._record(
                "exit", {"state": "failed", "code": 1, "reason": reason, "step": self.page.step}
            )
        if not self.view.ended:
            self.view.state = "failed"
            self.view.exit = {"state": "failed", "code": 1, "reason": reason}

    def _end_worker(self, worker: Worker, *, grace_s: float = 0.0) -> None:
        deadline = time.monotonic() + grace_s
        while not worker.gone and time.monotonic() < deadline:
            self._pump(0.1)
        if not worker.kill():
            self._lost_devices.add(worker.address)
            self._notice(
                f"the worker {worker.process.pid} on {worker.address} does not die: its device "
                "counts as lost, and the journal fences it off"
            )
        self._discard(worker)

    def _discard(self, worker: Worker) -> None:
        worker.sweep()
        self._placer.release(worker.lease)
        worker.close()
        if worker in self._workers:
            self._workers.remove(worker)
        for name in ("out", "err"):
            path = self.directory / "logs" / f"{worker.log_prefix or '-'}{name}"
            with contextlib.suppress(OSError):
                if path.stat().st_size == 0:
                    path.unlink()

    def _clean_up(self) -> None:
        for worker in list(self._workers):
            self._end_worker(worker)
        tidy(self.directory / "checkpoints")
        self._drop_replica()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                break
            command.future.set_exception(BadInput(f"job {self.job_id} has ended"))

    # -- telling -----------------------------------------------------------------------------------

    def _notice(self, text: str) -> None:
        self.notices.append(text)
        self._event("notice", text=text)

    def _event(self, kind: str, **facts: Any) -> None:
        event = {"event": kind, "job": self.job_id, "at": time.time(), **facts}
        with contextlib.suppress(OSError):
            path = self.directory / "logs" / "events.jsonl"
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(fd, (json.dumps(event, default=str) + "\n").encode())
            finally:
                os.close(fd)
        self._tell(event)


def _samples(worker: Worker) -> dict[str, int | None]:
    """Samples lost and doubled, as far as the copy's two records of its position tell (None
    before it has said so). The proof from inside the state is the script's own affair."""
    if worker.drift is None:
        return {"samples_lost": None, "samples_doubled": None}
    return {"samples_lost": max(0, worker.drift), "samples_doubled": max(0, -worker.drift)}

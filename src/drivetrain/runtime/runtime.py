"""``Runtime``: hosts jobs in this process, and answers the command line on a private socket."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from drivetrain import hal
from drivetrain.errors import (
    BadInput,
    DiskFull,
    DrivetrainError,
    JobError,
    PlacementError,
    StoreError,
)
from drivetrain.hal.device import Device
from drivetrain.migration.checkpoint import newest_valid, verify
from drivetrain.migration.moves import check_strategy
from drivetrain.runtime import jobs
from drivetrain.runtime.channel import (
    Channel,
    ChannelClosed,
    Listener,
    Message,
    ProtocolError,
    sweep_sockets,
)
from drivetrain.runtime.commands import Command
from drivetrain.runtime.environments import interpreter
from drivetrain.runtime.hosted import HostedJob
from drivetrain.runtime.placing import Placer
from drivetrain.runtime.process import check_environment
from drivetrain.runtime.supervisor import Supervisor
from drivetrain.store.crash import crash_point
from drivetrain.store.database import Database
from drivetrain.store.home import home, socket_path
from drivetrain.store.journal import Journal, JournalConflict
from drivetrain.store.process import ProcessId

_CLIENT_LIMIT = 64
_LONGEST_S = 1e9


class Job:
    """A running or ended workload. Made by ``Runtime.submit`` and ``Runtime.resume``."""

    def __init__(self, runtime: Runtime, supervisor: Supervisor) -> None:
        self.id = supervisor.hosted.job_id
        self.directory = supervisor.hosted.directory
        self._runtime = runtime
        self._supervisor = supervisor
        self._events: deque[dict[str, Any]] = deque(maxlen=10000)
        self._changed = threading.Condition()

    @property
    def state(self) -> str:
        """One of starting, running, paused, moving, recovering, done, failed, stopped, lost."""
        return self._supervisor.hosted.view.state

    @property
    def step(self) -> int:
        """Number of completed steps."""
        return self._supervisor.hosted.page.step

    @property
    def device(self) -> str:
        """Address of the device that the job's owner runs on."""
        return self._supervisor.hosted.view.device

    @property
    def first_step_end_ns(self) -> int:
        """When the present copy completed its first step, on CLOCK_MONOTONIC."""
        return self._supervisor.hosted.page.first_step_end_ns

    @property
    def exit_code(self) -> int | None:
        """The script's exit code once ended; 1 when the runtime gave the job up."""
        ending = self._supervisor.hosted.view.exit
        return None if ending is None else int(ending["code"])

    def migrate(
        self,
        to: str,
        strategy: str = "immediate",
        *,
        max_downtime: float | None = None,
        warm: str = "step",
        reason: str = "",
        on_phase: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        """Move the job to another device; the move's report.

        ``max_downtime`` in seconds refuses a move predicted to take longer. Raises BadInput for
        what cannot be meant, MigrationError when the move failed (the job then goes on where it
        was).
        """
        check_strategy(strategy)
        hal.device(to)
        body = {
            "to": to,
            "strategy": strategy,
            "max_downtime": max_downtime,
            "warm": warm,
            "reason": reason,
        }
        return self._do("migrate", body, on_phase)

    def pause(
        self,
        *,
        release: bool = False,
        to_disk: bool = False,
        reason: str = "",
        limit_s: float = 600.0,
    ) -> dict[str, Any]:
        """Stop at the next step boundary; with ``release`` give the device back too."""
        body = {
            "release": release or to_disk,
            "to_disk": to_disk,
            "reason": reason,
            "limit_s": limit_s,
        }
        return self._do("pause", body)

    def resume(self, on: str = "", *, reason: str = "") -> dict[str, Any]:
        """Go on after a pause; after a released one on any device."""
        return self._do("resume", {"on": on, "reason": reason})

    def checkpoint(self) -> dict[str, Any]:
        """Write a durable checkpoint at the next step boundary; its path, step and hash."""
        return self._do("checkpoint", {})

    def stop(
        self, *, reason: str = "", interrupt: bool = False, grace_s: float = 5.0
    ) -> dict[str, Any]:
        """End the job at its next step boundary (with ``interrupt`` at once)."""
        return self._do("stop", {"reason": reason, "interrupt": interrupt, "grace_s": grace_s})

    def leave(self) -> None:
        """Stop hosting the job here without ending it; ``Runtime.resume`` takes it up again.

        A worker that still runs is killed: what it did since the newest checkpoint is repeated.
        """
        with contextlib.suppress(BadInput):  # it has ended meanwhile
            self._do("leave", {})
        self._supervisor.ended.wait(10.0)

    @property
    def ended(self) -> bool:
        """True once this runtime hosts the job no more."""
        return self._supervisor.ended.is_set()

    @property
    def exit_code_known(self) -> bool:
        """True once the job itself has ended, and not only its hosting here."""
        return self._supervisor.hosted.view.exit is not None

    @property
    def problem(self) -> str:
        """Why this runtime could not take the job over; empty when it could."""
        return self._supervisor.problem

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait until the job ended; its exit code, or None when ``timeout`` seconds passed."""
        self._supervisor.ended.wait(timeout)
        return self.exit_code if self._supervisor.ended.is_set() else None

    def report(self) -> dict[str, Any]:
        """Everything that ``drivetrain show --json`` prints."""
        return jobs.load(self.directory).details()

    def events(self, *, follow: bool = True) -> Iterator[dict[str, Any]]:
        """What happens to the job, from its start; ends with the job unless ``follow`` is false."""
        seen = 0
        while True:
            with self._changed:
                known = list(self._events)
                if len(known) <= seen and follow and not self._supervisor.ended.is_set():
                    self._changed.wait(0.5)
                    known = list(self._events)
            yield from known[seen:]
            seen = len(known)
            if not follow or (self._supervisor.ended.is_set() and seen >= len(self._events)):
                return

    def logs(self) -> bytes:
        """What the job's owner has written to stdout."""
        path = self.directory / "logs" / "out"
        return path.read_bytes() if path.exists() else b""

    def _do(
        self,
        op: str,
        body: dict[str, Any],
        on_phase: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> dict[str, Any]:
        command = Command(op, body)
        if on_phase is not None:
            command.on_phase = on_phase
        self._supervisor.submit(command)
        return command.future.result()

    def _take_event(self, event: dict[str, Any]) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()


class Runtime:
    """Hosts jobs: each in its own worker process, watched by a thread of this one.

    Lives in the process that makes it. When that process ends without ``close`` (or dies), its
    jobs go on and wait to be adopted (``orphan="run"``), or stop (``orphan="exit"``).
    """

    def __init__(self) -> None:
        self.home = home()
        self.database = Database(self.home / "drivetrain.sqlite")
        self.process = ProcessId.of()
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._socket = socket_path(f"r-{self.process.pid}-{secrets.token_hex(4)}")
        sweep_sockets(os.path.dirname(self._socket))
        jobs.remove_unborn()
        self._listener = Listener(self._socket)
        self._clients: list[Channel] = []
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="drivetrain-runtime", daemon=True)
        self._thread.start()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- jobs -----------------------------------------------------------------------------

    def submit(
        self,
        script: str | os.PathLike[str],
        args: Sequence[str] = (),
        *,
        on: str = "auto",
        prefer: Sequence[str] = (),
        backup: Sequence[str] = (),
        standby: str | None = None,
        environment: str | None = None,
        strict: bool = False,
        memory: int | None = None,
        replicate_every: int | None = None,
        checkpoint_every: float | None = 600.0,
        replicas: bool = True,
        seed: int = 0,
        orphan: str = "run",
        name: str = "",
        options: Mapping[str, Any] | None = None,
    ) -> Job:
        """Start a script as a job and return at once.

        ``on`` is ``auto`` or a device address; ``prefer`` names vendors or drivers in order;
        ``backup`` are addresses to go on at after a loss, ``standby`` keeps a warm copy at one.
        ``memory`` is in bytes, ``checkpoint_every`` in seconds. Raises BadInput before anything is
        started.
        """
        path = Path(script).resolve()
        if not path.is_file():
            raise BadInput(f"there is no script {str(script)!r}")
        _check_options(on, backup, standby, memory, replicate_every, checkpoint_every, seed, orphan)
        python = interpreter(environment)
        try:
            check_environment(python)
        except JobError as error:
            raise BadInput(str(error)) from error
        if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
            raise BadInput(
                "this script is started with several ranks (WORLD_SIZE > 1), which Drivetrain "
                "cannot move yet; start it as one process"
            )
        if name:
            jobs.check_name(name)
        spec: dict[str, Any] = {
            "name": name,
            "script": str(path),
            "args": [str(arg) for arg in args],
            "cwd": os.getcwd(),
            "umask": _umask(),
            "python": python,
            "on": on,
            "prefer": list(prefer),
            "backup": list(backup),
            "standby": standby or "",
            "strict": strict,
            "memory": memory,
            "replicate_every": replicate_every,
            "checkpoint_every": checkpoint_every,
            "replicas": replicas,
            "seed": seed,
            "hash_seed": seed,
            "orphan": orphan,
            "uid": os.getuid(),
            "options": dict(options or {}),
        }
        try:
            placed = Placer(self.database, spec).choose()
        except PlacementError as error:
            raise BadInput(str(error)) from error
        job_id = jobs.new_id(str(path))
        directory = jobs.new_directory(job_id)
        try:
            journal = Journal.create(directory / "journal")
            journal.append("submitted", spec, epoch=0)
        except StoreError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        crash_point("runtime.submitted")
        return self._host(job_id, directory, journal, resume=False, placed=placed)

    def resume(self, name: str, *, on: str = "") -> Job:
        """Take over a job whose runtime is gone, or restart a released one from disk."""
        record = jobs.find(name)
        if record.damage:
            raise BadInput(f"job {record.id} cannot be resumed: {record.damage}")
        if record.view.ended:
            raise BadInput(f"job {record.id} has ended ({record.view.state}); start it anew")
        if on and on != "auto":
            hal.device(on)
        _check_resumable(record)
        journal = Journal.open(record.directory / "journal")
        return self._host(record.id, record.directory, journal, resume=True, on=on)

    def _host(
        self,
        job_id: str,
        directory: Path,
        journal: Journal,
        *,
        resume: bool,
        on: str = "",
        placed: tuple[dict[str, Any], Device] | None = None,
    ) -> Job:
        from drivetrain.runtime.view import JobView

        records = journal.records()
        view = JobView.of(records)
        if view.runtime is not None and view.runtime.alive and view.runtime != self.process:
            raise BadInput(
                f"job {job_id} is hosted by the runtime {view.runtime.pid}, which is alive"
            )
        try:
            journal.append(
                "runtime",
                {"process": self.process.to_json(), "socket": self._socket},
                epoch=view.epoch,
                expect_seq=journal.tail_seq,
            )
        except JournalConflict as error:
            raise BadInput(f"job {job_id} was just taken by another runtime") from error
        crash_point("runtime.hosting")
        box: list[Job] = []

        def tell(event: dict[str, Any]) -> None:
            box[0]._take_event(event)

        hosted = HostedJob(job_id, directory, journal, self.database, tell=tell, placed=placed)
        supervisor = Supervisor(hosted, resume=resume, on=on)
        job = Job(self, supervisor)
        box.append(job)
        with self._lock:
            self._jobs[job_id] = job
        supervisor.start()
        return job

    def jobs(self) -> list[dict[str, Any]]:
        """Every job in the state folder, as ``drivetrain jobs --json`` lists them."""
        return [record.summary() for record in jobs.all_jobs()]

    def close(self, *, stop_jobs: bool = True) -> None:
        """Stop what still runs here and remove the socket."""
        if self._closed:
            return
        if stop_jobs:
            for job in list(self._jobs.values()):
                if not job._supervisor.ended.is_set():
                    with contextlib.suppress(DrivetrainError):
                        job.stop(reason="the runtime closes")
        self._closed = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(5.0)
        self._listener.close()
        for client in self._clients:
            client.close()

    # -- the socket -------------------------------------------------------------------------

    def _serve(self) -> None:
        while not self._closed:
            sources: list[Any] = [self._listener, self._wake, *self._clients]
            try:
                ready = select.select(sources, [], [], 5.0)[0]
            except (OSError, ValueError):
                self._clients = [c for c in self._clients if not c.closed]
                continue
            if self._listener in ready:
                channel = self._listener.accept()
                if channel is not None:
                    if len(self._clients) >= _CLIENT_LIMIT:
                        channel.close()
                    else:
                        self._clients.append(channel)
            for client in [c for c in self._clients if c in ready]:
                try:
                    for message in client.receive():
                        message.close_fds()
                        self._answer(client, message)
                except (ChannelClosed, ProtocolError) as error:
                    if isinstance(error, ProtocolError):
                        with contextlib.suppress(ChannelClosed):
                            client.send("error", error=str(error), kind="protocol")
                    client.close()
                    self._clients.remove(client)

    def _answer(self, client: Channel, message: Message) -> None:
        """Serve one request of a client; long ones answer from a thread of their own."""
        number = message.body.get("id", 0)
        job = self._jobs.get(str(message.body.get("job")))

        def refuse(error: BaseException) -> None:
            asked_wrong = isinstance(error, (BadInput, DiskFull))
            asked_wrong = asked_wrong or isinstance(error.__cause__, DiskFull)
            kind = "input" if asked_wrong else "failed"
            with contextlib.suppress(ChannelClosed):
                client.send("error", re=number, error=str(error), kind=kind)

        if message.op == "ping":
            with contextlib.suppress(ChannelClosed):
                client.send("pong", re=number, jobs=sorted(self._jobs))
            return
        if message.op not in ("migrate", "pause", "resume", "stop", "checkpoint"):
            refuse(BadInput(f"there is no request {message.op!r}"))
            return
        if job is None:
            refuse(BadInput("this runtime does not host that job"))
            return
        try:
            body = _checked_body(message)
        except BadInput as error:
            refuse(error)
            return
        command = Command(message.op, body)

        def phase(name: str, facts: dict[str, Any]) -> None:
            with contextlib.suppress(ChannelClosed):
                client.send("phase", phase=name, facts=facts)

        command.on_phase = phase

        def finished(future: Future[dict[str, Any]]) -> None:
            error = future.exception()
            if error is not None:
                refuse(error)
                return
            with contextlib.suppress(ChannelClosed):
                client.send("done", re=number, result=future.result())

        command.future.add_done_callback(finished)
        job._supervisor.submit(command)


def _check_resumable(record: jobs.JobRecord) -> None:
    """Refuse, before anything is changed, a job whose saved state is damaged."""
    view = record.view
    if view.worker is not None and view.worker.alive:
        return  # it is adopted
    if view.standby and ProcessId.from_json(view.standby["process"]).alive:
        return  # its replica is used
    path = str((view.released or {}).get("path") or "")
    if path:
        try:
            verify(Path(path))
        except DrivetrainError as error:
            raise BadInput(f"job {record.id} cannot be resumed: {error}") from error
        return
    found = newest_valid(record.directory / "checkpoints")
    if found.path is None and found.skipped:
        reasons = "; ".join(reason for _, reason in found.skipped)
        raise BadInput(
            f"job {record.id} cannot be resumed: no checkpoint of it is whole ({reasons}). To "
            "begin again from step 0, start the script anew"
        )


_FIELDS: dict[str, tuple[type, ...]] = {
    "to": (str,),
    "strategy": (str,),
    "max_downtime": (int, float, type(None)),
    "warm": (str,),
    "reason": (str,),
    "on": (str,),
    "release": (bool,),
    "to_disk": (bool,),
    "limit_s": (int, float),
    "grace_s": (int, float),
    "interrupt": (bool,),
    "uid": (int,),
}


def _checked_body(message: Message) -> dict[str, Any]:
    body = {}
    for key, value in message.body.items():
        if key in ("id", "op", "job"):
            continue
        if key not in _FIELDS or not isinstance(value, _FIELDS[key]):
            raise BadInput(f"the request's field {key!r} is unknown or of the wrong type")
        if isinstance(value, float) and not 0 <= value < _LONGEST_S:
            raise BadInput(f"the request's field {key!r} is no duration: {value}")
        body[key] = value
    if message.op == "migrate":
        check_strategy(str(body.get("strategy") or "immediate"))
        hal.device(str(body.get("to") or "?"))
    return body


def _umask() -> int:
    """This process's umask, read without changing it for a moment."""
    for line in (
        Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    ):
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o077


def _check_options(
    on: str,
    backup: Sequence[str],
    standby: str | None,
    memory: int | None,
    replicate_every: int | None,
    checkpoint_every: float | None,
    seed: int,
    orphan: str,
) -> None:
    for address in [on, *backup, *([standby] if standby else [])]:
        if address != "auto":
            hal.device(address)
    if memory is not None and memory < 0:
        raise BadInput(f"--memory must not be negative: {memory}")
    if replicate_every is not None and replicate_every < 1:
        raise BadInput(f"--replicate-every must be at least 1: {replicate_every}")
    if checkpoint_every is not None and checkpoint_every <= 0:
        raise BadInput(f"--checkpoint-every must be more than 0 seconds: {checkpoint_every}")
    if not 0 <= seed < 2**63:
        raise BadInput(f"--seed must lie in [0, 2^63): {seed}")
    if orphan not in ("run", "exit"):
        raise BadInput(f"--orphan is run or exit, not {orphan!r}")

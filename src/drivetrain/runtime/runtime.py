"""``Runtime``: hosts jobs in this process, and answers the command line on a private socket."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drivetrain import hal
from drivetrain.errors import (
    BadInput,
    DrivetrainError,
    JobError,
    PlacementError,
    StoreError,
)
from drivetrain.hal.device import Device
from drivetrain.migration.checkpoint import newest_valid
from drivetrain.migration.loaded import verify
from drivetrain.runtime import jobs
from drivetrain.runtime.door import Door
from drivetrain.runtime.environments import interpreter
from drivetrain.runtime.hosted import HostedJob
from drivetrain.runtime.job import Job
from drivetrain.runtime.placing import Placer
from drivetrain.runtime.process import check_environment
from drivetrain.runtime.supervisor import Supervisor
from drivetrain.runtime.view import JobView
from drivetrain.store.crash import crash_point
from drivetrain.store.database import Database
from drivetrain.store.home import home, socket_path
from drivetrain.store.journal import Journal, JournalConflict
from drivetrain.store.process import ProcessId


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
        self._closed = False
        jobs.remove_unborn()
        self._door = Door(socket_path(f"r-{self.process.pid}-{secrets.token_hex(4)}"), self._jobs)

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
        records = journal.records()
        view = JobView.of(records)
        if view.runtime is not None and view.runtime.alive and view.runtime != self.process:
            raise BadInput(
                f"job {job_id} is hosted by the runtime {view.runtime.pid}, which is alive"
            )
        try:
            journal.append(
                "runtime",
                {"process": self.process.to_json(), "socket": self._door.path},
                epoch=view.epoch,
                expect_seq=journal.tail_seq,
            )
        except JournalConflict as error:
            raise BadInput(f"job {job_id} was just taken by another runtime") from error
        crash_point("runtime.hosting")
        box: list[Job] = []

        def tell(event: dict[str, Any]) -> None:
            box[0].take_event(event)

        hosted = HostedJob(job_id, directory, journal, self.database, tell=tell, placed=placed)
        supervisor = Supervisor(hosted, resume=resume, on=on)
        job = Job(supervisor)
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
                if not job.ended:
                    with contextlib.suppress(DrivetrainError):
                        job.stop(reason="the runtime closes")
        self._closed = True
        self._door.close()


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

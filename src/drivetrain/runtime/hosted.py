"""A job as the runtime that hosts it has it in hand: its journal, its workers, its replica.

One thread uses it (``supervisor``), and what that thread does is in the modules beside this one:
``watching``, ``starting``, ``commands``, ``moving``, ``losing``, ``restoring``, ``takeover``,
``ending``. Their functions take a ``HostedJob`` first.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from drivetrain.errors import BadInput, MigrationError
from drivetrain.hal.device import Device
from drivetrain.runtime.losses import Losses
from drivetrain.runtime.placing import Placer
from drivetrain.runtime.process import Worker
from drivetrain.runtime.status import StatusPage
from drivetrain.runtime.view import JobView
from drivetrain.store.crash import crash_point
from drivetrain.store.database import Database
from drivetrain.store.journal import Journal


class HostedJob:
    """One job in this runtime; ``view`` mirrors the journal, ``page`` the worker's progress."""

    def __init__(
        self,
        job_id: str,
        directory: Path,
        journal: Journal,
        database: Database,
        *,
        tell: Callable[[dict[str, Any]], None],
        placed: tuple[dict[str, Any], Device] | None = None,
    ) -> None:
        self.job_id = job_id
        self.directory = directory
        self.journal = journal
        self.database = database
        self.view = JobView.of(journal.records())
        self.page = StatusPage.create(directory / "status")
        self.notices: deque[str] = deque(maxlen=200)
        self.options: dict[str, Any] = self.view.spec.get("options") or {}
        self.placer = Placer(database, self.view.spec)
        self.placed = placed  # chosen at the submission
        self.device: Device | None = None
        self.workers: list[Worker] = []
        self.owner: Worker | None = None
        self.standby: Worker | None = None
        self.standby_losses = 0
        self.replica_fds: list[int] = []
        self.lost_devices: set[str] = set()
        self.losses = Losses()
        self.baseline = self.view.seq  # records after this one may show that others acted
        self.wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.stop_asked = False
        self.interruptible = False  # a stop may end what is under way
        self.left = False  # the job goes on without this runtime
        self._appends: deque[float] = deque(maxlen=9)
        self._tell = tell

    # -- the journal ----------------------------------------------------------------------

    def record(self, kind: str, data: dict[str, Any], *, epoch: int | None = None) -> None:
        """One more record; the runtime's own copy of the view follows."""
        began = time.monotonic()
        self.journal.append(kind, data, epoch=self.view.epoch if epoch is None else epoch)
        self._appends.append(time.monotonic() - began)
        self.catch_up()

    @property
    def append_s(self) -> float:
        """What one durable record takes, in seconds: the median of the latest."""
        return statistics.median(self._appends) if self._appends else 0.0

    def catch_up(self) -> None:
        """Read what the journal says now; workers write to it too."""
        for record in self.journal.records()[self.view.seq :]:
            self.view.take(record)

    def write_state(self, state: str, **facts: Any) -> None:
        """Record a state of the job, and tell."""
        self.record("state", {"state": state, **facts})
        self.event("state", state=state, **facts)

    def commit(self, worker: Worker, reason: str, step: int) -> int:
        """Make ``worker`` the owner: the one durable record that decides. Its epoch."""
        self.catch_up()
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
        self.baseline = record.seq
        crash_point("commit.after")
        self.catch_up()
        self.page.epoch = epoch
        crash_point("commit.fenced")
        return epoch

    def _check_nobody_else_acted(self) -> None:
        """Refuse to commit when ownership changed, or was claimed back, behind this runtime."""
        for record in self.journal.records()[self.baseline :]:
            claimed = record.kind == "state" and record.data.get("by") == "worker"
            if claimed or record.kind in ("commit", "exit", "released", "runtime"):
                raise MigrationError(
                    f"the job was taken on by another process meanwhile (record {record.seq}, "
                    f"{record.kind})"
                )

    def request(self, command: str, body: dict[str, Any]) -> None:
        """Record who asked for what, and why."""
        self.record(
            "request",
            {
                "command": command,
                "uid": int(body.get("uid", os.getuid())),
                "reason": str(body.get("reason", ""))[:500],
                "to": body.get("to", ""),
            },
        )

    # -- workers ----------------------------------------------------------------------------

    def owning(self, op: str) -> Worker:
        """The worker that owns the job; BadInput when nothing runs."""
        if self.owner is None:
            raise BadInput(
                f"job {self.job_id} is {self.view.state}: nothing runs to {op}; resume it"
            )
        return self.owner

    def keep_replica(self, fds: Sequence[int]) -> None:
        """Hold the replica's memory here too, and in the standby."""
        self.drop_replica()
        self.replica_fds = list(fds)
        if self.standby is not None and not self.standby.gone:
            with contextlib.suppress(MigrationError):
                self.standby.send("replica", fds=self.replica_fds)

    def drop_replica(self) -> None:
        for fd in self.replica_fds:
            os.close(fd)
        self.replica_fds = []

    # -- telling ----------------------------------------------------------------------------

    def notice(self, text: str) -> None:
        """A line for the person."""
        self.notices.append(text)
        self.event("notice", text=text)

    def event(self, kind: str, **facts: Any) -> None:
        """One more line of the job's event log, told to who follows it."""
        event = {"event": kind, "job": self.job_id, "at": time.time(), **facts}
        with contextlib.suppress(OSError):
            path = self.directory / "logs" / "events.jsonl"
            fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(fd, (json.dumps(event, default=str) + "\n").encode())
            finally:
                os.close(fd)
        self._tell(event)

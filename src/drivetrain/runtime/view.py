"""What a job's journal says: the one reading of its records that every process shares."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from drivetrain.store.journal import Record
from drivetrain.store.process import ProcessId

ENDED = ("done", "failed", "stopped")
STATES = ("starting", "running", "paused", "moving", "recovering", *ENDED, "lost")


@dataclass
class JobView:
    """A job as of the last record read.

    ``worker`` is the process named by the newest COMMIT record: the only owner. ``epoch`` is that
    record's. ``state`` is the last one recorded; ``present_state()`` also looks who is alive.
    """

    spec: dict[str, Any] = field(default_factory=dict)
    epoch: int = 0
    seq: int = 0
    worker: ProcessId | None = None
    worker_key: str = ""
    device: str = ""
    runtime: ProcessId | None = None
    state: str = "starting"
    started: float = 0.0
    placement: dict[str, Any] | None = None
    moves: list[dict[str, Any]] = field(default_factory=list)
    failovers: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    standby: dict[str, Any] | None = None
    released: dict[str, Any] | None = None
    once: dict[str, Any] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)
    exit: dict[str, Any] | None = None

    @classmethod
    def of(cls, records: Iterable[Record]) -> JobView:
        view = cls()
        for record in records:
            view.take(record)
        return view

    def take(self, record: Record) -> None:
        """Fold one more record in."""
        data = record.data
        self.seq = record.seq
        kind = record.kind
        if self.exit is not None and kind in ("commit", "state", "released"):
            return  # an end is final: what was on its way when it came does not count
        if kind == "submitted":
            self.spec = data
            self.started = record.at
        elif kind == "commit":
            self.epoch = record.epoch
            self.worker = ProcessId.from_json(data["worker"])
            self.worker_key = data["key"]
            self.device = data["device"]
            self.released = None
            self.state = "running" if data["reason"] != "start" else "starting"
        elif kind == "runtime":
            self.runtime = ProcessId.from_json(data["process"])
        elif kind == "state":
            self.state = data["state"]
        elif kind == "placement":
            self.placement = data
        elif kind == "move":
            self.moves.append(data)
        elif kind == "failover":
            self.failovers.append(data)
        elif kind == "checkpoint":
            self.checkpoints.append(data)
        elif kind == "standby":
            self.standby = data or None
        elif kind == "released":
            self.released = data
            self.worker = None
            self.state = "paused"
        elif kind == "once":
            self.once[data["key"]] = {k: v for k, v in data.items() if k == "value"}
        elif kind == "request":
            self.requests.append(data)
        elif kind == "exit":
            self.exit = data
            self.state = data["state"]
            self.worker = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def present_state(self) -> str:
        """The state now: ended, or what the living processes make of the last record."""
        if self.ended:
            return self.state
        runtime = self.runtime is not None and self.runtime.alive
        worker = self.worker is not None and self.worker.alive
        if worker:
            if runtime:
                return self.state
            return "paused" if self.state == "paused" else "running"
        if runtime:
            if self.state in ("starting", "moving", "recovering") or self.released:
                return self.state
            return "recovering"
        if self.released and self.released.get("path"):
            return "paused"
        return "lost"

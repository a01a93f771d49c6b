"""The runtime's handle on a worker as a migration Endpoint: one frame there, one answer back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from drivetrain.errors import DiskFull, MigrationError
from drivetrain.migration.endpoint import Cut, Passed
from drivetrain.runtime.channel import Message
from drivetrain.runtime.process import Worker, WorkerGone

T = TypeVar("T")
Pump = Callable[[float], None]

_ANSWER_S = 30.0
_BOUNDARY_S = 600.0  # a source answers at its next step boundary, and steps may be long


class Reply(Generic[T]):
    """An answer on its way; ``result`` runs the supervisor's loop until it is there."""

    def __init__(
        self, worker: Worker, number: int, op: str, pump: Pump, convert: Callable[[Message], T]
    ) -> None:
        self._worker = worker
        self._number = number
        self._op = op
        self._pump = pump
        self._convert = convert

    def result(self, limit_s: float) -> T:
        deadline = time.monotonic() + limit_s
        worker = self._worker
        while self._number not in worker.answers:
            if worker.gone or worker.channel is None:
                raise WorkerGone(worker, f"the worker on {worker.address} died during {self._op!r}")
            left = deadline - time.monotonic()
            if left <= 0:
                raise MigrationError(
                    f"the worker on {worker.address} did not answer {self._op!r} within "
                    f"{limit_s:g} s"
                )
            self._pump(min(left, 1.0))
        message = worker.answers.pop(self._number)
        if message.op == "error":
            kind = DiskFull if message.body.get("full") else MigrationError
            raise kind(str(message.body.get("error", "the worker reported an error")))
        return self._convert(message)


class RemoteEndpoint:
    """``migration.endpoint.Endpoint`` over a worker's channel."""

    def __init__(self, worker: Worker, pump: Pump) -> None:
        self.worker = worker
        self.address = worker.address
        self._pump = pump

    def ask(self, op: str, *, fds: Any = (), **body: Any) -> Reply[dict[str, Any]]:
        number = self.worker.send(op, fds=fds, **body)
        return Reply(self.worker, number, op, self._pump, lambda message: message.body)

    def manifest(self) -> Cut:
        return _cut(self.ask("manifest").result(_BOUNDARY_S))

    def prepare(self, segment_fd: int) -> Reply[None]:
        number = self.worker.send("prepare", fds=(segment_fd,))
        return Reply(self.worker, number, "prepare", self._pump, lambda _: None)

    def pause(self) -> Cut:
        return _cut(self.ask("pause", why="move").result(_BOUNDARY_S))

    def read(self, *, host_only: bool = False) -> Reply[Passed]:
        return self._hashes(self.worker.send("send", host_only=host_only), "send")

    def write(self, cut: Cut, *, host_only: bool = False) -> Reply[Passed]:
        number = self.worker.send(
            "receive", facts=cut.facts, nbytes=cut.nbytes, host_only=host_only
        )
        return self._hashes(number, "receive")

    def export(self) -> list[Any]:
        return list(self.ask("export").result(_BOUNDARY_S)["tensors"])

    def hash(self) -> Reply[Passed]:
        return self._hashes(self.worker.send("hash"), "hash")

    def _hashes(self, number: int, op: str) -> Reply[Passed]:
        return Reply(self.worker, number, op, self._pump, _passed)

    def restore(self, cut: Cut, *, rehearse: bool = False) -> float:
        facts = cut.facts if rehearse else b""
        answer = self.ask("restore", tree=cut.tree, facts=facts, rehearse=rehearse)
        return float(answer.result(_ANSWER_S).get("seconds", 0.0))

    def save(self, *, to_disk: bool) -> dict[str, Any]:
        return self.ask("save", to_disk=to_disk).result(_BOUNDARY_S)

    def load(self, path: str) -> str:
        return str(self.ask("restore_checkpoint", path=path).result(_BOUNDARY_S)["hash"])

    def restore_replica(self, fds: Any) -> dict[str, Any]:
        """The target's state from the newest closed replica slot: its step and hash."""
        return self.ask("restore_replica", fds=fds).result(_BOUNDARY_S)

    def ping(self) -> float:
        began = time.monotonic()
        self.ask("ping").result(_ANSWER_S)
        return time.monotonic() - began

    def commit(self, epoch: int) -> None:
        self.ask("commit", epoch=epoch).result(_ANSWER_S)

    def release(self) -> None:
        self.ask("release").result(_ANSWER_S)

    def abort(self) -> None:
        self.ask("abort").result(_ANSWER_S)


def _passed(message: Message) -> Passed:
    body = message.body
    seconds, waited_s = (float(body.get(name, 0.0)) for name in ("seconds", "waited_s"))
    return Passed(list(body["hashes"]), seconds, waited_s)


def _cut(body: dict[str, Any]) -> Cut:
    return Cut(
        step=int(body.get("step", 0)),
        facts=body["facts"],
        tree=body["tree"],
        nbytes=int(body["nbytes"]),
        step_end_ns=int(body.get("step_end_ns", 0)),
        median_ns=int(body.get("median_ns", 0)),
        took_s=float(body.get("took_s", 0.0)),
    )

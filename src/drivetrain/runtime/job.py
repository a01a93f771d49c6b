"""``Job``: a running or ended workload, as the program that hosts it sees it."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from drivetrain import hal
from drivetrain.errors import BadInput
from drivetrain.migration.moves import check_max_downtime, check_strategy
from drivetrain.runtime import jobs
from drivetrain.runtime.commands import Command
from drivetrain.runtime.supervisor import Supervisor


class Job:
    """A running or ended workload. Made by ``Runtime.submit`` and ``Runtime.resume``."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.id = supervisor.hosted.job_id
        self.directory = supervisor.hosted.directory
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
        check_max_downtime(max_downtime)
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
        self.submit(command)
        return command.future.result()

    def submit(self, command: Command) -> None:
        """Queue a command; its future gets the result."""
        self._supervisor.submit(command)

    def take_event(self, event: dict[str, Any]) -> None:
        """One more event (the supervisor's thread calls it)."""
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

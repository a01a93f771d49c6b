"""One thread a job: starts its workers, serves commands, moves it, brings it back after a loss.

Everything about a job happens in this thread, one thing after another, so there is no state to
lock. While it waits for an answer it goes on seeing exits, frames and commands
(``watching.pump``). What it does is in the modules beside this one, named in ``hosted``.
"""

from __future__ import annotations

import os
import queue
import threading
import time

from drivetrain.errors import BadInput, DrivetrainError
from drivetrain.runtime.commands import Command, obey
from drivetrain.runtime.ending import clean_up, give_up
from drivetrain.runtime.hosted import HostedJob
from drivetrain.runtime.losing import owner_gone
from drivetrain.runtime.starting import replace_standby, start_fresh
from drivetrain.runtime.takeover import take_over
from drivetrain.runtime.watching import pump

_LEASES_S = 2.0


class Supervisor(threading.Thread):
    """Runs one job until it ends; the thread alone touches ``hosted``, others read it."""

    def __init__(self, hosted: HostedJob, *, resume: bool = False, on: str = "") -> None:
        super().__init__(name=f"drivetrain-job-{hosted.job_id}", daemon=True)
        self.hosted = hosted
        self.ended = threading.Event()
        self.busy = ""
        self.problem = ""  # why this runtime does not host the job (which is left as it is)
        self._resume = resume
        self._resume_on = on
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._renewed = time.monotonic()

    # -- from other threads -------------------------------------------------------------

    def submit(self, command: Command) -> None:
        """Queue a command; a second move while one runs is refused at once."""
        job = self.hosted
        if self.ended.is_set():
            command.future.set_exception(
                BadInput(f"job {job.job_id} has ended ({job.view.state}): nothing to {command.op}")
            )
            return
        if self.busy and command.op == "migrate":
            command.future.set_exception(
                BadInput(f"job {job.job_id} is busy ({self.busy}): wait until that has ended")
            )
            return
        if command.op == "migrate":
            self.busy = "moving"
        if command.op == "stop":
            job.stop_asked = True
        self._commands.put(command)
        os.eventfd_write(job.wake, 1)

    # -- the thread ---------------------------------------------------------------------

    def run(self) -> None:
        job = self.hosted
        try:
            self._begin()
            while not job.view.ended and not job.left:
                pump(job, 1.0)
                self._look()
                self._keep_leases()
        except DrivetrainError as error:
            give_up(job, str(error))
        except BaseException as error:
            give_up(job, f"internal error: {type(error).__name__}: {error}")
            raise
        finally:
            try:
                clean_up(job)
            finally:
                self._refuse_the_rest()
                self.ended.set()
                job.event("ended", **(job.view.exit or {}))

    def _begin(self) -> None:
        if not self._resume:
            start_fresh(self.hosted)
            return
        try:
            take_over(self.hosted, on=self._resume_on)
        except DrivetrainError as error:
            # It was lost before and is no worse now: leave it to a later attempt.
            self.problem = str(error)
            self.hosted.left = True

    def _look(self) -> None:
        """Handle exits and one command."""
        job = self.hosted
        if job.owner is not None and job.owner.gone:
            owner_gone(job, job.owner)
            return
        if job.standby is not None and job.standby.gone:
            replace_standby(job, job.standby)
            return
        try:
            command = self._commands.get_nowait()
        except queue.Empty:
            return
        self._serve(command)
        os.eventfd_write(job.wake, 1)  # there may be another one

    def _serve(self, command: Command) -> None:
        try:
            result = obey(self.hosted, command)
        except Exception as error:
            self._no_longer_busy(command)
            command.future.set_exception(error)
            if not isinstance(error, DrivetrainError):
                raise
        else:
            self._no_longer_busy(command)
            command.future.set_result(result)

    def _no_longer_busy(self, command: Command) -> None:
        """Before whoever asked is told: the next move may come at once."""
        if command.op == "migrate":
            self.busy = ""

    def _keep_leases(self) -> None:
        """Put leases back that a deleted database has lost."""
        if time.monotonic() - self._renewed < _LEASES_S:
            return
        self._renewed = time.monotonic()
        for worker in self.hosted.workers:
            self.hosted.placer.keep(worker.lease)

    def _refuse_the_rest(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command.future.set_exception(BadInput(f"job {self.hosted.job_id} has ended"))

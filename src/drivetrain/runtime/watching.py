"""Waiting for a job's workers; whatever is awaited, frames, exits and commands are seen."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from drivetrain.errors import MigrationError
from drivetrain.runtime.channel import Message
from drivetrain.runtime.hosted import HostedJob
from drivetrain.runtime.process import Worker, WorkerGone
from drivetrain.runtime.remote import RemoteEndpoint

_TOLD = ("held", "carried", "entropy")  # what workers tell a rehearsal


def pump(job: HostedJob, limit_s: float) -> None:
    """Wait for something to happen and note it: frames, exits, commands."""
    if job.stop_asked and job.interruptible:
        job.interruptible = False
        raise MigrationError("the job is to be stopped")
    poller = select.poll()
    poller.register(job.wake, select.POLLIN)
    by_fd: dict[int, Worker] = {}
    for worker in job.workers:
        if worker.channel is not None:
            poller.register(worker.channel.fileno(), select.POLLIN)
            by_fd[worker.channel.fileno()] = worker
        if not worker.gone:
            poller.register(worker.pidfd, select.POLLIN)
            by_fd[worker.pidfd] = worker
    for fd, _ in poller.poll(max(0, int(limit_s * 1000))):
        if fd == job.wake:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(job.wake)
            continue
        worker = by_fd[fd]
        if fd == worker.pidfd:
            worker.died_ns = time.monotonic_ns()
            worker.receive(partial(_on_event, job))
            worker.gone = True
        else:
            worker.receive(partial(_on_event, job))


def endpoint_of(job: HostedJob, worker: Worker) -> RemoteEndpoint:
    """The worker as one side of a move; its answers are awaited with ``pump``."""
    return RemoteEndpoint(worker, partial(pump, job))


def wait_until(
    job: HostedJob, worker: Worker, true: Callable[[], bool], what: str, limit_s: float
) -> None:
    """Wait until ``true()``; WorkerGone when the worker dies first, MigrationError after
    ``limit_s`` seconds."""
    deadline = time.monotonic() + limit_s
    while not true():
        if worker.gone:
            raise WorkerGone(worker, _why_gone(worker, what))
        left = deadline - time.monotonic()
        if left <= 0:
            raise MigrationError(f"the worker on {worker.address} did not {what} in {limit_s:g} s")
        pump(job, min(left, 1.0))


def _on_event(job: HostedJob, worker: Worker, message: Message) -> None:
    op, body = message.op, message.body
    if op == "hello":
        worker.hello = True
    elif op == "loop":
        worker.in_loop = True
        worker.drift = int(body.get("drift", 0))
    elif op == "ready":
        worker.ready = body.get("timings", {})
        job.event("ready", role=worker.role, device=worker.address)
    elif op == "replica":
        if worker is job.owner or job.owner is None:
            job.keep_replica(message.fds)
            message.fds = []
    elif op == "running":
        _on_running(job, worker, body)
    elif op == "exit":
        worker.ending = body
    elif op == "notice":
        job.notice(str(body.get("text", ""))[:2000])
    elif op == "touched":
        if len(worker.touched) < 200:
            worker.touched.append(body)
        if worker.role != "owner" or job.options.get("watch"):
            told = ("action", "path", "line", "role", "phase")
            job.event("touched", **{k: body.get(k) for k in told})
    elif op == "told" and body.get("kind") in _TOLD:
        facts = {k: v for k, v in body.items() if k not in ("op", "kind")}
        job.event(body["kind"], **facts)
    message.close_fds()


def _on_running(job: HostedJob, worker: Worker, body: dict[str, Any]) -> None:
    if worker is not job.owner:
        return
    worker.in_loop = True
    job.placer.measured(worker, int(body.get("peak", 0)))
    if job.view.state == "starting":
        job.write_state("running")
    job.event("running", step=body.get("step"), device=worker.address)


def _why_gone(worker: Worker, what: str) -> str:
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

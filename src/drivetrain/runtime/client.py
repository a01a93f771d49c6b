"""How a command reaches the runtime that hosts a job."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from drivetrain.errors import BadInput, JobError
from drivetrain.runtime import jobs
from drivetrain.runtime.channel import ChannelClosed, ProtocolError, connect
from drivetrain.store.journal import Journal

_STEPS_S = 3600.0


def request(
    name: str,
    op: str,
    body: dict[str, Any],
    *,
    on_phase: Callable[[str, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Ask the runtime of job ``name`` for ``op``; its result.

    Raises BadInput for what cannot be meant (also when the job has ended or no runtime hosts
    it), JobError when it was tried and failed.
    """
    job = jobs.find(name)
    view = job.view
    if view.ended:
        raise BadInput(f"job {job.id} has ended ({view.state}): nothing to {op}")
    if view.runtime is None or not view.runtime.alive:
        raise BadInput(
            f"the runtime of job {job.id} is gone; take it over with "
            f"`drivetrain run --resume {job.id}`"
        )
    try:
        channel = connect(_socket_of(job))
    except (ChannelClosed, ProtocolError) as error:
        raise JobError(f"the runtime of job {job.id} does not answer: {error}") from error
    try:
        number = channel.new_id()
        channel.send(op, id=number, job=job.id, uid=os.getuid(), **body)
        while True:
            message = channel.wait(_STEPS_S)
            message.close_fds()
            if message.op == "phase" and on_phase is not None:
                on_phase(str(message.body.get("phase")), dict(message.body.get("facts") or {}))
            elif message.op == "done":
                return dict(message.body["result"])
            elif message.op == "error":
                text = str(message.body.get("error"))
                if message.body.get("kind") == "input":
                    raise BadInput(text)
                raise JobError(text)
    except (ChannelClosed, ProtocolError) as error:
        raise JobError(f"the runtime of job {job.id} went away: {error}") from error
    finally:
        channel.close()


def _socket_of(job: jobs.JobRecord) -> str:
    with Journal.open(job.directory / "journal") as journal:
        hosts = [r.data["socket"] for r in journal.records() if r.kind == "runtime"]
    return str(hosts[-1])

"""The runtime's door: a private socket on which the command line asks things of its jobs."""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from drivetrain import hal
from drivetrain.errors import BadInput, DiskFull
from drivetrain.migration.moves import check_max_downtime, check_strategy
from drivetrain.runtime.channel import (
    Channel,
    ChannelClosed,
    Listener,
    Message,
    ProtocolError,
    sweep_sockets,
)
from drivetrain.runtime.commands import Command
from drivetrain.runtime.job import Job

_CLIENT_LIMIT = 64
_LONGEST_S = 1e9


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
    body: dict[str, Any] = {}
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
        check_max_downtime(body.get("max_downtime"))
        hal.device(str(body.get("to") or "?"))
    return body


class Door:
    """Listens at ``path`` in a thread of its own and hands requests to ``hosted`` jobs."""

    def __init__(self, path: str, hosted: Mapping[str, Job]) -> None:
        self.path = path
        self._jobs = hosted
        sweep_sockets(os.path.dirname(path))
        self._listener = Listener(path)
        self._clients: list[Channel] = []
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._serve, name="drivetrain-runtime", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening and remove the socket."""
        self._closed = True
        os.eventfd_write(self._wake, 1)
        self._thread.join(5.0)
        self._listener.close()
        for client in self._clients:
            client.close()

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
                        _answer(client, message, self._jobs)
                except (ChannelClosed, ProtocolError) as error:
                    if isinstance(error, ProtocolError):
                        with contextlib.suppress(ChannelClosed):
                            client.send("error", error=str(error), kind="protocol")
                    client.close()
                    self._clients.remove(client)


def _answer(client: Channel, message: Message, hosted: Mapping[str, Job]) -> None:
    """Serve one request of a client; long ones answer from a thread of their own."""
    number = message.body.get("id", 0)
    job = hosted.get(str(message.body.get("job")))

    def refuse(error: BaseException) -> None:
        asked_wrong = isinstance(error, (BadInput, DiskFull))
        asked_wrong = asked_wrong or isinstance(error.__cause__, DiskFull)
        kind = "input" if asked_wrong else "failed"
        with contextlib.suppress(ChannelClosed):
            client.send("error", re=number, error=str(error), kind=kind)

    if message.op == "ping":
        with contextlib.suppress(ChannelClosed):
            client.send("pong", re=number, jobs=sorted(hosted))
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
    job.submit(command)

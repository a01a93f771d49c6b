"""A mover process for one move between two GPUs that can reach each other's memory."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from drivetrain.errors import MigrationError
from drivetrain.hal.device import Device
from drivetrain.runtime.process import MARK

_START_S = 30.0
_COPY_S = 120.0


def reachable(source: Device, target: Device) -> bool:
    """True when both are GPUs of one driver that offers peer copies, and not the same one."""
    return source.driver == target.driver == "cuda" and source.uuid != target.uuid


class PeerCopier:
    """``migration.endpoint.Peer``: started while the source still runs, closed after the move."""

    def __init__(self, source: Device, target: Device, key: str) -> None:
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": f"{source.uuid},{target.uuid}",
            MARK: key,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "drivetrain.hal.drivers.cuda_ipc"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        self._pending = b""

    def prepare(self, source: Sequence[Any], target: Sequence[Any]) -> None:
        """Open every allocation that the two sides exported."""
        self._ask(
            _START_S,
            op="open",
            handles=sorted({entry[2] for entry in (*source, *target)}),
        )

    def copy(self, source: Sequence[Any], target: Sequence[Any]) -> float:
        """Copy all pieces; the seconds it took. Both lists have the same image offsets."""
        if [e[:2] for e in source] != [e[:2] for e in target]:
            raise MigrationError("the two sides export different tensors")
        self.prepare(source, target)
        pieces = [
            [s[2], s[3], t[2], t[3], s[1]] for s, t in zip(source, target, strict=True) if s[1]
        ]
        return float(self._ask(_COPY_S, op="copy", pieces=pieces)["seconds"])

    def _ask(self, limit_s: float, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write((json.dumps(request) + "\n").encode())
            self._process.stdin.flush()
            deadline = time.monotonic() + limit_s
            while b"\n" not in self._pending:
                left = deadline - time.monotonic()
                ready = left > 0 and select.select([self._process.stdout], [], [], left)[0]
                block = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
                if not block:
                    raise MigrationError("the peer copy's process does not answer")
                self._pending += block
        except OSError as error:
            raise MigrationError(f"the peer copy's process is gone: {error}") from error
        line, self._pending = self._pending.split(b"\n", 1)
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise MigrationError(f"the peer copy failed: {answer['error']}")
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()

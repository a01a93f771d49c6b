"""Driver calls in child processes that run at the same time, each under a time limit.

Whatever a child does (hang, crash, print garbage, leave children of its own behind), the caller has
an answer for each within the limit and half a second.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
_LARGEST_ANSWER = 4 << 20
_LARGEST_COMPLAINT = 4000
_TICK_S = 0.05
_REAP_S = 0.25
_unreaped: list[subprocess.Popen[bytes]] = []  # killed, but stuck in the kernel


@dataclass(frozen=True)
class Request:
    """What to do in a child: arguments of ``drivetrain.hal.child``, and environment over ours."""

    action: str
    driver: str
    facts: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """``kind``: ``ok``, ``missing``, ``failed``, ``died``, ``timeout`` or ``garbage``."""

    kind: str
    value: Any = None
    """What was asked for; of ``missing``, what to install."""
    reason: str = ""
    code: str = ""
    seconds: float = 0.0


def python_path() -> str:
    """``PYTHONPATH`` with which a child finds this drivetrain, installed or not.

    A folder of installed packages is not put there: it would come before the standard library.
    """
    root = "" if Path(_PACKAGE_ROOT).name in ("site-packages", "dist-packages") else _PACKAGE_ROOT
    return os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))


class _Child:
    def __init__(self, request: Request) -> None:
        environment = {**os.environ, **request.environment}
        environment["PYTHONPATH"] = python_path()
        # -P: the current folder may hold a json.py.
        command = [sys.executable, "-P", "-m", "drivetrain.hal.child", request.action]
        command += [request.driver, *([request.facts] if request.facts else [])]
        self.started = time.monotonic()
        self.out, self.err = bytearray(), bytearray()
        self.answer: Answer | None = None
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)

    def read(self, stream: Any) -> bool:
        """Takes what is there; whether the stream goes on."""
        try:
            data = os.read(stream.fileno(), 1 << 16)
        except BlockingIOError:
            return True
        if self.answer is not None:
            return bool(data)
        if stream is self.process.stderr:
            self.err = (self.err + data)[-_LARGEST_COMPLAINT:]
        else:
            self.out += data
            if b"\n" in self.out or len(self.out) > _LARGEST_ANSWER:
                self.settle()
        return bool(data)

    def settle(self, timed_out_after_s: float | None = None) -> None:
        """Decides the answer from what was said so far."""
        seconds = time.monotonic() - self.started
        line, newline, _ = bytes(self.out).partition(b"\n")
        if newline:
            self.answer = _parsed(line, seconds)
        elif len(self.out) > _LARGEST_ANSWER:
            self.answer = Answer("garbage", None, "it answered without end", "garbage", seconds)
        elif timed_out_after_s is not None:
            reason = f"it did not answer within {timed_out_after_s:g} s"
            self.answer = Answer("timeout", None, reason, "timeout", seconds)
        else:
            status = self.exited()
            signalled = status is not None and status.si_code != os.CLD_EXITED
            code = 0 if status is None else status.si_status
            how = _signal_name(code) if signalled else f"exit code {code}"
            said = self.err.decode(errors="replace").strip().splitlines()
            reason = f"its process ended without an answer ({how})"
            if said:
                reason += f": {said[-1][:300]}"
            self.answer = Answer("died", None, reason, "died", seconds)

    def exited(self) -> Any:
        """How the process ended, ``None`` while it lives. It stays unreaped, so that its number
        still means it and its group when they are killed."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def kill(self) -> None:
        """Ends the whole session: a library may have started processes of its own."""
        if self.process.returncode is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                self.process.kill()

    def close(self) -> None:
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _parsed(line: bytes, seconds: float) -> Answer:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if isinstance(found, dict) and "ok" in found:
        return Answer("ok", found["ok"], "", "", seconds)
    if isinstance(found, dict):
        for kind in ("missing", "failed"):
            if isinstance(found.get(kind), str):
                install = str(found.get("install", "")) if kind == "missing" else None
                return Answer(kind, install, found[kind], str(found.get("code", "")), seconds)
    return Answer("garbage", None, "it answered with something unreadable", "garbage", seconds)


def run(requests: Mapping[str, Request], limit_s: float) -> dict[str, Answer]:
    """Runs all requests at the same time. Never raises for what a child does."""
    _unreaped[:] = [process for process in _unreaped if process.poll() is None]
    answers: dict[str, Answer] = {}
    children: dict[str, _Child] = {}
    for key, request in requests.items():
        try:
            children[key] = _Child(request)
        except OSError as error:
            answers[key] = Answer("failed", None, f"no process could be started: {error}", "child")
    deadline = time.monotonic() + limit_s
    try:
        _collect(list(children.values()), deadline, limit_s)
    finally:
        for child in children.values():
            child.kill()
        patience = time.monotonic() + _REAP_S
        for child in children.values():
            try:
                child.process.wait(max(0.0, patience - time.monotonic()))
            except subprocess.TimeoutExpired:
                _unreaped.append(child.process)
            child.close()
    for key, child in children.items():
        assert child.answer is not None
        answers[key] = child.answer
    return answers


def _collect(children: list[_Child], deadline: float, limit_s: float) -> None:
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.process.stdout, selectors.EVENT_READ, child)  # type: ignore[arg-type]
            selector.register(child.process.stderr, selectors.EVENT_READ, child)  # type: ignore[arg-type]
        while any(child.answer is None for child in children):
            left = deadline - time.monotonic()
            if left <= 0:
                for child in children:
                    if child.answer is None:
                        child.settle(timed_out_after_s=limit_s)
                return
            # The process is asked for too: a grandchild can hold its pipes open.
            for key, _ in selector.select(min(left, _TICK_S)) if selector.get_map() else ():
                if not key.data.read(key.fileobj):
                    selector.unregister(key.fileobj)
            for child in children:
                if child.answer is None and child.exited() is not None:
                    child.read(child.process.stdout)
                    if child.answer is None:
                        child.settle()
            if not selector.get_map() and any(child.answer is None for child in children):
                time.sleep(min(left, _TICK_S / 10))
            for child in children:
                if child.answer is not None and child.process.stdout in selector.get_map():
                    selector.unregister(child.process.stdout)  # type: ignore[arg-type]
                    if child.process.stderr in selector.get_map():
                        selector.unregister(child.process.stderr)  # type: ignore[arg-type]
                    child.kill()

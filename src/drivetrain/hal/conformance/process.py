"""One child process in which checks run one after another, watched from here."""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from drivetrain.hal.conformance.check import Check
from drivetrain.hal.conformance.report import FAILED, Result
from drivetrain.hal.isolated import python_path

_START_S = 60.0
_CLOSE_S = 10.0
_REAP_S = 2.0
_LARGEST_COMPLAINT = 16_000
_MOST_FRAMES = 4


class Process:
    """A child with a device of its own. It has ended once `ended`."""

    def __init__(self, address: str, environment: Mapping[str, str]) -> None:
        variables = {**os.environ, **environment, "PYTHONPATH": python_path()}
        command = [sys.executable, "-P", "-m", "drivetrain.hal.conformance.child", address]
        self._child = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._said, self._lines = bytearray(), bytearray()
        self._selector = selectors.DefaultSelector()
        assert self._child.stdout is not None
        assert self._child.stderr is not None
        self._selector.register(self._child.stdout, selectors.EVENT_READ)
        self._selector.register(self._child.stderr, selectors.EVENT_READ)
        self._started = False
        self.ended = False
        self.groups: tuple[str, ...] | None = None
        """What the device declares, once it was opened."""
        self.api_version = 0

    def result(self, check: Check) -> Result:
        """Run one check. Whatever it does, there is a result within its limit; the process ends
        with a check that crashed or did not end."""
        began = time.monotonic()
        word, complaint = self._ask(check.name, check.limit_s)
        seconds = round(time.monotonic() - began, 3)
        if word is None:
            self.end()
            return _result(check, FAILED, complaint, seconds)
        self.api_version = word["api_version"]
        if word["groups"] is not None:
            self.groups = tuple(word["groups"])
        return _result(check, word["state"], word["reason"], word["seconds"])

    def close(self) -> str:
        """Let the child close the device and end; what was wrong with that, or ``""``."""
        if self.ended:
            return ""
        word, complaint = self._ask("", _CLOSE_S)
        self.end()
        return "" if word is not None else f"closing the device failed: {complaint}"

    def end(self) -> None:
        """The child, and what it started, is gone when this returns."""
        if self.ended:
            return
        self.ended = True
        try:
            os.killpg(self._child.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        self._child.wait()
        self._selector.close()
        for pipe in (self._child.stdin, self._child.stdout, self._child.stderr):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass  # a name that the child did not read any more

    def _ask(self, name: str, limit_s: float) -> tuple[dict[str, Any] | None, str]:
        """(the child's answer, "") or (None, what happened instead)."""
        assert self._child.stdin is not None
        try:
            if name:
                self._child.stdin.write(name.encode() + b"\n")
                self._child.stdin.flush()
            else:
                self._child.stdin.close()
        except BrokenPipeError:
            pass  # it has ended, which its output says
        if not self._started:  # Python and the driver start first
            word, complaint = self._line(_START_S)
            if word is None:
                return None, complaint
            self._started = True
        else:
            word, complaint = self._line(limit_s)
            if word is None:
                return None, complaint
        if "begin" in word:
            return self._line(limit_s)
        return word, ""

    def _line(self, limit_s: float) -> tuple[dict[str, Any] | None, str]:
        until = time.monotonic() + limit_s
        while b"\n" not in self._lines:
            left = until - time.monotonic()
            if left <= 0:
                return None, self._complaint(f"it did not end within {limit_s:.0f} s")
            for key, _ in self._selector.select(min(left, 1.0)):
                chunk = os.read(key.fd, 1 << 16)
                if key.fileobj is self._child.stderr:
                    self._said = (self._said + chunk)[-_LARGEST_COMPLAINT:]
                elif chunk:
                    self._lines += chunk
                else:
                    return None, self._complaint(self._how())
                if not chunk:
                    self._selector.unregister(key.fileobj)
        line, _, rest = bytes(self._lines).partition(b"\n")
        self._lines = bytearray(rest)
        found: dict[str, Any] = json.loads(line)
        return found, ""

    def _how(self) -> str:
        """How the child ended, whose output has ended."""
        try:
            code = self._child.wait(_REAP_S)
        except subprocess.TimeoutExpired:
            return "its process closed its output"
        if code < 0:
            try:
                return f"its process was ended by {signal.Signals(-code).name}"
            except ValueError:
                return f"its process was ended by signal {-code}"
        return f"its process ended with code {code}"

    def _complaint(self, how: str) -> str:
        assert self._child.stderr is not None
        while self._child.stderr in self._selector.get_map():
            ready = [k for k, _ in self._selector.select(0.05) if k.fileobj is self._child.stderr]
            chunk = os.read(ready[0].fd, 1 << 16) if ready else b""
            if not chunk:
                break
            self._said = (self._said + chunk)[-_LARGEST_COMPLAINT:]
        words = _words(self._said.decode(errors="replace"))
        return f"{how}: {words}" if words else how


_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$')


def _words(said: str) -> str:
    """The last line of what a child said, or where its main thread was, if it told."""
    lines = said.strip().splitlines()
    heads = [at for at, line in enumerate(lines) if line.endswith("(most recent call first):")]
    current = [at for at in heads if lines[at].startswith("Current thread")]
    if heads:
        frames: list[str] = []
        for line in lines[(current or heads)[-1] + 1 :]:
            found = _FRAME.match(line)
            if not found or len(frames) == _MOST_FRAMES:
                break
            frames.append(f"{os.path.basename(found[1])}:{found[2]} in {found[3]}")
        if frames:
            return "at " + ", called from ".join(frames)
    return lines[-1][:300] if lines else ""


def _result(check: Check, state: str, reason: str, seconds: float) -> Result:
    needs = tuple(sorted(check.needs))
    return Result(check.name, state, reason, seconds, check.proves, needs, check.optional)

"""Worker processes as the runtime sees them: started isolated, watched by pidfd, ended with all
that they started."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from drivetrain.errors import JobError, MigrationError
from drivetrain.runtime.channel import (
    Channel,
    ChannelClosed,
    Message,
    ProtocolError,
    connect,
    early_names,
    pair,
)
from drivetrain.store.crash import crash_point
from drivetrain.store.home import socket_path
from drivetrain.store.process import ProcessId

MARK = "DRIVETRAIN_WORKER"


class WorkerGone(MigrationError):
    """The worker that was asked died before it answered."""

    def __init__(self, worker: Worker, text: str) -> None:
        super().__init__(text)
        self.worker = worker


class Worker:
    """One worker process of a job: the owner, a target in the making, or a standby."""

    def __init__(self, key: str, role: str, address: str, process: ProcessId) -> None:
        self.key = key
        self.role = role
        self.address = address
        self.process = process
        self.pidfd = process.pidfd()
        self.channel: Channel | None = None
        self.popen: subprocess.Popen[bytes] | None = None
        self.answers: dict[int, Message] = {}
        self.ending: dict[str, Any] | None = None
        self.gone = False
        self.died_ns = 0
        self.ready: dict[str, Any] | None = None
        self.hello = False
        self.in_loop = False
        self.drift: int | None = None  # see training.batches: samples given but not counted
        self.touched: list[dict[str, Any]] = []
        self.lease: Any = None
        self.host_lease: Any = None
        self.log_prefix = ""

    # -- starting ------------------------------------------------------------------------

    @classmethod
    def spawn(
        cls,
        *,
        role: str,
        address: str,
        python: str,
        environment: Mapping[str, str],
        hash_seed: int,
        logs: Path,
    ) -> Worker:
        """Start the process; it waits for its ``start`` frame before it does anything."""
        key = secrets.token_hex(8)
        channel, theirs = pair()
        env = {
            "THP_MEM_ALLOC_ENABLE": "1",  # torch's large tensors in huge pages: copied faster
            **os.environ,
            **environment,
            "PYTHONHASHSEED": str(hash_seed % 4294967295),
            MARK: key,
            "DRIVETRAIN_ROLE": {"owner": "source"}.get(role, role),
        }
        prefix = "" if role == "owner" else f"{role}-{key}."
        outputs = [
            os.open(logs / f"{prefix}{name}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            for name in ("out", "err")
        ]
        crash_point("runtime.spawn")
        try:
            popen = subprocess.Popen(
                [python, "-P", "-m", "drivetrain.runtime.worker", "--fd", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=outputs[0],
                stderr=outputs[1],
                env=env,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except OSError as error:
            channel.close()
            raise JobError(f"cannot start a worker with {python}: {error}") from error
        finally:
            theirs.close()
            for fd in outputs:
                os.close(fd)
        worker = cls(key, role, address, ProcessId.of(popen.pid))
        worker.log_prefix = prefix
        worker.popen = popen
        worker.channel = channel
        return worker

    @classmethod
    def adopt(cls, key: str, process: ProcessId, runtime: ProcessId) -> tuple[Worker, Message]:
        """Connect to a living worker whose runtime is gone; also its answer (with replica fds)."""
        try:
            channel = connect(socket_path(f"w-{key}"))
        except (ChannelClosed, ProtocolError) as error:
            raise JobError(f"the worker {process.pid} cannot be adopted: {error}") from error
        try:
            answer = channel.call("adopt", runtime=runtime.to_json(), limit_s=10.0)
            if answer.op != "adopted":
                raise JobError(f"the worker refuses: {answer.body.get('reason', answer.op)}")
            worker = cls(key, str(answer.body["role"]), str(answer.body["device"]), process)
        except (ChannelClosed, ProtocolError, ProcessLookupError, KeyError) as error:
            channel.close()
            raise JobError(f"the worker {process.pid} cannot be adopted: {error}") from error
        except JobError:
            channel.close()
            raise
        worker.channel = channel
        worker.hello = worker.in_loop = True
        return worker, answer

    # -- talking -------------------------------------------------------------------------

    def send(self, op: str, *, fds: Sequence[int] = (), **body: Any) -> int:
        """Send a request; its id. WorkerGone when nobody listens any more."""
        if self.channel is None:
            raise WorkerGone(self, f"the worker on {self.address} is gone")
        number = self.channel.new_id()
        try:
            self.channel.send(op, id=number, fds=fds, **body)
        except ChannelClosed:
            raise WorkerGone(self, f"the worker on {self.address} is gone") from None
        return number

    def receive(self, on_event: Callable[[Worker, Message], None]) -> None:
        """Take what has arrived: answers are kept, events handed on."""
        if self.channel is None:
            return
        try:
            messages = self.channel.receive()
        except (ChannelClosed, ProtocolError):
            self.channel.close()
            self.channel = None
            return
        for message in messages:
            if "re" in message.body:
                self.answers[message.body["re"]] = message
            else:
                on_event(self, message)

    # -- ending --------------------------------------------------------------------------

    def reap(self) -> int | None:
        """The exit status of the ended process (negative: the signal).

        None when nobody can know it: an adopted worker is not this process's child.
        """
        return None if self.popen is None else self.popen.wait()

    def kill(self, limit_s: float = 5.0) -> bool:
        """End the process and everything it started; False when it will not die."""
        self.process.kill(signal.SIGKILL)
        deadline = time.monotonic() + limit_s
        while self.process.alive and time.monotonic() < deadline:
            if self.popen is not None:
                self.popen.poll()
            time.sleep(0.005)
        self.sweep()
        if self.process.alive:
            return False
        if self.popen is not None:
            self.popen.wait()
        return True

    def sweep(self) -> None:
        """Kill what the worker started (found by its mark) and remove its socket."""
        kill_marked(self.key)
        path = socket_path(f"w-{self.key}")
        for left in (path, *early_names(path, self.process.pid)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(left)

    def close(self) -> None:
        if self.channel is not None:
            self.channel.close()
            self.channel = None
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


def kill_marked(key: str) -> int:
    """SIGKILL every process of this user that carries a worker's mark; how many there were."""
    needle = f"{MARK}={key}".encode()
    count = 0
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            with open(f"/proc/{entry}/environ", "rb") as file:
                marked = needle in file.read().split(b"\0")
            if marked:
                ProcessId.of(int(entry)).kill(signal.SIGKILL)
                count += 1
        except (OSError, ProcessLookupError):
            continue
    return count


def check_environment(python: str) -> None:
    """Refuse an interpreter whose environment lacks torch or drivetrain, with the install line."""
    if python == sys.executable:
        from importlib.util import find_spec

        missing = [name for name in ("torch",) if find_spec(name) is None]
    else:
        question = (
            "import importlib.util as u;"
            "print(*[n for n in ('drivetrain','torch') if u.find_spec(n) is None])"
        )
        try:
            done = subprocess.run(
                [python, "-c", question], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise JobError(
                f"the environment's interpreter {python} does not run: {error}"
            ) from error
        missing = done.stdout.split()
    if missing:
        line = f"{python} -m pip install " + " ".join(
            "'drivetrain[torch]'" if name == "drivetrain" else name for name in missing
        )
        raise JobError(f"the environment {python} lacks {' and '.join(missing)}; install: {line}")

"""The worker's side of the runtime: requests in, events out, and the fence. Free of torch.

The control thread owns the channel. It answers what needs no state of the script (``ping``,
``adopt``) and queues the rest for the main thread, which looks at ``attention`` between steps.
When the runtime is gone the worker goes on, listening on its own socket until a new runtime
adopts it.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from drivetrain.errors import DiskFull, DrivetrainError, JobError
from drivetrain.migration.checkpoint import tidy
from drivetrain.runtime.channel import (
    Channel,
    ChannelClosed,
    Listener,
    Message,
    ProtocolError,
    sweep_sockets,
)
from drivetrain.runtime.status import EPOCH, StatusPage
from drivetrain.runtime.view import JobView
from drivetrain.store.crash import crash_point
from drivetrain.store.home import socket_path
from drivetrain.store.journal import Journal, JournalConflict
from drivetrain.store.process import ProcessId

_STEP_LOG_LIMIT = 64 << 20
_STEP_LOG_NS = 100_000_000
"""Lines of shorter steps are written together: a system call each is much of the loop's cost."""
_ALONE_S = 3600.0  # how long a waiting copy keeps a replica that nobody else has
_current: Agent | None = None


def current() -> Agent | None:
    """This process's agent, or None when the script runs alone."""
    return _current


class Agent:
    """What a worker knows of its job, and how it talks with its runtime."""

    def __init__(self, start: Mapping[str, Any], channel: Channel) -> None:
        self.job_id: str = start["job"]
        self.directory = Path(start["directory"])
        self.role: str = start["role"]
        self.epoch: int = start["epoch"]
        self.device: str = start["device"]
        self.torch_device: str = start["torch_device"]
        self.custom: str = start.get("custom", "")  # its uuid, where it is registered here
        self.alike: str = start.get("alike", "")
        self.seed: int = start["seed"]
        self.spec: dict[str, Any] = start["spec"]
        self.key: str = start["worker"]
        self.source_pid: int = start.get("source_pid", 0)
        self.options: dict[str, Any] = {
            **(self.spec.get("options") or {}),
            **(start.get("options") or {}),
        }
        self.page = StatusPage.open(self.directory / "status", write=True)
        self.journal = Journal.open(self.directory / "journal")
        self.requests: collections.deque[Message] = collections.deque()
        self.attention = False
        self.replica_fds: list[int] = []
        self.on_orphaned: Callable[[], None] = lambda: None  # called by the control thread
        self.state = "starting"
        self.finished = False
        self.in_loop = False
        self.loop_over = False
        self.ending = False  # told to stop because its runtime died (--orphan exit)
        self._once: dict[str, Any] = dict(start.get("once") or {})
        self._channel: Channel | None = channel
        self._listener = Listener(socket_path(f"w-{self.key}"))
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._arrived = threading.Condition()
        self._step_log = -1
        self._unlogged: list[tuple[int, int, int, Mapping[str, Any]]] = []
        self._step_log_ns = 0
        self._gaps_told = False
        self._orphan_since = 0.0
        self._alone_since = 0.0
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._serve, name="drivetrain-control", daemon=True)

    # -- life ---------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to listen and become ``current()``."""
        global _current
        _current = self
        self._thread.start()

    @property
    def owner(self) -> bool:
        """True while this copy is the one that owns the job."""
        return self.role == "owner" and self.page.words[EPOCH] == self.epoch

    @property
    def phase(self) -> str:
        """Where the script is: ``before``, ``loop`` or ``after``."""
        if self.loop_over:
            return "after"
        return "loop" if self.in_loop else "before"

    @property
    def orphaned(self) -> bool:
        """True while no runtime is connected."""
        return self._channel is None

    def close(self) -> None:
        """Remove the socket (and a dead runtime's); called once when the process ends in order."""
        self._listener.close()
        if self.orphaned:
            tidy(self.directory / "checkpoints")
            with contextlib.suppress(OSError):
                sweep_sockets(os.path.dirname(self._listener.path))

    # -- the control thread -------------------------------------------------------------

    def _serve(self) -> None:
        while not self.finished:
            channel = self._channel
            sources: list[Any] = [self._listener, self._wake]
            if channel is not None:
                sources.append(channel)
            try:
                ready = select.select(sources, [], [], 1.0)[0]
            except (OSError, ValueError):
                continue
            if channel is not None and channel in ready:
                self._read(channel)
            if self._listener in ready:
                self._admit()
            if self._channel is None:
                self._while_orphaned()

    def _read(self, channel: Channel) -> None:
        try:
            for message in channel.receive():
                self._take(channel, message)
        except (ChannelClosed, ProtocolError):
            channel.close()
            if self._channel is channel:
                self._channel = None
                self._orphan_since = time.monotonic()
                self.on_orphaned()
                crash_point("worker.orphaned")
                self._queue(Message("orphaned", {}))

    def _take(self, channel: Channel, message: Message) -> None:
        if message.op == "ping":
            self._answer(channel, message, "pong", now_ns=time.monotonic_ns())
        elif message.op == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        else:
            self._queue(message)

    def _queue(self, message: Message) -> None:
        if self.loop_over and "id" in message.body:
            self.answer(
                message, "error", error="the job's loop has ended; it can no longer do this"
            )
            message.close_fds()
            return
        with self._arrived:
            self.requests.append(message)
            self.attention = True
            self._arrived.notify_all()

    def _admit(self) -> None:
        channel = self._listener.accept()
        if channel is None:
            return
        try:
            message = channel.wait(2.0)
            message.close_fds()
            if message.op != "adopt":
                raise ProtocolError("the first frame is not 'adopt'")
            if self._channel is not None:
                self._answer(channel, message, "refused", reason="this worker has a runtime")
                channel.close()
                return
            self._answer(
                channel,
                message,
                "adopted",
                fds=self.replica_fds,
                role=self.role,
                epoch=self.epoch,
                device=self.device,
                state=self.state,
                worker=self.key,
            )
        except (ChannelClosed, ProtocolError):
            channel.close()
            return
        self._channel = channel
        crash_point("worker.adopted")
        self._queue(Message("adopted", {}))

    def _while_orphaned(self) -> None:
        waited = time.monotonic() - self._orphan_since
        if self.role == "owner":
            if self.spec.get("orphan") == "exit" and waited > 1.0 and not self.ending:
                self.ending = True
                self._queue(Message("stop", {}))
        elif self._orphan_limit_reached(waited):
            self._listener.close()
            os._exit(0)

    def _orphan_limit_reached(self, waited: float) -> bool:
        """A copy that does not own the job waits only while it could still be needed."""
        if waited < 1.0:
            return False
        try:
            view = JobView.of(self.journal.records())
        except DrivetrainError:
            return True
        if view.ended:
            return True
        if view.worker == ProcessId.of():
            return False  # it was given the job just before: the main thread is about to see that
        if self.spec.get("orphan") == "exit":
            return True
        if view.worker is not None and view.worker.alive:
            self._alone_since = time.monotonic()
            return waited > 2.0 and self.role != "standby"
        return time.monotonic() - max(self._alone_since, self._orphan_since) > _ALONE_S

    # -- talking ------------------------------------------------------------------------

    def _answer(
        self, channel: Channel, message: Message, op: str, *, fds: Any = (), **body: Any
    ) -> None:
        try:
            channel.send(op, re=message.body.get("id", 0), fds=fds, **body)
        except ChannelClosed:
            pass

    def answer(self, message: Message, op: str = "ok", *, fds: Any = (), **body: Any) -> None:
        """Answer a request; silent when the runtime is gone."""
        channel = self._channel
        if channel is not None and "id" in message.body:
            self._answer(channel, message, op, fds=fds, **body)

    def answer_error(self, message: Message, error: Exception) -> None:
        """Answer that a request failed; ``full`` says that a disk was."""
        self.answer(
            message,
            "error",
            error=f"{type(error).__name__}: {error}",
            full=isinstance(error, DiskFull),
        )

    def event(self, op: str, *, fds: Any = (), **body: Any) -> None:
        """Tell the runtime something; silent when it is gone, and in children of the worker."""
        channel = self._channel
        if channel is not None and os.getpid() == self._pid:
            try:
                channel.send(op, fds=fds, **body)
            except ChannelClosed:
                pass

    def notice(self, text: str) -> None:
        """A line for the person: through the runtime, else on stderr."""
        if self._channel is not None:
            self.event("notice", text=text)
        else:
            print(f"drivetrain: {text}", file=sys.stderr, flush=True)

    def next_request(self, limit_s: float | None = 0.0) -> Message | None:
        """The oldest queued request; waits up to ``limit_s`` seconds (None: for ever)."""
        deadline = None if limit_s is None else time.monotonic() + limit_s
        with self._arrived:
            while not self.requests:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._arrived.wait(0.5 if left is None else min(left, 0.5))
            message = self.requests.popleft()
            self.attention = bool(self.requests)
            return message

    def end_loop(self) -> None:
        """From here on the script is past its loop: requests are refused at once."""
        with self._arrived:
            self.loop_over = True
            waiting = list(self.requests)
            self.requests.clear()
        for message in waiting:
            self._queue(message)

    def requeue(self, message: Message) -> None:
        """Put a request back to be taken at the next step boundary."""
        with self._arrived:
            self.requests.appendleft(message)
            self.attention = True

    # -- ownership ----------------------------------------------------------------------

    def fenced(self) -> bool:
        """True when another copy owns the job: nothing more may be done for it here."""
        return self.page.words[EPOCH] != self.epoch

    def epoch_in_journal(self) -> int:
        """Ask the authority: the epoch of the newest COMMIT if it names this process, else 0."""
        view = JobView.of(self.journal.records())
        return view.epoch if view.worker == ProcessId.of() and not view.ended else 0

    def reclaim(self) -> bool:
        """After a runtime vanished in mid-move: go on as owner if no other copy was committed.

        Appends a record on top of the journal's end, so that a late COMMIT by the old runtime
        (which expects the end it knew) fails. Returns False when the job went elsewhere.
        """
        while True:
            view = JobView.of(self.journal.records())
            if view.ended:
                return False
            here = view.worker == ProcessId.of()
            if not here and view.worker is not None and view.worker.alive:
                return False
            epoch = self.epoch if here else view.epoch + 1
            crash_point("worker.reclaim")
            try:
                if here:
                    data: dict[str, Any] = {"state": "running", "by": "worker"}
                    self.journal.append(
                        "state", data, epoch=epoch, expect_seq=self.journal.tail_seq
                    )
                else:
                    self.journal.append(
                        "commit",
                        {
                            "worker": ProcessId.of().to_json(),
                            "key": self.key,
                            "device": self.device,
                            "reason": "reclaim",
                            "step": self.page.step,
                        },
                        epoch=epoch,
                        expect_seq=self.journal.tail_seq,
                    )
            except JournalConflict:
                continue
            self.epoch = epoch
            self.page.epoch = epoch
            return True

    def become_owner(self, epoch: int) -> None:
        """The journal says that this copy owns the job from here on."""
        self.role = "owner"
        self.epoch = epoch
        self.page.epoch = epoch
        os.environ["DRIVETRAIN_ROLE"] = "source"
        crash_point("worker.owner")
        sys.stdout.flush()
        sys.stderr.flush()
        for number, name in ((1, "out"), (2, "err")):
            fd = os.open(
                self.directory / "logs" / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600
            )
            os.dup2(fd, number)
            os.close(fd)

    def record_end(self, ending: Mapping[str, Any]) -> None:
        """Journal how the script ended, if this copy owns the job.

        The worker does it, not its runtime: an end that nobody heard of would be trained again.
        """
        state = "done" if ending["code"] == 0 else "failed"
        if self.ending:
            state = "stopped"
        data = {
            "state": state,
            "code": ending["code"],
            "reason": ending.get("error", ""),
            "step": self.page.step,
        }
        while True:
            view = JobView.of(self.journal.records())
            if view.ended or view.worker != ProcessId.of():
                return
            crash_point("worker.end")
            try:
                self.journal.append("exit", data, epoch=view.epoch, expect_seq=view.seq)
            except JournalConflict:
                continue
            crash_point("worker.ended")
            return

    # -- what the script does once --------------------------------------------------------

    def once(self, key: str, call: Callable[[], Any]) -> Any:
        """``call()`` at most once per job; its JSON result is kept in the journal."""
        if key in self._once:
            entry = self._once[key]
            if "value" not in entry:
                self.notice(
                    f"run.once({key}) was interrupted in an earlier copy: it is not repeated"
                )
            return entry.get("value")
        if not self.owner:
            return None
        self.journal.append("once", {"key": key}, epoch=self.epoch)
        value = call()
        try:
            text = json.dumps(value)
        except (TypeError, ValueError) as error:
            raise JobError(
                f"run.once({key}) returned {type(value).__name__}, which is not JSON ({error}); "
                "return names and numbers, not objects"
            ) from None
        self.journal.append("once", {"key": key, "value": json.loads(text)}, epoch=self.epoch)
        self._once[key] = {"value": json.loads(text)}
        return value

    # -- the step log -----------------------------------------------------------------------

    def log_step(self, step: int, end_ns: int, duration_ns: int, logged: Mapping[str, Any]) -> None:
        """Append one line to the job's step log (JSON; rotated at 64 MiB, one old file kept): at
        once, or together with those of the next 100 ms. `flush_steps` before what must not be ahead
        of it.

        A full disk stops no training: it is said once, and lines are missing.
        """
        # Runs every step, with the step's own memory in the caches: so lines are made together.
        self._unlogged.append((step, end_ns, duration_ns, logged))
        if end_ns - self._step_log_ns >= _STEP_LOG_NS or step % 4096 == 0:
            self._step_log_ns = end_ns
            self.flush_steps()
        if step % 4096 or self._step_log < 0:
            return
        if os.fstat(self._step_log).st_size > _STEP_LOG_LIMIT:
            path = self.directory / "logs" / "steps.jsonl"
            os.replace(path, path.with_suffix(".jsonl.1"))
            os.close(self._step_log)
            self._step_log = -1

    def flush_steps(self) -> None:
        """Write what is left of the step log. Lines of a copy that lost the job are not."""
        unlogged, self._unlogged = self._unlogged, []
        if not unlogged or self.fenced() or os.getpid() != self._pid:
            return
        if self._step_log < 0:
            path = self.directory / "logs" / "steps.jsonl"
            self._step_log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        data = "".join(self._step_line(*each) for each in unlogged).encode()
        try:
            if os.write(self._step_log, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._gaps_told:
                self._gaps_told = True
                step = unlogged[0][0]
                self.notice(f"the step log has gaps from step {step} on: {error.strerror}")

    def _step_line(
        self, step: int, end_ns: int, duration_ns: int, logged: Mapping[str, Any]
    ) -> str:
        # Formatted by hand: json takes several times as long.
        more = f',"logged":{json.dumps(logged)}' if logged else ""
        return (
            f'{{"step":{step},"copy":{self.epoch},"end_ns":{end_ns},'
            f'"ms":{duration_ns / 1e6:.3f}{more}}}\n'
        )

"""Control frames over a private Unix socket.

A frame is a 4-byte big-endian length and a msgpack map. Every map has ``v`` (int, the protocol's
version) and ``op`` (str); a request has ``id`` (int) and its answer repeats it as ``re``. File
descriptors travel beside a frame, and the frame says how many (``fds``). Tensors never go through
here. The format is in docs/protocol.md.
"""

from __future__ import annotations

import array
import contextlib
import errno
import glob
import itertools
import os
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgpack

from drivetrain.errors import DrivetrainError
from drivetrain.store.crash import crash_point

VERSION = 1
MAX_FRAME = 16 << 20
MAX_FDS = 16
_MAX_QUEUED_FDS = 64
_LENGTH = struct.Struct(">I")


class ProtocolError(DrivetrainError):
    """The other side sent something that is no frame of this protocol; the channel is closed."""


class ChannelClosed(DrivetrainError):
    """The other side is gone."""


def encode(message: dict[str, Any]) -> bytes:
    """The frame for a message; more than ``MAX_FRAME`` bytes is a ProtocolError."""
    body: bytes = msgpack.packb(message, use_bin_type=True)
    if len(body) > MAX_FRAME:
        raise ProtocolError(
            f"a control frame of {len(body)} bytes is over the limit of {MAX_FRAME}: keep large "
            "values in tensors, not in run.vars or lists"
        )
    return _LENGTH.pack(len(body)) + body


class FrameDecoder:
    """Turns bytes into messages; holds at most one unfinished frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[dict[str, Any]]:
        """The messages that ``data`` completes, or ProtocolError at the first malformed one."""
        self._buffer += data
        messages = []
        while len(self._buffer) >= 4:
            (length,) = _LENGTH.unpack_from(self._buffer)
            if length > MAX_FRAME:
                raise ProtocolError(f"a frame of {length} bytes is over the limit of {MAX_FRAME}")
            if len(self._buffer) < 4 + length:
                break
            body = bytes(self._buffer[4 : 4 + length])
            del self._buffer[: 4 + length]
            messages.append(_decode(body))
        return messages


def _decode(body: bytes) -> dict[str, Any]:
    try:
        message = msgpack.unpackb(body, raw=False, strict_map_key=True)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise ProtocolError(f"a frame is not msgpack: {error}") from None
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        raise ProtocolError("a frame is not a map with the text field 'op'")
    version = message.pop("v", None)
    if version != VERSION or isinstance(version, bool):
        raise ProtocolError(
            f"a frame is of protocol version {version!r}; this Drivetrain speaks version "
            f"{VERSION}: use the same Drivetrain on both sides"
        )
    for key in ("id", "re", "fds"):
        value = message.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ProtocolError(f"a frame's field {key!r} is not a whole number")
    if not 0 <= (message.get("fds") or 0) <= MAX_FDS:
        raise ProtocolError(f"a frame announces {message['fds']} file descriptors")
    return message


def peer_uid(sock: socket.socket) -> int:
    """The user id of the process at the other end of a Unix socket."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return int(struct.unpack("3i", raw)[1])


@dataclass
class Message:
    """A received frame with the descriptors that came beside it (the receiver owns them)."""

    op: str
    body: dict[str, Any]
    fds: list[int] = field(default_factory=list)

    def close_fds(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []


class Channel:
    """One connection. Sending is safe from any thread; receiving belongs to one thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._socket.setblocking(False)
        self._decoder = FrameDecoder()
        self._fds: deque[int] = deque()
        self._messages: deque[Message] = deque()
        self._lock = threading.Lock()
        self._next_id = 0
        self.closed = False

    def fileno(self) -> int:
        return self._socket.fileno()

    def new_id(self) -> int:
        with self._lock:
            self._next_id += 1
            return self._next_id

    def send(self, op: str, *, fds: Sequence[int] = (), limit_s: float = 10.0, **body: Any) -> None:
        """Send one frame; ChannelClosed when the other side is gone or does not read in time."""
        message = {"v": VERSION, "op": op, **body}
        if fds:
            message["fds"] = len(fds)
        data = memoryview(encode(message))
        deadline = time.monotonic() + limit_s
        with self._lock:
            ancillary: list[tuple[int, int, Any]] = []
            if fds:
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            while data:
                if self.closed:
                    raise ChannelClosed("the channel is closed")
                try:
                    sent = self._socket.sendmsg([data], ancillary)
                except BlockingIOError:
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise ChannelClosed(
                            f"the other side did not read for {limit_s} s"
                        ) from None
                    select.select([], [self._socket], [], left)
                    continue
                except OSError as error:
                    raise ChannelClosed(f"the other side is gone ({error})") from None
                data = data[sent:]
                ancillary = []

    def receive(self) -> list[Message]:
        """What has arrived, without waiting; ChannelClosed at the end of the stream."""
        try:
            data, ancillary, _flags, _address = self._socket.recvmsg(
                1 << 18, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return []
        except OSError as error:
            raise ChannelClosed(f"the other side is gone ({error})") from None
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(payload[: len(payload) - len(payload) % 4])
                self._fds.extend(received)
        if not data:
            raise ChannelClosed("the other side closed the channel")
        messages: list[Message] = []
        try:
            for body in self._decoder.feed(data):
                count = body.pop("fds", None) or 0
                if count > len(self._fds):
                    raise ProtocolError(
                        f"a frame announces {count} descriptors, {len(self._fds)} came"
                    )
                fds = [self._fds.popleft() for _ in range(count)]
                messages.append(Message(body["op"], body, fds))
            if len(self._fds) > _MAX_QUEUED_FDS:
                raise ProtocolError("file descriptors without a frame")
        except ProtocolError:
            for message in messages:
                message.close_fds()
            raise
        return messages

    def wait(self, limit_s: float) -> Message:
        """The next message, waiting up to ``limit_s`` seconds (ProtocolError when none came)."""
        deadline = time.monotonic() + limit_s
        while not self._messages:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                raise ProtocolError(f"no answer within {limit_s:g} s")
            self._messages.extend(self.receive())
        return self._messages.popleft()

    def call(
        self, op: str, *, limit_s: float = 10.0, fds: Iterable[int] = (), **body: Any
    ) -> Message:
        """Send a request and wait for its answer, dropping other frames (simple clients only)."""
        request = self.new_id()
        self.send(op, id=request, fds=tuple(fds), **body)
        while True:
            message = self.wait(limit_s)
            if message.body.get("re") == request:
                return message
            message.close_fds()

    def close(self) -> None:
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._socket.close()
            while self._fds:
                os.close(self._fds.popleft())


def pair() -> tuple[Channel, socket.socket]:
    """A channel and the plain socket for a child that inherits it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(ours), theirs


def connect(path: str, *, limit_s: float = 5.0) -> Channel:
    """A channel to a listening private socket whose owner is this user; ChannelClosed if none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(limit_s)
    try:
        sock.connect(path)
        if peer_uid(sock) != os.geteuid():
            raise ProtocolError(f"the socket {path} belongs to another user")
    except OSError as error:
        sock.close()
        raise ChannelClosed(f"nobody answers on {path} ({error})") from None
    except ProtocolError:
        sock.close()
        raise
    return Channel(sock)


_listeners = itertools.count()


class Listener:
    """A private listening socket (mode 0600); only this user's processes get in.

    It gets its name when it listens already, so that a named socket on which nobody answers is
    always one that a dead process left (see `sweep_sockets`).
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        early = os.path.join(os.path.dirname(path), f".{os.getpid():x}-{next(_listeners):x}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(early)
        os.fchmod(self._socket.fileno(), 0o600)  # the file that bind makes takes this mode
        self._socket.bind(early)
        crash_point("socket.bound")
        self._socket.listen(16)
        os.rename(early, path)
        crash_point("socket.named")
        self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self) -> Channel | None:
        """The next connection of this user, or None (others are closed at once)."""
        try:
            sock, _ = self._socket.accept()
        except OSError:
            return None
        if peer_uid(sock) not in (os.geteuid(), 0):
            sock.close()
            return None
        return Channel(sock)

    def close(self) -> None:
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)


def early_names(path: str, pid: int) -> list[str]:
    """The sockets beside ``path`` that process ``pid`` bound and did not live to name."""
    return glob.glob(os.path.join(glob.escape(os.path.dirname(path)), f".{pid:x}-*"))


def sweep_sockets(folder: str) -> None:
    """Remove the sockets in ``folder`` on which nobody can ever answer again."""
    for entry in os.scandir(folder):
        if entry.name.startswith("."):  # bound by a process that died before it listened
            pid = entry.name[1:].split("-")[0]
            dead = not os.path.exists(f"/proc/{int(pid, 16)}")
        else:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.setblocking(False)
                dead = probe.connect_ex(entry.path) == errno.ECONNREFUSED
        if dead:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry.path)

"""The control protocol: what docs/protocol.md says, and what is no frame harms nobody."""

from __future__ import annotations

import gc
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import psutil
import pytest

from drivetrain.runtime.channel import (
    MAX_FRAME,
    VERSION,
    Channel,
    ChannelClosed,
    FrameDecoder,
    Listener,
    ProtocolError,
    encode,
    pair,
    sweep_sockets,
)
from drivetrain.store.home import socket_path
from drivetrain.store.journal import Journal

from .conftest import Home

CLIENT = Path(__file__).with_name("protocol_client.py")
OPS = ("ping", "migrate", "pause", "resume", "stop", "checkpoint", "adopt", "start", "interrupt")
FIELDS = ("id", "re", "fds", "v", "job", "to", "strategy", "max_downtime", "limit_s", "uid", "x")


# -- fuzz -----------------------------------------------------------------------------------------


def value(dice: random.Random, depth: int = 0) -> Any:
    kind = dice.randrange(11 if depth < 3 else 8)
    if kind == 0:
        return dice.choice([0, 1, -1, 2**31, 2**63 - 1, -(2**63), 2**64 - 1])
    if kind == 1:
        return dice.choice([float("nan"), float("inf"), -1.0, 1e308, 0.5])
    if kind == 2:
        return dice.choice([None, True, False])
    if kind == 3:
        return dice.randbytes(dice.randrange(40))
    if kind == 4:
        return msgpack.Timestamp(dice.randrange(2**31))
    if kind == 5:
        return msgpack.ExtType(dice.randrange(128), dice.randbytes(5))
    if kind in (6, 7):
        return dice.choice(["", "cpu:0", "cpu:99", "immediate", "\x00", "é" * 50, "../../etc"])
    if kind == 8:
        return [value(dice, depth + 1) for _ in range(dice.randrange(4))]
    if kind == 9:
        return {dice.choice(FIELDS): value(dice, depth + 1) for _ in range(3)}
    return {value(dice, 3) if dice.random() < 0.1 else "k": value(dice, depth + 1)}


def frame(dice: random.Random, job: str = "no-job") -> bytes:
    """Something between a right request and noise; never one that stops or moves the job."""
    kind = dice.randrange(8)
    if kind == 0:
        return dice.randbytes(dice.randrange(1, 200))
    if kind == 1:  # a length, and less or more than that
        return struct.pack(">I", dice.choice([0, 1, 5, 300, MAX_FRAME, MAX_FRAME + 1, 2**32 - 1]))
    body: dict[Any, Any] = {"v": VERSION, "op": dice.choice(OPS), "id": dice.randrange(9)}
    if kind == 2:
        body["op"] = value(dice)
    elif kind == 3:
        body["v"] = value(dice)
    for _ in range(dice.randrange(4)):
        body[dice.choice(FIELDS)] = value(dice)
    if kind == 4:
        body["job"], body["op"] = job, dice.choice(["ping", "resume", "migrate", "frobnicate"])
        body["unknown"] = value(dice)
    try:
        packed = msgpack.packb(body)
    except (ValueError, TypeError, OverflowError):
        packed = dice.randbytes(20)
    if kind == 5 and packed:
        cut = bytearray(packed)
        cut[dice.randrange(len(cut))] ^= 1 << dice.randrange(8)
        packed = bytes(cut)
    return struct.pack(">I", len(packed)) + packed


def feed_decoder(count: int) -> None:
    dice = random.Random(count)
    process, before = psutil.Process(), 0
    for number in range(count):
        decoder = FrameDecoder()
        data = b"".join(frame(dice) for _ in range(dice.randrange(1, 4)))
        try:
            for start in range(0, len(data), 37):
                for message in decoder.feed(data[start : start + 37]):
                    assert isinstance(message["op"], str)
        except ProtocolError:
            pass
        if number == count // 4:
            gc.collect()
            before = process.memory_info().rss
    gc.collect()
    assert process.memory_info().rss - before < 8 << 20


def sockets(home: Home) -> tuple[str, str, int, int]:
    """(the runtime's socket, the worker's, their pids) of the newest job."""
    job = home.job()
    assert job is not None
    assert job.view.runtime is not None
    assert job.view.worker is not None
    with Journal.open(job.directory / "journal") as journal:
        host = [r.data["socket"] for r in journal.records() if r.kind == "runtime"][-1]
    worker = socket_path(f"w-{job.view.worker_key}")
    return str(host), worker, job.view.runtime.pid, job.view.worker.pid


def throw(path: str, dice: random.Random, job: str, *, fds: bool) -> None:
    """Some frames on a new connection, which is then closed or half closed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(5)
        _connect(sock, path)
        try:
            for _ in range(dice.randrange(1, 4)):
                data = frame(dice, job)
                if fds and dice.random() < 0.2:
                    socket.send_fds(sock, [data], [0] * dice.randrange(1, 5))
                else:
                    sock.sendall(data)
            if dice.random() < 0.3:
                sock.shutdown(socket.SHUT_WR)
                sock.recv(4096)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it hung up, which is what it should do


def _connect(sock: socket.socket, path: str) -> None:
    """Connect, waiting for a place where a busy process has as many waiting as it lets wait."""
    deadline = time.monotonic() + 30
    while True:
        try:
            return sock.connect(path)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def bombard(home: Home, count: int, unmoved: Callable[..., dict[str, Any]]) -> None:
    hosted = home.run("--on", "cpu:0", "--name", "j", args=("--delay", "0.1"))
    home.wait_step(3, "j")
    host, worker, *pids = sockets(home)
    job = home.job("j")
    assert job is not None
    dice = random.Random(count)
    processes = [psutil.Process(pid) for pid in pids]
    before: list[tuple[int, int]] = []
    for number in range(count):
        throw(host if number % 2 else worker, dice, job.id, fds=True)
        if number == count // 4:
            before = [(p.memory_info().rss, p.num_fds()) for p in processes]
    home.ok("pause", "j")  # both still do what they are asked
    home.ok("resume", "j")
    after = [(p.memory_info().rss, p.num_fds()) for p in processes]
    for (rss, fds), (rss_after, fds_after) in zip(before, after, strict=True):
        assert rss_after - rss < 16 << 20
        assert fds_after <= fds + 4
    home.go.touch()
    assert hosted.wait() == 0
    assert hosted.result() == unmoved()
    home.assert_nothing_left()


def test_the_decoder_takes_anything() -> None:
    feed_decoder(4000)


def test_runtime_and_worker_take_anything(
    home: Home, unmoved: Callable[..., dict[str, Any]]
) -> None:
    bombard(home, 1500, unmoved)


@pytest.mark.soak
def test_the_decoder_takes_a_hundred_thousand_of_anything() -> None:
    feed_decoder(100_000)


@pytest.mark.soak
def test_runtime_and_worker_take_a_hundred_thousand_of_anything(
    home: Home, unmoved: Callable[..., dict[str, Any]]
) -> None:
    bombard(home, 100_000, unmoved)


# -- a client that knows the page alone -----------------------------------------------------------


def ask(path: str, job: str, op: str, **fields: Any) -> tuple[int, list[dict[str, Any]]]:
    done = subprocess.run(
        [sys.executable, "-I", str(CLIENT), path, job, op, json.dumps(fields)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]


def test_a_client_that_knows_only_the_page_moves_a_job(home: Home) -> None:
    hosted = home.run("--on", "cpu:0", "--name", "j")
    home.wait_step(3, "j")
    host, worker, *_ = sockets(home)
    job = home.job("j")
    assert job is not None
    code, frames = ask(host, job.id, "ping")
    assert (code, frames[-1]["op"], frames[-1]["jobs"]) == (0, "pong", [job.id])
    code, frames = ask(host, job.id, "migrate", to="cpu:1", strategy="immediate", reason="why")
    assert code == 0
    assert [f["op"] for f in frames[:-1]] == ["phase"] * (len(frames) - 1)
    assert frames[-1]["result"]["ok"] is True
    assert frames[-1]["result"]["to"] == "cpu:1"
    code, frames = ask(host, job.id, "migrate", to="cpu:1")
    assert (code, frames[-1]["kind"]) == (1, "input")
    code, frames = ask(host, job.id, "pause", colour="blue")
    assert (code, frames[-1]["kind"]) == (1, "input")
    code, frames = ask(host, "nosuchjob", "pause")
    assert (code, frames[-1]["kind"]) == (1, "input")
    worker = sockets(home)[1]
    code, frames = ask(worker, job.id, "adopt", runtime={})
    assert frames[-1]["op"] == "refused"
    code, frames = ask(host, job.id, "stop", reason="enough")
    assert (code, frames[-1]["result"]["state"]) == (0, "stopped")
    assert hosted.wait() == 0


def test_another_version_is_refused_by_name() -> None:
    body = msgpack.packb({"v": 2, "op": "ping"})
    with pytest.raises(ProtocolError, match="version 2"):
        FrameDecoder().feed(struct.pack(">I", len(body)) + body)


# -- the channel ----------------------------------------------------------------------------------


@pytest.fixture
def both() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = pair()
    other = Channel(theirs)
    yield ours, other
    ours.close()
    other.close()


def test_descriptors_arrive_with_their_frame_however_it_is_cut(
    both: tuple[Channel, Channel],
) -> None:
    ours, other = both
    reading, writing = os.pipe()

    def send() -> None:
        ours.send("plain", text="x" * 300_000)
        ours.send("with", fds=(writing,), number=7)

    sender = threading.Thread(target=send)
    sender.start()
    assert other.wait(5).op == "plain"
    message = other.wait(5)
    sender.join()
    os.close(writing)
    assert (message.op, message.body["number"], len(message.fds)) == ("with", 7, 1)
    os.write(message.fds[0], b"through")
    message.close_fds()
    assert os.read(reading, 100) == b"through"
    os.close(reading)


def test_descriptors_of_refused_frames_are_closed(both: tuple[Channel, Channel]) -> None:
    ours, other = both
    before = len(os.listdir("/proc/self/fd"))
    ours.send("one", fds=(0, 0))
    ours._socket.sendall(encode({"v": VERSION, "op": "two", "fds": 3}))

    def receive() -> None:
        for _ in range(2):
            other.wait(5).close_fds()

    with pytest.raises(ProtocolError):
        receive()
    other.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_reader_that_does_not_read_is_given_up(both: tuple[Channel, Channel]) -> None:
    ours, _ = both

    def flood() -> None:
        for _ in range(100):
            ours.send("much", limit_s=0.2, data=b"x" * 100_000)

    with pytest.raises(ChannelClosed, match="did not read"):
        flood()


def test_too_long_a_frame_is_not_sent() -> None:
    with pytest.raises(ProtocolError, match="limit"):
        encode({"v": VERSION, "op": "x", "data": bytes(MAX_FRAME)})


def test_sockets_of_the_dead_are_swept_and_those_of_the_living_stay(tmp_path: Path) -> None:
    living = Listener(str(tmp_path / "living"))
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    dead.bind(str(tmp_path / "dead"))
    dead.listen()
    dead.close()
    early = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    early.bind(str(tmp_path / f".{2**22 + 1:x}-0"))
    sweep_sockets(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["living"]
    assert os.stat(tmp_path / "living").st_mode & 0o777 == 0o600
    living.close()
    early.close()
    assert list(tmp_path.iterdir()) == []

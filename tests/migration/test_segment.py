"""Shared memory: a slot counts only when closed, the ring delivers in order and never hangs."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from drivetrain.errors import IntegrityError, MigrationError
from drivetrain.migration import segment
from drivetrain.migration.segment import Ring, Slot, newest, room_bytes


def test_a_closed_slot_is_read_by_another_mapping() -> None:
    with Slot.create(100, 10_000) as slot, Slot.attach(slot.fd) as other:
        assert not slot.valid
        assert slot.address % 4096 == 0
        slot.begin(1, step=7, epoch=3)
        slot.image()[:4] = b"abcd"
        ctypes.memset(slot.address + 9_999, 0x7F, 1)
        assert not other.valid
        slot.finish(b"meta")
        assert other.valid
        assert other.read() == (7, 3, b"meta")
        assert bytes(other.image()[:4]) == b"abcd"
        assert other.image()[9_999] == 0x7F
        assert (other.image_nbytes, other.meta_capacity) == (10_000, 100)


def test_an_open_slot_does_not_count() -> None:
    with Slot.create(100, 100) as slot:
        with pytest.raises(IntegrityError):
            slot.read()
        slot.begin(1, 1, 1)
        slot.finish(b"x")
        slot.begin(2, 2, 1)
        assert slot.sequence == 2
        assert not slot.valid
        with pytest.raises(IntegrityError):
            slot.read()


def test_the_newest_is_of_the_highest_epoch_and_then_step() -> None:
    with Slot.create(10, 10) as a, Slot.create(10, 10) as b:
        assert newest([a, b]) is None
        a.begin(1, step=9, epoch=1)
        a.finish(b"")
        assert newest([a, b]) is a
        b.begin(2, step=5, epoch=2)
        assert newest([a, b]) is a
        b.finish(b"")
        assert newest([a, b]) is b
        b.image()[0:1] = b"x"
        a.begin(3, step=6, epoch=2)
        a.finish(b"")
        assert newest([a, b]) is a


def test_a_flipped_byte_in_the_description_is_found() -> None:
    for offset in (4 * 8, 5 * 8, 6 * 8, 9 * 8, 4096, 4099):
        with Slot.create(10, 10) as slot:
            slot.begin(1, 1, 1)
            slot.finish(b"meta")
            ctypes.c_ubyte.from_address(slot._segment.base + offset).value ^= 1
            assert newest([slot]) is None


def test_misuse_is_refused() -> None:
    with Slot.create(4, 10) as slot:
        slot.begin(2, 1, 1)
        with pytest.raises(MigrationError, match="4"):
            slot.finish(b"12345")
        slot.finish(b"1234")
        with pytest.raises(MigrationError, match="number 2"):
            slot.begin(2, 2, 1)
    with open(os.devnull, "rb") as file, pytest.raises(IntegrityError):
        Slot.attach(file.fileno())
    ring = Ring.create(1, 4096)
    with pytest.raises(IntegrityError, match="another kind"):
        Slot.attach(ring.fd)
    ring.close()


def test_segments_cannot_change_size_under_a_reader() -> None:
    with Slot.create(10, 10) as slot:
        for size in (0, 1 << 20):
            with pytest.raises(PermissionError):
                os.ftruncate(slot.fd, size)
        assert fcntl.fcntl(slot.fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL


def test_all_pages_are_there_from_the_start() -> None:
    with Slot.create(10, 3 << 20) as slot:
        assert os.fstat(slot.fd).st_blocks * 512 >= 3 << 20


def test_a_large_ring_lies_in_huge_pages() -> None:
    allowed = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    if release < (6, 1) or not allowed.exists() or "[deny]" in allowed.read_text():
        pytest.skip("this kernel puts no pages together when it is asked to")

    def huge_bytes() -> int:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if "ShmemHugePages" in line)

    grown = 0
    for _ in range(3):  # other processes come and go
        before = huge_bytes()
        with contextlib.closing(Ring.create(8, 8 << 20)):
            grown = max(grown, huge_bytes() - before)
    assert grown >= 32 << 20


@pytest.mark.parametrize("point", ["slot.open", "slot.opened", "slot.close", "slot.closed"])
def test_a_writer_killed_at_any_point_leaves_the_old_replica_or_the_new(
    tmp_path: Path, point: str
) -> None:
    a, b = Slot.create(10, 10), Slot.create(10, 10)
    a.begin(1, step=1, epoch=1)
    a.finish(b"one")
    script = (
        "import sys; from drivetrain.migration.segment import Slot;"
        "s = Slot.attach(int(sys.argv[1])); s.begin(2, 2, 1); s.finish(b'two')"
    )
    env = os.environ | {"DRIVETRAIN_HOME": str(tmp_path), "DRIVETRAIN_CRASH_AT": f"{point}:1"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(b.fd)], env=env, pass_fds=[b.fd], timeout=60
    )
    assert done.returncode == -signal.SIGKILL
    found = newest([a, b])
    assert found is not None
    assert found.read() == ((2, 1, b"two") if point == "slot.closed" else (1, 1, b"one"))
    if not b.valid:
        b.begin(b.sequence + 1, 3, 1)  # the slot is usable again
        b.finish(b"three")
        assert newest([a, b]) is b
    a.close()
    b.close()


def test_room_is_what_the_tightest_group_leaves(tmp_path: Path) -> None:
    proc, group = tmp_path / "proc", tmp_path / "sys/fs/cgroup/a/b"
    (proc / "self").mkdir(parents=True)
    group.mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable: 8000 kB\n")
    assert room_bytes(tmp_path) == 8000 * 1024
    (proc / "self/cgroup").write_text("0::/a/b\n")
    (proc / "self/mountinfo").write_text(
        "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n"
    )
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("4096000\n")
    (group.parent / "memory.current").write_text("1096000\n")
    (group.parent / "memory.stat").write_text("anon 1\ninactive_file 96000\n")
    assert room_bytes(tmp_path) == 3_096_000
    assert 0 < room_bytes() < 1 << 50


def test_too_little_room_is_an_error_and_not_a_kill(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment, "room_bytes", lambda: 100 << 20)
    Slot.create(10, 30 << 20).close()
    with pytest.raises(MigrationError, match="left"):
        Slot.create(10, 40 << 20)


def _consume(fd: int, count: int, result: int) -> None:
    ring = Ring.attach(fd)
    good = 1
    for i in range(count):
        address = ring.consumer.acquire(10)
        data = ctypes.string_at(address, ring.consumer.nbytes)
        good &= data == bytes([i % 251]) * (i * 37 % 4096 + 1)
        ring.consumer.release()
    os.write(result, b"y" if good else b"n")


def test_blocks_arrive_in_order_and_whole_in_another_process() -> None:
    ring = Ring.create(3, 4096)
    read, write = os.pipe()
    context = multiprocessing.get_context("fork")
    consumer = context.Process(target=_consume, args=(ring.fd, 300, write))
    consumer.start()
    for i in range(300):
        nbytes = i * 37 % 4096 + 1
        address = ring.producer.acquire(10)
        ctypes.memmove(address, bytes([i % 251]) * nbytes, nbytes)
        ring.producer.commit(nbytes)
    consumer.join(20)
    assert consumer.exitcode == 0
    assert os.read(read, 1) == b"y"
    os.close(read)
    os.close(write)
    ring.close()


def test_several_slots_may_be_in_flight_on_both_sides() -> None:
    ring = Ring.create(4, 4096)
    addresses = [ring.producer.acquire(1) for _ in range(4)]
    assert addresses == [ring.address + i * 4096 for i in range(4)]
    with pytest.raises(MigrationError):
        ring.producer.acquire(0.01)
    with pytest.raises(MigrationError):
        ring.consumer.acquire(0.01)
    for n in range(4):
        ring.producer.commit(n)
    assert [ring.consumer.acquire(1) for _ in range(4)] == addresses
    assert ring.consumer.nbytes == 3
    with pytest.raises(ValueError, match="commit"):
        ring.producer.commit(1)
    ring.consumer.release()
    assert ring.producer.acquire(1) == addresses[0]
    ring.close()


def test_waits_end_at_their_deadline_and_at_an_abort() -> None:
    ring = Ring.create(1, 4096)
    other = Ring.attach(ring.fd)
    began = time.monotonic()
    with pytest.raises(MigrationError, match="hangs or is gone"):
        ring.consumer.acquire(0.05)
    assert time.monotonic() - began >= 0.05
    timer = threading.Timer(0.05, other.abort)
    timer.start()
    with pytest.raises(MigrationError, match="given up"):
        ring.consumer.acquire(30)
    timer.join()
    with pytest.raises(MigrationError, match="given up"):
        ring.producer.acquire(30)
    other.close()
    ring.close()


def test_nothing_stays_open_after_close() -> None:
    before = len(os.listdir("/proc/self/fd"))
    ring, slot = Ring.create(2, 4096), Slot.create(10, 10)
    others = [Ring.attach(ring.fd), Slot.attach(slot.fd)]
    for thing in [ring, slot, *others]:
        thing.touch()
        thing.close()
        thing.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_view_that_is_still_held_stays_usable_after_close() -> None:
    slot = Slot.create(10, 10)
    view = slot.image()
    slot.close()
    view[:1] = b"x"
    assert view[0] == ord("x")

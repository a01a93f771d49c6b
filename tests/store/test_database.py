"""The database never overcommits a device and may be lost at any moment."""

from __future__ import annotations

import contextlib
import multiprocessing
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from drivetrain.errors import PlacementError, StoreError
from drivetrain.store.database import Database, Move, Want
from drivetrain.store.process import ProcessId

ME = ProcessId.of()


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "store.sqlite")


def test_leases_add_up_and_are_given_back(database: Database) -> None:
    first = database.lease("host", 100, 60, ME, "a")
    with pytest.raises(PlacementError, match=r"60 of 100 are leased"):
        database.lease("host", 100, 41, ME, "b")
    second = database.lease("host", 100, 40, ME, "b", device_key="cpu:1")
    database.lease("gpu-0", 100, 100, ME, "b")
    assert database.leased("host") == 100
    assert {lease.id for lease in database.leases("host")} == {first.id, second.id}
    database.release(first)
    database.release(first)
    assert database.leased("host") == 40


def test_several_leases_are_taken_together_or_not_at_all(database: Database) -> None:
    with pytest.raises(PlacementError):
        database.lease_all([Want("gpu", 10, 5), Want("host", 10, 11)], ME, "a")
    assert database.leases() == ()
    with pytest.raises(PlacementError):
        database.lease_all([Want("host", 10, 6), Want("host", 10, 6)], ME, "a")
    assert len(database.lease_all([Want("gpu", 10, 5), Want("host", 10, 10)], ME, "a")) == 2


def test_the_leases_of_dead_owners_are_void_and_removed(database: Database) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = ProcessId.of(child.pid)
    database.lease("host", 100, 100, owner, "a")
    with pytest.raises(PlacementError):
        database.lease("host", 100, 1, ME, "b")
    child.kill()
    child.wait()
    assert database.leased("host") == 0
    database.lease("host", 100, 100, ME, "b")
    with contextlib.closing(sqlite3.connect(database.path)) as plain:
        assert plain.execute("SELECT COUNT(*) FROM leases").fetchone() == (1,)


def test_a_transferred_lease_outlives_its_first_owner(database: Database) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    lease = database.lease("host", 100, 70, ProcessId.of(child.pid), "a")
    moved = database.transfer(lease, ME)
    child.kill()
    child.wait()
    assert database.leases() == (moved,)
    assert moved.owner == ME


def test_a_lease_grows_only_as_far_as_it_fits(database: Database) -> None:
    lease = database.lease("gpu", 100, 0, ME, "a")
    database.lease("gpu", 100, 50, ME, "b")
    lease = database.resize(lease, 50, capacity_bytes=100)
    with pytest.raises(PlacementError):
        database.resize(lease, 51, capacity_bytes=100)
    assert database.leased("gpu") == 100
    database.resize(lease, 80)  # measured: it is in use whether it fits or not
    assert database.leased("gpu") == 130
    database.release(lease)
    with pytest.raises(StoreError, match="gone"):
        database.resize(lease, 1)


def _submit(path: Path, start: Any, won: Any) -> None:
    database = Database(path)
    start.wait()
    mine = 0
    for _ in range(10):
        with contextlib.suppress(PlacementError):
            database.lease("gpu", 1000, 70, ProcessId.of(), "job")
            mine += 1
    with won.get_lock():
        won.value += mine
    start.wait()  # stay alive until all have tried


def test_eight_processes_at_once_never_overcommit(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    context = multiprocessing.get_context("fork")
    start, won = context.Barrier(9), context.Value("i", 0)
    workers = [context.Process(target=_submit, args=(path, start, won)) for _ in range(8)]
    for worker in workers:
        worker.start()
    database = None
    start.wait()
    try:
        while sum(worker.is_alive() for worker in workers) == 8 and start.n_waiting < 8:
            workers[0].join(0.01)
        database = Database(path)
        assert won.value == 14  # 14 * 70 <= 1000 < 15 * 70: all that fits and no more
        assert database.leased("gpu") == 14 * 70
    finally:
        start.wait()
        for worker in workers:
            worker.join(30)
    assert [worker.exitcode for worker in workers] == [0] * 8
    assert database.leased("gpu") == 0


def test_history_placements_and_moves_come_back(database: Database) -> None:
    assert database.peak_bytes("s") is None
    database.add_history("s", "cpu:0", step_seconds=2.0, memory_bytes=10)
    database.add_history("s", "cpu:0", step_seconds=1.0, memory_bytes=None)
    database.add_history("s", "gpu", step_seconds=None, memory_bytes=30)
    assert database.step_seconds("s") == {"cpu:0": 1.0}
    assert database.step_seconds("other") == {}
    assert database.peak_bytes("s") == 30
    database.add_placement("j", {"address": "cpu:0", "score": 0.5})
    assert database.placements("j") == ({"address": "cpu:0", "score": 0.5},)
    for seconds in (1.0, 2.0):
        database.add_move(Move("j", "cpu:0", "cpu:1", 10, None, seconds, 5.0, "immediate"))
    database.add_move(Move("j", "cpu:1", "cpu:0", 10, None, 3.0, 5.0, "immediate"))
    assert [m.real_s for m in database.moves()] == [3.0, 2.0, 1.0]
    assert [m.real_s for m in database.moves(source="cpu:0", target="cpu:1")] == [2.0, 1.0]
    assert all(m.at > 0 for m in database.moves())


def test_only_the_newest_of_the_past_is_kept(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drivetrain.store.database._KEPT", 3)
    for i in range(7):
        database.add_placement("j", {"number": i})
        database.add_history("s", f"cpu:{i}", step_seconds=1.0, memory_bytes=None)
        database.add_move(Move("j", "cpu:0", "cpu:1", i, None, 1.0, 5.0, "immediate"))
    assert [p["number"] for p in database.placements("j")] == [4, 5, 6]
    assert sorted(database.step_seconds("s")) == ["cpu:4", "cpu:5", "cpu:6"]
    assert [m.nbytes for m in database.moves()] == [6, 5, 4]


@pytest.mark.parametrize("damage", ["garbage", "header", "middle"])
def test_a_damaged_file_is_made_anew_and_that_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    path = tmp_path / "store.sqlite"
    database = Database(path)
    for i in range(500):
        database.add_placement(f"j{i}", {"x": "y" * 100})
    database.close()
    data = bytearray(path.read_bytes())
    if damage == "garbage":
        data[:] = b"garbage" * 1000
    elif damage == "header":
        data[0:16] = bytes(16)
    else:
        data[8192 : 8192 + 4096 * 5] = b"\xa5" * (4096 * 5)
    path.write_bytes(data)
    again = Database(path)
    again.lease("host", 10, 10, ME, "a")
    assert again.placements("j0") == ()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(path) in said


def test_deleted_while_in_use_it_starts_anew_and_leases_can_be_renewed(database: Database) -> None:
    other = Database(database.path)
    lease = database.lease("gpu", 100, 60, ME, "a")
    for suffix in ("", "-wal", "-shm"):
        Path(f"{database.path}{suffix}").unlink(missing_ok=True)
    assert other.leased("gpu") == 0
    database.renew(lease)
    assert other.leased("gpu") == 60
    with pytest.raises(PlacementError):
        other.lease("gpu", 100, 41, ME, "b")


def test_deleted_without_its_log_the_old_rows_do_not_come_back(database: Database) -> None:
    database.add_placement("j", {"x": 1})
    database.path.unlink()
    assert Database(database.path).placements("j") == ()
    assert database.placements("j") == ()


def _child_lease(database: Database) -> None:
    database.lease("gpu", 100, 10, ME, "child")


def test_a_forked_child_may_use_it(database: Database) -> None:
    database.lease("gpu", 100, 10, ME, "parent")
    child = multiprocessing.get_context("fork").Process(target=_child_lease, args=(database,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert database.leased("gpu") == 20


def test_a_file_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as plain:
        plain.execute("PRAGMA user_version=99")
    before = path.read_bytes()
    with pytest.raises(StoreError, match="newer"):
        Database(path)
    assert path.read_bytes() == before

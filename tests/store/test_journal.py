"""The journal keeps a valid prefix whatever happens to its bytes, and one writer wins."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.errors import StoreError
from drivetrain.store.journal import RECORD_LIMIT, Journal, JournalConflict, Record

json_like: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=9) | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
entries = st.lists(
    st.tuples(st.text(max_size=8), st.dictionaries(st.text(max_size=5), json_like, max_size=3)),
    min_size=1,
    max_size=5,
)


def written(path: Path, items: list[tuple[str, dict[str, Any]]]) -> tuple[Record, ...]:
    with Journal.create(path) as journal:
        for number, (kind, data) in enumerate(items):
            journal.append(kind, data, epoch=number)
        return journal.records()


SOME = [("start", {"a": 1}), ("step", {"b": [1, b"x", None]}), ("commit", {"to": "cpu:1" * 9})]


def test_records_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    before = time.time()
    records = written(path, SOME)
    assert [(r.seq, r.kind, r.epoch, r.data) for r in records] == [
        (i + 1, kind, i, data) for i, (kind, data) in enumerate(SOME)
    ]
    assert all(before <= r.at <= time.time() for r in records)
    with Journal.open(path) as journal:
        assert journal.records() == records
        assert journal.tail_seq == 3
    assert path.stat().st_mode & 0o777 == 0o600


@settings(max_examples=12, deadline=None)
@given(entries)
def test_cut_anywhere_it_keeps_a_prefix_and_takes_new_records(
    items: list[tuple[str, dict[str, Any]]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        records = written(path, items)
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            with Journal.open(path) as journal:
                kept = journal.records()
                assert kept == records[: len(kept)]
                assert len(kept) < len(records)
        with Journal.open(path) as journal:  # the longest cut: one byte short
            assert journal.append("again", {}, epoch=9).seq == len(records)
        with Journal.open(path) as journal:
            assert [r.kind for r in journal.records()] == [r.kind for r in records[:-1]] + ["again"]


def test_cut_at_every_byte_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    records = written(path, SOME[:2])
    whole = path.read_bytes()
    for size in range(0, len(whole), 3):
        path.write_bytes(whole[:size])
        with Journal.open(path) as journal:
            kept = journal.records()
            journal.append("new", {"n": size}, epoch=1, expect_seq=len(kept))
        with Journal.open(path) as journal:
            assert journal.records()[:-1] == kept == records[: len(kept)]
            assert journal.records()[-1].data == {"n": size}


@settings(max_examples=10, deadline=None)
@given(entries, st.integers(1, 255))
def test_a_flipped_byte_never_yields_a_wrong_record(
    items: list[tuple[str, dict[str, Any]]], flip: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal"
        records = written(path, items)
        whole = path.read_bytes()
        last = 0
        for index in range(len(whole)):
            damaged = bytearray(whole)
            damaged[index] ^= flip
            path.write_bytes(damaged)
            try:
                with Journal.open(path) as journal:
                    kept = journal.records()
            except StoreError:
                continue
            last = index
            # Only the last record can be taken for a torn tail; no other may vanish unsaid.
            assert kept == records[:-1]
        assert last > 0


def test_damage_in_the_middle_is_an_error_not_a_shorter_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path, SOME)
    data = bytearray(path.read_bytes())
    data[16 + 14] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="corrupted at byte 16"):
        Journal.open(path)


def test_refresh_returns_what_others_appended(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with Journal.create(path) as ours, Journal.open(path) as theirs:
        theirs.append("a", {}, epoch=1)
        assert ours.tail_seq == 0
        assert [r.kind for r in ours.refresh()] == ["a"]
        assert ours.refresh() == ()
        ours.append("b", {}, epoch=1, expect_seq=1)
        with pytest.raises(JournalConflict, match="record 2"):
            theirs.append("c", {}, epoch=1, expect_seq=1)
        assert [r.kind for r in theirs.refresh()] == ["b"]
        assert [r.kind for r in theirs.records()] == ["a", "b"]


def _race(path: Path, barrier: Any, wins: Any) -> None:
    with Journal.open(path) as journal:
        for round_ in range(20):
            barrier.wait()
            tail = journal.tail_seq
            barrier.wait()
            try:
                journal.append("mine", {"pid": os.getpid()}, epoch=round_, expect_seq=tail)
            except JournalConflict:
                pass
            else:
                wins[round_] += 1
            barrier.wait()
            journal.refresh()


def test_of_two_processes_racing_exactly_one_wins_each_round(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal.create(path).close()
    context = multiprocessing.get_context("fork")
    barrier, wins = context.Barrier(2), context.Array("i", 20)
    racers = [context.Process(target=_race, args=(path, barrier, wins)) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(30)
        assert racer.exitcode == 0
    assert list(wins) == [1] * 20
    with Journal.open(path) as journal:
        assert [r.epoch for r in journal.records()] == list(range(20))


def test_a_forked_child_takes_a_lock_of_its_own(tmp_path: Path) -> None:
    journal = Journal.create(tmp_path / "journal")
    journal.append("parent", {}, epoch=1)
    context = multiprocessing.get_context("fork")
    child = context.Process(target=journal.append, args=("child", {}), kwargs={"epoch": 1})
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert [r.kind for r in journal.records()] == ["parent", "child"]


@pytest.mark.parametrize("n", [1, 2])
def test_a_full_disk_is_said_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    path = tmp_path / "journal"
    records = written(path, SOME)
    before = path.read_bytes()
    journal = Journal.open(path)
    monkeypatch.setenv("DRIVETRAIN_FAULT_WRITE", f"enospc:journal.write:{n}")
    with pytest.raises(StoreError, match="full"):
        journal.append("x", {"y": "z" * 100}, epoch=9)
    assert path.read_bytes() == before
    assert journal.append("after", {}, epoch=9).seq == len(records) + 1  # room again: it goes on


def test_after_a_failed_fsync_the_journal_is_unusable_and_nobody_sees_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal"
    records = written(path, SOME)
    journal, other = Journal.open(path), Journal.open(path)
    monkeypatch.setenv("DRIVETRAIN_FAULT_WRITE", "eio:journal.sync:1")
    with pytest.raises(StoreError, match="fsync failed"):
        journal.append("commit", {}, epoch=9)
    assert other.records() == records
    for call in (journal.records, journal.refresh, lambda: journal.append("x", {}, epoch=9)):
        with pytest.raises(StoreError, match=r"unusable.*fsync"):
            call()


def test_records_have_a_size_limit(tmp_path: Path) -> None:
    with Journal.create(tmp_path / "journal") as journal:
        journal.append("big", {"x": b"x" * (RECORD_LIMIT - 100)}, epoch=1)
        with pytest.raises(StoreError, match="limit"):
            journal.append("big", {"x": b"x" * RECORD_LIMIT}, epoch=1)
        assert len(journal.records()) == 1


def test_wrong_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    with pytest.raises(StoreError, match="no journal"):
        Journal.open(path)
    path.write_bytes(b"something else entirely")
    with pytest.raises(StoreError, match="not a journal"):
        Journal.open(path)
    with pytest.raises(StoreError, match="already"):
        Journal.create(path)


def test_a_lock_held_for_ever_ends_in_an_error(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    holder = Journal.create(path)
    waiter = Journal.open(path, lock_timeout_s=0.05)
    held = pytest.raises(StoreError, match="locked by another process")
    with holder._locked(fcntl.LOCK_EX), held:
        waiter.append("x", {}, epoch=1)
    waiter.append("x", {}, epoch=1)


def test_a_journal_cut_from_outside_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    written(path, SOME)
    journal = Journal.open(path)
    os.truncate(path, 40)
    with pytest.raises(StoreError, match="cut from outside"):
        journal.records()


CRASHES = {  # point -> how many records the next reader sees after a crash in the second append
    "journal.write": (1,),
    "journal.torn": (1,),
    "journal.sync": (2,),
    "journal.synced": (2,),
}


@pytest.mark.parametrize("point", sorted(CRASHES))
def test_killed_while_appending_the_record_counts_or_does_not(tmp_path: Path, point: str) -> None:
    path = tmp_path / "journal"
    script = (
        "import sys, pathlib; from drivetrain.store.journal import Journal;"
        "j = Journal.create(pathlib.Path(sys.argv[1])); j.append('a', {}, epoch=1);"
        "j.append('b', {'x': 'y' * 99}, epoch=1)"
    )
    env = os.environ | {"DRIVETRAIN_HOME": str(tmp_path), "DRIVETRAIN_CRASH_AT": f"{point}:2"}
    done = subprocess.run([sys.executable, "-c", script, str(path)], env=env, timeout=60)
    assert done.returncode == -signal.SIGKILL
    with Journal.open(path) as journal:
        count = len(journal.records())
        assert count in CRASHES[point]
        assert journal.append("c", {}, epoch=2).seq == count + 1
    with Journal.open(path) as journal:
        assert len(journal.records()) == count + 1

"""Durable writes are all or nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from drivetrain.errors import BadInput, StoreError
from drivetrain.store.files import write_at, write_durably


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_durably(path, [b"one", memoryview(b"two"), b""])
    assert path.read_bytes() == b"onetwo"
    assert path.stat().st_mode & 0o777 == 0o600
    write_durably(path, iter([b"three"]))
    assert path.read_bytes() == b"three"
    assert os.listdir(tmp_path) == ["f"]


def test_more_parts_than_one_system_call_takes(tmp_path: Path) -> None:
    parts = [bytes([i % 256]) * (i % 3) for i in range(5000)]
    with open(tmp_path / "f", "wb") as file:
        assert write_at(file.fileno(), parts, 7, name="t") == len(b"".join(parts))
    assert (tmp_path / "f").read_bytes() == bytes(7) + b"".join(parts)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("enospc:t.write:2", "full"),
        ("eio:t.write:1", "EIO"),
        ("eio:t.sync:1", "EIO"),
        ("enospc:t.sync:1+", "full"),
    ],
)
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, says: str
) -> None:
    path = tmp_path / "f"
    write_durably(path, [b"old"], name="t")
    monkeypatch.setenv("DRIVETRAIN_FAULT_WRITE", fault)
    with pytest.raises(StoreError, match=says):
        write_durably(path, [b"new", b"er"], name="t")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_fault_with_a_role_spares_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVETRAIN_FAULT_WRITE", "enospc:target@t.write:1+")
    write_durably(tmp_path / "f", [b"x"], name="t")
    monkeypatch.setenv("DRIVETRAIN_ROLE", "target")
    with pytest.raises(StoreError):
        write_durably(tmp_path / "f", [b"y"], name="t")


def test_a_malformed_fault_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVETRAIN_FAULT_WRITE", "full:t:1")
    with pytest.raises(BadInput, match="DRIVETRAIN_FAULT_WRITE"):
        write_durably(tmp_path / "f", [b"x"], name="t")


@pytest.mark.parametrize("point", ["files.sync", "files.rename", "files.dirsync", "files.done"])
def test_a_crash_leaves_the_old_file_or_the_new_one(tmp_path: Path, point: str) -> None:
    path = tmp_path / "f"
    write_durably(path, [b"old"])
    script = (
        "import sys, pathlib; from drivetrain.store.files import write_durably;"
        "write_durably(pathlib.Path(sys.argv[1]), [b'new'])"
    )
    env = os.environ | {"DRIVETRAIN_HOME": str(tmp_path), "DRIVETRAIN_CRASH_AT": f"{point}:1"}
    done = subprocess.run([sys.executable, "-c", script, str(path)], env=env, timeout=60)
    assert done.returncode == -signal.SIGKILL
    expected = b"old" if point in ("files.sync", "files.rename") else b"new"
    assert path.read_bytes() == expected

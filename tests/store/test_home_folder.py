"""The state folder: private, local, with short socket paths."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from drivetrain.errors import BadInput
from drivetrain.store import home as homes


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "state"
    monkeypatch.setenv("DRIVETRAIN_HOME", str(path))
    monkeypatch.delenv("DRIVETRAIN_FAULT_STATFS", raising=False)
    return path


def test_home_is_created_private_and_left_clean(at: Path) -> None:
    assert homes.home() == at
    assert at.stat().st_mode & 0o777 == 0o700
    assert list(at.iterdir()) == []


@pytest.mark.parametrize(
    "magic", ["0x6969", "0xFF534D42", "0xFE534D42", "0x517B", "0x65735546", "0x01021997"]
)
def test_an_explicit_home_on_a_network_file_system_is_bad_input(
    at: Path, monkeypatch: pytest.MonkeyPatch, magic: str
) -> None:
    monkeypatch.setenv("DRIVETRAIN_FAULT_STATFS", magic)
    with pytest.raises(BadInput, match=r"DRIVETRAIN_HOME=.*network file system"):
        homes.home()


def test_a_full_disk_does_not_make_another_folder_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its jobs would seem to be gone, and could be neither shown nor stopped."""

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for explicit in ("", str(tmp_path / "explicit")):
        monkeypatch.setenv("DRIVETRAIN_HOME", explicit)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / f"state-of-{bool(explicit)}"))
        wanted = Path(explicit) if explicit else tmp_path / "state-of-False" / "drivetrain"
        assert homes.home() == wanted
        assert list(wanted.iterdir()) == []


def test_a_local_file_system_passes(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVETRAIN_FAULT_STATFS", "0xEF53")  # ext4
    assert homes.home() == at


def test_a_default_home_on_a_network_file_system_falls_back_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DRIVETRAIN_HOME", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "net"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("DRIVETRAIN_FAULT_STATFS", "0x6969")
    assert homes.home() == tmp_path / "drivetrain"
    assert homes.home() == tmp_path / "drivetrain"
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "NFS" in said
    assert "DRIVETRAIN_HOME" in said


def test_a_fallback_that_somebody_else_prepared_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "drivetrain").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tmp").mkdir()
    monkeypatch.delenv("DRIVETRAIN_HOME", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "net"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(homes.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setenv("DRIVETRAIN_FAULT_STATFS", "0x6969")
    assert homes.home() == tmp_path / "tmp" / f"drivetrain-{os.geteuid()}"
    capsys.readouterr()


def test_a_home_that_others_can_write_is_refused(at: Path) -> None:
    at.mkdir()
    (at / "something").touch()
    at.chmod(0o777)
    with pytest.raises(BadInput, match="chmod go-w"):
        homes.home()


def test_a_file_in_the_place_of_home_is_bad_input(at: Path) -> None:
    at.touch()
    with pytest.raises(BadInput, match="DRIVETRAIN_HOME"):
        homes.home()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give folders away")
def test_a_home_of_somebody_else_is_refused(at: Path) -> None:
    at.mkdir(mode=0o700)
    os.chown(at, 65534, 65534)
    with pytest.raises(BadInput, match="belongs to user 65534"):
        homes.home()


@pytest.mark.parametrize("bad", ["", "../x", "a/b", ".hidden", "a" * 65, "a\0b"])
def test_a_job_id_cannot_leave_the_folder(at: Path, bad: str) -> None:
    with pytest.raises(BadInput):
        homes.job_dir(bad)


def test_job_folders(at: Path) -> None:
    assert homes.job_dir("j-1") == at / "jobs" / "j-1"
    assert not homes.job_dir("j-1").exists()
    assert homes.job_dir("j-1", create=True).stat().st_mode & 0o777 == 0o700


def test_sockets_can_be_bound_below_a_long_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for depth in (0, 4):
        home = tmp_path.joinpath(*["d" * 30] * depth, "h")
        monkeypatch.setenv("DRIVETRAIN_HOME", str(home))
        path = Path(homes.socket_path("job-0123456789.sock"))
        assert str(path) == homes.socket_path("job-0123456789.sock")
        assert len(os.fsencode(path)) <= 107
        assert path.parent.stat().st_mode & 0o777 == 0o700
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
        path.unlink()
        if depth:
            assert not path.is_relative_to(home)
            path.parent.rmdir()

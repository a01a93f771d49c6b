"""What cannot be meant is refused with a clear message, exit 2, and nothing changed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest

from .conftest import LIMIT_S, SCRIPT, Home, waiting_target

Unmoved = Callable[..., dict[str, Any]]
ROOT = os.geteuid() == 0


def refused(home: Home, *words: str, says: str, env: dict[str, str] | None = None) -> str:
    """The message of a command that must exit 2 and say ``says``, without a traceback."""
    done = home.drivetrain(*words, env=env)
    assert done.returncode == 2, (words, done.returncode, done.stderr)
    assert says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("  ")]
    assert all(line.startswith("drivetrain: ") for line in lines), done.stderr
    return done.stderr


def journal(home: Home) -> bytes:
    job = home.job()
    assert job is not None
    return (job.directory / "journal").read_bytes()


RUN_REFUSED = [
    (("--on", "cuda:97"), "cuda:97"),
    (("--on", "toaster:0"), "toaster:0"),
    (("--on", "cpu"), "cpu"),
    (("--standby", "cpu:9"), "cpu:9"),
    (("--backup", "cpu:9"), "cpu:9"),
    (("--prefer", "nosuchvendor", "--strict"), "nosuchvendor"),
    (("--memory", "lots"), "lots"),
    (("--memory", "900T"), "memory"),
    (("--seed", "-1"), "--seed"),
    (("--replicate-every", "0"), "--replicate-every"),
    (("--replicas", "maybe"), "--replicas"),
    (("--checkpoint-every", "soon"), "soon"),
    (("--checkpoint-every", "0"), "--checkpoint-every"),
    (("--grace", "never"), "never"),
    (("--orphan", "adopt"), "--orphan"),
    (("--name", "a b"), "a b"),
    (("--env", "no-such-environment"), "no-such-environment"),
    (("--resume", "nosuchjob"), "--resume"),
]


@pytest.mark.parametrize(
    ("options", "says"), RUN_REFUSED, ids=[" ".join(options) for options, _ in RUN_REFUSED]
)
def test_a_run_is_refused(home: Home, options: tuple[str, ...], says: str) -> None:
    refused(home, "run", *options, str(SCRIPT), says=says)
    assert home.records() == []
    assert not list((home.state / "jobs").iterdir()) if (home.state / "jobs").exists() else True


@pytest.mark.soak
def test_other_runs_are_refused(home: Home) -> None:
    refused(home, "run", "no/such/script.py", says="no/such/script.py")
    refused(home, "run", str(home.folder), says=str(home.folder))
    refused(home, "run", says="give a script")
    refused(home, "run", "--resume", "nosuchjob", says="nosuchjob")
    refused(home, "run", "--resume-or-start", "nosuchjob", says="nosuchjob")
    refused(home, "run", str(SCRIPT), says="rank", env={"WORLD_SIZE": "2"})
    refused(home, "run", str(SCRIPT), says="NFS", env={"DRIVETRAIN_FAULT_STATFS": "0x6969"})
    for command in ("show", "pause", "resume", "stop", "logs"):
        refused(home, command, "nosuchjob", says="nosuchjob")
    refused(home, "migrate", "nosuchjob", "--to", "cpu:1", says="nosuchjob")
    refused(home, "prune", "--keep", "-1", says="--keep")
    assert home.records() == []


def test_an_environment_without_torch_is_refused_with_the_install_line(home: Home) -> None:
    folder = home.folder / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    said = refused(home, "run", "--env", str(folder), str(SCRIPT), says="torch")
    assert "-m pip install" in said
    assert str(folder) in said
    assert home.records() == []


def test_what_cannot_be_meant_leaves_the_job_alone(home: Home) -> None:
    hosted = home.run("--on", "cpu:0", "--name", "j", "--replicate-every", "1")
    pid = home.wait_step(3, "j")
    before = journal(home)
    refused(home, "migrate", "j", "--to", "cpu:97", says="cpu:97")
    refused(home, "migrate", "j", "--to", "", says="")
    refused(home, "migrate", "j", "--to", "cpu:0", says="cpu:0 already")
    refused(home, "migrate", "j", "--to", "cpu:1", "--strategy", "teleport", says="immediate")
    said = refused(home, "migrate", "j", "--to", "cpu:1", "--strategy", "gradual", says="not built")
    assert "checkpointed" in said
    refused(home, "migrate", "j", "--to", "cpu:1", "--max-downtime", "0", says="--max-downtime")
    refused(home, "pause", "j", "--to-disk", says="--release")
    refused(home, "resume", "j", says="not paused")
    refused(home, "resume", "j", "--on", "cpu:97", says="cpu:97")
    refused(home, "run", "--resume", "j", says="alive")
    assert journal(home) == before
    assert home.wait_step(4, "j") == pid
    if ROOT:  # who alone can give a folder away
        somebody_else_cannot(home)
    home.go.touch()
    assert hosted.wait() == 0
    an_ended_job_cannot(home)


def somebody_else_cannot(home: Home) -> None:
    job = home.job("j")
    assert job is not None
    os.chown(job.directory, 12345, 12345)
    try:
        for words in (("show", "j"), ("pause", "j"), ("stop", "j"), ("run", "--resume", "j")):
            refused(home, *words, says="not yours")
    finally:
        os.chown(job.directory, 0, 0)


def an_ended_job_cannot(home: Home) -> None:
    before = journal(home)
    for words in (
        ("migrate", "j", "--to", "cpu:1"),
        ("pause", "j"),
        ("resume", "j"),
        ("stop", "j"),
        ("run", "--resume", "j"),
    ):
        refused(home, *words, says="has ended")
    assert journal(home) == before


@pytest.mark.soak
def test_a_second_move_while_one_runs_is_refused(home: Home) -> None:
    go = home.folder / "target may"
    script = waiting_target(home.folder, go)
    hosted = home.run("--on", "cpu:0", "--name", "j", script=script, args=("--go", str(home.go)))
    home.wait_step(3, "j")
    first = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from drivetrain.cli.main import main; main()",
            "migrate",
            "j",
            "--to",
            "cpu:1",
        ],
        env=home.env,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    home.wait_state("moving", "j")
    refused(home, "migrate", "j", "--to", "cpu:1", says="busy")
    go.touch()
    assert first.wait(LIMIT_S) == 0
    job = home.job("j")
    assert job is not None
    assert [move["ok"] for move in job.view.moves] == [True]
    home.go.touch()
    assert hosted.wait() == 0


def test_a_target_with_too_little_memory_is_refused(home: Home) -> None:
    facts = json.loads(home.ok("devices", "--json"))["devices"][0]
    most = int(facts["free_bytes"] * 0.6)
    hosted = home.run("--on", "cpu:0", "--name", "j", "--memory", str(most))
    pid = home.wait_step(3, "j")
    before = journal(home)
    refused(home, "migrate", "j", "--to", "cpu:1", says="too little memory")
    assert journal(home) == before
    assert home.wait_step(4, "j") == pid
    home.go.touch()
    assert hosted.wait() == 0


# -- damage ---------------------------------------------------------------------------------------


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset % len(data)] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    "which", ["state.safetensors", pytest.param("manifest.json", marks=pytest.mark.soak)]
)
def test_a_checkpoint_with_one_flipped_byte_is_refused(
    home: Home, unmoved: Unmoved, which: str
) -> None:
    hosted = home.run("--on", "cpu:0", "--name", "j")
    home.wait_step(5, "j")
    hosted.process.send_signal(signal.SIGTERM)
    assert hosted.wait() == 75, hosted.err
    job = home.job("j")
    assert job is not None
    path = Path(job.view.released["path"]) / which  # type: ignore[index]
    before, dice = journal(home), random.Random(3)
    for _ in range(3):
        offset = dice.randrange(path.stat().st_size)
        flip(path, offset)
        refused(home, "run", "--resume", "j", says="damaged")
        flip(path, offset)
    assert journal(home) == before
    home.go.touch()
    again = home.run("--resume", "j", script=None)  # the control: whole again, it goes on
    assert again.wait() == 0, again.err
    assert again.result() == unmoved()


# -- a full disk ----------------------------------------------------------------------------------


@pytest.mark.soak
def test_a_full_disk_changes_nothing(home: Home, unmoved: Unmoved) -> None:
    fault = {"DRIVETRAIN_FAULT_WRITE": "enospc:checkpoint.data:1+"}
    hosted = home.run("--on", "cpu:0", "--name", "j", env=fault)
    pid = home.wait_step(3, "j")
    refused(home, "migrate", "j", "--to", "cpu:1", "--strategy", "checkpointed", says="full")
    assert home.wait_step(home.job("j").step + 2, "j") == pid  # type: ignore[union-attr]
    refused(home, "pause", "j", "--release", "--to-disk", says="full")
    assert home.wait_step(home.job("j").step + 2, "j") == pid  # type: ignore[union-attr]
    job = home.job("j")
    assert job is not None
    assert job.view.checkpoints == []
    home.go.touch()
    assert hosted.wait() == 0
    assert hosted.result() == unmoved()
    home.assert_nothing_left()


def test_a_job_is_not_begun_on_a_full_disk(home: Home) -> None:
    for name in ("journal.create.write", "journal.write"):
        fault = {"DRIVETRAIN_FAULT_WRITE": f"enospc:{name}:1+"}
        refused(home, "run", str(SCRIPT), says="full", env=fault)
        assert home.records() == []
        assert list((home.state / "jobs").iterdir()) == []


def fill(file: IO[bytes]) -> None:
    """Write until the disk takes no more."""
    with contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.skipif(not ROOT, reason="mounting a small tmpfs needs root; the fault layer is above")
def test_a_really_full_disk_changes_nothing(home: Home) -> None:
    home.state.mkdir(mode=0o700)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", str(home.state)], check=False
    )
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        hosted = home.run("--on", "cpu:0", "--name", "j", args=("--width", "512"))
        pid = home.wait_step(3, "j")
        ballast = home.state / "ballast"
        with ballast.open("wb", buffering=0) as file:
            fill(file)
        for words in (("pause", "j", "--release", "--to-disk"), ("run", str(SCRIPT))):
            refused(home, *words, says="the disk (or quota)")
        assert home.wait_step(home.job("j").step + 2, "j") == pid  # type: ignore[union-attr]
        assert home.summary("j")["state"] == "running"
        home.ok("pause", "j")
        home.ok("resume", "j")
        ballast.unlink()
        home.ok("stop", "j")
        hosted.wait()
    finally:
        home.stop_everything()
        for _ in range(50):
            if subprocess.run(["umount", str(home.state)], check=False).returncode == 0:
                break
            time.sleep(0.1)

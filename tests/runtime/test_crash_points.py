"""Whoever is killed wherever: one copy goes on, and the end is that of the unmoved run.

The names of the points come from the code, so a new one without a row in REACHED fails here. Every
point is passed by some process of a journey (two moves, checkpoints, a pause, a release); the
process that passes it in the given role is killed there. A lost worker comes back by itself; after
the loss of the runtime `drivetrain run --resume` takes over. `make test` runs a fixed sample,
`make soak` every point and role.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from drivetrain.store.crash import crash_points

from .conftest import LIMIT_S, Home, Hosted, until

ANY = ("source", "target", "runtime")
JOURNAL = ("source", "runtime")
SOURCE, TARGET, RUNTIME = ("source",), ("target",), ("runtime",)
BOTH = ("source", "target")

# The roles that reach each point in a journey.
REACHED: dict[str, tuple[str, ...]] = {
    "checkpoint.data": SOURCE,
    "checkpoint.data.sync": SOURCE,
    "checkpoint.dirsync": SOURCE,
    "checkpoint.done": SOURCE,
    "checkpoint.manifest": SOURCE,
    "checkpoint.prune": SOURCE,
    "checkpoint.pruned": SOURCE,
    "checkpoint.record": SOURCE,
    "checkpoint.rename": SOURCE,
    "checkpoint.temporary.dirsync": SOURCE,
    "commit.after": RUNTIME,
    "commit.before": RUNTIME,
    "commit.fenced": RUNTIME,
    "failover.restored": RUNTIME,
    "files.dirsync": SOURCE,
    "files.done": SOURCE,
    "files.rename": SOURCE,
    "files.sync": SOURCE,
    "home.probe": ANY,
    "journal.create.dirsync": RUNTIME,
    "journal.create.sync": RUNTIME,
    "journal.create.write": RUNTIME,
    "journal.created": RUNTIME,
    "journal.sync": JOURNAL,
    "journal.synced": JOURNAL,
    "journal.torn": JOURNAL,
    "journal.write": JOURNAL,
    "move.copying": RUNTIME,
    "move.switched": RUNTIME,
    "pause.released": RUNTIME,
    "pause.saved": RUNTIME,
    "replica.announce": SOURCE,
    "replica.begin": SOURCE,
    "runtime.hosting": RUNTIME,
    "runtime.spawn": RUNTIME,
    "runtime.submitted": RUNTIME,
    "runtime.target_started": RUNTIME,
    "slot.close": SOURCE,
    "slot.closed": SOURCE,
    "slot.open": SOURCE,
    "slot.opened": SOURCE,
    "socket.bound": ANY,
    "socket.named": ANY,
    "source.paused": SOURCE,
    "source.resumed": SOURCE,
    "source.sending": SOURCE,
    "source.sent": SOURCE,
    "target.received": TARGET,
    "target.receiving": TARGET,
    "target.restored": TARGET,
    "worker.end": SOURCE,
    "worker.ended": SOURCE,
    "worker.exit": SOURCE,
    "worker.hello": BOTH,
    "worker.owner": SOURCE,
}
# Points that need something else to go wrong first, each with what makes it reached.
SPECIAL: dict[str, str] = {
    "journal.cut": "source@journal.torn:2,runtime@journal.cut:1",
    "worker.adopted": "runtime@commit.fenced:2,source@worker.adopted:1",
    "worker.orphaned": "runtime@runtime.target_started:1,source@worker.orphaned:1",
    "worker.reclaim": "runtime@commit.before:2,source@worker.reclaim:1",
}
# Not reached by a job that runs to its end.
ELSEWHERE = {
    "checkpoint.replace": "tests/migration/test_checkpoint.py: a damaged one of the same step",
    "source.released": "test_stop_survives below",
}
# Later passes of points where it matters which record, frame or worker it is.
LATER = {
    "journal.torn": (6, 12, 20),
    "journal.synced": (5, 9, 14, 18, 22, 26),
    "commit.before": (2, 3, 4),
    "commit.after": (2, 3, 4),
    "commit.fenced": (2, 3, 4),
    "runtime.spawn": (2, 4),
    "runtime.target_started": (2, 3),
    "slot.close": (100, 101),
    "worker.owner": (1,),
}
# Where the runtime and the only copy of the newest state die together: back to a checkpoint.
TO_CHECKPOINT = ("worker.orphaned", "worker.adopted", "worker.reclaim")


def cases() -> list[str]:
    found = [f"{role}@{name}:1" for name, roles in REACHED.items() for role in roles]
    found += [
        f"{role}@{name}:{n}"
        for name, ns in LATER.items()
        for n in ns
        if n > 1
        for role in REACHED[name]
        if role != "target" and (role == "runtime" or name.startswith("slot"))
    ]
    return sorted(found) + sorted(SPECIAL.values())


SAMPLE = ["runtime@commit.before:2", SPECIAL["worker.reclaim"]]
JOURNEY = (
    ("migrate", "j", "--to", "cpu:1"),
    ("migrate", "j", "--to", "cpu:0", "--strategy", "checkpointed"),
    ("pause", "j"),
    ("resume", "j"),
    ("pause", "j", "--release"),
    ("resume", "j", "--on", "cpu:1"),
)
SETTLED = ("running", "paused", "done", "failed")
FLAGS = ("--on", "cpu:0", "--name", "j", "--replicate-every", "1", "--checkpoint-every", "1")


def test_every_point_of_the_code_has_a_row() -> None:
    assert {*REACHED, *SPECIAL, *ELSEWHERE} == set(crash_points())


def fired(home: Home) -> set[str]:
    folder = home.state / "crash-markers"
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def deaths(home: Home) -> list[int]:
    """When the crash points were reached, in ns of the monotonic clock."""
    folder = home.state / "crash-markers"
    behind = time.time_ns() - time.monotonic_ns()
    return [path.stat().st_mtime_ns - behind for path in folder.iterdir()]


def told(home: Home, when: str) -> None:
    """`drivetrain jobs` says what is true: owners live, and a job that runs has one."""
    for job in json.loads(home.ok("jobs", "--json"))["jobs"]:
        for worker in job["workers"]:
            assert os.path.exists(f"/proc/{worker['pid']}"), (when, job)
        if job["state"] in ("done", "failed", "stopped", "lost"):
            assert job["workers"] == [], (when, job)


def settle(home: Home, hosted: Hosted) -> Hosted:
    """Until the job runs or has ended, doing only what a person would do."""

    def settled(process: subprocess.Popen[bytes]) -> bool:
        job = home.job("j")
        if process.poll() is not None:
            return True
        if job is None or job.view.runtime is None or not job.view.runtime.alive:
            return False  # begins, or is dying: its first thread ends before the process does
        return job.view.present_state() in SETTLED

    for _ in range(8):
        until(partial(settled, hosted.process), "the job to settle")
        job = home.job("j")
        if hosted.process.poll() is None:
            assert job is not None
            if job.view.present_state() != "paused":
                return hosted
            home.drivetrain("resume", "j")
        elif job is None:
            told(home, "after the runtime's death, without a job")
            hosted = home.run(*FLAGS, env=home.crash)  # it never came to be
        elif job.view.ended:
            return hosted
        else:
            told(home, "after the runtime's death")
            hosted = home.run("--resume", "j", script=None, env=home.crash)
    pytest.fail("the job does not settle")


def travel(home: Home, hosted: Hosted, crash: str) -> Hosted:
    """The journey, up to the point where all crashes of ``crash`` have happened."""
    wanted = len(crash.split(",")) if crash else 99
    for words in JOURNEY:
        hosted = settle(home, hosted) if words[0] != "resume" else hosted
        job = home.job("j")
        if len(fired(home)) >= wanted or (job is not None and job.view.ended):
            break
        if words[0] != "resume":
            home.wait_step((job.step if job else 0) + 3, "j")
        home.drivetrain(*words)
    return settle(home, hosted)


def journey(home: Home, crash: str) -> Hosted:
    home.crash = {"DRIVETRAIN_CRASH_AT": crash}
    hosted = travel(home, home.run(*FLAGS, env=home.crash), crash)
    job = home.job("j")
    if job is not None and not job.view.ended:
        home.wait_step(job.step + 2, "j")
        told(home, "before the end")
    home.go.touch()
    for _ in range(4):
        hosted.process.wait(LIMIT_S)
        job = home.job("j")
        if job is not None and job.view.ended:
            return hosted
        hosted = settle(home, hosted)
    pytest.fail("the job does not end")


def step_log(home: Home) -> list[dict[str, Any]]:
    job = home.job("j")
    assert job is not None
    text = (job.directory / "logs" / "steps.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def check_steps(
    log: list[dict[str, Any]],
    *,
    repeats: int,
    within_s: float = 60.0,
    died_ns: Sequence[int] | None = None,
) -> None:
    """One copy after the other, each step by step, and at most ``repeats`` done again.

    The promise is to go on within 10 seconds of a death; the soaks, which have the machine for
    themselves, hold to it. Without ``died_ns`` each copy is taken to die with its last step.
    """
    seen: list[int] = []
    for before, after in pairwise(log):
        if after["copy"] == before["copy"]:
            assert after["step"] == before["step"] + 1
        else:
            assert after["copy"] not in seen, "a copy went on after another one had"
            seen.append(before["copy"])
            assert after["copy"] > before["copy"]
            assert before["step"] + 1 - repeats <= after["step"] <= before["step"] + 1
            begun = [before["end_ns"]]
            if died_ns is not None:  # a job may be paused, and nobody dead, for longer
                begun = [at for at in died_ns if before["end_ns"] <= at <= after["end_ns"]]
            if begun:
                gap_s = (after["end_ns"] - max(begun)) / 1e9
                assert gap_s < within_s, f"resumed after {gap_s:.1f} s"


def prove(
    home: Home, crash: str, unmoved: Callable[..., dict[str, Any]], *, within_s: float = 60.0
) -> None:
    hosted = journey(home, crash)
    assert len(fired(home)) == len(crash.split(",")), (crash, fired(home), hosted.err)
    assert home.summary("j")["state"] == "done", hosted.err
    outputs = b"".join(
        path.read_bytes() for path in sorted((home.state / "jobs").glob("*/logs/out"))
    )
    lines = [json.loads(line) for line in outputs.splitlines()]
    expected = unmoved()
    assert lines, hosted.err
    assert all(line == expected for line in lines)
    # A copy killed after it had printed prints again: its step is not complete without its end.
    assert len(lines) == 1 or "worker.e" in crash
    lossy = any(name in crash for name in TO_CHECKPOINT)
    check_steps(
        step_log(home), repeats=320 if lossy else 1, within_s=within_s, died_ns=deaths(home)
    )
    told(home, "at the end")
    home.assert_nothing_left()


@pytest.mark.parametrize("crash", SAMPLE)
def test_a_kill_at_a_sampled_point(
    home: Home, unmoved: Callable[..., dict[str, Any]], crash: str
) -> None:
    prove(home, crash, unmoved)


@pytest.mark.soak
@pytest.mark.parametrize("crash", [c for c in cases() if c not in SAMPLE])
def test_a_kill_at_every_point(
    home: Home, unmoved: Callable[..., dict[str, Any]], crash: str
) -> None:
    prove(home, crash, unmoved, within_s=10.0)


@pytest.mark.soak
def test_the_journey_reaches_what_the_table_says(home: Home, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    home.crash = {"DRIVETRAIN_CRASH_TRACE": str(trace)}
    hosted = travel(home, home.run(*FLAGS, env=home.crash), "")
    home.go.touch()
    assert hosted.wait() == 0
    reached: dict[str, set[str]] = {}
    for line in set(trace.read_text().split()):
        role, _, name = line.partition("@")
        reached.setdefault(name, set()).add(role)
    assert {name: set(roles) for name, roles in REACHED.items()} == reached


@pytest.mark.soak
@pytest.mark.parametrize(
    "crash",
    ["runtime@move.copying:1", "source@source.sending:4", "target@target.receiving:2"],
)
def test_a_large_state_does_not_wait_for_the_dead(
    home: Home, unmoved: Callable[..., dict[str, Any]], crash: str
) -> None:
    """The copy is larger than the ring, so each side waits for the other in mid-copy."""
    args = ("--width", "500000", "--steps", "40", "--delay", "0.5")  # the second half is slower
    hosted = home.run(*FLAGS[:4], args=args, env={"DRIVETRAIN_CRASH_AT": crash})
    home.wait_step(3, "j")
    moved = home.drivetrain("migrate", "j", "--to", "cpu:1")
    assert moved.returncode == 1
    assert len(fired(home)) == 1
    job = home.job("j")
    assert job is not None
    if hosted.process.poll() is not None:
        hosted = home.run("--resume", "j", script=None)
    home.wait_step(job.step + 1, "j")
    home.go.touch()
    assert hosted.wait(120) == 0
    assert hosted.result() == unmoved(*args[:4])
    log = step_log(home)
    check_steps(log, repeats=16)
    for died in deaths(home):  # of the copy that trains, or of another one that it waits for
        gap_s = min(step["end_ns"] - died for step in log if step["end_ns"] > died) / 1e9
        assert gap_s < 10, f"it goes on {gap_s:.1f} s after the death"
    home.assert_nothing_left()


def test_stop_survives_the_death_of_the_worker(home: Home) -> None:
    hosted = home.run(*FLAGS, env={"DRIVETRAIN_CRASH_AT": "source@source.released:1"})
    home.wait_step(5, "j")
    home.ok("stop", "j")
    hosted.wait()
    assert len(fired(home)) == 1
    assert home.summary("j")["state"] == "stopped"
    home.assert_nothing_left()


# -- the controls: what must be noticed is noticed ------------------------------------------------


def test_a_dropped_sample_and_a_missing_seed_change_the_result(
    home: Home, unmoved: Callable[..., dict[str, Any]]
) -> None:
    expected = unmoved()
    dropped = unmoved("--drop", "100")
    assert dropped["fold"] != expected["fold"]
    assert unmoved("--unseeded")["hash"] != expected["hash"]


def test_steps_done_twice_or_by_two_copies_are_noticed() -> None:
    def step(n: int, copy: int) -> dict[str, Any]:
        return {"step": n, "copy": copy, "end_ns": n * 10**7}

    fine = [step(1, 1), step(2, 1), step(2, 2), step(3, 2)]
    check_steps(fine, repeats=1)
    for bad in (
        [step(1, 1), step(3, 1)],  # lost
        [step(1, 1), step(2, 1), step(4, 2)],  # lost between copies
        [step(3, 1), step(2, 2)],  # two repeated
        [step(1, 1), step(1, 2), step(2, 1)],  # the old copy went on
    ):
        with pytest.raises(AssertionError):
            check_steps(bad, repeats=1)
    late = [step(1, 1), {"step": 2, "copy": 2, "end_ns": 20 * 10**9}]
    check_steps(late, repeats=1, within_s=10, died_ns=[12 * 10**9])  # it was paused before
    with pytest.raises(AssertionError, match="resumed after"):
        check_steps(late, repeats=1, within_s=10, died_ns=[5 * 10**9])


def test_a_random_kill_is_not_survived_without_a_runtime(home: Home) -> None:
    """The control of recovery itself: nobody there, nobody goes on, and `jobs` says lost."""
    hosted = home.run(*FLAGS)
    pid = home.wait_step(5, "j")
    hosted.process.kill()
    hosted.process.wait()
    os.kill(pid, signal.SIGKILL)
    until(lambda: home.summary("j")["state"] == "lost", "the job to be lost")

"""Losing a worker, a device, or the runtime; and what is the script's own fault."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.migration.segment import Slot, newest_first
from drivetrain.runtime.process import MARK
from drivetrain.runtime.status import StatusPage
from drivetrain.store.database import Database
from drivetrain.store.journal import Journal
from drivetrain.store.process import ProcessId

from .conftest import LIMIT_S, MAIN, Home, carrying, replicas_of, until, waiting_target
from .test_crash_points import check_steps, step_log

Unmoved = Callable[..., dict[str, Any]]
JOB = ("--on", "cpu:0", "--name", "j", "--replicate-every", "1")


def owner(home: Home) -> tuple[int, str]:
    """The owner's pid and its mark in the environment of all that it started."""
    pid = home.wait_step(3, "j")
    job = home.job("j")
    assert job is not None
    return pid, f"{MARK}={job.view.worker_key}"


def failovers(home: Home) -> list[dict[str, Any]]:
    job = home.job("j")
    return [] if job is None else job.view.failovers


def starts(home: Home) -> int:
    """How many workers were started before the newest failover."""
    job = home.job("j")
    assert job is not None
    with Journal.open(job.directory / "journal") as journal:
        records = journal.records()
    last = max(i for i, record in enumerate(records) if record.kind == "failover")
    before = [record.data["key"] for record in records[:last] if record.data.get("key")]
    return len(set(before))


def lose_worker(home: Home, count: int = 1) -> dict[str, Any]:
    """SIGKILL the owner and wait for the failover's report, number ``count``."""
    pid, _ = owner(home)
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(failovers(home)) >= count, "the failover")
    return failovers(home)[-1]


# -- a worker dies --------------------------------------------------------------------------------


QUICK_STEPS = """
import os, signal, sys
import torch
from drivetrain import TrainingJob

model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
run = TrainingJob(model, optimizer, [torch.ones(1, 2)] * 400, epochs=1)
for step in run:
    with step as batch:
        model(batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step.index == 175 and not step.dry and not os.path.exists(sys.argv[1]):
            open(sys.argv[1], "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_log_of_quick_steps_has_no_gap_where_a_worker_was_killed(home: Home) -> None:
    """Their lines are written together, and before each replica."""
    path = home.folder / "quick.py"
    path.write_text(QUICK_STEPS)
    killed = home.folder / "killed"
    options = ("--on", "cpu:0", "--name", "j", "--replicate-every", "50")
    hosted = home.run(*options, script=path, args=(str(killed),))
    assert hosted.wait() == 0, hosted.err
    assert killed.exists()
    log = step_log(home)
    assert len({line["copy"] for line in log}) == 2
    assert {line["step"] for line in log} == set(range(1, 401))
    check_steps(log, repeats=50)


@pytest.mark.soak
def test_a_killed_worker_comes_back_with_all_that_it_started_gone(
    home: Home, unmoved: Unmoved
) -> None:
    args = ("--workers", "2", "--steps", "64")
    hosted = home.run(*JOB, args=("--child", "--delay", "0.2", *args))
    _, mark = owner(home)
    before = carrying(mark.encode())
    assert len(before) >= 4  # itself, two loader workers, one child of the script
    report = lose_worker(home)
    until(lambda: not carrying(mark.encode()), "the lost worker's children to be gone")
    assert report["from"] == "cpu:0"
    assert report["to"] == "cpu:1"
    assert report["steps_repeated"] <= 1
    assert report["resumed_ms"] > 0
    assert (report["samples_lost"], report["samples_doubled"]) == (0, 0)
    home.go.touch()
    assert hosted.wait() == 0
    assert hosted.result() == unmoved(*args)
    check_steps(step_log(home), repeats=1)
    home.assert_nothing_left()


def lose_worker_with_damage(home: Home, count: int) -> tuple[list[int], dict[str, Any]]:
    """Flip a byte in the ``count`` newest replicas of the owner, then kill it.

    Gives the steps of the two replicas, newest first, and the failover's report.
    """
    pid, _ = owner(home)
    slots: list[Slot] = []

    def both_count() -> bool:
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.05)
        os.kill(pid, signal.SIGSTOP)
        until(stopped, "the owner to stand still")
        for slot in slots:
            slot.close()
        slots[:] = [attached(link) for link in replicas_of(pid)]
        slots[:] = newest_first(slots)
        return len(slots) == 2

    def stopped() -> bool:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("T")

    def attached(link: Path) -> Slot:
        fd = os.open(link, os.O_RDWR)
        try:
            return Slot.attach(fd)
        finally:
            os.close(fd)

    until(both_count, "two whole replicas")
    steps = [slot.read()[0] for slot in slots]
    for slot in slots[:count]:
        image = slot.image()
        image[len(image) // 2] ^= 1
    os.kill(pid, signal.SIGKILL)
    for slot in slots:
        slot.close()
    until(lambda: failovers(home), "the failover")
    return steps, failovers(home)[-1]


@pytest.mark.soak
@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_a_flipped_byte_in_a_replica_is_named_and_the_next_best_is_used(
    home: Home, unmoved: Unmoved, damaged: int
) -> None:
    hosted = home.run(*JOB, "--checkpoint-every", "0.5")

    def saved() -> list[dict[str, Any]]:
        job = home.job("j")
        return [] if job is None else job.view.checkpoints

    until(saved, "a checkpoint")
    steps, report = lose_worker_with_damage(home, damaged)
    if damaged < 2:
        assert report["step"] == steps[damaged]
    else:
        assert report["step"] in [found["step"] for found in saved()]
    home.go.touch()
    assert hosted.wait() == 0
    assert hosted.result() == unmoved()
    named = [f"the saved state of step {step} does not match its hash" for step in steps]
    assert [line in hosted.err for line in named] == [damaged > 0, damaged > 1]
    assert (f"going on from the replica of step {steps[1]}" in hosted.err) == (damaged == 1)
    assert ("the replica cannot be used" in hosted.err) == (damaged == 2)
    home.assert_nothing_left()


@pytest.mark.parametrize("within_ms", [60_000, pytest.param(2000, marks=pytest.mark.soak)])
def test_a_standby_takes_over_within_two_seconds(
    home: Home, unmoved: Unmoved, within_ms: int
) -> None:
    """The quick run does not hold to the time: the machine may be busy with other things."""
    hosted = home.run(*JOB, "--standby", "cpu:1")
    home.wait_step(3, "j")

    home.wait_event("ready", "j", role="standby")
    report = lose_worker(home)
    assert report["to"] == "cpu:1"
    assert report["resumed_ms"] < within_ms
    assert starts(home) == 2  # nobody had to be started for it
    assert report["steps_repeated"] <= 1
    home.go.touch()
    assert hosted.wait() == 0
    assert hosted.result() == unmoved()
    home.assert_nothing_left()


def test_a_paused_job_that_loses_its_worker_stays_paused(home: Home, unmoved: Unmoved) -> None:
    hosted = home.run(*JOB)
    home.wait_step(3, "j")
    home.ok("pause", "j")
    before = home.owners()
    os.kill(before[0], signal.SIGKILL)
    until(lambda: failovers(home), "the failover")
    home.wait_state("paused", "j")
    assert home.owners() != before
    home.ok("resume", "j")
    home.go.touch()
    assert hosted.wait() == 0, hosted.err
    assert hosted.result() == unmoved()
    home.assert_nothing_left()


def test_a_standby_that_has_warmed_up_does_not_start_the_job_over(
    home: Home, unmoved: Unmoved
) -> None:
    """Without anything saved: its model was stepped already, so a fresh copy has to."""
    hosted = home.run(*JOB, "--standby", "cpu:1", "--replicas", "off", "--checkpoint-every", "off")
    home.wait_event("ready", "j", role="standby")
    assert lose_worker(home)["step"] == 0
    home.go.touch()
    assert hosted.wait() == 0, hosted.err
    assert hosted.err.count("the job starts over from step 0") == 1
    assert hosted.result() == unmoved()
    home.assert_nothing_left()


def test_a_job_starts_over_in_a_copy_that_no_damaged_replica_was_read_into(
    home: Home, unmoved: Unmoved
) -> None:
    hosted = home.run(*JOB, "--checkpoint-every", "off")
    _, report = lose_worker_with_damage(home, 2)
    assert report["step"] == 0
    home.go.touch()
    assert hosted.wait() == 0, hosted.err
    assert hosted.err.count("the job starts over from step 0") == 1
    assert hosted.result() == unmoved()
    home.assert_nothing_left()


@pytest.mark.soak
def test_a_standbys_replica_survives_worker_and_runtime(home: Home, unmoved: Unmoved) -> None:
    hosted = home.run(*JOB, "--standby", "cpu:1", "--checkpoint-every", "off")
    pid = home.wait_step(20, "j")

    def holds() -> bool:
        job = home.job("j")
        if job is None or not job.view.standby:
            return False
        return len(replicas_of(job.view.standby["process"]["pid"])) == 2

    home.wait_event("ready", "j", role="standby")
    until(holds, "the standby to hold the replica")
    hosted.process.kill()
    hosted.process.wait()
    os.kill(pid, signal.SIGKILL)
    again = home.run("--resume", "j", script=None)
    home.wait_step(21, "j")
    home.go.touch()
    assert again.wait() == 0, again.err
    assert again.result() == unmoved()
    check_steps(step_log(home), repeats=1)
    home.assert_nothing_left()


@pytest.mark.soak
def test_a_backup_comes_before_other_devices(home: Home) -> None:
    home.run(*JOB, "--backup", "cpu:0")
    assert lose_worker(home)["to"] == "cpu:0"
    home.ok("stop", "j")


def adoptions(home: Home) -> int:
    """How often a worker was taken over by a new runtime."""
    job = home.job("j")
    assert job is not None
    with Journal.open(job.directory / "journal") as journal:
        return sum("adopted" in record.data for record in journal.records())


def kills(
    home: Home,
    count: int,
    unmoved: Unmoved,
    *,
    of_runtime: float,
    steps: str,
    within_s: float = 60.0,
) -> None:
    """``count`` SIGKILLs at random moments, each after a step since the one before."""
    dice = random.Random(count)
    hosted = home.run(*JOB, args=("--steps", steps))
    home.wait_step(3, "j")
    for _ in range(count):
        job = home.job("j")
        assert job is not None
        assert job.page is not None
        base = max(job.page.restored_step, 0)
        pid = until(
            lambda base=base: (
                (now := home.job("j")) is not None
                and now.page is not None
                and now.view.present_state() == "running"
                and now.view.worker is not None
                and now.page.step > base
                and now.page.step > now.page.restored_step
                and now.view.worker.pid
            ),
            "a step since the last kill",
        )
        time.sleep(dice.random() * 0.5)
        if dice.random() < of_runtime:
            hosted.process.kill()
            hosted.process.wait()
            adopted = adoptions(home)
            hosted = home.run("--resume", "j", script=None)
            # Before that the worker's death would be the death of both.
            until(lambda adopted=adopted: adoptions(home) > adopted, "the worker to be adopted")
        else:
            seen = len(failovers(home))
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            until(lambda seen=seen: len(failovers(home)) > seen, "the failover")
            report = failovers(home)[-1]
            assert report["steps_repeated"] <= 1
            assert report["resumed_ms"] < within_s * 1e3
    home.go.touch()
    assert hosted.wait(300) == 0, hosted.err
    job = home.job("j")
    assert job is not None
    lines = (job.directory / "logs" / "out").read_bytes().splitlines()
    assert len(lines) == 1
    check_steps(step_log(home), repeats=1, within_s=within_s)
    assert hosted.result() == unmoved("--steps", steps)
    home.assert_nothing_left()


def test_two_random_kills(home: Home, unmoved: Unmoved) -> None:
    kills(home, 2, unmoved, of_runtime=0.34, steps="640")


@pytest.mark.soak
def test_fifty_random_kills(home: Home, unmoved: Unmoved) -> None:
    began = time.monotonic()
    kills(home, 50, unmoved, of_runtime=0.2, steps="8000", within_s=10.0)
    assert time.monotonic() - began >= 60


# -- whose fault ----------------------------------------------------------------------------------


def test_a_device_error_condemns_the_device_and_the_job_goes_on(
    home: Home, unmoved: Unmoved
) -> None:
    once = str(home.folder / "once")
    hosted = home.run(*JOB, args=("--fault", "lost:20", "--once", once))
    until(lambda: failovers(home), "the failover")
    report = failovers(home)[0]
    assert "DeviceLost" in report["error"]
    assert (report["from"], report["to"]) == ("cpu:0", "cpu:1")
    home.wait_step(25, "j")
    assert lose_worker(home, 2)["to"] == "cpu:1"  # not back to the condemned one
    home.go.touch()
    assert hosted.wait() == 0
    assert hosted.result() == unmoved()


@pytest.mark.parametrize(
    ("fault", "code", "text"),
    [
        ("error", 1, "ValueError: a mistake of the script's own"),
        pytest.param("oom", 1, "CUDA out of memory", marks=pytest.mark.soak),
        pytest.param("assert", 1, "device-side assert", marks=pytest.mark.soak),
        pytest.param("exit", 7, "", marks=pytest.mark.soak),
    ],
)
def test_what_the_script_did_wrong_is_not_repeated(
    home: Home, fault: str, code: int, text: str
) -> None:
    hosted = home.run(*JOB, args=("--fault", f"{fault}:5"))
    assert hosted.wait() == code
    assert text in hosted.err
    if text:
        assert "Traceback" in hosted.err
        assert "drivetrain/runtime/worker.py" not in hosted.err
    job = home.job("j")
    assert job is not None
    assert job.view.failovers == []
    assert job.view.exit is not None
    assert (job.view.exit["state"], job.view.exit["code"]) == ("failed", code)
    home.assert_nothing_left()


@pytest.mark.soak
def test_a_nan_is_said_once_and_stops_nothing(home: Home) -> None:
    hosted = home.run(*JOB, args=("--steps", "40", "--fault", "nan:5,nan:6"))
    home.go.touch()
    assert hosted.wait() == 0
    assert hosted.err.count("is NaN") == 1


@pytest.mark.soak
def test_the_same_step_failing_on_two_devices_stops_the_job(home: Home) -> None:
    hosted = home.run(*JOB, args=("--fault", "lost:20"))
    assert hosted.wait() == 1
    assert "step 21 failed on two devices" in hosted.err
    assert "cpu:0" in hosted.err
    assert "cpu:1" in hosted.err
    assert home.summary("j")["state"] == "failed"
    home.assert_nothing_left()


@pytest.mark.soak
def test_three_fruitless_failovers_stop_the_job(home: Home) -> None:
    hosted = home.run(*JOB, args=("--fault", "late:20"))
    assert hosted.wait() == 1
    assert "3 failovers without a completed step" in hosted.err
    assert len(failovers(home)) == 3
    assert home.summary("j")["state"] == "failed"
    home.assert_nothing_left()


@pytest.mark.soak
def test_a_job_that_comes_no_further_is_stopped(home: Home) -> None:
    """Each copy completes the last step again, but dies before its replica is closed."""
    hosted = home.run(*JOB, args=("--fault", "kill:20"))
    assert hosted.wait() == 1
    assert "without" in hosted.err
    assert 3 <= len(failovers(home)) <= 10
    home.assert_nothing_left()


# -- the runtime dies -----------------------------------------------------------------------------


@pytest.mark.soak
def test_orphans_that_should_exit_do(home: Home) -> None:
    hosted = home.run(*JOB, "--orphan", "exit")
    home.wait_step(5, "j")
    hosted.process.kill()
    hosted.process.wait()
    until(lambda: home.summary("j")["state"] == "stopped", "the orphan to stop")
    home.assert_nothing_left()


def test_a_worker_finishes_without_a_runtime_and_says_so(home: Home, unmoved: Unmoved) -> None:
    hosted = home.run(*JOB)
    home.wait_step(5, "j")
    hosted.process.kill()
    hosted.process.wait()
    found = home.summary("j")
    assert found["state"] == "running"
    assert len(found["workers"]) == 1
    home.go.touch()
    until(lambda: home.summary("j")["state"] == "done", "the worker to finish")
    text = home.ok("logs", "j")
    assert text.count("hash") == 1
    assert str(unmoved()["hash"]) in text
    assert home.drivetrain("run", "--resume", "j").returncode == 2
    home.assert_nothing_left()


@pytest.mark.soak
def test_a_worker_that_will_not_answer_keeps_the_job(home: Home, unmoved: Unmoved) -> None:
    hosted = home.run(*JOB)
    pid = home.wait_step(5, "j")
    hosted.process.kill()
    hosted.process.wait()
    os.kill(pid, signal.SIGSTOP)
    refused = home.drivetrain("run", "--resume", "j")
    assert refused.returncode == 1
    assert f"kill -9 {pid}" in refused.stderr
    os.kill(pid, signal.SIGCONT)
    again = home.run("--resume", "j", script=None)
    until(lambda: "adopted" in again.err, "the worker to be adopted")
    home.go.touch()
    assert again.wait() == 0
    assert again.result() == unmoved()


def test_a_worker_that_wakes_up_after_it_was_replaced_does_nothing_more(home: Home) -> None:
    home.run(*JOB, args=("--delay", "0.5"))
    pid = home.wait_step(5, "j")
    job = home.job("j")
    assert job is not None
    begun = job.step
    home.wait_step(begun + 1, "j")  # the next half second it is within a step, which it must lose
    os.kill(pid, signal.SIGSTOP)
    with Journal.open(job.directory / "journal") as journal:
        data = {
            "worker": ProcessId.of().to_json(),
            "key": "elsewhere",
            "device": "cpu:1",
            "reason": "test",
            "step": job.step,
        }
        journal.append("commit", data, epoch=job.view.epoch + 1, expect_seq=journal.tail_seq)
    page = StatusPage.open(job.directory / "status", write=True)
    page.epoch = job.view.epoch + 1
    before = len(step_log(home)), page.step
    os.kill(pid, signal.SIGCONT)
    until(lambda: not carrying(f"{MARK}={job.view.worker_key}".encode()), "it to end")
    assert (len(step_log(home)), page.step) == before


@pytest.mark.soak
def test_a_lost_database_costs_nothing(home: Home, unmoved: Unmoved) -> None:
    hosted = home.run(*JOB, "--memory", "64M")
    pid = home.wait_step(5, "j")
    for path in home.state.glob("drivetrain.sqlite*"):
        path.unlink()
    found = home.summary("j")
    assert (found["state"], found["workers"][0]["pid"]) == ("running", pid)

    def leased() -> bool:
        database = Database(home.state / "drivetrain.sqlite")
        try:
            return [(le.owner.pid, le.nbytes) for le in database.leases()] == [(pid, 64 << 20)]
        finally:
            database.close()

    until(leased, "the lease to be back")
    home.go.touch()
    assert hosted.wait() == 0
    assert hosted.result() == unmoved()


# -- batch systems and Ctrl-C ---------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_requeued_job_goes_on_where_it_was(home: Home, unmoved: Unmoved, name: str) -> None:
    line = ("--on", "cpu:0", "--resume-or-start", "nightly")
    hosted = home.run(*line)
    home.wait_step(20, "nightly")
    hosted.process.send_signal(signal.Signals[name])
    assert hosted.wait() == 75, hosted.err
    saved = re.search(r"saved at step (\d+)", hosted.err)
    assert saved
    assert home.summary("nightly")["state"] == "paused"
    home.assert_nothing_left()
    again = home.run(*line)
    home.wait_step(int(saved[1]) + 1, "nightly")
    home.go.touch()
    assert again.wait() == 0
    assert again.result() == unmoved()
    assert again.process.returncode == 0
    done = home.drivetrain("run", "--resume-or-start", "nightly")
    assert (done.returncode, "done already" in done.stderr) == (0, True)


@pytest.mark.soak
def test_a_state_that_cannot_be_saved_in_time_is_resumed_from_the_last_one(
    home: Home, unmoved: Unmoved
) -> None:
    line = ("--on", "cpu:0", "--resume-or-start", "nightly", "--checkpoint-every", "0.2")
    once = str(home.folder / "once")
    args = ("--fault", "sleep:60", "--once", once)
    hosted = home.run(*line, "--grace", "0.3", args=args)
    until(lambda: Path(once).exists(), "the long step")
    hosted.process.send_signal(signal.SIGTERM)
    assert hosted.wait() == 75, hosted.err
    assert home.summary("nightly")["state"] == "lost"
    home.go.touch()
    again = home.run(*line, args=args)
    assert again.wait() == 0, again.err
    assert again.result() == unmoved()


def test_ctrl_c_ends_the_worker_and_its_children(home: Home) -> None:
    hosted = home.run(*JOB, args=("--child", "--workers", "2"))
    home.wait_step(3, "j")
    hosted.process.send_signal(signal.SIGINT)
    assert hosted.wait() == 130
    assert home.summary("j")["state"] == "stopped"
    home.assert_nothing_left()


@pytest.mark.soak
def test_ctrl_c_in_the_middle_of_a_move_does_not_wait_for_it(home: Home) -> None:
    """The target hangs before its loop; nobody should have to wait until that is given up."""
    path = waiting_target(home.folder, home.folder / "never")
    hosted = home.run("--on", "cpu:0", "--name", "j", script=path, args=("--go", str(home.go)))
    home.wait_step(3, "j")
    move = subprocess.Popen(
        [sys.executable, "-c", MAIN, "migrate", "j", "--to", "cpu:1"],
        env=home.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    home.wait_state("moving", "j")
    hosted.process.send_signal(signal.SIGINT)
    assert hosted.wait() == 130
    assert move.wait(LIMIT_S) == 1
    home.assert_nothing_left()

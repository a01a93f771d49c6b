"""When a job that keeps losing its worker is given up, and when it is not."""

from __future__ import annotations

from drivetrain.runtime.losses import MAX_FRUITLESS, MAX_STALE, Losses


def lose(losses: Losses, step: int, *, killed: bool = True, restored: int = 0, at: str = "cpu:0"):
    return losses.verdict(step, at, "why", killed=killed, restored=restored, furthest=step)


def test_losses_without_a_step_between_end_the_job():
    losses = Losses()
    told = [lose(losses, 7, restored=7) for _ in range(MAX_FRUITLESS + 1)]
    assert not any(told[:-1])
    assert "without a completed step" in told[-1]


def test_a_completed_step_between_two_losses_keeps_the_job_alive():
    losses = Losses()
    for step in range(1, 40):
        assert not lose(losses, step, restored=step - 1)


def test_repeating_the_same_steps_for_ever_ends_the_job():
    losses = Losses()
    told = [lose(losses, 5, restored=3) for _ in range(MAX_STALE + 1)]
    assert not any(told[:-1])
    assert "coming further" in told[-1]


def test_a_step_that_fails_on_two_devices_is_the_steps_own_fault():
    losses = Losses()
    assert not lose(losses, 5, killed=False, at="cpu:0")
    assert not lose(losses, 5, killed=False, at="cpu:0")
    told = lose(losses, 5, killed=False, at="cpu:1")
    assert "step 6 failed on two devices" in told
    assert "cpu:0" in told
    assert "cpu:1" in told


def test_two_kills_on_two_devices_are_not():
    losses = Losses()
    assert not lose(losses, 5, at="cpu:0")
    assert not lose(losses, 5, at="cpu:1")

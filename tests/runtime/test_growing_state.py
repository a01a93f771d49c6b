"""A state that becomes larger, or cannot be carried any more, while the job trains."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from .conftest import Home, until

SCRIPT = """
import os, time, torch
from torch import nn
from drivetrain import TrainingJob

model = nn.Linear(4, 4)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
run = TrainingJob(model, optimizer, [torch.ones(2, 4)] * {steps})
for step in run:
    with step as x:
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(0 if os.path.exists({go!r}) else 0.1)
    {line}
print("ended", run.completed, len(run.vars.get("seen", [])))
"""
GROWS = "run.vars.setdefault('seen', []).append('x' * 20_000)"
LATER = "if step.index == 10: run.vars['handle'] = object()"


def write(home: Home, folder: Path, line: str, steps: int) -> str:
    path = folder / "growing.py"
    path.write_text(SCRIPT.format(line=line, steps=steps, go=str(home.go)))
    return str(path)


@pytest.mark.soak
def test_a_description_that_outgrows_its_slot_gets_a_larger_one(home: Home, tmp_path: Path) -> None:
    script = write(home, tmp_path, GROWS, 100)
    hosted = home.run("--on", "cpu:0", "--name", "g", "--replicate-every", "1", script=script)
    home.wait_step(25, "g")
    job = home.job("g")
    assert job is not None
    assert job.view.worker is not None
    os.kill(job.view.worker.pid, signal.SIGKILL)
    report = until(lambda: home.details("g")["failovers"], "the failover")[0]
    assert report["steps_repeated"] <= 1
    home.go.touch()
    assert hosted.wait() == 0
    assert "ended 100 100" in hosted.out
    home.assert_nothing_left()


@pytest.mark.soak
def test_what_cannot_be_carried_any_more_does_not_end_the_training(
    home: Home, tmp_path: Path
) -> None:
    script = write(home, tmp_path, LATER, 600)
    hosted = home.run("--on", "cpu:0", "--name", "g", "--replicate-every", "1", script=script)
    home.wait_step(20, "g")
    refused = home.drivetrain("migrate", "g", "--to", "cpu:1")
    assert refused.returncode == 1
    assert "vars" in refused.stderr
    home.go.touch()
    assert hosted.wait() == 0
    assert "ended 600 0" in hosted.out
    assert hosted.err.count("no replica, and no move") == 1
    home.assert_nothing_left()

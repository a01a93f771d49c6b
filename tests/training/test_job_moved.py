"""A TrainingJob under the runtime: what two copies of a script do, and that a move changes nothing.

``hold_every`` makes a job wait at a boundary after so many steps, so that a move comes at a known
step; without it the examples would be over before a second copy has started.
"""

import json
import os
import re
import time
from pathlib import Path

import pytest

from drivetrain import hal
from drivetrain.errors import BadInput
from drivetrain.hal.drivers import cpu
from drivetrain.runtime import Runtime

EXAMPLES = Path(__file__).parents[2] / "examples"
LIMIT_S = 100.0
SAYS_ITS_STATE = 'print("state", run.state_hash(), run.completed)\n'


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    if len(cpu.allowed_cores()) < 2:
        pytest.skip("a move needs two devices: this machine has one core")
    monkeypatch.setenv("DRIVETRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DRIVETRAIN_CPU_PARTITIONS", "2")
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert len(hal.devices("cpu")) == 2
    with Runtime() as runtime:
        yield runtime


def submit(runtime, script, **options):
    return runtime.submit(
        script, on="cpu:0", checkpoint_every=None, orphan="exit", options=options, seed=7
    )


def held_after(job, step):
    """The step that the job waits at, after ``step``; None when it ended."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        over = job.ended
        for event in job.events(follow=False):
            if event["event"] == "held" and event["step"] > step:
                return event["step"]
        if over:
            return None
        time.sleep(0.02)
    raise AssertionError(f"nothing happened for {LIMIT_S} s: {job.state} at step {job.step}")


def go_on(job):
    job.pause()
    job.resume()


def finish(job):
    assert job.wait(LIMIT_S) is not None
    return job.exit_code, job.logs().decode(), (job.directory / "logs" / "err").read_text()


# -- a move changes nothing ---------------------------------------------------------------


def example(folder, name):
    """A copy of an example that says its state at the end."""
    text = (EXAMPLES / f"{name}.py").read_text()
    if "def main()" in text:
        text = text.replace("    with torch.no_grad():\n", f"    {SAYS_ITS_STATE}\n\\g", 1)
        text = text.replace("\\g", "    with torch.no_grad():\n")
    else:
        text += SAYS_ITS_STATE
    path = folder / f"{name}.py"
    path.write_text(text)
    return path


def logged(job):
    lines = (job.directory / "logs" / "steps.jsonl").read_text().splitlines()
    return [(line["step"], line.get("logged")) for line in map(json.loads, lines)]


def moved_and_unmoved(runtime, script, every):
    """(state lines, logs of all steps, moves) of a run with moves to and fro, and one without."""
    unmoved = submit(runtime, script)
    code, out, err = finish(unmoved)
    assert code == 0, err
    moved = submit(runtime, script, hold_every=every)
    at, turn = 0, 0
    while (at := held_after(moved, at)) is not None:
        if turn < 3:
            moved.migrate(
                "cpu:1" if turn % 2 == 0 else "cpu:0",
                strategy="checkpointed" if turn == 1 else "immediate",
            )
            turn += 1
        else:
            go_on(moved)
    code, moved_out, err = finish(moved)
    assert code == 0, err
    moves = moved.report()["moves"]
    assert all(move["ok"] and move["hash_source"] == move["hash_target"] for move in moves)
    return (out, logged(unmoved)), (moved_out, logged(moved)), len(moves)


@pytest.mark.parametrize(
    ("name", "every"),
    [
        ("loader_workers", 50),
        pytest.param("plain", 70, marks=pytest.mark.soak),
        pytest.param("accumulation", 200, marks=pytest.mark.soak),
        pytest.param("evaluation", 40, marks=pytest.mark.soak),
        pytest.param("early_stop", 30, marks=pytest.mark.soak),
        pytest.param("ema_gan", 50, marks=pytest.mark.soak),
        pytest.param("compile_amp", 50, marks=pytest.mark.soak),
    ],
)
def test_a_moved_run_is_the_unmoved_one_bit_for_bit(runtime, tmp_path, name, every):
    script = example(tmp_path, name)
    unmoved, moved, moves = moved_and_unmoved(runtime, script, every)
    assert moves >= 2
    assert re.search(r"state [0-9a-f]{32} \d+", unmoved[0])
    assert moved[0] == unmoved[0]
    assert moved[1] == unmoved[1]


HIDDEN = """
import torch, drivetrain
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
noise = torch.Generator().manual_seed(0)
run = drivetrain.TrainingJob(
    model, optimizer, [torch.ones(2, 4)] * 12, extra={"noise": noise} if GIVEN else None
)
for step in run:
    with step as x:
        model(x + torch.randn(2, 4, generator=noise)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.mark.soak
def test_a_generator_that_was_not_given_shows_in_the_state(runtime, tmp_path):
    """The control: what is not state does not move, and the comparison above would see it."""
    ends = {}
    for given in (True, False):
        script = tmp_path / f"hidden_{given}.py"
        script.write_text(HIDDEN.replace("GIVEN", str(given)) + SAYS_ITS_STATE)
        unmoved = finish(submit(runtime, script))[1]
        job = submit(runtime, script, hold_every=8)
        assert held_after(job, 0) == 8
        job.migrate("cpu:1")
        ends[given] = unmoved == finish(job)[1]
    assert ends == {True: True, False: False}


# -- two copies of a script ---------------------------------------------------------------

COPIES = """
import os, torch, drivetrain
def tell(text):
    with open("told.txt", "a") as file:
        file.write(f"{os.environ['DRIVETRAIN_ROLE']} {text}\\n")

def begin():
    tell("once")
    return {"id": os.getpid()}

model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = drivetrain.TrainingJob(model, optimizer, [torch.ones(2, 4)] * 12)
first = run.once(begin)
tell(f"owner {run.owner}")
tell(f"got {first}")
try:
    for step in run:
        with step as x:
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            step.log(dry=step.dry)
        print(f"step {step.index} {'dry' if step.dry else 'real'}")
        if step.dry:
            tell(f"dry {run.owner}")
        if step.index == 9 and not step.dry:
            tell(f"tenth {run.owner} {run.once(begin) == first}")
finally:
    tell("finally")
tell("after")
"""


def test_the_second_copy_warms_up_unseen_and_then_is_the_job(runtime, tmp_path):
    script = tmp_path / "copies.py"
    script.write_text(COPIES)
    job = submit(runtime, script, hold_every=8)
    assert held_after(job, 0) == 8
    source = job.report()["workers"][0]["pid"]
    for never in (0, -1.0, float("nan")):
        with pytest.raises(BadInput, match="more than 0 seconds"):
            job.migrate("cpu:1", max_downtime=never)
    job.migrate("cpu:1")
    code, out, err = finish(job)
    assert code == 0, err
    told = Path("told.txt").read_text().splitlines()
    assert [line for line in told if "once" in line] == ["source once"]
    assert "source owner True" in told
    assert "target owner False" in told
    assert told.count(f"source got {{'id': {source}}}") == 1
    assert told.count(f"target got {{'id': {source}}}") == 1
    assert {line for line in told if "dry" in line} == {"target dry False"}
    assert [line.split(maxsplit=1)[1] for line in told if "tenth" in line] == ["tenth True True"]
    # The source unwinds; what stands after the loop is for the copy that ends as the owner.
    assert sum("finally" in line for line in told) == 2
    assert sum("after" in line for line in told) == 1
    assert out.splitlines() == [f"step {i} real" for i in range(12)]
    assert [step for step, _ in logged(job)] == list(range(1, 13))
    assert not any(values["dry"] for _, values in logged(job))


OPAQUE = """
import torch, drivetrain
model = torch.nn.Linear(1, 1)
run = drivetrain.TrainingJob(
    model, None, [torch.ones(1)] * 3, extra={"tracker": {"client": lambda: 1}}
)
for step in run:
    with step:
        print("trained")
"""


def test_what_cannot_be_carried_is_refused_at_step_0_with_its_path(runtime, tmp_path):
    script = tmp_path / "opaque.py"
    script.write_text(OPAQUE)
    job = submit(runtime, script)
    code, out, err = finish(job)
    assert (code, job.state, job.step) == (1, "failed", 0)
    assert "trained" not in out
    assert "extra.tracker" in err
    assert "client" in err
    assert "step 0" in err


def test_several_ranks_are_refused_before_anything_is_started(runtime, tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "4")
    script = tmp_path / "ranks.py"
    script.write_text("")
    with pytest.raises(BadInput, match="several ranks"):
        submit(runtime, script)
    assert runtime.jobs() == []

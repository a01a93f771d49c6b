"""``drivetrain check``: good scripts pass, broken ones are named with the line, nothing is left."""

import glob
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from drivetrain.errors import BadInput
from drivetrain.hal.drivers import cpu
from drivetrain.training import static_check
from drivetrain.training.check import rehearse
from drivetrain.training.rehearsal import copy_of

EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCE = str(Path(__file__).parents[2] / "src")
COMMAND = [sys.executable, "-c", "from drivetrain.cli.main import main; main()", "check"]

pytestmark = pytest.mark.skipif(
    len(cpu.allowed_cores()) < 2, reason="a move needs two devices: this machine has one core"
)


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DRIVETRAIN_CPU_PARTITIONS", raising=False)
    monkeypatch.setenv("DRIVETRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    monkeypatch.setattr(tempfile, "tempdir", None)
    (tmp_path / "t").mkdir()
    before = environment()
    yield
    assert environment() == before
    assert not glob.glob(f"{tmp_path}/t/drivetrain-*")
    assert not glob.glob(f"/tmp/drivetrain-check-{os.getpid()}*")
    assert not (tmp_path / "home" / "jobs").exists()
    assert workers_of(str(tmp_path)) == []


def environment():
    return {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}


def workers_of(mark):
    """Living processes whose environment names this test's folder, other than this one."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                environ = Path(f"/proc/{entry}/environ").read_bytes()
            except OSError:
                continue
            if mark.encode() in environ and b"DRIVETRAIN_WORKER=" in environ:
                found.append(int(entry))
    return found


def line_of(path, text):
    lines = Path(path).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if text in line)


# -- the shipped examples -----------------------------------------------------------------

soak = pytest.mark.soak


@pytest.mark.parametrize(
    "name",
    [
        "early_stop",
        pytest.param("accumulation", marks=soak),
        pytest.param("loader_workers", marks=soak),
        pytest.param("plain", marks=soak),
        pytest.param("evaluation", marks=soak),
        pytest.param("ema_gan", marks=soak),
        pytest.param("compile_amp", marks=soak),
    ],
)
def test_a_good_example_passes(name):
    assert rehearse(EXAMPLES / f"{name}.py") == []


BROKEN = {
    "best_in_a_local": ("does-not-move", "does-not-move"),
    "hard_coded_cuda": ("hard-coded-device", "fails"),
    "log_truncated": ("truncates", "truncates"),
    "output_without_owner": ("unguarded-output", "unguarded-output"),
    "set_order": ("set-order", "set-order"),
    "unseeded_split": ("unseeded", "not-repeatable"),
}


SAMPLE = ("hard_coded_cuda", "log_truncated")


@pytest.mark.parametrize(
    "name", [name if name in SAMPLE else pytest.param(name, marks=soak) for name in BROKEN]
)
def test_a_broken_example_is_named_with_its_line(name):
    if name == "log_truncated":
        Path("train.log").write_text("of an earlier run\n")
    script = EXAMPLES / "broken" / f"{name}.py"
    found = rehearse(script)
    assert [(f.line, f.code) for f in found] == [(line_of(script, "# broken:"), BROKEN[name][0])]
    assert found[0].message
    assert found[0].remedy
    if name == "log_truncated":  # the rehearsal had a copy of its own
        assert Path("train.log").read_text() == "of an earlier run\n"
    else:
        assert os.listdir() == []


@pytest.mark.soak
@pytest.mark.parametrize("name", BROKEN)
def test_the_rehearsal_alone_finds_it_too(name, monkeypatch):
    """Nothing is read from the source; a set's order then has the line of what it ends up in."""
    monkeypatch.setattr(static_check, "findings", lambda path: [])
    script = EXAMPLES / "broken" / f"{name}.py"
    line = line_of(script, "TrainingJob(" if name == "set_order" else "# broken:")
    assert [(f.line, f.code) for f in rehearse(script)] == [(line, BROKEN[name][1])]


# -- what cannot be read from one file ----------------------------------------------------

HELPER = """
import torch
noise = torch.Generator().manual_seed(0)

def begin():
    with open("state.txt", "w") as file:
        file.write("begun")

def note(text):
    with open("notes.txt", "a") as file:
        file.write(text)
"""
HIDDEN = """
import time, torch, drivetrain, helper
helper.begin()  # 1
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = drivetrain.TrainingJob(model, optimizer, [torch.ones(2, 4)] * 12)
run.vars["begun"] = time.time()  # differs from run to run, and that is fine
for step in run:  # 2
    with step as x:
        model(x + torch.randn(2, 4, generator=helper.noise)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    helper.note("step")  # 3
"""


@pytest.mark.soak
def test_what_a_module_hides_is_found_by_rehearsal(tmp_path):
    (tmp_path / "helper.py").write_text(HELPER)
    script = tmp_path / "hidden.py"
    script.write_text(HIDDEN)
    assert static_check.findings(script) == []
    told = []
    found = rehearse(script, on_progress=told.append)
    assert [(f.code, f.line) for f in found] == [
        ("truncates", line_of(script, "# 1")),
        ("does-not-move", line_of(script, "# 2")),
        ("unguarded-output", line_of(script, "# 3")),
    ]
    assert "state.txt" in found[0].message
    assert "model.main.weight" in found[1].message
    assert "notes.txt" in found[2].message
    assert any("moving" in text for text in told)


CLOCK = """
import sys, time, torch, drivetrain
assert sys.argv[1:] == ["--fast"]
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = drivetrain.TrainingJob(model, optimizer, [torch.ones(2, 4)] * 7)
run.vars["begun"] = time.time()
for step in run:
    with step as x:
        scale = time.time() % 1 if DEPENDS else 1.0
        (model(x) * scale).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
"""


@soak
@pytest.mark.parametrize("depends", [False, True])
def test_the_time_of_day_in_vars_is_fine_and_in_the_training_is_not(tmp_path, depends):
    """Also a short script (seven steps), with arguments."""
    script = tmp_path / "clock.py"
    script.write_text(CLOCK.replace("DEPENDS", str(depends)))
    found = rehearse(script, ["--fast"])
    assert [f.code for f in found] == (["not-repeatable"] if depends else [])
    if depends:
        assert found[0].line == line_of(script, "for step in run")
        assert "model.main.weight" in found[0].message


def test_a_script_that_fails_is_named_with_its_line_and_error(tmp_path):
    script = tmp_path / "fails.py"
    script.write_text("import drivetrain\nvalue = {}\nfor step in value['run']:\n    pass\n")
    found = [f for f in rehearse(script) if f.code == "fails"]
    assert [f.line for f in found] == [3]
    assert "KeyError" in found[0].message


@pytest.mark.parametrize("text", [None, "for in"])
def test_what_is_no_script_is_bad_input(tmp_path, text):
    script = tmp_path / "no.py"
    if text is not None:
        script.write_text(text)
    with pytest.raises(BadInput):
        rehearse(script)


# -- the command --------------------------------------------------------------------------


def test_the_command_says_what_it_found_and_ends_1(tmp_path):
    script = EXAMPLES / "broken" / "hard_coded_cuda.py"
    done = subprocess.run(
        [*COMMAND, str(script), "--json"],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": SOURCE},
    )
    assert done.returncode == 1, done.stderr
    answer = json.loads(done.stdout)
    assert [f["line"] for f in answer["findings"]] == [line_of(script, "# broken:")]
    assert "drivetrain: without a move" in done.stderr


@pytest.mark.soak
def test_ctrl_c_leaves_nothing_behind(tmp_path):
    process = subprocess.Popen(
        [*COMMAND, str(EXAMPLES / "plain.py")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": SOURCE},
    )
    for line in process.stderr:
        if "step" in line:
            break
    process.send_signal(signal.SIGINT)
    assert process.wait(100.0) == 130
    process.stderr.close()
    deadline = time.monotonic() + 30.0
    while workers_of(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)


# -- the stage ----------------------------------------------------------------------------


def test_a_copied_folder_is_written_to_without_touching_the_original(tmp_path):
    folder = tmp_path / "original"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "small.txt").write_text("small")
    with open(folder / "large.bin", "wb") as file:
        file.truncate(17 << 20)
    (folder / ".git").mkdir()
    copy = folder / "stage" / "copy"  # even inside the folder itself
    copy_of(folder, copy)
    (copy / "deep" / "small.txt").write_text("changed")
    assert (folder / "deep" / "small.txt").read_text() == "small"
    assert (copy / "large.bin").is_symlink()
    assert (copy / ".git").is_symlink()
    assert not (copy / "stage").exists()

"""The ``drivetrain`` command where its surroundings are not as usual."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from drivetrain import hal
from drivetrain.cli import calibrate, jobs
from drivetrain.cli.capabilities import capabilities
from drivetrain.placement.calibration import Calibration
from drivetrain.placement.capabilities import CapabilityMatrix, Row

# -P: as the installed command, which does not import from the current folder.
COMMAND = [sys.executable, "-P", "-c", "from drivetrain.cli.main import main; main()"]


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVETRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DRIVETRAIN_CPU_PARTITIONS", raising=False)
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


def command(*words: str, stdout: int = subprocess.PIPE, cwd: Path | None = None) -> tuple[int, str]:
    """(exit code, what it wrote on standard error)."""
    done = subprocess.run(
        [*COMMAND, *words], stdout=stdout, stderr=subprocess.PIPE, text=True, cwd=cwd, timeout=60
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("words", [("--version",), ("jobs",), ("devices", "--json"), ("--help",)])
def test_output_that_nobody_reads_is_no_traceback(words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        assert command(*words, stdout=writer) == (1, "")
    finally:
        os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("words", [("--version",), ("jobs",), ("devices", "--json"), ("--help",)])
def test_output_onto_a_full_disk_is_told_and_ends_with_2(words: tuple[str, ...]) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    try:
        code, said = command(*words, stdout=full)
    finally:
        os.close(full)
    assert code == 2
    assert said.startswith("drivetrain: the disk is full: ")
    assert said.count("\n") == 1


def test_ctrl_c_while_the_commands_are_loaded_ends_with_130(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    (tmp_path / "typer.py").write_text(
        "import pathlib, time\n"
        f"pathlib.Path({str(begun)!r}).touch()\n"
        "class Broken:\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    except KeyboardInterrupt:\n"
        "        raise RuntimeError('an import that was broken off')\n"
    )
    process = subprocess.Popen(
        [*COMMAND, "jobs"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 60
    while not begun.exists() and time.monotonic() < until:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said) == (130, "", "")


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    gone = tmp_path / "gone"

    def after_it_is_gone(*words: str) -> tuple[int, str]:
        gone.mkdir()
        done = subprocess.run(
            ["sh", "-c", 'rmdir "$0" && exec "$@"', str(gone), *COMMAND, *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=gone,
            timeout=60,
        )
        return done.returncode, done.stderr

    assert after_it_is_gone("devices", "--json") == (0, "")
    code, said = after_it_is_gone("run", "train.py")
    assert code == 2
    assert said == "drivetrain: the current folder is gone; go to one that exists\n"


def test_a_job_runs_where_the_standard_streams_are_closed(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(f"print('hello')\nopen({str(tmp_path / 'ran')!r}, 'w').close()\n")
    words = [*COMMAND, "run", "--on", "cpu:0", str(script)]
    done = subprocess.run(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words], timeout=60)
    assert done.returncode == 0
    assert (tmp_path / "ran").exists()


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("")
    code, said = command("run", "--memory", "9" * 400, str(script))
    assert code == 2
    assert "more bytes than any device has" in said
    code, said = command("migrate", "job", "--to", "cpu:0", "--max-downtime", "nan")
    assert code == 2
    assert "--max-downtime must be more than 0 seconds: nan" in said


def test_a_script_is_listed_under_its_whole_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"name": "j", "state": "done", "step": 1, "workers": [], "script": "/x/a[bold]b.py"}
    job = SimpleNamespace(summary=lambda: {**facts, "started": time.time()})
    monkeypatch.setattr("drivetrain.runtime.jobs.all_jobs", lambda: [job])
    jobs.jobs()
    assert "a[bold]b.py" in capsys.readouterr().out


def test_reasons_are_shown_as_they_are_whatever_brackets_they_have(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    reason = "the driver wrote [/dev/chip0]"
    matrix = CapabilityMatrix((Row(hal.device("cpu:0"), 0, 0, reason=reason),))
    monkeypatch.setattr(CapabilityMatrix, "of", lambda _: matrix)
    capabilities(None)
    assert reason in capsys.readouterr().out
    told = {"float32": f"not measured: {reason}"}
    measured = Calibration("", "", "", 0.0, measured_with=told).as_json()
    calibrate._show_calibration({"chip:0": measured}, {}, {})
    assert reason in capsys.readouterr().out


def test_watching_shows_pages_also_where_nothing_can_be_drawn_over() -> None:
    process = subprocess.Popen(
        [*COMMAND, "devices", "--watch"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    heads = 0
    for line in process.stdout:
        heads += "free / memory" in line
        if heads == 2:
            break
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert (heads, process.returncode, said) == (2, 0, "")


def test_optimize_takes_the_file_that_is_named_not_a_module_of_its_name(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "random.py").write_text("def make():\n    return 'the file was read'\n")
    code, said = command("optimize", "random.py:make", "--on", "cpu:0", cwd=tmp_path)
    assert code == 2
    assert "random.py:make returned a str" in said
    code, said = command("optimize", ".models:make", "--on", "cpu:0", cwd=tmp_path)
    assert code == 2
    assert "relative to no package" in said

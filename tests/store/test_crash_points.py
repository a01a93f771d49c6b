"""Named crash points: they kill once, where they were told to, and can be listed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from drivetrain.store.crash import crash_points, listed

SCRIPT = """
from drivetrain.store.crash import crash_point
for i in range(5):
    print(i, flush=True)
    crash_point("here")
    crash_point("there")
"""


def run(home: Path, at: str | None, role: str = "") -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("DRIVETRAIN_")}
    env |= {"DRIVETRAIN_HOME": str(home), "DRIVETRAIN_ROLE": role}
    if at is not None:
        env["DRIVETRAIN_CRASH_AT"] = at
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=60
    )


def test_the_nth_pass_kills_and_only_once_per_home(tmp_path: Path) -> None:
    first = run(tmp_path, "here:3")
    assert first.returncode == -signal.SIGKILL
    assert first.stdout.split() == ["0", "1", "2"]
    again = run(tmp_path, "here:3")
    assert again.returncode == 0
    assert again.stdout.split() == ["0", "1", "2", "3", "4"]


def test_a_role_limits_the_crash_to_its_process(tmp_path: Path) -> None:
    assert run(tmp_path, "target@there:1", role="source").returncode == 0
    assert run(tmp_path, "target@there:1", role="target").returncode == -signal.SIGKILL


def test_several_specifications_each_kill_once(tmp_path: Path) -> None:
    both = "here:2,there:1"
    assert run(tmp_path, both).stdout.split() == ["0"]
    assert run(tmp_path, both).stdout.split() == ["0", "1"]
    assert run(tmp_path, both).returncode == 0


def test_a_trace_names_role_and_point_at_every_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACE", str(tmp_path / "trace"))
    env_script = "import os; os.environ['DRIVETRAIN_CRASH_TRACE'] = os.environ['TRACE']\n"
    monkeypatch.setitem(globals(), "SCRIPT", env_script + SCRIPT)
    assert run(tmp_path, None, role="target").returncode == 0
    lines = (tmp_path / "trace").read_text().split()
    assert lines == ["target@here", "target@there"] * 5


def test_without_the_variable_nothing_happens(tmp_path: Path) -> None:
    assert run(tmp_path, None).returncode == 0


@pytest.mark.parametrize("text", ["here", "here:0", ":1", "@here:1", "here:x"])
def test_a_malformed_specification_is_named(tmp_path: Path, text: str) -> None:
    done = run(tmp_path, text)
    assert done.returncode == 1
    assert "DRIVETRAIN_CRASH_AT" in done.stderr
    assert "BadInput" in done.stderr


def test_every_point_of_the_package_is_listed() -> None:
    names = crash_points()
    assert {"files.rename", "journal.sync", "journal.synced"} <= set(names)
    assert len(names) == len(set(names))


def test_a_name_that_is_no_literal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("crash_point('a.b')\nx.crash_point('c')\n")
    assert listed(tmp_path) == ("a.b", "c")
    (tmp_path / "b.py").write_text("crash_point(name)\n")
    with pytest.raises(ValueError, match="literal"):
        listed(tmp_path)

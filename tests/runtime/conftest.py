"""A state folder of its own for each test, real ``drivetrain`` processes in it, and what to ask.

Everything runs as a user runs it: ``drivetrain run`` in a process, commands in others, workers
below. Tests wait for what they need (a step, a state) and never for a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from drivetrain.runtime import jobs
from drivetrain.store.process import ProcessId

SCRIPT = Path(__file__).with_name("training_script.py")
MAIN = "from drivetrain.cli.main import main; main()"
LIMIT_S = 100.0  # a safety net: less than pytest's own, far more than anything takes


def until(true: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """The first true answer; fails after ``limit_s`` seconds."""
    deadline = time.monotonic() + limit_s
    while not (found := true()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {limit_s:g} s for {what}")
        time.sleep(0.01)
    return found


def carrying(mark: bytes) -> list[int]:
    """The living processes with ``mark`` (NAME=VALUE) in their environment, this one left out."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            state = Path(f"/proc/{entry}/stat").read_bytes().rpartition(b") ")[2][:1]
            if state != b"Z" and mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                found.append(int(entry))
        except OSError:
            continue
    return found


def replicas_of(pid: int) -> list[Path]:
    """A descriptor of each replica that a process holds (it may open and close others)."""
    found: dict[int, Path] = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if "drivetrain-replica" in os.readlink(link):
                found[link.stat().st_ino] = link
    return list(found.values())


def waiting_target(folder: Path, until_there: Path) -> Path:
    """The training script, but its second copy does nothing before a file is there."""
    text = SCRIPT.read_text()
    path = folder / "waiting_target.py"
    path.write_text(
        "import os, time\n"
        f"while os.environ.get('DRIVETRAIN_ROLE') == 'target' and not os.path.exists("
        f"{str(until_there)!r}):\n    time.sleep(0.02)\n" + text[text.index("import argparse") :]
    )
    return path


@dataclass
class Hosted:
    """A ``drivetrain run`` in the background."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def out(self) -> str:
        return (self.folder / "stdout").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "stderr").read_text()

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """Its exit code."""
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"`drivetrain run` did not end in {limit_s:g} s: {self.err[-2000:]}")

    def result(self) -> dict[str, Any]:
        """The JSON line that the script prints when it is done."""
        return dict(json.loads(self.out.strip().splitlines()[-1]))


@dataclass
class Home:
    """A state folder, and the commands run in it."""

    folder: Path
    env: dict[str, str]
    hosted: list[Hosted] = field(default_factory=list)
    crash: dict[str, str] = field(default_factory=dict)

    @property
    def state(self) -> Path:
        return self.folder / "home"

    @property
    def go(self) -> Path:
        """Makes the training script fast, and so end."""
        return self.folder / "go"

    def drivetrain(
        self, *words: str, env: Mapping[str, str] | None = None, limit_s: float = LIMIT_S
    ) -> subprocess.CompletedProcess[str]:
        """Run one command to its end."""
        return subprocess.run(
            [sys.executable, "-P", "-c", MAIN, *words],
            env={**self.env, **(env or {})},
            capture_output=True,
            text=True,
            timeout=limit_s,
            cwd=self.folder,
            check=False,
        )

    def ok(self, *words: str) -> str:
        """The stdout of a command that must succeed."""
        done = self.drivetrain(*words)
        assert done.returncode == 0, (words, done.returncode, done.stderr)
        return done.stdout

    def run(
        self,
        *words: str,
        script: Path | str | None = SCRIPT,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> Hosted:
        """``drivetrain run`` in the background; the script is slow until ``go`` exists."""
        own = self.folder / f"run{len(self.hosted)}"
        own.mkdir()
        line = [sys.executable, "-c", MAIN, "run", *words]
        if script is not None:
            line.append(str(script))
            if script == SCRIPT:
                args = ("--go", str(self.go), *args)
            if args:
                line += ["--", *args]
        with (own / "stdout").open("wb") as out, (own / "stderr").open("wb") as err:
            process = subprocess.Popen(
                line,
                env={**self.env, "DRIVETRAIN_ROLE": "runtime", **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=self.folder,
            )
        hosted = Hosted(process, own)
        self.hosted.append(hosted)
        return hosted

    # -- what is there now ------------------------------------------------------------------

    def records(self) -> list[jobs.JobRecord]:
        return jobs.all_jobs() if (self.state / "jobs").is_dir() else []

    def job(self, name: str = "") -> jobs.JobRecord | None:
        """The newest job (of that name), from its journal."""
        found = [j for j in self.records() if not name or j.view.spec.get("name") == name]
        return found[-1] if found else None

    def summary(self, name: str = "") -> dict[str, Any]:
        """The newest job as ``drivetrain jobs --json`` tells it, from a process of its own."""
        found = json.loads(self.ok("jobs", "--json"))["jobs"]
        return dict([j for j in found if not name or j["name"] == name][-1])

    def details(self, name: str) -> dict[str, Any]:
        return dict(json.loads(self.ok("show", name, "--json")))

    def wait_step(self, step: int, name: str = "", limit_s: float = LIMIT_S) -> int:
        """Wait until the running job has completed ``step`` steps; the pid of its owner."""

        def there() -> int:
            job = self.job(name)
            if job is None or job.step < step or job.view.present_state() != "running":
                return 0
            worker = job.view.worker
            return worker.pid if worker is not None and worker.alive else 0

        return int(until(there, f"step {step} of a running job", limit_s))

    def wait_event(self, kind: str, name: str = "", **facts: Any) -> None:
        """Wait until the job's event log has such an event."""

        def there() -> bool:
            job = self.job(name)
            path = None if job is None else job.directory / "logs" / "events.jsonl"
            if path is None or not path.exists():
                return False
            wanted = {"event": kind, **facts}
            whole = path.read_text().rpartition("\n")[0]
            return any(wanted.items() <= json.loads(line).items() for line in whole.splitlines())

        until(there, f"the event {kind}")

    def wait_state(self, state: str, name: str = "", limit_s: float = LIMIT_S) -> None:
        def there() -> bool:
            job = self.job(name)
            return job is not None and job.view.present_state() == state

        until(there, f"the state {state}", limit_s)

    def owners(self) -> list[int]:
        """Pids of the living copies that would go on with the job: by the journal, at most one."""
        found = []
        for job in self.records():
            worker = job.view.worker
            if worker is not None and worker.alive and not job.view.ended:
                found.append(worker.pid)
        return found

    # -- afterwards -----------------------------------------------------------------------------

    def left_behind(self) -> list[str]:
        """What should be gone when nothing runs any more: processes (and so segments), sockets,
        temporary files, leases."""
        mark = f"DRIVETRAIN_HOME={self.state}".encode()
        left = [f"process {pid}" for pid in carrying(mark)]
        for path in self.state.rglob("*"):
            relative = path.relative_to(self.state)
            if path.is_socket():
                left.append(f"socket {relative}")
            elif path.name.startswith((".tmp", ".old", ".probe")) or ".tmp-" in path.name:
                left.append(f"file {relative}")
        return left

    def assert_nothing_left(self) -> None:
        """Nothing of `left_behind`, once what ends has ended."""
        deadline = time.monotonic() + 30.0
        while self.left_behind() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert self.left_behind() == []

    def stop_everything(self) -> None:
        for pid in carrying(f"DRIVETRAIN_HOME={self.state}".encode()):
            try:
                ProcessId.of(pid).kill(signal.SIGKILL)
            except ProcessLookupError:
                continue
        for hosted in self.hosted:
            hosted.process.wait(10)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """A private state folder with two CPU partitions; whatever a test leaves running is killed."""
    for name in [n for n in os.environ if n.startswith("DRIVETRAIN_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DRIVETRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DRIVETRAIN_CPU_PARTITIONS", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = Home(tmp_path, dict(os.environ))
    yield found
    found.stop_everything()


_unmoved: dict[tuple[str, ...], dict[str, Any]] = {}


def train_alone(*args: str) -> dict[str, Any]:
    """The result of the script without Drivetrain's runtime: what every moved run must equal."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("DRIVETRAIN_")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *args],
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


@pytest.fixture
def unmoved() -> Callable[..., dict[str, Any]]:
    """``unmoved(*args)``: what the script ends with when nothing happens to it; run once."""

    def result(*args: str) -> dict[str, Any]:
        if args not in _unmoved:
            _unmoved[args] = train_alone(*args)
        return _unmoved[args]

    return result

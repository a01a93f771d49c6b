"""Each alert has a fault that fires it, as the exporter tells the fault; without, none fires."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import StoreError
from drivetrain.hal import registry
from drivetrain.hal.probe import Verdict
from drivetrain.hal.telemetry import Telemetry
from drivetrain.runtime import metrics
from drivetrain.runtime.metrics import Collector
from drivetrain.runtime.status import StatusPage
from drivetrain.store.home import job_dir
from drivetrain.store.journal import Journal
from drivetrain.store.process import ProcessId

RULES = Path(__file__).resolve().parents[2] / "docs/monitoring/alerts.yml"
ALERTS = re.findall(r"^ *- alert: (\w+)$", RULES.read_text(), re.MULTILINE)
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="needs promtool (Debian: apt install prometheus)"
)


class Machine:
    """A machine whose sensors, drivers and jobs a test sets; the exporter looks at it for real."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reading = Telemetry(
            utilisation=0.5, memory_used_bytes=10, memory_total_bytes=100, ecc_corrected=0,
            ecc_uncorrected=0, health="ok",
        )  # fmt: skip
        self.usable = True
        self.broken: set[str] = set()
        self.store_fails = False
        self.patch = monkeypatch
        drivers, load = dict(hal.drivers()), metrics.on_disk.load
        only = hal.devices("cpu")[:1]  # one device, so that each fault is one alert
        monkeypatch.setattr(hal, "devices", lambda: only)
        monkeypatch.setattr(registry, "telemetry", lambda device: self.reading)
        monkeypatch.setattr(registry, "refresh", lambda: None)
        verdict = lambda found: dict.fromkeys(found, Verdict(self.usable, 0.0, ""))  # noqa: E731
        monkeypatch.setattr(metrics, "verdicts", verdict)

        def states() -> dict[str, Any]:
            return {
                name: replace(info, state="broken" if name in self.broken else "usable")
                for name, info in drivers.items()
            }

        def loaded(folder: Path) -> Any:
            if self.store_fails:
                raise StoreError("the disk is gone")
            return load(folder)

        monkeypatch.setattr(hal, "drivers", states)
        monkeypatch.setattr(metrics.on_disk, "load", loaded)
        self.journal("train-1")
        self.collector = Collector(fresh_s=0.0)

    def journal(self, job: str) -> Path:
        """The folder of a job that runs here, with this process for its worker and runtime."""
        folder = job_dir(job, create=True)
        me = ProcessId.of().to_json()
        with Journal.create(folder / "journal") as journal:
            journal.append("submitted", {"script": "train.py", "name": ""}, epoch=0)
            journal.append("runtime", {"process": me}, epoch=0)
            commit = {"worker": me, "key": "k", "device": "cpu:0", "reason": "start"}
            journal.append("commit", commit, epoch=1)
            journal.append("state", {"state": "running"}, epoch=1)
        page = StatusPage.create(folder / "status")
        page.step, page.median_ns, page.replicate_every = 10, 1_000_000, 5
        page.replica_step = 10
        page.step_end_ns = 1 << 62  # ends in the future: its age is 0
        self.page = page
        return folder

    def note(self, kind: str, data: dict[str, Any], job: str = "train-1") -> None:
        with Journal.open(job_dir(job) / "journal") as journal:
            journal.append(kind, data, epoch=1)


def set_(**change: Any) -> Callable[[Machine], None]:
    def fault(machine: Machine) -> None:
        machine.reading = replace(machine.reading, **change)

    return fault


def lose_job(machine: Machine) -> None:
    folder = job_dir("train-2", create=True)
    dead = {**ProcessId.of().to_json(), "start_time": 1}
    with Journal.create(folder / "journal") as journal:
        journal.append("submitted", {"script": "other.py"}, epoch=0)
        journal.append("runtime", {"process": dead}, epoch=0)


def fail_job(machine: Machine) -> None:
    machine.journal("train-3")
    machine.note("exit", {"state": "failed", "code": 1}, "train-3")


def stall(machine: Machine) -> None:
    machine.page.step_end_ns = 1


def fall_behind(machine: Machine) -> None:
    machine.page.step = 5000


def fail_move(machine: Machine) -> None:
    machine.note("move", {"strategy": "immediate", "ok": False, "downtime_ms": None})


def lose_worker(machine: Machine) -> None:
    machine.note("failover", {"resumed_ms": 800.0, "steps_repeated": 3})


def fail_store(machine: Machine) -> None:
    machine.journal("train-4")
    machine.store_fails = True


FAULTS: dict[str, tuple[Callable[[Machine], None], set[str]]] = {
    "DrivetrainDeviceLost": (set_(health="lost: it fell off the bus"), set()),
    "DrivetrainDeviceDegraded": (set_(health="degraded: rows wait for a reset"), set()),
    "DrivetrainUncorrectedMemoryErrors": (set_(ecc_uncorrected=2), {"DrivetrainDeviceDegraded"}),
    "DrivetrainDeviceThrottled": (set_(throttle=("hw_thermal",)), set()),
    "DrivetrainDeviceMemoryNearlyFull": (set_(memory_used_bytes=99), set()),
    "DrivetrainDeviceUnusable": (lambda machine: setattr(machine, "usable", False), set()),
    "DrivetrainDriverBroken": (lambda machine: machine.broken.add("cuda"), set()),
    "DrivetrainJobLost": (lose_job, set()),
    "DrivetrainJobFailed": (fail_job, set()),
    "DrivetrainJobStalled": (stall, set()),
    "DrivetrainMoveFailed": (fail_move, set()),
    "DrivetrainFailover": (lose_worker, set()),
    "DrivetrainReplicaBehind": (fall_behind, set()),
    "DrivetrainExporterFails": (fail_store, set()),
}
"""Alert -> the fault that fires it, and which others the same fault fires rightly."""
HARMLESS = {
    "a card at its power cap": set_(throttle=("power_cap", "application_clocks")),
    "errors that were put right": set_(ecc_corrected=5000),
    "a move that succeeded": lambda machine: machine.note(
        "move", {"strategy": "immediate", "ok": True, "downtime_ms": 90.0, "state_bytes": 10}
    ),
}


def samples(page: str) -> dict[str, float]:
    found = {}
    for line in page.splitlines():
        if not line.startswith("#"):
            name, _, value = line.rpartition(" ")
            found[name] = float(value)
    return found


def scraped(name: str) -> str:
    """The series as Prometheus keeps it."""
    bare, _, labels = name.partition("{")
    return f'{bare}{{job="drivetrain",instance="here",{labels or "}"}'


def case(name: str, before: str, after: str, expected: set[str]) -> dict[str, Any]:
    """Five minutes of the one page, then half an hour of the other."""
    first, then = samples(before), samples(after)
    first["up"] = then["up"] = 1
    series = []
    for key in {**first, **then}:
        start = f"{first[key]}x10" if key in first else "_x10"
        end = f"{then[key]}x60" if key in then else "_x60"
        series.append({"series": scraped(key), "values": f"{start} {end}"})
    ending = 'count by (alertname) (ALERTS{alertstate="firing"})'
    return {
        "name": name,
        "interval": "30s",
        "input_series": series,
        "promql_expr_test": [
            {
                "expr": ending,
                "eval_time": "17m",
                "exp_samples": [
                    {"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in sorted(expected)
                ],
            }
        ],
    }


def judged(cases: list[dict[str, Any]], folder: Path) -> subprocess.CompletedProcess[str]:
    document = {"rule_files": [str(RULES)], "evaluation_interval": "30s", "tests": cases}
    (folder / "alerts_test.yml").write_text(json.dumps(document))  # JSON is YAML
    return subprocess.run(
        ["promtool", "test", "rules", str(folder / "alerts_test.yml")],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Machine]]:
    made = iter(range(100))
    monkeypatch.setenv("DRIVETRAIN_CPU_PARTITIONS", "1")
    registry.refresh()

    def another() -> Machine:
        monkeypatch.undo()
        monkeypatch.setenv("DRIVETRAIN_CPU_PARTITIONS", "1")
        monkeypatch.setenv("DRIVETRAIN_HOME", str(tmp_path / f"home{next(made)}"))
        return Machine(monkeypatch)

    yield another
    monkeypatch.undo()
    registry.refresh()


@needs_promtool
def test_the_rules_are_rules() -> None:
    done = subprocess.run(
        ["promtool", "check", "rules", str(RULES)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(ALERTS)} rules found" in done.stdout


def test_every_alert_but_that_of_a_dead_exporter_has_a_fault() -> None:
    assert set(ALERTS) - set(FAULTS) == {"DrivetrainExporterDown"}
    assert len(ALERTS) == len(set(ALERTS))


@needs_promtool
def test_each_fault_fires_its_alert_and_no_other(
    machines: Callable[[], Machine], tmp_path: Path
) -> None:
    cases = []
    for alert, (fault, others) in FAULTS.items():
        machine = machines()
        before = machine.collector.page()
        fault(machine)
        cases.append(case(alert, before, machine.collector.page(), {alert, *others}))
    for name, change in HARMLESS.items():
        machine = machines()
        before = machine.collector.page()
        change(machine)
        cases.append(case(name, before, machine.collector.page(), set()))
    dead = case("down", before, before, {"DrivetrainExporterDown"})
    dead["input_series"] = [{"series": scraped("up"), "values": "1x10 0x60"}]
    done = judged([*cases, dead], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    # The control: a fault that nobody tells fires nothing, so expecting it fails.
    untold = case("control", before, before, {"DrivetrainDeviceLost"})
    assert judged([untold], tmp_path).returncode != 0

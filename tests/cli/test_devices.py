"""What people and programs see of the hardware."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from drivetrain import hal
from drivetrain.cli import calibrate, doctor, drivers
from drivetrain.cli import devices as cli
from drivetrain.errors import BadInput
from drivetrain.hal import probe, registry
from drivetrain.hal.drivers import cuda as cuda_driver
from drivetrain.hal.probe import Verdict

INSTALL = cuda_driver.DRIVER.install

DEVICE_FIELDS = {
    "address": str,
    "driver": str,
    "vendor": str,
    "name": str,
    "uuid": str,
    "routes": list,
    "memory_bytes": int,
    "free_bytes": int,
    "usable": (bool, type(None)),
    "checked_at": (str, type(None)),
    "reason": str,
    "capabilities": dict,
    "health": dict,
    "telemetry": dict,
}


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("DRIVETRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DRIVETRAIN_CPU_PARTITIONS", raising=False)
    monkeypatch.chdir(tmp_path)
    registry.refresh()
    yield
    registry.refresh()


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(cli.devices)
    app.command()(doctor.doctor)
    app.command()(calibrate.calibrate)
    app.add_typer(drivers.drivers_app, name="drivers")
    return app


def run(app: typer.Typer, *arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_json_has_exactly_the_promised_fields(app: typer.Typer) -> None:
    result = run(app, "devices", "--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert set(found) == {"devices", "drivers"}
    for device in found["devices"]:
        assert set(device) == set(DEVICE_FIELDS)
        for name, kind in DEVICE_FIELDS.items():
            assert isinstance(device[name], kind), name
    for driver in found["drivers"]:
        assert set(driver) == {"name", "state", "reason"}
        assert driver["state"] in ("usable", "absent", "broken", "unchecked")
    assert {"cuda", "cpu"} <= {driver["name"] for driver in found["drivers"]}


def test_a_device_is_unchecked_until_it_is_probed(app: typer.Typer) -> None:
    def cpu(*arguments: str) -> dict[str, Any]:
        found = json.loads(run(app, "devices", "--json", *arguments).stdout)["devices"]
        return next(device for device in found if device["address"] == "cpu:0")

    assert (cpu()["usable"], cpu()["checked_at"]) == (None, None)
    assert cpu("--probe")["usable"] is True
    assert cpu()["usable"] is True
    assert cpu()["checked_at"].endswith("Z")


def test_the_table_names_devices_and_reasons(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    real = dict(hal.drivers())
    broken = replace(real["cuda"], state="broken", reason="it [hangs] badly")
    monkeypatch.setattr(cli.hal, "drivers", lambda: {**real, "cuda": broken})
    text = run(app, "devices").stdout
    assert "cpu:0" in text
    assert "cuda: broken, it [hangs] badly" in text


def test_the_table_says_why_a_device_is_unusable(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    verdict = Verdict(False, 0.0, "it smokes")
    monkeypatch.setattr(probe, "verdicts", lambda found: dict.fromkeys(found, verdict))
    assert "no: it smokes" in run(app, "devices").stdout


def test_health_and_its_reasons_are_shown_and_told(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    hot = hal.Telemetry(throttle=("hw_thermal",), ecc_uncorrected=2, health="ok")
    real = cli.device_record
    monkeypatch.setattr(
        cli, "device_record", lambda device, verdict, now=None: real(device, verdict, hot)
    )
    text = run(app, "devices").stdout
    assert "degraded: 2 uncorrected memory errors" in text
    assert "hw_thermal" in text
    (device, *_) = json.loads(run(app, "devices", "--json").stdout)["devices"]
    assert device["health"]["state"] == "degraded"
    assert [reason["kind"] for reason in device["health"]["reasons"]] == ["ecc", "throttling"]
    monkeypatch.setattr(cli, "device_record", real)
    fine = next(d for d in hal.devices() if d.driver == "cpu").health()
    assert fine.state in ("ok", "strained")


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_watching_reads_the_sensors_anew_until_it_is_interrupted(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    rounds = iter([None, None])

    def sleep(seconds: float) -> None:
        try:
            next(rounds)
        except StopIteration:
            raise KeyboardInterrupt from None

    readings: list[str] = []
    real = registry.telemetry

    def telemetry(device: hal.Device) -> Any:
        readings.append(device.address)
        return real(device)

    monkeypatch.setattr(registry, "telemetry", telemetry)
    hal.devices()  # found before the clock is taken away
    monkeypatch.setattr(cli.time, "sleep", sleep)
    result = run(app, "devices", "--watch", *arguments)
    assert result.exit_code == 0
    assert readings.count(hal.devices()[0].address) == 2
    if arguments:
        assert len([json.loads(line) for line in result.stdout.splitlines()]) == 3


def test_bad_partitions_are_bad_input(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVETRAIN_CPU_PARTITIONS", "9999")
    assert isinstance(run(app, "devices", "--json").exception, BadInput)


def test_doctor_advises_on_what_is_absent_or_broken(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dict(hal.drivers())
    states = {
        "absent": "install the NVIDIA driver",
        "broken": "nvidia-smi",
    }
    for state, advice in states.items():
        cuda = replace(real["cuda"], state=state, reason="because", install=INSTALL)
        monkeypatch.setattr(cli.hal, "drivers", lambda cuda=cuda: {**real, "cuda": cuda})
        monkeypatch.setattr(cli.hal, "devices", lambda **_: registry.devices("cpu"))
        result = run(app, "doctor")
        assert advice in result.stdout
        assert result.exit_code == (1 if state == "broken" else 0)


def test_the_bundle_tells_versions_and_no_secrets(
    app: typer.Typer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "hunter2hunter2")
    real = dict(hal.drivers())
    reason = f"hunter2hunter2 {Path.home()}/secret {tmp_path}/x {os.environ['DRIVETRAIN_HOME']}"
    cuda = replace(real["cuda"], state="broken", reason=reason)
    monkeypatch.setattr(cli.hal, "drivers", lambda: {**real, "cuda": cuda})
    path = tmp_path / "report.json"
    run(app, "doctor", "--bundle", str(path))
    text = path.read_text()
    found = json.loads(text)
    assert found["python"].startswith(f"{sys.version_info.major}.")
    assert "torch" in found["packages"]
    for secret in ("hunter2", str(Path.home()) + "/", str(tmp_path)):
        assert secret not in text
    assert "<MY_TOKEN>" in text


def test_a_bundle_that_cannot_be_written_is_bad_input(app: typer.Typer, tmp_path: Path) -> None:
    result = run(app, "doctor", "--bundle", str(tmp_path / "no" / "where.json"))
    assert isinstance(result.exception, BadInput)


def test_calibrate_refuses_an_unknown_device(app: typer.Typer) -> None:
    assert isinstance(run(app, "calibrate", "cuda:77").exception, BadInput)


def test_drivers_can_be_listed_and_only_outside_ones_trusted(app: typer.Typer) -> None:
    found = json.loads(run(app, "drivers", "list", "--json").stdout)["drivers"]
    assert {"cuda", "cpu"} <= {driver["name"] for driver in found}
    assert isinstance(run(app, "drivers", "trust", "cpu").exception, BadInput)
    assert isinstance(run(app, "drivers", "untrust", "nobody").exception, BadInput)


def test_listing_devices_needs_no_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
from drivetrain.cli import devices
devices.devices(as_json=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30
    )
    assert json.loads(done.stdout)["devices"]

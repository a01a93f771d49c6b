"""Jobs on devices that torch does not know: they are placed, moved and lost like any other."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from drivetrain import hal

from .conftest import LIMIT_S, Home, until

pytestmark = pytest.mark.timeout(400)  # kernels are compiled first, on a machine that may be busy

SCRIPT = Path(__file__).with_name("chip_script.py")
ROOT = Path(__file__).parents[2]

needs_opencl = pytest.mark.skipif(
    not hal.devices("opencl"), reason="needs an OpenCL device: apt install pocl-opencl-icd"
)

SYCL = Path(os.environ.get("DRIVETRAIN_TEST_SYCL", "/nowhere")).joinpath(
    "lib",
    f"python{sys.version_info[0]}.{sys.version_info[1]}",
    "site-packages/dpctl/libDPCTLSyclInterface.so",
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of compiled kernels: the tests of this file share it."""
    return str(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def chips(home: Home, kernels: str) -> Home:
    home.env["DRIVETRAIN_CACHE"] = kernels
    return home


def begin(home: Home, *words: str, args: Sequence[str] = (), **env: str) -> Any:
    home.env.update(env)
    arguments = ("--go", str(home.go), *args)
    return home.run("--name", "j", *words, script=SCRIPT, args=arguments)


def alone(*args: str) -> dict[str, Any]:
    """The result of the script on the processor, without the runtime."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("DRIVETRAIN_")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *args],
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def move(home: Home, to: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(home.ok("migrate", "j", "--to", to, "--json"))
    assert report["ok"]
    assert report["hash_source"] == report["hash_target"] != ""
    assert (report["steps_lost"], report["steps_repeated"]) == (0, 0)
    return report


def ended(home: Home, hosted: Any) -> dict[str, Any]:
    home.go.touch()
    assert hosted.wait() == 0, hosted.err
    result: dict[str, Any] = hosted.result()
    return result


def same_training(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """The same samples in the same order; the loss to what unlike kernels may differ by."""
    exact = all(found[name] == wanted[name] for name in ("steps", "fold"))
    return exact and found["loss"] == pytest.approx(wanted["loss"], rel=1e-3)


@needs_opencl
@pytest.mark.parametrize("memory", ["", pytest.param("buffers", marks=pytest.mark.soak)])
def test_a_job_moves_to_a_chip_and_back_while_it_trains(chips: Home, memory: str) -> None:
    """With the best memory that the device has, and with such that the host has no address of."""
    chips.env.update({"DRIVETRAIN_OPENCL_MEMORY": memory} if memory else {})
    there_and_back(chips, "opencl:0", "hal_opencl")  # torch has another ``opencl``


@pytest.mark.skipif(not SYCL.is_file(), reason="dpctl and Intel's runtime are not installed")
def test_a_job_moves_to_intels_runtime_by_sycl_and_back_while_it_trains(chips: Home) -> None:
    chips.env["DRIVETRAIN_SYCL_LIBRARY"] = str(SYCL)
    there_and_back(chips, "sycl:0", "sycl")


def there_and_back(chips: Home, address: str, place: str) -> None:
    hosted = begin(chips, "--on", "cpu:0")
    chips.wait_step(2, "j")
    there = move(chips, address)
    assert there["to"] == address
    chips.wait_step(there["step"] + 2, "j")
    back = move(chips, "cpu:1")
    found = ended(chips, hosted)
    assert found["places"][place] == back["step"] - there["step"] >= 2
    assert sum(found["places"].values()) == found["steps"]
    assert found["device"] == "cpu"
    wanted = alone()
    assert same_training(found, wanted)
    # The control: one step's samples lost on the way would show.
    assert not same_training({**found, "fold": found["short"]}, wanted)
    chips.assert_nothing_left()


def lost(home: Home, count: int = 1) -> dict[str, Any]:
    """The report of the job's failover number ``count``, once it is there."""

    def there() -> list[dict[str, Any]]:
        job = home.job("j")
        found = [] if job is None else job.view.failovers
        return found if len(found) >= count else []

    return dict(until(there, "the failover")[count - 1])


@needs_opencl
@pytest.mark.soak
def test_a_killed_worker_on_a_chip_goes_on_there_or_on_its_backup_and_one_on_the_cpu_on_the_chip(
    chips: Home,
) -> None:
    hosted = begin(chips, "--on", "cpu:0", "--backup", "opencl:0", "--replicate-every", "1")
    os.kill(chips.wait_step(3, "j"), signal.SIGKILL)
    first = lost(chips)
    assert (first["from"], first["to"]) == ("cpu:0", "opencl:0")
    os.kill(chips.wait_step(first["step"] + 2, "j"), signal.SIGKILL)
    second = lost(chips, 2)
    assert (second["from"], second["to"]) == ("opencl:0", "opencl:0")
    for report in (first, second):
        assert report["steps_repeated"] <= 1
        assert (report["samples_lost"], report["samples_doubled"]) == (0, 0)
    move(chips, "cpu:1")
    found = ended(chips, hosted)
    assert found["places"]["hal_opencl"] >= 2
    assert same_training(found, alone())
    chips.assert_nothing_left()


@pytest.mark.soak
@pytest.mark.parametrize("fault", [True, False])
def test_a_device_that_is_lost_is_left_and_one_that_is_not_is_kept(
    chips: Home, fault: bool
) -> None:
    """On a made-up device, whose memory the host cannot touch and which can be told to fail."""
    # Much later than the first steps: a replica must be there to go on from.
    asked = "memory=1G" + (" fault=work:600:lost" if fault else "")
    hosted = begin(chips, "--on", "simulated:0", "--backup", "cpu:1", DRIVETRAIN_SIMULATED=asked)
    chips.wait_step(3, "j")
    if fault:
        report = lost(chips)
        assert (report["from"], report["to"]) == ("simulated:0", "cpu:1")
        assert (report["samples_lost"], report["samples_doubled"]) == (0, 0)
    else:
        move(chips, "cpu:1")
    found = ended(chips, hosted)
    assert len(chips.job("j").view.failovers) == fault  # type: ignore[union-attr]
    assert found["places"]["simulated"] >= 2
    assert same_training(found, alone())


def template() -> Any:
    """The module of the tests of the driver template."""
    path = ROOT / "tests/hal/template/test_template_in_python.py"
    spec = importlib.util.spec_from_file_location("template_in_python", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.soak
def test_a_plugged_in_chip_trains_once_its_driver_can_do_what_it_needs(chips: Home) -> None:
    """The driver template: as it begins it is refused, and finished by the page it takes a job."""
    guide = template()
    package = guide.Package(chips.folder)
    chips.env.update(
        (name, package.environment[name]) for name in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    )
    refused = begin(chips, "--on", "minichip:0")
    assert refused.wait() != 0
    assert "minichip does not have this yet" in refused.err
    for name in guide.STEPS:
        package.step(name)
    package.declare()
    chips.ok("devices", "--probe")
    hosted = begin(chips, "--on", "minichip:1")
    there = chips.wait_step(2, "j")
    assert there
    move(chips, "cpu:0")
    found = ended(chips, hosted)
    assert found["places"]["minichip"] >= 2
    assert same_training(found, alone())


@needs_opencl
@pytest.mark.soak
def test_autocast_and_a_scaler_go_along(chips: Home) -> None:
    hosted = begin(chips, "--on", "opencl:0", args=("--amp",))
    chips.wait_step(2, "j")
    move(chips, "cpu:1")
    found = ended(chips, hosted)
    assert found["places"]["hal_opencl"] >= 2
    wanted = alone("--amp")
    assert (found["fold"], found["scale"]) == (wanted["fold"], wanted["scale"])
    assert found["loss"] == pytest.approx(wanted["loss"], rel=0.05)
    assert alone()["scale"] != wanted["scale"]

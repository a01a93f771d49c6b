"""Discovery: passive, complete, with reasons, and unharmed by any one driver."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from drivetrain import hal
from drivetrain.errors import BadInput
from drivetrain.hal import loading, registry
from drivetrain.hal.driver import Driver

EXPECTED = {
    "hang": "broken",
    "abort": "broken",
    "missing": "absent",
    "garbage": "broken",
    "wrong": "broken",
    "flood": "broken",
    "silent": "broken",
    "orphan": "broken",
    "raise": "broken",
}


def addresses(*arguments: object, **options: object) -> list[str]:
    return [device.address for device in hal.devices(*arguments, **options)]  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _no_opencl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever OpenCL platforms the machine has, none is registered here."""
    monkeypatch.setenv("OCL_ICD_VENDORS", str(tmp_path / "no-vendors"))
    registry.refresh()


@pytest.fixture
def trusted(outside: Path) -> Path:
    registry.trust("alpha")
    registry.trust("beta")
    return outside


@pytest.fixture
def cuda_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cuda driver is asked in a child, as on a machine with NVIDIA files."""
    real = loading.built_in

    def built_in(name: str) -> Driver:
        driver = real(name)
        return replace(driver, absent=lambda: "") if name == "cuda" else driver

    monkeypatch.setattr(loading, "built_in", built_in)


def test_the_functions_keep_their_names_after_the_submodules_are_loaded() -> None:
    assert "cpu" in hal.drivers()

    assert hal.device().driver
    assert hal.drivers()["cpu"].state == "usable"


def test_outside_drivers_are_listed_and_never_imported_before_they_are_trusted(
    outside: Path,
) -> None:
    state = hal.drivers()["alpha"]
    assert (state.state, state.reason) == ("unchecked", "not trusted")
    assert state.source == "acme-drivers 1.0"
    assert hal.devices("alpha") == ()
    assert not (outside / "imported-by").exists()


def test_a_trusted_driver_is_imported_in_children_only(trusted: Path) -> None:
    assert addresses("alpha") == ["alpha:0", "alpha:1"]
    hal.device("alpha:0").telemetry()
    importers = (trusted / "imported-by").read_text().split()
    assert importers
    assert str(os.getpid()) not in importers
    assert "acme_drivers" not in sys.modules


def test_trust_is_in_one_distribution_and_ends_with_untrust(trusted: Path) -> None:
    points = trusted / "acme_drivers-1.0.dist-info" / "entry_points.txt"
    points.write_text(points.read_text().replace("acme_drivers:ALPHA", "elsewhere:ALPHA"))
    registry.refresh()
    assert hal.drivers()["alpha"].reason == "not trusted"
    assert hal.drivers()["beta"].state == "usable"
    registry.untrust("beta")
    assert hal.drivers()["beta"].reason == "not trusted"


def test_trust_that_cannot_be_kept_is_bad_input(
    outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVETRAIN_HOME", str(outside / "acme_drivers.py"))
    with pytest.raises(BadInput, match="cannot be written, nothing was changed"):
        registry.trust("beta")
    assert hal.drivers()["beta"].reason == "not trusted"


@pytest.mark.parametrize("name", ["nobody", "cpu"])
def test_only_an_outside_driver_can_be_trusted(outside: Path, name: str) -> None:
    with pytest.raises(BadInput):
        registry.trust(name)
    with pytest.raises(BadInput):
        registry.untrust(name)


def test_an_entry_point_that_names_no_driver_is_broken_with_the_reason(outside: Path) -> None:
    registry.trust("gamma")
    state = hal.drivers()["gamma"]
    assert state.state == "broken"
    assert "is no drivetrain.hal.driver.Driver named gamma" in state.reason


def test_a_device_reached_by_two_drivers_is_listed_once_with_its_routes(trusted: Path) -> None:
    assert addresses() == ["alpha:0", "alpha:1", "beta:1", "cpu:0"]
    assert hal.device("alpha:0").routes == ("alpha:0", "beta:0")
    assert addresses(all_routes=True) == ["alpha:0", "alpha:1", "beta:0", "beta:1", "cpu:0"]
    assert hal.device("beta:0").address == "beta:0"
    assert addresses("beta") == ["beta:0", "beta:1"]
    assert addresses(vendor="ACME") == ["alpha:0", "alpha:1", "beta:1"]


def test_an_address_may_be_a_uuid_or_the_unique_beginning_of_one(trusted: Path) -> None:
    assert hal.device("alpha://alpha-1").address == "alpha:1"
    with pytest.raises(BadInput, match="several devices: alpha-0, alpha-1"):
        hal.device("alpha://alpha-")


def test_devices_are_cached_and_hashable(trusted: Path) -> None:
    first = hal.device("alpha:0")
    assert hal.device("alpha:0") is first
    assert hal.devices()[0] is first
    assert {first: 1}[hal.device("alpha://alpha-0")] == 1


@pytest.mark.parametrize(
    "address", ["cuda:99", "cpu:7", "cpu", "nonsense", "tpu:0", "cpu:-1", "other/cpu:0", "cpu://"]
)
def test_an_unknown_address_is_bad_input_that_names_those_that_exist(address: str) -> None:
    with pytest.raises(BadInput, match="cpu:0"):
        hal.device(address)


@pytest.mark.parametrize("address", [0, 1, None, b"cpu:0"])
def test_an_address_that_is_no_text_is_refused_and_not_the_default(address: Any) -> None:
    with pytest.raises(BadInput, match="an address is a text"):
        hal.device(address)


def test_an_unknown_driver_is_bad_input_that_names_those_that_exist() -> None:
    with pytest.raises(BadInput, match="cuda, hip, opencl, sycl, level_zero, cpu"):
        hal.devices("voodoo")


def test_a_driver_switched_off_is_unchecked_and_not_imported(trusted: Path) -> None:
    Path("drivetrain.toml").write_text('[drivers]\ndisable = ["alpha"]\n')
    home = Path(os.environ["DRIVETRAIN_HOME"])
    (home / "drivetrain.toml").write_text('[drivers]\ndisable = ["beta"]\n')
    registry.refresh()
    (trusted / "imported-by").unlink(missing_ok=True)
    assert addresses() == ["cpu:0"]
    assert hal.drivers()["alpha"].state == "unchecked"
    assert "switched off in" in hal.drivers()["beta"].reason
    assert not (trusted / "imported-by").exists()


@pytest.mark.parametrize(
    "text", ["[drivers", '[drivers]\ndisable = "cuda"', "[drivers]\ndisable = [1]", "drivers = 3"]
)
def test_a_broken_settings_file_is_bad_input_that_names_it(text: str) -> None:
    Path("drivetrain.toml").write_text(text)
    registry.refresh()
    with pytest.raises(BadInput, match=r"drivetrain\.toml"):
        hal.drivers()


@pytest.mark.parametrize("fault", sorted(set(EXPECTED) - {"hang"}))
def test_one_drivers_fault_leaves_the_others_listed(
    trusted: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("DRIVETRAIN_FAULT_DISCOVERY", f"alpha={fault}")
    registry.refresh()
    assert hal.drivers()["alpha"].state == EXPECTED[fault]
    assert hal.drivers()["alpha"].reason
    assert addresses() == ["beta:0", "beta:1", "cpu:0"]


def test_drivers_that_hang_cost_one_limit_together_and_leave_no_process(
    trusted: Path, cuda_asked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVETRAIN_FAULT_DISCOVERY", "cuda=hang,alpha=hang")
    monkeypatch.setenv("DRIVETRAIN_TEST_MARK", str(trusted))
    registry.refresh()
    started = time.monotonic()
    states = hal.drivers()
    took = time.monotonic() - started
    assert [states[name].state for name in ("cuda", "alpha")] == ["broken", "broken"]
    assert "did not answer within 2 s" in states["cuda"].reason
    assert addresses() == ["beta:0", "beta:1", "cpu:0"]
    assert 2 <= took < 4, "both limits run at the same time"
    assert not _marked(str(trusted))


def test_what_a_dead_driver_left_behind_is_ended(
    trusted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVETRAIN_FAULT_DISCOVERY", "alpha=orphan")
    monkeypatch.setenv("DRIVETRAIN_TEST_MARK", str(trusted))
    registry.refresh()
    assert "exit code 3" in hal.drivers()["alpha"].reason
    deadline = time.monotonic() + 5
    while _marked(str(trusted)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _marked(str(trusted))


def _marked(mark: str) -> list[int]:
    """Living processes, but this, that carry the mark in their environment."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            living = process.info["status"] != psutil.STATUS_ZOMBIE
            if (
                living
                and process.pid != os.getpid()
                and process.environ().get("DRIVETRAIN_TEST_MARK") == mark
            ):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def _faulty_discoveries(count: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Discoveries with faults in one or two of three drivers; all but 1 in 1,000 must be right."""
    dice = random.Random(seed)
    wrong: list[str] = []
    slowest = 0.0
    for _ in range(count):
        faulty = dice.sample(["cuda", "alpha", "beta"], dice.choice([1, 1, 1, 2]))
        faults = {name: dice.choice(sorted(EXPECTED)) for name in faulty}
        text = ",".join(f"{name}={fault}" for name, fault in faults.items())
        monkeypatch.setenv("DRIVETRAIN_FAULT_DISCOVERY", text)
        registry.refresh()
        started = time.monotonic()
        states = {name: state.state for name, state in hal.drivers().items()}
        listed = addresses(all_routes=True)
        slowest = max(slowest, time.monotonic() - started)
        right_states = {
            # Without a GPU in the machine, a cuda driver that works says absent.
            name: {EXPECTED[faults[name]]} if name in faults else {"usable", "absent"}
            for name in ("cuda", "alpha", "beta")
        }
        right_list = [f"{n}:{i}" for n in ("alpha", "beta") if n not in faults for i in (0, 1)]
        without_cuda = [address for address in listed if not address.startswith("cuda:")]
        if without_cuda != [*right_list, "cpu:0"] or not all(
            states[name] in right for name, right in right_states.items()
        ):
            wrong.append(f"{text}: {states} {listed}")
    print(f"{count} discoveries, {len(wrong)} wrong, the slowest took {slowest:.2f} s")
    assert len(wrong) <= count / 1000, wrong[:5]
    assert slowest <= 10


def test_a_sample_of_faulty_discoveries_ends_with_the_right_list(
    trusted: Path, cuda_asked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _faulty_discoveries(12, 3, monkeypatch)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_a_thousand_faulty_discoveries_end_with_the_right_list(
    trusted: Path, cuda_asked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    _faulty_discoveries(1000, 20261120, monkeypatch)


def test_the_proof_notices_a_list_that_is_wrong(
    trusted: Path, cuda_asked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with alpha switched off, lists lack its devices and the proof must fail."""
    Path("drivetrain.toml").write_text('[drivers]\ndisable = ["alpha"]\n')
    with pytest.raises(AssertionError):
        _faulty_discoveries(2, 1, monkeypatch)


def test_a_machine_without_nvidia_files_starts_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    if not loading.built_in("cuda").absent():
        pytest.skip("this machine has NVIDIA files")

    def no_child(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", no_child)
    registry.refresh()
    assert hal.drivers()["cuda"].state == "absent"
    assert "/dev/nvidia" in hal.drivers()["cuda"].reason


def test_devices_are_found_anew_in_a_fork_of_a_process_that_found_them() -> None:
    code = """
import os
from drivetrain import hal
assert hal.devices()
pid = os.fork()
if pid == 0:
    os.environ["DRIVETRAIN_CPU_PARTITIONS"] = "1"
    ok = hal.device("cpu:0").telemetry().health == "ok" and len(hal.devices("cpu")) == 1
    os._exit(0 if ok else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def test_finding_devices_imports_neither_torch_nor_a_vendors_library() -> None:
    code = """
import sys
sys.modules["torch"] = None
from drivetrain import hal
hal.devices()
loaded = [name for name in sys.modules if name.split(".")[0] in ("pynvml", "cuda", "numpy")]
assert not loaded, loaded
maps = open("/proc/self/maps").read()
assert "libcuda" not in maps and "libnvidia" not in maps
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)

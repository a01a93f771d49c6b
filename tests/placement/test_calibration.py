"""Peaks: measured in a worker, kept per device and driver version, never half-read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import HalError
from drivetrain.hal import config, registry
from drivetrain.placement import calibration


@pytest.fixture(autouse=True)
def _own_state(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVETRAIN_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


@pytest.fixture
def device() -> hal.Device:
    return hal.device("cpu:0")


FOUND = {
    "torch_version": "1",
    "peak_flops": {"float32": 1e9},
    "copy_gbps": 2.0,
    "launch_us": 3.0,
    "links": {"to host": 4.0},
}


def test_a_cpu_is_measured_and_the_result_kept(device: hal.Device) -> None:
    pytest.importorskip("tree_sitter_cuda")
    assert calibration.load(device) is None
    told: list[tuple[str, float]] = []
    found = calibration.calibrate(device, progress=lambda what, share: told.append((what, share)))
    assert calibration.load(device) == found
    for dtype in ("float32", "float64"):
        assert 1e8 < found.peak_flops[dtype] < 1e15
        assert found.measured_with[dtype]
    assert 0.1 < found.copy_gbps < 1e4
    assert 0 < found.launch_us < 1e4
    assert {"copy", "launch"} <= set(found.measured_with)
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert told[-1] == ("done", 1.0)
    assert told.count(("done", 1.0)) == 1


def test_torch_measures_only_what_the_hal_leaves_to_it(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[Any] = []

    def measure(request: Any, *_: Any) -> Any:
        tasks.append((request["task"], request.get("dtypes")))
        if request["task"] == "torch":
            return {"torch_version": "9", "peak_flops": {"bfloat16": 5e9}}
        return {**FOUND, "torch_version": "", "left": ["bfloat16", "float16"]}

    monkeypatch.setattr(calibration, "_measure", measure)
    found = calibration.calibrate(device)
    assert tasks == [("device", None), ("torch", ["bfloat16", "float16"])]
    assert found.peak_flops == {"float32": 1e9, "bfloat16": 5e9}
    assert found.measured_with["bfloat16"] == "torch 9"
    assert found.measured_with["float16"].startswith("not measured")
    assert found.torch_version == "9"


def test_without_torch_the_rest_is_measured_and_the_reason_told(
    device: hal.Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tree_sitter_cuda")
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = calibration.calibrate(device)
    assert found.peak_flops["float32"] > 1e8
    assert "bfloat16" not in found.peak_flops
    assert "no torch here; install it with: pip install" in found.measured_with["bfloat16"]
    assert found.torch_version == ""


def test_a_result_holds_for_one_driver_version(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_measure", lambda *_: FOUND)
    calibration.calibrate(device)
    updated = replace(device, info=replace(device.info, driver_version="another"))
    assert calibration.load(device) is not None
    assert calibration.load(updated) is None


def test_a_result_that_cannot_be_kept_is_a_warning(device: hal.Device, tmp_path: Path) -> None:
    no_folder = tmp_path / "file"
    no_folder.touch()
    measured = calibration.Calibration(device.uuid, device.info.driver_version, "", 0.0)
    with pytest.warns(RuntimeWarning, match="is not kept"):
        calibration.save(device, measured, home=no_folder)
    assert calibration.load(device, home=no_folder) is None


def test_what_was_measured_is_the_roofline_of_profiles(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert calibration.peaks(device) is None
    monkeypatch.setattr(calibration, "_measure", lambda *_: FOUND)
    found = calibration.calibrate(device)
    roof = calibration.peaks(device)
    assert roof == hal.Peaks(2 * found.copy_gbps, found.peak_flops)
    assert hal.profile(peaks=calibration.peaks).peaks(device.address) == roof


def test_a_worker_that_does_not_see_the_device_gives_the_reason(device: hal.Device) -> None:
    gone = replace(device, uuid="CPU-999", info=replace(device.info, uuid="CPU-999"))
    with pytest.raises(HalError, match="does not see the cpu device CPU-999"):
        calibration.calibrate(gone)
    assert calibration.load(gone) is None


def test_links_are_measured_between_devices_of_any_drivers(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=1")
    registry.refresh()
    other = hal.device("simulated:0")
    links = calibration.calibrate_links([device, other])
    assert set(links) == {(device.uuid, other.uuid), (other.uuid, device.uuid)}
    assert all(0 < gbps < 1e4 for gbps in links.values())


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import os; os.abort()", "-6|Abort"),
        ("import time; time.sleep(60)", "did not end within 1 s"),
        ("import os; print('{\"result\": 7}', flush=True); os._exit(3)", "ended with 3"),
    ],
)
def test_a_worker_that_dies_or_hangs_is_an_error_with_the_reason(
    device: hal.Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, reason: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(HalError, match=reason):
        calibration.calibrate(device, limit_s=1 if "sleep" in body else 30)


@pytest.mark.parametrize("spoilt", [{}, {"peak_flops": 3}, {"copy_gbps": "x"}, [], None, 7])
def test_a_spoilt_entry_is_no_calibration(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch, spoilt: Any
) -> None:
    monkeypatch.setattr(calibration, "_measure", lambda *_: FOUND)
    calibration.calibrate(device)
    path = config.state_folder() / calibration.FILE
    kept = config.read_json(path)
    [key] = kept
    entry = {**kept[key], **spoilt} if spoilt and isinstance(spoilt, dict) else spoilt
    config.write_json(path, {key: entry})
    assert calibration.load(device) is None


def test_links_join_what_is_known_of_each_device(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = [
        replace(
            device,
            address=f"cuda:{i}",
            uuid=f"GPU-{i}",
            info=replace(device.info, driver="cuda", index=i, uuid=f"GPU-{i}"),
        )
        for i in range(2)
    ]
    assert calibration.calibrate_links(gpus[:1]) == {}
    monkeypatch.setattr(calibration, "_measure", lambda *_: FOUND)
    for gpu in gpus:
        calibration.calibrate(gpu)
    seen: list[str] = []

    def measure(request: Any, environment: dict[str, str], *_: Any) -> Any:
        seen.append(environment["CUDA_VISIBLE_DEVICES"])
        return {"links": [[0, 1, 300.0], [1, 0, 200.0]]}

    monkeypatch.setattr(calibration, "_measure", measure)
    calibration.calibrate_links(gpus)
    assert seen == ["GPU-0,GPU-1"]
    known = calibration.load(gpus[0])
    assert known is not None
    assert known.links == {"to host": 4.0, "GPU-1": 300.0}

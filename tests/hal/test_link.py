"""Links between devices: their kind, and a bandwidth that is measured once and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import DriverMissing, HalError
from drivetrain.hal import LinkKind, link
from drivetrain.hal.config import state_folder


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "_SAMPLE_BYTES", 1 << 20)


def test_a_link_is_measured_once_and_kept_for_the_machine(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = rig.device.link(rig.other)
    assert found.kind is LinkKind.PEER
    assert found.bandwidth_gbps is not None
    assert found.bandwidth_gbps > 0
    monkeypatch.setattr(link, "_measured", lambda *_: pytest.fail("measured again"))
    assert rig.device.link(rig.other) == found
    hal.close_all()
    assert rig.device.link(rig.other) == found
    known = json.loads((state_folder() / link.FILE).read_text())
    assert found.bandwidth_gbps in known.values()


def test_links_between_drivers_are_staged_and_each_direction_is_its_own(
    rig_of: Callable[[str], Any],
) -> None:
    cpu, simulated = rig_of("cpu").device, rig_of("simulated").device
    assert cpu.link(simulated).kind is LinkKind.STAGED
    assert simulated.link(cpu).kind is LinkKind.STAGED
    assert cpu.link(cpu).kind is LinkKind.SAME
    assert len(json.loads((state_folder() / link.FILE).read_text())) == 3


def test_a_device_that_cannot_be_opened_has_no_link_and_the_reason_is_told(
    rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from drivetrain.hal.drivers import cuda_backend

    rig = rig_of("cuda")

    def load() -> None:
        raise DriverMissing("libcuda.so.1 is gone")

    monkeypatch.setattr(cuda_backend, "load", load)
    found = rig.device.link(hal.device("cpu:0"))
    assert found.kind is LinkKind.NONE
    assert found.bandwidth_gbps is None
    assert "is gone" in found.reason


def test_devices_without_a_way_say_so(
    rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of("simulated")
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=2 groups=none")
    found = rig.device.link(rig.other)
    assert found.kind is LinkKind.NONE
    assert "pinned" in found.reason


def test_a_measurement_that_fails_is_a_link_without_a_number(
    rig: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> float:
        raise HalError("no room")

    monkeypatch.setattr(link, "_measured", fails)
    found = rig.device.link(rig.other)
    assert found.kind is LinkKind.PEER
    assert found.bandwidth_gbps is None
    assert "no room" in found.reason


def test_what_is_kept_may_be_spoilt_or_unwritable(
    rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = rig_of("cpu").device
    path = state_folder() / link.FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    for text in ("", "[]", "no json", '{"a": "b"}'):
        path.write_text(text)
        assert device.link(device).bandwidth_gbps
    path.unlink()

    def cannot(*_: object) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(link.config, "write_json", cannot)
    assert device.link(device).bandwidth_gbps

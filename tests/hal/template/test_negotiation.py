"""Versions of the driver interface: the last and the one before are taken, others are refused."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from textwrap import dedent

import pytest

from drivetrain import hal
from drivetrain.errors import Unsupported
from drivetrain.hal import probe, registry
from drivetrain.hal.driver import API_VERSION, OLDEST_API_VERSION

# As it was written for version 1: no `open`, no `known`, no groups; sensors of that time.
DRIVER = dedent(
    """
    from drivetrain.hal.driver import DeviceInfo, Driver, Isolation, Telemetry

    def discover():
        return (
            DeviceInfo(driver="oldchip", index=0, name="Old chip", vendor="old", uuid="OLD-0",
                       memory_bytes=1 << 20, isolation=Isolation(environment={"OLDCHIP": "0"})),
        )

    DRIVER = Driver(
        name="oldchip", vendor="old", absent=lambda: "", discover=discover,
        telemetry=lambda info: Telemetry(temperature_c=41.0, health="ok"),
        probe=lambda info: None, api_version=VERSION,
    )
    """
)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site"
    metadata = site / "oldchip-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: oldchip\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[drivetrain.drivers]\noldchip = oldchip:DRIVER\n")
    monkeypatch.syspath_prepend(str(site))
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), before])))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    importlib.invalidate_caches()
    return site


def install(site: Path, version: int) -> None:
    (site / "oldchip.py").write_text(DRIVER.replace("VERSION", str(version)))
    registry.trust("oldchip")


def test_a_driver_of_the_version_before_is_found_read_and_probed(site: Path) -> None:
    assert OLDEST_API_VERSION == API_VERSION - 1
    install(site, OLDEST_API_VERSION)
    (device,) = hal.devices("oldchip")
    assert device.name == "Old chip"
    now = device.telemetry()
    assert (now.temperature_c, now.ecc_corrected, now.vendor_specific) == (41.0, None, ())
    assert device.health().state == "ok"
    assert probe.probe([device])[device].usable is True
    assert device.isolation().environment == {"OLDCHIP": "0"}
    with pytest.raises(Unsupported, match="serves PyTorch only"):
        device.stream()


@pytest.mark.parametrize("version", [OLDEST_API_VERSION - 1, API_VERSION + 1])
def test_a_driver_of_any_other_version_is_broken_with_the_reason(site: Path, version: int) -> None:
    install(site, version)
    state = hal.drivers()["oldchip"]
    assert state.state == "broken"
    assert f"speaks version {version}" in state.reason
    assert f"takes {OLDEST_API_VERSION} to {API_VERSION}" in state.reason
    assert hal.devices("oldchip") == ()

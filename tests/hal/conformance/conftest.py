"""A driver of somebody else's, installed and trusted, for the kit to check."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from drivetrain.hal import registry

ACME = '''
"""Three drivers: one that works (on the simulated device's memory and threads), one that opens no
device, one that lies about its groups."""

import os

from drivetrain.hal.driver import DeviceInfo, Driver
from drivetrain.hal.drivers import simulated
from drivetrain.hal.drivers.simulated_backend import Simulated


class Backend(Simulated):
    def __init__(self, info):
        super().__init__(info, simulated.Configuration(count=2, bandwidth_gbps=4))
        self.groups = GROUPS | LIES


class Crashing(Backend):
    def fill(self, *given):
        os.abort()


GROUPS = frozenset({"pinned", "timing"})
LIES = frozenset(os.environ.get("ACME_LIES", "").split())


def discover(name):
    return tuple(
        DeviceInfo(
            driver=name,
            index=index,
            name="Acme chip",
            vendor="acme",
            uuid=f"{name}-{index}",
            memory_bytes=256 << 20,
            driver_version="7",
        )
        for index in range(2)
    )


def driver(name, open):
    return Driver(
        name=name,
        vendor="acme",
        absent=lambda: "",
        discover=lambda: discover(name),
        telemetry=simulated.telemetry,
        probe=lambda info: None,
        open=open,
        groups=GROUPS | LIES if open else frozenset(),
    )


ACME = driver("acme", Backend)
CRASHING = driver("crashing", Crashing)
TORCHY = driver("torchy", None)
'''


@pytest.fixture
def acme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path with the drivers ``acme``, ``crashing`` and ``torchy``, trusted."""
    site = tmp_path / "site"
    metadata = site / "acme_kit-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "acme_kit.py").write_text(ACME)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-kit\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        dedent(
            """
            [drivetrain.drivers]
            acme = acme_kit:ACME
            crashing = acme_kit:CRASHING
            torchy = acme_kit:TORCHY
            """
        )
    )
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), before])))
    monkeypatch.syspath_prepend(str(site))
    for name in ("acme", "crashing", "torchy"):
        drivetrain("drivers", "trust", name, check=True)
    registry.refresh()
    return site


def drivetrain(
    *words: str, check: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return subprocess.run(
        [sys.executable, "-m", "drivetrain", *words],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=check,
    )


@pytest.fixture
def command() -> Callable[..., subprocess.CompletedProcess[str]]:
    return drivetrain


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machines that run tests are shared, and no promise here is about discovery's limit."""
    monkeypatch.setenv("DRIVETRAIN_DISCOVERY_LIMIT_S", "8")

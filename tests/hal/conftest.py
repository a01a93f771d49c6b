"""A state folder of one's own, a package that offers outside drivers, and patience.

The machines that run these tests are shared, so single hypothesis examples have no deadline.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import settings

from drivetrain.hal import registry

settings.register_profile("hal", deadline=None, max_examples=60)
settings.load_profile("hal")

OUTSIDE = '''
"""Two drivers; importing them leaves a mark."""

import os
import time
from pathlib import Path

from drivetrain.errors import HalError, OutOfMemory
from drivetrain.hal.driver import Capabilities, DeviceInfo, Driver, Isolation, Telemetry

with open(Path(__file__).with_name("imported-by"), "a") as file:
    print(os.getpid(), file=file)


def _driver(name, pci):
    def discover():
        return tuple(
            DeviceInfo(
                driver=name,
                index=index,
                name=f"{name} chip",
                vendor="acme",
                uuid=f"{name}-{index}",
                pci=pci if index == 0 else "",
                memory_bytes=1 << 30,
                driver_version="7",
                isolation=Isolation({"ACME": str(index)}, None, 1, "acme:0"),
                telemetry=Telemetry(memory_used_bytes=1 << 20, health="ok"),
            )
            for index in range(2)
        )

    def telemetry(info):
        return Telemetry(utilisation=0.5, memory_used_bytes=2 << 20, health="ok")

    def probe(info):
        how = os.environ.get("ACME_PROBE", "")
        if how == "hang":
            time.sleep(3600)
        elif how == "abort":
            os.abort()
        elif how == "broken":
            raise HalError("the chip smokes", code="error")
        elif how == "full":
            raise OutOfMemory("someone else has it all", code="out_of_memory")
        elif os.environ["ACME"] != str(info.index):
            raise HalError("not isolated", code="error")

    return Driver(
        name=name,
        vendor="acme",
        absent=lambda: "",
        discover=discover,
        telemetry=telemetry,
        probe=probe,
        groups=frozenset({"compute"}),
    )


ALPHA = _driver("alpha", "0000:05:00.0")
BETA = _driver("beta", "00000000:05:00.0")
NOT_A_DRIVER = object()
'''


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("DRIVETRAIN_HOME", str(tmp_path / "home"))
    for name in ("DRIVETRAIN_CPU_PARTITIONS", "DRIVETRAIN_FAULT_DISCOVERY", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    registry.refresh()
    yield
    registry.refresh()


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the path that is an installed package with drivers alpha, beta and gamma.

    ``imported-by`` in it lists the processes that imported it; gamma's entry point names no driver.
    """
    site = tmp_path / "site"
    metadata = site / "acme_drivers-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "acme_drivers.py").write_text(OUTSIDE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-drivers\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        dedent(
            """
            [drivetrain.drivers]
            alpha = acme_drivers:ALPHA
            beta = acme_drivers:BETA
            gamma = acme_drivers:NOT_A_DRIVER
            """
        )
    )
    monkeypatch.syspath_prepend(str(site))
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), before])))
    return site

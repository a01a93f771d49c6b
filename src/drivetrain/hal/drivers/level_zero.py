"""Intel devices through Level Zero, listed by its loader in a child process; only the probe and
`open_device` make a context. Kernels come as SPIR-V that exists already; from source they go
through the devices' other routes, OpenCL among them."""

from __future__ import annotations

import os
import time
from pathlib import Path

from drivetrain.errors import DriverMissing
from drivetrain.hal.driver import (
    Backend,
    Capabilities,
    DeviceInfo,
    Driver,
    Isolation,
    hidden_from_all,
)
from drivetrain.hal.drivers import level_zero_api
from drivetrain.hal.drivers.memory_probe import fill_and_read
from drivetrain.hal.telemetry import Telemetry

# --- names ---------------------------------------------------------------------------------------

NAME = "level_zero"
VENDOR = "intel"
GROUPS = frozenset({"compute", "managed", "peer", "pinned", "timing"})
ROOT = Path("/")


# --- discovery -----------------------------------------------------------------------------------


def _intel_on_the_bus(root: Path) -> bool:
    """A GPU or accelerator of Intel's that no driver needs to be loaded for to be seen."""
    for device in (root / "sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = (device / "vendor").read_text(), (device / "class").read_text()
        except OSError:
            continue
        if vendor.strip() == "0x8086" and kind.startswith(("0x03", "0x12")):
            return True
    return False


def absent(root: Path = ROOT) -> str:
    """Why there is no Level Zero device here; ``""`` when the loader is worth asking."""
    selected = os.environ.get(level_zero_api.SELECTED, "")
    if selected:
        if Path(selected).is_file():
            return ""
        return f"{level_zero_api.SELECTED}={selected} names no file"
    if not level_zero_api.find([level_zero_api.LOADER], root):
        return f"no Level Zero loader ({level_zero_api.LOADER})"
    # The loader looks for drivers by name; this variable names others.
    if os.environ.get("ZE_ENABLE_ALT_DRIVERS"):
        return ""
    if not level_zero_api.find(level_zero_api.DRIVERS, root):
        if _intel_on_the_bus(root):
            return (
                "an Intel GPU is on the PCI bus and the Level Zero loader is installed, but no "
                "driver for it (libze_intel_gpu.so.1)"
            )
        return "the Level Zero loader is installed, but no driver (libze_intel_gpu.so.1)"
    nodes = [*(root / "dev/dri").glob("renderD*"), *(root / "dev/accel").glob("accel*")]
    if not nodes and not (root / "dev/dxg").exists():
        return "Level Zero is installed, but there is no device (no /dev/dri/renderD*)"
    return ""


def on_the_bus(pci: str) -> str:
    """A place on the bus as the loader tells it, where the machine has it; else empty."""
    return pci if pci and (ROOT / "sys/bus/pci/devices" / pci).exists() else ""


def discover() -> tuple[DeviceInfo, ...]:
    """Every device of every driver. Loads the vendor's libraries, which may hang or crash."""
    from drivetrain.hal.drivers.level_zero_backend import Seen, groups_of, seen

    api = level_zero_api.load()
    found = seen(api)
    if not found:
        raise DriverMissing(
            "the Level Zero loader and driver work, but show no device"
            + (" under ZE_AFFINITY_MASK" if os.environ.get("ZE_AFFINITY_MASK") else ""),
            code="no_device",
            driver=NAME,
        )

    def described(index: int, each: Seen) -> DeviceInfo:
        facts = each.facts
        pci = on_the_bus(each.pci)
        slices = facts.numSlices * facts.numSubslicesPerSlice
        integrated = bool(facts.flags & level_zero_api.Ze.DEVICE_PROPERTY_FLAG_INTEGRATED)
        return DeviceInfo(
            driver=NAME,
            index=index,
            name=facts.name.decode(errors="replace") or "Level Zero device",
            vendor=VENDOR if facts.vendorId == 0x8086 else f"pci {facts.vendorId:04x}",
            uuid=each.uuid,
            pci=pci,
            memory_bytes=each.memory_bytes or facts.maxMemAllocSize,
            memory_domain="host" if integrated else "",
            driver_version=str(each.driver_version),
            by_name_only=True,  # who names no device wants one that compiles kernels
            capabilities=Capabilities(
                compute=f"{facts.deviceId:04x}",
                cores=slices * facts.numEUsPerSubslice or None,
                multiprocessors=slices or None,
                features=("binary_only", "fake") if api.is_fake else ("binary_only",),
                clock_mhz=facts.coreClockRate or None,
                groups=tuple(sorted(groups_of(api, each, found))),
            ),
            isolation=isolation(_shown(index)),
            telemetry=_first_reading(each.memory_bytes),
        )

    return tuple(described(index, each) for index, each in enumerate(found))


def _shown(index: int) -> str:
    """What to write into ``ZE_AFFINITY_MASK`` for a device that is seen under the mask of now."""
    inherited = [word for word in os.environ.get("ZE_AFFINITY_MASK", "").split(",") if word]
    return inherited[index] if index < len(inherited) else str(index)


def _first_reading(total: int) -> Telemetry:
    return Telemetry(memory_total_bytes=total or None, at=time.time())


# --- telemetry -----------------------------------------------------------------------------------


def telemetry(info: DeviceInfo) -> Telemetry:
    """The sensors of the card at its PCI address; only the size of memory where it has none."""
    if info.fault:
        return Telemetry(health=f"lost: {info.fault}")
    if not info.pci:
        return _first_reading(info.memory_bytes)
    from drivetrain.hal.telemetry import intel

    return intel.read(info.pci)


# --- isolation -----------------------------------------------------------------------------------


def isolation(mask: str) -> Isolation:
    """Only this device; it is ``xpu:0`` in a worker's torch."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    environment = hidden_from_all(ZE_AFFINITY_MASK=mask, ONEAPI_DEVICE_SELECTOR="level_zero:0")
    return Isolation(environment, None, threads, "xpu:0")


# --- probe ---------------------------------------------------------------------------------------


def probe(info: DeviceInfo) -> None:
    """1 MiB allocated, filled, copied back and compared. Raises HalError."""
    fill_and_read(open_device(info), info)


# --- open ----------------------------------------------------------------------------------------


def open_device(info: DeviceInfo) -> Backend:
    """The device, open in this process through the loader. Raises HalError."""
    from typing import Any

    from drivetrain.hal.drivers.level_zero_backend import LevelZeroBackend

    made: Any = LevelZeroBackend(info)  # without the methods of groups that it does not have
    backend: Backend = made
    return backend


DRIVER = Driver(
    name=NAME,
    vendor=VENDOR,
    absent=absent,
    discover=discover,
    telemetry=telemetry,
    probe=probe,
    open=open_device,
    groups=GROUPS,
    install=(
        "install the loader and Intel's driver (Ubuntu: apt install libze1 libze-intel-gpu1; in a "
        "container, start it with --device /dev/dri), and be in the group render"
    ),
)

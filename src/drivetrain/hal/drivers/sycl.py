"""Intel's GPUs and whatever else SYCL shows, through dpctl's library; listed in a child process.
Only the probe and `open_device` make a context."""

from __future__ import annotations

import glob
import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from drivetrain.errors import DriverMissing
from drivetrain.hal.driver import Backend, Capabilities, DeviceInfo, Driver
from drivetrain.hal.drivers import kept, opencl, sycl_api
from drivetrain.hal.drivers import opencl_loader as loader
from drivetrain.hal.drivers.memory_probe import fill_and_read
from drivetrain.hal.drivers.opencl_platforms import vendor_of
from drivetrain.hal.drivers.sycl_api import INSTALL, LIBRARY, SELECTED
from drivetrain.hal.telemetry import Telemetry

if TYPE_CHECKING:
    from drivetrain.hal.drivers.sycl_devices import Seen

# --- names ---------------------------------------------------------------------------------------

NAME = "sycl"
VENDOR = "khronos"
GROUPS = frozenset({"compute", "managed", "pinned", "timing"})
FILE = "sycl-devices.json"
_READ = ("DRIVETRAIN_LEVEL_ZERO_", "DRIVETRAIN_SYCL_", "ONEAPI_", "SYCL_", "UR_")
"""Beginnings of the environment variables that change what SYCL lists, beside OpenCL's."""


# --- discovery -----------------------------------------------------------------------------------


def absent() -> str:
    """Why there is no SYCL here; ``""`` when it is worth asking."""
    path = sycl_api.find()
    selected = os.environ.get(SELECTED, "")
    if not path:
        if selected:
            return f"{SELECTED}={selected} names no file"
        return f"no dpctl ({LIBRARY}) on Python's path{_of_the_runtime()}"
    if selected:
        return ""
    folder = sycl_api.libraries(path)
    if not _versions(folder, "libsycl.so"):
        return (
            f"dpctl is installed in {Path(path).parent}, but there is no libsycl.so in {folder}: "
            f"pip leaves a wheel's libraries out with --target. Install it into an environment, or "
            f"with --prefix: {INSTALL}"
        )
    return ""


def _versions(folder: Path, name: str) -> list[str]:
    return sorted(glob.glob(f"{glob.escape(str(folder))}/{name}*"))


def _of_the_runtime() -> str:
    """What there is to say about Intel's runtime for processors, from files."""
    folder = loader.intel_folder()
    if folder is not None and not (folder / loader.INTEL_NEEDS).exists():
        return (
            f"; Intel's OpenCL runtime in {folder} lacks {loader.INTEL_NEEDS}, without which it "
            "shows no device: pip install intel-cmplr-lib-rt"
        )
    return ""


def _fingerprint() -> str:
    path = sycl_api.find()
    facts: list[object] = [loader.fingerprint(), path]
    if path:
        folder = sycl_api.libraries(path)
        files = [path, *(f for n in ("libsycl", "libur_") for f in _versions(folder, n))]
        facts += [(f, os.stat(f).st_mtime_ns, os.stat(f).st_size) for f in files]
    facts += sorted((n, value) for n, value in os.environ.items() if n.startswith(_READ))
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def known() -> tuple[DeviceInfo, ...] | None:
    """What SYCL listed before, when nothing has changed since that a listing depends on."""
    found = kept.read(FILE, _fingerprint())
    if found is None:
        return None
    return tuple(replace(info, telemetry=opencl.first_reading(info)) for info in found)


def discover() -> tuple[DeviceInfo, ...]:
    """Every device with unified shared memory. Loads the vendors' libraries, which may hang or
    crash."""
    from drivetrain.hal.drivers.sycl_devices import seen

    before = _fingerprint()
    listed = seen(sycl_api.load())
    usable = [each for each in listed if each.has_usm]
    if not usable:
        raise DriverMissing(_nothing([each.name for each in listed]), code="no_device", driver=NAME)
    found = tuple(_describe(index, each) for index, each in enumerate(usable))
    kept.write(FILE, before, found)
    return tuple(replace(info, telemetry=opencl.first_reading(info)) for info in found)


def _nothing(others: list[str]) -> str:
    """Why SYCL shows nothing that can be used, and what to do."""
    reason = "SYCL works, but shows no device"
    if others:
        reason += f" with unified shared memory (it shows {', '.join(others)})"
    selector = os.environ.get("ONEAPI_DEVICE_SELECTOR", "")
    if selector:
        reason += f" under ONEAPI_DEVICE_SELECTOR={selector}"
    said = _of_the_runtime()
    where = os.environ.get(loader.VENDORS) or os.environ.get(loader.FILENAMES)
    if not said and where and loader.intel_folder() is not None:
        dead = [
            f"{each.name} names {loader.text(each)}, which is not there"
            for each in loader.icd_files()
            if "/" in loader.text(each) and not Path(loader.text(each)).exists()
        ]
        said = f"; Intel's runtime is installed, but {where} does not register it"
        said += f" ({'; '.join(dead)})" if dead else ""
        said += f": take {loader.VENDORS} and {loader.FILENAMES} out of the environment"
    if not said:
        said = (
            ". A GPU needs its driver (Ubuntu: apt install intel-opencl-icd libze-intel-gpu1), "
            "a processor pip install intel-opencl-rt intel-cmplr-lib-rt"
        )
    return reason + said


def _describe(index: int, each: Seen) -> DeviceInfo:
    api, handle = each.api, each.handle
    units = api.DPCTLDevice_GetMaxComputeUnits(handle)
    return DeviceInfo(
        driver=NAME,
        index=index,
        name=each.name,
        vendor=vendor_of(each.platform) if each.is_processor else _maker(each),
        uuid=each.uuid,
        pci=each.pci,
        memory_bytes=api.DPCTLDevice_GetGlobalMemSize(handle),
        memory_domain=opencl.MEMORY_DOMAIN if each.shares_host else "",
        driver_version=f"{each.platform} {each.driver_version}".strip(),
        by_name_only=each.is_processor or each.cl is None,
        capabilities=Capabilities(
            compute=f"OpenCL C {each.cl.language}" if each.cl is not None else "",
            cores=units if each.is_processor else None,
            multiprocessors=None if each.is_processor else units,
            features=("fake",) if api.is_fake else (),
            clock_mhz=api.DPCTLDevice_GetMaxClockFrequency(handle) or None,
            groups=tuple(sorted(GROUPS)),
        ),
        isolation=opencl.isolation(each.uuid, each.platform, each.is_processor),
    )


def _maker(each: Seen) -> str:
    words = each.api.text(each.api.DPCTLDevice_GetVendor, each.handle)
    return vendor_of(words) or vendor_of(each.platform) or "unknown"


# --- telemetry -----------------------------------------------------------------------------------


def telemetry(info: DeviceInfo) -> Telemetry:
    """The same sensors as OpenCL's devices have: SYCL's interface has none."""
    return opencl.telemetry(info)


# --- probe ---------------------------------------------------------------------------------------


def probe(info: DeviceInfo) -> None:
    """1 MiB allocated, filled, copied back and compared. Raises HalError."""
    fill_and_read(open_device(info), info)


# --- open ----------------------------------------------------------------------------------------


def open_device(info: DeviceInfo) -> Backend:
    """The device, open in this process through dpctl's library. Raises HalError."""
    from typing import Any

    from drivetrain.hal.drivers.sycl_backend import SyclBackend

    made: Any = SyclBackend(info)  # without the methods of groups that it does not have
    backend: Backend = made
    return backend


DRIVER = Driver(
    name=NAME,
    vendor=VENDOR,
    absent=absent,
    discover=discover,
    known=known,
    telemetry=telemetry,
    probe=probe,
    open=open_device,
    groups=GROUPS,
    install=f"{INSTALL} (1.6 GB; the last two are for processors, a GPU needs its driver)",
)

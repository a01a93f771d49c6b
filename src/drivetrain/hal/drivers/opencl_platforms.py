"""What the OpenCL loader lists: platforms, their devices, and facts about each.

A platform is known by its name, never by a vendor's number: PoCL says Intel's on an AMD processor.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from uuid import UUID

from drivetrain.errors import DriverMissing, HalError
from drivetrain.hal.drivers import opencl_loader as loader
from drivetrain.hal.drivers.opencl_api import (
    NAME,
    Api,
    Cl,
    Code,
    NameVersion,
    Nv,
    PciBusInfo,
    TopologyAmd,
    name_of,
)

_VENDORS = {
    "nvidia": "nvidia",
    "amd": "amd",
    "advanced micro devices": "amd",
    "intel": "intel",
    "portable computing language": "pocl",
    "arm": "arm",
    "qualcomm": "qualcomm",
    "xilinx": "xilinx",
    "altera": "altera",
    "imagination": "imagination",
}
"""Words in a platform's or device vendor's name, and ours."""


# -- questions -------------------------------------------------------------------------------------


def answer(function: Callable[..., int], handle: int, number: int) -> bytes | None:
    """The raw answer to a question by number; None where the platform has none."""
    size = ctypes.c_size_t()
    if function(handle, number, 0, None, ctypes.byref(size)) or not size.value:
        return None
    data = ctypes.create_string_buffer(size.value)
    if function(handle, number, size.value, ctypes.addressof(data), None):
        return None
    return data.raw


def text_of(data: bytes | None) -> str:
    return "" if data is None else data.partition(b"\0")[0].decode(errors="replace").strip()


def number_of(data: bytes | None) -> int:
    """An unsigned integer of any width; 0 for none."""
    return int.from_bytes(data or b"", "little")


@dataclass(frozen=True)
class Platform:
    api: Api
    handle: int
    name: str
    vendor: str
    version: int
    """As ``CL_TARGET_OPENCL_VERSION`` is written: 300 for 3.0."""
    version_text: str


@dataclass(frozen=True)
class Found:
    """One device of one platform, by the loader's handles."""

    platform: Platform
    handle: int
    ordinal: int
    """Among devices of the same name on the platform, from 0."""
    shown_before: bool = False
    """Whether another platform, before this one, shows the same device."""

    def raw(self, number: int) -> bytes | None:
        return answer(self.platform.api.clGetDeviceInfo, self.handle, number)

    def text(self, number: int) -> str:
        return text_of(self.raw(number))

    def number(self, number: int) -> int:
        return number_of(self.raw(number))

    def structure(self, number: int, kind: type[Any]) -> Any:
        """The answer as a structure; None where it has another size."""
        data = self.raw(number)
        if data is None or len(data) != ctypes.sizeof(kind):
            return None
        return kind.from_buffer_copy(data)

    @cached_property
    def name(self) -> str:
        return " ".join(self.text(Cl.DEVICE_NAME).split()) or "OpenCL device"

    @cached_property
    def extensions(self) -> frozenset[str]:
        return frozenset(self.text(Cl.DEVICE_EXTENSIONS).split())

    @cached_property
    def version(self) -> int:
        return version_of(self.text(Cl.DEVICE_VERSION))

    @cached_property
    def language(self) -> str:
        """The newest OpenCL C that the device compiles: ``1.2``, ``3.0``."""
        newest = version_of(self.text(Cl.DEVICE_OPENCL_C_VERSION)) or 120
        if self.version >= 300:
            data = self.raw(Cl.DEVICE_OPENCL_C_ALL_VERSIONS) or b""
            size = ctypes.sizeof(NameVersion)
            for at in range(0, len(data) - size + 1, size):
                packed = NameVersion.from_buffer_copy(data, at).version
                newest = max(newest, 100 * (packed >> 22) + 10 * (packed >> 12 & 0x3FF))
        return f"{newest // 100}.{newest % 100 // 10}"

    @property
    def is_processor(self) -> bool:
        """Whether it is the host's own processor."""
        return bool(self.number(Cl.DEVICE_TYPE) & Cl.DEVICE_TYPE_CPU)

    @property
    def compiles(self) -> bool:
        return bool(self.number(Cl.DEVICE_COMPILER_AVAILABLE))

    @cached_property
    def vendor(self) -> str:
        """Who made the device; for a processor, who made the runtime."""
        words = self.platform.name if self.is_processor else self.text(Cl.DEVICE_VENDOR)
        return vendor_of(words) or vendor_of(self.platform.name) or "unknown"

    @cached_property
    def pci(self) -> str:
        """``00000000:18:00.0``, as NVML writes it; empty where the platform does not tell."""
        if "cl_khr_pci_bus_info" in self.extensions:
            info = self.structure(Cl.DEVICE_PCI_BUS_INFO_KHR, PciBusInfo)
            if info is not None:
                return _pci(info.pci_domain, info.pci_bus, info.pci_device, info.pci_function)
        if "cl_nv_device_attribute_query" in self.extensions:
            bus, slot = self.raw(Nv.DEVICE_PCI_BUS_ID), self.raw(Nv.DEVICE_PCI_SLOT_ID)
            if bus is not None and slot is not None:
                place = number_of(slot)
                domain = self.number(Nv.DEVICE_PCI_DOMAIN_ID)
                return _pci(domain, number_of(bus), place >> 3, place & 7)
        if "cl_amd_device_attribute_query" in self.extensions:
            amd = self.structure(Cl.DEVICE_TOPOLOGY_AMD, TopologyAmd)
            if amd is not None and amd.type == Cl.DEVICE_TOPOLOGY_TYPE_PCIE_AMD:
                return _pci(0, amd.bus, amd.device, amd.function)
        return ""

    @cached_property
    def uuid(self) -> str:
        """The vendor's where the platform tells it (NVIDIA's as NVML writes it); else made of the
        platform and the place on the bus, or of names."""
        if "cl_khr_device_uuid" in self.extensions:
            data = self.raw(Cl.DEVICE_UUID_KHR)
            if data is not None and len(data) == 16 and any(data):
                kind = "GPU" if vendor_of(self.platform.name) == "nvidia" else "CL"
                return f"{kind}-{UUID(bytes=data)}"
        facts = (self.platform.name, self.name, self.pci or str(self.ordinal))
        return f"CL-{hashlib.sha256(repr(facts).encode()).hexdigest()[:32]}"

    @property
    def known_as(self) -> str:
        """The uuid, with the platform's name behind it where another one shows the device too."""
        if not self.shown_before:
            return self.uuid
        slug = re.sub(r"[^a-z0-9]+", "-", self.platform.name.lower()).strip("-")
        return f"{self.uuid}-{slug}-{self.ordinal}"


def _pci(domain: int, bus: int, device: int, function: int) -> str:
    return f"{domain:08x}:{bus:02x}:{device:02x}.{function:x}"


def version_of(text: str) -> int:
    """``OpenCL 3.0 PoCL`` and ``OpenCL C 3.0`` -> 300; 0 for anything else."""
    match = re.match(r"OpenCL (?:C )?(\d+)\.(\d+)", text)
    return 100 * int(match[1]) + 10 * int(match[2]) if match else 0


def vendor_of(words: str) -> str:
    """Our word for a vendor in a name; empty when none is known."""
    low = words.lower()
    return next((ours for theirs, ours in _VENDORS.items() if re.search(rf"\b{theirs}\b", low)), "")


# -- the list --------------------------------------------------------------------------------------


def platforms(api: Api) -> list[Platform]:
    """Every platform of the loader. Raises HalError when none of those registered loads."""
    count = ctypes.c_uint()
    with loader.registered():
        code = api.clGetPlatformIDs(0, None, ctypes.byref(count))
    if code == Code.PLATFORM_NOT_FOUND_KHR or (not code and not count.value):
        raise _none_loads(code)
    if code:
        raise _broken("clGetPlatformIDs", code, "the OpenCL loader lists no platform")
    handles = (ctypes.c_void_p * count.value)()
    code = api.clGetPlatformIDs(count.value, handles, None)
    if code:
        raise _broken("clGetPlatformIDs", code, "the OpenCL loader lists no platform")
    found = []
    for handle in handles:
        words = [
            text_of(answer(api.clGetPlatformInfo, int(handle or 0), number))
            for number in (Cl.PLATFORM_NAME, Cl.PLATFORM_VENDOR, Cl.PLATFORM_VERSION)
        ]
        found.append(
            Platform(api, int(handle or 0), words[0], words[1], version_of(words[2]), words[2])
        )
    return found


def _broken(op: str, code: int, message: str) -> HalError:
    return HalError(
        f"{message}: {op} failed: {name_of(code)}",
        code="broken",
        driver=NAME,
        native=code,
        native_name=name_of(code),
        op=op,
    )


def _none_loads(code: int) -> HalError:
    """Why no registered platform is there: what the system's loader says of each library."""
    reasons = []
    for path in loader.icd_files():
        name = loader.text(path)
        try:
            ctypes.CDLL(name)
            reasons.append(f"{path.name}: {name} loads, but offers no platform")
        except OSError as failed:
            reasons.append(f"{path.name}: {failed}")
    if not reasons:
        return DriverMissing("no OpenCL platform is registered", code="no_platform", driver=NAME)
    error = _broken("clGetPlatformIDs", code or Code.PLATFORM_NOT_FOUND_KHR, "no platform works")
    return HalError(
        f"{error} ({'; '.join(reasons)})",
        code="broken",
        driver=NAME,
        native=error.native,
        native_name=error.native_name,
        op=error.op,
    )


def devices(api: Api, listed: Sequence[Platform] | None = None) -> list[Found]:
    """Every device of every platform that serves OpenCL 1.2, in the loader's order.

    Raises DriverMissing when the platforms have none, HalError when they fail to tell.
    """
    found: list[Found] = []
    failed: list[HalError] = []
    known = platforms(api) if listed is None else listed
    for platform in known:
        if platform.version < 120:
            continue
        count = ctypes.c_uint()
        ask = api.clGetDeviceIDs
        code = ask(platform.handle, Cl.DEVICE_TYPE_ALL, 0, None, ctypes.byref(count))
        handles = (ctypes.c_void_p * count.value)()
        if not code and count.value:
            code = ask(platform.handle, Cl.DEVICE_TYPE_ALL, count.value, handles, None)
        if code == Code.DEVICE_NOT_FOUND:
            continue
        if code:
            failed.append(_broken("clGetDeviceIDs", code, f"platform {platform.name!r} fails"))
            continue
        ordinals: dict[str, int] = {}
        for handle in handles:
            name = text_of(answer(api.clGetDeviceInfo, int(handle or 0), Cl.DEVICE_NAME))
            ordinal = ordinals[name] = ordinals.get(name, -1) + 1
            each = Found(platform, int(handle or 0), ordinal)
            before = any(each.uuid == other.uuid for other in found)
            found.append(replace(each, shown_before=before))
    if not found and failed:
        raise failed[0]
    if not found:
        names = ", ".join(f"{p.name} ({p.version_text})" for p in known)
        raise DriverMissing(
            f"no OpenCL 1.2 device on any platform; there are: {names}",
            code="no_device",
            driver=NAME,
        )
    return found

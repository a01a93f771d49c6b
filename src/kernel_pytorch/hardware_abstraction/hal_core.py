"""The guide's words for devices: vendors, capabilities, and what Drivetrain found in them."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from drivetrain import hal
from drivetrain.errors import BadInput
from drivetrain.hal.device import Device
from drivetrain.hal.probe import probe, verdicts
from drivetrain.placement import calibration

__all__ = [
    "DeviceSpec",
    "HardwareCapabilities",
    "HardwareVendor",
    "capabilities_of",
    "devices",
    "vendor_named",
    "vendor_of",
]

GB = 1_000_000_000
"""Bytes in the guide's GB."""

_TORCH_NAMES = {"cuda": "cuda", "hip": "cuda", "sycl": "xpu", "level_zero": "xpu"}
_AMD_MATRIX = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
_AMD_FLOAT8 = ("gfx94", "gfx95", "gfx12")
_OWN_VENDORS = ("nvidia", "amd", "intel")
_FLOPS_PER_CYCLE = (("avx512", 64), ("fma", 32), ("avx2", 32), ("neon", 32))
"""float32 operations a core does in a cycle at most: two units, a fused multiply-add each."""
_FASTEST_CLOCK_MHZ = 6500
"""No processor on sale has a faster one."""


class HardwareVendor(StrEnum):
    """Whose hardware it is. Equal to its text: ``HardwareVendor.AMD == "amd"``.

    A processor is ``CPU`` whoever made it, through whichever driver it is used; devices of drivers
    from outside and simulated chips are ``CUSTOM_ASIC``.
    """

    NVIDIA = "nvidia"
    AMD = "amd"
    INTEL = "intel"
    CPU = "cpu"
    CUSTOM_ASIC = "custom_asic"
    UNKNOWN = "unknown"


def vendor_named(name: str | HardwareVendor) -> HardwareVendor:
    """The vendor of that name, in any case. Raises BadInput, naming those that there are."""
    try:
        return HardwareVendor(str(name).lower())
    except ValueError:
        known = ", ".join(HardwareVendor)
        raise BadInput(f"there is no vendor {str(name)!r}; there are {known}") from None


def vendor_of(device: Device) -> HardwareVendor:
    """The guide's vendor of a device of Drivetrain."""
    if device.driver == "cpu" or device.info.by_name_only:
        return HardwareVendor.CPU
    if device.vendor.lower() in _OWN_VENDORS:
        return HardwareVendor(device.vendor.lower())
    if device.driver in ("cuda", "hip", "sycl", "level_zero", "opencl"):
        return HardwareVendor.UNKNOWN
    return HardwareVendor.CUSTOM_ASIC


@dataclass(frozen=True)
class HardwareCapabilities:
    """What one device offers. GB are 1e9 bytes, TFLOPS 1e12 operations a second."""

    device_name: str
    vendor: HardwareVendor
    memory_gb: float
    available_memory_gb: float
    compute_tflops: float | None
    """The best rate over the types of numbers; None where nothing is known."""
    compute_basis: str
    """``measured`` (``drivetrain calibrate``), ``listed`` (clock, cores and width, matrix units not
    counted), or ``unknown``."""
    architecture: str = ""
    driver_version: str = ""
    precisions: tuple[str, ...] = ()
    supports_tensor_core: bool = False
    """It has matrix units that Drivetrain knows of."""
    supports_mixed_precision: bool = False
    supports_custom_kernels: bool = False
    peak_tflops: dict[str, float] = field(default_factory=dict, hash=False)
    """Measured: type of numbers -> TFLOPS."""
    ceiling_tflops: float | None = None
    """It does no more than this: what was measured, or what a processor's cores can at the fastest
    clock that there is. None where nothing is ruled out."""

    utilisation: float | None = None
    """Share of the last sampling period that it was busy, in [0, 1]; None where it is not told."""

    def may_reach(self, tflops: float) -> bool:
        """False only where a measurement or a ceiling rules it out."""
        return self.ceiling_tflops is None or self.ceiling_tflops >= tflops

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class DeviceSpec:
    """A device as the guide hands it out: ``.vendor``, ``.capabilities``, and what it is here."""

    device_id: int
    """Its index among the devices of its driver."""
    vendor: HardwareVendor
    capabilities: HardwareCapabilities
    address: str
    """Drivetrain's address, for ``drivetrain.hal.device`` and ``drivetrain run --on``."""
    torch_device: str
    """What this process's torch calls it; empty where torch needs ``register_custom_device``."""
    device: Device = field(repr=False)

    def __str__(self) -> str:
        return f"{self.address} ({self.capabilities.device_name})"


def capabilities_of(device: Device) -> HardwareCapabilities:
    """Facts about a device now, without a compute context."""
    told = device.capabilities
    now = device.telemetry()  # one reading: each costs milliseconds
    total = now.memory_total_bytes or device.info.memory_bytes
    free = total - min(total, now.memory_used_bytes or 0)
    measured = calibration.load(device)
    peaks = {k: v / 1e12 for k, v in measured.peak_flops.items()} if measured else {}
    precisions = _precisions(device)
    matrix = _has_matrix_units(device)
    if peaks:
        rate: float | None = max(peaks.values())
        basis, ceiling = "measured", rate
    else:
        rate = _rate(device)
        basis, ceiling = "listed" if rate is not None else "unknown", _ceiling(device)
    return HardwareCapabilities(
        device_name=device.name,
        vendor=vendor_of(device),
        memory_gb=total / GB,
        available_memory_gb=free / GB,
        compute_tflops=rate,
        compute_basis=basis,
        architecture=told.compute,
        driver_version=device.info.driver_version,
        precisions=precisions,
        supports_tensor_core=matrix,
        supports_mixed_precision=bool({"bfloat16", "float16"} & set(precisions)),
        supports_custom_kernels="compute" in told.groups,
        peak_tflops=peaks,
        ceiling_tflops=ceiling,
        utilisation=now.utilisation,
    )


def spec_of(device: Device) -> DeviceSpec:
    """A device of Drivetrain as the guide hands it out."""
    return DeviceSpec(
        device.index,
        vendor_of(device),
        capabilities_of(device),
        device.address,
        _torch_name(device),
        device,
    )


def _torch_name(device: Device) -> str:
    if device.driver == "cpu":
        return "cpu"
    if device.driver in _TORCH_NAMES:
        return f"{_TORCH_NAMES[device.driver]}:{device.index}"
    # A custom device can be registered only where that module was imported.
    custom: Any = sys.modules.get("drivetrain.pytorch.custom.registration")
    handle: Any = custom.registered() if custom is not None else None
    if handle is None:
        return ""
    index = 0
    for backend in handle.backends:
        if device in getattr(backend, "devices", ()):
            return f"{handle.name}:{index + backend.devices.index(device)}"
        index += backend.device_count()
    return ""


def devices(
    vendors: Iterable[HardwareVendor] | None = None, *, usable_only: bool = True
) -> tuple[DeviceSpec, ...]:
    """The machine's devices, of these vendors only when some are named.

    ``usable_only`` leaves out what a probe found broken; what was never probed is probed first, in
    a child process, except for a processor's further runtimes.
    """
    wanted = None if vendors is None else set(vendors)
    found = [d for d in hal.devices() if wanted is None or vendor_of(d) in wanted]
    if usable_only:
        known = verdicts(found)
        fresh = [d for d in found if known[d].usable is None and not d.info.by_name_only]
        known |= probe(fresh) if fresh else {}
        found = [d for d in found if known[d].usable is not False]
    return tuple(spec_of(device) for device in found)


# -- rates ----------------------------------------------------------------------------------------


def _rate(device: Device) -> float | None:
    """TFLOPS in float32 from clock, cores and width; None where one of them is not told."""
    told = device.capabilities
    clock = told.clock_mhz or device.info.telemetry.clock_mhz
    if not clock:
        return None
    if device.driver == "cpu":
        per_cycle = _processor_flops_per_cycle(device)
    elif told.multiprocessors is not None and told.cores:
        per_cycle = 2 * told.cores
    else:
        return None
    return per_cycle * clock * 1e6 / 1e12 if per_cycle else None


def _ceiling(device: Device) -> float | None:
    if device.driver != "cpu" or _has_matrix_units(device):
        return None
    per_cycle = _processor_flops_per_cycle(device)
    return per_cycle * _FASTEST_CLOCK_MHZ * 1e6 / 1e12 if per_cycle else None


def _processor_flops_per_cycle(device: Device) -> int:
    """Over all cores; 0 where they are not told."""
    told = device.capabilities
    words = " ".join(told.features)
    wide = next((n for word, n in _FLOPS_PER_CYCLE if word in words), 16)
    return (told.physical_cores or told.cores or 0) * wide * (2 if "avx512_bf16" in words else 1)


def _major(device: Device) -> int:
    head = device.capabilities.compute.partition(".")[0]
    return int(head) if head.isdigit() else 0


def _has_matrix_units(device: Device) -> bool:
    if device.driver == "cuda":
        return _major(device) >= 7
    if device.driver == "hip":
        return device.capabilities.compute.startswith(_AMD_MATRIX)
    return any(word.startswith(("amx", "sme")) for word in device.capabilities.features)


def _precisions(device: Device) -> tuple[str, ...]:
    """Types of numbers that the device computes in as fast as in float32, or faster."""
    found = ["float32"]
    words = " ".join(device.capabilities.features)
    if device.driver == "cuda":
        found += ["float16"] if _major(device) >= 6 else []
        found += ["bfloat16"] if _major(device) >= 8 else []
        has_float8 = device.capabilities.compute == "8.9" or _major(device) >= 9
        found += ["float8"] if has_float8 else []
    elif device.driver == "hip":
        found += ["float16"]
        found += ["bfloat16"] if _has_matrix_units(device) else []
        found += ["float8"] if device.capabilities.compute.startswith(_AMD_FLOAT8) else []
    else:
        found += ["bfloat16"] if "bf16" in words else []
        found += ["float16"] if "fp16" in words else []
    return tuple(found)

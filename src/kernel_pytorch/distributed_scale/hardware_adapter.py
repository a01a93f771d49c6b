"""`HardwareAdapter`: which device a workload of so much memory and compute gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from drivetrain.errors import BadInput
from kernel_pytorch._kept import kept
from kernel_pytorch.hardware_abstraction.choosing import ranked
from kernel_pytorch.hardware_abstraction.hal_core import DeviceSpec, devices
from kernel_pytorch.hardware_abstraction.layer import HardwareAbstractionLayer

__all__ = ["HardwareAdapter"]


class HardwareAdapter:
    """Chooses devices; kept for the guide. Now: `drivetrain.Runtime`, ``drivetrain run --prefer``
    and `drivetrain.hal.devices`.

    ``enable_hal=False``, the default of older code, keeps to the devices of this process's torch.
    """

    def __init__(self, enable_hal: bool = False) -> None:
        kept(
            "kernel_pytorch.HardwareAdapter",
            "drivetrain.Runtime, `drivetrain run --prefer` and drivetrain.hal.devices",
        )
        self._enabled = bool(enable_hal)

    def is_hal_enabled(self) -> bool:
        """True when devices of all vendors are looked at."""
        return self._enabled

    def get_optimal_device_hal(
        self,
        memory_requirement_gb: float = 0.0,
        compute_requirement_tflops: float = 0.0,
        preferred_vendors: Sequence[str] | None = None,
    ) -> DeviceSpec | None:
        """The best device over all vendors, or None when nothing fits.

        ``memory_requirement_gb`` (1e9 bytes) must be free, with a headroom of 15 %.
        ``compute_requirement_tflops`` rules out a device whose measured rate (``drivetrain
        calibrate``) or theoretical peak is less; a rate that nobody knows rules nothing out.
        ``preferred_vendors`` go first, in this order; when nothing of theirs fits, others do.
        Raises BadInput for a negative requirement, an unknown vendor, or with HAL disabled.
        """
        self._require("get_optimal_device_hal")
        found = ranked(
            devices(),
            memory_gb=memory_requirement_gb,
            compute_tflops=compute_requirement_tflops,
            prefer=preferred_vendors or (),
        )
        return found[0] if found else None

    def get_cross_vendor_capabilities(self) -> dict[str, Any]:
        """What the machine has: ``cross_vendor_devices`` (how many), ``vendor_distribution``
        (vendor -> how many), ``available_memory_gb`` (free now; devices that share one memory
        count once), and ``devices``: address -> `HardwareCapabilities`."""
        self._require("get_cross_vendor_capabilities")
        found = devices()
        free: dict[str, float] = {}
        for spec in found:
            domain = spec.device.memory_domain
            free[domain] = max(free.get(domain, 0.0), spec.capabilities.available_memory_gb)
        return {
            "cross_vendor_devices": len(found),
            "vendor_distribution": dict(Counter(str(spec.vendor) for spec in found)),
            "available_memory_gb": round(sum(free.values()), 3),
            "devices": {spec.address: spec.capabilities for spec in found},
        }

    def get_optimal_device_placement(
        self, memory_gb: float = 0.0, compute_tflops: float = 0.0
    ) -> list[str]:
        """The devices that fit and that this process's torch can name, best first, as in
        ``torch.device(name)``; empty when none fits. Works with HAL enabled or not."""
        specs = [spec for spec in devices() if spec.torch_device]
        if not self._enabled:
            specs = [spec for spec in specs if _torch_has(spec.torch_device)]
        found = ranked(specs, memory_gb=memory_gb, compute_tflops=compute_tflops)
        return list(dict.fromkeys(spec.torch_device for spec in found))

    def get_hal(self) -> HardwareAbstractionLayer:
        """The layer of the vendor whose device is the best here, HAL enabled or not."""
        best = ranked(devices())
        if not best:
            raise BadInput("this machine has no usable device; `drivetrain doctor` tells why")
        spec = best[0]
        told = spec.capabilities
        return HardwareAbstractionLayer(spec.vendor, told.architecture, told.driver_version)

    def _require(self, what: str) -> None:
        if not self._enabled:
            raise BadInput(
                f"{what} looks at all vendors, and this adapter was made without: "
                "use HardwareAdapter(enable_hal=True)"
            )


def _torch_has(name: str) -> bool:
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return True
    import torch

    module = getattr(torch, kind, None)
    return bool(module and module.is_available() and int(index or 0) < module.device_count())

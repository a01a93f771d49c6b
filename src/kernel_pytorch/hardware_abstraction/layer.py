"""`HardwareAbstractionLayer`: one vendor's devices under the guide's names."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from drivetrain.errors import Unsupported
from drivetrain.hal.language.source import Source
from kernel_pytorch._kept import kept
from kernel_pytorch.hardware_abstraction.compiled import CompiledKernel, compile_for
from kernel_pytorch.hardware_abstraction.hal_core import (
    DeviceSpec,
    HardwareCapabilities,
    HardwareVendor,
    devices,
    vendor_named,
)
from kernel_pytorch.hardware_abstraction.mesh import DeviceMesh, mesh_over

__all__ = ["HardwareAbstractionLayer"]


class HardwareAbstractionLayer:
    """The devices of one vendor in this machine; kept for the guide. Now: `drivetrain.hal`.

    ``chip_family`` and ``driver_version`` are what the caller says of the hardware; what is there
    is in ``capabilities``. Raises BadInput for a vendor that is none of `HardwareVendor`.
    """

    def __init__(
        self, vendor: str | HardwareVendor, chip_family: str = "", driver_version: str = ""
    ) -> None:
        kept("kernel_pytorch.HardwareAbstractionLayer", "drivetrain.hal")
        self.vendor = vendor_named(vendor)
        self.chip_family = chip_family
        self.driver_version = driver_version
        self.devices: tuple[DeviceSpec, ...] = devices([self.vendor])
        """Usable ones; empty where the machine has none of this vendor."""

    @property
    def capabilities(self) -> dict[str, HardwareCapabilities]:
        """Address -> what the device offers."""
        return {spec.address: spec.capabilities for spec in self.devices}

    def register_device_backend(self) -> str:
        """Make the vendor's first device a torch device; its name in torch.

        NVIDIA and ROCm (``cuda``), Intel (``xpu``) and processors (``cpu``) are torch's own
        devices: nothing is registered for them. Any other device of Drivetrain goes through
        `drivetrain.pytorch.register_custom_device`. Raises Unsupported where the machine has no
        such device, or this torch was built without it.
        """
        for spec in sorted(self.devices, key=lambda spec: not spec.torch_device):
            return _own_torch_device(spec) if spec.torch_device else _registered(spec)
        raise Unsupported(
            f"this machine has no usable device of {self.vendor}; `drivetrain doctor` tells why",
            code="no_device",
            op="register_device_backend",
        )

    def compile_kernel(self, kernel_source: str | Source, target_arch: str = "") -> CompiledKernel:
        """Compile CUDA C text, or a `drivetrain.hal.Source`, for an architecture.

        ``target_arch`` is ``sm_90``, ``gfx942``, ``cpu``, or a device's address; left out, the
        vendor's first device. The machine needs no such device, only the compiler.
        """
        arch = target_arch or (self.devices[0].address if self.devices else "")
        return compile_for(kernel_source, arch)

    def get_device_mesh(self, world_size: int) -> DeviceMesh:
        """``world_size`` ranks over the vendor's devices. Raises BadInput when there are too few.
        ``.to_torch()`` makes torch's own mesh of it."""
        torch_first = sorted(self.devices, key=lambda spec: not spec.torch_device)
        own = [spec for spec in torch_first if spec.torch_device]
        return mesh_over(own or torch_first, world_size)

    def __repr__(self) -> str:
        there = ", ".join(spec.address for spec in self.devices) or "no device"
        return f"<HardwareAbstractionLayer {self.vendor}: {there}>"


def _own_torch_device(spec: DeviceSpec) -> str:
    import torch

    try:
        torch.empty(1, device=spec.torch_device)
    except (RuntimeError, AssertionError) as error:
        raise Unsupported(
            f"{spec.address} is there, but this torch ({torch.__version__}) cannot use "
            f"{spec.torch_device}: {error}. Install the torch build of the vendor",
            code="unsupported",
            op="register_device_backend",
            device=spec.address,
        ) from error
    return spec.torch_device


def _registered(spec: DeviceSpec) -> str:
    custom: Any = import_module("drivetrain.pytorch.custom")
    return str(custom.register_custom_device(spec.address).device)

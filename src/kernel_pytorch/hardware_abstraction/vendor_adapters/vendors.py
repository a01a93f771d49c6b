"""The adapters that there are."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from kernel_pytorch.hardware_abstraction.choosing import ranked
from kernel_pytorch.hardware_abstraction.hal_core import HardwareVendor, devices
from kernel_pytorch.hardware_abstraction.vendor_adapters.adapter import (
    CommunicationBackend,
    VendorAdapter,
    channels_last,
    contiguous,
    torch_backend,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "AMDAdapter",
    "CPUAdapter",
    "CustomASICAdapter",
    "IntelAdapter",
    "NVIDIAAdapter",
    "auto_detect_best_adapter",
]


class NVIDIAAdapter(VendorAdapter):
    """NVIDIA GPUs: ``cuda``, NCCL, channels last for convolutions (tensor cores read NHWC)."""

    vendor = HardwareVendor.NVIDIA

    def create_communication_backend(self) -> CommunicationBackend:
        return torch_backend("nccl", "torch's CUDA build")

    def optimize_memory_layout(self, tensor: Tensor) -> Tensor:
        return channels_last(tensor)


class AMDAdapter(VendorAdapter):
    """AMD GPUs under ROCm, where torch says ``cuda`` and ``nccl`` too and means HIP and RCCL."""

    vendor = HardwareVendor.AMD

    def create_communication_backend(self) -> CommunicationBackend:
        return torch_backend("nccl", "torch's ROCm build")

    def optimize_memory_layout(self, tensor: Tensor) -> Tensor:
        """Contiguous: MIOpen prefers NCHW unless it is told otherwise."""
        return contiguous(tensor)


class IntelAdapter(VendorAdapter):
    """Intel GPUs: torch's own ``xpu`` and XCCL. Intel Extension for PyTorch is discontinued; what
    it did is in torch since 2.5, so nothing is imported from it."""

    vendor = HardwareVendor.INTEL

    def create_communication_backend(self) -> CommunicationBackend:
        return torch_backend("xccl", "torch's XPU build")

    def optimize_memory_layout(self, tensor: Tensor) -> Tensor:
        return channels_last(tensor)


class CPUAdapter(VendorAdapter):
    """Processors of any maker: ``cpu``, Gloo, channels last for oneDNN's convolutions."""

    vendor = HardwareVendor.CPU

    def create_communication_backend(self) -> CommunicationBackend:
        return torch_backend("gloo", "torch with Gloo")

    def optimize_memory_layout(self, tensor: Tensor) -> Tensor:
        return channels_last(tensor)


class CustomASICAdapter(VendorAdapter):
    """Chips of drivers from outside, and simulated ones: ``custom`` collectives."""

    vendor = HardwareVendor.CUSTOM_ASIC

    def create_communication_backend(self) -> CommunicationBackend:
        """``custom``: the collectives of the registered custom device, its own where the backend
        brings some, else through the host. Available once a device is registered."""
        # A custom device can be registered only where that module was imported.
        custom: Any = sys.modules.get("drivetrain.pytorch.custom.registration")
        handle: Any = custom.registered() if custom is not None else None
        if handle is None:
            return CommunicationBackend("custom", "no custom device is registered in this process")
        from drivetrain.pytorch.custom.distributed import group_name

        return CommunicationBackend("custom", torch_name=group_name(handle.name))

    def optimize_memory_layout(self, tensor: Tensor) -> Tensor:
        return contiguous(tensor)


_ADAPTERS: dict[HardwareVendor, type[VendorAdapter]] = {
    kind.vendor: kind
    for kind in (NVIDIAAdapter, AMDAdapter, IntelAdapter, CPUAdapter, CustomASICAdapter)
}


def auto_detect_best_adapter() -> VendorAdapter:
    """The adapter of the best device here, by Drivetrain's placement; a CPU's when there is no
    accelerator."""
    for spec in ranked([spec for spec in devices() if spec.vendor in _ADAPTERS]):
        return _ADAPTERS[spec.vendor]()
    return CPUAdapter()

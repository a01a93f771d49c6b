"""The guide's hardware abstraction, one name each; imported when first asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernel_pytorch.hardware_abstraction.compiled import CompiledKernel
    from kernel_pytorch.hardware_abstraction.hal_core import (
        DeviceSpec,
        HardwareCapabilities,
        HardwareVendor,
    )
    from kernel_pytorch.hardware_abstraction.layer import HardwareAbstractionLayer
    from kernel_pytorch.hardware_abstraction.mesh import DeviceMesh
    from kernel_pytorch.hardware_abstraction.optimizer import CapabilityAwareOptimizer
    from kernel_pytorch.hardware_abstraction.plugin_system import HardwarePluginManager
    from kernel_pytorch.hardware_abstraction.privateuse1_integration import (
        CustomDeviceBackend,
        PrivateUse1Config,
        register_custom_device,
    )
    from kernel_pytorch.hardware_abstraction.triton_backends import ProprietaryTritonBackend
    from kernel_pytorch.hardware_abstraction.vendor_adapters import (
        AMDAdapter,
        CPUAdapter,
        CustomASICAdapter,
        IntelAdapter,
        NVIDIAAdapter,
        VendorAdapter,
        auto_detect_best_adapter,
    )

_HOMES = {
    **dict.fromkeys(["DeviceSpec", "HardwareCapabilities", "HardwareVendor"], "hal_core"),
    "HardwareAbstractionLayer": "layer",
    "CompiledKernel": "compiled",
    "DeviceMesh": "mesh",
    **dict.fromkeys(["AMDAdapter", "CPUAdapter", "CustomASICAdapter"], "vendor_adapters"),
    **dict.fromkeys(["IntelAdapter", "NVIDIAAdapter", "VendorAdapter"], "vendor_adapters"),
    "auto_detect_best_adapter": "vendor_adapters",
    "ProprietaryTritonBackend": "triton_backends",
    "HardwarePluginManager": "plugin_system",
    "CapabilityAwareOptimizer": "optimizer",
    "CustomDeviceBackend": "privateuse1_integration",
    "PrivateUse1Config": "privateuse1_integration",
    "register_custom_device": "privateuse1_integration",
}

__all__ = [
    "AMDAdapter",
    "CPUAdapter",
    "CapabilityAwareOptimizer",
    "CompiledKernel",
    "CustomASICAdapter",
    "CustomDeviceBackend",
    "DeviceMesh",
    "DeviceSpec",
    "HardwareAbstractionLayer",
    "HardwareCapabilities",
    "HardwarePluginManager",
    "HardwareVendor",
    "IntelAdapter",
    "NVIDIAAdapter",
    "PrivateUse1Config",
    "ProprietaryTritonBackend",
    "VendorAdapter",
    "auto_detect_best_adapter",
    "register_custom_device",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])

"""One adapter for each vendor: its devices, its collectives, the layout that it likes."""

from kernel_pytorch.hardware_abstraction.vendor_adapters.adapter import (
    CommunicationBackend,
    VendorAdapter,
)
from kernel_pytorch.hardware_abstraction.vendor_adapters.vendors import (
    AMDAdapter,
    CPUAdapter,
    CustomASICAdapter,
    IntelAdapter,
    NVIDIAAdapter,
    auto_detect_best_adapter,
)

__all__ = [
    "AMDAdapter",
    "CPUAdapter",
    "CommunicationBackend",
    "CustomASICAdapter",
    "IntelAdapter",
    "NVIDIAAdapter",
    "VendorAdapter",
    "auto_detect_best_adapter",
]

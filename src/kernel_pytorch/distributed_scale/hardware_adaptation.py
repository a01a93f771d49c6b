"""Where `HardwareAdapter` was before the guide; the same class."""

from kernel_pytorch.distributed_scale.hardware_adapter import HardwareAdapter

__all__ = ["HardwareAdapter"]

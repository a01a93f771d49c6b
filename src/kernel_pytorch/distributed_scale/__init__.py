"""Device selection under the guide's names; also in ``hardware_adaptation``, its older home."""

from kernel_pytorch.distributed_scale.hardware_adapter import HardwareAdapter

__all__ = ["HardwareAdapter"]

"""What every vendor's adapter does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput, DrivetrainError, HalError, Unsupported
from kernel_pytorch._kept import kept
from kernel_pytorch.hardware_abstraction.hal_core import DeviceSpec, HardwareVendor, devices

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CommunicationBackend", "VendorAdapter"]


class CommunicationBackend(str):
    """The name of a backend of torch.distributed, and whether this torch has it."""

    available: bool
    reason: str
    """Why not; empty when it is available."""
    torch_name: str
    """What torch.distributed calls it: of ``custom``, the device's own collectives."""

    def __new__(cls, name: str, reason: str = "", torch_name: str = "") -> CommunicationBackend:
        made = super().__new__(cls, name)
        made.available, made.reason = not reason, reason
        made.torch_name = torch_name or name
        return made

    def init_process_group(self, **arguments: Any) -> None:
        """``torch.distributed.init_process_group`` with this backend. Raises Unsupported where
        this torch does not have it."""
        if not self.available:
            raise Unsupported(
                f"the collectives {self!s} cannot be used: {self.reason}",
                code="unsupported",
                op="init_process_group",
            )
        import torch.distributed as dist

        dist.init_process_group(self.torch_name, **arguments)


class VendorAdapter(ABC):
    """One vendor's devices; kept for the guide. Now: `drivetrain.hal`, and torch's own names.

    A vendor of one's own subclasses this, or better writes a driver (docs/write_a_driver.md).
    """

    vendor: HardwareVendor = HardwareVendor.UNKNOWN

    def __init__(self) -> None:
        kept(f"kernel_pytorch.{type(self).__name__}", "drivetrain.hal.devices(vendor=...)")

    def discover_devices(self) -> list[DeviceSpec]:
        """The vendor's usable devices in this machine, those first that torch can name."""
        found = devices([self.vendor])
        return sorted(found, key=lambda spec: not spec.torch_device)

    def initialize_device(self, device_id: int) -> DeviceSpec:
        """Open a device in this process and do a small operation on it.

        ``device_id`` counts `discover_devices`. Raises BadInput when there is none, HalError when
        it does not work.
        """
        found = self.discover_devices()
        if isinstance(device_id, bool) or not isinstance(device_id, int):
            raise BadInput(f"the device {device_id!r} is no number")
        if not 0 <= device_id < len(found):
            there = ", ".join(f"{i}: {spec}" for i, spec in enumerate(found)) or "none"
            raise BadInput(f"{self.vendor} has no device {device_id} here; there are: {there}")
        spec = found[device_id]
        _use(spec)
        return spec

    @abstractmethod
    def create_communication_backend(self) -> CommunicationBackend:
        """The vendor's collectives in torch.distributed; nothing is started."""

    @abstractmethod
    def optimize_memory_layout(self, tensor: Tensor) -> Tensor:
        """The same values in the layout that the vendor's libraries like; the same object where it
        has that layout already."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


def _use(spec: DeviceSpec) -> None:
    """Write and read four bytes."""
    device = spec.device
    back = bytearray(4)
    stream = device.stream()
    try:
        with device.alloc(4, stream=stream) as buffer:
            buffer.fill(b"\x2a", stream=stream)
            buffer.copy_to(back, stream=stream)
            stream.synchronize(timeout=30)
    except DrivetrainError:
        raise
    finally:
        stream.close()
    if back != b"\x2a" * 4:
        raise HalError(
            f"{spec.address} gave back {back.hex()} for 2a2a2a2a: do not use it",
            code="wrong",
            driver=device.driver,
            op="initialize_device",
            device=spec.address,
        )


def torch_backend(name: str, built: str) -> CommunicationBackend:
    """A backend of torch.distributed; ``built`` is what its torch build is called."""
    import torch.distributed as dist

    if not dist.is_available():
        return CommunicationBackend(name, "this torch was built without torch.distributed")
    known = {
        "nccl": dist.is_nccl_available,
        "gloo": dist.is_gloo_available,
        "xccl": getattr(dist, "is_xccl_available", lambda: False),
    }[name]
    if known():
        return CommunicationBackend(name)
    import torch

    return CommunicationBackend(
        name, f"torch {torch.__version__} was built without {name}; install {built}"
    )


def channels_last(tensor: Tensor) -> Tensor:
    """4-dimensional tensors as NHWC, 5-dimensional ones as NDHWC, others contiguous."""
    import torch

    if tensor.layout != torch.strided:
        return tensor
    if tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if tensor.dim() == 5:
        return tensor.contiguous(memory_format=torch.channels_last_3d)
    return tensor.contiguous()


def contiguous(tensor: Tensor) -> Tensor:
    """Row after row; sparse tensors as they are."""
    import torch

    return tensor.contiguous() if tensor.layout == torch.strided else tensor

"""Ranks and the devices that they get, of one vendor or of several."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from drivetrain.errors import BadInput, Unsupported
from kernel_pytorch.hardware_abstraction.hal_core import DeviceSpec, HardwareVendor

__all__ = ["DeviceMesh", "mesh_over"]

BACKENDS = {
    HardwareVendor.NVIDIA: "nccl",
    HardwareVendor.AMD: "nccl",
    HardwareVendor.INTEL: "xccl",
    HardwareVendor.CPU: "gloo",
    HardwareVendor.CUSTOM_ASIC: "custom",
}
"""torch.distributed's name of each vendor's collectives. ROCm's RCCL answers to ``nccl``, too."""

LARGEST = 4096


@dataclass(frozen=True)
class DeviceMesh:
    """Which device each rank of this machine gets: a plan, which starts nothing."""

    ranks: tuple[DeviceSpec, ...]

    @property
    def world_size(self) -> int:
        return len(self.ranks)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.ranks),)

    @property
    def vendors(self) -> dict[str, int]:
        """Vendor -> how many ranks."""
        return dict(Counter(str(spec.vendor) for spec in self.ranks))

    @property
    def backend(self) -> str:
        """The collectives that all ranks share: the vendor's own, or ``gloo`` across vendors."""
        found = {BACKENDS.get(spec.vendor, "gloo") for spec in self.ranks}
        return found.pop() if len(found) == 1 else "gloo"

    def to_torch(self) -> Any:
        """``torch.distributed``'s DeviceMesh over the process group that this process is in.

        Raises BadInput when there is no group of this size, Unsupported across kinds of devices:
        a mesh of torch's has one kind.
        """
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        if not dist.is_available() or not dist.is_initialized():
            raise BadInput(
                "there is no process group: call torch.distributed.init_process_group("
                f"{self.backend!r}, ...) in each of the {self.world_size} processes first"
            )
        if dist.get_world_size() != self.world_size:
            raise BadInput(
                f"the process group has {dist.get_world_size()} ranks, the mesh {self.world_size}"
            )
        kinds = {spec.torch_device.partition(":")[0] for spec in self.ranks}
        if len(kinds) != 1 or "" in kinds:
            raise Unsupported(
                "torch's DeviceMesh has one kind of device; this mesh has "
                f"{', '.join(spec.torch_device or spec.address for spec in self.ranks)}",
                code="unsupported",
                op="device_mesh",
            )
        return init_device_mesh(kinds.pop(), self.shape)

    def __str__(self) -> str:
        rows = (f"rank {i}: {spec}" for i, spec in enumerate(self.ranks))
        return f"{'; '.join(rows)}; collectives: {self.backend}"


def mesh_over(specs: Sequence[DeviceSpec], world_size: int) -> DeviceMesh:
    """A mesh of ``world_size`` ranks over these devices, one each, in their order.

    Processors take as many ranks as are asked for; an accelerator takes one. Raises BadInput when
    there are more ranks than devices to take them.
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int):
        raise BadInput(f"world_size is {world_size!r}; give a whole number")
    if not 1 <= world_size <= LARGEST:
        raise BadInput(f"world_size is {world_size}; give 1 to {LARGEST}")
    if not specs:
        raise BadInput("there is no device to make a mesh of; see `drivetrain devices`")
    shared = [spec for spec in specs if spec.vendor is HardwareVendor.CPU]
    ranks = list(specs[:world_size])
    if len(ranks) < world_size and not shared:
        there = ", ".join(spec.address for spec in specs)
        raise BadInput(
            f"{world_size} ranks were asked for and there are {len(specs)} devices ({there}); an "
            "accelerator takes one rank. Ask for fewer, or start one job per machine"
        )
    while len(ranks) < world_size:
        ranks.append(shared[len(ranks) % len(shared)])
    return DeviceMesh(tuple(ranks))

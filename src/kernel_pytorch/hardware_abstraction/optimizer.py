"""`CapabilityAwareOptimizer`: a model tuned to hardware that is told by its capabilities."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from drivetrain.errors import BadInput
from kernel_pytorch._kept import kept
from kernel_pytorch.hardware_abstraction.hal_core import (
    DeviceSpec,
    HardwareCapabilities,
    HardwareVendor,
    devices,
    spec_of,
    vendor_named,
)

__all__ = ["CapabilityAwareOptimizer", "OptimizedModel"]

_WITHOUT = {
    "supports_tensor_core": ("tf32", "int8*", "fp8"),
    "supports_mixed_precision": ("bf16-*", "fp16-*", "fp8"),
    "supports_custom_kernels": ("compile-*", "flex-attention"),
}
"""A capability -> the steps of `drivetrain.pytorch.optimize` that want it."""


class OptimizedModel(nn.Module):
    """A model that is tuned when it is first called in eval mode, with that call's arguments: what
    is fastest depends on their shapes. In training mode it runs as it was.

    ``report`` is None until then; ``optimize(example_inputs)`` does it at once.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, skip: tuple[str, ...], options: dict[str, Any]
    ) -> None:
        super().__init__()
        self.model = model
        self.device = device
        self.skip = skip
        """Steps that are not tried, because the hardware lacks what they want."""
        self.report: Any = None
        self._options = options

    def optimize(self, example_inputs: Any) -> OptimizedModel:
        """Tune for arguments of this form: a tensor, a tuple, or a mapping of names."""
        from drivetrain.pytorch.optimize import optimize

        skip = (*self.skip, *self._options.get("skip", ()))
        options = {**self._options, "skip": skip}
        found = optimize(self.model, self.device, example_inputs, **options)
        self.model, self.report = found.model, found.report
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        if self.report is None and not self.training:
            self.optimize(_arguments(self.model, args, kwargs))
        return self.model(*args, **kwargs)


def _arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not kwargs:
        return args
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


class CapabilityAwareOptimizer:
    """Kept for the guide. Now: `drivetrain.pytorch.optimize.optimize`, which measures each step on
    the device and keeps it where it is faster and within tolerance.

    ``capability_database`` maps addresses or names to capabilities, as
    ``HardwarePluginManager.discover_capabilities()`` gives them; None: this machine's.
    """

    def __init__(self, capability_database: Mapping[str, Any] | None = None) -> None:
        kept("kernel_pytorch.CapabilityAwareOptimizer", "drivetrain.pytorch.optimize.optimize")
        if capability_database is not None and not isinstance(capability_database, Mapping):
            raise BadInput(
                f"the capability database is a {type(capability_database).__name__}; give a dict "
                "of names and capabilities, or None"
            )
        self.capabilities: Mapping[str, Any] = (
            {spec.address: spec.capabilities for spec in devices()}
            if capability_database is None
            else capability_database
        )

    def optimize_for_hardware(
        self, model: nn.Module, target_hardware: Any, example_inputs: Any = None, **options: Any
    ) -> OptimizedModel:
        """The model on the target, tuned with what its capabilities allow.

        ``target_hardware`` is a name in the database, an address, a vendor, a `DeviceSpec`, or an
        object with ``supports_tensor_core``, ``supports_custom_kernels`` and
        ``supports_mixed_precision`` (and ``address``, else the CPU). A capability that is False
        leaves out the steps that want it; one that is True has them tried. Without
        ``example_inputs`` the first call in eval mode gives them. ``options`` go to ``optimize``.

        The model that is passed stays as it is. Raises BadInput for hardware that is not there.
        """
        if not isinstance(model, nn.Module):
            raise BadInput(f"a {type(model).__name__} is no torch.nn.Module")
        device, told = self._target(target_hardware)
        skip = tuple(
            dict.fromkeys(
                step
                for capability, steps in _WITHOUT.items()
                if getattr(told, capability, None) is False
                for step in steps
            )
        )
        found = OptimizedModel(model, device, skip, options)
        found.train(model.training)
        return found if example_inputs is None else found.optimize(example_inputs)

    def _target(self, target: Any) -> tuple[torch.device, Any]:
        """torch's device and the capabilities."""
        from drivetrain import hal
        from drivetrain.pytorch.devices import torch_device

        if isinstance(target, HardwareVendor) or str(target).lower() in set(HardwareVendor):
            vendor = vendor_named(target)
            there = [spec for spec in devices([vendor]) if spec.torch_device]
            if not there:
                raise BadInput(f"this machine has no device of {vendor} that torch can use")
            return torch_device(there[0].address), there[0].capabilities
        if isinstance(target, DeviceSpec):
            return torch_device(target.address), self.capabilities.get(
                target.address, target.capabilities
            )
        if isinstance(target, HardwareCapabilities):
            names = [name for name, known in self.capabilities.items() if known == target]
            return torch_device(names[0] if names else "cpu"), target
        if isinstance(target, (str, torch.device)):
            name = str(target)
            device = torch_device(name)
            if name in self.capabilities:
                return device, self.capabilities[name]
            own = hal.device("cpu:0" if name == "cpu" else name)
            return device, spec_of(own).capabilities
        if any(hasattr(target, name) for name in _WITHOUT):
            return torch_device(getattr(target, "address", "cpu")), target
        raise BadInput(
            f"a {type(target).__name__} tells no hardware: give an address, a vendor, a "
            "DeviceSpec, or an object with supports_mixed_precision and its kin"
        )

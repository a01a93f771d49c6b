"""The guide's custom devices: its backend class and configuration, over Drivetrain's registration.

A subclass of `CustomDeviceBackend` becomes a backend of `drivetrain.pytorch.custom`, which does the
rest. New code gives that function a backend of `drivetrain.pytorch.custom.protocol` directly.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput, HalError
from drivetrain.hal import shared_library
from kernel_pytorch._kept import kept
from kernel_pytorch.hardware_abstraction.backend_memory import BackendMemory
from kernel_pytorch.hardware_abstraction.hal_core import HardwareVendor, vendor_named

if TYPE_CHECKING:
    import torch

__all__ = ["CustomDeviceBackend", "PrivateUse1Config", "Registration", "register_custom_device"]

_MIB = 1 << 20
_OPTIONAL = ("kernels", "capabilities", "collectives", "copy_across")
"""Methods of the protocol that a subclass may have, too."""


class CustomDeviceBackend:
    """What the guide subclasses: a chip's driver, with four methods to override.

    It may also have what `drivetrain.pytorch.custom.protocol` calls optional: ``kernels()``,
    ``compile_graph(gm, example_inputs)``, ``synchronize(device_id)``.
    """

    def __init__(
        self, name: str, vendor: HardwareVendor | str = HardwareVendor.CUSTOM_ASIC
    ) -> None:
        kept(
            "kernel_pytorch.CustomDeviceBackend", "a backend of drivetrain.pytorch.custom.protocol"
        )
        self.name = name
        self.vendor = vendor_named(vendor)

    def initialize_device(self, device_id: int) -> bool:
        """Make a device ready; False when it cannot be used."""
        return True

    def get_device_count(self) -> int:
        """How many devices there are, at least 1."""
        return 1

    def get_device_properties(self, device_id: int) -> Mapping[str, Any]:
        """At least ``name``, and ``memory`` in MiB."""
        return {"name": f"{self.name}-{device_id}", "memory": 0}

    def allocate_memory(self, size: int, device_id: int) -> Any:
        """``size`` bytes, as an object whose bytes the host may touch (a bytearray, a numpy array,
        a CPU tensor, ...) or, where ``host_visible = True`` is set, as an address. None, as here:
        Drivetrain gives host memory. ``free_memory(what, device_id)``, where there is one, gets it
        back."""
        return None

    def copy_to_device(self, tensor: torch.Tensor, device_id: int) -> torch.Tensor:
        """Transfer a tensor. Memory that the host may touch needs none: Drivetrain asks this once
        for each device, with a small tensor, so that what does not work is known at once."""
        return tensor


@dataclass(frozen=True)
class PrivateUse1Config:
    """How a custom device is registered.

    A ``backend_library`` that exports ``drivetrain_driver_v1`` (docs/write_a_driver.md) *is* the
    driver: the devices, their memory and kernels are the library's, and of the backend only
    ``kernels``, ``compile_graph`` and ``collectives`` are asked. Any other is only loaded.
    """

    device_name: str
    vendor: HardwareVendor | str = HardwareVendor.CUSTOM_ASIC
    backend_library: str | None = None
    enable_autograd: bool = True
    """Drivetrain's devices always have it; False only warns."""
    enable_compilation: bool = True
    """Whether the backend's ``compile_graph`` becomes a backend of torch.compile."""


@dataclass(frozen=True)
class Registration:
    """A registered device type; true, so that ``if register_custom_device(...)`` works."""

    handle: Any
    """Of `drivetrain.pytorch.custom`: ``device``, ``devices``, ``fallbacks``, ``shim``."""
    library: ctypes.CDLL | None = None

    @property
    def device(self) -> torch.device:
        found: torch.device = self.handle.device
        return found

    @property
    def devices(self) -> tuple[torch.device, ...]:
        found: tuple[torch.device, ...] = self.handle.devices
        return found

    @property
    def fallbacks(self) -> Any:
        """Which operations left the device, and how often."""
        return self.handle.fallbacks

    def __bool__(self) -> bool:
        return True

    def __str__(self) -> str:
        return f"True ({self.handle!r})"


_registered: list[tuple[CustomDeviceBackend, PrivateUse1Config, Registration]] = []


def register_custom_device(
    backend: CustomDeviceBackend, config: PrivateUse1Config | None = None
) -> Registration:
    """Make the backend's devices a device type of torch's, named ``config.device_name``, for the
    rest of the process; kept for the guide. Now: `drivetrain.pytorch.custom`.

    The same call again gives the same registration. A backend library that cannot be loaded is a
    warning. Raises BadInput, before torch is touched, for a name that torch cannot take, a backend
    that is none, and when there is another such device already; HalError for a device that does not
    get ready.
    """
    kept(
        "kernel_pytorch.register_custom_device",
        "drivetrain.pytorch.custom.register_custom_device",
    )
    given: object = backend
    if not isinstance(given, CustomDeviceBackend):
        kind = given.__name__ if isinstance(given, type) else type(given).__name__
        raise BadInput(
            f"{kind} is no CustomDeviceBackend object; subclass it, or give this backend to "
            "drivetrain.pytorch.custom.register_custom_device"
        )
    chosen = PrivateUse1Config(str(backend.name), backend.vendor) if config is None else config
    if type(chosen) is not PrivateUse1Config:
        raise BadInput(f"config is a {type(chosen).__name__}; give a PrivateUse1Config")
    for known, its, registration in _registered:
        if known is backend and its == chosen:
            return registration
    vendor_named(chosen.vendor)
    from drivetrain.pytorch import custom
    from drivetrain.pytorch.custom.config import checked_name

    checked_name(chosen.device_name)
    if not chosen.enable_autograd:
        warnings.warn("enable_autograd=False: autograd cannot be taken away here", stacklevel=2)
    library = _library(chosen.backend_library)
    adapted: Any
    if library is not None and shared_library.is_driver(str(chosen.backend_library)):
        adapted = _driven(backend, chosen)
    else:
        adapted = _Adapted(backend, chosen)
    handle = custom.register_custom_device(adapted, custom.Config(name=chosen.device_name))
    registration = Registration(handle, library)
    _registered.append((backend, chosen, registration))
    return registration


def _library(name: str | None) -> ctypes.CDLL | None:
    if not name:
        return None
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        warnings.warn(
            f"the backend library {name} cannot be loaded ({error}); the device works without it: "
            "operations that the backend has no kernel for run on the CPU",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def _driven(backend: CustomDeviceBackend, config: PrivateUse1Config) -> Any:
    """Devices of the library, with what the guide's backend has for torch beside them."""
    from drivetrain.pytorch.custom.hal_backend import HalBackend
    from drivetrain.pytorch.custom.protocol import kernels_of

    class Driven(HalBackend):
        def kernels(self) -> Mapping[str, Any]:
            return {**super().kernels(), **kernels_of(backend)}

    made = Driven(shared_library.devices(str(config.backend_library)), config.device_name)
    optional = ("collectives", "compile_graph") if config.enable_compilation else ("collectives",)
    for name in optional:
        if callable(getattr(backend, name, None)):
            setattr(made, name, getattr(backend, name))
    return made


class _Adapted:
    """The guide's backend as one of `drivetrain.pytorch.custom.protocol`."""

    host_visible = True

    def __init__(self, backend: CustomDeviceBackend, config: PrivateUse1Config) -> None:
        self.name = config.device_name
        self.guide = backend
        self._count = _checked_count(backend)
        self._properties = [self._ready(index) for index in range(self._count)]
        for name in _OPTIONAL:
            if callable(getattr(backend, name, None)):
                setattr(self, name, getattr(backend, name))
        if config.enable_compilation and callable(getattr(backend, "compile_graph", None)):
            self.compile_graph = backend.compile_graph  # type: ignore[attr-defined]
        memory = BackendMemory.of(backend, self.name)
        if memory is not None:
            self.alloc, self.free = memory.alloc, memory.free

    def device_count(self) -> int:
        return self._count

    def synchronize(self, index: int) -> None:
        wait = getattr(self.guide, "synchronize", None)
        if callable(wait):
            wait(index)

    def properties(self, index: int) -> Mapping[str, Any]:
        return self._properties[index]

    def _ready(self, index: int) -> dict[str, Any]:
        import torch

        kind = type(self.guide).__name__
        if not self.guide.initialize_device(index):
            raise HalError(
                f"{kind}.initialize_device({index}) says that the device cannot be used; nothing "
                "was registered",
                code="not_ready",
                driver=self.name,
                op="initialize_device",
                device=f"{self.name}:{index}",
            )
        told = self.guide.get_device_properties(index)
        if not isinstance(told, Mapping) or not isinstance(told.get("name"), str):
            raise BadInput(
                f"{kind}.get_device_properties({index}) gives {told!r}; give at least "
                '{"name": ..., "memory": MiB}'
            )
        memory = told.get("memory", 0)
        if isinstance(memory, bool) or not isinstance(memory, (int, float)) or memory < 0:
            raise BadInput(f"{kind}.get_device_properties({index}): memory is {memory!r}, no MiB")
        sample = torch.arange(4, dtype=torch.float32)
        there = self.guide.copy_to_device(sample, index)
        if not isinstance(there, torch.Tensor) or there.shape != sample.shape:
            raise BadInput(
                f"{kind}.copy_to_device gives {type(there).__name__}; give back the tensor"
            )
        return {**told, "total_memory": int(memory * _MIB)}


def _checked_count(backend: CustomDeviceBackend) -> int:
    count = backend.get_device_count()
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= 64:
        raise BadInput(f"{type(backend).__name__}.get_device_count() gives {count!r}; give 1 to 64")
    return count

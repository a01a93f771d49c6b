"""The one custom device type of this process: its devices, their memory, what left them."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from drivetrain.errors import BadInput
from drivetrain.pytorch.custom.config import Config
from drivetrain.pytorch.custom.memory import Memory, Opaque, Shared, Visible
from drivetrain.pytorch.custom.table import Fallbacks


class Runtime:
    """Made once, by `register_custom_device`."""

    def __init__(self, name: str, backends: tuple[Any, ...], config: Config) -> None:
        self.name = name
        self.backends = backends
        self.config = config
        self.fallbacks = Fallbacks(name, config.fallback)
        self.places: list[tuple[Any, int]] = []
        """By torch's index: the backend, and the device's number to it."""
        self.memories: list[Memory] = []
        for backend in backends:
            for local in range(backend.device_count()):
                index = len(self.places)
                self.places.append((backend, local))
                self.memories.append(_memory(name, index, backend, local))
        self.visible = all(memory.visible for memory in self.memories)
        self.generators = [torch.Generator("cpu") for _ in self.places]
        self.random = threading.RLock()
        self.shim: Any = None
        """The C++ shim's module where it is in use."""
        self._current = threading.local()

    @property
    def count(self) -> int:
        return len(self.places)

    @property
    def current(self) -> int:
        """The device that ``NAME`` without an index means, in this thread."""
        if self.shim is not None:
            return int(self.shim.current())
        return getattr(self._current, "index", 0)

    @current.setter
    def current(self, index: int) -> None:
        self.checked(index)
        if self.shim is not None:
            self.shim.set_current(index)
        else:
            self._current.index = index

    def checked(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise RuntimeError(
                f"there is no {self.name}:{index}; the last device is {self.name}:{self.count - 1}"
            )
        return index

    def index_of(self, device: Any = None) -> int:
        """The number of a device as torch's functions take one: None, a number, a name."""
        if device is None:
            return self.current
        if isinstance(device, int):
            return self.checked(device)
        found = torch.device(device)
        if found.type != self.name:
            raise BadInput(f"{found} is no device of {self.name}")
        return self.current if found.index is None else self.checked(found.index)

    def memory(self, device: Any) -> Memory:
        """The memory of a `torch.device` (None: the current one)."""
        index = None if device is None else device.index
        return self.memories[self.current if index is None else self.checked(index)]

    def is_here(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.name

    def synchronize(self, index: int | None = None) -> None:
        backend, local = self.places[self.current if index is None else index]
        backend.synchronize(local)

    def memory_info(self, index: int) -> tuple[int, int]:
        """Free and total bytes, from the backend; (0, 0) where it does not tell."""
        backend, local = self.places[index]
        if not hasattr(backend, "memory_info"):
            return 0, 0
        free, total = backend.memory_info(local)
        return int(free), int(total)


def _memory(name: str, index: int, backend: Any, local: int) -> Memory:
    if not backend.host_visible:
        return Opaque(name, index, backend, local)
    if hasattr(backend, "alloc"):
        return Visible(name, index, backend, local)
    return Shared(name, index)

"""Memory that a backend of the guide allocates itself, as addresses."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from drivetrain.errors import BadInput

__all__ = ["BackendMemory"]

_ALIGNMENT = 64


class BackendMemory:
    """``alloc`` and ``free`` of the protocol over ``allocate_memory`` and ``free_memory``."""

    def __init__(self, backend: Any, name: str) -> None:
        self._backend = backend
        self._name = name
        self._held: dict[int, Any] = {}
        """Address -> what the backend gave, which is kept alive."""
        self._lock = threading.RLock()  # a finaliser may come in between

    @classmethod
    def of(cls, backend: Any, name: str) -> BackendMemory | None:
        """The backend's memory; None where it leaves memory to Drivetrain. Raises BadInput for
        memory that cannot be used."""
        sample = backend.allocate_memory(_ALIGNMENT, 0)
        if sample is None:
            return None
        made = cls(backend, name)
        made._address(sample, _ALIGNMENT)
        made._give_back(sample, 0)
        return made

    def alloc(self, nbytes: int, index: int) -> int:
        given = self._backend.allocate_memory(nbytes + _ALIGNMENT, index)
        if given is None:
            raise MemoryError(f"{self._name}:{index} has no {nbytes} bytes left")
        address, size = self._address(given, nbytes + _ALIGNMENT)
        if size < nbytes + _ALIGNMENT:
            raise BadInput(
                f"allocate_memory({nbytes + _ALIGNMENT}, {index}) gave {size} bytes of memory"
            )
        aligned = -(-address // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            self._held[aligned] = given
        return aligned

    def free(self, address: int, nbytes: int, index: int) -> None:
        with self._lock:
            given = self._held.pop(address, None)
        if given is not None:
            self._give_back(given, index)

    def _give_back(self, given: Any, index: int) -> None:
        free = getattr(self._backend, "free_memory", None)
        if callable(free):
            free(given, index)

    def _address(self, given: Any, nbytes: int) -> tuple[int, int]:
        """Where it lies, and its bytes. Raises BadInput for what the host may not touch."""
        if isinstance(given, int) and not isinstance(given, bool):
            if getattr(self._backend, "host_visible", False) is not True:
                raise BadInput(
                    f"allocate_memory gives the address {given:#x}. Set host_visible = True where "
                    "the host may touch it; memory that it may not needs a backend of "
                    "drivetrain.pytorch.custom.protocol, which copies in and out"
                )
            return given, nbytes
        if hasattr(given, "data_ptr"):
            if getattr(given, "device", None) is None or given.device.type != "cpu":
                raise BadInput("allocate_memory gives a tensor that is not on the CPU")
            return int(given.data_ptr()), int(given.numel() * given.element_size())
        try:
            view = memoryview(given).cast("B")
        except TypeError as error:
            raise BadInput(
                f"allocate_memory gives a {type(given).__name__}, which is no memory: give a "
                "bytearray, an array, a CPU tensor, or None for memory of Drivetrain's"
            ) from error
        if view.readonly:
            raise BadInput(f"allocate_memory gives a {type(given).__name__} that is read-only")
        return ctypes.addressof(ctypes.c_char.from_buffer(view)), view.nbytes

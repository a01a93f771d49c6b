"""``torch.NAME``: what torch and scripts ask of a device's module, by the names of torch.cuda."""

from __future__ import annotations

import os
import types
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from drivetrain.pytorch.custom.runtime import Runtime


class Namespace(types.ModuleType):
    """The module of the registered device. ``device`` arguments are a number, a name, a
    `torch.device` or None, the current one."""

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(f"torch.{runtime.name}", f"The device {runtime.name}, by Drivetrain.")
        self._runtime = runtime
        self._forked = False
        if not runtime.visible and hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._note_fork)

        class device:
            """With it, ``NAME`` without an index means this device."""

            def __init__(self, index: Any) -> None:
                self.index = runtime.index_of(index)

            def __enter__(self) -> None:
                self.before, runtime.current = runtime.current, self.index

            def __exit__(self, *_: object) -> None:
                runtime.current = self.before

        self.device = device

    def _note_fork(self) -> None:
        self._forked = True

    # -- devices -----------------------------------------------------------------------------

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def init(self) -> None:
        pass

    def _lazy_init(self) -> None:
        pass

    def _is_in_bad_fork(self) -> bool:
        return self._forked

    def device_count(self) -> int:
        return self._runtime.count

    def current_device(self) -> int:
        return self._runtime.current

    def set_device(self, device: Any) -> None:
        self._runtime.current = self._runtime.index_of(device)

    def _exchange_device(self, index: int) -> int:
        before = self._runtime.current
        if index >= 0:
            self._runtime.current = index
        return before

    def _maybe_exchange_device(self, index: int) -> int:
        return self._exchange_device(index)

    def synchronize(self, device: Any = None) -> None:
        """Wait until all that was queued is done."""
        self._runtime.synchronize(self._runtime.index_of(device))

    def get_device_properties(self, device: Any = None) -> Any:
        """What the backend tells of its device; it has a ``name`` at least."""
        backend, local = self._runtime.places[self._runtime.index_of(device)]
        found = dict(backend.properties(local)) if hasattr(backend, "properties") else {}
        return SimpleNamespace(**{"name": f"{backend.name}:{local}", **found})

    def get_device_name(self, device: Any = None) -> str:
        return str(self.get_device_properties(device).name)

    def get_device_capability(self, device: Any = None) -> dict[str, Any]:
        """``supported_dtypes``: the types that the device computes in."""
        backend, _ = self._runtime.places[self._runtime.index_of(device)]
        told = dict(backend.capabilities()) if hasattr(backend, "capabilities") else {}
        names = told.get("dtypes")
        types_of = _ALL if names is None else {getattr(torch, name) for name in names}
        return {**told, "supported_dtypes": types_of}

    # -- autocast ----------------------------------------------------------------------------

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [getattr(torch, name) for name in self._runtime.config.amp_dtypes]

    def is_bf16_supported(self) -> bool:
        return torch.bfloat16 in self.get_device_capability()["supported_dtypes"]

    # -- random numbers ----------------------------------------------------------------------

    @property
    def default_generators(self) -> tuple[torch.Generator, ...]:
        return tuple(self._runtime.generators)

    def manual_seed(self, seed: int) -> None:
        self._runtime.generators[self._runtime.current].manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        for generator in self._runtime.generators:
            generator.manual_seed(seed)

    def seed_all(self) -> None:
        self.manual_seed_all(torch.Generator("cpu").seed())

    def initial_seed(self) -> int:
        return self._runtime.generators[self._runtime.current].initial_seed()

    def get_rng_state(self, device: Any = None) -> Tensor:
        return self._runtime.generators[self._runtime.index_of(device)].get_state()

    def set_rng_state(self, new_state: Tensor, device: Any = None) -> None:
        self._runtime.generators[self._runtime.index_of(device)].set_state(new_state)

    def get_rng_state_all(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._runtime.generators]

    def set_rng_state_all(self, new_states: Iterable[Tensor]) -> None:
        for generator, state in zip(self._runtime.generators, new_states, strict=True):
            generator.set_state(state)

    # -- memory ------------------------------------------------------------------------------

    def _used(self, device: Any) -> tuple[int, int]:
        """Bytes in tensors now, and the most there were."""
        index = self._runtime.index_of(device)
        if self._runtime.shim is not None:
            now, most = self._runtime.shim.memory(index)
            return now, most
        memory: Any = self._runtime.memories[index]
        return getattr(memory, "used_bytes", 0), getattr(memory, "peak_bytes", 0)

    def memory_allocated(self, device: Any = None) -> int:
        """Bytes in tensors. Without the C++ shim 0 where the memory is Drivetrain's, which is then
        not counted."""
        return self._used(device)[0]

    def max_memory_allocated(self, device: Any = None) -> int:
        return self._used(device)[1]

    def memory_reserved(self, device: Any = None) -> int:
        return self.memory_allocated(device)

    def max_memory_reserved(self, device: Any = None) -> int:
        return self.max_memory_allocated(device)

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        index = self._runtime.index_of(device)
        if self._runtime.shim is not None:
            self._runtime.shim.reset_peak(index)
            return
        memory: Any = self._runtime.memories[index]
        if hasattr(memory, "peak_bytes"):
            memory.peak_bytes = memory.used_bytes

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return {
            "allocated_bytes.all.current": self.memory_allocated(device),
            "allocated_bytes.all.peak": self.max_memory_allocated(device),
        }

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        """Free and total bytes, from the backend; (0, 0) where it does not tell."""
        return self._runtime.memory_info(self._runtime.index_of(device))

    def empty_cache(self) -> None:
        """Memory goes back to the backend at once; it has a cache where it wants one."""


_ALL = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    torch.complex128,
}

"""Storages of the device: saved, loaded, copied, and made without ending the process.

Without a C++ allocator ``torch.UntypedStorage(n, device=...)`` of such a device reads address 0.
The methods of storages that would allocate or copy are given ways of their own here. With the C++
shim, which is such an allocator, torch makes and resizes them itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drivetrain.errors import Unsupported
from drivetrain.pytorch.custom.memory import set_to
from drivetrain.pytorch.custom.runtime import Runtime

_PRIORITY = 5  # before torch's own, which know nothing of the name


def register(runtime: Runtime) -> None:
    """``torch.save`` and ``torch.load`` with any ``map_location``; and storages that do not end
    the process."""
    name = runtime.name

    def tag(storage: Any) -> str | None:
        device = storage.device
        return f"{name}:{device.index or 0}" if device.type == name else None

    def load(storage: Any, location: str) -> Any:
        if location != name and not location.startswith(f"{name}:"):
            return None
        device = torch.device(location)
        return moved(runtime, storage, runtime.current if device.index is None else device.index)

    torch.serialization.register_package(_PRIORITY, tag, load)
    _guard(runtime)


def bytes_over(runtime: Runtime, storage: Any) -> Tensor:
    """All bytes of a storage as a uint8 tensor where the storage is."""
    if storage.device.type == "cpu":
        return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
    memory = runtime.memories[storage.device.index or 0]
    nothing = memory.empty((0,), torch.uint8)
    return set_to(nothing, storage, 0, (storage.nbytes(),), (1,))


def moved(runtime: Runtime, storage: Any, index: int) -> Any:
    """A copy of a storage of the CPU or the device, on device ``index``."""
    memory = runtime.memories[runtime.checked(index)]
    made = memory.empty((storage.nbytes(),), torch.uint8)
    if storage.nbytes():
        made.copy_(bytes_over(runtime, storage))
    return made.untyped_storage()


def _guard(runtime: Runtime) -> None:
    """Storages are a C type: what would go wrong in C is caught in its Python subclass."""
    kind: Any = torch.UntypedStorage
    new, clone, cpu, copy = kind.__new__, kind.clone, kind.cpu, kind.copy_
    resize, fill, get, put = kind.resize_, kind.fill_, kind.__getitem__, kind.__setitem__
    byteswap, renew = kind.byteswap, kind.new
    name = runtime.name

    def here(storage: Any) -> bool:
        return bool(storage.device.type == name)

    def made(cls: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is None or torch.device(device).type != name:
            more = {} if device is None else {"device": device}
            return new(cls, *args, **more, **kwargs)
        if len(args) > 1 or kwargs:
            raise TypeError("UntypedStorage takes a number of bytes, or a sequence of them")
        index = runtime.index_of(device)
        if args and not isinstance(args[0], int):
            return moved(runtime, new(cls, args[0]), index)
        size = args[0] if args else 0
        if size < 0:
            raise RuntimeError(f"a storage of {size} bytes; give 0 or more")
        if runtime.shim is not None:
            return new(cls, size, device=torch.device(name, index))
        return runtime.memories[index].empty((size,), torch.uint8).untyped_storage()

    def cloned(self: Any) -> Any:
        return moved(runtime, self, self.device.index or 0) if here(self) else clone(self)

    def on_cpu(self: Any) -> Any:
        if not here(self):
            return cpu(self)
        return bytes_over(runtime, self).to("cpu", copy=True).untyped_storage()

    def copied(self: Any, source: Any, non_blocking: Any = None) -> Any:
        if not here(self) and not here(source):
            return copy(self, source, non_blocking)
        if self.nbytes() != source.nbytes():
            raise RuntimeError(
                f"copy_: a storage of {source.nbytes()} bytes into one of {self.nbytes()} bytes"
            )
        if self.nbytes():
            bytes_over(runtime, self).copy_(bytes_over(runtime, source))
        return self

    def resized(self: Any, size: int) -> Any:
        if here(self) and runtime.shim is None:
            raise Unsupported(
                f"a storage of {name} cannot be resized in place without the C++ shim; use "
                "Tensor.resize_, or register with shim='require', which builds it",
                code="unsupported",
                driver=name,
                op="resize_",
            )
        return resize(self, size)

    def filled(self: Any, value: Any) -> Any:
        if not here(self):
            return fill(self, value)
        if self.nbytes():
            bytes_over(runtime, self).fill_(value)
        return self

    def got(self: Any, index: Any) -> Any:
        if not here(self):
            return get(self, index)
        if isinstance(index, slice):
            return bytes_over(runtime, self)[index].clone().untyped_storage()
        return bytes_over(runtime, self)[index].item()

    def set_item(self: Any, index: Any, value: Any) -> None:
        if here(self):
            bytes_over(runtime, self)[index] = value
        else:
            put(self, index, value)

    def swapped(self: Any, dtype: torch.dtype) -> None:
        if not here(self):
            byteswap(self, dtype)
            return
        host = self.cpu()
        byteswap(host, dtype)
        self.copy_(host)

    def another(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not here(self):
            return renew(self, *args, **kwargs)
        return made(kind, *args, device=self.device)

    kind.byteswap, kind.new = swapped, another
    kind.__new__ = staticmethod(made)
    kind.clone, kind.cpu, kind.copy_ = cloned, on_cpu, copied
    kind.resize_, kind.fill_ = resized, filled
    kind.__getitem__, kind.__setitem__ = got, set_item

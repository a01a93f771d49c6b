"""Memory of one device, of the three sorts that there are.

`Shared` is Drivetrain's own, on the host; `Visible` the backend's, where the host may touch it;
`Opaque` the backend's, where it may not. With all three a tensor of the device is a plain
``torch.Tensor`` with a real storage. What differs is how the CPU gets at one: as an alias, or as a
copy that is written back.

With the C++ shim torch has an allocator for the device, which asks the same backend; without it a
tensor gets its memory by way of DLPack.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from drivetrain.errors import OutOfMemory
from drivetrain.pytorch.custom.alias import label, on_host, owned, relabelled

_CPU = torch.device("cpu")
CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_set: Any = torch.ops.aten.set_.source_Storage_storage_offset._handle.redispatch_boxed


class Memory(Protocol):
    """Of device ``index``. ``visible``: the CPU may work on the device's own bytes."""

    index: int
    visible: bool
    native: Any
    """The shim's module once it is in use, else None."""

    def for_native(self) -> tuple[Any, Any, Any]:
        """What the shim's allocator calls: ``allocate(nbytes)`` for an address, ``release(address,
        nbytes)``, ``copy(dst, src, nbytes)``; None where the host does it itself."""

    def empty(self, size: Sequence[int], dtype: torch.dtype, form: Any = None) -> Tensor:
        """New and undefined, in the memory format ``form``."""

    def empty_strided(
        self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype
    ) -> Tensor: ...

    def on_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors on the CPU; those that share memory still do."""

    def written(self, tensors: Sequence[Tensor], hosts: Sequence[Tensor]) -> None:
        """The CPU wrote to ``hosts``, which came from `on_host` of these tensors."""

    def from_host(self, host: Tensor) -> Tensor:
        """A tensor of the CPU that nobody else has, as one of the device."""


def plain(host: Tensor) -> Tensor:
    """The tensor without conj and neg bits, gradient or implied zeros."""
    if host.is_conj() or host.is_neg():
        host = host.resolve_conj().resolve_neg()
    if host._is_zerotensor():
        return torch.zeros(host.shape, dtype=host.dtype, device=_CPU)
    return host.detach() if host.requires_grad else host


def set_to(tensor: Tensor, storage: Any, offset: int, size: Any, stride: Any) -> Tensor:
    """Make ``tensor`` one over ``storage``; the offset and strides in elements."""
    found: Tensor = _set(CPU_KEYS, tensor, storage, offset, list(size), list(stride))
    return found


class _Numbered:
    """Of the device ``name:index``."""

    def __init__(self, name: str, index: int) -> None:
        self.index = index
        self.native: Any = None
        self._name = name
        self._label = label(index)

    @cached_property
    def _device(self) -> torch.device:
        return torch.device(self._name, self.index)  # torch knows the name only when it is in use

    def _on_host(self, tensor: Tensor) -> Tensor:
        """Of host-visible memory."""
        if self.native is None:
            return on_host(tensor)
        found: Tensor = self.native.host(tensor)
        return found

    def _here(self, host: Tensor) -> Tensor:
        """The memory of a tensor of the CPU under the device's name."""
        if self.native is None:
            return relabelled(host, self._label)
        found: Tensor = self.native.device(host, self.index)
        return found


class Shared(_Numbered):
    """Memory on the host that torch's own CPU allocator gives."""

    visible = True

    def for_native(self) -> tuple[Any, Any, Any]:
        return None, None, None

    def empty(self, size: Sequence[int], dtype: torch.dtype, form: Any = None) -> Tensor:
        more = {} if form is None else {"memory_format": form}
        return self._here(torch.empty(size, dtype=dtype, device=_CPU, **more))

    def empty_strided(
        self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        return self._here(torch.empty_strided(size, stride, dtype=dtype, device=_CPU))

    def on_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self._on_host(each) for each in tensors]

    def written(self, tensors: Sequence[Tensor], hosts: Sequence[Tensor]) -> None:
        pass

    def from_host(self, host: Tensor) -> Tensor:
        return self._here(plain(host))


class _Allocated(_Numbered):
    """Memory that a backend's ``alloc`` gives."""

    def __init__(self, name: str, index: int, backend: Any, local: int) -> None:
        super().__init__(name, index)
        self.backend = backend
        self.local = local
        """The device's number to its backend."""
        self.used_bytes = self.peak_bytes = 0
        self._lock = threading.RLock()  # a finaliser may come in between

    def for_native(self) -> tuple[Any, Any, Any]:
        return self._allocate, self._release, self._copying()

    def _copying(self) -> Callable[[int, int, int], None] | None:
        return None

    def _storage(self, nbytes: int) -> Any:
        """A storage of the device; its bytes are undefined."""
        address = self._allocate(nbytes)
        free = partial(self._release, address, nbytes)
        return owned(address, nbytes, self.index, free).untyped_storage()

    def _allocate(self, nbytes: int) -> int:
        reason: object = "it said so"
        try:
            address = self.backend.alloc(nbytes, self.local)
        except MemoryError as error:
            address, reason = 0, error
        if not address:
            raise OutOfMemory(
                f"{self.backend.name}:{self.local} has no {nbytes} bytes left ({reason}); "
                f"{self.used_bytes} bytes are in use here. Take a smaller batch or free tensors",
                requested=nbytes,
                code="out_of_memory",
                driver=self.backend.name,
                op="alloc",
                device=f"{self.backend.name}:{self.local}",
            )
        if not isinstance(address, int) or not 0 < address < 1 << 63:
            raise TypeError(
                f"alloc of {self.backend.name} gave {address!r}, which is no address: a number "
                "above 0 and below 2**63"
            )
        with self._lock:
            self.used_bytes += nbytes
            self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return address

    def _release(self, address: int, nbytes: int) -> None:
        with self._lock:
            self.used_bytes -= nbytes
        self.backend.free(address, nbytes, self.local)

    def empty(self, size: Sequence[int], dtype: torch.dtype, form: Any = None) -> Tensor:
        if self.native is not None:
            return torch.empty(size, dtype=dtype, device=self._device, memory_format=form)
        if form is None or form is torch.contiguous_format:
            return self._typed(size, contiguous_strides(size), dtype)
        stride = torch.empty(size, device="meta", memory_format=form).stride()
        return self.empty_strided(size, stride, dtype)

    def empty_strided(
        self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        if self.native is not None:
            return torch.empty_strided(size, stride, dtype=dtype, device=self._device)
        return self._typed(size, stride, dtype)

    def _typed(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = extent(size, stride)
        if not count:
            made = torch.empty_strided(size, stride, dtype=dtype, device=_CPU)
            return relabelled(made, self._label)
        storage = self._storage(count * dtype.itemsize)
        nothing = relabelled(torch.empty(0, dtype=dtype, device=_CPU), self._label)
        return set_to(nothing, storage, 0, size, stride)


class Visible(_Allocated):
    """The backend's memory at addresses of the host."""

    visible = True

    def on_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [self._on_host(each) for each in tensors]

    def written(self, tensors: Sequence[Tensor], hosts: Sequence[Tensor]) -> None:
        pass

    def from_host(self, host: Tensor) -> Tensor:
        host = plain(host)
        made = self.empty_strided(host.shape, dense_strides(host), host.dtype)
        if host.numel():
            self._on_host(made).copy_(host)
        return made


class Opaque(_Allocated):
    """The backend's memory, which only its ``copy_in`` and ``copy_out`` reach."""

    visible = False

    def _copying(self) -> Callable[[int, int, int], None]:
        def copy(dst: int, src: int, nbytes: int) -> None:
            self.backend.copy_within(dst, src, nbytes, self.local)

        return copy

    def on_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [host for host, _ in self._staged(tensors)]

    def _staged(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, _Span]]:
        bare = [_stripped(each) for each in tensors]
        spans: dict[int, _Span] = {}
        for each, _ in bare:
            if each.numel():
                low, high = bytes_of(each)
                base = each.untyped_storage().data_ptr()
                known = spans.get(base)
                if known is None:
                    spans[base] = _Span(base, low, high)
                else:  # two tensors of one storage may overlap: they must go on doing so
                    known.low, known.high = min(known.low, low), max(known.high, high)
        for span in spans.values():
            # Whole 16 bytes, so that a complex number lies on a multiple of its size.
            span.low -= span.low % 16
            span.host = torch.empty(span.high - span.low, dtype=torch.uint8, device=_CPU)
            self.backend.copy_out(
                span.host.data_ptr(), span.base + span.low, span.high - span.low, self.local
            )
        found = []
        for each, bits in bare:
            if not each.numel():
                made = torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=_CPU)
                found.append((bits(made), _NOTHING))
                continue
            span = spans[each.untyped_storage().data_ptr()]
            host = torch.empty(0, dtype=each.dtype, device=_CPU)
            offset = int(each.storage_offset()) - span.low // each.element_size()
            host.set_(span.host.untyped_storage(), offset, each.shape, each.stride())
            found.append((bits(host), span))
        return found

    def written(self, tensors: Sequence[Tensor], hosts: Sequence[Tensor]) -> None:
        done = set()
        for each, host in zip(tensors, hosts, strict=True):
            if not host.numel():
                continue
            low, high = bytes_of(host)
            start, _ = bytes_of(each)
            key = (host.untyped_storage().data_ptr(), low, high)
            if key in done:
                continue
            done.add(key)
            self.backend.copy_in(
                each.untyped_storage().data_ptr() + start,
                host.untyped_storage().data_ptr() + low,
                high - low,
                self.local,
            )

    def from_host(self, host: Tensor) -> Tensor:
        host = plain(host)
        if not is_dense(host):
            host = host.contiguous()
        made = self.empty_strided(host.shape, host.stride(), host.dtype)
        if host.numel():
            nbytes = host.numel() * host.element_size()
            self.backend.copy_in(made.data_ptr(), host.data_ptr(), nbytes, self.local)
        return made


class _Span:
    """Bytes ``low`` to ``high`` of the storage at ``base``, as they are on the host."""

    def __init__(self, base: int, low: int, high: int) -> None:
        self.base, self.low, self.high = base, low, high
        self.host: Tensor = _NO_TENSOR


_NO_TENSOR = torch.empty(0, dtype=torch.uint8, device=_CPU)
_NOTHING = _Span(0, 0, 0)


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _stripped(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The tensor without its bits, and what puts them on again."""
    if tensor.is_conj():
        return torch._conj(tensor), torch._conj
    if tensor.is_neg():
        return torch._neg_view(tensor), torch._neg_view
    if tensor._is_zerotensor():
        zeros = torch.zeros(tensor.shape, dtype=tensor.dtype, device=_CPU)
        return torch.empty(0, dtype=tensor.dtype, device=_CPU), lambda _: zeros
    return tensor, _same


def contiguous_strides(size: Sequence[int]) -> tuple[int, ...]:
    found, step = [], 1
    for each in reversed(size):
        found.append(step)
        step *= max(each, 1)
    return tuple(reversed(found))


def dense_strides(tensor: Tensor) -> Sequence[int]:
    """The tensor's own strides where it has no gaps, else those of a contiguous one."""
    return tensor.stride() if is_dense(tensor) else contiguous_strides(tensor.shape)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a range of memory, in whatever order, without gap or overlap."""
    step = 1
    for own, n in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if n != 1:
            if own != step:
                return not tensor.numel()
            step *= n
    return True


def extent(size: Sequence[int], stride: Sequence[int]) -> int:
    """How many elements a tensor reaches over, its gaps included."""
    if 0 in size:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))


def bytes_of(tensor: Tensor) -> tuple[int, int]:
    """From where to where the tensor reaches in its storage, in bytes."""
    size = tensor.element_size()
    low = int(tensor.storage_offset()) * size
    return low, low + extent(tensor.shape, tensor.stride()) * size

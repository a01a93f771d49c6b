"""Devices of the HAL as a backend: torch's memory on them is HAL buffers, its work HAL streams.

What a kernel for such a device asks of a tensor is here: `buffer_of`, `stream_of`, `device_of`. The
kernels themselves are in `drivetrain.pytorch.custom.hal_ops`.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from drivetrain import hal
from drivetrain.errors import BadInput
from drivetrain.hal.opened import opened
from drivetrain.pytorch.custom.protocol import Kernel

_KERNELS = "drivetrain.pytorch.custom.hal_ops"
_serving: HalBackend | None = None


class HalBackend:
    """Devices of one driver, in order: torch's index 0 is the first of them.

    Each device has one stream, on which torch's operations are queued; ``stream(index)``.
    """

    host_visible = False

    def __init__(self, devices: Sequence[hal.Device], name: str | None = None) -> None:
        if not devices:
            raise BadInput("a backend over HAL devices needs at least one device")
        self.devices = tuple(devices)
        self.name = name or devices[0].driver
        self._streams: dict[int, hal.Stream] = {}
        self._buffers: dict[int, hal.Buffer] = {}
        self._lock = threading.RLock()  # a finaliser may come in between
        open_one: Any = opened(devices[0]).backend
        if "compile_graph" in open_one.groups:
            self.compile_graph = open_one.compile_graph
        if "collectives" in open_one.groups:
            self.collectives = self._collectives

    # -- the protocol ------------------------------------------------------------------------

    def device_count(self) -> int:
        return len(self.devices)

    def synchronize(self, index: int) -> None:
        self.stream(index).synchronize()

    def alloc(self, nbytes: int, index: int) -> int:
        buffer = self.devices[index].alloc(nbytes, stream=self.stream(index))
        self._buffers[buffer.ptr] = buffer
        return buffer.ptr

    def free(self, address: int, nbytes: int, index: int) -> None:
        self._buffers.pop(address).close()

    def copy_in(self, address: int, host: int, nbytes: int, index: int) -> None:
        stream = self.stream(index)
        self.buffer(address, nbytes).copy_from(_bytes_at(host, nbytes), stream=stream)
        stream.synchronize()

    def copy_out(self, host: int, address: int, nbytes: int, index: int) -> None:
        stream = self.stream(index)
        self.buffer(address, nbytes).copy_to(_bytes_at(host, nbytes), stream=stream)
        stream.synchronize()

    def copy_within(self, dst: int, src: int, nbytes: int, index: int) -> None:
        self.buffer(dst, nbytes).copy_from(self.buffer(src, nbytes), stream=self.stream(index))

    def copy_across(self, dst: int, dst_index: int, src: int, src_index: int, nbytes: int) -> None:
        self.stream(src_index).synchronize()
        stream = self.stream(dst_index)
        self.buffer(dst, nbytes).copy_from(self.buffer(src, nbytes), stream=stream)
        stream.synchronize()

    def memory_info(self, index: int) -> tuple[int, int]:
        found = self.devices[index].memory()
        return found.free_bytes, found.total_bytes

    def properties(self, index: int) -> Mapping[str, Any]:
        device = self.devices[index]
        total = device.info.memory_bytes
        return {"name": device.name, "address": device.address, "total_memory": total}

    def kernels(self) -> Mapping[str, Kernel]:
        """What `drivetrain.pytorch.custom.hal_ops` has for these devices."""
        global _serving
        _serving = self
        if find_spec(_KERNELS) is None:
            return {}
        found: Mapping[str, Kernel] = import_module(_KERNELS).kernels(self)
        return found

    def _collectives(self, store: Any, rank: int, size: int, timeout_s: float) -> Any:
        from drivetrain.pytorch.custom.hal_collectives import Communicator

        return Communicator(self, store, rank, size, timeout_s)

    # -- for kernels -------------------------------------------------------------------------

    def stream(self, index: int) -> hal.Stream:
        """The stream of device ``index`` on which torch's work is queued."""
        found = self._streams.get(index)
        if found is None:
            with self._lock:
                found = self._streams.get(index)
                if found is None:
                    found = self._streams[index] = self.devices[index].stream()
        return found

    def buffer(self, address: int, nbytes: int, base: int | None = None) -> hal.Buffer:
        """``nbytes`` at ``address``, which lies in an allocation of this backend (``base``: where
        that begins, when it is known)."""
        whole = self._buffers.get(address if base is None else base)
        if whole is None:
            whole = self._around(address)
        offset = address - whole.ptr
        return whole if not offset and nbytes == whole.nbytes else whole.view(offset, nbytes)

    def _around(self, address: int) -> hal.Buffer:
        for start, each in list(self._buffers.items()):
            if start <= address < start + each.nbytes:
                return each
        raise BadInput(f"{address:#x} is no memory of {self.name}; was its tensor freed?")


def _bytes_at(address: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def serving() -> HalBackend:
    """The backend over HAL devices that is registered in this process. Raises BadInput."""
    if _serving is None:
        raise BadInput("no HAL device is registered with torch; see register_custom_device")
    return _serving


def buffer_of(tensor: torch.Tensor) -> hal.Buffer:
    """The tensor's memory from its first element to the end of its storage. An empty tensor has
    none: ask ``numel()`` first. Valid for as long as the tensor is alive."""
    storage = tensor.untyped_storage()
    base, size = storage.data_ptr(), int(storage.nbytes())
    offset = int(tensor.storage_offset()) * tensor.element_size()
    return serving().buffer(base + offset, size - offset, base)


def stream_of(tensor: torch.Tensor) -> hal.Stream:
    """The stream on which work on this tensor is queued."""
    return serving().stream(tensor.device.index)


def device_of(tensor: torch.Tensor) -> hal.Device:
    """The HAL device that the tensor is on."""
    return serving().devices[tensor.device.index]

"""A pool in C that frameworks can allocate from as well: torch, on threads that must not wait for
Python's lock. Its rules are those of `drivetrain.hal.pool`.

It is a resource like the others (``Device.alloc(pool=...)``), so that buffers and tensors come from
one cache, under one limit, in one set of numbers. For devices whose driver has a C API for memory
(CUDA).
"""

from __future__ import annotations

import ctypes
from dataclasses import astuple, fields
from functools import cache
from typing import Any

from drivetrain.errors import BadInput, HalError, OutOfMemory, Unsupported
from drivetrain.hal import hot
from drivetrain.hal.device import Device
from drivetrain.hal.driver import MemoryCalls
from drivetrain.hal.kinds import Kind
from drivetrain.hal.opened import Opened, opened
from drivetrain.hal.resource import Stats

_NO_LIMIT = (1 << 64) - 1
_NO_MEMORY, _LIMIT, _CAPTURING, _UNKNOWN, _DRIVER, _HOST = range(1, 7)
_WORDS = {
    _CAPTURING: ("capturing", "the stream is being captured; allocate before the capture begins"),
    _UNKNOWN: ("not_allocated", "no memory of this pool begins there"),
    _DRIVER: ("error", "the driver's error is {native}"),
    _HOST: ("host_memory", "there is no host memory for the pool's own lists"),
}
_MOST_DEVICES = 64
_LARGEST = 5

_u64 = ctypes.c_uint64
_CALLS = [field.name for field in fields(MemoryCalls)][:-1]


class _Calls(ctypes.Structure):
    """``dt_pool_calls``."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _CALLS)


class _Counts(ctypes.Structure):
    """``dt_pool_counts``."""

    _fields_ = (
        *((name, _u64) for name in ("live", "requested", "allocated", "reserved")),
        *((f"peak_{name}", _u64) for name in ("requested", "allocated", "reserved")),
        ("retries", _u64),
        ("failures", _u64),
        ("largest", _u64 * _LARGEST),
        ("native", ctypes.c_int64),
    )


def library_path() -> str:
    """The shared object with ``dt_torch_alloc`` and ``dt_torch_free``. Raises Unsupported where
    Drivetrain was installed without its C code."""
    if hot.BACKEND != "native":
        raise Unsupported(
            "a pool without Python needs Drivetrain's C code: install a C compiler and Python's "
            "headers, install Drivetrain again, and leave DRIVETRAIN_NATIVE alone",
            code="unsupported",
            op="native_pool",
        )
    from drivetrain.hal import _hot

    return str(_hot.__file__)


@cache
def _library() -> ctypes.CDLL:
    found = ctypes.CDLL(library_path())
    handle, status = ctypes.c_void_p, ctypes.c_int
    for name, result, arguments in (
        ("dt_pool_new", handle, (ctypes.POINTER(_Calls), _u64)),
        ("dt_pool_close", None, (handle,)),
        ("dt_pool_alloc", status, (handle, _u64, _u64, ctypes.POINTER(_u64))),
        ("dt_pool_free", status, (handle, _u64, _u64)),
        ("dt_pool_used_by", status, (handle, _u64, _u64)),
        ("dt_pool_forget_stream", None, (handle, _u64, _u64)),
        ("dt_pool_trim", _u64, (handle, _u64)),
        ("dt_pool_read", None, (handle, ctypes.POINTER(_Counts))),
        ("dt_torch_serve", status, (ctypes.c_int, handle)),
    ):
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


class NativePool:
    """A pool of device memory on ``device``; at most ``limit`` bytes are reserved."""

    def __init__(self, device: Device | Opened, *, limit: int | None = None) -> None:
        if limit is not None and not 0 <= limit < _NO_LIMIT:
            raise BadInput(f"a pool of at most {limit} bytes: give 0 or more, or None")
        self._handle = 0
        self.opened = device if isinstance(device, Opened) else opened(device)
        self.kind = Kind.DEVICE
        self._limit = limit
        self._library = library = _library()
        calls = getattr(self.opened.backend, "memory_calls", None)
        if calls is None:
            raise Unsupported(
                f"native_pool: the driver of {self.opened.device.address} has no C functions for "
                "memory; hal.Pool serves every device",
                code="unsupported",
                driver=self.opened.device.driver,
                op="native_pool",
                device=self.opened.device.address,
            )
        found: MemoryCalls = calls()
        self.ordinal = found.ordinal
        """The device's number in this process, as torch counts."""
        self._served = False
        table = _Calls(*astuple(found)[:-1])
        self._handle = library.dt_pool_new(
            ctypes.byref(table), _NO_LIMIT if limit is None else limit
        )
        if not self._handle:
            raise MemoryError("there is no host memory for a pool's lists")
        self.opened.tell_of_streams(self)

    # -- a memory resource -----------------------------------------------------------------------

    def allocate(self, nbytes: int, stream: int) -> int:
        box = _u64()
        code = self._library.dt_pool_alloc(self._open(), nbytes, stream, ctypes.byref(box))
        if code in (_NO_MEMORY, _LIMIT):
            raise self._exhausted(nbytes, code == _LIMIT)
        if code:
            raise self._failed("alloc", code)
        return box.value

    def deallocate(self, ptr: int, nbytes: int, stream: int, waits: tuple[int, ...]) -> None:
        if not self._handle:
            return
        backend = self.opened.backend
        for event in waits:
            backend.stream_wait(stream, event)
            self.opened.give_event(event)
        code = self._library.dt_pool_free(self._handle, ptr, stream)
        if code:
            raise self._failed("free", code)

    def stats(self) -> Stats:
        counts = self._counts()
        return Stats(**{name: getattr(counts, name) for name in Stats.__dataclass_fields__})

    def trim(self, keep: int = 0) -> int:
        return int(self._library.dt_pool_trim(self._open(), keep))

    def forget_stream(self, stream: int, heir: int, *, wait: bool = True) -> bool:
        if self._handle:
            self._library.dt_pool_forget_stream(self._handle, stream, heir)
        return True  # no Python runs while the pool is at work: nobody can come in between

    # -- torch -----------------------------------------------------------------------------------

    def serve_torch(self) -> None:
        """From here on ``dt_torch_alloc`` takes memory for torch's device `ordinal` from here. The
        pool then lives until the process ends: nobody tells when torch has let go of it."""
        if self._library.dt_torch_serve(self.ordinal, self._open()):
            raise BadInput(
                f"device {self.ordinal} is beyond the {_MOST_DEVICES} that can be served"
            )
        self._served = True

    # -- life ------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give everything back to the driver; nothing may use it any more. Raises BadInput while it
        serves torch, or holds living buffers."""
        if not self._handle:
            return
        if not self.opened.closed:
            live = self._counts().live
            if self._served or live:
                raise BadInput(
                    f"close: the pool {'serves torch' if self._served else f'has {live} buffers'}"
                )
            self._library.dt_pool_close(self._handle)
        self._handle = 0

    def __del__(self) -> None:
        # Where buffers or tensors live on, their memory is theirs until the process ends.
        if getattr(self, "_handle", 0) and not (self._served or self.opened.closed):
            try:
                self.close()
            except BadInput:
                pass

    def __enter__(self) -> NativePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- inside ----------------------------------------------------------------------------------

    def _open(self) -> int:
        if not self._handle or self.opened.closed:
            raise BadInput("the pool is closed, or its device is")
        return int(self._handle)

    def _counts(self) -> _Counts:
        counts = _Counts()
        self._library.dt_pool_read(self._open(), ctypes.byref(counts))
        return counts

    def _facts(self, op: str) -> dict[str, Any]:
        device = self.opened.device
        return {"driver": device.driver, "op": op, "device": device.address}

    def _failed(self, op: str, code: int) -> HalError:
        word, sentence = _WORDS[code]
        native = int(self._counts().native)
        return HalError(
            f"{op} on {self.opened.device.address}: {sentence.format(native=native)}",
            code=word,
            native=native if code == _DRIVER else 0,
            **self._facts(op),
        )

    def _exhausted(self, nbytes: int, at_limit: bool) -> OutOfMemory:
        free, total = self.opened.backend.memory()
        counts = self._counts()
        largest = ", ".join(str(size) for size in counts.largest if size) or "none"
        why = f"the pool's limit is {self._limit} bytes" if at_limit else "the driver has no more"
        return OutOfMemory(
            f"{nbytes} bytes of device memory on {self.opened.device.address} were asked for: "
            f"{why}. The device has {free} of {total} bytes free; this pool holds "
            f"{counts.reserved} bytes, {counts.allocated} of them in {counts.live} buffers and "
            f"tensors, the largest {largest}. Close buffers, or ask for less",
            requested=nbytes,
            free=free,
            total=total,
            code="out_of_memory",
            native=int(counts.native),
            **self._facts("alloc"),
        )

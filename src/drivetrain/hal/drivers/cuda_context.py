"""A device of CUDA's API, or of HIP's, which is the same under other names: calls made where they
belong, results turned into errors, waits.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, Protocol

from drivetrain.errors import DeviceLost, HalError, OutOfMemory, Unsupported
from drivetrain.hal.drivers.cuda_api import Api, Code, Cu
from drivetrain.hal.drivers.waits import wait_until

STICKY = frozenset(
    {
        Code.ERROR_ECC_UNCORRECTABLE,
        Code.ERROR_NVLINK_UNCORRECTABLE,
        Code.ERROR_CONTAINED,
        Code.ERROR_ILLEGAL_ADDRESS,
        Code.ERROR_LAUNCH_TIMEOUT,
        Code.ERROR_CONTEXT_IS_DESTROYED,
        Code.ERROR_ASSERT,
        Code.ERROR_HARDWARE_STACK_ERROR,
        Code.ERROR_ILLEGAL_INSTRUCTION,
        Code.ERROR_MISALIGNED_ADDRESS,
        Code.ERROR_INVALID_ADDRESS_SPACE,
        Code.ERROR_INVALID_PC,
        Code.ERROR_LAUNCH_FAILED,
        Code.ERROR_TENSOR_MEMORY_LEAK,
        Code.ERROR_MPS_CLIENT_TERMINATED,
        Code.ERROR_EXTERNAL_DEVICE,
    }
)
"""After one of these every further call fails: the context is gone with all its memory."""

_UNSUPPORTED = frozenset(
    {
        Code.ERROR_CALL_REQUIRES_NEWER_DRIVER,
        Code.ERROR_UNSUPPORTED_LIMIT,
        Code.ERROR_PEER_ACCESS_UNSUPPORTED,
        Code.ERROR_JIT_COMPILER_NOT_FOUND,
        Code.ERROR_JIT_COMPILATION_DISABLED,
        Code.ERROR_NOT_SUPPORTED,
    }
)
_CODES = {
    Code.ERROR_INVALID_VALUE: ("invalid", ""),
    Code.ERROR_DEVICE_UNAVAILABLE: (
        "busy",
        "; another process has the device for itself (nvidia-smi shows its compute mode)",
    ),
    Code.ERROR_LAUNCH_OUT_OF_RESOURCES: (
        "launch_resources",
        "; the block needs more registers or shared memory than there are: take fewer threads",
    ),
    Code.ERROR_DEINITIALIZED: ("closed", "; the process is ending"),
}


class Current(Protocol):
    """How an API knows which device a call is for."""

    handle: int

    def code(self, function: Any, *arguments: Any) -> int:
        """The result of a call for the device; what the thread had is found as it was. Raises
        `Refused` when the device could not be made current."""

    def release(self) -> None:
        """Let go of it. Raises `Refused`."""


class Refused(Exception):
    """A call that makes the device current, or lets go of it, failed."""

    def __init__(self, op: str, code: int) -> None:
        super().__init__(op, code)
        self.op, self.code = op, code


class Primary:
    """CUDA's primary context, retained until `release` and made current for each call.

    The context that somebody else made current on a thread is put back after each call. On a thread
    that has none, ours stays: the next call then finds it with one look.
    """

    def __init__(self, api: Api, device: int) -> None:
        self._api, self._device = api, device
        self._local = threading.local()
        handle = ctypes.c_void_p()
        code = api.cuDevicePrimaryCtxRetain(ctypes.byref(handle), device)
        if code:
            raise Refused("cuDevicePrimaryCtxRetain", code)
        self.handle = int(handle.value or 0)
        # A look at thread-local state: not worth giving up the interpreter's lock for.
        self._get_current = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(
            ctypes.cast(api.cuCtxGetCurrent, ctypes.c_void_p).value or 0
        )

    def code(self, function: Any, *arguments: Any) -> int:
        try:
            box, where = self._local.box
        except AttributeError:
            box = ctypes.c_void_p()
            where = ctypes.addressof(box)
            self._local.box = box, where
        self._get_current(where)
        if box.value == self.handle:
            return int(function(*arguments))
        if box.value is None:
            self._must(self._api.cuCtxSetCurrent, self.handle)
            return int(function(*arguments))
        self._must(self._api.cuCtxPushCurrent, self.handle)
        try:
            return int(function(*arguments))
        finally:
            self._api.cuCtxPopCurrent(ctypes.byref(ctypes.c_void_p()))

    def _must(self, function: Any, *arguments: Any) -> None:
        code = function(*arguments)
        if code:
            raise Refused(function.__name__, code)

    def release(self) -> None:
        self._must(self._api.cuDevicePrimaryCtxRelease, self._device)


class Context:
    """One device, current for each call until `release`."""

    def __init__(
        self,
        api: Api,
        device: int,
        address: str,
        current: Callable[[Api, int], Current] = Primary,
    ) -> None:
        self.api = api
        self.device = device
        """The API's own number of the device in this process."""
        self.address = address
        self.captures: set[int] = set()
        """Streams on which a capture was begun here."""
        self.streams: set[int] = set()
        """Streams made here."""
        self.closed = False
        self._over: Callable[[str], HalError] | None = None
        try:
            self._current = current(api, device)
        except Refused as error:
            raise self.failure(error.op, error.code) from None
        self.handle = self._current.handle

    # -- calls ---------------------------------------------------------------------------------

    def code(self, function: Any, *arguments: Any) -> int:
        """The result of a call made for this device. Raises what ended the device."""
        if self._over is not None:
            raise self._over(function.__name__)
        try:
            return self._current.code(function, *arguments)
        except Refused as error:
            raise self.failure(error.op, error.code) from None

    def call(self, function: Any, *arguments: Any) -> None:
        """A call that must succeed. Raises HalError."""
        code = self.code(function, *arguments)
        if code:
            raise self.failure(function.__name__, code)

    def ready(self, function: Any, handle: int) -> bool:
        """Whether a query says done. Raises what failed of the work that it asks for."""
        code = self.code(function, handle)
        if code == Code.ERROR_NOT_READY:
            return False
        if code:
            raise self.failure(function.__name__, code)
        return True

    def attribute(self, number: int) -> int:
        """A device attribute; 0 when the driver does not know it."""
        found = ctypes.c_int()
        code = self.api.cuDeviceGetAttribute(ctypes.byref(found), number, self.device)
        return found.value if code == Code.SUCCESS else 0

    # -- errors --------------------------------------------------------------------------------

    def failure(self, op: str, code: int, *, requested: int = 0, what: str = "") -> HalError:
        """The error that a result stands for. One that ended the context is kept for good."""
        name, sentence = self.api.words(code)
        asked = f"{op} on {self.address}{f' ({what})' if what else ''}"
        message = f"{asked} failed: {name} ({sentence or 'the driver has no words for it'})"
        facts: dict[str, Any] = {
            "driver": self.api.driver,
            "native": code,
            "native_name": name,
            "op": op,
            "device": self.address,
        }
        if code in STICKY:
            return self._lose(message, facts)
        if code == Code.ERROR_OUT_OF_MEMORY:
            free, total = self._memory()
            if requested:
                message = (
                    f"{asked}: {requested} bytes do not fit; {free} of {total} bytes are free. "
                    "Free buffers, or take a smaller size"
                )
            return OutOfMemory(
                message, requested=requested, free=free, total=total, code="out_of_memory", **facts
            )
        if code in _UNSUPPORTED:
            return Unsupported(message, code="unsupported", **facts)
        if Code.ERROR_STREAM_CAPTURE_UNSUPPORTED <= code <= Code.ERROR_STREAM_CAPTURE_WRONG_THREAD:
            return HalError(f"{message}; a stream is being captured", code="capturing", **facts)
        word, advice = _CODES.get(code, ("error", ""))
        return HalError(message + advice, code=word, **facts)

    def _lose(self, message: str, facts: dict[str, Any]) -> HalError:
        def again(op: str) -> HalError:
            return DeviceLost(
                f"{op} on {self.address}: the device was lost to this process earlier: {message}. "
                "Only a new process can use it again",
                code="lost",
                **{**facts, "op": op},
            )

        if self._over is None:
            self._over = again
        return DeviceLost(
            f"{message}; the device is lost to this process. Only a new process can use it again",
            code="lost",
            **facts,
        )

    def error(self, code: str, op: str, message: str) -> HalError:
        """An error of this driver's own, found before the vendor's was asked."""
        return HalError(
            f"{op} on {self.address}: {message}",
            code=code,
            driver=self.api.driver,
            op=op,
            device=self.address,
        )

    @property
    def lost(self) -> bool:
        return self._over is not None

    def _memory(self) -> tuple[int, int]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.api.cuMemGetInfo(ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    # -- capture -------------------------------------------------------------------------------

    def capturing(self, stream: int) -> bool:
        """Whether work queued on the stream is noted now and not done. Asking is harmless,
        where a query or a wait would break the capture."""
        if not self.captures and stream in self.streams:
            return False
        status = ctypes.c_int()
        self.call(self.api.cuStreamIsCapturing, stream, ctypes.byref(status))
        return status.value != Cu.STREAM_CAPTURE_STATUS_NONE

    def check_capture(self, stream: int, op: str) -> None:
        """Raises HalError for what cannot be done on a stream that is being captured."""
        if self.capturing(stream):
            raise self.error(
                "capturing", op, "the stream is being captured; do it before or after the capture"
            )

    # -- waits ---------------------------------------------------------------------------------

    def wait_until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Ask until it is so. False when ``timeout_s`` passed."""
        return wait_until(done, timeout_s)

    def wait_stream(self, stream: int, timeout_s: float) -> bool:
        query = self.api.cuStreamQuery
        return self.wait_until(lambda: self.ready(query, stream), timeout_s)

    # -- end -----------------------------------------------------------------------------------

    def release(self) -> None:
        """Let go of the context. Every later call raises."""
        lost, self.closed = self.lost, True
        self._over = lambda op: self.error("closed", op, "the device was closed; open it again")
        try:
            self._current.release()
        except Refused as error:
            if not lost and error.code != Code.ERROR_DEINITIALIZED:
                raise self.failure(error.op, error.code) from None

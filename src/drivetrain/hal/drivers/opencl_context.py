"""A context of one device, and the queues in it: results turned into errors, waits with limits.

Nothing waits inside OpenCL, whose own waits know no limit: a marker is queued and asked for.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

from drivetrain.errors import DeviceLost, HalError, OutOfMemory, Unsupported
from drivetrain.hal.drivers.opencl_api import NAME, Api, Cl, Code, Nv, name_of
from drivetrain.hal.drivers.opencl_platforms import Found

LOST = frozenset({Nv.ILLEGAL_ACCESS, Code.DEVICE_NOT_AVAILABLE, Code.CONTEXT_TERMINATED_KHR})
"""After one of these nothing works any more in this process."""

_GONE = frozenset({Code.INVALID_CONTEXT, Code.INVALID_COMMAND_QUEUE})
"""What is said of a handle that we know is alive, once its device was lost."""

_NO_MEMORY = frozenset(
    {Code.MEM_OBJECT_ALLOCATION_FAILURE, Code.OUT_OF_HOST_MEMORY, Code.OUT_OF_RESOURCES}
)
_UNSUPPORTED = frozenset(
    {Code.COMPILER_NOT_AVAILABLE, Code.LINKER_NOT_AVAILABLE, Code.PROFILING_INFO_NOT_AVAILABLE}
)
_WORDS = {
    Code.INVALID_VALUE: "invalid",
    Code.INVALID_WORK_GROUP_SIZE: "launch_resources",
    Code.INVALID_KERNEL_NAME: "no_such_kernel",
    Code.INVALID_BINARY: "not_taken",
    Code.BUILD_PROGRAM_FAILURE: "compile",
}
_LAUNCH = "clEnqueueNDRangeKernel"
_SPIN_S = 100e-6
_LONGEST_SLEEP_S = 1e-3


class Context:
    """The context of one device. Every call goes through `call` or `made`, which raise."""

    def __init__(self, api: Api, found: Found, address: str) -> None:
        self.api = api
        self.found = found
        self.device = found.handle
        self.address = address
        self.closed = False
        self.memory: Callable[[], tuple[int, int]] = lambda: (0, 0)
        """(free, total) bytes, for what OutOfMemory tells."""
        self._over: Callable[[str], HalError] | None = None
        properties = (ctypes.c_void_p * 3)(Cl.CONTEXT_PLATFORM, found.platform.handle, None)
        device = ctypes.c_void_p(found.handle)
        self.handle = self.made(
            api.clCreateContext, properties, 1, ctypes.byref(device), None, None
        )

    # -- calls -----------------------------------------------------------------------------------

    def call(self, function: Any, *arguments: Any) -> None:
        """A call that must succeed. Raises HalError."""
        if self._over is not None:
            raise self._over(function.__name__)
        code = function(*arguments)
        if code:
            raise self.failure(function.__name__, code)

    def code(self, function: Any, *arguments: Any) -> int:
        """The result of a call. Raises what ended the context before."""
        if self._over is not None:
            raise self._over(function.__name__)
        return int(function(*arguments))

    def made(self, function: Any, *arguments: Any, requested: int = 0) -> int:
        """The handle from a function that takes the address for its result last. Raises."""
        if self._over is not None:
            raise self._over(function.__name__)
        code = ctypes.c_int()
        handle = function(*arguments, ctypes.byref(code))
        if code.value or not handle:
            raise self.failure(
                function.__name__, code.value or Code.OUT_OF_RESOURCES, requested=requested
            )
        return int(handle)

    # -- errors ----------------------------------------------------------------------------------

    def failure(
        self, op: str, code: int, *, requested: int = 0, what: str = "", queued: bool = False
    ) -> HalError:
        """The error that a result stands for; ``queued``: the status of work that was queued.
        One that ended the context is kept for good."""
        name = name_of(code)
        asked = f"{op} on {self.address}{f' ({what})' if what else ''}"
        message = f"{asked} failed: {name}"
        facts: dict[str, Any] = {
            "driver": NAME,
            "native": code,
            "native_name": name,
            "op": op,
            "device": self.address,
        }
        crashed = queued and self.found.vendor == "nvidia" and code == Code.OUT_OF_RESOURCES
        if code in LOST or code in _GONE or crashed:
            return self._lose(message, facts)
        if queued:
            return HalError(f"{message}; work that was queued before failed", code="work", **facts)
        if code == Code.OUT_OF_RESOURCES and op == _LAUNCH:
            advice = "the block needs more registers or local memory than there are: take fewer"
            return HalError(f"{message}; {advice} threads", code="launch_resources", **facts)
        if code in _NO_MEMORY:
            free, total = self.memory()
            if requested:
                message = (
                    f"{asked}: {requested} bytes do not fit ({name}); {free} of {total} bytes are "
                    "free. Free buffers, or take a smaller size"
                )
            return OutOfMemory(
                message, requested=requested, free=free, total=total, code="out_of_memory", **facts
            )
        if code in _UNSUPPORTED:
            return Unsupported(message, code="unsupported", **facts)
        return HalError(message, code=_WORDS.get(code, "error"), **facts)

    def check(self, op: str) -> None:
        """Raises when the context is over."""
        if self._over is not None:
            raise self._over(op)

    def no_memory(self, op: str, nbytes: int) -> HalError:
        """For a request that does not fit, where OpenCL has no word for why."""
        most = self.found.number(Cl.DEVICE_MAX_MEM_ALLOC_SIZE)
        error = self.failure(op, Code.MEM_OBJECT_ALLOCATION_FAILURE, requested=nbytes)
        if isinstance(error, OutOfMemory) and nbytes > most:
            error.args = (f"{error}. One allocation has at most {most} bytes on this device",)
        return error

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
        """An error of this driver's own, found before OpenCL was asked."""
        return HalError(
            f"{op} on {self.address}: {message}",
            code=code,
            driver=NAME,
            op=op,
            device=self.address,
        )

    def unsupported(self, op: str, message: str) -> Unsupported:
        return Unsupported(
            f"{op} on {self.address}: {message}",
            code="unsupported",
            driver=NAME,
            op=op,
            device=self.address,
        )

    @property
    def lost(self) -> bool:
        return self._over is not None

    # -- waits -----------------------------------------------------------------------------------

    def complete(self, event: int) -> bool:
        """Whether an OpenCL event is. Raises what failed of its work."""
        status = ctypes.c_int()
        self.call(
            self.api.clGetEventInfo,
            event,
            Cl.EVENT_COMMAND_EXECUTION_STATUS,
            ctypes.sizeof(status),
            ctypes.addressof(status),
            None,
        )
        if status.value < 0:
            raise self.failure("queued work", status.value, queued=True)
        return status.value == Cl.COMPLETE

    def wait_until(self, done: Callable[[], bool], timeout_s: float) -> bool:
        """Ask until it is so: at once for short work, then with sleeps of an eighth of the time
        waited so far, 1 ms at most. False when ``timeout_s`` passed."""
        began = time.monotonic()
        while not done():
            waited = time.monotonic() - began
            if waited >= timeout_s:
                return False
            if waited > _SPIN_S:
                time.sleep(min(waited / 8, _LONGEST_SLEEP_S, timeout_s - waited))
        return True

    # -- end -------------------------------------------------------------------------------------

    def release(self) -> None:
        """Let go of the context. Every later call raises."""
        lost, self.closed = self.lost, True
        self._over = lambda op: self.error("closed", op, "the device was closed; open it again")
        code = self.api.clReleaseContext(self.handle)
        if code and not lost:
            raise self.failure("clReleaseContext", code)

"""A Level Zero device in the process's context of its driver: calls, and results turned into
errors."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from drivetrain.errors import DeviceLost, HalError, OutOfMemory, Unsupported
from drivetrain.hal.drivers.level_zero_api import NAME, Api, ContextDesc, Shared, Ze, word

LOST = frozenset({Ze.RESULT_ERROR_DEVICE_LOST, Ze.RESULT_ERROR_DEVICE_REQUIRES_RESET})
"""After one of these every further call for the device fails."""

_MEMORY = (Ze.RESULT_ERROR_OUT_OF_HOST_MEMORY, Ze.RESULT_ERROR_OUT_OF_DEVICE_MEMORY)
_UNSUPPORTED = (
    Ze.RESULT_ERROR_UNSUPPORTED_VERSION,
    Ze.RESULT_ERROR_UNSUPPORTED_FEATURE,
    Ze.RESULT_ERROR_UNSUPPORTED_SIZE,
)


class Context:
    """One device; every call for it goes through here."""

    def __init__(self, api: Api, driver: int, device: int, address: str) -> None:
        self.api, self.device, self.address = api, device, address
        self.lock = threading.RLock()
        """Command lists are not to be appended to by two threads at once."""
        self.free_and_total: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.closed = False
        self._over: Callable[[str], HalError] | None = None
        self._driver = driver
        with api.lock:
            found = api.contexts.get(driver)
            if found is None:
                box = ctypes.c_void_p()
                desc = ContextDesc(Ze.STRUCTURE_TYPE_CONTEXT_DESC)
                self.call(api.zeContextCreate, driver, ctypes.byref(desc), ctypes.byref(box))
                found = api.contexts[driver] = Shared(int(box.value or 0))
            found.users += 1
        self._shared = found
        self.handle = found.handle

    @property
    def lost(self) -> bool:
        return self._over is not None

    def code(self, function: Any, *arguments: Any) -> int:
        """The result of a call. Raises what ended the device."""
        if self._over is not None:
            raise self._over(function.__name__)
        return int(function(*arguments))

    def call(self, function: Any, *arguments: Any) -> None:
        """A call that must succeed. Raises HalError."""
        code = self.code(function, *arguments)
        if code:
            raise self.failure(function.__name__, code)

    def ready(self, function: Any, handle: int) -> bool:
        """Whether a query says done. Raises what failed."""
        code = self.code(function, handle)
        if code and code != Ze.RESULT_NOT_READY:
            raise self.failure(function.__name__, code)
        return not code

    def failure(self, op: str, code: int, *, requested: int = 0) -> HalError:
        """The error that a result stands for. One that ended the device is kept for good."""
        name = word(code)
        message = f"{op} on {self.address} failed: {name}"
        facts: dict[str, Any] = {
            "driver": NAME,
            "native": code,
            "native_name": name,
            "op": op,
            "device": self.address,
        }
        if code in LOST:
            return self._lose(message, facts)
        if code in _MEMORY:
            free, total = self.free_and_total()
            if requested:
                message = (
                    f"{op} on {self.address}: {requested} bytes do not fit; {free} of {total} "
                    "bytes are free. Free buffers, or take a smaller size"
                )
            return OutOfMemory(
                message, requested=requested, free=free, total=total, code="out_of_memory", **facts
            )
        if code in _UNSUPPORTED:
            return Unsupported(message, code="unsupported", **facts)
        return HalError(
            message,
            code="invalid" if code == Ze.RESULT_ERROR_INVALID_ARGUMENT else "error",
            **facts,
        )

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
            driver=NAME,
            op=op,
            device=self.address,
        )

    def at_end(self, give_back: Callable[[], None]) -> None:
        """Call it when the last device of the driver is closed."""
        self._shared.at_end.append(give_back)

    def release(self, *, keep: bool = False) -> None:
        """Let go of the context, or with ``keep`` leave it to the driver. Later calls raise."""
        lost, self.closed = self.lost, True
        self._over = lambda op: self.error("closed", op, "the device was closed; open it again")
        shared, api = self._shared, self.api
        with api.lock:
            shared.users -= 1
            shared.kept |= lost or keep
            last = not shared.users
            if api.contexts.get(self._driver) is shared and (last or shared.kept):
                del api.contexts[self._driver]
        if last and not shared.kept:
            for give_back in shared.at_end:
                give_back()
            code = api.zeContextDestroy(self.handle)
            if code:
                raise self.failure("zeContextDestroy", code)

"""A SYCL device with a context of its own: calls, and null results turned into errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from drivetrain.errors import HalError, OutOfMemory, Unsupported
from drivetrain.hal.drivers.sycl_api import NAME, Api, Dp, ErrorHandler

_told: list[int] = []
"""What queues reported by themselves and nobody asked about yet: OpenCL's or Level Zero's codes."""


_tell = ErrorHandler(_told.append)
"""Without a handler of one's own, SYCL ends the process when queued work fails."""


class Context:
    """One device, which it takes for its own; every call for it goes through here."""

    def __init__(self, api: Api, device: int, address: str) -> None:
        self.api, self.device, self.address = api, device, address
        self.lock = threading.RLock()  # a finaliser may come in between
        self.free_and_total: Callable[[], tuple[int, int]] = lambda: (0, 0)
        self.closed = False
        self.handle = 0
        self.home = 0
        """A queue for calls that name a device by one."""
        try:
            self.handle = self.made(api.DPCTLContext_Create, device, _tell, 0)
            self.home = self.queue(timing=False)
        except HalError:
            self.release()
            raise

    def check(self, op: str) -> None:
        if self.closed:
            raise self.error("closed", op, "the device was closed; open it again")

    def made(self, function: Any, *arguments: Any, what: str = "") -> int:
        """The handle from a function. Raises HalError when there is none."""
        self.check(function.__name__)
        found = function(*arguments)
        if not found:
            raise self.failure(function.__name__, what)
        return int(found)

    def queue(self, *, timing: bool) -> int:
        properties = Dp.IN_ORDER | (Dp.ENABLE_PROFILING if timing else 0)
        return self.made(self.api.DPCTLQueue_Create, self.handle, self.device, _tell, properties)

    def is_complete(self, event: int) -> bool:
        """Whether a SYCL event is. Raises what failed of its work."""
        status = self.api.DPCTLEvent_GetCommandExecutionStatus(event)
        if status == Dp.UNKNOWN_STATUS:
            codes = f" (reported: {', '.join(map(str, _told))})" if _told else ""
            _told.clear()
            raise HalError(
                f"queued work on {self.address} failed{codes}; SYCL does not tell more",
                code="work",
                driver=NAME,
                op="queued work",
                device=self.address,
            )
        return bool(status == Dp.COMPLETE)

    # -- errors ----------------------------------------------------------------------------------

    def failure(self, op: str, what: str = "") -> HalError:
        """For a call that gave null, which is all that the library tells of an error."""
        return self.error("error", op, f"it was refused{f': {what}' if what else ''}")

    def no_memory(self, op: str, nbytes: int) -> OutOfMemory:
        free, total = self.free_and_total()
        return OutOfMemory(
            f"{op} on {self.address}: {nbytes} bytes do not fit; {free} of {total} bytes are free. "
            "Free buffers, or take a smaller size",
            requested=nbytes,
            free=free,
            total=total,
            code="out_of_memory",
            driver=NAME,
            op=op,
            device=self.address,
        )

    def error(self, code: str, op: str, message: str) -> HalError:
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

    def release(self, *, keep: bool = False) -> None:
        """Let go of the context, or with ``keep`` leave it to SYCL. Later calls raise."""
        self.closed = True
        if keep:
            return
        if self.home:
            self.api.DPCTLQueue_Delete(self.home)
        if self.handle:
            self.api.DPCTLContext_Delete(self.handle)
        self.api.DPCTLDevice_Delete(self.device)

"""Streams and events of a device, and the wait for all of it."""

from __future__ import annotations

import ctypes
import threading
from functools import partial

from drivetrain.errors import HalError
from drivetrain.hal.drivers.cuda_api import Cu
from drivetrain.hal.drivers.cuda_context import Context
from drivetrain.hal.drivers.giving_back import GivingBack


class Streams:
    """The streams and events that a backend made."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._api = context.api
        self._events: set[int] = set()
        self._captured: set[int] = set()
        """Events last recorded on a stream while it was being captured."""
        least, greatest = ctypes.c_int(), ctypes.c_int()
        context.call(
            context.api.cuCtxGetStreamPriorityRange, ctypes.byref(least), ctypes.byref(greatest)
        )
        self._priorities = greatest.value, least.value

    def close(self) -> None:
        """Let go of all that is left; nothing is running on the device any more."""
        give = GivingBack()
        for event in list(self._events):
            give(self.event_destroy, event)
        for stream in list(self._context.streams):
            give(self.stream_destroy, stream)
        give.end()

    def are_done(self, timeout_s: float, give: GivingBack) -> bool:
        """Whether all work of the device ended; where that cannot be asked for at once, of each
        stream made here."""
        done: list[bool] = []
        give(lambda: done.append(self.synchronize(timeout_s)))
        if not done and not self._context.lost:
            streams = list(self._context.streams)
            wait = self._context.wait_stream
            give(lambda: done.append(all(wait(stream, timeout_s) for stream in streams)))
        return done == [True]

    def synchronize(self, timeout_s: float) -> bool:
        context, api = self._context, self._api
        if context.captures:
            raise context.error(
                "capturing", "synchronize", "a stream is being captured; end the capture first"
            )
        if "context_event" not in api.off:
            event = self.event_create(False)
            try:
                context.call(api.cuCtxRecordEvent, context.handle, event)
                return self.event_synchronize(event, timeout_s)
            finally:
                if not context.lost:
                    self.event_destroy(event)
        # Older drivers can only be waited for in a call without a limit: in a thread of its own.
        ended: list[int | HalError] = []

        def wait() -> None:
            try:
                ended.append(context.code(api.cuCtxSynchronize))
            except HalError as error:
                ended.append(error)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        thread.join(timeout_s)
        if not ended:
            return False
        if isinstance(ended[0], HalError):
            raise ended[0]
        if ended[0]:
            raise context.failure(api.cuCtxSynchronize.__name__, ended[0])
        return True

    def stream_create(self, priority: int) -> int:
        first, last = self._priorities
        box = ctypes.c_void_p()
        self._context.call(
            self._api.cuStreamCreateWithPriority,
            ctypes.byref(box),
            Cu.STREAM_NON_BLOCKING,
            max(first, min(last, priority)),
        )
        stream = int(box.value or 0)
        self._context.streams.add(stream)
        return stream

    def stream_destroy(self, stream: int) -> None:
        self._context.check_capture(stream, "stream_destroy")
        self._context.streams.discard(stream)
        try:
            self._context.call(self._api.cuStreamDestroy, stream)
        except HalError:
            self._context.streams.add(stream)
            raise

    def stream_done(self, stream: int) -> bool:
        self._context.check_capture(stream, "stream_done")
        return self._context.ready(self._api.cuStreamQuery, stream)

    def stream_synchronize(self, stream: int, timeout_s: float) -> bool:
        self._context.check_capture(stream, "stream_synchronize")
        return self._context.wait_stream(stream, timeout_s)

    def stream_wait(self, stream: int, event: int) -> None:
        self._context.call(self._api.cuStreamWaitEvent, stream, event, 0)

    # -- events ------------------------------------------------------------------------------------

    def event_create(self, timing: bool) -> int:
        box = ctypes.c_void_p()
        flags = Cu.EVENT_DEFAULT if timing else Cu.EVENT_DISABLE_TIMING
        self._context.call(self._api.cuEventCreate, ctypes.byref(box), flags)
        event = int(box.value or 0)
        self._events.add(event)
        return event

    def event_destroy(self, event: int) -> None:
        self._events.discard(event)
        self._captured.discard(event)
        try:
            self._context.call(self._api.cuEventDestroy, event)
        except HalError:
            self._events.add(event)
            raise

    def event_record(self, event: int, stream: int) -> None:
        self._context.call(self._api.cuEventRecord, event, stream)
        if self._context.capturing(stream):
            self._captured.add(event)
        elif self._captured:
            self._captured.discard(event)

    def event_done(self, event: int) -> bool:
        self._check_captured(event, "event_done")
        return self._context.ready(self._api.cuEventQuery, event)

    def event_synchronize(self, event: int, timeout_s: float) -> bool:
        self._check_captured(event, "event_synchronize")
        done = partial(self._context.ready, self._api.cuEventQuery, event)
        return self._context.wait_until(done, timeout_s)

    def _check_captured(self, event: int, op: str) -> None:
        """An event that was recorded in a capture is a place in a graph and never done; asking the
        driver for it would break a capture that still goes on."""
        if event in self._captured:
            raise self._context.error(
                "capturing", op, "the event was recorded in a capture; record it outside of one"
            )

    def event_seconds(self, start: int, end: int) -> float:
        box = ctypes.c_float()
        self._context.call(self._api.cuEventElapsedTime, ctypes.byref(box), start, end)
        return box.value / 1e3

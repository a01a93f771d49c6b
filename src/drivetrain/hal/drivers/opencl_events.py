"""Events that are recorded again and again, over OpenCL's, which are made anew at each recording.

Boxes in C (``opencl_event.c``), which the hot path records without Python, or their twin.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from typing import Any, Protocol

from drivetrain.hal import hot
from drivetrain.hal.drivers.opencl_api import Api, address_of


class Boxes(Protocol):
    """Events by handle."""

    record_address: int
    """Of ``int (void *event, void *queue)``; 0: only `record` records."""

    def new(self) -> int: ...

    def free(self, event: int) -> None: ...

    def record(self, event: int, queue: int) -> int:
        """OpenCL's code."""

    def take(self, event: int) -> tuple[int, int]:
        """(the cl_event of the last recording, retained; 0: none, the queue that it was recorded
        on, when nobody has asked since)."""

    def launches(self) -> int:
        """How often C launched a kernel of any OpenCL device."""


def boxes(api: Api) -> Boxes:
    return NativeBoxes(api) if hot.BACKEND == "native" else TwinBoxes(api)


class NativeBoxes:
    """In C."""

    def __init__(self, api: Api) -> None:
        from drivetrain.hal import _hot

        library: Any = ctypes.CDLL(_hot.__file__)
        new, free = library.dt_cl_event_new, library.dt_cl_event_free
        new.restype, new.argtypes = ctypes.c_void_p, (ctypes.c_size_t,) * 3
        free.restype, free.argtypes = None, (ctypes.c_void_p,)
        self._record = library.dt_cl_event_record
        self._record.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self._take = library.dt_cl_event_take
        self._take.restype, self._take.argtypes = ctypes.c_void_p, (ctypes.c_void_p,) * 2
        self.launches = library.dt_opencl_launches
        self.launches.restype, self.launches.argtypes = ctypes.c_uint64, ()
        self._new, self._free = new, free
        self._calls = (
            address_of(api.clEnqueueMarkerWithWaitList),
            address_of(api.clRetainEvent),
            address_of(api.clReleaseEvent),
        )
        self.record_address = address_of(self._record)

    def new(self) -> int:
        event = self._new(*self._calls)
        if not event:
            raise MemoryError("no memory for an event")
        return int(event)

    def free(self, event: int) -> None:
        self._free(event)

    def record(self, event: int, queue: int) -> int:
        return int(self._record(event, queue))

    def take(self, event: int) -> tuple[int, int]:
        queue = ctypes.c_void_p()
        found = self._take(event, ctypes.byref(queue))
        return int(found or 0), int(queue.value or 0)


class TwinBoxes:
    """In Python."""

    record_address = 0

    def __init__(self, api: Api) -> None:
        self._api = api
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._boxes: dict[int, tuple[int, int]] = {}

    def launches(self) -> int:
        return 0

    def new(self) -> int:
        event = next(self._numbers) << 4
        self._boxes[event] = (0, 0)
        return event

    def free(self, event: int) -> None:
        with self._lock:
            found, _ = self._boxes.pop(event)
        if found:
            self._api.clReleaseEvent(found)

    def record(self, event: int, queue: int) -> int:
        made = ctypes.c_void_p()
        code = self._api.clEnqueueMarkerWithWaitList(queue, 0, None, ctypes.byref(made))
        if code:
            return int(code)
        with self._lock:
            before, _ = self._boxes[event]
            self._boxes[event] = (int(made.value or 0), queue)
        if before:
            self._api.clReleaseEvent(before)
        return 0

    def take(self, event: int) -> tuple[int, int]:
        with self._lock:
            found, queue = self._boxes[event]
            self._boxes[event] = (found, 0)
            if found:
                self._api.clRetainEvent(found)
        return found, queue

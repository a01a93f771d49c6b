"""``torch.NAME``'s streams and events, with the C++ shim.

A custom device has one queue. A stream of it is a name for that queue, so what is put on several
streams runs in the order in which it was put there; an event is recorded when the queue is empty.
What waits for streams and events (FSDP2, prefetching, timing) is right, and gains nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from drivetrain.pytorch.custom.runtime import Runtime

_private: Any = torch._C  # torch.accelerator's own may mean another device


class _Torchs(type):
    """What makes events of torch's own class: it takes no others where two are compared."""

    def __instancecheck__(cls, given: object) -> bool:
        return isinstance(given, torch.Event)


def register(runtime: Runtime, module: Any) -> None:
    """``Stream``, ``Event``, ``stream``, ``current_stream``, ``default_stream``, ``set_stream``."""

    def device_of(device: Any) -> torch.device:
        return torch.device(runtime.name, runtime.index_of(device))

    place = torch.Stream(device=device_of(0)).device_type

    class Stream(torch.Stream):
        """A stream of the device."""

        def __new__(cls, device: Any = None, priority: int = 0, **more: Any) -> Any:
            given = more or {"device": device_of(device), "priority": priority}
            return super().__new__(cls, **given)

    class Event(metaclass=_Torchs):
        """An event of the device; ``elapsed_time`` in milliseconds."""

        def __new__(cls, **more: Any) -> Any:
            return torch.Event(**{"device": device_of(None), **more})

    def current_stream(device: Any = None) -> torch.Stream:
        found: torch.Stream = _private._accelerator_getStream(device_of(device).index)
        return found

    def default_stream(device: Any = None) -> torch.Stream:
        index = device_of(device).index
        found: torch.Stream = Stream(stream_id=0, device_index=index, device_type=place)
        return found

    @contextlib.contextmanager
    def stream(given: torch.Stream | None) -> Iterator[None]:
        if given is None:
            yield
            return
        with given:
            yield

    module.Stream, module.Event, module.stream = Stream, Event, stream
    module.current_stream, module.default_stream = current_stream, default_stream
    module.set_stream = _private._accelerator_setStream

"""Host memory that a GPU reads and writes at full speed: page-locked for as long as it is used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import torch

_REGISTERED = 0  # cudaSuccess


class Pinned:
    """A range of host memory, registered with the CUDA (or HIP) runtime until ``close``.

    Where it cannot be registered (another kind of device, a limit on locked memory), copies work
    all the same, only slower: ``pinned`` says which.
    """

    def __init__(self, address: int, nbytes: int, device: torch.device) -> None:
        self._address = address
        self.pinned = False
        if device.type == "cuda" and nbytes:
            code = _runtime().cudaHostRegister(address, nbytes, 0)
            self.pinned = int(code) == _REGISTERED

    def close(self) -> None:
        """Unregister; the memory must still be mapped."""
        if self.pinned:
            self.pinned = False
            _runtime().cudaHostUnregister(self._address)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def mark(device: torch.device) -> Any:
    """This point of the device's current stream, for ``beside``; None on the CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextlib.contextmanager
def beside(device: torch.device, after: Any) -> Iterator[None]:
    """Work inside runs on a stream of its own, once the device has passed the point ``after``."""
    if after is None:
        yield
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        stream.wait_event(after)
        yield


def lanes(device: torch.device, count: int) -> list[AbstractContextManager[Any]]:
    """Streams of a GPU that do not wait for each other, all behind what its current stream has now:
    work inside the i-th context goes to the i-th. On the CPU they change nothing."""
    if device.type != "cuda":
        return [contextlib.nullcontext() for _ in range(count)]
    streams = [_lane(device, number) for number in range(count)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream(device))
    return [torch.cuda.stream(stream) for stream in streams]


@cache
def _lane(device: torch.device, number: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

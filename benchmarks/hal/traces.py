"""Recorded traces of allocations, replayed against a pool, and the rules of torch's allocator.

They are those that torch documents and its source states for CUDA with the default settings
(c10/cuda/CUDACachingAllocator): sizes in multiples of 512 bytes; 2 MiB blocks for up to 1 MiB,
20 MiB blocks below 10 MiB, else multiples of 2 MiB; best fit on the same stream; a block is split
when 512 bytes are left of a small one, more than 1 MiB of a large one; neighbours are merged as
soon as they are free. On a machine with a GPU the real one takes its place.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect_left, insort
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

FOLDER = Path(__file__).parent / "traces"
NAMES = ("mlp", "cnn", "transformer")

Trace = list[list[int] | int]
"""``[stream, bytes]`` for an allocation; its number, from 0, when it is freed."""


def load(name: str) -> Trace:
    found: Trace = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))["events"]
    return found


class Allocator(Protocol):
    def allocate(self, nbytes: int, stream: int) -> int: ...

    def free(self, handle: int, nbytes: int, stream: int) -> None: ...

    def peak_reserved(self) -> int: ...


def peak_requested(trace: Trace) -> int:
    """The most bytes that were asked for and not freed at one time."""
    sizes: list[int] = []
    now = most = 0
    for event in trace:
        if isinstance(event, int):
            now -= sizes[event]
        else:
            sizes.append(event[1])
            now += event[1]
            most = max(most, now)
    return most


def waste(trace: Trace, allocator: Allocator) -> float:
    """(reserved - requested) / requested at the peak, after a replay of the trace."""
    held: list[tuple[int, int, int]] = []
    for event in trace:
        if isinstance(event, int):
            allocator.free(*held[event])
        else:
            stream, nbytes = event
            held.append((allocator.allocate(nbytes, stream), nbytes, stream))
    requested = peak_requested(trace)
    return (allocator.peak_reserved() - requested) / requested


# -- torch's rules ---------------------------------------------------------------------------------

_GRAIN, _SMALL, _SMALL_BLOCK = 512, 1 << 20, 2 << 20
_MIDDLE, _LARGE_BLOCK, _LARGE_GRAIN = 10 << 20, 20 << 20, 2 << 20


@dataclass(eq=False)
class _Block:
    stream: int
    small: bool
    ptr: int
    nbytes: int
    before: _Block | None = None
    after: _Block | None = None
    free: bool = False

    def __lt__(self, other: _Block) -> bool:
        return (self.nbytes, self.ptr) < (other.nbytes, other.ptr)


class TorchRules:
    """How much torch's allocator would reserve."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, bool], list[_Block]] = {}
        self._used: dict[int, _Block] = {}
        self._top = 1 << 30
        self._reserved = 0

    def allocate(self, nbytes: int, stream: int) -> int:
        size = max(_GRAIN, -(-nbytes // _GRAIN) * _GRAIN)
        small = size <= _SMALL
        listed = self._free.setdefault((stream, small), [])
        at = bisect_left([block.nbytes for block in listed], size)
        block = listed.pop(at) if at < len(listed) else self._new(size, stream, small)
        left = block.nbytes - size
        if left >= _GRAIN if small else left > _SMALL:
            rest = _Block(stream, small, block.ptr + size, left, block, block.after, True)
            if block.after is not None:
                block.after.before = rest
            block.after, block.nbytes = rest, size
            insort(listed, rest)
        block.free = False
        self._used[block.ptr] = block
        return block.ptr

    def _new(self, size: int, stream: int, small: bool) -> _Block:
        if small:
            nbytes = _SMALL_BLOCK
        elif size < _MIDDLE:
            nbytes = _LARGE_BLOCK
        else:
            nbytes = -(-size // _LARGE_GRAIN) * _LARGE_GRAIN
        self._reserved += nbytes  # nothing is given back before memory runs out: the peak is now
        self._top += nbytes
        return _Block(stream, small, self._top - nbytes, nbytes)

    def free(self, handle: int, nbytes: int, stream: int) -> None:
        block = self._used.pop(handle)
        listed = self._free[block.stream, block.small]
        after, before = block.after, block.before
        if after is not None and after.free:
            listed.remove(after)
            block.nbytes += after.nbytes
            block.after = after.after
            if block.after is not None:
                block.after.before = block
        if before is not None and before.free:
            listed.remove(before)
            before.nbytes += block.nbytes
            before.after = block.after
            if before.after is not None:
                before.after.before = before
            block = before
        block.free = True
        insort(listed, block)

    def peak_reserved(self) -> int:
        return self._reserved


# -- ours ------------------------------------------------------------------------------------------


class Ours:
    """A pool of Drivetrain on a device, with a stream of the device for each of the trace's."""

    def __init__(self, pool: Any, streams: list[Any]) -> None:
        self._pool, self._streams = pool, streams

    def allocate(self, nbytes: int, stream: int) -> int:
        found: int = self._pool.allocate(nbytes, self._streams[stream].handle)
        return found

    def free(self, handle: int, nbytes: int, stream: int) -> None:
        self._pool.deallocate(handle, nbytes, self._streams[stream].handle, ())

    def peak_reserved(self) -> int:
        found: int = self._pool.stats().peak_reserved
        return found


class RealTorch:
    """torch's own allocator on a GPU."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_reserved()
        self._streams = [torch.cuda.Stream() for _ in range(2)]
        self._held: dict[int, object] = {}
        self._count = 0

    def allocate(self, nbytes: int, stream: int) -> int:
        with self._torch.cuda.stream(self._streams[stream]):
            made = self._torch.empty(nbytes, dtype=self._torch.uint8, device="cuda")
        self._count += 1
        self._held[self._count] = made
        return self._count

    def free(self, handle: int, nbytes: int, stream: int) -> None:
        del self._held[handle]

    def peak_reserved(self) -> int:
        return int(self._torch.cuda.max_memory_reserved()) - self._before

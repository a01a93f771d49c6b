"""The state's image (see ``image``) in memory, and its chunk hashes, on the tensors' own device.

On the CPU the bytes go through hal.bytes. On an accelerator torch's 64-bit integer operations,
which wrap, give the same numbers.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from drivetrain.errors import BadInput
from drivetrain.hal import bytes as raw
from drivetrain.hal.bytes import CHUNK_BYTES
from drivetrain.pytorch.image import ALIGNMENT, MASK, cut, layout, summed

_WORDS = CHUNK_BYTES // 4
_BLOCK = 16 * CHUNK_BYTES  # hashed at once on an accelerator
_SHARE = 4  # chunks that one thread takes at once
_MOST_THREADS = 24

Pieces = list[tuple[int, int]]  # (index of the chunk, a part of its hash)
_Work = TypeVar("_Work")
_Span = tuple[int, int, int, int]  # number of the tensor, offset in it, offset in the image, bytes


class ImagePlan:
    """The image of a list of flat tensors (``TrainingState.flats``), which stay the caller's.

    Ranges start and end at multiples of 64 bytes, or at the image's end. Addresses are of host
    memory and point at the range's first byte, not at the image's.
    """

    def __init__(self, flats: Sequence[Tensor]) -> None:
        for tensor in flats:
            if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous():
                raise BadInput("an image is made of flat uint8 tensors; see TrainingState.flats")
        self.flats = list(flats)
        self.offsets, self.nbytes = layout(tensor.numel() for tensor in flats)

    def read_into(self, ptr: int, start: int, stop: int, threads: int = 1) -> Pieces:
        """Copies the image's bytes [start, stop) to host memory at ``ptr``; gaps become zeros.

        Returns the parts of the chunks' hashes, taken from the bytes as they pass.
        """
        return self.begin_read(ptr, start, stop, threads)()

    def begin_read(self, ptr: int, start: int, stop: int, threads: int = 1) -> Callable[[], Pieces]:
        """As read_into, but the work is only begun: on an accelerator's current stream, or in other
        threads where there are several. The function that is returned waits for it."""
        work: list[tuple[int, int, int, int, int]] = []
        spans = list(self._spans(start, stop))
        devices = {self.flats[span[0]].device for span in spans} - {torch.device("cpu")}
        # The hashes first, on a stream of their own: the copies then follow each other closely.
        hashes = [self._hash_beside(device, start, stop) for device in devices]
        at = start
        for number, inside, place, size in spans:
            if place > at:
                ctypes.memset(ptr + at - start, 0, place - at)
            at = place + size
            tensor = self.flats[number]
            if tensor.device.type == "cpu":
                source = tensor.data_ptr() + inside
                target = ptr + place - start
                work += [
                    (chunk, target + offset, source + offset, part, word)
                    for chunk, word, offset, part in cut(place, size)
                ]
            else:
                host = _host(ptr + place - start, size)
                host.copy_(tensor[inside : inside + size], non_blocking=True)
        if stop > at:
            ctypes.memset(ptr + at - start, 0, stop - at)
        marks = _marks(devices)
        copied = _start(_copy_host, work, threads)

        def finish() -> Pieces:
            for mark in marks:
                mark.synchronize()
            return copied() + [piece for collect in hashes for piece in collect()]

        return finish

    def write_from(self, ptr: int, start: int, stop: int, threads: int = 1) -> None:
        """Copies host memory at ``ptr`` into the image's bytes [start, stop)."""
        self.begin_write(ptr, start, stop, threads)()

    def begin_write(self, ptr: int, start: int, stop: int, threads: int = 1) -> Callable[[], None]:
        """As write_from, but the work is only begun; the function that is returned waits for it,
        and ``ptr`` must stay until then."""
        work: list[tuple[int, int, int]] = []
        devices = set()
        for number, inside, place, size in self._spans(start, stop):
            tensor = self.flats[number]
            source = ptr + place - start
            if tensor.device.type == "cpu":
                target = tensor.data_ptr() + inside
                work += [
                    (target + at, source + at, min(CHUNK_BYTES, size - at))
                    for at in range(0, size, CHUNK_BYTES)
                ]
            else:
                tensor[inside : inside + size].copy_(_host(source, size), non_blocking=True)
                devices.add(tensor.device)
        marks = _marks(devices)
        written = _start(_write_host, work, threads)

        def finish() -> None:
            written()
            for mark in marks:
                mark.synchronize()

        return finish

    def hashes(self, threads: int = 1) -> list[int]:
        """The chunk hashes, from the tensors themselves."""
        return summed(self.nbytes, self.hash_range(0, self.nbytes, threads))

    def hash_range(self, start: int, stop: int, threads: int = 1) -> Pieces:
        """Parts of the hashes of the chunks in [start, stop), from the tensors themselves."""
        host, devices = [], set()
        for number, inside, place, size in self._spans(start, stop):
            tensor = self.flats[number]
            if tensor.device.type == "cpu":
                address = tensor.data_ptr() + inside
                host += [
                    (chunk, address + offset, part, word)
                    for chunk, word, offset, part in cut(place, size)
                ]
            else:
                devices.add(tensor.device)
        waiting = [found for device in devices for found in self._hash_on(device, start, stop)]
        return _start(_hash_host, host, threads)() + _collect(waiting)

    def _spans(self, start: int, stop: int) -> Iterator[_Span]:
        if not 0 <= start <= stop <= self.nbytes or start % ALIGNMENT or stop % ALIGNMENT:
            raise BadInput(
                f"[{start}, {stop}) is no range of this image: it has {self.nbytes} bytes and "
                f"ranges are cut at multiples of {ALIGNMENT}"
            )
        first = max(0, bisect_right(self.offsets, start) - 1)
        while first > 0 and self.offsets[first - 1] == self.offsets[first]:
            first -= 1
        for number in range(first, len(self.flats)):
            offset = self.offsets[number]
            if offset >= stop:
                return
            low, high = max(offset, start), min(offset + self.flats[number].numel(), stop)
            if low < high:
                yield number, low - offset, low, high - low

    def _hash_beside(self, device: torch.device, start: int, stop: int) -> Callable[[], Pieces]:
        """Queues the range's hashes after what the device's current stream has now, beside what
        it gets next; the function that is returned waits for them."""
        if device.type != "cuda":
            waiting = self._hash_on(device, start, stop)
            return lambda: _collect(waiting)
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            queued = self._hash_on(device, start, stop)

        def collect() -> Pieces:
            with torch.cuda.stream(stream):
                return _collect(queued)

        return collect

    def _hash_on(
        self, device: torch.device, start: int, stop: int
    ) -> list[tuple[int, int, Tensor]]:
        """Queues the hashes of the range's bytes on ``device``: (first chunk, chunks, parts)."""
        weights, total = _weights(device)
        waiting = []
        first_block = start - start % CHUNK_BYTES
        for low in range(first_block, stop, _BLOCK):
            high = min(low + _BLOCK, -(-stop // CHUNK_BYTES) * CHUNK_BYTES)
            spans = [
                span
                for span in self._spans(max(low, start), min(high, stop))
                if self.flats[span[0]].device == device
            ]
            if not spans:
                continue
            block = self._block(device, spans, low, high - low)
            words = block.view(torch.int32).view(-1, _WORDS)
            # A signed word with its top bit turned is w - 2^31; the rest is added by a constant.
            turned = torch.bitwise_xor(words, -(2**31))
            parts = torch.mul(turned, weights).sum(dim=1).add_(total)
            waiting.append((low // CHUNK_BYTES, (high - low) // CHUNK_BYTES, parts))
        return waiting

    def _block(self, device: torch.device, spans: list[_Span], low: int, nbytes: int) -> Tensor:
        """The bytes of some spans as one tensor: a view where one tensor has them, else packed."""
        number, inside, place, size = spans[0]
        tensor = self.flats[number]
        if size == nbytes and place == low and (tensor.storage_offset() + inside) % 4 == 0:
            return tensor[inside : inside + size]
        covered = sum(span[3] for span in spans)
        make = torch.empty if covered == nbytes else torch.zeros
        block = make(nbytes, dtype=torch.uint8, device=device)
        targets = [block[p - low : p - low + s] for _, _, p, s in spans]
        torch._foreach_copy_(targets, [self.flats[n][i : i + s] for n, i, _, s in spans])
        return block


def warm(device: torch.device) -> None:
    """Loads what the hashes of an accelerator need, so that no first use falls into a pause."""
    if device.type == "cpu":
        return
    ImagePlan(
        [
            torch.zeros(_BLOCK, dtype=torch.uint8, device=device),
            torch.zeros(100, dtype=torch.uint8, device=device),
        ]
    ).hashes()


def _write_host(work: Sequence[tuple[int, int, int]]) -> Pieces:
    for target, source, size in work:
        raw.copy(target, source, size)
    return []


def _marks(devices: Iterable[torch.device]) -> list[Any]:
    """An event on each device's current stream: done when what was queued until now is."""
    return [torch.get_device_module(d).current_stream(d).record_event() for d in devices]


def _hash_host(work: Sequence[tuple[int, int, int, int]]) -> Pieces:
    return [(chunk, raw.checksum(ptr, size, word)) for chunk, ptr, size, word in work]


def _copy_host(work: Sequence[tuple[int, int, int, int, int]]) -> Pieces:
    return [
        (chunk, raw.copy_checksum(target, source, size, word))
        for chunk, target, source, size, word in work
    ]


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="drivetrain-copy")


def _start(
    function: Callable[[Sequence[_Work]], Pieces], work: Sequence[_Work], threads: int
) -> Callable[[], Pieces]:
    """Begins the work, in threads that stay for the next time (the C calls let go of the GIL);
    the function that is returned waits for it."""
    if threads <= 1 or not work:
        done = function(work)
        return lambda: done
    pool = _pool(min(threads, _MOST_THREADS))
    shares = [pool.submit(function, work[at : at + _SHARE]) for at in range(0, len(work), _SHARE)]
    return lambda: [piece for share in shares for piece in share.result()]


def _collect(waiting: Iterable[tuple[int, int, Tensor]]) -> Pieces:
    pieces: Pieces = []
    for first, count, parts in waiting:
        values = parts.tolist()
        pieces += [(first + n, values[n] & MASK) for n in range(count)]
    return pieces


def _host(ptr: int, nbytes: int) -> Tensor:
    memory = (ctypes.c_char * nbytes).from_address(ptr)
    return torch.frombuffer(memory, dtype=torch.uint8)


_weights_of: dict[torch.device, tuple[Tensor, int]] = {}


def _weights(device: torch.device) -> tuple[Tensor, int]:
    """The words' weights a_i as int64, and 2^31 times their sum, mod 2^64 as int64."""
    found = _weights_of.get(device)
    if found is None:
        index = torch.arange(1, _WORDS + 1, dtype=torch.int64, device=device)
        weights = (index * (0x9E3779B97F4A7C15 - 2**64)) | 1
        total = (int(weights.sum().item()) << 31) & MASK
        found = (weights, total - 2**64 if total >= 2**63 else total)
        _weights_of[device] = found
    return found

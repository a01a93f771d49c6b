"""The state's image (see ``image``) in memory, and its chunk hashes, on the tensors' own device.

On the CPU the bytes go through hal.bytes. On an accelerator torch's 64-bit integer operations,
which wrap, give the same numbers, and on a custom device the HAL's kernel (see ``on_chip``).
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from drivetrain.errors import BadInput
from drivetrain.hal.bytes import CHUNK_BYTES
from drivetrain.pytorch import crew, on_chip
from drivetrain.pytorch.crew import Begun, Piece
from drivetrain.pytorch.image import ALIGNMENT, MASK, cut, layout, summed

_WORDS = CHUNK_BYTES // 4
_BLOCK = 16 * CHUNK_BYTES  # hashed at once on an accelerator
_CHIP_BLOCK = 4 * CHUNK_BYTES  # on a custom device, whose memory may be small

Pieces = list[tuple[int, int]]  # (index of the chunk, a part of its hash)
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
        self.flats = on_chip.reachable(flats)
        self.offsets, self.nbytes = layout(tensor.numel() for tensor in flats)

    def read_into(self, ptr: int, start: int, stop: int, threads: int = 1) -> Pieces:
        """Copies the image's bytes [start, stop) to host memory at ``ptr``; gaps become zeros.

        Returns the parts of the chunks' hashes, taken from the bytes as they pass.
        """
        return self.begin_read(ptr, start, stop, threads)()

    def begin_read(
        self, ptr: int, start: int, stop: int, threads: int = 1, *, hash_too: bool = True
    ) -> Begun[Pieces]:
        """As read_into, but the work is only begun: on an accelerator's current stream, or in other
        threads where there are several.

        Without ``hash_too`` the bytes on an accelerator are only copied (see `begin_hashes`)."""
        work: list[Piece] = []
        owners: list[int] = []
        spans = list(self._spans(start, stop))
        devices = {self.flats[span[0]].device for span in spans} - {torch.device("cpu")}
        # The hashes first, on a stream of their own: the copies then follow each other closely.
        hashes = [self._hash_beside(device, start, stop) for device in devices if hash_too]
        at = start
        for number, inside, place, size in spans:
            if place > at:
                ctypes.memset(ptr + at - start, 0, place - at)
            at = place + size
            tensor = self.flats[number]
            if tensor.device.type == "cpu":
                source = tensor.data_ptr() + inside
                target = ptr + place - start
                for chunk, word, offset, part in cut(place, size):
                    work.append((target + offset, source + offset, part, word))
                    owners.append(chunk)
            else:
                host = _host(ptr + place - start, size)
                host.copy_(tensor[inside : inside + size], non_blocking=True)
        if stop > at:
            ctypes.memset(ptr + at - start, 0, stop - at)
        marks = _marks(devices)
        copied = crew.begin(work, threads)

        def finish() -> Pieces:
            for mark in marks:
                mark.synchronize()
            found = list(zip(owners, copied(), strict=True))
            return found + [piece for collect in hashes for piece in collect()]

        return Begun(finish, lambda: copied.done and all(mark.query() for mark in marks))

    def write_from(self, ptr: int, start: int, stop: int, threads: int = 1) -> None:
        """Copies host memory at ``ptr`` into the image's bytes [start, stop)."""
        self.begin_write(ptr, start, stop, threads)()

    def begin_write(self, ptr: int, start: int, stop: int, threads: int = 1) -> Begun[None]:
        """As write_from, but the work is only begun; ``ptr`` must stay until it is done."""
        work: list[Piece] = []
        devices = set()
        for number, inside, place, size in self._spans(start, stop):
            tensor = self.flats[number]
            source = ptr + place - start
            if tensor.device.type == "cpu":
                target = tensor.data_ptr() + inside
                work.append((target, source, size, crew.ONLY_COPY))
            else:
                tensor[inside : inside + size].copy_(_host(source, size), non_blocking=True)
                devices.add(tensor.device)
        marks = _marks(devices)
        written = crew.begin(work, threads)

        def finish() -> None:
            written()
            for mark in marks:
                mark.synchronize()

        return Begun(finish, lambda: written.done and all(mark.query() for mark in marks))

    def hashes(self, threads: int = 1) -> list[int]:
        """The chunk hashes, from the tensors themselves."""
        return summed(self.nbytes, self.hash_range(0, self.nbytes, threads))

    def hash_range(self, start: int, stop: int, threads: int = 1) -> Pieces:
        """Parts of the hashes of the chunks in [start, stop), from the tensors themselves."""
        host: list[Piece] = []
        owners: list[int] = []
        devices = set()
        for number, inside, place, size in self._spans(start, stop):
            tensor = self.flats[number]
            if tensor.device.type == "cpu":
                address = tensor.data_ptr() + inside
                for chunk, word, offset, part in cut(place, size):
                    host.append((0, address + offset, part, word))
                    owners.append(chunk)
            else:
                devices.add(tensor.device)
        waiting = [self._begin_hash(device, start, stop) for device in devices]
        hashed = crew.begin(host, threads)()
        found = list(zip(owners, hashed, strict=True))
        return found + [piece for collect in waiting for piece in collect()]

    def begin_hashes(self, start: int, stop: int) -> Callable[[], Pieces]:
        """Begin to hash what the range has on accelerators, beside what their current streams get
        next; the function that is returned waits for it."""
        devices = {self.flats[s[0]].device for s in self._spans(start, stop)}
        begun = [self._hash_beside(d, start, stop) for d in devices - {torch.device("cpu")}]
        return lambda: [piece for collect in begun for piece in collect()]

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
            return self._begin_hash(device, start, stop)
        stream = _side_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            queued = self._hash_on(device, start, stop)

        def collect() -> Pieces:
            with torch.cuda.stream(stream):
                return _collect(queued)

        return collect

    def _begin_hash(self, device: torch.device, start: int, stop: int) -> Callable[[], Pieces]:
        """Queues the hashes of what the range has on ``device``; the result waits for them."""
        if on_chip.is_custom(device):
            blocks = self._blocks(device, start, stop)
            found = [(low, on_chip.chunk_hashes(block)) for low, block in blocks]
            return lambda: [
                (low // CHUNK_BYTES + n, value)
                for low, values in found
                for n, value in enumerate(values)
            ]
        waiting = self._hash_on(device, start, stop)
        return lambda: _collect(waiting)

    def _hash_on(
        self, device: torch.device, start: int, stop: int
    ) -> list[tuple[int, int, Tensor]]:
        """Queues the hashes of the range's bytes on ``device``: (first chunk, chunks, parts)."""
        weights, total = _weights(device)
        waiting = []
        for low, block in self._blocks(device, start, stop):
            words = block.view(torch.int32).view(-1, _WORDS)
            # A signed word with its top bit turned is w - 2^31; the rest is added by a constant.
            turned = torch.bitwise_xor(words, -(2**31))
            parts = torch.mul(turned, weights).sum(dim=1).add_(total)
            waiting.append((low // CHUNK_BYTES, block.numel() // CHUNK_BYTES, parts))
        return waiting

    def _blocks(self, device: torch.device, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
        """The range's bytes on ``device`` in whole chunks, zeros where it has none: (offset in the
        image, bytes)."""
        first_block, at_once = start - start % CHUNK_BYTES, _at_once(device)
        for low in range(first_block, stop, at_once):
            high = min(low + at_once, -(-stop // CHUNK_BYTES) * CHUNK_BYTES)
            spans = [
                span
                for span in self._spans(max(low, start), min(high, stop))
                if self.flats[span[0]].device == device
            ]
            if spans:
                yield low, self._block(device, spans, low, high - low)

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


def _at_once(device: torch.device) -> int:
    """How many bytes are hashed at once on a device."""
    return _CHIP_BLOCK if on_chip.is_custom(device) else _BLOCK


def warm(device: torch.device) -> None:
    """Loads what the hashes of an accelerator need, so that no first use falls into a pause."""
    if device.type == "cpu":
        return
    plan = ImagePlan(
        [
            torch.zeros(_at_once(device), dtype=torch.uint8, device=device),
            torch.zeros(100, dtype=torch.uint8, device=device),
        ]
    )
    plan.hashes()
    plan.begin_hashes(0, plan.nbytes)()


def _marks(devices: Iterable[torch.device]) -> list[Any]:
    """An event on each device's current stream: done when what was queued until now is. Copies
    from and to a custom device are done when they return."""
    return [
        torch.get_device_module(d).current_stream(d).record_event()
        for d in devices
        if not on_chip.is_custom(d)
    ]


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


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

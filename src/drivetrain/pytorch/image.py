"""The image: the bytes of a state's tensors in one flat address space. Free of torch.

The tensors lie one after the other, each at a multiple of 64 bytes, and the whole is cut in chunks
of 4 MiB. A chunk's hash is a sum over its words (see ``drivetrain.hal.bytes``), so the parts that
pieces of a chunk contribute add up, mod 2^64, wherever and whenever each was computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from drivetrain.hal.bytes import CHUNK_BYTES

ALIGNMENT = 64
MASK = 2**64 - 1

Parts = Iterable[tuple[int, int]]  # (index of the chunk, a part of its hash)


def layout(sizes: Iterable[int]) -> tuple[list[int], int]:
    """The offset of each tensor in the image, and the image's size, from sizes in bytes."""
    offsets, at = [], 0
    for size in sizes:
        offsets.append(at)
        at += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, at


def chunks(nbytes: int) -> int:
    """How many chunks an image of ``nbytes`` has."""
    return -(-nbytes // CHUNK_BYTES)


def cut(place: int, size: int) -> Iterator[tuple[int, int, int, int]]:
    """``size`` bytes of the image from ``place`` on, cut at the chunks' borders.

    Each piece is (chunk, index of its first 4-byte word in it, offset from ``place``, bytes).
    """
    offset = 0
    while offset < size:
        chunk, inside = divmod(place + offset, CHUNK_BYTES)
        part = min(size - offset, CHUNK_BYTES - inside)
        yield chunk, inside // 4, offset, part
        offset += part


def combine(hashes: list[int], parts: Parts) -> None:
    """Add parts to the chunk hashes in place."""
    for chunk, part in parts:
        hashes[chunk] = (hashes[chunk] + part) & MASK


def summed(nbytes: int, parts: Parts) -> list[int]:
    """The chunk hashes of an image of ``nbytes`` from all their parts."""
    hashes = [0] * chunks(nbytes)
    combine(hashes, parts)
    return hashes

"""The twin of ``_native``: same results without C, written from the definition."""

from __future__ import annotations

import ctypes
import sys
from array import array
from functools import cache
from typing import Any

from drivetrain.errors import BadInput

try:
    import numpy as np
except ImportError:
    np = None  # type: ignore[assignment]

BACKEND = "python" if np is None else "numpy"

CHUNK_BYTES = 4 << 20
CHUNK_WORDS = CHUNK_BYTES // 4
_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_BLOCK_WORDS = 1 << 14  # 64 KiB of words and 128 KiB of products: they stay in the cache


def _check(name: str, nbytes: int, first_word: int | None, *pointers: int) -> None:
    for value in (*pointers, nbytes, first_word or 0):
        if not 0 <= value <= _MASK:
            raise BadInput(f"{value} is no address, size or word index: it must be in [0, 2^64)")
    if first_word is not None and (
        first_word >= CHUNK_WORDS or first_word + (nbytes + 3) // 4 > CHUNK_WORDS
    ):
        raise BadInput(
            f"{name}: {nbytes} bytes from word {first_word} do not lie in one chunk of "
            f"{CHUNK_BYTES} bytes; cut the range at chunk borders"
        )
    if nbytes and not all(pointers):
        raise BadInput(f"{name}: the address is 0")


def weight(index: int) -> int:
    """a_i: what the word with this index in its chunk is multiplied by."""
    return (((index + 1) * _GOLDEN) & _MASK) | 1


@cache
def _weights() -> Any:
    index = np.arange(1, CHUNK_WORDS + 1, dtype=np.uint64)
    return (index * np.uint64(_GOLDEN)) | np.uint64(1)


def checksum(ptr: int, nbytes: int, first_word: int = 0, /) -> int:
    """The chunk hash of ``nbytes`` at ``ptr`` (see ``drivetrain.hal.bytes``)."""
    _check("checksum", nbytes, first_word, ptr)
    if not nbytes:
        return 0
    view = memoryview((ctypes.c_char * nbytes).from_address(ptr)).cast("B")
    whole = nbytes // 4
    total = _numpy_sum(view, whole, first_word) if np else _python_sum(view, whole, first_word)
    if nbytes % 4:
        total += int.from_bytes(view[whole * 4 :], "little") * weight(first_word + whole)
    return total & _MASK


def _numpy_sum(view: memoryview, words: int, first_word: int) -> int:
    values = np.frombuffer(view, dtype="<u4", count=words)
    weights = _weights()[first_word : first_word + words]
    products = np.empty(min(words, _BLOCK_WORDS), dtype=np.uint64)
    total = 0
    for start in range(0, words, _BLOCK_WORDS):
        stop = min(words, start + _BLOCK_WORDS)
        block = products[: stop - start]
        np.multiply(values[start:stop], weights[start:stop], out=block)
        total += int(block.sum(dtype=np.uint64))
    return total


def _python_sum(view: memoryview, words: int, first_word: int) -> int:
    values = array("I", view[: words * 4].tobytes())
    if sys.byteorder == "big":
        values.byteswap()
    return sum(value * weight(index) for index, value in enumerate(values, first_word))


def copy(dst_ptr: int, src_ptr: int, nbytes: int, /) -> None:
    """Copies ``nbytes``; the ranges may overlap."""
    _check("copy", nbytes, None, dst_ptr, src_ptr)
    if nbytes:
        ctypes.memmove(dst_ptr, src_ptr, nbytes)


def copy_checksum(dst_ptr: int, src_ptr: int, nbytes: int, first_word: int = 0, /) -> int:
    """Copies, and hashes what was written (two passes here)."""
    _check("copy_checksum", nbytes, first_word, dst_ptr, src_ptr)
    copy(dst_ptr, src_ptr, nbytes)
    return checksum(dst_ptr, nbytes, first_word)

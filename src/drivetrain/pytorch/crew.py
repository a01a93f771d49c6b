"""Copies and hashes of host memory by several threads: a crew of C threads where there is one.

The crew takes parts of 256 KiB in turn and costs microseconds a job, so that blocks can be small
enough to stay in the processor's cache on their way. Without the C extension a pool of Python
threads does the same work.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar

from drivetrain.hal import bytes as raw

ONLY_COPY = 2**64 - 1
MOST_COPYING, MOST_HASHING = 14, 24
"""Threads of a crew. A dozen copy as fast as a GPU's link, and many more get in each other's way;
what is only hashed comes from main memory, which serves more of them."""
_SHARE = 4  # pieces that one Python thread takes at once

Result = TypeVar("Result")

Piece = tuple[int, int, int, int]
"""(destination, or 0 to hash only; source; bytes; index of the first word in its chunk, or
ONLY_COPY). A piece that is hashed lies in one chunk."""


@dataclass(frozen=True)
class Begun(Generic[Result]):
    """Work that was begun. Calling it waits, and returns what came of it; once only."""

    finish: Callable[[], Result]
    is_done: Callable[[], bool]

    def __call__(self) -> Result:
        return self.finish()

    @property
    def done(self) -> bool:
        """Whether the call would not wait."""
        return self.is_done()


def begin(pieces: Sequence[Piece], threads: int) -> Begun[list[int]]:
    """Begin to copy or hash; the result is the hashes, one a piece (0 where only copied). The
    memory must stay until then."""
    only_hashed = not any(piece[0] for piece in pieces)
    threads = _size(threads, MOST_HASHING if only_hashed else MOST_COPYING)
    if threads <= 1 or not pieces:
        hashes = _do(pieces)
        return Begun(lambda: hashes, lambda: True)
    crew = _crew(threads, os.getpid())
    if crew is not None:
        job = crew.begin(array("Q", [number for piece in pieces for number in piece]))

        def wait() -> list[int]:
            found: list[int] | None = job.wait()
            return [0] * len(pieces) if found is None else found

        return Begun(wait, lambda: bool(job.done))
    pool = _pool(threads, os.getpid())
    shares = [pool.submit(_do, pieces[at : at + _SHARE]) for at in range(0, len(pieces), _SHARE)]
    return Begun(
        lambda: [value for share in shares for value in share.result()],
        lambda: all(share.done() for share in shares),
    )


def warm(threads: int) -> None:
    """Start what `begin` will want of so many threads, so that no start falls into a pause."""
    for most in (MOST_COPYING, MOST_HASHING):
        size = _size(threads, most)
        if size > 1:
            _crew(size, os.getpid())


def _size(threads: int, most: int) -> int:
    if threads >= 8:
        threads -= 2  # the two processes of a move have a thread each that feeds its crew
    return min(threads, most)


def _do(pieces: Sequence[Piece]) -> list[int]:
    hashes = []
    for target, source, nbytes, word in pieces:
        if word == ONLY_COPY:
            raw.copy(target, source, nbytes)
            hashes.append(0)
        elif target:
            hashes.append(raw.copy_checksum(target, source, nbytes, word))
        else:
            hashes.append(raw.checksum(source, nbytes, word))
    return hashes


@cache
def _crew(threads: int, pid: int) -> Any:
    """The crew of this process, ``None`` where the C extension is not used. The thread that waits
    works too, so the crew has one thread less."""
    if raw.BACKEND != "native":
        return None
    try:
        from drivetrain.hal._crew import Crew  # type: ignore[import-not-found]
    except ImportError:
        return None
    return Crew(max(1, threads - 1))


@cache
def _pool(threads: int, pid: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="drivetrain-copy")

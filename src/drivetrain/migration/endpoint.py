"""What a move needs of the two workers it runs between; the runtime implements it by frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T", covariant=True)


@dataclass(frozen=True)
class Cut:
    """A job's state at a step boundary, less its tensors.

    ``facts`` is the manifest that both sides compare, ``tree`` the typed JSON part of the state,
    ``nbytes`` the size of its tensors' image, ``step_end_ns`` the end of the last completed step on
    CLOCK_MONOTONIC, ``median_ns`` the median duration of its recent steps.
    """

    step: int
    facts: bytes
    tree: bytes
    nbytes: int
    step_end_ns: int = 0
    median_ns: int = 0
    took_s: float = 0.0


@dataclass(frozen=True)
class Passed:
    """Chunk hashes of what passed, the seconds that the bytes were under way, and how many of them
    this side waited for the other."""

    hashes: list[int]
    seconds: float = 0.0
    waited_s: float = 0.0


class Pending(Protocol[T]):
    """An answer that is on its way."""

    def result(self, limit_s: float) -> T:
        """Wait for it; MigrationError when the other side failed, died or took too long."""


class Peer(Protocol):
    """Copies device memory from one worker's to the other's without the host."""

    def prepare(self, source: Sequence[Any], target: Sequence[Any]) -> None: ...

    def copy(self, source: Sequence[Any], target: Sequence[Any]) -> float: ...

    def close(self) -> None: ...


class Endpoint(Protocol):
    """One side of a move. Every call raises MigrationError when the worker fails or dies.

    On the source: ``manifest`` and ``prepare`` while it runs; ``pause`` stops it at a step
    boundary; ``read`` pours its state into the segment and gives the chunk hashes of what passed;
    then ``release`` (it ends) or ``abort`` (it goes on as if nothing had happened).

    On the target, which has warmed up and waits: ``prepare``; ``write`` takes the image from the
    segment and gives the chunk hashes of its own tensors; ``restore`` takes the tree;
    ``commit`` makes it the owner; or ``abort`` ends it.
    """

    address: str

    def manifest(self) -> Cut:
        """What it is at its next boundary, without stopping there."""

    def prepare(self, segment_fd: int) -> Pending[None]:
        """Attach and touch the segment, so that the pause pays for no page fault."""

    def pause(self) -> Cut: ...

    def read(self, *, host_only: bool = False) -> Pending[Passed]:
        """Pour the image into the segment. With ``host_only`` just the tensors in host memory;
        the hashes are of everything all the same."""

    def write(self, cut: Cut, *, host_only: bool = False) -> Pending[Passed]:
        """Take the image from the segment; with ``host_only`` without hashes (see ``hash``)."""

    def export(self) -> list[Any]:
        """[image offset, bytes, handle, offset in it] of each tensor in device memory."""

    def hash(self) -> Pending[Passed]:
        """The chunk hashes of its own tensors."""

    def restore(self, cut: Cut, *, rehearse: bool = False) -> float:
        """Make the cut's tree the target's state; the seconds it took.

        With ``rehearse`` it is tried out, the loader's start included, and may be repeated.
        """

    def save(self, *, to_disk: bool) -> dict[str, Any]:
        """The paused source's state into its replica or a durable checkpoint."""

    def load(self, path: str) -> str:
        """The target's state from a durable checkpoint; its state hash."""

    def ping(self) -> float:
        """Seconds for one frame to go and come back."""

    def commit(self, epoch: int) -> None: ...

    def release(self) -> None: ...

    def abort(self) -> None: ...

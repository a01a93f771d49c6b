"""The state's image through the ring of a move: one side pours it in, the other takes it out.

Several blocks are under way at once on each side. On a GPU they are queued on its streams, on a
processor a crew of threads works on them; what passes is hashed where it comes from.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable

import torch

from drivetrain.migration.segment import Ring
from drivetrain.pytorch import crew, hashing
from drivetrain.pytorch.crew import Begun
from drivetrain.pytorch.hashing import ImagePlan, Pieces
from drivetrain.pytorch.image import chunks, combine
from drivetrain.pytorch.pinned import lanes
from drivetrain.store.crash import crash_point

_HASH_BYTES = 128 << 20  # hashed in one go on an accelerator, beside the copies
_LANES = 2  # on a GPU one block is set up while the one before it arrives
_QUEUED = 4  # blocks, on a GPU
_STALL_S = 60.0


def warm(device: torch.device, threads: int) -> None:
    """Make what `pour` and `take` need, so that no first use falls into a pause."""
    hashing.warm(device)
    lanes(device, _LANES)
    if device.type == "cpu":
        crew.warm(threads)


def pour(plan: ImagePlan, ring: Ring, device: torch.device, threads: int) -> list[int]:
    """The image into the ring; the chunk hashes of what passed.

    Raises MigrationError when no slot becomes free for a minute, or the other side gives up."""
    producer = ring.producer
    hashes = [0] * chunks(plan.nbytes)
    flying: deque[tuple[Begun[Pieces], int]] = deque()
    begun_hashes: list[Callable[[], Pieces]] = []
    hashed = 0

    def land() -> None:
        finish, nbytes = flying.popleft()
        combine(hashes, finish())
        producer.commit(nbytes)

    for start in range(0, plan.nbytes, ring.slot_bytes):
        stop = min(start + ring.slot_bytes, plan.nbytes)
        crash_point("source.sending")
        if start >= hashed:  # in larger steps than the blocks: each costs many calls
            hashed = min(start + _HASH_BYTES, plan.nbytes)
            begun_hashes.append(plan.begin_hashes(start, hashed))
        while flying and (flying[0][0].done or not producer.ready):
            land()
        address = producer.acquire(_STALL_S)
        flying.append(
            (plan.begin_read(address, start, stop, threads, hash_too=False), stop - start)
        )
        if len(flying) >= _depth(ring, device, threads):
            land()
    while flying:
        land()
    for collect in begun_hashes:
        combine(hashes, collect())
    return hashes


def take(plan: ImagePlan, ring: Ring, device: torch.device, threads: int) -> None:
    """What comes through the ring into the image. Raises MigrationError as `pour` does."""
    consumer = ring.consumer
    lane = itertools.cycle(lanes(device, _LANES))
    flying: deque[Begun[None]] = deque()

    def land() -> None:
        flying.popleft()()
        consumer.release()

    for start in range(0, plan.nbytes, ring.slot_bytes):
        stop = min(start + ring.slot_bytes, plan.nbytes)
        crash_point("target.receiving")
        while flying and (flying[0].done or not consumer.ready):
            land()
        address = consumer.acquire(_STALL_S)
        with next(lane):
            flying.append(plan.begin_write(address, start, stop, threads))
        if len(flying) >= _depth(ring, device, threads):
            land()
    while flying:
        land()


def _depth(ring: Ring, device: torch.device, threads: int) -> int:
    """How many blocks are under way at once: each in a thread, or queued on the device."""
    most = threads if device.type == "cpu" else _QUEUED
    return max(1, min(most, ring.slots // 2))

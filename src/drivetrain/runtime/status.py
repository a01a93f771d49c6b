"""The status page: one 4 KiB file a job, mapped by its worker, its runtime and whoever asks.

The worker that owns the job stores a few 64-bit numbers a step; readers see them without asking
anybody, also when the runtime is dead. It is a view: who owns the job is decided by the journal
alone. ``epoch`` is the fence that an owner checks before every step.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from drivetrain.errors import StoreError

_MAGIC = 0x3153_5544_4E52_5444
_FIELDS = (
    "magic",
    "epoch",
    "step",
    "step_end_ns",
    "median_ns",
    "replica_step",
    "replicate_every",
    "state_bytes",
    "first_step_end_ns",
    "peak_bytes",
    "restored_step",
    "high_step",
    "replica_cost_ppm",
)
_SIZE = 4096


class StatusPage:
    """Attributes are unsigned 64-bit numbers; steps count completed steps, times are ns."""

    words: memoryview

    epoch: int
    step: int
    step_end_ns: int
    median_ns: int
    replica_step: int
    replicate_every: int
    state_bytes: int
    first_step_end_ns: int
    peak_bytes: int
    restored_step: int
    high_step: int
    replica_cost_ppm: int

    def __init__(self, words: memoryview, mapped: mmap.mmap) -> None:
        object.__setattr__(self, "words", words)
        object.__setattr__(self, "_mapped", mapped)

    def __getattr__(self, name: str) -> int:
        try:
            return int(self.__dict__["words"][_FIELDS.index(name)])
        except ValueError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: int) -> None:
        self.__dict__["words"][_FIELDS.index(name)] = value

    @classmethod
    def create(cls, path: Path) -> StatusPage:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(fd, 0, _SIZE)
            mapped = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)
        page = cls(memoryview(mapped).cast("Q"), mapped)
        page.words[0] = _MAGIC
        return page

    @classmethod
    def open(cls, path: Path, *, write: bool = False) -> StatusPage:
        """Map an existing page; StoreError when it is missing or not one of ours."""
        try:
            fd = os.open(path, os.O_RDWR if write else os.O_RDONLY)
        except OSError as error:
            raise StoreError(f"no status page at {path} ({error.strerror})") from None
        try:
            if os.fstat(fd).st_size != _SIZE:
                raise StoreError(f"{path} is not a status page")
            access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
            mapped = mmap.mmap(fd, _SIZE, access=access)
        finally:
            os.close(fd)
        page = cls(memoryview(mapped).cast("Q"), mapped)
        if page.words[0] != _MAGIC:
            raise StoreError(f"{path} is not a status page")
        return page


STEP, EPOCH, STEP_END, MEDIAN, HIGH = (
    _FIELDS.index(name) for name in ("step", "epoch", "step_end_ns", "median_ns", "high_step")
)

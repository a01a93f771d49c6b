"""Memory that two processes share by file descriptor: replica slots, and the ring of a move.

Both are memfds, sealed against changing size, so that a mapping can never be cut away under a
reader. All numbers in the headers are native u64s, each written by one aligned 8-byte store. The
order of stores is what x86 guarantees; elsewhere (aarch64) a lock taken and given back between
data and counter orders them, and the chunk hashes would show a byte that came late all the same.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import xxhash

from drivetrain.errors import IntegrityError, MigrationError
from drivetrain.hal import cgroup
from drivetrain.store.crash import crash_point

HEADER_BYTES = 4096
RING_SLOT_BYTES = 8 << 20
"""Eight such blocks stay in the last cache of a server's processor: what one side wrote, the other
reads there. Of a ring that does not fit there each byte goes through main memory twice more."""
_LONGEST_PAUSE_S = 2e-4  # the ring holds a millisecond of a fast link
_PAGE = 4096
_HUGE_PAGE = 2 << 20
_HUGE_FROM_BYTES = 32 << 20  # a state for a smaller ring moves at once anyway
_MADV_COLLAPSE, _MAP_FIXED = 25, 0x10  # the former from Linux 6.1 on
_SLOT_MAGIC = 0x31544F4C53545244  # "DRTSLOT1"
_RING_MAGIC = 0x31474E4952545244  # "DRTRING1"
_VERSION = 1
_SPARE_BYTES = 64 << 20  # left free for everything else in the control group
_fence_lock = threading.Lock()
_ORDERED = platform.machine() in ("x86_64", "AMD64", "i686")


def _fence() -> None:
    if not _ORDERED:
        with _fence_lock:
            pass


def room_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may still take: the least of machine and control groups."""
    room = _available(root)
    group = cgroup.memory(root)
    if group.limit_bytes is not None:
        room = min(room, max(0, group.limit_bytes - (group.used_bytes or 0)))
    return room


def _available(root: Path) -> int:
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    import psutil

    return int(psutil.virtual_memory().available)


def _into_huge_pages(fd: int, nbytes: int) -> None:
    """Ask the kernel to put a memfd's pages together to huge ones, which a device that reads it
    needs fewer translations for. Where it cannot, they stay as they are."""
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    failed = ctypes.c_void_p(-1).value
    reserved = nbytes + _HUGE_PAGE  # room to start at a multiple of a huge page
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    base = libc.mmap(None, reserved, 0, private, -1, 0)
    if base == failed:
        return
    try:
        start = -(-base // _HUGE_PAGE) * _HUGE_PAGE
        both = mmap.PROT_READ | mmap.PROT_WRITE
        if libc.mmap(start, nbytes, both, mmap.MAP_SHARED | _MAP_FIXED, fd, 0) != failed:
            libc.madvise(start, nbytes // _HUGE_PAGE * _HUGE_PAGE, _MADV_COLLAPSE)
    finally:
        libc.munmap(base, reserved)


def _round_up(nbytes: int) -> int:
    return -(-nbytes // _PAGE) * _PAGE


class _Segment:
    """A mapped memfd with a header of u64s."""

    def __init__(self, fd: int, nbytes: int, *, populate: bool) -> None:
        self.fd = fd
        self.nbytes = nbytes
        flags = mmap.MAP_SHARED | (getattr(mmap, "MAP_POPULATE", 0) if populate else 0)
        self._map = mmap.mmap(fd, nbytes, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        self._anchor: ctypes.c_char | None = ctypes.c_char.from_buffer(self._map)
        self.base = ctypes.addressof(self._anchor)
        self.words = memoryview(self._map)[:HEADER_BYTES].cast("Q")

    @classmethod
    def create(cls, name: str, nbytes: int, *, huge: bool = False) -> _Segment:
        room = room_bytes()
        if nbytes + _SPARE_BYTES > room:
            raise MigrationError(
                f"Shared memory of {nbytes} bytes was asked for, but only {room} bytes are left "
                f"({_SPARE_BYTES} of them stay free); give the job more memory or keep fewer copies"
            )
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, nbytes)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            os.posix_fallocate(fd, 0, nbytes)  # pages now, or an error now: never SIGBUS later
            if huge:
                _into_huge_pages(fd, nbytes)
            return cls(fd, nbytes, populate=True)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.ENOMEM, errno.ENOSPC):
                raise MigrationError(f"There is no shared memory of {nbytes} bytes left") from error
            raise

    @classmethod
    def attach(cls, fd: int, magic: int) -> _Segment:
        own = os.dup(fd)
        try:
            size = os.fstat(own).st_size
            seals = fcntl.fcntl(own, fcntl.F_GET_SEALS)
            needed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
            if seals & needed != needed or size < HEADER_BYTES:
                raise IntegrityError("A file that is not a sealed segment was handed over")
            segment = cls(own, size, populate=False)
        except OSError as error:
            os.close(own)
            raise IntegrityError(f"A file that is no segment was handed over: {error}") from error
        except BaseException:
            os.close(own)
            raise
        if segment.words[0] != magic or segment.words[1] != _VERSION:
            segment.close()
            raise IntegrityError("The segment is of another kind or version")
        return segment

    def view(self, offset: int, nbytes: int) -> memoryview:
        return memoryview(self._map)[offset : offset + nbytes]

    def touch(self) -> None:
        """Map every page now, so that no page fault falls into a pause."""
        with contextlib.suppress(AttributeError, OSError):  # MADV_POPULATE_WRITE, Linux 5.14
            self._map.madvise(23)
            return
        for offset in range(0, self.nbytes, _PAGE):
            self._map[offset]

    def close(self) -> None:
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        self.words.release()
        self._anchor = None
        # Somebody may still hold a view of it: then it goes with the last view.
        with contextlib.suppress(BufferError):
            self._map.close()


# -- replica slots --------------------------------------------------------------------------------

(_OPEN, _CLOSE, _STEP, _EPOCH, _META, _IMAGE, _CAPACITY, _META_HASH) = range(2, 10)


class Slot:
    """One replica of a state: an image and its description, valid only once closed.

    A writer calls `begin`, fills the image at `address`, and calls `finish`, which stores the
    sequence number a second time, last of all. Killed in between, the two numbers differ.
    """

    def __init__(self, segment: _Segment) -> None:
        self._segment = segment
        words = segment.words
        self.meta_capacity = int(words[_CAPACITY])
        self.image_nbytes = int(words[_IMAGE])
        self._image = HEADER_BYTES + _round_up(self.meta_capacity)
        if self._image + _round_up(self.image_nbytes) > segment.nbytes:
            segment.close()
            raise IntegrityError("The replica's header does not fit its size")

    @classmethod
    def create(cls, meta_capacity: int, image_nbytes: int) -> Slot:
        """A new slot with all its pages in memory. Raises MigrationError when there is no room."""
        nbytes = HEADER_BYTES + _round_up(meta_capacity) + _round_up(image_nbytes)
        segment = _Segment.create("drivetrain-replica", nbytes)
        words = segment.words
        words[1], words[_CAPACITY], words[_IMAGE] = _VERSION, meta_capacity, image_nbytes
        _fence()
        words[0] = _SLOT_MAGIC
        return cls(segment)

    @classmethod
    def attach(cls, fd: int) -> Slot:
        """The slot behind a file descriptor, which stays the caller's. Raises IntegrityError."""
        return cls(_Segment.attach(fd, _SLOT_MAGIC))

    @property
    def fd(self) -> int:
        return self._segment.fd

    @property
    def address(self) -> int:
        """Where the image lies in this process, page-aligned."""
        return self._segment.base + self._image

    def image(self) -> memoryview:
        return self._segment.view(self._image, self.image_nbytes)

    @property
    def sequence(self) -> int:
        """The number of the last replica begun here, closed or not; 0 before the first."""
        return int(self._segment.words[_OPEN])

    @property
    def valid(self) -> bool:
        """A replica was begun and closed here."""
        words = self._segment.words
        return bool(words[_OPEN] and words[_OPEN] == words[_CLOSE])

    def begin(self, seq: int, step: int, epoch: int) -> None:
        """From here on the slot does not count, until `finish`. ``seq`` must grow."""
        words = self._segment.words
        if seq <= max(words[_OPEN], words[_CLOSE]):
            raise MigrationError(f"Replica number {seq} follows number {words[_OPEN]}")
        crash_point("slot.open")
        words[_OPEN] = seq
        _fence()
        words[_STEP], words[_EPOCH] = step, epoch
        crash_point("slot.opened")

    def finish(self, meta: bytes) -> None:
        """Store the description and close the slot. Raises MigrationError if it is too long."""
        words = self._segment.words
        if len(meta) > self.meta_capacity:
            raise MigrationError(
                f"A replica's description has {len(meta)} bytes; its slot takes "
                f"{self.meta_capacity}"
            )
        self._segment.view(HEADER_BYTES, len(meta))[:] = meta
        words[_META], words[_META_HASH] = len(meta), self._hash(meta)
        _fence()
        crash_point("slot.close")
        words[_CLOSE] = words[_OPEN]
        crash_point("slot.closed")

    def _hash(self, meta: bytes) -> int:
        words = self._segment.words
        tag = f"{words[_OPEN]} {words[_STEP]} {words[_EPOCH]} {self.image_nbytes} ".encode()
        return int(xxhash.xxh3_64_intdigest(tag + meta))

    def read(self) -> tuple[int, int, bytes]:
        """(step, epoch, description) of a closed replica. Raises IntegrityError."""
        words = self._segment.words
        seq = words[_CLOSE]
        if not self.valid:
            raise IntegrityError("The replica was never completed")
        step, epoch = int(words[_STEP]), int(words[_EPOCH])
        meta = bytes(self._segment.view(HEADER_BYTES, min(words[_META], self.meta_capacity)))
        hashed = self._hash(meta)
        _fence()
        if not self.valid or words[_CLOSE] != seq or hashed != words[_META_HASH]:
            raise IntegrityError(f"The replica of step {step} does not match its description")
        return step, epoch, meta

    def spoil(self) -> None:
        """The replica in it turned out to be damaged: it counts no more."""
        self._segment.words[_CLOSE] = 0

    def touch(self) -> None:
        self._segment.touch()

    def close(self) -> None:
        """Unmap it here; the memory goes when nobody holds it any more."""
        self._segment.close()

    def __enter__(self) -> Slot:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def newest_first(slots: Iterable[Slot]) -> list[Slot]:
    """The readable slots by epoch, then step, then number, the highest first."""
    found: list[tuple[tuple[int, int, int], Slot]] = []
    for slot in slots:
        try:
            step, epoch, _ = slot.read()
        except IntegrityError:
            continue
        found.append(((epoch, step, slot.sequence), slot))
    return [slot for _, slot in sorted(found, key=lambda pair: pair[0], reverse=True)]


def newest(slots: Iterable[Slot]) -> Slot | None:
    """The first of `newest_first`; None if none counts."""
    return next(iter(newest_first(slots)), None)


# -- ring -----------------------------------------------------------------------------------------

_SLOTS, _SLOT_BYTES = 2, 3
_PRODUCED, _CONSUMED, _ABORTED = 8, 16, 24  # each on a cache line of its own
_SIZES = 64  # from here on: bytes committed in each slot
_MAX_SLOTS = HEADER_BYTES // 8 - _SIZES


class Ring:
    """A ring of ``slots`` blocks between one producer and one consumer, for the bytes of a move."""

    def __init__(self, segment: _Segment) -> None:
        self._segment = segment
        self.slots = int(segment.words[_SLOTS])
        self.slot_bytes = int(segment.words[_SLOT_BYTES])
        if not 1 <= self.slots <= _MAX_SLOTS or (
            HEADER_BYTES + self.slots * self.slot_bytes > segment.nbytes
        ):
            segment.close()
            raise IntegrityError("The ring's header does not fit its size")
        self.producer = Producer(self)
        self.consumer = Consumer(self)
        self.waited_s = 0.0
        """Seconds that this process waited for the other side."""

    @classmethod
    def create(cls, slots: int = 8, slot_bytes: int = RING_SLOT_BYTES) -> Ring:
        """A new ring with all its pages in memory. Raises MigrationError when there is no room."""
        if not 1 <= slots <= _MAX_SLOTS or slot_bytes < _PAGE or slot_bytes % _PAGE:
            raise ValueError(f"a ring has 1 to {_MAX_SLOTS} slots of whole pages")
        nbytes = slots * slot_bytes
        huge = nbytes >= _HUGE_FROM_BYTES
        segment = _Segment.create("drivetrain-ring", HEADER_BYTES + nbytes, huge=huge)
        words = segment.words
        words[1], words[_SLOTS], words[_SLOT_BYTES] = _VERSION, slots, slot_bytes
        _fence()
        words[0] = _RING_MAGIC
        return cls(segment)

    @classmethod
    def attach(cls, fd: int) -> Ring:
        """The ring behind a file descriptor, which stays the caller's. Raises IntegrityError."""
        return cls(_Segment.attach(fd, _RING_MAGIC))

    @property
    def fd(self) -> int:
        return self._segment.fd

    @property
    def address(self) -> int:
        """Where slot 0 lies in this process, page-aligned; slot i is i * `slot_bytes` further."""
        return self._segment.base + HEADER_BYTES

    @property
    def nbytes(self) -> int:
        """Size of all slots together, for registering them with a device."""
        return self.slots * self.slot_bytes

    @property
    def aborted(self) -> bool:
        return bool(self._segment.words[_ABORTED])

    def abort(self) -> None:
        """Make both sides' waits end in a MigrationError, now and later."""
        self._segment.words[_ABORTED] = 1

    def touch(self) -> None:
        self._segment.touch()

    def close(self) -> None:
        """Unmap it here; the memory goes when nobody holds it any more."""
        self._segment.close()

    def _wait(self, ready: Callable[[], bool], timeout_s: float, for_what: str) -> None:
        began = 0.0
        pause = 50e-6
        for attempt in range(1 << 62):
            if self.aborted:
                raise MigrationError("The copy was given up by the other side")
            if ready():
                _fence()
                if attempt:
                    self.waited_s += time.monotonic() - began
                return
            if not attempt:
                began = time.monotonic()
            if attempt < 50:
                continue
            if time.monotonic() >= began + timeout_s:
                raise MigrationError(
                    f"{for_what} within {timeout_s:g} s: the other side hangs or is gone"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_S)


class Producer:
    """The sending side. Several slots may be acquired before the first is committed."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._acquired = int(ring._segment.words[_PRODUCED])

    @property
    def ready(self) -> bool:
        """Whether a slot is free."""
        words = self._ring._segment.words
        return self._acquired - words[_CONSUMED] < self._ring.slots

    def acquire(self, timeout_s: float) -> int:
        """The address of the next free slot. Raises MigrationError after ``timeout_s``."""
        ring, words, mine = self._ring, self._ring._segment.words, self._acquired
        ring._wait(lambda: mine - words[_CONSUMED] < ring.slots, timeout_s, "No slot became free")
        self._acquired += 1
        return ring.address + mine % ring.slots * ring.slot_bytes

    def commit(self, nbytes: int) -> None:
        """Hand over the oldest acquired slot, with ``nbytes`` in it."""
        ring, words = self._ring, self._ring._segment.words
        produced = words[_PRODUCED]
        if produced >= self._acquired or not 0 <= nbytes <= ring.slot_bytes:
            raise ValueError(f"commit of {nbytes} bytes without a slot that takes them")
        words[_SIZES + produced % ring.slots] = nbytes
        _fence()
        words[_PRODUCED] = produced + 1


class Consumer:
    """The receiving side. Several slots may be acquired before the first is released."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._acquired = int(ring._segment.words[_CONSUMED])
        self.nbytes = 0
        """Bytes in the slot that was acquired last."""

    @property
    def ready(self) -> bool:
        """Whether a slot is filled."""
        return bool(self._ring._segment.words[_PRODUCED] > self._acquired)

    def acquire(self, timeout_s: float) -> int:
        """The address of the next filled slot. Raises MigrationError after ``timeout_s``."""
        ring, words, mine = self._ring, self._ring._segment.words, self._acquired
        ring._wait(lambda: words[_PRODUCED] > mine, timeout_s, "Nothing arrived")
        self._acquired += 1
        self.nbytes = int(words[_SIZES + mine % ring.slots])
        return ring.address + mine % ring.slots * ring.slot_bytes

    def release(self) -> None:
        """Give the oldest acquired slot back to the producer."""
        words = self._ring._segment.words
        consumed = words[_CONSUMED]
        if consumed >= self._acquired:
            raise ValueError("release without an acquired slot")
        _fence()
        words[_CONSUMED] = consumed + 1

"""The per-job journal: an append-only file that says who owns the job. It is the authority.

File: a 16-byte header (8 bytes magic, u32 version, u32 xxh32 of both), then records, all numbers
little-endian: u32 length of the payload, u64 sequence number (from 1, no gaps), the payload
(msgpack map of kind, epoch, at, data), u64 xxh3_64 of everything in the record before it.

A record that a `Journal` returns is durable: appends fsync under the file's lock before it can be
seen, and a reader that finds new bytes syncs them itself, in case their writer died before it did.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import msgpack
import xxhash

from drivetrain.errors import StoreError
from drivetrain.store import files
from drivetrain.store.crash import crash_point

VERSION = 1
RECORD_LIMIT = 1 << 20  # bytes of payload
_MAGIC = b"DTJRNL\r\n"
_HEAD = struct.Struct("<IQ")
_HASH = struct.Struct("<Q")
_START = _MAGIC + struct.pack("<I", VERSION)
HEADER = _START + struct.pack("<I", xxhash.xxh32_intdigest(_START))


class JournalConflict(StoreError):
    """Somebody else appended first: the last record is not the one that was expected."""


@dataclass(frozen=True)
class Record:
    """One journal entry. ``at`` is wall-clock time in seconds since 1970; ``data`` is JSON-like."""

    seq: int
    kind: str
    epoch: int
    at: float
    data: dict[str, Any]


def _encode(record: Record) -> bytes:
    facts = {"kind": record.kind, "epoch": record.epoch, "at": record.at, "data": record.data}
    payload = bytes(msgpack.packb(facts))
    if len(payload) > RECORD_LIMIT:
        raise StoreError(
            f"A journal record of kind {record.kind!r} has {len(payload)} bytes; the limit is "
            f"{RECORD_LIMIT}. Keep large values in a file and name it in the record"
        )
    head = _HEAD.pack(len(payload), record.seq)
    return head + payload + _HASH.pack(xxhash.xxh3_64_intdigest(head + payload))


def _decode(data: memoryview, offset: int, seq: int | None) -> tuple[Record, int] | None:
    """The valid record at ``offset`` (of that number, if given) and where it ends, else None."""
    if len(data) - offset < _HEAD.size + _HASH.size:
        return None
    length, number = _HEAD.unpack_from(data, offset)
    body = offset + _HEAD.size
    end = body + length
    if (seq is not None and number != seq) or length > RECORD_LIMIT:
        return None
    if end + _HASH.size > len(data):
        return None
    if xxhash.xxh3_64_intdigest(data[offset:end]) != _HASH.unpack_from(data, end)[0]:
        return None
    facts = msgpack.unpackb(data[body:end], strict_map_key=False)
    record = Record(number, facts["kind"], facts["epoch"], facts["at"], facts["data"])
    return record, end + _HASH.size


def _later_record(data: memoryview, offset: int, seq: int) -> int | None:
    """Where behind the bad bytes at ``offset`` a valid record of number >= ``seq`` starts."""
    smallest = _HEAD.size + _HASH.size
    highest = seq + len(data) // smallest
    for start in range(offset + 1, len(data) - smallest + 1):
        number = _HEAD.unpack_from(data, start)[1]
        if seq <= number <= highest and _decode(data, start, None) is not None:
            return start
    return None


class Journal:
    """One open journal file. Safe between threads, between processes and across fork.

    After a failed fsync the object is unusable for good: the kernel may have dropped the pages,
    and a second fsync would report success for bytes that are not on the disk.
    """

    def __init__(self, path: Path, *, lock_timeout_s: float) -> None:
        self.path = path
        self._lock_timeout_s = lock_timeout_s
        self._mutex = threading.RLock()
        self._pid = os.getpid()
        self._records: list[Record] = []
        self._unseen: list[Record] = []  # read while appending, not returned by refresh yet
        self._end = 0  # where the verified prefix ends; 0: no whole header yet
        self._size = -1  # the file's size when it was read last
        self._broken = ""
        self._fd = self._open_file()

    def _open_file(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise StoreError(f"There is no journal at {self.path}") from None
        except OSError as error:
            raise files.explain(error, "Opening the journal", self.path) from error

    @classmethod
    def create(cls, path: Path, *, lock_timeout_s: float = 10.0) -> Journal:
        """A new, empty journal. Raises StoreError if the file exists or cannot be written."""
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise StoreError(f"There is a journal at {path} already; open it instead") from None
        except OSError as error:
            raise files.explain(error, "Creating the journal", path) from error
        try:
            crash_point("journal.create.write")
            files.write_at(fd, [HEADER], 0, name="journal.create.write")
            crash_point("journal.create.sync")
            files.sync(fd, name="journal.create.sync")
            crash_point("journal.create.dirsync")
            files.sync_directory(path.parent, name="journal.create.dirsync")
            crash_point("journal.created")
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(path)
            raise files.explain(error, "Creating the journal", path) from error
        finally:
            os.close(fd)
        return cls.open(path, lock_timeout_s=lock_timeout_s)

    @classmethod
    def open(cls, path: Path, *, lock_timeout_s: float = 10.0) -> Journal:
        """An existing journal, verified. Raises StoreError: missing, damaged or not a journal.

        ``lock_timeout_s``: how long to wait for a process that holds the file's lock.
        """
        journal = cls(path, lock_timeout_s=lock_timeout_s)
        try:
            journal.refresh()
        except BaseException:
            journal.close()
            raise
        return journal

    def close(self) -> None:
        with self._mutex:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
            self._broken = self._broken or "it was closed"

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def tail_seq(self) -> int:
        """The number of the last record read so far; 0 when there is none."""
        return self._records[-1].seq if self._records else 0

    def records(self) -> tuple[Record, ...]:
        """All records, what others appended until now included."""
        with self._mutex:
            self.refresh()
            return tuple(self._records)

    def refresh(self) -> tuple[Record, ...]:
        """What others appended and no earlier `refresh` returned.

        One fstat when nothing happened. Waits while another process is appending.
        """
        with self._mutex:
            self._usable()
            if os.fstat(self._fd).st_size != self._size:
                with self._locked(fcntl.LOCK_SH):
                    self._read_new()
            new, self._unseen = tuple(self._unseen), []
            return new

    def append(
        self, kind: str, data: Mapping[str, Any], *, epoch: int, expect_seq: int | None = None
    ) -> Record:
        """Add one record and make it durable; returns it.

        Raises JournalConflict when the last record is not number ``expect_seq`` (nothing is
        written), StoreError when it cannot be written; then the record does not count.
        """
        with self._mutex:
            self._usable()
            with self._locked(fcntl.LOCK_EX):
                self._read_new()
                tail = self.tail_seq
                if expect_seq is not None and tail != expect_seq:
                    last = f"record {tail} ({self._records[-1].kind})" if tail else "no record"
                    raise JournalConflict(
                        f"{kind!r} was to follow record {expect_seq} in {self.path}, but the "
                        f"journal ends with {last}: another process acted first; read it again"
                    )
                record = Record(tail + 1, kind, epoch, time.time(), dict(data))
                raw = _encode(record)
                self._write(raw)
                decoded = _decode(memoryview(raw), 0, record.seq)
                assert decoded is not None
                self._records.append(decoded[0])  # as every reader sees it
                return decoded[0]

    def _write(self, raw: bytes) -> None:
        before = self._end
        if before == 0:  # a creation that was cut short
            raw, start = HEADER + raw, 0
        else:
            start = before
        try:
            if os.fstat(self._fd).st_size != start:
                crash_point("journal.cut")
                os.ftruncate(self._fd, start)  # a torn tail
            crash_point("journal.write")
            half = len(raw) // 2
            files.write_at(self._fd, [raw[:half]], start, name="journal.write")
            crash_point("journal.torn")
            files.write_at(self._fd, [raw[half:]], start + half, name="journal.write")
            crash_point("journal.sync")
        except OSError as error:
            self._take_back(before)
            raise files.explain(error, "Appending to the journal", self.path) from error
        try:
            files.sync(self._fd, name="journal.sync")
        except OSError as error:
            # Still under the lock: nobody saw the record, and after this nobody will.
            self._take_back(before)
            self._broken = (
                f"fsync failed ({error.strerror}), so its last bytes may not be on the disk; "
                "check the disk, then open the journal again"
            )
            raise StoreError(f"The journal {self.path} is unusable: {self._broken}") from error
        crash_point("journal.synced")
        self._end = self._size = start + len(raw)

    def _take_back(self, end: int) -> None:
        """Cut what a failed append left; if even that fails, a torn tail is ignored anyway.

        A whole record may only have been left by a failed fsync, so its first bytes are spoilt too.
        """
        self._size = -1
        try:
            os.ftruncate(self._fd, end)
        except OSError:
            with contextlib.suppress(OSError):
                os.pwrite(self._fd, b"\xff" * _HEAD.size, end)

    def _read_new(self) -> None:
        size = os.fstat(self._fd).st_size
        if size < self._end:
            raise StoreError(
                f"The journal {self.path} was cut from outside: it had {self._end} verified bytes "
                f"and has {size}. Do not edit it; restore it or remove the job's folder"
            )
        if self._end == 0:
            head = os.pread(self._fd, len(HEADER), 0)
            if not HEADER.startswith(head):
                raise StoreError(self._what_header(head))
            if len(head) < len(HEADER):
                self._size = size
                return
            self._end = len(HEADER)
        data = memoryview(self._pread(self._end, size - self._end))
        new: list[Record] = []
        offset, seq = 0, self.tail_seq + 1
        while (found := _decode(data, offset, seq)) is not None:
            new.append(found[0])
            offset, seq = found[1], seq + 1
        if offset < len(data):
            later = _later_record(data, offset, seq)
            if later is not None:
                raise StoreError(
                    f"The journal {self.path} is corrupted at byte {self._end + offset}: record "
                    f"{seq} is damaged, but records follow at byte {self._end + later}. Restore "
                    "the file or remove the job's folder"
                )
        if new:
            try:
                os.fsync(self._fd)
            except OSError as error:
                self._broken = f"fsync failed ({error.strerror}); check the disk"
                raise StoreError(f"The journal {self.path} is unusable: {self._broken}") from error
        self._records += new
        self._unseen += new
        self._end += offset
        self._size = size

    def _what_header(self, head: bytes) -> str:
        if head[:8] == _MAGIC and len(head) == len(HEADER):
            version = int.from_bytes(head[8:12], "little")
            if xxhash.xxh32_intdigest(head[:12]) == int.from_bytes(head[12:], "little"):
                return (
                    f"The journal {self.path} has version {version}; this Drivetrain reads "
                    f"{VERSION}. Use the Drivetrain that wrote it"
                )
        return f"{self.path} is not a journal, or its header is damaged"

    def _pread(self, offset: int, nbytes: int) -> bytes:
        parts = []
        while nbytes > 0:
            part = os.pread(self._fd, nbytes, offset)
            if not part:
                break
            parts.append(part)
            offset, nbytes = offset + len(part), nbytes - len(part)
        return b"".join(parts)

    def _usable(self) -> None:
        if self._broken:
            raise StoreError(f"The journal {self.path} is unusable: {self._broken}")
        if self._pid != os.getpid():  # a lock is shared with the parent: take one of our own
            os.close(self._fd)
            self._fd = self._open_file()
            self._pid = os.getpid()

    @contextlib.contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        deadline = time.monotonic() + self._lock_timeout_s
        pause = 0.0001
        while True:
            try:
                fcntl.flock(self._fd, how | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"The journal {self.path} stayed locked by another process for "
                        f"{self._lock_timeout_s:g} s; see which with: fuser {self.path}"
                    ) from None
            time.sleep(pause)
            pause = min(2 * pause, 0.005)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

"""The file of a recording: frames of JSON and of raw bytes, each with its length and hash.

After the magic come frames: a letter, the payload's length, its xxh3, the payload. ``H`` is the
header and ``Z`` the end (both JSON), ``E`` an entry (JSON), ``B`` bytes that entries name by
number, counted from 0. A file without its end was cut off. Nothing in it is code for Python;
kernels are sources.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import xxhash

from drivetrain.errors import BadInput, IntegrityError

MAGIC = b"drivetrain-hal\x00\x01"
VERSION = 1
_FRAME = struct.Struct("<cQQ")
_LARGEST_JSON = 64 << 20


class Full(Exception):
    """The recording has reached its limit."""


def digest(data: Any) -> str:
    """What contents are compared by."""
    return xxhash.xxh3_128_hexdigest(data)


class Writer:
    """Writes beside ``path`` and takes its place at the end."""

    def __init__(self, path: Path, limit: int, header: dict[str, Any]) -> None:
        self.path, self._limit = path, limit
        self._beside = path.with_name(f".{path.name}.{os.getpid()}")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
        self._file: IO[bytes] = os.fdopen(os.open(self._beside, flags, 0o600), "wb")
        self._blobs: dict[bytes, int] = {}
        self.nbytes = self.entries = 0
        self._file.write(MAGIC)
        self._frame(b"H", _json({"version": VERSION, **header}))

    def _frame(self, letter: bytes, payload: Any) -> None:
        size = memoryview(payload).nbytes
        if letter in b"EB" and self.nbytes + size > self._limit:
            raise Full(f"more than {self._limit} bytes")
        self._file.write(_FRAME.pack(letter, size, xxhash.xxh3_64_intdigest(payload)))
        self._file.write(payload)
        self.nbytes += _FRAME.size + size

    def entry(self, op: str, **facts: Any) -> None:
        self._frame(b"E", _json({"op": op, **facts}))
        self.entries += 1

    def blob(self, data: Any) -> int:
        """The number of these bytes; the same bytes are written once."""
        key = hashlib.sha256(data).digest()
        number = self._blobs.get(key)
        if number is None:
            self._frame(b"B", data)
            number = self._blobs[key] = len(self._blobs)
        return number

    def end(self, **facts: Any) -> None:
        self._frame(b"Z", _json({"entries": self.entries, **facts}))
        self._file.close()
        os.replace(self._beside, self.path)

    def abandon(self) -> None:
        self._file.close()
        self._beside.unlink(missing_ok=True)


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


class Reader:
    """A recording, checked whole before anything of it is used. Raises BadInput for what is no
    recording, IntegrityError for one that is damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: IO[bytes] = path.open("rb")
        except OSError as error:
            raise BadInput(f"{path} cannot be read: {error}") from error
        self._blobs: list[tuple[int, int]] = []
        self.entries: list[dict[str, Any]] = []
        try:
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def damaged(self, what: str) -> IntegrityError:
        return IntegrityError(f"{self.path} is damaged: {what}; record it again")

    def _read(self) -> None:
        self._size = os.fstat(self._file.fileno()).st_size
        magic = self._file.read(len(MAGIC))
        if magic[:-1] != MAGIC[:-1]:
            raise BadInput(f"{self.path} is no recording of HAL calls")
        self.header: dict[str, Any] = {}
        self.ending: dict[str, Any] | None = None
        for number, (letter, payload) in enumerate(self._frames()):
            if number == 0:
                if letter != b"H":
                    raise self.damaged("it has no header")
                self.header = self._object(payload, "the header")
                version = self.header.get("version")
                if version != VERSION:
                    raise BadInput(
                        f"{self.path}: format {version!r} is not known here; this drivetrain reads "
                        f"format {VERSION}"
                    )
            elif letter == b"E":
                self.entries.append(self._object(payload, f"entry {len(self.entries)}"))
            elif letter == b"Z":
                self.ending = self._object(payload, "the end")
        if self.ending is None:
            raise self.damaged("it was cut off")
        if self.ending.get("entries") != len(self.entries):
            raise self.damaged(
                f"it has {len(self.entries)} entries, {self.ending.get('entries')!r} were written"
            )

    def _frames(self) -> Iterator[tuple[bytes, bytes]]:
        """Each frame with its payload, without what lies in ``B`` frames."""
        while True:
            at = self._file.tell()
            head = self._file.read(_FRAME.size)
            if not head:
                return
            if len(head) < _FRAME.size:
                raise self.damaged(f"it was cut off at byte {at}")
            letter, size, wanted = _FRAME.unpack(head)
            if letter not in b"HEBZ" or self.ending is not None:
                raise self.damaged(f"byte {at} begins no frame")
            if size > self._size - self._file.tell():
                raise self.damaged(f"the frame at byte {at} is longer than the file")
            if letter != b"B" and size > _LARGEST_JSON:
                raise self.damaged(f"the frame at byte {at} has {size} bytes")
            start = self._file.tell()
            if self._hashed(size) != wanted:
                raise self.damaged(f"the frame at byte {at} has another hash than was written")
            if letter == b"B":
                self._blobs.append((start, size))
                yield letter, b""
                continue
            self._file.seek(start)
            yield letter, self._file.read(size)

    def _hashed(self, size: int) -> int:
        hasher = xxhash.xxh3_64()
        while size:
            part = self._file.read(min(size, 1 << 20))
            if not part:
                return -1
            hasher.update(part)
            size -= len(part)
        return hasher.intdigest()

    def _object(self, payload: bytes, what: str) -> dict[str, Any]:
        try:
            found = json.loads(payload)
        except (ValueError, RecursionError) as error:
            raise self.damaged(f"{what} is no JSON ({error})") from error
        if not isinstance(found, dict):
            raise self.damaged(f"{what} is no object")
        return found

    def blob(self, number: Any) -> bytes:
        """The bytes of that number. Raises IntegrityError."""
        if not isinstance(number, int) or not 0 <= number < len(self._blobs):
            raise self.damaged(f"there are no bytes {number!r}")
        start, size = self._blobs[number]
        self._file.seek(start)
        return self._file.read(size)

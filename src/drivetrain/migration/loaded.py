"""Reading a checkpoint: whatever comes into memory is verified on the way."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from drivetrain.errors import IntegrityError, StoreError
from drivetrain.hal.bytes import CHUNK_BYTES
from drivetrain.migration.checkpoint_form import DATA, MANIFEST, DataFile, order_of, unsealed
from drivetrain.migration.integrity import Layout, Manifest
from drivetrain.store import files

_PARTS_MAX = 1000  # of one preadv
_CACHED_CHUNKS = 4


def verify(path: Path) -> None:
    """Read every byte. Raises IntegrityError for a wrong one, StoreError if it cannot be read."""
    with load(path) as loaded:
        loaded.verify()


def load(path: Path) -> Loaded:
    """Open a checkpoint: its manifest is verified now, its data as it is read.

    Raises IntegrityError for a damaged one and StoreError for one that cannot be read.
    """
    try:
        text = (path / MANIFEST).read_bytes()
        file = open(path / DATA, "rb", buffering=0)  # noqa: SIM115 - Loaded closes it
    except FileNotFoundError as error:
        raise IntegrityError(
            f"{path} is no whole checkpoint: {Path(error.filename).name} is missing"
        ) from None
    except OSError as error:
        raise files.explain(error, "Opening a checkpoint", path) from error
    try:
        return Loaded(path, unsealed(path, text), file.fileno(), file.close)
    except BaseException:
        file.close()
        raise


class Loaded:
    """An open checkpoint. Whatever it reads into memory is verified; addresses are the caller's."""

    def __init__(
        self, path: Path, body: Mapping[str, Any], fd: int, close: Callable[[], None]
    ) -> None:
        self.path = path
        self.step = int(body["step"])
        self.epoch = int(body["epoch"])
        self.facts: dict[str, Any] = body["facts"]
        self.manifest = Manifest.from_json(self.facts)
        self.tree_json: bytes = body["tree"].encode()
        self.state_hash: str = body["state_hash"]
        self.nbytes = int(body["image_nbytes"])
        """Size of the image."""
        self.layout = Layout.of(self.manifest)
        self._specs = {spec.name: spec for spec in self.manifest.tensors}
        self._fd = fd
        self.close = close
        self._data = DataFile.of(self.manifest, self.layout, self.step, self.epoch)
        self._hashes: list[str] = body["data"]["xxh3_64"]
        self._cache: dict[int, bytearray] = {}
        if order_of(path) not in (None, (self.epoch, self.step)):
            raise IntegrityError(
                f"{path} was renamed: it is of step {self.step}, epoch {self.epoch}"
            )
        size = os.fstat(fd).st_size
        if size != self._data.nbytes or size != body["data"]["nbytes"]:
            raise IntegrityError(
                f"{path / DATA} has {size} bytes instead of {self._data.nbytes}: it is damaged"
            )
        header = self._data.header
        start = b"".join(bytes(self._chunk(i)) for i in range(-(-len(header) // CHUNK_BYTES)))
        if start[: len(header)] != header:
            raise IntegrityError(f"{path / DATA} does not have the header that its manifest says")

    def __enter__(self) -> Loaded:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def read(self, name: str, address: int) -> int:
        """Read one tensor (or alias) into memory at ``address``; returns its number of bytes.

        Raises IntegrityError; what lies at ``address`` is then worthless.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise StoreError(f"{self.path} has no tensor {name!r}")
        owner = self.layout.index[spec.alias_of or name]
        self._fill([(self._data.offsets[owner] + spec.alias_offset, spec.nbytes, address)])
        return spec.nbytes

    def read_into(self, address: int, start: int = 0, stop: int | None = None) -> None:
        """Read the image's bytes ``[start, stop)`` to ``address`` on; padding is zeroed."""
        stop = self.nbytes if stop is None else stop
        wanted, end = [], start
        for p in self.layout.pieces(start, stop):
            here = address + p.start - start
            ctypes.memset(address + end - start, 0, p.start - end)
            wanted.append((self._data.offsets[p.tensor] + p.offset, p.nbytes, here))
            end = p.start + p.nbytes
        ctypes.memset(address + end - start, 0, stop - end)
        self._fill(wanted)

    def verify(self) -> None:
        """Read every byte of the data. Raises IntegrityError."""
        for index in range(len(self._hashes)):
            self._chunk(index)

    def _bounds(self, index: int) -> tuple[int, int]:
        return index * CHUNK_BYTES, min((index + 1) * CHUNK_BYTES, self._data.nbytes)

    def _fill(self, wanted: list[tuple[int, int, int]]) -> None:
        """Read (offset in the file, bytes, address) each, chunk by chunk, with its hash."""
        by_chunk: dict[int, list[tuple[int, int, int]]] = {}
        for at, left, address in wanted:
            while left > 0:
                index = at // CHUNK_BYTES
                now = min(left, (index + 1) * CHUNK_BYTES - at)
                by_chunk.setdefault(index, []).append((at, now, address))
                at, left, address = at + now, left - now, address + now
        for index, parts in sorted(by_chunk.items()):
            start, stop = self._bounds(index)
            parts.sort()
            asked = sum(nbytes for _, nbytes, _ in parts)
            distinct = all(a[0] + a[1] <= b[0] for a, b in pairwise(parts))
            if distinct and 2 * asked > stop - start and 2 * len(parts) < _PARTS_MAX:
                self._read_chunk(index, parts)
                continue
            chunk = self._chunk(index)
            source = ctypes.addressof(ctypes.c_char.from_buffer(chunk))
            for at, nbytes, address in parts:
                ctypes.memmove(address, source + at - start, nbytes)

    def _chunk(self, index: int) -> bytearray:
        """One verified chunk, from a small cache."""
        found = self._cache.get(index)
        if found is None:
            start, stop = self._bounds(index)
            found = bytearray(stop - start)
            if found:
                address = ctypes.addressof(ctypes.c_char.from_buffer(found))
                self._read_chunk(index, [(start, stop - start, address)])
            while len(self._cache) >= _CACHED_CHUNKS:
                del self._cache[next(iter(self._cache))]
            self._cache[index] = found
        return found

    def _read_chunk(self, index: int, parts: list[tuple[int, int, int]]) -> None:
        """Read a whole chunk, what ``parts`` name to their addresses, and check its hash."""
        start, stop = self._bounds(index)
        views: list[memoryview] = []
        at = start
        for offset, nbytes, address in [*parts, (stop, 0, 0)]:
            if offset > at:
                views.append(memoryview(bytearray(offset - at)))
            if nbytes:
                memory = (ctypes.c_char * nbytes).from_address(address)
                views.append(memoryview(memory).cast("B"))
            at = offset + nbytes
        self._read_exactly(views, start)
        digest = xxhash.xxh3_64()
        for view in views:
            digest.update(view)
        if index >= len(self._hashes) or digest.hexdigest() != self._hashes[index]:
            raise IntegrityError(
                f"{self.path / DATA} is damaged between bytes {start} and {stop}: their hash is "
                "not the one that was written"
            )

    def _read_exactly(self, views: list[memoryview], offset: int) -> None:
        left = list(views)
        while left:
            try:
                got = os.preadv(self._fd, left, offset)
            except OSError as error:
                raise files.explain(error, "Reading a checkpoint", self.path) from error
            if got == 0:
                raise IntegrityError(f"{self.path / DATA} ends at byte {offset}: it is cut short")
            offset += got
            while left and got >= left[0].nbytes:
                got -= left[0].nbytes
                del left[0]
            if got:
                left[0] = left[0][got:]

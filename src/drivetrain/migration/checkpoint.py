"""Durable checkpoints: folders that are whole or absent, of which every byte is verified on load.

``<directory>/step-<12 digits>-e<epoch>/`` holds ``state.safetensors``, which any safetensors
reader opens (aliases left out, a tensor with permuted strides in its order in memory), and
``manifest.json``: what the tensors are, the tree, the state hash, xxh3_64 of each 4 MiB of the data
file, and an xxh3_64 of the manifest itself, whose text is canonical to the byte.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from drivetrain.errors import DrivetrainError, IntegrityError, StoreError
from drivetrain.hal.bytes import checksum
from drivetrain.migration.integrity import (
    CHUNK_BYTES,
    Layout,
    Manifest,
    TensorSpec,
    canonical_json,
    combine,
)
from drivetrain.migration.integrity import state_hash as hash_of_state
from drivetrain.store import files
from drivetrain.store.crash import crash_point
from drivetrain.store.process import ProcessId

FORMAT = 1
KEEP = 2
DATA, MANIFEST = "state.safetensors", "manifest.json"
_NAME = re.compile(r"step-(\d{12})-e(\d+)")
_TEMPORARY = re.compile(r"\.(?:tmp|old)-(\d+)\.(\d+)-.*")
_VIEW_BYTES = 16 << 20
_PARTS_MAX = 1000  # of one preadv
_CACHED_CHUNKS = 4
_DTYPES = {  # name -> (safetensors' name, bytes of an element)
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "complex64": ("C64", 8),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint64": ("U64", 8),
    "uint32": ("U32", 4),
    "uint16": ("U16", 2),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}


# -- the data file's form -------------------------------------------------------------------------


def _stored_as(spec: TensorSpec) -> tuple[str, list[int], int]:
    """(dtype, shape, bytes of an element) in the header; raw bytes if it has no word for it."""
    dtype, width = _DTYPES.get(spec.dtype, ("", 0))
    if not width or math.prod(spec.shape) * width != spec.nbytes:
        return "U8", [spec.nbytes], 1
    in_memory = sorted(range(len(spec.shape)), key=lambda i: -spec.stride[i] if spec.stride else 0)
    expected = 1
    for i in reversed(range(len(spec.shape))):
        if spec.shape[i] != 1 and spec.stride[i] != expected:
            return dtype, [spec.shape[i] for i in in_memory], width
        expected *= spec.shape[i]
    return dtype, list(spec.shape), width


@dataclass(frozen=True)
class _DataFile:
    """Where each tensor of a layout lies in the data file.

    Tensors with wide elements come first: safetensors allows no gap, and readers want each
    tensor aligned to its elements.
    """

    header: bytes
    offsets: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, manifest: Manifest, layout: Layout, step: int, epoch: int) -> _DataFile:
        own = [spec for spec in manifest.tensors if spec.alias_of is None]
        stored = [_stored_as(spec) for spec in own]
        entries: dict[str, Any] = {
            "__metadata__": {"format": "pt", "step": str(step), "epoch": str(epoch)}
        }
        starts, end = [0] * len(own), 0
        for i in sorted(range(len(own)), key=lambda i: -stored[i][2]):
            dtype, shape, _ = stored[i]
            starts[i], end = end, end + layout.sizes[i]
            if own[i].name in entries:
                raise StoreError(f"Two tensors of the state are called {own[i].name!r}")
            entries[own[i].name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [starts[i], end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % 64)
        header = len(text).to_bytes(8, "little") + text
        return cls(header, tuple(len(header) + start for start in starts), len(header) + end)


# -- writing --------------------------------------------------------------------------------------

# A periodic checkpoint and one that was asked for may be of the same step, in two threads.
_writing = threading.Lock()


def write(
    directory: Path,
    *,
    step: int,
    epoch: int,
    facts: Manifest | Mapping[str, Any],
    tree_json: bytes,
    state_hash: str,
    image: memoryview | Iterable[memoryview],
) -> Path:
    """Write a checkpoint durably, then remove all but the two newest. Returns its folder.

    ``facts`` is a manifest (or its JSON, kept as it is), ``image`` the bytes of its layout, whole
    or in consecutive parts of a multiple of 64 bytes. Raises IntegrityError when the bytes do not
    have ``state_hash`` and StoreError when they cannot be written; then nothing has changed.
    A valid checkpoint of the same step, epoch and hash is left as it is.
    """
    facts_json = facts.to_json() if isinstance(facts, Manifest) else dict(facts)
    manifest = Manifest.from_json(facts_json)
    layout = Layout.of(manifest)
    data = _DataFile.of(manifest, layout, step, epoch)
    final = directory / f"step-{step:012d}-e{epoch}"
    with _writing:
        return _write(directory, final, step, epoch, facts_json, tree_json, state_hash, data, image)


def _write(
    directory: Path,
    final: Path,
    step: int,
    epoch: int,
    facts_json: dict[str, Any],
    tree_json: bytes,
    state_hash: str,
    data: _DataFile,
    image: memoryview | Iterable[memoryview],
) -> Path:
    layout = Layout.of(Manifest.from_json(facts_json))
    if _holds(final, state_hash):
        return final
    me = ProcessId.of()
    temporary = directory / f".tmp-{me.pid}.{me.start_time}-{final.name}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_stale(directory)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(mode=0o700)
        crash_point("checkpoint.data")
        hashes, image_nbytes = _write_data(temporary / DATA, data, layout, image)
        if hash_of_state(hashes, tree_json) != state_hash:
            raise IntegrityError(
                f"The state that was to be saved at step {step} does not have its hash "
                f"{state_hash}; it changed on the way, and nothing was saved"
            )
        body = {
            "format": FORMAT,
            "step": step,
            "epoch": epoch,
            "state_hash": state_hash,
            "facts": facts_json,
            "tree": tree_json.decode("utf-8"),
            "image_nbytes": image_nbytes,
            "data": {
                "file": DATA,
                "nbytes": data.nbytes,
                "chunk_bytes": CHUNK_BYTES,
                "xxh3_64": _file_hashes(temporary / DATA),
            },
        }
        crash_point("checkpoint.manifest")
        files.write_durably(temporary / MANIFEST, [_sealed(body)], name="checkpoint.manifest")
        crash_point("checkpoint.temporary.dirsync")
        files.sync_directory(temporary, name="checkpoint.temporary.dirsync")
        _put_in_place(temporary, final, directory)
    except OSError as error:
        raise files.explain(error, "Writing a checkpoint", directory) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    with contextlib.suppress(OSError):  # the checkpoint is safe; the next one tidies up
        _prune(directory, final)
    return final


def _write_data(
    path: Path, data: _DataFile, layout: Layout, image: memoryview | Iterable[memoryview]
) -> tuple[list[int], int]:
    """Write and fsync the data file; (chunk hashes, size of the image) of what was given."""
    hashes = [0] * layout.chunks
    at = 0
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(NotImplementedError):
            os.posix_fallocate(fd, 0, data.nbytes)  # a full disk shows now
        files.write_at(fd, [data.header], 0, name="checkpoint.data")
        for given in _views(image):
            if at % 64:
                raise ValueError("only the last part of an image may be no multiple of 64 bytes")
            view = given if not given.readonly else memoryview(bytearray(given))
            base = ctypes.addressof(ctypes.c_char.from_buffer(view)) if view.nbytes else 0
            batch: list[memoryview] = []
            first = last = 0
            for p in layout.pieces(at, at + view.nbytes):
                here = p.start - at
                part = checksum(base + here, p.nbytes, p.first_word)
                combine(hashes, [(p.chunk, part)])
                where = data.offsets[p.tensor] + p.offset
                if batch and where != last:
                    files.write_at(fd, batch, first, name="checkpoint.data")
                    batch = []
                if not batch:
                    first = last = where
                batch.append(view[here : here + p.nbytes])
                last += p.nbytes
            if batch:
                files.write_at(fd, batch, first, name="checkpoint.data")
            at += view.nbytes
        crash_point("checkpoint.data.sync")
        files.sync(fd, name="checkpoint.data.sync")
    finally:
        os.close(fd)
    end = layout.offsets[-1] + layout.sizes[-1] if layout.offsets else 0
    if not end <= at <= layout.nbytes:
        raise IntegrityError(
            f"The state that was to be saved has {at} bytes; its tensors need {layout.nbytes}"
        )
    return hashes, at


def _views(image: memoryview | Iterable[memoryview]) -> Iterator[memoryview]:
    for part in [image] if isinstance(image, memoryview) else image:
        view = part.cast("B")
        for start in range(0, view.nbytes, _VIEW_BYTES):
            yield view[start : start + _VIEW_BYTES]


def _file_hashes(path: Path) -> list[str]:
    """xxh3_64 of each chunk, read back from what was written."""
    buffer = bytearray(CHUNK_BYTES)
    found: list[str] = []
    with open(path, "rb", buffering=0) as file:
        while True:
            got = 0
            while got < CHUNK_BYTES and (n := file.readinto(memoryview(buffer)[got:])):
                got += n
            if got == 0:
                return found
            found.append(xxhash.xxh3_64_hexdigest(memoryview(buffer)[:got]))


def _sealed(body: Mapping[str, Any]) -> bytes:
    """The manifest's text: the body and the hash of its canonical JSON."""
    digest = xxhash.xxh3_64_hexdigest(canonical_json(body))
    return canonical_json({**body, "xxh3_64": digest})


def _put_in_place(temporary: Path, final: Path, directory: Path) -> None:
    old = directory / f".old{temporary.name.removeprefix('.tmp')}"
    if final.exists():  # the same step of the same epoch, saved again
        crash_point("checkpoint.replace")
        os.rename(final, old)
    crash_point("checkpoint.rename")
    os.rename(temporary, final)
    crash_point("checkpoint.dirsync")
    files.sync_directory(directory, name="checkpoint.dirsync")
    crash_point("checkpoint.done")
    shutil.rmtree(old, ignore_errors=True)


def tidy(directory: Path) -> None:
    """Remove what dead writers left half done; the checkpoints stay."""
    with contextlib.suppress(OSError):
        _remove_stale(directory)


def _remove_stale(directory: Path) -> None:
    """Remove what writers left that are not alive any more."""
    boot = ProcessId.of().boot_id
    for path in directory.glob(".*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and not ProcessId(int(match[1]), int(match[2]), boot).alive:
            shutil.rmtree(path, ignore_errors=True)


def _prune(directory: Path, fresh: Path) -> None:
    """Remove what is older than the two newest that can be opened."""
    good = 0
    for path in reversed(_all(directory)):
        if good >= KEEP:
            gone = path.with_name(f".old-{os.getpid()}.{ProcessId.of().start_time}-{path.name}")
            crash_point("checkpoint.prune")
            os.rename(path, gone)  # half removed, it must not look like a checkpoint
            crash_point("checkpoint.pruned")
            shutil.rmtree(gone, ignore_errors=True)
        elif path == fresh or _opens(path):
            good += 1


def _holds(path: Path, state_hash: str) -> bool:
    if not path.is_dir():
        return False
    try:
        with load(path) as loaded:
            loaded.verify()
            return loaded.state_hash == state_hash
    except DrivetrainError:
        return False


def _opens(path: Path) -> bool:
    try:
        load(path).close()
    except DrivetrainError:
        return False
    return True


# -- finding --------------------------------------------------------------------------------------


def _order(path: Path) -> tuple[int, int] | None:
    """(epoch, step) by the folder's name: a later owner's steps are the newer ones."""
    match = _NAME.fullmatch(path.name)
    return (int(match[2]), int(match[1])) if match else None


def _all(directory: Path) -> list[Path]:
    """All checkpoints by name, oldest first."""
    try:
        found = [(order, path) for path in directory.iterdir() if (order := _order(path))]
    except FileNotFoundError:
        return []
    return [path for _, path in sorted(found)]


def newest(directory: Path) -> Path | None:
    """The newest checkpoint by name, not opened; None when there is none."""
    found = _all(directory)
    return found[-1] if found else None


@dataclass(frozen=True)
class Found:
    """The newest valid checkpoint, if any, and the newer ones that are not, with the reasons."""

    path: Path | None
    skipped: tuple[tuple[Path, str], ...]


def newest_valid(directory: Path) -> Found:
    """The newest checkpoint of which every byte is right, read in full."""
    skipped = []
    for path in reversed(_all(directory)):
        try:
            verify(path)
        except DrivetrainError as error:
            skipped.append((path, str(error)))
        else:
            return Found(path, tuple(skipped))
    return Found(None, tuple(skipped))


# -- reading --------------------------------------------------------------------------------------


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
        return Loaded(path, _unsealed(path, text), file.fileno(), file.close)
    except BaseException:
        file.close()
        raise


def _unsealed(path: Path, text: bytes) -> dict[str, Any]:
    try:
        body = json.loads(text)
        body.pop("xxh3_64")
        same = _sealed(body) == text
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        same, body = False, {}
    if not same:
        raise IntegrityError(f"{path / MANIFEST} is damaged: it does not match its own hash")
    if body.get("format") != FORMAT:
        raise StoreError(
            f"{path} has format {body.get('format')}; this Drivetrain reads {FORMAT}. Use the "
            "Drivetrain that wrote it"
        )
    return dict(body)


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
        self._data = _DataFile.of(self.manifest, self.layout, self.step, self.epoch)
        self._hashes: list[str] = body["data"]["xxh3_64"]
        self._cache: dict[int, bytearray] = {}
        if _order(path) not in (None, (self.epoch, self.step)):
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

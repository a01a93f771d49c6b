"""Durable checkpoints: folders that are whole or absent, of which every byte is verified on load.

Written beside each other and put in place by a rename; the two newest are kept. What they look
like is in ``checkpoint_form``, how they are read in ``loaded``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from drivetrain.errors import DrivetrainError, IntegrityError
from drivetrain.hal.bytes import CHUNK_BYTES, checksum
from drivetrain.migration.checkpoint_form import (
    DATA,
    FORMAT,
    MANIFEST,
    DataFile,
    folder_name,
    order_of,
    sealed,
)
from drivetrain.migration.integrity import Layout, Manifest
from drivetrain.migration.integrity import state_hash as hash_of_state
from drivetrain.migration.loaded import load, verify
from drivetrain.pytorch.image import combine
from drivetrain.store import files
from drivetrain.store.crash import crash_point
from drivetrain.store.process import ProcessId

KEEP = 2
_TEMPORARY = re.compile(r"\.(?:tmp|old)-(\d+)\.(\d+)-.*")
_VIEW_BYTES = 16 << 20


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
    data = DataFile.of(manifest, layout, step, epoch)
    final = directory / folder_name(step, epoch)
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
    data: DataFile,
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
        files.write_durably(temporary / MANIFEST, [sealed(body)], name="checkpoint.manifest")
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
    path: Path, data: DataFile, layout: Layout, image: memoryview | Iterable[memoryview]
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


def _all(directory: Path) -> list[Path]:
    """All checkpoints by name, oldest first."""
    try:
        found = [(order, path) for path in directory.iterdir() if (order := order_of(path))]
    except FileNotFoundError:
        return []
    return [path for _, path in sorted(found)]


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

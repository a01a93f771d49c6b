"""Compiled kernels on disk: one file an entry, checked before it is believed.

An entry is: magic, sha256 of all that follows together with its key, the lengths of its two parts,
facts as JSON, code. It is written to a file of its own and renamed, so a reader sees all of it or
nothing, and of two writers of one key the later wins with the same content.

The folder must be ours alone (mode 0700, our user): loading code that others can write is running
it. A folder that is not is left alone, said once, and everything is compiled anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
import struct
import time
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from drivetrain.errors import BadInput
from drivetrain.hal import config
from drivetrain.hal.language.facts import Compiled, KernelFacts, Param

__all__ = ["Cache", "cache", "cache_folder"]

_FOLDER = "DRIVETRAIN_CACHE"
_LIMIT = "DRIVETRAIN_CACHE_LIMIT_MIB"
_DEFAULT_LIMIT = 512 << 20
_MAGIC = b"dtkern\x01\n"
_HEAD = struct.Struct("<8s32sQQ")
_SUFFIX = ".kernel"
_STALE_S = 3600.0
_IN_PROCESS_BYTES = 64 << 20


def cache_folder() -> Path:
    """``DRIVETRAIN_CACHE``, else ``cache/kernels`` in the state folder."""
    asked = os.environ.get(_FOLDER)
    return Path(asked) if asked else config.state_folder() / "cache" / "kernels"


def _limit() -> int:
    text = os.environ.get(_LIMIT, "")
    if not text:
        return _DEFAULT_LIMIT
    if not text.isdecimal():
        raise BadInput(f"{_LIMIT}={text!r} is no number of MiB")
    return int(text) << 20


class Cache:
    """Compiled code by key, in one folder; with the last used kept in this process.

    ``limit`` is the most bytes on disk; the least recently used entries go first. Neither `get` nor
    `put` raises for what the disk does.
    """

    def __init__(self, folder: Path, limit: int = _DEFAULT_LIMIT) -> None:
        self.folder = folder
        self.limit = limit
        self._lock = Lock()
        self._recent: OrderedDict[str, Compiled] = OrderedDict()
        self._recent_bytes = 0
        self._said = False

    def get(self, key: str) -> Compiled | None:
        """What was put under ``key``, or None. A damaged entry is dropped."""
        with self._lock:
            found = self._recent.get(key)
            if found is not None:
                self._recent.move_to_end(key)
                return found
        folder = self._open(make=False)
        if folder is None:
            return None
        try:
            found = self._read(folder, key)
        finally:
            os.close(folder)
        if found is not None:
            self._remember(key, found)
        return found

    def put(self, key: str, compiled: Compiled) -> None:
        self._remember(key, compiled)
        data = _packed(key, compiled)
        if len(data) > self.limit:
            return
        folder = self._open(make=True)
        if folder is None:
            return
        try:
            _write(folder, key + _SUFFIX, data)
            self._evict(folder)
        except OSError as error:
            self._say(f"{self.folder} takes no compiled kernel: {error}")
        finally:
            os.close(folder)

    def _remember(self, key: str, compiled: Compiled) -> None:
        with self._lock:
            before = self._recent.pop(key, None)
            if before is not None:
                self._recent_bytes -= len(before.code)
            self._recent[key] = compiled
            self._recent_bytes += len(compiled.code)
            while self._recent_bytes > _IN_PROCESS_BYTES and len(self._recent) > 1:
                _, oldest = self._recent.popitem(last=False)
                self._recent_bytes -= len(oldest.code)

    def _open(self, *, make: bool) -> int | None:
        """The folder's descriptor if it is ours alone; None otherwise."""
        try:
            if make:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._say(f"{self.folder} cannot be used for compiled kernels: {error}")
            return None
        facts = os.fstat(folder)
        why = ""
        if facts.st_uid != os.geteuid():
            why = f"it belongs to user {facts.st_uid}"
        elif stat.S_IMODE(facts.st_mode) & 0o077:
            why = f"others may use it (mode {stat.S_IMODE(facts.st_mode):04o})"
        if why:
            os.close(folder)
            self._say(
                f"compiled kernels are not kept in {self.folder}: {why}. Make it yours with "
                f"mode 0700, or set {_FOLDER} to another folder"
            )
            return None
        return folder

    def _say(self, message: str) -> None:
        with self._lock:
            said, self._said = self._said, True
        if not said:
            warnings.warn(message, RuntimeWarning, stacklevel=4)

    def _read(self, folder: int, key: str) -> Compiled | None:
        name = key + _SUFFIX
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
        except OSError:
            return None
        facts = os.fstat(file)
        if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
            os.close(file)
        else:
            with open(file, "rb") as stream:
                try:
                    found = _unpacked(key, stream.read())
                    if found is not None:
                        os.utime(file)
                        return found
                except OSError:
                    pass
        try:
            os.unlink(name, dir_fd=folder)
        except OSError:
            pass
        return None

    def _evict(self, folder: int) -> None:
        entries, total, now = [], 0, time.time()
        with os.scandir(folder) as found:
            for entry in found:
                try:
                    facts = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if entry.name.endswith(_SUFFIX):
                    entries.append((facts.st_mtime_ns, entry.name, facts.st_size))
                    total += facts.st_size
                elif entry.name.startswith(".new-") and now - facts.st_mtime > _STALE_S:
                    entries.append((0, entry.name, facts.st_size))
                    total += self.limit  # a writer died: it goes in any case
        for _, name, size in sorted(entries):
            if total <= self.limit:
                return
            try:
                os.unlink(name, dir_fd=folder)
            except OSError:
                continue
            total -= self.limit if name.startswith(".new-") else size


def _write(folder: int, name: str, data: bytes) -> None:
    temporary = f".new-{os.getpid()}-{secrets.token_hex(8)}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    file = os.open(temporary, flags, 0o600, dir_fd=folder)
    try:
        with open(file, "wb") as stream:
            stream.write(data)
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        os.unlink(temporary, dir_fd=folder)
        raise


def _digest(key: str, rest: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + rest).digest()


def _packed(key: str, compiled: Compiled) -> bytes:
    facts = json.dumps(
        {
            "form": compiled.form,
            "log": compiled.log,
            "kernels": {name: asdict(kernel) for name, kernel in compiled.kernels.items()},
        }
    ).encode()
    rest = struct.pack("<QQ", len(facts), len(compiled.code)) + facts + compiled.code
    return _MAGIC + _digest(key, rest) + rest


def _unpacked(key: str, data: bytes) -> Compiled | None:
    """The entry, or None when anything in it is not as it was written."""
    if len(data) < _HEAD.size:
        return None
    magic, digest, facts_bytes, code_bytes = _HEAD.unpack_from(data)
    if magic != _MAGIC or len(data) != _HEAD.size + facts_bytes + code_bytes:
        return None
    if digest != _digest(key, data[len(_MAGIC) + 32 :]):
        return None
    try:
        facts = json.loads(data[_HEAD.size : _HEAD.size + facts_bytes])
        kernels = {name: _kernel(kernel) for name, kernel in facts["kernels"].items()}
        return Compiled(facts["form"], data[_HEAD.size + facts_bytes :], kernels, facts["log"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return None  # of another version, with the same name: it cannot be ours


def _kernel(facts: Mapping[str, Any]) -> KernelFacts:
    params, block = facts["params"], facts["block"]
    told = None if params is None else tuple(Param(**param) for param in params)
    return KernelFacts(**{**facts, "params": told, "block": tuple(block) if block else None})


_caches: dict[tuple[Path, int], Cache] = {}
_caches_lock = Lock()


def cache() -> Cache:
    """The cache that the environment names now."""
    key = cache_folder(), _limit()
    with _caches_lock:
        return _caches.setdefault(key, Cache(*key))

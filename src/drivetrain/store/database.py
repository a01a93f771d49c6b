"""SQLite for what may be lost: history, placements, moves, and device leases.

The journals are the authority on jobs. This file is recreated when it is missing or damaged; then
living owners take their leases again with `Database.renew`. Safe between threads and processes and
across fork.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drivetrain.errors import DiskFull, PlacementError, StoreError
from drivetrain.store.process import ProcessId

VERSION = 1
_BUSY_S = 10.0
_SCHEMA = """
CREATE TABLE history(script_key TEXT NOT NULL, device_key TEXT NOT NULL, step_seconds REAL,
    memory_bytes INTEGER, at REAL NOT NULL);
CREATE INDEX history_script ON history(script_key, device_key, at);
CREATE TABLE placements(job TEXT NOT NULL, decision TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE moves(job TEXT NOT NULL, source TEXT NOT NULL, target TEXT NOT NULL,
    nbytes INTEGER NOT NULL, predicted_s REAL, real_s REAL, bandwidth REAL,
    strategy TEXT NOT NULL, at REAL NOT NULL);
CREATE INDEX moves_pair ON moves(source, target, at);
CREATE TABLE leases(id TEXT PRIMARY KEY, device_key TEXT NOT NULL, domain TEXT NOT NULL,
    nbytes INTEGER NOT NULL, pid INTEGER NOT NULL, start_time INTEGER NOT NULL,
    boot_id TEXT NOT NULL, job TEXT NOT NULL, at REAL NOT NULL);
CREATE INDEX leases_domain ON leases(domain);
"""
_KEPT = 20_000  # newest rows of each table of past things
_LEASE = "id, device_key, domain, nbytes, pid, start_time, boot_id, job, at"


@dataclass(frozen=True)
class Lease:
    """``nbytes`` of a memory domain, held for a job for as long as ``owner`` lives."""

    id: str
    device_key: str
    domain: str
    nbytes: int
    owner: ProcessId
    job: str
    at: float


@dataclass(frozen=True)
class Want:
    """One line of a lease request: ``nbytes`` out of the ``capacity_bytes`` of ``domain``."""

    domain: str
    capacity_bytes: int
    nbytes: int
    device_key: str = ""


@dataclass(frozen=True)
class Move:
    """How a move went. Times in seconds, ``bandwidth`` in GB/s."""

    job: str
    source: str
    target: str
    nbytes: int
    predicted_s: float | None
    real_s: float | None
    bandwidth: float | None
    strategy: str
    at: float = 0.0


def _lease_of(row: Sequence[Any]) -> Lease:
    owner = ProcessId(row[4], row[5], row[6])
    return Lease(row[0], row[1], row[2], row[3], owner, row[7], row[8])


class _Replaced(Exception):
    """The file is damaged or is another one now."""


class Database:
    """The database at ``path``, created when needed. Raises StoreError when it cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mutex = threading.RLock()
        self._pid = 0
        self._inode = (0, 0)
        self._connection: sqlite3.Connection | None = None
        with self._mutex:
            self._connect()

    def close(self) -> None:
        with self._mutex:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    # -- opening ---------------------------------------------------------------------------------

    def _connect(self) -> sqlite3.Connection:
        """Open, check and, if need be, recreate the file, one process at a time."""
        if self._connection is not None and self._pid == os.getpid():
            self._connection.close()
        self._connection = None  # after a fork: the parent's; sqlite forbids even closing it
        try:
            with self._opening():
                try:
                    connection = self._open()
                except _Replaced as damage:
                    print(
                        f"drivetrain: {self.path} was damaged ({damage}) and was made anew; "
                        "history and past placements are gone, jobs are not.",
                        file=sys.stderr,
                        flush=True,
                    )
                    self._remove()
                    connection = self._open()
                facts = os.stat(self.path)
        except (OSError, sqlite3.Error, _Replaced) as error:
            raise StoreError(
                f"The database {self.path} cannot be opened: {error}. Check the disk's space and "
                "the folder's permissions; the file may be deleted at any time"
            ) from error
        self._connection, self._pid = connection, os.getpid()
        self._inode = (facts.st_dev, facts.st_ino)
        return connection

    @contextlib.contextmanager
    def _opening(self) -> Iterator[None]:
        fd = os.open(f"{self.path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _open(self) -> sqlite3.Connection:
        if not self.path.exists():
            self._remove()  # a log without its database must not be replayed into a new one
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > VERSION:
                raise StoreError(
                    f"The database {self.path} is of a newer Drivetrain (version {version}); use "
                    "that one, or delete the file: jobs live in journals"
                )
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
            if version == 0:
                connection.executescript(
                    f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={VERSION}; COMMIT;"
                )
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":
                raise _Replaced(str(found).splitlines()[-1])
        except sqlite3.DatabaseError as error:
            connection.close()
            if _is_damage(error):
                raise _Replaced(str(error)) from error
            raise
        except BaseException:
            connection.close()
            raise
        return connection

    def _remove(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def _current(self) -> sqlite3.Connection:
        """The connection, made again after a fork or when the file was deleted or replaced."""
        connection = self._connection
        try:
            facts = os.stat(self.path)
            same = (facts.st_dev, facts.st_ino) == self._inode
        except FileNotFoundError:
            same = False
        if connection is None or self._pid != os.getpid() or not same:
            return self._connect()
        return connection

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._mutex:
            try:
                connection = self._current()
                try:
                    connection.execute("BEGIN IMMEDIATE")
                except sqlite3.DatabaseError as error:
                    if not _is_damage(error):
                        raise
                    connection = self._connect()
                    connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):
                        connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                full = getattr(error, "sqlite_errorcode", 0) == sqlite3.SQLITE_FULL
                raise (DiskFull if full else StoreError)(
                    f"The database {self.path} failed: {error}. Nothing of this was stored; the "
                    "file may be deleted at any time, jobs live in journals"
                ) from error

    def _rows(self, query: str, *values: object) -> list[tuple[Any, ...]]:
        with self._mutex:
            try:
                try:
                    return self._current().execute(query, values).fetchall()
                except sqlite3.DatabaseError as error:
                    if not _is_damage(error):
                        raise
                    return self._connect().execute(query, values).fetchall()
            except sqlite3.Error as error:
                raise StoreError(f"The database {self.path} failed: {error}") from error

    # -- leases ----------------------------------------------------------------------------------

    def lease(
        self,
        domain: str,
        capacity_bytes: int,
        nbytes: int,
        owner: ProcessId,
        job: str,
        *,
        device_key: str = "",
    ) -> Lease:
        """Take ``nbytes`` of a domain that has ``capacity_bytes`` for all leases together.

        Raises PlacementError when they do not fit beside the leases of living owners.
        """
        want = Want(domain, capacity_bytes, nbytes, device_key)
        return self.lease_all([want], owner, job)[0]

    def lease_all(self, wants: Sequence[Want], owner: ProcessId, job: str) -> tuple[Lease, ...]:
        """Several leases or none, in one transaction. Raises PlacementError as `lease` does."""
        with self._transaction() as connection:
            _drop_dead(connection)
            leases = []
            for want in wants:
                _check_fit(connection, want)
                lease = Lease(
                    secrets.token_hex(8),
                    want.device_key or want.domain,
                    want.domain,
                    want.nbytes,
                    owner,
                    job,
                    time.time(),
                )
                _insert(connection, lease)
                leases.append(lease)
            return tuple(leases)

    def leased(self, domain: str) -> int:
        """Bytes of the domain that living owners hold."""
        return sum(lease.nbytes for lease in self.leases(domain))

    def leases(self, domain: str | None = None) -> tuple[Lease, ...]:
        """The leases of living owners, oldest first."""
        query = f"SELECT {_LEASE} FROM leases"
        found = (
            self._rows(f"{query} ORDER BY at")
            if domain is None
            else self._rows(f"{query} WHERE domain = ? ORDER BY at", domain)
        )
        leases = [_lease_of(row) for row in found]
        living = {owner: owner.alive for owner in {lease.owner for lease in leases}}
        return tuple(lease for lease in leases if living[lease.owner])

    def transfer(self, lease: Lease, new_owner: ProcessId) -> Lease:
        """Hand the lease to another process. Raises StoreError when it does not exist any more."""
        return self._change(lease, dataclasses.replace(lease, owner=new_owner))

    def resize(self, lease: Lease, nbytes: int, *, capacity_bytes: int | None = None) -> Lease:
        """Change the size. With a capacity, growing beyond what is left raises PlacementError."""
        return self._change(lease, dataclasses.replace(lease, nbytes=nbytes), capacity_bytes)

    def _change(self, old: Lease, new: Lease, capacity_bytes: int | None = None) -> Lease:
        with self._transaction() as connection:
            if capacity_bytes is not None and new.nbytes > old.nbytes:
                _drop_dead(connection)
                _check_fit(
                    connection, Want(new.domain, capacity_bytes, new.nbytes), except_id=new.id
                )
            owner = new.owner
            changed = connection.execute(
                "UPDATE leases SET nbytes=?, pid=?, start_time=?, boot_id=? WHERE id=?",
                (new.nbytes, owner.pid, owner.start_time, owner.boot_id, new.id),
            ).rowcount
            if not changed:
                raise StoreError(
                    f"Job {new.job}'s lease on {new.domain} is gone (its owner died or the "
                    "database was deleted); take it again"
                )
        return new

    def renew(self, lease: Lease) -> None:
        """Put the lease back if the database lost it; the memory is in use already."""
        with self._transaction() as connection:
            _insert(connection, lease)

    def release(self, lease: Lease) -> None:
        """Give the lease back; doing it twice is fine."""
        with self._transaction() as connection:
            connection.execute("DELETE FROM leases WHERE id = ?", (lease.id,))

    # -- history ---------------------------------------------------------------------------------

    def add_history(
        self,
        script_key: str,
        device_key: str,
        *,
        step_seconds: float | None,
        memory_bytes: int | None,
    ) -> None:
        """Remember a run's median step time and peak memory on a device."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO history VALUES (?, ?, ?, ?, ?)",
                (script_key, device_key, step_seconds, memory_bytes, time.time()),
            )
            _forget_oldest(connection, "history")

    def step_seconds(self, script_key: str) -> dict[str, float]:
        """The script's newest known step time on each device key."""
        rows = self._rows(
            "SELECT device_key, step_seconds FROM history WHERE script_key = ? "
            "AND step_seconds IS NOT NULL ORDER BY at, rowid",
            script_key,
        )
        return {str(key): float(value) for key, value in rows}

    def peak_bytes(self, script_key: str) -> int | None:
        """The script's last known peak of device memory, None if it never ran."""
        rows = self._rows(
            "SELECT memory_bytes FROM history WHERE script_key = ? AND memory_bytes IS NOT NULL "
            "ORDER BY at DESC, rowid DESC LIMIT 1",
            script_key,
        )
        return int(rows[0][0]) if rows else None

    def add_placement(self, job: str, decision: Mapping[str, Any]) -> None:
        """Remember where a job was put, with the terms and alternatives of the decision."""
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO placements VALUES (?, ?, ?)", (job, json.dumps(decision), time.time())
            )
            _forget_oldest(connection, "placements")

    def placements(self, job: str) -> tuple[dict[str, Any], ...]:
        """The job's placement decisions, oldest first."""
        rows = self._rows("SELECT decision FROM placements WHERE job = ? ORDER BY at, rowid", job)
        return tuple(json.loads(row[0]) for row in rows)

    def add_move(self, move: Move) -> None:
        with self._transaction() as connection:
            values = dataclasses.astuple(dataclasses.replace(move, at=move.at or time.time()))
            connection.execute("INSERT INTO moves VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", values)
            _forget_oldest(connection, "moves")

    def moves(
        self, *, source: str | None = None, target: str | None = None, limit: int = 100
    ) -> tuple[Move, ...]:
        """Past moves, newest first, optionally of one pair of devices."""
        rows = self._rows(
            "SELECT * FROM moves WHERE (?1 IS NULL OR source = ?1) AND (?2 IS NULL OR target = ?2) "
            "ORDER BY at DESC, rowid DESC LIMIT ?3",
            source,
            target,
            limit,
        )
        return tuple(Move(*row) for row in rows)


def _is_damage(error: sqlite3.DatabaseError) -> bool:
    """SQLITE_CORRUPT or SQLITE_NOTADB, and nothing that passes by itself."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (11, 26)


def _forget_oldest(connection: sqlite3.Connection, table: str) -> None:
    connection.execute(
        f"DELETE FROM {table} WHERE rowid <= (SELECT max(rowid) FROM {table}) - ?", (_KEPT,)
    )


def _drop_dead(connection: sqlite3.Connection) -> None:
    owners = connection.execute("SELECT DISTINCT pid, start_time, boot_id FROM leases").fetchall()
    for row in owners:
        if not ProcessId(*row).alive:
            connection.execute(
                "DELETE FROM leases WHERE pid = ? AND start_time = ? AND boot_id = ?", row
            )


def _check_fit(connection: sqlite3.Connection, want: Want, except_id: str = "") -> None:
    if want.nbytes < 0:
        raise PlacementError(f"A lease cannot have {want.nbytes} bytes")
    query = "SELECT COALESCE(SUM(nbytes), 0) FROM leases WHERE domain = ? AND id != ?"
    held = connection.execute(query, (want.domain, except_id)).fetchone()[0]
    if held + want.nbytes > want.capacity_bytes:
        raise PlacementError(
            f"{want.nbytes} bytes do not fit on {want.domain}: {held} of {want.capacity_bytes} are "
            "leased to running jobs. Wait for one to end, stop one, or choose another device"
        )


def _insert(connection: sqlite3.Connection, lease: Lease) -> None:
    owner = lease.owner
    connection.execute(
        f"INSERT OR REPLACE INTO leases({_LEASE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            lease.id,
            lease.device_key,
            lease.domain,
            lease.nbytes,
            owner.pid,
            owner.start_time,
            owner.boot_id,
            lease.job,
            lease.at,
        ),
    )

"""A move: from two workers, one running and one warm, to one that owns the job.

COMPARE -> PREPARE -> REHEARSE -> PAUSE -> COPY -> VERIFY -> RESTORE -> COMMIT -> RELEASE. The
source stays the owner until ``commit`` (one durable record in the job's journal) returns; whatever
fails before that aborts the target and lets the source go on. After it, the target owns the job,
and a failure is an ordinary loss of a worker.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from drivetrain.errors import BadInput, DrivetrainError, IntegrityError, MigrationError
from drivetrain.migration.endpoint import Cut, Endpoint, Peer
from drivetrain.migration.integrity import first_difference, state_hash
from drivetrain.migration.prediction import SMALL, Past, predict, slower_step_s
from drivetrain.migration.segment import RING_SLOT_BYTES, Ring
from drivetrain.store.crash import crash_point

STRATEGIES = ("immediate", "checkpointed")
_ABSENT = ("gradual", "load_balanced")
_PAUSE_S = 600.0
_COPY_S = 600.0
_PREPARE_S = 60.0
_RING_SLOTS = 8
MOST_RING_BYTES = _RING_SLOTS * RING_SLOT_BYTES
"""Of host memory that a move takes, beside the state itself."""


def check_strategy(name: str) -> str:
    """The strategy's name; BadInput for one that does not exist or is not built yet."""
    if name in STRATEGIES:
        return name
    exist = ", ".join(STRATEGIES)
    if name in _ABSENT:
        raise BadInput(f"the strategy {name!r} is not built yet; those that exist: {exist}")
    raise BadInput(f"there is no strategy {name!r}; those that exist: {exist}")


def check_max_downtime(seconds: float | None) -> None:
    """BadInput for a limit that no move could keep, or that is no number; None: no limit."""
    if seconds is not None and not seconds > 0:
        raise BadInput(f"--max-downtime must be more than 0 seconds: {seconds}")


@dataclass
class MoveReport:
    """What a move did. ``downtime_ms``: from the source's last step to the target's first.
    ``waited_ms``: how long the source and the target waited for each other's blocks of the copy."""

    id: str
    strategy: str
    source: str
    target: str
    ok: bool = False
    reason: str = ""
    path: str = ""
    step: int = 0
    state_bytes: int = 0
    hash_source: str = ""
    hash_target: str = ""
    downtime_ms: float | None = None
    predicted_downtime_ms: float | None = None
    bandwidth_gbps: float | None = None
    steps_lost: int = 0
    steps_repeated: int = 0
    phases_ms: dict[str, float] = field(default_factory=dict)
    waited_ms: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        found = asdict(self)
        found["from"] = found.pop("source")
        found["to"] = found.pop("target")
        return found


class Move:
    """One attempt to give a job to ``target``: it commits, or leaves the source alone."""

    def __init__(
        self,
        report: MoveReport,
        source: Endpoint,
        target: Endpoint,
        *,
        commit: Callable[[Cut], int],
        on_phase: Callable[[str, dict[str, Any]], None],
        write_s: float,
        copy_gbps: float,
        target_step_s: float = 0.0,
        max_downtime_s: float | None = None,
        past: Sequence[Past] = (),
        peer: Peer | None = None,
    ) -> None:
        self.report = report
        self.cut: Cut | None = None
        self.committed = False
        self._source = source
        self._target = target
        self._commit = commit
        self._on_phase = on_phase
        self._write_s = write_s
        self._copy_gbps = copy_gbps
        self._max_downtime_s = max_downtime_s
        self._past = past
        self._peer = peer
        self._exported: list[Any] = []
        self.modelled_s = self.copied_s = self._passing_s = 0.0
        self._target_step_s = target_step_s
        self._paused = False
        self._untold: list[str] = []
        self._ring: Ring | None = None

    def run(self) -> None:
        """Move, or raise with the source running as before (``committed`` says which)."""
        try:
            self._run()
        except DrivetrainError as error:
            self.report.reason = str(error)
            if not self.committed:
                self._undo()
            raise
        finally:
            self._tell()
            if self._ring is not None:
                self._ring.close()
            if self._peer is not None:
                self._peer.close()

    def _run(self) -> None:
        source, target = self._source, self._target
        with self._phase("compare"):
            now = source.manifest()
            difference = first_difference(
                json.loads(now.facts), json.loads(target.manifest().facts)
            )
            if difference is not None:
                raise MigrationError(
                    f"the script builds something else on {target.address}: {difference}"
                )
            self.report.state_bytes = now.nbytes
        if self.report.strategy == "immediate":
            with self._phase("prepare"):
                self._ring = _ring_for(now.nbytes)
                both = [e.prepare(self._ring.fd) for e in (source, target)]
                for pending in both:
                    pending.result(_PREPARE_S)
        with self._phase("rehearse"):
            self._predict(now)
        if self._peer is not None:
            with self._phase("peer"):
                self._prepare_peer()
        with self._phase("pause"):
            self.cut = cut = source.pause()
            self._paused = True
            self.report.step = cut.step
            if self._peer is not None:
                self._exported = source.export()
        if self.report.strategy == "immediate":
            self._copy(cut)
        else:
            self._through_disk(cut)
        with self._phase("commit"):
            epoch = self._commit(cut)
            self.committed = True
            target.commit(epoch)
        with self._phase("release"):
            try:
                source.release()
            except MigrationError as error:  # it is fenced by the journal all the same
                self.report.reason = f"the source did not answer its release: {error}"
        self.report.ok = True

    def _copy(self, cut: Cut) -> None:
        with self._phase("copy"):
            began = time.monotonic()
            passed, arrived = self._pass_on(cut)
            self.copied_s = time.monotonic() - began
        with self._phase("verify"):
            self.report.hash_source = state_hash(passed, cut.tree)
            self.report.hash_target = state_hash(arrived, cut.tree)
            bad = [i for i, (a, b) in enumerate(zip(passed, arrived, strict=False)) if a != b]
            if bad or len(passed) != len(arrived):
                raise IntegrityError(
                    f"chunk {bad[0] if bad else len(arrived)} of {len(passed)} arrived on "
                    f"{self._target.address} with another hash than it left"
                )
        with self._phase("restore"):
            self._target.restore(cut)

    def _pass_on(self, cut: Cut) -> tuple[list[int], list[int]]:
        """The tensors from one side to the other; the chunk hashes of both."""
        source, target, peer = self._source, self._target, self._peer
        sent = source.read(host_only=peer is not None)
        received = target.write(cut, host_only=peer is not None)
        self._tell()  # while the bytes are on their way
        crash_point("move.copying")
        if peer is None:
            out, arrived = sent.result(_COPY_S), received.result(_COPY_S)
            for name, side in (("source", out), ("target", arrived)):
                self.report.waited_ms[name] = round(side.waited_s * 1e3, 3)
            self._note_rate(cut, max(out.seconds, arrived.seconds))
            return out.hashes, arrived.hashes
        received.result(_COPY_S)
        self._note_rate(cut, peer.copy(self._exported, target.export()))
        hashes = target.hash()
        return sent.result(_COPY_S).hashes, hashes.result(_COPY_S).hashes

    @property
    def explained_s(self) -> float:
        """The model with what the copy really took, where the bytes count: what is left of the
        downtime is the fixed cost that the next prediction learns from."""
        if self.report.state_bytes < SMALL:
            return self.modelled_s
        return self.modelled_s - self._passing_s + self.copied_s

    def _note_rate(self, cut: Cut, seconds: float) -> None:
        if seconds > 0:
            self.report.bandwidth_gbps = cut.nbytes / seconds / 1e9

    def _through_disk(self, cut: Cut) -> None:
        began = time.monotonic()
        with self._phase("write"):
            saved = self._source.save(to_disk=True)
            self.report.hash_source = saved["hash"]
        with self._phase("read"):
            self.report.hash_target = self._target.load(saved["path"])
        self.copied_s = time.monotonic() - began
        self._note_rate(cut, self.copied_s)
        if self.report.hash_source != self.report.hash_target:
            raise IntegrityError(f"the checkpoint {saved['path']} arrived with another hash")

    def _predict(self, now: Cut) -> None:
        """Predict the downtime from what was just measured: a rehearsal, one frame, one fsync."""
        source, target = self._source, self._target
        # The first one also makes what is missing: the second is what the pause will see.
        restore_s = min(target.restore(now, rehearse=True) for _ in range(2))
        frame_s = statistics.median([source.ping(), target.ping(), source.ping(), target.ping()])
        passed_s = now.nbytes / (self._copy_gbps * 1e9)
        if self.report.strategy == "checkpointed":
            passed_s += 4 * self._write_s
        self._passing_s = passed_s
        slower_s = slower_step_s(self._target_step_s, now.median_ns / 1e9)
        self.modelled_s = now.took_s + restore_s + 6 * frame_s + self._write_s + passed_s + slower_s
        predicted = predict(now.nbytes, self.modelled_s, passed_s, self._past)
        self.report.predicted_downtime_ms = predicted * 1e3
        if self._max_downtime_s is not None and predicted > self._max_downtime_s:
            raise MigrationError(
                f"the move would stop the job for about {predicted:.2f} s, more than the "
                f"{self._max_downtime_s:g} s of --max-downtime; nothing was paused"
            )

    def _prepare_peer(self) -> None:
        """Open both sides' device memory; where that cannot be done, go through the host."""
        assert self._peer is not None
        try:
            self._peer.prepare(self._source.export(), self._target.export())
        except DrivetrainError as error:
            self.report.path = f"staged: {error}"
            self._peer.close()
            self._peer = None
        else:
            self.report.path = "peer"

    def _tell(self) -> None:
        """Tell of the phases that began in the pause: then there was no time for it."""
        for name in self._untold:
            self._on_phase(name, {})
        self._untold.clear()

    def _undo(self) -> None:
        if self._ring is not None:
            self._ring.abort()  # neither side waits for the other any more
        for endpoint, needed in ((self._source, self._paused), (self._target, True)):
            if not needed:
                continue
            try:
                endpoint.abort()
            except DrivetrainError:
                continue  # it is dead; the runtime sees that by itself

    def _phase(self, name: str) -> _Phase:
        return _Phase(self, name)


class _Phase:
    """Times one phase and tells who listens."""

    def __init__(self, move: Move, name: str) -> None:
        self._move = move
        self._name = name

    def __enter__(self) -> None:
        self._began = time.monotonic()
        self._move._untold.append(self._name)
        if not self._move._paused:
            self._move._tell()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        took = (time.monotonic() - self._began) * 1e3
        self._move.report.phases_ms[self._name] = round(took, 3)


def _ring_for(nbytes: int) -> Ring:
    return Ring.create(max(2, min(_RING_SLOTS, -(-nbytes // RING_SLOT_BYTES))))

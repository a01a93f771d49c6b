"""Replicas: a copy of the state outside the worker, taken while the worker goes on.

At a step boundary the small, boundary-bound part (buffers, generators, loader position,
``run.vars``, ``extra``) is copied at once. Parameters and optimizer state do not change until the
next optimizer step, so they are copied by a thread during the next forward and backward; the
optimizer's pre-hook waits for it. Where that takes less time than a thread costs (a small state in
host memory), they are copied at once too. Two slots in shared memory take turns, and a slot counts
only once its sequence number was closed last.
"""

from __future__ import annotations

import json
import math
import os
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from drivetrain.errors import DrivetrainError
from drivetrain.migration.checkpoint import write as write_checkpoint
from drivetrain.migration.integrity import state_hash
from drivetrain.migration.segment import Slot, room_bytes
from drivetrain.pytorch.hashing import ImagePlan
from drivetrain.pytorch.image import chunks, combine
from drivetrain.pytorch.pinned import Pinned, beside, mark
from drivetrain.pytorch.state import Capture, TrainingState
from drivetrain.runtime.agent import Agent
from drivetrain.store.crash import crash_point

_TARGET_COST = 0.01
_AIM = 0.8  # of the target: a copy also leaves colder caches, which nobody measures
_LOOP_WEIGHT = 2.0  # so does the loop, every step: in short steps as much again as is measured
_AT_ONCE = 1 << 20  # bytes: 0.1 ms, where a thread that takes a core from torch's can cost a slice
_MAX_GAP_S = 10.0
_COST_SAMPLES = 9
_META_SPARE = 1 << 16
_META_WORDS = 256  # of a replica's description, beside facts, tree and hashes
_HASH_TEXT = 21  # a 64-bit number and a comma


def choose_interval(cost_s: float, step_s: float, loop_s: float = 0.0) -> int:
    """K: the least number of steps between replicas that costs at most 1% of the step time.

    ``cost_s`` is what one replica costs, ``loop_s`` what the loop itself costs every step. Capped
    so that K steps take at most 10 s: at most that much work is repeated after a loss.
    """
    if step_s <= 0:
        return 1
    target_s = _AIM * _TARGET_COST * step_s
    room = max(target_s - _LOOP_WEIGHT * loop_s, 0.1 * target_s)
    least = max(1, math.ceil(cost_s / room))
    cap = max(1, int(_MAX_GAP_S / step_s))
    return min(least, cap)


class Snapshot(NamedTuple):
    """One boundary: its tensors (live), what they are as JSON, and the tree as JSON."""

    capture: Capture
    facts: bytes
    tree: bytes


def same_memory(plan: ImagePlan | None, tensors: Sequence[torch.Tensor]) -> bool:
    """True while ``plan`` is an image of exactly these tensors."""
    if plan is None or len(plan.flats) != len(tensors):
        return False
    return all(
        a.data_ptr() == b.data_ptr() and a.numel() == b.numel() * b.element_size()
        for a, b in zip(plan.flats, tensors, strict=True)
    )


class Replicator:
    """Keeps the newest closed replica at most K steps behind the job."""

    def __init__(
        self,
        state: TrainingState,
        agent: Agent,
        describe: Callable[[], Snapshot],
    ) -> None:
        self._state = state
        self._agent = agent
        self._describe = describe
        self._given: list[int] = []
        self._slots: list[Slot] = []
        self._pins: list[Pinned] = []
        self._retired: list[Slot] = []
        self._announced = False
        self._plan: ImagePlan | None = None
        self._split = 0
        self._window: list[torch.Tensor] = []
        self._together = False
        self._copier = _Copier()
        self._copying = False
        self._settled = False
        self._failure: BaseException | None = None
        self._waited_s = 0.0
        self._thread_s = 0.0
        self._main_s = 0.0
        self._costs: deque[float] = deque(maxlen=_COST_SAMPLES)
        self._sequence = 0
        self._unpinned = threading.Event()
        self._unpinned.set()
        self._checkpoint_due = time.monotonic() + float(agent.spec.get("checkpoint_every") or 1e18)
        self._checkpointing: threading.Thread | None = None
        chosen = agent.spec.get("replicate_every")
        self.fixed = int(chosen) if chosen else 0
        self.every = self.fixed or 1
        self.last_step = -1  # of the newest closed replica
        self.last_hash = ""
        self._captured = -1  # of the newest begun one
        self.enabled = bool(agent.spec.get("replicas", True))

    # -- set-up -------------------------------------------------------------------------

    def _prepare(self, now: Snapshot) -> None:
        specs = [spec for spec in now.capture.specs if spec.alias_of is None]
        tensors = list(now.capture.tensors.values())
        self._plan = ImagePlan(now.capture.flats())
        first = next((i for i, spec in enumerate(specs) if spec.window), len(specs))
        self._window = tensors[first:]
        self._split = self._plan.offsets[first] if first < len(specs) else self._plan.nbytes
        if self._state.device.type == "cpu" and self._plan.nbytes - self._split <= _AT_ONCE:
            self._together = True
        facts, tree = now.facts, now.tree
        capacity = 2 * (len(facts) + len(tree)) + _META_SPARE + 32 * (chunks(self._plan.nbytes))
        if self._given and self._adopt(capacity):
            return
        # What the old slots hold counts until the first replica in the new ones is closed.
        self._unpin()
        self._retired += self._slots
        self._slots = []
        wanted = 2
        room = room_bytes()
        each = self._plan.nbytes + capacity + 8192
        if room < 2.2 * each:
            wanted = 1 if room > 1.2 * each else 0
            self._agent.notice(
                f"replicas of {self._plan.nbytes / 2**20:.0f} MiB do not fit twice into the "
                f"{room / 2**20:.0f} MiB of memory left: "
                + ("keeping one, plus checkpoints on disk" if wanted else "replicas are off")
            )
        self._slots = [Slot.create(capacity, self._plan.nbytes) for _ in range(wanted)]
        self._pin()
        if not wanted:
            self.enabled = False
            return
        self._announced = False

    def _adopt(self, capacity: int) -> bool:
        """Go on in the slots that an earlier copy of the job used, when they fit."""
        slots = [Slot.attach(fd) for fd in self._given]
        for fd in self._given:
            os.close(fd)
        self._given = []
        fits = self._plan is not None and all(
            slot.image_nbytes == self._plan.nbytes and slot.meta_capacity >= capacity // 2
            for slot in slots
        )
        if not fits:
            for slot in slots:
                slot.close()
            return False
        self._slots = slots
        self._pin()
        self._sequence = max(slot.sequence for slot in slots)
        self._announce()
        return True

    def _pin(self) -> None:
        device = self._state.device
        self._pins = [Pinned(slot.address, slot.image_nbytes, device) for slot in self._slots]

    def _unpin(self) -> None:
        for pin in self._pins:
            pin.close()
        self._pins = []

    def _announce(self) -> None:
        """Show the slots to the runtime; those of before are let go."""
        crash_point("replica.announce")
        self._announced = True
        self._agent.replica_fds = [slot.fd for slot in self._slots]
        self._agent.event("replica", fds=self._agent.replica_fds)
        for slot in self._retired:
            slot.close()
        self._retired = []

    # -- taking a replica ---------------------------------------------------------------

    def continue_in(self, fds: Sequence[int], step: int) -> None:
        """Go on, from ``step`` on, in the slots that an earlier copy of the job kept."""
        self._given = list(fds)
        self._captured = step - self.every if not fds else step

    def due(self, step: int) -> bool:
        return self.enabled and (self._captured < 0 or step - self._captured >= self.every)

    def capture(self, step: int, *, together: bool = False) -> None:
        """Take a replica of the boundary after ``step`` completed steps.

        Returns once the boundary-bound part is copied; with ``together`` once all is.
        """
        began = time.perf_counter()
        self.wait()
        now = self._describe()
        facts, tree = now.facts, now.tree
        fits = self._takes(now)
        if not fits:
            self._prepare(now)
            if not self.enabled:
                return
        assert self._plan is not None
        self._unpinned.wait()
        # One that does not count goes first, so that the other counts until this one does.
        slot = min(self._slots, key=lambda s: (s.valid, s.sequence))
        self._sequence += 1
        slot.begin(self._sequence, step, self._agent.epoch)
        crash_point("replica.begin")
        hashes = [0] * chunks(self._plan.nbytes)
        combine(hashes, self._plan.read_into(slot.address, 0, self._split))
        boundary = mark(self._state.device)
        versions = [t._version for t in self._window]
        self._captured = step
        together = together or self._together

        def copy_window() -> None:
            started = time.thread_time()
            try:
                assert self._plan is not None
                rest = slot.address + self._split
                with beside(self._state.device, boundary):
                    combine(hashes, self._plan.read_into(rest, self._split, self._plan.nbytes))
                if not together and versions != [t._version for t in self._window]:
                    # Something other than the optimizer wrote the parameters during the step:
                    # this copy may be torn, so it is never closed.
                    self._together = True
                    self._captured = -1
                    return
                digest = state_hash(hashes, tree)
                slot.finish(
                    b'{"step":%d,"epoch":%d,"hash":"%s","hashes":%s,"facts":%s,"tree":%s}'
                    % (
                        step,
                        self._agent.epoch,
                        digest.encode(),
                        json.dumps(hashes).encode(),
                        facts,
                        tree,
                    )
                )
                if not self._announced:
                    self._announce()
                self.last_hash = digest
                self.last_step = step
                self._agent.page.replica_step = step
                self._maybe_checkpoint(slot, step, facts, tree, digest)
            except BaseException as error:
                self._failure = error
            finally:
                self._thread_s = time.thread_time() - started

        if together:
            copy_window()
            self._check()
        else:
            self._copying = True
            self._copier.begin(copy_window)
        self._main_s = time.perf_counter() - began
        self._settled = fits  # a first one in new slots costs more than those to come
        if together and self._together and fits:
            self._costs.append(self._main_s)

    def _takes(self, now: Snapshot) -> bool:
        """True while this state, and what describes it, fits the slots as they are."""
        if not same_memory(self._plan, list(now.capture.tensors.values())):
            return False
        needed = len(now.facts) + len(now.tree) + _HASH_TEXT * chunks(self.nbytes) + _META_WORDS
        return all(slot.meta_capacity >= needed for slot in self._slots)

    def wait(self) -> None:
        """Wait until the running copy is done: the optimizer's pre-hook, and every boundary."""
        if not self._copying:
            return
        began = time.perf_counter()
        self._copier.wait()
        self._copying = False
        self._waited_s = time.perf_counter() - began
        self._check()
        busy = self._thread_s if self._state.device.type == "cpu" else 0.0
        if self._settled:
            self._costs.append(self._main_s + max(self._waited_s, busy))

    def _check(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def tune(self, step_s: float, loop_s: float) -> None:
        """Choose K from the measured costs (nothing to choose when the user fixed it)."""
        if len(self._costs) < 2:
            return
        cost = statistics.median(self._costs)
        if not self.fixed:
            self.every = choose_interval(cost, step_s, loop_s)
        share = (cost / self.every + loop_s) / max(step_s, 1e-9)
        self._agent.page.replica_cost_ppm = int(1e6 * share)

    @property
    def nbytes(self) -> int:
        return 0 if self._plan is None else self._plan.nbytes

    # -- durable checkpoints --------------------------------------------------------------

    def _maybe_checkpoint(
        self, slot: Slot, step: int, facts: bytes, tree: bytes, digest: str
    ) -> None:
        if time.monotonic() < self._checkpoint_due or self._checkpointing is not None:
            return
        self._checkpoint_due = time.monotonic() + float(self._agent.spec["checkpoint_every"])
        self._unpinned.clear()

        def write() -> None:
            try:
                self.write_from_slot(slot, step, facts, tree, digest)
            except DrivetrainError as error:
                self._agent.notice(f"checkpoint at step {step} failed: {error}")
            finally:
                self._unpinned.set()
                self._checkpointing = None

        self._checkpointing = threading.Thread(
            target=write, name="drivetrain-checkpoint", daemon=True
        )
        self._checkpointing.start()

    def write_from_slot(
        self, slot: Slot, step: int, facts: bytes, tree: bytes, digest: str
    ) -> Path:
        """A durable checkpoint of a closed slot; tells the journal."""
        return save_checkpoint(self._agent, slot.image(), step, facts, tree, digest)

    def close(self) -> None:
        """Finish what runs and let go of the slots."""
        try:
            self.wait()
        finally:
            self._copier.close()
            checkpointing = self._checkpointing
            if checkpointing is not None:
                checkpointing.join()
            self._unpin()
            for slot in (*self._slots, *self._retired):
                slot.close()
            self._slots, self._retired = [], []


class _Copier:
    """A thread that does one thing after another: starting one for each copy would make the
    training wait until it runs."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Begin ``work``, which raises nothing; ``wait`` for it before the next."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="drivetrain-replica", daemon=True
            )
            self._thread.start()
        self._work.put(work)

    def wait(self) -> None:
        self._done.get()

    def close(self) -> None:
        if self._thread is not None:
            self._work.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work  # it holds the state's tensors
            self._done.put(None)


def save_checkpoint(
    agent: Agent, image: memoryview, step: int, facts: bytes, tree: bytes, digest: str
) -> Path:
    """Write image and tree as a durable checkpoint and record it in the journal."""
    path = write_checkpoint(
        agent.directory / "checkpoints",
        step=step,
        epoch=agent.epoch,
        facts=json.loads(facts),
        tree_json=tree,
        state_hash=digest,
        image=image,
    )
    crash_point("checkpoint.record")
    agent.journal.append(
        "checkpoint",
        {"step": step, "path": str(path), "hash": digest, "pid": os.getpid()},
        epoch=agent.epoch,
    )
    return path

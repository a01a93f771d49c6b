"""The worker's half of moves, pauses and restores: requests of the runtime, served at a boundary.

Everything here runs in the main thread between two steps (or, in a copy that does not own the job
yet, after its warm-up), so nothing else touches the state meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from drivetrain.errors import DrivetrainError, IntegrityError, MigrationError, Moved
from drivetrain.hal.drivers import cuda_ipc
from drivetrain.migration.integrity import state_hash
from drivetrain.migration.loaded import load as load_checkpoint
from drivetrain.migration.segment import Ring, Slot, newest_first
from drivetrain.pytorch import tree as typed
from drivetrain.pytorch.dense import flat
from drivetrain.pytorch.hashing import ImagePlan
from drivetrain.pytorch.image import chunks, combine
from drivetrain.pytorch.pinned import Pinned
from drivetrain.pytorch.state import TrainingState
from drivetrain.runtime.agent import Agent
from drivetrain.runtime.channel import Message
from drivetrain.store.crash import crash_point
from drivetrain.training import passing
from drivetrain.training.replication import Replicator, Snapshot, same_memory, save_checkpoint

_STALL_S = 60.0  # a runtime silent for so long in a pause of its own is taken for dead


class Endpoint:
    """Serves requests for one job's state; see ``migration.endpoint`` for the contract."""

    def __init__(
        self,
        agent: Agent,
        state: TrainingState,
        *,
        snapshot: Callable[[], Snapshot],
        restore: Callable[[Mapping[str, Any]], None],
        rehearse: Callable[[Mapping[str, Any]], None],
        replicator: Replicator,
        threads: int = 1,
    ) -> None:
        self.agent = agent
        self.state = state
        self.replicator = replicator
        self.fds: list[int] = []
        self._snapshot = snapshot
        self._restore = restore
        self._rehearse = rehearse
        self._threads = threads
        self._ring: Ring | None = None
        self._pinned: Pinned | None = None
        self._plan: ImagePlan | None = None
        self._cut: Snapshot | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="drivetrain-prepare")
        self._preparing: Future[None] | None = None
        agent.on_orphaned = self._abort_ring

    def plan(self, now: Snapshot | None = None) -> ImagePlan:
        """The image of the state's tensors as they are now (in ``now``, if that was just taken)."""
        found = self.state.tensors() if now is None else now.capture.tensors
        tensors = list(found.values())
        if self._plan is None or not same_memory(self._plan, tensors):
            self._plan = ImagePlan([flat(tensor) for tensor in tensors])
        return self._plan

    # -- the owner's side -----------------------------------------------------------------

    def serve(self, step: int) -> None:
        """Serve what is queued; returns when the job may go on, raises Moved when it may not."""
        paused = ""
        since = 0.0
        while True:
            message = self.agent.next_request(0.2 if paused else 0.0)
            if self.agent.fenced():
                if message is not None:
                    self.agent.answer(message)
                raise Moved("another copy owns this job")
            if message is None:
                if not paused:
                    return
                if paused != "move" or time.monotonic() - since < _STALL_S:
                    continue
                message = Message("orphaned", {})
            try:
                now = self._serve_one(message, step, paused)
            except (DrivetrainError, OSError, RuntimeError) as error:
                self.agent.answer_error(message, error)
                continue
            if now != paused:
                since = time.monotonic()
            paused = now

    def _serve_one(self, message: Message, step: int, paused: str) -> str:
        """Serve one request of the owner; whether (and for what) it is paused afterwards."""
        agent = self.agent
        if message.op == "manifest":
            began = time.monotonic()
            now = self._snapshot()
            agent.answer(
                message,
                facts=now.facts,
                tree=now.tree,
                step=step,
                nbytes=self.plan(now).nbytes,
                median_ns=agent.page.median_ns,
                took_s=time.monotonic() - began,
            )
        elif message.op == "prepare":
            self._prepare(message)
        elif message.op == "pause":
            paused = str(message.body.get("why", "user"))
            self._pause(message, step)
        elif message.op == "send":
            hashes, seconds = self._send(bool(message.body.get("host_only")))
            waited_s = self._attached().waited_s
            agent.answer(message, hashes=hashes, seconds=seconds, waited_s=waited_s)
        elif message.op == "export":
            agent.answer(message, tensors=self._export())
        elif message.op in ("save", "checkpoint"):
            agent.answer(message, **self._save(step, bool(message.body.get("to_disk", True))))
        elif message.op in ("resume", "abort"):
            self._drop_ring()
            crash_point("source.resumed")
            agent.state = "running"
            agent.answer(message)
            paused = ""
        elif message.op in ("release", "stop"):
            crash_point("source.released")
            agent.answer(message)
            raise Moved("the job goes on elsewhere" if message.op == "release" else "stopped")
        elif message.op == "orphaned":
            if paused == "move":
                if not agent.reclaim():
                    raise Moved("the job goes on elsewhere")
                agent.state = "running"
                self._drop_ring()
                paused = ""
        elif message.op == "adopted":
            agent.event("loop", step=step, nbytes=agent.page.state_bytes)
        else:
            message.close_fds()
            agent.answer(message, "error", error=f"a running owner does not serve {message.op!r}")
        return paused

    def _pause(self, message: Message, step: int) -> None:
        self.replicator.wait()
        self._cut = self._snapshot()
        self.agent.state = "paused"
        crash_point("source.paused")
        page = self.agent.page
        self.agent.answer(
            message,
            step=step,
            facts=self._cut.facts,
            tree=self._cut.tree,
            nbytes=self.plan(self._cut).nbytes,
            step_end_ns=page.step_end_ns,
            median_ns=page.median_ns,
        )

    def _save(self, step: int, to_disk: bool) -> dict[str, Any]:
        """The whole state, hashed, into a replica slot or straight into a checkpoint."""
        if not to_disk:
            if not self.replicator.enabled:
                raise MigrationError("replicas are off for this job: use --to-disk")
            self.replicator.capture(step, together=True)
            return {"step": step, "hash": self.replicator.last_hash, "path": ""}
        self.replicator.wait()
        now = self._snapshot()
        plan = self.plan()
        buffer = bytearray(plan.nbytes)
        hashes = [0] * chunks(plan.nbytes)
        if plan.nbytes:
            combine(hashes, plan.read_into(_address(buffer), 0, plan.nbytes, self._threads))
        digest = state_hash(hashes, now.tree)
        path = save_checkpoint(self.agent, memoryview(buffer), step, now.facts, now.tree, digest)
        return {"step": step, "hash": digest, "path": str(path)}

    def _export(self) -> list[list[Any]]:
        """[image offset, bytes, handle, offset in it] of each tensor in device memory."""
        plan = self.plan()
        there = [
            (offset, flat)
            for offset, flat in zip(plan.offsets, plan.flats, strict=True)
            if flat.device.type == "cuda" and flat.numel()
        ]
        if there:
            torch.cuda.synchronize(there[0][1].device)
        handles = cuda_ipc.export([flat.data_ptr() for _, flat in there])
        return [
            [offset, flat.numel(), handle, inside]
            for (offset, flat), (handle, inside) in zip(there, handles, strict=True)
        ]

    def _host_plan(self) -> ImagePlan:
        """The image of just the tensors in host memory: what a peer copy leaves over."""
        return ImagePlan([flat for flat in self.plan().flats if flat.device.type == "cpu"])

    def _send(self, host_only: bool) -> tuple[list[int], float]:
        """Pour the image through the ring; the chunk hashes of what passed, and the seconds."""
        began = time.monotonic()
        if host_only:
            self._pour(self._host_plan())
            return self.plan(self._cut).hashes(self._threads), time.monotonic() - began
        return self._pour(self.plan(self._cut)), time.monotonic() - began

    def _pour(self, plan: ImagePlan) -> list[int]:
        hashes = passing.pour(plan, self._attached(), self.state.device, self._threads)
        crash_point("source.sent")
        return hashes

    # -- the target's side ----------------------------------------------------------------

    def await_ownership(self) -> None:
        """Serve as a copy without the job until it owns it; Moved when it never will."""
        agent = self.agent
        while True:
            message = agent.next_request(None)
            assert message is not None
            if message.op == "commit":
                agent.become_owner(int(message.body["epoch"]))
                agent.answer(message)
                return
            if message.op == "orphaned":
                epoch = agent.epoch_in_journal()
                if epoch:
                    agent.become_owner(epoch)
                    return
                if self.fds:
                    continue  # a replica is held here: somebody may come for it
                raise Moved("the runtime was gone before this copy owned the job")
            if message.op in ("abort", "stop"):
                agent.answer(message)
                raise Moved("not needed")
            try:
                self._serve_target(message)
            except (
                DrivetrainError,
                RuntimeError,
                ValueError,
                KeyError,
                TypeError,
                OSError,
            ) as error:
                agent.answer_error(message, error)

    def _serve_target(self, message: Message) -> None:
        agent, body = self.agent, message.body
        if message.op == "prepare":
            self._prepare(message)
        elif message.op == "manifest":
            now = self._snapshot()
            agent.answer(message, facts=now.facts, tree=now.tree, nbytes=self.plan().nbytes)
        elif message.op == "receive":
            host_only = bool(body.get("host_only"))
            began = time.monotonic()
            self._receive(json.loads(body["facts"]), int(body["nbytes"]), host_only)
            seconds = time.monotonic() - began
            crash_point("target.received")
            hashes = [] if host_only else self.plan().hashes(self._threads)
            waited_s = self._attached().waited_s
            agent.answer(message, hashes=hashes, seconds=seconds, waited_s=waited_s)
        elif message.op == "export":
            agent.answer(message, tensors=self._export())
        elif message.op == "hash":
            agent.answer(message, hashes=self.plan().hashes(self._threads))
        elif message.op == "restore":
            began = time.monotonic()
            if body.get("rehearse"):
                self.state.materialise(json.loads(body["facts"]))
                self._rehearse(json.loads(body["tree"]))
            else:
                self._restore(json.loads(body["tree"]))
                crash_point("target.restored")
            agent.answer(message, seconds=time.monotonic() - began)
        elif message.op == "replica":
            self._hold(message)
            agent.answer(message)
        elif message.op == "restore_replica":
            if message.fds:
                self._hold(message)
            agent.answer(message, **self._restore_replica())
        elif message.op == "restore_checkpoint":
            agent.answer(message, **self._restore_checkpoint(Path(body["path"])))
        elif message.op == "adopted":
            agent.event("ready", timings={})
        else:
            message.close_fds()
            agent.answer(message, "error", error=f"a waiting copy does not serve {message.op!r}")

    def _hold(self, message: Message) -> None:
        """Keep the replica's descriptors: this copy may be all that is left of the job."""
        for fd in self.fds:
            os.close(fd)
        self.fds = list(message.fds)
        message.fds = []
        self.agent.replica_fds = self.fds

    def _receive(self, facts: dict[str, Any], nbytes: int, host_only: bool) -> None:
        self.state.materialise(facts)
        plan = self._receiving_plan(nbytes)
        if host_only:
            plan = self._host_plan()
        passing.take(plan, self._attached(), self.state.device, self._threads)

    def _receiving_plan(self, nbytes: int) -> ImagePlan:
        plan = self.plan()
        if plan.nbytes != nbytes:
            raise MigrationError(
                f"the arriving state has {nbytes} bytes, this copy's {plan.nbytes}: the script "
                "builds something else here"
            )
        return plan

    def _restore_replica(self) -> dict[str, Any]:
        """The newest replica whose bytes are right, into this copy; a damaged one is named."""
        slots = [Slot.attach(fd) for fd in self.fds]
        damaged: list[Slot] = []
        problems: list[str] = []
        try:
            for slot in newest_first(slots):
                try:
                    step, _epoch, meta = slot.read()
                    found = json.loads(meta)
                    facts, tree = found["facts"], typed.dumps(found["tree"])
                    done = self._fill(facts, tree, found["hash"], step, slot.image())
                except IntegrityError as error:
                    damaged.append(slot)
                    problems.append(str(error))
                    continue
                # Only now: had this device spoilt the bytes, the replicas would be sound.
                for slot_before, problem in zip(damaged, problems, strict=True):
                    slot_before.spoil()
                    self.agent.notice(f"{problem}; going on from the replica of step {step}")
                return done
            raise MigrationError("; ".join(problems) or "no replica was ever completed")
        finally:
            for slot in slots:
                slot.close()

    def _restore_checkpoint(self, path: Path) -> dict[str, Any]:
        loaded = load_checkpoint(path)
        image = bytearray(loaded.nbytes)
        if image:
            loaded.read_into(_address(image))
        return self._fill(
            loaded.facts, loaded.tree_json, loaded.state_hash, loaded.step, memoryview(image)
        )

    def _fill(
        self, facts: Mapping[str, Any], tree: bytes, digest: str, step: int, image: memoryview
    ) -> dict[str, Any]:
        """A saved state into this copy, verified from this copy's own tensors."""
        self.state.materialise(facts)
        plan = self._receiving_plan(image.nbytes)
        if image.nbytes:
            plan.write_from(_address(image), 0, image.nbytes, self._threads)
        if state_hash(plan.hashes(self._threads), tree) != digest:
            raise IntegrityError(f"the saved state of step {step} does not match its hash")
        self._restore(json.loads(tree))
        return {"step": step, "hash": digest}

    # -- both -----------------------------------------------------------------------------

    def _prepare(self, message: Message) -> None:
        """Attach and touch the ring off the main thread: the owner keeps training."""
        self._drop_ring()
        fd = message.fds.pop()

        def attach() -> None:
            try:
                ring = Ring.attach(fd)
                ring.touch()
                self._pinned = Pinned(ring.address, ring.nbytes, self.state.device)
                passing.warm(self.state.device, self._threads)
            except DrivetrainError as error:
                self.agent.answer(message, "error", error=str(error))
            else:
                self._ring = ring
                self.agent.answer(message)
            finally:
                os.close(fd)

        self._preparing = self._pool.submit(attach)

    def _attached(self) -> Ring:
        if self._preparing is not None:
            self._preparing.result()
        if self._ring is None:
            raise MigrationError("no segment was prepared for this move")
        return self._ring

    def _abort_ring(self) -> None:
        """The runtime is gone, and with it the move: neither side waits for the other."""
        ring = self._ring
        if ring is not None:
            with contextlib.suppress(ValueError):  # it was closed just now
                ring.abort()

    def _drop_ring(self) -> None:
        if self._preparing is not None:
            self._preparing.result()
            self._preparing = None
        if self._pinned is not None:
            self._pinned.close()
            self._pinned = None
        if self._ring is not None:
            self._ring.close()
            self._ring = None

    def close(self) -> None:
        """Let go of the segment and the helper thread."""
        self._drop_ring()
        self._pool.shutdown(wait=False)


def _address(buffer: bytearray | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))

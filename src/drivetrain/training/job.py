"""``TrainingJob``: the script's side of a job, and the loop that can change its process.

The step contract: a step is complete, and its state captured, only when the loop asks for the next
one or ends; the lines after the ``with`` belong to it. In a process the device never changes: a
move always goes on in another process from the last capture.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from drivetrain.errors import BadInput, CannotCarry, JobError, Moved
from drivetrain.migration.integrity import state_hash
from drivetrain.pytorch import tree as typed
from drivetrain.pytorch.dense import Spec
from drivetrain.pytorch.hashing import ImagePlan
from drivetrain.pytorch.loader import LoaderPosition
from drivetrain.pytorch.place import place as place_on
from drivetrain.pytorch.place import place_batch
from drivetrain.pytorch.state import TrainingState
from drivetrain.runtime import agent as agents
from drivetrain.runtime.agent import Agent
from drivetrain.runtime.channel import Message
from drivetrain.runtime.status import EPOCH
from drivetrain.training.arguments import device_for_this_job, named, once_key, refuse_ranks
from drivetrain.training.batches import Batches
from drivetrain.training.endpoint import Endpoint
from drivetrain.training.leaving import left_on_purpose
from drivetrain.training.locals import Watcher
from drivetrain.training.pace import Pace
from drivetrain.training.replication import Replicator, Snapshot
from drivetrain.training.step import Step, StepGuard

_WATCHED_STEPS = 64


class TrainingJob:
    """A training loop whose state Drivetrain can copy, check and carry to another device.

    ``model``, ``optimizer``, ``scheduler`` and ``scaler`` are one object or a dict of them. They
    are placed on the job's device here; TrainingJob never steps them: passing them makes them
    state. ``loader`` is a DataLoader, a StatefulDataLoader or any re-iterable of batches.
    ``extra`` maps names to further state (modules, tensors, plain values, objects with
    ``state_dict``). ``accumulate=n`` says that the optimizer steps every n-th batch
    (``step.updates``), and ``place=False`` leaves batches where the loader made them.

    Use ``run.vars`` for numbers that must survive a move, ``run.once(fn)`` for what may happen
    once a job, ``run.owner`` to guard outside effects::

        run = TrainingJob(model, optimizer, loader, epochs=3)
        for step in run:
            with step as (x, y):
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                step.log(loss=loss)

    Raises BadInput for arguments that cannot be meant and JobError, before the first step, for
    state that cannot be carried to another process.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        optimizer: Any = None,
        loader: Any = None,
        *,
        epochs: int = 1,
        scheduler: Any = None,
        scaler: Any = None,
        extra: Mapping[str, Any] | None = None,
        accumulate: int = 1,
        place: bool = True,
    ) -> None:
        if loader is None:
            raise BadInput("TrainingJob needs a loader: a DataLoader or any list of batches")
        for name, value in (("epochs", epochs), ("accumulate", accumulate)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BadInput(f"{name} must be a whole number of at least 1, not {value!r}")
        self._agent = agents.current()
        if self._agent is not None:
            refuse_ranks()
        self.vars: dict[str, Any] = {}
        self.device = device_for_this_job()
        self._place = place
        self._models: dict[str, nn.Module] = named(model, "model")
        self._optimizers = named(optimizer, "optimizer")
        self._extra = dict(extra or {})
        movable = [v for v in self._extra.values() if isinstance(v, nn.Module)]
        for thing in [*self._models.values(), *movable, *self._optimizers.values()]:
            place_on(thing, self.device)
        seed = self._agent.seed if self._agent is not None else 0
        self._batches = Batches(
            LoaderPosition.for_loader(loader, seed), epochs=epochs, accumulate=accumulate
        )
        self._state = TrainingState(
            models=self._models,
            optimizers=self._optimizers,
            schedulers=named(scheduler, "scheduler"),
            scalers=named(scaler, "scaler"),
            extra=self._extra,
            vars=self.vars,
            loader=self._batches,
            device=self.device,
        )
        self._guard = StepGuard(list(self._models.values()), self.device)
        self._completed = 0
        self._finished = False
        self._nan_told = self._uncarried_told = False
        self._hold_every = 0  # a rehearsal waits after so many steps, until it is told to go on
        self._held = 0
        self._once: dict[str, Any] = {}
        self._pace = Pace()
        self._facts: bytes | None = None
        self._facts_of: list[Spec] | None = None
        self._watcher: Watcher | None = None
        self._replicator: Replicator | None = None
        self._endpoint: Endpoint | None = None
        for each in self._optimizers.values():
            each.register_step_pre_hook(self._before_update)

    # -- for the script -------------------------------------------------------------------

    @property
    def owner(self) -> bool:
        """True only in the copy that owns the job; guard files and messages with it."""
        return self._agent is None or self._agent.owner

    @property
    def handle(self) -> Agent | None:
        """The job as this worker knows it (``job_id``, ``device``); None when run alone."""
        return self._agent

    @property
    def completed(self) -> int:
        """Number of completed steps."""
        return self._completed

    @property
    def epoch(self) -> int:
        """Number of completed epochs."""
        return self._batches.epoch

    def once(self, fn: Callable[..., Any], *args: Any) -> Any:
        """``fn(*args)`` at most once per job; later calls and copies get its JSON result."""
        key = once_key(fn, args)
        if self._agent is not None:
            return self._agent.once(key, lambda: fn(*args))
        if key not in self._once:
            self._once[key] = fn(*args)
        return self._once[key]

    def state_hash(self) -> str:
        """The hash of the whole state as it is now, between two steps or after the loop.

        Equal for two runs that are the same bit for bit: parameters, buffers, optimizer,
        scheduler, generators, loader position, ``vars`` and ``extra``.
        """
        if self._replicator is not None:
            self._replicator.wait()
        now = self._snapshot()
        hashes = ImagePlan(now.capture.flats()).hashes(max(1, torch.get_num_threads()))
        return state_hash(hashes, now.tree)

    def __iter__(self) -> Iterator[Step]:
        if self._finished:
            raise JobError("this TrainingJob's loop has ended; make a new one to train again")
        return self._steps()

    # -- the loop -------------------------------------------------------------------------

    def _steps(self) -> Iterator[Step]:
        agent = self._agent
        self._watcher = Watcher(sys._getframe(1))
        if agent is not None:
            self._bind(agent)
            if agent.role != "owner":
                yield from self._warm(agent)
        open_step: Step | None = None
        began = loop_ns = 0
        try:
            if agent is not None:
                self._own(agent)
            while (fetched := self._batches.next()) is not None:
                batch, updates, ends_epoch = fetched
                attempt = 0
                while True:
                    began = time.monotonic_ns()
                    placed = self._placed(batch)
                    started = time.monotonic_ns()
                    open_step = self._open(placed, updates, ends_epoch, attempt)
                    loop_ns += time.monotonic_ns() - started
                    yield open_step
                    if open_step.ok:
                        break
                    attempt += 1
                step, open_step = open_step, None
                ended = self._complete(step, began, loop_ns)
                loop_ns = time.monotonic_ns() - ended
                self._boundary()
        except GeneratorExit:
            # `break` and `return` complete the step; an exception passing through does not. The
            # interpreter's own end, where nobody called us, is neither.
            left = open_step is not None and open_step.ok and open_step.left
            caller = sys._getframe().f_back
            if left and open_step is not None and caller and left_on_purpose(caller):
                self._complete(open_step, began, loop_ns)
            raise
        finally:
            self._leave()

    def _placed(self, batch: Any) -> Any:
        return place_batch(batch, self.device) if self._place else batch

    def _open(
        self, batch: Any, updates: bool, ends_epoch: bool, attempt: int, *, dry: bool = False
    ) -> Step:
        batches = self._batches
        self._guard.remember(
            gradients=batches.accumulate > 1 and batches.in_epoch % batches.accumulate != 1
        )
        return Step(
            batch,
            index=self._completed,
            epoch=batches.epoch,
            updates=updates,
            ends_epoch=ends_epoch,
            attempt=attempt,
            dry=dry,
            guard=self._guard,
        )

    def _before_update(self, *_: Any) -> None:
        if self._replicator is not None:
            self._replicator.wait()
        self._guard.stepped = True

    def _complete(self, step: Step, began: int, loop_ns: int) -> int:
        """Count a step that began then, and show it; when it ended (ns). ``loop_ns``: what this
        took the step before, and opening this one."""
        if not step.entered:
            raise JobError(
                "the loop went on without entering the step: write `with step as batch:` in it"
            )
        logged = step.logged()
        if step.ends_epoch:
            self._batches.end_epoch()
        ended = time.monotonic_ns()
        agent = self._agent
        if agent is not None and agent.page.words[EPOCH] != agent.epoch:
            raise Moved("another copy owns this job")
        self._completed += 1
        self._pace.completed(ended - began, loop_ns)
        if logged:
            self._tell_nan(logged)
        if agent is not None:
            self._pace.publish(agent, self._completed, ended, logged, self.device)
        return ended

    def _tell_nan(self, logged: Mapping[str, Any]) -> None:
        if self._nan_told:
            return
        for name, value in logged.items():
            if isinstance(value, float) and value != value:
                self._nan_told = True
                self._say(f"step {self._completed}: {name} is NaN (said once; training goes on)")

    def _boundary(self) -> None:
        """Between two steps: name what would not move, replicate, serve the runtime."""
        if self._watcher is not None and self._completed <= _WATCHED_STEPS:
            for name, line in self._watcher.observe():
                self._say(
                    f"line {line}: {name} changes from step to step and is not in run.vars: "
                    "it does not move with the job"
                )
                if self._agent is not None:
                    self._agent.event("told", kind="carried", name=name, line=line)
        agent, replicator = self._agent, self._replicator
        if agent is None or replicator is None:
            return
        due = replicator.due(self._completed)
        asked = due or agent.attention or self._hold_every
        if not asked or not self._batches.at_cut:
            return
        if self._hold_every and self._completed - self._held >= self._hold_every:
            self._held = self._completed
            agent.requeue(Message("pause", {"why": "rehearsal"}))
            agent.event("told", kind="held", step=self._completed)
        if agent.attention or due:
            agent.flush_steps()
        if agent.attention and self._endpoint is not None:
            # First, so that a pause for a move does not wait for a replica as well.
            self._endpoint.serve(self._completed)
        if due and replicator.due(self._completed):  # serving may have taken one
            self._replicate(agent, replicator)

    def _replicate(self, agent: Agent, replicator: Replicator) -> None:
        """Take a replica. What came to be in the state later and cannot be carried does not end
        the training: it is said once, and the newest replica stays an older one."""
        try:
            replicator.capture(self._completed)
        except CannotCarry as error:
            if not self._uncarried_told:
                self._uncarried_told = True
                self._say(f"no replica, and no move, from step {self._completed} on: {error}")
            return
        replicator.tune(self._pace.median_ns / 1e9, self._pace.loop_s)
        agent.page.replicate_every = replicator.every

    def _say(self, text: str) -> None:
        if self._agent is None:
            print(f"drivetrain: {text}", file=sys.stderr, flush=True)
        elif self._agent.owner:
            self._agent.notice(text)

    # -- under the runtime ------------------------------------------------------------------

    def _bind(self, agent: Agent) -> None:
        agent.in_loop = True
        self._hold_every = int(agent.options.get("hold_every") or 0)
        self._replicator = Replicator(self._state, agent, self._snapshot)
        self._endpoint = Endpoint(
            agent,
            self._state,
            snapshot=self._snapshot,
            restore=self._restore,
            rehearse=self._rehearse,
            replicator=self._replicator,
            threads=max(1, torch.get_num_threads()),
        )

    def _snapshot(self) -> Snapshot:
        """This boundary: live tensors, what both sides of a move compare, and the tree."""
        batches = self._batches
        capture = self._state.capture(
            {
                "completed": self._completed,
                "epoch": batches.epoch,
                "in_epoch": batches.in_epoch,
                "done": batches.done,
            }
        )
        if self._facts is None or self._facts_of is not capture.specs:
            self._facts_of = capture.specs  # the same list as long as no tensor is new
            facts = self._state.manifest_facts()
            facts["loop"] = {"epochs": batches.epochs, "accumulate": batches.accumulate}
            self._facts = typed.dumps(facts)
        return Snapshot(capture, self._facts, typed.dumps(capture.tree))

    def _restore(self, tree: Mapping[str, Any]) -> None:
        """Make the tree's state this process's: the loader, then the generators last."""
        self._restore_counted(tree)
        if not self._batches.done:
            self._state.restore_loader(tree)
        self._state.restore_rng(tree)

    def _restore_counted(self, tree: Mapping[str, Any]) -> None:
        self._batches.reset()
        counters = self._state.restore_tree(tree)
        self._completed = counters["completed"]
        self._batches.epoch = counters["epoch"]
        self._batches.in_epoch = counters["in_epoch"]
        for model in self._models.values():
            model.zero_grad(set_to_none=True)
        self._facts = None

    def _rehearse(self, tree: Mapping[str, Any]) -> None:
        """Restore as in a move, fetch one batch, and stop the loader again."""
        self._restore(tree)
        if not self._batches.done:
            self._batches.next()
        self._batches.reset()

    def _warm(self, agent: Agent) -> Iterator[Step]:
        """A copy without the job: warm up, then wait until the job is given to it."""
        assert self._endpoint is not None
        timings: dict[str, float] = {}
        began = time.monotonic()
        if agent.options.get("warm", "step") == "step":
            for name in ("first_ms", "dry_ms"):  # the first one compiles
                batch = self._batches.first()
                started = time.monotonic()
                yield self._open(self._placed(batch), True, False, 0, dry=True)
                timings[name] = (time.monotonic() - started) * 1e3
                self._batches.reset()
        timings["warm_s"] = time.monotonic() - began
        agent.state = "waiting"
        agent.event("ready", timings=timings)
        try:
            self._endpoint.await_ownership()
        except Moved:
            self._leave()
            raise

    def _own(self, agent: Agent) -> None:
        """This copy owns the job: the first replica also refuses, at step 0, what cannot move."""
        replicator, endpoint = self._replicator, self._endpoint
        assert replicator is not None
        assert endpoint is not None
        self._batches.begin()
        if self._completed == 0:
            try:
                if replicator.enabled:
                    replicator.capture(0, together=True)
                else:
                    self._snapshot()
            except CannotCarry as error:
                raise JobError(f"{error} (found at step 0, before any training)") from error
        else:
            replicator.continue_in(endpoint.fds, self._completed)
        self._held = self._completed
        page = agent.page
        page.restored_step = page.step = self._completed
        page.state_bytes = endpoint.plan().nbytes
        page.replicate_every = replicator.every
        agent.event(
            "loop",
            step=self._completed,
            nbytes=page.state_bytes,
            drift=self._batches.drift,
        )

    def _leave(self) -> None:
        if self._finished:
            return
        self._finished = True
        if self._agent is not None:
            self._agent.flush_steps()
            self._agent.end_loop()
        try:
            self._batches.close()
        finally:
            if self._replicator is not None:
                self._replicator.close()
            if self._endpoint is not None:
                self._endpoint.close()

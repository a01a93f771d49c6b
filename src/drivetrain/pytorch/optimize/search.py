"""Which steps to take: each on top of the best so far, cheap ones first, compiling ones few.

Steps that only set something up are measured on the model as it runs (on CUDA inside a captured
graph, so that launches do not hide what a step gains). Only what is best then is compiled, and
again with the choices that compiling may turn: a handful of compilations, where trying every
combination would take one for each.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer

from drivetrain.errors import DeviceLost
from drivetrain.pytorch.optimize.capabilities import lost
from drivetrain.pytorch.optimize.measuring import ROUNDS, Call, Comparison, compare, memory
from drivetrain.pytorch.optimize.report import Trial
from drivetrain.pytorch.optimize.steps import GROUPS, MOST_CONVOLVED, Step
from drivetrain.pytorch.optimize.subject import Subject
from drivetrain.pytorch.optimize.wrapped import Build

__all__ = ["COMPILATIONS", "Candidate", "Plan", "Search", "build", "protected"]

Plan = tuple[Step, ...]

COMPILATIONS = 6
"""At most this many plans are compiled in one search."""
FIRST_COMPILATION_S = 5.0
"""What the first one is thought to take, where seconds are counted."""
GAIN = 1.01
"""A step is kept when it makes a call this many times faster (or smaller), or more."""
GRAPHED = ("cuda-graph", "compile-reduce-overhead", "compile-max-autotune")
MARGIN = 1.25
"""Inputs that were not seen may come out a little worse than those that were."""
WORTH = 0.6
"""A choice that lost by no more than this may win when it is compiled for a GPU."""
HALVED = ("bf16-weights", "fp16-weights")
NEAR = 1.1
"""The half type that lost by no more than this is compiled too; on a processor any choice."""
CLOSE = 1.05
"""Candidates within this factor of each other are measured in `CLOSE_ROUNDS`, and the last of them
that lost once more at the end: a few hundredths are less than a busy machine's noise."""
CLOSE_ROUNDS = 27


@dataclass
class Candidate:
    """A plan made real."""

    plan: Plan
    model: nn.Module
    optimizer: Optimizer | None
    call: Call
    restore: Callable[[], None]
    speedup: float = 1.0
    """Over the model as it was given."""
    before: float = 1.0
    """The speed-up of what was best when this was tried."""
    seconds: float = 0.0
    error: float = 0.0
    nbytes: int | None = None
    sure: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(step.name for step in self.plan)


def with_step(plan: Plan, step: Step) -> Plan:
    """The plan with ``step`` in its group's place."""
    rest = [s for s in plan if s.group != step.group or step.group == "own"]
    return tuple(sorted([*rest, step], key=lambda each: GROUPS.index(each.group)))


def build(
    subject: Subject, plan: Plan, onto: tuple[nn.Module, Optimizer | None] | None = None
) -> Candidate:
    """The plan applied to a copy of the model, or to ``onto``. Steps' own exceptions come out."""
    module, optimizer = onto or subject.copy()
    made = Build(module, optimizer, output_dtype=subject.output_dtype)
    for step in plan:
        step.change(made)
    model: nn.Module = made.tuned() if plan else module
    restore = protected(made.module, optimizer)
    return Candidate(plan, model, optimizer, subject.workload(model, optimizer), restore)


def protected(module: nn.Module, optimizer: Optimizer | None) -> Callable[[], None]:
    """What gives the model and its optimizer back the values that they have now."""
    if not module.training:
        return lambda: None
    tensors = [(t, t.detach().clone()) for t in (*module.parameters(), *module.buffers())]
    gradients = [(p, p.grad) for p in module.parameters()]
    state = copy.deepcopy(optimizer.state_dict()) if optimizer is not None else None
    for parameter, _ in gradients:
        parameter.grad = None  # the step that is measured begins without any

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in tensors:
                tensor.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        if optimizer is not None and state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))  # it keeps what it is given

    return restore


@dataclass
class Search:
    """One search. ``trials`` grows while it goes; ``best`` is always a usable answer."""

    subject: Subject
    steps: Sequence[Step]
    objective: str
    tolerance: float
    seconds: float | None
    """What the whole may take; checked before each step, not within one."""
    progress: Callable[[str], None] = lambda what: None
    fatal: frozenset[str] = frozenset()
    """Steps that took the device down in an earlier process."""
    trials: list[Trial] = field(default_factory=list)
    compilations: int = 0
    _lost: dict[str, float] = field(default_factory=dict)
    """Steps that were right and slower -> by which factor."""
    _longest: dict[bool, float] = field(default_factory=dict)
    _close: Candidate | None = None
    """The last that was right and lost by little to what is best now."""

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        subject = self.subject
        call = subject.workload(subject.model, subject.optimizer)
        restore = protected(subject.model, subject.optimizer)
        self.eager = Candidate((), subject.model, subject.optimizer, call, restore)
        self.eager.error = subject.own_error
        self.best = self.eager
        self._size(self.eager)

    def run(self) -> Candidate:
        """The best plan that is as good as the model as it is, or better; the latter if none is."""
        gates = {step.name: self._gate(step) for step in self.steps}
        for name, reason in gates.items():
            if reason:
                self.trials.append(Trial(name, "not tried", reason))
        open_ = [step for step in self.steps if not gates[step.name]]
        for step in open_:
            if not step.compiles:
                self.consider(step)
        self._compile([step for step in open_ if step.compiles])
        return self._confirmed()

    def _gate(self, step: Step) -> str:
        if step.name in self.fatal:
            return "it took the device down in an earlier process"
        try:
            return step.gate(self.subject)
        except Exception as error:  # a gate of somebody's own step
            return f"its gate raised {told(error)}"

    # -- order ------------------------------------------------------------------------------------

    def _compile(self, steps: list[Step]) -> None:
        if self._products_are_the_librarys():
            steps = self._without_tuning(steps)
        modes = [step for step in steps if step.group == "execution"]
        others = [step for step in steps if step.group != "execution"]
        tried: set[str] = set()
        base = None
        for step in modes[:2]:  # reduce-overhead where graphs are, else default
            tried.add(step.name)
            if self.consider(step) is not None:
                base = step
                break
        if base is not None and base in self.best.plan:
            known = {step.name: step for step in self.steps}
            again = sorted(self._lost.items(), key=lambda item: -item[1])
            for name, _ in [pair for pair in again if self._may_turn(known[pair[0]], pair[1])][:2]:
                self.consider(known[name], compiling=True)
        for step in others:
            if step.group != "attention":
                continue
            if base is None or base not in self.best.plan:
                self._skip(step, "it is fast only when compiled, and compiling gained nothing")
            else:
                self.consider(step)
        for step in modes:
            if step.name in tried:
                continue
            if step.name == "compile-default" and base is not None:
                self._skip(step, f"{base.name} is the same code with fewer launches")
            elif step.name == "compile-max-autotune-no-cudagraphs" and self._has("max-autotune"):
                self._skip(step, "compile-max-autotune is the same code with fewer launches")
            else:
                self.consider(step)
        for step in others:
            if step.group != "attention":
                self.consider(step)

    def _may_turn(self, step: Step, factor: float) -> bool:
        """Whether compiling may make a choice win that lost by ``factor``: compiled code fuses the
        casts of autocast and the copies between layouts, and a GPU is not kept waiting for their
        launches. Weights of half the size have no casts left, and then it is between the two half
        types: the library has other kernels for each."""
        worth = 1 / NEAR if self.subject.device.type == "cpu" else WORTH
        if step.group == "precision":
            halved = any(each.name in HALVED for each in self.best.plan)
            if step.name in HALVED:
                return halved and factor >= 1 / NEAR
            return step.name.endswith("-autocast") and not halved and factor >= worth
        return step.group in ("layout", "attention") and factor >= worth

    def _products_are_the_librarys(self) -> bool:
        """Nothing is left to tune on a processor: its convolutions and its float32 products may
        gain a little, products of half the size have instructions that the library uses best."""
        return (
            self.subject.device.type == "cpu"
            and self.subject.convolved <= MOST_CONVOLVED
            and any(step.name in HALVED for step in self.best.plan)
        )

    def _without_tuning(self, steps: list[Step]) -> list[Step]:
        for step in steps:
            if "autotune" in step.name:
                self._skip(
                    step,
                    "on a processor the library's matrix products of half the size are as fast as "
                    "tuned ones, and tuning takes as long as compiling",
                )
        return [step for step in steps if "autotune" not in step.name]

    def _has(self, mode: str) -> bool:
        return any(t.step == f"compile-{mode}" and t.seconds is not None for t in self.trials)

    def _skip(self, step: Step, reason: str) -> None:
        self.trials.append(Trial(step.name, "not tried", reason))

    # -- one step ---------------------------------------------------------------------------------

    def consider(self, step: Step, *, compiling: bool = False) -> Candidate | None:
        """Tries ``step`` on top of the best; it becomes the best where it should. None where it
        could not be measured or was wrong."""
        plan = with_step(self.best.plan, step)
        on = tuple(each.name for each in plan if each is not step)
        replaced = [each for each in self.best.plan if each not in plan]
        candidate = self._try(step.name, plan, on, compiling=compiling or step.compiles)
        if candidate is None:
            return None
        factor = candidate.speedup / candidate.before
        if candidate is self.best:
            self._lost.pop(step.name, None)
            self._lost.update((each.name, 1 / factor) for each in replaced)
        elif not (compiling or step.compiles):
            self._lost[step.name] = factor
        return candidate

    def _try(
        self, name: str, plan: Plan, on: tuple[str, ...], *, compiling: bool
    ) -> Candidate | None:
        reason = self._over_budget(compiling)
        if reason:
            self.trials.append(Trial(name, "not tried", reason))
            return None
        self.compilations += compiling
        self.progress(name)
        began = time.monotonic()
        try:
            candidate = build(self.subject, plan)
            candidate.error = self.subject.error(candidate.model)
            spent = time.monotonic() - began
            if not candidate.error * MARGIN <= self.tolerance:
                why = f"results are {candidate.error:.1e} away, {self.tolerance:g} is allowed"
                if candidate.error <= self.tolerance:
                    why += f" with a margin of {MARGIN:g} for inputs not seen"
                self.trials.append(
                    Trial(name, "rejected", why, on, error=candidate.error, spent_s=spent)
                )
                return None
            self._measure(candidate)
        except Exception as error:  # whatever a compiler, a library or somebody's step raises
            spent = time.monotonic() - began
            self.trials.append(Trial(name, "failed", told(error), on, spent_s=spent))
            reason = lost(self.subject.device)
            if reason:
                raise DeviceLost(
                    f"the step {name} on top of {' + '.join(on) or 'nothing'} left "
                    f"{self.subject.device} unusable for this process: {reason}. Start another one "
                    f"and leave the step out: skip=[{name!r}]",
                    code="device_lost",
                    op=name,
                    device=str(self.subject.device),
                ) from error
            return None
        finally:
            spent = time.monotonic() - began
            self._longest[compiling] = max(spent, self._longest.get(compiling, 0.0))
        better, why = self._better(candidate)
        self.trials.append(
            Trial(
                name,
                "kept" if better else "not kept",
                why,
                on,
                candidate.seconds,
                candidate.speedup,
                candidate.error,
                candidate.nbytes,
                spent,
            )
        )
        candidate.before = self.best.speedup
        factor = candidate.speedup / candidate.before
        if better:
            self._close = self.best if factor < CLOSE and self.best is not self.eager else None
            self.best = candidate
        elif factor > 1 / CLOSE:
            self._close = candidate
        return candidate

    def _over_budget(self, compiling: bool) -> str:
        if compiling and self.compilations >= COMPILATIONS:
            return f"{COMPILATIONS} plans were compiled; that is the limit of one search"
        if self.seconds is None:
            return ""
        left = self.seconds - (time.monotonic() - self.started)
        needs = self._longest.get(compiling, FIRST_COMPILATION_S if compiling else 0.0)
        if left > needs:
            return ""
        return (
            f"it takes about {needs:.1f} s, and {max(left, 0):.1f} of {self.seconds:g} s are left"
        )

    def _measure(self, candidate: Candidate) -> None:
        found = self.against(self.best, candidate)
        if 1 / CLOSE < found.speedup < CLOSE and self.objective != "memory":
            found = self.against(self.best, candidate, CLOSE_ROUNDS)
        candidate.seconds, candidate.sure = found.new_s, found.sure
        candidate.speedup = self.best.speedup * found.speedup
        if self.best is self.eager:
            self.eager.seconds = found.old_s
        self._size(candidate)

    def _size(self, candidate: Candidate) -> None:
        graphs = any(step.name in GRAPHED for step in candidate.plan)
        if self.objective == "memory" or (self.subject.device.type == "cuda" and not graphs):
            device = self.subject.device
            candidate.nbytes = memory(candidate.call, [candidate.model], device)
        candidate.restore()

    def against(self, old: Candidate, new: Candidate, rounds: int = ROUNDS) -> Comparison:
        """Both measured in turns; what training did to them is taken back."""
        try:
            return compare(
                old.call,
                new.call,
                self.subject.device,
                pipelined=self.objective == "throughput",
                rounds=rounds,
            )
        finally:
            old.restore()
            new.restore()

    def _better(self, candidate: Candidate) -> tuple[bool, str]:
        best = self.best
        if self.objective == "memory":
            assert candidate.nbytes is not None
            assert best.nbytes is not None
            ratio = best.nbytes / max(candidate.nbytes, 1)
            word = "smaller"
        else:
            ratio, word = candidate.speedup / best.speedup, "faster"
        if ratio >= GAIN and not candidate.sure and word == "faster":
            return False, f"x{ratio:.2f} faster than before, but not in three of four rounds"
        if ratio >= GAIN:
            return True, f"x{ratio:.2f} {word} than before"
        return False, f"no {word}: x{ratio:.2f} of what is best so far"

    def _confirmed(self) -> Candidate:
        """The best against the model as it is, once more: never slower (or larger) than that."""
        if self.best is self.eager:
            if not self.eager.seconds:
                found = self.against(self.eager, self.eager)
                self.eager.seconds = found.old_s
            return self.eager
        self._run_off()
        found = self.against(self.eager, self.best)
        self.eager.seconds, self.best.seconds = found.old_s, found.new_s
        self.best.speedup = found.speedup
        if self.objective != "memory" and found.speedup < 1:
            self.trials.append(
                Trial(
                    " + ".join(self.best.names),
                    "not kept",
                    f"measured once more it is x{found.speedup:.2f} of the model as it is",
                    seconds=found.new_s,
                    speedup=found.speedup,
                    error=self.best.error,
                )
            )
            self.best = self.eager
        return self.best

    def _run_off(self) -> None:
        """The best against the last that lost by little, once more, both as they are used now."""
        close = self._close
        if close is None or close.plan == self.best.plan or self.objective == "memory":
            return
        began = time.monotonic()
        found = self.against(self.best, close, CLOSE_ROUNDS)
        better = found.speedup >= GAIN and found.sure
        won = f"measured once more it is x{found.speedup:.2f} of {' + '.join(self.best.names)}"
        self.trials.append(
            Trial(
                " + ".join(close.names),
                "kept" if better else "not kept",
                won,
                seconds=found.new_s,
                speedup=self.best.speedup * found.speedup,
                error=close.error,
                nbytes=close.nbytes,
                spent_s=time.monotonic() - began,
            )
        )
        if better:
            self.best = close


def told(error: Exception) -> str:
    """The first line of what was raised, with its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__

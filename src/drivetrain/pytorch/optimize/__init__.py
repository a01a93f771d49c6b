"""Models tuned to the hardware: what a device offers is tried, measured, and kept where it helps.

::

    found = optimize(model.eval(), "cuda:0", example_inputs=(images,))
    print(found.report)
    with torch.no_grad():
        found.model(images)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drivetrain.errors import BadInput, DeviceLost
from drivetrain.pytorch.devices import torch_device
from drivetrain.pytorch.optimize import cache as caching
from drivetrain.pytorch.optimize import flags
from drivetrain.pytorch.optimize.capabilities import facts_of
from drivetrain.pytorch.optimize.report import Report, Trial
from drivetrain.pytorch.optimize.search import MARGIN, Candidate, Search, build
from drivetrain.pytorch.optimize.steps import Step, builtin
from drivetrain.pytorch.optimize.subject import Arguments, Subject
from drivetrain.pytorch.optimize.wrapped import Build, Tuned

__all__ = ["Build", "Optimized", "Report", "Step", "Trial", "Tuned", "optimize"]

OBJECTIVES = ("latency", "throughput", "memory")
Objective = Literal["latency", "throughput", "memory"]


@dataclass(frozen=True)
class Optimized:
    """What `optimize` found. ``model`` takes and gives what the original took and gave."""

    model: nn.Module
    report: Report
    optimizer: Optimizer | None = None
    """The optimizer that steps ``model``, where one was passed."""


def optimize(
    model: nn.Module,
    device: Any,
    example_inputs: Any,
    *,
    objective: Objective = "latency",
    tolerance: float = 1e-2,
    optimizer: Optimizer | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    steps: Sequence[Step] = (),
    skip: Sequence[str] = (),
    seconds: float | None = None,
    in_place: bool = False,
    cache: bool | Literal["refresh"] = True,
    home: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Optimized:
    """The model as fast (or small) as measured steps make it on ``device``, within ``tolerance``.

    ``device`` is an address, a `hal.Device` or a ``torch.device``. ``example_inputs`` are the
    arguments of one call: a tensor, a tuple of several, or a mapping of those with names; their
    shapes are what is tuned for. In eval mode a call is measured (under ``no_grad``), in training a
    whole step: forward, ``loss`` of the result (its mean square otherwise), backward and
    ``optimizer``.

    A step is kept only when it is at least 1% faster (``latency``: each call waited for;
    ``throughput``: calls queued) or smaller (``memory``), and its results stay within ``tolerance``
    of the model in float32: relative 2-norm, on the example inputs and on perturbed ones, with a
    margin. In training gradients are compared too, within ten times that.

    ``steps`` are further ones of yours (`Step.of`); ``skip`` are patterns of those not to try
    (``compile-*``). ``seconds`` bounds the search; it is asked before each step. The model and
    optimizer that you pass stay as they are, and the result shares no memory with them, unless
    ``in_place``: then the plan found is applied to them. A plan that was found is kept for this
    structure, torch and device; ``cache`` False neither reads nor keeps it, ``refresh`` only keeps.

    Raises BadInput for arguments that cannot be meant and for a model that does not run,
    Unsupported for a device that torch has not (`drivetrain.pytorch.devices`), DeviceLost
    where a step took the device down: the next search, in another process, leaves it out.
    """
    _check(model, objective, tolerance, optimizer, steps, seconds)
    facts = facts_of(torch_device(device))
    started = time.monotonic()
    with flags.kept(facts.device):
        subject = Subject(model, facts, Arguments.of(example_inputs), optimizer, loss, objective)
        offered = (*builtin(subject), *steps)
        names = [step.name for step in offered]
        skipped = {name for name in names if any(fnmatchcase(name, each) for each in skip)}
        for step in steps:
            if names.count(step.name) > 1:
                raise BadInput(f"two steps are called {step.name!r}; rename yours")
        onto = (model, optimizer) if in_place else None
        offered = tuple(step for step in offered if step.name not in skipped)
        key = caching.key_of(subject, model, offered, objective, tolerance)
        if cache is True:
            known = caching.load(key, home=home)
            found = known and _rebuilt(subject, known, offered, tolerance, onto, started)
            if found:
                return found
        search = Search(
            subject, offered, objective, tolerance, seconds, progress or (lambda what: None)
        )
        search.fatal = caching.fatal(key, home=home) if cache is True else frozenset()
        try:
            best = search.run()
        except DeviceLost as error:
            if cache:
                caching.note_fatal(key, error.op, home=home)
            raise
        report = _report(search, best, started)
        if cache and not any("are left" in trial.reason for trial in report.trials):
            caching.save(key, report, home=home)
        if onto is not None:
            best = _onto(subject, best, onto)
        return Optimized(best.model, report, best.optimizer)


def _check(
    model: Any,
    objective: Any,
    tolerance: Any,
    optimizer: Optimizer | None,
    steps: Sequence[Any],
    seconds: Any,
) -> None:
    if not isinstance(model, nn.Module):
        raise BadInput(f"optimize takes a torch.nn.Module, not a {type(model).__name__}")
    if isinstance(model, Tuned):
        raise BadInput("this model was optimised already; pass the one that it was made from")
    if objective not in OBJECTIVES:
        raise BadInput(f"no objective {objective!r}; there are {', '.join(OBJECTIVES)}")
    for name, value in (("tolerance", tolerance), *((("seconds", seconds),) if seconds else ())):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise BadInput(f"{name} must be a number above 0, not {value!r}")
    for step in steps:
        if not isinstance(step, Step):
            raise BadInput(f"a {type(step).__name__} is no step; make one with Step.of")
    if optimizer is None:
        return
    if not model.training:
        raise BadInput("an optimizer was passed with a model in eval mode; call model.train()")
    own = {id(parameter) for parameter in model.parameters()}
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    if not all(id(parameter) in own for parameter in stepped):
        raise BadInput("the optimizer steps parameters that are not the model's")


def _rebuilt(
    subject: Subject,
    known: Report,
    offered: Sequence[Step],
    tolerance: float,
    onto: tuple[nn.Module, Optimizer | None] | None,
    started: float,
) -> Optimized | None:
    """The plan of an earlier search; None where it does not hold for these weights."""
    by_name = {step.name: step for step in offered}
    if any(name not in by_name for name in known.kept):
        return None
    plan = tuple(by_name[name] for name in known.kept)
    if any(step.gate(subject) for step in plan):
        return None
    try:
        candidate = build(subject, plan)
        error = subject.error(candidate.model)
    except Exception:  # whatever a compiler raises: then the search says so
        return None
    if plan and not error * MARGIN <= tolerance:
        return None
    if onto is not None:
        candidate = _onto(subject, candidate, onto)
    report = known.again(error, time.monotonic() - started)
    return Optimized(candidate.model, report, candidate.optimizer)


def _onto(subject: Subject, best: Candidate, onto: tuple[nn.Module, Optimizer | None]) -> Candidate:
    """The plan of ``best`` applied to the caller's own model and optimizer."""
    from drivetrain.pytorch.place import place

    for thing in onto:
        if thing is not None:
            place(thing, subject.device)
    return build(subject, best.plan, onto)


def _report(search: Search, best: Candidate, started: float) -> Report:
    subject, eager = search.subject, search.eager
    return Report(
        device=str(subject.device),
        name=subject.facts.name,
        torch_version=str(torch.__version__),
        objective=search.objective,
        tolerance=search.tolerance,
        training=subject.training,
        kept=best.names,
        seconds_before=eager.seconds,
        seconds_after=best.seconds,
        speedup=best.speedup,
        nbytes_before=eager.nbytes,
        nbytes_after=best.nbytes,
        error=best.error,
        own_error=subject.own_error,
        trials=tuple(search.trials),
        spent_s=time.monotonic() - started,
    )

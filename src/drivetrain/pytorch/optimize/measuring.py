"""Times of calls that are compared, in turns, and the memory of one."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from drivetrain.pytorch.optimize.capabilities import synchronize

__all__ = ["ROUNDS", "Comparison", "compare", "memory"]

ROUNDS = 9
WARM = 3
SAMPLE_S = 0.02
"""A sample lasts about this long: shorter calls are repeated."""
MOST_CALLS = 200
HOPELESS = 0.75
"""A candidate that is this much slower in each of the first `FIRST` rounds is given up."""
FIRST = 3
LONG_S = 0.5
"""Calls longer than this are compared in `FEW` rounds."""
FEW = 5

Call = Callable[[], None]


@dataclass(frozen=True)
class Comparison:
    """Seconds a call, medians of rounds in which both ran one after the other."""

    old_s: float
    new_s: float
    speedup: float
    """The median over the rounds of old / new."""
    rounds: int
    sure: bool
    """New was faster in three of four rounds, so that noise alone does not decide."""
    spread: float
    """Half the distance between the quartiles of old / new, relative to the speed-up."""


def compare(
    old: Call, new: Call, device: torch.device, *, pipelined: bool = False, rounds: int = ROUNDS
) -> Comparison:
    """Compares two calls in interleaved rounds.

    ``pipelined`` queues the calls of a sample one after the other and waits at its end: what counts
    for throughput. Otherwise each is waited for: its latency.
    """
    for call in (old, new):
        for _ in range(WARM):
            call()
    synchronize(device)
    counts = []
    for call in (old, new):
        once = _sample(call, 1, device, pipelined)
        counts.append(max(1, min(MOST_CALLS, math.ceil(SAMPLE_S / max(once, 1e-7)))))
        if once > LONG_S:
            rounds = min(rounds, FEW)
    times: list[tuple[float, float]] = []
    for turn in range(rounds):
        pair = [0.0, 0.0]
        for which in (0, 1) if turn % 2 == 0 else (1, 0):  # neither always comes second
            pair[which] = _sample((old, new)[which], counts[which], device, pipelined)
        times.append((pair[0], pair[1]))
        if turn + 1 == FIRST and all(a < HOPELESS * b for a, b in times):
            break
    ratios = [a / b for a, b in times]
    speedup = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (0.0, 0.0, 0.0)
    return Comparison(
        statistics.median(a for a, _ in times),
        statistics.median(b for _, b in times),
        speedup,
        len(times),
        4 * sum(ratio > 1 for ratio in ratios) >= 3 * len(times),
        (high - low) / 2 / speedup,
    )


def _sample(call: Call, count: int, device: torch.device, pipelined: bool) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
        if not pipelined:
            synchronize(device)
    synchronize(device)
    return (time.perf_counter() - start) / count


def memory(call: Call, models: Sequence[nn.Module], device: torch.device) -> int:
    """Bytes of parameters and buffers, and the most that a call takes beside them."""
    storages = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            for part in _parts(tensor):
                storage = part.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) + _peak(call, device)


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors of a tensor subclass (quantised weights), else the tensor itself."""
    names = getattr(tensor, "__tensor_flatten__", None)
    if names is None:
        return [tensor.detach()]
    found = []
    for name in names()[0]:
        found += _parts(getattr(tensor, name))
    return found


def _peak(call: Call, device: torch.device) -> int:
    call()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    inner = found.profiler
    if inner is None or inner.kineto_results is None:
        return 0
    events = [e for e in inner.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

"""How long a move will stop its job: modelled from what was just measured, and learned from moves.

The model adds what the pause consists of, each part measured a moment before: one noisy sample
each. What earlier moves really took says more, the more of them there are: moves of the same job
most of all (same script, same state), then moves of alike size between such devices.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SMALL = 32 << 20  # bytes; below this they hardly count beside the fixed parts
_NEWEST = 9  # moves that are learned from
_SLOWER = 1.5  # times the usual step, below which a slower first step is noise
_LEAST_S = 1e-3


@dataclass(frozen=True)
class Past:
    """An earlier move between such devices under the same strategy.

    ``modelled_s`` with what the copy really took (``copied_s``) where the bytes count; ``own``
    when it was this job's.
    """

    nbytes: int
    modelled_s: float
    real_s: float
    copied_s: float = 0.0
    own: bool = False

    def alike(self, nbytes: int) -> bool:
        """True when its size was about as much."""
        return self.nbytes <= 4 * nbytes + SMALL and nbytes <= 4 * self.nbytes + SMALL


def slower_step_s(dry_s: float, median_s: float) -> float:
    """What a step takes more on the target, from one dry step there and the source's median."""
    return dry_s - median_s if dry_s > _SLOWER * median_s else 0.0


def predict(nbytes: int, modelled_s: float, passing_s: float, past: Sequence[Past]) -> float:
    """The predicted downtime in seconds; ``past`` oldest first.

    ``passing_s`` is the model's part for the bytes. The model is corrected by the median of what
    earlier moves took more than theirs. n moves of this job's own, less their copies, then count n
    times as much as the corrected model: their median has a fraction of one measurement's noise.
    """
    known = [move for move in past if move.alike(nbytes)]
    model = modelled_s
    if known:
        model += statistics.median(m.real_s - m.modelled_s for m in known[-_NEWEST:])
    own = [move for move in known if move.own][-_NEWEST:]
    if not own:
        return max(model, _LEAST_S)
    fixed = statistics.median(m.real_s - (m.copied_s if m.nbytes >= SMALL else 0.0) for m in own)
    learned = fixed + (passing_s if nbytes >= SMALL else 0.0)
    return max((len(own) * learned + model) / (len(own) + 1), _LEAST_S)

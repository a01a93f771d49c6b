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
_DISTURBED = 1.5
_SAME_S = 1e-4  # closer predictions were not better ones


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
    earlier moves took more than theirs. This job's own moves, less their copies, have a median of
    their own: it sees no change of the machine, and has less noise than one measurement. Both are
    averaged, each by how far it was from what those moves took; of one or two moves, which say
    nothing of that, the median counts once or twice as much as the model. A model that is further
    from the median than by half is taken for a measurement that was disturbed, and moved there.
    """
    known = [move for move in past if move.alike(nbytes)][-_NEWEST:]
    more = statistics.median(m.real_s - m.modelled_s for m in known) if known else 0.0
    model = modelled_s + more
    own = [move for move in past if move.alike(nbytes) and move.own][-_NEWEST:]
    if not own:
        return max(model, _LEAST_S)
    fixed = [m.real_s - (m.copied_s if m.nbytes >= SMALL else 0.0) for m in own]
    learned = statistics.median(fixed) + (passing_s if nbytes >= SMALL else 0.0)
    weight = float(len(own))
    if len(own) > 2:
        missed_s = statistics.median(abs(each - statistics.median(fixed)) for each in fixed)
        model_missed_s = statistics.median(abs(m.real_s - m.modelled_s - more) for m in own)
        weight = (max(model_missed_s, _SAME_S) / max(missed_s, _SAME_S)) ** 2
    if learned > _LEAST_S:
        model = min(max(model, learned / _DISTURBED), learned * _DISTURBED)
    return max((weight * learned + model) / (weight + 1), _LEAST_S)

"""What `optimize` tells: each step, its speed and error, and why it was kept or not."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

__all__ = ["Report", "Trial"]


@dataclass(frozen=True)
class Trial:
    """One step, on top of those that were kept before it."""

    step: str
    verdict: str
    """``kept``, ``not kept``, ``rejected`` (wrong results), ``failed`` or ``not tried``."""
    reason: str = ""
    on: tuple[str, ...] = ()
    """The other steps of the plan that was measured."""
    seconds: float | None = None
    """Of one call, the median."""
    speedup: float | None = None
    """Over the model as it was given."""
    error: float | None = None
    """The largest relative error on the example inputs and on perturbed ones."""
    nbytes: int | None = None
    """Parameters, buffers and the most that a call takes beside them."""
    spent_s: float = 0.0
    """What trying it took."""

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        if self.error is not None and not math.isfinite(self.error):
            found["error"] = None
        return found


@dataclass(frozen=True)
class Report:
    """The outcome for one model on one device. ``print`` shows it as a table."""

    device: str
    name: str
    torch_version: str
    objective: str
    tolerance: float
    training: bool
    kept: tuple[str, ...]
    """The steps of the returned model, in the order in which they were applied; may be none."""
    seconds_before: float
    seconds_after: float
    speedup: float
    nbytes_before: int | None
    """Measured on CUDA, and elsewhere where memory is the objective."""
    nbytes_after: int | None
    error: float
    """Of the returned model against the float32 reference."""
    own_error: float
    """Of the model as it was given."""
    trials: tuple[Trial, ...]
    spent_s: float
    cached: bool = False
    """The plan was found before; only its error was measured anew."""

    def as_json(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found["kept"] = list(self.kept)
        found["trials"] = [trial.as_json() for trial in self.trials]
        return found

    @staticmethod
    def read(found: Any) -> Report | None:
        """A report from what `as_json` gave; None for what is none."""
        try:
            trials = tuple(
                Trial(**{**trial, "on": tuple(trial["on"])}) for trial in found["trials"]
            )
            report = Report(**{**found, "trials": trials, "kept": tuple(found["kept"])})
        except (KeyError, TypeError):
            return None
        numbers = (report.seconds_before, report.seconds_after, report.speedup, report.error)
        right = all(isinstance(n, (int, float)) for n in numbers)
        words = all(isinstance(word, str) for word in report.kept)
        return report if right and words else None

    def again(self, error: float, spent_s: float) -> Report:
        """The same plan, found in the cache."""
        return replace(self, error=error, spent_s=spent_s, cached=True)

    def __str__(self) -> str:
        work = "training step" if self.training else "call"
        head = (
            f"{self.device} ({self.name}), torch {self.torch_version}, objective {self.objective}\n"
            f"kept: {', '.join(self.kept) or 'nothing, the model stays as it is'}"
            f"{' (from the cache)' if self.cached else ''}\n"
            f"a {work}: {_time(self.seconds_before)} -> {_time(self.seconds_after)} "
            f"(x{self.speedup:.2f}), {_memory(self.nbytes_before, self.nbytes_after)}"
            f"error {self.error:.1e} of {self.tolerance:g} allowed; "
            f"found in {self.spent_s:.1f} s"
        )
        rows = [("step", "speed", "error", "took", "")]
        for trial in self.trials:
            why = trial.verdict + (f": {trial.reason}" if trial.reason else "")
            took = f"{trial.spent_s:.1f} s" if trial.spent_s else ""
            rows.append((trial.step, speed(trial), error(trial), took, why))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([*(row[i].ljust(widths[i]) for i in range(4)), row[4]]).rstrip()
            for row in rows
        ]
        return "\n".join([head, "", *lines])


def speed(trial: Trial) -> str:
    return "" if trial.speedup is None else f"x{trial.speedup:.2f}"


def error(trial: Trial) -> str:
    return "" if trial.error is None else f"{trial.error:.1e}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.3g} ms"


def _memory(before: int | None, after: int | None) -> str:
    if before is None or after is None:
        return ""
    return f"{before / (1 << 20):.1f} -> {after / (1 << 20):.1f} MiB, "

"""Whether a job that lost its worker is past help: the record of its losses, and the verdict."""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_FRUITLESS = 3  # losses without a completed step between them
MAX_STALE = 10  # losses without coming further than ever before


@dataclass
class Losses:
    """What is known of a job's losses so far; ``verdict`` takes one more into account."""

    fruitless: int = 0
    stale: int = 0
    furthest: int = -1
    errors: list[tuple[int, str, str]] = field(default_factory=list)  # step, address, error

    def verdict(
        self, step: int, address: str, error: str, *, killed: bool, restored: int, furthest: int
    ) -> str:
        """Why the job is to be given up after this loss; empty when it goes on.

        ``step`` was completed last, ``restored`` is where the lost copy had begun, ``furthest`` the
        highest step any copy has completed. A SIGKILL (``killed``) is not the step's fault.
        """
        if step > restored:
            self.fruitless = 0
        self.fruitless += 1
        if furthest > self.furthest:
            self.furthest = furthest
            self.stale = 0
        self.stale += 1
        if self.stale > MAX_STALE:
            return f"{MAX_STALE} failovers without coming further than before: {error}"
        if not killed:
            self.errors.append((step, address, error))
            here = [(a, e) for s, a, e in self.errors if s == step]
            if len({a for a, _ in here}) >= 2:
                told = "; ".join(f"{a}: {e}" for a, e in here)
                return f"step {step + 1} failed on two devices: {told}"
        if self.fruitless > MAX_FRUITLESS:
            return f"{MAX_FRUITLESS} failovers without a completed step between: {error}"
        return ""

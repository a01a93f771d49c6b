"""What TrainingJob costs a step when the script runs alone, without a runtime.

Start: before a block of steps; end: after it. Peer: the same steps in a plain loop, interleaved in
the same process. The difference is in microseconds, for it does not depend on the step's length.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import drivetrain
from benchmarks.common import ROUNDS, Gate, Report, spread

STEPS = 2000
LIMIT_US = 75.0  # 1.5% of the shortest step that the replicas are measured at, 5 ms


def block(as_job: bool) -> float:
    """Microseconds a step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    batches = [torch.ones(16, 64)] * STEPS
    run = drivetrain.TrainingJob(model, optimizer, batches) if as_job else None
    began = time.perf_counter()
    if run is not None:
        for step in run:
            with step as x:
                model(x).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
    else:
        for x in batches:
            model(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return (time.perf_counter() - began) / STEPS * 1e6


def main() -> int:
    torch.set_num_threads(1)
    report = Report("alone")
    plain, job = [], []
    for _ in range(ROUNDS):
        plain.append(block(as_job=False))
        job.append(block(as_job=True))
    cost = statistics.median(b - a for a, b in zip(plain, job, strict=True))
    base = statistics.median(plain)
    report.add(
        Gate(
            "TrainingJob alone",
            cost,
            LIMIT_US,
            "us a step",
            spread=spread(plain) * base,
            room=LIMIT_US,
            detail=f"a plain step {base:.0f} us",
        )
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

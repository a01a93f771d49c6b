"""The job that bench_loop.py runs: blocks of steps as a plain loop and as a job, in turn.

python loop_job.py RESULT.json STATE_MB STEP_MS ROUNDS
"""

from __future__ import annotations

import json
import sys
import time

import torch
from torch import nn

from drivetrain import TrainingJob


def main() -> None:
    result, state_mb, step_ms, rounds = sys.argv[1], *map(float, sys.argv[2:5])
    parameters = max(64, int(state_mb * 1e6 / 12))  # float32 and Adam's two moments
    weight = nn.Parameter(torch.randn(parameters) * 1e-3)
    model = nn.Module()
    model.register_parameter("weight", weight)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    side = 256
    a = torch.randn(side, side)

    def body(repeats: int) -> None:
        x = a
        for _ in range(repeats):
            x = torch.mm(x, a) * side**-0.5  # stays of one size: tiny numbers are slow
        loss = weight.sum() * x.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def timed(repeats: int) -> float:
        began = time.perf_counter()
        body(repeats)
        return time.perf_counter() - began

    for _ in range(5):
        body(1)
    base = min(timed(0) for _ in range(5))
    one = (min(timed(50) for _ in range(5)) - base) / 50
    repeats = max(1, int((step_ms / 1e3 - base) / one))

    run = TrainingJob(model, optimizer, [torch.zeros(1)] * 100_000, epochs=10**6)
    steps = iter(run)

    def job_step() -> None:
        with next(steps):
            body(repeats)

    page = run.handle.page if run.handle else None
    settle = max(30, int(2.0 / (step_ms / 1e3))) if step_ms < 500 else 25
    for _ in range(settle):
        job_step()
    every = int(page.replicate_every) if page else 1
    size = every * max(1, round(1.0 / (every * step_ms / 1e3)))
    plain: list[float] = []
    as_job: list[float] = []
    for number in range(int(rounds)):
        for kind in ("plain", "job") if number % 2 else ("job", "plain"):
            if kind == "plain":
                body(repeats)  # drains what the job's last step started
                began = time.perf_counter()
                for _ in range(size):
                    body(repeats)
                plain.append((time.perf_counter() - began) / size)
            else:
                job_step()
                began = time.perf_counter()
                for _ in range(size):
                    job_step()
                as_job.append((time.perf_counter() - began) / size)
    found = {"plain": plain, "job": as_job, "every": int(page.replicate_every) if page else 0}
    found["state_mb"] = (page.state_bytes if page else 0) / 1e6
    with open(result, "w", encoding="utf-8") as file:
        json.dump(found, file)
    steps.close()  # type: ignore[attr-defined]


main()

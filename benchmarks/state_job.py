"""A job with a state of a given size, for benchmarks of moves.

python state_job.py STATE_GIB STEP_S     (parameters and Adam's two moments together)
"""

from __future__ import annotations

import sys
import time

import torch
from torch import nn

import drivetrain

TENSORS = 16


def main() -> None:
    gib, step_s = float(sys.argv[1]), float(sys.argv[2])
    device = drivetrain.device_for_this_job()
    each = int(gib * 2**30 / 12 / TENSORS)
    model = nn.Module()
    for number in range(TENSORS):
        parameter = nn.Parameter(torch.full((each,), 1e-3, device=device))
        model.register_parameter(f"weight{number}", parameter)
    # Made here, not by a step: a step over that much state takes long on a CPU.
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros(()),
            "exp_avg": torch.full_like(parameter, 1e-4),
            "exp_avg_sq": torch.full_like(parameter, 1e-8),
        }
    weights = list(model.parameters())
    run = drivetrain.TrainingJob(model, optimizer, [torch.ones(4)] * 100_000, epochs=1)
    for step in run:
        with step as x:
            with torch.no_grad():
                weights[step.index % TENSORS][: x.numel()].add_(1e-3 * x)
            time.sleep(step_s)


main()

"""The job of these tests: small, with everything in it that a wrong move would change.

    python training_script.py [--steps N] [--go FILE] [--fault KIND:STEP[,KIND:STEP]] ...

Dropout, BatchNorm, AdamW, a scheduler and a shuffled loader make its final state depend on every
random number and every sample in order; ``run.vars["fold"]`` folds the sample ids exactly. It is
slow (``--delay``) until the file of ``--go`` exists, so that a test can do things to it meanwhile.
Its last line on stdout is JSON with the hash of the whole state.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from drivetrain import TrainingJob, errors

MODULUS = 2**61 - 1
FACTOR = 1_000_003
SAMPLES, BATCH = 256, 32

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=320)
parser.add_argument("--delay", type=float, default=0.02)
parser.add_argument("--go", default="")
parser.add_argument("--fault", default="")
parser.add_argument("--once", default="", help="faults fire only while this file does not exist")
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--child", action="store_true", help="start a child that would run for long")
parser.add_argument("--drop", type=int, default=-1, help="a control: skip the samples of this step")
parser.add_argument("--unseeded", action="store_true", help="a control")
options = parser.parse_args()
faults = {int(step): kind for kind, step in (f.split(":") for f in options.fault.split(",") if f)}

if options.unseeded:
    torch.seed()
else:
    torch.manual_seed(1)
x = torch.randn(SAMPLES, 20)
y = (x.sum(1) > 0).long()
model = nn.Sequential(
    nn.Linear(20, options.width),
    nn.ReLU(),
    nn.BatchNorm1d(options.width),
    nn.Dropout(0.1),
    nn.Linear(options.width, 2),
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
data = TensorDataset(x, y, torch.arange(SAMPLES))
loader = DataLoader(data, batch_size=BATCH, shuffle=True, num_workers=options.workers)
run = TrainingJob(
    model, optimizer, loader, epochs=options.steps * BATCH // SAMPLES, scheduler=scheduler
)
if options.child:
    subprocess.Popen(["sleep", "1000"])


def fail(kind: str) -> None:
    if options.once:
        try:
            os.close(os.open(options.once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    if kind == "lost":
        raise errors.DeviceLost("the device fell off the bus", code="lost")
    if kind == "error":
        raise ValueError("a mistake of the script's own")
    if kind == "oom":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    if kind == "assert":
        raise RuntimeError("CUDA error: device-side assert triggered")
    if kind == "exit":
        sys.exit(7)
    if kind == "late":
        time.sleep(0.3)
    if kind in ("kill", "late"):
        os.kill(os.getpid(), 9)
    if kind == "sleep":
        time.sleep(3)


for step in run:
    with step as (a, b, ids):
        if not step.dry and step.index in faults and faults[step.index] != "nan":
            fail(faults[step.index])
        if step.index != options.drop:
            fold = run.vars.get("fold", 0)
            for number in ids.tolist():
                fold = (fold * FACTOR + number + 1) % MODULUS
            run.vars["fold"] = fold
        loss = F.cross_entropy(model(a), b)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step.log(loss=float("nan") if faults.get(step.index) == "nan" else loss)
        if options.go and not step.dry and not os.path.exists(options.go):
            # Slower and slower, so that it cannot end before the test is done with it, however
            # slow the machine is.
            quarter = 4 * step.index // options.steps
            time.sleep(options.delay * (1, 1, 10, 50)[quarter])


def told(value: Any, digest: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            told(value[key], digest)
    elif isinstance(value, (list, tuple)):
        for each in value:
            told(each, digest)
    else:
        digest.update(repr(value).encode())


state = hashlib.sha256()
told([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()], state)
told(torch.get_rng_state(), state)
told(dict(run.vars), state)
print(
    json.dumps(
        {
            "completed": run.completed,
            "fold": run.vars["fold"],
            "hash": state.hexdigest(),
        }
    ),
    flush=True,
)

"""A job for devices that torch does not know: few kernels, and a proof of the samples' order.

    python chip_script.py --go FILE [--steps N] [--amp]

``run.vars["fold"]`` folds the sample ids exactly, whatever the device, and ``"short"`` does so
without those of one step, as a control; the loss differs between devices in its last digits. Its
last line on stdout is JSON, with where each step ran.
"""

from __future__ import annotations

import argparse
import json
import os
import time

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import drivetrain

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=64)
parser.add_argument("--go", default="")
parser.add_argument("--amp", action="store_true", help="autocast and a GradScaler")
options = parser.parse_args()

torch.manual_seed(1)
x = torch.randn(256, 8)
y = x.sum(1, keepdim=True).tanh()
device = drivetrain.device_for_this_job()
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
scaler = torch.amp.GradScaler(device.type, init_scale=256.0, enabled=options.amp)
loader = DataLoader(TensorDataset(x, y, torch.arange(256)), batch_size=32, shuffle=True)
run = drivetrain.TrainingJob(
    model, optimizer, loader, epochs=options.steps // 8, scaler=scaler if options.amp else None
)
for step in run:
    with step as (a, b, ids):
        assert a.device.type == model[0].weight.device.type == device.type
        for name in ("fold", "short"):
            for number in ids.tolist() if name == "fold" or step.index != 9 else ():
                run.vars[name] = (run.vars.get(name, 0) * 1_000_003 + number + 1) % (2**61 - 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.amp):
            loss = (model(a) - b).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        step.log(loss=loss)
        if not step.dry:
            places = run.vars.setdefault("places", {})
            places[device.type] = places.get(device.type, 0) + 1
        if options.go and not step.dry and not os.path.exists(options.go):
            # Slower and slower, so that it cannot end before the test is done with it.
            time.sleep((0.05, 0.3, 1.5, 4.0)[4 * step.index // options.steps])

with torch.no_grad():
    loss = (model(x.to(device)) - y.to(device)).square().mean().item()
if run.owner:
    found = {"steps": run.completed, "loss": loss, "device": str(device), **run.vars}
    found["scale"] = scaler.get_scale()
    print(json.dumps(found), flush=True)

"""The demo's training script: a small convolutional network learns handwritten digits.

    python train_digits.py RESULT.json [--epochs N]

It runs alone like any script. The model carries two buffers that prove exactly-once training from
inside the state: ``fold`` folds the sample ids in their order, h = (h * P + id) mod (2^61 - 1),
and ``seen`` counts each sample. A lost, doubled or reordered sample changes the first, and the
second says which it was. The result file is written after the loop, by the copy that owns the job.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import drivetrain

MODULUS = 2**61 - 1
FACTOR = 1_000_003
HELD_OUT = 360
BATCH = 64
WIDTH = 96


class DigitsNet(nn.Module):
    """Three convolutions and a linear layer on 8 x 8 images, with the two proving buffers."""

    def __init__(self, samples: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.Conv2d(WIDTH, 2 * WIDTH, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(2 * WIDTH),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(2 * WIDTH * 16, 10),
        )
        self.fold: torch.Tensor
        self.seen: torch.Tensor
        self.register_buffer("fold", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(samples, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out

    def note(self, ids: torch.Tensor) -> None:
        """Fold a batch's sample ids in, exactly: the product does not fit into 64 bits."""
        self.fold.fill_(fold(int(self.fold), ids.tolist()))
        self.seen.index_add_(0, ids, torch.ones_like(ids))


def fold(h: int, ids: list[int]) -> int:
    """h = (h * P + id) mod (2^61 - 1) for each id in order; ids count from 1 in it, so that
    leading zeros are not lost."""
    for number in ids:
        h = (h * FACTOR + number + 1) % MODULUS
    return h


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Training and held-out digits, split by a fixed seed; each item is image, label, id."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(20))
    held_out, kept = order[:HELD_OUT], order[HELD_OUT:]
    ids = torch.arange(len(kept))
    return (
        TensorDataset(images[kept], labels[kept], ids),
        TensorDataset(images[held_out], labels[held_out]),
    )


@torch.no_grad()
def evaluate(model: DigitsNet, data: TensorDataset, device: torch.device) -> tuple[float, float]:
    """(accuracy, loss) on the held-out digits."""
    x, y = (tensor.to(device) for tensor in data.tensors)
    model.eval()
    scores = model(x)
    model.train()
    right = (scores.argmax(dim=1) == y).float().mean().item()
    return right, F.cross_entropy(scores, y).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, help="the JSON file to write")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--batch", type=int, default=BATCH, help="samples a step")
    parser.add_argument(
        "--drop-step",
        type=int,
        default=-1,
        help="a control: do not train on this step's batch, so that the comparison must fail",
    )
    options = parser.parse_args()

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    device = drivetrain.device_for_this_job()
    training, held_out = digits()
    loader = DataLoader(training, batch_size=options.batch, shuffle=True)
    model = DigitsNet(len(training))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=options.epochs * len(loader)
    )

    run = drivetrain.TrainingJob(
        model, optimizer, loader, epochs=options.epochs, scheduler=scheduler
    )
    starts: list[float] = []
    for step in run:
        with step as (x, y, ids):
            starts.append(time.perf_counter())
            if step.index == options.drop_step:
                continue
            loss = F.cross_entropy(model(x + 0.1 * torch.randn_like(x)), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            model.note(ids)
            step.log(loss=loss)
        if step.ends_epoch:
            accuracy, _ = evaluate(model, held_out, device)
            run.vars["best"] = max(run.vars.get("best", 0.0), accuracy)
            step.log(accuracy=accuracy)

    accuracy, held_out_loss = evaluate(model, held_out, device)
    seen = model.seen.cpu()
    if run.owner:
        intervals = [b - a for a, b in itertools.pairwise(starts)]
        result = {
            "state_hash": run.state_hash(),
            "step_ms": statistics.median(intervals) * 1e3 if intervals else None,
            "accuracy": accuracy,
            "best_accuracy": run.vars["best"],
            "loss": held_out_loss,
            "steps": run.completed,
            "epochs": options.epochs,
            "fold": int(model.fold),
            "samples": int(seen.sum()),
            "samples_lost": int((options.epochs - seen).clamp(min=0).sum()),
            "samples_doubled": int((seen - options.epochs).clamp(min=0).sum()),
        }
        partial = options.result.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(options.result)
        print(f"accuracy {accuracy:.4f} on {HELD_OUT} held-out digits, {run.completed} steps")


if __name__ == "__main__":
    main()

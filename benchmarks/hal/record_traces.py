"""Record what three models in training ask of an allocator: allocations and frees, in order.

    python -m benchmarks.hal.record_traces

The allocations are torch's own on the CPU, as its profiler sees them, from the model's first
parameter to its last step; batches are on a stream of their own, as a loader copies them. Writes
``traces/NAME.json.gz``: ``[stream, bytes]`` for an allocation, its number, from 0, when it is
freed.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

FOLDER = Path(__file__).parent / "traces"
STEPS = 4
LOADER = "the loader's stream"


class Residual(nn.Module):
    def __init__(self, wide: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(wide, wide, 3, padding=1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, wide, 3, padding=1, bias=False),
            nn.BatchNorm2d(wide),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.body(x))


def mlp() -> nn.Module:
    sizes = [784, 3000, 3000, 1500, 10]
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(sizes):
        layers += [nn.Linear(into, out), nn.GELU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers[:-2])


def cnn() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1)]
    wide = 32
    for _ in range(3):
        layers += [Residual(wide), Residual(wide), nn.Conv2d(wide, 2 * wide, 3, 2, 1), nn.ReLU()]
        wide *= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 100))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8000, 256)
        layer = nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(256, 8000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embed(x))).flatten(0, 1)


Batch = tuple[torch.Tensor, torch.Tensor]


def images(size: int, *shape: int) -> Callable[[int], Batch]:
    return lambda step: (torch.rand(size, *shape), torch.randint(0, 10, (size,)))


def sentences(step: int) -> Batch:
    long = 96 if step % 2 else 128  # batches of two lengths, as a bucketing loader gives them
    words = torch.randint(0, 8000, (8, long + 1))
    return words[:, :-1].contiguous(), words[:, 1:].reshape(-1)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch]]] = {
    "mlp": (mlp, images(256, 784)),
    "cnn": (cnn, images(32, 3, 48, 48)),
    "transformer": (Transformer, sentences),
}


def train(make: Callable[[], nn.Module], batch: Callable[[int], Batch]) -> None:
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    for step in range(STEPS):
        with record_function(LOADER):
            x, y = batch(step)
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 2:
            with torch.no_grad():
                model.eval()
                model(x)
                model.train()


def events_of(prof: Any) -> Iterator[Any]:
    """All events of the profile, parents before children."""
    left = list(prof.profiler.kineto_results.experimental_event_tree())
    while left:
        event = left.pop()
        yield event
        left += event.children


def record(name: str) -> list[Any]:
    from torch._C._profiler import _EventType

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        train(*MODELS[name])
    found, loads = [], []
    for event in events_of(prof):
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
        elif event.name == LOADER:
            loads.append((event.start_time_ns, event.end_time_ns))
    trace: list[Any] = []
    live: dict[int, int] = {}
    count = 0
    for at, ptr, nbytes in sorted(found):
        if nbytes > 0:
            stream = int(any(start <= at <= end for start, end in loads))
            trace.append([stream, nbytes])
            live[ptr] = count
            count += 1
        elif ptr in live:  # else it is from before the recording
            trace.append(live.pop(ptr))
    return trace


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name in MODELS:
        trace = record(name)
        made = f"torch {torch.__version__.partition('+')[0]} on a CPU, {STEPS} steps"
        text = json.dumps({"model": name, "made_by": made, "events": trace}, separators=(",", ":"))
        path = FOLDER / f"{name}.json.gz"
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{path}: {len(trace)} events, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()

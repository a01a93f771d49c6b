"""Stopped after any batch and resumed in a fresh process, a loader gives what it would have given.

Run as a program it is that fresh process: positions on stdin, digests of the batches on stdout.
"""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from drivetrain.errors import BadInput, MigrationError
from drivetrain.pytorch import rng
from drivetrain.pytorch import tree as typed
from drivetrain.pytorch.loader import LoaderPosition

torch.set_num_threads(1)


class Augmented(Dataset):  # type: ignore[type-arg]
    """Every item draws from all three global generators."""

    def __init__(self, length: int = 14) -> None:
        self.length = length
        self.opened = False
        self.shift = 0.0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        self.opened = True
        noise = [float(torch.rand(())), random.random(), float(np.random.rand()), self.shift]
        return torch.tensor([float(index), *noise], dtype=torch.float64)


class Many(Augmented):
    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[torch.Tensor]:
        for index in range(14):
            noise = [float(torch.rand(())), random.random(), float(np.random.rand())]
            yield torch.tensor([float(index), *noise], dtype=torch.float64)


class Restless(Sampler):  # type: ignore[type-arg]
    """Draws at every item, from everything."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.length):
            drawn = random.randrange(7) + int(torch.randint(7, ())) + int(np.random.randint(7))
            yield drawn % self.length


class OwnNumbers(Restless):
    """Draws from generators that it keeps under names of its own."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.rng = np.random.default_rng(3)
        self._python = random.Random(4)
        self.torch = torch.Generator().manual_seed(5)

    def __iter__(self) -> Iterator[int]:
        for index in self.rng.permutation(self.length).tolist():
            drawn = int(torch.randint(7, (), generator=self.torch)) + self._python.randrange(7)
            yield (index + drawn) % self.length


class Remembering(Augmented):
    """A data set with a state of its own, as torchdata has it."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def __getitem__(self, index: int) -> torch.Tensor:
        self.read += 1
        return torch.tensor([float(index), float(self.read)], dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        return {"read": self.read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.read = state["read"]


def shift(worker: int) -> None:
    info = torch.utils.data.get_worker_info()
    assert info is not None
    assert type(info.dataset) is Augmented
    info.dataset.shift = 0.5


def seeded(value: int) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def distributed() -> DataLoader[Any]:
    sampler: Any = DistributedSampler(Augmented(), num_replicas=2, rank=1, seed=3)
    return DataLoader(Augmented(), 2, sampler=sampler)


LOADERS: dict[str, Callable[[], Any]] = {
    "plain": lambda: DataLoader(Augmented(), 3, shuffle=True),
    "plain with generator": lambda: DataLoader(Augmented(), 3, True, generator=seeded(5)),
    "drop last": lambda: DataLoader(Many(), 4, shuffle=True, drop_last=True),
    "workers": lambda: DataLoader(Augmented(), 3, shuffle=True, num_workers=2),
    "workers, all options": lambda: DataLoader(
        Augmented(),
        3,
        shuffle=True,
        num_workers=2,
        persistent_workers=True,
        prefetch_factor=3,
        worker_init_fn=shift,
        generator=seeded(6),
    ),
    "workers, own sampler": lambda: DataLoader(Many(), 3, sampler=Restless(13), num_workers=2),
    "own sampler": lambda: DataLoader(Augmented(), 3, sampler=Restless(13)),
    "own numbers": lambda: DataLoader(Augmented(), 3, sampler=OwnNumbers(13)),
    "workers, own numbers": lambda: DataLoader(
        Many(), 3, sampler=OwnNumbers(13), num_workers=1, persistent_workers=True
    ),
    "workers that stay": lambda: DataLoader(
        Augmented(), 3, shuffle=True, num_workers=1, persistent_workers=True
    ),
    "own batches": lambda: DataLoader(
        Augmented(), batch_sampler=BatchSampler(Restless(13), 3, False)
    ),
    "replacement": lambda: DataLoader(
        Augmented(), 3, sampler=RandomSampler(Augmented(), True, 40, generator=seeded(1))
    ),
    "weighted": lambda: DataLoader(
        Augmented(), 3, sampler=WeightedRandomSampler([0.1 * k for k in range(14)], 13)
    ),
    "distributed": distributed,
    "single items": lambda: DataLoader(Augmented(5), None, shuffle=True, num_workers=1),
    "iterable": lambda: DataLoader(Stream(), 3),
    "iterable, workers": lambda: DataLoader(Stream(), 3, num_workers=2),
    "iterable, workers that stay": lambda: DataLoader(
        Stream(), 3, num_workers=1, persistent_workers=True
    ),
    "torchdata": lambda: StatefulDataLoader(Augmented(), 3, shuffle=True),
    "torchdata, workers": lambda: StatefulDataLoader(Augmented(), 3, True, num_workers=2),
    "torchdata, stateful set": lambda: StatefulDataLoader(Remembering(), 3, shuffle=True),
    "torchdata, iterable": lambda: StatefulDataLoader(Stream(), 3),
    "list": lambda: [torch.full((2,), float(k)) for k in range(5)],
}
EPOCHS = 2


def digest(batch: torch.Tensor) -> str:
    return hashlib.sha256(batch.numpy().tobytes()).hexdigest()[:16]


def train_a_little() -> None:
    """What a step does to the generators."""
    torch.rand(3)
    random.random()
    np.random.rand()


def start(name: str, seed: int) -> LoaderPosition:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    return LoaderPosition.for_loader(LOADERS[name](), seed=11)


def rest(position: LoaderPosition) -> list[str]:
    """The digests from here to the end of the last epoch."""
    found = []
    while True:
        if position.epoch < 0:
            position.begin(0)
        try:
            found.append(digest(position.next_batch()))
            train_a_little()
        except StopIteration:
            if position.epoch + 1 >= EPOCHS:
                return found
            position.begin(position.epoch + 1)


def unbroken(name: str) -> tuple[list[str], list[str]]:
    """Digests of all batches, and the position (as text) before each."""
    position = start(name, 1)
    found, cuts = [], []

    def cut() -> None:
        tree = {"loader": position.position(), "rng": rng.capture(None)}
        cuts.append(typed.dumps(tree).decode())

    cut()
    position.begin(0)
    while True:
        try:
            found.append(digest(position.next_batch()))
            train_a_little()
        except StopIteration:
            if position.epoch + 1 >= EPOCHS:
                position.close()
                return found, cuts
            position.begin(position.epoch + 1)
            continue
        cut()


def resumed(name: str, text: str) -> list[str]:
    position = start(name, 2)
    tree = typed.loads(text.encode())
    position.resume(tree["loader"])
    rng.restore(tree["rng"], None)
    found = rest(position)
    position.close()
    return found


def main() -> None:
    work = json.load(sys.stdin)
    json.dump([[resumed(name, cut) for cut in cuts] for name, cuts in work], sys.stdout)


def in_a_fresh_process(work: list[tuple[str, list[str]]]) -> list[list[list[str]]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__],
        input=json.dumps(work),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[list[str], list[list[str]]]]:
    """Each loader's unbroken run, and its resumed ones from every batch (workers: from three)."""
    whole, work = {}, []
    for name in LOADERS:
        whole[name], cuts = unbroken(name)
        work.append((name, cuts))
    kept = [(n, c if "workers" not in n else [c[0], c[2], c[5], c[7], c[-1]]) for n, c in work]
    continued = in_a_fresh_process(kept)
    return {name: (whole[name], continued[n]) for n, (name, _) in enumerate(kept)}


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_goes_on_in_a_fresh_process_from_any_batch(
    name: str, runs: dict[str, tuple[list[str], list[list[str]]]]
) -> None:
    whole, continued = runs[name]
    assert len(whole) >= 2 * 3
    for found in continued:
        assert found == whole[len(whole) - len(found) :]
    lengths = [len(found) for found in continued]
    assert lengths[0] == len(whole)
    assert lengths[-1] == 0
    assert lengths == sorted(set(lengths), reverse=True)


def test_a_set_without_a_state_loses_no_batch_in_a_second_move() -> None:
    whole, cuts = unbroken("torchdata, iterable")
    first = start("torchdata, iterable", 2)
    tree = typed.loads(cuts[2].encode())
    first.resume(tree["loader"])
    again = {"loader": first.position(), "rng": tree["rng"]}
    assert resumed("torchdata, iterable", typed.dumps(again).decode()) == whole[2:]


@pytest.mark.parametrize("name", ["plain", "workers", "iterable"])
def test_the_batches_are_random_so_the_comparison_can_fail(
    name: str, runs: dict[str, tuple[list[str], list[list[str]]]]
) -> None:
    whole, _ = runs[name]
    assert len(set(whole)) == len(whole)
    if name == "plain":
        _, cuts = unbroken(name)
        tree = json.loads(cuts[3])
        tree["loader"]["batches"] += 1
        assert resumed(name, json.dumps(tree)) != whole[3:]
        tree["loader"]["batches"] -= 1
        tree["rng"] = json.loads(cuts[1])["rng"]
        assert resumed(name, json.dumps(tree)) != whole[3:]


def test_without_workers_the_batches_are_those_of_the_plain_loader() -> None:
    position = start("plain", 4)
    position.begin(0)
    ours = [digest(position.next_batch()) for _ in range(5)]
    torch.manual_seed(4)
    random.seed(4)
    np.random.seed(4)
    assert [digest(batch) for batch in LOADERS["plain"]()] == ours


def test_resuming_skips_without_reading_samples() -> None:
    class Counting(Augmented):
        reads = 0

        def __getitem__(self, index: int) -> torch.Tensor:
            Counting.reads += 1
            return super().__getitem__(index)

    def make() -> LoaderPosition:
        return LoaderPosition.for_loader(DataLoader(Counting(), 2, shuffle=True))

    first = make()
    first.begin(0)
    for _ in range(4):
        first.next_batch()
    tree = first.position()
    Counting.reads = 0
    second = make()
    second.resume(tree)
    second.next_batch()
    assert Counting.reads == 2
    assert not second.slow_resume
    assert LoaderPosition.for_loader(DataLoader(Stream(), 2)).slow_resume


def test_facts_and_length() -> None:
    position = LoaderPosition.for_loader(DataLoader(Augmented(), 3, num_workers=2))
    assert position.facts() == {
        "length": 5,
        "batch_size": 3,
        "class": "torch.utils.data.dataloader.DataLoader",
        "workers": 2,
    }
    assert LoaderPosition.for_loader(DataLoader(Stream(), 2)).length() is None
    assert LoaderPosition.for_loader([1, 2]).length() == 2
    with pytest.raises(BadInput, match="iterable"):
        LoaderPosition.for_loader(3)


def test_a_fingerprint_is_of_the_data_and_leaves_generators_and_data_set_alone() -> None:
    data = Augmented()
    before = typed.dumps(rng.capture(None))
    one = LoaderPosition.for_loader(DataLoader(data, 3)).fingerprint()
    assert typed.dumps(rng.capture(None)) == before
    assert not data.opened
    train_a_little()
    assert LoaderPosition.for_loader(DataLoader(Augmented(), 3)).fingerprint() == one
    shifted = Augmented()
    shifted.shift = 1.0
    others = [
        DataLoader(shifted, 3),
        DataLoader(Augmented(13), 3),
        DataLoader(Many(), 3),
        DataLoader(Stream(), 3),
        [{"a": 1}],
        [{"a": 2}],
        [(np.ones(2), "x", None)],
        [],
    ]
    prints = {LoaderPosition.for_loader(other).fingerprint() for other in others} | {one}
    assert len(prints) == len(others) + 1


def test_a_position_of_another_loader_is_refused() -> None:
    position = LoaderPosition.for_loader([1, 2, 3])
    position.begin(0)
    position.next_batch()
    tree = position.position()
    with pytest.raises(MigrationError, match="kind"):
        LoaderPosition.for_loader(DataLoader(Augmented(), 3)).resume(tree)
    tree["batches"] = 9
    with pytest.raises(MigrationError, match="ended after 3"):
        LoaderPosition.for_loader([1, 2, 3]).resume(tree)
    with pytest.raises(BadInput):
        LoaderPosition.for_loader([1]).resume({"kind": "consumed"})
    with pytest.raises(BadInput, match="before begin"):
        LoaderPosition.for_loader([1]).next_batch()


def test_close_ends_worker_processes() -> None:
    import multiprocessing

    for name in ("workers", "workers, all options"):
        position = start(name, 1)
        position.begin(0)
        position.next_batch()
        assert multiprocessing.active_children()
        position.close()
        assert not multiprocessing.active_children()
        position.begin(0)
        position.next_batch()
        position.close()


if __name__ == "__main__":
    main()

"""Where a job is in its data, and going on from there in another process.

Three ways, by what the loader is:

* ``indexed``: a DataLoader over a map-style data set. An equal DataLoader is fed by a sampler that
  can start at any batch. With workers, each batch is made after seeding the worker's generators
  from (seed, epoch, batch), so a batch is the same whichever worker makes it, and when.
* ``stateful``: a loader (or its data set or sampler) with ``state_dict``: that state is used.
* ``consumed``: any other iterable. Batches are read again from the epoch's start and thrown away
  (``slow_resume``); its random numbers are a stream of their own, so that they are the same then.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import itertools
import random
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from drivetrain.errors import BadInput, MigrationError
from drivetrain.pytorch import rng
from drivetrain.pytorch import tree as typed

# Samplers that draw from the global generators when they start, if at all, and never later.
_KNOWN_SAMPLERS = frozenset(
    {
        "SequentialSampler",
        "RandomSampler",
        "SubsetRandomSampler",
        "WeightedRandomSampler",
        "BatchSampler",
        "DistributedSampler",
    }
)


class LoaderPosition:
    """Resumable iteration over a loader. Made by ``for_loader``.

    ``begin(epoch)`` starts an epoch, ``next_batch()`` gives its batches and raises StopIteration at
    its end, ``position()`` says where it is, between batches, and ``resume(tree)`` goes there in
    another process, which must then put its random number generators back itself.
    """

    def __init__(self, loader: Any, seed: int, kind: str) -> None:
        self.loader = loader
        self.kind = kind
        self.slow_resume = kind == "consumed" and not isinstance(loader, (list, tuple))
        self.epoch = -1
        self.batches = 0
        self._seed = seed
        self._iterator: Iterator[Any] | None = None
        self._finished = False
        self._start: dict[str, Any] | None = None
        self._stream: _Stream | None = None
        self._fingerprint: str | None = None
        self._feed: _Feed | None = None
        self._source = loader
        if kind == "indexed":
            self._feed = _Feed(_index_sampler(loader), seed, loader.num_workers > 0)
            self._source = _equal_loader(loader, self._feed)

    @classmethod
    def for_loader(cls, loader: Any, seed: int = 0) -> LoaderPosition:
        """Raises BadInput for what cannot be iterated."""
        name = type(loader).__name__
        ours = type(loader) is DataLoader or (
            name == "StatefulDataLoader" and type(loader).__module__.startswith("torchdata.")
        )
        if ours and not isinstance(loader.dataset, IterableDataset):
            # Samplers of torchdata have a state too, but starting them anew gives the same.
            pieces = [loader.dataset, *(s for s in _samplers(loader) if not _is_known(s))]
            if type(loader) is DataLoader or not any(map(_has_state, pieces)):
                return cls(loader, seed, "indexed")
        if ours and isinstance(loader.dataset, IterableDataset) and not _keeps_state(loader):
            return cls(loader, seed, "consumed")
        if _has_state(loader) and hasattr(loader, "__iter__"):
            return cls(loader, seed, "stateful")
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise BadInput(f"a loader is an iterable of batches; {name} is none")
        return cls(loader, seed, "consumed")

    def length(self) -> int | None:
        """Batches in an epoch, or None when the loader does not know."""
        try:
            return len(self.loader)
        except (TypeError, NotImplementedError):
            return None

    def begin(self, epoch: int) -> None:
        """Starts an epoch from its first batch."""
        self._start = self._random_states()
        self._open(epoch, 0)

    def next_batch(self) -> Any:
        """The next batch. Raises StopIteration at the epoch's end (and again after it)."""
        if self._iterator is None:
            if self._finished:
                raise StopIteration
            raise BadInput("next_batch was called before begin")
        try:
            if self._stream is None:
                batch = next(self._iterator)
            else:
                with self._stream:
                    batch = next(self._iterator)
        except StopIteration:
            self._finished = True
            self._iterator = None
            raise
        self.batches += 1
        return batch

    def position(self) -> dict[str, Any]:
        """Where the iteration is, as a typed tree without tensors of its own."""
        tree: dict[str, Any] = {
            "kind": self.kind,
            "epoch": self.epoch,
            "batches": self.batches,
            "finished": self._finished,
            "start": self._start,
            "generators": self._generator_states(),
        }
        if self.kind == "stateful" and self.epoch >= 0:  # before, asking would start workers
            tree["state"] = typed.encode(self.loader.state_dict(), "loader", None)
        return tree

    def resume(self, tree: Any) -> None:
        """Goes to a position. Draws random numbers: put the generators back afterwards.

        Raises MigrationError when the position is another kind of loader's, or behind its end.
        """
        try:
            kind, epoch, batches = tree["kind"], int(tree["epoch"]), int(tree["batches"])
            finished, start, generators = tree["finished"], tree["start"], tree["generators"]
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(f"this is no position of a loader: {error!r}") from error
        if kind != self.kind or len(generators) != len(self._generators()):
            raise MigrationError(
                f"the position is of a loader of kind {kind!r} with {len(generators)} generators; "
                f"the one here is {self.kind!r} with {len(self._generators())}"
            )
        self.close()
        if self.kind == "stateful" and epoch >= 0:
            self.loader.load_state_dict(typed.decode(tree["state"], {}))
        if epoch < 0 or finished:
            self._restore_generators(generators)
            self.epoch, self.batches, self._finished = epoch, batches, bool(finished)
            self._start = start
            return
        self._start = start
        if self.kind == "stateful":
            _set_epoch(self.loader, epoch)
            self._iterator = iter(self.loader)
            self.epoch, self.batches, self._finished = epoch, batches, False
            return
        rng.restore(start["global"], None)
        self._restore_generators(start["generators"])
        self._open(epoch, batches)
        if self.kind == "consumed":
            for done in range(batches):
                try:
                    self.next_batch()
                except StopIteration:
                    raise MigrationError(
                        f"the loader ended after {done} batches of epoch {epoch}, before the "
                        f"position of {batches}; it must give the same batches on both sides"
                    ) from None
            self.batches = batches

    def facts(self) -> dict[str, Any]:
        """What two copies of a job compare: length, batch size, class and number of workers."""
        size = getattr(self.loader, "batch_size", None)
        return {
            "length": self.length(),
            "batch_size": size if isinstance(size, int) else None,
            "class": f"{type(self.loader).__module__}.{type(self.loader).__qualname__}",
            "workers": int(getattr(self.loader, "num_workers", 0) or 0),
        }

    def fingerprint(self) -> str:
        """Length, type names and the xxh3 of three samples of the data set, as one hex word.

        Samples are read once, from a copy of the data set's object (so that a file it opens lazily
        is not shared with forked workers), with generators seeded alike and put back after it.
        """
        if self._fingerprint is None:
            data = getattr(self.loader, "dataset", self.loader)
            total = xxhash.xxh3_64()
            for word in (self.length(), type(self.loader).__name__, type(data).__name__):
                _digest(word, total)
            with _Stream(_mix(0, "fingerprint")):
                for sample in _samples(data):
                    _digest(sample, total)
            self._fingerprint = total.hexdigest()
        return self._fingerprint

    def close(self) -> None:
        """Ends the iteration and its worker processes. ``begin`` and ``resume`` start anew."""
        for iterator in {id(i): i for i in (self._iterator, _kept_iterator(self._source))}.values():
            shut_down = getattr(iterator, "_shutdown_workers", None)
            if shut_down is not None:
                shut_down()
        if _kept_iterator(self._source) is not None:
            self._source._iterator = None
        self._iterator = None

    def _open(self, epoch: int, batches: int) -> None:
        _set_epoch(self.loader, epoch)
        self.epoch, self.batches, self._finished = epoch, 0, False
        self._iterator, self._stream = None, None
        if self._feed is not None:
            self._feed.epoch, self._feed.first = epoch, batches
            self.batches = batches
        elif self.slow_resume:
            if _kept_iterator(self.loader) is not None:
                self.close()  # workers that stay go on with the numbers of the epochs before
            self._stream = _Stream(_mix(self._seed, "loader", epoch))
        if self._feed is not None and self._source.persistent_workers:
            self._start_workers()
        if self._stream is None:
            self._iterator = iter(self._source)
        else:
            with self._stream:
                self._iterator = iter(self._source)
        if batches and self._feed is not None and self._feed.items is not None:
            # Now: a lazy skip would draw from generators that the caller has put back by then.
            with contextlib.suppress(StopIteration):
                self._feed.items.skip()

    def _start_workers(self) -> None:
        """Start workers that stay over all epochs, without a batch yet. Only a start draws a seed
        for them: drawn beside the job's numbers, it does not make a resumed epoch another one."""
        if _kept_iterator(self._source) is not None:
            return
        assert self._feed is not None
        generators = self._generator_states()
        self._feed.asleep = True
        with _Stream(_mix(self._seed, "workers")):
            iter(self._source)
        self._feed.asleep = False
        self._restore_generators(generators)

    def _random_states(self) -> dict[str, Any] | None:
        if self.kind == "stateful":
            return None
        return {
            "global": rng.capture(None),
            "generators": self._generator_states(),
        }

    def _generators(self) -> list[Any]:
        """Those of the loader and its samplers: torch's, numpy's and Python's, by any name."""
        found: dict[int, Any] = {}
        for owner in (self.loader, *_samplers(self.loader)):
            own = getattr(owner, "__dict__", {})
            for value in (getattr(owner, "generator", None), *own.values()):
                if rng.is_generator(value):
                    found.setdefault(id(value), value)
        return list(found.values())

    def _generator_states(self) -> list[Any]:
        return [
            rng.capture_generator(generator)
            if isinstance(generator, torch.Generator)
            else rng.generator_state(generator)
            for generator in self._generators()
        ]

    def _restore_generators(self, states: Any) -> None:
        for generator, state in zip(self._generators(), states, strict=True):
            if isinstance(generator, torch.Generator):
                rng.restore_generator(generator, state)
            else:
                rng.restore_generator_of(generator, state)


# ------------------------------------------------------------------------------------- pieces


class _Feed:
    """A sampler that yields another one's items from item ``first`` on, with a seed for workers."""

    def __init__(self, sampler: Any, seed: int, seeded: bool) -> None:
        self.sampler = sampler
        self.seed = seed
        self.seeded = seeded
        self.epoch = 0
        self.first = 0
        self.items: _Items | None = None
        self.asleep = False  # gives nothing

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        if self.asleep:
            return iter(())
        known = all(map(_is_known, _chain(self.sampler)))
        # A sampler of the user's may draw at any item: with random numbers of its own it gives the
        # same items however far ahead the workers are.
        stream = None if known else _Stream(_mix(self.seed, "sampler", self.epoch))
        self.items = _Items(iter(self.sampler), self.first, stream)
        if not self.seeded:
            return self.items
        seeds = (_mix(self.seed, "batch", self.epoch, k) for k in itertools.count(self.first))
        return zip(seeds, self.items, strict=False)


class _Items:
    """A sampler's items but the first few, drawn with the random numbers of ``stream``, if any."""

    def __init__(self, items: Iterator[Any], first: int, stream: _Stream | None) -> None:
        self._items = items
        self._first = first
        self._stream = stream

    def __iter__(self) -> _Items:
        return self

    def __next__(self) -> Any:
        self.skip()
        return self._next()

    def skip(self) -> None:
        while self._first > 0:
            self._first -= 1
            self._next()

    def _next(self) -> Any:
        if self._stream is None:
            return next(self._items)
        with self._stream:
            return next(self._items)


class _Seeded:
    """A data set whose items are read after seeding the worker's generators."""

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, "dataset", dataset)

    def __reduce__(self) -> Any:
        return _Seeded, (self.dataset,)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)  # a worker_init_fn may change the data set

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, numbered: tuple[int, Any]) -> Any:
        seed, index = numbered
        _seed_all(seed)
        return self.dataset[index]

    def __getitems__(self, numbered: tuple[int, Any]) -> Any:
        seed, indices = numbered
        _seed_all(seed)
        many = getattr(self.dataset, "__getitems__", None)
        return many(indices) if many else [self.dataset[index] for index in indices]


class _InWorker:
    """A worker_init_fn that shows the user's own one the user's own data set."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, number: int) -> None:
        info = get_worker_info()
        if info is not None and isinstance(info.dataset, _Seeded):
            object.__setattr__(info, "dataset", info.dataset.dataset)  # it refuses plain ones
        if self.function is not None:
            self.function(number)


class _Stream:
    """Random numbers of its own for what runs inside ``with stream:``; nothing else sees it."""

    def __init__(self, seed: int) -> None:
        self._seed: int | None = seed
        self._mine: Any = None
        self._others: Any = None

    def __enter__(self) -> None:
        self._others = _global_states()
        if self._seed is not None:
            _seed_all(self._seed)
            self._seed = None
        else:
            _set_global_states(self._mine)

    def __exit__(self, *exc: object) -> None:
        self._mine = _global_states()
        _set_global_states(self._others)


def _global_states() -> Any:
    numpy = sys.modules.get("numpy")
    return (
        random.getstate(),
        torch.get_rng_state(),
        None if numpy is None else numpy.random.get_state(legacy=False),
    )


def _set_global_states(states: Any) -> None:
    python, host, numpy_state = states
    random.setstate(python)
    torch.set_rng_state(host)
    if numpy_state is not None:
        sys.modules["numpy"].random.set_state(numpy_state)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    torch.default_generator.manual_seed(seed)  # the CPU's alone: no device is drawn in
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def _mix(*words: object) -> int:
    """A seed of 63 bits from some words."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _has_state(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


def _keeps_state(loader: Any) -> bool:
    """False where torchdata would read a data set again from its start: it counts those batches
    twice, so that a second move would lose as many."""
    data = loader.dataset
    if _has_state(data):
        return True
    try:
        with _Stream(_mix(0, "state")):
            return _has_state(iter(data))
    except Exception:  # the user's own, which may be right in a worker only
        return True


def _is_known(sampler: Any) -> bool:
    kind = type(sampler)
    return kind.__module__.split(".")[0] in ("torch", "torchdata") and (
        kind.__name__ in _KNOWN_SAMPLERS
    )


def _chain(sampler: Any) -> list[Any]:
    """A sampler and those that it draws from."""
    found: list[Any] = []
    while sampler is not None and all(sampler is not other for other in found):
        found.append(sampler)
        sampler = getattr(sampler, "sampler", None)
    return found


def _samplers(loader: Any) -> list[Any]:
    found = _chain(getattr(loader, "batch_sampler", None))
    found += _chain(getattr(loader, "sampler", None))
    return list({id(sampler): sampler for sampler in found}.values())


def _set_epoch(loader: Any, epoch: int) -> None:
    for sampler in _samplers(loader):
        set_epoch = getattr(sampler, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)


def _index_sampler(loader: Any) -> Any:
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def _equal_loader(loader: Any, feed: _Feed) -> DataLoader[Any]:
    """A plain DataLoader like ``loader`` that takes its indices from ``feed``."""
    workers = loader.num_workers
    options: dict[str, Any] = {
        "num_workers": workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "persistent_workers": loader.persistent_workers,
    }
    if workers:
        options["prefetch_factor"] = loader.prefetch_factor
        options["worker_init_fn"] = _InWorker(loader.worker_init_fn)
    if getattr(loader, "pin_memory_device", ""):
        options["pin_memory_device"] = loader.pin_memory_device
    dataset = _Seeded(loader.dataset) if workers else loader.dataset
    if loader.batch_sampler is None:
        return DataLoader(dataset, batch_size=None, sampler=feed, **options)  # type: ignore[arg-type]
    return DataLoader(dataset, batch_sampler=feed, **options)  # type: ignore[arg-type]


def _kept_iterator(source: Any) -> Any:
    """The iterator that a DataLoader with persistent workers keeps between epochs."""
    return getattr(source, "_iterator", None) if isinstance(source, DataLoader) else None


def _samples(data: Any) -> Iterator[Any]:
    if isinstance(data, (IterableDataset, Mapping)) or not hasattr(data, "__getitem__"):
        return
    try:
        count = len(data)
    except (TypeError, NotImplementedError):
        return
    reader = data if isinstance(data, (list, tuple)) else copy.copy(data)
    for index in sorted({0, count // 2, count - 1} if count else ()):
        yield reader[index]


def _digest(value: Any, total: Any) -> None:
    """Adds a sample to a running hash: numbers and texts by value, the rest by type."""
    total.update(f"{type(value).__name__}:".encode())
    if isinstance(value, torch.Tensor):
        total.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if value.layout == torch.strided and not value.is_quantized and value.numel():
            host = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
            total.update(memoryview(host.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    elif isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        total.update(repr(value).encode())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _digest(key, total)
            _digest(item, total)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _digest(item, total)
    elif callable(getattr(value, "tobytes", None)):  # numpy's and PIL's
        total.update(value.tobytes())

"""Where a loop is in its data: which epoch, which batch, and whether a group or epoch ends here."""

from __future__ import annotations

import contextlib
from typing import Any

from drivetrain.errors import JobError
from drivetrain.pytorch import rng
from drivetrain.pytorch.loader import LoaderPosition


class Batches:
    """Gives batch after batch over all epochs; its position can be carried to another process.

    A boundary always lies inside an epoch: the next one is begun as soon as one has ended, so that
    what the loader draws at its start belongs to the step before.
    """

    def __init__(self, loader: LoaderPosition, *, epochs: int, accumulate: int) -> None:
        self.loader = loader
        self.epochs = epochs
        self.accumulate = accumulate
        self.epoch = 0
        self.in_epoch = 0
        self._begun = False
        self._ahead: list[Any] = []
        self._before_ahead: Any = None

    @property
    def done(self) -> bool:
        """True once every epoch has ended."""
        return self.epoch >= self.epochs

    @property
    def at_cut(self) -> bool:
        """True between whole groups of accumulated steps."""
        return self.in_epoch % self.accumulate == 0

    def next(self) -> tuple[Any, bool, bool] | None:
        """(batch, whether the optimizer steps on it, whether it ends its epoch); None at last."""
        while self.epoch < self.epochs:
            if not self._begun:
                self.begin()
            fetched = self._fetch()
            if fetched is not None:
                self.in_epoch += 1
                batch, last = fetched
                return batch, last or self.at_cut, last
            self.end_epoch()
        return None

    def begin(self) -> None:
        """Begin the epoch unless that was done."""
        if not self._begun and not self.done:
            self.loader.begin(self.epoch)
            self._begun = True
            self._ahead = []
            self._before_ahead = None

    def end_epoch(self) -> None:
        """The epoch's last step is complete: begin the next one."""
        if self.in_epoch == 0:
            raise JobError("the loader gave no batch in a whole epoch: is the data set empty?")
        self.epoch += 1
        self.in_epoch = 0
        self._begun = False
        self._before_ahead = None
        self.begin()

    def _fetch(self) -> tuple[Any, bool] | None:
        length = self.loader.length()
        if length is not None:
            try:
                return self.loader.next_batch(), self.in_epoch + 1 >= length
            except StopIteration:
                return None
        # Nobody knows the length: look one batch ahead, and remember the position before it.
        try:
            batch = self._ahead.pop() if self._ahead else self.loader.next_batch()
        except StopIteration:
            return None
        self._before_ahead = self.loader.position()
        if self.loader.kind == "stateful":  # the others have random numbers of their own here
            self._before_ahead["random"] = rng.capture(None)
        try:
            self._ahead.append(self.loader.next_batch())
        except StopIteration:
            return batch, True
        return batch, False

    def first(self) -> Any:
        """A batch to warm up with; call ``reset`` when done."""
        self.loader.begin(0)
        try:
            return self.loader.next_batch()
        except StopIteration:
            raise JobError("the loader gave no batch to warm up with") from None

    def reset(self) -> None:
        """Stop the loader's workers and forget the position."""
        self.loader.close()
        self.epoch = self.in_epoch = 0
        self._begun = False
        self._ahead = []
        self._before_ahead = None

    @property
    def drift(self) -> int:
        """Samples that the loader has given beyond what the loop has counted: 0 when the two
        records of a restored position agree, more when samples were lost, less when doubled."""
        if not self._begun:
            return 0
        given = self.loader.batches - len(self._ahead)
        return (given - self.in_epoch) * int(self.facts().get("batch_size") or 1)

    # -- the part of the state ------------------------------------------------------------

    def position(self) -> Any:
        """The loader's position after the batches given so far (typed JSON)."""
        self.begin()
        if self.done and not self._begun:
            return None
        return self.loader.position() if self._before_ahead is None else self._before_ahead

    def resume(self, tree: Any) -> None:
        """Recreate the loader's iterator at a position; set ``epoch`` and ``in_epoch`` first.
        Draws random numbers: put the generators back afterwards."""
        self._ahead = []
        self._before_ahead = None
        self.loader.resume(tree)
        self._begun = True
        if "random" in tree:  # the batch looked at is made again, with what it was made of
            rng.restore(tree["random"], None)
            self._before_ahead = tree
            with contextlib.suppress(StopIteration):
                self._ahead.append(self.loader.next_batch())

    def facts(self) -> dict[str, Any]:
        return self.loader.facts()

    def fingerprint(self) -> str | None:
        return self.loader.fingerprint()

    def close(self) -> None:
        self.loader.close()

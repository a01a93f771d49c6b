"""A driver's group ``collectives`` as what a process group of torch's asks for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from drivetrain.errors import Unsupported
from drivetrain.hal.opened import opened

if TYPE_CHECKING:
    from drivetrain.pytorch.custom.hal_backend import HalBackend

_WORDS = ("sum", "product", "min", "max", "avg")


class Communicator:
    """One rank. Its devices join when a first tensor of theirs comes, which is the same call on all
    ranks; each call is done when it returns."""

    def __init__(
        self, backend: HalBackend, store: Any, rank: int, size: int, timeout_s: float
    ) -> None:
        self._backend, self._rank, self._size = backend, rank, size
        self._store, self._timeout_s = store, timeout_s
        self._joined: dict[int, int] = {}

    def all_reduce(self, tensors: Sequence[Tensor], op: Any) -> None:
        """In place, on tensors of any strides."""
        word = self._word(op)
        for each in tensors:
            whole = each.contiguous()
            self._call(
                "all_reduce", whole, whole.data_ptr(), whole.numel(), _name(whole), _sum(word)
            )
            if word == "avg":
                whole.div_(self._size)
            if whole is not each:
                each.copy_(whole)

    def broadcast(self, tensors: Sequence[Tensor], root: int) -> None:
        for each in tensors:
            whole = each.contiguous()
            self._call("broadcast", whole, whole.data_ptr(), whole.nbytes, root)
            if whole is not each:
                each.copy_(whole)

    def all_gather(self, outputs: Sequence[Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
        for parts, given in zip(outputs, inputs, strict=True):
            own = given.contiguous()
            shape = (self._size, *own.shape)
            whole = torch.empty(shape, dtype=own.dtype, device=own.device)
            self._call("all_gather", own, whole.data_ptr(), own.data_ptr(), own.nbytes)
            for part, one in zip(parts, whole.unbind(0), strict=True):
                part.copy_(one)

    def reduce_scatter(
        self, outputs: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]], op: Any
    ) -> None:
        word = self._word(op)
        for output, parts in zip(outputs, inputs, strict=True):
            whole, own = torch.stack(list(parts)), output.contiguous()
            self._call(
                "reduce_scatter", own, own.data_ptr(), whole.data_ptr(), own.numel(), _name(own),
                _sum(word),
            )  # fmt: skip
            if word == "avg":
                own.div_(self._size)
            if own is not output:
                output.copy_(own)

    def barrier(self) -> None:
        name = torch._C._get_privateuse1_backend_name()
        index = torch.get_device_module(name).current_device()
        one = torch.zeros(1, dtype=torch.int32).to(torch.device(name, index))
        self._call("all_reduce", one, one.data_ptr(), 1, _name(one), "sum")

    def _call(self, name: str, tensor: Tensor, *arguments: Any) -> None:
        """Nothing is to be done for an empty tensor, on any rank."""
        if not tensor.numel():
            return
        index = tensor.device.index
        driver: Any = opened(self._backend.devices[index]).backend
        stream = self._backend.stream(index)
        getattr(driver, name)(self._handle(driver, index), *arguments, stream.handle)
        stream.synchronize()

    def _handle(self, driver: Any, index: int) -> int:
        found = self._joined.get(index)
        if found is None:
            key = f"drivetrain collectives {len(self._joined)}"
            if self._rank == 0:
                self._store.set(key, driver.collective_id())
            identity = bytes(self._store.get(key))
            found = driver.collective_join(identity, self._rank, self._size, self._timeout_s)
            self._joined[index] = found
        return found

    def _word(self, op: Any) -> str:
        from torch.distributed import ReduceOp

        for word in _WORDS:
            if op == getattr(ReduceOp, word.upper()):
                return word
        raise Unsupported(
            f"collectives of {self._backend.name} have {', '.join(_WORDS)}, and no other reduction",
            code="unsupported",
            driver=self._backend.devices[0].driver,
            op="all_reduce",
        )


def _sum(word: str) -> str:
    """The mean is a sum that is divided here."""
    return "sum" if word == "avg" else word


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")

"""Tensors as spans of bytes: which can be carried, where they lie, which lie in one another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from drivetrain.errors import CannotCarry

_WRAPPERS = {Tensor.__torch_dispatch__, torch.nn.Parameter.__torch_dispatch__}


@dataclass(frozen=True, slots=True)
class Spec:
    """The facts of one named tensor; ``nbytes`` counts its storage span, ``stride`` elements.

    ``klass`` is ``replace`` or ``read_only``. ``window``: it changes in the optimizer's step only,
    so it may be copied during forward and backward. ``alias_of`` names the tensor whose bytes it
    shares, from ``alias_offset`` on; an alias has no bytes of its own in the image. ``state_of`` is
    (optimizer, index of the parameter, key) of optimizer state. ``host``: on the CPU although the
    job is not.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    nbytes: int
    klass: str
    window: bool
    alias_of: str | None = None
    alias_offset: int = 0
    state_of: tuple[str, int, str] | None = None
    host: bool = False


def check(tensor: Tensor, name: str) -> None:
    """Raises CannotCarry, naming the tensor, unless its bytes are all there is to it."""
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        what, advice = "not initialised yet", "run one forward pass before the first step"
    elif tensor.layout != torch.strided:
        what, advice = f"sparse ({tensor.layout})", "keep it dense (to_dense())"
    elif tensor.is_quantized:
        what, advice = "quantised", "keep its int_repr() and scales as plain tensors"
    elif type(tensor).__torch_dispatch__ not in _WRAPPERS:
        what, advice = f"a {type(tensor).__name__}", "keep plain tensors"
    elif tensor.device.type == "meta":
        what, advice = "on the meta device", "give it real memory first (to_empty())"
    elif tensor.is_conj() or tensor.is_neg():
        what, advice = "a lazy conjugate or negative", "call resolve_conj().resolve_neg()"
    elif not is_dense(tensor):
        what = f"not dense (shape {tuple(tensor.shape)}, strides {tensor.stride()})"
        advice = "call contiguous(), or keep the tensor that it is a view of"
    else:
        return
    raise CannotCarry(f"{name} is {what}, which cannot be carried; {advice}", path=name)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill their span of storage without gap or overlap, in some order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    pairs = sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n != 1)
    for stride, size in pairs:
        if stride != expected:
            return False
        expected *= size
    return True


def flat(tensor: Tensor) -> Tensor:
    """The bytes of a dense tensor in storage order, uint8 and one-dimensional. Never a copy."""
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device=tensor.device)
    line = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return line.view(torch.uint8)


def view_of(owner: Tensor, offset: int, like: Spec) -> Tensor:
    """A tensor like ``like`` over the bytes of ``owner`` that start at ``offset``."""
    line = flat(owner)[offset : offset + like.nbytes]
    return line.view(dtype_of(like)).as_strided(like.shape, like.stride)


def dtype_of(spec: Spec) -> torch.dtype:
    dtype = getattr(torch, spec.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype


def nbytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def matches(tensor: Tensor, spec: Spec) -> bool:
    """Whether a raw copy of the spec's bytes into the tensor gives the same values."""
    return (
        str(tensor.dtype) == f"torch.{spec.dtype}"
        and tuple(tensor.shape) == spec.shape
        and tensor.stride() == spec.stride
    )


def same_memory(a: Tensor, b: Tensor) -> bool:
    return (
        a.data_ptr() == b.data_ptr()
        and a.device == b.device
        and a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
    )


def aliases(named: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[str, int]]:
    """Which tensors lie in which: name -> (name of the owner, offset in bytes).

    Of equal spans the first is the owner. Raises CannotCarry where two spans overlap in part.
    """
    spans = []
    for order, (name, tensor) in enumerate(named):
        nbytes = nbytes_of(tensor)
        if nbytes:
            device = (tensor.device.type, tensor.device.index or 0)
            spans.append((device, tensor.data_ptr(), -nbytes, order, name))
    spans.sort()
    found: dict[str, tuple[str, int]] = {}
    owner, owner_device, first, last = "", ("", 0), 0, 0
    for device, start, negative, _, name in spans:
        stop = start - negative
        if device == owner_device and start < last:
            if stop > last:
                raise CannotCarry(
                    f"{name} overlaps {owner} in part, which cannot be carried; "
                    "keep the tensor that both are views of",
                    path=name,
                )
            found[name] = (owner, start - first)
        else:
            owner, owner_device, first, last = name, device, start, stop
    return found

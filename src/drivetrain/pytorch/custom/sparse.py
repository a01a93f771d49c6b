"""Sparse tensors in coordinate form on the device: indices and values of it, computed on the CPU.

What touches no elements is the CPU's own, as with views. Other operations run on the CPU, counted.
Compressed forms (CSR and the like) are not there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from drivetrain.errors import Unsupported
from drivetrain.pytorch.custom.runtime import Runtime
from drivetrain.pytorch.custom.schema import overload, plan_of, words

KEY = "SparsePrivateUse1"
_FACTS = words(
    """
    _sparse_coo_tensor_with_dims_and_tensors _sparse_coo_tensor_with_dims _indices _values
    sparse_dim dense_dim _dimI _dimV _nnz is_coalesced _coalesced_
    """
)
_FROM_DENSE = ("_to_sparse", "_to_sparse.sparse_dim")
_libraries: list[Any] = []
Library: Any = torch.library.Library


def register(runtime: Runtime) -> None:
    """From here on ``to_sparse()``, sparse gradients and `torch.optim.SparseAdam` work."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.SparseCPU)
    library, rest = Library("aten", "IMPL"), Library("_", "IMPL")
    for name in _FACTS:
        op = overload(f"aten::{name}")
        if op is not None:
            library.impl(name, partial(op._handle.redispatch_boxed, keys), KEY)
    for name in _FROM_DENSE:
        op = overload(f"aten::{name}")
        if op is not None:
            library.impl(name, partial(_run, runtime, op), "PrivateUse1")
    run: Callable[..., Any] = partial(_run, runtime)
    rest.fallback(run, KEY)
    _libraries.extend((library, rest))


def _run(runtime: Runtime, op: Any, *args: Any, **kwargs: Any) -> Any:
    plan = plan_of(op)
    ours = [each for each in (*args, *kwargs.values()) if _is_ours(runtime, each)]
    device = ours[0].device if ours else torch.device(runtime.name, runtime.current)
    runtime.fallbacks.note(plan.name)
    hosts = [_to(runtime, each, torch.device("cpu")) for each in args]
    more = {name: _to(runtime, each, torch.device("cpu")) for name, each in kwargs.items()}
    out = op(*hosts, **more)
    if not plan.written:
        return _to(runtime, out, device)
    (position, _), *others = plan.written
    if others or position >= len(args) or args[position].layout is not torch.strided:
        raise Unsupported(
            f"{plan.name} writes to a sparse tensor of {runtime.name}; use the form that gives a "
            "new one, or move it to the CPU",
            code="unsupported",
            driver=runtime.name,
            op=plan.name,
        )
    args[position].copy_(hosts[position])
    return args[position]


def _is_ours(runtime: Runtime, value: Any) -> bool:
    return isinstance(value, Tensor) and runtime.is_here(value)


def _to(runtime: Runtime, value: Any, device: torch.device) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_to(runtime, each, device) for each in value)
    if isinstance(value, torch.device) and value.type == runtime.name:
        return device
    if not isinstance(value, Tensor) or value.device == device:
        return value
    if value.layout is not torch.sparse_coo:
        return value.to(device)
    return torch.sparse_coo_tensor(
        value._indices().to(device),
        value._values().to(device),
        value.shape,
        check_invariants=False,
        is_coalesced=value.is_coalesced(),
    )

"""Sparse tensors on the device: indices and values of it, computed with on the CPU.

What touches no elements is the CPU's own, as with views. Other operations run on the CPU, counted.
Coordinate form and the compressed ones (CSR, CSC, BSR, BSC).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from drivetrain.errors import Unsupported
from drivetrain.pytorch.custom.runtime import Runtime
from drivetrain.pytorch.custom.schema import argument_at, overload, plan_of, words

COMPRESSED = "SparseCsrPrivateUse1"
_FACTS = {
    "SparsePrivateUse1": words(
        """
        _sparse_coo_tensor_with_dims_and_tensors _sparse_coo_tensor_with_dims _indices _values
        sparse_dim dense_dim _dimI _dimV _nnz is_coalesced _coalesced_
        """
    ),
    COMPRESSED: words(
        "crow_indices col_indices ccol_indices row_indices values _nnz sparse_dim dense_dim"
    ),
}
"""By the key of the form."""
_FROM_DENSE = words(
    """
    _to_sparse _to_sparse.sparse_dim _to_sparse_csr _to_sparse_csc _to_sparse_bsr _to_sparse_bsc
    sparse_mask
    """
)
_BY_ROW = (torch.sparse_csr, torch.sparse_bsr)
_libraries: list[Any] = []
Library: Any = torch.library.Library


def register(runtime: Runtime) -> None:
    """From here on ``to_sparse()``, sparse gradients and `torch.optim.SparseAdam` work."""
    library, rest = Library("aten", "IMPL"), Library("_", "IMPL")
    run: Callable[..., Any] = partial(_run, runtime)
    for key, names in _FACTS.items():
        own = getattr(torch._C.DispatchKey, key.replace("PrivateUse1", "CPU"))
        keys = torch._C.DispatchKeySet(own)
        for name in names:
            op = overload(f"aten::{name}")
            if op is not None:
                library.impl(name, partial(op._handle.redispatch_boxed, keys), key)
        rest.fallback(run, key)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in torch._C._dispatch_get_all_op_names():
        short = name.removeprefix("aten::")
        if not has(name, "SparseCsrCPU") or short.startswith(("empty", "resize")):
            continue
        op = overload(name)
        if short not in _FACTS[COMPRESSED] and op is not None and not plan_of(op).written:
            library.impl(short, partial(_run, runtime, op), COMPRESSED)  # whole, not in parts
    for name in _FROM_DENSE:
        op = overload(f"aten::{name}")
        if op is not None:
            library.impl(name, partial(_run, runtime, op), "PrivateUse1")
    _libraries.extend((library, rest))


def _run(runtime: Runtime, op: Any, *args: Any, **kwargs: Any) -> Any:
    plan = plan_of(op)
    ours = [each for each in (*args, *kwargs.values()) if _is_ours(runtime, each)]
    device = ours[0].device if ours else torch.device(runtime.name, runtime.current)
    runtime.fallbacks.note(plan.name)
    hosts = [_to(runtime, each, torch.device("cpu")) for each in args]
    more = {name: _to(runtime, each, torch.device("cpu")) for name, each in kwargs.items()}
    if op is torch.ops.aten._sparse_mm_reduce_impl.default:
        # Torch's CPU leaves out the positions that backward reads unless it sees who needs them.
        hosts[0] = hosts[0].detach().requires_grad_()
        with torch.enable_grad():
            out = tuple(each.detach() for each in op(*hosts, **more))
    else:
        out = op(*hosts, **more)
    if not plan.written:
        return _to(runtime, out, device)
    place, *others = plan.written
    target = argument_at(place, args, kwargs)
    if others or target.layout is not torch.strided:
        raise Unsupported(
            f"{plan.name} writes to a sparse tensor of {runtime.name}; use the form that gives a "
            "new one, or move it to the CPU",
            code="unsupported",
            driver=runtime.name,
            op=plan.name,
        )
    host = argument_at(place, tuple(hosts), more)
    if target.shape != host.shape:
        target.resize_(host.shape)
    return target.copy_(host)


def _is_ours(runtime: Runtime, value: Any) -> bool:
    return isinstance(value, Tensor) and runtime.is_here(value)


def _to(runtime: Runtime, value: Any, device: torch.device) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_to(runtime, each, device) for each in value)
    if isinstance(value, torch.device) and value.type == runtime.name:
        return device
    if not isinstance(value, Tensor) or value.device == device:
        return value
    if value.layout is torch.strided:
        return value.to(device)
    if value.layout is not torch.sparse_coo:
        by_row = value.layout in _BY_ROW
        return torch.sparse_compressed_tensor(
            (value.crow_indices() if by_row else value.ccol_indices()).to(device),
            (value.col_indices() if by_row else value.row_indices()).to(device),
            value.values().to(device),
            value.shape,
            layout=value.layout,
            check_invariants=False,
        )
    return torch.sparse_coo_tensor(
        value._indices().to(device),
        value._values().to(device),
        value.shape,
        check_invariants=False,
        is_coalesced=value.is_coalesced(),
    )

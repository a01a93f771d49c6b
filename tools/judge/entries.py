"""torch's own databases of operations, modules and optimizers, one entry at a time.

An entry is run on the device and, with the same values, on the CPU; it passes when both give the
same within torch's own tolerances. One that does not run on the CPU at all is not counted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.common_optimizers import optim_db
from torch.utils._pytree import tree_leaves, tree_map_only

STEPS = 3
DTYPES = ("float32", "bfloat16", "float16", "int64", "bool")
_FUSED = {"LSTM", "LSTMCell", "GRU", "GRUCell"}
"""Devices run their cells fused, the CPU does not: torch compares their gradients to 5e-5
(test_nn.py, test_rnn_fused)."""
_UNDEFINED = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty")
_UNDEFINED += ("new_empty_strided", "resize_", "resize_as_")
"""Operations whose results have no value, or keep what memory held."""


class NotOnCpu(Exception):
    """The entry does not pass on the CPU of this machine: it is not counted."""


@dataclass(frozen=True)
class Entry:
    """``group`` is what a rate is of: ``op_db float32 forward``."""

    group: str
    name: str
    run: Callable[[str], None]
    """Given a device, raises where the device is wrong."""


def entries(dtypes: tuple[str, ...] = DTYPES) -> list[Entry]:
    """All, in a fixed order."""
    return list(_all(dtypes))


def _all(dtypes: tuple[str, ...]) -> Iterator[Entry]:
    for name in dtypes:
        dtype = getattr(torch, name)
        for op in sorted(op_db, key=lambda each: str(each.formatted_name)):
            if dtype not in op.supported_dtypes("cpu"):
                continue
            yield Entry(f"op_db {name} forward", op.formatted_name, _forward(op, dtype))
            if name == "float32" and op.supports_autograd:
                yield Entry(f"op_db {name} backward", op.formatted_name, _backward(op, dtype))
    for module in module_db:
        if torch.float32 in module.dtypes:
            yield Entry("module_db", module.formatted_name, _module(module))
    for optim in optim_db:
        yield Entry("optim_db", optim.optim_cls.__name__, _optimizer(optim))


# -- comparing -------------------------------------------------------------------------------------


def to_cpu(value: Any) -> Any:
    """Tensors to the CPU, with strides, storage offsets and shared memory as they were."""
    storages: dict[int, Any] = {}

    def one(tensor: torch.Tensor) -> torch.Tensor:
        needs = tensor.requires_grad
        tensor = tensor.detach()
        if tensor.layout is torch.strided and not (tensor.is_conj() or tensor.is_neg()):
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key not in storages:
                storages[key] = storage.cpu()
            host = torch.empty(0, dtype=tensor.dtype)
            host.set_(storages[key], tensor.storage_offset(), tensor.shape, tensor.stride())
        else:
            host = tensor.cpu()
        return host.requires_grad_(needs)

    return tree_map_only(torch.Tensor, one, value)


def same(found: Any, expected: Any, rtol: float | None = None, atol: float | None = None) -> None:
    """Raises AssertionError where they differ by more than rounding; None: torch's tolerance for
    the type."""
    ours, theirs = tree_leaves(found), tree_leaves(expected)
    assert len(ours) == len(theirs), f"{len(ours)} results, expected {len(theirs)}"
    for one, other in zip(ours, theirs, strict=True):
        if not isinstance(other, torch.Tensor):
            assert one == other or one != one, f"{one!r}, expected {other!r}"
            continue
        host = one.detach().cpu()
        assert host.dtype == other.dtype, f"{host.dtype}, expected {other.dtype}"
        torch.testing.assert_close(host, other.detach().cpu(), rtol=rtol, atol=atol, equal_nan=True)


def on_device(results: Any, device: str) -> None:
    for each in tree_leaves(results):
        if isinstance(each, torch.Tensor):
            assert each.device.type == torch.device(device).type, f"a result is on {each.device}"


# -- operations ------------------------------------------------------------------------------------


def _forward(op: Any, dtype: torch.dtype) -> Callable[[str], None]:
    def run(device: str) -> None:
        torch.manual_seed(0)
        try:
            for sample in islice(op.sample_inputs("cpu", dtype), 2):
                op(sample.input, *sample.args, **sample.kwargs)
        except Exception as error:
            raise NotOnCpu(str(error)[:200]) from error
        torch.manual_seed(0)
        for sample in op.sample_inputs(device, dtype):
            host = to_cpu((sample.input, sample.args, sample.kwargs))
            given = tree_leaves((sample.input, sample.args))
            tensors = any(isinstance(each, torch.Tensor) for each in given)
            if host[2].get("device") is not None:
                host[2]["device"] = "cpu"
            moves = any(isinstance(each, (str, torch.device)) for each in sample.args)
            torch.manual_seed(3)
            try:
                expected = op(host[0], *host[1], **host[2])
            except Exception:
                continue  # not on the CPU either
            torch.manual_seed(3)
            found = op(sample.input, *sample.args, **sample.kwargs)
            if tensors and not moves and sample.kwargs.get("device") is None:
                on_device(found, device)
            if op.name.removeprefix("nn.functional.") in _UNDEFINED:
                assert [each.shape for each in tree_leaves(found)] == [
                    each.shape for each in tree_leaves(expected)
                ]
            else:
                same(found, expected)

    return run


def _backward(op: Any, dtype: torch.dtype) -> Callable[[str], None]:
    def gradients(sample: Any) -> Any:
        torch.manual_seed(3)
        out = sample.output_process_fn_grad(op(sample.input, *sample.args, **sample.kwargs))
        out = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
        given = tree_leaves((sample.input, sample.args, sample.kwargs))
        into = [t for t in given if isinstance(t, torch.Tensor) and t.requires_grad]
        if not out or not into:
            return []
        sums = [each.abs().sum() if each.is_complex() else each.sum() for each in out]
        return list(torch.autograd.grad(sums, into, allow_unused=True))

    def run(device: str) -> None:
        torch.manual_seed(0)
        try:
            for sample in islice(op.sample_inputs("cpu", dtype, requires_grad=True), 2):
                gradients(sample)
        except Exception as error:
            raise NotOnCpu(str(error)[:200]) from error
        torch.manual_seed(0)
        for sample in op.sample_inputs(device, dtype, requires_grad=True):
            host = copy.copy(sample)
            host.input, host.args, host.kwargs = to_cpu((sample.input, sample.args, sample.kwargs))
            if host.kwargs.get("device") is not None:
                host.kwargs["device"] = "cpu"
            try:
                expected = gradients(host)
            except Exception:
                continue
            found = gradients(sample)
            try:
                same(found, expected)
            except AssertionError:
                host.input, host.args, host.kwargs = _doubled((host.input, host.args, host.kwargs))
                if not _as_near(found, expected, gradients(host)):
                    raise

    return run


def _doubled(value: Any) -> Any:
    """Floats in double precision."""

    def one(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype is not torch.float32:
            return tensor
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    return tree_map_only(torch.Tensor, one, value)


def _as_near(found: Any, expected: Any, truth: Any) -> bool:
    """Whether gradients are as near to those in double precision as the CPU's own: some linear
    algebra loses so many digits that where memory begins decides the last ones."""
    for ours, theirs, right in zip(found, expected, truth, strict=True):
        if right is None or ours is None:
            if ours is not right:
                return False
            continue
        far, near = ((each.cpu() - right).abs().max().item() for each in (ours, theirs))
        if not far <= 2 * near:
            return False
    return True


# -- modules, optimizers ---------------------------------------------------------------------------


def _module(info: Any) -> Callable[[str], None]:
    def run(device: str) -> None:
        torch.manual_seed(0)
        for training in (True, False):
            try:
                samples = info.module_inputs_func(
                    info, device="cpu", dtype=torch.float32, requires_grad=True, training=training
                )
                samples = list(samples)
            except Exception as error:
                raise NotOnCpu(str(error)[:200]) from error
            for sample in samples:
                _module_once(info, sample, training, device)

    return run


def _module_once(info: Any, sample: Any, training: bool, device: str) -> None:
    made, given = sample.constructor_input, sample.forward_input
    module = info.module_cls(*made.args, **made.kwargs).train(training)

    def there(value: Any) -> Any:
        return tree_map_only(
            torch.Tensor,
            lambda t: t.detach().clone().to(device).requires_grad_(t.requires_grad),
            value,
        )

    def once(part: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        torch.manual_seed(1)
        out = part(*args, **kwargs)
        ends = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.requires_grad]
        if ends:
            sum(each.float().sum() for each in ends).backward()
        return out, [parameter.grad for parameter in part.parameters()]

    ours = copy.deepcopy(module).to(device)
    args, kwargs = there(given.args), there(given.kwargs)
    try:
        expected = once(module, given.args, given.kwargs)
    except Exception as error:
        raise NotOnCpu(str(error)[:200]) from error
    found = once(ours, args, kwargs)
    on_device(found, device)
    same(found[0], expected[0])
    fused = info.module_cls.__name__ in _FUSED
    same(found[1], expected[1], rtol=0.0 if fused else None, atol=5e-5 if fused else None)


def _optimizer(info: Any) -> Callable[[str], None]:
    kind = info.optim_cls

    def run(device: str) -> None:
        for sample in info.optim_inputs_func(device=device):
            options = {k: v for k, v in sample.kwargs.items() if k not in ("capturable", "fused")}
            torch.manual_seed(0)
            model = torch.nn.Linear(4, 4)
            ours = copy.deepcopy(model).to(device)
            x = torch.randn(8, 4)
            expected = _steps(kind, model, x, options)
            torch.testing.assert_close(_steps(kind, ours, x.to(device), options), expected)

    return run


def _steps(kind: Any, model: Any, x: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """The weight after some steps, on the CPU."""
    moved = tree_map_only(torch.Tensor, lambda t: t.detach().to(x.device), options)
    parameters = [model.weight] if kind.__name__ == "Muon" else model.parameters()
    optimizer = kind(parameters, **moved)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(x).pow(2).mean()
        loss.backward()
        if kind.__name__ == "SparseAdam":
            for each in model.parameters():
                each.grad = each.grad.to_sparse()
        return loss

    for _ in range(STEPS):
        optimizer.step(closure)
    weight: torch.Tensor = model.weight.detach().cpu()
    return weight

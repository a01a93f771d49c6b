"""Putting models, optimizer state and batches on the job's device."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.optim import Optimizer

from drivetrain.errors import BadInput


def place(thing: nn.Module | Optimizer, device: torch.device) -> None:
    """Moves a module's tensors or an optimizer's state to ``device``, in place.

    Parameters stay the same objects and tensors that share memory go on sharing it
    (``Module.to`` parts them). Adagrad, for one, builds its state on the CPU: place an optimizer
    after its model. Raises BadInput where torch cannot keep a parameter's identity.
    """
    if isinstance(thing, Optimizer):
        for index, parameter, state in _states(thing):
            for key in list(state):
                home = home_of(thing, index, str(key), parameter)
                state[key] = _moved(state[key], home)
        return
    tensors = {id(t): t for t in _own_tensors(thing)}.values()
    moving = [t for t in tensors if t.device != device]
    users: dict[int, int] = {}
    for tensor in moving:
        users[_storage_key(tensor)] = users.get(_storage_key(tensor), 0) + 1
    storages: dict[int, Tensor] = {}
    replaced: dict[int, Tensor] = {}
    with torch.no_grad():
        for tensor in moving:
            key = _storage_key(tensor)
            if users[key] > 1 and tensor.numel():
                if key not in storages:
                    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
                    whole.set_(tensor.untyped_storage())
                    storages[key] = whole.to(device)
                whole = storages[key]
                line = whole[: len(whole) // tensor.itemsize * tensor.itemsize].view(tensor.dtype)
                new = line.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            else:
                new = tensor.detach().to(device)
            grad, tensor.grad = (tensor.grad, None) if tensor.is_leaf else (None, None)
            try:
                if torch._has_compatible_shallow_copy_type(tensor, new):
                    tensor.data = new
                elif isinstance(
                    tensor, nn.Parameter
                ):  # XLA's, a custom device's: swap what they are
                    new = nn.Parameter(new, requires_grad=tensor.requires_grad)
                    torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call]
                else:
                    replaced[id(tensor)] = new
            except RuntimeError as error:
                raise BadInput(
                    f"torch cannot move a {type(tensor).__name__} from {tensor.device} to {device} "
                    f"without making a new one ({error}); build the model on {device}"
                ) from error
            if grad is not None:
                tensor.grad = grad.to(device)
    for part in thing.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = replaced.get(id(buffer), buffer)
    thing.to(device)  # everything is there; this runs what modules do after a move (RNN weights)


def home_of(optimizer: Optimizer, index: int, key: str, parameter: Tensor) -> torch.device:
    """Where an optimizer keeps the state ``key`` of its parameter number ``index``.

    ``step`` stays on the CPU unless the group is fused or capturable, as in torch's own rule.
    """
    if key != "step":
        return parameter.device
    for group in optimizer.param_groups:
        if index < len(group["params"]):
            on_device = group.get("capturable") or group.get("fused")
            return parameter.device if on_device else torch.device("cpu")
        index -= len(group["params"])
    return torch.device("cpu")


def place_batch(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``, in the same structure; what holds none is the same
    object. Knows tuples, named tuples, lists, mappings, dataclasses and packed sequences; anything
    else is handed on as it is. Copies from pinned memory do not wait.
    """
    if isinstance(batch, Tensor):
        if batch.device == device:
            return batch
        return batch.to(device, non_blocking=batch.device.type == "cpu" and batch.is_pinned())
    if isinstance(batch, PackedSequence):
        return batch if batch.data.device == device else batch.to(device)  # type: ignore[arg-type]
    if isinstance(batch, (tuple, list)):
        items = [place_batch(item, device) for item in batch]
        if all(new is old for new, old in zip(items, batch, strict=True)):
            return batch
        if type(batch) is list or type(batch) is tuple:
            return type(batch)(items)
        if hasattr(batch, "_fields"):
            return type(batch)(*items)
        return type(batch)(items)
    if isinstance(batch, Mapping):
        placed = {key: place_batch(item, device) for key, item in batch.items()}
        if all(placed[key] is item for key, item in batch.items()):
            return batch
        if isinstance(batch, MutableMapping):
            new_map = copy.copy(batch)
            for key, item in placed.items():
                new_map[key] = item
            return new_map
        return type(batch)(placed)  # type: ignore[call-arg]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = [f.name for f in dataclasses.fields(batch)]
        moved = {name: place_batch(getattr(batch, name), device) for name in fields}
        if all(moved[name] is getattr(batch, name) for name in fields):
            return batch
        new = copy.copy(batch)
        for name, item in moved.items():
            object.__setattr__(new, name, item)  # works for frozen ones and runs no __post_init__
        return new
    return batch


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _states(optimizer: Optimizer) -> Iterator[tuple[int, Tensor, dict[Any, Any]]]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, parameter in enumerate(parameters):
        if parameter in optimizer.state:
            yield index, parameter, optimizer.state[parameter]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value

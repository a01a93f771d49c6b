"""Putting a job's trees back into the objects that are there."""

from __future__ import annotations

import sys
from collections import deque
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from drivetrain.errors import BadInput, MigrationError
from drivetrain.pytorch import dense
from drivetrain.pytorch import tree as typed
from drivetrain.pytorch.gather import is_stateful
from drivetrain.pytorch.rng import generator_state, restore_generator_of
from drivetrain.pytorch.walk import bare, join, parameters, parts


def restore_module(module: nn.Module, tree: Any, table: dict[str, Tensor]) -> None:
    """Modes, what wants gradients, and extra state; its tensors are restored as bytes."""
    unlike, fixed = set(tree["unlike"]), set(tree.get("fixed", ()))
    for prefix, part in parts(module):
        for key, parameter in part._parameters.items():
            wanted = join(prefix, key) not in fixed
            if parameter is not None and "fixed" in tree and parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)
        part.training = tree["training"] != (prefix in unlike)
        if prefix in tree["extra_state"]:
            part.set_extra_state(typed.decode(tree["extra_state"][prefix], table))


def restore_optimizer(optimizer: Optimizer, tree: Any, table: dict[str, Tensor]) -> None:
    """Groups and state, over tensors of ``table``; no cast on the way (pytorch#80809)."""
    for group, body in zip(optimizer.param_groups, tree["groups"], strict=True):
        values = typed.decode(body, table)
        for key in [key for key in group if key != "params" and key not in values]:
            del group[key]
        for key, value in values.items():
            group[key] = restore_into(group.get(key), value)
    owned = parameters(optimizer)
    states: dict[Any, Any] = {}
    for index, owner, body in tree["state"]:
        if index is None:
            states[typed.decode(owner, {})] = typed.decode(body, table)
            continue
        if type(index) is not int or not 0 <= index < len(owned):
            raise BadInput(f"the optimizer has {len(owned)} parameters, not number {index}")
        states[owned[index]] = {
            typed.decode(key, {}): typed.decode(value, table) for key, value in body
        }
    optimizer.state.clear()
    optimizer.state.update(states)


def restore_extra(name: str, value: Any, tree: Any, table: dict[str, Tensor]) -> Any:
    """A value of the caller's from {kind: tree}; what ``extra`` holds from now on."""
    ((kind, body),) = tree.items()
    if kind == "module" and isinstance(value, nn.Module):
        restore_module(bare(value), body, table)
    elif kind == "generator" and generator_state(value) is not None:
        restore_generator_of(value, body)
    elif kind == "object" and is_stateful(value):
        value.load_state_dict(typed.decode(body, table))
    elif kind == "value":
        return restore_into(value, typed.decode(body, table))
    else:
        raise MigrationError(
            f"extra {name!r} is a {kind} in the arriving state and a {type(value).__name__} "
            "here; both must build the same job"
        )
    return value


def restore_into(live: Any, new: Any) -> Any:
    """``new``, in the objects that are there already where they are of the same type, so that
    names which the script gave to them stay true."""
    if isinstance(live, Tensor) and isinstance(new, Tensor):
        return live if dense.same_memory(live, new) else new
    if type(live) is not type(new):
        return new
    if isinstance(live, dict):
        values = {
            key: restore_into(live[key], item) if key in live else item for key, item in new.items()
        }
        live.clear()
        for key, item in values.items():
            live[key] = item
        return live
    if isinstance(live, list):
        live[:] = [
            restore_into(live[i], item) if i < len(live) else item for i, item in enumerate(new)
        ]
        return live
    if isinstance(live, (set, deque)) and getattr(live, "maxlen", 0) == getattr(new, "maxlen", 0):
        live.clear()
        live.update(new) if isinstance(live, set) else live.extend(new)
        return live
    numpy = sys.modules.get("numpy")
    if (
        numpy is not None
        and isinstance(live, numpy.ndarray)
        and (live.shape, live.dtype) == (new.shape, new.dtype)
        and live.flags.writeable
    ):
        live[...] = new
        return live
    return new

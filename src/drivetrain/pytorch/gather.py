"""Finding every tensor of a job and saying what is around them."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drivetrain.errors import CannotCarry
from drivetrain.pytorch import dense
from drivetrain.pytorch import tree as typed
from drivetrain.pytorch.dense import Spec
from drivetrain.pytorch.rng import generator_state
from drivetrain.pytorch.walk import bare, join, loose_name, parameters, parts

PARAMETER, OPTIMIZER, BUFFER, HELD, GIVEN = range(5)

WasWritten = Callable[[str, Tensor], bool]


@dataclass(slots=True)
class Slot:
    """A live tensor. ``kind``: HELD is in a container of the user's, GIVEN by a state_dict()."""

    name: str
    tensor: Tensor
    kind: int
    window: bool = False
    frozen: bool = False
    state_of: tuple[str, int, str] | None = None
    home: tuple[nn.Module, str] | None = None


@dataclass
class Gathered:
    slots: list[Slot] = field(default_factory=list)
    tree: dict[str, Any] = field(default_factory=dict)

    def add(self, found: dict[str, Tensor], kind: int, **facts: Any) -> None:
        self.slots += [Slot(name, tensor, kind, **facts) for name, tensor in found.items()]


def take(out: Gathered, value: Any, path: str, kind: int, **facts: Any) -> Any:
    """A value as a tree; its tensors go into ``out``."""
    found: dict[str, Tensor] = {}
    tree = typed.encode(value, path, found)
    out.add(found, kind, **facts)
    return tree


def signature(slots: list[Slot], device: torch.device) -> list[Any] | None:
    """All that the specs depend on; None when a tensor has no address (sparse ones, say)."""
    found: list[Any] = [device]
    try:
        for slot in slots:
            t = slot.tensor
            found.append((slot.name, slot.kind, slot.window, slot.frozen, type(t), t.dtype))
            found.append((t.data_ptr(), t.shape, t.stride(), t.device, t.is_conj(), t.is_neg()))
    except (RuntimeError, ValueError):  # NotImplementedError is one of the first
        return None
    return found


def gather_module(
    out: Gathered,
    path: str,
    module: nn.Module,
    stepped: set[int],
    *,
    was_written: WasWritten | None,
) -> dict[str, Any]:
    """A module's parameters and buffers into ``out``; the rest of its state as a tree, with the
    names of the parameters that want no gradients (``fixed``).

    ``stepped`` are the ids of what optimizers change; ``was_written`` tells of a model's frozen
    parameter whether somebody writes it all the same (None: a module that is no model).
    """
    extra_state = {}
    fixed = []
    for prefix, part in parts(module):
        for key, parameter in part._parameters.items():
            if parameter is None:
                continue
            if not parameter.requires_grad:
                fixed.append(join(prefix, key))
            window = id(parameter) in stepped
            frozen = was_written is not None and not window and not parameter.requires_grad
            name = join(path, prefix, key)
            dense.check(parameter, name)
            slot = Slot(name, parameter.detach(), PARAMETER, window)
            slot.frozen = (
                frozen and was_written is not None and not was_written(slot.name, parameter)
            )
            slot.home = (part, key)
            out.slots.append(slot)
        for key, buffer in part._buffers.items():
            if buffer is not None:
                name = join(path, prefix, key)
                out.slots.append(Slot(name, buffer, BUFFER, home=(part, key)))
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            name = join(path, prefix, "(extra_state)")
            extra_state[prefix] = take(out, part.get_extra_state(), name, GIVEN)
    unlike = [prefix for prefix, part in parts(module) if part.training != module.training]
    return {
        "training": module.training,
        "unlike": unlike,
        "fixed": fixed,
        "extra_state": extra_state,
    }


def gather_optimizer(
    out: Gathered, name: str, optimizer: Optimizer, known: set[int]
) -> dict[str, Any]:
    """Its state's tensors into ``out``, the rest as a tree; ``known`` are the ids of parameters
    that modules own."""
    indices: dict[int, int] = {}
    for index, parameter in enumerate(parameters(optimizer)):
        indices.setdefault(id(parameter), index)
        if id(parameter) not in known:
            own = loose_name(name, index)
            out.slots.append(Slot(own, parameter.detach(), PARAMETER, window=True))
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        values = {key: value for key, value in group.items() if key != "params"}
        groups.append(take(out, values, f"optimizer.{name}.group{number}", HELD))
    states = []
    entries: dict[Any, Any] = optimizer.state  # keyed by tensors, and by what one likes
    for owner, state in entries.items():
        index = indices.get(id(owner), -1) if isinstance(owner, Tensor) else -1
        if index < 0:
            if isinstance(owner, Tensor):
                raise CannotCarry(
                    f"optimizer {name} has state for a tensor that is in none of its groups; "
                    "remove it from optimizer.state",
                    path=f"optimizer.{name}",
                )
            path = f"optimizer.{name}.{owner}"
            body = take(out, state, path, OPTIMIZER, window=True)
            states.append([None, typed.encode(owner, path, None), body])
            continue
        pairs = []
        for key, value in state.items():
            body = take(
                out,
                value,
                f"optimizer.{name}.{index}.{key}",
                OPTIMIZER,
                window=True,
                state_of=(name, index, str(key)),
            )
            pairs.append([typed.encode(key, f"optimizer.{name}.{index}", None), body])
        states.append([index, None, pairs])
    return {"groups": groups, "state": states}


def gather_schedulers(out: Gathered, schedulers: Mapping[str, Any]) -> dict[str, Any]:
    """The schedulers' states, without the functions in them."""
    return {
        name: take(out, without_code(scheduler.state_dict()), f"scheduler.{name}", GIVEN)
        for name, scheduler in schedulers.items()
    }


def gather_extra(out: Gathered, name: str, value: Any) -> dict[str, Any]:
    """A value of the caller's: {kind: tree}."""
    path = f"extra.{name}"
    if isinstance(value, nn.Module):
        return {"module": gather_module(out, path, bare(value), set(), was_written=None)}
    if isinstance(value, Optimizer):
        raise CannotCarry(f"{path} is an optimizer; pass it as an optimizer", path=path)
    generator = generator_state(value)
    if generator is not None:
        return {"generator": generator}
    if is_stateful(value):
        return {"object": take(out, value.state_dict(), path, GIVEN)}
    return {"value": take(out, value, path, HELD)}


def is_stateful(value: object) -> bool:
    """True for what gives and takes its state as a dict."""
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


def without_code(state: Any) -> Any:
    """A scheduler's state without functions, which the other side builds for itself."""
    if type(state) is not dict:
        return state
    return {
        key: [without_code(item) for item in value] if type(value) is list else without_code(value)
        for key, value in state.items()
        if not isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType))
    }


def specs_of(slots: list[Slot], device: torch.device) -> list[Spec]:
    """The facts of the tensors of a job on ``device``, in image order."""
    # Of two names for the same bytes the parameter's, then the optimizer's is the owner's.
    ordered = sorted(slots, key=lambda slot: (slot.kind, slot.name))
    found = dense.aliases((slot.name, slot.tensor) for slot in ordered)
    by_name = {slot.name: slot for slot in ordered}
    written = {found[s.name][0] for s in ordered if s.name in found and not s.frozen}
    rank = {}
    for slot in ordered:
        owner = by_name[found[slot.name][0]] if slot.name in found else slot
        frozen = owner.frozen and owner.name not in written
        rank[slot.name] = 2 if frozen else 1 if owner.window else 0
    ordered.sort(key=lambda slot: (rank[slot.name], slot.name))
    specs = []
    for slot in ordered:
        owner_name, offset = found.get(slot.name, (None, 0))
        specs.append(
            Spec(
                name=slot.name,
                dtype=str(slot.tensor.dtype).removeprefix("torch."),
                shape=tuple(slot.tensor.shape),
                stride=tuple(slot.tensor.stride()),
                nbytes=dense.nbytes_of(slot.tensor),
                klass="read_only" if rank[slot.name] == 2 else "replace",
                window=rank[slot.name] == 1,
                alias_of=owner_name,
                alias_offset=offset,
                state_of=slot.state_of,
                host=slot.tensor.device.type == "cpu" and device.type != "cpu",
            )
        )
    return specs

"""Tensors for a state that arrives: those that are here where they fit, new ones where not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drivetrain.errors import MigrationError
from drivetrain.pytorch import dense
from drivetrain.pytorch.dense import Spec
from drivetrain.pytorch.gather import BUFFER, GIVEN, PARAMETER, Slot
from drivetrain.pytorch.place import home_of
from drivetrain.pytorch.walk import join, parameters, parts


def fact_of(spec: Spec) -> dict[str, Any]:
    """A spec as JSON."""
    fact = asdict(spec)
    for key in ("shape", "stride", "state_of"):
        fact[key] = None if fact[key] is None else list(fact[key])
    return fact


def spec_of(fact: Mapping[str, Any]) -> Spec:
    """The spec that ``fact`` made JSON of. MigrationError for a type this torch does not know."""
    known = {item.name for item in fields(Spec)}
    values: dict[str, Any] = {"klass": "replace", "window": False, "state_of": None}
    values |= {key: value for key, value in fact.items() if key in known}
    for key in ("shape", "stride", "state_of"):
        values[key] = None if values[key] is None else tuple(values[key])
    spec = Spec(**values)
    if not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
        raise MigrationError(f"{spec.name} is {spec.dtype}, which this torch does not know")
    return spec


@dataclass(frozen=True)
class Arrival:
    """Where a state arrives: this job's models, optimizers, device and present tensors."""

    models: Mapping[str, nn.Module]
    optimizers: Mapping[str, Optimizer]
    device: torch.device
    slots: Mapping[str, Slot]
    ours: Mapping[str, Spec]

    def table(self, wanted: list[Spec]) -> dict[str, Tensor]:
        """A tensor for each spec of ``wanted``, aliases as views of their owners.

        Raises MigrationError, having changed nothing of the job, when the models differ.
        """
        self._compare(wanted)
        table: dict[str, Tensor] = {}
        for spec in wanted:
            if spec.alias_of is None:
                table[spec.name] = self._tensor_for(spec, self.slots.get(spec.name))
        for spec in wanted:
            if spec.alias_of is not None:
                slot, own = self.slots.get(spec.name), self.ours.get(spec.name)
                same = own is not None and slot is not None and slot.kind != GIVEN
                if same and own and slot and aliased_alike(own, spec):
                    same = dense.matches(slot.tensor, spec)
                    if same and table[spec.alias_of].data_ptr() + spec.alias_offset == (
                        slot.tensor.data_ptr()
                    ):
                        table[spec.name] = slot.tensor
                        continue
                table[spec.name] = dense.view_of(table[spec.alias_of], spec.alias_offset, spec)
        return table

    def _compare(self, wanted: list[Spec]) -> None:
        """The parameters must be the same on both sides; the first difference is named."""
        names = {spec.name for spec in wanted}
        for name, slot in self.slots.items():
            if slot.kind in (PARAMETER, BUFFER) and name not in names:
                raise MigrationError(f"{name} is here but not in the state that arrives")
        for spec in wanted:
            if spec.name not in self.slots:
                if (
                    spec.name.startswith("model.")
                    and "(extra_state)" not in spec.name
                    and self._empty_buffer(spec.name) is None
                ):
                    raise MigrationError(f"{spec.name} is in the arriving state but not here")
                continue
            if self.slots[spec.name].kind != PARAMETER:
                continue
            mine = self.ours[spec.name]
            if (mine.dtype, mine.shape) != (spec.dtype, spec.shape):
                raise MigrationError(
                    f"{spec.name} is {spec.dtype} {list(spec.shape)} in the arriving state and "
                    f"{mine.dtype} {list(mine.shape)} here; both must build the same model"
                )
            if not aliased_alike(mine, spec):
                raise MigrationError(
                    f"{spec.name} shares memory with {spec.alias_of or 'nothing'} in the arriving "
                    f"state and with {mine.alias_of or 'nothing'} here; tie the same tensors"
                )

    def _tensor_for(self, spec: Spec, slot: Slot | None) -> Tensor:
        if slot is None:
            home = self._empty_buffer(spec.name)
            made = self._new(spec, None)
            if home is not None:
                home[0]._buffers[home[1]] = made
            return made
        fixed = slot.kind in (PARAMETER, BUFFER)
        if slot.kind == GIVEN or (not fixed and self.ours[spec.name].alias_of is not None):
            return self._new(spec, slot.tensor.device if slot.kind == GIVEN else None)
        if dense.matches(slot.tensor, spec):
            home_device = self._home(spec, slot.tensor.device)
            return slot.tensor if slot.tensor.device == home_device else self._new(spec, None)
        made = self._new(spec, slot.tensor.device)
        if slot.home is not None:
            part, key = slot.home
            if slot.kind == PARAMETER:
                parameter = part._parameters[key]
                assert parameter is not None
                parameter.data = made  # the same parameter, laid out as the source's
            else:
                part._buffers[key] = made
        elif slot.kind == PARAMETER:
            raise MigrationError(f"{spec.name} is laid out differently in the arriving state")
        return made

    def _home(self, spec: Spec, default: torch.device) -> torch.device:
        if spec.state_of is not None:
            name, index, key = spec.state_of
            optimizer = self.optimizers.get(name)
            owned = [] if optimizer is None else parameters(optimizer)
            if optimizer is None:
                raise MigrationError(
                    f"{spec.name} is in the arriving state; its optimizer is not here"
                )
            if index >= len(owned):
                raise MigrationError(
                    f"{spec.name} is in the arriving state, but optimizer {name!r} has only "
                    f"{len(owned)} parameters here; add all groups before the first step"
                )
            return home_of(optimizer, index, key, owned[index])
        return default

    def _new(self, spec: Spec, device: torch.device | None) -> Tensor:
        if device is None:
            device = self._home(spec, torch.device("cpu") if spec.host else self.device)
        return torch.empty_strided(
            spec.shape, spec.stride, dtype=dense.dtype_of(spec), device=device
        ).zero_()

    def _empty_buffer(self, name: str) -> tuple[nn.Module, str] | None:
        """The buffer of that name when it is declared but None here (a cache not yet filled)."""
        for model_name, model in self.models.items():
            for prefix, part in parts(model):
                for key, buffer in part._buffers.items():
                    if buffer is None and join(f"model.{model_name}", prefix, key) == name:
                        return part, key
        return None


def aliased_alike(a: Spec, b: Spec) -> bool:
    return (a.alias_of, a.alias_offset) == (b.alias_of, b.alias_offset)

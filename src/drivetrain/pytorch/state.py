"""The state of a training job: named tensors and a typed tree, taken and put back.

Taking: ``capture`` gives both at once. Putting back, in this order::

    state.materialise(facts)       # tensors exist, with the source's shapes, names and order
    ...raw bytes into state.flats()...
    counters = state.restore_tree(tree)
    state.restore_loader(tree)     # may start worker processes
    state.restore_rng(tree)        # last: building an iterator draws random numbers

Tensors are copied in place and never pass through an optimizer's ``load_state_dict``, which casts
them (pytorch#80809).
"""

from __future__ import annotations

import random
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drivetrain.errors import BadInput, CannotCarry, MigrationError
from drivetrain.pytorch import dense, rng
from drivetrain.pytorch import tree as typed
from drivetrain.pytorch.dense import Spec, flat
from drivetrain.pytorch.place import home_of

FORMAT = 1
_PARAMETER, _OPTIMIZER, _BUFFER, _HELD, _GIVEN = range(5)


class Position(Protocol):
    """What the state needs of a loader's position (see loader.LoaderPosition)."""

    def position(self) -> Any: ...
    def resume(self, tree: Any) -> None: ...
    def facts(self) -> dict[str, Any]: ...
    def fingerprint(self) -> str | None: ...


@dataclass(slots=True)
class _Slot:
    """A live tensor. ``kind``: _HELD is in a container of the user's, _GIVEN by a state_dict()."""

    name: str
    tensor: Tensor
    kind: int
    window: bool = False
    frozen: bool = False
    state_of: tuple[str, int, str] | None = None
    home: tuple[nn.Module, str] | None = None


@dataclass(frozen=True)
class Capture:
    """One moment of the state: ``specs`` with aliases, ``tensors`` without, both in image order."""

    tree: dict[str, Any]
    specs: list[Spec]
    tensors: dict[str, Tensor]

    def flats(self) -> list[Tensor]:
        return [flat(tensor) for tensor in self.tensors.values()]


@dataclass
class _Gathered:
    slots: list[_Slot] = field(default_factory=list)
    tree: dict[str, Any] = field(default_factory=dict)

    def add(self, found: dict[str, Tensor], kind: int, **facts: Any) -> None:
        self.slots += [_Slot(name, tensor, kind, **facts) for name, tensor in found.items()]


class TrainingState:
    """Everything a training job is made of. Raises CannotCarry, when it is taken, for what cannot
    move to another process.

    ``models``, ``optimizers``, ``schedulers``, ``scalers`` and ``extra`` are named by their keys
    and belong to the caller; ``extra`` may hold modules, generators, plain values and tensors in
    containers, and objects with ``state_dict`` and ``load_state_dict``. ``vars`` and the containers
    in ``extra`` are changed in place by a restore. ``loader`` may be None.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer] | None = None,
        schedulers: Mapping[str, Any] | None = None,
        scalers: Mapping[str, Any] | None = None,
        extra: dict[str, Any] | None = None,
        vars: dict[str, Any] | None = None,
        loader: Position | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.models = {name: _bare(model) for name, model in models.items()}
        self.optimizers = dict(optimizers or {})
        self.schedulers = dict(schedulers or {})
        self.scalers = dict(scalers or {})
        self.extra = extra if extra is not None else {}
        self.vars = vars if vars is not None else {}
        self.loader = loader
        self.device = torch.device(device)
        self._carried_rng: dict[str, Any] = {}
        self._carried_scalers: dict[str, Any] = {}
        self._written: set[str] = set()  # frozen parameters that someone wrote after all
        self._versions: dict[str, tuple[int, int]] = {}
        self._table: dict[str, Tensor] | None = None  # while receiving: every tensor by name
        self._received: list[Spec] = []
        self._signature: list[Any] | None = None  # of the last look; most are alike
        self._known_specs: list[Spec] | None = None

    # ------------------------------------------------------------------------------- taking

    def capture(self, counters: Mapping[str, Any] | None = None) -> Capture:
        """Tree and tensors of this moment. The tensors are live: the next step changes them."""
        gathered = self._gather()
        specs = self._known_specs
        if specs is None:
            specs = self._known_specs = self._specs(gathered.slots)
        gathered.tree["counters"] = typed.encode(dict(counters or {}), "counters", None)
        by_name = {slot.name: slot.tensor for slot in gathered.slots}
        tensors = {spec.name: by_name[spec.name] for spec in specs if spec.alias_of is None}
        return Capture(gathered.tree, specs, tensors)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the image, without aliases, in image order. While a state is received
        (between materialise and restore_tree), those that it is received into."""
        if self._table is not None:
            return {s.name: self._table[s.name] for s in self._received if s.alias_of is None}
        return self.capture().tensors

    def flats(self) -> list[Tensor]:
        return [flat(tensor) for tensor in self.tensors().values()]

    def specs(self) -> list[Spec]:
        """The facts of each tensor, in image order: first what may change at any time, then what
        only the optimizer's step changes, then read-only ones; an alias is with its owner."""
        return list(self._received if self._table is not None else self.capture().specs)

    def tree(self, counters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """All that is no tensor, as a typed tree (see tree.dumps)."""
        return self.capture(counters).tree

    def manifest_facts(self) -> dict[str, Any]:
        """What two copies of a job compare before a move, as JSON: ``tensors`` (specs), ``groups``
        (per optimizer and group: parameter names and hyper-parameter keys), ``loader`` (length,
        batch size, class, workers) and ``fingerprint`` (of the data set; None when not known)."""
        names = self._parameter_names()
        return {
            "tensors": [_fact(spec) for spec in self.specs()],
            "groups": {
                name: [
                    {
                        "params": [names[id(p)] for p in group["params"]],
                        "keys": sorted(str(key) for key in group if key != "params"),
                    }
                    for group in optimizer.param_groups
                ]
                for name, optimizer in self.optimizers.items()
            },
            "loader": None if self.loader is None else self.loader.facts(),
            "fingerprint": None if self.loader is None else self.loader.fingerprint(),
        }

    def _gather(self) -> _Gathered:
        out = _Gathered()
        stepped = {id(p) for o in self.optimizers.values() for p in _parameters(o)}
        models = {}
        for name, model in self.models.items():
            models[name] = self._gather_module(out, f"model.{name}", model, stepped, True)
        optimizers = {}
        for name, optimizer in self.optimizers.items():
            optimizers[name] = self._gather_optimizer(out, name, optimizer)
        out.tree = {
            "format": FORMAT,
            "models": models,
            "optimizers": optimizers,
            "schedulers": self._gather_schedulers(out),
            "scalers": self._gather_scalers(out),
            "extra": {name: self._gather_extra(out, name) for name in self.extra},
            "vars": _take(out, self.vars, "vars", _HELD),
            "rng": rng.capture(self.device, self._carried_rng),
            "loader": None if self.loader is None else self.loader.position(),
        }
        signature = _signature(out.slots, self.device)
        if signature is None or signature != self._signature:
            self._signature, self._known_specs = None, None
            for slot in out.slots:
                dense.check(slot.tensor, slot.name)
            self._signature = signature
        return out

    def _gather_module(
        self, out: _Gathered, path: str, module: nn.Module, stepped: set[int], is_model: bool
    ) -> dict[str, Any]:
        extra_state = {}
        for prefix, part in _parts(module):
            for key, parameter in part._parameters.items():
                if parameter is None:
                    continue
                window = id(parameter) in stepped
                frozen = is_model and not window and not parameter.requires_grad
                name = _join(path, prefix, key)
                dense.check(parameter, name)
                slot = _Slot(name, parameter.detach(), _PARAMETER, window)
                slot.frozen = frozen and not self._was_written(slot.name, parameter)
                slot.home = (part, key)
                out.slots.append(slot)
            for key, buffer in part._buffers.items():
                if buffer is not None:
                    name = _join(path, prefix, key)
                    out.slots.append(_Slot(name, buffer, _BUFFER, home=(part, key)))
            if type(part).get_extra_state is not nn.Module.get_extra_state:
                name = _join(path, prefix, "(extra_state)")
                extra_state[prefix] = _take(out, part.get_extra_state(), name, _GIVEN)
        unlike = [prefix for prefix, part in _parts(module) if part.training != module.training]
        return {"training": module.training, "unlike": unlike, "extra_state": extra_state}

    def _was_written(self, name: str, parameter: Tensor) -> bool:
        """Frozen parameters that change all the same (momentum encoders) are no read-only ones."""
        version = -1 if parameter.is_inference() else parameter._version
        seen = (parameter.data_ptr(), version)
        if self._versions.setdefault(name, seen) != seen:
            self._written.add(name)
        return name in self._written

    def _gather_optimizer(self, out: _Gathered, name: str, optimizer: Optimizer) -> dict[str, Any]:
        known = {id(slot_tensor) for slot_tensor in self._module_parameters()}
        indices: dict[int, int] = {}
        for index, parameter in enumerate(_parameters(optimizer)):
            indices.setdefault(id(parameter), index)
            if id(parameter) not in known:
                own = _loose_name(name, index)
                out.slots.append(_Slot(own, parameter.detach(), _PARAMETER, window=True))
        groups = []
        for number, group in enumerate(optimizer.param_groups):
            values = {key: value for key, value in group.items() if key != "params"}
            groups.append(_take(out, values, f"optimizer.{name}.group{number}", _HELD))
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
                body = _take(out, state, path, _OPTIMIZER, window=True)
                states.append([None, typed.encode(owner, path, None), body])
                continue
            pairs = []
            for key, value in state.items():
                body = _take(
                    out,
                    value,
                    f"optimizer.{name}.{index}.{key}",
                    _OPTIMIZER,
                    window=True,
                    state_of=(name, index, str(key)),
                )
                pairs.append([typed.encode(key, f"optimizer.{name}.{index}", None), body])
            states.append([index, None, pairs])
        return {"groups": groups, "state": states}

    def _gather_schedulers(self, out: _Gathered) -> dict[str, Any]:
        return {
            name: _take(out, _without_code(scheduler.state_dict()), f"scheduler.{name}", _GIVEN)
            for name, scheduler in self.schedulers.items()
        }

    def _gather_scalers(self, out: _Gathered) -> dict[str, Any]:
        trees = {}
        for name, scaler in self.scalers.items():
            tree = _take(out, scaler.state_dict(), f"scaler.{name}", _GIVEN)
            # A scaler that is off (CUDA's on a CPU) has no state; the one it came with goes on.
            trees[name] = tree if tree != {"dict": []} else self._carried_scalers.get(name, tree)
        return trees

    def _gather_extra(self, out: _Gathered, name: str) -> dict[str, Any]:
        value, path = self.extra[name], f"extra.{name}"
        if isinstance(value, nn.Module):
            return {"module": self._gather_module(out, path, _bare(value), set(), False)}
        if isinstance(value, Optimizer):
            raise CannotCarry(f"{path} is an optimizer; pass it as an optimizer", path=path)
        generator = _generator_state(value)
        if generator is not None:
            return {"generator": generator}
        if _is_stateful(value):
            return {"object": _take(out, value.state_dict(), path, _GIVEN)}
        return {"value": _take(out, value, path, _HELD)}

    def _specs(self, slots: list[_Slot]) -> list[Spec]:
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
                    host=slot.tensor.device.type == "cpu" and self.device.type != "cpu",
                )
            )
        return specs

    def _module_parameters(self) -> Iterator[Tensor]:
        modules = [*self.models.values()]
        modules += [_bare(m) for m in self.extra.values() if isinstance(m, nn.Module)]
        for module in modules:
            yield from module.parameters()

    def _parameter_names(self) -> dict[int, str]:
        names: dict[int, str] = {}
        for name, model in self.models.items():
            for path, parameter in _named_parameters(model):
                names.setdefault(id(parameter), _join(f"model.{name}", path))
        for name, value in self.extra.items():
            if isinstance(value, nn.Module):
                for path, parameter in _named_parameters(_bare(value)):
                    names.setdefault(id(parameter), _join(f"extra.{name}", path))
        for name, optimizer in self.optimizers.items():
            for index, parameter in enumerate(_parameters(optimizer)):
                names.setdefault(id(parameter), _loose_name(name, index))
        return names

    # --------------------------------------------------------------------------- putting back

    def materialise(self, facts: Mapping[str, Any]) -> None:
        """Makes every tensor that ``facts`` (a source's manifest_facts) names exist here, so that
        raw copies into ``flats()`` followed by ``restore_tree`` complete a restore.

        Live tensors are reused, optimizer state that is missing is created, what the source does
        not have is dropped by restore_tree. Raises MigrationError, having changed nothing of the
        job, when the models differ.
        """
        wanted = [_spec(fact) for fact in facts["tensors"]]
        slots = {slot.name: slot for slot in self._gather().slots}
        ours = {spec.name: spec for spec in self._specs(list(slots.values()))}
        self._compare(wanted, slots, ours)
        table: dict[str, Tensor] = {}
        for spec in wanted:
            if spec.alias_of is None:
                table[spec.name] = self._tensor_for(spec, slots.get(spec.name), ours)
        for spec in wanted:
            if spec.alias_of is not None:
                slot, own = slots.get(spec.name), ours.get(spec.name)
                same = own is not None and slot is not None and slot.kind != _GIVEN
                if same and own and slot and _aliased_alike(own, spec):
                    same = dense.matches(slot.tensor, spec)
                    if same and table[spec.alias_of].data_ptr() + spec.alias_offset == (
                        slot.tensor.data_ptr()
                    ):
                        table[spec.name] = slot.tensor
                        continue
                table[spec.name] = dense.view_of(table[spec.alias_of], spec.alias_offset, spec)
        self._table, self._received = table, wanted
        self._written -= {s.name for s in wanted if s.klass == "read_only"}
        self._written |= {s.name for s in wanted if s.klass != "read_only"} & set(self._versions)

    def _compare(self, wanted: list[Spec], slots: dict[str, _Slot], ours: dict[str, Spec]) -> None:
        """The parameters must be the same on both sides; the first difference is named."""
        names = {spec.name for spec in wanted}
        for name, slot in slots.items():
            if slot.kind in (_PARAMETER, _BUFFER) and name not in names:
                raise MigrationError(f"{name} is here but not in the state that arrives")
        for spec in wanted:
            if spec.name not in slots:
                if (
                    spec.name.startswith("model.")
                    and "(extra_state)" not in spec.name
                    and self._empty_buffer(spec.name) is None
                ):
                    raise MigrationError(f"{spec.name} is in the arriving state but not here")
                continue
            if slots[spec.name].kind != _PARAMETER:
                continue
            mine = ours[spec.name]
            if (mine.dtype, mine.shape) != (spec.dtype, spec.shape):
                raise MigrationError(
                    f"{spec.name} is {spec.dtype} {list(spec.shape)} in the arriving state and "
                    f"{mine.dtype} {list(mine.shape)} here; both must build the same model"
                )
            if not _aliased_alike(mine, spec):
                raise MigrationError(
                    f"{spec.name} shares memory with {spec.alias_of or 'nothing'} in the arriving "
                    f"state and with {mine.alias_of or 'nothing'} here; tie the same tensors"
                )

    def _tensor_for(self, spec: Spec, slot: _Slot | None, ours: dict[str, Spec]) -> Tensor:
        if slot is None:
            home = self._empty_buffer(spec.name)
            made = self._new(spec, None)
            if home is not None:
                home[0]._buffers[home[1]] = made
            return made
        fixed = slot.kind in (_PARAMETER, _BUFFER)
        if slot.kind == _GIVEN or (not fixed and ours[spec.name].alias_of is not None):
            return self._new(spec, slot.tensor.device if slot.kind == _GIVEN else None)
        if dense.matches(slot.tensor, spec):
            home_device = self._home(spec, slot.tensor.device)
            return slot.tensor if slot.tensor.device == home_device else self._new(spec, None)
        made = self._new(spec, slot.tensor.device)
        if slot.home is not None:
            part, key = slot.home
            if slot.kind == _PARAMETER:
                parameter = part._parameters[key]
                assert parameter is not None
                parameter.data = made  # the same parameter, laid out as the source's
            else:
                part._buffers[key] = made
        elif slot.kind == _PARAMETER:
            raise MigrationError(f"{spec.name} is laid out differently in the arriving state")
        return made

    def _home(self, spec: Spec, default: torch.device) -> torch.device:
        if spec.state_of is not None:
            name, index, key = spec.state_of
            optimizer = self.optimizers.get(name)
            parameters = [] if optimizer is None else _parameters(optimizer)
            if optimizer is None or index >= len(parameters):
                raise MigrationError(
                    f"{spec.name} is in the arriving state; its optimizer is not here"
                )
            return home_of(optimizer, index, key, parameters[index])
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
            for prefix, part in _parts(model):
                for key, buffer in part._buffers.items():
                    if buffer is None and _join(f"model.{model_name}", prefix, key) == name:
                        return part, key
        return None

    def restore_tree(self, tree: Any) -> dict[str, Any]:
        """Puts back all but the loader's position and the random number generators; returns the
        caller's counters. Raises MigrationError or BadInput when the tree is of another job."""
        try:
            if tree["format"] != FORMAT:
                raise MigrationError(
                    f"the state is of format {tree['format']}, this Drivetrain reads {FORMAT}"
                )
            table = self._table
            if table is None:
                table = {slot.name: slot.tensor for slot in self._gather().slots}
            self._check_names(tree)
            counters = typed.decode(tree["counters"], {})
            variables = typed.decode(tree["vars"], table)
            for name, model in self.models.items():
                _restore_module(model, tree["models"][name], table)
            for name, scheduler in self.schedulers.items():
                scheduler.load_state_dict(typed.decode(tree["schedulers"][name], table))
            for name in self.scalers:
                self._restore_scaler(name, tree["scalers"][name], table)
            for name, optimizer in self.optimizers.items():  # last: schedulers may set rates
                _restore_optimizer(optimizer, tree["optimizers"][name], table)
            for name in self.extra:
                self._restore_extra(name, tree["extra"][name], table)
            _restore_into(self.vars, variables)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"this is no state of a training job: {error!r}") from error
        self._table = None
        self._versions.clear()
        return dict(counters)

    def restore_loader(self, tree: Any) -> None:
        """Recreates the loader's iterator where it was."""
        if self.loader is not None and tree["loader"] is not None:
            self.loader.resume(tree["loader"])

    def restore_rng(self, tree: Any) -> None:
        """Puts the random number generators back. After everything else."""
        self._carried_rng = rng.restore(tree["rng"], self.device)

    def _check_names(self, tree: Any) -> None:
        for kind in ("models", "optimizers", "schedulers", "scalers", "extra"):
            here, there = set(getattr(self, kind)), set(tree[kind])
            for name in sorted(here ^ there):
                where = "not in the state that arrives" if name in here else "not here"
                raise MigrationError(f"{kind} {name!r} is {where}; both must build the same job")
        for name, optimizer in self.optimizers.items():
            here_n, there_n = len(optimizer.param_groups), len(tree["optimizers"][name]["groups"])
            if here_n != there_n:
                raise MigrationError(
                    f"optimizer {name!r} has {there_n} parameter groups in the arriving state and "
                    f"{here_n} here; add the groups before the first step"
                )

    def _restore_scaler(self, name: str, tree: Any, table: dict[str, Tensor]) -> None:
        scaler = self.scalers[name]
        values = typed.decode(tree, table)
        if not values:
            return
        if getattr(scaler, "is_enabled", lambda: True)():
            scaler.load_state_dict(values)
        else:
            self._carried_scalers[name] = tree

    def _restore_extra(self, name: str, tree: Any, table: dict[str, Tensor]) -> None:
        ((kind, body),) = tree.items()
        value = self.extra[name]
        if kind == "module" and isinstance(value, nn.Module):
            _restore_module(_bare(value), body, table)
        elif kind == "generator" and _generator_state(value) is not None:
            _restore_generator(value, body)
        elif kind == "object" and _is_stateful(value):
            value.load_state_dict(typed.decode(body, table))
        elif kind == "value":
            self.extra[name] = _restore_into(value, typed.decode(body, table))
        else:
            raise MigrationError(
                f"extra {name!r} is a {kind} in the arriving state and a {type(value).__name__} "
                "here; both must build the same job"
            )


# ------------------------------------------------------------------------------------- pieces


def _signature(slots: list[_Slot], device: torch.device) -> list[Any] | None:
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


def _bare(module: nn.Module) -> nn.Module:
    """The module without torch.compile around it, so that names match a run without it."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return iter(
        (name.replace("_orig_mod.", "").removesuffix("_orig_mod").removesuffix("."), part)
        for name, part in module.named_modules(remove_duplicate=True)
        if not (isinstance(getattr(part, "_orig_mod", None), nn.Module))
    )


def _named_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, part in _parts(module):
        for key, parameter in part._parameters.items():
            if parameter is not None:
                yield _join(prefix, key), parameter


def _join(*words: str) -> str:
    return ".".join(word for word in words if word)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _loose_name(optimizer: str, index: int) -> str:
    """The name of a parameter that an optimizer steps and no module owns."""
    return f"optimizer.{optimizer}.{index}.(parameter)"


def _take(out: _Gathered, value: Any, path: str, kind: int, **facts: Any) -> Any:
    found: dict[str, Tensor] = {}
    tree = typed.encode(value, path, found)
    out.add(found, kind, **facts)
    return tree


def _fact(spec: Spec) -> dict[str, Any]:
    fact = asdict(spec)
    for key in ("shape", "stride", "state_of"):
        fact[key] = None if fact[key] is None else list(fact[key])
    return fact


def _spec(fact: Mapping[str, Any]) -> Spec:
    known = {item.name for item in fields(Spec)}
    values: dict[str, Any] = {"klass": "replace", "window": False, "state_of": None}
    values |= {key: value for key, value in fact.items() if key in known}
    for key in ("shape", "stride", "state_of"):
        values[key] = None if values[key] is None else tuple(values[key])
    spec = Spec(**values)
    if not isinstance(getattr(torch, spec.dtype, None), torch.dtype):
        raise MigrationError(f"{spec.name} is {spec.dtype}, which this torch does not know")
    return spec


def _aliased_alike(a: Spec, b: Spec) -> bool:
    return (a.alias_of, a.alias_offset) == (b.alias_of, b.alias_offset)


def _without_code(state: Any) -> Any:
    """A scheduler's state without functions, which the other side builds for itself."""
    if type(state) is not dict:
        return state
    return {
        key: [_without_code(item) for item in value]
        if type(value) is list
        else _without_code(value)
        for key, value in state.items()
        if not isinstance(value, (types.FunctionType, types.MethodType, types.BuiltinFunctionType))
    }


def _is_stateful(value: object) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(
        getattr(value, "load_state_dict", None)
    )


def _generator_state(value: object) -> Any:
    numpy = sys.modules.get("numpy")
    if isinstance(value, torch.Generator):
        return [value.device.type, rng.capture_generator(value)]
    if type(value) is random.Random:
        return ["python", typed.encode(value.getstate(), "generator", None)]
    if numpy is not None and isinstance(value, numpy.random.Generator):
        return ["numpy", typed.encode(value.bit_generator.state, "generator", None)]
    if numpy is not None and isinstance(value, numpy.random.RandomState):
        return ["numpy", typed.encode(value.get_state(legacy=False), "generator", None)]
    return None


def _restore_generator(value: Any, body: Any) -> None:
    kind, state = body
    if isinstance(value, torch.Generator):
        if kind == value.device.type:  # another type's numbers cannot be continued
            rng.restore_generator(value, state)
    elif isinstance(value, random.Random):
        value.setstate(typed.decode(state, {}))
    elif hasattr(value, "bit_generator"):
        value.bit_generator.state = typed.decode(state, {})
    else:
        value.set_state(typed.decode(state, {}))


def _restore_module(module: nn.Module, tree: Any, table: dict[str, Tensor]) -> None:
    unlike = set(tree["unlike"])
    for prefix, part in _parts(module):
        part.training = tree["training"] != (prefix in unlike)
        if prefix in tree["extra_state"]:
            part.set_extra_state(typed.decode(tree["extra_state"][prefix], table))


def _restore_optimizer(optimizer: Optimizer, tree: Any, table: dict[str, Tensor]) -> None:
    for group, body in zip(optimizer.param_groups, tree["groups"], strict=True):
        values = typed.decode(body, table)
        for key in [key for key in group if key != "params" and key not in values]:
            del group[key]
        for key, value in values.items():
            group[key] = _restore_into(group.get(key), value)
    parameters = _parameters(optimizer)
    states: dict[Any, Any] = {}
    for index, owner, body in tree["state"]:
        if index is None:
            states[typed.decode(owner, {})] = typed.decode(body, table)
            continue
        if type(index) is not int or not 0 <= index < len(parameters):
            raise BadInput(f"the optimizer has {len(parameters)} parameters, not number {index}")
        states[parameters[index]] = {
            typed.decode(key, {}): typed.decode(value, table) for key, value in body
        }
    optimizer.state.clear()
    optimizer.state.update(states)


def _restore_into(live: Any, new: Any) -> Any:
    """``new``, in the objects that are there already where they are of the same type, so that
    names which the script gave to them stay true."""
    if isinstance(live, Tensor) and isinstance(new, Tensor):
        return live if dense.same_memory(live, new) else new
    if type(live) is not type(new):
        return new
    if isinstance(live, dict):
        values = {
            key: _restore_into(live[key], item) if key in live else item
            for key, item in new.items()
        }
        live.clear()
        for key, item in values.items():
            live[key] = item
        return live
    if isinstance(live, list):
        live[:] = [
            _restore_into(live[i], item) if i < len(live) else item for i, item in enumerate(new)
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

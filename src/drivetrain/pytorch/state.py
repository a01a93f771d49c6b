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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from drivetrain.errors import BadInput, MigrationError
from drivetrain.pytorch import dense, rng
from drivetrain.pytorch import tree as typed
from drivetrain.pytorch.arriving import Arrival, fact_of, spec_of
from drivetrain.pytorch.dense import Spec, flat
from drivetrain.pytorch.gather import (
    GIVEN,
    HELD,
    Gathered,
    gather_extra,
    gather_module,
    gather_optimizer,
    gather_schedulers,
    signature,
    specs_of,
    take,
)
from drivetrain.pytorch.restore import (
    restore_extra,
    restore_into,
    restore_module,
    restore_optimizer,
)
from drivetrain.pytorch.walk import bare, join, loose_name, named_parameters, parameters

FORMAT = 1


class Position(Protocol):
    """What the state needs of a loader's position (see loader.LoaderPosition)."""

    def position(self) -> Any: ...
    def resume(self, tree: Any) -> None: ...
    def facts(self) -> dict[str, Any]: ...
    def fingerprint(self) -> str | None: ...


@dataclass(frozen=True)
class Capture:
    """One moment of the state: ``specs`` with aliases, ``tensors`` without, both in image order."""

    tree: dict[str, Any]
    specs: list[Spec]
    tensors: dict[str, Tensor]

    def flats(self) -> list[Tensor]:
        return [flat(tensor) for tensor in self.tensors.values()]


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
        self.models = {name: bare(model) for name, model in models.items()}
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
            specs = self._known_specs = specs_of(gathered.slots, self.device)
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
            "tensors": [fact_of(spec) for spec in self.specs()],
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

    def _gather(self) -> Gathered:
        out = Gathered()
        stepped = {id(p) for o in self.optimizers.values() for p in parameters(o)}
        models = {}
        for name, model in self.models.items():
            models[name] = gather_module(
                out, f"model.{name}", model, stepped, was_written=self._was_written
            )
        known = {id(parameter) for parameter in self._module_parameters()}
        optimizers = {}
        for name, optimizer in self.optimizers.items():
            optimizers[name] = gather_optimizer(out, name, optimizer, known)
        out.tree = {
            "format": FORMAT,
            "models": models,
            "optimizers": optimizers,
            "schedulers": gather_schedulers(out, self.schedulers),
            "scalers": self._gather_scalers(out),
            "extra": {name: gather_extra(out, name, value) for name, value in self.extra.items()},
            "vars": take(out, self.vars, "vars", HELD),
            "rng": rng.capture(self.device, self._carried_rng),
            "loader": None if self.loader is None else self.loader.position(),
        }
        seen = signature(out.slots, self.device)
        if seen is None or seen != self._signature:
            self._signature, self._known_specs = None, None
            for slot in out.slots:
                dense.check(slot.tensor, slot.name)
            self._signature = seen
        return out

    def _was_written(self, name: str, parameter: Tensor) -> bool:
        """Frozen parameters that change all the same (momentum encoders) are no read-only ones."""
        version = -1 if parameter.is_inference() else parameter._version
        seen = (parameter.data_ptr(), version)
        if self._versions.setdefault(name, seen) != seen:
            self._written.add(name)
        return name in self._written

    def _gather_scalers(self, out: Gathered) -> dict[str, Any]:
        trees = {}
        for name, scaler in self.scalers.items():
            tree = take(out, scaler.state_dict(), f"scaler.{name}", GIVEN)
            # A scaler that is off (CUDA's on a CPU) has no state; the one it came with goes on.
            trees[name] = tree if tree != {"dict": []} else self._carried_scalers.get(name, tree)
        return trees

    def _module_parameters(self) -> Iterator[Tensor]:
        modules = [*self.models.values()]
        modules += [bare(m) for m in self.extra.values() if isinstance(m, nn.Module)]
        for module in modules:
            yield from module.parameters()

    def _parameter_names(self) -> dict[int, str]:
        names: dict[int, str] = {}
        for name, model in self.models.items():
            for path, parameter in named_parameters(model):
                names.setdefault(id(parameter), join(f"model.{name}", path))
        for name, value in self.extra.items():
            if isinstance(value, nn.Module):
                for path, parameter in named_parameters(bare(value)):
                    names.setdefault(id(parameter), join(f"extra.{name}", path))
        for name, optimizer in self.optimizers.items():
            for index, parameter in enumerate(parameters(optimizer)):
                names.setdefault(id(parameter), loose_name(name, index))
        return names

    # --------------------------------------------------------------------------- putting back

    def materialise(self, facts: Mapping[str, Any]) -> None:
        """Makes every tensor that ``facts`` (a source's manifest_facts) names exist here, so that
        raw copies into ``flats()`` followed by ``restore_tree`` complete a restore.

        Live tensors are reused, optimizer state that is missing is created, what the source does
        not have is dropped by restore_tree. Raises MigrationError, having changed nothing of the
        job, when the models differ.
        """
        wanted = [spec_of(fact) for fact in facts["tensors"]]
        slots = {slot.name: slot for slot in self._gather().slots}
        ours = {spec.name: spec for spec in specs_of(list(slots.values()), self.device)}
        table = Arrival(self.models, self.optimizers, self.device, slots, ours).table(wanted)
        self._table, self._received = table, wanted
        self._written -= {s.name for s in wanted if s.klass == "read_only"}
        self._written |= {s.name for s in wanted if s.klass != "read_only"} & set(self._versions)

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
                restore_module(model, tree["models"][name], table)
            for name, scheduler in self.schedulers.items():
                scheduler.load_state_dict(typed.decode(tree["schedulers"][name], table))
            for name in self.scalers:
                self._restore_scaler(name, tree["scalers"][name], table)
            for name, optimizer in self.optimizers.items():  # last: schedulers may set rates
                restore_optimizer(optimizer, tree["optimizers"][name], table)
            for name in self.extra:
                self.extra[name] = restore_extra(name, self.extra[name], tree["extra"][name], table)
            restore_into(self.vars, variables)
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

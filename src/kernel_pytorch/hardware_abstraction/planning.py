"""Nodes of a computation on devices: list scheduling by earliest finish.

Each node goes, in order of its dependences, to the device on which it would end first, counting
what its inputs take to get there (Topcuoglu et al., HEFT, 2002, with the given order for ranks).
Rates are calibrated ones where there are any, else the listed ones; what had to be assumed is told.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from drivetrain.errors import BadInput
from drivetrain.placement import calibration
from drivetrain.placement.graphs import flops_of, nbytes_of
from kernel_pytorch.hardware_abstraction.hal_core import DeviceSpec

__all__ = ["ExecutionPlan", "Step", "Work", "plan", "work_of"]

_ASSUMED_FLOPS = 1e10
_ASSUMED_LINK_BYTES_S = 10e9
_MOST_NODES = 100_000


@dataclass(frozen=True)
class Work:
    """One node: so many operations, so many bytes of results, after these nodes."""

    name: str
    flops: float = 0.0
    nbytes: float = 0.0
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """Where one node runs, and when it ends, in seconds from the start, as estimated."""

    name: str
    address: str
    end_s: float


@dataclass(frozen=True)
class ExecutionPlan:
    """Every node with its device. Estimates order the devices; they promise no time."""

    steps: tuple[Step, ...]
    assumed: tuple[str, ...] = ()
    """What nobody measured."""

    @property
    def devices(self) -> dict[str, int]:
        """Address -> how many nodes."""
        found: dict[str, int] = {}
        for step in self.steps:
            found[step.address] = found.get(step.address, 0) + 1
        return found

    @property
    def estimated_s(self) -> float:
        return max((step.end_s for step in self.steps), default=0.0)

    def __getitem__(self, name: str) -> str:
        """The address of a node's device."""
        for step in self.steps:
            if step.name == name:
                return step.address
        raise KeyError(name)


def plan(work: Sequence[Work], devices: Sequence[DeviceSpec]) -> ExecutionPlan:
    """A device for each node. Raises BadInput without devices, for a name given twice, and for a
    node that comes before one that it needs."""
    # A processor's further runtimes would be the same cores counted twice.
    own = [spec for spec in devices if not spec.device.info.by_name_only]
    if not own:
        raise BadInput("there is no device to plan for; see `drivetrain devices`")
    if len(work) > _MOST_NODES:
        raise BadInput(f"the computation has {len(work)} nodes; at most {_MOST_NODES} are planned")
    assumed: dict[str, None] = {}
    rates = {}
    for spec in own:
        rate = spec.capabilities.compute_tflops
        if rate is None:
            assumed[f"{spec.address} does {_ASSUMED_FLOPS:.0e} operations/s"] = None
        elif spec.capabilities.compute_basis != "measured":
            assumed[f"{spec.address} does {rate:.3g} TFLOPS, as listed"] = None
        rates[spec.address] = rate * 1e12 if rate else _ASSUMED_FLOPS
    links = _links(own)
    if len(links) < len(own) * (len(own) - 1):
        assumed[f"copies between devices reach {_ASSUMED_LINK_BYTES_S / 1e9:g} GB/s"] = None
    schedule = _Schedule(rates, links)
    for node in work:
        schedule.add(node)
    return ExecutionPlan(tuple(schedule.steps.values()), tuple(assumed))


def _links(specs: Sequence[DeviceSpec]) -> dict[tuple[str, str], float]:
    """Bytes a second between two devices, where ``drivetrain calibrate`` measured it."""
    found = {}
    for source in specs:
        known = calibration.load(source.device)
        for target in specs:
            rate = known.links.get(target.device.uuid) if known is not None else None
            if rate and source.address != target.address:
                found[source.address, target.address] = rate * 1e9
    return found


class _Schedule:
    def __init__(self, rates: dict[str, float], links: dict[tuple[str, str], float]) -> None:
        self.steps: dict[str, Step] = {}
        self._links = links
        self._rates = rates
        self._free = dict.fromkeys(rates, 0.0)
        self._nbytes: dict[str, float] = {}

    def add(self, node: Work) -> None:
        _check(node, self.steps)
        end, address = min((self._end(node, address), address) for address in self._rates)
        self.steps[node.name] = Step(node.name, address, end)
        self._free[address] = end
        self._nbytes[node.name] = node.nbytes

    def _end(self, node: Work, address: str) -> float:
        """When the node would end there."""
        ready = self._free[address]
        for name in node.after:
            step = self.steps[name]
            rate = self._links.get((step.address, address), _ASSUMED_LINK_BYTES_S)
            far = step.address != address
            ready = max(ready, step.end_s + (self._nbytes[name] / rate if far else 0.0))
        return ready + node.flops / self._rates[address]


def _check(node: Work, before: Container[str]) -> None:
    if not isinstance(node, Work):
        raise BadInput(f"a {type(node).__name__} is no Work(name, flops, nbytes, after)")
    if node.name in before:
        raise BadInput(f"two nodes are called {node.name!r}")
    missing = [name for name in node.after if name not in before]
    if missing:
        raise BadInput(f"{node.name} comes before {', '.join(missing)}, which it needs")
    if not (0 <= node.flops < math.inf and 0 <= node.nbytes < math.inf):
        raise BadInput(f"{node.name}: {node.flops!r} operations and {node.nbytes!r} bytes")


# -- what a computation consists of ---------------------------------------------------------------


def work_of(computation: Any) -> list[Work]:
    """The nodes of a computation in an order that keeps to their dependences."""
    if isinstance(computation, Iterable) and not hasattr(computation, "named_parameters"):
        return list(computation)
    graph = getattr(computation, "graph", None)
    if graph is None and hasattr(computation, "named_parameters"):
        from torch import fx

        try:
            graph = fx.symbolic_trace(computation).graph
        except Exception as error:  # what torch.fx raises has no one class
            raise BadInput(
                f"torch.fx cannot trace this {type(computation).__name__} ({error}); give "
                "torch.export.export(model, example_inputs) instead"
            ) from error
    if graph is None or not hasattr(graph, "nodes"):
        raise BadInput(
            f"a {type(computation).__name__} is no computation: give a module, a GraphModule, an "
            "ExportedProgram, or Work(...) nodes"
        )
    nodes = [node for node in graph.nodes if node.op.startswith("call_")]
    names = {node.name for node in nodes}
    return [
        Work(
            node.name,
            flops_of(node),
            nbytes_of(node),
            tuple(dict.fromkeys(n.name for n in node.all_input_nodes if n.name in names)),
        )
        for node in nodes
    ]

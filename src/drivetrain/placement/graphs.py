"""An exported torch program on several devices of one process: what `plan` needs of it, and a run.

torch devices are the processor, GPUs that this torch is built for, and the one custom device type
that was registered (docs/custom_devices.md); a device that torch has none for is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from drivetrain import hal
from drivetrain.errors import BadInput, Unsupported
from drivetrain.placement.capabilities import CapabilityMatrix, Row
from drivetrain.placement.execution import HOST, ExecutionPlan, Operation, plan

__all__ = ["ProgramPlan", "flops_of", "nbytes_of", "plan_program"]


@dataclass(frozen=True)
class ProgramPlan:
    """A program and where its operations run. Weights stay on their devices from the first run."""

    plan: ExecutionPlan
    program: Any
    _weights: dict[tuple[str, str], Any] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        return str(self.plan)

    def __getitem__(self, name: str) -> str:
        """The address of an operation's device."""
        return self.plan[name]

    def run(self, *inputs: Any) -> Any:
        """What the program gives for these inputs, on the CPU. Raises BadInput for inputs of
        another structure than it was exported with."""
        import torch
        from torch.utils import _pytree

        spec: Any = self.program.call_spec
        flat, given = _pytree.tree_flatten((inputs, {}))
        names = self.program.graph_signature.user_inputs
        if given != spec.in_spec or len(flat) != len(names):
            raise BadInput(f"run: the program was exported with inputs {spec.in_spec}, not {given}")
        values = {**_constants(self.program), **dict(zip(names, flat, strict=True))}
        wrong = [n for n, size in self.plan.inputs.items() if values[n].nbytes != size]
        if wrong:
            raise BadInput(f"run: {', '.join(wrong)} are of another size than the plan is for")
        with torch.no_grad():
            places = self._done(values)
        outs = []
        for name in self.program.graph_signature.user_outputs:
            found = places.get(name) or {HOST: values[name]}
            outs.append(next(iter(found.values())).cpu())
        return _pytree.tree_unflatten(outs, spec.out_spec)

    def _done(self, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """value -> address -> tensor, after the last step; what nobody reads again is dropped."""
        from torch import fx

        from drivetrain.pytorch.devices import torch_device

        nodes = {node.name: node for node in self.program.graph.nodes}
        last = {v: i for i, s in enumerate(self.plan.steps) for v in s.operation.reads}
        kept = set(self.program.graph_signature.user_outputs)
        places: dict[str, dict[str, Any]] = {}
        for index, step in enumerate(self.plan.steps):
            device = torch_device(self.plan.devices[step.address])
            for move in step.moves:
                at = places.setdefault(move.value, {})
                key = (move.value, step.address)
                there = self._weights.get(key)
                if there is None:
                    source = values[move.value] if move.source == HOST else at[move.source]
                    there = source.to(device)
                    if move.value in self.plan.weights:
                        self._weights[key] = there
                at[step.address] = there
            node = nodes[step.operation.name]

            def here(each: Any, address: str = step.address) -> Any:
                return places[each.name][address]

            args, kwargs = fx.node.map_arg((node.args, node.kwargs), here)
            if kwargs.get("device") is not None:
                kwargs = {**kwargs, "device": device}
            places[node.name] = {step.address: node.target(*args, **kwargs)}
            for value in step.operation.reads:
                if last[value] == index and value not in kept:
                    del places[value]
        return places


def plan_program(
    program: Any,
    devices: Sequence[hal.Device | str] | CapabilityMatrix | None = None,
    *,
    example_inputs: tuple[Any, ...] | None = None,
    on: Mapping[str, str] | None = None,
    memory: Mapping[str, int] | None = None,
) -> ProgramPlan:
    """A device for each operation of an ``ExportedProgram``; a module or GraphModule is exported
    with ``example_inputs``. ``on``: operation -> address or driver. See `execution.plan` for the
    rest and for what is raised; memory counts a view as a copy, so that it is never too little."""
    from torch import export

    if not isinstance(program, export.ExportedProgram):
        if example_inputs is None or not callable(getattr(program, "forward", None)):
            raise BadInput(
                f"plan_program: a {type(program).__name__} needs to be a module, with "
                "example_inputs=; or give torch.export.export(model, inputs)"
            )
        program = export.export(program, example_inputs)
    whole = program.run_decompositions()
    operations, inputs, weights = _read(whole, on or {})
    outputs = [name for name in whole.graph_signature.user_outputs if name not in inputs]
    made = plan(operations, devices, inputs=inputs, weights=weights, outputs=outputs, memory=memory)
    return ProgramPlan(made, whole)


def _read(program: Any, on: Mapping[str, str]) -> tuple[list[Operation], dict[str, int], list[str]]:
    """Operations, inputs with their bytes, and which of them are weights."""
    signature = program.graph_signature
    changed = {**signature.buffers_to_mutate, **signature.user_inputs_to_mutate}
    if changed:
        raise BadInput(
            f"plan_program: the program changes {', '.join(map(str, changed.values()))}; export "
            "the model after eval(), without in-place changes to its inputs"
        )
    users = set(signature.user_inputs)
    operations, inputs, weights = [], {}, []
    for node in program.graph.nodes:
        if node.op == "output":
            continue
        nbytes = int(nbytes_of(node))
        if not nbytes:
            if node.op == "placeholder" and not node.users:
                continue
            raise BadInput(
                f"plan_program: {node.name} ({node.target}) is no tensor of known size with "
                "elements; export with tensors and without dynamic shapes"
            )
        if node.op == "placeholder":
            if node.users or node.name in signature.user_outputs:
                inputs[node.name] = nbytes
                weights += [] if node.name in users else [node.name]
        else:
            reads = tuple(dict.fromkeys(each.name for each in node.all_input_nodes))
            operations.append(
                Operation(
                    node.name, reads, ((node.name, nbytes),), (), _dtype(node), flops_of(node),
                    on=on.get(node.name, ""), refuses=_refuses(node),
                )
            )  # fmt: skip
    unknown = set(on) - {each.name for each in operations}
    if unknown:
        raise BadInput(f"plan_program: on= names {', '.join(sorted(unknown))}, no operation of it")
    return operations, inputs, weights


def _refuses(node: Any) -> Any:
    """What tells why a device cannot run the node; the texts are made once a device type."""

    def refuses(row: Row) -> str:
        from drivetrain.pytorch.custom.protocol import full_name, kernels_of
        from drivetrain.pytorch.custom.registration import registered
        from drivetrain.pytorch.devices import torch_device

        try:
            device = torch_device(row.device)
        except Unsupported as error:
            return str(error)
        handle = registered()
        if handle is None or device.type != handle.name or not hasattr(node.target, "_schema"):
            return ""
        schema = node.target._schema
        if any(each.alias_info is not None for each in schema.returns):
            return ""  # a view: nothing is computed
        name = full_name(str(node.target).replace(".", "::", 1))
        if name not in kernels_of(handle.backends[0]):
            return f"{device.type} has no kernel for {name}"
        dtype = _dtype(node)
        return "" if dtype in dict(row.dtypes) else f"it does not compute in {dtype}"

    return refuses


def _constants(program: Any) -> dict[str, Any]:
    """Parameters, buffers and constants by their placeholders' names."""
    signature, state = program.graph_signature, {**program.constants, **program.state_dict}
    found = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    return {name: state[key] for name, key in found.items()}


def _tensors(node: Any) -> list[Any]:
    """The tensors that tracing left on a node; several for an operation with several results."""
    value = node.meta.get("val")
    found = value if isinstance(value, (list, tuple)) else [value]
    return [each for each in found if hasattr(each, "shape")]


def _dtype(node: Any) -> str:
    found = _tensors(node)
    return str(found[0].dtype).removeprefix("torch.") if found else ""


def nbytes_of(node: Any) -> float:
    """Bytes of an fx node's results; 0 where tracing left no shapes."""
    return float(sum(each.numel() * each.element_size() for each in _tensors(node)))


def flops_of(node: Any) -> float:
    """Operations of a product or a convolution, by torch's own formulas; else one an element; 0
    where tracing left no shapes."""
    from torch.utils import flop_counter

    def seen(argument: Any) -> Any:
        return argument.meta.get("val") if hasattr(argument, "meta") else argument

    values = _tensors(node)
    if not values:
        return 0.0
    value = values[0]
    packet = getattr(node.target, "overloadpacket", node.target)
    formula = flop_counter.flop_registry.get(packet)
    arguments = [seen(each) for each in node.args]
    if str(packet) == "aten.linear":  # torch counts it under the products that it is made of
        return float(2 * value.numel() * arguments[1].shape[-1])
    if formula is None:
        return float(value.numel())
    named = {key: seen(each) for key, each in node.kwargs.items()}
    try:
        return float(formula(*arguments, **named, out_val=node.meta.get("val")))
    except (TypeError, ValueError, AssertionError, IndexError):
        return float(value.numel())  # an overload that the formula does not know

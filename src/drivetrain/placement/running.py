"""An execution plan, done: a stream a device, values moved as planned and freed after use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drivetrain import hal
from drivetrain.errors import BadInput
from drivetrain.placement.execution import HOST, ExecutionPlan


def run(
    plan: ExecutionPlan, values: Mapping[str, Any], outputs: Sequence[str]
) -> dict[str, bytearray]:
    """See `ExecutionPlan.run`."""
    given = {name: _bytes(name, values, nbytes) for name, nbytes in plan.inputs.items()}
    made = {value for step in plan.steps for value, _ in step.operation.writes}
    unknown = [name for name in outputs if name not in made]
    if unknown:
        raise BadInput(f"run: no operation of the plan writes {', '.join(unknown)}")
    last = {
        value: index
        for index, step in enumerate(plan.steps)
        for value in (*step.operation.reads, *(name for name, _ in step.operation.writes))
    }
    last.update(dict.fromkeys((*plan.weights, *outputs), len(plan.steps)))
    state = _State(plan.devices)
    try:
        for index, step in enumerate(plan.steps):
            for value in [v for v in state.places if last[v] < index]:
                state.forget(value)
            device, stream = state.at(step.address)
            for move in step.moves:
                target = state.alloc(move.value, step.address, move.nbytes)
                if move.source == HOST:
                    target.copy_from(given[move.value], stream=stream)
                else:
                    target.copy_from(state.places[move.value][move.source], stream=stream)
            for value, nbytes in step.operation.writes:
                state.alloc(value, step.address, nbytes)
            if step.operation.launch is None:
                raise BadInput(f"run: {step.operation.name} has no launch; it can only be planned")
            named = (*step.operation.reads, *(value for value, _ in step.operation.writes))
            buffers = {value: state.places[value][step.address] for value in named}
            step.operation.launch(device, stream, buffers)
            state.done_by(step.address)
        return {name: state.read(name) for name in outputs}
    finally:
        state.close()


def _bytes(name: str, values: Mapping[str, Any], nbytes: int) -> memoryview:
    if name not in values:
        raise BadInput(f"run: the input {name} is missing; it has {nbytes} bytes")
    view = memoryview(values[name])
    if view.nbytes != nbytes or not view.c_contiguous:
        raise BadInput(
            f"run: {name} has {view.nbytes} bytes; the plan is for {nbytes} in one piece"
        )
    return view.cast("B") if view.nbytes else view


class _State:
    """Streams and buffers of a run."""

    def __init__(self, devices: Mapping[str, hal.Device]) -> None:
        self.devices = devices
        self.streams: dict[str, tuple[hal.Device, hal.Stream]] = {}
        self.places: dict[str, dict[str, hal.Buffer]] = {}

    def at(self, address: str) -> tuple[hal.Device, hal.Stream]:
        found = self.streams.get(address)
        if found is None:
            device = self.devices[address]
            found = self.streams[address] = (device, device.stream())
        return found

    def alloc(self, value: str, address: str, nbytes: int) -> hal.Buffer:
        device, stream = self.at(address)
        buffer = device.alloc(nbytes, stream=stream)
        self.places.setdefault(value, {})[address] = buffer
        return buffer

    def done_by(self, address: str) -> None:
        """Devices of unlike drivers share no events: a step is done before the next one begins."""
        self.streams[address][1].synchronize()

    def forget(self, value: str) -> None:
        for buffer in self.places.pop(value).values():
            buffer.close()

    def read(self, value: str) -> bytearray:
        address, buffer = next(iter(self.places[value].items()))
        stream, out = self.streams[address][1], bytearray(buffer.nbytes)
        buffer.copy_to(out, stream=stream)
        stream.synchronize()
        return out

    def close(self) -> None:
        for value in list(self.places):
            self.forget(value)
        for _, stream in self.streams.values():
            stream.close()

"""Operations on devices by capability, memory and link cost: `plan` decides, `run` does.

Each operation goes, in the order given, to the device on which it would end first, counting what
its inputs take to get there (Topcuoglu et al., HEFT, 2002, with the given order for ranks), among
those that can run it and have the memory. It is no optimiser: an operation is never placed again.

Values have names. One that no operation writes is an input: it comes from the host. Values live
until their last reader is done; those in ``weights`` stay on each device that they came to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from drivetrain import hal
from drivetrain.errors import BadInput, PlacementError
from drivetrain.hal.copies import direct
from drivetrain.hal.opened import opened
from drivetrain.placement.capabilities import CapabilityMatrix, Row

__all__ = ["HOST", "Candidate", "ExecutionPlan", "Launch", "Move", "Operation", "Step", "copy",
           "kernel", "plan"]  # fmt: skip

HOST = "host"
ASSUMED_FLOPS = 1e10
ASSUMED_LINK_BYTES_S = 10e9
ASSUMED_LAUNCH_S = 10e-6
_MOST_OPERATIONS = 100_000

Launch = Callable[[hal.Device, hal.Stream, Mapping[str, hal.Buffer]], None]
"""Queues one operation: the device, its stream, and each value it reads or writes by name."""


@dataclass(frozen=True)
class Operation:
    """One operation. ``writes`` are (value, bytes); ``needs`` groups and features of a device."""

    name: str
    reads: tuple[str, ...] = ()
    writes: tuple[tuple[str, int], ...] = ()
    needs: tuple[str, ...] = ("compute",)
    dtype: str = ""
    flops: float = 0.0
    threads: int = 0
    """Of one block; 0: not told."""
    shared: int = 0
    """Bytes of shared memory of one block."""
    on: str = ""
    """Only this device (``cuda:0``), or only this driver's (``cuda``)."""
    launch: Launch | None = field(default=None, compare=False, repr=False)
    refuses: Callable[[Row], str] | None = field(default=None, compare=False, repr=False)
    """Why a device cannot run it, beyond what its row tells; empty when it can."""


@dataclass(frozen=True)
class Move:
    """A value that a step needs and that is elsewhere."""

    value: str
    source: str
    target: str
    nbytes: int
    link: str
    """``host`` (one copy from the host), ``peer`` or ``staged`` (through pinned host memory)."""
    seconds: float


@dataclass(frozen=True)
class Candidate:
    """What one device would mean for a step: cost terms in seconds, or why it cannot be."""

    address: str
    wait_s: float = 0.0
    """Until the device is free and what the inputs come from is done."""
    move_s: float = 0.0
    compute_s: float = 0.0
    launch_s: float = 0.0
    end_s: float = math.inf
    lacks: str = ""


@dataclass(frozen=True)
class Step:
    """Where one operation runs, why, and what has to be moved for it."""

    operation: Operation
    address: str
    reason: str
    moves: tuple[Move, ...]
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> Candidate:
        return next(each for each in self.candidates if each.address == self.address)


@dataclass(frozen=True)
class ExecutionPlan:
    """Every operation with its device. Estimates order the devices; they promise no time."""

    steps: tuple[Step, ...]
    inputs: Mapping[str, int]
    weights: frozenset[str]
    devices: Mapping[str, hal.Device] = field(repr=False)
    peak_bytes: Mapping[str, int]
    """Address -> most bytes of weights and live values there."""
    assumed: tuple[str, ...] = ()
    """What nobody measured."""

    def __getitem__(self, name: str) -> str:
        """The address of an operation's device."""
        for step in self.steps:
            if step.operation.name == name:
                return step.address
        raise KeyError(name)

    @property
    def estimated_s(self) -> float:
        return max((step.chosen.end_s for step in self.steps), default=0.0)

    @property
    def moved_bytes(self) -> dict[tuple[str, str], int]:
        """(source, target) -> bytes."""
        found: dict[tuple[str, str], int] = {}
        for move in (move for step in self.steps for move in step.moves):
            key = (move.source, move.target)
            found[key] = found.get(key, 0) + move.nbytes
        return found

    def as_json(self) -> dict[str, Any]:
        return {
            "steps": [
                {
                    "name": step.operation.name,
                    "device": step.address,
                    "reason": step.reason,
                    "moves": [asdict(move) for move in step.moves],
                    "terms": {
                        name: getattr(step.chosen, name)
                        for name in ("wait_s", "move_s", "compute_s", "launch_s", "end_s")
                    },
                    "refused": {c.address: c.lacks for c in step.candidates if c.lacks},
                }
                for step in self.steps
            ],
            "peak_bytes": dict(self.peak_bytes),
            "estimated_s": self.estimated_s,
            "assumed": list(self.assumed),
        }

    def __str__(self) -> str:
        lines = []
        for step in self.steps:
            terms = step.chosen
            lines.append(
                f"{step.operation.name} on {step.address}: {step.reason} (wait {terms.wait_s:.1e} "
                f"s, move {terms.move_s:.1e}, compute {terms.compute_s:.1e}, launch "
                f"{terms.launch_s:.1e})"
            )
            lines += [
                f"    {move.value}: {move.nbytes} bytes {move.source} -> {move.target}, {move.link}"
                for move in step.moves
            ]
        lines += [f"peak on {address}: {n} bytes" for address, n in self.peak_bytes.items()]
        lines += [f"assumed: {each}" for each in self.assumed]
        return "\n".join(lines)

    def run(self, values: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, bytearray]:
        """Do it: ``values`` are the inputs as C-contiguous memory of their planned sizes. Gives the
        ``outputs`` in host memory. Raises BadInput for a value that is missing or of another size,
        and what the devices raise."""
        from drivetrain.placement.running import run

        return run(self, values, outputs)


def kernel(
    name: str,
    source: hal.Source,
    symbol: str,
    types: Sequence[Any],
    arguments: Sequence[Any],
    *,
    grid: Any,
    block: Any,
    writes: Mapping[str, int],
    dtype: str = "",
    flops: float = 0.0,
    shared: int = 0,
    on: str = "",
) -> Operation:
    """A HAL kernel as an operation: in ``arguments`` a text names a value, all else is passed as it
    is. Values of ``writes`` (name -> bytes) are written, the other named ones read."""
    named = dict.fromkeys(each for each in arguments if isinstance(each, str))

    def launch(device: hal.Device, stream: hal.Stream, buffers: Mapping[str, hal.Buffer]) -> None:
        given = [buffers[each] if isinstance(each, str) else each for each in arguments]
        made = device.compile(source).kernel(symbol, types)
        made(stream, grid, block, *given, shared=shared)

    def refuses(row: Row) -> str:
        return source.misfit(opened(row.device).backend.target)

    sizes = block if isinstance(block, tuple) else (block,)
    return Operation(
        name,
        tuple(each for each in named if each not in writes),
        tuple(writes.items()),
        ("compute",),
        dtype,
        flops,
        math.prod(sizes),
        shared,
        on,
        launch,
        refuses,
    )


def copy(name: str, source: str, target: str, nbytes: int, *, on: str = "") -> Operation:
    """The value ``source`` again as ``target``, by the device's copy: it needs no compute group."""

    def launch(device: hal.Device, stream: hal.Stream, buffers: Mapping[str, hal.Buffer]) -> None:
        buffers[target].copy_from(buffers[source], stream=stream)

    return Operation(name, (source,), ((target, nbytes),), (), on=on, launch=launch)


def plan(
    graph: Iterable[Operation],
    devices: Sequence[hal.Device | str] | CapabilityMatrix | None = None,
    *,
    inputs: Mapping[str, int],
    weights: Iterable[str] = (),
    outputs: Iterable[str] = (),
    memory: Mapping[str, int] | None = None,
) -> ExecutionPlan:
    """A device for each operation.

    ``devices``: HAL devices or addresses (None: all that are listed, but for other runtimes on the
    processor), or a matrix. ``inputs``: the bytes of each value that comes from the host;
    ``weights``: those of them that stay; ``outputs`` live to the end. ``memory``: address -> bytes
    at most, where it is to be less than what is free.

    Raises BadInput for operations that do not fit together, and PlacementError, naming the
    operation, its type and what each device lacks, when no device can run one.
    """
    if devices is None:  # a processor's further runtimes would be the same cores counted twice
        devices = [each for each in hal.devices() if not each.info.by_name_only]
    matrix = devices if isinstance(devices, CapabilityMatrix) else CapabilityMatrix.of(devices)
    operations = list(graph)
    kept = frozenset(weights)
    _check(operations, inputs, kept, memory or {}, matrix)
    return _Planner(matrix, operations, dict(inputs), kept, frozenset(outputs), memory or {}).plan()


def _check(
    operations: Sequence[Operation],
    inputs: Mapping[str, int],
    weights: frozenset[str],
    memory: Mapping[str, int],
    matrix: CapabilityMatrix,
) -> None:
    if not matrix.rows:
        raise BadInput("plan: there is no device to plan for; see `drivetrain devices`")
    if len(operations) > _MOST_OPERATIONS:
        raise BadInput(f"plan: {len(operations)} operations; at most {_MOST_OPERATIONS}")
    unknown = set(memory) - {row.address for row in matrix}
    if unknown:
        raise BadInput(f"plan: memory= names {', '.join(sorted(unknown))}, which is no device here")
    if not weights <= set(inputs):
        raise BadInput(f"plan: {', '.join(sorted(weights - set(inputs)))}: weights are inputs")
    known, names = dict(inputs), set()
    for each in operations:
        if not isinstance(each, Operation):
            raise BadInput(f"plan: a {type(each).__name__} is no Operation")
        if each.name in names:
            raise BadInput(f"plan: two operations are called {each.name!r}")
        names.add(each.name)
        missing = [value for value in each.reads if value not in known]
        if missing:
            raise BadInput(f"plan: {each.name} reads {', '.join(missing)}, which nothing made yet")
        again = [value for value, _ in each.writes if value in known]
        if again:
            raise BadInput(f"plan: {each.name} writes {', '.join(again)} again; give a new name")
        known.update(each.writes)
        if not 0 <= each.flops < math.inf:
            raise BadInput(f"plan: {each.name}: {each.flops!r} operations")
    wrong = [value for value, nbytes in known.items() if not isinstance(nbytes, int) or nbytes < 1]
    if wrong:
        raise BadInput(f"plan: {', '.join(wrong)}: give a size of at least one byte")


class _Planner:
    def __init__(
        self,
        matrix: CapabilityMatrix,
        operations: Sequence[Operation],
        inputs: dict[str, int],
        weights: frozenset[str],
        outputs: frozenset[str],
        memory: Mapping[str, int],
    ) -> None:
        self.matrix, self.operations, self.inputs, self.weights = (
            matrix, operations, inputs, weights,
        )  # fmt: skip
        self.memory = memory
        self.nbytes = dict(inputs)
        self.last: dict[str, int] = {}
        for index, each in enumerate(operations):
            self.nbytes.update(each.writes)
            self.last.update(dict.fromkeys((*each.reads, *(v for v, _ in each.writes)), index))
        self.last.update(dict.fromkeys(weights | outputs, len(operations)))
        self.places: dict[str, dict[str, float]] = {name: {HOST: 0.0} for name in inputs}
        """value -> address -> when it is there."""
        self.held: dict[str, int] = {row.address: 0 for row in matrix}
        self.peak = dict(self.held)
        self.free_at = {row.address: 0.0 for row in matrix}
        self.assumed: dict[str, None] = {}

    def plan(self) -> ExecutionPlan:
        steps = []
        for index, each in enumerate(self.operations):
            self._let_go(index)
            steps.append(self._step(each))
        peaks = {address: peak for address, peak in self.peak.items() if peak}
        devices = {row.address: row.device for row in self.matrix}
        return ExecutionPlan(
            tuple(steps), self.inputs, self.weights, devices, peaks, tuple(self.assumed)
        )

    def _let_go(self, index: int) -> None:
        for value in [v for v in self.places if self.last.get(v, -1) < index]:
            for address in self.places.pop(value):
                if address != HOST:
                    self.held[address] -= self.nbytes[value]

    def _step(self, operation: Operation) -> Step:
        told = [self._candidate(operation, row) for row in self.matrix]
        able = [each for each, _ in told if not each.lacks]
        if not able:
            what = f"{operation.name} ({operation.dtype})" if operation.dtype else operation.name
            why = "; ".join(f"{each.address}: {each.lacks}" for each, _ in told)
            raise PlacementError(f"no device can run {what}. {why}")
        best = min(able, key=lambda each: each.end_s)  # of equals the first listed
        moves = next(moves for each, moves in told if each is best)
        self._place(operation, best, moves)
        candidates = tuple(each for each, _ in told)
        return Step(
            operation, best.address, _reason(operation, best, candidates), moves, candidates
        )

    def _place(self, operation: Operation, best: Candidate, moves: Sequence[Move]) -> None:
        address = best.address
        arrived = best.wait_s + best.move_s
        for move in moves:
            self.places[move.value][address] = arrived
        for value, _ in operation.writes:
            self.places[value] = {address: best.end_s}
        self.held[address] += self._new_bytes(operation, moves)
        self.peak[address] = max(self.peak[address], self.held[address])
        self.free_at[address] = best.end_s

    def _new_bytes(self, operation: Operation, moves: Sequence[Move]) -> int:
        return sum(move.nbytes for move in moves) + sum(size for _, size in operation.writes)

    def _candidate(self, operation: Operation, row: Row) -> tuple[Candidate, tuple[Move, ...]]:
        if operation.on and operation.on not in (row.address, row.address.partition(":")[0]):
            return Candidate(row.address, lacks=f"the operation is for {operation.on} only"), ()
        lacks = row.lacks(
            needs=operation.needs,
            dtype=operation.dtype,
            threads=operation.threads,
            shared=operation.shared,
        )
        if not lacks and operation.refuses is not None:
            lacks = operation.refuses(row)
        if lacks:
            return Candidate(row.address, lacks=lacks), ()
        moves, wait = [], self.free_at[row.address]
        for value in operation.reads:
            if row.address in self.places[value]:
                wait = max(wait, self.places[value][row.address])
                continue
            move, ready = self._move(value, row)
            if move is None:
                return Candidate(row.address, lacks=f"{value} has no way there"), ()
            moves.append(move)
            wait = max(wait, ready)
        short = self._short(row, self._new_bytes(operation, moves))
        if short:
            return Candidate(row.address, lacks=short), ()
        move_s = sum(move.seconds for move in moves)
        compute = self._compute(operation, row)
        launch = row.launch_us * 1e-6 if row.launch_us else ASSUMED_LAUNCH_S
        end = wait + move_s + compute + launch
        return Candidate(row.address, wait, move_s, compute, launch, end), tuple(moves)

    def _short(self, row: Row, new: int) -> str:
        """Why this many more bytes do not fit: the device's own limit, and what is free in memory
        that it shares with others."""
        limit = self.memory.get(row.address, row.free_bytes)
        held = self.held[row.address]
        if held + new > limit:
            return f"{held} bytes live there and {new} more do not fit {limit}"
        shared = [e.address for e in self.matrix if e.memory_domain == row.memory_domain]
        together = sum(self.held[address] for address in shared)
        if together + new > row.free_bytes:
            return f"{', '.join(shared)} share {row.free_bytes} free bytes, {together} are planned"
        return ""

    def _move(self, value: str, row: Row) -> tuple[Move | None, float]:
        """The quickest way of a value to a device, and from when it can go."""
        nbytes, found = self.nbytes[value], []
        for source, ready in self.places[value].items():
            link = HOST if source == HOST else _link(self.matrix[source], row)
            if link:
                seconds = nbytes / self._rate(source, row, link)
                found.append(
                    (ready + seconds, Move(value, source, row.address, nbytes, link, seconds))
                )
        if not found:
            return None, 0.0
        end, best = min(found, key=lambda each: each[0])
        return best, end - best.seconds

    def _rate(self, source: str, row: Row, link: str) -> float:
        """Bytes a second."""
        if source == HOST:
            known = dict(row.links).get("from host")
        else:
            known = dict(self.matrix[source].links).get(row.device.uuid)
        if known:
            return known * 1e9
        what = f"{source} -> {row.address} ({link})"
        self.assumed[f"{what} carries {ASSUMED_LINK_BYTES_S / 1e9:g} GB/s"] = None
        return ASSUMED_LINK_BYTES_S

    def _compute(self, operation: Operation, row: Row) -> float:
        """The longer of its arithmetic and its traffic to memory."""
        seconds = 0.0
        if operation.flops:
            rates = dict(row.flops)
            rate = rates.get(operation.dtype) or rates.get("float32")
            if rate is None:
                self.assumed[f"{row.address} does {ASSUMED_FLOPS:.0e} operations/s"] = None
            seconds = operation.flops / (rate or ASSUMED_FLOPS)
        if row.copy_gbps:
            traffic = sum(self.nbytes[v] for v in operation.reads)
            traffic += sum(size for _, size in operation.writes)
            seconds = max(seconds, traffic / (row.copy_gbps * 1e9))
        return seconds


def _link(source: Row, target: Row) -> str:
    """How a copy goes between two open devices; empty when it cannot."""
    src, dst = opened(source.device), opened(target.device)
    if direct(src, dst):
        return "peer"
    if "pinned" in src.backend.groups or "pinned" in dst.backend.groups:
        return "staged"
    return ""


def _reason(operation: Operation, best: Candidate, candidates: Sequence[Candidate]) -> str:
    able = [each for each in candidates if not each.lacks and each is not best]
    if operation.on:
        return f"it is for {operation.on}"
    if not able:
        lacking = "; ".join(f"{each.address}: {each.lacks}" for each in candidates if each.lacks)
        return f"the only device that can ({lacking})" if lacking else "the only device"
    next_best = min(able, key=lambda each: each.end_s)
    if next_best.end_s == best.end_s:
        return f"as soon as on {next_best.address}, and listed before it"
    return (
        f"done after {best.end_s:.2e} s as estimated, on {next_best.address} after "
        f"{next_best.end_s:.2e} s"
    )

"""Do again what `hal.record` wrote down, on the same device or another, and compare the results."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput, IntegrityError
from drivetrain.hal.kernel import TYPES, ArgType, struct_of
from drivetrain.hal.language.facts import KernelFacts, Param
from drivetrain.hal.language.source import Source
from drivetrain.hal.record_file import Reader, digest
from drivetrain.hal.recording import KINDS, PART_BYTES, read_hash
from drivetrain.hal.registry import device as find_device

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.graph import Graph
    from drivetrain.hal.kernel import Kernel, Module
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.stream import Event, Stream

Where = str | Mapping[str, str]


@dataclass(frozen=True)
class Difference:
    """Contents that are not those of the recording."""

    entry: int
    """Its number in the file, from 0."""
    what: str


@dataclass(frozen=True)
class Replayed:
    """What came of a replay."""

    entries: int
    checks: int
    """Contents that were compared."""
    differences: tuple[Difference, ...]
    complete: bool
    """Whether the recording was; else it ends early, and so does this."""
    reason: str
    seconds: float

    @property
    def same(self) -> bool:
        return not self.differences


def replay(path: str | Path, *, on: Where | None = None) -> Replayed:
    """Do again what was recorded, and compare what was read back and what is left in memory.

    ``on`` is the address of a device for all of it, or a mapping from recorded addresses to others;
    None: the devices it was recorded on. It compiles and runs the kernels that the file holds, as
    ``Device.compile`` does: replay files that you trust. Raises BadInput for what is no recording
    or cannot be done there, IntegrityError for a damaged file, and what the calls themselves raise.
    Floating-point results may differ between devices by rounding.
    """
    if on is not None and not isinstance(on, (str, Mapping)):
        raise BadInput(f"replay: on={on!r}; give an address, or a mapping from recorded ones")
    began = time.perf_counter()
    with Reader(Path(path)) as file, ExitStack() as left:
        player = _Player(file, on, left)
        for number, entry in enumerate(file.entries):
            player.play(number, entry)
        ending = file.ending or {}
        return Replayed(
            len(file.entries),
            player.checks,
            tuple(player.differences),
            ending.get("complete") is True,
            str(ending.get("reason", "")),
            time.perf_counter() - began,
        )


@dataclass
class _Player:
    file: Reader
    on: Where | None
    left: ExitStack
    """Closes what is still open at the end."""
    checks: int = 0
    differences: list[Difference] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.devices: dict[int, Device] = {}
        self.streams: dict[int, Stream] = {}
        self.buffers: dict[int, Buffer] = {}
        self.modules: dict[int, Module] = {}
        self.kernels: dict[int, Kernel] = {}
        self.events: dict[int, Event] = {}
        self.graphs: dict[int, Graph] = {}
        self.captures: dict[int, ExitStack] = {}
        self.capturing: dict[int, int] = {}
        """Graph -> the stream that it is captured from now."""
        self.reads: dict[int, tuple[bytearray, int]] = {}

    def play(self, number: int, entry: dict[str, Any]) -> None:
        facts = dict(entry)
        op = facts.pop("op", None)
        run: Callable[..., None] | None = None
        if isinstance(op, str):
            run = getattr(self, "on_" + op.replace(" ", "_"), None)
        if run is None:
            raise self.file.damaged(f"entry {number} asks for {op!r}")
        self.number = number
        try:
            run(**facts)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise self.file.damaged(
                f"entry {number} ({op}) cannot be meant: {type(error).__name__}: {error}"
            ) from error

    def _compare(self, found: str, wanted: str, what: str) -> None:
        self.checks += 1
        if found != wanted:
            self.differences.append(Difference(self.number, what))

    def _part(self, told: Any) -> Buffer:
        number, offset, nbytes = (int(each) for each in told)
        return self.buffers[number].view(offset, nbytes)

    # -- things ----------------------------------------------------------------------------------

    def on_device(self, n: int, address: str, name: str) -> None:
        wanted = address
        if isinstance(self.on, str):
            wanted = self.on
        elif self.on is not None:
            wanted = self.on.get(address, address)
        self.devices[n] = find_device(wanted)

    def on_stream(self, n: int, device: int) -> None:
        self.streams[n] = self.devices[device].stream()

    def on_buffer(self, n: int, device: int, nbytes: int, kind: str, content: int | None) -> None:
        stream = self._home(device)
        made = self.devices[device].alloc(nbytes, stream=stream, kind=KINDS[kind])
        self.left.callback(made.close)
        self.buffers[n] = made
        if content is not None:
            made.copy_from(self.file.blob(content), stream=stream)
        elif nbytes:
            made.fill(b"\0", stream=stream)
        stream.synchronize()

    def _home(self, device: int) -> Stream:
        """A stream of ours for each device, on which buffers begin."""
        key = -1 - device
        if key not in self.streams:
            self.streams[key] = self.devices[device].stream()
        return self.streams[key]

    def on_close(self, buffer: int) -> None:
        self.buffers.pop(buffer).close()

    def on_module(self, n: int, device: int, source: dict[str, Any], options: list[str]) -> None:
        found = self._source(source)
        self.modules[n] = self.devices[device].compile(found, options=tuple(options))

    def _source(self, told: dict[str, Any]) -> Source:
        facts = dict(told)
        facts["data"] = self.file.blob(facts["data"])
        for name in ("defines", "signature", "constants"):
            facts[name] = tuple((str(key), value) for key, value in facts[name])
        facts["lines"] = tuple(facts["lines"])
        facts["kernels"] = tuple(
            (name, KernelFacts(**{**kernel, "params": tuple(Param(**p) for p in kernel["params"])}))
            for name, kernel in facts["kernels"]
        )
        return Source(**facts)

    def on_kernel(self, n: int, module: int, name: str, arguments: list[Any]) -> None:
        types: list[ArgType] = [
            struct_of(nbytes) if kind == "struct" else TYPES[kind] for kind, nbytes in arguments
        ]
        self.kernels[n] = self.modules[module].kernel(name, types)

    # -- calls -------------------------------------------------------------------------------------

    def _value(self, told: Any) -> Any:
        if told is None:
            return None
        ((kind, value),) = told.items()
        if kind == "buffer":
            return self._part(value)
        if kind == "float":
            return float.fromhex(value)
        return bytes.fromhex(value) if kind == "bytes" else int(value)

    def on_launch(
        self,
        stream: int,
        kernel: int,
        grid: list[int],
        block: list[int],
        shared: int,
        arguments: list[Any],
    ) -> None:
        values = [self._value(told) for told in arguments]
        call = self.kernels[kernel]
        call(self.streams[stream], tuple(grid), tuple(block), *values, shared=shared)

    def on_fill(self, stream: int, to: Any, pattern: str) -> None:
        self._part(to).fill(bytes.fromhex(pattern), stream=self.streams[stream])

    def on_write(self, stream: int, to: Any, data: int) -> None:
        self._part(to).copy_from(self.file.blob(data), stream=self.streams[stream])

    def on_copy(self, stream: int, to: Any, source: Any, nbytes: int) -> None:
        into, out_of = self._part(to), self._part(source)
        into.copy_from(out_of, stream=self.streams[stream])

    def on_read(self, stream: int, source: Any, n: int, nbytes: int) -> None:
        found = self._part(source)
        if not 0 <= nbytes <= found.nbytes:
            raise self.file.damaged(f"entry {self.number} reads {nbytes} of {found.nbytes} bytes")
        content = bytearray(nbytes)
        self.reads[n] = content, stream
        found.copy_to(content, stream=self.streams[stream])

    def on_check(self, read: int, hash: str) -> None:
        content, stream = self.reads.pop(read)
        self.streams[stream].synchronize()
        self._compare(digest(content), hash, f"what was read (read {read})")

    def on_final(self, buffer: int, hash: str) -> None:
        for number, stream in self.streams.items():
            if number not in self.capturing.values():  # the recording ended meanwhile
                stream.synchronize()
        found = self.buffers[buffer]
        device = next(n for n, d in self.devices.items() if d == found.device)
        what = f"buffer {buffer} of {found.nbytes} bytes at the end"
        self._compare(read_hash(found, self._home(device)), hash, what)

    def on_record(self, n: int, stream: int) -> None:
        self.events[n] = self.streams[stream].record()

    def on_wait(self, event: int, stream: int) -> None:
        self.streams[stream].wait(self.events[event])

    def on_synchronize(self, stream: int) -> None:
        self.streams[stream].synchronize()

    def on_capture(self, n: int, stream: int) -> None:
        self.captures[n] = self.left.enter_context(ExitStack())
        self.graphs[n] = self.captures[n].enter_context(self.streams[stream].capture())
        self.capturing[n] = stream

    def on_captured(self, graph: int) -> None:
        del self.capturing[graph]
        self.captures.pop(graph).close()

    def on_abandoned(self, graph: int) -> None:
        del self.capturing[graph]
        error = RuntimeError("as it was recorded")
        self.captures.pop(graph).__exit__(RuntimeError, error, None)

    def on_graph(self, stream: int, graph: int) -> None:
        self.graphs[graph].launch(self.streams[stream])

    def on_graph_set(self, graph: int, node: int, index: int, value: Any) -> None:
        self.graphs[graph].set(node, index, self._value(value))


__all__ = ["PART_BYTES", "BadInput", "Difference", "IntegrityError", "Replayed", "replay"]

"""Work that was noted once and is launched again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput, DeviceLost, HalError
from drivetrain.hal import watch
from drivetrain.hal.hot import GraphCore, StreamCore

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.kernel import Launch
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.opened import Opened
    from drivetrain.hal.stream import Stream


class Graph(GraphCore):
    """What was queued in a ``with stream.capture()`` block. Made by `Stream.capture` only.

    The driver's own graph where it has them, else the commands in order. The n-th kernel launch,
    counted from 0, can get other arguments by `set`.
    """

    def __init__(self, opened: Opened) -> None:
        self._opened = opened
        self.device: Device = opened.device
        self.native = "graphs" in opened.backend.groups
        """Whether the driver runs it; else the core repeats the commands."""
        self._handle = 0
        self._ready = False
        self._closed = False
        self._commands: list[Callable[[int], None]] = []
        self._launches: list[Launch] = []
        self._buffers: list[Buffer] = []
        self._kept: list[object] = []
        self._before = 0
        self._recorded: set[int] = set()
        """Events of the capture itself."""
        self._launches_only = True

    # -- capture -------------------------------------------------------------------------------

    def _begin(self, stream: Stream) -> None:
        if self.native:
            self._before = self._opened.take_event()
            try:
                self._opened.backend.event_record(self._before, stream.handle)
                self._opened.backend.graph_begin(stream.handle)
            except HalError:
                self._captured()
                raise

    def _wait_before(self) -> None:
        """Wait for what was queued on the stream before the capture; no event can be recorded
        there now."""
        if self._before:
            self._opened.wait_for(self._before, "close")

    def _captured(self) -> None:
        before, self._before = self._before, 0
        if before:
            self._opened.give_event(before)

    def _end(self, stream: Stream) -> None:
        self._captured()
        if self.native:
            self._handle = self._opened.backend.graph_end(stream.handle)
        self._ready = True
        self._prepare()

    def _prepare(self) -> None:
        """Have C launch it, where it can: the driver's own graph, or nothing but kernels."""
        self._disarm()
        if self._kept or not (self.native or self._launches_only):
            return
        used = [*self._buffers, *(b for noted in self._launches for b in noted.buffers.values())]
        steps: tuple[Any, ...] = ()
        if not self.native:
            steps = tuple(
                (noted.kernel, noted.arguments, noted.grid, noted.block, noted.shared)
                for noted in self._launches
            )
        buffers = tuple({id(buffer): buffer for buffer in used}.values())
        calls, launches = self._opened.calls, tuple(self._launches)
        self._arm(self._opened, calls, self._handle, buffers, launches, steps)

    def _abandon(self, stream: Stream) -> None:
        self._closed = True
        self._captured()
        if self.native:
            try:
                handle = self._opened.backend.graph_end(stream.handle)
            except HalError:
                return  # the capture was broken, which the caller's own error tells
            self._opened.backend.graph_destroy(handle)

    def _keeps(self, thing: object) -> None:
        self._kept.append(thing)

    def _no_events(self, op: str) -> None:
        if not self.native:
            raise HalError(
                f"{op}: a graph of {self.device.address} is a list of commands of one stream and "
                "takes no events",
                code="capturing",
                driver=self.device.driver,
                op=op,
                device=self.device.address,
            )

    def _takes_wait(self, event: int) -> None:
        """Raises HalError for an event from outside: a driver would break the capture over it."""
        self._no_events("wait")
        if event not in self._recorded:
            raise HalError(
                "wait: the stream is being captured, and the event was not recorded in that "
                "capture. Wait before the capture begins, or for the graph's launch",
                code="capturing",
                driver=self.device.driver,
                op="wait",
                device=self.device.address,
            )

    def _takes(self, name: str, buffers: tuple[Buffer, ...], arguments: tuple[Any, ...]) -> bool:
        """Note a command; True when that is all that is to be done now."""
        self._buffers += buffers
        self._launches_only = False
        if self.native:
            return False
        function = getattr(self._opened.backend, name)
        if name == "copy":
            self._commands.append(lambda handle: function(*arguments, handle, False))
        else:
            self._commands.append(lambda handle: function(*arguments, handle))
        return True

    def _takes_launch(self, launch: Launch) -> bool:
        """Note a kernel launch; True when that is all that is to be done now."""
        self._launches.append(launch)
        if self.native:
            return False
        self._commands.append(launch.queue)
        return True

    # -- use -----------------------------------------------------------------------------------

    @property
    def kernels(self) -> int:
        """How many kernel launches it holds."""
        return len(self._launches)

    if TYPE_CHECKING:

        def launch(self, stream: Stream) -> None:
            """Queue all of it. Raises BadInput when one of its buffers is closed."""

    def _launch_from(self, stream: Stream, first: int) -> None:
        """`launch` when it is not the usual case; the commands before ``first`` are queued."""
        self._check("launch")
        if not isinstance(stream, StreamCore):
            raise BadInput(f"launch: a graph takes a Stream, not a {type(stream).__name__}")
        if stream._opened is not self._opened:
            raise BadInput(
                f"launch: the graph is of {self.device.address} and the stream of "
                f"{stream.device.address}"
            )
        handle = stream._alive("launch")
        if stream._graph is not None:
            raise BadInput("launch: a graph cannot be launched into another graph")
        for buffer in self._buffers:
            if buffer.closed:
                raise BadInput(f"launch: the graph uses a buffer that is closed: {buffer!r}")
            buffer._note(stream)
        for noted in self._launches:
            noted.check_buffers(stream)
        with (
            watch.around(
                watch.Work(
                    "graph", f"graph of {self.kernels} kernels", self._opened, handle, graph=self
                )
            )
            if watch.active
            else watch.NOBODY
        ):
            if self.native:
                self._opened.backend.graph_launch(self._handle, handle)
            else:
                for command in self._commands[first:]:
                    command(handle)
        if self._kept:  # the graph may be gone before the stream comes to them
            stream._keep([self._kept])

    def set(self, node: int, index: int, value: Any) -> None:
        """From the next launch on, argument ``index`` of kernel launch ``node`` is ``value``."""
        self._check("set")
        if not 0 <= node < len(self._launches):
            raise BadInput(f"set: the graph has {len(self._launches)} kernel launches, no {node}")
        noted = self._launches[node]
        noted.set(index, value)
        if self.native:
            noted.change(self._handle, node)
        self._prepare()
        if watch.active:
            watch.tell("graph set", self, node, index, value)

    def _check(self, op: str) -> None:
        if self._closed:
            raise BadInput(f"{op}: the graph is closed, or its capture failed")
        if not self._ready:
            raise BadInput(f"{op}: the graph is still being captured; leave the `with` block first")

    def close(self) -> None:
        """Give back what the driver holds. What was launched still happens."""
        self._closed = True
        self._disarm()
        handle, self._handle = self._handle, 0
        if handle and not self._opened.closed:
            try:
                self._opened.backend.graph_destroy(handle)
            except DeviceLost:
                pass  # nothing is left to give back
        self._commands, self._launches, self._buffers, self._kept = [], [], [], []

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:
            pass  # the device is closed

    def __enter__(self) -> Graph:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        kind = "native" if self.native else "a list of commands"
        return f"<Graph of {self.kernels} kernel launches, {kind}, on {self.device.address}>"

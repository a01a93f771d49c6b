"""Named defects of a simulated device, each a small change of the right one.

``DRIVETRAIN_SIMULATED="mutant=event_done_early"`` opens a device with that defect. They prove the
conformance kit: `drivetrain.hal.conformance.mutants` says which of its checks must catch which.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from drivetrain.errors import CompileError, DeviceLost, HalError
from drivetrain.hal.driver import Backend, DeviceInfo
from drivetrain.hal.drivers.simulated_backend import Launch, Simulated
from drivetrain.hal.drivers.simulated_chip import Command, Point, Queue, Reach
from drivetrain.hal.kinds import Kind, Way

MUTANTS: dict[str, type[Simulated]] = {}
"""By name."""

Dims = tuple[int, int, int]


def _mutant(kind: type[Simulated]) -> type[Simulated]:
    words = "".join(f"_{c.lower()}" if c.isupper() else c for c in kind.__name__)
    MUTANTS[words.lstrip("_")] = kind
    return kind


# -- memory ---------------------------------------------------------------------------------------


@_mutant
class FreeIgnoresStream(Simulated):
    """Memory is given back while queued work still uses it."""

    def free(self, ptr: int, kind: int, stream: int) -> None:
        self._owned.pop(ptr)
        self.release(ptr, kind)


@_mutant
class LeakOnFree(Simulated):
    """What is freed is never given back."""

    def release(self, ptr: int, kind: int) -> None:
        pass


@_mutant
class DoubleFreeAccepted(Simulated):
    """Freeing what is not allocated does nothing and says nothing."""

    def free(self, ptr: int, kind: int, stream: int) -> None:
        if ptr in self._owned:
            super().free(ptr, kind, stream)


@_mutant
class OomWrongError(Simulated):
    """Too little memory is told as some error."""

    def alloc(self, nbytes: int, kind: int, stream: int) -> int:
        try:
            return super().alloc(nbytes, kind, stream)
        except MemoryError:
            self.fail("alloc", "error", "status 2")


@_mutant
class OomNull(Simulated):
    """Too little memory gives address 0."""

    def alloc(self, nbytes: int, kind: int, stream: int) -> int:
        try:
            return super().alloc(nbytes, kind, stream)
        except MemoryError:
            return 0


@_mutant
class AlignmentEight(Simulated):
    """Addresses are multiples of 8 only."""

    def alloc(self, nbytes: int, kind: int, stream: int) -> int:
        return super().alloc(nbytes + 8, kind, stream) + 8

    def free(self, ptr: int, kind: int, stream: int) -> None:
        super().free(ptr - 8, kind, stream)


@_mutant
class AllocHalf(Simulated):
    """Allocations have half the bytes that were asked for, so they overlap."""

    def take(self, nbytes: int, kind: int) -> int:
        return super().take(nbytes // 2, kind)

    def check(self, op: str, ptr: int, nbytes: int) -> None:
        pass


@_mutant
class MemoryConstant(Simulated):
    """Free memory is always all of it."""

    def memory(self) -> tuple[int, int]:
        return self.info.memory_bytes, self.info.memory_bytes


@_mutant
class CloseLeaks(Simulated):
    """A closed device keeps what was allocated on it."""

    def give_all_back(self) -> None:
        pass


@_mutant
class AllocRaces(Simulated):
    """Two threads that allocate at once can get the same memory."""

    _taken: tuple[int, int] = (0, 0)

    def take(self, nbytes: int, kind: int) -> int:
        before = self._taken
        time.sleep(0.002)
        now = self._taken
        if now is not before and now[1] >= nbytes:
            return now[0]
        found = super().take(nbytes, kind)
        self._taken = (found, nbytes)
        return found


# -- copies and fills -----------------------------------------------------------------------------


@_mutant
class CopyShort(Simulated):
    """The last byte of each copy is left out."""

    def move(self, dst: int, src: int, nbytes: int, way: int) -> None:
        super().move(dst, src, nbytes - 1, way)


@_mutant
class CopySwapped(Simulated):
    """Copies within the device go from the destination to the source."""

    def move(self, dst: int, src: int, nbytes: int, way: int) -> None:
        if way == Way.DEVICE_TO_DEVICE:
            dst, src = src, dst
        super().move(dst, src, nbytes, way)


@_mutant
class CopySizeOf24Bits(Simulated):
    """The size of a copy is kept in 24 bits."""

    def move(self, dst: int, src: int, nbytes: int, way: int) -> None:
        super().move(dst, src, nbytes & 0xFFFFFF, way)


@_mutant
class ViewOffsetDropped(Simulated):
    """Copies begin at an aligned address, whatever was asked."""

    def move(self, dst: int, src: int, nbytes: int, way: int) -> None:
        if way in (Way.HOST_TO_DEVICE, Way.DEVICE_TO_DEVICE):
            dst -= dst % self.alignment
        if way in (Way.DEVICE_TO_HOST, Way.DEVICE_TO_DEVICE):
            src -= src % self.alignment
        super().move(dst, src, nbytes, way)


@_mutant
class HostReadLate(Simulated):
    """Host memory is read when the copy's turn comes, also when the caller may reuse it."""

    def copy(self, dst: int, src: int, nbytes: int, way: int, stream: int, host_free: bool) -> None:
        super().copy(dst, src, nbytes, way, stream, False)


@_mutant
class FillWidth(Simulated):
    """Patterns of more than 8 bytes are cut to 8."""

    def repeat(self, ptr: int, pattern: bytes, count: int) -> None:
        width = min(8, len(pattern))
        super().repeat(ptr, pattern[:width], count * len(pattern) // width)


@_mutant
class FillShort(Simulated):
    """The last repetition of a fill is left out."""

    def repeat(self, ptr: int, pattern: bytes, count: int) -> None:
        super().repeat(ptr, pattern, count - 1)


@_mutant
class FillOutOfOrder(Simulated):
    """Fills happen at once, before what was queued."""

    def fill(self, ptr: int, pattern: bytes, count: int, stream: int) -> None:
        self.repeat(ptr, pattern, count)


@_mutant
class PeerCopyBackwards(Simulated):
    """Copies from another device go to it."""

    def copy_peer(self, dst: int, src: int, nbytes: int, other: Backend, stream: int) -> None:
        super().copy_peer(src, dst, nbytes, other, stream)


# -- order ----------------------------------------------------------------------------------------


@_mutant
class EventDoneEarly(Simulated):
    """Events are done when they are recorded."""

    def event_done(self, event: int) -> bool:
        return True

    def event_synchronize(self, event: int, timeout_s: float) -> bool:
        return True


@_mutant
class StreamDoneEarly(Simulated):
    """Streams say that they are done while they work."""

    def stream_done(self, stream: int) -> bool:
        return True


@_mutant
class SynchronizeEarly(Simulated):
    """Waiting for a stream returns before its work is done."""

    def stream_synchronize(self, stream: int, timeout_s: float) -> bool:
        super().stream_synchronize(stream, min(timeout_s, 0.01))
        return True


@_mutant
class SynchronizeForgetsStreams(Simulated):
    """Waiting for the device waits for its first stream only."""

    def wait_for(self, queues: Sequence[Queue], timeout_s: float) -> bool:
        return super().wait_for(queues[:1], timeout_s)


@_mutant
class WaitIgnored(Simulated):
    """Streams do not wait for events."""

    def hold(self, point: Point) -> None:
        pass


@_mutant
class WaitWrongEvent(Simulated):
    """Streams wait for the event that was recorded last, whichever was named."""

    def event_record(self, event: int, stream: int) -> None:
        super().event_record(event, stream)
        self._last = self._events[event]

    def stream_wait(self, stream: int, event: int) -> None:
        self.queue(stream).put(lambda point=self._last: self.hold(point))  # type: ignore[misc]


@_mutant
class WaitReadsLate(Simulated):
    """A queued wait is for the event as recorded when its turn comes."""

    def stream_wait(self, stream: int, event: int) -> None:
        def late() -> None:
            time.sleep(0.01)  # the device looks at the event a little later
            point = self._events.get(event)
            if point is not None:
                self.hold(point)

        self.queue(stream).put(late)


@_mutant
class StreamDestroyDropsWork(Simulated):
    """What was queued on a stream that ends does not happen."""

    def retire(self, queue: Queue) -> None:
        with queue._changed:
            kept = [c for c in queue._waiting if isinstance(c, Reach)]
            queue._finished += len(queue._waiting) - len(kept)
            queue._waiting.clear()
            queue._waiting.extend(kept)
        queue.end()


@_mutant
class PriorityCrashes(Simulated):
    """A stream of another priority ends the process."""

    def stream_create(self, priority: int) -> int:
        if priority:
            os.abort()
        return super().stream_create(priority)


# -- time -----------------------------------------------------------------------------------------


@_mutant
class EventTimeBackwards(Simulated):
    """Elapsed time is negative."""

    def event_seconds(self, start: int, end: int) -> float:
        return -super().event_seconds(start, end)


@_mutant
class ElapsedInMilliseconds(Simulated):
    """Elapsed time is in milliseconds."""

    def event_seconds(self, start: int, end: int) -> float:
        return super().event_seconds(start, end) * 1e3


@_mutant
class TimeoutIgnored(Simulated):
    """Waits end with the work, whatever their limit."""

    def wait_for(self, queues: Sequence[Queue], timeout_s: float) -> bool:
        return super().wait_for(queues, 3600.0)


@_mutant
class TimeoutTrue(Simulated):
    """A wait that ended at its limit says that all is done."""

    def wait_for(self, queues: Sequence[Queue], timeout_s: float) -> bool:
        super().wait_for(queues, timeout_s)
        return True


@_mutant
class EventTimeoutTrue(Simulated):
    """The same, for events."""

    def event_synchronize(self, event: int, timeout_s: float) -> bool:
        super().event_synchronize(event, timeout_s)
        return True


# -- kernels --------------------------------------------------------------------------------------


@_mutant
class AtomicLost(Simulated):
    """What two halves of a launch both wrote, only the second wrote."""

    def blocks(self, launch: Launch, first: int, count: int) -> None:
        if count < 2:
            super().blocks(launch, first, count)
            return
        spans = []
        for value, size in zip(launch.values, launch.sizes, strict=True):
            address = int.from_bytes(value, "little")
            arena = self._arenas.get(Kind.DEVICE)
            if size < 0 and arena is not None:
                spans += [(a, n) for a, n in arena.sizes.items() if a <= address < a + n]
        before = [ctypes.string_at(a, n) for a, n in spans]
        super().blocks(launch, first, count // 2)
        half = [ctypes.string_at(a, n) for a, n in spans]
        for (a, n), old in zip(spans, before, strict=True):
            ctypes.memmove(a, old, n)
        super().blocks(launch, first + count // 2, count - count // 2)
        for (a, n), old, one in zip(spans, before, half, strict=True):
            for at in range(0, n - 3, 4):
                word = slice(at, at + 4)
                if old[word] != one[word] and ctypes.string_at(a + at, 4) == old[word]:
                    ctypes.memmove(a + at, one[word], 4)


class _OtherLaunch(Simulated):
    """A launch in which something is changed."""

    def changed(self, launch: Launch) -> dict[str, Any]:
        return {}

    def prepared(self, *given: Any) -> Launch:
        launch = super().prepared(*given)
        return Launch(**{**vars(launch), **self.changed(launch)})


@_mutant
class GridYzDropped(_OtherLaunch):
    """Only the first row of blocks runs."""

    def changed(self, launch: Launch) -> dict[str, Any]:
        return {"grid": (launch.grid[0], 1, 1)}


@_mutant
class BlockSwapped(_OtherLaunch):
    """The block's x and y are swapped."""

    def changed(self, launch: Launch) -> dict[str, Any]:
        x, y, z = launch.block
        return {"block": (y, x, z)}


@_mutant
class LastBlockSkipped(Simulated):
    """The last block does not run."""

    def blocks(self, launch: Launch, first: int, count: int) -> None:
        super().blocks(launch, first, max(1, count - 1))


@_mutant
class SharedLimited(Simulated):
    """Launches with more than half the declared shared memory fail."""

    def run(self, launch: Launch) -> None:
        if launch.shared > self.limits.shared_bytes // 2:
            self.fail("launch", "error", "too many resources were asked for")
        super().run(launch)


@_mutant
class ByteSignLost(_OtherLaunch):
    """Arguments of one byte lose their highest bit."""

    def changed(self, launch: Launch) -> dict[str, Any]:
        return {"values": tuple(bytes([v[0] & 127]) if len(v) == 1 else v for v in launch.values)}


@_mutant
class StructTruncated(_OtherLaunch):
    """Only the first 8 bytes of a structure arrive."""

    def changed(self, launch: Launch) -> dict[str, Any]:
        return {"values": tuple(v[:8].ljust(len(v), b"\0") for v in launch.values)}


@_mutant
class ArgumentsReadLate(Simulated):
    """Arguments are read when the launch's turn comes."""

    def launch(
        self,
        function: int,
        grid: Dims,
        block: Dims,
        shared: int,
        stream: int,
        arguments: int,
        sizes: Sequence[int],
    ) -> None:
        given = (function, grid, block, shared, arguments, sizes)
        self.put(stream, lambda: self.prepared(*given)())


@_mutant
class ArgumentsShared(Simulated):
    """The arguments of launches by two threads are packed into one place."""

    _packed: tuple[bytes, ...] = ()

    def values(self, arguments: int, sizes: Sequence[int]) -> tuple[bytes, ...]:
        self._packed = super().values(arguments, sizes)
        time.sleep(0.0005)
        packed = self._packed
        same = tuple(map(len, packed)) == tuple(map(abs, sizes))
        return packed if same else super().values(arguments, sizes)


@_mutant
class BarrierSkipped(Simulated):
    """Barriers in kernels do nothing."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        from drivetrain.hal import language

        right = language.compile

        def without(source: Any, *more: Any, **options: Any) -> Any:
            if source.language == "cuda":
                source = replace(source, text=f"#define __syncthreads()\n{source.text}")
            return right(source, *more, **options)

        language.compile = without


@_mutant
class BadCodeAccepted(Simulated):
    """Code that cannot be loaded is taken, and has no kernels."""

    def module_load(self, code: bytes, form: str) -> int:
        try:
            return super().module_load(code, form)
        except CompileError:
            return 1 << 40


@_mutant
class MissingKernelNull(Simulated):
    """A kernel that the code does not have has handle 0."""

    def function(self, module: int, symbol: str) -> int:
        try:
            return super().function(module, symbol)
        except HalError:
            return 0


@_mutant
class UnloadDropsWork(Simulated):
    """Launches that are queued when their module is unloaded do not happen."""

    def run(self, launch: Launch) -> None:
        if any(f.library is launch.function.library for f in self._functions.values()):
            super().run(launch)


# -- graphs ---------------------------------------------------------------------------------------


@_mutant
class GraphOldArguments(Simulated):
    """Arguments that are changed in a graph stay as they were."""

    def graph_set(self, *given: Any) -> None:
        pass


@_mutant
class GraphDropsLast(Simulated):
    """The last command of a graph does not happen."""

    def graph_end(self, stream: int) -> int:
        graph = super().graph_end(stream)
        del self._graphs[graph][-1:]
        return graph


@_mutant
class GraphRunsAtCapture(Simulated):
    """What goes into a graph happens at once, too."""

    def put(self, stream: int, command: Command) -> None:
        queue = self.queue(stream)
        if queue.noted is not None:
            queue.put(command)
        super().put(stream, command)


@_mutant
class GraphChangesWhatIsQueued(Simulated):
    """Changing a graph's arguments changes launches that are queued already."""

    def graph_launch(self, graph: int, stream: int) -> None:
        commands = self.graph(graph)

        def play() -> None:
            for command in commands:
                command()

        self.queue(stream).put(play)


@_mutant
class GraphDestroyDropsWork(Simulated):
    """Launches of a graph that are queued when it is destroyed do not happen."""

    def graph_launch(self, graph: int, stream: int) -> None:
        commands = list(self.graph(graph))

        def play() -> None:
            if graph in self._graphs:
                for command in commands:
                    command()

        self.queue(stream).put(play)


@_mutant
class GraphLaunchesOnce(Simulated):
    """A graph does nothing when it is launched a second time."""

    def graph_launch(self, graph: int, stream: int) -> None:
        super().graph_launch(graph, stream)
        self._graphs[graph] = []


# -- leaks ----------------------------------------------------------------------------------------


@_mutant
class EventsLeak(Simulated):
    """Events that are destroyed stay."""

    def event_destroy(self, event: int) -> None:
        self.point(event)


@_mutant
class StreamsLeak(Simulated):
    """The thread of a stream that was destroyed stays."""

    def retire(self, queue: Queue) -> None:
        pass


@_mutant
class GraphsLeak(Simulated):
    """What a destroyed graph holds stays."""

    def graph_destroy(self, graph: int) -> None:
        self._graphs[-graph] = self.graph(graph)
        super().graph_destroy(graph)


@_mutant
class ModulesLeak(Simulated):
    """Code that is unloaded stays."""

    def module_unload(self, module: int) -> None:
        pass


@_mutant
class LaunchesLeak(Simulated):
    """The packed arguments of each launch stay."""

    def prepared(self, *given: Any) -> Launch:
        self.__dict__.setdefault("_all", []).append(ctypes.create_string_buffer(512))
        return super().prepared(*given)


# -- failures -------------------------------------------------------------------------------------


@_mutant
class WorkErrorSwallowed(Simulated):
    """Queued work that failed is not told of."""

    def tell(self, queue: Queue) -> None:
        queue.failure = None


@_mutant
class WorkErrorOnWrongStream(Simulated):
    """What failed on one stream is raised where another one is waited for."""

    def tell(self, queue: Queue) -> None:
        for other in self._queues.values():
            if other is not queue:
                super().tell(other)


@_mutant
class LossForgotten(Simulated):
    """After the device is lost, calls succeed again."""

    def enter(self, method: str) -> None:
        try:
            super().enter(method)
        except DeviceLost:
            self._lost = ""
            raise


@_mutant
class CloseHangs(Simulated):
    """Closing the device never ends."""

    def close(self) -> None:
        threading.Event().wait(3600.0)


@_mutant
class ReopenFails(Simulated):
    """A device that is opened a second time does nothing but fail."""

    _closed_before: set[int] = set()  # noqa: RUF012  # of the whole process, on purpose

    def stream_create(self, priority: int) -> int:
        if self.info.index in self._closed_before:
            raise HalError("the context is destroyed", code="error")
        return super().stream_create(priority)

    def close(self) -> None:
        super().close()
        self._closed_before.add(self.info.index)


# -- what is found --------------------------------------------------------------------------------


def uuid_changes(info: DeviceInfo) -> DeviceInfo:
    """The device has another uuid in each process."""
    return replace(info, uuid=f"{info.uuid}-{os.getpid()}")


def uuid_shared(info: DeviceInfo) -> DeviceInfo:
    """All devices have one uuid."""
    return replace(info, uuid="SIMULATED")


FACTS = {each.__name__: each for each in (uuid_changes, uuid_shared)}
"""Defects in what discovery says, by name."""
MUTANTS.update(dict.fromkeys(FACTS, Simulated))


@_mutant
class GroupsOverstated(Simulated):
    """The open device declares a group that its driver does not."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.groups = self.groups | {"ipc"}


def defect_of(name: str) -> str:
    """What is wrong with a mutant, in a line."""
    told = FACTS[name].__doc__ if name in FACTS else MUTANTS[name].__doc__
    return " ".join((told or "").split())

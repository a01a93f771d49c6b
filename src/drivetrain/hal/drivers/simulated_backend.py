"""The simulated device, open: right in every point of the driver interface, and in no hurry."""

from __future__ import annotations

import ctypes
import itertools
import os
import tempfile
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

from drivetrain.errors import CompileError, DeviceLost, HalError, OutOfMemory, Unsupported
from drivetrain.hal.device import DeviceInfo
from drivetrain.hal.driver import Backend, Calls, FunctionFacts, Limits, Target
from drivetrain.hal.drivers import cpu
from drivetrain.hal.drivers.simulated import NAME, Configuration, Fault, fault
from drivetrain.hal.drivers.simulated_chip import (
    ALIGNMENT,
    Arena,
    Command,
    Point,
    Queue,
    Reach,
    charge,
    room,
    used_bytes,
)
from drivetrain.hal.kinds import Kind, Way

_DRAIN_S = 10.0
_HANG_S = 3600.0

P = ParamSpec("P")
R = TypeVar("R")

_backends: weakref.WeakSet[Simulated] = weakref.WeakSet()
_handles = itertools.count(1)
"""One count for all devices: a stream may wait for another device's event."""


def _entry(
    method: Callable[Concatenate[Simulated, P], R],
) -> Callable[Concatenate[Simulated, P], R]:
    """Counts the call, and lets it fail if a fault or the device's end says so."""
    name = method.__name__

    def called(self: Simulated, /, *arguments: P.args, **named: P.kwargs) -> R:
        self.enter(name)
        return method(self, *arguments, **named)

    return called


@cache
def _host_level() -> str:
    """The processor's instruction set: kernels run on it."""
    return cpu.discover()[0].capabilities.compute


class _Range(ctypes.Structure):
    """``dt_cpu_range``: which blocks of a launch to run."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("reserved", ctypes.c_uint32),
        ("first", ctypes.c_uint64),
        ("count", ctypes.c_uint64),
    )


class _Library:
    """A loaded shared object; unloaded with the last kernel or queued launch that needs it."""

    def __init__(self, code: bytes) -> None:
        descriptor, path = tempfile.mkstemp(suffix=".so")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(code)
            self.loaded = ctypes.CDLL(path)
        finally:
            os.unlink(path)

    def __del__(self) -> None:
        loaded = getattr(self, "loaded", None)
        if loaded is not None:
            from _ctypes import dlclose

            dlclose(loaded._handle)


@dataclass(frozen=True)
class _Function:
    library: _Library
    entry: Any


@dataclass(frozen=True)
class Launch:
    """One kernel launch with all it needs; a graph replaces it when an argument changes."""

    backend: Simulated
    function: _Function
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    values: tuple[bytes, ...]
    sizes: tuple[int, ...]

    def __call__(self) -> None:
        self.backend.run(self)


class Simulated:
    """The backend. Handles count from 1; each address is checked when a command touches it."""

    checks_addresses = True
    """For the conformance kit: freeing what is not allocated is a HalError."""

    def __init__(self, info: DeviceInfo, asked: Configuration) -> None:
        self.info, self.asked = info, asked
        self.groups = asked.groups
        self.alignment = ALIGNMENT
        self.limits = Limits((2**31 - 1, 65535, 65535), (1024, 1024, 64), 1024, 48 << 10)
        self.target = Target("cpu", _host_level(), ("fp64", "fp16"), "1")
        self._lock = threading.RLock()
        self._calls: Counter[str] = Counter()
        self._faults = list(asked.faults)
        self._lost = ""
        self._closed = False
        self._arenas: dict[int, Arena] = {}
        self._owned: dict[int, int] = {}  # address -> kind, until `free` is called
        self._ending: dict[int, int] = {}  # streams -> frees that are queued there
        self._queues: dict[int, Queue] = {}
        self._old: list[Queue] = []  # let go of, still at work
        self._events: dict[int, Point] = {}
        self._modules: dict[int, _Library] = {}
        self._functions: dict[int, _Function] = {}
        self._graphs: dict[int, list[Command]] = {}
        _backends.add(self)

    # -- faults ----------------------------------------------------------------------------------

    def inject(self, text: str) -> None:
        """From now on: a fault as ``DRIVETRAIN_SIMULATED`` writes them, counted from here."""
        new = fault(text)
        with self._lock:
            nth = new.nth + self._calls[new.method]
            self._faults.append(Fault(new.method, nth, new.what, new.seconds))

    def enter(self, method: str) -> None:
        with self._lock:
            self._calls[method] += 1
            number = self._calls[method]
            due = [f for f in self._faults if f.method == method and f.nth == number]
        if self._closed:
            self.fail(method, "closed", "the device was closed; its objects are dead")
        if self._lost:
            raise self.lost(method)
        for each in due:
            if each.what == "delay":
                time.sleep(each.seconds)
            elif each.what == "hang":
                time.sleep(_HANG_S)
            elif each.what == "lost":
                self._lost = f"a fault was injected into call {number} of {method}"
                raise self.lost(method)
            elif each.what == "out_of_memory":
                raise self.out_of_memory(0, f"a fault was injected into call {number} of {method}")
            else:
                self.fail(method, "injected", f"a fault was injected into call {number}")

    def fail(self, op: str, code: str, why: str) -> NoReturn:
        device = f"{NAME}:{self.info.index}"
        raise HalError(f"{op}: {why}", code=code, driver=NAME, op=op, device=device)

    def lost(self, op: str) -> DeviceLost:
        return DeviceLost(
            f"{op}: {NAME}:{self.info.index} is lost ({self._lost}); use it from a new process",
            code="lost",
            driver=NAME,
            op=op,
            device=f"{NAME}:{self.info.index}",
        )

    def out_of_memory(self, nbytes: int, why: str) -> OutOfMemory:
        free, total = self.room_now()
        return OutOfMemory(
            f"{nbytes} bytes on {NAME}:{self.info.index}: {why}; {free} of {total} bytes are free",
            requested=nbytes,
            free=free,
            total=total,
            code="out_of_memory",
            driver=NAME,
            op="alloc",
            device=f"{NAME}:{self.info.index}",
        )

    # -- for the conformance kit -----------------------------------------------------------------

    def handles(self) -> dict[str, int]:
        """How many of each the backend holds."""
        with self._lock:
            return {
                "streams": len(self._queues),
                "events": len(self._events),
                "modules": len(self._modules),
                "functions": len(self._functions),
                "graphs": len(self._graphs),
            }

    # -- life ------------------------------------------------------------------------------------

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            queues = [*self._queues.values(), *self._old]
            until = time.monotonic() + _DRAIN_S
            for queue in queues:
                queue.end(drop=bool(self._lost))
        ended = [queue.join(max(0.0, until - time.monotonic())) for queue in queues]
        with self._lock:
            self._closed = True
            self.give_all_back()
            if all(ended):  # else a thread may be at work in there
                self._arenas.clear()
            self._queues.clear()
            self._events.clear()
            self._functions.clear()
            self._modules.clear()
            self._graphs.clear()
            self._old.clear()

    def give_all_back(self) -> None:
        arena = self._arenas.get(Kind.DEVICE)
        if arena is not None:
            charge(self.info.index, -sum(map(room, arena.sizes.values())), 0)
        self._owned.clear()

    def room_now(self) -> tuple[int, int]:
        total = self.info.memory_bytes
        return max(0, total - used_bytes(self.info.index)), total

    @_entry
    def memory(self) -> tuple[int, int]:
        return self.room_now()

    @_entry
    def synchronize(self, timeout_s: float) -> bool:
        with self._lock:
            queues = [*self._queues.values(), *self._old]
        return self.wait_for(queues, timeout_s)

    def wait_for(self, queues: Sequence[Queue], timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        done = True
        for queue in queues:
            done = queue.wait(max(0.0, until - time.monotonic())) and done
        if self._lost:
            raise self.lost("synchronize")
        for queue in queues:
            self.tell(queue)
        return done

    def tell(self, queue: Queue) -> None:
        """Raise what failed of the work on ``queue``, once."""
        failure, queue.failure = queue.failure, None
        if failure is not None:
            raise failure

    # -- memory ----------------------------------------------------------------------------------

    @_entry
    def alloc(self, nbytes: int, kind: int, stream: int) -> int:
        self.queue(stream)
        ptr = self.take(nbytes, kind)
        if not ptr:
            # Memory whose free is queued is memory still; wait for it before giving up.
            with self._lock:
                queues = [*self._queues.values(), *self._old]
            for queue in queues:
                if queue.noted is None:
                    queue.wait(_DRAIN_S)
            ptr = self.take(nbytes, kind)
        if not ptr:
            raise self.out_of_memory(nbytes, "there is not so much")
        with self._lock:
            self._owned[ptr] = kind
        return ptr

    def take(self, nbytes: int, kind: int) -> int:
        """An address, 0 when there is no room."""
        if kind != Kind.DEVICE:
            return self.arena(kind).take(nbytes)
        if not charge(self.info.index, room(nbytes), self.info.memory_bytes):
            return 0
        ptr = self.arena(kind).take(nbytes)
        if not ptr:
            charge(self.info.index, -room(nbytes), 0)
        return ptr

    def arena(self, kind: int) -> Arena:
        with self._lock:
            found = self._arenas.get(kind)
            if found is None:
                found = self._arenas[kind] = Arena(self.info.memory_bytes)
            return found

    @_entry
    def free(self, ptr: int, kind: int, stream: int) -> None:
        queue = self.queue(stream)
        with self._lock:
            if self._owned.pop(ptr, None) != kind:
                self.fail("free", "bad_address", f"{ptr:#x} was not allocated, or was freed")
        queue.put(lambda: self.release(ptr, kind))

    def release(self, ptr: int, kind: int) -> None:
        arena = self.arena(kind)
        nbytes = arena.sizes[ptr]
        arena.release(ptr)
        if kind == Kind.DEVICE:
            charge(self.info.index, -room(nbytes), 0)

    def check(self, op: str, ptr: int, nbytes: int) -> None:
        """Raises HalError when these bytes are in no allocation of any simulated device."""
        if any(arena.holds(ptr, nbytes) for arena in list(self._arenas.values())):
            return
        for other in list(_backends):
            if any(arena.holds(ptr, nbytes) for arena in list(other._arenas.values())):
                return
        self.fail(op, "bad_address", f"{nbytes} bytes at {ptr:#x} are in no allocation")

    def pace(self, nbytes: int) -> None:
        """Take as long as a device of this speed."""
        seconds = self.asked.latency_us * 1e-6
        if self.asked.bandwidth_gbps:
            seconds += nbytes / (self.asked.bandwidth_gbps * 1e9)
        if seconds:
            time.sleep(seconds)

    @_entry
    def copy(self, dst: int, src: int, nbytes: int, way: int, stream: int, host_free: bool) -> None:
        keep = None
        if host_free and way == Way.HOST_TO_DEVICE:
            keep = ctypes.create_string_buffer(ctypes.string_at(src, nbytes), nbytes)
            src = ctypes.addressof(keep)
        self.put(stream, lambda keep=keep: self.move(dst, src, nbytes, way))  # type: ignore[misc]

    def move(self, dst: int, src: int, nbytes: int, way: int) -> None:
        if way in (Way.DEVICE_TO_HOST, Way.DEVICE_TO_DEVICE):
            self.check("copy", src, nbytes)
        if way in (Way.HOST_TO_DEVICE, Way.DEVICE_TO_DEVICE):
            self.check("copy", dst, nbytes)
        self.pace(nbytes)
        ctypes.memmove(dst, src, nbytes)

    @_entry
    def fill(self, ptr: int, pattern: bytes, count: int, stream: int) -> None:
        self.put(stream, lambda: self.repeat(ptr, pattern, count))

    def repeat(self, ptr: int, pattern: bytes, count: int) -> None:
        nbytes = len(pattern) * count
        self.check("fill", ptr, nbytes)
        self.pace(nbytes)
        if len(pattern) == 1:
            ctypes.memset(ptr, pattern[0], nbytes)
            return
        ctypes.memmove(ptr, pattern, min(len(pattern), nbytes))
        done = len(pattern)
        while done < nbytes:  # what is there already is copied behind itself
            step = min(done, nbytes - done)
            ctypes.memmove(ptr + done, ptr, step)
            done += step

    # -- streams and events ----------------------------------------------------------------------

    def queue(self, stream: int) -> Queue:
        found = self._queues.get(stream)
        if found is None:
            self.fail("stream", "bad_handle", f"{stream} is no stream, or was destroyed")
        return found

    def put(self, stream: int, command: Command) -> None:
        queue = self.queue(stream)
        if queue.noted is not None:
            queue.noted.append(command)
        else:
            queue.put(command)

    def guarded(self, command: Command) -> None:
        """Do a queued command; what it raises is a HalError. Events are reached in any case."""
        try:
            if not isinstance(command, Reach):
                self.enter("work")
            command()
        except DeviceLost as error:
            self._lost = self._lost or str(error)
            raise
        except HalError:
            raise
        except Exception as error:  # a mistake in this file must not end the thread
            self.fail("work", "internal", f"{type(error).__name__}: {error}")

    @_entry
    def stream_create(self, priority: int) -> int:
        with self._lock:
            handle = next(_handles)
            self._queues[handle] = Queue(handle, self.guarded)
            return handle

    @_entry
    def stream_destroy(self, stream: int) -> None:
        queue = self.queue(stream)
        with self._lock:
            del self._queues[stream]
            self._old = [old for old in self._old if not old.idle]
            self._old.append(queue)
        self.retire(queue)

    def retire(self, queue: Queue) -> None:
        queue.end()

    @_entry
    def stream_done(self, stream: int) -> bool:
        queue = self.queue(stream)
        if not queue.idle:
            return False
        self.tell(queue)
        return True

    @_entry
    def stream_synchronize(self, stream: int, timeout_s: float) -> bool:
        return self.wait_for([self.queue(stream)], timeout_s)

    @_entry
    def stream_wait(self, stream: int, event: int) -> None:
        self.no_capture(stream, "stream_wait")
        point = self.point(event)
        self.queue(stream).put(lambda: self.hold(point))

    def hold(self, point: Point) -> None:
        while not point.done.wait(0.1):
            if self._closed or self._lost:
                return

    def no_capture(self, stream: int, op: str) -> None:
        if self.queue(stream).noted is not None:
            self.fail(op, "capturing", "a simulated graph is of one stream and takes no events")

    def point(self, event: int) -> Point:
        found = self._events.get(event)
        for other in () if found is not None else list(_backends):
            found = found or other._events.get(event)
        if found is None:
            self.fail("event", "bad_handle", f"{event} is no event, or was destroyed")
        return found

    @_entry
    def event_create(self, timing: bool) -> int:
        point = Point()
        point.reach()
        with self._lock:
            handle = next(_handles)
            self._events[handle] = point
            return handle

    @_entry
    def event_destroy(self, event: int) -> None:
        self.point(event)
        with self._lock:
            del self._events[event]

    @_entry
    def event_record(self, event: int, stream: int) -> None:
        self.point(event)
        self.no_capture(stream, "event_record")
        point = Point()
        with self._lock:
            self._events[event] = point
        self.queue(stream).put(Reach(point))

    @_entry
    def event_done(self, event: int) -> bool:
        return self.point(event).done.is_set()

    @_entry
    def event_synchronize(self, event: int, timeout_s: float) -> bool:
        return self.point(event).done.wait(timeout_s)

    # -- group timing ----------------------------------------------------------------------------

    @_entry
    def event_seconds(self, start: int, end: int) -> float:
        return self.point(end).at - self.point(start).at

    # -- group compute ---------------------------------------------------------------------------

    @_entry
    def module_load(self, code: bytes, form: str) -> int:
        if form != "so":
            raise Unsupported(
                f"a simulated device takes shared objects (so), not {form}",
                code="unsupported",
                driver=NAME,
                op="module_load",
            )
        try:
            library = _Library(code)
        except OSError as error:
            raise CompileError(
                f"the shared object cannot be loaded: {error}", code="error", driver=NAME
            ) from error
        with self._lock:
            handle = next(_handles)
            self._modules[handle] = library
            return handle

    @_entry
    def module_unload(self, module: int) -> None:
        with self._lock:
            library = self._modules.pop(module, None)
            if library is None:
                self.fail("module_unload", "bad_handle", f"{module} is no module")
            for handle in [h for h, f in self._functions.items() if f.library is library]:
                del self._functions[handle]

    @_entry
    def function(self, module: int, symbol: str) -> int:
        library = self._modules.get(module)
        if library is None:
            self.fail("function", "bad_handle", f"{module} is no module")
        try:
            entry = getattr(library.loaded, f"dt_cpu_{symbol}")
        except AttributeError:
            self.fail("function", "no_such_kernel", f"the code has no kernel {symbol}")
        entry.restype = ctypes.c_int
        entry.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        with self._lock:
            handle = next(_handles)
            self._functions[handle] = _Function(library, entry)
            return handle

    @_entry
    def function_arguments(self, function: int, sizes: Sequence[int]) -> None:
        pass

    @_entry
    def function_facts(self, function: int) -> FunctionFacts:
        return FunctionFacts()

    @_entry
    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        stream: int,
        arguments: int,
        sizes: Sequence[int],
    ) -> None:
        self.put(stream, self.prepared(function, grid, block, shared, arguments, sizes))

    def prepared(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        arguments: int,
        sizes: Sequence[int],
    ) -> Launch:
        """The launch, its arguments read."""
        found = self._functions[function]
        return Launch(self, found, grid, block, shared, self.values(arguments, sizes), tuple(sizes))

    def values(self, arguments: int, sizes: Sequence[int]) -> tuple[bytes, ...]:
        table = (ctypes.c_void_p * len(sizes)).from_address(arguments) if sizes else ()
        return tuple(
            ctypes.string_at(at, abs(size)) for at, size in zip(table, sizes, strict=True) if at
        )

    def run(self, launch: Launch) -> None:
        """Do a launch, when its turn has come."""
        self.pace(0)
        for value, size in zip(launch.values, launch.sizes, strict=True):
            address = int.from_bytes(value, "little")
            if size < 0 and address:
                self.check("launch", address, 1)
        self.blocks(launch, 0, launch.grid[0] * launch.grid[1] * launch.grid[2])

    def blocks(self, launch: Launch, first: int, count: int) -> None:
        """Run some of the launch's blocks."""
        offsets, at = [], 0
        for value in launch.values:
            offsets.append(at)
            at += -(-len(value) // 16) * 16
        held = ctypes.create_string_buffer(at + 16)
        start = -(-ctypes.addressof(held) // 16) * 16
        for offset, value in zip(offsets, launch.values, strict=True):
            ctypes.memmove(start + offset, value, len(value))
        table = (ctypes.c_void_p * max(len(offsets), 1))(*(start + o for o in offsets))
        which = _Range(launch.grid, launch.block, launch.shared, 0, first, count)
        code = launch.function.entry(ctypes.addressof(which), ctypes.addressof(table))
        if code == 1:
            raise self.out_of_memory(0, "a kernel found no host memory")
        if code:
            self.fail("launch", "error", f"the kernel ended with code {code}")

    @_entry
    def calls(self) -> Calls:
        return Calls()

    # -- group graphs ----------------------------------------------------------------------------

    @_entry
    def graph_begin(self, stream: int) -> None:
        queue = self.queue(stream)
        if queue.noted is not None:
            self.fail("graph_begin", "capturing", "a graph was begun on this stream already")
        queue.noted = []

    @_entry
    def graph_end(self, stream: int) -> int:
        queue = self.queue(stream)
        noted, queue.noted = queue.noted, None
        if noted is None:
            self.fail("graph_end", "not_capturing", "no graph was begun on this stream")
        with self._lock:
            handle = next(_handles)
            self._graphs[handle] = noted
            return handle

    def graph(self, graph: int) -> list[Command]:
        found = self._graphs.get(graph)
        if found is None:
            self.fail("graph", "bad_handle", f"{graph} is no graph, or was destroyed")
        return found

    @_entry
    def graph_launch(self, graph: int, stream: int) -> None:
        commands = list(self.graph(graph))  # as it is now: later changes are for later launches

        def play() -> None:
            for command in commands:
                command()

        self.queue(stream).put(play)

    @_entry
    def graph_destroy(self, graph: int) -> None:
        self.graph(graph)
        with self._lock:
            del self._graphs[graph]

    @_entry
    def graph_set(
        self,
        graph: int,
        node: int,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        arguments: int,
        sizes: Sequence[int],
    ) -> None:
        commands = self.graph(graph)
        launches = [at for at, command in enumerate(commands) if isinstance(command, Launch)]
        if not 0 <= node < len(launches):
            self.fail("graph_set", "no_such_node", f"there are {len(launches)} launches, no {node}")
        commands[launches[node]] = self.prepared(function, grid, block, shared, arguments, sizes)

    # -- group peer ------------------------------------------------------------------------------

    @_entry
    def peer_enable(self, other: Backend) -> bool:
        return isinstance(other, Simulated)

    @_entry
    def copy_peer(self, dst: int, src: int, nbytes: int, other: Backend, stream: int) -> None:
        assert isinstance(other, Simulated)
        self.put(stream, lambda: self.move(dst, src, nbytes, Way.DEVICE_TO_DEVICE))

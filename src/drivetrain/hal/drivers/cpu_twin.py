"""The twin of ``drivetrain.hal._cpu``: the same device with Python's threads and ctypes.

Each stream has a thread of its own; kernels are shared out over helpers. The GIL is free while a
kernel runs or bytes move.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
import time
from _thread import start_new_thread
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from drivetrain.hal.drivers.cpu_errors import Status, error
from drivetrain.hal.drivers.cpu_twin_parts import GUARD, Allocation, Function, Library, Range

_MOST_QUEUED = 32768
_STAGED = 256 << 10
_PARTS_A_WORKER = 8

_handles = itertools.count(1)
_generation = 0


def _forked() -> None:
    global _generation
    _generation += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)

Failure = tuple[int, str]
Command = Callable[[], Failure | None]

_MEANINGS = {
    1: " (out of memory)",
    2: " (a block of more than 1024 threads)",
    3: " (a barrier that not all threads of a block reach)",
}
"""Of what translated kernels return."""


class _Mark:
    """One recording of an event."""

    __slots__ = ("at_ns", "done")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.at_ns = 0

    def signal(self) -> None:
        self.at_ns = time.monotonic_ns()
        self.done.set()


class _Event:
    __slots__ = ("device", "mark", "timing")

    def __init__(self, device: Device, timing: bool) -> None:
        self.device = device
        self.timing = timing
        self.mark: _Mark | None = None


_events: dict[int, _Event] = {}
"""Of all devices: a stream may wait for another device's event."""


class _Stream:
    """Commands in order, done by a thread that begins with the first of them."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.changed = threading.Condition()
        self.commands: deque[tuple[Command, bool]] = deque()
        self.queued = self.finished = 0
        self.failure: Failure | None = None
        self.destroyed = False
        self.started = False

    def put(self, command: Command, always: bool = False) -> int:
        """Queue it; ``always``: even when the device drops what has not begun."""
        with self.changed:
            if self.queued - self.finished >= _MOST_QUEUED:
                self.changed.wait_for(lambda: self.queued - self.finished <= _MOST_QUEUED // 2)
            self.commands.append((command, always))
            self.queued += 1
            if not self.started:
                # threading's own start waits for the thread, which may collect garbage first; and
                # what it closes may want a lock that is held here.
                start_new_thread(self._work, ())
                self.started = True
            self.changed.notify_all()
            return self.queued

    def _work(self) -> None:
        self.device.pin_thread()
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.commands or self.destroyed)
                if not self.commands:
                    return
                command, always = self.commands.popleft()
            try:
                failure = command() if always or not self.device.dropping else None
            except Exception as wrong:
                failure = (-1, f"{type(wrong).__name__}: {wrong}")
            del command
            with self.changed:
                self.finished += 1
                self.failure = self.failure or failure
                self.changed.notify_all()

    def wait(self, target: int, limit_s: float) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.finished >= target, _wait_s(limit_s))

    def tell(self) -> Failure | None:
        with self.changed:
            failure, self.failure = self.failure, None
            return failure

    def end(self) -> None:
        with self.changed:
            self.destroyed = True
            self.changed.notify_all()


def _wait_s(limit_s: float) -> float:
    return min(max(limit_s, 0.0), threading.TIMEOUT_MAX / 2)


class _Job:
    """A kernel's blocks, in parts that the stream's thread and the helpers take."""

    def __init__(self, parts: int, step: int, run: Callable[[int, int], int]) -> None:
        self.lock = threading.Condition()
        self.parts, self.step, self.run = parts, step, run
        self.next = self.inside = 0
        self.code, self.failed_at = 0, 0

    def take_parts(self) -> None:
        with self.lock:
            self.inside += 1
        while True:
            with self.lock:
                first = self.next
                self.next += self.step
                if first >= self.parts:
                    self.inside -= 1
                    self.lock.notify_all()
                    return
            code = self.run(first, min(self.step, self.parts - first))
            if code:
                with self.lock:
                    if not self.code:
                        self.code, self.failed_at = code, first
                    self.next = self.parts

    def finish(self) -> None:
        self.take_parts()
        with self.lock:
            self.lock.wait_for(lambda: not self.inside)


class Device:
    """See ``dt_cpu_open`` in ``drivetrain_hal.h``; every method answers like its namesake in C."""

    def __init__(self, name: str, cores: Sequence[int], threads: int, guards: bool) -> None:
        self._name, self._cores, self._threads, self._guards = name, cores, threads, guards
        self._generation = _generation
        self._lock = threading.RLock()
        self._closed = self.dropping = False
        self._allowance = 0
        self._allocations: dict[int, Allocation] = {}
        self._leaving: dict[int, Allocation] = {}
        self._freed = threading.Condition(self._lock)
        self._streams: dict[int, _Stream] = {}
        self._gone: list[_Stream] = []
        self._modules: dict[int, Library] = {}
        self._functions: dict[int, Function] = {}
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._helpers = 0

    # -- what every call begins with -----------------------------------------------------------

    def _check(self, op: str) -> None:
        if self._generation != _generation:
            raise error(self._name, op, Status.FORKED, 0, "")
        if self._closed:
            raise error(self._name, op, Status.CLOSED, 0, "")

    def _stream(self, op: str, stream: int) -> _Stream:
        self._check(op)
        found = self._streams.get(stream)
        if found is None:
            raise error(self._name, op, Status.CLOSED, 0, "")
        return found

    def _event(self, op: str, event: int) -> _Event:
        self._check(op)
        found = _events.get(event)
        if found is None:
            raise error(self._name, op, Status.CLOSED, 0, "")
        return found

    def pin_thread(self) -> None:
        """The calling thread keeps to the device's cores, where the system lets it."""
        if self._cores and hasattr(os, "sched_setaffinity"):
            try:
                os.sched_setaffinity(0, self._cores)
            except OSError:
                pass

    # -- life ----------------------------------------------------------------------------------

    def close(self, limit_s: float, /) -> bool:
        with self._lock:
            self._check("close")
            self._closed = True
            streams = [*self._streams.values(), *self._gone]
        end = time.monotonic() + limit_s
        done = all(s.wait(s.queued, end - time.monotonic()) for s in streams)
        if not done:
            self.dropping = True
            end = time.monotonic() + limit_s / 4
            done = all(s.wait(s.queued, end - time.monotonic()) for s in streams)
        for stream in streams:
            stream.end()
        for _ in range(self._helpers):
            self._jobs.put(None)
        if not done:
            return False
        for handle, event in list(_events.items()):
            if event.device is self:
                _events.pop(handle, None)
        self._streams.clear()
        self._functions.clear()
        self._modules.clear()
        for allocation in self._allocations.values():
            allocation.give_back()
        self._allocations.clear()
        return True

    def synchronize(self, limit_s: float, /) -> bool:
        self._check("synchronize")
        with self._lock:
            streams = [*self._streams.values(), *self._gone]
        end = time.monotonic() + limit_s
        targets = [(s, s.queued) for s in streams]
        done = all(s.wait(target, end - time.monotonic()) for s, target in targets)
        for stream in streams:
            failure = stream.tell()
            if failure is not None:
                raise error(self._name, "synchronize", Status.FAILED, *failure)
        with self._lock:
            self._gone = [s for s in self._gone if s.finished < s.queued]
        return done

    # -- memory --------------------------------------------------------------------------------

    def alloc(self, nbytes: int, /) -> int:
        self._check("alloc")
        if not 0 <= nbytes < 1 << 64:
            raise OverflowError("a size of 64 bits, not below 0")
        with self._lock:
            if nbytes > self._allowance:
                return 0
            self._allowance -= nbytes
        try:
            made = Allocation(nbytes, self._guards)
        except (OSError, MemoryError, OverflowError, ValueError):
            raise error(self._name, "alloc", Status.NO_MEMORY, 0, "") from None
        with self._lock:
            self._allocations[made.address] = made
        return made.address

    def allow(self, nbytes: int, /) -> None:
        self._check("alloc")
        with self._lock:
            self._allowance = nbytes

    def untouched(self) -> int:
        self._check("memory")
        with self._lock:
            return sum(each.untouched() for each in self._allocations.values())

    def freed(self, limit_s: float, /) -> bool:
        self._check("alloc")
        with self._freed:
            return self._freed.wait_for(lambda: not self._leaving, _wait_s(limit_s))

    def free(self, address: int, stream: int, /) -> None:
        on = self._stream("free", stream)
        with self._lock:
            allocation = self._allocations.pop(address, None)
            if allocation is None:
                raise error(self._name, "free", Status.INVALID, 0, "")
            self._leaving[address] = allocation

        def give_back() -> None:
            with self._freed:
                self._leaving.pop(address).give_back()
                if not self._leaving:
                    self._freed.notify_all()

        on.put(give_back, always=True)

    def check(self, address: int, /) -> tuple[int, int] | None:
        self._check("free")
        with self._lock:
            allocation = self._allocations.get(address)
        if allocation is None:
            raise error(self._name, "free", Status.INVALID, 0, "")
        offset = allocation.damaged() if self._guards else None
        return None if offset is None else (allocation.nbytes, offset)

    def copy(
        self, dst: int, src: int, nbytes: int, stream: int, host_free: bool, limit_s: float, /
    ) -> bool:
        on = self._stream("copy", stream)
        if nbytes and not (dst and src):
            raise error(self._name, "copy", Status.INVALID, 0, "")
        if host_free and nbytes <= _STAGED:
            staged = ctypes.string_at(src, nbytes)
            on.put(lambda: _nothing(ctypes.memmove(dst, staged, nbytes)))
            return True
        ticket = on.put(lambda: _nothing(ctypes.memmove(dst, src, nbytes)))
        return not host_free or on.wait(ticket, limit_s)

    def fill(self, address: int, pattern: bytes, count: int, stream: int, /) -> None:
        on = self._stream("fill", stream)
        width = len(pattern)
        if width not in (1, 2, 4, 8, 16) or (count and (not address or address % width)):
            raise error(self._name, "fill", Status.INVALID, 0, "")
        on.put(lambda: _fill(address, pattern, count * width))

    # -- streams and events --------------------------------------------------------------------

    def stream_create(self, priority: int, /) -> int:
        self._check("stream")
        with self._lock:
            handle = next(_handles)
            self._streams[handle] = _Stream(self)
            return handle

    def stream_destroy(self, stream: int, /) -> None:
        found = self._stream("stream_destroy", stream)
        with self._lock:
            self._streams.pop(stream, None)
            self._gone = [s for s in self._gone if s.failure or s.finished < s.queued]
            self._gone.append(found)
        found.end()

    def stream_done(self, stream: int, /) -> bool:
        return self._stream_waited("stream_done", stream, 0.0)

    def stream_synchronize(self, stream: int, limit_s: float, /) -> bool:
        return self._stream_waited("stream_synchronize", stream, limit_s)

    def _stream_waited(self, op: str, stream: int, limit_s: float) -> bool:
        found = self._stream(op, stream)
        done = found.wait(found.queued, limit_s)
        failure = found.tell()
        if failure is not None:
            raise error(self._name, op, Status.FAILED, *failure)
        return done

    def stream_wait(self, stream: int, event: int, /) -> None:
        on, mark = self._stream("stream_wait", stream), self._event("stream_wait", event).mark
        if mark is not None and not mark.done.is_set():
            on.put(lambda: _nothing(mark.done.wait()), always=True)

    def event_create(self, timing: bool, /) -> int:
        self._check("event")
        handle = next(_handles)
        _events[handle] = _Event(self, timing)
        return handle

    def event_destroy(self, event: int, /) -> None:
        self._event("event_destroy", event)
        _events.pop(event, None)

    def event_record(self, event: int, stream: int, /) -> None:
        found, on = self._event("event_record", event), self._stream("event_record", stream)
        mark = _Mark()
        on.put(mark.signal, always=True)
        found.mark = mark

    def event_done(self, event: int, /) -> bool:
        mark = self._event("event_done", event).mark
        return mark is None or mark.done.is_set()

    def event_synchronize(self, event: int, limit_s: float, /) -> bool:
        mark = self._event("event_synchronize", event).mark
        return mark is None or mark.done.wait(_wait_s(limit_s))

    def event_seconds(self, start: int, end: int, /) -> float:
        at = []
        for handle in (start, end):
            found = self._event("event_seconds", handle)
            if not found.timing or found.mark is None or not found.mark.done.is_set():
                text = "both events must be made for timing, recorded and done"
                raise error(self._name, "event_seconds", Status.INVALID, 0, text)
            at.append(found.mark.at_ns)
        return (at[1] - at[0]) * 1e-9

    # -- kernels -------------------------------------------------------------------------------

    def module_load(self, code: bytes, /) -> int:
        self._check("module_load")
        try:
            library = Library(code)
        except OSError as wrong:
            raise error(self._name, "module_load", Status.REJECTED, 0, str(wrong)) from wrong
        with self._lock:
            handle = next(_handles)
            self._modules[handle] = library
            return handle

    def module_unload(self, module: int, /) -> None:
        self._check("module_unload")
        with self._lock:
            library = self._modules.pop(module, None)
            if library is None:
                raise error(self._name, "module_unload", Status.INVALID, 0, "")
            for handle in library.functions.values():
                self._functions.pop(handle, None)

    def function(self, module: int, symbol: str, /) -> int:
        self._check("function")
        with self._lock:
            library = self._modules.get(module)
            if library is None:
                raise error(self._name, "function", Status.CLOSED, 0, "")
            known = library.functions.get(symbol)
            if known:
                return known
            entry = library.symbol(f"dt_cpu_{symbol}")
            if entry is None:
                return 0
            handle = next(_handles)
            library.functions[symbol] = handle
            self._functions[handle] = Function(library, symbol, entry)
            return handle

    def function_arguments(self, function: int, sizes: Sequence[int], /) -> None:
        self._check("function_arguments")
        told = tuple(8 if size < 0 else size for size in sizes)
        with self._lock:
            found = self._functions.get(function)
            if found is None or not all(0 < size <= 1 << 20 for size in told):
                raise error(self._name, "function_arguments", Status.INVALID, 0, "")
            if found.sizes is None:
                found.sizes = told
            elif found.sizes != told:
                text = "the sizes are not those that were told before"
                raise error(self._name, "function_arguments", Status.INVALID, 0, text)

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        stream: int,
        arguments: int,
        /,
    ) -> None:
        on, found = self._stream("launch", stream), self._functions.get(function)
        right = found is not None and found.sizes is not None and min(*grid, *block) > 0
        if not right or grid[0] > 2**31 - 1 or max(grid[1:]) > 65535:
            text = "the dimensions must be within the limits and the arguments' sizes told first"
            raise error(self._name, "launch", Status.INVALID, 0, text)
        assert found is not None
        values = found.values_at(arguments)
        whole = Range(grid, block, shared)
        on.put(lambda: self._run(found, whole, values))

    def _run(
        self, function: Function, whole: Range, values: ctypes.Array[ctypes.c_void_p]
    ) -> Failure | None:
        blocks = whole.grid[0] * whole.grid[1] * whole.grid[2]
        step = max(1, blocks // (self._threads * _PARTS_A_WORKER))

        def run(first: int, count: int) -> int:
            part = Range(whole.grid, whole.block, whole.shared, first, count)
            return int(function.call(ctypes.byref(part), values))

        job = _Job(blocks, step, run)
        for _ in range(min(self._threads - 1, -(-blocks // step) - 1)):
            self._help(job)
        job.finish()
        if not job.code:
            return None
        meaning = _MEANINGS.get(job.code, "")
        return job.code, (
            f"{function.symbol} returned {job.code}{meaning} in or after block {job.failed_at} of "
            f"a grid of {whole.grid[0]}x{whole.grid[1]}x{whole.grid[2]}"
        )

    def _help(self, job: _Job) -> None:
        with self._lock:
            if self._helpers < self._threads - 1:
                self._helpers += 1
                start_new_thread(self._helper, ())
        self._jobs.put(job)

    def _helper(self) -> None:
        self.pin_thread()
        while (job := self._jobs.get()) is not None:
            job.take_parts()
            del job


def _nothing(_: object) -> None:
    return None


def _fill(address: int, pattern: bytes, nbytes: int) -> None:
    if len(set(pattern)) == 1:
        ctypes.memset(address, pattern[0], nbytes)
        return
    # Write some, then copy what is there behind itself.
    there = min(nbytes, 64 << 10)
    ctypes.memmove(address, pattern * (there // len(pattern)), there)
    while there < nbytes:
        more = min(there, nbytes - there)
        ctypes.memmove(address + there, address, more)
        there += more


__all__ = ["GUARD", "Device"]

"""The cpu device, open: streams of commands over threads, on the cores of one `DeviceInfo`.

The queues are C (``drivetrain.hal._cpu``) or, without a compiler or with ``DRIVETRAIN_NATIVE=0``,
their twin in Python. Both are the *engine* here: plain calls, with the same names and answers.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from drivetrain.errors import BadInput, HalError, OutOfMemory, Timeout, Unsupported
from drivetrain.hal import cgroup
from drivetrain.hal.driver import (
    Backend,
    Calls,
    DeviceInfo,
    FunctionFacts,
    LaunchAbi,
    Limits,
    Target,
)
from drivetrain.hal.drivers import cpu
from drivetrain.hal.drivers.cpu_code import check_shared_object
from drivetrain.hal.drivers.cpu_errors import Status, error
from drivetrain.hal.telemetry import host

if TYPE_CHECKING:
    from drivetrain.hal import _cpu
    from drivetrain.hal.drivers import cpu_twin

    Engine = _cpu.Device | cpu_twin.Device

LIMITS = Limits(
    grid=(2**31 - 1, 65535, 65535), block=(1024, 1024, 64), threads=1024, shared_bytes=1 << 20
)
ALIGNMENT = 64

_CLOSE_WAIT_S = 10.0
_FREED_WAIT_S = 60.0
_MARGIN = 32 << 20
"""Bytes of the machine's memory that are left to what is not ours: tables, stacks, code."""
_GRANT = 64 << 20
"""Bytes that are allocated before the machine's memory is looked at again."""

_open: weakref.WeakSet[Cpu] = weakref.WeakSet()


def _engine(name: str, cores: Sequence[int], threads: int, guards: bool) -> tuple[Engine, int]:
    """The engine, and the address of its C launch function; 0 for the twin."""
    if os.environ.get("DRIVETRAIN_NATIVE", "1") != "0":
        try:
            from drivetrain.hal import _cpu
        except ImportError:
            pass
        else:
            return _cpu.Device(name, cores, threads, guards), _cpu.LAUNCHER
    from drivetrain.hal.drivers import cpu_twin

    return cpu_twin.Device(name, cores, threads, guards), 0


class Cpu:
    """The `Backend` of one cpu device. ``root`` is where ``proc`` and ``sys`` lie.

    All kinds of memory are the host's. An allocation that does not fit what the machine and the
    control group leave is refused; memory is taken when it is first written, so what was allocated
    and never written counts too. With ``DRIVETRAIN_DEBUG=1`` guard bytes around each allocation are
    checked when it is freed.
    """

    groups = cpu.GROUPS
    alignment = ALIGNMENT
    limits = LIMITS

    def __init__(self, info: DeviceInfo, *, root: Path = cgroup.ROOT) -> None:
        self.target = Target("cpu", info.capabilities.compute, ("fp64",), info.driver_version)
        self.name = f"{info.driver}:{info.index}"
        self._root = root
        self._guards = os.environ.get("DRIVETRAIN_DEBUG", "") == "1"
        self._looking = threading.Lock()
        # Two at least, so that two streams get on even on one core.
        threads = max(2, info.isolation.threads)
        self._engine, self._launcher = _engine(
            self.name, info.isolation.cpus or (), threads, self._guards
        )
        _open.add(self)

    @property
    def native(self) -> bool:
        """Whether the C engine is used."""
        return self._launcher != 0

    def close(self) -> None:
        """Wait for what is queued (10 s), drop what has not begun then, give everything back.

        Raises Timeout when a kernel still runs after that: it goes on, with the memory it uses.
        """
        _open.discard(self)
        if not self._engine.close(_CLOSE_WAIT_S):
            raise Timeout(
                f"close: a kernel on {self.name} has not ended within {_CLOSE_WAIT_S:g} s; it goes "
                "on until the process ends",
                code="timeout",
                driver="cpu",
                op="close",
                device=self.name,
            )

    def synchronize(self, timeout_s: float) -> bool:
        return self._engine.synchronize(timeout_s)

    # -- memory --------------------------------------------------------------------------------

    def memory(self) -> tuple[int, int]:
        now = host.memory(self._root)
        unwritten = 0
        for backend in list(_open):
            try:
                unwritten += backend._engine.untouched()
            except HalError:
                pass  # closed meanwhile
        return max(0, now.free_bytes - unwritten - _MARGIN), now.total_bytes

    def alloc(self, nbytes: int, kind: int, stream: int) -> int:
        try:
            return self._engine.alloc(nbytes) or self._alloc_checked(nbytes)
        except OutOfMemory:
            pass
        except OverflowError:
            raise BadInput(f"alloc: {nbytes} bytes; give 0 or more") from None
        return self._out_of_memory(nbytes, *self.memory())

    def _alloc_checked(self, nbytes: int) -> int:
        """Look at the machine before more is allocated; wait for queued frees if that helps."""
        with self._looking:
            free, total = self.memory()
            if nbytes > free and nbytes <= total and self._engine.freed(_FREED_WAIT_S):
                free, total = self.memory()
            if nbytes <= free:
                # What is granted beyond the request is a small part of what is left.
                self._engine.allow(nbytes + min(_GRANT, (free - nbytes) // 8))
                ptr = self._engine.alloc(nbytes)
                if ptr:
                    return ptr
        return self._out_of_memory(nbytes, free, total)

    def _out_of_memory(self, nbytes: int, free: int, total: int) -> NoReturn:
        raise OutOfMemory(
            f"alloc: {nbytes} bytes were asked for on {self.name}; {free} of {total} bytes are "
            "free. Free something, ask for less, or raise the control group's limit",
            requested=nbytes,
            free=free,
            total=total,
            code="out_of_memory",
            driver="cpu",
            op="alloc",
            device=self.name,
        )

    def free(self, ptr: int, kind: int, stream: int) -> None:
        if self._guards:
            self._check_guards(ptr, stream)
        self._engine.free(ptr, stream)

    def _check_guards(self, ptr: int, stream: int) -> None:
        from drivetrain.hal.opened import wait_limit_s

        event = self._engine.event_create(False)
        try:
            self._engine.event_record(event, stream)
            self._engine.event_synchronize(event, wait_limit_s())
        finally:
            self._engine.event_destroy(event)
        damage = self._engine.check(ptr)
        if damage is None:
            return
        nbytes, offset = damage
        self._engine.free(ptr, stream)
        raise HalError(
            f"free: the guard bytes of the buffer of {nbytes} bytes at {ptr:#x} on {self.name} "
            f"were overwritten, first at byte {offset} of it; something wrote outside",
            code="guard",
            driver="cpu",
            op="free",
            device=self.name,
        )

    def copy(self, dst: int, src: int, nbytes: int, way: int, stream: int, host_free: bool) -> None:
        if not host_free:
            self._engine.copy(dst, src, nbytes, stream, False, 0.0)
            return
        from drivetrain.hal.opened import wait_limit_s

        limit = wait_limit_s()
        if not self._engine.copy(dst, src, nbytes, stream, True, limit):
            raise Timeout(
                f"copy: what is queued before it on {self.name} was not done within {limit:g} s; "
                "it goes on, and the source must stay as it is until the stream is synchronised",
                code="timeout",
                driver="cpu",
                op="copy",
                device=self.name,
            )

    def fill(self, ptr: int, pattern: bytes, count: int, stream: int) -> None:
        self._engine.fill(ptr, pattern, count, stream)

    # -- streams and events --------------------------------------------------------------------

    def stream_create(self, priority: int) -> int:
        return self._engine.stream_create(priority)

    def stream_destroy(self, stream: int) -> None:
        self._engine.stream_destroy(stream)

    def stream_done(self, stream: int) -> bool:
        return self._engine.stream_done(stream)

    def stream_synchronize(self, stream: int, timeout_s: float) -> bool:
        return self._engine.stream_synchronize(stream, timeout_s)

    def stream_wait(self, stream: int, event: int) -> None:
        self._engine.stream_wait(stream, event)

    def event_create(self, timing: bool) -> int:
        return self._engine.event_create(timing)

    def event_destroy(self, event: int) -> None:
        self._engine.event_destroy(event)

    def event_record(self, event: int, stream: int) -> None:
        self._engine.event_record(event, stream)

    def event_done(self, event: int) -> bool:
        return self._engine.event_done(event)

    def event_synchronize(self, event: int, timeout_s: float) -> bool:
        return self._engine.event_synchronize(event, timeout_s)

    def event_seconds(self, start: int, end: int) -> float:
        return self._engine.event_seconds(start, end)

    # -- kernels -------------------------------------------------------------------------------

    def module_load(self, code: bytes, form: str) -> int:
        if form != "so":
            raise Unsupported(
                f"module_load: {self.name} takes shared objects (`so`), not {form!r}",
                code="unsupported",
                driver="cpu",
                op="module_load",
                device=self.name,
            )
        wrong = check_shared_object(code)
        if wrong:
            raise error(self.name, "module_load", Status.REJECTED, 0, wrong)
        return self._engine.module_load(code)

    def module_unload(self, module: int) -> None:
        self._engine.module_unload(module)

    def function(self, module: int, symbol: str) -> int:
        found = self._engine.function(module, symbol)
        if not found:
            raise HalError(
                f"function: the code has no kernel {symbol!r} (no symbol dt_cpu_{symbol})",
                code="no_such_kernel",
                driver="cpu",
                op="function",
                device=self.name,
            )
        return found

    def function_arguments(self, function: int, sizes: Sequence[int]) -> None:
        self._engine.function_arguments(function, sizes)

    def function_facts(self, function: int) -> FunctionFacts:
        return FunctionFacts()

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
        self._engine.launch(function, grid, block, shared, stream, arguments)

    def calls(self) -> Calls:
        if not self._launcher:
            return Calls()
        from drivetrain.hal import _cpu

        return Calls(LaunchAbi.PLAIN, launch=self._launcher, record=_cpu.RECORDER)

    # -- graphs: the core keeps a list of commands ----------------------------------------------

    def _no_graphs(self, op: str) -> NoReturn:
        raise Unsupported(
            f"{op}: {self.name} has no graphs of its own",
            code="unsupported",
            driver="cpu",
            op=op,
            device=self.name,
        )

    def graph_begin(self, stream: int) -> None:
        self._no_graphs("graph_begin")

    def graph_end(self, stream: int) -> int:
        self._no_graphs("graph_end")

    def graph_launch(self, graph: int, stream: int) -> None:
        self._no_graphs("graph_launch")

    def graph_destroy(self, graph: int) -> None:
        self._no_graphs("graph_destroy")

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
        self._no_graphs("graph_set")

    # -- peer ----------------------------------------------------------------------------------

    def peer_enable(self, other: Backend) -> bool:
        return isinstance(other, Cpu) and other.native == self.native

    def copy_peer(self, dst: int, src: int, nbytes: int, other: Backend, stream: int) -> None:
        self._engine.copy(dst, src, nbytes, stream, False, 0.0)

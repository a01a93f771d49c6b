"""One device of one OpenCL platform, open in this process."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any, NoReturn

from drivetrain.errors import BadInput, HalError
from drivetrain.hal.driver import (
    Backend,
    Calls,
    DeviceInfo,
    LaunchAbi,
    Limits,
    Target,
)
from drivetrain.hal.drivers import opencl_build
from drivetrain.hal.drivers.opencl_api import NAME, Api, Cl, address_of, load
from drivetrain.hal.drivers.opencl_context import Context
from drivetrain.hal.drivers.opencl_fill import Filler
from drivetrain.hal.drivers.opencl_heaps import Addresses, heap_of
from drivetrain.hal.drivers.opencl_memory import Memory
from drivetrain.hal.drivers.opencl_platforms import Found
from drivetrain.hal.drivers.opencl_programs import Programs
from drivetrain.hal.drivers.opencl_queues import Queues

GRID = (2**31 - 1, 65535, 65535)
"""Most blocks. OpenCL does not tell; every GPU's hardware takes this many."""

PROFILING = "DRIVETRAIN_OPENCL_PROFILING"
"""``0``: queues take no times, which spares some platforms work; ``timing`` is off then."""
MEMORY = "DRIVETRAIN_OPENCL_MEMORY"
"""``svm``, ``usm`` or ``buffers``: which sort of memory, instead of the best that there is."""
BINARY_ONLY = "DRIVETRAIN_OPENCL_BINARY_ONLY"
"""``1``: as if the platforms had no compilers, which is how FPGAs' are."""

FILL = "DRIVETRAIN_OPENCL_FILL"
"""``kernel`` or ``command``: how shared virtual memory is filled; else what suits the platform."""

_CLOSE_WAIT_S = 5.0
_NVIDIA_LOCAL_BYTES = 128
"""No kernel gets the last of the local memory that NVIDIA's platform tells (64 are too few)."""
_MOST_FAILURES = 64


class OpenclBackend:
    """`drivetrain.hal.driver.Backend` over the OpenCL loader."""

    def __init__(self, info: DeviceInfo, api: Api | None = None) -> None:
        api = load() if api is None else api
        self.address = f"{NAME}:{info.index}"
        self._found = found = opencl_build.find(api, info.uuid)
        self._api = api
        self._context = context = Context(api, found, self.address)
        try:
            self._describe(context, found)
            self._queues = queues = Queues(context, timing="timing" in self.groups)
            if "timing" in self.groups and not queues.tells_time():
                self.groups -= {"timing"}
            self._memory = memory = Memory(
                context, queues, self._heap, shares_host=bool(info.memory_domain)
            )
            only = "binary_only" in self.target.features
            self._programs = programs = Programs(context, self._heap, binary_only=only)
            how = _chosen(FILL, ("kernel", "command"))
            by_kernel = how == "kernel" or (not how and found.vendor == "nvidia")
            if by_kernel and isinstance(self._heap, Addresses) and self._heap.name == "svm":
                self._heap.filler = Filler(context, programs)
        except BaseException:
            context.release()
            raise
        # The parts answer for themselves.
        self.memory = memory.info
        self.alloc = memory.alloc
        self.free = memory.free
        self.copy = memory.copy
        self.fill = memory.fill
        self.stream_create = queues.new
        self.stream_destroy = queues.free
        self.stream_done = queues.done
        self.stream_synchronize = queues.wait
        self.stream_wait = queues.wait_event
        self.synchronize = queues.synchronize
        self.event_destroy = queues.event_free
        self.event_record = queues.event_record
        self.event_done = queues.event_done
        self.event_synchronize = queues.event_wait
        self.module_load = programs.load
        self.module_unload = programs.unload
        self.function = programs.function
        self.function_arguments = programs.arguments
        self.function_facts = programs.facts

    def _describe(self, context: Context, found: Found) -> None:
        self._heap = heap_of(context, _chosen(MEMORY, ("svm", "usm", "buffers")))
        groups = {"compute", "pinned", "timing"}
        if self._heap.managed:
            groups.add("managed")
        if _chosen(PROFILING, ("0", "1")) == "0":
            groups.discard("timing")
        self.groups = frozenset(groups)
        self.alignment = self._heap.alignment
        threads = max(1, found.number(Cl.DEVICE_MAX_WORK_GROUP_SIZE))
        sizes = found.raw(Cl.DEVICE_MAX_WORK_ITEM_SIZES) or b""
        most = (ctypes.c_size_t * 3)(*(threads,) * 3)
        ctypes.memmove(most, sizes[: ctypes.sizeof(most)], min(len(sizes), ctypes.sizeof(most)))
        self.limits = Limits(
            grid=GRID,
            block=(min(most[0], threads), min(most[1], threads), min(most[2], threads)),
            threads=threads,
            shared_bytes=found.number(Cl.DEVICE_LOCAL_MEM_SIZE)
            - (_NVIDIA_LOCAL_BYTES if found.vendor == "nvidia" else 0),
        )
        self.target = Target(
            kind="opencl",
            arch=found.language,
            features=features(found),
            version=" / ".join(
                (
                    found.platform.name,
                    found.platform.version_text,
                    found.text(Cl.DEVICE_VERSION),
                    found.text(Cl.DRIVER_VERSION),
                )
            ),
        )

    # -- life ------------------------------------------------------------------------------------

    def close(self) -> None:
        context = self._context
        if context.closed:
            return
        try:
            # What is left when the work does not end is the platform's, until the process ends.
            if self._comes_to_rest():
                self._programs.close()
                self._memory.close()
                self._queues.close()
        finally:
            context.release()

    def _comes_to_rest(self) -> bool:
        """Whether all that was queued is done, well or not: nobody is left to be told."""
        for _ in range(_MOST_FAILURES):
            if self._context.lost:
                return False
            try:
                return self.synchronize(_CLOSE_WAIT_S)
            except HalError:
                continue  # each failure is told once
        return False

    # -- events ----------------------------------------------------------------------------------

    def event_create(self, timing: bool) -> int:
        return self._queues.event()

    def event_seconds(self, start: int, end: int) -> float:
        return (self._queues.end_ns(end) - self._queues.end_ns(start)) / 1e9

    # -- group compute ---------------------------------------------------------------------------

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
        self._programs.launch(function, grid, block, shared, stream, arguments, sizes)
        self._queues.queued()

    def calls(self) -> Calls:
        """Buffers without addresses are looked up in Python, so there C launches nothing."""
        api, record = self._api, self._queues.record_address
        if not self._heap.set_pointer:
            return Calls(record=record)
        return Calls(
            LaunchAbi.OPENCL,
            launch=address_of(api.clEnqueueNDRangeKernel),
            set_value=address_of(api.clSetKernelArg),
            set_pointer=self._heap.set_pointer,
            record=record,
        )

    # -- graphs, peers ---------------------------------------------------------------------------
    #
    # None: the core repeats a graph's commands, and each device has a context of its own.

    def _undeclared(self, op: str) -> NoReturn:
        raise self._context.unsupported(op, "an OpenCL device has neither graphs nor peers here")

    def graph_begin(self, stream: int) -> None:
        self._undeclared("graph_begin")

    def graph_end(self, stream: int) -> int:
        self._undeclared("graph_end")

    def graph_launch(self, graph: int, stream: int) -> None:
        self._undeclared("graph_launch")

    def graph_destroy(self, graph: int) -> None:
        self._undeclared("graph_destroy")

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
        self._undeclared("graph_set")

    def peer_enable(self, other: Backend) -> bool:
        self._undeclared("peer_enable")

    def copy_peer(self, dst: int, src: int, nbytes: int, other: Backend, stream: int) -> None:
        self._undeclared("copy_peer")


def features(found: Found) -> tuple[str, ...]:
    """Words that the compiler asks about."""
    has: dict[str, Any] = {
        "fp64": found.number(Cl.DEVICE_DOUBLE_FP_CONFIG) or "cl_khr_fp64" in found.extensions,
        "fp16": "cl_khr_fp16" in found.extensions,
        "int64_atomics": {"cl_khr_int64_base_atomics", "cl_khr_int64_extended_atomics"}
        <= found.extensions,
        "subgroups": {"cl_khr_subgroups", "cl_intel_subgroups"} & found.extensions
        or (found.version >= 210 and found.number(Cl.DEVICE_MAX_NUM_SUB_GROUPS)),
        "binary_only": not found.compiles or _chosen(BINARY_ONLY, ("0", "1")) == "1",
    }
    return tuple(word for word, there in has.items() if there)


def _chosen(name: str, words: tuple[str, ...]) -> str:
    """An environment variable that is one of these; empty when it is not set."""
    text = os.environ.get(name, "")
    if text and text not in words:
        raise BadInput(f"{name}={text!r} must be one of {', '.join(words)}")
    return text


__all__ = ["BINARY_ONLY", "FILL", "GRID", "MEMORY", "PROFILING", "OpenclBackend", "features"]

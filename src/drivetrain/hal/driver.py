"""What a driver author writes: one ``Driver`` object over one vendor API.

Start from ``drivetrain/hal/drivers/cpu.py``. A driver that lives outside Drivetrain registers under
the entry-point group ``drivetrain.drivers``; the entry point names a ``Driver``::

    [project.entry-points."drivetrain.drivers"]
    mychip = "mychip_drivetrain:DRIVER"

It is listed from its metadata and imported only after ``drivetrain drivers trust mychip``, and then
only in child processes with a time limit: whatever it does, the others are listed.

The rules of the required core:

* ``absent()`` looks at files only, in the caller's process: a sentence why this machine cannot have
  the device, or ``""`` when ``discover()`` is worth a child process.
* ``discover()`` is passive: it initialises no runtime and opens no context. It returns every device
  it sees, raises ``DriverMissing`` when the vendor's software is not there (the driver is then
  *absent*) and any other ``HalError`` when it is there and does not work (*broken*).
* ``known()``, where a driver has it, tells from files what ``discover()`` found before, or None
  when something has changed since that a listing depends on. It spares the child process.
* ``telemetry(info)`` reads sensors without a context.
* ``probe(info)`` does a small operation on the device and compares the result; it raises a
  ``HalError`` otherwise. It runs in a child of its own under ``info.isolation``, may hang, and may
  crash.
* ``examine()``, where a driver has it, names what is installed and does not work although the
  driver does, each in a sentence that says what to do; ``drivetrain doctor`` asks, in a child.
* ``open(info)`` makes the device ready in this process and returns its `Backend`: plain integers
  in, plain integers out. A driver without it serves torch only. What a backend has beyond the
  required core it declares in ``groups``; the core answers ``Unsupported`` for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from drivetrain.hal.device import Capabilities, DeviceInfo, Isolation
from drivetrain.hal.kinds import Kind, Way
from drivetrain.hal.telemetry import Telemetry

__all__ = [
    "API_VERSION",
    "GROUPS",
    "OLDEST_API_VERSION",
    "Backend",
    "Calls",
    "Collective",
    "CompilesGraphs",
    "CompilesTriton",
    "Capabilities",
    "DeviceInfo",
    "Driver",
    "FunctionFacts",
    "Isolation",
    "Kind",
    "LaunchAbi",
    "Limits",
    "MemoryCalls",
    "Target",
    "Telemetry",
    "TritonTarget",
    "Way",
    "hidden_from_all",
]

API_VERSION = 2
OLDEST_API_VERSION = 1

ENTRY_POINT_GROUP = "drivetrain.drivers"

GROUPS = {
    "compute": "module and launch",
    "graphs": "captured work, launched again",
    "peer": "one device reads another's memory",
    "ipc": "memory shared between processes",
    "managed": "memory that moves by itself",
    "pinned": "host memory that the device reads fast",
    "timing": "elapsed time between events",
    "collectives": "all-reduce and its kin; see `Collective`",
    "triton": "a target of Triton's, with stages of its own; see `CompilesTriton`",
    "compile_graph": "a back end for torch.compile; see `CompilesGraphs`",
}
"""Optional groups: what each holds. A driver declares those it has in ``Driver.groups``."""


@dataclass(frozen=True)
class TritonTarget:
    """How Triton compiles for a device: group ``triton``."""

    backend: str
    """Which of Triton's back ends begins: ``cuda``, ``hip``, or one that a package adds to Triton
    under its entry points."""
    arch: int | str
    """Its word for an architecture: ``90``, ``gfx942``."""
    warp_size: int
    """Threads of a warp: a kernel is launched with blocks of ``num_warps`` times as many."""
    form: str
    """The name of the last stage; ``module_load`` gets what it makes, and this word."""
    stages: str = ""
    """``package.module:function``, called in the compiler's process as ``function(stages,
    options)`` with Triton's ordered table of stages (``ttir``, ``ttgir``, ``llir``, ...), which it
    changes in place. A stage is ``stage(module, metadata)``; it gives what the next one takes, the
    last one bytes. Where it leaves out Triton's own last stages it sets ``metadata["name"]`` (the
    symbol) and ``metadata["shared"]`` (bytes) itself. A ``RuntimeError`` is the kernel's fault and
    becomes a CompileError. Empty: the back end's own stages."""
    options: tuple[tuple[str, Any], ...] = ()
    """For the back end, beside ``num_warps``, ``num_stages`` and ``enable_fp_fusion``."""
    hidden: int = 0
    """Null pointers that the code takes behind the kernel's parameters: Triton's own last stages
    for ``cuda`` and ``hip`` add some."""
    version: str = ""
    """Of what the stages call: kernels in the cache that another version made are made anew. The
    file of ``stages`` counts by itself."""


@dataclass(frozen=True)
class Target:
    """What kernels are compiled for on this device."""

    kind: str
    """``cuda``, ``hip``, ``opencl`` or ``cpu``: which compiler."""
    arch: str = ""
    """``sm_90``, ``gfx942``, ``x86-64-v4``; for OpenCL the device's OpenCL C version."""
    features: tuple[str, ...] = ()
    """Words that kernels may ask about: ``fp64``, ``fp16``, ``subgroups``, ``binary_only``."""
    version: str = ""
    """Of the driver that compiles or loads the code: a part of the cache's key."""
    triton: TritonTarget | None = None
    """Set by the core where the driver has the group ``triton``."""


@dataclass(frozen=True)
class Limits:
    """What a launch must keep to; the core checks it before the driver is called."""

    grid: tuple[int, int, int]
    """Most blocks in x, y, z."""
    block: tuple[int, int, int]
    """Most threads of a block in x, y, z."""
    threads: int
    """Most threads of a block in all."""
    shared_bytes: int
    """Most shared memory of a block, static and dynamic together."""


@dataclass(frozen=True)
class FunctionFacts:
    """What a loaded kernel needs; 0 means "not told"."""

    threads: int = 0
    """Most threads of a block for this kernel."""
    registers: int = 0
    shared_bytes: int = 0
    """Static shared memory."""
    local_bytes: int = 0
    """Spilled, for each thread."""


class LaunchAbi(IntEnum):
    """How a launch is called from C; see ``drivetrain_hal.h``."""

    PYTHON = 0
    """Not at all: the core calls ``Backend.launch``."""
    CUDA = 1
    """The address of ``cuLaunchKernel`` or a function with its arguments."""
    PLAIN = 2
    """``int launch(void *function, const uint32_t grid[3], const uint32_t block[3], uint32_t
    shared, void *stream, void **arguments)``, 0 for success."""
    OPENCL = 3
    """The addresses of ``clEnqueueNDRangeKernel`` and of what sets a kernel's arguments."""


@dataclass(frozen=True)
class Calls:
    """Addresses of the C functions that the hot path calls itself; 0 where there is none."""

    abi: LaunchAbi = LaunchAbi.PYTHON
    launch: int = 0
    set_value: int = 0
    """OpenCL: ``clSetKernelArg``."""
    set_pointer: int = 0
    """OpenCL: ``clSetKernelArgSVMPointer``."""
    record: int = 0
    """``int (void *event, void *stream)``, 0 for success."""
    context: int = 0
    """Made current around each call, where the two functions below are given."""
    get_context: int = 0
    """``int (void **context)``"""
    set_context: int = 0
    """``int (void *context)``"""
    graph_launch: int = 0
    """``int (void *graph, void *stream)``, 0 for success; of the group ``graphs``."""


@dataclass(frozen=True)
class MemoryCalls:
    """Addresses of libcuda's functions, or functions with their arguments, for a pool that works
    without Python; see ``native_pool.h``. A backend that has them answers ``memory_calls()``."""

    context: int
    push: int
    pop: int
    alloc: int
    free: int
    event_create: int
    event_destroy: int
    event_record: int
    event_query: int
    stream_wait: int
    is_capturing: int
    ordinal: int
    """The device's number in this process, as torch counts."""


class Backend(Protocol):
    """One device, open in this process.

    Handles and addresses are plain integers; 0 is no handle. Any thread may call any method, and
    each call makes current what its API wants current. A method raises a ``HalError`` that names
    the vendor's code, and nothing else. Waits take ``timeout_s`` and return False when it passed.
    Everything queued on one stream happens in order; streams are unordered otherwise.
    """

    groups: frozenset[str]
    alignment: int
    """Bytes: each address from ``alloc`` is a multiple of it. A power of two, at least 16."""
    limits: Limits
    target: Target

    def close(self) -> None:
        """Give back all that is left. The device may be opened again afterwards."""

    def memory(self) -> tuple[int, int]:
        """(free bytes, total bytes) now."""

    def synchronize(self, timeout_s: float) -> bool:
        """Wait until all that was queued on the device from here is done."""

    # -- memory: required; kinds other than DEVICE are the groups ``pinned`` and ``managed``

    def alloc(self, nbytes: int, kind: int, stream: int) -> int:
        """An address, usable by work queued on ``stream`` from here on. Raises OutOfMemory."""

    def free(self, ptr: int, kind: int, stream: int) -> None:
        """Give memory back once the work queued on ``stream`` so far is done."""

    def copy(self, dst: int, src: int, nbytes: int, way: int, stream: int, host_free: bool) -> None:
        """Queue a copy. ``host_free``: return only when host memory it reads may be reused. The
        two ranges do not overlap. Host memory may be pageable."""

    def fill(self, ptr: int, pattern: bytes, count: int, stream: int) -> None:
        """Queue ``count`` repetitions of ``pattern`` (1, 2, 4, 8 or 16 bytes) to ``ptr``, which
        is a multiple of the pattern's length."""

    # -- streams and events: required

    def stream_create(self, priority: int) -> int:
        """A stream; a lower ``priority`` goes first where the device knows priorities."""

    def stream_destroy(self, stream: int) -> None:
        """Let go of a stream; what was queued on it still happens."""

    def stream_done(self, stream: int) -> bool:
        """Whether all that was queued so far has happened. A failure of that work is raised."""

    def stream_synchronize(self, stream: int, timeout_s: float) -> bool:
        """Wait for all that was queued so far. A failure of that work is raised here."""

    def stream_wait(self, stream: int, event: int) -> None:
        """What is queued on ``stream`` from here on waits for the event as last recorded. With the
        group ``peer`` the event may be another device's of the same driver."""

    def event_create(self, timing: bool) -> int:
        """An event; it counts as done until it is recorded."""

    def event_destroy(self, event: int) -> None:
        """Let go of an event; waits that were queued on it still hold."""

    def event_record(self, event: int, stream: int) -> None:
        """The event is done once all that is queued on ``stream`` so far is done."""

    def event_done(self, event: int) -> bool: ...

    def event_synchronize(self, event: int, timeout_s: float) -> bool: ...

    # -- group timing

    def event_seconds(self, start: int, end: int) -> float:
        """Seconds on the device's clock between two recorded, done events made for timing."""

    # -- group compute

    def module_load(self, code: bytes, form: str) -> int:
        """Load what the compiler made (``ptx``, ``cubin``, ``cl``, ``spirv``, ``so``, ...). Raises
        CompileError when the driver does not take it, Unsupported for a form it never takes."""

    def module_unload(self, module: int) -> None: ...

    def function(self, module: int, symbol: str) -> int:
        """A kernel by its symbol. Raises HalError with code ``no_such_kernel``."""

    def function_arguments(self, function: int, sizes: Sequence[int]) -> None:
        """The bytes of each argument, told once before the first launch; negative for pointers to
        memory of the device."""

    def function_facts(self, function: int) -> FunctionFacts: ...

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
        """Queue a kernel. ``arguments`` is the address of an array of addresses, one an argument;
        ``sizes`` are the arguments' bytes, negative for a pointer to memory of the device. All is
        read before the call returns. ``shared`` bytes of dynamic shared memory."""

    def calls(self) -> Calls:
        """What C may call itself, so that a launch costs no Python. When such a call fails, the
        core does it again through the methods here, which say why."""

    # -- group graphs

    def graph_begin(self, stream: int) -> None:
        """From here on what is queued on ``stream`` is noted, not done."""

    def graph_end(self, stream: int) -> int:
        """Stop noting; a graph ready to be launched. Raises HalError if nothing can be made of
        it; the stream is usable again in any case."""

    def graph_launch(self, graph: int, stream: int) -> None: ...

    def graph_destroy(self, graph: int) -> None: ...

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
        """Change the ``node``-th kernel launch of the graph, counted from 0 in the order noted."""

    # -- group peer

    def peer_enable(self, other: Backend) -> bool:
        """Whether memory of ``other`` (an open device of the same driver) can be read by this
        device from here on."""

    def copy_peer(self, dst: int, src: int, nbytes: int, other: Backend, stream: int) -> None:
        """Queue a copy from ``other``'s memory at ``src`` to this device's at ``dst``. The stream
        is this device's; or, where the backend has a true ``peer_pushes`` (writing to a peer is
        faster than reading from it), also one of ``other``'s."""


class Collective(Protocol):
    """Group ``collectives``: what a backend has that declares it. Counts are elements, types
    torch's names (``float32``), operations ``sum product min max``. Each call is queued on
    ``stream``; all ranks make the same calls in the same order."""

    def collective_id(self) -> bytes:
        """What rank 0 makes, and all others join by."""

    def collective_join(self, identity: bytes, rank: int, size: int, timeout_s: float) -> int:
        """A communicator, once all have joined. Raises Timeout."""

    def collective_leave(self, communicator: int) -> None: ...

    def all_reduce(
        self, communicator: int, ptr: int, count: int, dtype: str, op: str, stream: int
    ) -> None:
        """In place."""

    def broadcast(
        self, communicator: int, ptr: int, nbytes: int, root: int, stream: int
    ) -> None: ...

    def all_gather(self, communicator: int, dst: int, src: int, nbytes: int, stream: int) -> None:
        """``nbytes`` of each rank, in order of rank, to ``dst``."""

    def reduce_scatter(
        self, communicator: int, dst: int, src: int, count: int, dtype: str, op: str, stream: int
    ) -> None:
        """``count`` elements of each rank's ``size * count`` at ``src``, reduced, to ``dst``."""


class CompilesGraphs(Protocol):
    """Group ``compile_graph``: a back end for torch.compile. It alone sees torch's objects."""

    def compile_graph(self, gm: Any, example_inputs: Any) -> Any:
        """A callable of the same inputs that gives a list or tuple of the outputs; or
        ``gm.forward`` for what it does not compile."""


class CompilesTriton(Protocol):
    """Group ``triton``: what a backend has that declares it, beside ``compute``."""

    def triton_target(self) -> TritonTarget:
        """How ``Source.triton`` is compiled for this device."""


@dataclass(frozen=True)
class Driver:
    """The service provider interface: plain functions over plain facts."""

    name: str
    vendor: str
    absent: Callable[[], str]
    discover: Callable[[], tuple[DeviceInfo, ...]]
    telemetry: Callable[[DeviceInfo], Telemetry]
    probe: Callable[[DeviceInfo], None]
    open: Callable[[DeviceInfo], Backend] | None = None
    known: Callable[[], tuple[DeviceInfo, ...] | None] | None = None
    api_version: int = API_VERSION
    in_process: bool = False
    """Discovery and telemetry read only files of the system: they need no child."""
    groups: frozenset[str] = frozenset()
    """The optional groups that its backends have on the best device; a backend may have fewer."""
    install: str = ""
    """What ``drivetrain doctor`` says to install when the driver is absent."""
    examine: Callable[[], Sequence[str]] | None = None


_HIDING = {
    "CUDA_VISIBLE_DEVICES": "",
    # Some runtimes read an empty value as unset; a number that no machine has hides all.
    "HIP_VISIBLE_DEVICES": "-1",
    "ROCR_VISIBLE_DEVICES": "",
    "ZE_AFFINITY_MASK": "9999",
    "ONEAPI_DEVICE_SELECTOR": "*:cpu",
}


def hidden_from_all(**shown: str) -> dict[str, str]:
    """Environment in which no vendor shows a device, except as ``shown`` says.

    A GPU reached by two drivers is hidden under both names; the worker's driver sets its own.
    """
    return {**_HIDING, **shown}

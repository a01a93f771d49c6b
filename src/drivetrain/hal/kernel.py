"""Kernels: loaded code, arguments typed once, and launches."""

from __future__ import annotations

import ctypes
import math
import numbers
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput, HalError
from drivetrain.hal import hot, watch
from drivetrain.hal.device import Device
from drivetrain.hal.hot import KernelCore, PlanCore, StreamCore
from drivetrain.hal.memory import Buffer, MemoryKind, alloc

if TYPE_CHECKING:
    from drivetrain.hal.driver import FunctionFacts
    from drivetrain.hal.language.facts import KernelFacts, Param
    from drivetrain.hal.language.source import Source
    from drivetrain.hal.opened import Opened
    from drivetrain.hal.stream import Stream

Dim = int | tuple[int, ...]


@dataclass(frozen=True)
class ArgType:
    """The type of a kernel's argument: ``PTR``, ``I8`` to ``F64``, or `struct_of`."""

    name: str
    nbytes: int
    code: str = ""
    """``struct``'s letter; empty for pointers and structs."""
    least: int = 0
    most: int = 0

    @property
    def family(self) -> str:
        """``ptr``, ``i``, ``u``, ``f``, ``bf`` or ``struct``."""
        return self.name.rstrip("0123456789")

    def __repr__(self) -> str:
        return self.name.upper() if self.code or self.name == "ptr" else f"struct_of({self.nbytes})"


def _integer(name: str, code: str, bits: int, signed: bool) -> ArgType:
    least = -(1 << (bits - 1)) if signed else 0
    return ArgType(name, bits // 8, code, least, (1 << (bits - signed)) - 1)


PTR = ArgType("ptr", 8)
I8, I16, I32, I64 = (
    _integer("i8", "b", 8, True),
    _integer("i16", "h", 16, True),
    _integer("i32", "i", 32, True),
    _integer("i64", "q", 64, True),
)
U8, U16, U32, U64 = (
    _integer("u8", "B", 8, False),
    _integer("u16", "H", 16, False),
    _integer("u32", "I", 32, False),
    _integer("u64", "Q", 64, False),
)
F16 = ArgType("f16", 2, "e")
BF16 = ArgType("bf16", 2, "bf16")
F32 = ArgType("f32", 4, "f")
F64 = ArgType("f64", 8, "d")

TYPES: Mapping[str, ArgType] = {
    t.name: t for t in (PTR, I8, I16, I32, I64, U8, U16, U32, U64, F16, BF16, F32, F64)
}


_LETTERS = {
    "ptr": b"P",
    "struct": b"S",
    **{t.name: t.code.encode() for t in TYPES.values() if len(t.code) == 1 and t is not F16},
}
"""What C packs by itself."""


def struct_of(nbytes: int) -> ArgType:
    """A structure by value: the argument is a bytes-like object of exactly ``nbytes``."""
    if not 1 <= nbytes <= 4096:
        raise BadInput(f"a structure of {nbytes} bytes: kernels take 1 to 4096")
    return ArgType("struct", nbytes)


def _bfloat16(value: float) -> bytes:
    """Rounded to nearest even, as the hardware does."""
    word = struct.unpack("<I", struct.pack("<f", value))[0]
    if value != value:
        return b"\xc0\x7f"
    return struct.pack("<H", ((word + 0x7FFF + ((word >> 16) & 1)) >> 16) & 0xFFFF)


def packed(kind: ArgType, value: Any) -> bytes:
    """``value`` as the argument's bytes. Raises BadInput when it is of another type or range."""
    if kind.least or kind.most:
        try:
            number = value.__index__()
        except AttributeError:
            raise _wrong(kind, value) from None
        if not kind.least <= number <= kind.most:
            raise BadInput(
                f"{_shown(number)} does not lie in [{kind.least}, {kind.most}], as {kind!r} does"
            )
        return struct.pack(kind.code, number)
    if kind.code:
        if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
            raise _wrong(kind, value)
        try:
            number = float(value)
            # "=": without it single precision beyond its range becomes infinite in silence.
            return _bfloat16(number) if kind is BF16 else struct.pack("=" + kind.code, number)
        except OverflowError:
            raise BadInput(f"{_shown(value)} is beyond the range of {kind!r}") from None
    try:
        data = bytes(memoryview(value).cast("B"))
    except TypeError:
        raise _wrong(kind, value) from None
    if len(data) != kind.nbytes:
        raise BadInput(f"{kind!r} takes {kind.nbytes} bytes, not {len(data)}")
    return data


def _shown(number: Any) -> str:
    large = isinstance(number, int) and number.bit_length() > 256
    return f"a number of {number.bit_length()} bits" if large else repr(number)


def _wrong(kind: ArgType, value: object) -> BadInput:
    return BadInput(f"{kind!r} does not take a {type(value).__name__}")


def dims(value: Dim, what: str, most: tuple[int, int, int]) -> tuple[int, int, int]:
    """(x, y, z) of a grid or block, each at least 1 and within the device's limits."""
    given = (value,) if isinstance(value, int) else value
    if (
        not isinstance(given, tuple)
        or not 1 <= len(given) <= 3
        or not all(isinstance(n, int) for n in given)
    ):
        raise BadInput(f"the {what} is {value!r}; give an int or a tuple of one to three")
    x, y, z = (*given, 1, 1)[:3]
    if x < 1 or y < 1 or z < 1 or x > most[0] or y > most[1] or z > most[2]:
        raise BadInput(f"the {what} is {(x, y, z)}; each must be from 1 to {most}")
    return x, y, z


Count = float | Callable[[tuple[int, int, int], tuple[int, int, int], tuple[Any, ...]], float]
"""A number, or a function of (grid, block, arguments)."""


@dataclass(frozen=True)
class WorkFacts:
    """What one launch of a kernel moves and computes."""

    nbytes: float
    """Read and written."""
    bytes_are: str
    """``declared``, or ``estimated``: each buffer among the arguments counted once, whole."""
    flops: float | None
    dtype: str


@dataclass(frozen=True)
class _Raw:
    """An argument that is packed already."""

    data: bytes


class Launch:
    """One launch, checked and packed: the kernel, its dimensions and its arguments."""

    def __init__(
        self, kernel: Kernel, grid: Dim, block: Dim | None, shared: int, values: Sequence[Any]
    ) -> None:
        self.kernel = kernel
        limits = kernel._opened.backend.limits
        self.grid = dims(grid, "grid", limits.grid)
        self.block = _block(kernel, block, limits.block)
        threads = self.block[0] * self.block[1] * self.block[2]
        most = kernel.facts.threads or limits.threads
        if threads > most:
            raise BadInput(
                f"{kernel.name}: a block of {threads} threads; at most {most} on "
                f"{kernel.device.address}"
            )
        room = max(limits.shared_bytes - kernel.facts.shared_bytes - kernel._shared, 0)
        if not isinstance(shared, int) or not 0 <= shared <= room:
            raise BadInput(
                f"{kernel.name}: {shared!r} bytes of dynamic shared memory; 0 to {room} on "
                f"{kernel.device.address}"
            )
        self.shared = kernel._shared + shared
        if len(values) != len(kernel.arguments):
            raise BadInput(
                f"{kernel.name} takes {len(kernel.arguments)} arguments "
                f"({', '.join(map(repr, kernel.arguments))}), {len(values)} were given"
            )
        self._values = ctypes.create_string_buffer(max(kernel._room, 1))
        start = ctypes.addressof(self._values)
        places = [start + offset for offset in kernel._offsets]
        self._table = (ctypes.c_void_p * max(len(places), 1))(*places)
        self.arguments = ctypes.addressof(self._table)
        self.buffers: dict[int, Buffer] = {}
        for index, value in enumerate(values):
            self.set(index, value)

    def set(self, index: int, value: Any) -> None:
        """Change one argument. Raises BadInput and changes nothing when it does not fit."""
        kernel = self.kernel
        if not 0 <= index < len(kernel.arguments):
            raise BadInput(f"{kernel.name} has {len(kernel.arguments)} arguments, no {index}")
        kind, offset = kernel.arguments[index], kernel._offsets[index]
        if kind is PTR:
            buffer = _buffer(kernel, index, value)
            data = struct.pack("Q", 0 if buffer is None else buffer.ptr)
            self.buffers.pop(index, None)
            if buffer is not None:
                self.buffers[index] = buffer
        elif isinstance(value, _Raw):
            data = value.data
        else:
            try:
                data = packed(kind, value)
            except BadInput as error:
                raise BadInput(f"{kernel.name}, argument {index}: {error}") from None
        ctypes.memmove(ctypes.addressof(self._values) + offset, data, kind.nbytes)

    def copy(self) -> Launch:
        """The same launch with arguments of its own."""
        values: list[Any] = []
        for index, (kind, offset) in enumerate(
            zip(self.kernel.arguments, self.kernel._offsets, strict=False)
        ):
            raw = self._values.raw[offset : offset + kind.nbytes]
            values.append(self.buffers.get(index) if kind is PTR else _Raw(raw))
        shared = self.shared - self.kernel._shared
        return Launch(self.kernel, self.grid, self.block, shared, values)

    def check_buffers(self, stream: Stream) -> None:
        for index, buffer in self.buffers.items():
            if buffer.closed:
                raise BadInput(f"{self.kernel.name}, argument {index}: the buffer is closed")
            buffer._note(stream)

    def queue(self, handle: int) -> None:
        kernel = self.kernel
        kernel._opened.backend.launch(
            kernel._function,
            self.grid,
            self.block,
            self.shared,
            handle,
            self.arguments,
            kernel._sizes,
        )

    def change(self, graph: int, node: int) -> None:
        """Give the driver's graph this launch's arguments."""
        kernel = self.kernel
        kernel._opened.backend.graph_set(
            graph,
            node,
            kernel._function,
            self.grid,
            self.block,
            self.shared,
            self.arguments,
            kernel._sizes,
        )

    def on(self, stream: Stream) -> None:
        """Queue it on a stream of its device, or note it when that is being captured."""
        handle = self.check(stream)
        self.check_buffers(stream)
        graph = stream._graph
        with self._watched(handle, graph is not None) if watch.active else watch.NOBODY:
            if graph is None:
                self.queue(handle)
                return
            noted = self.copy()  # what is noted must not change with a plan
            if not graph._takes_launch(noted):
                noted.queue(handle)

    def values(self) -> tuple[Any, ...]:
        """The arguments as the kernel sees them: buffers, numbers, a structure's bytes."""
        found: list[Any] = []
        for index, (kind, offset) in enumerate(
            zip(self.kernel.arguments, self.kernel._offsets, strict=False)
        ):
            raw = self._values.raw[offset : offset + kind.nbytes]
            if kind is PTR:
                found.append(self.buffers.get(index))
            elif kind is BF16:
                found.append(struct.unpack("<f", b"\0\0" + raw)[0])
            elif kind.code:
                found.append(struct.unpack(kind.code, raw)[0])
            else:
                found.append(raw)
        return tuple(found)

    def work(self) -> WorkFacts:
        """What one launch moves and computes, as the kernel declares it or else estimated."""
        told = self.kernel._work
        nbytes, flops, dtype = told if told is not None else (None, None, "")
        if callable(nbytes) or callable(flops):
            facts = (self.grid, self.block, self.values())
            nbytes = _number(self.kernel, "bytes", nbytes(*facts)) if callable(nbytes) else nbytes
            flops = _number(self.kernel, "flops", flops(*facts)) if callable(flops) else flops
        if nbytes is not None:
            return WorkFacts(nbytes, "declared", flops, dtype)
        seen = {(buffer.ptr, buffer.nbytes) for buffer in self.buffers.values()}
        return WorkFacts(sum(size for _, size in seen), "estimated", flops, dtype)

    def _watched(self, handle: int, captured: bool) -> watch.around:
        kernel = self.kernel
        work = watch.Work("kernel", kernel.name, kernel._opened, handle, launch=self)
        work.buffers, work.captured = tuple(self.buffers.values()), captured
        return watch.around(work)

    def check(self, stream: Stream) -> int:
        """The handle of a stream that takes this launch. Raises BadInput."""
        if not isinstance(stream, StreamCore):
            raise BadInput(
                f"{self.kernel.name}: a launch takes a Stream first, not a {type(stream).__name__}"
            )
        handle = stream._alive("launch")
        if stream._opened is not self.kernel._opened:
            raise BadInput(
                f"{self.kernel.name} is of {self.kernel.device.address} and the stream of "
                f"{stream.device.address}"
            )
        return handle


def _number(kernel: Kernel, what: str, told: object) -> float:
    """What was declared of a launch, as Python's own number. Raises BadInput."""
    if not isinstance(told, numbers.Real) or not 0 <= float(told) < math.inf:
        raise BadInput(f"{kernel.name}: {told!r} {what} a launch: give a number of 0 or more")
    return int(told) if isinstance(told, numbers.Integral) else float(told)


def _block(kernel: Kernel, block: Dim | None, most: tuple[int, int, int]) -> tuple[int, int, int]:
    """The block of a launch; a kernel that was compiled for one size takes only that, or None."""
    fixed = kernel._block
    if block is None:
        if fixed is None:
            raise BadInput(f"{kernel.name}: give a block; only Triton's kernels know theirs")
        return fixed
    found = dims(block, "block", most)
    if fixed is not None and found != fixed:
        raise BadInput(
            f"{kernel.name} was compiled for blocks of {fixed[0]} threads, not {found}; give None"
        )
    return found


def _buffer(kernel: Kernel, index: int, value: Any) -> Buffer | None:
    if value is None:
        return None
    if not isinstance(value, Buffer):
        raise BadInput(
            f"{kernel.name}, argument {index}: PTR takes a Buffer or None, not a "
            f"{type(value).__name__}"
        )
    if value.closed:
        raise BadInput(f"{kernel.name}, argument {index}: the buffer is closed")
    value._alive(f"{kernel.name}, argument {index}")
    here = value._opened is kernel._opened
    if not here and (
        value.device.driver != kernel.device.driver or value.kind is MemoryKind.DEVICE
    ):
        raise BadInput(
            f"{kernel.name}, argument {index}: the buffer is on {value.device.address}, the kernel "
            f"on {kernel.device.address}; copy it there"
        )
    return value


class Plan(PlanCore):
    """A launch prepared once: calling it queues it. Made by `Kernel.plan`."""

    __slots__ = ()

    if TYPE_CHECKING:
        _launch: Launch
        _stream: Stream

        def __call__(self) -> None:
            """Queue the launch. Raises BadInput when one of its buffers was closed meanwhile."""

    def set(self, index: int, value: Any) -> None:
        """Change argument ``index`` for the launches to come. Raises BadInput."""
        self._launch.set(index, value)
        self._uses(tuple(self._launch.buffers.values()))


class Kernel(KernelCore):
    """A kernel of a loaded module. Made by `Module.kernel`.

    ``kernel(stream, grid, block, *arguments, shared=0)`` queues one launch. ``grid`` counts blocks,
    ``block`` threads, each an int or a tuple of one to three; ``shared`` is bytes of dynamic shared
    memory. A Triton kernel has its block and its shared memory already: give None as its block.
    Everything is checked first: BadInput for a wrong number, type or range of arguments, a closed
    buffer, one of another device.
    """

    def __init__(
        self,
        module: Module,
        name: str,
        function: int,
        arguments: tuple[ArgType, ...],
        facts: FunctionFacts,
        launched: KernelFacts | None = None,
    ) -> None:
        self._module = module  # keeps the code loaded
        self._opened = module._opened
        self._function = function
        self.device: Device = module.device
        self.name = name
        self.arguments = arguments
        """Types, in order."""
        self.facts = facts
        self._work: tuple[Count | None, Count | None, str] | None = None
        self._block = launched.block if launched else None
        self._shared = launched.shared_bytes if launched else 0
        # Pointers that the compiler added after the user's arguments; it has no use for them here.
        every = (*arguments, *(PTR for _ in range(launched.hidden if launched else 0)))
        self._sizes = tuple(-8 if kind is PTR else kind.nbytes for kind in every)
        offsets, at = [], 0
        for kind in every:
            at = -(-at // 16) * 16 if kind.nbytes > 8 else -(-at // 8) * 8
            offsets.append(at)
            at += kind.nbytes
        self._offsets, self._room = tuple(offsets), at
        limits = module._opened.backend.limits
        threads = facts.threads or limits.threads
        room = limits.shared_bytes - facts.shared_bytes
        letters = b"".join(_LETTERS.get(kind.name, b"\0") for kind in every)
        if self._block:
            if not every:
                return
            letters = bytes(len(every))  # what it adds to a launch is added in Python
        self._bind(
            module._opened,
            function,
            module._opened.calls,
            (*limits.grid, *limits.block, threads, max(room, 0)),
            letters,
            self._sizes,
        )

    if TYPE_CHECKING:

        def __call__(
            self, stream: Stream, grid: Dim, block: Dim | None, *arguments: Any, shared: int = 0
        ) -> None: ...

    def work(
        self, *, bytes: Count | None = None, flops: Count | None = None, dtype: str = "float32"
    ) -> Kernel:
        """Declare for profiles what one launch reads and writes together and how many operations it
        does, in numbers or as functions of ``(grid, block, arguments)``. ``dtype`` says which peak
        the operations are held against. Without it, bytes are estimated: each buffer among the
        arguments counts once, whole. Raises BadInput for what is no number, below 0 or infinite."""
        bytes, flops = (
            told if told is None or callable(told) else _number(self, what, told)
            for what, told in (("bytes", bytes), ("flops", flops))
        )
        self._work = (bytes, flops, dtype)
        return self

    def plan(
        self, stream: Stream, grid: Dim, block: Dim | None, *arguments: Any, shared: int = 0
    ) -> Plan:
        """The same launch, prepared to be repeated."""
        launch = Launch(self, grid, block, shared, arguments)
        launch.check(stream)
        launch.check_buffers(stream)
        made: Plan = Plan(
            launch, stream, self, launch.arguments, launch.grid, launch.block, launch.shared
        )
        made._uses(tuple(launch.buffers.values()))
        return made

    def __repr__(self) -> str:
        return f"<Kernel {self.name}{self.arguments} on {self.device.address}>"


class Module:
    """Loaded code. Made by ``Device.compile``."""

    def __init__(
        self,
        opened: Opened,
        handle: int,
        kernels: Mapping[str, KernelFacts],
        made_of: tuple[Source, tuple[str, ...]] | None = None,
    ) -> None:
        self._opened = opened
        self._made_of = made_of
        """The source and the options, for who compiles it elsewhere."""
        self.device: Device = opened.device
        self._handle = handle
        self._kernels = kernels

    @property
    def names(self) -> tuple[str, ...]:
        """The kernels that the source is known to have; empty for binaries."""
        return tuple(self._kernels)

    def kernel(self, name: str, args: Sequence[ArgType] | None = None) -> Kernel:
        """A kernel by its name in the source, ``extern "C"`` or not.

        ``args`` are its arguments' types; None takes them from the source, where it tells them.
        Raises BadInput for an unknown name, or types that are not the source's.
        """
        if self._opened.closed:
            raise BadInput(
                f"{name}: the module's device, {self.device.address}, was closed; compile it again"
            )
        facts = self._kernels.get(name)
        if facts is None and self._kernels and "<" in str(name):
            from drivetrain.hal.language.names import plain_name

            facts = self._kernels.get(plain_name(name))
        if facts is None and self._kernels:
            raise BadInput(f"there is no kernel {name!r}; there are {', '.join(self._kernels)}")
        if args is None:
            if facts is None or facts.params is None:
                raise BadInput(f"{name}: this code does not tell its arguments; give args=[...]")
            types = tuple(
                struct_of(p.nbytes) if p.type == "struct" else TYPES[p.type] for p in facts.params
            )
        else:
            types = tuple(args)
            for kind in types:
                if not isinstance(kind, ArgType):
                    raise BadInput(
                        f"{name}: {kind!r} is no argument type; use hal.PTR, hal.F32, ..."
                    )
            if facts is not None and facts.params is not None:
                self._compare(name, types, facts.params)
        backend = self._opened.backend
        try:
            function = backend.function(self._handle, facts.symbol if facts else name)
        except HalError as error:
            if error.code != "no_such_kernel":
                raise
            raise BadInput(f"there is no kernel {name!r} in this code: {error}") from error
        kernel = Kernel(self, name, function, types, backend.function_facts(function), facts)
        backend.function_arguments(function, kernel._sizes)
        note = getattr(backend, "note_kernel", None)  # there with DRIVETRAIN_DEBUG=1
        if note is not None:
            note(kernel)
        return kernel

    @staticmethod
    def _compare(name: str, types: tuple[ArgType, ...], params: tuple[Param, ...]) -> None:
        if len(types) != len(params):
            raise BadInput(
                f"{name} has {len(params)} arguments in the source, {len(types)} types were given"
            )
        for index, (kind, param) in enumerate(zip(types, params, strict=True)):
            if kind.family != param.type.rstrip("0123456789") or kind.nbytes != param.nbytes:
                raise BadInput(
                    f"{name}, argument {index} ({param.name}): {kind!r} was given, the source has "
                    f"{param.type} of {param.nbytes} bytes"
                )

    def __del__(self) -> None:
        handle, self._handle = getattr(self, "_handle", 0), 0
        if handle and not self._opened.closed:
            try:
                self._opened.backend.module_unload(handle)
            except Exception:
                pass  # the device is closed


def compiled(opened: Opened, source: Any, options: Sequence[str]) -> Module:
    """Compile ``source`` for the device and load it."""
    from drivetrain.hal.language import compile as compile_source

    opened.require("compute", "compile")
    result = compile_source(source, opened.target_of(source), options=tuple(options))
    handle = opened.backend.module_load(result.code, result.form)
    return Module(opened, handle, result.kernels, (source, tuple(options)))


def _launch(
    kernel: Kernel, stream: Stream, grid: Dim, block: Dim | None, *arguments: Any, shared: int = 0
) -> None:
    """A kernel's call when it is not the usual case."""
    Launch(kernel, grid, block, shared, arguments).on(stream)


hot.bind(Buffer, MemoryKind.DEVICE, alloc, _launch)
Device.alloc = hot.alloc_method  # type: ignore[assignment]  # the same, past Python where it can

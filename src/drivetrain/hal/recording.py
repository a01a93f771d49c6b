"""``with hal.record(path): ...``: the calls of the block in a file, to be done again elsewhere.

What is recorded is what was asked for (allocations, copies, fills, launches, events, graphs), not
what the pool and the drivers made of it. What existed before and is used inside is taken along with
its contents. Memory that is allocated inside begins with zeros, so that its contents compare.
Hashes of what was read back, and of each buffer that is alive at the end, are what `hal.replay`
compares.
"""

from __future__ import annotations

import ctypes
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import xxhash

from drivetrain import __version__
from drivetrain.errors import BadInput, HalError
from drivetrain.hal import watch
from drivetrain.hal.kinds import Kind
from drivetrain.hal.memory import Buffer
from drivetrain.hal.record_file import Full, Writer, digest

if TYPE_CHECKING:
    from types import TracebackType

    from drivetrain.hal.graph import Graph
    from drivetrain.hal.kernel import Kernel, Launch, Module
    from drivetrain.hal.opened import Opened
    from drivetrain.hal.stream import Event, Stream
    from drivetrain.hal.watch import Work

LIMIT_BYTES = 1 << 30
PART_BYTES = 32 << 20
_MOST_PENDING = 256
_PATIENCE_S = 30.0
"""For other threads; then the recording is not complete."""


class Stop(Exception):
    """Something cannot be recorded."""


def read_hash(buffer: Buffer, stream: Stream) -> str:
    """Hash of a buffer's bytes, once what is queued on ``stream`` is done."""
    hasher = xxhash.xxh3_128()
    for part in _parts(buffer, stream):
        hasher.update(part)
    return hasher.hexdigest()


def _parts(buffer: Buffer, stream: Stream) -> Any:
    for at in range(0, buffer.nbytes, PART_BYTES):
        part = bytearray(min(PART_BYTES, buffer.nbytes - at))
        buffer.view(at, len(part)).copy_to(part, stream=stream)
        stream.synchronize()
        yield part


class Recording:
    """Made by ``hal.record``; at most ``limit`` bytes are written. One runs at a time.

    When the limit is reached, or something cannot be recorded (a kernel without its source), the
    recording ends there, with a warning, and the program goes on: see ``complete`` and ``reason``.
    """

    level = watch.ALL

    def __init__(self, path: str | Path, *, limit: int = LIMIT_BYTES) -> None:
        if limit < 1 << 10:
            raise BadInput(f"record: a limit of {limit} bytes; give 1024 or more")
        self.path = Path(path)
        self.complete, self.reason = True, ""
        self._limit = limit
        self._lock = threading.RLock()
        self._turn = threading.Condition(self._lock)
        self._under_way = 0
        """Calls of all threads that have begun and not ended."""
        self._ending = False
        self._here = threading.local()
        self._devices: dict[Opened, int] = {}
        self._streams: dict[tuple[Opened, int], int] = {}
        self._buffers: dict[tuple[Opened, int], tuple[int, Buffer]] = {}
        self._modules: dict[int, tuple[int, Module]] = {}
        self._kernels: dict[int, tuple[int, Kernel]] = {}
        self._events: WeakKeyDictionary[Event, int] = WeakKeyDictionary()
        self._graphs: dict[int, tuple[int, Graph]] = {}
        self._reads: dict[tuple[Opened, int], list[tuple[int, int, int, object]]] = {}
        self._closing: set[tuple[Opened, int]] = set()
        self._capturing: set[tuple[Opened, int]] = set()
        self._numbers: dict[str, int] = {}
        self._ended = False

    # -- the block -----------------------------------------------------------------------------

    def __enter__(self) -> Recording:
        if any(isinstance(each, Recording) for each in watch.active):
            raise BadInput("record: another recording is running; end it first")
        try:
            self._file = Writer(self.path, self._limit, {"drivetrain": __version__})
        except OSError as error:
            raise BadInput(f"record: {self.path} cannot be written: {error}") from error
        watch.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        with self._turn:
            self._ending = True  # other threads' calls wait until the contents are hashed
            if not self._turn.wait_for(lambda: not self._under_way, _PATIENCE_S):
                self._stop("calls were under way in other threads when it ended")
            self._guarded(self._final)
            self._ended = True
            self._turn.notify_all()
            watch.remove(self)
            ending = {"complete": self.complete, "reason": self.reason}
            try:
                self._file.end(**ending, error=type(error).__name__ if error else "")
            except OSError as wrong:
                self._file.abandon()
                raise BadInput(f"record: {self.path} cannot be written: {wrong}") from wrong
        if not self.complete:
            text = f"{self.path}: the recording ends early: {self.reason}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def _final(self) -> None:
        """Hashes of what was read and of every buffer that is alive."""
        for opened in self._devices:
            if not opened.closed:
                opened.device.synchronize()
                self._checked(opened, 0)
        for (opened, _), (number, buffer) in list(self._buffers.items()):
            if not opened.closed and not buffer.closed:
                self._file.entry("final", buffer=number, hash=self._hash(buffer))

    def _guarded(self, run: Callable[..., None], *facts: Any) -> None:
        """Do it without being watched by ourselves; what cannot be recorded ends the recording."""
        if not self.complete or getattr(self._here, "busy", False):
            return
        if not self._lock.acquire(timeout=_PATIENCE_S):  # a finaliser may hold what the other needs
            self._stop("two threads waited for each other")
            return
        self._here.busy = True
        try:
            if not self._ended:
                run(*facts)
        except (Stop, Full) as error:
            self._stop(str(error))
        except (HalError, BadInput, OSError) as error:
            self._stop(f"{type(error).__name__}: {error}")
        finally:
            self._here.busy = False
            self._lock.release()

    def _stop(self, why: str) -> None:
        self.complete, self.reason = False, why

    # -- numbers for things ----------------------------------------------------------------------

    def _next(self, kind: str) -> int:
        number = self._numbers.get(kind, 0)
        self._numbers[kind] = number + 1
        return number

    def _device(self, opened: Opened) -> int:
        number = self._devices.get(opened)
        if number is None:
            number = self._devices[opened] = self._next("device")
            device = opened.device
            self._file.entry("device", n=number, address=device.address, name=device.name)
        return number

    def _stream(self, opened: Opened, handle: int) -> int:
        key = (opened, handle)
        if key not in self._streams:
            device = self._device(opened)
            self._streams[key] = self._next("stream")
            self._file.entry("stream", n=self._streams[key], device=device)
        return self._streams[key]

    @staticmethod
    def _root(buffer: Buffer) -> Buffer:
        while isinstance(buffer._root, Buffer):
            buffer = buffer._root
        return buffer

    def _part(self, buffer: Buffer) -> list[int]:
        """[number, offset, bytes]; a buffer from before is taken along with its contents."""
        root = self._root(buffer)
        key = (root._opened, root.ptr)
        if key not in self._buffers or self._buffers[key][1].nbytes < root.nbytes:
            self._adopt(root)
        return [self._buffers[key][0], buffer.ptr - root.ptr, buffer.nbytes]

    def _adopt(self, root: Buffer) -> None:
        device = self._device(root._opened)
        for user in (root._home, *(root._users or ())):
            if user is not None and user.handle and user._graph is None:
                user.synchronize()
        stream = root._opened.inner_stream("record")
        content = b"".join(_parts(root, stream))
        self._note_buffer(root, device, self._file.blob(content))

    def _note_buffer(self, root: Buffer, device: int, content: int | None) -> None:
        number = self._next("buffer")
        opened, kept = root._opened, root
        if root._resource is not None:  # the recording must not keep it from being given back
            kept = Buffer(opened, root.ptr, root.nbytes, root.kind)
        self._buffers[opened, root.ptr] = (number, kept)
        facts = {"n": number, "device": device, "nbytes": root.nbytes, "kind": root.kind.name}
        self._file.entry("buffer", **facts, content=content)

    def _hash(self, buffer: Buffer) -> str:
        return read_hash(buffer, buffer._opened.inner_stream("record"))

    def _kernel(self, kernel: Kernel) -> int:
        found = self._kernels.get(id(kernel))
        if found is None:
            module = self._module(kernel._module)
            found = self._kernels[id(kernel)] = (self._next("kernel"), kernel)
            types = [[kind.name, kind.nbytes] for kind in kernel.arguments]
            name = kernel.name
            self._file.entry("kernel", n=found[0], module=module, name=name, arguments=types)
        return found[0]

    def _module(self, module: Module) -> int:
        found = self._modules.get(id(module))
        if found is None:
            if module._made_of is None:
                raise Stop("a kernel was loaded without its source")
            source, options = module._made_of
            device = self._device(module._opened)
            facts = asdict(source)
            facts["data"] = self._file.blob(facts["data"])
            found = self._modules[id(module)] = (self._next("module"), module)
            self._file.entry(
                "module", n=found[0], device=device, source=facts, options=list(options)
            )
        return found[0]

    def _values(self, launch: Launch) -> list[Any]:
        return [self._value(value) for value in launch.values()]

    def _value(self, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, Buffer):
            return {"buffer": self._part(value)}
        if isinstance(value, float):
            return {"float": value.hex()}
        if isinstance(value, bytes):
            return {"bytes": value.hex()}
        return {"int": value}

    # -- what the core tells -----------------------------------------------------------------------

    def begins(self, work: Work) -> bool:
        """Whether it is to be written down when it ends."""
        if work.part or getattr(self._here, "linking", False):
            return False
        if work.captured and (work.opened, work.stream) not in self._capturing:
            return False  # into a graph whose capture began before
        if work.kind != "wait" and not getattr(self._here, "busy", False):
            with self._turn:
                self._turn.wait_for(lambda: self._ended or not self._ending, _PATIENCE_S)
                self._under_way += 1
        self._guarded(self._prepare, work)
        if work.kind == "link":
            self._here.linking = True
        return True

    def _prepare(self, work: Work) -> None:
        """Number all that the call uses, before it changes anything."""
        for buffer in work.buffers:
            self._part(buffer)
        if work.opened is not None and work.stream and work.kind != "wait":
            self._stream(work.opened, work.stream)
        if work.launch is not None:
            self._kernel(work.launch.kernel)
        elif work.kind == "kernel":
            raise Stop(f"{work.name} is a library's work; DRIVETRAIN_BLAS=own does without it")

    def ends(self, work: Work, token: bool, error: BaseException | None) -> None:
        if work.kind == "link":
            self._here.linking = False
        if token and error is None:
            self._guarded(self._write, work)
        if token and work.kind != "wait" and not getattr(self._here, "busy", False):
            with self._turn:
                self._under_way -= 1
                self._turn.notify_all()

    def _write(self, work: Work) -> None:
        opened = work.opened
        assert opened is not None
        if work.kind == "wait":
            if work.stream:
                number = self._streams.get((opened, work.stream))
                if number is not None:
                    self._file.entry("synchronize", stream=number)
            if not work.name.startswith("event"):
                self._checked(opened, work.stream)
            return
        stream = self._stream(opened, work.stream)
        parts = [self._part(buffer) for buffer in work.buffers]
        if work.launch is not None:
            launch = work.launch
            self._file.entry(
                "launch",
                stream=stream,
                kernel=self._kernel(launch.kernel),
                grid=list(launch.grid),
                block=list(launch.block),
                shared=launch.shared,
                arguments=self._values(launch),
            )
        elif work.kind == "graph":
            found = self._graphs.get(id(work.graph))
            if found is None:
                raise Stop("a graph was launched that was captured before the recording")
            self._file.entry("graph", stream=stream, graph=found[0])
        elif work.kind == "fill":
            pattern = work.facts[0].hex()
            self._file.entry("fill", stream=stream, to=parts[0], pattern=pattern)
        elif not work.facts:
            self._file.entry(
                "copy", stream=stream, to=parts[0], source=parts[1], nbytes=work.nbytes
            )
        elif work.name == "host to device":
            data = ctypes.string_at(work.facts[0], work.nbytes)
            self._file.entry("write", stream=stream, to=parts[0], data=self._file.blob(data))
        else:
            number = self._next("read")
            facts = {"stream": stream, "source": parts[0], "n": number, "nbytes": work.nbytes}
            self._file.entry("read", **facts)
            pending = self._reads.setdefault((opened, work.stream), [])
            if not work.captured and len(pending) < _MOST_PENDING:
                pending.append((number, work.facts[0], work.nbytes, work.facts[1]))

    def _checked(self, opened: Opened, stream: int) -> None:
        """What was read on a stream (0: on all of the device) is there."""
        for key in list(self._reads):
            if key[0] is opened and stream in (0, key[1]):
                for number, address, nbytes, _ in self._reads.pop(key):
                    found = digest(ctypes.string_at(address, nbytes))
                    self._file.entry("check", read=number, hash=found)

    def told(self, what: str, *facts: Any) -> None:
        if getattr(self._here, "linking", False):
            return
        told: dict[str, Callable[..., None]] = {
            "alloc": self._told_alloc,
            "close": self._told_close,
            "record": self._told_record,
            "wait": self._told_wait,
            "stream closed": self._told_stream_closed,
            "capture": self._told_capture,
            "captured": self._told_captured,
            "abandoned": self._told_abandoned,
            "graph set": self._told_graph_set,
        }
        run = told.get(what)
        if run is not None:
            self._guarded(run, *facts)

    def _told_alloc(self, buffer: Buffer) -> None:
        device = self._device(buffer._opened)
        home = buffer._home
        assert home is not None
        if buffer.nbytes and self._own(home):
            buffer.fill(b"\0", stream=home)
        self._note_buffer(buffer, device, None)

    def _told_close(self, buffer: Buffer) -> None:
        if isinstance(buffer._root, Buffer):
            return
        found = self._buffers.pop((buffer._opened, buffer.ptr), None)
        if found is not None:
            self._file.entry("close", buffer=found[0])

    @staticmethod
    def _own(stream: Stream) -> bool:
        """Whether it is the program's, and not one of the core's."""
        return all(stream is not each for each in list(stream._opened._inner.values()))

    def _told_record(self, event: Event, stream: Stream) -> None:
        key = (stream._opened, stream.handle)
        if key in self._closing:  # the stream's end, which waits for it
            self._closing.discard(key)
            self._streams.pop(key, None)
        elif self._own(stream):
            number = self._events[event] = self._next("event")
            self._file.entry("record", n=number, stream=self._stream(*key))

    def _told_wait(self, event: Event, stream: Stream) -> None:
        number = self._events.get(event)  # None: of before, and what was then is done
        if number is not None and self._own(stream):
            on = self._stream(stream._opened, stream.handle)
            self._file.entry("wait", event=number, stream=on)

    def _told_stream_closed(self, stream: Stream) -> None:
        self._closing.add((stream._opened, stream.handle))

    def _told_capture(self, graph: Graph, stream: Stream) -> None:
        number = self._next("graph")
        self._graphs[id(graph)] = (number, graph)
        on = self._stream(stream._opened, stream.handle)
        self._capturing.add((stream._opened, stream.handle))
        self._file.entry("capture", n=number, stream=on)

    def _told_captured(self, graph: Graph, stream: Stream) -> None:
        if id(graph) in self._graphs:
            self._capturing.discard((stream._opened, stream.handle))
            self._file.entry("captured", graph=self._graphs[id(graph)][0])

    def _told_abandoned(self, graph: Graph, stream: Stream) -> None:
        if id(graph) in self._graphs:
            self._capturing.discard((stream._opened, stream.handle))
            self._file.entry("abandoned", graph=self._graphs.pop(id(graph))[0])

    def _told_graph_set(self, graph: Graph, node: int, index: int, value: Any) -> None:
        found = self._graphs.get(id(graph))
        if found is not None:
            told = self._value(graph._launches[node].values()[index])
            self._file.entry("graph set", graph=found[0], node=node, index=index, value=told)

    def closing(self, opened: Opened) -> None:
        """What is read must be checked, and contents are gone, with the device."""
        self._guarded(self._checked, opened, 0)
        with self._lock:
            for key in [key for key in self._buffers if key[0] is opened]:
                del self._buffers[key]


def record(path: str | Path, *, limit: int = LIMIT_BYTES) -> Recording:
    """A recording of what the block does on devices, into a file for `replay`.

    Raises BadInput when the file cannot be written or another recording runs. The file holds the
    contents of host memory that was copied, and is readable by its owner only.
    """
    return Recording(path, limit=limit)


KINDS = {kind.name: kind for kind in Kind}

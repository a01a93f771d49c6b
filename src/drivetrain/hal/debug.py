"""``DRIVETRAIN_DEBUG=1``: each call is done when it returns, and a failure says what was called.

`Debug` stands between the core and any driver's backend. After each call that queues work it waits
for the stream, so that what fails is named where it was queued, with its arguments and the user's
line. The last calls are kept, and told on standard error and in a file when one fails. Contents of
memory, code and structures are never told, only their sizes. Work that waits for something the
host does later cannot go on under it: such a call ends in Timeout after DRIVETRAIN_WAIT_LIMIT_S.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import os
import struct
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivetrain.errors import HalError, OutOfMemory, Timeout, Unsupported
from drivetrain.hal import config
from drivetrain.hal.driver import Backend, Calls
from drivetrain.hal.kinds import Kind, Way

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.kernel import Kernel

FOLDER = "debug"
_RING = 64
_MOST_FILES = 20
_MOST_DUMPS = 8
"""Of one process; a program that goes on after failures does not fill the disk."""
_MOST_KERNELS = 4096
_QUEUED_ON = {
    "alloc": 2,
    "free": 2,
    "copy": 4,
    "fill": 3,
    "stream_wait": 0,
    "event_record": 1,
    "launch": 4,
    "graph_launch": 1,
    "copy_peer": 4,
}
"""Method -> which of its arguments is the stream that it queues on."""
_HANDLES = {"ptr", "dst", "src", "stream", "event", "start", "end", "module", "graph", "function"}
_HERE = str(Path(__file__).resolve().parents[1]) + os.sep
_BETWEEN = (_HERE, contextlib.__file__, "<frozen")


def call_site() -> str:
    """``file:line in function`` of the innermost frame that is not Drivetrain's own."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_BETWEEN) and frame.f_back is not None:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


@cache
def _names(method: str) -> tuple[str, ...]:
    """The parameters' names of a method of the driver interface."""
    parameters = inspect.signature(getattr(Backend, method)).parameters
    return tuple(parameters)[1:]


@dataclass(slots=True)
class Call:
    """One call of the driver."""

    number: int
    at: float
    thread: str
    text: str
    site: str
    outcome: str = "has not returned"
    times: int = 1
    """In a row; polling does not push everything else out of the ring."""

    def __str__(self) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(self.at))
        moment = f"{clock}.{int(self.at % 1 * 1e6):06d}"
        again = f", {self.times} times" if self.times > 1 else ""
        head = f"{self.number} {moment} [{self.thread}] {self.text}{again}"
        return f"{head}\n    {self.site}: {self.outcome}"


_METHODS = frozenset(
    name for name, value in vars(Backend).items() if callable(value) and not name.startswith("_")
) - {"calls", "close"}


class Debug:
    """A backend that is called through to, one call after the other."""

    def __init__(self, backend: Backend, device: Device) -> None:
        self.inner = backend
        self._device = device
        self._kernels: dict[int, tuple[str, tuple[Any, ...]]] = {}
        self._calls: deque[Call] = deque(maxlen=_RING)
        self._lock = threading.Lock()
        self._count = self._dumps = 0
        self._capturing: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        if name in _METHODS:
            found: Any = partial(self._call, name)
        else:
            return getattr(self.inner, name)
        setattr(self, name, found)
        return found

    def calls(self) -> Calls:
        """None: C must call nothing past this."""
        return Calls()

    def close(self) -> None:
        self.inner.close()

    def note_kernel(self, kernel: Kernel) -> None:
        """How a kernel's launches are to be told."""
        if len(self._kernels) < _MOST_KERNELS:
            self._kernels[kernel._function] = (kernel.name, kernel.arguments)

    @property
    def last_calls(self) -> tuple[Call, ...]:
        """The last calls, the oldest first."""
        with self._lock:
            return tuple(self._calls)

    # -- a call --------------------------------------------------------------------------------

    def _call(self, name: str, *args: Any) -> Any:
        call = self._begin(name, args)
        plain = [each.inner if isinstance(each, Debug) else each for each in args]
        began = time.perf_counter()
        try:
            result = getattr(self.inner, name)(*plain)
            if name == "graph_begin":
                self._capturing.add(args[0])
            stream = args[_QUEUED_ON[name]] if name in _QUEUED_ON else 0
            waited = bool(stream) and not self._capturing
            if waited:
                self._settle(name, stream)
        except HalError as error:
            call.outcome = f"{type(error).__name__}: {error}"
            self._explain(error, call)
            raise
        except Exception as error:  # the driver's own mistake: it may raise HalError only
            call.outcome = f"{type(error).__name__}: {error}"
            error.add_note(f"in {call.text}, called at {call.site}")
            self._dump(call)
            raise
        finally:
            if name == "graph_end":
                self._capturing.discard(args[0])
        took = (time.perf_counter() - began) * 1e6
        call.outcome = f"{self._shown(result)} in {took:.1f} us" + (", done" if waited else "")
        return result

    def _begin(self, name: str, args: tuple[Any, ...]) -> Call:
        text = f"{name}({', '.join(self._arguments(name, args))})"
        thread, site = threading.current_thread().name, call_site()
        with self._lock:
            self._count += 1
            last = self._calls[-1] if self._calls else None
            if last is not None and (last.text, last.site, last.thread) == (text, site, thread):
                last.times += 1
                last.at, last.outcome = time.time(), "has not returned"
                return last
            call = Call(self._count, time.time(), thread, text, site)
            self._calls.append(call)
        return call

    def _settle(self, name: str, stream: int) -> None:
        from drivetrain.hal.opened import wait_limit_s

        limit = wait_limit_s()
        if not self.inner.stream_synchronize(stream, limit):
            raise Timeout(
                f"{name}: DRIVETRAIN_DEBUG=1 waits for each call, and this one was not done on "
                f"{self._device.address} within {limit:g} s; it goes on",
                code="timeout",
                driver=self._device.driver,
                op=name,
                device=self._device.address,
            )

    # -- what is told --------------------------------------------------------------------------

    def _arguments(self, name: str, args: tuple[Any, ...]) -> list[str]:
        told = []
        for parameter, value in zip(_names(name), args, strict=False):
            if parameter == "arguments":
                told += self._packed(args)
            elif parameter == "function" and value in self._kernels:
                told.append(self._kernels[value][0])
            elif parameter != "sizes":
                told.append(f"{parameter}={self._shown(value, parameter)}")
        return told

    def _shown(self, value: Any, name: str = "") -> str:
        if isinstance(value, (bytes, bytearray, memoryview)):
            return f"<{len(value)} bytes>"
        if name in _HANDLES and isinstance(value, int):
            return f"{value:#x}"
        if name == "way":
            return f"<{Way(value).words}>"
        if name == "kind":
            return Kind(value).name.lower()
        if name == "other":
            other = value._device.address if isinstance(value, Debug) else type(value).__name__
            return f"<{other}>"
        text = repr(value)
        return text if len(text) <= 200 else text[:200] + "..."

    def _packed(self, args: tuple[Any, ...]) -> list[str]:
        """A launch's arguments, as its kernel's types tell them."""
        table, sizes = args[-2], args[-1]
        known = self._kernels.get(args[0] if len(args) == 7 else args[2], ("", ()))[1]
        pointers = (ctypes.c_void_p * len(sizes)).from_address(table) if len(sizes) else ()
        told = []
        for index, (address, size) in enumerate(zip(pointers, sizes, strict=True)):
            raw = ctypes.string_at(address, abs(size))
            code = getattr(known[index], "code", "") if index < len(known) else ""
            if size < 0:
                told.append(f"{struct.unpack('Q', raw)[0]:#x}")
            elif code == "bf16":
                told.append(repr(struct.unpack("<f", b"\0\0" + raw)[0]))
            elif code:
                told.append(repr(struct.unpack(code, raw)[0]))
            else:
                told.append(f"<{size} bytes>")
        return told

    # -- a failure -----------------------------------------------------------------------------

    def _explain(self, error: HalError, call: Call) -> None:
        lines = [
            str(error),
            f"  in {call.text} on {self._device.address}",
            f"  called at {call.site}",
        ]
        if getattr(error, "explained", False):
            return  # a sticky failure is raised again as the same object
        error.explained = True  # type: ignore[attr-defined]
        answers = isinstance(error, (OutOfMemory, Unsupported)) or error.code == "no_such_kernel"
        if not answers:  # those are answers that the core and its callers reckon with
            path = self._dump(call)
            if path:
                lines.append(f"  the calls before it: {path}")
        error.args = ("\n".join(lines), *error.args[1:])

    def _dump(self, failed: Call) -> str:
        """Tell the last calls; the path of the file, empty when there is none."""
        with self._lock:
            calls, self._dumps = tuple(self._calls), self._dumps + 1
            number = self._dumps
        if number > _MOST_DUMPS:
            return ""
        title = (
            f"drivetrain: call {failed.number} failed on {self._device.address}; the last calls:"
        )
        text = "\n".join([title, *map(str, calls)]) + "\n"
        sys.stderr.write(text)
        return _write(text)


def _write(text: str) -> str:
    folder = config.state_folder() / FOLDER
    path = folder / f"calls-{os.getpid()}-{time.time_ns()}.txt"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        old = sorted(folder.glob("calls-*.txt"), key=lambda each: each.stat().st_mtime)
        for each in old[: max(0, len(old) - _MOST_FILES + 1)]:
            each.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        with os.fdopen(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        return ""  # standard error has it
    return str(path)

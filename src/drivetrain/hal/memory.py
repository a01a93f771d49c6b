"""Memory of a device: buffers, and how much there is."""

from __future__ import annotations

import ctypes
import threading
from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput, DeviceLost, HalError
from drivetrain.hal import watch
from drivetrain.hal.hot import BufferCore, StreamCore
from drivetrain.hal.kinds import Kind as MemoryKind
from drivetrain.hal.kinds import MemoryInfo, Way
from drivetrain.hal.opened import wait_limit_s
from drivetrain.hal.pool import Pool
from drivetrain.hal.stream import check_capturing, late

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.opened import Opened
    from drivetrain.hal.resource import MemoryResource
    from drivetrain.hal.stream import Event, Stream

__all__ = ["Buffer", "MemoryInfo", "MemoryKind"]

_MOST_BYTES = 1 << 48
_noting = threading.RLock()  # a finaliser may come in between
_MANY_USERS = 16


class Buffer(BufferCore):
    """Bytes of one device, at ``ptr``. Made by ``Device.alloc`` and ``Device.wrap``.

    A buffer belongs to the stream that it was allocated on: closing it gives its memory back in
    that stream's order, after the work of every other stream that used it through Drivetrain or
    was named by `used_by`. A forgotten buffer is closed by its finaliser.
    """

    __slots__ = ()

    if TYPE_CHECKING:  # they are in the core, in C or its twin
        _opened: Opened
        device: Device
        ptr: int
        nbytes: int
        kind: MemoryKind
        _resource: MemoryResource | None
        _home: Stream | None
        _root: object
        _users: set[Stream] | None
        _waits: list[Event] | None

    def __init__(
        self,
        opened: Opened,
        ptr: int,
        nbytes: int,
        kind: MemoryKind,
        *,
        resource: MemoryResource | None = None,
        home: Stream | None = None,
        root: object = None,
    ) -> None:
        self._opened = opened
        self.device = opened.device
        self.ptr = ptr
        self.nbytes = nbytes
        self.kind = kind
        self._resource = resource
        self._home = home
        self._root = root

    @classmethod
    def of(
        cls,
        opened: Opened,
        nbytes: int,
        kind: MemoryKind,
        stream: Stream,
        pool: MemoryResource | None = None,
    ) -> Buffer:
        """A new buffer from ``pool``, or else the device's own pool. Raises OutOfMemory."""
        if not isinstance(nbytes, int) or nbytes < 0 or nbytes > _MOST_BYTES:
            raise BadInput(f"alloc: {nbytes!r} bytes; give an int of 0 to {_MOST_BYTES}")
        _same_device(opened, stream, "alloc")
        if not isinstance(kind, MemoryKind):
            raise BadInput(f"alloc: kind={kind!r}; give a hal.MemoryKind")
        stream._alive("alloc")
        check_capturing(stream, "alloc")
        resource = pool if pool is not None else opened.pool(kind)
        if resource.opened is not opened or resource.kind is not kind:
            raise BadInput(
                f"alloc: the pool is for {resource.kind.name.lower()} memory of "
                f"{resource.opened.device.address}, asked was {kind.name.lower()} memory of "
                f"{opened.device.address}"
            )
        ptr = resource.allocate(nbytes, stream.handle)
        usual = pool is None and kind is MemoryKind.DEVICE and stream._lists is None
        if usual and isinstance(resource, Pool):
            stream._pool, stream._lists = resource, resource.lists  # from here on C finds them
        made = cls(opened, ptr, nbytes, kind, resource=resource, home=stream)
        if watch.active:
            watch.tell("alloc", made)
        return made

    # -- life --------------------------------------------------------------------------------

    def _close(self, stream: Stream | None = None) -> None:
        """`close` when it is not the usual case."""
        ptr = self.ptr
        if watch.active and ptr:
            watch.tell("close", self)
        if stream is not None and ptr and self._resource is not None:
            _same_device(self._opened, stream, "close")
            self._note(stream)
        ptr, resource = self._take()
        if not ptr or resource is None or self._opened.closed:
            return
        home = self._home
        assert home is not None
        try:
            for event in self._waits or ():
                event.synchronize()
            handle, waits = home._give_back(self._users)
        except DeviceLost:
            return  # its memory is gone with it
        except BaseException:
            self._resource, self.ptr = resource, ptr  # it is in use still: close it again
            raise
        try:
            if handle:
                resource.deallocate(ptr, self.nbytes, handle, waits)
        except DeviceLost:
            pass

    def __enter__(self) -> Buffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.nbytes} bytes at {self.ptr:#x}"
        return f"<Buffer {state}, {self.kind.name.lower()} on {self.device.address}>"

    def used_by(self, stream: Stream) -> None:
        """The memory is used again only after what is queued on ``stream`` when it closes.

        Copies, fills and launches through Drivetrain say so themselves; this is for work that
        others queue.
        """
        self._alive("used_by")
        _same_device(self._opened, stream, "used_by")
        self._note(stream)

    def _note(self, stream: Stream) -> None:
        root = self._root
        if isinstance(root, Buffer):
            root._note(stream)
            self._last_user(stream)
            return
        if stream is not self._home and stream not in (self._users or ()):
            with _noting:
                users = self._users
                if users is None:
                    users = self._users = set()
                elif len(users) >= _MANY_USERS:
                    _hand_on(users)
                users.add(stream)
        self._last_user(stream)

    def _note_event(self, event: Event) -> None:
        """Another device reads or writes the memory until ``event``."""
        root = self._root
        if isinstance(root, Buffer):
            root._note_event(event)
            return
        with _noting:
            self._waits = [*(each for each in self._waits or () if not each.done), event]

    def _settle(self) -> None:
        """Wait for the work that was queued on the buffer so far, through Drivetrain."""
        root = self._root
        if isinstance(root, Buffer):
            root._settle()
            return
        for stream in (self._home, *(self._users or ())):
            behind = stream._behind() if stream is not None else 0
            if behind and not self._opened.backend.stream_synchronize(behind, wait_limit_s()):
                raise late(self._opened, "buffer", wait_limit_s())
        for event in self._waits or ():
            event.synchronize()

    def _alive(self, op: str) -> None:
        if self.closed:
            raise BadInput(f"{op}: the buffer of {self.nbytes} bytes is closed")
        if self._opened.closed:
            raise BadInput(
                f"{op}: the buffer's device, {self.device.address}, was closed, and its memory is "
                "gone; make a new buffer"
            )

    # -- parts -------------------------------------------------------------------------------

    def view(self, offset: int, nbytes: int) -> Buffer:
        """``nbytes`` from ``offset`` on, as a buffer that keeps this one alive. Closing a view
        frees nothing; closing this one closes its views."""
        self._alive("view")
        if not isinstance(offset, int) or not isinstance(nbytes, int):
            raise BadInput(f"view: {offset!r} and {nbytes!r}; give two ints, in bytes")
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise BadInput(
                f"view: bytes {offset} to {offset + nbytes} do not lie in a buffer of "
                f"{self.nbytes} bytes"
            )
        return Buffer(self._opened, self.ptr + offset, nbytes, self.kind, root=self)

    # -- moving bytes ------------------------------------------------------------------------

    def fill(self, pattern: bytes, *, stream: Stream) -> None:
        """Queue: repeat ``pattern`` (1, 2, 4, 8 or 16 bytes) over the whole buffer, whose size
        must be a multiple of it."""
        self._alive("fill")
        _same_device(self._opened, stream, "fill")
        if not isinstance(pattern, (bytes, bytearray)):
            raise BadInput(f"fill: a pattern is bytes, not a {type(pattern).__name__}")
        width = len(pattern)
        if width not in (1, 2, 4, 8, 16):
            raise BadInput(f"fill: a pattern has 1, 2, 4, 8 or 16 bytes, not {width}")
        if self.nbytes % width or self.ptr % width:
            raise BadInput(
                f"fill: {self.nbytes} bytes at an address {self.ptr % width} past a multiple of "
                f"{width} do not take a pattern of {width} bytes"
            )
        if self.nbytes:
            self._note(stream)
            stream._fill(self, bytes(pattern))

    def copy_from(self, src: Buffer | Any, *, stream: Stream) -> None:
        """Queue: copy all of ``src`` to the start of this buffer.

        ``src`` is a buffer of any device, or a C-contiguous object with the buffer protocol, whose
        memory may be reused when the call returns. Shorter is fine, longer is BadInput. Between two
        devices the stream may be of either.
        """
        self._alive("copy_from")
        if isinstance(src, Buffer):
            from drivetrain.hal.copies import copy

            copy(self, src, stream)
            return
        _same_device(self._opened, stream, "copy_from")
        address, nbytes, keep = _host(src, writable=False)
        self._fits(nbytes, "copy_from")
        if nbytes:
            self._note(stream)
            stream._do_host(self, self.ptr, address, nbytes, Way.HOST_TO_DEVICE, keep)

    def copy_to(self, dst: Buffer | Any, *, stream: Stream) -> None:
        """Queue: copy as much of this buffer as ``dst`` takes to its start.

        ``dst`` is a buffer of any device, at least as long as this one, or a writable C-contiguous
        object with the buffer protocol, at most as long; it holds the bytes once the stream is
        synchronised and is kept alive until then.
        """
        self._alive("copy_to")
        if isinstance(dst, Buffer):
            dst.copy_from(self, stream=stream)
            return
        _same_device(self._opened, stream, "copy_to")
        address, nbytes, keep = _host(dst, writable=True)
        self._fits(nbytes, "copy_to")
        if nbytes:
            self._note(stream)
            stream._do_host(self, address, self.ptr, nbytes, Way.DEVICE_TO_HOST, keep)

    def _fits(self, nbytes: int, op: str) -> None:
        if nbytes > self.nbytes:
            raise BadInput(f"{op}: {nbytes} bytes do not fit a buffer of {self.nbytes} bytes")

    # -- the same bytes for others -------------------------------------------------------------

    @property
    def host_visible(self) -> bool:
        """Whether the host may touch the bytes: pinned and managed memory, and the cpu's."""
        return self.kind is not MemoryKind.DEVICE or self.device.driver == "cpu"

    def memoryview(self) -> memoryview:
        """The bytes themselves, writable, for memory that the host may touch. The stream must have
        been synchronised; the buffer must outlive the view."""
        self._alive("memoryview")
        if not self.host_visible:
            raise HalError(
                f"the host cannot touch {self!r}; copy it with copy_to",
                code="not_host_visible",
                driver=self.device.driver,
                op="memoryview",
                device=self.device.address,
            )
        array = (ctypes.c_char * self.nbytes).from_address(self.ptr)
        array._buffer = self  # type: ignore[attr-defined]  # the view keeps the memory alive
        return memoryview(array).cast("B")

    def __dlpack_device__(self) -> tuple[int, int]:
        from drivetrain.hal import dlpack

        return dlpack.device_of(self)

    def __dlpack__(self, *, stream: Any = None, **options: Any) -> Any:
        """The bytes as a one-dimensional uint8 tensor."""
        from drivetrain.hal import dlpack

        return dlpack.export(self, (self.nbytes,), (1,), "uint8", stream=stream, **options)


class Wrapped(Buffer):
    """Memory of somebody else, which ``owner`` keeps alive and who may well hold this buffer: a
    slot of this class is seen by the garbage collector, fields of the core are not."""

    __slots__ = ("_owner",)

    def __init__(
        self, opened: Opened, ptr: int, nbytes: int, kind: MemoryKind, owner: object
    ) -> None:
        super().__init__(opened, ptr, nbytes, kind)
        self._owner = owner

    def _close(self, stream: Stream | None = None) -> None:
        if stream is not None and self.ptr:
            _same_device(self._opened, stream, "close")
            self._note(stream)
        owner, self._owner = self._owner, None
        super()._close()
        # Work that is queued may use the memory still: those streams keep the owner until then.
        for user in tuple(self._users or ()):
            user._hold(owner)
        for event in self._waits or ():
            heir = event._opened.inner_stream("heir")
            heir.wait(event)
            heir._hold(owner)

    def __del__(self) -> None:
        if self.ptr:
            try:
                self._close()
            except Exception:
                pass  # a device is closed or lost: nothing runs there any more


def alloc(
    device: Device,
    nbytes: int,
    *,
    stream: Stream,
    kind: MemoryKind = MemoryKind.DEVICE,
    pool: MemoryResource | None = None,
) -> Buffer:
    """``Device.alloc`` when it is not the usual case."""
    from drivetrain.hal.opened import opened

    return Buffer.of(opened(device), nbytes, kind, stream, pool)


def _hand_on(users: set[Stream]) -> None:
    """Streams that were closed are left to their heirs: a buffer may outlive any number of them."""
    for user in tuple(users):
        if not user.handle:
            if user._heir is not None:
                users.add(user._heir)
            users.discard(user)


def _same_device(opened: Opened, stream: Stream, op: str) -> None:
    if not isinstance(stream, StreamCore):
        raise BadInput(f"{op}: stream= takes a Stream, not a {type(stream).__name__}")
    if stream._opened is not opened:
        stream._alive(op)  # one of a device that was closed is of none
        raise BadInput(
            f"{op}: the buffer is on {opened.device.address} and the stream on "
            f"{stream.device.address}"
        )


def _host(value: Any, *, writable: bool) -> tuple[int, int, object]:
    """(address, bytes, what keeps them alive) of a C-contiguous object."""
    try:
        view = memoryview(value)
    except TypeError as error:
        raise BadInput(
            f"a copy takes a Buffer or an object with the buffer protocol, not "
            f"{type(value).__name__}"
        ) from error
    if not view.c_contiguous:
        raise BadInput("the host array is not C-contiguous; make it so (numpy.ascontiguousarray)")
    if writable and view.readonly:
        raise BadInput("the host array to copy to is read-only")
    if not view.nbytes:
        return 0, 0, view
    flat = view.cast("B") if view.format != "B" or view.ndim != 1 else view
    return _address(flat), view.nbytes, view


class _PyBuffer(ctypes.Structure):
    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def _address(view: memoryview) -> int:
    """Where a contiguous view lies, read-only or not (``c_char.from_buffer`` takes only writable
    ones)."""
    raw = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(raw), 0)
    try:
        return int(raw.buf or 0)
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(raw))

"""Copies between any two devices: the caller writes one line, the best way is taken.

On one device the driver copies. Between two devices of a driver that can read each other's memory
it copies from peer to peer. Everything else is staged: chunks go through pinned host memory, one
chunk leaving the source while the one before it enters the destination.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from drivetrain.errors import BadInput
from drivetrain.hal import watch
from drivetrain.hal.hot import StreamCore
from drivetrain.hal.kinds import Kind, Way
from drivetrain.hal.memory import Buffer

if TYPE_CHECKING:
    from drivetrain.hal.opened import Opened
    from drivetrain.hal.stream import Event, Stream

CHUNK_BYTES = 10 << 20
"""A copy takes as long as all of its chunks on the slower leg and one of them on the other, and
some microseconds for each of them."""
SLOTS = 3
"""Few, so that they fit the part of a server's last cache that devices write to: between two GPUs
larger rings were slower."""


def copy(dst: Buffer, src: Buffer, stream: Stream) -> None:
    """Queue: all of ``src`` to the start of ``dst``, in the order of ``stream``, which belongs to
    one of the two devices. Raises BadInput before anything moves."""
    if src.closed:
        raise BadInput(f"copy: the source of {src.nbytes} bytes is closed")
    src._alive("copy")
    if src.nbytes > dst.nbytes:
        raise BadInput(f"copy: {src.nbytes} bytes do not fit a buffer of {dst.nbytes} bytes")
    if not isinstance(stream, StreamCore):
        raise BadInput(f"copy: stream= takes a Stream, not a {type(stream).__name__}")
    if stream._opened is not dst._opened and stream._opened is not src._opened:
        raise BadInput(
            f"copy: the stream is on {stream.device.address}, the buffers on "
            f"{src.device.address} and {dst.device.address}"
        )
    if not src.nbytes:
        return
    if src._opened is dst._opened:
        if _overlap(dst, src):
            raise BadInput("copy: the two buffers overlap")
        way = _side(src) * 2 + _side(dst)
        src._note(stream)
        dst._note(stream)
        stream._do_copy((dst, src), dst.ptr, src.ptr, src.nbytes, _WAYS[way])
        return
    from drivetrain.hal.stream import check_capturing

    check_capturing(stream, "a copy between devices")
    if direct(src._opened, dst._opened):
        name, move = "peer", _peer
    elif src.host_visible and src.kind is Kind.PINNED and stream._opened is dst._opened:
        name, move = "from host", _from_host
    elif dst.host_visible and dst.kind is Kind.PINNED and stream._opened is src._opened:
        name, move = "to host", _to_host
    else:
        name, move = "staged", _staged
    if watch.active:
        work = watch.Work("link", name, stream._opened, stream.handle, src.nbytes)
        work.buffers = (dst, src)
        with watch.around(work):
            move(dst, src, stream)
    else:
        move(dst, src, stream)


def _leg(opened: Opened, dst: int, src: int, nbytes: int, way: Way, stream: Stream) -> None:
    """Queue a part of a copy between devices, to or from the host's memory."""
    if watch.active:
        work = watch.Work("copy", way.words, opened, stream.handle, nbytes, part=True)
        with watch.around(work):
            opened.backend.copy(dst, src, nbytes, way, stream.handle, False)
    else:
        opened.backend.copy(dst, src, nbytes, way, stream.handle, False)


_WAYS = (Way.HOST_TO_HOST, Way.HOST_TO_DEVICE, Way.DEVICE_TO_HOST, Way.DEVICE_TO_DEVICE)


def _side(buffer: Buffer) -> int:
    return 0 if buffer.kind is Kind.PINNED else 1


_PUSH_BYTES = 1 << 20
"""From there on the faster way is worth two events more."""


def _overlap(a: Buffer, b: Buffer) -> bool:
    return a.ptr < b.ptr + b.nbytes and b.ptr < a.ptr + b.nbytes


def direct(src: Opened, dst: Opened) -> bool:
    """Whether ``dst`` can read the memory of ``src``; asked of the driver once for each pair."""
    if src.device.driver != dst.device.driver or "peer" not in dst.backend.groups:
        return False
    known = dst.peers.get(src.device.address)
    if known is None:
        known = dst.peers[src.device.address] = dst.backend.peer_enable(src.backend)
    return known


def _ordered(dst: Buffer, src: Buffer, stream: Stream) -> tuple[Stream, Stream]:
    """A stream on each side, both behind ``stream``; the caller's own where it is of that side."""
    if stream._opened is dst._opened:
        far = src._opened.inner_stream("copy")
        _behind(far, stream)
        return stream, far
    near = dst._opened.inner_stream("copy")
    _behind(near, stream)
    return near, stream


def _behind(inner: Stream, stream: Stream) -> None:
    """``inner`` waits for what is queued on ``stream``; devices take a while to hear of each
    other's events, so an idle stream is not waited for."""
    if watch.active or not stream.done:
        inner.wait(stream)


def _peer(dst: Buffer, src: Buffer, stream: Stream) -> None:
    """On the caller's stream, or on one of the source where writing to a peer is the faster way."""
    near, far = dst._opened, src._opened
    pushes = src.nbytes >= _PUSH_BYTES and getattr(near.backend, "peer_pushes", False)
    side = far if pushes and direct(near, far) else near
    by = stream if stream._opened is side else side.inner_stream("copy")
    if by is not stream:
        _behind(by, stream)
    if watch.active:
        work = watch.Work("copy", "peer", side, by.handle, src.nbytes, part=True)
        with watch.around(work):
            near.backend.copy_peer(dst.ptr, src.ptr, src.nbytes, far.backend, by.handle)
    else:
        near.backend.copy_peer(dst.ptr, src.ptr, src.nbytes, far.backend, by.handle)
    if by is not stream:
        stream.wait(by)
    for buffer in (dst, src):
        if buffer._opened is side:
            buffer._note(by)
        elif buffer._opened is stream._opened:
            buffer._note(stream)
        else:
            buffer._note_event(by.record())


def _from_host(dst: Buffer, src: Buffer, stream: Stream) -> None:
    """``src`` is host memory of another device: its memory must not be reused while it is read."""
    _leg(dst._opened, dst.ptr, src.ptr, src.nbytes, Way.HOST_TO_DEVICE, stream)
    dst._note(stream)
    src._note_event(stream.record())


def _to_host(dst: Buffer, src: Buffer, stream: Stream) -> None:
    _leg(src._opened, dst.ptr, src.ptr, src.nbytes, Way.DEVICE_TO_HOST, stream)
    src._note(stream)
    dst._note_event(stream.record())


# -- staged ---------------------------------------------------------------------------------------


class Staging:
    """The pinned slots of one pair of devices, and what each slot still waits for."""

    def __init__(self, src: Opened, dst: Opened) -> None:
        owner = src if "pinned" in src.backend.groups else dst
        if "pinned" not in owner.backend.groups:
            raise BadInput(
                f"copy: neither {src.device.address} nor {dst.device.address} has pinned host "
                "memory to stage through"
            )
        stream = owner.inner_stream("copy")
        self.lock = threading.Lock()
        self.buffer = Buffer.of(owner, SLOTS * CHUNK_BYTES, Kind.PINNED, stream)
        stream.synchronize()
        self.emptied: list[Event | None] = [None] * SLOTS
        self.next = 0


def _staging(src: Opened, dst: Opened) -> Staging:
    with src.lock:
        found = src.stagings.get(dst)
        if found is None:
            found = src.stagings[dst] = Staging(src, dst)
        return found


def _staged(dst: Buffer, src: Buffer, stream: Stream) -> None:
    """Each chunk: a slot is free once the chunk before it in there has left; out of the source
    into the slot; out of the slot into the destination. Between devices that share events the
    devices wait for each other, else the caller does."""
    into, out_of = _ordered(dst, src, stream)
    dst._note(into)
    src._note(out_of)
    staging = _staging(src._opened, dst._opened)
    with staging.lock:
        base = staging.buffer.ptr
        done = 0
        filled: list[tuple[int, int, int, Event]] = []

        def drain() -> None:
            slot, at, size, event = filled.pop(0)
            into.wait(event)
            slot_at = base + slot * CHUNK_BYTES
            _leg(dst._opened, dst.ptr + at, slot_at, size, Way.HOST_TO_DEVICE, into)
            staging.emptied[slot] = into.record()

        try:
            for size in _chunks(src.nbytes):
                slot = staging.next
                staging.next = (slot + 1) % SLOTS
                emptied = staging.emptied[slot]
                if emptied is not None:
                    out_of.wait(emptied)
                slot_at = base + slot * CHUNK_BYTES
                _leg(src._opened, slot_at, src.ptr + done, size, Way.DEVICE_TO_HOST, out_of)
                filled.append((slot, done, size, out_of.record()))
                done += size
                if len(filled) >= SLOTS - 1:
                    drain()
            while filled:
                drain()
        except BaseException:
            for slot, _, _, event in filled:  # being written still, and never read
                staging.emptied[slot] = event
            raise
    stream.wait(into if into is not stream else out_of)


def _chunks(nbytes: int) -> Iterator[int]:
    """Small copies in four chunks, so that both legs overlap; large ones in full slots."""
    quarter = -(-nbytes // 4)
    most = min(CHUNK_BYTES, max(256 << 10, -(-quarter // 4096) * 4096))
    for at in range(0, nbytes, most):
        yield min(most, nbytes - at)

"""Copies between devices: staged through pinned memory, and from peer to peer.

Start: before the call; end: the bytes are there (the stream waited for). On NVIDIA GPUs a staged
copy is held against the slower of the two ways that it is made of, device to host and host to
device from pinned memory, and a peer copy against the driver's own cuMemcpyPeer called from C
(which the runtime's cudaMemcpyPeer calls). Elsewhere the same lines are printed for information,
between the processor, its partitions and OpenCL.

    python -m benchmarks hal_copies
    python benchmarks/bench_hal_copies.py [--quick] [--json] [cuda other]
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.hal.common import (
    QUICK,
    Call,
    HalReport,
    Measure,
    Span,
    interleaved,
    ratio,
    whole,
    words,
)
from benchmarks.hal.native import floor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from drivetrain import hal

STAGED, PEER = 0.95, 0.98
NBYTES = (8 << 20) if QUICK else (4 << 30)
"""So many that what a copy costs once, some 50 us, does not count: the limits are on rates."""
SHORTER = NBYTES >> 2
"""Shown beside it."""
OTHER_BYTES = (4 << 20) if QUICK else (256 << 20)
D2H, H2D = "device to pinned host", "pinned host to device"
C_PEER = "cuMemcpyPeer in C"


class Pair:
    """Two devices with a buffer each, full of the same bytes, and pinned memory of each."""

    def __init__(self, src: hal.Device, dst: hal.Device, nbytes: int) -> None:
        from drivetrain import hal

        self.src, self.dst, self.nbytes = src, dst, nbytes
        self.out, self.into = src.stream(), dst.stream()
        self.a = src.alloc(nbytes, stream=self.out)
        self.b = dst.alloc(nbytes, stream=self.into)
        kind = hal.MemoryKind.PINNED
        self.host_a = src.alloc(nbytes, stream=self.out, kind=kind)
        self.host_b = dst.alloc(nbytes, stream=self.into, kind=kind)
        for buffer, stream in ((self.a, self.out), (self.host_a, self.out)):
            buffer.fill(b"\x5a", stream=stream)
        for buffer in (self.b, self.host_b):
            buffer.fill(b"\0", stream=self.into)
        self.settle()

    def settle(self) -> None:
        self.out.synchronize()
        self.into.synchronize()

    def copy(self) -> None:
        self.b.copy_from(self.a, stream=self.into)

    def checked(self) -> None:
        """The bytes arrive. Raises RuntimeError."""
        self.b.fill(b"\0", stream=self.into)
        self.copy()
        back = bytearray(min(self.nbytes, 1 << 20))
        self.b.view(self.nbytes - len(back), len(back)).copy_to(back, stream=self.into)
        self.into.synchronize()
        if set(back) != {0x5A}:
            raise RuntimeError(f"{self.src} to {self.dst}: other bytes arrived")

    def legs(self) -> dict[str, Measure]:
        def out() -> None:
            self.host_a.copy_from(self.a, stream=self.out)

        def into() -> None:
            self.b.copy_from(self.host_b, stream=self.into)

        return {D2H: whole(out, self.settle), H2D: whole(into, self.settle)}


@contextmanager
def staged_only(pair: Pair) -> Iterator[None]:
    """As if neither device could read the other's memory."""
    from drivetrain.hal.opened import opened

    src, dst = opened(pair.src), opened(pair.dst)
    before = dict(dst.peers), dict(src.peers)
    dst.peers[pair.src.address] = src.peers[pair.dst.address] = False
    try:
        yield
    finally:
        dst.peers, src.peers = before


def rates(medians: dict[str, float], nbytes: int) -> None:
    for name, seconds in medians.items():
        print(f"    {name:36} {nbytes / seconds / 1e9:10.2f} GB/s")


def staged(report: HalReport, pair: Pair, gate: bool) -> None:
    name = "staged copy"
    with staged_only(pair):
        pair.checked()
        found = interleaved({**pair.legs(), name: whole(pair.copy, pair.settle)}, pair.settle)
    # Round by round the slower of the two legs, which no staging can beat.
    slower = "the slower leg"
    found[slower] = [max(a, b) for a, b in zip(found[D2H], found[H2D], strict=True)]
    span = Span("before the call", "the bytes are there", slower, slower)
    title = f"{pair.nbytes >> 20} MiB from {pair.src} to {pair.dst}, staged"
    rates(report.show(title, found, span, "ms"), pair.nbytes)
    if gate:
        limit = 1 / STAGED
        share = ratio(found, name, slower)
        title = f"{pair.src} to {pair.dst}: staged copy's time over the slower leg's"
        report.gate(title, share, limit, "x", span, room=limit - 1)


def peer(report: HalReport, pair: Pair, gate: bool) -> None:
    """The HAL's peer copy, against the driver's own."""
    link = pair.src.link(pair.dst)
    if link.kind.value != "peer":
        report.missing(f"a peer copy from {pair.src} to {pair.dst}", link.reason or link.kind.value)
        return
    pair.checked()
    found = interleaved(
        {"peer copy": whole(pair.copy, pair.settle), C_PEER: _cu_memcpy_peer(pair)}, pair.settle
    )
    span = Span("before the call", "the bytes are there", C_PEER, C_PEER)
    title = f"{pair.nbytes >> 20} MiB from {pair.src} to {pair.dst}, peer"
    rates(report.show(title, found, span, "ms"), pair.nbytes)
    if gate:
        limit = 1 / PEER
        title = f"{pair.src} to {pair.dst}: peer copy's time over {C_PEER}"
        report.gate(title, ratio(found, "peer copy", C_PEER), limit, "x", span, room=limit - 1)


def _cu_memcpy_peer(pair: Pair) -> Measure:
    """The call and a wait for its context, both from C."""
    cuda = ctypes.CDLL("libcuda.so.1")
    addresses = [
        ctypes.cast(getattr(cuda, name), ctypes.c_void_p).value
        for name in ("cuMemcpyPeer", "cuCtxSynchronize")
    ]
    calls = [stream._opened.calls[5] for stream in (pair.into, pair.out)]  # their contexts
    run = floor().floor_peer

    def measure() -> float:
        cuda.cuCtxSetCurrent(ctypes.c_void_p(calls[0]))
        seconds: float = run(*addresses, pair.b.ptr, calls[0], pair.a.ptr, calls[1], pair.nbytes)
        if seconds < 0:
            raise RuntimeError("cuMemcpyPeer failed")
        return seconds

    return measure


def on_cuda(report: HalReport) -> None:
    from drivetrain import hal

    gpus = hal.devices("cuda")
    if not gpus:
        report.missing("cuda", hal.drivers()["cuda"].reason)
        return
    if len(gpus) > 1:
        pairs = [(gpus[0], gpus[1])]
    else:
        report.missing("a second GPU", "peer copies and staging between GPUs are not measured")
        pairs = [(gpus[0], hal.device("cpu:0"))]
    for src, dst in pairs:
        for nbytes in (NBYTES, SHORTER):
            _between(report, src, dst, nbytes)


def _between(report: HalReport, src: hal.Device, dst: hal.Device, nbytes: int) -> None:
    made: list[Pair] = []
    report.part(f"{src} and {dst}", lambda: made.append(Pair(src, dst, nbytes)))
    if made:
        both = src.driver == dst.driver
        gate = both and nbytes == NBYTES
        report.part(f"staged, {src} to {dst}", lambda: staged(report, made[0], gate))
        if both:
            report.part(f"peer, {src} to {dst}", lambda: peer(report, made[0], gate))


def on_other(report: HalReport) -> None:
    """The processor's partitions and OpenCL, for information."""
    from drivetrain import hal

    parts = hal.devices("cpu")
    others = hal.devices("opencl", all_routes=True)[:1]
    if not others:
        report.missing("opencl", hal.drivers()["opencl"].reason)
    if len(parts) < 2:
        report.missing("a second part of the processor", "one core only")
    pairs = [(parts[0], each) for each in (*parts[1:2], *others)]
    for src, dst in pairs:
        made: list[Pair] = []
        report.part(
            f"{src} and {dst}", lambda s=src, d=dst, m=made: m.append(Pair(s, d, OTHER_BYTES))
        )
        if made:
            report.part(f"staged, {src} to {dst}", lambda p=made[0]: staged(report, p, False))
            if src.driver == dst.driver:
                report.part(f"direct, {src} to {dst}", lambda p=made[0]: direct(report, p))


def direct(report: HalReport, pair: Pair) -> None:
    """Between parts of the processor: one copy, against the C library's memcpy by one thread."""
    pair.checked()
    memmove: Any = ctypes.memmove

    def in_c() -> None:
        memmove(pair.b.ptr, pair.a.ptr, pair.nbytes)

    nothing: Call = lambda: None  # noqa: E731
    ways = {"direct copy": whole(pair.copy, pair.settle), "memcpy": whole(in_c, nothing)}
    found = interleaved(ways, pair.settle)
    span = Span("before the call", "the bytes are there", "memcpy", "memcpy")
    title = f"{pair.nbytes >> 20} MiB from {pair.src} to {pair.dst}, direct"
    rates(report.show(title, found, span, "ms"), pair.nbytes)


ON = {"cuda": on_cuda, "other": on_other}


def main() -> int:
    if len(os.sched_getaffinity(0)) > 1:
        os.environ.setdefault("DRIVETRAIN_CPU_PARTITIONS", "2")
    report = HalReport("hal_copies")
    chosen = words() or list(ON)
    if set(chosen) - set(ON):
        print(f"there are: {', '.join(ON)}", file=sys.stderr)
        return 2
    for name in chosen:
        report.part(name, lambda name=name: ON[name](report))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

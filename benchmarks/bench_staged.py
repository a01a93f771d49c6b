"""The two halves of a staged move alone: an image through the ring, between a device and memory.

Start: both processes are ready; end: the last byte is in its tensor. No job, no runtime: what is
left is the ring, the copies and the hashes, so that one sees which side the rate hangs on. Nothing
is promised of it here (`make gpu-check` has the gates of whole moves): several rings and numbers of
threads, for information.

    python -m benchmarks staged
    python benchmarks/bench_staged.py --device cuda:0 --gib 10 --rings 8x8,6x16 --threads 8,14,24
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROUNDS, machine

TENSORS = 48
MIB = 1 << 20
THERE, BACK = "from the device", "to the device"


@dataclass(frozen=True)
class Setting:
    """A ring of ``slots`` blocks, and the most threads that copy."""

    ring: int
    slots: int
    slot_mib: int
    threads: int

    def __str__(self) -> str:
        return f"{self.slots} x {self.slot_mib} MiB, {self.threads} threads"


def ring_of(text: str) -> tuple[int, int]:
    """(slots, MiB of each) of SLOTSxMIB. Raises ValueError."""
    slots, _, mib = text.partition("x")
    if not (slots.isdecimal() and mib.isdecimal() and int(slots) and int(mib)):
        raise ValueError(f"{text!r} is no ring: give SLOTSxMIB, such as 8x8")
    return int(slots), int(mib)


def half(conn: Any, fds: list[int], device_name: str, nbytes: int) -> None:
    """One side, in a process of its own: told (setting, whether it sends), tells its seconds and
    how many of them it waited for the other."""
    import torch

    from drivetrain.migration.segment import Ring
    from drivetrain.pytorch import crew
    from drivetrain.pytorch.hashing import ImagePlan
    from drivetrain.pytorch.pinned import Pinned
    from drivetrain.training import passing

    device = torch.device(device_name)
    each = nbytes // TENSORS // 64 * 64
    tensors = [torch.full((each,), n, dtype=torch.uint8, device=device) for n in range(TENSORS)]
    plan = ImagePlan(tensors)
    cores = len(os.sched_getaffinity(0))
    conn.send(plan.nbytes)
    while (told := conn.recv()) is not None:
        setting, sends = told
        crew.MOST_COPYING = setting.threads
        ring = Ring.attach(fds[setting.ring])
        ring.touch()
        pinned = Pinned(ring.address, ring.nbytes, device)
        passing.warm(device, cores)
        conn.send("ready")
        conn.recv()
        began = time.perf_counter()
        (passing.pour if sends else passing.take)(plan, ring, device, cores)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        conn.send((time.perf_counter() - began, ring.waited_s))
        pinned.close()
        ring.close()


class Halves:
    """Both processes: the device's first, then the processor's."""

    def __init__(self, device: str, nbytes: int, settings: list[Setting]) -> None:
        from drivetrain.migration.segment import Ring

        shapes = {s.ring: (s.slots, s.slot_mib * MIB) for s in settings}
        self._rings = [Ring.create(*shapes[number]) for number in range(len(shapes))]
        context = multiprocessing.get_context("fork")
        self._pipes = []
        for name in (device, "cpu"):
            ours, theirs = context.Pipe()
            arguments = (theirs, [ring.fd for ring in self._rings], name, nbytes)
            context.Process(target=half, args=arguments, daemon=True).start()
            self._pipes.append(ours)
        self.nbytes = next(iter({pipe.recv() for pipe in self._pipes}))

    def once(self, setting: Setting, way: str) -> tuple[float, float, float]:
        """(seconds of the slower side, seconds that the device's waited, that the processor's)."""
        for pipe, sends in zip(self._pipes, (way == THERE, way == BACK), strict=True):
            pipe.send((setting, sends))
        for pipe in self._pipes:
            pipe.recv()
        for pipe in self._pipes:
            pipe.send("go")
        (one, waited), (other, other_waited) = [pipe.recv() for pipe in self._pipes]
        return max(one, other), waited, other_waited

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for ring in self._rings:
            ring.close()


def main() -> int:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as in a worker
    from drivetrain import hal

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    at_hand = "cuda:0" if hal.devices("cuda") else "cpu"
    parser.add_argument("--device", default=at_hand, help="of one side; the other is host memory")
    parser.add_argument("--gib", type=float, default=10.0 if at_hand != "cpu" else 0.5)
    parser.add_argument("--rings", default="8x8,4x8,6x16", help="SLOTSxMIB, with commas")
    parser.add_argument("--threads", default="14", help="the most that copy, with commas")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    try:
        shapes = [ring_of(shape) for shape in options.rings.split(",")]
        most = [int(threads) for threads in options.threads.split(",")]
        if min(most) < 1 or options.rounds < 1 or options.gib * 2**30 < TENSORS * 64:
            raise ValueError("--threads, --rounds and --gib are above 0")
    except ValueError as error:
        parser.error(f"{error}; see --help")
    settings = [
        Setting(ring, *shape, threads) for ring, shape in enumerate(shapes) for threads in most
    ]
    halves = Halves(options.device, int(options.gib * 2**30), settings)
    found: dict[tuple[Setting, str], list[tuple[float, float, float]]] = {}
    for _ in range(options.rounds):
        for setting in settings:
            for way in (THERE, BACK):
                found.setdefault((setting, way), []).append(halves.once(setting, way))
    halves.close()
    print(f"  {options.gib:g} GiB between {options.device} and host memory")
    for (setting, way), rows in found.items():
        seconds, waited, other = (statistics.median(column) for column in zip(*rows, strict=True))
        rates = [halves.nbytes / row[0] / 1e9 for row in rows]
        print(
            f"    {setting}, {way:15}: {halves.nbytes / seconds / 1e9:6.2f} GB/s "
            f"({min(rates):.2f} to {max(rates):.2f}); waited: the device's side "
            f"{waited * 1e3:.0f} ms, the processor's {other * 1e3:.0f} ms"
        )
    print(machine())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A planned move of 1 GiB between two CPU partitions against one pipelined pass of the bytes.

Start: the end of the source's last step; end: the end of the target's first, less a median step.
Floor, in the same run: the bytes copied source -> segment -> target by two processes on the same
cores, hashed as they pass and again from where they arrived, without any protocol.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROUNDS, Gate, Report, spread

STATE_GIB = 1.0
STEP_S = 0.05
FIXED_MS = 150.0
FACTOR = 1.3


def _half(conn: Any, ring_fd: int, core: int, sends: bool, nbytes: int) -> None:
    """One side of the floor: waits for a line on the pipe, passes the bytes, tells the seconds."""
    os.sched_setaffinity(0, {core})
    import torch

    from drivetrain.migration.segment import Ring
    from drivetrain.pytorch.hashing import ImagePlan

    torch.set_num_threads(1)
    plan = ImagePlan([torch.ones(nbytes // 16, dtype=torch.uint8) for _ in range(16)])
    ring = Ring.attach(ring_fd)
    ring.touch()
    conn.send("ready")
    while conn.recv() == "go":
        began = time.monotonic()
        for start in range(0, plan.nbytes, ring.slot_bytes):
            stop = min(start + ring.slot_bytes, plan.nbytes)
            if sends:
                plan.read_into(ring.producer.acquire(60.0), start, stop)
                ring.producer.commit(stop - start)
            else:
                plan.write_from(ring.consumer.acquire(60.0), start, stop)
                ring.consumer.release()
        if not sends:
            plan.hashes()
        conn.send((began, time.monotonic()))


class Floor:
    """The two processes of the floor; ``once`` gives the seconds of one pass."""

    def __init__(self, cores: list[int]) -> None:
        from drivetrain.migration.segment import Ring

        self._ring = Ring.create()
        os.set_inheritable(self._ring.fd, True)
        context = multiprocessing.get_context("fork")
        self._pipes = []
        for core, sends in zip(cores, (True, False), strict=True):
            ours, theirs = context.Pipe()
            nbytes = int(STATE_GIB * 2**30)
            arguments = (theirs, self._ring.fd, core, sends, nbytes)
            context.Process(target=_half, args=arguments, daemon=True).start()
            ours.recv()
            self._pipes.append(ours)

    def once(self) -> float:
        for pipe in self._pipes:
            pipe.send("go")
        times = [pipe.recv() for pipe in self._pipes]
        return max(end for _, end in times) - min(start for start, _ in times)


def main() -> int:
    report = Report("move")
    os.environ["DRIVETRAIN_CPU_PARTITIONS"] = "2"
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        print("undecided: two CPU partitions need two cores")
        return 0
    floor = Floor([cores[0], cores[len(cores) // 2]])
    rounds = 3 if "--quick" in sys.argv else ROUNDS
    floors: list[float] = []
    pauses: list[float] = []
    predicted: list[float] = []
    with tempfile.TemporaryDirectory() as home:
        os.environ["DRIVETRAIN_HOME"] = home
        from drivetrain.runtime import Runtime

        with Runtime() as runtime:
            script = Path(__file__).with_name("state_job.py")
            job = runtime.submit(script, [str(STATE_GIB), str(STEP_S)], on="cpu:0", replicas=False)
            while job.step < 20 and job.wait(0.1) is None:
                pass
            for number in range(rounds):
                floors.append(floor.once())
                move = job.migrate("cpu:1" if number % 2 == 0 else "cpu:0")
                pauses.append(move["downtime_ms"] / 1e3)
                predicted.append(move["predicted_downtime_ms"] / 1e3)
                print(
                    f"  floor {floors[-1] * 1e3:.0f} ms, pause {pauses[-1] * 1e3:.0f} ms, "
                    f"predicted {predicted[-1] * 1e3:.0f} ms, "
                    f"phases {json.dumps(move['phases_ms'])}",
                    flush=True,
                )
            job.stop()
    over = [pause - FACTOR * passed for pause, passed in zip(pauses, floors, strict=True)]
    report.add(
        Gate(
            "pause over 1.3 x one pipelined pass of 1 GiB",
            statistics.median(over) * 1e3,
            FIXED_MS,
            "ms",
            spread=spread(floors),
            room=FIXED_MS / 1e3 / statistics.median(floors),
            detail=(
                f"pass {statistics.median(floors) * 1e3:.0f} ms, "
                f"pause {statistics.median(pauses) * 1e3:.0f} ms"
            ),
        )
    )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

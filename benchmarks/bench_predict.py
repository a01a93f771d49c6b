"""How far a move's predicted downtime is from the real one, on moves of the demo's size.

Start and end as in bench_move.py; the gate counts moves within 25% out of ten, after the three
that the model learns this pair of devices from.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import Gate, Report  # noqa: E402

MOVES = 10
LEARNT = 3
WITHIN = 0.25
WANTED = 8
STEPS_BETWEEN = 40


def main() -> int:
    report = Report("predict")
    if len(os.sched_getaffinity(0)) < 2:
        print("undecided: two CPU partitions need two cores")
        return 0
    os.environ["DRIVETRAIN_CPU_PARTITIONS"] = "2"
    within = 0
    with tempfile.TemporaryDirectory() as home:
        os.environ["DRIVETRAIN_HOME"] = home
        from drivetrain.runtime import Runtime

        with Runtime() as runtime:
            script = ROOT / "src/drivetrain/cli/demo/train_digits.py"
            arguments = [f"{home}/result.json", "--epochs", "1000"]
            job = runtime.submit(script, arguments, on="cpu:0")
            for number in range(LEARNT + MOVES):
                goal = job.step + STEPS_BETWEEN
                while job.step < goal and job.wait(0.05) is None:
                    pass
                move = job.migrate("cpu:1" if number % 2 == 0 else "cpu:0")
                real, predicted = move["downtime_ms"], move["predicted_downtime_ms"]
                near = abs(predicted - real) <= WITHIN * real
                within += near and number >= LEARNT
                print(
                    f"  {'learning' if number < LEARNT else 'near' if near else 'far':8} "
                    f"downtime {real:.1f} ms, predicted {predicted:.1f} ms",
                    flush=True,
                )
            job.stop()
    name = f"moves of {MOVES} predicted worse than within 25%"
    report.add(Gate(name, MOVES - within, MOVES - WANTED))
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

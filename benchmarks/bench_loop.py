"""What a step costs more as a job with replicas than in a plain loop, at three sizes.

Start: before a block of steps; end: after it; peer and floor: the same steps in a plain loop,
interleaved in the same process. K is what the rule picked.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROUNDS, Gate, Report, spread

CASES = ((0.1, 5.0), (10.0, 50.0), (400.0, 1000.0))
LIMIT = 1.01


def measure(state_mb: float, step_ms: float, rounds: int) -> dict[str, object]:
    """Run one case as a job on the whole machine; the two lists of seconds a step, and K."""
    from drivetrain.runtime import Runtime

    with tempfile.TemporaryDirectory() as folder, Runtime() as runtime:
        result = Path(folder) / "result.json"
        script = Path(__file__).with_name("loop_job.py")
        job = runtime.submit(script, [str(result), str(state_mb), str(step_ms), str(rounds)])
        if job.wait() != 0:
            errors = (job.directory / "logs" / "err").read_text(errors="replace")
            raise SystemExit(f"the job failed:\n{errors[-2000:]}")
        found: dict[str, object] = json.loads(result.read_text())
        return found


def main() -> int:
    report = Report("loop")
    quick = "--quick" in sys.argv
    for state_mb, step_ms in CASES[:2] if quick else CASES:
        found = measure(state_mb, step_ms, 5 if quick else ROUNDS)
        plain, as_job = found["plain"], found["job"]
        assert isinstance(plain, list)
        assert isinstance(as_job, list)
        ratio = statistics.median(b / a for a, b in zip(plain, as_job, strict=True))
        report.add(
            Gate(
                f"loop cost at {state_mb:g} MB, {step_ms:g} ms",
                ratio,
                LIMIT,
                "x plain",
                spread=spread(plain),
                room=LIMIT - 1,
                detail=(
                    f"K = {found['every']}, a plain step {statistics.median(plain) * 1e3:.3f} ms"
                ),
            )
        )
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

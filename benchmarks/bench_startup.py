"""What a user waits for before anything happens: the import, and a cold `drivetrain devices`.

Median of interleaved rounds, each in a new process; the interpreter's own start is measured in
the same rounds and taken off the import's time.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = 11
IMPORT_LIMIT_MS = 100.0
DEVICES_LIMIT_MS = 1000.0
CASES = {
    "python": ["-c", "pass"],
    "import": ["-c", "import drivetrain"],
    "devices": ["-m", "drivetrain.cli.main", "devices", "--json"],
}


def once(arguments: list[str]) -> float:
    """Milliseconds of one run, with an empty state folder: nothing is cached from before."""
    with tempfile.TemporaryDirectory() as home:
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            env={"DRIVETRAIN_HOME": home, "PATH": "/usr/bin:/bin", "HOME": home},
        )
        return (time.perf_counter() - start) * 1e3


def main() -> int:
    times: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS):
        for name, arguments in CASES.items():
            times[name].append(once(arguments))
    median = {name: statistics.median(values) for name, values in times.items()}
    imported = median["import"] - median["python"]
    print(f"the import          {imported:7.1f} ms  (limit {IMPORT_LIMIT_MS:.0f})")
    print(f"devices --json cold {median['devices']:7.1f} ms  (limit {DEVICES_LIMIT_MS:.0f})")
    return int(imported > IMPORT_LIMIT_MS or median["devices"] > DEVICES_LIMIT_MS)


if __name__ == "__main__":
    sys.exit(main())

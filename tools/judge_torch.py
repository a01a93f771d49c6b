"""torch's own suites against the custom device: op_db, module_db, optim_db of the installed torch.

    make judge-torch                                            all of it
    python tools/judge_torch.py [--every N] [--only GROUP] [--memory shared|visible|opaque]

An entry counts when it passes on the CPU of this machine; an expected failure counts as failed.
``tools/judge/expected.json`` lists those: one that passes, or an unlisted failure, ends the run
with 1, as does, in a run of all, a rate below its limit. The last line is all rates.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EXPECTED = HERE / "judge" / "expected.json"
LIMITS = {
    "op_db float32 forward": 99.5,
    "op_db float32 backward": 99.5,
    "op_db bfloat16 forward": 98.0,
    "op_db float16 forward": 98.0,
    "op_db int64 forward": 98.0,
    "op_db bool forward": 98.0,
    "module_db": 97.0,
    "optim_db": 100.0,
}
"""Of each group, the least percentage."""
PROCESSES = 2
MEMORIES = ("shared", "visible", "opaque", "wrong")
"""Chips of the tests; ``wrong`` must not pass."""
SILENCE_S = 600
"""A process that says nothing for so long is ended, and its entry has failed."""


@dataclass
class Tally:
    """What is known of one sort of memory."""

    memory: str
    passed: Counter[str] = field(default_factory=Counter)
    failed: dict[str, str] = field(default_factory=dict)
    """``group/name`` -> why."""
    seen: set[str] = field(default_factory=set)

    def note(self, line: dict[str, Any]) -> None:
        key = f"{line['group']}/{line['name']}"
        if line["state"] == "passed":
            self.passed[line["group"]] += 1
            self.seen.add(key)
        elif line["state"] == "failed":
            self.failed[key] = str(line["why"])
            self.seen.add(key)

    def rates(self) -> dict[str, tuple[int, int, float]]:
        """group -> passed, counted, percent."""
        lost = Counter(key.split("/")[0] for key in self.failed)
        found = {}
        for group in LIMITS:
            total = self.passed[group] + lost[group]
            if total:
                passed = self.passed[group]
                found[group] = (passed, total, 100 * passed / total)
        return found


def run_share(tally: Tally, lock: threading.Lock, share: int, asked: argparse.Namespace) -> None:
    """One share, in a process that is started anew behind an entry that ends it."""
    start = 0
    while True:
        words = [sys.executable, str(HERE / "judge" / "worker.py"), tally.memory, asked.shim]
        words += [str(share), str(asked.processes), str(start), asked.only, str(asked.every)]
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert process.stdout is not None
        current: dict[str, Any] = {}
        watch = threading.Timer(SILENCE_S, process.kill)
        watch.start()
        for text in process.stdout:
            if not text.startswith('{"'):
                continue
            watch.cancel()
            watch = threading.Timer(SILENCE_S, process.kill)
            watch.start()
            current = json.loads(text)
            if current["state"] == "end":
                break
            with lock:
                tally.note(current)
        watch.cancel()
        process.wait()
        if current.get("state") == "end":
            return
        if not current:
            raise SystemExit(f"a judge's process ended with {process.returncode} before it began")
        how = f"the process ended with {process.returncode}"
        with lock:
            if current["state"] == "begins":
                tally.note({**current, "state": "failed", "why": how})
        start = int(current["number"]) + 1


def judge(memory: str, asked: argparse.Namespace) -> Tally:
    tally, lock = Tally(memory), threading.Lock()
    threads = [
        threading.Thread(target=run_share, args=(tally, lock, share, asked))
        for share in range(asked.processes)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def expected() -> dict[str, str]:
    """``group/name`` -> why it fails; for every sort of memory."""
    found: dict[str, str] = json.loads(EXPECTED.read_text(encoding="utf-8"))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--memory", action="append", choices=MEMORIES)
    parser.add_argument("--only", default="", help="a beginning of a group, or GROUP/NAME,...")
    parser.add_argument("--every", type=int, default=1, help="only each Nth entry")
    parser.add_argument("--shim", default="off", choices=("off", "auto", "require"))
    parser.add_argument("--processes", type=int, default=PROCESSES)
    asked = parser.parse_args()
    right, words = True, []
    listed = expected()
    for memory in asked.memory or ("shared", "opaque"):
        tally = judge(memory, asked)
        for key, why in sorted(tally.failed.items()):
            known = key in listed
            right = right and known
            print(f"{memory}: {'expected' if known else 'FAILED'} {key}: {listed.get(key, why)}")
        for key in sorted(listed.keys() & tally.seen - tally.failed.keys()):
            right = False
            print(f"{memory}: PASSED although expected to fail: {key}; take it off the list")
        for group, (passed, total, percent) in tally.rates().items():
            enough = percent >= LIMITS[group] or asked.every > 1 or "/" in asked.only
            right = right and enough
            words.append(
                f"{memory} {group} {passed}/{total} {percent:.2f}%{'' if enough else ' LOW'}"
            )
    if not words:
        print("no entry was run", file=sys.stderr)
        return 2
    print("; ".join(words))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

"""One process of the judge: registers a device, runs its share, writes a line an entry."""

from __future__ import annotations

import json
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "pytorch" / "custom")]

import torch  # noqa: E402

ENTRY_LIMIT_S = 60
"""Of processor time: a busy machine fails no entry."""


class TooLong(Exception):
    """An entry took more than its time."""


def _ring(*_: Any) -> None:
    raise TooLong(f"more than {ENTRY_LIMIT_S} s")


def main(
    memory: str, shim: str, share: int, shares: int, start: int, only: str, every: int
) -> None:
    """``share`` of ``shares``, from its entry number ``start`` on; ``only`` is a beginning of the
    group, or ``group/name`` of single entries; of those, each of number ``every``."""
    from chips import CHIPS

    from drivetrain.pytorch.custom import Config, register_custom_device

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    handle = register_custom_device(
        CHIPS[memory]("npu", count=1), Config(shim=shim, fallback="allow")
    )
    from tools.judge.entries import NotOnCpu, entries

    chosen = [e for e in entries() if wanted(memory, e.group, e.name, only)]
    chosen = chosen[::every][share::shares]
    signal.signal(signal.SIGPROF, _ring)
    for number, entry in enumerate(chosen[start:], start):
        say(number=number, group=entry.group, name=entry.name, state="begins")
        began = time.monotonic()
        signal.setitimer(signal.ITIMER_PROF, ENTRY_LIMIT_S)
        try:
            entry.run(str(handle.device))
            state, why = "passed", ""
        except NotOnCpu as error:
            state, why = "not on cpu", str(error)
        except (Exception, TooLong) as error:
            lines = str(error).strip().splitlines() or [""]
            state, why = "failed", f"{type(error).__name__}: {' '.join(lines)[:300]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = round(time.monotonic() - began, 3)
        say(number=number, group=entry.group, name=entry.name, state=state, why=why, s=seconds)
    say(state="end", total=len(chosen))


def wanted(memory: str, group: str, name: str, only: str) -> bool:
    if memory == "opaque" and group.startswith("op_db") and "float32" not in group:
        return False
    if "/" in only:
        return f"{group}/{name}" in only.split(",")
    return group.startswith(only)


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(given[0], given[1], int(given[2]), int(given[3]), int(given[4]), given[5], int(given[6]))

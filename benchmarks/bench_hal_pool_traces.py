"""How much more than was asked for the pool reserves, on traces recorded from three models.

start: an empty pool; end: the whole trace replayed; the value is (reserved - requested) / requested
at the peak, in percent; peer: torch's caching allocator, on a GPU the real one, elsewhere its rules
(benchmarks/hal/traces.py); floor: nothing but what was asked for. Counts, so one round is all.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import Gate, Report  # noqa: E402
from benchmarks.hal.traces import (  # noqa: E402
    NAMES,
    Allocator,
    Ours,
    RealTorch,
    TorchRules,
    load,
    waste,
)

POINTS = 5.0


def main() -> int:
    import torch

    from drivetrain import hal
    from drivetrain.errors import Unsupported
    from drivetrain.hal.native_pool import NativePool

    gpu = torch.cuda.is_available()
    device = hal.device("cuda:0" if gpu else "cpu:0")
    report = Report(f"pool on recorded traces, {device.address}")
    print(f"peer: torch's allocator, {'itself' if gpu else 'its rules'}; device {device.address}")
    for name in NAMES:
        trace = load(name)
        peer: Allocator = RealTorch() if gpu else TorchRules()
        theirs = 100 * waste(trace, peer)
        if gpu:
            rules = 100 * waste(trace, TorchRules())
            print(f"  control   {name}: torch {theirs:.2f} %, its rules {rules:.2f} %")
        del peer
        streams: list[object] = [device.stream() for _ in range(2)]
        pools: dict[str, object] = {"Pool": hal.Pool(hal.DriverMemory(device))}
        try:
            pools["NativePool"] = NativePool(device)
        except Unsupported as why:
            print(f"  no NativePool on {device.address}: {why}")
        for kind, pool in pools.items():
            ours = 100 * waste(trace, Ours(pool, streams))
            detail = f"ours {ours:.2f} %, torch {theirs:.2f} % of what was asked for"
            gate = Gate(f"{name}, {kind} - torch", ours - theirs, POINTS, "points", detail=detail)
            report.add(gate)
            pool.trim()  # type: ignore[attr-defined]
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

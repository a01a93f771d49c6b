"""What torch on a custom device costs more than torch on the CPU, in pure Python and with the C++
shim.

The device is a host-visible chip without kernels of its own: each operation is the CPU's, and the
way there and back is measured. Start: before a block of calls; end: after it; peer and floor:
the same calls on the CPU, interleaved in the same process, on one thread. A process registers one
device, so each of the two is a process; the shim is built first where it is not.

    python -m benchmarks custom_device
    python benchmarks/bench_custom_device.py [--quick] [--json] [--shim off|require]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.common import ROUNDS, Gate, Report, spread
from drivetrain.errors import Unsupported
from drivetrain.pytorch.custom import Config, Handle, register_custom_device

LIMITS = {"16x16 add": (11.0, 8.5), "view": (3.5, 3.5), "MLP step": (4.5, 4.5)}
"""Most times the CPU's: in pure Python, and with the C++ shim."""


class Chip:
    """Host-visible, on Drivetrain's memory."""

    name, host_visible = "bench_chip", True

    def device_count(self) -> int:
        return 1

    def synchronize(self, index: int) -> None:
        pass


def cases(device: str) -> dict[str, tuple[Callable[[], object], int]]:
    """name -> what is called, and how often in one block."""
    torch.manual_seed(0)
    x, y = (torch.randn(16, 16).to(device) for _ in range(2))
    batch, target = torch.randn(64, 128).to(device), torch.randn(64, 32).to(device)
    model = torch.nn.Sequential(
        torch.nn.Linear(128, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 32),
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def add() -> object:
        return x + y

    def view() -> object:
        return x.view(256)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(model(batch), target).backward()
        optimizer.step()

    return {"16x16 add": (add, 1000), "view": (view, 2000), "MLP step": (step, 30)}


def seconds(call: Callable[[], object], times: int) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times


def measure(handle: Handle, report: Report, rounds: int) -> None:
    here, there = cases("cpu"), cases(str(handle.device))
    how = " with the shim" if handle.shim else ""
    for name, limits in LIMITS.items():
        cpu, device = [], []
        times = here[name][1]
        for number in range(rounds + 1):
            with torch.set_grad_enabled(name == "MLP step"):
                pair = seconds(here[name][0], times), seconds(there[name][0], times)
            if number:  # the first round warms up
                cpu.append(pair[0])
                device.append(pair[1])
        ratio = statistics.median(b / a for a, b in zip(cpu, device, strict=True))
        limit = limits[handle.shim]
        report.add(
            Gate(
                f"custom device{how}, {name}",
                ratio,
                limit,
                "x the CPU",
                spread=spread(cpu),
                room=limit - 1,
                detail=f"{statistics.median(device) * 1e6:.1f} us, on the CPU "
                f"{statistics.median(cpu) * 1e6:.1f} us",
            )
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    parser.add_argument("--json", action="store_true", help="the gates as a last line")
    parser.add_argument("--shim", choices=("off", "require"), help="one of the two only")
    asked = parser.parse_args()
    if asked.shim is None:
        command = [sys.executable, __file__, *sys.argv[1:], "--shim"]
        return max(
            subprocess.run([*command, how], check=False).returncode for how in ("off", "require")
        )
    torch.set_num_threads(1)
    try:
        handle = register_custom_device(Chip(), Config(fallback="allow", shim=asked.shim))
    except Unsupported as error:
        print(f"  not measured: {error}")
        return 0
    report = Report("custom_device")
    print(f"  {handle!r}", flush=True)
    measure(handle, report, 5 if asked.quick else 2 * ROUNDS + 1)
    return report.finish()


if __name__ == "__main__":
    sys.exit(main())

"""What each device of this machine does, and what the abstraction over it costs.

    python3 benchmarks/hardware_abstraction_benchmark.py --quick
    python3 benchmarks/hardware_abstraction_benchmark.py --output hal_results.json

For every usable device that takes kernels, through one interface: a float32 product (GFLOP/s), a
copy within its memory (GB/s, each byte counted once) and the launch of a small kernel
(microseconds); where this process's torch has the device too, torch's own product in the same
rounds. Then what choosing a device takes. Numbers are medians of interleaved rounds; each product
is checked against numpy first.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LARGEST = 1 << 30
TOLERANCE = 1e-3
"""Relative, of a float32 product of numbers around 1."""


def needs_the_environment() -> None:
    """Go on in the project's .venv where this interpreter has no Drivetrain."""
    try:
        import drivetrain  # noqa: F401
    except ImportError:
        python = ROOT / ".venv" / "bin" / "python"
        if not python.exists() or os.environ.get("VIRTUAL_ENV") == str(ROOT / ".venv"):
            sys.exit("drivetrain is not installed for this interpreter: run `make setup` first")
        os.environ["VIRTUAL_ENV"] = str(ROOT / ".venv")
        os.execv(python, [str(python), *sys.argv])


def rounds_of(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round; the calls of one round follow each other."""
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(call())
    return found


def timed(work: Callable[[], Any], wait: Callable[[], Any], repeats: int) -> Callable[[], float]:
    """A call that does ``work`` so often, waits for its end, and gives the seconds of one."""

    def call() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        wait()
        return (time.perf_counter() - start) / repeats

    return call


def measure_device(spec: Any, n: int, nbytes: int, rounds: int) -> dict[str, Any]:
    """Measurements of one device (`DeviceSpec`), as plain values."""
    import numpy as np

    from drivetrain import hal

    device = spec.device
    stream = device.stream()
    a, b = (hal.ops.random.normal((n, n), seed=s, stream=stream) for s in (1, 2))
    product = hal.ops.matmul(a, b, stream=stream).numpy()
    expected = a.numpy().astype(np.float64) @ b.numpy().astype(np.float64)
    error = float(np.abs(product - expected).max() / np.abs(expected).max())
    if not error < TOLERANCE:
        sys.exit(f"{spec}: a product of {n} is wrong by {error:.2g}, so its time is worth nothing")
    nbytes = min(nbytes, device.memory().free_bytes // 8)
    source, target = (device.alloc(nbytes, stream=stream) for _ in range(2))
    source.fill(b"\x5a", stream=stream)
    kernel = device.compile(
        hal.Source.cuda('extern "C" __global__ void nothing(int *x) { if (x == 0) return; }')
    ).kernel("nothing", args=[hal.PTR])
    launch = kernel.plan(stream, 1, 32, source)
    repeats = max(1, int(2e8 // (2 * n**3)))
    calls = {
        "matmul": timed(lambda: hal.ops.matmul(a, b, stream=stream), stream.synchronize, repeats),
        "copy": timed(lambda: target.copy_from(source, stream=stream), stream.synchronize, 2),
        "launch": timed(launch, stream.synchronize, 200),
        **_torch_product(spec, n, repeats),
    }
    seconds = rounds_of(calls, rounds)
    for buffer in (source, target):
        buffer.close()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    found = {
        "address": spec.address,
        "name": spec.capabilities.device_name,
        "vendor": str(spec.vendor),
        "matmul_n": n,
        "matmul_gflops": 2 * n**3 / median["matmul"] / 1e9,
        "matmul_error": error,
        "matmul_with": hal.ops.matmul_backend(device),
        "copy_bytes": nbytes,
        "copy_gbps": nbytes / median["copy"] / 1e9,
        "launch_us": median["launch"] * 1e6,
        "seconds": seconds,
    }
    if "torch" in median:
        found["torch_device"] = spec.torch_device
        found["torch_gflops"] = 2 * n**3 / median["torch"] / 1e9
    return found


def _torch_product(spec: Any, n: int, repeats: int) -> dict[str, Callable[[], float]]:
    """torch's product on the same device; nothing where this torch does not have it."""
    if not spec.torch_device:
        return {}
    import torch

    try:
        a, b = (torch.randn(n, n, device=spec.torch_device) for _ in range(2))
    except (RuntimeError, AssertionError):
        return {}  # the machine has the device, this build of torch does not
    own = spec.torch_device != "cpu"
    wait = torch.accelerator.synchronize if own else (lambda: None)
    return {"torch": timed(lambda: torch.matmul(a, b), wait, repeats)}


def measure_choosing(rounds: int) -> dict[str, float]:
    """Milliseconds of the calls that choose a device; the first one finds them."""
    from kernel_pytorch.distributed_scale import HardwareAdapter

    def milliseconds(work: Callable[[], Any]) -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3

    adapter = HardwareAdapter(enable_hal=True)
    first = milliseconds(adapter.get_cross_vendor_capabilities)
    calls = {
        "capabilities_ms": adapter.get_cross_vendor_capabilities,
        "choose_ms": lambda: adapter.get_optimal_device_hal(memory_requirement_gb=1),
    }
    again = {
        name: statistics.median(milliseconds(call) for _ in range(rounds))
        for name, call in calls.items()
    }
    return {"first_look_ms": first, **again}


def measure(quick: bool, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Everything, as JSON; ``say`` gets a line for each device."""
    from kernel_pytorch.hardware_abstraction.hal_core import devices

    n, nbytes, rounds = (256, 16 << 20, 5) if quick else (1024, 256 << 20, 9)
    choosing = measure_choosing(rounds)
    found, left_out = [], []
    for spec in devices():
        if "compute" not in spec.device.capabilities.groups:
            left_out.append({"address": spec.address, "reason": "it takes no kernels of the HAL"})
            continue
        if spec.vendor not in ("cpu",) and not quick:
            n, nbytes = 4096, LARGEST
        result = measure_device(spec, n, nbytes, rounds)
        found.append(result)
        say(line_of(result))
    for each in left_out:
        say(f"{each['address']:12} not measured: {each['reason']}")
    return {
        "machine": _machine(),
        "quick": quick,
        "rounds": rounds,
        "choosing": choosing,
        "devices": found,
        "left_out": left_out,
    }


def line_of(result: dict[str, Any]) -> str:
    with_what = result["matmul_with"].partition(" (")[0]
    torch = f", torch {result['torch_gflops']:.4g}" if "torch_gflops" in result else ""
    return (
        f"{result['address']:12} {result['name'][:28]:28} matmul {result['matmul_gflops']:.4g} "
        f"GFLOP/s ({with_what}{torch}), copy {result['copy_gbps']:.3g} GB/s, "
        f"launch {result['launch_us']:.3g} us"
    )


def _machine() -> dict[str, Any]:
    from drivetrain import __version__

    return {
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        "drivetrain": __version__,
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--output", metavar="FILE", type=Path, help="write everything as JSON")
    given = parser.parse_args()
    if given.output is not None and not given.output.absolute().parent.is_dir():
        parser.error(f"there is no folder {given.output.absolute().parent} to write into")
    warnings.simplefilter("ignore", DeprecationWarning)
    results = measure(given.quick)
    choosing = results["choosing"]
    print(
        f"choosing a device: first look {choosing['first_look_ms']:.3g} ms, then "
        f"{choosing['choose_ms']:.3g} ms; capabilities of all {choosing['capabilities_ms']:.3g} ms"
    )
    if given.output is not None:
        given.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(f"written: {given.output}")
    return 0


if __name__ == "__main__":
    needs_the_environment()
    sys.exit(main())

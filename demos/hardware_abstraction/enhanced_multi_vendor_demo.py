"""A mesh over unlike devices, placement of workloads, performance, and live capabilities.

python3 demos/hardware_abstraction/enhanced_multi_vendor_demo.py --quick
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.hardware_abstraction_benchmark import (
    line_of,
    measure_device,
    needs_the_environment,
)

WORKLOADS = (
    ("a small model's inference", {"memory_requirement_gb": 0.5}),
    ("fine-tuning", {"memory_requirement_gb": 4, "compute_requirement_tflops": 0.05}),
    (
        "training, NVIDIA or AMD if there is one",
        {"memory_requirement_gb": 8, "preferred_vendors": ["nvidia", "amd", "intel"]},
    ),
    ("training in 20 TFLOPS", {"memory_requirement_gb": 8, "compute_requirement_tflops": 20}),
    ("a model of 100 TB", {"memory_requirement_gb": 100_000}),
)


def mesh(specs: list[Any]) -> None:
    """One rank for each device, whoever made it."""
    from kernel_pytorch.hardware_abstraction.mesh import mesh_over

    made = mesh_over(specs, len(specs))
    for rank, spec in enumerate(made.ranks):
        print(f"  rank {rank}: {spec}")
    print(f"  vendors {made.vendors}, collectives that all of them have: {made.backend}")


def placement(quick: bool) -> None:
    """Which device each workload gets; then each part of a model."""
    from kernel_pytorch.distributed_scale import HardwareAdapter
    from kernel_pytorch.hardware_abstraction import HardwarePluginManager
    from kernel_pytorch.hardware_abstraction.plugin_system import Work

    adapter = HardwareAdapter(enable_hal=True)
    for what, needs in WORKLOADS:
        chosen = adapter.get_optimal_device_hal(**needs)
        print(f"  {what}: {chosen or 'nothing here fits'}")
    width, batch = (256, 32) if quick else (2048, 512)
    numbers = batch * width
    layers = [
        Work("embed", 2.0 * numbers * width, 4 * numbers),
        Work("attention", 8.0 * numbers * width, 4 * numbers, ("embed",)),
        Work("mlp", 16.0 * numbers * width, 4 * numbers, ("attention",)),
        Work("head", 2.0 * numbers * 10, 4 * batch * 10, ("mlp",)),
    ]
    plan = HardwarePluginManager().create_execution_plan(layers)
    parts = ", ".join(f"{step.name} on {step.address}" for step in plan.steps)
    print(f"  a model in parts: {parts}")
    for assumption in plan.assumed:
        print(f"    assumed: {assumption} (`drivetrain calibrate` measures)")


def performance(specs: list[Any], quick: bool) -> list[dict[str, Any]]:
    """Measured now, on each device, each product checked."""
    n, nbytes, rounds = (256, 16 << 20, 3) if quick else (1024, 256 << 20, 9)
    results = []
    for spec in specs:
        if "compute" in spec.device.capabilities.groups:
            results.append(measure_device(spec, n, nbytes, rounds))
            print(f"  {line_of(results[-1])}")
    best = max(results, key=lambda result: result["matmul_gflops"], default=None)
    if best is not None and len(results) > 1:
        for result in results:
            share = result["matmul_gflops"] / best["matmul_gflops"]
            print(f"    {result['address']}: {share:.2f} of the fastest ({best['address']})")
    return results


def live(specs: list[Any], seconds: float) -> None:
    """Sensors of each device while it works."""
    from drivetrain import hal

    for spec in specs:
        if "compute" not in spec.device.capabilities.groups:
            continue
        stop = threading.Event()

        def work(spec: Any = spec, stop: threading.Event = stop) -> None:
            stream = spec.device.stream()
            a = hal.ops.random.normal((256, 256), seed=1, stream=stream)
            while not stop.is_set():
                hal.ops.matmul(a, a, stream=stream)
                stream.synchronize()

        worker = threading.Thread(target=work)
        worker.start()
        readings = []
        try:
            for _ in range(3):
                time.sleep(seconds / 3)
                readings.append(spec.device.telemetry())
        finally:
            stop.set()
            worker.join()
        last = readings[-1]
        busy = [f"{r.utilisation:.0%}" for r in readings if r.utilisation is not None]
        facts = [f"busy {' '.join(busy) or 'unknown'}"]
        facts += [f"{spec.device.memory().free_bytes / 1e9:.1f} GB free"]
        facts += [f"{last.power_w:.0f} W"] if last.power_w is not None else []
        facts += [f"{last.temperature_c:.0f} C"] if last.temperature_c is not None else []
        told = spec.capabilities
        rate = "unknown" if told.compute_tflops is None else f"{told.compute_tflops:.3g}"
        print(f"  {spec.address:12} {', '.join(facts)}; health {last.health}")
        print(
            f"    {rate} TFLOPS ({told.compute_basis}), types {', '.join(told.precisions)}, "
            f"matrix units {'yes' if told.supports_tensor_core else 'none known'}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore", DeprecationWarning)
    from kernel_pytorch.hardware_abstraction.hal_core import devices

    specs = list(devices())
    print("Cross-vendor device mesh")
    mesh(specs)
    print("Intelligent workload placement")
    placement(quick)
    print("Performance comparison")
    performance(specs, quick)
    print("Real-time capability analysis")
    live(specs, 0.6 if quick else 3.0)
    return 0


if __name__ == "__main__":
    needs_the_environment()
    sys.exit(main())

"""Every vendor's devices through one interface: found, opened, given a kernel, copied between.

python3 demos/hardware_abstraction/multi_vendor_demo.py --quick
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.hardware_abstraction_benchmark import needs_the_environment

SAXPY = """
extern "C" __global__ void saxpy(float a, const float *x, float *y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = a * x[i] + y[i];
}
"""


def vendors() -> list[Any]:
    """Each vendor's adapter with what it finds; the usable devices."""
    from kernel_pytorch.hardware_abstraction import vendor_adapters as adapters

    found = []
    for kind in (
        adapters.NVIDIAAdapter,
        adapters.AMDAdapter,
        adapters.IntelAdapter,
        adapters.CPUAdapter,
        adapters.CustomASICAdapter,
    ):
        adapter = kind()
        devices = adapter.discover_devices()
        backend = adapter.create_communication_backend()
        state = "" if backend.available else " (not in this torch)"
        there = ", ".join(map(str, devices)) or "no device here"
        print(f"  {adapter.vendor:12} {there}; collectives: {backend}{state}")
        found += [adapter.initialize_device(index) for index in range(len(devices))]
    print(f"  best here: {adapters.auto_detect_best_adapter()!r}")
    return found


def one_kernel_everywhere(specs: list[Any], n: int) -> None:
    """The same CUDA C source on each device, its result checked."""
    import numpy as np

    from drivetrain import hal

    x = np.arange(n, dtype=np.float32)
    for spec in specs:
        if "compute" not in spec.device.capabilities.groups:
            print(f"  {spec.address:12} takes no kernels")
            continue
        stream, y = spec.device.stream(), np.ones(n, dtype=np.float32)
        saxpy = spec.device.compile(hal.Source.cuda(SAXPY)).kernel(
            "saxpy", args=[hal.F32, hal.PTR, hal.PTR, hal.I32]
        )
        with (
            spec.device.alloc(x.nbytes, stream=stream) as on_x,
            spec.device.alloc(y.nbytes, stream=stream) as on_y,
        ):
            on_x.copy_from(x, stream=stream)
            on_y.copy_from(y, stream=stream)
            saxpy(stream, (n + 255) // 256, 256, 2.0, on_x, on_y, n)
            on_y.copy_to(y, stream=stream)
            stream.synchronize()
        if not (y == 2 * x + 1).all():
            sys.exit(f"{spec}: the kernel's result is wrong")
        print(f"  {spec.address:12} 2x + 1 over {n} numbers: equal to numpy's")


def around_the_machine(specs: list[Any], n: int) -> None:
    """The same bytes from device to device, and back."""
    import numpy as np

    from drivetrain import hal

    first = np.random.default_rng(0).random(n, dtype=np.float32)
    array = hal.ops.asarray(first, device=specs[0].device)
    way = [specs[0].address]
    for spec in [*specs[1:], specs[0]]:
        array = array.to(spec.device)
        way.append(spec.address)
    if not (array.numpy() == first).all():
        sys.exit(f"the bytes changed on the way {' -> '.join(way)}")
    print(f"  {' -> '.join(way)}: the same {array.numpy().nbytes} bytes")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore", DeprecationWarning)
    n = 10_000 if quick else 10_000_000
    print("Vendors and their devices")
    specs = vendors()
    print("One kernel source on every device")
    one_kernel_everywhere(specs, n)
    print("Memory from device to device")
    around_the_machine(specs, n)
    return 0


if __name__ == "__main__":
    needs_the_environment()
    sys.exit(main())

"""Choosing devices under the guide's names: what fits, what is preferred, what is refused."""

from __future__ import annotations

import subprocess
import sys

from .conftest import LIMIT, Script

pytestmark = LIMIT

QUICK_START = """
    from kernel_pytorch.distributed_scale import HardwareAdapter

    # Enable HAL for multi-vendor support
    adapter = HardwareAdapter(enable_hal=True)

    # Check if HAL is available
    if adapter.is_hal_enabled():
        print("✅ Multi-vendor hardware support enabled")
    else:
        print("⚠️ Running in legacy mode")

    # Automatically select best hardware across vendors
    optimal_device = adapter.get_optimal_device_hal(
        memory_requirement_gb=8,
        compute_requirement_tflops=20,
        preferred_vendors=['nvidia', 'amd', 'intel']
    )

    if optimal_device:
        print(f"Selected: {optimal_device.vendor} - {optimal_device.capabilities.device_name}")

    # Get comprehensive hardware information
    capabilities = adapter.get_cross_vendor_capabilities()

    print(f"Total devices: {capabilities['cross_vendor_devices']}")
    print(f"Vendor distribution: {capabilities['vendor_distribution']}")
    print(f"Available memory: {capabilities['available_memory_gb']} GB")

    # Legacy code still works
    adapter = HardwareAdapter()  # HAL disabled by default in legacy usage
    devices = adapter.get_optimal_device_placement(memory_gb=8, compute_tflops=10)

    from kernel_pytorch.hardware_abstraction.vendor_adapters import auto_detect_best_adapter

    # Automatically detect best available hardware
    best_adapter = auto_detect_best_adapter()
    devices = best_adapter.discover_devices()
    print([str(device) for device in devices])
"""

SELECTION = """
    import kernel_pytorch.distributed_scale as home
    from drivetrain import hal
    from drivetrain.errors import BadInput
    from kernel_pytorch.distributed_scale import hardware_adaptation, hardware_adapter
    from kernel_pytorch.hardware_abstraction import HardwareAbstractionLayer
    from kernel_pytorch.hardware_abstraction.hal_core import HardwareVendor

    assert hardware_adapter.HardwareAdapter is home.HardwareAdapter
    assert hardware_adaptation.HardwareAdapter is home.HardwareAdapter
    assert [v.name for v in HardwareVendor] == "NVIDIA AMD INTEL CPU CUSTOM_ASIC UNKNOWN".split()

    adapter = home.HardwareAdapter(enable_hal=True)
    best = adapter.get_optimal_device_hal(memory_requirement_gb=0.001)
    assert hal.device(best.address).name == best.capabilities.device_name

    # A preferred vendor goes first, one that is not there is passed over, order counts.
    offered = adapter.get_cross_vendor_capabilities()["devices"]
    there = {told.vendor for told in offered.values()}
    for wanted in (["cpu"], ["nvidia", "cpu"], ["intel", "CPU", "nvidia"]):
        found = adapter.get_optimal_device_hal(preferred_vendors=wanted)
        first = next(v.lower() for v in wanted if v.lower() in there)
        assert found.vendor == first, (wanted, found)
        assert found.address.startswith("cpu:") or first != "cpu"  # never PoCL, which nobody named

    # Nothing has so much memory, no processor computes so much.
    assert adapter.get_optimal_device_hal(memory_requirement_gb=1e6) is None
    assert adapter.get_optimal_device_hal(compute_requirement_tflops=1e8) is None or any(
        told.ceiling_tflops is None for told in offered.values()
    )
    processor = offered["cpu:0"]
    assert processor.vendor is HardwareVendor.CPU
    if processor.ceiling_tflops is not None:
        assert not processor.may_reach(2 * processor.ceiling_tflops)
        assert processor.may_reach(processor.ceiling_tflops / 2)

    told = adapter.get_cross_vendor_capabilities()
    listed = hal.devices()
    assert told["cross_vendor_devices"] == len(listed) == sum(told["vendor_distribution"].values())
    domains = {d.memory_domain: d.memory().total_bytes for d in listed}
    assert 0 < told["available_memory_gb"] <= sum(domains.values()) / 1e9  # shared memory once

    legacy = home.HardwareAdapter()
    assert not legacy.is_hal_enabled()
    assert legacy.get_optimal_device_placement(memory_gb=0.001)[-1] == "cpu"
    assert legacy.get_optimal_device_placement(memory_gb=1e6) == []
    assert isinstance(legacy.get_hal(), HardwareAbstractionLayer)

    def refused(call, *words):
        try:
            call()
        except BadInput as error:
            assert all(word in str(error) for word in words), error
        else:
            raise AssertionError("not refused")

    refused(legacy.get_cross_vendor_capabilities, "enable_hal=True")
    refused(lambda: adapter.get_optimal_device_hal(memory_requirement_gb=-1), "-1")
    refused(lambda: adapter.get_optimal_device_hal(memory_requirement_gb=float("nan")), "nan")
    best_of = adapter.get_optimal_device_hal
    refused(lambda: best_of(preferred_vendors=["nvidea"]), "nvidea", "nvidia")
    refused(lambda: best_of(preferred_vendors="nvidia"), "list")
    print("held")
"""


def test_the_quick_start_of_the_guide_runs_as_printed(script: Script) -> None:
    done = script(QUICK_START)
    lines = done.stdout.splitlines()
    assert lines[0] == "✅ Multi-vendor hardware support enabled"
    assert any(line.startswith("Total devices: ") for line in lines)
    assert "drivetrain.Runtime" in done.stderr  # the deprecation note names what to use
    assert "script.py:5:" in done.stderr
    assert done.stderr.count("kernel_pytorch.HardwareAdapter is kept") == 1


def test_what_fits_is_chosen_and_what_does_not_is_none(script: Script) -> None:
    assert script(SELECTION).stdout == "held\n"


def test_measured_rates_rule_out_a_device_and_let_another_through(script: Script) -> None:
    done = script(
        """
        from drivetrain import hal
        from drivetrain.placement import calibration
        from kernel_pytorch.distributed_scale import HardwareAdapter

        cpu = hal.device("cpu:0")
        adapter = HardwareAdapter(enable_hal=True)
        wanted = dict(compute_requirement_tflops=20, preferred_vendors=["cpu"])

        def measured(rate):
            facts = calibration.Calibration(
                cpu.uuid, cpu.info.driver_version, "", 0.0, {"float32": rate}
            )
            calibration.save(cpu, facts)
            return adapter.get_optimal_device_hal(**wanted)

        slow, after = measured(1e12), measured(3e13)
        assert slow is None or slow.address != "cpu:0"
        assert after.address == "cpu:0" and after.capabilities.compute_basis == "measured"
        wanted["compute_requirement_tflops"] = 31
        assert adapter.get_optimal_device_hal(**wanted) is None
        print("held")
        """,
        environment={"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.stdout == "held\n"


def test_importing_the_package_takes_neither_torch_nor_a_warning() -> None:
    code = (
        "import sys, kernel_pytorch, kernel_pytorch.distributed_scale, "
        "kernel_pytorch.hardware_abstraction as h; dir(h); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"

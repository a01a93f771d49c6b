"""The layer, the adapters, compiled kernels, meshes and plans of the published API."""

from __future__ import annotations

import os
from importlib.util import find_spec

from .conftest import LIMIT, Script

pytestmark = LIMIT

REFUSED = """
    from drivetrain.errors import BadInput, CompileError, DrivetrainError, Unsupported

    def refused(call, *words, kind=BadInput):
        try:
            call()
        except kind as error:
            assert all(word in str(error) for word in words), error
        else:
            raise AssertionError("not refused")
"""

LAYER = """
    import numpy as np
    from drivetrain import hal
    from kernel_pytorch.hardware_abstraction import HardwareAbstractionLayer

    text = '''
    extern "C" __global__ void twice(float *x, int n) {
        int i = blockIdx.x * blockDim.x + threadIdx.x;
        if (i < n) x[i] *= 2.0f;
    }
    '''
    layer = HardwareAbstractionLayer("cpu", "any", "1.0")
    assert layer.vendor == "cpu" and "cpu:0" in layer.capabilities
    assert layer.register_device_backend() == "cpu"

    def works(kernel, device):
        stream = device.stream()
        x = np.arange(100, dtype=np.float32)
        with device.alloc(x.nbytes, stream=stream) as buffer:
            buffer.copy_from(x, stream=stream)
            twice = kernel.load(device).kernel("twice", args=[hal.PTR, hal.I32])
            twice(stream, 2, 64, buffer, 100)
            buffer.copy_to(x, stream=stream)
            stream.synchronize()
        assert (x == 2 * np.arange(100)).all()

    for address in [d.address for d in hal.devices() if "compute" in d.capabilities.groups]:
        kernel = layer.compile_kernel(text, address)
        assert kernel.names == ("twice",) and kernel.code
        works(kernel, hal.device(address))
    works(layer.compile_kernel(text, "cpu"), hal.device("cpu:0"))

    # Without such a device: code for an NVIDIA GPU by NVRTC.
    foreign = HardwareAbstractionLayer("NVIDIA", "hopper", "550").compile_kernel(text, "sm_90")
    assert foreign.form in ("cubin", "ptx")
    refused(lambda: foreign.load("cpu:0"), "sm_90", "cpu:0")
    refused(lambda: layer.compile_kernel(text, "quantum"), "quantum", "write_a_driver")
    refused(lambda: layer.compile_kernel("", "cpu"), "empty")
    refused(lambda: layer.compile_kernel(text.replace("int i", "itn i"), "cpu"), kind=CompileError)
    refused(lambda: HardwareAbstractionLayer("nvidea"), "nvidea", "nvidia")

    # A mesh: processors take several ranks, accelerators one.
    mesh = layer.get_device_mesh(3)
    assert (mesh.world_size, mesh.shape, mesh.backend) == (3, (3,), "gloo")
    assert mesh.vendors == {"cpu": 3} and {r.torch_device for r in mesh.ranks} == {"cpu"}
    refused(mesh.to_torch, "init_process_group")
    for size in (0, -1, 1.5, True, 1 << 20):
        refused(lambda: layer.get_device_mesh(size), "world_size")
    absent = HardwareAbstractionLayer("intel", "arc", "")
    if not absent.devices:
        refused(lambda: absent.get_device_mesh(1), "no device")
        refused(absent.register_device_backend, "intel", kind=Unsupported)

    import torch.distributed as dist
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    refused(mesh.to_torch, "1 ranks")
    made = layer.get_device_mesh(1).to_torch()
    assert (made.device_type, made.size()) == ("cpu", 1)
    dist.destroy_process_group()
    print("held")
"""

ADAPTERS = """
    import torch
    import torch.distributed as dist
    from kernel_pytorch.hardware_abstraction import vendor_adapters as va
    from kernel_pytorch.hardware_abstraction.hal_core import HardwareVendor

    backends = {
        va.NVIDIAAdapter: "nccl", va.AMDAdapter: "nccl", va.IntelAdapter: "xccl",
        va.CPUAdapter: "gloo", va.CustomASICAdapter: "custom",
    }
    images, clips = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5, 6)
    for kind, name in backends.items():
        adapter = kind()
        assert isinstance(adapter, va.VendorAdapter)
        backend = adapter.create_communication_backend()
        assert backend == name and (backend.available or backend.reason)
        if not backend.available:
            refused(lambda: backend.init_process_group(rank=0), backend.reason, kind=Unsupported)
        for tensor in (images, clips, images[0].mT, torch.tensor(3.0), torch.eye(3).to_sparse()):
            better = adapter.optimize_memory_layout(tensor)
            assert better.shape == tensor.shape and better.dtype == tensor.dtype
            assert torch.equal(better.to_dense(), tensor.to_dense())
            assert adapter.optimize_memory_layout(better).layout == better.layout
        for spec in adapter.discover_devices():
            assert spec.vendor is adapter.vendor
        found = adapter.discover_devices()
        refused(lambda: adapter.initialize_device(len(found)), "no device")
        refused(lambda: adapter.initialize_device("0"), "number")
        if found:
            assert adapter.initialize_device(0).address == found[0].address
    nhwc = va.NVIDIAAdapter().optimize_memory_layout(images)
    assert nhwc.is_contiguous(memory_format=torch.channels_last)
    assert va.AMDAdapter().optimize_memory_layout(nhwc).is_contiguous()

    backend = va.CPUAdapter().create_communication_backend()
    backend.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    assert dist.get_backend() == "gloo"
    dist.destroy_process_group()

    best = va.auto_detect_best_adapter()
    assert best.discover_devices()
    if not torch.cuda.is_available() and not torch.xpu.is_available():
        assert isinstance(best, va.CPUAdapter)
    refused(lambda: va.VendorAdapter(), "abstract", kind=TypeError)
    print("held")
"""

SIMULATED = """
    from drivetrain import hal
    from kernel_pytorch.hardware_abstraction import CustomASICAdapter, HardwareAbstractionLayer
    from kernel_pytorch.hardware_abstraction import HardwarePluginManager
    from kernel_pytorch.hardware_abstraction.hal_core import HardwareVendor, spec_of

    chips = [d for d in hal.devices() if d.driver == "simulated"]
    if not chips:
        chips = list(hal.devices("simulated"))
    spec = spec_of(chips[0])
    assert spec.vendor is HardwareVendor.CUSTOM_ASIC and spec.torch_device == ""

    class Rack:
        name = "rack"
        def discover_devices(self):
            return [spec_of(chip) for chip in chips]

    manager = HardwarePluginManager()
    manager.register_plugin(Rack())
    assert {chip.address for chip in chips} <= set(manager.discover_capabilities())

    # The layer makes a HAL device a torch device, and from then on it is named as one.
    import warnings
    import torch
    warnings.simplefilter("ignore")
    layer = HardwareAbstractionLayer("cpu")
    layer.devices = tuple(spec_of(chip) for chip in chips[:1])
    name = layer.register_device_backend()
    assert torch.device(name).type != "cpu" and spec_of(chips[0]).torch_device == name
    assert spec_of(chips[1]).torch_device == ""
    x = torch.ones(3, device=name)
    assert (x + x).cpu().tolist() == [2.0] * 3
    print("held")
"""

PLANS = """
    import torch
    from kernel_pytorch.hardware_abstraction import CPUAdapter, HardwarePluginManager
    from kernel_pytorch.hardware_abstraction.hal_core import HardwareVendor
    from kernel_pytorch.hardware_abstraction.plugin_system import Work
    from kernel_pytorch.hardware_abstraction.planning import plan
    from dataclasses import replace

    manager = HardwarePluginManager()
    adapter = CPUAdapter()
    manager.register_plugin(adapter)
    manager.register_plugin(adapter)  # again: nothing
    assert list(manager.plugins.values()) == [adapter]
    refused(lambda: manager.register_plugin(CPUAdapter()), "CPUAdapter", "already")
    refused(lambda: manager.register_plugin(object()), "discover_devices")
    capabilities = manager.discover_capabilities()
    assert capabilities["cpu:0"].vendor is HardwareVendor.CPU

    net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
    made = manager.create_execution_plan(torch.export.export(net, (torch.randn(8, 64),)))
    assert [step.name for step in made.steps] == ["linear", "relu", "linear_1"]
    assert set(made.devices) <= set(capabilities) and made.estimated_s > 0 and made.assumed
    assert len(manager.create_execution_plan(net).steps) == 3
    refused(lambda: manager.create_execution_plan(3), "no computation")
    refused(lambda: manager.create_execution_plan([Work("b", after=("a",))]), "before")
    refused(lambda: manager.create_execution_plan([Work("a"), Work("a")]), "two nodes")
    refused(lambda: manager.create_execution_plan([Work("a", float("nan"))]), "nan")

    class Asks(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    refused(lambda: manager.create_execution_plan(Asks()), "torch.export")

    # A fast far device gets what is worth the copy, and only that.
    (near,) = [spec for spec in adapter.discover_devices() if spec.address == "cpu:0"]
    def like(address, tflops):
        told = replace(near.capabilities, compute_tflops=tflops)
        return replace(near, address=address, capabilities=told)
    slow, fast = like("slow:0", 0.001), like("fast:0", 10.0)
    work = [Work("large", 1e12, 4e3), Work("a", 1e6, 4e12, ("large",)), Work("b", 1e6, 1, ("a",))]
    made = plan(work, [slow, fast])
    assert made["large"] == "fast:0" and made["a"] == made["b"]
    assert any("GB/s" in what for what in made.assumed)

    # A measured link counts instead of the assumed one: so slow, nothing is sent over it.
    from drivetrain import hal
    from drivetrain.placement import calibration
    def far(spec, uuid):
        return replace(spec, device=replace(spec.device, uuid=uuid))
    slow, fast = far(slow, "CPU-slow"), far(fast, "CPU-fast")
    for one, other in ((slow, fast), (fast, slow)):
        links, version = {other.device.uuid: 1e-9}, one.device.info.driver_version
        facts = calibration.Calibration(one.device.uuid, version, "", 0.0, links=links)
        calibration.save(one.device, facts)
    made = plan(work, [slow, fast])
    assert made.devices == {"fast:0": 3} and not any("GB/s" in what for what in made.assumed)
    both = plan([Work(f"n{i}", 1e9, 1) for i in range(20000)], [slow, fast])
    assert both.devices["fast:0"] > 1000 * both.devices["slow:0"] > 0
    print("held")
"""

TRITON = '''
    from kernel_pytorch.hardware_abstraction import ProprietaryTritonBackend

    add = """
    import triton
    import triton.language as tl

    @triton.jit
    def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr = 256):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        m = i < n
        tl.store(out_ptr + i, tl.load(x_ptr + i, mask=m) + tl.load(y_ptr + i, mask=m), mask=m)
    """
    import sys, textwrap
    add = textwrap.dedent(add)
    twice = """extern "C" __global__ void twice(float *x) { x[threadIdx.x] *= 2; }"""
    backend = ProprietaryTritonBackend("sm_90", optimization_level=3)
    backend.register_kernel_variants({"triton": add, "plain": twice})
    backend.register_kernel_variants({"plain": twice})  # the same again
    assert backend.variant("plain").names == ("twice",)
    assert backend.variant("plain") is backend.variant("plain")
    refused(lambda: backend.register_kernel_variants({"plain": add}), "already")
    refused(lambda: backend.register_kernel_variants({"new": "x", "empty": ""}), "empty")
    assert "new" not in backend.variants
    refused(lambda: backend.variant("none"), "triton", "plain")
    refused(lambda: ProprietaryTritonBackend("abacus"), "abacus")
    refused(lambda: ProprietaryTritonBackend("sm_90", 7), "7")
    refused(lambda: backend.compile_triton_kernel("def f(: pass"), "line 1", kind=CompileError)
    refused(lambda: backend.compile_triton_kernel("x = 1"), "0 kernels")
    refused(lambda: backend.compile_triton_kernel(add.replace(" = 256", "")), "BLOCK", "constants=")
    refused(lambda: backend.compile_triton_kernel(add, signature={"z": "i32"}), "z")
    refused(lambda: backend.compile_triton_kernel(add, signature={"n": "int"}), "int")
    refused(lambda: ProprietaryTritonBackend("cpu").compile_triton_kernel(add), "cpu")
    if sys.argv[1:] == ["triton"]:
        for arch, form in (("sm_90", "cubin"), ("gfx942", "hsaco")):
            there = ProprietaryTritonBackend(arch)
            made = there.compile_triton_kernel(add, constants={"BLOCK": 64})
            assert (made.form, made.names) == (form, ("add",)) and made.code
        wrong = add.replace("tl.arange", "tl.aronge")
        refused(lambda: backend.compile_triton_kernel(wrong), "add:7", kind=CompileError)
    else:
        refused(lambda: backend.variant("triton"), "drivetrain[triton]", kind=Unsupported)
    print("held")
'''


def test_every_call_works_as_documented(script: Script) -> None:
    assert script(REFUSED + LAYER + ADAPTERS + PLANS).stdout == "held\n" * 3


def test_a_chip_of_another_driver_is_custom_hardware(script: Script) -> None:
    done = script(SIMULATED, environment={"DRIVETRAIN_SIMULATED": "count=2"})
    assert done.stdout == "held\n"


def test_triton_text_is_compiled_or_says_what_is_missing(script: Script) -> None:
    folder = os.environ.get("DRIVETRAIN_TEST_TRITON", "")
    there = bool(folder) or find_spec("triton") is not None
    more = {"PYTHONPATH": folder} if folder else {}
    done = script(REFUSED + TRITON, *(["triton"] if there else []), environment=more)
    assert done.stdout == "held\n"

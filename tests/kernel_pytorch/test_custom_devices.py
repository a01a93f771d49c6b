"""Custom devices and tuned models under the guide's names."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from drivetrain.hal.shared_library import INCLUDE

from .conftest import LIMIT, Script
from .test_abstraction import REFUSED

pytestmark = LIMIT

# As the guide prints it.
REGISTERED = """
    from kernel_pytorch.hardware_abstraction.privateuse1_integration import (
        register_custom_device, CustomDeviceBackend, PrivateUse1Config
    )
    from kernel_pytorch.hardware_abstraction.hal_core import HardwareVendor

    class MyCustomBackend(CustomDeviceBackend):
        def initialize_device(self, device_id: int) -> bool:
            # Custom device initialization logic
            return True

        def get_device_count(self) -> int:
            return 4  # Number of custom devices

        def get_device_properties(self, device_id: int):
            return {"name": f"MyASIC-{device_id}", "memory": 32768}

        def allocate_memory(self, size: int, device_id: int):
            # Custom memory allocation
            pass

        def copy_to_device(self, tensor, device_id: int):
            # Custom tensor transfer
            return tensor

    # Register custom hardware
    backend = MyCustomBackend("my_asic", HardwareVendor.CUSTOM_ASIC)
    config = PrivateUse1Config(
        device_name="my_asic",
        vendor=HardwareVendor.CUSTOM_ASIC,
        backend_library="libmyasic.so",
        enable_autograd=True,
        enable_compilation=True
    )
    success = register_custom_device(backend, config)
    print(f"Custom device registered: {success}")
"""

WORKS = """
    import warnings
    import torch
    warnings.simplefilter("ignore")

    assert success and success.devices == tuple(torch.device("my_asic", i) for i in range(4))
    assert success.device == torch.device("my_asic:0") and torch.my_asic.device_count() == 4
    assert register_custom_device(backend, config) is success
    for device in success.devices:
        told = torch.my_asic.get_device_properties(device.index)
        assert told.name == f"MyASIC-{device.index}" and told.total_memory == 32 << 30
        torch.manual_seed(0)
        model, x = torch.nn.Linear(8, 3), torch.randn(5, 8)
        model(x).square().sum().backward()
        expected = model.weight.grad.clone()
        model.zero_grad()
        model.to(device)
        model(x.to(device)).square().sum().backward()
        assert model.weight.grad.device == device
        assert torch.equal(model.weight.grad.cpu(), expected)
    assert success.fallbacks  # nobody gave a kernel

    compiled = torch.compile(lambda x: x * 2 + 1, backend="aot_eager")
    assert torch.equal(compiled(x.to(success.device)).cpu(), x * 2 + 1)

    other = MyCustomBackend("other", "custom_asic")
    refused(lambda: register_custom_device(other), "my_asic", "already")
    refused(lambda: register_custom_device(MyCustomBackend), "MyCustomBackend", "object")
    refused(lambda: register_custom_device(object()), "CustomDeviceBackend")
    refused(lambda: register_custom_device(other, {"device_name": "x"}), "PrivateUse1Config")
    print("held")
"""

OWN_MEMORY = """
    import torch
    from drivetrain.errors import HalError
    from kernel_pytorch.hardware_abstraction import (
        CustomASICAdapter, CustomDeviceBackend, PrivateUse1Config, register_custom_device
    )

    class Chip(CustomDeviceBackend):
        taken = given_back = waits = 0
        ready, count, properties, returned = True, 2, {"name": "Chip", "memory": 64}, None
        def initialize_device(self, device_id):
            return self.ready
        def get_device_count(self):
            return self.count
        def get_device_properties(self, device_id):
            return self.properties
        def allocate_memory(self, size, device_id):
            if self.returned is not None:
                return self.returned
            if size > 1 << 20:
                return None
            Chip.taken += 1
            return bytearray(size)
        def free_memory(self, what, device_id):
            assert isinstance(what, bytearray)
            Chip.given_back += 1
        def synchronize(self, device_id):
            Chip.waits += 1
        graphs = 0
        def compile_graph(self, gm, example_inputs):
            Chip.graphs += 1
            return gm.forward
        def kernels(self):
            def relu(x):
                out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
                return out.copy_(torch.where(x.cpu() > 0, x.cpu(), 7.0))  # a mark of its own
            return {"aten::relu": relu}

    def chip(**facts):
        made = Chip("chip")
        vars(made).update(facts)
        return made

    def registered(backend, name="chip", **more):
        return register_custom_device(backend, PrivateUse1Config(name, **more))

    # What cannot be is refused before torch is touched, so that the next call works.
    for name in ("chip0", "Chip", "cuda", "my-chip", "", 3):
        refused(lambda: registered(chip(), name), str(name))
    refused(lambda: registered(chip(), vendor="acme"), "acme", "custom_asic")
    refused(lambda: registered(chip(count=0)), "get_device_count", "0")
    refused(lambda: registered(chip(count="2")), "get_device_count")
    refused(lambda: registered(chip(properties=None)), "get_device_properties")
    refused(lambda: registered(chip(properties={"name": "x", "memory": -1})), "memory")
    refused(lambda: registered(chip(returned=4096)), "host_visible")
    refused(lambda: registered(chip(returned=b"12345678")), "read-only")
    refused(lambda: registered(chip(returned=object())), "no memory")
    refused(lambda: registered(chip(copy_to_device=lambda t, i: None)), "copy_to_device")
    refused(lambda: registered(chip(ready=False)), "initialize_device(0)", kind=HalError)
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"

    import warnings
    warnings.simplefilter("ignore")
    found = registered(chip())
    assert found.device.type == "chip" and len(found.devices) == 2
    x = torch.tensor([-1.0, 2.0])
    assert torch.relu(x.to("chip:1")).cpu().tolist() == [7.0, 2.0]
    def plus(x):
        return torch.sub(x, -1.0)
    assert torch.compile(plus, backend="chip")(x.to("chip")).cpu().tolist() == [0.0, 3.0]
    assert Chip.graphs == 1
    taken = Chip.taken
    y = torch.ones(1000, device="chip")
    assert Chip.taken == taken + 1 and y.data_ptr() % 64 == 0
    before = Chip.given_back
    view = y[10:]
    del y
    assert Chip.given_back == before and view.sum().item() == 990
    del view
    assert Chip.given_back > before
    refused(lambda: torch.empty(1 << 20, device="chip"), "no", kind=MemoryError)
    torch.chip.synchronize()
    assert Chip.waits
    adapter = CustomASICAdapter()
    backend = adapter.create_communication_backend()
    assert backend == "custom" and backend.available
    import torch.distributed as dist
    backend.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    ones = torch.ones(3, device="chip")
    dist.all_reduce(ones)
    assert dist.get_backend() == "chip_ccl" and ones.cpu().tolist() == [1.0] * 3
    dist.destroy_process_group()
    print("held")
"""

TUNED = """
    import torch
    from types import SimpleNamespace
    from kernel_pytorch.hardware_abstraction import CapabilityAwareOptimizer, HardwareVendor
    from kernel_pytorch.hardware_abstraction import HardwarePluginManager

    database = HardwarePluginManager().discover_capabilities()
    optimizer = CapabilityAwareOptimizer(database)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    net.eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = net(images)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    plain = SimpleNamespace(
        supports_tensor_core=False, supports_custom_kernels=False, supports_mixed_precision=False
    )
    import sys
    search = sys.argv[1:] == ["search"]
    more = {"skip": [] if search else ["*"], "seconds": 20, "cache": False}
    lazy = optimizer.optimize_for_hardware(net, plain, **more)
    assert lazy.report is None and {"compile-*", "bf16-*", "fp16-*", "tf32"} <= set(lazy.skip)
    with torch.no_grad():
        found = lazy(images)
    assert lazy.report is not None and lazy.device == torch.device("cpu")
    tried = {trial.step for trial in lazy.report.trials}
    left_out = ("compile", "bf16", "fp16")
    assert bool(tried) == search and not any(name.startswith(left_out) for name in tried)
    assert (found - expected).norm() <= 1e-2 * expected.norm()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())

    for target in ("cpu:0", "cpu", HardwareVendor.CPU, torch.device("cpu"), database["cpu:0"]):
        made = optimizer.optimize_for_hardware(net, target)
        assert made.device == torch.device("cpu")
        assert ("compile-*" in made.skip) == (not database["cpu:0"].supports_custom_kernels)
    net.train()
    training = optimizer.optimize_for_hardware(net, "cpu:0")
    training(images)
    assert training.report is None  # nothing is tuned while it trains
    refused(lambda: optimizer.optimize_for_hardware(net, "abacus:0"), "abacus")
    refused(lambda: optimizer.optimize_for_hardware(net, 3), "int")
    refused(lambda: optimizer.optimize_for_hardware(print, "cpu"), "Module")
    refused(lambda: CapabilityAwareOptimizer(3), "int")
    if not torch.xpu.is_available():
        refused(lambda: optimizer.optimize_for_hardware(net, "intel"), "intel")
    print("held")
"""


def test_the_custom_device_of_the_guide_runs_as_printed_and_its_four_devices_work(
    script: Script,
) -> None:
    done = script(REFUSED + REGISTERED + WORKS)
    first, last = done.stdout.splitlines()
    assert first.startswith("Custom device registered: True")
    assert last == "held"
    assert "RuntimeWarning: the backend library libmyasic.so cannot be loaded" in done.stderr
    assert "drivetrain.pytorch.custom.register_custom_device" in done.stderr


def test_memory_of_the_backends_own_is_used_and_given_back(script: Script) -> None:
    assert script(REFUSED + OWN_MEMORY).stdout == "held\n"


def test_a_model_goes_to_its_target_with_the_steps_that_the_capabilities_allow(
    script: Script,
) -> None:
    assert script(REFUSED + TUNED).stdout == "held\n"


@pytest.mark.soak
def test_a_model_is_tuned_by_a_search(script: Script) -> None:
    assert script(REFUSED + TUNED, "search").stdout == "held\n"


LIBRARY = """
    import sys, warnings
    import torch
    from drivetrain.errors import HalError
    from drivetrain.pytorch import devices
    from kernel_pytorch.hardware_abstraction.privateuse1_integration import (
        register_custom_device, CustomDeviceBackend, PrivateUse1Config
    )
    warnings.simplefilter("ignore")
    whole, broken = sys.argv[1:]

    class Chip(CustomDeviceBackend):
        def allocate_memory(self, size, device_id):
            raise AssertionError("the library has the memory")
        def kernels(self):
            def sin(x):  # a mark of its own: this one is the backend's
                return torch.full(x.shape, 7.0).to(x.device)
            return {"aten::sin": sin}

    chip = Chip("chip")
    refused(lambda: register_custom_device(chip, PrivateUse1Config("chip", backend_library=broken)),
            "takes version 1", kind=HalError)
    found = register_custom_device(chip, PrivateUse1Config("chip", backend_library=whole))
    assert found.device == torch.device("chip:0") and found.library is not None
    told = torch.chip.get_device_properties(0)
    assert told.address == "tinychip:0" and told.total_memory > 0, told
    here = devices.hal_device("chip:0")
    assert here.driver == "tinychip" and here.memory().free_bytes > 0
    assert here.telemetry().health == "ok", here.telemetry()
    torch.manual_seed(0)
    model, x = torch.nn.Linear(8, 3), torch.randn(5, 8)
    expected = model(x)
    there = model.to("chip")(x.to("chip"))
    assert there.device == found.device and torch.allclose(there.cpu(), expected, atol=1e-6)
    assert torch.equal(x.to("chip").cpu(), x)
    assert x.to("chip").sin().tolist() == [[7.0] * 8] * 5
    print("held")
"""


def test_a_backend_library_that_exports_the_table_is_the_driver(
    script: Script, tmp_path: Path
) -> None:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    text = (Path(__file__).parents[2] / "examples/driver_template/c/tinychip.c").read_text()
    libraries = []
    for name, code in (("whole", text), ("broken", text.replace(".version = 1,", ".version = 9,"))):
        source, library = tmp_path / f"{name}.c", tmp_path / f"lib{name}.so"
        source.write_text(code)
        flags = ["-shared", "-fPIC", "-std=gnu11", "-O1", "-pthread", "-I", INCLUDE]
        subprocess.run(["cc", *flags, "-o", str(library), str(source)], check=True)
        libraries.append(str(library))
    done = script(REFUSED + LIBRARY, *libraries)
    assert done.stdout.endswith("held\n")

"""Devices of the HAL as torch devices: their memory, their names on both sides."""

from __future__ import annotations

from collections.abc import Callable

import pytest

SCRIPT = """
from drivetrain import hal
from drivetrain.pytorch import devices

assert devices.torch_device("cpu:0") == torch.device("cpu") and devices.adopted() == ""
raises(Unsupported, "register_custom_device('simulated:0')",
       lambda: devices.torch_device("simulated:0"))
raises(BadInput, "no device of the HAL", lambda: devices.hal_device("meta"))
raises(BadInput, "one driver", lambda: register_custom_device(["simulated:0", "cpu:0"]))
x = torch.arange(4.0)
buffer = devices.as_buffer(x)
assert buffer.ptr == x.data_ptr() and buffer.nbytes == 16
with hal.device("cpu:0").stream() as stream:
    buffer.fill(bytes(4), stream=stream)
    stream.synchronize()
assert x.tolist() == [0] * 4
assert devices.as_tensor(buffer, torch.float32).data_ptr() == x.data_ptr()
raises(BadInput, "contiguous", lambda: devices.as_buffer(torch.ones(2, 3).t()))

h = register_custom_device(["simulated:0", "simulated:1"], Config(fallback="allow", shim=SHIM))
assert h.name == "simulated" and len(h.devices) == 2
assert devices.torch_device("simulated:1") == torch.device("simulated:1")
assert devices.hal_device("simulated:1").address == "simulated:1"
assert devices.accelerator() == h.device
y = torch.arange(4, dtype=torch.int32, device="simulated:1")
buffer = devices.as_buffer(y[1:])
assert buffer.device.address == "simulated:1" and buffer.nbytes == 12
buffer.fill((7).to_bytes(4, "little"), stream=devices.as_stream("simulated:1"))
assert y.tolist() == [0, 7, 7, 7]
assert y.to("simulated:0").to("cpu").tolist() == [0, 7, 7, 7]
raises(BadInput, "as_buffer", lambda: devices.as_tensor(buffer))
raises(RuntimeError, "same device", lambda: y + torch.ones(4, device="simulated:0"))

# Backward on the second device, also without the C++ shim.
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
ours = copy.deepcopy(model).to("simulated:1")
x = torch.randn(5, 4)
model(x).sum().backward()
ours(x.to("simulated:1")).sum().backward()
assert ours[0].weight.grad.device.index == 1
assert torch.allclose(ours[0].weight.grad.cpu(), model[0].weight.grad, atol=1e-6)
free, total = torch.simulated.mem_get_info(0)
assert 0 < free <= total == 64 << 20
assert torch.accelerator.get_memory_info(0)[1] == total
error = raises(OutOfMemory, "", lambda: torch.empty(1 << 30, device="simulated:0"))
with torch.simulated.device(1):
    assert torch.ones(1, device="simulated").device.index == 1
print("end")
"""


def test_a_device_of_the_hal_is_a_device_of_torch(run: Callable[..., str]) -> None:
    assert "end" in run(SCRIPT, DRIVETRAIN_SIMULATED="count=2 memory=64M")


@pytest.mark.soak
def test_a_device_of_the_hal_is_the_same_with_the_shim(with_shim: Callable[..., str]) -> None:
    assert "end" in with_shim(SCRIPT, DRIVETRAIN_SIMULATED="count=2 memory=64M")

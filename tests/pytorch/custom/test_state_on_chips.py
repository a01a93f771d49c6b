"""The state's image on custom devices: its bytes and hashes are those of the same on the CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest

SCRIPT = """
import ctypes
from drivetrain.hal.bytes import CHUNK_BYTES
from drivetrain.pytorch.hashing import ImagePlan

torch.manual_seed(0)
sizes = (100, CHUNK_BYTES + 70001, 0, 64, 4 * CHUNK_BYTES)
here = [torch.randint(256, (n,), dtype=torch.uint8) for n in sizes]
there = [t.to(device) for t in here]
wide = torch.cat([torch.zeros(7, dtype=torch.uint8), here[1]]).to(device)
there[1] = wide[7:]  # one that does not begin at a multiple of 4
ours, theirs = ImagePlan(here), ImagePlan(there)
wanted = ours.hashes()
assert theirs.hashes() == wanted and len(wanted) == 6
out = bytearray(theirs.nbytes)
address = ctypes.addressof(ctypes.c_char.from_buffer(out))
parts = theirs.read_into(address, 0, theirs.nbytes)
sums = [0] * 6
for chunk, part in parts:
    sums[chunk] = (sums[chunk] + part) % 2**64
assert sums == wanted
assert bytes(out[:100]) == bytes(here[0].tolist())
there[0].zero_()
assert ImagePlan(there).hashes() != wanted  # the control
again = ImagePlan(there)
again.write_from(address, 0, again.nbytes)
assert there[0].cpu().tolist() == here[0].tolist() and ImagePlan(there).hashes() == wanted
print("end")
"""


@pytest.mark.parametrize(
    "memory",
    [
        "shared",
        pytest.param("visible", marks=pytest.mark.soak),
        pytest.param("opaque", marks=pytest.mark.soak),
    ],
)
def test_the_image_of_a_chips_tensors(run: Callable[..., str], memory: str) -> None:
    assert "end" in run(f"device = register({memory!r}).device\n" + SCRIPT)


@pytest.mark.soak
def test_the_image_on_a_device_of_the_hal(run: Callable[..., str]) -> None:
    begin = 'device = register_custom_device("simulated:0", Config(fallback="error")).device\n'
    assert "end" in run(begin + SCRIPT, DRIVETRAIN_SIMULATED="count=1 memory=64M")


STATE = """
from drivetrain import hal
from drivetrain.errors import CannotCarry
from drivetrain.pytorch import devices
from drivetrain.pytorch.place import place
from drivetrain.pytorch.state import TrainingState
from drivetrain.training.step import StepGuard

assert devices.use("cpu:0") == torch.device("cpu") and registered() is None
device = devices.use("simulated:0")
assert devices.use("simulated:0") == device == devices.torch_device(str(device))
assert register_custom_device(hal.device("simulated:0")) is registered()
model = nn.Linear(4, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
place(model, device)
assert optimizer.param_groups[0]["params"][0] is model.weight and model.weight.device == device

def draw():
    return torch.rand(8, device=device).cpu().tolist() + torch.rand(8).tolist()

state = TrainingState({"main": model}, {"main": optimizer}, device=device)
tree = state.tree()
first, second = draw(), draw()
state.restore_rng(tree)
assert draw() == first != second

# A host without the chip carries its numbers on, and its own are seeded from the state there.
host = TrainingState({"main": nn.Linear(4, 2)}, device="cpu")
host.restore_rng(tree)
state.restore_rng(host.tree())
assert draw() == first
guard = StepGuard([model], device)
guard.remember(gradients=False)
before = draw()
assert guard.put_back() and draw() == before

extra = {"mask": torch.eye(3).to_sparse().to(device)}
raises(CannotCarry, "extra.mask",
       lambda: TrainingState({"main": model}, extra=extra, device=device).capture())
print("end")
"""


@pytest.mark.soak
def test_a_chips_random_numbers_are_carried_and_what_cannot_be_is_named(
    run: Callable[..., str],
) -> None:
    assert "end" in run(STATE, DRIVETRAIN_SIMULATED="count=1 memory=64M")

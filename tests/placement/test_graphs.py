"""An exported program on two devices of one process, in a process of its own: a device is
registered with torch for good."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

pytest.importorskip("torch")

SCRIPT = """
import torch
from drivetrain import hal
from drivetrain.errors import BadInput, PlacementError
from drivetrain.placement.graphs import plan_program
from drivetrain.pytorch.custom import Config, register_custom_device

there = hal.devices("opencl")[0].address

def refused(kind, call, *words):
    try:
        call()
    except kind as error:
        assert all(word in str(error) for word in words), error
        return
    raise AssertionError(f"not refused: {words}")

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)
).eval()
x = torch.randn(4, 16)
with torch.no_grad():
    expected = model(x)
program = torch.export.export(model, (x,))

# torch has no such device yet: the only candidate is refused with what to do.
refused(PlacementError, lambda: plan_program(program, [there]), "float32", "register_custom_device")
handle = register_custom_device(there, Config(fallback="error", shim="off"))

one = plan_program(program, ["cpu:0"])
assert {step.address for step in one.plan.steps} == {"cpu:0"}
assert torch.equal(one.run(x), expected)

names = [step.operation.name for step in one.plan.steps]
last = [name for name in names if "addmm" in name][-1]
cut = names.index(last)
where = {name: there if index >= cut else "cpu:0" for index, name in enumerate(names)}
split = plan_program(program, ["cpu:0", there], on=where)
assert {split[name] for name in names} == {"cpu:0", there}, str(split)
assert split.plan.moved_bytes["cpu:0", there] > 0
for _ in range(2):  # weights are there the second time
    found = split.run(x)
    assert torch.allclose(found, expected, atol=1e-6), (found - expected).abs().max()
assert not torch.allclose(split.run(x + 1), expected, atol=1e-6)
whole = plan_program(program, [there])
assert torch.allclose(whole.run(x), expected, atol=1e-6)
every = plan_program(program, ["cpu:0", there], on=dict.fromkeys(names, there))
assert torch.equal(whole.run(x), every.run(x))
assert "peak on" in str(split) and "wait" in str(split)

# Weights and live values count: a device without room for the weights is not taken.
weights = sum(each.nbytes for each in model.parameters())
assert max(whole.plan.peak_bytes.values()) > weights
tight = {there: weights}
refused(PlacementError, lambda: plan_program(program, [there], memory=tight), "do not fit")
small = plan_program(program, [there, "cpu:0"], memory={there: 64})
assert {step.address for step in small.plan.steps} == {"cpu:0"}

# An operation that the device has no kernel for goes elsewhere, and is named where there is none.
class Odd(torch.nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x * 2)
odd = torch.export.export(Odd(), (x,))
refused(PlacementError, lambda: plan_program(odd, [there]), "no kernel for aten::special_bessel_j0",
        "special_bessel_j0 (float32)")
assert torch.allclose(plan_program(odd, [there, "cpu:0"]).run(x), Odd()(x), atol=1e-6)

class Counts(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("n", torch.zeros(1))
    def forward(self, x):
        self.n += 1
        return x + self.n
refused(BadInput, lambda: plan_program(torch.export.export(Counts(), (x,))), "changes n")
refused(BadInput, lambda: plan_program(model), "example_inputs")
refused(BadInput, lambda: one.run(x, x), "exported with")
refused(BadInput, lambda: one.run(x[:1]), "another size")
refused(BadInput, lambda: plan_program(program, on={"nothing": "cpu:0"}), "nothing")
print("end")
"""


def test_a_program_runs_on_two_devices_with_the_result_of_one(tmp_path: Path) -> None:
    from drivetrain import hal

    if not hal.devices("opencl") or importlib.util.find_spec("tree_sitter_cuda") is None:
        pytest.skip("needs an OpenCL device and drivetrain[kernels]")
    done = subprocess.run(
        [sys.executable, "-c", dedent(SCRIPT)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        cwd=tmp_path,
        env={**os.environ, "DRIVETRAIN_HOME": str(tmp_path / "home")},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.endswith("end\n")

"""A small network, trained with ``hal.ops`` alone: the same weights wherever it ran."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.hal import ops, registry

np = pytest.importorskip("numpy")
pytest.importorskip("sklearn")
pytest.importorskip("tree_sitter_cuda")

EXAMPLE = Path(__file__).parents[2] / "examples" / "hal_digits.py"
STEPS = 100
SAME = 1e-5


def _example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hal_digits", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


network = _example()


def trained(*addresses: str, steps: int = STEPS, seed: int = 0, batch: int = 400) -> list[Any]:
    """The weights after ``steps``, shared equally by the devices in their order."""
    device = hal.device(addresses[0])
    w, data = network.weights(device, seed), network.data(device)
    for at, address in enumerate(addresses):
        device = hal.device(address)
        w, (images, digits) = [x.to(device) for x in w], [x.to(device) for x in data]
        for _ in range(steps * (at + 1) // len(addresses) - steps * at // len(addresses)):
            network.step(w, images[:batch], digits[:batch])
    assert all(each.device == device for each in w)
    return [each.numpy() for each in w]


def apart(a: list[Any], b: list[Any]) -> float:
    return max(float(abs(x - y).max()) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def wanted() -> list[Any]:
    return trained("cpu:0")


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=1")
    registry.refresh()
    return "simulated:0"


def opencl() -> str:
    found = hal.devices("opencl")
    if not found:
        pytest.skip("there is no OpenCL device here")
    return found[0].address


def test_the_network_learns(wanted: list[Any]) -> None:
    device = hal.device("cpu:0")
    w = [ops.asarray(each, device=device) for each in wanted]
    images, digits = network.data(device)
    told = ops.argmax(network.forward(w, images[1400:])[1], axis=1)
    right = ops.mean(ops.astype(told == digits[1400:], "float32"))
    assert right.item() > 0.8


def test_numpy_in_double_precision_gives_the_same_weights(wanted: list[Any]) -> None:
    """The gradients are right: written once more, for numpy, and once by differences."""
    start = [each.numpy().astype(np.float64) for each in network.weights(hal.device("cpu:0"))]
    images, digits = (each.numpy()[:400] for each in network.data(hal.device("cpu:0")))
    images, one = images.astype(np.float64), np.eye(10)[digits]

    def loss(w: list[Any]) -> float:
        logits = np.tanh(images @ w[0] + w[1]) @ w[2] + w[3]
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return float(-(one * logs).sum() / len(images))

    w = [each.copy() for each in start]
    for at in range(STEPS):
        hidden = np.tanh(images @ w[0] + w[1])
        logits = hidden @ w[2] + w[3]
        chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        outer = (chances - one) / len(images)
        inner = outer @ w[2].T * (1 - hidden**2)
        gradients = [images.T @ inner, inner.sum(0), hidden.T @ outer, outer.sum(0)]
        if at == 0:
            for which, index in ((0, (20, 3)), (1, (5,)), (2, (7, 2)), (3, (4,))):
                near = [each.copy() for each in w]
                near[which][index] += 1e-6
                slope = (loss(near) - loss(w)) / 1e-6
                assert abs(slope - gradients[which][index]) < 1e-5
        w = [each - 0.5 * gradient for each, gradient in zip(w, gradients, strict=True)]
    assert apart(wanted, w) < SAME


@pytest.mark.parametrize("where", ["opencl", "simulated"])
def test_another_driver_gives_the_same_weights(
    where: str, wanted: list[Any], request: pytest.FixtureRequest
) -> None:
    address = opencl() if where == "opencl" else request.getfixturevalue("simulated")
    assert apart(trained(address), wanted) < SAME


def test_a_move_in_the_middle_changes_nothing(wanted: list[Any], simulated: str) -> None:
    assert apart(trained("cpu:0", simulated, "cpu:0"), wanted) < SAME


def test_a_move_to_opencl_and_back_changes_nothing(wanted: list[Any]) -> None:
    assert apart(trained("cpu:0", opencl(), "cpu:0"), wanted) < SAME


def test_another_seed_and_a_wrong_gradient_are_seen(
    wanted: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert apart(trained("cpu:0", seed=1), wanted) > 100 * SAME
    assert apart(trained("cpu:0", steps=STEPS - 1), wanted) > SAME
    tanh = ops.tanh
    monkeypatch.setattr(ops, "tanh", lambda x: tanh(x) * 1.001)  # its slope is no longer 1 - h * h
    assert apart(trained("cpu:0"), wanted) > SAME


PRINTED = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("test_digits_network", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from drivetrain.hal.opened import opened
from drivetrain import hal
found = module.trained("cpu:0", steps=5)
native = opened(hal.device("cpu:0")).backend.native
print(json.dumps([native, module.ops.matmul_backend("cpu:0"),
                  [each.tolist() for each in found]]))
"""


def test_the_twin_and_our_own_products_give_the_same_weights() -> None:
    import json

    wanted = trained("cpu:0", steps=5)
    for setting in ({"DRIVETRAIN_NATIVE": "0"}, {"DRIVETRAIN_BLAS": "own"}):
        done = subprocess.run(
            [sys.executable, "-c", PRINTED, __file__],
            env={**os.environ, **setting},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        native, backend, found = json.loads(done.stdout.splitlines()[-1])
        assert native == ("DRIVETRAIN_NATIVE" not in setting)
        assert backend.startswith("own")
        assert apart([np.asarray(each) for each in found], wanted) < SAME

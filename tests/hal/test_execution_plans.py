"""Plans over capabilities: a chain over a CUDA device (a fake libcuda, which runs kernels of its
own on the host), OpenCL and the processor, in one process."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import BadInput, PlacementError
from drivetrain.placement.capabilities import CapabilityMatrix
from drivetrain.placement.execution import Operation, copy, kernel, plan

COUNT = 1 << 16
TEXT = """
extern "C" __global__ void twice(const int *x, int *y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = 2 * x[i] + 1;
}
"""


def twice(name: str, read: str, write: str, *, on: str = "", **more: Any) -> Operation:
    return kernel(
        name,
        hal.Source.cuda(TEXT),
        "twice",
        [hal.PTR, hal.PTR, hal.I32],
        [read, write, COUNT],
        grid=COUNT // 64,
        block=64,
        writes={write: 4 * COUNT},
        dtype="int32",
        **{"flops": 2.0 * COUNT, "on": on, **more},
    )


@pytest.fixture
def kernels() -> None:
    if importlib.util.find_spec("tree_sitter_cuda") is None:
        pytest.skip("kernels in CUDA C for other devices need drivetrain[kernels]")


def opencl_or_skip() -> hal.Device:
    found = hal.devices("opencl")
    if not found:
        pytest.skip("there is no OpenCL device")
    return found[0]


@pytest.fixture
def opencl() -> None:
    """Its name tells ``rig_of`` to leave the driver on."""


def test_a_value_goes_round_cuda_opencl_and_the_cpu_and_comes_back_the_same(
    opencl: None, rig_of: Callable[[str], Any]
) -> None:
    cuda = rig_of("cuda").device
    others = [opencl_or_skip(), *(hal.devices("sycl")[:1] if "sycl" in hal.drivers() else ())]
    devices = [cuda, *others, hal.device("cpu:0")]
    data = hashlib.shake_128(b"round").digest(4 * COUNT)
    stations = [*(each.address for each in devices), cuda.address]
    if os.environ.get("DRIVETRAIN_SYCL_LIBRARY"):  # make test-vendors
        assert "sycl:0" in stations
    chain = [
        copy(f"to {i}", f"v{i}", f"v{i + 1}", len(data), on=address)
        for i, address in enumerate(stations)
    ]
    made = plan(chain, devices, inputs={"v0": len(data)})
    assert [step.address for step in made.steps] == stations
    ways = [(move.source, move.target) for step in made.steps for move in step.moves]
    assert ways == list(zip(["host", *stations], stations, strict=False))
    assert set(made.moved_bytes.values()) == {len(data)}
    last = f"v{len(stations)}"
    back = made.run({"v0": data}, [last])[last]
    assert hashlib.sha256(back).digest() == hashlib.sha256(data).digest()
    other = bytes([data[0] ^ 1]) + data[1:]  # one bit more or less is another hash
    assert made.run({"v0": other}, [last])[last] != data


def test_a_chain_over_two_drivers_gives_what_one_device_gives(
    opencl: None, kernels: None, tmp_path: Path
) -> None:
    import numpy as np

    there = opencl_or_skip().address
    x = np.arange(COUNT, dtype=np.int32)
    expected = 8 * x + 7

    def result(*stations: str) -> np.ndarray:
        chain = [twice(f"k{i}", f"v{i}", f"v{i + 1}", on=at) for i, at in enumerate(stations)]
        made = plan(chain, ["cpu:0", there], inputs={"v0": x.nbytes})
        assert {step.address for step in made.steps} == set(stations)
        return np.frombuffer(made.run({"v0": x}, ["v3"])["v3"], np.int32)

    assert np.array_equal(result("cpu:0", "cpu:0", "cpu:0"), expected)
    assert np.array_equal(result("cpu:0", there, "cpu:0"), expected)
    assert np.array_equal(result(there, "cpu:0", there), expected)


def test_what_no_device_can_run_is_told_with_type_and_what_each_lacks(
    rig_of: Callable[[str], Any],
) -> None:
    rig = rig_of("cpu")
    devices = [rig.device, rig.other]
    graph = [Operation("fft", ("x",), (("y", 8),), ("compute", "tensor_cores"), "bfloat16")]
    with pytest.raises(PlacementError) as told:
        plan(graph, devices, inputs={"x": 8})
    assert "fft (bfloat16)" in str(told.value)
    assert "cpu:0: it has no tensor_cores" in str(told.value)
    assert "cpu:1" in str(told.value)
    with pytest.raises(PlacementError, match="does not compute in float8"):
        plan([Operation("a", (), (("y", 8),), dtype="float8")], devices, inputs={})
    with pytest.raises(PlacementError, match="at most 1024 threads there, not 2048"):
        plan([Operation("k", (), (("y", 8),), threads=2048)], devices, inputs={})


def test_a_device_that_takes_binaries_only_gets_no_source(
    opencl: None, rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRIVETRAIN_OPENCL_BINARY_ONLY", "1")
    cpu, there = rig_of("cpu").device, opencl_or_skip()
    graph = [twice("k", "x", "y")]
    with pytest.raises(PlacementError, match=r"k \(int32\).*binaries only"):
        plan(graph, [there], inputs={"x": 4 * COUNT})
    made = plan(graph, [there, cpu], inputs={"x": 4 * COUNT})
    assert made["k"] == cpu.address
    assert "binaries only" in made.steps[0].reason
    hal.close_all()
    monkeypatch.delenv("DRIVETRAIN_OPENCL_BINARY_ONLY")
    assert plan(graph, [there], inputs={"x": 4 * COUNT})["k"] == there.address


def test_memory_counts_weights_and_live_values_and_nothing_else(
    rig_of: Callable[[str], Any],
) -> None:
    rig = rig_of("simulated")
    one, two = rig.device, rig.other
    inputs, size = {"x": 1000, "w": 4000}, 1000
    chain = [
        Operation("first", ("x", "w"), (("a", size),)),
        Operation("second", ("a", "w"), (("b", size),)),
        Operation("third", ("b", "w"), (("c", size),)),
    ]
    enough = 4000 + 2 * size  # the weight, what is read and what is written
    made = plan(chain, [one, two], inputs=inputs, weights=["w"], memory={one.address: enough})
    assert {step.address for step in made.steps} == {one.address}
    assert made.peak_bytes == {one.address: enough}
    tight = {one.address: enough - 1}
    made = plan(chain, [one, two], inputs=inputs, weights=["w"], memory=tight)
    assert {step.address for step in made.steps} == {two.address}
    assert "do not fit 5999" in made.steps[0].reason
    with pytest.raises(PlacementError, match=r"first.*do not fit"):
        plan(chain, [one], inputs=inputs, weights=["w"], memory=tight)
    # What is kept for the end is alive until then.
    with pytest.raises(PlacementError, match=r"third.*do not fit"):
        plan(
            chain, [one], inputs=inputs, weights=["w"], outputs=["a"], memory={one.address: enough}
        )


def test_a_plan_prints_device_terms_reason_and_moves_and_refuses_what_does_not_fit(
    rig_of: Callable[[str], Any],
) -> None:
    rig = rig_of("simulated")
    graph = [Operation("a", ("x",), (("y", 8),)), Operation("b", ("y",), (("z", 8),))]
    made = plan(graph, [rig.device, rig.other], inputs={"x": 8})
    text = str(made)
    assert f"a on {rig.device.address}: as soon as on {rig.other.address}" in text
    assert f"x: 8 bytes host -> {rig.device.address}, host" in text
    assert "compute" in text
    assert any("carries 10 GB/s" in each for each in made.assumed)
    assert made.as_json()["steps"][0]["moves"][0]["nbytes"] == 8
    assert made["b"] == made["a"]  # the value is there
    listed = plan(graph, inputs={"x": 8}).devices.values()
    assert not any(device.info.by_name_only for device in listed)
    for wrong, why in (
        ([graph[1]], "which nothing made yet"),
        ([graph[0], graph[0]], "two operations"),
        ([Operation("a", (), (("x", 8),))], "writes x again"),
        ([3], "no Operation"),
    ):
        with pytest.raises(BadInput, match=why):
            plan(wrong, [rig.device], inputs={"x": 8})  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="the plan is for 8"):
        made.run({"x": b"1"}, ["z"])
    with pytest.raises(BadInput, match="can only be planned"):
        made.run({"x": bytes(8)}, ["z"])


def test_the_matrix_has_every_device_and_the_reason_where_one_cannot_be_opened(
    rig_of: Callable[[str], Any], outside: Path
) -> None:
    from drivetrain.hal import registry

    rig = rig_of("cpu")
    registry.trust("alpha")
    matrix = CapabilityMatrix.of([rig.device, "alpha:0"])
    row = matrix["cpu:0"]
    assert "compute" in row.groups
    assert dict(row.dtypes)["float32"] == "native"
    assert row.limits is not None
    assert not row.lacks(needs=["compute"], dtype="float64")
    assert "serves PyTorch only" in matrix["alpha:0"].reason
    assert matrix.as_json()["devices"][0]["limits"]["threads"] == row.limits.threads
    with pytest.raises(BadInput, match="twice"):
        CapabilityMatrix.of(["cpu:0", "cpu:0"])


def test_the_matrix_is_a_table_and_json_on_the_command_line(
    rig_of: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from drivetrain.cli.main import main

    rig_of("cpu")
    with pytest.raises(SystemExit) as ended:
        main(["capabilities", "cpu:0", "--json"])
    assert ended.value.code == 0
    (told,) = json.loads(capsys.readouterr().out)["devices"]
    assert told["address"] == "cpu:0"
    assert told["dtypes"]["float64"] == "native"
    assert told["limits"]["threads"] > 0
    with pytest.raises(SystemExit):
        main(["capabilities"])
    assert "cpu:1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["capabilities", "cpu:9"])
    assert ended.value.code == 2

"""On traces of three models in training the pool wastes no more than torch's allocator would."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.hal import hot

ROOT = Path(__file__).parents[2]
POINTS = 0.05


@pytest.fixture(scope="module")
def traces() -> ModuleType:
    path = ROOT / "benchmarks" / "hal" / "traces.py"
    spec = importlib.util.spec_from_file_location("benchmarks_hal_traces", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["mlp", "cnn", "transformer"])
def trace(request: pytest.FixtureRequest, traces: ModuleType) -> Any:
    found = traces.load(request.param)
    assert len(found) > 1000
    assert traces.peak_requested(found) > 100 << 20
    return found


def test_the_pool_wastes_no_more_than_torch(
    traces: ModuleType, trace: Any, rig_of: Callable[[str], Any]
) -> None:
    device = rig_of("cpu").device
    pool = hal.Pool(hal.DriverMemory(device))
    ours = traces.waste(trace, traces.Ours(pool, [device.stream() for _ in range(2)]))
    assert ours <= traces.waste(trace, traces.TorchRules()) + POINTS
    assert pool.stats().live == 0
    pool.trim()
    assert pool.stats().reserved == 0


@pytest.mark.skipif(hot.BACKEND != "native", reason="the C code is not used")
def test_the_pool_in_c_wastes_no_more_than_torch(
    traces: ModuleType,
    trace: Any,
    rig_of: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from drivetrain.hal.native_pool import NativePool

    monkeypatch.setenv("FAKE_CUDA_MEMORY", str(4 << 30))
    device = rig_of("cuda").device
    with NativePool(device) as pool:
        ours = traces.waste(trace, traces.Ours(pool, [device.stream() for _ in range(2)]))
        assert ours <= traces.waste(trace, traces.TorchRules()) + POINTS


def test_the_control_memory_straight_from_a_driver_wastes_more(
    traces: ModuleType, trace: Any
) -> None:
    """A driver that gives whole pages of 2 MiB, and nobody who cuts them."""

    class Pages:
        def __init__(self) -> None:
            self.now = self.most = self.count = 0

        def allocate(self, nbytes: int, stream: int) -> int:
            self.now += -(-max(nbytes, 1) // (2 << 20)) * (2 << 20)
            self.most = max(self.most, self.now)
            self.count += 1
            return self.count

        def free(self, handle: int, nbytes: int, stream: int) -> None:
            self.now -= -(-max(nbytes, 1) // (2 << 20)) * (2 << 20)

        def peak_reserved(self) -> int:
            return self.most

    assert traces.waste(trace, Pages()) > traces.waste(trace, traces.TorchRules()) + POINTS

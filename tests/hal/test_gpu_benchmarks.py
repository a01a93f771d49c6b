"""The benchmarks' GPU parts run over the fake libcuda: their calls are right, their times mean
nothing."""

from __future__ import annotations

import ctypes
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from drivetrain import hal

ROOT = Path(__file__).resolve().parents[2]
SMALL = [hal.I32, hal.F32, hal.PTR, hal.PTR]
KERNELS: dict[str, list[hal.ArgType]] = {
    "add": [hal.PTR, hal.PTR, hal.I32],
    "spin": [hal.PTR, hal.I32],
    "stencil": [hal.I32, hal.I32, hal.PTR, hal.PTR],
    **dict.fromkeys(["scale", "shift", "bound", "mix"], SMALL),
}
WORDS = {hal.PTR: ".u64", hal.I32: ".u32", hal.F32: ".f32"}


def entry(name: str) -> str:
    """A kernel of that name, which does nothing."""
    told = ", ".join(f".param {WORDS[kind]} p{i}" for i, kind in enumerate(KERNELS[name]))
    return f".visible .entry {name}({told}) {{}}\n"


TEXT = ".version 6.4\n.target sm_50\n" + "".join(map(entry, KERNELS))
Modules = Callable[[str], ModuleType]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, rig_of: Any) -> Iterator[Modules]:
    """A benchmark's module, in a hurry, on two devices of the fake."""
    pytest.importorskip("torch")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    rig = rig_of("cuda")
    monkeypatch.setattr(sys, "argv", ["bench", "--quick"])
    monkeypatch.syspath_prepend(str(ROOT))
    real = hal.Device.compile

    def compile(self: hal.Device, source: hal.Source, **options: Any) -> hal.Module:
        if self.driver == "cuda":
            source = hal.Source.binary(TEXT.encode(), "ptx", KERNELS)
        return real(self, source, **options)

    def devices(driver: str | None = None, **_: Any) -> tuple[hal.Device, ...]:
        return (rig.device, rig.other) if driver in (None, "cuda") else ()

    monkeypatch.setattr(hal.Device, "compile", compile)
    monkeypatch.setattr(hal, "devices", devices)
    monkeypatch.setattr(ctypes, "CDLL", _loads(rig.fake, ctypes.CDLL))
    before = {name for name in sys.modules if name.startswith("benchmarks")}
    yield lambda name: importlib.import_module(f"benchmarks.{name}")
    for name in [name for name in sys.modules if name.startswith("benchmarks")]:
        if name not in before:
            del sys.modules[name]


def _loads(fake: Any, real: Any) -> Any:
    def load(name: Any, *arguments: Any, **options: Any) -> Any:
        return fake.library if name == "libcuda.so.1" else real(name, *arguments, **options)

    return load


def test_launches_events_memory_and_graphs(
    bench: Modules, capfd: pytest.CaptureFixture[str]
) -> None:
    module, common = bench("bench_hal_launch"), bench("hal.common")
    report = common.HalReport("hal_launch")
    module.on_cuda(hal.devices("cuda")[0], report)
    assert report.failed == []
    lines = {row["line"] for row in report.rows}
    assert {"C loop", "plan()", "kernel(...)", "stream.record()", "C record"} <= lines
    assert {"graph of 100 kernels", "C graph launch"} <= lines
    gates = {gate.name.partition(" ")[2] for gate in report.gates}
    assert {"plan() above the C loop", "graph of 100 kernels / C"} <= gates
    assert any(each.startswith("CuPy") for each in report.absent)  # named, not hidden
    assert "floor: C loop" in capfd.readouterr().out


def test_staged_and_peer_copies(bench: Modules) -> None:
    module, common = bench("bench_hal_copies"), bench("hal.common")
    report = common.HalReport("hal_copies")
    module.on_cuda(report)
    assert report.failed == []
    gates = {gate.name for gate in report.gates}
    assert "cuda:0 to cuda:1: staged copy's time over the slower leg's" in gates
    assert "cuda:0 to cuda:1: peer copy's time over cuMemcpyPeer in C" in gates


def test_whole_workloads(bench: Modules, monkeypatch: pytest.MonkeyPatch) -> None:
    module, common = bench("bench_hal_workloads"), bench("hal.common")
    monkeypatch.setattr(module.Workloads, "same", lambda *_: None)  # the fake's kernels do nothing
    report = common.HalReport("hal_workloads")
    work = module.Workloads(report, hal.devices("cuda")[0])
    report.part("stencil", work.stencil)
    report.part("pipeline", work.pipeline)
    assert report.failed == []
    wanted = {"stencil on cuda:0 / C", "pipeline of small kernels on cuda:0 / C"}
    assert {gate.name for gate in report.gates} == wanted

"""The cache of compiled kernels knows the translator, the compiler and the processor."""

from __future__ import annotations

import numpy as np

from drivetrain import hal
from drivetrain.hal.language import compiling
from drivetrain.hal.language.compilers import cxx

TEXT = "__global__ void k(int *p) { p[threadIdx.x] = threadIdx.x + %d; }"


def test_a_second_compilation_needs_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(tmp_path / "kernels"))
    device = hal.device("cpu:0")
    source = hal.Source.cuda(TEXT % 1)
    device.compile(source)
    builds = []
    monkeypatch.setattr(cxx, "build", lambda *given: builds.append(given))
    module = device.compile(source)
    assert not builds
    with device.stream() as stream, device.alloc(32, stream=stream) as buffer:
        out = np.zeros(8, np.int32)
        module.kernel("k")(stream, 1, 8, buffer)
        buffer.copy_to(memoryview(out).cast("B"), stream=stream)
        stream.synchronize()
    assert out.tolist() == list(range(1, 9))


def test_another_translator_or_compiler_compiles_anew(monkeypatch, tmp_path):
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(tmp_path / "kernels"))
    device = hal.device("cpu:0")
    source = hal.Source.cuda(TEXT % 2)
    build, count = cxx.build, []

    def counted(*given):
        count.append(1)
        return build(*given)

    monkeypatch.setattr(cxx, "build", counted)
    device.compile(source)
    device.compile(source)
    assert len(count) == 1
    monkeypatch.setattr(compiling, "_own_code", lambda: "another")
    device.compile(source)
    assert len(count) == 2
    monkeypatch.setattr(cxx, "_processor", lambda: "another")
    device.compile(source)
    assert len(count) == 3

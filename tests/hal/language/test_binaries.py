"""Binaries end to end on CUDA devices over a fake driver, which reads all that it is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import BadInput, CompileError
from drivetrain.hal.language.facts import Compiled, KernelFacts, Param

HEAD = ".version 6.4\n.target sm_50\n"
PTX = f"{HEAD}.visible .entry add(.param .u64 p, .param .u32 v) {{}}\n.entry nothing() {{}}\n"
WITH_SCRATCH = (
    f"{HEAD}.visible .entry add(.param .u64 p, .param .u32 v, .param .u64 g, .param .u64 s) {{}}\n"
)
TRITONS = KernelFacts(
    "add", (Param("ptr", 8, "p"), Param("i32", 4, "v")),
    block=(128, 1, 1), shared_bytes=4096, hidden=2,
)  # fmt: skip


def source(kernels: dict[str, Any], text: str = PTX) -> hal.Source:
    return hal.Source.binary(text.encode(), "ptx", kernels)


def test_ptx_runs_with_the_types_that_are_told(rig_of: Callable[[str], Any]) -> None:
    rig = rig_of("cuda")
    module = rig.device.compile(source({"add": [hal.PTR, hal.I32]}))
    assert module.names == ("add", "nothing")
    kernel = module.kernel("add")
    assert kernel.arguments == (hal.PTR, hal.I32)
    with rig.device.stream() as stream, rig.alloc(4, stream) as buffer:
        buffer.fill(b"\0", stream=stream)
        kernel(stream, 1, 1, buffer, 40)
        kernel.plan(stream, 1, 1, buffer, 2)()
        assert rig.number(buffer, stream) == 42


def test_ptx_without_types_takes_those_of_the_kernel(rig_of: Callable[[str], Any]) -> None:
    rig = rig_of("cuda")
    module = rig.device.compile(source({}))
    with pytest.raises(BadInput, match=r"add: this code does not tell its arguments; give args="):
        module.kernel("add")
    with pytest.raises(BadInput, match="no kernel 'absent'; there are add, nothing"):
        module.kernel("absent", [])
    with rig.device.stream() as stream, rig.alloc(4, stream) as buffer:
        buffer.fill(b"\0", stream=stream)
        module.kernel("add", [hal.PTR, hal.I32])(stream, 1, 1, buffer, 7)
        assert rig.number(buffer, stream) == 7


def test_what_does_not_fit_is_refused_before_a_launch(rig_of: Callable[[str], Any]) -> None:
    device = rig_of("cuda").device
    with pytest.raises(BadInput, match=r"add takes arguments of \[8, 4\] bytes"):
        device.compile(source({"add": [hal.PTR, hal.I64]}))
    with pytest.raises(BadInput, match=r"argument 1 \(arg1\): I64 was given, the source has i32"):
        device.compile(source({"add": [hal.PTR, hal.I32]})).kernel("add", [hal.PTR, hal.I64])
    with pytest.raises(BadInput, match="cuda loads ptx or cubin, not so"):
        device.compile(hal.Source.binary(b"\x7fELF", "so"))
    with pytest.raises(BadInput, match="'-I/etc' is not allowed"):
        device.compile(source({}), options=["-I/etc"])
    with pytest.raises(CompileError):
        device.compile(hal.Source.binary(b"\x7fELF no cubin", "cubin"))


def test_a_triton_kernel_gets_its_block_its_shared_memory_and_its_scratch(
    rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = rig_of("cuda")
    made = Compiled("ptx", WITH_SCRATCH.encode(), {"add": TRITONS})
    monkeypatch.setattr("drivetrain.hal.language.compile", lambda *_, **__: made)
    kernel = rig.device.compile(source({})).kernel("add")
    assert kernel.arguments == (hal.PTR, hal.I32)
    with rig.device.stream() as stream, rig.alloc(4, stream) as buffer:
        buffer.fill(b"\0", stream=stream)
        kernel(stream, (3, 2), None, buffer, 1)
        plan = kernel.plan(stream, 1, None, buffer, 10)
        plan()
        plan.set(1, 100)
        plan()
        assert rig.number(buffer, stream) == 111
        with stream.capture() as graph:
            kernel(stream, 1, None, buffer, 1000)
        graph.launch(stream)
        graph.launch(stream)
        assert rig.number(buffer, stream) == 2111
        with pytest.raises(BadInput, match="compiled for blocks of 128 threads"):
            kernel(stream, 1, 64, buffer, 1)
        assert rig.number(buffer, stream) == 2111


def test_a_parameter_that_the_compiler_added_and_nobody_told_is_refused(
    rig_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: without ``hidden`` the driver says that there are more."""
    rig = rig_of("cuda")
    facts = KernelFacts("add", TRITONS.params, block=(128, 1, 1))
    made = Compiled("ptx", WITH_SCRATCH.encode(), {"add": facts})
    monkeypatch.setattr("drivetrain.hal.language.compile", lambda *_, **__: made)
    with pytest.raises(Exception, match="argument"):
        rig.device.compile(source({})).kernel("add")

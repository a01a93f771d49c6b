"""The kit's kernels and the project's own compile for NVIDIA, on a machine without one."""

from __future__ import annotations

from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import CompileError, Unsupported
from drivetrain.hal.conformance.checks import kernels
from drivetrain.hal.driver import Target
from drivetrain.hal.kernels import FAMILIES
from drivetrain.hal.language import compile as compile_source

H200 = Target("cuda", "sm_90", ("fp64", "fp16", "subgroups"), "12.4")
SAMPLE = ("saxpy", "histogram")


def made(source: hal.Source) -> Any:
    """The cubin. Skips without NVRTC."""
    try:
        return compile_source(source, H200)
    except Unsupported as error:
        pytest.skip(str(error))


def sources_of(name: str, monkeypatch: pytest.MonkeyPatch) -> list[hal.Source]:
    """What a family compiles when it is checked on the processor."""
    found: list[hal.Source] = []
    right = hal.Device.compile

    def noted(self: hal.Device, source: hal.Source, **options: Any) -> Any:
        found.append(source)
        return right(self, source, **options)

    monkeypatch.setattr(hal.Device, "compile", noted)
    device = hal.device("cpu:0")
    FAMILIES[name].check(device, device.stream(), 33)
    hal.close_all()  # a family keeps what it compiled with the open device
    return found


@pytest.mark.parametrize("text", [kernels.SOURCE, kernels.DOUBLES], ids=["kernels", "doubles"])
def test_the_kits_kernels_compile_for_nvidia(text: str) -> None:
    code = made(hal.Source.cuda(text))
    assert code.form == "cubin"
    assert code.code[:4] == b"\x7fELF"
    assert set(code.kernels) == set(compile_source(hal.Source.cuda(text), Target("cpu")).kernels)


@pytest.mark.parametrize(
    "name",
    [
        name if name in SAMPLE else pytest.param(name, marks=pytest.mark.soak)
        for name in sorted(FAMILIES)
    ],
)
def test_a_familys_kernels_compile_for_nvidia(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hal.close_all()
    found = sources_of(name, monkeypatch)
    assert found
    for source in found:
        code = made(source)
        assert code.form == "cubin"
        assert code.kernels


def test_a_kernel_that_is_wrong_does_not_compile_for_nvidia() -> None:
    """The control."""
    made(hal.Source.cuda(kernels.SOURCE))
    with pytest.raises(CompileError) as caught:
        made(hal.Source.cuda(kernels.SOURCE.replace("atomicMax", "atomicMost")))
    assert "atomicMost" in f"{caught.value}{caught.value.log}"

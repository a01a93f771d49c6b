"""Variants of a kernel: which one applies where, and why not."""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import BadInput, CompileError, Unsupported
from drivetrain.hal import registry
from drivetrain.hal.driver import Limits, Target
from drivetrain.hal.language.facts import Compiled

TEXT = """
#include <stdint.h>
typedef struct { uint32_t grid[3], block[3], shared, reserved; uint64_t first, count; } range;
int dt_cpu_fill_with(const range *all, void **arguments) {
    (void)all;
    **(int32_t **)arguments[0] = WORD;
    return 0;
}
"""
SOURCE = hal.Source.cuda('extern "C" __global__ void fill_with(int *x) { *x = 1; }')
PTX = hal.Source.binary(b".version 8.0\n.target sm_80\n", "ptx", {"fill_with": [hal.PTR]})
CUDA = Target("cuda", "sm_90", ("fp64", "fp16"), "12.4")
HIP = Target("hip", "gfx942", ("fp64",), "6.2")
LIMITS = Limits((1 << 30, 65535, 65535), (1024, 1024, 64), 1024, 49152)


@pytest.fixture(scope="module")
def shared_object(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("variants")
    (folder / "fill.c").write_text(TEXT)

    def make(word: int) -> hal.Source:
        out = folder / f"fill{word}.so"
        command = [compiler, "-shared", "-fPIC", f"-DWORD={word}", "fill.c", "-o", str(out)]
        subprocess.run(command, cwd=folder, check=True, timeout=60)
        return hal.Source.binary(out.read_bytes(), "so", {"fill_with": [hal.PTR]})

    return make


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[hal.Device]:
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=1")
    registry.refresh()
    yield hal.device("simulated:0")
    hal.close_all()


def word_of(kernel: hal.Kernel) -> int:
    device = kernel.device
    with device.stream() as stream, device.alloc(4, stream=stream) as buffer:
        kernel(stream, 1, 1, buffer)
        out = bytearray(4)
        buffer.copy_to(memoryview(out), stream=stream)
        stream.synchronize()
        return int(struct.unpack("<i", out)[0])


def test_the_first_that_applies_is_compiled_and_runs(
    shared_object: Any, device: hal.Device
) -> None:
    variants = hal.Variants(
        "fill",
        [
            hal.Variant(PTX, "fill_with", name="nvidia"),
            hal.Variant(shared_object(1), "fill_with", name="even", when=lambda n: n % 2 == 0),
            hal.Variant(shared_object(2), "fill_with", name="any"),
        ],
    )
    assert word_of(variants.kernel(device, n=4)) == 1
    assert word_of(variants.kernel(device, n=5)) == 2
    names = [variant.called for variant in variants.applicable(device, n=4)]
    assert names == ["even", "any"]
    assert word_of(variants.compiled(device, "any")) == 2


def test_priority_goes_before_order(shared_object: Any, device: hal.Device) -> None:
    variants = hal.Variants(
        "fill",
        [
            hal.Variant(shared_object(1), "fill_with", name="plain"),
            hal.Variant(shared_object(2), "fill_with", name="good", priority=2),
            hal.Variant(shared_object(3), "fill_with", name="best", priority=2),
        ],
    )
    assert [v.called for v in variants.applicable(device)] == ["good", "best", "plain"]
    assert word_of(variants.kernel(device)) == 2


def test_a_kernel_is_loaded_once_for_each_open_device(
    shared_object: Any, device: hal.Device
) -> None:
    source = shared_object(1)
    variants = hal.Variants(
        "fill",
        [
            hal.Variant(source, "fill_with", name="a", threads=64),
            hal.Variant(source, "fill_with", name="b"),
        ],
    )
    first = variants.kernel(device)
    assert variants.kernel(device) is first
    assert variants.compiled(device, "b") is not first
    hal.close_all()
    again = variants.kernel(device)
    assert again is not first
    assert word_of(again) == 1


def test_when_none_applies_each_says_why(device: hal.Device) -> None:
    variants = hal.Variants(
        "fill",
        [
            hal.Variant(PTX, "fill_with", name="ptx"),
            hal.Variant(SOURCE, "fill_with", name="amd", kinds=("hip",)),
            hal.Variant(SOURCE, "fill_with", name="new", archs=("zz_9+",)),
            hal.Variant(SOURCE, "fill_with", name="wide", features=("fp64", "tensor")),
            hal.Variant(SOURCE, "fill_with", name="big", shared_bytes=1 << 40),
            hal.Variant(SOURCE, "fill_with", name="many", threads=1 << 30),
            hal.Variant(SOURCE, "fill_with", name="odd", when=lambda n: n % 2 or "n is even"),
            hal.Variant(SOURCE, "fill_with", name="never", when=lambda: False),
        ],
    )
    with pytest.raises(Unsupported) as caught:
        variants.kernel(device, n=2)
    message = str(caught.value)
    for words in (
        "no variant of fill runs on simulated:0",
        "ptx: cpu loads so, not ptx",
        "amd: it is for hip, not cpu",
        "new: it is for zz_9+, not ",
        "wide: the device has no tensor",
        "big: it wants 1099511627776 bytes of shared memory",
        "many: it wants blocks of",
        "odd: n is even",
        "never: its rule says no",
    ):
        assert words in message
    assert caught.value.code == "no_variant"


def test_without_its_compiler_a_variant_is_passed_over(
    shared_object: Any, device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(source: hal.Source, *_: Any, **__: Any) -> Compiled:
        if source.language == "cuda":
            raise Unsupported("install a compiler", code="no_compiler")
        return Compiled("so", source.data, dict(source.kernels))

    monkeypatch.setattr("drivetrain.hal.language.compile", missing)
    plain = hal.Variant(SOURCE, "fill_with", name="text")
    assert (
        word_of(
            hal.Variants(
                "fill", [plain, hal.Variant(shared_object(5), "fill_with", name="made")]
            ).kernel(device)
        )
        == 5
    )
    with pytest.raises(Unsupported, match="text: install a compiler"):
        hal.Variants("fill", [plain]).kernel(device)


def test_a_variant_that_does_not_compile_is_an_error(
    shared_object: Any, device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Compiled:
        raise CompileError("kernel.cu:1: no", log="kernel.cu:1: no")

    made = hal.Variant(shared_object(1), "fill_with", name="made")
    monkeypatch.setattr("drivetrain.hal.language.compile", broken)
    variants = hal.Variants("fill", [hal.Variant(SOURCE, "fill_with", name="text"), made])
    with pytest.raises(CompileError):
        variants.kernel(device)


@pytest.mark.parametrize(
    ("target", "archs", "fits"),
    [
        (CUDA, ("sm_90",), True),
        (CUDA, ("sm_80",), False),
        (CUDA, ("sm_80+",), True),
        (CUDA, ("sm_90+",), True),
        (CUDA, ("sm_100+",), False),
        (CUDA, ("gfx80+",), False),
        (CUDA, ("sm_70", "sm_9*"), True),
        (Target("cuda", "sm_90a"), ("sm_90+",), True),
        (Target("cuda", "sm_90a"), ("sm_90",), False),
        (Target("cuda", ""), ("sm_10+",), False),
        (HIP, ("gfx94*",), True),
        (HIP, ("gfx90*",), False),
        (Target("opencl", "CL1.2"), ("CL1.2+",), True),
        (Target("opencl", "CL1.2"), ("CL2.0+",), False),
        (Target("opencl", "CL3.0"), ("CL1.2+",), True),
    ],
)
def test_architectures(target: Target, archs: tuple[str, ...], fits: bool) -> None:
    variant = hal.Variant(SOURCE, "fill_with", archs=archs)
    assert (variant.misfit(target, LIMITS, {}) == "") is fits


def test_rules_are_given_the_facts_that_they_name() -> None:
    def rule(n: int, dtype: str, wide: bool = False, **_: Any) -> bool:
        return n > 1 and dtype == "f32" and not wide

    every = hal.Variant(SOURCE, "fill_with", when=rule)
    assert every.misfit(CUDA, None, {"n": 2, "dtype": "f32", "unused": 1}) == ""
    some = hal.Variant(SOURCE, "fill_with", when=lambda n: n > 1)
    assert some.misfit(CUDA, None, {"n": 2, "dtype": "f32"}) == ""
    assert some.misfit(CUDA, None, {"n": 0}) == "its rule says no"
    with pytest.raises(BadInput, match=r"the rule of fill_with asks for n; give n=\.\.\."):
        some.misfit(CUDA, None, {"m": 2})


def test_a_launch_rule_gives_the_dimensions() -> None:
    variant = hal.Variant(SOURCE, "fill_with", launch=lambda n: (-(-n // 256), 256, 0))
    assert variant.dimensions(n=1000, dtype="f32") == (4, 256, 0)
    with pytest.raises(BadInput, match="asks for n"):
        variant.dimensions()
    with pytest.raises(BadInput, match="no launch rule"):
        hal.Variant(SOURCE, "fill_with").dimensions(n=1)


def test_bad_variants_are_refused() -> None:
    one = hal.Variant(SOURCE, "fill_with")
    with pytest.raises(BadInput, match="no variant"):
        hal.Variants("fill", [])
    with pytest.raises(BadInput, match="two variants are called 'fill_with'"):
        hal.Variants("fill", [one, one])
    with pytest.raises(BadInput, match="'vulkan'; there are cuda"):
        hal.Variants("fill", [hal.Variant(SOURCE, "fill_with", kinds=("vulkan",))])
    with pytest.raises(BadInput, match="a Source is no Variant"):
        hal.Variants("fill", [SOURCE])  # type: ignore[list-item]
    with pytest.raises(BadInput, match="no variant 'other'; there are fill_with"):
        hal.Variants("fill", [one])["other"]

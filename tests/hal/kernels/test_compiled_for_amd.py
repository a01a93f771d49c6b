"""The kit's kernels and the families' sources are taken by AMD's own compiler, on a machine without
a GPU: hiprtc of whatever ROCm is installed, in a process of its own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from drivetrain.errors import CompileError, Unsupported
from drivetrain.hal import Source
from drivetrain.hal.conformance.checks.kernels import SOURCE
from drivetrain.hal.driver import Target
from drivetrain.hal.language import compile

sys.path.insert(0, str(Path(__file__).parent))

from test_compiled_for_gpus import SOURCES

INSTINCT = Target("hip", "gfx90a", ("fp64", "fp16"), "5.2")
EM_AMDGPU = 224


@pytest.fixture(scope="module", autouse=True)
def _hiprtc() -> None:
    try:
        compile(SOURCES["saxpy"], INSTINCT)
    except Unsupported as error:
        pytest.skip(f"hiprtc is not installed here: {error}")


def check(source: Source) -> None:
    found = compile(source, INSTINCT)
    assert found.form == "hsaco"
    assert found.code[:4] == b"\x7fELF"
    assert int.from_bytes(found.code[18:20], "little") == EM_AMDGPU
    assert found.kernels


def test_the_kits_kernels_compile_for_gfx90a() -> None:
    check(Source.cuda(SOURCE))


@pytest.mark.parametrize("name", ["gemm of halves", "softmax"])
def test_some_families_compile_for_gfx90a(name: str) -> None:
    check(SOURCES[name])


@pytest.mark.soak
@pytest.mark.parametrize("name", SOURCES)
def test_every_family_compiles_for_gfx90a(name: str) -> None:
    check(SOURCES[name])


def test_a_broken_source_is_refused_so_that_the_tests_above_can_fail() -> None:
    broken = Source.cuda(SOURCE.replace("tile[t] = data", "tile[t] = dada"), name="turn.cu")
    with pytest.raises(CompileError, match=r"turn\.cu"):
        compile(broken, INSTINCT)

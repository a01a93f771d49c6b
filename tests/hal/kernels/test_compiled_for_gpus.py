"""The families' sources are taken by NVIDIA's own compiler, on a machine without a GPU."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import pytest

from drivetrain.errors import CompileError, Unsupported
from drivetrain.hal import Source
from drivetrain.hal.driver import Target
from drivetrain.hal.dtype import DTYPES
from drivetrain.hal.kernels import (
    activations,
    elementwise,
    gather,
    gemm,
    hash,
    histogram,
    indexing,
    loss,
    normalization,
    optimizers,
    philox,
    pooling,
    reduction,
    scan,
    softmax,
    stencil,
    text,
    transpose,
    unfold,
)
from drivetrain.hal.kernels.elementwise import Operand
from drivetrain.hal.language import compile

F16, F32, F64 = DTYPES["float16"], DTYPES["float32"], DTYPES["float64"]
BF16, I32, TRUTH = DTYPES["bfloat16"], DTYPES["int32"], DTYPES["bool"]
HOPPER = Target("cuda", "sm_90", ("fp64", "fp16"), "12.8")

SOURCES: dict[str, Source] = {
    "saxpy": elementwise.saxpy_source(),
    "add": elementwise.elementwise("add", F32, Operand(F32, "1"), (Operand(F32, "1"),) * 2, 0),
    "half to bfloat16": elementwise.elementwise("astype", BF16, Operand(BF16), (Operand(F16),), 3),
    "double to half": elementwise.elementwise("astype", F64, Operand(F16), (Operand(F64),), 0),
    "where": elementwise.elementwise(
        "where", F32, Operand(F32), (Operand(TRUTH), Operand(F32), Operand(F32, "value")), 1
    ),
    "remainder": elementwise.elementwise("remainder", I32, Operand(I32), (Operand(I32),) * 2, 0),
    "gemm": gemm.source(F32, 1),
    "gemm of halves": gemm.source(F16),
    "sum": reduction.source("sum", F16, F32, F16, 1, 1, "block"),
    "max of columns": reduction.source("max", F64, F64, F64, 1, 1, "rows"),
    "argmax": reduction.position("argmax", F32, 1, 1),
    "scan": scan.source(I32),
    "histogram": histogram.source(),
    "transpose": transpose.source(2),
    "stencil": stencil.source(),
    "softmax": softmax.source(BF16),
    "log_softmax of short rows": softmax.source(F64, True, True),
    "philox": philox.source("normal32"),
    "philox of halves": philox.source("float16"),
    "philox of doubles": philox.source("normal64"),
    "hash": hash.source(),
    "gather": gather.source(4, DTYPES["int64"]),
    "activations": activations.every(),
    "gradient of gelu in halves": elementwise.elementwise(
        "gelu_gradient", F16, Operand(F16, "1"), (Operand(F16, "1"),) * 2, 0
    ),
    "normalization": normalization.source(BF16),
    "unfold": unfold.source(F16),
    "pooling": pooling.source(F64),
    "loss": loss.source(F32),
    "gradient of log_softmax": loss.slope_source(F16, True),
    "indexing": indexing.source(BF16),
    "optimizers": optimizers.source(F32),
}


@pytest.fixture(scope="module", autouse=True)
def _nvrtc() -> None:
    try:
        compile(SOURCES["saxpy"], HOPPER)
    except Unsupported as error:
        pytest.skip(f"NVRTC is not installed here: {error}")


@pytest.mark.parametrize("name", SOURCES)
def test_the_source_compiles_for_hopper(name: str) -> None:
    found = compile(SOURCES[name], HOPPER)
    assert found.form in ("ptx", "cubin")
    assert len(found.code) > 500
    assert found.kernels


def test_halves_are_converted_by_instructions_there() -> None:
    found = compile(SOURCES["gemm of halves"], HOPPER, options=["--std=c++17"])
    if found.form == "ptx":
        assert b"cvt.f32.f16" in found.code
        assert b"cvt.rn.f16.f32" in found.code


def test_a_broken_source_is_refused_so_that_the_test_above_can_fail() -> None:
    broken = Source.cuda(SOURCES["stencil"].text.replace("int row", "in row"), name="stencil.cu")
    with pytest.raises(CompileError, match="stencil"):
        compile(broken, HOPPER)


def test_a_device_without_double_precision_refuses_doubles() -> None:
    device: Any = SimpleNamespace(address="opencl:0", name="small", driver="opencl")
    small = Target("opencl", "1.2", ())
    text.require(device, small, F32, F16, I32)
    with pytest.raises(Unsupported, match="use float32"):
        text.require(device, small, F32, F64)
    text.require(device, Target("opencl", "1.2", ("fp64",)), F64)
    text.require(device, HOPPER, F64)


def test_structures_have_the_layout_that_kernels_read() -> None:
    packed = text.packed([1, -2, 3])
    assert list((ctypes.c_int64 * 3).from_buffer_copy(packed)) == [1, -2, 3]
    assert "long long n[3]" in text.record("Walk", 3)

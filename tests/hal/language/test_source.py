"""Sources: what they take, and that all else is refused before a compiler or a driver sees it."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import BadInput
from drivetrain.hal.driver import Target
from drivetrain.hal.language import compile
from drivetrain.hal.language.source import FORMS, Source

TEXT = 'extern "C" __global__ void k(int *p) { p[0] = 1; }'
PTX = (
    b".version 8.0\n.target sm_80\n.visible .entry k(\n\t.param .u64 k_0,\n\t.param .f32 k_1\n)\n"
    b"{ ret; }\n.visible .entry bare()\n{ ret; }\n"
)
CUDA = Target("cuda", "sm_90", (), "12.4")


def kernel(x: Any, n: Any, BLOCK: Any) -> None:
    return


def triton(**changes: Any) -> Source:
    given: dict[str, Any] = {"signature": {"x": "*fp32", "n": "i32"}, "constants": {"BLOCK": 64}}
    return Source.triton(kernel, **{**given, **changes})


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "no text": (lambda: Source.cuda(b"x"), "a bytes; give its text as str"),
    "empty": (lambda: Source.cuda(""), "the source is empty"),
    "blank": (lambda: Source.opencl(" \n\t"), "the source is empty"),
    "NUL": (lambda: Source.cuda("a\nb\0c"), "line 2 of the source has a NUL"),
    "half a character": (lambda: Source.cuda("\ud800"), "cannot be written as UTF-8"),
    "too long": (lambda: Source.cuda("x" * ((16 << 20) + 1)), "more than 16777216 bytes"),
    "too long in bytes": (lambda: Source.cuda("ü" * (9 << 20)), "more than 16777216 bytes"),
    "a path": (lambda: Source.cuda(TEXT, name="../x.cu"), "the name '../x.cu' of a source"),
    "a line": (lambda: Source.cuda(TEXT, name="a\nb"), "of a source"),
    "no name": (lambda: Source.cuda(TEXT, name=""), "of a source"),
    "quotes": (lambda: Source.cuda(TEXT, name='a"b'), "of a source"),
    "a long name": (lambda: Source.cuda(TEXT, name="x" * 101), "of a source"),
    "a macro's name": (lambda: Source.cuda(TEXT, defines={"1N": 1}), "'1N' cannot be defined"),
    "a macro of macros": (lambda: Source.cuda(TEXT, defines={"defined": 1}), "cannot be defined"),
    "a macro with brackets": (lambda: Source.cuda(TEXT, defines={"F(x)": 1}), "cannot be defined"),
    "a macro's lines": (lambda: Source.cuda(TEXT, defines={"N": "1\n2"}), "one printable line"),
    "a macro's value": (lambda: Source.cuda(TEXT, defines={"N": [1]}), "the macro N is a list"),
    "no form": (lambda: Source.binary(b"x", "exe"), "the format 'exe' is not known"),
    "no bytes": (lambda: Source.binary(b"", "cubin"), "the binary is empty"),
    "no ELF": (lambda: Source.binary(b"MZ..", "cubin"), "this is no cubin: it starts with 4d5a"),
    "no code object": (lambda: Source.binary(b"xxxx", "hsaco"), "this is no hsaco"),
    "no SPIR-V": (lambda: Source.binary(b"xxxx", "spirv"), "this is no spirv"),
    "no shared object": (lambda: Source.binary(b"xxxx", "so"), "this is no so"),
    "no PTX": (lambda: Source.binary(b"int x;", "ptx"), "this is no PTX"),
    "bytes as PTX": (lambda: Source.binary(b".version \xff", "ptx"), "ptx is text"),
    "too many bytes": (
        lambda: Source.binary(b"\x7fELF" + bytes(16 << 20), "cubin"),
        "at most 16777216 are taken",
    ),
    "no type": (
        lambda: Source.binary(PTX, "ptx", {"k": ["ptr", "float"]}),
        "k, argument 1: 'float' is no type",
    ),
    "a type's size": (lambda: Source.binary(PTX, "ptx", {"k": ["struct"]}), "is no type"),
    "no kernel's name": (lambda: Source.binary(PTX, "ptx", {"": []}), "'' is no name"),
    "a parameter left out": (lambda: triton(signature={"x": "*fp32"}), "'n' is neither in"),
    "a parameter too many": (
        lambda: triton(signature={"x": "*fp32", "n": "i32", "m": "i32"}),
        "no parameter 'm'",
    ),
    "a constant too many": (lambda: triton(constants={"BLOCK": 1, "C": 2}), "no parameter 'C'"),
    "a type of Triton's": (lambda: triton(signature={"x": "float*", "n": "i32"}), "no type of"),
    "a constant without value": (
        lambda: triton(signature={"x": "*fp32", "n": "i32", "BLOCK": "constexpr"}, constants={}),
        "'BLOCK' has no value",
    ),
    "a constant with a type": (
        lambda: triton(signature={"x": "*fp32", "n": "i32", "BLOCK": "i32"}),
        "is a constant and has the type i32",
    ),
    "a constant's value": (lambda: triton(constants={"BLOCK": [1]}), "the constant 'BLOCK' is a"),
    "warps": (lambda: triton(num_warps=3), "num_warps is 3"),
    "stages": (lambda: triton(num_stages=0), "num_stages is 0"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_with_what_is_wrong(what: str) -> None:
    make, message = BAD[what]
    with pytest.raises(BadInput, match=re.escape(message)):
        make()


def test_good_input_is_taken() -> None:
    made = Source.cuda(TEXT, name="my kernel-1.0+x.cu", defines={"N": True, "A": 1.5, "B": "x y"})
    assert made.defines == (("A", "1.5"), ("B", "x y"), ("N", "1"))
    found = triton(name="renamed", num_warps=8, num_stages=2)
    assert found.signature == (("x", "*fp32"), ("n", "i32"), ("BLOCK", "constexpr"))
    assert (found.form, found.name, found.constants) == ("kernel", "renamed", (("BLOCK", 64),))
    for form, start in (("cubin", b"\x7fELF"), ("spirv", b"\x03\x02\x23\x07"), ("clbin", b"x")):
        assert Source.binary(start + b"...", form).data == start + b"..."
    assert Source.binary(bytearray(PTX) + b"\0", "ptx").data == PTX


def test_sources_are_values() -> None:
    assert Source.cuda(TEXT) == Source.cuda(TEXT)
    assert len({Source.cuda(TEXT), Source.cuda(TEXT), Source.cuda(TEXT, name="b.cu")}) == 2
    assert triton() == triton()


@pytest.mark.parametrize(
    ("made", "kind", "message"),
    [
        (Source.opencl("kernel void k() {}"), "cuda", "opencl sources are not compiled for cuda"),
        (Source.binary(PTX, "ptx"), "cpu", "cpu loads so, not ptx"),
        (Source.binary(PTX, "ptx"), "hip", "hip loads hsaco, not ptx"),
        (Source.binary(b"\x7fELF", "so"), "cuda", "cuda loads ptx or cubin, not so"),
        (Source.cuda(TEXT), "vulkan", "'vulkan' is no kind of target; there are cuda, hip"),
    ],
)
def test_a_source_that_a_target_does_not_take(made: Source, kind: str, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(f"{made.name}: {message}")):
        compile(made, Target(kind, ""))


def test_a_device_that_takes_binaries_only() -> None:
    target = Target("opencl", "CL1.2", ("binary_only",))
    with pytest.raises(BadInput, match="takes binaries only"):
        compile(Source.cuda(TEXT), target)
    assert compile(Source.binary(b"bits", "clbin"), target).code == b"bits"


def test_what_is_no_source() -> None:
    with pytest.raises(BadInput, match=r"a str is no source; use hal\.Source\.cuda"):
        compile(TEXT, CUDA)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="not allowed"):
        compile(Source.binary(PTX, "ptx"), CUDA, options=["-I/etc"])


def test_ptx_tells_its_kernels() -> None:
    told = Source.binary(PTX, "ptx", {"k": [hal.PTR, hal.F32]})
    made = compile(told, CUDA)
    assert (made.form, made.code) == ("ptx", PTX)
    assert list(made.kernels) == ["k", "bare"]
    assert made.kernels["k"].params is not None
    assert [param.type for param in made.kernels["k"].params] == ["ptr", "f32"]
    assert made.kernels["bare"].params is None
    assert [facts.symbol for facts in made.kernels.values()] == ["k", "bare"]


@pytest.mark.parametrize(
    ("kernels", "message"),
    [
        ({"absent": []}, "there is no kernel 'absent'; there are k, bare"),
        ({"k": ["ptr"]}, "k takes arguments of [8, 4] bytes, and types of [8] bytes were given"),
        ({"k": ["ptr", "f64"]}, "k takes arguments of [8, 4] bytes, and types of [8, 8]"),
        ({"k": [hal.PTR, hal.struct_of(12)]}, "types of [8, 12] bytes were given"),
    ],
)
def test_types_that_are_not_the_ptxs_are_refused(kernels: Any, message: str) -> None:
    with pytest.raises(BadInput, match=re.escape(message)):
        compile(Source.binary(PTX, "ptx", kernels), CUDA)


def test_other_binaries_have_the_kernels_that_are_told() -> None:
    told = Source.binary(b"\x7fELF...", "cubin", {"k": ["ptr", hal.struct_of(24), "bf16"]})
    params = compile(told, CUDA).kernels["k"].params
    assert params is not None
    assert [(param.type, param.nbytes) for param in params] == [
        ("ptr", 8), ("struct", 24), ("bf16", 2),
    ]  # fmt: skip
    assert dict(compile(Source.binary(b"\x7fELF", "cubin"), CUDA).kernels) == {}


@pytest.mark.parametrize("form", sorted({form for forms in FORMS.values() for form in forms}))
def test_any_bytes_are_taken_or_refused_as_bad_input(form: str) -> None:
    taken = []
    for data in (b"", b"\0", b"\xff" * 100, b"\x7fELF", b".version 8.0", bytes(range(256))):
        with suppress(BadInput):
            taken.append(Source.binary(data, form).form)
    assert taken == [form] * len(taken)
    assert taken or form == "spirv"

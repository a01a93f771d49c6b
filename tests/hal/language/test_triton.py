"""Triton without a device: real code for each target where Triton is installed, and its launch.

``DRIVETRAIN_TEST_TRITON`` names a folder that has Triton in it, where the interpreter has none.
"""

from __future__ import annotations

import importlib
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import BadInput, CompileError, HalError, Unsupported
from drivetrain.hal import registry
from drivetrain.hal.driver import Target
from drivetrain.hal.language import compile
from drivetrain.hal.language.compilers import triton as compiler
from drivetrain.hal.language.compilers.triton import _code_object_sizes
from drivetrain.hal.language.facts import Compiled, KernelFacts, Param
from drivetrain.hal.language.source import Source

_ELSEWHERE = os.environ.get("DRIVETRAIN_TEST_TRITON", "")
if _ELSEWHERE and find_spec("triton") is None:
    sys.path.append(_ELSEWHERE)
real = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

TARGETS = [
    *(("cuda", arch) for arch in ("sm_80", "sm_90", "sm_100")),
    *(("hip", arch) for arch in ("gfx90a", "gfx942", "gfx950", "gfx1100")),
]
MACHINES = {
    "gfx90a": 0x3F, "gfx942": 0x4C, "gfx950": 0x4F, "gfx1100": 0x41,
}  # fmt: skip
"""AMD's numbers of its architectures in the low byte of an ELF file's flags (LLVM's ABI)."""

KERNELS = """
import triton
import triton.language as tl

SCALE = tl.constexpr(2.0)

@triton.jit
def twice(x):
    return x * SCALE

@triton.jit
def add(x, y, out, n, by, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = i < n
    tl.store(out + i, twice(tl.load(x + i, mask=m)) + by * tl.load(y + i, mask=m), mask=m)

@triton.jit
def dot(a, b, c, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    p = i[:, None] * BLOCK + i[None, :]
    tl.store(c + p, tl.dot(tl.load(a + p), tl.load(b + p)))

@triton.jit
def fused(x, out):
    tl.store(out, tl.load(x) * tl.load(x + 1) + tl.load(x + 2))

@triton.jit
def types(a, b, c, d, e, f, g, h, i, j, k, l, out):
    tl.store(out, a + b + c + d + e + f + g + h + i.to(tl.float32) + j + k + l)

def wrong(x, n):
    y = tl.load(x)

    tl.store(x, y[3, 4, n])

@triton.jit
def innermost(x):
    return tl.dot(x, 1)

def wrong_inside(x):

    tl.store(x, innermost(tl.load(x)))
"""


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "users_kernels.py").write_text(dedent(KERNELS))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield importlib.import_module("users_kernels")
    del sys.modules["users_kernels"]


def add(kernels: Any, **more: Any) -> Source:
    types = {"x": "*fp32", "y": "*fp32", "out": "*fp32", "n": "i32", "by": "fp32"}
    return Source.triton(kernels.add, signature=types, constants={"BLOCK": 1024}, **more)


def flags(code: bytes) -> int:
    return int(struct.unpack_from("<I", code, 48)[0])


@real
@pytest.mark.parametrize(("kind", "arch"), TARGETS)
def test_real_code_for_each_target(kernels: Any, kind: str, arch: str) -> None:
    made = compile(add(kernels), Target(kind, arch))
    facts = made.kernels["add"]
    assert made.code[:4] == b"\x7fELF"
    if kind == "cuda":
        number = int(arch[3:])
        assert made.form == "cubin"
        assert number in (flags(made.code) & 0xFF, flags(made.code) >> 8 & 0xFF)
    else:
        assert made.form == "hsaco"
        assert flags(made.code) & 0xFF == MACHINES[arch]
    assert facts.symbol.encode() in made.code
    assert facts.params is not None
    assert [(param.type, param.name) for param in facts.params] == [
        ("ptr", "x"), ("ptr", "y"), ("ptr", "out"), ("i32", "n"), ("f32", "by"),
    ]  # fmt: skip
    warp = 64 if arch.startswith("gfx9") else 32
    assert facts.block == (4 * warp, 1, 1)
    assert facts.shared_bytes == 0
    assert facts.hidden in (1, 2)  # pointers to scratch: one before Triton 3.5


@real
def test_shared_memory_and_warps_are_told(kernels: Any) -> None:
    source = Source.triton(
        kernels.dot,
        signature={"a": "*fp16", "b": "*fp16", "c": "*fp32"},
        constants={"BLOCK": 64},
        num_warps=8,
    )
    for target, warp in ((Target("cuda", "sm_90"), 32), (Target("hip", "gfx942"), 64)):
        facts = compile(source, target).kernels["dot"]
        assert facts.shared_bytes >= 64 * 64 * 2
        assert facts.block == (8 * warp, 1, 1)


@real
def test_whether_products_and_sums_are_fused_is_ours_to_say(kernels: Any, tmp_path: Path) -> None:
    source = Source.triton(kernels.fused, signature={"x": "*fp32", "out": "*fp32"})
    target = Target("hip", "gfx942")
    plain = compile(source, target).code
    assert compile(source, target, options=["--fmad=true"]).code == plain
    assert compile(source, target, options=["--fmad=false"]).code != plain


@real
def test_a_kernel_has_the_name_that_it_is_given(kernels: Any) -> None:
    assert list(compile(add(kernels), Target("hip", "gfx942")).kernels) == ["add"]
    renamed = compile(add(kernels, name="add wide"), Target("hip", "gfx942"))
    assert list(renamed.kernels) == ["add wide"]
    assert renamed.kernels["add wide"].symbol == "add"


@real
def test_every_type_of_a_number(kernels: Any) -> None:
    words = ["i1", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64", "fp16", "bf16", "fp64"]
    types = dict(zip("abcdefghijkl", words, strict=True)) | {"out": "*fp64"}
    source = Source.triton(kernels.types, signature=types)
    for target in (Target("cuda", "sm_90"), Target("hip", "gfx942")):
        params = compile(source, target).kernels["types"].params
        assert params is not None
        assert [param.type for param in params] == [
            "u8", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64", "f16", "bf16", "f64", "ptr",
        ]  # fmt: skip


@real
def test_an_error_names_the_users_line(kernels: Any) -> None:
    source = Source.triton(kernels.wrong, signature={"x": "*fp32", "n": "i32"})
    line = KERNELS.splitlines().index("    tl.store(x, y[3, 4, n])") + 1
    with pytest.raises(CompileError, match=rf"for sm_90 by Triton .*: wrong:{line}: error:"):
        compile(source, Target("cuda", "sm_90"))


@real
def test_an_error_in_a_function_that_is_called_names_its_line(kernels: Any) -> None:
    source = Source.triton(kernels.wrong_inside, signature={"x": "*fp32"})
    line = KERNELS.splitlines().index("    return tl.dot(x, 1)") + 1
    with pytest.raises(CompileError, match=rf"wrong_inside:{line}: error:") as caught:
        compile(source, Target("hip", "gfx942"))
    assert f"wrong_inside:{line}: error:" in caught.value.log


@real
def test_the_callers_environment_does_not_steer_it(
    kernels: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    target = Target("hip", "gfx942")
    plain = compile(add(kernels), target).code
    for name in ("TRITON_INTERPRET", "TRITON_ALWAYS_COMPILE", "TRITON_KERNEL_DUMP"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "theirs"))
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(tmp_path / "other-cache"))
    assert compile(add(kernels), target).code == plain
    assert not (tmp_path / "theirs").exists()


@real
def test_other_architectures_are_not_asked_for(kernels: Any) -> None:
    for kind, arch in (("cuda", "sm_999"), ("cuda", "gfx942"), ("hip", "gfx000"), ("hip", "")):
        with pytest.raises(Unsupported, match="not asked for the architecture"):
            compile(add(kernels), Target(kind, arch))


@real
def test_macros_mean_nothing_to_it(kernels: Any) -> None:
    with pytest.raises(BadInput, match="no macros; give constants="):
        compile(add(kernels), Target("cuda", "sm_90"), options=["-DBLOCK=3"])


@real
def test_a_compiler_that_hangs_or_crashes_is_an_error(
    kernels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child.py"
    monkeypatch.setattr(compiler.triton_child, "__file__", str(child))
    child.write_text("import os; os.abort()")
    with pytest.raises(HalError, match=r"did not finish for sm_90: it crashed \(SIGABRT\)"):
        compile(add(kernels), Target("cuda", "sm_90"))
    child.write_text("import time; time.sleep(600)")
    monkeypatch.setenv("DRIVETRAIN_COMPILE_LIMIT_S", "1")
    with pytest.raises(HalError, match="did not end within 1 s"):
        compile(add(kernels), Target("cuda", "sm_90"))


# -- without Triton --------------------------------------------------------------------------------


def plain_kernel(x: Any, n: Any) -> None:
    return


PLAIN = {"x": "*fp32", "n": "i32"}


def test_without_triton_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "find_spec", lambda name: None)
    with pytest.raises(Unsupported, match=r"install drivetrain\[triton\]"):
        compile(Source.triton(plain_kernel, signature=PLAIN), Target("cuda", "sm_90"))


def test_an_old_triton_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text('__version__ = "3.3.1"\n')
    spec = importlib.machinery.ModuleSpec("triton", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "triton")]
    monkeypatch.setattr(compiler, "find_spec", lambda name: spec)
    with pytest.raises(Unsupported, match=r"Triton 3\.3\.1 is too old.*3\.4"):
        compile(Source.triton(plain_kernel, signature=PLAIN), Target("cuda", "sm_90"))


def test_a_triton_that_does_not_load_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(
        '__version__ = "3.9.0"\nraise ImportError("libtriton.so: no such file")\n'
    )
    spec = importlib.machinery.ModuleSpec("triton", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path / "triton")]
    monkeypatch.setattr(compiler, "find_spec", lambda name: spec)
    if find_spec("triton") is not None:
        pytest.skip("the child finds the real one first")
    with pytest.raises(Unsupported, match=r"cannot be used: libtriton\.so: no such file"):
        compile(Source.triton(plain_kernel, signature=PLAIN), Target("cuda", "sm_90"))


def test_triton_is_for_gpus_only() -> None:
    source = Source.triton(plain_kernel, signature=PLAIN)
    for kind in ("cpu", "opencl"):
        with pytest.raises(BadInput, match=f"triton sources are not compiled for {kind}"):
            compile(source, Target(kind, ""))


def test_sizes_of_arguments_in_the_notes_of_amds_assembly() -> None:
    notes = """
amdhsa.kernels:
  - .agpr_count:     0
    .args:
      - .address_space:  global
        .offset:         0
        .size:           8
        .value_kind:     global_buffer
      - .name:           n
        .offset:         8
        .size:           4
        .value_kind:     by_value
      - .offset:         16
        .size:           4
        .value_kind:     hidden_block_count_x
    .group_segment_fixed_size: 0
    .name:           other
    .symbol:         other.kd
  - .args:
      - .offset:         0
        .size:           2
        .value_kind:     by_value
    .name:           mine
"""
    assert _code_object_sizes(notes, "other") == [8, 4]
    assert _code_object_sizes(notes, "mine") == [2]
    assert _code_object_sizes(notes, "n") is None
    assert _code_object_sizes("", "mine") is None


# -- the launch ------------------------------------------------------------------------------------

LAUNCHED = """
#include <stdint.h>
typedef struct { uint32_t grid[3], block[3], shared, reserved; uint64_t first, count; } range;
int dt_cpu_seen(const range *all, void **arguments) {
    int64_t *out = *(int64_t **)arguments[0];
    out[0] = *(int32_t *)arguments[1];
    out[1] = all->block[0];
    out[2] = all->shared;
    for (int i = 0; i < HIDDEN; i++) out[3 + i] = (int64_t)(intptr_t)*(void **)arguments[2 + i];
    return 0;
}
int dt_cpu_nothing(const range *all, void **arguments) {
    (void)all; (void)arguments;
    return 0;
}
"""
FACTS = {
    "seen": KernelFacts(
        "seen",
        (Param("ptr", 8, "out"), Param("i32", 4, "n")),
        block=(96, 1, 1),
        shared_bytes=640,
        hidden=2,
    ),
    "nothing": KernelFacts("nothing", (), block=(32, 1, 1), shared_bytes=64),
}

Launched = Callable[[str], hal.Kernel]


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Launched]:
    """A kernel as Triton makes them, on a device that runs code of the processor's."""
    c_compiler = shutil.which("gcc") or shutil.which("cc")
    if c_compiler is None:
        pytest.skip("there is no C compiler")
    (tmp_path / "seen.c").write_text(LAUNCHED)
    command = [c_compiler, "-shared", "-fPIC", "-DHIDDEN=2", "seen.c", "-o", "seen.so"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    made = Compiled("so", (tmp_path / "seen.so").read_bytes(), FACTS)
    monkeypatch.setattr("drivetrain.hal.language.compile", lambda *_, **__: made)
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=1")
    registry.refresh()
    module = hal.device("simulated:0").compile(Source.triton(plain_kernel, signature=PLAIN))
    yield module.kernel
    hal.close_all()


def read(buffer: hal.Buffer, stream: hal.Stream) -> tuple[int, ...]:
    out = bytearray(40)
    buffer.copy_to(memoryview(out), stream=stream)
    stream.synchronize()
    return struct.unpack("<5q", out)


def test_a_launch_adds_what_the_compiler_added(launched: Launched) -> None:
    kernel = launched("seen")
    assert kernel.arguments == (hal.PTR, hal.I32)
    with kernel.device.stream() as stream, kernel.device.alloc(40, stream=stream) as out:

        def filled() -> None:
            out.fill(b"\xff", stream=stream)

        filled()
        kernel(stream, 1, None, out, 7)
        assert read(out, stream) == (7, 96, 640, 0, 0)
        filled()
        kernel(stream, (1, 1), 96, out, -8)
        assert read(out, stream) == (-8, 96, 640, 0, 0)
        filled()
        kernel(stream, 1, None, out, 9, shared=100)
        assert read(out, stream) == (9, 96, 740, 0, 0)
        filled()
        plan = kernel.plan(stream, 1, None, out, 10)
        plan()
        assert read(out, stream) == (10, 96, 640, 0, 0)
        plan.set(1, 11)
        plan()
        assert read(out, stream) == (11, 96, 640, 0, 0)
        filled()
        with stream.capture() as graph:
            kernel(stream, 1, None, out, 12)
        graph.launch(stream)
        assert read(out, stream) == (12, 96, 640, 0, 0)


def test_a_launch_that_does_not_fit_is_refused(launched: Launched) -> None:
    kernel, nothing = launched("seen"), launched("nothing")
    with kernel.device.stream() as stream, kernel.device.alloc(40, stream=stream) as out:
        with pytest.raises(BadInput, match="compiled for blocks of 96 threads"):
            kernel(stream, 1, 128, out, 7)
        with pytest.raises(BadInput, match="compiled for blocks of 96 threads"):
            kernel.plan(stream, 1, (32, 3), out, 7)
        with pytest.raises(BadInput, match="takes 2 arguments"):
            kernel(stream, 1, None, out, 7, None, None)
        with pytest.raises(BadInput, match="bytes of dynamic shared memory"):
            kernel(stream, 1, None, out, 7, shared=1 << 30)
        with pytest.raises(BadInput, match="compiled for blocks of 32 threads"):
            nothing(stream, 1, 16)
        nothing(stream, 1, None)
        nothing(stream, 1, 32)


def test_other_kernels_must_be_given_a_block(
    launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = launched("seen").device
    plain = Compiled("so", Path("seen.so").read_bytes(), {"nothing": KernelFacts("nothing", ())})
    monkeypatch.setattr("drivetrain.hal.language.compile", lambda *_, **__: plain)
    kernel = device.compile(Source.cuda("other")).kernel("nothing")
    with device.stream() as stream, pytest.raises(BadInput, match="give a block"):
        kernel(stream, 1, None)

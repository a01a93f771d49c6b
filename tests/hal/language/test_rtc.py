"""NVRTC and hiprtc: the real ones where they are, and one that fails as it is told."""

from __future__ import annotations

import random
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from drivetrain.errors import BadInput, CompileError, HalError, Unsupported
from drivetrain.hal.driver import Target
from drivetrain.hal.language import compile
from drivetrain.hal.language.compilers import rtc, rtc_library
from drivetrain.hal.language.compilers.rtc_kernels import entry_sizes, written_kernels
from drivetrain.hal.language.facts import Compiled, Param
from drivetrain.hal.language.frontend import program
from drivetrain.hal.language.options import read_options
from drivetrain.hal.language.signature import kernel_params
from drivetrain.hal.language.source import Source
from drivetrain.hal.language.tokens import scan

H200 = Target("cuda", "sm_90", ("fp64",), "")
NEWER = Target("cuda", "sm_999", ("fp64",), "")
"""Newer than every library: it makes PTX."""
MI200 = Target("hip", "gfx90a", ("fp64",), "")
FAKE = Path(__file__).with_name("fake_rtc.c")


def installed(kind: str) -> rtc_library.Library | None:
    try:
        return rtc_library.library(kind)
    except Unsupported:
        return None


nvidia = pytest.mark.skipif(installed("cuda") is None, reason="NVRTC is not installed")
amd = pytest.mark.skipif(installed("hip") is None, reason="hiprtc is not installed")


def ptx(text: str, *options: str, **more: Any) -> str:
    made = compile(Source.cuda(text, **more), NEWER, options=options)
    assert made.form == "ptx"
    return made.code.decode()


# -- the real NVRTC --------------------------------------------------------------------------------

KERNELS = """
struct V { float a, b, c; };
__device__ void wait() { __syncthreads(); }
extern "C" __global__ void __launch_bounds__(256) plain(
    const float *__restrict__ p, int n, char c, unsigned short s, double d, V v, float4 q,
    unsigned long long *o) { o[0] = (unsigned long long)(p[n] + c + s + d + v.a + q.x); }
__global__ void late(float *p) { extern __shared__ float room[]; room[0] = p[0]; wait();
    p[1] = room[0]; }
template <typename T, int N> __global__ void scale(T *p, T by) { p[threadIdx.x] *= by + N; }
template __global__ void scale<float, 4>(float *, float);
template __global__ void scale<double, 8>(double *, double);
static __global__ void mine(int *p) { p[0] = 1; }
namespace deep { namespace er { __global__ void inside(int *p) { p[0] = 2; } } }
"""


@nvidia
def test_a_cubin_for_the_h200_holds_each_kernel() -> None:
    made = compile(Source.cuda(KERNELS), H200)
    kind, machine, _, _, _, _, flags = struct.unpack_from("<HHIQQQI", made.code, 16)
    assert (made.form, made.code[:4], kind, machine) == ("cubin", b"\x7fELF", 2, 190)
    assert 90 in (flags & 0xFF, flags >> 8 & 0xFF)
    assert list(made.kernels) == [
        "plain", "late", "scale<float,4>", "scale<double,8>", "mine", "deep::er::inside",
    ]  # fmt: skip
    for facts in made.kernels.values():
        assert b"\0" + facts.symbol.encode() + b"\0" in made.code
    other = compile(Source.cuda(KERNELS), Target("cuda", "sm_80"))
    assert other.code != made.code


@nvidia
def test_what_is_told_of_a_kernel_is_what_the_compiler_made() -> None:
    found = compile(Source.cuda(KERNELS), H200).kernels
    plain = found["plain"]
    assert plain.params is not None
    assert [(p.type, p.nbytes, p.name) for p in plain.params] == [
        ("ptr", 8, "p"), ("i32", 4, "n"), ("i8", 1, "c"), ("u16", 2, "s"), ("f64", 8, "d"),
        ("struct", 12, "v"), ("struct", 16, "q"), ("ptr", 8, "o"),
    ]  # fmt: skip
    assert (plain.launch_bounds, plain.dynamic_shared, plain.barriers) == (256, False, False)
    assert (found["late"].dynamic_shared, found["late"].barriers) == (True, True)
    assert found["scale<double,8>"].params is not None
    assert [p.type for p in found["scale<double,8>"].params] == ["ptr", "f64"]
    assert found["deep::er::inside"].params is not None
    assert [p.type for p in found["deep::er::inside"].params] == ["ptr"]


@nvidia
def test_ptx_where_the_architecture_is_newer_than_the_library() -> None:
    text = ptx('extern "C" __global__ void k(float *p, int n) { p[n] = n; }')
    assert entry_sizes(text) == {"k": [8, 4]}


@nvidia
def test_an_architecture_that_is_too_old_is_refused_with_those_it_knows() -> None:
    with pytest.raises(Unsupported, match=r"no longer compiles for sm_20; it knows sm_\d+"):
        compile(Source.cuda("__global__ void k() {}"), Target("cuda", "sm_20"))


@nvidia
@pytest.mark.parametrize("arch", ["", "sm_", "90", "sm_90; rm", "compute_90", "gfx90a"])
def test_only_architectures_of_its_own_reach_it(arch: str) -> None:
    with pytest.raises(Unsupported, match="not asked for the architecture"):
        compile(Source.cuda("__global__ void k() {}"), Target("cuda", arch))


@nvidia
def test_the_names_that_nvcc_finds_in_the_c_library_are_there() -> None:
    ptx(
        """
        #include <stdint.h>
        #include <cstdio>
        #include <math.h>
        #include <float.h>
        #include <limits.h>
        #include <cuda_runtime.h>
        #include <math_constants.h>
        using namespace std;
        static_assert(sizeof(int64_t) == 8 && sizeof(uint8_t) == 1, "");
        __global__ void k(float *p, uint64_t *q, uint x, size_t n, uchar c) {
            p[0] = std::sqrt(p[1]) + std::min(1.f, p[2]) + INFINITY + sqrt(p[3]) + max(1u, 2u)
                 + isnan(p[0]) + std::pow(2.f, 3) + M_PI + FLT_MAX + CUDART_PI_F + NAN + c
                 + std::abs(-1.f) + fmaxf(p[1], p[2]);
            atomicMax(q, UINT64_MAX); q[1] = INT_MAX + INT32_MIN + LONG_MAX;
            if (n == 0) printf("%d", x);
        }
        """
    )


@nvidia
@pytest.mark.parametrize(
    "header",
    ["cuda_fp16.h", "cooperative_groups.h", pytest.param("mma.h", marks=pytest.mark.soak)],
)
def test_headers_of_cuda(header: str) -> None:
    library = installed("cuda")
    assert library is not None
    folders = [folder for folder in library.include if (folder / header).is_file()]
    if not folders and library.version < (13, 3):
        pytest.skip("this NVRTC has no headers beside it or in it")
    text = (
        f"#include <{header}>\n"
        + {
            "cuda_fp16.h": "__global__ void k(half *p) { p[0] = __hadd(p[1], __float2half(2.f)); }",
            "cooperative_groups.h": "__global__ void k(int *p) "
            "{ cooperative_groups::this_thread_block().sync(); p[0] = 1; }",
            "mma.h": "__global__ void k(float *p) { nvcuda::wmma::fragment<"
            "nvcuda::wmma::accumulator, 16, 16, 16, float> f; p[0] = f.x[0]; }",
        }[header]
    )
    assert "k" in compile(Source.cuda(text), H200).kernels


@nvidia
def test_halves_need_no_header_as_on_other_targets() -> None:
    made = compile(Source.cuda("__global__ void k(__half *p, half h) { p[0] = h; }"), H200)
    params = made.kernels["k"].params
    assert params is not None
    assert [param.type for param in params] == ["ptr", "f16"]
    compile(Source.cuda("__global__ void half(int *p) { int half = 2; p[0] = half; }"), H200)


@nvidia
def test_an_error_names_the_users_line() -> None:
    text = "#define TWICE(x) ((x) + \\\n (x))\n\n__global__ void k(int *p) {\n  p[0] = TWICE(q);\n}"
    with pytest.raises(CompileError, match=r"for sm_90 by NVRTC .*: user\.cu:5: error:") as caught:
        compile(Source.cuda(text, name="user.cu"), H200)
    assert 'user.cu:5: error: identifier "q" is undefined' in caught.value.log
    assert caught.value.code == "compile"
    assert caught.value.driver == "cuda"


@nvidia
def test_a_warning_is_kept_in_the_log() -> None:
    made = compile(Source.cuda("__global__ void k() { int unused = 1; }", name="user.cu"), H200)
    assert "user.cu:1: warning" in made.log


@nvidia
def test_a_header_that_is_missing_is_said_with_where_headers_come_from() -> None:
    with pytest.raises(CompileError, match=r"absent\.h.*CUDA_HOME"):
        compile(Source.cuda("#include <absent.h>\n__global__ void k() {}"), H200)


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.h", "a/../../x.h"])
def test_other_files_are_not_included(name: str) -> None:
    if installed("cuda") is None:
        pytest.skip("NVRTC is not installed")
    with pytest.raises(CompileError, match=r"kernel\.cu:2: #include of .*put other text into"):
        compile(Source.cuda(f'\n#include "{name}"\n__global__ void k() {{}}'), H200)


@nvidia
def test_each_option_reaches_the_compiler() -> None:
    text = 'extern "C" __global__ void k(float *p) { p[0] = p[1] * p[2] + expf(p[3]) / p[4]; }'
    plain = ptx(text)
    assert "fma.rn.f32" in plain
    assert "mul.rn.f32" in ptx(text, "--fmad=false")
    assert "mul.rn.f32" not in plain
    assert "div.approx.ftz" in ptx(text, "--use_fast_math")
    assert "div.approx.ftz" not in plain
    assert ".loc" in ptx(text, "--lineinfo")
    assert ".loc" not in plain
    many = "".join(f"float v{i} = p[{i}];" for i in range(64))
    uses = "".join(f"p[{i}] = v{63 - i} * v{i};" for i in range(64))
    wide = Source.cuda(f'extern "C" __global__ void k(float *p) {{ {many} {uses} }}')
    for most in (24, 40):
        code = compile(wide, H200, options=[f"--maxrregcount={most}"]).code
        # The record of a kernel's registers: its number is 0x2f, then come 8 bytes.
        at = code.index(b"\x04\x2f\x08\x00")
        assert struct.unpack_from("<II", code, at + 4)[1] == most
    value = 'extern "C" __global__ void k(int *p) { p[0] = VALUE; }'
    assert "1234567" in ptx(value, "-DVALUE=1234567")
    assert "1234567" in ptx(value, "-DVALUE=1234567", defines={"VALUE": 1})
    assert "7654321" in ptx(value, defines={"VALUE": 7654321})
    with pytest.raises(CompileError, match="VALUE"):
        ptx(value, "-UVALUE", defines={"VALUE": 7})
    newer = "template <class T> concept Any = true;\n" + text
    ptx(newer, "--std=c++20", "-O1")
    with pytest.raises(CompileError):
        ptx(newer, "--std=c++17")


@nvidia
def test_a_source_can_ask_who_compiles_it() -> None:
    ptx("#if !__DRIVETRAIN__ || !defined(__CUDACC_RTC__)\n#error\n#endif\n__global__ void k() {}")


@nvidia
def test_a_name_that_the_compiler_does_not_know_costs_only_the_names() -> None:
    made = compile(
        Source.cuda(
            "#if !__has_include(<cuda_fp16.h>) && 0\n#endif\n"
            "#if !__has_include(<stdint.h>)\n__global__ void ghost() {}\n#endif\n"
            '#include <stdint.h>\nextern "C" __global__ void real(int *p) { p[0] = 1; }'
        ),
        H200,
    )
    assert "real" in made.kernels
    assert "ghost" not in made.kernels


@nvidia
def test_the_same_source_has_the_same_kernels_on_every_target() -> None:
    source = Source.cuda(KERNELS.partition("namespace")[0])
    there = program(source, read_options(())).kernels
    here = compile(source, H200).kernels
    assert {name: (facts.params, facts.launch_bounds) for name, facts in here.items()} == {
        name: (kernel_params(kernel), kernel.launch_bounds) for name, kernel in there.items()
    }


# -- the scan --------------------------------------------------------------------------------------


def names(text: str, **defines: str) -> list[str]:
    return [kernel.name for kernel in written_kernels(text, defines)]


def test_kernels_are_found_whatever_else_is_there() -> None:
    text = """
    #include <anything.h>
    #define KERNEL extern "C" __global__
    struct __align__(8) P { float a; __device__ P operator+(P o) const { return o; } };
    __device__ P operator-(P a, P b) { return a; }
    __device__ float table[] = {1, 2};
    __constant__ struct { int a; } c = {1};
    enum class E : int { A, B };
    auto lambda = [](int x) { return x; };
    template <class T> struct Holder { T value; };
    template <class T, int N = (1 < 2)> __device__ T first(T (&x)[N]) { return x[0]; }
    __global__ void declared(int *);
    KERNEL void one(int *p) {}
    extern "C" { __global__ void two(Holder<Holder<int>> h) {} }
    namespace a::b { inline namespace c { __global__ void three() {} } using x = int; }
    __global__ void __launch_bounds__(128, 2) four(void (*f)(int)) {}
    template <> __global__ void five<int>(int) {}
    template <class T> __global__ void six(T) {}
    template __global__ void six<unsigned   int>(unsigned int);
    template __global__ void a::seven<Holder<int> >(Holder<int>);
    #ifdef MORE
    __global__ void eight() {}
    #endif
    // __global__ void nine() {}
    const char *text = "__global__ void ten() {}";
    """
    want = ["one", "two", "a::b::c::three", "four", "five<int>", "six<unsigned int>"]
    assert names(text) == [*want, "a::seven<Holder<int>>"]
    assert names(text, MORE="1") == [*want, "a::seven<Holder<int>>", "eight"]
    assert names('"no end') == []


def test_without_the_parser_a_kernel_without_types_of_its_own_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = KERNELS + "__global__ void __launch_bounds__(2 * 32, 1) named(V v, float4 *q) {}"
    with_parser = {kernel.name: kernel for kernel in written_kernels(text, {})}
    monkeypatch.setitem(sys.modules, "tree_sitter", None)
    without = {kernel.name: kernel for kernel in written_kernels(text, {})}
    assert [name for name, kernel in without.items() if kernel.facts.params is not None] == [
        "late", "mine", "deep::er::inside",
    ]  # fmt: skip
    for name in ("late", "mine", "deep::er::inside"):
        assert without[name].facts == with_parser[name].facts
    assert with_parser["named"].facts.launch_bounds == 64
    (alone,) = written_kernels("__global__ void __launch_bounds__(2 * 32, 1) k(uint n) {}", {})
    assert (alone.facts.params, alone.facts.launch_bounds) == ((Param("u32", 4, "n"),), 64)


def test_any_text_is_scanned() -> None:
    """What no longer is CUDA C costs the facts of kernels, never an error of ours."""
    chance = random.Random(7)
    words = [(token.text, token.start, token.space) for token in scan(KERNELS)]
    for _ in range(60):
        mixed = list(words)
        for _ in range(chance.randrange(1, 8)):
            at = chance.randrange(len(mixed))
            if chance.random() < 0.5:
                del mixed[at]
            else:
                mixed.insert(at, chance.choice(words))
        text = "".join(f"{chr(10) * start}{' ' * space}{word}" for word, start, space in mixed)
        for kernel in written_kernels(text, {}):
            assert kernel.name
            assert kernel.expression


def test_parameters_that_the_compiler_has_otherwise_are_not_told() -> None:
    written = written_kernels('extern "C" __global__ void k(int *p, short n) {}', {})
    told = rtc._facts(written, {"k": "k"}, {"k": [8, 2]})["k"]
    assert told.params is not None
    assert [param.type for param in told.params] == ["ptr", "i16"]
    assert rtc._facts(written, {"k": "k"}, {"k": [8, 4]})["k"].params is None
    assert rtc._facts(written, {"k": "k"}, {})["k"].params == told.params


def test_sizes_of_parameters_in_ptx() -> None:
    text = (
        ".visible .entry a(\n\t.param .u64 .ptr .align 1 a_0,\n\t.param .align 4 .b8 a_1[12],\n"
        "\t.param .f32 a_2\n)\n.maxntid 64\n{ }\n.weak .entry _Z1b()\n{ }\n.entry c { }"
    )
    assert entry_sizes(text) == {"a": [8, 12, 4], "_Z1b": [], "c": []}


# -- a library that fails as it is told ------------------------------------------------------------

Fake = Callable[..., Path]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Builds a library below a toolkit's folder, and names that folder."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    monkeypatch.setenv("FAKE_RTC_SEEN", str(tmp_path / "seen"))

    def make(how: str = "", kind: str = "nvrtc", version: str = "12.4", *flags: str) -> Path:
        monkeypatch.setenv("FAKE_RTC", how)
        root = tmp_path / f"toolkit-{kind}"
        (root / "lib64").mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("CUDA_HOME" if kind == "nvrtc" else "ROCM_PATH", str(root))
        major, minor = version.split(".")
        command = [compiler, "-shared", "-fPIC", f"-DP(x)={kind}##x", *flags, str(FAKE)]
        if kind == "nvrtc":
            command += ["-DNVIDIA", f"-DMAJOR={major}", f"-DMINOR={minor}"]
            command += ["-DREAL", "-DTELLS"] if not flags else []
        library = root / "lib64" / f"lib{kind}.so.{version}"
        subprocess.run([*command, "-o", str(library)], check=True, timeout=60)
        return tmp_path / "seen"

    return make


def seen(path: Path, what: str) -> list[str]:
    rows = [line.partition("\t") for line in path.read_text().splitlines()]
    return [rest for word, _, rest in rows if word == what]


TEXT = Source.cuda("__global__ void add(int *p, int n) { p[0] += n; }", name="user.cu")


def made_by(fake: Fake, *asked: str, target: Target = H200, options: Any = ()) -> Compiled:
    fake(*asked)
    return compile(TEXT, target, options=options)


def test_a_library_of_a_toolkit_is_asked_and_answers(fake: Fake) -> None:
    path = fake()
    made = compile(TEXT, H200, options=["-O2", "-DN=3", "-UM", "--std=c++20"])
    assert (made.form, made.code) == ("cubin", b"\x7fELF cubin\0")
    facts = made.kernels["add"]
    assert facts.symbol == "_Z_add"
    assert facts.params is not None
    assert [param.name for param in facts.params] == ["p", "n"]
    assert seen(path, "name") == ["user.cu"]
    assert seen(path, "text") == [TEXT.text]
    assert seen(path, "expression") == ["add"]
    assert seen(path, "option") == [
        "--std=c++20",
        "--pre-include=drivetrain_prelude.h",
        "--define-macro=__DRIVETRAIN__=1",
        "--define-macro=N=3",
        "--undefine-macro=M",
        "--ptxas-options=-O2",
        "--gpu-architecture=sm_90",
    ]


def test_cuda_11_0_makes_ptx(fake: Fake) -> None:
    path = fake("", "nvrtc", "11.0", "-DOLD")
    made = compile(TEXT, H200)
    assert made.form == "ptx"
    assert made.code.startswith(b".visible .entry _Z_add(")
    assert seen(path, "option")[-1] == "--gpu-architecture=compute_80"


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("abort", HalError, r"user\.cu: NVRTC 12\.4 \(.*\) did not finish: it crashed \(SIGABRT\)"),
        ("exit", HalError, "did not finish: it ended with exit code 3"),
        ("fail1", HalError, r"failed \(nvrtcCompileProgram: SOMETHING\)"),
        ("fail5", Unsupported, "does not take these options"),
        ("fail6", CompileError, r"user\.cu cannot be compiled for sm_90 by NVRTC 12\.4"),
        ("empty", HalError, "it gave no code for sm_90"),
    ],
)
def test_each_way_to_fail_is_an_error_and_no_more(
    fake: Fake, how: str, kind: type[HalError], message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        made_by(fake, how)
    assert type(caught.value) is kind
    fake("")
    assert compile(TEXT, H200).code  # nothing of the failure was kept


def test_a_compiler_that_hangs_is_ended(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRIVETRAIN_COMPILE_LIMIT_S", "1")
    with pytest.raises(HalError, match="did not end within 1 s"):
        made_by(fake, "hang")


def test_a_failure_with_names_is_tried_without(fake: Fake) -> None:
    path = fake("unnamed")
    made = compile(TEXT, H200)
    assert seen(path, "expression") == ["add"]
    # PTX tells the symbols that are there.
    assert list(made.kernels) == ["_Z_add"]
    assert made.kernels["_Z_add"].params is None


def test_a_warning_is_in_the_users_file(fake: Fake) -> None:
    assert made_by(fake, "log").log == "user.cu:7: warning: something"


def test_a_file_that_is_no_library_is_said(fake: Fake, tmp_path: Path) -> None:
    fake()
    (tmp_path / "toolkit-nvrtc" / "lib64" / "libnvrtc.so.12.4").write_bytes(b"not a library")
    with pytest.raises(Unsupported, match=r"libnvrtc\.so\.12\.4 cannot be used as nvrtc"):
        compile(TEXT, H200)


def test_hiprtc_is_asked_for_architectures_that_it_may_know(fake: Fake) -> None:
    path = fake("", "hiprtc", "6.2")
    made = compile(TEXT, MI200, options=["-DN=3", "--use_fast_math", "--fmad=false", "--lineinfo"])
    assert (made.form, made.code) == ("hsaco", b"\x7fELF hsaco\0")
    assert made.kernels["add"].symbol == "_Z_add"
    assert seen(path, "option") == [
        "-std=c++17", "-include", "drivetrain_prelude.h", "-Wno-macro-redefined",
        "-D__DRIVETRAIN__=1", "-DN=3", "-O3", "-ffast-math", "-ffp-contract=off",
        "-gline-tables-only", "--gpu-architecture=gfx90a",
    ]  # fmt: skip
    compile(TEXT, Target("hip", "gfx942:sramecc+:xnack-"))
    for arch in ("gfx777", "sm_90", "gfx90a:evil", "gfx90a -x"):
        with pytest.raises(Unsupported, match="not asked for the architecture"):
            compile(TEXT, Target("hip", arch))


def test_a_crash_of_hiprtc_says_that_it_may_be_too_old(fake: Fake) -> None:
    fake("abort", "hiprtc", "5.2")
    with pytest.raises(HalError, match=r"hiprtc 5\.2 .* crashed .*too old for gfx90a"):
        compile(TEXT, MI200)


@amd
def test_the_real_hiprtc_makes_a_code_object() -> None:
    made = compile(Source.cuda(KERNELS.partition("namespace")[0]), MI200)
    assert made.form == "hsaco"
    assert made.code[:4] == b"\x7fELF"
    assert "scale<float,4>" in made.kernels
    with pytest.raises(CompileError, match=r"user\.cu:3: error: .*undeclared identifier 'q'"):
        compile(Source.cuda("\n__global__ void k(int *p) {\n  p[0] = q;\n}", name="user.cu"), MI200)


# -- where the libraries are -----------------------------------------------------------------------


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any; the folder is its site-packages."""
    site = tmp_path / "site"
    site.mkdir()
    for name in ("CUDA_HOME", "CUDA_PATH", "ROCM_PATH", "ROCM_HOME", "HIP_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(rtc_library, "_sites", lambda: iter([site]))
    monkeypatch.setattr(rtc_library, "_system_libraries", tuple)
    monkeypatch.setattr(rtc_library.sys, "prefix", str(tmp_path / "prefix"))
    for kind in rtc_library._KINDS.values():
        folders = tuple(str(tmp_path / "local" / Path(f).name) for f in kind.folders)
        monkeypatch.setitem(
            rtc_library._KINDS,
            "cuda" if kind.name == "nvrtc" else "hip",
            rtc_library._Kind(**{**vars(kind), "folders": folders}),
        )
    return site


def put(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder / names[0]


def test_without_a_library_the_package_is_named(nowhere: Path) -> None:
    with pytest.raises(Unsupported, match=r"pip install nvidia-cuda-nvrtc .*CUDA_HOME"):
        compile(TEXT, H200)
    with pytest.raises(Unsupported, match=r"hiprtc.*ROCM_PATH"):
        compile(TEXT, MI200)


def test_wheels_toolkits_and_what_is_asked_for(
    nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = tmp_path / "local"
    old = put(
        local / "cuda-12.4" / "lib64", "libnvrtc.so.12.4.127", "libnvrtc-builtins.so.12.4.127"
    )
    (local / "cuda-12.4" / "lib64" / "libnvrtc.so.12").symlink_to("libnvrtc.so.12.4.127")
    new = put(local / "cuda-12.10" / "lib64", "libnvrtc.so.12.10.3", "libnvrtc-builtins.so.12.10")
    assert rtc_library.library("cuda").path == new
    assert rtc_library.library("cuda").version == (12, 10, 3)
    wheel = put(
        nowhere / "nvidia" / "cu13" / "lib",
        "libnvrtc.so.13", "libnvrtc.alt.so.13", "libnvrtc-builtins.so.13.5",
    )  # fmt: skip
    put(nowhere / "nvidia" / "cu13" / "include", "cuda_fp16.h")
    found = rtc_library.library("cuda")
    assert (found.path, found.version) == (wheel, (13, 5))
    assert found.preload == (wheel.with_name("libnvrtc-builtins.so.13.5"),)
    assert found.include == (nowhere / "nvidia" / "cu13" / "include",)
    # A driver of CUDA 12 does not load what 13 makes.
    assert rtc_library.library("cuda", "12.4").path == new
    assert rtc_library.library("cuda", "13.0").path == wheel
    assert rtc_library.library("cuda", "11.4").path == wheel
    monkeypatch.setenv("CUDA_HOME", str(local / "cuda-12.4"))
    assert rtc_library.library("cuda").path == old


def test_all_of_cuda_11_is_called_11_2_and_the_builtins_tell(nowhere: Path) -> None:
    put(nowhere / "nvidia" / "cuda_nvrtc" / "lib", "libnvrtc.so.11.2", "libnvrtc-builtins.so.11.8")
    put(nowhere / "nvidia" / "cuda_runtime" / "include", "cuda_fp16.h")
    found = rtc_library.library("cuda")
    assert found.version == (11, 8)
    assert found.title == "NVRTC 11.8"
    assert found.include == (nowhere / "nvidia" / "cuda_runtime" / "include",)


def test_another_library_is_another_key_of_the_cache(nowhere: Path) -> None:
    path = put(nowhere / "nvidia" / "cu13" / "lib", "libnvrtc.so.13", "libnvrtc-builtins.so.13.5")
    before = rtc.identity(TEXT, H200)
    assert rtc.identity(TEXT, H200) == before
    path.write_bytes(b"other")
    assert rtc.identity(TEXT, H200) != before


def test_hiprtc_in_its_own_library_or_in_the_runtimes(nowhere: Path, tmp_path: Path) -> None:
    runtime = put(tmp_path / "local" / "rocm" / "lib", "libamdhip64.so.5.2.21153")
    assert rtc_library.library("hip").path == runtime
    own = put(tmp_path / "local" / "rocm" / "lib", "libhiprtc.so.6.2.0")
    assert rtc_library.library("hip").path == own
    assert rtc_library.library("hip").title == "hiprtc 6.2.0"


def test_an_option_that_names_a_file_never_gets_there() -> None:
    for option in ("--include-path=/etc", "-I/etc", "-include x", "@file", "-ptx", "-Xptxas=-v"):
        with pytest.raises(BadInput, match=re.escape(repr(option))):
            compile(TEXT, H200, options=[option])

"""Compiler options: read into facts, written anew; nothing of the caller's reaches a compiler."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.errors import BadInput
from drivetrain.hal.driver import Target
from drivetrain.hal.language.compilers import cxx, rtc
from drivetrain.hal.language.compilers.rtc_library import Library
from drivetrain.hal.language.options import ALLOWED, Options, read_options
from drivetrain.hal.language.source import Source

GOOD = {
    "-DN=4": Options(defines={"N": "4"}),
    "-DN": Options(defines={"N": "1"}),
    "-D N=a b": Options(defines={"N": "a b"}),
    "-DN=": Options(defines={"N": ""}),
    "-DN=a=b": Options(defines={"N": "a=b"}),
    "-UN": Options(undefines=("N",)),
    "-U N": Options(undefines=("N",)),
    "-O0": Options(level=0),
    "-O3": Options(level=3),
    "--use_fast_math": Options(fast_math=True),
    "-use_fast_math": Options(fast_math=True),
    "--fmad=true": Options(fmad=True),
    "--fmad=false": Options(fmad=False),
    "--std=c++17": Options(std="c++17"),
    "-std=c++20": Options(std="c++20"),
    "--maxrregcount=32": Options(registers=32),
    "--lineinfo": Options(lineinfo=True),
    "-lineinfo": Options(lineinfo=True),
    "--generate-line-info": Options(lineinfo=True),
}
BAD = [
    "", "-", "--", "kernel.cu", "/etc/passwd", "-I/etc", "-I", "-include", "--pre-include=x",
    "--include-path=/", "@file", "-o", "-oout", "-L/", "-lm", "-Wl,-rpath", "-fplugin=x.so",
    "-B/tmp", "-specs=x", "--sysroot=/", "-x", "-Xptxas", "-Xcompiler=-fplugin", "-O4", "-Os", "-O",
    "-O3 -I/etc", "--std=c++98", "--std=gnu++17", "--std=c++17 -I/", "--fmad=maybe", "--fmad",
    "--maxrregcount=0", "--maxrregcount=8", "--maxrregcount=256", "--maxrregcount=1e2",
    "--maxrregcount=٣٢", "-D1N", "-D", "-D=3", "-DN M", "-DN(x)=x", "-Ddefined", "-DN=a\nb",
    "-DN=a\0b", "-DN=\r", "-UN=1", "-U1", "-U", " -DN", "-DN=\u2028", "--use_fast_math=x", "-DÄ=1",
    "\n-O3", "-O3\n", "-UN\n", "--lineinfo\n", "--std=c++17\n", "-march=native", "-ffast-math",
]  # fmt: skip


@pytest.mark.parametrize("option", GOOD)
def test_what_is_allowed_is_read(option: str) -> None:
    assert read_options([option]) == GOOD[option]
    assert read_options(option) == GOOD[option]


@pytest.mark.parametrize("option", BAD)
def test_all_else_is_refused(option: str) -> None:
    with pytest.raises(BadInput):
        read_options([option])


def test_a_refusal_lists_what_there_is() -> None:
    with pytest.raises(BadInput) as caught:
        read_options(["-I/etc"])
    assert "'-I/etc' is not allowed" in str(caught.value)
    for option in ALLOWED:
        assert option in str(caught.value)


def test_what_is_no_option_at_all() -> None:
    with pytest.raises(BadInput, match="a compiler option is a int"):
        read_options([3])  # type: ignore[list-item]
    with pytest.raises(BadInput, match="257 compiler options"):
        read_options(["-O1"] * 257)
    assert read_options(["-O1"] * 256).level == 1
    assert read_options(()) == Options()


def test_the_last_one_counts_and_options_go_over_the_sources_own() -> None:
    assert read_options(["-O1", "-O3", "--fmad=true", "--fmad=false"]) == Options(
        level=3, fmad=False
    )
    assert read_options(["-DN=2"], [("N", "1"), ("M", "5")]).defines == {"N": "2", "M": "5"}
    assert read_options(["-UN"], [("N", "1")]) == Options(undefines=("N",))
    assert read_options(["-UN", "-DN=3"]) == Options(defines={"N": "3"})
    assert read_options(["-DN=3", "-UN"]) == Options(undefines=("N",))


# -- what compilers see ----------------------------------------------------------------------------

LIBRARY = Library("nvrtc", Path("/opt/libnvrtc.so.13"), (13, 5), (), ())
SOURCE = Source.cuda("__global__ void k() {}")
NVRTC = re.compile(
    r"--std=c\+\+(11|14|17|20)|--pre-include=drivetrain_prelude\.h|--use_fast_math|--fmad=(true|false)"
    r"|--maxrregcount=\d{2,3}|--generate-line-info|--ptxas-options=-O[0-3]"
    r"|--define-macro=[A-Za-z_]\w*=[^\n\r\0]*|--undefine-macro=[A-Za-z_]\w*",
    re.ASCII,
)
CLANG = re.compile(
    r"-std=c\+\+(11|14|17|20)|-include|drivetrain_prelude\.h|-Wno-macro-redefined|-O[0-3]"
    r"|-ffast-math|-ffp-contract=(fast|off)|-gline-tables-only"
    r"|-D[A-Za-z_]\w*=[^\n\r\0]*|-U[A-Za-z_]\w*",
    re.ASCII,
)
CXX = re.compile(r"-O[0-3]|-m(arch|cpu)=native|-std=c\+\+17|-shared|-w|-g1|-fPIC|-f[a-z=-]+")

words = st.sampled_from([*GOOD, *BAD]) | st.text(max_size=12)
options = st.lists(
    words
    | st.builds("-D{}={}".format, st.text(max_size=6), st.text(max_size=12))
    | st.builds("-U{}".format, st.text(max_size=6))
    | st.builds("{}{}".format, st.sampled_from([*GOOD]), st.text(max_size=6)),
    max_size=5,
)


@given(options)
@settings(max_examples=400)
def test_whatever_is_given_only_known_words_reach_a_compiler(given: list[str]) -> None:
    try:
        read = read_options(given)
    except BadInput:
        return
    job = rtc._Job(SOURCE, Target("cuda", "sm_90"), read, LIBRARY)
    for pattern, line in (
        (NVRTC, job._nvrtc_options()),
        (CLANG, job._hiprtc_options()),
        (CXX, cxx._flags(read)),
    ):
        for word in line:
            assert pattern.fullmatch(word), word
    assert len(given) <= 5


def test_the_patterns_themselves_refuse_what_names_a_file() -> None:
    for word in ("-I/etc", "--include-path=/etc", "@x", "-o", "x.cu", "-fplugin=/x.so", "-Wl,x"):
        assert not any(pattern.fullmatch(word) for pattern in (NVRTC, CLANG, CXX))

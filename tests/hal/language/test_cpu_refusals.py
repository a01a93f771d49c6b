"""What cannot be translated is refused with the user's line; nothing else ever comes out."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from drivetrain import hal
from drivetrain.errors import BadInput, CompileError, HalError, Unsupported
from drivetrain.hal.language.compilers import cxx
from drivetrain.hal.language.facts import Translated
from drivetrain.hal.language.options import read_options

HEAD = "__global__ void k(int *p, float *f, int n) {\n"
CASES = {
    "lambda": (2, HEAD + " auto g = [](int x) { return x; };\n p[0] = g(1);\n}", "lambda"),
    "function pointer": (2, HEAD + " int (*g)(int);\n}", "pointers to functions"),
    "union": (1, "union U { int a; float b; };\n" + HEAD + "}", "union"),
    "class": (1, "class C { int a; };\n" + HEAD + "}", "class"),
    "member function": (2, "struct S { int a;\n int get() { return a; } };\n" + HEAD + "}", "get"),
    "unknown name": (3, HEAD + " int x = 1;\n p[0] = y;\n}", "'y' is not known"),
    "unknown function": (2, HEAD + " p[0] = foo(1);\n}", "'foo' is not known"),
    "unknown type": (2, HEAD + " Foo x;\n}", "'Foo' is not known"),
    "wrong argument": (2, HEAD + " f[0] = sqrtf(p);\n}", "sqrtf does not take"),
    "const": (3, HEAD + " const int x = 1;\n x = 2;\n}", "const"),
    "store to const": (3, HEAD + " const int *q = p;\n __stcs(q, 1);\n}", "may be written"),
    "goto": (2, HEAD + " goto end;\n end: p[0] = 1;\n}", "goto"),
    "printf": (2, HEAD + ' printf("hello");\n}', "printf is not part"),
    "assembly": (2, HEAD + ' asm("nop");\n}', "assembly"),
    "malloc": (2, HEAD + " void *q = malloc(4);\n}", "allocated"),
    "launch": (2, HEAD + " k<<<1, 1>>>(p, f, n);\n}", "launch|not called"),
    "volatile": (2, HEAD + " volatile int x = 1;\n}", "volatile"),
    "double to bits": (2, HEAD + " p[0] = *f & 1;\n}", "whole numbers"),
    "assignment before a comma": (2, HEAD + " p[0] = (n = 1, n + 1);\n}", "brackets of its own"),
    "addition before a comma": (2, HEAD + " p[0] = (n += 3, --n);\n}", "brackets of its own"),
    "number after a name": (2, HEAD + " p[0] = (n 3, n);\n}", "not CUDA C"),
    "missing bracket": (2, HEAD + " p[0] = (1 + 2;\n}", "missing|not CUDA C"),
    "missing brace": (2, HEAD + " p[0] = 1;\n", "missing"),
    "comment without end": (2, HEAD + " /* p[0] = 1;\n}", "no end"),
    "strange character": (2, HEAD + " p[0] = 1 € 2;\n}", "does not belong"),
    "include": (1, "#include <vector>\n" + HEAD + "}", "include"),
    "error directive": (2, "#if 1\n#error not here\n#endif\n" + HEAD + "}", "not here"),
    "endif missing": (1, "#ifdef A\n" + HEAD + "}", "endif"),
    "macro": (4, "#define INC(x) \\\n  ((x) + missing)\n" + HEAD + " p[0] = INC(1);\n}", "missing"),
    "macro inside": (
        6,
        "#define A(x) B(x)\n#define B(x) (x) + \\\n  C\n" + HEAD + " p[1] = 0;\n"
        " p[0] = A(\n 1);\n}",
        "'C'",
    ),
    "macro with arguments on more lines": (
        3,
        "#define ADD(a, b) ((a) + (b))\n" + HEAD + " p[0] = ADD(1,\n   nowhere);\n}",
        "nowhere",
    ),
    "template argument": (
        4,
        "template <int N> __device__ int g(int x) { return x + N; }\n" + HEAD + " int y = 2;\n"
        " p[0] = g<y>(1);\n}",
        "template",
    ),
    "static_assert": (2, HEAD + ' static_assert(sizeof(int) == 8, "small");\n}', "static_assert"),
    "barrier in an expression": (2, HEAD + " p[0] = 1, __syncthreads();\n}", "statement of its"),
    "barrier in recursion": (
        5,
        "__device__ void f(int n) {\n if (n) f(n - 1);\n __syncthreads();\n}\n"
        "__global__ void k(int n) { f(n); }",
        "calls itself",
    ),
    "too much shared memory": (2, HEAD + " __shared__ int s[1 << 20];\n p[0] = s[0];\n}", "shared"),
    "too large a variable": (2, HEAD + " int s[1 << 20];\n p[0] = s[n];\n}", "bytes"),
    "return type": (1, "__global__ int k() { return 1; }", "returns a value"),
    "reference parameter": (1, "__global__ void k(int &x) { x = 1; }", "reference"),
    "global variable": (1, "__device__ int counter;\n" + HEAD + " counter = 1;\n}", "pointer"),
    "duplicate": (2, "__global__ void k() {}\n__global__ void k() {}", "twice"),
    "constant from outside": (1, "__constant__ float w[4];\n" + HEAD + "}", "__constant__"),
}


def translated(text: str):
    return cxx.translation(hal.Source.cuda(text), read_options(()))


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_with_its_line(case):
    line, text, says = CASES[case]
    with pytest.raises(CompileError, match=says) as caught:
        translated(text)
    assert caught.value.log.startswith(f"kernel.cu:{line}: "), caught.value.log
    assert "cpu" in str(caught.value)


@pytest.mark.parametrize(
    "inside",
    [
        "if (n) " * 3000 + ";",
        "if (n) ; else " * 3000 + ";",
        "{" * 3000 + "}" * 3000,
        "p[0] = " + "(" * 1000 + "1" + ")" * 1000 + ";",
        "p[0] = " + "1 + " * 20000 + "1;",
        "p[0] = " + "- " * 5000 + "1;",
        "p[0] = " + "n ? 1 : " * 3000 + "2;",
        "p[0] = " * 3000 + "2;",
        "p[0] = 1, " * 3000 + "p[0] = 2;",
        "int " + "*" * 3000 + "q;",
        "int q" + "[2]" * 3000 + ";",
        "for (;n;) " * 2000 + ";",
        "p[" * 2000 + "0" + "]" * 2000 + "=1;",
        "f[0] = " + "sqrtf(" * 1500 + "1.f" + ")" * 1500 + ";",
        "p[0] = " + "~" * 3000 + "1;",
        "p[0] = " + "(int)" * 3000 + "1;",
        "p[0] = " + "*&" * 3000 + "p[0];",
    ],
    ids=lambda text: text[:12],
)
def test_code_that_is_nested_without_end_is_refused(inside):
    with pytest.raises(CompileError, match=r"kernel\.cu"):
        translated(HEAD + inside + "}")


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f"#define A{i} A{i - 1} A{i - 1}" for i in range(1, 50))
        + "\n#define A0 1 +\n"
        + HEAD
        + "p[0] = A49 1; }",
        "template <int N> __device__ int g(int x) { return g<N + 1>(x); }\n"
        + HEAD
        + "p[0] = g<0>(1); }",
        "struct A { A a; };\n" + HEAD + "}",
        "#define F(x) F(F(x))\n" + HEAD + "p[0] = " + "F(" * 300 + "1" + ")" * 300 + "; }",
    ],
)
def test_what_makes_ever_more_of_itself_is_refused(text):
    with pytest.raises(CompileError):
        translated(text)


def test_a_macro_may_name_itself_and_a_long_source_is_fine():
    text = HEAD + "#define n (n + 1)\n p[0] = n;\n" + " p[1] = 2;\n" * 3000 + "}"
    assert "k" in translated(text).kernels


TEXT = (
    "__global__ __device__ __shared__ void int float unsigned char k p n x if else for while "
    "do switch case default break continue return struct template typename T < > ( ) { } [ ] "
    "; , . -> :: + - * / % & | ^ ! ~ = == != += << >> ? : 0 1 2u 3.5f 0x7f 1e9 'a' \"s\" "
    "threadIdx.x blockIdx.y __syncthreads() __syncwarp() __shfl_down_sync(~0u,x,1) "
    "atomicAdd(p,1) sizeof static_cast<int>(x) const & && auto extern enum using typedef "
    "constexpr #define #if #endif \\ // /* */ nullptr true float4 make_float4 double long half "
    "operator this goto new "
)
WORDS = TEXT.split()
token = st.one_of(
    st.sampled_from(WORDS), st.sampled_from([" ", "\n", "\n#"]), st.text(min_size=1, max_size=3)
)
soup = st.lists(token, max_size=40).map(" ".join)
GOOD = (
    "__device__ int g(int a) { return a * 2; }\nstruct S { int a; float b; };\n"
    "__global__ void k(int *p, float *f, int n) {\n"
    "  int i = blockIdx.x * blockDim.x + threadIdx.x;\n  __shared__ float s[32];\n"
    "  for (int j = 0; j < n; j++) { s[i % 32] += f[j]; __syncthreads(); }\n"
    "  S v = {1, 2.f}; if (i < n) p[i] = g(v.a) + (int)s[0]; else return;\n}\n"
)


def only_refusals(text: str) -> None:
    try:
        translated(text)
    except (CompileError, BadInput, Unsupported):
        pass


@settings(max_examples=60)
@given(soup)
@example("template <> __global__ void k")
@example("__global__ void k(int x[")
@example("#define A(")
def test_token_soup_at_the_top_is_only_ever_refused(text):
    only_refusals(text)


@settings(max_examples=100)
@given(soup)
def test_token_soup_in_a_kernel_is_only_ever_refused(text):
    only_refusals("__global__ void k(int *p, float x, int n) {" + text + "}")


@settings(max_examples=120)
@given(st.data())
def test_a_kernel_with_words_changed_is_only_ever_refused(data):
    words = GOOD.replace("(", " ( ").replace(")", " ) ").replace(";", " ; ").split(" ")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(words) - 1))
        how = data.draw(st.sampled_from(["drop", "double", "swap", "replace"]))
        if how == "drop":
            del words[at]
        elif how == "double":
            words.insert(at, words[at])
        elif how == "swap":
            other = data.draw(st.integers(0, len(words) - 1))
            words[at], words[other] = words[other], words[at]
        else:
            words[at] = data.draw(token)
    only_refusals(" ".join(words))


def test_no_compiler_is_unsupported_and_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Unsupported, match=r"g\+\+"):
        hal.device("cpu:0").compile(hal.Source.cuda(HEAD + "}// no compiler"))


def test_a_compiler_that_hangs_or_fails_is_an_error_that_names_it(monkeypatch, tmp_path):
    fake = tmp_path / "slow"
    fake.write_text('#!/bin/sh\n[ "$1" = --version ] && echo slow 1 && exit\nsleep 60\n')
    fake.chmod(0o755)
    monkeypatch.setenv("CXX", str(fake))
    monkeypatch.setenv("DRIVETRAIN_COMPILE_LIMIT_S", "0.3")
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(HalError, match=r"slow.*did not end within"):
        hal.device("cpu:0").compile(hal.Source.cuda(HEAD + "}"))


def test_what_the_compiler_says_of_translated_code_names_the_users_line(monkeypatch, tmp_path):
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(tmp_path / "cache"))
    broken = Translated("int good;\nint bad = ;\n", {}, (4, 7))
    monkeypatch.setattr(cxx, "translate", lambda program: broken)
    with pytest.raises(CompileError, match=r"kernel\.cu:7: error") as caught:
        hal.device("cpu:0").compile(hal.Source.cuda(HEAD + "}"))
    assert "kernel.cu:7: error" in caught.value.log

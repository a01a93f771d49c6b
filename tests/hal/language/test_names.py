"""An instance of a template is found however its name is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.errors import BadInput
from drivetrain.hal import registry
from drivetrain.hal.language.facts import Compiled, KernelFacts
from drivetrain.hal.language.frontend import program
from drivetrain.hal.language.names import plain_name
from drivetrain.hal.language.options import read_options
from drivetrain.hal.language.source import Source


@pytest.mark.parametrize(
    ("written", "plain"),
    [
        ("scale", "scale"),
        (" scale ", "scale"),
        ("a::scale", "a::scale"),
        ("scale<float>", "scale<float>"),
        ("scale< float , 4 >", "scale<float,4>"),
        ("scale<uint32_t, 2 * 2>", "scale<unsigned int,4>"),
        ("scale<unsigned>", "scale<unsigned int>"),
        ("scale<float4, -1>", "scale<float4,-1>"),
        ("scale<float *>", "scale<float*>"),
        ("scale<Mine, 4>", "scale<Mine,4>"),
        ("scale<", "scale<"),
        ("scale<float> x", "scale<float>x"),
        ('scale<">', 'scale<">'),
        ("", ""),
    ],
)
def test_a_name_has_one_plain_form(written: str, plain: str) -> None:
    assert plain_name(written) == plain


def test_the_plain_form_is_what_the_front_end_calls_it() -> None:
    types = ["unsigned", "uint32_t", "signed char", "int64_t", "double", "bool", "float4"]
    for written in (f"k<{kind}, 3 + 1>" for kind in types):
        text = (
            "template <typename T, int N> __global__ void k(T *p) { p[N] = p[0]; }\n"
            f"template __global__ void {written}({written[2:].partition(',')[0]} *);"
        )
        (name,) = program(Source.cuda(text), read_options(())).kernels
        assert plain_name(written) == plain_name(name) == name


@pytest.fixture
def module(
    monkeypatch: pytest.MonkeyPatch, kernels_so: bytes
) -> Iterator[Callable[..., hal.Module]]:
    made = Compiled("so", kernels_so, {"k<unsigned int,4>": KernelFacts("nothing", ())})
    monkeypatch.setattr("drivetrain.hal.language.compile", lambda *_, **__: made)
    monkeypatch.setenv("DRIVETRAIN_SIMULATED", "count=1")
    registry.refresh()
    yield hal.device("simulated:0").compile(Source.cuda("x"))
    hal.close_all()


def test_a_module_finds_it(module: Any) -> None:
    for name in ("k<unsigned int,4>", "k<uint32_t, 4>", "k< unsigned , 8 / 2 >"):
        assert module.kernel(name).arguments == ()
    for name in ("k<int, 4>", "k<uint32_t, 5>", "k", "k<"):
        with pytest.raises(BadInput, match=r"there are k<unsigned int,4>"):
            module.kernel(name)

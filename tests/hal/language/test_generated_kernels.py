"""Generated kernels agree between ``cpu``, ``opencl`` and an interpreter of their own tree."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from drivetrain import hal
from drivetrain.errors import Unsupported
from drivetrain.hal.driver import Target
from drivetrain.hal.language.compiling import compile

# The grammar and the interpreter are files of this folder.
sys.path.insert(0, str(Path(__file__).parent))

from reference_grammar import MACROS, Novelty
from reference_grammar import kernel as kernel_of
from reference_kernels import (
    Bin,
    Kernel,
    Store,
    interpreted,
)
from reference_numbers import (
    RIGHT,
    Rules,
)

A_SOURCE = 5
"""Kernels compiled together."""
SAMPLE, MANY = 30, 200

_relaxed: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


def text_of(made: list[Kernel]) -> str:
    return MACROS + "\n".join(kernel.text() for kernel in made) + "\n"


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Bit for bit, but for which bits a NaN has."""
    if one.dtype.kind == "f":
        both = np.isnan(one) & np.isnan(other)
        return bool((both | (one.view(f"i{one.itemsize}") == other.view(one.view(
            f"i{one.itemsize}").dtype))).all())  # fmt: skip
    return bool((one == other).all())


def launched(compiled: Any, kernel: Kernel) -> list[np.ndarray]:
    arguments = kernel.arrays()
    compiled(kernel.name, kernel.grid, kernel.block, *arguments, shared=kernel.dynamic_bytes)
    return [a for a in arguments if isinstance(a, np.ndarray)]


def compare(compiled: Callable[[str], Any], address: str, made: list[Kernel]) -> None:
    module = compiled(text_of(made))
    for kernel in made:
        expected, got = interpreted(kernel), launched(module, kernel)
        for name, one, other in zip((n for n, _ in kernel.params), expected, got, strict=False):
            if not same(one, other):
                at = int(np.nonzero(one != other)[0][0])
                pytest.fail(
                    f"{address} and the interpreter differ in {name}[{at}]: {other[at]!r}, not "
                    f"{one[at]!r}\ngrid {kernel.grid}, block {kernel.block}, arguments "
                    f"{kernel.arguments}\n{MACROS}{kernel.text()}"
                )


@pytest.fixture
def devices(kernels: Any) -> dict[str, Callable[[str], Any]]:
    """By address: what compiles a source there."""
    out: dict[str, Callable[[str], Any]] = {"cpu:0": kernels}
    if hal.devices("opencl", all_routes=True):
        out["opencl:0"] = lambda text: kernels(text, address="opencl:0")
    return out


@pytest.fixture(scope="module")
def drawn() -> list[Kernel]:
    """Kernels unlike one another, the same ones each time."""
    novel, out = Novelty(), []

    @settings(derandomize=True, max_examples=8 * SAMPLE, phases=[Phase.generate], **_relaxed)
    @given(st.data())
    def collect(data: Any) -> None:
        made = data.draw(kernel_of(f"k{len(out)}"))
        if novel(made):
            out.append(made)

    collect()
    return out


@pytest.fixture
def sample(drawn: list[Kernel]) -> list[Kernel]:
    """`SAMPLE` of them: the last, for hypothesis makes small ones first."""
    return drawn[-SAMPLE:]


@pytest.mark.timeout(600)
def test_a_sample_of_generated_kernels_agrees(devices, sample: list[Kernel]) -> None:
    assert len(sample) == SAMPLE

    def agrees(address: str) -> None:
        for first in range(0, SAMPLE, A_SOURCE):
            compare(devices[address], address, sample[first : first + A_SOURCE])

    # Nearly all of the time is the compilers'.
    with ThreadPoolExecutor(len(devices)) as pool:
        for done in [pool.submit(agrees, address) for address in devices]:
            done.result()


@pytest.mark.timeout(600)
def test_generated_kernels_are_cuda_c_to_nvidia(kernels, sample: list[Kernel]) -> None:
    """So what agrees here is what CUDA's own compiler takes."""
    try:
        made = compile(hal.Source.cuda(text_of(sample)), Target("cuda", "sm_90"))
    except Unsupported as error:
        pytest.skip(str(error))
    assert set(made.kernels) == {kernel.name for kernel in sample}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_generated_kernels_agree(devices) -> None:
    """`MANY` kernels, others each time; one that fails is shrunk to the smallest that does."""
    novel, count, failed = Novelty(), 0, False

    @settings(max_examples=20 * MANY, **_relaxed)
    @given(kernel_of("k"))
    def agree(made: Kernel) -> None:
        nonlocal count, failed
        # While it shrinks, a kernel is like the one before it.
        if not failed and (count >= MANY or not novel(made)):
            return
        count += 1
        try:
            for address, compiled in devices.items():
                compare(compiled, address, [made])
        except BaseException:
            failed = True
            raise

    agree()
    assert count >= MANY


# -- controls: what is wrong is noticed


def differ(kernel: Kernel, rules: Rules) -> bool:
    try:
        got = interpreted(kernel, rules)
    except (AssertionError, OverflowError, ZeroDivisionError, TypeError, ValueError, KeyError):
        return True
    return not all(map(same, interpreted(kernel), got))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("rule", [item.name for item in fields(Rules)])
def test_a_wrong_rule_would_be_noticed(drawn: list[Kernel], rule: str) -> None:
    rules = replace(RIGHT, **{rule: False})
    assert any(differ(kernel, rules) for kernel in reversed(drawn)), f"{rule} does not matter"


def test_a_wrong_kernel_is_noticed(devices, sample: list[Kernel]) -> None:
    """One operator of a kernel is changed after the interpreter saw it."""

    def mutate(kernel: Kernel) -> tuple[list[np.ndarray], Bin] | None:
        expected = interpreted(kernel)
        for stmt in kernel.body:
            of = stmt.of if isinstance(stmt, Store) else getattr(stmt, "init", None)
            if isinstance(of, Bin) and of.op in "+-*" and of is not None:
                was, of.op = of.op, "+" if of.op != "+" else "-"
                if not all(map(same, expected, interpreted(kernel))):
                    return expected, of
                of.op = was
        return None

    for kernel in sample:
        changed = mutate(kernel)
        if changed is None:
            continue
        expected, of = changed
        try:
            for compiled in devices.values():
                assert not all(map(same, expected, launched(compiled(text_of([kernel])), kernel)))
        finally:
            of.op = "+" if of.op == "-" else "-"
        return
    pytest.fail("no kernel of the sample could be changed")

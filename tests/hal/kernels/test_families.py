"""Each family of kernels gives what its reference gives, and its check can fail."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from drivetrain import hal
from drivetrain.hal.kernels import (
    FAMILIES,
    family,
    gemm,
    indexing,
    loss,
    normalization,
    optimizers,
    philox,
    pooling,
    reduction,
    unfold,
)

np = pytest.importorskip("numpy")
pytest.importorskip("tree_sitter_cuda")


@pytest.fixture(scope="module")
def device() -> hal.Device:
    return hal.device("cpu:0")


def test_every_family_that_is_promised_is_there() -> None:
    promised = (
        "saxpy elementwise gemm reduction scan histogram transpose stencil softmax philox hash "
        "activations normalization unfold pooling loss indexing optimizers"
    )
    assert set(promised.split()) <= set(FAMILIES)
    for name, each in FAMILIES.items():
        assert each.name == name
        assert each.proves
        assert len(each.sizes) >= 3
        assert any(size % 32 for size in each.sizes)


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, each in FAMILIES.items() for size in each.sizes]
)
def test_a_family_agrees_with_its_reference(device: hal.Device, name: str, size: int) -> None:
    FAMILIES[name].check(device, device.stream(), size)


SPOILT = {
    "a lost product": (gemm, "TILED", "sum[i * EACH + j] += mine[i] * other[j]", "if (deep != 3) "),
    "a lost sum": (reduction, "ONE_A_BLOCK", "if (t < half) {", "if (t < half && half != 8) {"),
    "a round too few": (philox, "KERNEL", "ROUND ROUND", "ROUND"),
    "a mean that is a sum": (normalization, "TEXT", "sums[0] / (T)count;", "sums[0];"),
    "a border of ones": (unfold, "TEXT", "E value = 0;", "E value = 1;"),
    "a window too narrow": (
        pooling,
        "TEXT",
        "column < right; ++column",
        "column + 1 < right; ++column",
    ),
    "a class that counts": (loss, "TEXT", "class_of != ignored && ", ""),
    "a skipped row that counts": (indexing, "TEXT", " || row == skipped", ""),
    "no bias correction": (optimizers, "TEXT", "w.f[0] / w.f[6] * m", "w.f[0] * m"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_kernel_is_found(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    module, attribute, old, new = SPOILT[what]
    text = getattr(module, attribute)
    assert old in text
    changed = text.replace(old, new + old if new.startswith("if (deep") else new)
    monkeypatch.setattr(module, attribute, changed)
    from drivetrain.hal.opened import opened

    monkeypatch.setattr(opened(device), "kernels", {})
    (family_of,) = module.FAMILIES
    with pytest.raises(AssertionError, match="was expected"):
        FAMILIES[family_of.name].check(device, device.stream(), 256)


def test_a_kernel_is_compiled_once_for_a_device(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = family.kernel(device, "philox", philox.source, "words")
    made: list[Any] = []
    monkeypatch.setattr(hal.Device, "compile", lambda *a, **k: made.append(a))
    assert family.kernel(device, "philox", philox.source, "words") is first
    assert not made


def test_without_numpy_a_check_says_what_to_install(
    device: hal.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(hal_error(), match=r"pip install 'drivetrain\[kernels\]'"):
        FAMILIES["scan"].check(device, device.stream(), 33)


def hal_error() -> type[Exception]:
    from drivetrain.errors import Unsupported

    return Unsupported


def test_a_difference_is_named_by_its_first_element() -> None:
    found, wanted = np.array([1, 2, 9, 9]), np.array([1, 2, 3, 4])
    with pytest.raises(AssertionError, match=r"x: element 2 of \(4,\) is .*9.*; 2 of 4 differ"):
        family.agree("x", found, wanted)
    family.agree("x", np.array([np.nan]), np.array([np.nan]))
    with pytest.raises(AssertionError, match="the shape"):
        family.agree("x", found, wanted[:2])


def test_a_family_is_a_plain_fact() -> None:
    one = next(iter(FAMILIES.values()))
    assert replace(one, name="other").check is one.check

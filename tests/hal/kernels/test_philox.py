"""Philox gives the published numbers, and floats that are spread as they should be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drivetrain import hal
from drivetrain.hal.kernels import philox
from drivetrain.hal.kernels.family import get

pytest.importorskip("tree_sitter_cuda")

U64 = st.integers(0, (1 << 64) - 1)

# The known answers of Random123 (kat_vectors) for philox4x32 with 10 rounds: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def made(kind: str, n: int, dtype: str, *where: int) -> np.ndarray:
    device = hal.device("cpu:0")
    stream = device.stream()
    out = device.alloc(n * np.dtype(dtype).itemsize, stream=stream)
    philox.run(stream, out, kind, n, *where)
    return get(out, stream, n, dtype)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_the_published_answers_come_out(
    counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]
) -> None:
    where = (key[0] | key[1] << 32, counter[0] | counter[1] << 32, counter[2] | counter[3] << 32)
    assert tuple(philox.words(4, *where).tolist()) == words
    assert tuple(made("words", 4, "uint32", *where).tolist()) == words


@given(n=st.integers(1, 70), seed=U64, first=st.integers(0, 1 << 40), sequence=U64)
def test_device_and_reference_agree_to_the_last_bit(
    n: int, seed: int, first: int, sequence: int
) -> None:
    for kind, dtype in (
        ("words", "uint32"), ("float32", "float32"), ("float64", "float64"),
        ("float16", "float16"), ("normal32", "float32"), ("normal16", "float16"),
    ):  # fmt: skip
        wanted = philox.reference(kind, n, seed, first, sequence)
        assert np.array_equal(made(kind, n, dtype, seed, first, sequence), wanted), kind


def test_a_later_counter_goes_on_where_the_first_ended() -> None:
    whole = made("normal32", 4000, "float32", 7)
    assert np.array_equal(made("normal32", 1000, "float32", 7, 750), whole[3000:])
    assert not np.array_equal(made("normal32", 1000, "float32", 7, 0, 1), whole[:1000])


def test_floats_lie_in_the_unit_interval_and_are_spread_evenly() -> None:
    for kind, dtype in (("float32", "float32"), ("float64", "float64"), ("float16", "float16")):
        found = made(kind, 1 << 16, dtype, 3).astype(np.float64)
        assert found.min() >= 0
        assert found.max() < 1
        counts = np.histogram(found, 64, (0, 1))[0]
        assert abs(counts - 1024).max() < 6 * 32
    top = made("float32", 1 << 20, "float32", 4)
    assert top.max() < 1


def test_normal_numbers_are_normal() -> None:
    found = made("normal32", 1 << 20, "float32", 11).astype(np.float64)
    assert abs(found.mean()) < 6 / 1024
    assert abs(found.std() - 1) < 6 / 1448
    assert abs((found**3).mean()) < 0.03
    assert abs((found**4).mean() - 3) < 0.06
    assert 4.5 < abs(found).max() < 6.0
    assert np.isfinite(found).all()
    # What is even and odd in it comes from one pair of uniform numbers; they must not go together.
    assert abs(np.corrcoef(found[0::2], found[1::2])[0, 1]) < 0.01


def test_the_polynomials_are_close_to_the_functions() -> None:
    unit = (np.arange(1, (1 << 24) + 1, 997, dtype=np.int64) * 2.0**-24).astype(np.float32)
    exact = -2 * np.log(unit.astype(np.float64))
    found = philox._scaled_log(unit)
    assert np.all(abs(found - exact) <= 3e-7 * np.maximum(exact, 1e-3))
    assert np.all(abs(philox._root(unit) - np.sqrt(unit.astype(np.float64))) <= 1.2e-7)
    word = np.arange(0, 1 << 24, 991, dtype=np.uint32)
    angle = 2 * np.pi * word.astype(np.float64) * 2.0**-24
    assert abs(philox._wave(word, 0) - np.cos(angle)).max() < 4e-7
    assert abs(philox._wave(word, 3) - np.sin(angle)).max() < 4e-7


def test_double_normal_numbers_agree_to_rounding() -> None:
    wanted = philox.reference("normal64", 1000, 5)
    assert np.allclose(made("normal64", 1000, "float64", 5), wanted, rtol=1e-12, atol=1e-12)

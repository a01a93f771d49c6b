"""The chunk hash and the copies: every implementation against the definition and each other."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import random
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.errors import BadInput
from drivetrain.hal import _twin
from drivetrain.hal import bytes as hal_bytes

MASK = (1 << 64) - 1


def _load_native() -> ModuleType | None:
    folder = Path(hal_bytes.__file__).parent
    if not (folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").exists():
        return None
    from drivetrain.hal import _native

    return _native


def _plain_python() -> Any:
    """The twin as it is where numpy cannot be imported."""
    spec = importlib.util.spec_from_file_location("drivetrain_twin_plain", _twin.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.np = None  # type: ignore[attr-defined]
    return module


IMPLEMENTATIONS: dict[str, Any] = {"twin": _twin, "python": _plain_python()}
if (_module := _load_native()) is not None:
    IMPLEMENTATIONS["native"] = _module


@pytest.fixture(params=sorted(IMPLEMENTATIONS))
def implementation(request: pytest.FixtureRequest) -> Any:
    return IMPLEMENTATIONS[request.param]


def definition(data: bytes, first_word: int = 0) -> int:
    data += bytes(-len(data) % 4)
    total = 0
    for k in range(len(data) // 4):
        i = first_word + k
        a = (((i + 1) * 0x9E3779B97F4A7C15) % 2**64) | 1
        total += int.from_bytes(data[4 * k : 4 * k + 4], "little") * a
    return total % 2**64


class Memory:
    """Bytes at an address of any alignment."""

    def __init__(self, data: bytes, misaligned: int = 0) -> None:
        self.block = ctypes.create_string_buffer(
            bytes(misaligned) + data, len(data) + misaligned + 1
        )
        self.ptr = ctypes.addressof(self.block) + misaligned
        self.nbytes = len(data)

    def read(self) -> bytes:
        return ctypes.string_at(self.ptr, self.nbytes)


pieces = st.binary(max_size=600)
firsts = st.integers(0, (1 << 20) - 200)
misalignments = st.integers(0, 7)


@given(pieces, firsts, misalignments)
def test_every_implementation_gives_the_defined_hash(
    data: bytes, first: int, misaligned: int
) -> None:
    memory = Memory(data, misaligned)
    expected = definition(data, first)
    for name, each in IMPLEMENTATIONS.items():
        assert each.checksum(memory.ptr, memory.nbytes, first) == expected, name


@given(pieces, firsts, misalignments, misalignments)
def test_copy_checksum_copies_exactly_and_hashes_what_it_wrote(
    data: bytes, first: int, source_offset: int, target_offset: int
) -> None:
    source = Memory(data, source_offset)
    for name, each in IMPLEMENTATIONS.items():
        target = Memory(b"\xaa" * (len(data) + 1), target_offset)
        hashed = each.copy_checksum(target.ptr, source.ptr, len(data), first)
        assert hashed == definition(data, first), name
        assert target.read() == data + b"\xaa", name


@given(st.binary(min_size=8, max_size=600), st.data())
def test_parts_hashed_alone_sum_to_the_whole(data: bytes, draw: st.DataObject) -> None:
    cut = 4 * draw.draw(st.integers(0, len(data) // 4))
    memory = Memory(data)
    for name, each in IMPLEMENTATIONS.items():
        head = each.checksum(memory.ptr, cut)
        tail = each.checksum(memory.ptr + cut, len(data) - cut, cut // 4)
        assert (head + tail) & MASK == each.checksum(memory.ptr, len(data)), name


@given(st.binary(min_size=1, max_size=600), st.data())
def test_one_flipped_bit_changes_the_hash(data: bytes, draw: st.DataObject) -> None:
    bit = draw.draw(st.integers(0, 8 * len(data) - 1))
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << (bit % 8)
    for name, each in IMPLEMENTATIONS.items():
        before, after = Memory(data), Memory(bytes(flipped))
        assert each.checksum(before.ptr, len(data)) != each.checksum(after.ptr, len(data)), name


@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=150, unique=True), st.data())
def test_two_swapped_words_change_the_hash(words: list[int], draw: st.DataObject) -> None:
    i = draw.draw(st.integers(0, len(words) - 2))
    j = draw.draw(st.integers(i + 1, len(words) - 1))
    swapped = list(words)
    swapped[i], swapped[j] = swapped[j], swapped[i]

    def packed(values: list[int]) -> Memory:
        return Memory(b"".join(v.to_bytes(4, "little") for v in values))

    for name, each in IMPLEMENTATIONS.items():
        before, after = packed(words), packed(swapped)
        assert each.checksum(before.ptr, before.nbytes) != each.checksum(after.ptr, after.nbytes), (
            name
        )


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 3))
def test_a_full_chunk_of_the_largest_words_does_not_overflow(seed: int, missing: int) -> None:
    nbytes = (4 << 20) - missing
    ones = Memory(b"\xff" * nbytes)
    noise = Memory(random.Random(seed).randbytes(nbytes))
    # The plain-Python twin takes half a second a chunk; the definition is the numpy twin's code.
    hashes = {
        name: (each.checksum(ones.ptr, nbytes), each.checksum(noise.ptr, nbytes))
        for name, each in IMPLEMENTATIONS.items()
        if name != "python"
    }
    assert len(set(hashes.values())) == 1, hashes
    # sum of a_i = G * (n (n + 1) / 2) + (number of odd i)
    if missing == 0:
        n = 1 << 20
        total = (0x9E3779B97F4A7C15 * (n * (n + 1) // 2) + n // 2) % 2**64
        assert hashes["twin"][0] == (2**32 - 1) * total % 2**64


@given(st.binary(max_size=300), st.integers(0, 40))
def test_copy_takes_overlapping_ranges(data: bytes, shift: int) -> None:
    for name, each in IMPLEMENTATIONS.items():
        memory = Memory(data + bytes(shift))
        each.copy(memory.ptr + shift, memory.ptr, len(data))
        assert memory.read()[shift:] == data, name


def test_nothing_at_no_address_hashes_to_zero(implementation: Any) -> None:
    assert implementation.checksum(0, 0) == 0
    assert implementation.copy_checksum(0, 0, 0) == 0
    implementation.copy(0, 0, 0)


@pytest.mark.parametrize(
    ("nbytes", "first"),
    [((4 << 20) + 1, 0), (5, (1 << 20) - 1), (0, 1 << 20), (4, 1 << 62), (1 << 63, 0)],
)
def test_a_piece_that_leaves_its_chunk_is_refused(
    implementation: Any, nbytes: int, first: int
) -> None:
    memory = Memory(b"1234")
    with pytest.raises(BadInput, match="do not lie in one chunk"):
        implementation.checksum(memory.ptr, nbytes, first)
    with pytest.raises(BadInput, match="do not lie in one chunk"):
        implementation.copy_checksum(memory.ptr, memory.ptr, nbytes, first)


@pytest.mark.parametrize("bad", [-1, 1 << 64])
def test_numbers_outside_64_bits_are_refused(implementation: Any, bad: int) -> None:
    memory = Memory(b"1234")
    with pytest.raises(BadInput):
        implementation.checksum(bad, 4)
    with pytest.raises(BadInput):
        implementation.copy(memory.ptr, memory.ptr, bad)


def test_address_zero_with_bytes_is_refused(implementation: Any) -> None:
    memory = Memory(b"1234")
    with pytest.raises(BadInput, match="address is 0"):
        implementation.checksum(0, 4)
    with pytest.raises(BadInput, match="address is 0"):
        implementation.copy(memory.ptr, 0, 4)


def test_wrong_types_and_counts_are_type_errors(implementation: Any) -> None:
    with pytest.raises(TypeError):
        implementation.checksum("here", 4)
    with pytest.raises(TypeError):
        implementation.checksum(1)
    with pytest.raises(TypeError):
        implementation.copy(1, 2)


@pytest.mark.parametrize(("value", "expected"), [("0", "twin"), ("1", "native")])
def test_the_environment_chooses_the_backend(value: str, expected: str) -> None:
    if expected == "native" and "native" not in IMPLEMENTATIONS:
        pytest.skip("the C extension is not built")
    code = "from drivetrain.hal import bytes as b; print(b.BACKEND, b.checksum.__module__)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "DRIVETRAIN_NATIVE": value},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert ("native" in found) == (expected == "native"), found


@pytest.mark.parametrize("shift", [0, 1, 16, 64])
@pytest.mark.parametrize("nbytes", [(256 << 10) - 1, 256 << 10, (1 << 20) + 13])
def test_a_large_copy_is_exact_whatever_its_alignment(nbytes: int, shift: int) -> None:
    source = np.random.default_rng(nbytes).integers(0, 256, nbytes + 64, dtype=np.uint8)
    target = np.zeros(nbytes + 128, dtype=np.uint8)
    hal_bytes.copy(target.ctypes.data + shift, source.ctypes.data + 3, nbytes)
    assert (target[shift : shift + nbytes] == source[3 : 3 + nbytes]).all()
    assert not target[:shift].any()
    assert not target[shift + nbytes :].any()


@pytest.mark.parametrize("distance", [-64, -16, 16, 64])
def test_a_large_copy_within_one_buffer_is_exact(distance: int) -> None:
    nbytes = 512 << 10
    buffer = np.random.default_rng(1).integers(0, 256, nbytes + 256, dtype=np.uint8)
    expected = buffer[128 : 128 + nbytes].copy()
    hal_bytes.copy(buffer.ctypes.data + 128 + distance, buffer.ctypes.data + 128, nbytes)
    assert (buffer[128 + distance : 128 + distance + nbytes] == expected).all()

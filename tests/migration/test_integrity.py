"""Chunk hashes, state hashes, layouts, and the sentence that names the first difference."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import json
from collections.abc import Iterable
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.errors import IntegrityError
from drivetrain.hal.bytes import CHUNK_BYTES, checksum
from drivetrain.migration.integrity import (
    Layout,
    Manifest,
    TensorSpec,
    canonical_json,
    first_difference,
    state_hash,
)
from drivetrain.pytorch.image import summed


def spec(name: str, nbytes: int, **more: Any) -> TensorSpec:
    return TensorSpec(name, "uint8", (nbytes,), (1,), nbytes, **more)


def address(buffer: bytearray) -> int:
    return ctypes.addressof((ctypes.c_char * len(buffer)).from_buffer(buffer)) if buffer else 0


def slow_hash(data: bytes) -> int:
    """The chunk hash as it is written down, a word at a time."""
    data += bytes(-len(data) % 4)
    total = 0
    for i in range(len(data) // 4):
        weight = ((i + 1) * 0x9E3779B97F4A7C15) % 2**64 | 1
        total += int.from_bytes(data[4 * i : 4 * i + 4], "little") * weight
    return total % 2**64


SIZES = st.lists(st.integers(0, 300), max_size=8)


@given(SIZES)
def test_tensors_lie_aligned_in_order_and_do_not_overlap(sizes: list[int]) -> None:
    layout = Layout.of([spec(f"t{i}", n) for i, n in enumerate(sizes)])
    end = 0
    for offset, size in zip(layout.offsets, layout.sizes, strict=True):
        assert offset % 64 == 0
        assert end <= offset < end + 64
        end = offset + size
    assert end <= layout.nbytes < end + 64


def test_aliases_take_no_place() -> None:
    layout = Layout.of([spec("a", 10), spec("b", 10, alias_of="a"), spec("c", 4)])
    assert layout.names == ("a", "c")
    assert layout.offsets == (0, 64)
    assert layout.index == {"a": 0, "c": 1}


@given(SIZES, st.data())
def test_the_pieces_of_any_cuts_cover_each_tensor_once(sizes: list[int], data: Any) -> None:
    sizes = [n * 40_000 + n % 7 for n in sizes]
    layout = Layout.of([spec(f"t{i}", n) for i, n in enumerate(sizes)])
    marks = data.draw(st.lists(st.integers(0, layout.nbytes // 4), max_size=5))
    cuts = sorted({0, layout.nbytes, *(4 * m for m in marks)})
    done = [0] * len(sizes)
    for start, stop in itertools.pairwise(cuts):
        for piece in layout.pieces(start, stop):
            assert piece.offset == done[piece.tensor]
            assert piece.start == layout.offsets[piece.tensor] + piece.offset
            assert start <= piece.start < piece.start + piece.nbytes <= stop
            assert piece.chunk * CHUNK_BYTES + 4 * piece.first_word == piece.start
            assert piece.start + piece.nbytes <= (piece.chunk + 1) * CHUNK_BYTES
            done[piece.tensor] += piece.nbytes
    assert done == sizes


def hashes_of(layout: Layout, tensors: list[bytearray], cuts: Iterable[int]) -> list[int]:
    """The chunk hashes, from the pieces between the cuts, each hashed by itself."""
    marks = [0, *cuts, layout.nbytes]
    return summed(
        layout.nbytes,
        [
            (p.chunk, checksum(address(tensors[p.tensor]) + p.offset, p.nbytes, p.first_word))
            for start, stop in itertools.pairwise(marks)
            for p in layout.pieces(start, stop)
        ],
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=200), max_size=5))
def test_the_hash_is_the_written_formula_with_padding_as_zero(tensors: list[bytes]) -> None:
    layout = Layout.of([spec(f"t{i}", len(t)) for i, t in enumerate(tensors)])
    image = bytearray(layout.nbytes)
    for offset, tensor in zip(layout.offsets, tensors, strict=True):
        image[offset : offset + len(tensor)] = tensor
    expected = [slow_hash(bytes(image))] if layout.nbytes else []
    assert hashes_of(layout, [bytearray(t) for t in tensors], []) == expected


def test_over_several_chunks_pieces_sum_up_however_they_are_cut() -> None:
    sizes = [CHUNK_BYTES - 100, 7, CHUNK_BYTES + 4099, 0, 333]
    seed = bytes(range(256)) * (max(sizes) // 256 + 2)
    tensors = [bytearray(seed[i * 13 : i * 13 + n]) for i, n in enumerate(sizes)]
    layout = Layout.of([spec(f"t{i}", n) for i, n in enumerate(sizes)])
    whole = hashes_of(layout, tensors, [])
    assert hashes_of(layout, tensors, range(1 << 20, layout.nbytes, 1 << 20)) == whole
    tensors[2][CHUNK_BYTES] ^= 1
    changed = hashes_of(layout, tensors, [])
    assert [a != b for a, b in zip(whole, changed, strict=True)] == [False, False, True]


def test_ranges_must_start_at_words() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        list(Layout.of([spec("a", 64)]).pieces(2))


def test_the_state_hash_is_xxh3_128_of_hashes_and_tree() -> None:
    expected = xxhash.xxh3_128_hexdigest(bytes([1, 0, 0, 0, 0, 0, 0, 0]) + b'{"a":1}')
    assert state_hash([1], b'{"a":1}') == expected
    assert state_hash([], b"") == xxhash.xxh3_128_hexdigest(b"")
    assert state_hash([1, 2], b"") != state_hash([2, 1], b"")
    assert canonical_json({"b": 1, "a": "é"}) == b'{"a":"\\u00e9","b":1}'


BASE = Manifest(
    (
        TensorSpec("w", "float32", (2, 3), (3, 1), 24),
        TensorSpec("tied", "float32", (2, 3), (3, 1), 24, alias_of="w"),
        TensorSpec("m", "float32", (2, 3), (3, 1), 24, lazy=True),
    ),
    {"main": [{"params": ["w"], "keys": ["lr"]}]},
    {"length": 100, "batch_size": 8},
    "f00d",
    {"loop": {"epochs": 3}},
)


def changed(index: int, **what: Any) -> Manifest:
    tensors = list(BASE.tensors)
    tensors[index] = dataclasses.replace(tensors[index], **what)
    return dataclasses.replace(BASE, tensors=tuple(tensors))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (dataclasses.replace(BASE, tensors=BASE.tensors[1:]), ["'w'", "source only"]),
        (
            dataclasses.replace(BASE, tensors=(*BASE.tensors, spec("n", 1))),
            ["'n'", "target only"],
        ),
        (changed(0, shape=(3, 2)), ["shape", "'w'", "[2, 3]", "[3, 2]"]),
        (changed(0, dtype="bfloat16"), ["dtype", "'w'", "bfloat16"]),
        (changed(0, stride=(1, 2)), ["strides", "'w'"]),
        (changed(1, alias_of=None), ["aliasing", "'tied'", "memory of its own"]),
        (
            dataclasses.replace(BASE, groups={"main": [{"params": ["w"], "keys": ["betas"]}]}),
            ["parameter groups main[0] keys[0]", "lr", "betas"],
        ),
        (
            dataclasses.replace(BASE, loader={"length": 99, "batch_size": 8}),
            ["loader length", "100", "99"],
        ),
        (dataclasses.replace(BASE, loader=None), ["loader"]),
        (dataclasses.replace(BASE, fingerprint="beef"), ["data set", "f00d", "beef"]),
        (dataclasses.replace(BASE, extra={"loop": {"epochs": 4}}), ["loop epochs", "3", "4"]),
    ],
)
def test_the_first_difference_is_named(other: Manifest, words: list[str]) -> None:
    said = first_difference(BASE, other)
    assert said is not None
    assert [word for word in words if word not in said] == []
    assert first_difference(other, BASE) is not None
    assert first_difference(BASE.to_json(), other.to_json()) == said


def test_equal_sides_have_no_difference() -> None:
    assert (
        first_difference(BASE, Manifest.from_json(json.loads(json.dumps(BASE.to_json())))) is None
    )
    shuffled = dataclasses.replace(BASE, tensors=BASE.tensors[::-1])
    assert first_difference(BASE, shuffled) is None
    without_optimizer_state = dataclasses.replace(BASE, tensors=BASE.tensors[:2])
    assert first_difference(BASE, without_optimizer_state) is None
    assert first_difference(without_optimizer_state, BASE) is None


def test_a_manifest_survives_json() -> None:
    assert Manifest.from_json(json.loads(canonical_json(BASE.to_json()))) == BASE


@pytest.mark.parametrize("bad", [{}, {"tensors": [{}]}, {"tensors": 3}, {"tensors": [None]}])
def test_what_is_no_manifest_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(IntegrityError, match="manifest"):
        Manifest.from_json(bad)

"""The image's hashes are one number whatever computes them, and see any change."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.errors import BadInput
from drivetrain.hal.bytes import CHUNK_BYTES
from drivetrain.pytorch import hashing
from drivetrain.pytorch.hashing import ImagePlan
from drivetrain.pytorch.image import summed

torch.set_num_threads(1)


def reference(flats: list[torch.Tensor]) -> list[int]:
    """The definition, in numpy: pad, cut in chunks, multiply, add."""
    image = b"".join(bytes(t.numpy()) + b"\0" * (-t.numel() % 64) for t in flats)
    hashes = []
    for start in range(0, len(image), CHUNK_BYTES):
        words = np.frombuffer(image[start : start + CHUNK_BYTES], "<u4").astype(np.uint64)
        index = np.arange(1, len(words) + 1, dtype=np.uint64)
        weights = (index * np.uint64(0x9E3779B97F4A7C15)) | np.uint64(1)
        hashes.append(int((words * weights).sum(dtype=np.uint64)))
    return hashes


def tensors(sizes: list[int], seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in sizes
    ]


def as_accelerator(plan: ImagePlan) -> list[int]:
    """The operations that an accelerator runs, run by torch's CPU."""
    waiting = plan._hash_on(torch.device("cpu"), 0, plan.nbytes)
    return summed(plan.nbytes, hashing._collect(waiting))


SIZES = [
    [],
    [0],
    [1],
    [64, 0, 3],
    [CHUNK_BYTES],
    [CHUNK_BYTES - 64, 130],
    [5, CHUNK_BYTES * 2 + 7, 0, 100],
    [CHUNK_BYTES * 17 + 5, 9],
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_all_ways_of_hashing_give_the_definitions_numbers(sizes: list[int]) -> None:
    flats = tensors(sizes)
    plan = ImagePlan(flats)
    expected = reference(flats)
    assert plan.hashes() == expected
    assert plan.hashes(threads=2) == expected
    assert as_accelerator(plan) == expected


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 300) | st.sampled_from([CHUNK_BYTES, CHUNK_BYTES - 60]), max_size=8),
    st.lists(st.floats(0, 1), max_size=6),
    st.integers(0, 1000),
)
def test_an_image_survives_any_cut_into_pieces(
    sizes: list[int], cuts: list[float], seed: int
) -> None:
    source, target = tensors(sizes, seed), tensors(sizes, seed + 1)
    plan, other = ImagePlan(source), ImagePlan(target)
    segment = (ctypes.c_char * max(plan.nbytes, 1))(b"\xff")
    base = ctypes.addressof(segment)
    edges = sorted({0, plan.nbytes, *(int(c * plan.nbytes) // 64 * 64 for c in cuts)})
    pieces = []
    for start, stop in itertools.pairwise(edges):
        pieces += plan.read_into(base + start, start, stop, threads=1 + seed % 2)
        other.write_from(base + start, start, stop)
    assert summed(plan.nbytes, pieces) == plan.hashes() == other.hashes()
    for a, b in zip(source, target, strict=True):
        assert torch.equal(a, b)
    image = b"".join(bytes(t.numpy()) + b"\0" * (-t.numel() % 64) for t in source)
    assert segment.raw[: plan.nbytes] == image


def test_gaps_in_dirty_memory_become_zeros() -> None:
    plan = ImagePlan(tensors([3, 70]))
    segment = ctypes.create_string_buffer(b"\xff" * plan.nbytes, plan.nbytes)
    plan.read_into(ctypes.addressof(segment), 0, plan.nbytes)
    assert segment.raw[3:64] == b"\0" * 61
    assert segment.raw[134:] == b"\0" * (192 - 134)


def test_any_flipped_bit_and_any_two_swapped_words_change_the_hash() -> None:
    flats = tensors([1000])
    before = ImagePlan(flats).hashes()
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        at = int(torch.randint(1000, (), generator=generator))
        bit = 1 << int(torch.randint(8, (), generator=generator))
        flats[0][at] ^= bit
        assert ImagePlan(flats).hashes() != before
        flats[0][at] ^= bit
    assert ImagePlan(flats).hashes() == before
    swapped = flats[0].clone()
    swapped[:4], swapped[4:8] = flats[0][4:8].clone(), flats[0][:4].clone()
    assert ImagePlan([swapped]).hashes() != before


def test_a_tensor_that_starts_at_an_odd_byte_is_hashed_alike() -> None:
    base = tensors([CHUNK_BYTES * 2 + 9])[0]
    for start in (0, 1, 3, 4):
        flats = [base[start : start + CHUNK_BYTES + 5]]
        assert as_accelerator(ImagePlan(flats)) == ImagePlan(flats).hashes() == reference(flats)


@pytest.mark.parametrize("bad", [(0, 65), (1, 64), (64, 0), (0, 1 << 20), (-64, 64)])
def test_ranges_that_are_none_are_refused(bad: tuple[int, int]) -> None:
    plan = ImagePlan(tensors([200]))
    with pytest.raises(BadInput, match="no range"):
        plan.read_into(0, *bad)
    with pytest.raises(BadInput, match="flat"):
        ImagePlan([torch.ones(3)])


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_gpu_gives_the_cpus_numbers_and_bytes(sizes: list[int]) -> None:
    host = tensors(sizes)
    plan = ImagePlan([t.cuda() for t in host])
    assert plan.hashes() == reference(host)
    segment = ctypes.create_string_buffer(b"\xff" * (plan.nbytes + 1), plan.nbytes + 1)
    base, middle = ctypes.addressof(segment), plan.nbytes // 128 * 64
    first = plan.begin_read(base, 0, middle)
    second = plan.begin_read(base + middle, middle, plan.nbytes)
    assert summed(plan.nbytes, first() + second()) == reference(host)
    back = [torch.zeros_like(t) for t in plan.flats]
    target = ImagePlan(back)
    target.write_from(base, 0, middle)
    target.write_from(base + middle, middle, plan.nbytes)
    assert target.hashes() == reference(host)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(back, host, strict=True))

"""Threads that copy and hash together give what one thread gives, with and without C."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain.errors import BadInput
from drivetrain.hal import bytes as raw
from drivetrain.pytorch import crew

PIECES = st.lists(
    st.tuples(
        st.integers(0, 700_000), st.integers(0, 1000), st.sampled_from(["copy", "hash", "both"])
    ),
    min_size=1,
    max_size=6,
)


def address(memory: bytearray) -> int:
    return ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))


@given(PIECES, st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_what_several_threads_do_is_what_one_does(
    wanted: list[tuple[int, int, str]], threads: int
) -> None:
    sources = [bytearray(os.urandom(size + 1)) for size, _, _ in wanted]
    targets = [bytearray(size + 1) for size, _, _ in wanted]
    pieces = []
    for (size, word, what), source, target in zip(wanted, sources, targets, strict=True):
        to = 0 if what == "hash" else address(target)
        pieces.append((to, address(source), size, crew.ONLY_COPY if what == "copy" else word))
    hashes = crew.begin(pieces, threads)()
    for (size, word, what), source, target, piece, found in zip(
        wanted, sources, targets, pieces, hashes, strict=True
    ):
        expected = bytes(size + 1) if what == "hash" else bytes(source[:size]) + b"\0"
        assert bytes(target) == expected
        assert found == (0 if what == "copy" else raw.checksum(piece[1], size, word))


def test_several_jobs_are_under_way_at_once() -> None:
    source = bytearray(os.urandom(3 << 20))
    targets = [bytearray(3 << 20) for _ in range(20)]
    waits = [crew.begin([(address(target), address(source), 3 << 20, 0)], 3) for target in targets]
    hashes = [wait() for wait in reversed(waits)]
    assert all(target == source for target in targets)
    assert {value for each in hashes for value in each} == {raw.checksum(address(source), 3 << 20)}


def test_the_twin_without_c_gives_the_same() -> None:
    code = """
import ctypes
from drivetrain.pytorch import crew
data = bytearray(range(256)) * 5000
copy = bytearray(len(data))
at = lambda b: ctypes.addressof((ctypes.c_char * len(b)).from_buffer(b))
print(crew.begin([(at(copy), at(data), len(data), 7)] * 9, 3)(), copy == data)
"""
    said = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "DRIVETRAIN_NATIVE": native},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for native in "01"
    ]
    assert said[0] == said[1]
    assert "True" in said[0]


@pytest.mark.skipif(raw.BACKEND != "native", reason="the C extension is not built")
def test_bad_pieces_are_refused_before_anything_is_copied() -> None:
    source, target = bytearray(100), bytearray(100)
    for piece in [
        (address(target), address(source), (4 << 20) + 1, 0),
        (address(target), address(source), 100, 1 << 20),
        (address(target), 0, 100, 0),
        (0, address(source), 100, crew.ONLY_COPY),
    ]:
        with pytest.raises(BadInput):
            crew.begin([piece], 2)()

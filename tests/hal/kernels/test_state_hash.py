"""The hash kernel gives the state hash that the rest of the house uses, bit for bit."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drivetrain import hal
from drivetrain.errors import BadInput
from drivetrain.hal import bytes as hal_bytes
from drivetrain.hal.kernels import hash as state_hash

pytest.importorskip("numpy")
pytest.importorskip("tree_sitter_cuda")

CHUNK = hal_bytes.CHUNK_BYTES


@pytest.fixture(scope="module")
def stream() -> hal.Stream:
    return hal.device("cpu:0").stream()


def house(buffer: hal.Buffer) -> list[int]:
    """By ``hal.bytes``, chunk by chunk."""
    starts = range(0, buffer.nbytes, CHUNK)
    return [hal_bytes.checksum(buffer.ptr + at, min(CHUNK, buffer.nbytes - at), 0) for at in starts]


@settings(max_examples=25)
@given(nbytes=st.integers(0, 200_000), seed=st.integers(0, 1 << 32))
def test_every_length_hashes_as_on_the_host(nbytes: int, seed: int) -> None:
    stream = hal.device("cpu:0").stream()
    with stream.device.alloc(nbytes, stream=stream) as buffer:
        buffer.copy_from(random.Random(seed).randbytes(nbytes), stream=stream)
        stream.synchronize()
        assert state_hash.chunk_hashes(buffer, stream=stream) == house(buffer)


@pytest.mark.parametrize("nbytes", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 32770])
def test_chunks_begin_anew(stream: hal.Stream, nbytes: int) -> None:
    with stream.device.alloc(nbytes, stream=stream) as buffer:
        buffer.copy_from(random.Random(nbytes).randbytes(nbytes), stream=stream)
        stream.synchronize()
        found = state_hash.chunk_hashes(buffer, stream=stream)
        assert found == house(buffer)
        assert len(found) == -(-nbytes // CHUNK)
        assert found == state_hash.reference(bytes(buffer.memoryview()))
        buffer.memoryview()[nbytes - 1] ^= 1
        assert state_hash.chunk_hashes(buffer, stream=stream) != found


def test_a_view_that_is_not_aligned_is_refused(stream: hal.Stream) -> None:
    buffer = stream.device.alloc(64, stream=stream)
    with pytest.raises(BadInput, match="multiple of 16"):
        state_hash.chunk_hashes(buffer.view(4, 32), stream=stream)

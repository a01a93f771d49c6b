"""The state hash (see ``drivetrain.hal.bytes``) of memory on a device, without a copy to the host.

For each 4 MiB chunk the sum of its 32-bit words times odd weights, mod 2^64. Sums mod 2^64 may be
taken in any order, so pieces of a chunk are summed beside each other and then together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain.errors import BadInput
from drivetrain.hal.bytes import CHUNK_BYTES, CHUNK_WORDS
from drivetrain.hal.kernels.family import (
    Family,
    Launch,
    agree,
    blocks,
    generator,
    kernel,
    launch,
    numpy,
    put,
)
from drivetrain.hal.language.source import Source

if TYPE_CHECKING:
    from drivetrain.hal.device import Device
    from drivetrain.hal.memory import Buffer
    from drivetrain.hal.stream import Stream

BLOCK = 256
PIECE_WORDS = 8192
"""Words that a block sums; a chunk has 128 such pieces."""
_WEIGHT = 0x9E3779B97F4A7C15

TEXT = """
#define BLOCK 256
#define PIECE 8192
#define CHUNK 1048576
#define WEIGHT 0x9E3779B97F4A7C15ull

/* Block b sums piece b of the bytes; what is missing of the last word counts as zeros. */
extern "C" __global__ void hash_pieces(unsigned long long *sums, const unsigned int *words,
                                       long long nbytes) {
    __shared__ unsigned long long joined[BLOCK];
    int t = threadIdx.x;
    long long first = (long long)blockIdx.x * PIECE, whole = nbytes / 4;
    unsigned long long inside = (unsigned long long)(first % CHUNK), sum = 0;
    if (first + PIECE <= whole) {
        const uint4 *fours = (const uint4 *)(words + first);
        for (int i = t; i < PIECE / 4; i += BLOCK) {
            uint4 four = fours[i];
            unsigned long long at = inside + 4ull * (unsigned long long)i + 1ull;
            sum += (at * WEIGHT | 1ull) * four.x;
            sum += ((at + 1ull) * WEIGHT | 1ull) * four.y;
            sum += ((at + 2ull) * WEIGHT | 1ull) * four.z;
            sum += ((at + 3ull) * WEIGHT | 1ull) * four.w;
        }
    } else {
        for (long long i = first + t; i <= whole && i < first + PIECE; i += BLOCK) {
            unsigned int word = 0;
            if (i < whole) {
                word = words[i];
            } else {
                const unsigned char *tail = (const unsigned char *)(words + whole);
                for (int j = 0; j < (int)(nbytes % 4); ++j)
                    word |= (unsigned int)tail[j] << (8 * j);
            }
            sum += ((inside + (unsigned long long)(i - first) + 1ull) * WEIGHT | 1ull) * word;
        }
    }
    joined[t] = sum;
    __syncthreads();
    for (int half = BLOCK / 2; half > 0; half >>= 1) {
        if (t < half) joined[t] += joined[t + half];
        __syncthreads();
    }
    if (t == 0) sums[blockIdx.x] = joined[0];
}

extern "C" __global__ void hash_chunks(unsigned long long *out, const unsigned long long *sums,
                                       int pieces, int chunks) {
    int chunk = blockIdx.x * blockDim.x + threadIdx.x;
    if (chunk >= chunks) return;
    int each = CHUNK / PIECE;
    unsigned long long sum = 0;
    for (int i = chunk * each; i < (chunk + 1) * each && i < pieces; ++i) sum += sums[i];
    out[chunk] = sum;
}
"""


def source() -> Source:
    """``hash_pieces(sums, words, nbytes)`` and ``hash_chunks(out, sums, pieces, chunks)``. The
    bytes start at a multiple of 16."""
    return Source.cuda(TEXT, name="hash.cu")


def rule(nbytes: int) -> Launch:
    """Of ``hash_pieces``."""
    return Launch((blocks(nbytes, 4 * PIECE_WORDS),), (BLOCK,))


def chunk_hashes(buffer: Buffer, *, stream: Stream) -> list[int]:
    """The hash of each 4 MiB chunk of a buffer, in order, after what is queued on ``stream``.

    Raises BadInput for a buffer that does not start at a multiple of 16 bytes.
    """
    if not buffer.nbytes:
        return []
    if buffer.ptr % 16:
        raise BadInput("the state hash of a buffer that does not start at a multiple of 16 bytes")
    device, pieces = stream.device, blocks(buffer.nbytes, 4 * PIECE_WORDS)
    chunks = blocks(buffer.nbytes, CHUNK_BYTES)
    with (
        device.alloc(8 * pieces, stream=stream) as sums,
        device.alloc(8 * chunks, stream=stream) as out,
    ):
        found = kernel(device, "hash_pieces", source)
        launch(found, stream, rule(buffer.nbytes), sums, buffer, buffer.nbytes)
        found = kernel(device, "hash_chunks", source)
        launch(found, stream, Launch((blocks(chunks, 64),), (64,)), out, sums, pieces, chunks)
        host = bytearray(8 * chunks)
        out.copy_to(host, stream=stream)
        stream.synchronize()
    return list(memoryview(host).cast("Q"))


def reference(data: bytes) -> list[int]:
    """By numpy."""
    np = numpy()
    padded = np.frombuffer(data + b"\0" * (-len(data) % 4), np.uint32).astype(np.uint64)
    weights = np.arange(1, CHUNK_WORDS + 1, dtype=np.uint64) * np.uint64(_WEIGHT) | np.uint64(1)
    return [
        int((part * weights[: len(part)]).sum(dtype=np.uint64))
        for part in (padded[at : at + CHUNK_WORDS] for at in range(0, len(padded), CHUNK_WORDS))
    ]


_BYTES = {33: 33, 256: 4 * PIECE_WORDS + 2, 1000: CHUNK_BYTES + 70001}


def _check(device: Device, stream: Stream, size: int) -> None:
    np = numpy()
    data = generator(size).integers(0, 256, _BYTES.get(size, size), dtype=np.uint8)
    found = chunk_hashes(put(device, stream, data), stream=stream)
    wanted: Any = reference(data.tobytes())
    agree("state hash", np.array(found, np.uint64), np.array(wanted, np.uint64))


FAMILIES = (Family("hash", "the state hash, pieces and tails", source, rule, reference, _check),)

"""Shuffles and votes where no warp exists: through local memory, with every thread along."""

from __future__ import annotations

import numpy as np
import pytest

from drivetrain.errors import CompileError
from drivetrain.hal.language.frontend import program
from drivetrain.hal.language.opencl import translate
from drivetrain.hal.language.options import Options
from drivetrain.hal.language.source import Source

FULL = "0xffffffffu"


def translated(text: str) -> object:
    return translate(program(Source.cuda(text), Options()), ("fp64", "int64_atomics"))


MOVES = """
#define FULL 0xffffffffu
__global__ void moves(const int *in, int *out) {
  int t = threadIdx.x + blockDim.x * threadIdx.y;
  int v = in[t];
  out[8 * t] = __shfl_sync(FULL, v, 5);
  out[8 * t + 1] = __shfl_up_sync(FULL, v, 3);
  out[8 * t + 2] = __shfl_down_sync(FULL, v, 3);
  out[8 * t + 3] = __shfl_xor_sync(FULL, v, 6);
  out[8 * t + 4] = __shfl_sync(FULL, v, t + 1, 8);
  out[8 * t + 5] = __shfl_up_sync(FULL, v, 2, 4);
  out[8 * t + 6] = __shfl_down_sync(FULL, v, 5, 16);
  out[8 * t + 7] = __shfl_xor_sync(FULL, v, 9, 8);
}
__global__ void wide(const double *in, double *out, long long *longs, float *floats,
                     unsigned *votes) {
  int t = threadIdx.x;
  out[t] = __shfl_down_sync(FULL, in[t], 1);
  longs[t] = __shfl_xor_sync(FULL, ((long long)t << 40) - 7, 1);
  floats[t] = __shfl_up_sync(FULL, (float)in[t] * 0.5f, 1);
  short small = (short)(-t);
  floats[t] += __shfl_sync(FULL, small, 31);
  votes[4 * t] = __ballot_sync(FULL, t % 3 == 0);
  votes[4 * t + 1] = __any_sync(FULL, t == 40);
  votes[4 * t + 2] = __all_sync(FULL, t < 40);
  votes[4 * t + 3] = __ballot_sync(0x0000ff00u, in[t] > 0.0);
}
"""


def source(t: np.ndarray, kind: str, by: np.ndarray | int, width: int = 32) -> np.ndarray:
    """The thread that each thread reads from (PTX ISA, "shfl")."""
    lane, low = t % 32, t % 32 & -width
    high = low + width - 1
    if kind == "idx":
        other = low | (by & (width - 1))
    elif kind == "up":
        other = np.where(lane - by < low, lane, lane - by)
    elif kind == "down":
        other = np.where(lane + by > high, lane, lane + by)
    else:
        other = np.where((lane ^ by) > high, lane, lane ^ by)
    other = t - lane + other
    return np.where(other < len(t), other, t)


@pytest.mark.parametrize("block", [(64,), (16, 6), (45,)])
def test_lanes_read_from_the_lanes_that_cuda_says(opencl, block: tuple[int, ...]) -> None:
    count = int(np.prod(block))
    t = np.arange(count)
    given = (t * 7919 % 1000).astype(np.int32)
    out = np.zeros(8 * count, np.int32)
    opencl(MOVES)("moves", 1, block, given, out)
    expected = [
        given[source(t, *move)]
        for move in (
            ("idx", 5), ("up", 3), ("down", 3), ("xor", 6), ("idx", t + 1, 8), ("up", 2, 4),
            ("down", 5, 16), ("xor", 9, 8),
        )
    ]  # fmt: skip
    got = out.reshape(count, 8).T
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert one.tolist() == other.tolist(), number


def test_numbers_of_every_width_move_and_votes_count_the_lanes_that_exist(opencl) -> None:
    t = np.arange(70)
    given = (t - 20).astype(np.float64)
    out, longs = np.zeros(70), np.zeros(70, np.int64)
    floats, votes = np.zeros(70, np.float32), np.zeros(280, np.uint32)
    opencl(MOVES)("wide", 1, 70, given, out, longs, floats, votes)
    assert out.tolist() == given[source(t, "down", 1)].tolist()
    assert longs.tolist() == ((source(t, "xor", 1) << 40) - 7).tolist()
    last = source(t, "idx", 31)
    assert floats.tolist() == (given[source(t, "up", 1)] * 0.5 - last).tolist()

    def ballot(holds: np.ndarray) -> np.ndarray:
        words = [sum(1 << i for i, yes in enumerate(holds[w : w + 32]) if yes) for w in (0, 32, 64)]
        return np.array(words)[t // 32]

    rows = votes.reshape(70, 4).T
    assert rows[0].tolist() == ballot(t % 3 == 0).tolist()
    assert rows[1].tolist() == (t // 32 == 1).tolist()
    assert rows[2].tolist() == (t // 32 == 0).tolist()
    assert rows[3].tolist() == (ballot(given > 0) & 0xFF00).tolist()


UNEVEN = """
#define FULL 0xffffffffu
__device__ float warp_sum(float v) {
  for (int o = 16; o > 0; o >>= 1) v += __shfl_down_sync(FULL, v, o);
  return v;
}
__device__ float block_sum(float v) {
  __shared__ float part[32];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  v = warp_sum(v);
  if (lane == 0) part[warp] = v;
  __syncthreads();
  if (warp == 0) {
    v = lane < blockDim.x / 32 ? part[lane] : 0.0f;
    v = warp_sum(v);
  }
  __syncthreads();
  return v;
}
// Warps that are beyond the end leave first; the others shuffle on.
__global__ void sums(const float *in, float *out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float v = block_sum(i < n ? in[i] : 0.0f);
  if (threadIdx.x == 0) out[blockIdx.x] = v;
  if (i >= n) return;
  float w = warp_sum(in[i]);
  if (threadIdx.x % 32 == 0) atomicAdd(&out[gridDim.x], w);
}
// Every warp goes round as often as it must: the loop's condition is a vote.
__global__ void rounds(const int *in, int *out) {
  int t = threadIdx.x, v = in[t], n = 0;
  while (__any_sync(FULL, v > 0)) {
    n++;
    v -= 1 + (t & 1);
    if (n > 20) break;
    if (v < -30) continue;
    v += 0;
  }
  out[t] = 1000 * n + v;
}
// A warp's own loop, its condition from memory; conditions inside choose among shuffles.
__global__ void trips(const int *counts, int *out) {
  int t = threadIdx.x, v = t, warp = t / 32;
  for (int i = 0; i < counts[warp]; i++) {
    if (counts[warp] == 3) {
      v += __shfl_xor_sync(FULL, v, 1);
    } else {
      int w = __shfl_up_sync(FULL, v, 1);
      v = w * 2;
      __syncwarp();
    }
  }
  int far = warp == 1 ? __shfl_sync(FULL, v, 7) : -v;
  bool both = warp < 2 && __all_sync(FULL, v >= 0);
  bool either = warp == 0 || __any_sync(FULL, t == 70);
  int turns = 0;
  do { v++; } while (__any_sync(FULL, v % 5 != 0) && turns++ < 7);
  out[4 * t] = v; out[4 * t + 1] = far; out[4 * t + 2] = both; out[4 * t + 3] = either;
}
"""


def test_a_block_adds_up_with_one_warp_shuffling_at_the_end(opencl) -> None:
    n = 896
    given = np.arange(n, dtype=np.float32)
    out = np.zeros(5, np.float32)
    opencl(UNEVEN)("sums", 4, 256, given, out, n)
    expected = [float(given[256 * b : 256 * b + 256].sum()) for b in range(4)]
    assert out.tolist() == [*expected, float(given.sum())]


def test_a_vote_is_a_loops_condition(opencl) -> None:
    given = (np.arange(96) * 5 % 43).astype(np.int32)
    given[64:] = 0
    out = np.zeros(96, np.int32)
    opencl(UNEVEN)("rounds", 1, 96, given, out)
    expected = []
    for warp in range(3):
        values, n = given[32 * warp : 32 * warp + 32].astype(int), 0
        step = 1 + (np.arange(32) & 1)
        while (values > 0).any():
            n += 1
            values = values - step
            if n > 20:
                break
        expected += (1000 * n + values).tolist()
    assert out.tolist() == expected


def test_warps_go_round_their_own_loops(opencl, kernels) -> None:
    counts = np.array([2, 3, 0], np.int32)
    got, wanted = np.zeros(4 * 96, np.int32), np.zeros(4 * 96, np.int32)
    opencl(UNEVEN)("trips", 1, 96, counts, got)
    t = np.arange(32)
    warp = t.copy()
    for _ in range(2):
        warp = warp[source(t, "up", 1)] * 2
    assert (got.reshape(3, 32, 4)[0, :, 2] == 1).all()
    kernels(UNEVEN)("trips", 1, 96, counts, wanted)
    assert got.tolist() == wanted.tolist()


def test_a_block_that_shuffles_has_at_most_the_threads_there_is_memory_for() -> None:
    facts = translated(MOVES).kernels  # type: ignore[attr-defined]
    assert facts["moves"].launch_bounds == 1024
    text = MOVES.replace("void moves", "void __launch_bounds__(128) moves")
    made = translated(text)
    assert made.kernels["moves"].launch_bounds == 128  # type: ignore[attr-defined]
    assert "dt_lanes[128]" in made.text  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("body", "line", "words"),
    [
        ("switch (t) {\n case 1: a[t] = __shfl_sync(FULL, t, 1); break; }", 3, "switch"),
        ("switch (a[0]) {\n case 1: if (t) break; a[t] = __shfl_sync(FULL, t, 1); }", 3, "switch"),
        ("a[t] = found(a, t);", 3, "returns from inside a loop"),
        ("if (t > 3) return;\n __syncthreads();", 4, "__syncthreads.. is not reached"),
        ("if (t > 3) return; a[t] = __shfl_sync(FULL, t, 1);\n __syncthreads();", 4, "not reached"),
        ("for (int i = 0; i < t; i++) {\n __syncthreads(); }", 4, "loop of line 3"),
        ("while (1) { if (a[t + atomicAdd(a, 1)]) break;\n __syncthreads(); }", 4, "not reached"),
        ("if (t & 1)\n waits(a);", 1, "__syncthreads.. is not reached"),
    ],
)
def test_what_cannot_wait_is_refused_with_its_line(body: str, line: int, words: str) -> None:
    text = (
        "#define FULL 0xffffffffu\n__device__ int found(int *a, int t) { for (int i = 0; i < 9; "
        "i++) if (__shfl_sync(FULL, t, i) == 3) return i; return -1; } __device__ void waits(int "
        "*a) { __syncthreads(); a[0] = 1; } __global__ void k(int *a) { int t = threadIdx.x;\n"
        f" {body}\n}}"
    )
    with pytest.raises(CompileError, match=words) as caught:
        translated(text)
    if words.startswith("__sync") and "waits(a)" in body:
        line = 2
    assert str(caught.value).startswith(f"line {line}:")


def test_a_barrier_is_taken_under_conditions_that_are_the_same_for_all(opencl) -> None:
    text = """
    __device__ void shift(int *s, int by) {
      int v = s[(threadIdx.x + by) % blockDim.x];
      __syncthreads();
      s[threadIdx.x] = v;
      __syncthreads();
    }
    __device__ int early(int *s, int by) {
      if (by == 0) return 0;
      shift(s, by);
      return 1;
    }
    __global__ void rolls(int *a, const int *by, int n) {
      __shared__ int s[64];
      __shared__ int turns;
      if (n == 0) return;
      s[threadIdx.x] = a[threadIdx.x];
      if (threadIdx.x == 0) turns = by[0];
      __syncthreads();
      for (int i = 0; i < n; i++) {
        if (i == 1) continue;
        shift(s, turns);
        if (turns > 5) break;
      }
      a[threadIdx.x] = s[threadIdx.x];
    }
    __global__ void chosen(int *a, int n) {
      __shared__ int s[64];
      s[threadIdx.x] = a[threadIdx.x];
      __syncthreads();
      int i = 0;
      do { early(s, i); i++; } while (i < n);
      switch (n) { case 3: shift(s, 1); break; default: shift(s, 2); }
      a[threadIdx.x] = s[threadIdx.x];
    }
    """
    for turns, n in ((3, 3), (7, 4), (0, 2), (1, 0)):
        a = np.arange(48, dtype=np.int32)
        opencl(text)("rolls", 1, 48, a, np.array([turns], np.int32), n)
        rounds = 1 if turns > 5 else n - (n > 1)
        assert a.tolist() == np.roll(np.arange(48), -rounds * turns).tolist(), (turns, n)
    for n in (3, 5):
        a = np.arange(48, dtype=np.int32)
        opencl(text)("chosen", 1, 48, a, n)
        by = sum(range(n)) + (1 if n == 3 else 2)
        assert a.tolist() == np.roll(np.arange(48), -by).tolist(), n

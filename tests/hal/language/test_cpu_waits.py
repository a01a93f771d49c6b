"""Threads of a block that wait for one another on the CPU: loops that are cut, or stacks."""

from __future__ import annotations

import os
import subprocess
import sys
from textwrap import dedent

import numpy as np
import pytest

from drivetrain import hal
from drivetrain.errors import CompileError, HalError
from drivetrain.hal.language.compilers.cxx import translation
from drivetrain.hal.language.options import read_options

SPLIT = """
__device__ void reverse(int *s, int n) {
  int t = threadIdx.x, v = s[t];
  __syncthreads();
  s[n - 1 - t] = v;
  __syncthreads();
}
__device__ int rotated(int *s, int n, int by) {
  reverse(s, n);
  int v = s[(threadIdx.x + by) % n];
  __syncthreads();
  if (by > 2) return -v;
  s[threadIdx.x] = v;
  __syncthreads();
  return s[(threadIdx.x + 1) % n];
}
__global__ void called(int *data, int rounds) {
  __shared__ int s[64];
  int t = threadIdx.x, last = 0;
  s[t] = data[t];
  __syncthreads();
  for (int r = 0; r < rounds; r++) {
    if (r % 2 == 1) continue;
    last = rotated(s, blockDim.x, r);
    if (r >= 6) break;
  }
  data[t] = s[t] * 1000 + last;
}
__global__ void lives_across(const float *in, float *out) {
  __shared__ float s[128];
  float history[4] = {0.f};
  float4 v = make_float4(threadIdx.x, 1.f, 2.f, 3.f);
  int x = threadIdx.x;
  float *mine = &history[threadIdx.x % 4];
  for (int i = 0; i < 4; i++) {
    s[x] = in[x] + i;
    __syncthreads();
    history[i] = s[(x + 1) % 128];
    v.y += history[i];
    *mine += 1.f;
    x = (x + 5) % 128;
    __syncthreads();
  }
  out[threadIdx.x] = history[0] + history[1] * 2 + history[2] * 3 + history[3] * 4 + v.x + v.y;
}
__global__ void flag(int *out, int n) {
  __shared__ int done;
  int count = 0;
  if (threadIdx.x == 0) done = 0;
  __syncthreads();
  while (!done) {
    count++;
    __syncthreads();
    if (threadIdx.x == blockDim.x - 1 && count == n) done = 1;
    __syncthreads();
  }
  out[threadIdx.x] = count;
}
__global__ void by_mode(int *out, int mode) {
  __shared__ int s[32];
  s[threadIdx.x] = threadIdx.x;
  if (mode == 1) {
    __syncthreads();
    out[threadIdx.x] = s[31 - threadIdx.x];
  } else if (mode == 2) {
    out[threadIdx.x] = 7;
    return;
  } else {
    switch (mode) {
      case 3: __syncthreads(); out[threadIdx.x] = s[(threadIdx.x + 1) % 32]; break;
      default: out[threadIdx.x] = -1;
    }
  }
  __syncthreads();
  if (threadIdx.x > 0) out[threadIdx.x] += s[0];
}
__global__ void parameter_written(int *data, int n) {
  __shared__ int s[32];
  do {
    s[threadIdx.x] = data[threadIdx.x];
    __syncthreads();
    data[threadIdx.x] = s[(threadIdx.x + n) % 32];
    __syncthreads();
  } while (--n > 0);
}
__global__ void shuffles(const int *in, int *out, const double *din, double *dout) {
  int v = in[threadIdx.x];
  out[threadIdx.x] = __shfl_sync(~0u, v, 3) + 10 * __shfl_up_sync(~0u, v, 2)
                   + 100 * __shfl_xor_sync(~0u, v, 5, 8) + 1000 * __shfl_down_sync(~0u, v, 1, 16);
  dout[threadIdx.x] = __shfl_down_sync(0xffffffffu, din[threadIdx.x], 4);
}
__device__ int walk(unsigned mask, int v) {
  for (int i = 0; i < 4; i++) {
    v += __shfl_xor_sync(mask, v, 1 << i);
    if (v > 100000) return -1;
  }
  return v;
}
__global__ void part_of_a_warp(const int *in, int *out) {
  int v = in[threadIdx.x];
  if (threadIdx.x % 32 < 16) {
    v += __shfl_down_sync(0x0000ffffu, v, 8, 16);
    __syncwarp(0x0000ffff);
    if (__any_sync(0xffffu, v > 50)) v++;
  } else {
    v = walk(0xffff0000u, v);
  }
  out[threadIdx.x] = v;
}
__global__ void tiles_by_data(const int *sizes, const int *in, int *out) {
  __shared__ int s[32];
  int n = sizes[blockIdx.x], sum = 0;
  for (int i = 0; i < n; i++) {
    s[threadIdx.x] = in[i * 32 + threadIdx.x];
    __syncthreads();
    sum += s[31 - threadIdx.x] * (i + 1);
    __syncthreads();
  }
  out[blockIdx.x * 32 + threadIdx.x] = sum;
}
__global__ void some_lanes(const int *in, int *out, int step, int width) {
  int v = in[threadIdx.x], warp = threadIdx.x / 32;
  if (warp == 1 && step > 0) {
    for (int i = step; i < width; i += step) {
      int other = __shfl_xor_sync(~0u, v, i);
      if (i > 4) { int more = __shfl_up_sync(~0u, other, 1); v += more; }
      else v -= other;
    }
  } else if (step > 0) {
    v = -v;
  } else {
    unsigned b = __ballot_sync(~0u, v > 5);
    v = b >> threadIdx.x % 32 & 1;
  }
  out[threadIdx.x] = v;
}
__global__ void by_data(const int *in, int *out) {
  if (in[blockIdx.x] == 0) return;
  __shared__ int s[32];
  s[threadIdx.x] = threadIdx.x * in[blockIdx.x];
  __syncthreads();
  out[blockIdx.x * 32 + threadIdx.x] = s[31 - threadIdx.x];
}
__global__ void missing(const int *in, int *out) {
  __shared__ int turn;
  turn = in[threadIdx.x];
  switch (turn) { case 1: __syncthreads(); }
  out[threadIdx.x] = 1;
}
__global__ void left_early(const int *in, int *out) {
  __shared__ int turn;
  turn = in[threadIdx.x];
  switch (turn) { case 0: return; default: __syncthreads(); }
  out[threadIdx.x] = 1;
}
"""


def _rotated(s: np.ndarray, by: int) -> np.ndarray:
    s[:] = s[::-1].copy()
    v = np.roll(s, -by)
    if by > 2:
        return -v
    s[:] = v
    return np.roll(v, -1)


@pytest.mark.parametrize("rounds", [0, 1, 3, 9])
def test_functions_that_wait_are_called_in_a_loop_with_break_and_continue(kernels, rounds):
    data = np.arange(64, dtype=np.int32) + 5
    s, last = data.copy(), np.zeros(64, np.int32)
    for r in range(rounds):
        if r % 2 == 0:
            last = _rotated(s, r)
            if r >= 6:
                break
    kernels(SPLIT)("called", 1, 64, data, rounds)
    assert (data == s * 1000 + last).all()


def test_arrays_structs_and_pointers_of_a_thread_live_across_barriers(kernels):
    given = np.random.default_rng(0).random(128).astype(np.float32)
    out = np.zeros(128, np.float32)
    kernels(SPLIT)("lives_across", 1, 128, given, out)
    t = np.arange(128)
    s = np.zeros(128, np.float32)
    history, x, y = np.zeros((4, 128), np.float32), t.copy(), np.ones(128, np.float32)
    for i in range(4):
        s[x] = given[x] + i
        history[i] = s[(x + 1) % 128]
        y += history[i]
        history[t % 4, t] += 1
        x = (x + 5) % 128
    expected = history[0] + history[1] * 2 + history[2] * 3 + history[3] * 4 + t + y
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_a_loop_over_a_flag_in_shared_memory_ends_for_all(kernels):
    out = np.zeros(40, np.int32)
    kernels(SPLIT)("flag", 1, 40, out, 6)
    assert (out == 6).all()


@pytest.mark.parametrize("mode", [1, 2, 3, 4])
def test_barriers_under_conditions_that_are_the_same_for_all(kernels, mode):
    out, t = np.zeros(32, np.int32), np.arange(32)
    kernels(SPLIT)("by_mode", 1, 32, out, mode)
    expected = {1: 31 - t, 2: t * 0 + 7, 3: (t + 1) % 32, 4: t * 0 - 1}[mode]
    assert (out == expected).all()


def test_a_parameter_may_be_counted_down(kernels):
    data = np.arange(32, dtype=np.int32)
    kernels(SPLIT)("parameter_written", 1, 32, data, 4)
    assert (data == np.roll(np.arange(32), -(4 + 3 + 2 + 1))).all()


def test_shuffles_read_the_lanes_that_ptx_names(kernels):
    v = np.random.default_rng(1).integers(0, 10, 64, dtype=np.int32)
    d = np.random.default_rng(1).random(64)
    out, dout = np.zeros(64, np.int32), np.zeros(64)
    kernels(SPLIT)("shuffles", 1, 64, v, out, d, dout)
    for t in range(64):
        lane, base = t % 32, t - t % 32
        up = t - 2 if lane >= 2 else t
        xor = base + (lane // 8) * 8 + ((lane % 8) ^ 5)
        down = t + 1 if lane % 16 < 15 else t
        assert out[t] == v[base + 3] + 10 * v[up] + 100 * v[xor] + 1000 * v[down]
        assert dout[t] == d[t + 4 if lane < 28 else t]


def test_lanes_of_half_a_warp_exchange_among_themselves(kernels):
    v = np.random.default_rng(2).integers(0, 40, 64, dtype=np.int32)
    out = np.zeros(64, np.int32)
    kernels(SPLIT)("part_of_a_warp", 1, 64, v, out)
    for start in (0, 32):
        half = v[start : start + 16]
        sums = half + np.concatenate([half[8:], half[8:]])
        assert (out[start : start + 16] == sums + int((sums > 50).any())).all()
        assert (out[start + 16 : start + 32] == v[start + 16 : start + 32].sum()).all()


def test_a_loop_with_barriers_may_be_as_long_as_its_data_says(kernels):
    sizes = np.array([0, 3, 1], np.int32)
    given = np.random.default_rng(3).integers(0, 9, (3, 32), dtype=np.int32)
    out = np.full((3, 32), -1, np.int32)
    kernels(SPLIT)("tiles_by_data", 3, 32, sizes, given, out)
    for block, n in enumerate(sizes):
        expected = sum((given[i, ::-1] * (i + 1) for i in range(n)), np.zeros(32, np.int32))
        assert (out[block] == expected).all()


@pytest.mark.parametrize("step", [0, 2, 3])
def test_one_warp_exchanges_in_a_branch_that_the_others_do_not_take(kernels, step):
    given = np.random.default_rng(4).integers(0, 9, 96, dtype=np.int32)
    out = np.zeros(96, np.int32)
    kernels(SPLIT)("some_lanes", 1, 96, given, out, step, 16)
    expected = -given if step else (given > 5).astype(np.int32)
    if step:
        v, lane = given[32:64].copy(), np.arange(32)
        for i in range(step, 16, step):
            other = v[lane ^ i]
            v = v + other[np.maximum(lane - 1, 0)] if i > 4 else v - other
        expected[32:64] = v
    assert (out == expected).all()


def test_a_block_may_leave_when_its_data_says_so(kernels):
    given, out = np.array([3, 0, 5], np.int32), np.zeros(96, np.int32)
    kernels(SPLIT)("by_data", 3, 32, given, out)
    t = np.arange(32)
    assert (out.reshape(3, 32) == np.outer(given, 31 - t)).all()


@pytest.mark.parametrize("name", ["missing", "left_early"])
def test_a_barrier_that_some_threads_miss_is_an_error_and_no_hang(kernels, name):
    everyone, some = np.ones(32, np.int32), np.arange(32, dtype=np.int32) % 2
    out = np.zeros(32, np.int32)
    kernels(SPLIT)(name, 1, 32, everyone, out)
    assert (out == 1).all()
    with pytest.raises(HalError, match="a barrier that not all threads of a block reach"):
        kernels(SPLIT)(name, 1, 32, some, out)
    kernels(SPLIT)(name, 1, 32, everyone, out)


REFUSED = {
    "under an if": (3, "__global__ void k(int *p) {\n if (threadIdx.x < 3)\n  __syncthreads();\n}"),
    "after a return": (
        5,
        "__global__ void k(int *p, int n) {\n int i = threadIdx.x;\n if (i >= n) return;\n"
        " p[i] = 1;\n __syncthreads();\n p[i] = 2;\n}",
    ),
    "in a loop of each thread": (
        3,
        "__global__ void k(int *p, int n) {\n for (int i = threadIdx.x; i < n; i += 32) {\n"
        "  __syncthreads();\n }\n}",
    ),
    "in a function": (
        2,
        "__device__ void f() {\n __syncthreads();\n}\n__global__ void k(int *p) {\n"
        " if (threadIdx.x == 0) f();\n}",
    ),
    "through a variable": (
        5,
        "__global__ void k(int *p) {\n int a = threadIdx.x / 2;\n bool b = a > 1;\n"
        " while (b) {\n  __syncthreads(); b = false;\n }\n}",
    ),
    "after a break": (
        4,
        "__global__ void k(int *p, int n) {\n for (int i = 0; i < n; i++) {\n"
        "  if (i == threadIdx.x) break;\n  __syncthreads();\n }\n}",
    ),
    "in a macro": (
        5,
        "#define WAIT(x) \\\n  p[x] = 1; \\\n  __syncthreads()\n__global__ void k(int *p) {\n"
        " if (threadIdx.x & 1) { WAIT(0); }\n}",
    ),
    "after an atomic": (
        3,
        "__global__ void k(int *p) {\n if (atomicAdd(p, 1) == 0) return;\n __syncthreads();\n}",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_barrier_that_only_some_threads_reach_is_refused_with_its_line(case):
    line, text = REFUSED[case]
    with pytest.raises(CompileError, match=rf"^.*kernel\.cu:{line}: __syncthreads") as caught:
        translation(hal.Source.cuda(text), read_options(()))
    assert f"kernel.cu:{line}: " in caught.value.log


def test_without_its_barrier_the_same_kernel_is_wrong(kernels):
    """The control: threads run one after another here, so a missing barrier shows."""
    text = (
        "__global__ void k(int *p) {\n __shared__ int s[64];\n s[threadIdx.x] = threadIdx.x;\n"
        " %s\n p[threadIdx.x] = s[63 - threadIdx.x];\n}"
    )
    for barrier, right in (("__syncthreads();", True), (";", False)):
        out = np.zeros(64, np.int32)
        kernels(text % barrier)("k", 1, 64, out)
        assert bool((out == 63 - np.arange(64)).all()) == right


def test_the_twin_in_python_runs_the_same_code(tmp_path):
    script = """
    import numpy as np
    from drivetrain import hal
    from drivetrain.errors import HalError

    device = hal.device("cpu:0")
    module = device.compile(hal.Source.cuda(
        "__global__ void k(const float *x, float *y, int n) { __shared__ float s[64];"
        " int i = blockIdx.x * 64 + threadIdx.x; s[threadIdx.x] = i < n ? x[i] : 0.f;"
        " __syncthreads(); if (i < n) y[i] = s[63 - threadIdx.x]; }"
        "__global__ void bad(const float *x) { __shared__ float s; s = x[threadIdx.x];"
        " switch ((int)s) { case 0: return; default: __syncthreads(); } }"))
    stream = device.stream()
    x = np.arange(128, dtype=np.float32)
    a, b = device.alloc(512, stream=stream), device.alloc(512, stream=stream)
    a.copy_from(memoryview(x).cast("B"), stream=stream)
    module.kernel("k")(stream, 2, 64, a, b, 128)
    y = np.zeros(128, np.float32)
    b.copy_to(memoryview(y).cast("B"), stream=stream)
    stream.synchronize()
    assert (y.reshape(2, 64) == x.reshape(2, 64)[:, ::-1]).all()
    module.kernel("bad")(stream, 1, 64, a)
    try:
        stream.synchronize()
    except HalError as error:
        assert "barrier" in str(error), error
        print("told")
    """
    environment = {**os.environ, "DRIVETRAIN_NATIVE": "0", "DRIVETRAIN_CACHE": str(tmp_path / "k")}
    done = subprocess.run(
        [sys.executable, "-c", dedent(script)], env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["told"], done.stderr


def test_functions_that_wait_may_be_called_in_a_case(kernels):
    text = """
    __device__ int shared_sum(int v, int *s) {
      s[threadIdx.x] = v;
      __syncthreads();
      int sum = 0;
      for (int i = 0; i < blockDim.x; i++) sum += s[i];
      __syncthreads();
      return sum;
    }
    __global__ void k(int *out, int mode) {
      __shared__ int s[32];
      int r = 0;
      switch (mode) {
        case 0: r = shared_sum(threadIdx.x, s);
        case 1: r += shared_sum(1, s); break;
        default: r = -1;
      }
      out[threadIdx.x] = r;
    }"""
    for mode, expected in ((0, 496 + 32), (1, 32), (2, -1)):
        out = np.zeros(32, np.int32)
        kernels(text)("k", 1, 32, out, mode)
        assert (out == expected).all()

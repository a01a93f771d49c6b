"""Blocks of every shape, arguments of every kind, loops over indices of every width."""

from __future__ import annotations

import math

import numpy as np
import pytest

TEXT = """
struct Big { float v[20]; int n; };

__global__ void reversed(int *p) {
  extern __shared__ int s[];
  int t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int n = blockDim.x * blockDim.y * blockDim.z;
  s[t] = t;
  __syncthreads();
  p[blockIdx.x * n + t] = s[n - 1 - t];
}
__global__ void all_kinds_of_shared(const float *x, float *y, int n) {
  __shared__ float a[64];
  __shared__ int rounds;
  extern __shared__ double dynamic[];
  int t = threadIdx.x;
  if (t == 0) rounds = n;
  a[t] = x[t];
  dynamic[t] = 2.0 * x[t];
  __syncthreads();
  if (rounds > 5) {
    a[t] += 1;
    __syncthreads();
  }
  for (int i = 0; i < rounds; i++) {
    float v = a[(t + i) % 64];
    __syncthreads();
    a[t] = v;
    __syncthreads();
  }
  y[t] = a[t] + (float)dynamic[63 - t];
}
__global__ void big(Big b, Big *out, int s) {
  b.v[threadIdx.x % 20] += s;
  Big copy = b;
  copy.n = threadIdx.x;
  out[threadIdx.x] = copy;
}
__global__ void wide_indices(const long long *in, long long *out, long long n) {
  long long start = blockIdx.x * (long long)blockDim.x + threadIdx.x;
  for (long long i = start; i < n; i += (long long)blockDim.x * gridDim.x) out[i] = in[i] * 3 - i;
}
__global__ void while_loop(const int *in, int *out, unsigned n) {
  unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  while (i < n) {
    out[i] = in[n - 1 - i];
    i += gridDim.x * blockDim.x;
  }
}
__device__ int depth(int n) { return n <= 0 ? 0 : 1 + depth(n - 1); }
__global__ void recursion(int *o) { o[threadIdx.x] = depth(threadIdx.x * 3); }
__global__ void small_types(const unsigned char *a, bool *b, short *s, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (!(i < n && a[i] != 3)) return;
  b[i] = a[i] > 100 || (i & 1);
  s[i] = -a[i];
}
"""


@pytest.mark.parametrize(
    "block", [1, (1, 64), (5, 3, 2), (16, 16), (1, 1, 64), (32, 32), (31, 1, 3), 1024]
)
def test_threads_of_a_block_of_any_shape_wait_for_one_another(kernels, block):
    n = block if isinstance(block, int) else math.prod(block)
    p = np.zeros((3, n), np.int32)
    kernels(TEXT)("reversed", 3, block, p, shared=4 * n)
    assert (p == np.arange(n)[::-1]).all()


@pytest.mark.parametrize("n", [0, 3, 7])
def test_static_dynamic_and_single_shared_variables_lie_apart(kernels, n):
    x = np.random.default_rng(n).random(64).astype(np.float32)
    y = np.zeros_like(x)
    kernels(TEXT)("all_kinds_of_shared", 1, 64, x, y, n, shared=512)
    a = x + 1 if n > 5 else x
    for i in range(n):
        a = np.roll(a, -i)
    np.testing.assert_allclose(y, a + 2 * x[::-1], rtol=1e-6)


def test_a_struct_that_is_an_argument_may_be_written_to(kernels):
    kind = np.dtype([("v", "20f4"), ("n", "i4")])
    given, out = np.zeros(1, kind), np.zeros(50, kind)
    given["v"] = np.arange(20)
    kernels(TEXT)("big", 1, 50, given.tobytes(), out, 7)
    for i in range(50):
        expected = np.arange(20, dtype=np.float32)
        expected[i % 20] += 7
        assert (out["v"][i] == expected).all()
        assert out["n"][i] == i


def test_indices_of_64_bits_and_loops_with_while(kernels):
    i = np.arange(1000)
    wide = np.zeros(1000, np.int64)
    kernels(TEXT)("wide_indices", 3, 37, i.astype(np.int64) ** 2, wide, 1000)
    assert (wide == i * i * 3 - i).all()
    out = np.zeros(1000, np.int32)
    kernels(TEXT)("while_loop", 3, 37, i.astype(np.int32), out, 1000)
    assert (out == i[::-1]).all()


def test_a_function_may_call_itself(kernels):
    out = np.zeros(40, np.int32)
    kernels(TEXT)("recursion", 1, 40, out)
    assert (out == np.arange(40) * 3).all()


def test_bytes_shorts_and_truth_values(kernels):
    a = np.random.default_rng(5).integers(0, 255, 200, dtype=np.uint8)
    b, s = np.zeros(200, np.uint8), np.zeros(200, np.int16)
    kernels(TEXT)("small_types", 2, 100, a, b, s, 190)
    i = np.arange(200)
    done = (i < 190) & (a != 3)
    assert (b == np.where(done, (a > 100) | (i & 1 == 1), 0)).all()
    assert (s == np.where(done, -a.astype(np.int16), 0)).all()

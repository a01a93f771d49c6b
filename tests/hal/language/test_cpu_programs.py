"""Whole kernels of the kind that programs are made of, each against numpy."""

from __future__ import annotations

import numpy as np
import pytest

NETWORK = """
#include <cuda_runtime.h>
#include <float.h>
#define ALL 0xffffffffu

template <typename T>
__device__ __forceinline__ T sum_of_warp(T v) {
#pragma unroll
  for (int d = warpSize / 2; d >= 1; d /= 2) v += __shfl_xor_sync(ALL, v, d);
  return v;
}
template <typename T>
__device__ T sum_of_block(T v) {
  __shared__ T part[32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  v = sum_of_warp(v);
  if (lane == 0) part[warp] = v;
  __syncthreads();
  v = lane < (blockDim.x + 31) / 32 ? part[lane] : T(0);
  v = sum_of_warp(v);
  __syncthreads();
  return v;
}

template <int THREADS>
__global__ void row_softmax(const float *__restrict__ x, float *__restrict__ y, int rows, int n) {
  extern __shared__ float cache[];
  if (blockIdx.x >= rows) return;
  const float *in = x + (size_t)blockIdx.x * n;
  float *out = y + (size_t)blockIdx.x * n;
  float top = -FLT_MAX;
  for (int c = threadIdx.x; c < n; c += THREADS) top = fmaxf(top, in[c]);
  cache[threadIdx.x] = top;
  for (int half = THREADS / 2; half > 0; half >>= 1) {
    __syncthreads();
    if (threadIdx.x < half)
      cache[threadIdx.x] = fmaxf(cache[threadIdx.x], cache[threadIdx.x + half]);
  }
  __syncthreads();
  top = cache[0];
  float total = 0.f;
  for (int c = threadIdx.x; c < n; c += THREADS) {
    const float e = __expf(in[c] - top);
    out[c] = e;
    total += e;
  }
  total = sum_of_block(total);
  for (int c = threadIdx.x; c < n; c += THREADS) out[c] /= total;
}
template __global__ void row_softmax<64>(const float *, float *, int, int);

__global__ void normalise(const float *in, float *out, const float *gain, int n, float epsilon) {
  __shared__ float mean, scale;
  const float *row = &in[blockIdx.x * n];
  float part = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) part += __ldg(row + i);
  part = sum_of_block<float>(part);
  if (threadIdx.x == 0) mean = part / n;
  __syncthreads();
  part = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) part += (row[i] - mean) * (row[i] - mean);
  part = sum_of_block<float>(part);
  if (threadIdx.x == 0) scale = rsqrtf(part / n + epsilon);
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += blockDim.x)
    out[blockIdx.x * n + i] = (row[i] - mean) * scale * gain[i];
}

// Attention, one block a query, the keys in tiles, the softmax corrected from tile to tile.
__global__ void attention(const float *q, const float *k, const float *v, float *out, int keys) {
  const int WIDTH = 16, TILE = 32;
  __shared__ float tile[TILE][WIDTH + 1];
  __shared__ float weight[TILE];
  const int t = threadIdx.x;
  float top = -INFINITY, total = 0, result = 0;
  for (int first = 0; first < keys; first += TILE) {
    for (int i = t; i < TILE * WIDTH; i += TILE)
      tile[i / WIDTH][i % WIDTH] = first + i / WIDTH < keys ? k[first * WIDTH + i] : 0;
    __syncthreads();
    float score = 0;
    for (int c = 0; c < WIDTH; c++) score += q[blockIdx.x * WIDTH + c] * tile[t][c];
    score = first + t < keys ? score * 0.25f : -INFINITY;
    float highest = score;
    for (int d = 16; d; d >>= 1) highest = fmaxf(highest, __shfl_xor_sync(ALL, highest, d));
    const float now = fmaxf(top, highest), keep = expf(top - now);
    weight[t] = expf(score - now);
    total = total * keep + sum_of_warp(weight[t]);
    result *= keep;
    top = now;
    __syncthreads();
    if (t < WIDTH)
      for (int i = 0; i < TILE && first + i < keys; i++)
        result += weight[i] * v[(first + i) * WIDTH + t];
    __syncthreads();
  }
  if (t < WIDTH) out[blockIdx.x * WIDTH + t] = result / total;
}
"""

MATRICES = """
struct View { int rows, columns, pitch; float *data; };
__device__ float at(const View m, int r, int c) {
  return r < m.rows && c < m.columns ? m.data[r * m.pitch + c] : 0.f;
}
__device__ View part_of(View m, int r, int c, int size) {
  View p = {min(size, m.rows - r * size), min(size, m.columns - c * size), m.pitch,
            &m.data[m.pitch * size * r + size * c]};
  return p;
}
template <int EDGE>
__global__ void multiply(View a, View b, View c) {
  View mine = part_of(c, blockIdx.y, blockIdx.x, EDGE);
  const int row = threadIdx.y, column = threadIdx.x;
  float sum = 0;
  for (int step = 0; step < (a.columns + EDGE - 1) / EDGE; ++step) {
    View left = part_of(a, blockIdx.y, step, EDGE), right = part_of(b, step, blockIdx.x, EDGE);
    __shared__ float l[EDGE][EDGE], r[EDGE][EDGE];
    l[row][column] = at(left, row, column);
    r[row][column] = at(right, row, column);
    __syncthreads();
    for (int i = 0; i < EDGE; ++i) sum += l[row][i] * r[i][column];
    __syncthreads();
  }
  if (row < mine.rows && column < mine.columns) mine.data[row * mine.pitch + column] = sum;
}
template __global__ void multiply<16>(View, View, View);

// Each thread of 64 holds a 4 x 4 part of a 32 x 32 part of C in registers.
__global__ void __launch_bounds__(64) blocked(const float *A, const float *B, float *C, int n) {
  __shared__ float a[8][32], b[8][32];
  float own[4][4] = {}, left[4], right[4];
  const unsigned x = threadIdx.x % 8 * 4, y = threadIdx.x / 8 * 4;
  const float *from_a = A + blockIdx.y * 32 * n, *from_b = B + blockIdx.x * 32;
  for (unsigned k = 0; k < n; k += 8, from_a += 8, from_b += 8 * n) {
    for (unsigned i = threadIdx.x; i < 256; i += 64) {
      a[i % 8][i / 8] = from_a[i / 8 * n + i % 8];
      b[i / 32][i % 32] = from_b[i / 32 * n + i % 32];
    }
    __syncthreads();
#pragma unroll
    for (int d = 0; d < 8; ++d) {
      for (int i = 0; i < 4; ++i) { left[i] = a[d][y + i]; right[i] = b[d][x + i]; }
      for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) own[i][j] += left[i] * right[j];
    }
    __syncthreads();
  }
  for (int i = 0; i < 4; ++i) {
    float4 line = make_float4(own[i][0], own[i][1], own[i][2], own[i][3]);
    *reinterpret_cast<float4 *>(&C[(blockIdx.y * 32 + y + i) * n + blockIdx.x * 32 + x]) = line;
  }
}
"""

OTHERS = """
__global__ void sort_block(int *keys, int n) {
  extern __shared__ int s[];
  const unsigned t = threadIdx.x;
  s[t] = t < n ? keys[t] : INT_MAX;
  __syncthreads();
  for (unsigned size = 2; size <= blockDim.x; size *= 2)
    for (unsigned stride = size / 2; stride > 0; stride /= 2) {
      const unsigned other = t ^ stride;
      if (other > t && (s[t] > s[other]) == ((t & size) == 0)) {
        int swap = s[t];
        s[t] = s[other];
        s[other] = swap;
      }
      __syncthreads();
    }
  if (t < n) keys[t] = s[t];
}
__device__ static int escapes_after(double cx, double cy, int most) {
  double x = 0, y = 0;
  int i = 0;
  while (i < most && x * x + y * y < 4.0) {
    const double t = x * x - y * y + cx;
    y = 2 * x * y + cy;
    x = t;
    i++;
  }
  return i;
}
__global__ void mandelbrot(int *out, int w, int h, int most) {
  const int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
  if (x < w && y < h) out[y * w + x] = escapes_after(-2. + 3. * x / w, -1. + 2. * y / h, most);
}
__global__ void compact(const int *in, int *out, int *count, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x & 31;
  const int v = i < n ? in[i] : 0;
  const unsigned wanted = __ballot_sync(~0u, v > 0);
  int base = 0;
  if (lane == 0) base = atomicAdd(count, __popc(wanted));
  base = __shfl_sync(~0u, base, 0);
  if (v > 0) out[base + __popc(wanted & ((1u << lane) - 1))] = v;
}
__global__ void life(const unsigned char *now, unsigned char *next, int w, int h) {
  __shared__ unsigned char s[10][34];
  const int x0 = blockIdx.x * 32, y0 = blockIdx.y * 8;
  for (int i = threadIdx.y * 32 + threadIdx.x; i < 340; i += 256) {
    const int x = (x0 + i % 34 - 1 + w) % w, y = (y0 + i / 34 - 1 + h) % h;
    s[i / 34][i % 34] = now[y * w + x];
  }
  __syncthreads();
  const int x = threadIdx.x + 1, y = threadIdx.y + 1;
  int around = -s[y][x];
  for (int j = -1; j <= 1; j++)
    for (int i = -1; i <= 1; i++) around += s[y + j][x + i];
  if (x0 + x - 1 < w && y0 + y - 1 < h)
    next[(y0 + y - 1) * w + x0 + x - 1] = around == 3 || (around == 2 && s[y][x]);
}
"""


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def random(rng, *shape):
    return rng.random(shape).astype(np.float32)


@pytest.mark.parametrize("n", [1, 63, 200])
def test_softmax_of_rows(kernels, rng, n):
    x = random(rng, 3, n) * 9
    y = np.zeros_like(x)
    kernels(NETWORK)("row_softmax<64>", 4, 64, x, y, 3, n, shared=256)
    e = np.exp(x - x.max(1, keepdims=True))
    np.testing.assert_allclose(y, e / e.sum(1, keepdims=True), rtol=1e-5)


def test_layer_normalisation(kernels, rng):
    x, gain = random(rng, 4, 333), random(rng, 333)
    y = np.zeros_like(x)
    kernels(NETWORK)("normalise", 4, 96, x, y, gain, 333, 1e-5)
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * gain
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("keys", [5, 32, 100])
def test_attention_in_tiles(kernels, rng, keys):
    q, k, v = random(rng, 6, 16), random(rng, keys, 16), random(rng, keys, 16)
    out = np.zeros_like(q)
    kernels(NETWORK)("attention", 6, 32, q, k, v, out, keys)
    e = np.exp(q @ k.T / 4)
    np.testing.assert_allclose(out, e / e.sum(1, keepdims=True) @ v, rtol=1e-5)


def test_a_product_of_parts_of_matrices_that_are_structs(kernels, rng):
    import struct

    from drivetrain import hal

    a, b = random(rng, 40, 23), random(rng, 23, 50)
    c = np.zeros((40, 50), np.float32)
    run = kernels(MATRICES)
    with run.device.stream() as stream:
        buffers, views = [], []
        for array in (a, b, c):
            buffer = run.device.alloc(array.nbytes, stream=stream)
            buffer.copy_from(memoryview(array).cast("B"), stream=stream)
            rows, columns = array.shape
            views.append(struct.pack("iiiiP", rows, columns, columns, 0, buffer.ptr))
            buffers.append(buffer)
        kernel = run.module.kernel("multiply<16>", args=[hal.struct_of(24)] * 3)
        kernel(stream, (4, 3), (16, 16), *views)
        buffers[2].copy_to(memoryview(c).cast("B"), stream=stream)
        stream.synchronize()
    np.testing.assert_allclose(c, a @ b, rtol=1e-5)


def test_a_product_with_parts_in_registers(kernels, rng):
    a, b = random(rng, 64, 64), random(rng, 64, 64)
    c = np.zeros_like(a)
    kernels(MATRICES)("blocked", (2, 2), 64, a, b, c, 64)
    np.testing.assert_allclose(c, a @ b, rtol=1e-5)


def test_a_block_sorts(kernels, rng):
    keys = rng.integers(-1000, 1000, 200, dtype=np.int32)
    expected = np.sort(keys)
    kernels(OTHERS)("sort_block", 1, 256, keys, 200, shared=1024)
    assert (keys == expected).all()


def test_loops_that_every_thread_leaves_by_itself(kernels):
    w, h, most = 45, 31, 60
    out = np.zeros((h, w), np.int32)
    kernels(OTHERS)("mandelbrot", (3, 4), (16, 8), out, w, h, most)
    y, x = np.mgrid[0:h, 0:w]
    cx, cy = -2.0 + 3.0 * x / w, -1.0 + 2.0 * y / h
    zx, zy, expected = np.zeros((h, w)), np.zeros((h, w)), np.zeros((h, w), int)
    for _ in range(most):
        inside = zx * zx + zy * zy < 4
        expected += inside
        zx, zy = (np.where(inside, zx * zx - zy * zy + cx, zx),
                  np.where(inside, 2 * zx * zy + cy, zy))  # fmt: skip
    assert (out == expected).all()


def test_values_are_gathered_without_gaps(kernels, rng):
    values = rng.integers(-5, 6, 1000, dtype=np.int32)
    out, count = np.zeros(1000, np.int32), np.zeros(1, np.int32)
    kernels(OTHERS)("compact", 8, 128, values, out, count, 1000)
    kept = values[values > 0]
    assert count[0] == len(kept)
    assert (np.sort(out[: count[0]]) == np.sort(kept)).all()


def test_a_world_of_bytes_with_edges_that_meet(kernels, rng):
    now = rng.integers(0, 2, (19, 70), dtype=np.uint8)
    after = np.zeros_like(now)
    kernels(OTHERS)("life", (3, 3), (32, 8), now, after, 70, 19)
    shifts = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    around = sum(np.roll(now, shift, (0, 1)).astype(int) for shift in shifts)
    assert (after == ((around == 3) | ((around == 2) & (now == 1)))).all()

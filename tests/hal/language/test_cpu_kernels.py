"""What people write in CUDA C, run on the CPU and compared with numpy."""

from __future__ import annotations

import numpy as np
import pytest

REDUCTIONS = """
#include <cuda_runtime.h>
#define FULL 0xffffffffu
#define WARP_SIZE 32

__inline__ __device__ float warp_sum(float value) {
  for (int offset = WARP_SIZE / 2; offset > 0; offset /= 2)
    value += __shfl_down_sync(FULL, value, offset);
  return value;
}

__inline__ __device__ float block_sum(float value) {
  static __shared__ float partial[32];
  int lane = threadIdx.x % WARP_SIZE;
  int warp = threadIdx.x / WARP_SIZE;
  value = warp_sum(value);
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  value = (threadIdx.x < blockDim.x / WARP_SIZE) ? partial[lane] : 0.0f;
  if (warp == 0) value = warp_sum(value);
  return value;
}

extern "C" __global__ void tree(const float *__restrict__ in, float *out, int n) {
  extern __shared__ float sdata[];
  unsigned int tid = threadIdx.x;
  unsigned int i = blockIdx.x * (blockDim.x * 2) + threadIdx.x;
  float sum = i < n ? in[i] : 0.f;
  if (i + blockDim.x < n) sum += in[i + blockDim.x];
  sdata[tid] = sum;
  __syncthreads();
  for (unsigned int s = blockDim.x / 2; s > 0; s >>= 1) {
    if (tid < s) sdata[tid] += sdata[tid + s];
    __syncthreads();
  }
  if (tid == 0) out[blockIdx.x] = sdata[0];
}

__global__ void shuffled(const float *in, float *out, int n) {
  float sum = 0.f;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x)
    sum += in[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) atomicAdd(out, sum);
}

__global__ void with_tail(const float *in, float *out, int n) {
  __shared__ float s[256];
  const int tid = threadIdx.x;
  float v = 0;
  for (int i = tid; i < n; i += blockDim.x) v += in[i];
  s[tid] = v;
  __syncthreads();
  if (tid < 128) s[tid] += s[tid + 128];
  __syncthreads();
  if (tid < 64) s[tid] += s[tid + 64];
  __syncthreads();
  if (tid < 32) {
    v = s[tid] + s[tid + 32];
#pragma unroll
    for (int mask = 16; mask >= 1; mask >>= 1) v += __shfl_xor_sync(0xffffffff, v, mask);
    if (tid == 0) *out = v;
  }
}

__global__ void maximum(const int *in, int *out, int n) {
  int best = INT_MIN;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    best = max(best, in[i]);
  for (int d = 16; d; d >>= 1) best = max(best, __shfl_xor_sync(FULL, best, d));
  if ((threadIdx.x & 31) == 0) atomicMax(out, best);
}

__global__ void votes(const int *in, unsigned *ballots, int *any, int *all) {
  int v = in[blockIdx.x * blockDim.x + threadIdx.x];
  unsigned ballot = __ballot_sync(FULL, v > 0);
  int some = __any_sync(FULL, v > 100), every = __all_sync(FULL, v > -100);
  int w = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) { ballots[w] = ballot; any[w] = some; all[w] = every; }
}
"""


@pytest.fixture(scope="module")
def numbers():
    return np.random.default_rng(0).standard_normal(5000).astype(np.float32)


def test_a_tree_in_dynamic_shared_memory_sums(kernels, numbers):
    out = np.zeros(10, np.float32)
    kernels(REDUCTIONS)("tree", 10, 256, numbers, out, 5000, shared=1024)
    expected = np.array([numbers[i * 512 : (i + 1) * 512].sum() for i in range(10)])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [32, 64, 256, 1024])
def test_warp_shuffles_and_a_block_sum_in_a_function_add_up(kernels, numbers, block):
    out = np.zeros(1, np.float32)
    kernels(REDUCTIONS)("shuffled", 3, block, numbers, out, 5000)
    np.testing.assert_allclose(out[0], numbers.sum(dtype=np.float64), rtol=1e-3)


def test_a_shuffle_in_a_branch_of_one_warp_ends_a_reduction(kernels, numbers):
    out = np.zeros(1, np.float32)
    kernels(REDUCTIONS)("with_tail", 1, 256, numbers, out, 5000)
    np.testing.assert_allclose(out[0], numbers.sum(dtype=np.float64), rtol=1e-3)


def test_integers_are_reduced_by_shuffles_and_an_atomic_maximum(kernels):
    values = np.random.default_rng(1).integers(-(2**31), 2**31 - 1, 3001, dtype=np.int32)
    out = np.full(1, -(2**31), np.int32)
    kernels(REDUCTIONS)("maximum", 4, 96, values, out, len(values))
    assert out[0] == values.max()


def test_votes_see_the_whole_warp(kernels):
    values = np.random.default_rng(2).integers(-101, 103, 192, dtype=np.int32)
    ballots, some, every = np.zeros(6, np.uint32), np.zeros(6, np.int32), np.zeros(6, np.int32)
    kernels(REDUCTIONS)("votes", 2, 96, values, ballots, some, every)
    warps = values.reshape(6, 32)
    bits = (warps > 0) @ (1 << np.arange(32, dtype=np.uint64))
    assert (ballots == bits).all()
    assert (some.astype(bool) == (warps > 100).any(1)).all()
    assert (every.astype(bool) == (warps > -100).all(1)).all()


TILES = """
template <typename T, int TILE>
__global__ void matmul(const T *A, const T *B, T *C, int m, int n, int k) {
  __shared__ T As[TILE][TILE];
  __shared__ T Bs[TILE][TILE];
  int row = blockIdx.y * TILE + threadIdx.y, col = blockIdx.x * TILE + threadIdx.x;
  T acc = 0;
  for (int t = 0; t < (k + TILE - 1) / TILE; ++t) {
    As[threadIdx.y][threadIdx.x] =
        row < m && t * TILE + threadIdx.x < k ? A[row * k + t * TILE + threadIdx.x] : T(0);
    Bs[threadIdx.y][threadIdx.x] =
        col < n && t * TILE + threadIdx.y < k ? B[(t * TILE + threadIdx.y) * n + col] : T(0);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < TILE; ++i) acc += As[threadIdx.y][i] * Bs[i][threadIdx.x];
    __syncthreads();
  }
  if (row < m && col < n) C[row * n + col] = acc;
}
template __global__ void matmul<float, 16>(const float *, const float *, float *, int, int, int);
template __global__ void matmul<double, 8>(const double *, const double *, double *, int, int, int);

#define TILE_DIM 32
#define BLOCK_ROWS 8
__global__ void transpose(float *odata, const float *idata, int width, int height) {
  __shared__ float tile[TILE_DIM][TILE_DIM + 1];
  int x = blockIdx.x * TILE_DIM + threadIdx.x;
  int y = blockIdx.y * TILE_DIM + threadIdx.y;
  for (int j = 0; j < TILE_DIM; j += BLOCK_ROWS)
    if (x < width && y + j < height)
      tile[threadIdx.y + j][threadIdx.x] = idata[(y + j) * width + x];
  __syncthreads();
  x = blockIdx.y * TILE_DIM + threadIdx.x;
  y = blockIdx.x * TILE_DIM + threadIdx.y;
  for (int j = 0; j < TILE_DIM; j += BLOCK_ROWS)
    if (x < height && y + j < width)
      odata[(y + j) * height + x] = tile[threadIdx.x][threadIdx.y + j];
}

#define RADIUS 3
__constant__ float weights[2 * RADIUS + 1] = {0.1f, 0.2f, 0.3f, 0.4f, 0.3f, 0.2f, 0.1f};
__global__ void stencil(const float *in, float *out, int n) {
  __shared__ float temp[64 + 2 * RADIUS];
  int g = blockIdx.x * blockDim.x + threadIdx.x, l = threadIdx.x + RADIUS;
  temp[l] = g < n ? in[g] : 0.f;
  if (threadIdx.x < RADIUS) {
    temp[l - RADIUS] = g - RADIUS >= 0 && g - RADIUS < n ? in[g - RADIUS] : 0.f;
    temp[l + blockDim.x] = g + (int)blockDim.x < n ? in[g + blockDim.x] : 0.f;
  }
  __syncthreads();
  float result = 0;
  for (int o = -RADIUS; o <= RADIUS; o++) result += temp[l + o] * weights[o + RADIUS];
  if (g < n) out[g] = result;
}

__global__ void histogram(const unsigned char *data, unsigned int *bins, int n) {
  __shared__ unsigned int local[256];
  for (int i = threadIdx.x; i < 256; i += blockDim.x) local[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
    atomicAdd(&local[data[i]], 1u);
  __syncthreads();
  for (int i = threadIdx.x; i < 256; i += blockDim.x)
    if (local[i]) atomicAdd(&bins[i], local[i]);
}

__global__ void scan(const int *in, int *out, int n) {  // Hillis and Steele, two buffers
  extern __shared__ int temp[];
  int tid = threadIdx.x, pout = 0, pin = 1;
  temp[pout * n + tid] = in[tid];
  __syncthreads();
  for (int offset = 1; offset < n; offset *= 2) {
    pout = 1 - pout;
    pin = 1 - pout;
    if (tid >= offset) temp[pout * n + tid] = temp[pin * n + tid] + temp[pin * n + tid - offset];
    else temp[pout * n + tid] = temp[pin * n + tid];
    __syncthreads();
  }
  out[tid] = temp[pout * n + tid];
}

__global__ void blelloch(const int *in, int *out, int n) {
  extern __shared__ int temp[];
  int thid = threadIdx.x, offset = 1;
  temp[2 * thid] = in[2 * thid];
  temp[2 * thid + 1] = in[2 * thid + 1];
  for (int d = n >> 1; d > 0; d >>= 1) {
    __syncthreads();
    if (thid < d) {
      int ai = offset * (2 * thid + 1) - 1, bi = offset * (2 * thid + 2) - 1;
      temp[bi] += temp[ai];
    }
    offset *= 2;
  }
  if (thid == 0) temp[n - 1] = 0;
  for (int d = 1; d < n; d *= 2) {
    offset >>= 1;
    __syncthreads();
    if (thid < d) {
      int ai = offset * (2 * thid + 1) - 1, bi = offset * (2 * thid + 2) - 1;
      int t = temp[ai];
      temp[ai] = temp[bi];
      temp[bi] += t;
    }
  }
  __syncthreads();
  out[2 * thid] = temp[2 * thid];
  out[2 * thid + 1] = temp[2 * thid + 1];
}

__global__ void volume(float *out, int nx, int ny, int nz) {
  int x = blockIdx.x * blockDim.x + threadIdx.x;
  int y = blockIdx.y * blockDim.y + threadIdx.y;
  int z = blockIdx.z * blockDim.z + threadIdx.z;
  if (x >= nx || y >= ny || z >= nz) return;
  out[(z * ny + y) * nx + x] = x + 10.f * y + 100.f * z;
}
"""


@pytest.mark.parametrize(
    ("name", "tile", "kind"), [("float,16", 16, np.float32), ("double,8", 8, np.float64)]
)
def test_a_tiled_product_of_matrices_is_right_at_sizes_that_do_not_fit(kernels, name, tile, kind):
    m, n, k = 37, 50, 45
    rng = np.random.default_rng(3)
    a, b = rng.standard_normal((m, k)).astype(kind), rng.standard_normal((k, n)).astype(kind)
    c = np.zeros((m, n), kind)
    grid = (-(-n // tile), -(-m // tile))
    kernels(TILES)(f"matmul<{name}>", grid, (tile, tile), a, b, c, m, n, k)
    np.testing.assert_allclose(c, a @ b, rtol=1e-4, atol=1e-4)


def test_a_transpose_through_a_padded_tile(kernels):
    a = np.random.default_rng(4).standard_normal((70, 45)).astype(np.float32)
    out = np.zeros((45, 70), np.float32)
    kernels(TILES)("transpose", (2, 3), (32, 8), out, a, 45, 70)
    assert (out == a.T).all()


def test_a_stencil_reads_its_halo_and_constant_memory(kernels):
    a = np.random.default_rng(5).standard_normal(200).astype(np.float32)
    out = np.zeros(200, np.float32)
    kernels(TILES)("stencil", 4, 64, a, out, 200)
    weights = np.array([0.1, 0.2, 0.3, 0.4, 0.3, 0.2, 0.1], np.float32)
    np.testing.assert_allclose(out, np.convolve(a, weights, "same"), rtol=1e-5, atol=1e-6)


def test_a_histogram_with_atomics_in_shared_memory_loses_nothing(kernels):
    data = np.random.default_rng(6).integers(0, 256, 10007, dtype=np.uint8)
    bins = np.zeros(256, np.uint32)
    kernels(TILES)("histogram", 8, 128, data, bins, len(data))
    assert (bins == np.bincount(data, minlength=256)).all()


def test_two_scans_of_a_block(kernels):
    values = np.random.default_rng(7).integers(-9, 9, 128, dtype=np.int32)
    out = np.zeros(128, np.int32)
    kernels(TILES)("scan", 1, 128, values, out, 128, shared=2 * 128 * 4)
    assert (out == np.cumsum(values)).all()
    kernels(TILES)("blelloch", 1, 64, values, out, 128, shared=128 * 4)
    assert (out == np.cumsum(values) - values).all()


def test_blocks_of_three_dimensions(kernels):
    out = np.zeros((5, 7, 11), np.float32)
    kernels(TILES)("volume", (3, 4, 2), (4, 2, 3), out, 11, 7, 5)
    z, y, x = np.mgrid[0:5, 0:7, 0:11]
    assert (out == x + 10 * y + 100 * z).all()


LANGUAGE = """
struct Particle { float3 position; float mass; int tags[2]; };
struct alignas(16) Pair { double first; float second; };
typedef unsigned long long u64;
enum Mode { COPY, DOUBLE = 5, NEGATE };
enum class Axis : int { X = 1, Y = 2 };
constexpr int kWidth = 4;
__constant__ int table[4] = {3, 1, 4, 1};
static const float scale_factor = 0.5f;

template <typename T> __device__ __forceinline__ T square(T x) { return x * x; }
template <typename T> __device__ T clamped(T x, T lo, T hi) {
  return x < lo ? lo : x > hi ? hi : x;
}
template <int N> __device__ int power(int x) {
  int r = 1;
  for (int i = 0; i < N; i++) r *= x;
  return r;
}
__device__ void swap(int &a, int &b) { int t = a; a = b; b = t; }
__device__ int total(const int *p, int n) {
  int s = 0;
  for (int i = 0; i < n; ++i) s += p[i];
  return s;
}
__device__ float total(const float *p, int n) { float s = 0; while (n--) s += *p++; return s; }
__device__ int fib(int n) { return n < 2 ? n : fib(n - 1) + fib(n - 2); }
__device__ bool is_even(int n);
__device__ bool is_odd(int n) { return n == 0 ? false : is_even(n - 1); }
__device__ bool is_even(int n) { return n == 0 ? true : is_odd(n - 1); }
__device__ Particle moved(Particle p, float dx) { p.position.x += dx; p.tags[1]++; return p; }

__global__ void structs(const Particle *in, Particle *out, Particle offset, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    Particle p = in[i];
    p.position.y += offset.position.y;
    p.mass *= offset.mass;
    p.tags[0] = offset.tags[1] + i;
    out[i] = moved(p, offset.position.x);
  }
}
__global__ void pairs(Pair *out, Pair p) {
  out[threadIdx.x] = Pair{p.first + threadIdx.x, p.second};
}

__global__ void vectors(const float4 *in, float4 *out, const float *scalars, float *sums)
{
  int i = threadIdx.x;
  float4 v = in[i];
  const float4 w = *reinterpret_cast<const float4 *>(&scalars[4 * i]);
  float4 r = make_float4(v.x + w.x, v.y - w.y, v.z * w.z, v.w / w.w);
  out[i] = r;
  int2 q = {i, -i};
  uchar4 c = make_uchar4(1, 2, 3, 250);
  c.w += 10;
  __stcs(&sums[i], r.x + q.y + c.w + __ldg(&scalars[i]));
}

__global__ void functions(int *out, const float *f) {
  int i = threadIdx.x;
  int a = i, b = 10 * i;
  swap(a, b);
  int local[5] = {1, 2, 3};
  __shared__ int shared_numbers[4];
  if (i < 4) shared_numbers[i] = i * i;
  __syncthreads();
  out[i * 8 + 0] = a - b;
  out[i * 8 + 1] = total(local, 5) + total(shared_numbers, 4) + total(table, 4);
  out[i * 8 + 2] = (int)total(f, 3);
  out[i * 8 + 3] = fib(i + 5);
  out[i * 8 + 4] = is_even(i);
  out[i * 8 + 5] = square(i) + (int)square(1.5f) + square<int>(2);
  out[i * 8 + 6] = clamped(i * 100, 50, 250) + power<3>(i);
  out[i * 8 + 7] = (int)(scale_factor * i) + kWidth + (int)Axis::Y + NEGATE;
}

__global__ void control(int *out, int mode) {
  int i = threadIdx.x, r = 0;
  switch (mode) {
    case COPY: r = i; break;
    case DOUBLE: r = i;
    case NEGATE: r -= 2 * i; break;
    default: r = 99;
  }
  do { r += 3; if (r % 7 == 0) break; } while (r < 50);
  for (int k = 0, m = 10; k < m; ++k, --m) { if (k == 2) continue; r += k * m; }
  while (true) { if (++r % 5 == 0) break; }
  for (int k = 0; k < 3; k++) { if (i == k) { out[i] = -r; return; } }
  r = i > 2 ? (i > 4 ? r : r + 1) : r - 1, r += 0;
  out[i] = r;
}

__global__ void wide(long long *out, u64 *uout, double *dout, short *sout, unsigned char *cout) {
  int i = threadIdx.x;
  out[i] = (1LL << 40) * (i - 2) + 0x7fffffff;
  uout[i] = 0xffffffffffffffffULL - (u64)i * 3;
  dout[i] = sqrt((double)i) + 1e-300 * i + M_PI;
  short s = 32767; s += i; sout[i] = s;
  unsigned char c = 250; c += i; c++; cout[i] = c;
}

__global__ void atomics(int *ints, unsigned *u, float *f, double *d, unsigned long long *l) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&ints[0], i); atomicSub(&ints[1], i); atomicMin(&ints[2], -i); atomicMax(&ints[3], i);
  atomicAnd(&ints[4], ~(1 << (i & 15))); atomicOr(&ints[5], 1 << (i & 15));
  atomicXor(&ints[6], 1 << (i & 7)); atomicExch(&ints[7], 42);
  atomicInc(&u[0], 9); atomicDec(&u[1], 9);
  atomicAdd(f, 0.5f); atomicAdd(d, 0.25); atomicAdd(l, (unsigned long long)i << 33);
  int old = ints[8], seen;
  do { seen = old; old = atomicCAS(&ints[8], seen, seen + 2); } while (old != seen);
}
__device__ float atomic_max_float(float *p, float v) {
  int *q = (int *)p, old = *q, assumed;
  do {
    assumed = old;
    old = atomicCAS(q, assumed, __float_as_int(fmaxf(v, __int_as_float(assumed))));
  } while (assumed != old);
  return __int_as_float(old);
}
__global__ void float_max(const float *in, float *out) { atomic_max_float(out, in[threadIdx.x]); }

__global__ void mathematics(const float *x, float *y, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float v = x[i];
  y[i] = expf(-v * v) + sinf(v) * cosf(v) + logf(fabsf(v) + 1.f) + powf(fabsf(v), 1.5f)
       + rsqrtf(v * v + 1.f) + tanhf(v) + fminf(v, 0.f) + floorf(v) + erff(v) + fmaf(v, v, 1.0f);
}
__global__ void __launch_bounds__(128, 2) bounded(int *out) { out[threadIdx.x] = blockDim.x; }
__global__ void empty() {}
__global__ void halves(const __half *in, __half *out) {
  int i = threadIdx.x;
  out[i] = __float2half(__half2float(in[i]) * 2.0f + 0.1f);
}
"""


def test_structs_are_passed_and_returned_by_value(kernels):
    kind = np.dtype([("position", "3f4"), ("mass", "f4"), ("tags", "2i4")])
    rng = np.random.default_rng(8)
    data = np.zeros(10, kind)
    data["position"], data["mass"] = rng.random((10, 3)), rng.random(10)
    data["tags"] = rng.integers(0, 9, (10, 2))
    out, offset = np.zeros(10, kind), np.zeros(1, kind)
    offset["position"], offset["mass"], offset["tags"] = [[1, 2, 3]], 4, [[5, 6]]
    kernels(LANGUAGE)("structs", 2, 8, data, out, offset.tobytes(), 10)
    expected = data.copy()
    expected["position"][:, 0] += 1
    expected["position"][:, 1] += 2
    expected["mass"] *= 4
    expected["tags"][:, 0] = 6 + np.arange(10)
    expected["tags"][:, 1] += 1
    assert out.tobytes() == expected.tobytes()


def test_a_struct_with_an_alignment_has_the_size_it_has_in_cuda(kernels):
    kind = np.dtype({"names": ["a", "b"], "formats": ["f8", "f4"], "itemsize": 16})
    out, given = np.zeros(3, kind), np.zeros(1, kind)
    given["a"], given["b"] = 0.5, 7
    kernels(LANGUAGE)("pairs", 1, 3, out, given.tobytes())
    assert out["a"].tolist() == [0.5, 1.5, 2.5]
    assert out["b"].tolist() == [7, 7, 7]


def test_vector_types_and_loads_through_a_cast(kernels):
    rng = np.random.default_rng(9)
    v, w = rng.random((6, 4)).astype(np.float32), rng.random((6, 4)).astype(np.float32) + 1
    out, sums = np.zeros((6, 4), np.float32), np.zeros(6, np.float32)
    kernels(LANGUAGE)("vectors", 1, 6, v, out, w, sums)
    expected = np.stack(
        [v[:, 0] + w[:, 0], v[:, 1] - w[:, 1], v[:, 2] * w[:, 2], v[:, 3] / w[:, 3]]
    )
    np.testing.assert_array_equal(out, expected.T)
    np.testing.assert_allclose(sums, out[:, 0] - np.arange(6) + 4 + w.ravel()[:6], rtol=1e-6)


def test_functions_take_pointers_to_every_kind_of_memory_references_and_types(kernels):
    out = np.zeros((6, 8), np.int32)
    kernels(LANGUAGE)("functions", 1, 6, out, np.array([1.5, 2.5, 3.5], np.float32))
    fib = [5, 8, 13, 21, 34, 55]
    for i in range(6):
        a, b = 10 * i, i
        expected = [a - b, 6 + 14 + 9, 7, fib[i], int(i % 2 == 0), i * i + 2 + 4]
        expected += [min(max(i * 100, 50), 250) + i**3, int(0.5 * i) + 4 + 2 + 6]
        assert out[i].tolist() == expected


def _control(i: int, mode: int) -> int:
    r = {0: i, 5: i - 2 * i, 6: -2 * i}.get(mode, 99)
    while True:
        r += 3
        if int(np.fmod(r, 7)) == 0 or r >= 50:
            break
    k, m = 0, 10
    while k < m:
        r += 0 if k == 2 else k * m
        k, m = k + 1, m - 1
    while True:
        r += 1
        if r % 5 == 0:
            break
    if i < 3:
        return -r
    return r if i > 4 else r + 1


@pytest.mark.parametrize("mode", [0, 5, 6, 1])
def test_control_flow_does_what_c_says(kernels, mode):
    out = np.zeros(7, np.int32)
    kernels(LANGUAGE)("control", 1, 7, out, mode)
    assert out.tolist() == [_control(i, mode) for i in range(7)]


def test_numbers_of_all_widths_wrap_as_they_must(kernels):
    i = np.arange(9)
    a, b, c = np.zeros(9, np.int64), np.zeros(9, np.uint64), np.zeros(9)
    s, u = np.zeros(9, np.int16), np.zeros(9, np.uint8)
    kernels(LANGUAGE)("wide", 1, 9, a, b, c, s, u)
    assert (a == (1 << 40) * (i - 2) + 0x7FFFFFFF).all()
    assert (b == np.uint64(2**64 - 1) - (i * 3).astype(np.uint64)).all()
    np.testing.assert_allclose(c, np.sqrt(i) + np.pi, rtol=1e-15)
    assert (s == (32767 + i).astype(np.int16)).all()
    assert (u == (251 + i).astype(np.uint8)).all()


def test_atomics_lose_no_update(kernels):
    n = 500
    ints = np.zeros(9, np.int32)
    ints[4] = 0xFFFF
    u, f = np.zeros(2, np.uint32), np.zeros(1, np.float32)
    d, wide = np.zeros(1), np.zeros(1, np.uint64)
    kernels(LANGUAGE)("atomics", 10, 50, ints, u, f, d, wide)
    total = n * (n - 1) // 2
    xor = np.bitwise_xor.reduce(1 << (np.arange(n) & 7))
    assert ints.tolist() == [total, -total, 1 - n, n - 1, 0, 0xFFFF, xor, 42, 2 * n]
    assert u.tolist() == [n % 10, (10 - n % 10) % 10]
    assert f[0] == 0.5 * n
    assert d[0] == 0.25 * n
    assert wide[0] == total << 33


def test_a_loop_over_compare_and_swap_is_a_float_maximum(kernels):
    values = np.random.default_rng(10).standard_normal(77).astype(np.float32)
    out = np.full(1, -np.inf, np.float32)
    kernels(LANGUAGE)("float_max", 1, 77, values, out)
    assert out[0] == values.max()


def test_mathematics_agrees_with_the_double_precision_result(kernels):
    import math

    x = np.random.default_rng(11).standard_normal(300).astype(np.float32) * 3
    y = np.zeros_like(x)
    kernels(LANGUAGE)("mathematics", 3, 128, x, y, 300)
    v = x.astype(np.float64)
    erf = np.array([math.erf(t) for t in v])
    expected = np.exp(-v * v) + np.sin(v) * np.cos(v) + np.log(abs(v) + 1) + abs(v) ** 1.5
    expected += 1 / np.sqrt(v * v + 1) + np.tanh(v) + np.minimum(v, 0) + np.floor(v) + erf
    np.testing.assert_allclose(y, expected + v * v + 1, rtol=1e-5, atol=1e-5)


def test_halves_are_rounded_to_nearest(kernels):
    data = np.array([0, 1, -2.5, 1000, 3e-6, 65504], np.float16)
    out = np.zeros_like(data)
    kernels(LANGUAGE)("halves", 1, 6, data, out)
    with np.errstate(over="ignore"):
        expected = (data.astype(np.float32) * np.float32(2) + np.float32(0.1)).astype(np.float16)
    assert out.tobytes() == expected.tobytes()


def test_a_kernel_without_arguments_and_one_with_bounds(kernels):
    kernels(LANGUAGE)("empty", 2, 2)
    out = np.zeros(100, np.int32)
    kernels(LANGUAGE)("bounded", 1, 100, out)
    assert (out == 100).all()

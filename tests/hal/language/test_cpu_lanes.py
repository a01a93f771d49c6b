"""Vectors are made of threads without changing what a thread does, even where indices wrap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from drivetrain.hal.language import cpp

GUARDS = """
#define GUARD(name, type, op, step)                                              \\
  __global__ void name(type base, type n, int *out) {                            \\
    type i = base + (type)threadIdx.x * (step);                                  \\
    if (i op n) out[blockIdx.x * blockDim.x + threadIdx.x] += 1;                 \\
  }                                                                              \\
  __global__ void name##_return(type base, type n, int *out) {                   \\
    const type i = (step) * threadIdx.x + base;                                  \\
    if (!(i op n)) return;                                                       \\
    type j = i - 1;                                                              \\
    if (n op j) return;                                                          \\
    out[blockIdx.x * blockDim.x + threadIdx.x] += 1;                             \\
  }                                                                              \\
  __global__ void name##_wide(type base, long long n, int *out) {                \\
    type i = base + threadIdx.x * (step);                                        \\
    if ((long long)i op n && threadIdx.x != 2)                                   \\
      out[blockIdx.x * blockDim.x + threadIdx.x] += 1;                           \\
  }
""" + "\n".join(
    f"GUARD({word}_{kind}_{abs(step)}{'m' if step < 0 else ''}, {spelled}, {op}, {step})"
    for word, op in [("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "==")]
    for kind, spelled in [("i", "int"), ("u", "unsigned")]
    for step in (1, -1, 3)
)
OPS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
}
EDGES = [0, 1, 5, 31, 2**31 - 40, 2**31 - 1, 2**31, 2**31 + 9, 2**32 - 33, 2**32 - 1]
words = st.one_of(st.sampled_from(EDGES), st.integers(0, 2**32 - 1), st.integers(0, 70))


@settings(max_examples=150)
@given(
    op=st.sampled_from(sorted(OPS)),
    signed=st.booleans(),
    step=st.sampled_from([1, -1, 3]),
    base=words,
    near=st.one_of(words, st.integers(-40, 140)),
    block=st.sampled_from([1, 7, 32, 33, 64]),
)
@example(op="lt", signed=True, step=1, base=2**31 - 3, near=2, block=32)
@example(op="gt", signed=False, step=-1, base=3, near=0, block=32)
def test_a_guard_lets_the_same_threads_pass_wherever_their_index_wraps(
    kernels, op, signed, step, base, near, block
):
    kind = np.int32 if signed else np.uint32
    n = np.uint32((base + near) % 2**32).astype(kind)
    first = np.uint32(base).astype(kind)
    name = f"{op}_{'i' if signed else 'u'}_{abs(step)}{'m' if step < 0 else ''}"
    lanes = np.arange(block, dtype=np.int64)
    i = (int(base) + lanes * step).astype(np.uint32).astype(kind)
    compare = OPS[op]
    results = {
        "": compare(i, n),
        "_return": compare(i, n) & ~compare(n, (i - kind(1)).astype(kind)),
        "_wide": compare(i.astype(np.int64), int(n)) & (lanes != 2),
    }
    for suffix, expected in results.items():
        out = np.zeros(block, np.int32)
        kernels(GUARDS)(name + suffix, 1, block, int(first), int(n), out)
        assert out.tolist() == expected.astype(int).tolist(), suffix


def test_without_the_cut_where_an_index_wraps_the_guard_is_wrong(kernels, monkeypatch, tmp_path):
    """The control."""
    text = cpp._text

    def mutated(name: str) -> str:
        return text(name).replace("if (steps < hi - 1 - lo)", "if (0)")

    source = """__global__ void k(int base, int n, int *out) {
      int i = base + (int)threadIdx.x;
      if (i < n) out[threadIdx.x] += 1;
    }"""
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(tmp_path / "right"))
    results = []
    for folder in ("right", "wrong"):
        out = np.zeros(32, np.int32)
        monkeypatch.setenv("DRIVETRAIN_CACHE", str(tmp_path / folder))
        kernels(source + f"// {folder}")("k", 1, 32, 2**31 - 3, 5, out)
        results.append(out.tolist())
        monkeypatch.setattr(cpp, "_text", mutated)
    assert results == [[0] * 3 + [1] * 29, [0] * 32]


LOOPS = """
__global__ void strided(const float *x, float *y, float *sums, int n, int *count) {
  float sum = 0;
  int mine = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += blockDim.x * gridDim.x) {
    if (x[i] < 0) continue;
    y[i] += 2 * x[i];
    sum += x[i];
    mine++;
  }
  sums[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  count[blockIdx.x * blockDim.x + threadIdx.x] = mine;
}
__global__ void strided_64(const float *x, float *y, unsigned long long n) {
  const size_t stride = (size_t)blockDim.x * gridDim.x;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n; i += stride) y[i] = -x[i];
}
__global__ void two_at_once(const float *x, float *y, unsigned n) {
  const unsigned threads = gridDim.x * blockDim.x;
  for (unsigned i = 2 * (blockIdx.x * blockDim.x + threadIdx.x); i < n; i += 2 * threads) {
    y[i] = x[i] + 1;
    if (i + 1 < n) y[i + 1] = x[i + 1] + 2;
  }
}
__global__ void product(const float *A, const float *B, float *C, int m, int n, int k) {
  int row = blockIdx.y * blockDim.y + threadIdx.y, col = blockIdx.x * blockDim.x + threadIdx.x;
  if (row < m && col < n) {
    float sum = 0.f;
    for (int i = 0; i < k; i++) sum += A[row * k + i] * B[i * n + col];
    C[row * n + col] = sum;
  }
}
__global__ void nested(const float *in, float *out, int w, int h, int r) {
  int x = blockIdx.x * blockDim.x + threadIdx.x;
  int y = blockIdx.y * blockDim.y + threadIdx.y;
  if (x >= w || y >= h) return;
  float sum = 0, weight = 0;
  for (int dy = -r; dy <= r; dy++) {
    int yy = min(max(y + dy, 0), h - 1);
    for (int dx = -r; dx <= r; dx++) {
      if (dx * dx + dy * dy > r * r) continue;
      int xx = min(max(x + dx, 0), w - 1);
      sum += in[yy * w + xx];
      weight += 1.f;
    }
  }
  out[y * w + x] = sum / weight;
}
__global__ void collatz(const int *in, int *out, int n, int rounds) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int v = in[i], steps = 0;
  for (int k = 0; k < rounds; k++) {
    if (v == 1) break;
    v = v & 1 ? 3 * v + 1 : v / 2;
    steps = k + 1;
  }
  int last = 0;
  for (int k = 0; k < rounds; k++) { last = last * 3 + (v ^ k); if (rounds > 1000) return; }
  out[i] = steps * 100000 + (last & 0xffff);
}
__global__ void rows(const float *in, float *out, int n, int width) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    float largest = in[i * width];
    for (int k = 1; k < width; k++) largest = fmaxf(largest, in[i * width + k]);
    float sum = 0;
    for (int k = 0; k < width; k++) sum += in[i * width + k] - largest;
    out[i] = sum;
  }
}
"""


@pytest.mark.parametrize(("grid", "block"), [(1, 1), (2, 31), (3, 64), (7, 100)])
@pytest.mark.parametrize("n", [0, 1, 63, 64, 1000])
def test_loops_that_stride_over_the_grid_do_every_element_once(kernels, grid, block, n):
    rng = np.random.default_rng(n)
    x = rng.standard_normal(1001).astype(np.float32)
    y = np.zeros(1001, np.float32)
    threads = grid * block
    sums, count = np.zeros(threads, np.float32), np.zeros(threads, np.int32)
    run = kernels(LOOPS)
    run("strided", grid, block, x, y, sums, n, count)
    kept = np.where(np.arange(1001) < n, np.maximum(x, 0), 0)
    np.testing.assert_array_equal(y, 2 * kept)
    padded = np.zeros(-(-1001 // threads) * threads, np.float32)
    padded[:1001] = kept
    np.testing.assert_allclose(sums, padded.reshape(-1, threads).sum(0), rtol=1e-5, atol=1e-6)
    assert (count == (padded.reshape(-1, threads) > 0).sum(0)).all()
    y = np.zeros(1001, np.float32)
    run("strided_64", grid, block, x, y, n)
    np.testing.assert_array_equal(y, np.where(np.arange(1001) < n, -x, 0))
    y = np.zeros(1001, np.float32)
    run("two_at_once", grid, block, x, y, n)
    expected = np.where(np.arange(1001) < n, x + (1 + np.arange(1001) % 2), 0)
    np.testing.assert_array_equal(y, expected.astype(np.float32))


@pytest.mark.parametrize("shape", [(1, 1, 1), (16, 16, 16), (33, 70, 5), (5, 129, 40)])
@pytest.mark.parametrize("block", [(16, 16), (32, 4), (48, 2), (3, 5)])
def test_a_product_of_matrices_without_tiles(kernels, shape, block):
    m, n, k = shape
    rng = np.random.default_rng(1)
    a, b = rng.random((m, k)).astype(np.float32), rng.random((k, n)).astype(np.float32)
    c = np.zeros((m, n), np.float32)
    grid = (-(-n // block[0]), -(-m // block[1]))
    kernels(LOOPS)("product", grid, block, a, b, c, m, n, k)
    np.testing.assert_allclose(c, a @ b, rtol=1e-5)


def test_loops_inside_one_another_with_continue(kernels):
    w, h, r = 45, 20, 3
    a = np.random.default_rng(2).random((h, w)).astype(np.float32)
    out = np.zeros_like(a)
    kernels(LOOPS)("nested", (2, 3), (32, 8), a, out, w, h, r)
    padded = np.pad(a, r, "edge").astype(np.float64)
    offsets = [(i, j) for i in range(-r, r + 1) for j in range(-r, r + 1) if i * i + j * j <= r * r]
    expected = sum(padded[r + i : r + i + h, r + j : r + j + w] for i, j in offsets) / len(offsets)
    np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_a_loop_that_some_threads_leave_and_one_that_all_go_around(kernels):
    v = np.arange(1, 101, dtype=np.int32)
    out = np.zeros(100, np.int32)
    kernels(LOOPS)("collatz", 2, 64, v, out, 100, 40)
    for i, start in enumerate(v):
        x, steps, last = int(start), 0, 0
        for k in range(40):
            if x == 1:
                break
            x = 3 * x + 1 if x & 1 else x // 2
            steps = k + 1
        for k in range(40):
            last = last * 3 + (x ^ k)
        assert out[i] == steps * 100000 + (last & 0xFFFF)


def test_a_row_for_each_thread(kernels):
    a = np.random.default_rng(3).random((70, 33)).astype(np.float32)
    out = np.zeros(70, np.float32)
    kernels(LOOPS)("rows", 2, 64, a, out, 70, 33)
    np.testing.assert_allclose(out, (a - a.max(1, keepdims=True)).sum(1), rtol=1e-4, atol=1e-4)


ALIASED = """
__global__ void shift(float *x, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i + 1] = x[i] + 1;
}
"""


def test_pointers_without_restrict_may_overlap(kernels):
    """Threads run one after another here, and the compiler must not assume otherwise."""
    x = np.zeros(101, np.float32)
    kernels(ALIASED)("shift", 1, 100, x, 100)
    assert (x == np.arange(101)).all()

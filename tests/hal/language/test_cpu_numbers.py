"""What numbers do on the CPU where C leaves it open, and what options change."""

from __future__ import annotations

import numpy as np
import pytest

OPEN = """
__global__ void integers(const int *a, const int *b, int *out) {
  int i = threadIdx.x, n = blockDim.x;
  out[i] = a[i] / b[i];
  out[n + i] = a[i] % b[i];
  out[2 * n + i] = a[i] << (b[i] & 63);
  out[3 * n + i] = a[i] >> (b[i] & 63);
  out[4 * n + i] = a[i] + b[i];
  out[5 * n + i] = a[i] * b[i];
  out[6 * n + i] = -a[i];
  out[7 * n + i] = abs(a[i]);
  out[8 * n + i] = __popc(a[i]) + 100 * __clz(a[i]) + 10000 * __ffs(a[i]);
  out[9 * n + i] = __mulhi(a[i], b[i]);
}
__global__ void floats(const float *x, int *i32, unsigned *u32, long long *i64, signed char *c) {
  int i = threadIdx.x;
  i32[i] = (int)x[i];
  u32[i] = (unsigned)x[i];
  i64[i] = (long long)x[i];
  c[i] = (signed char)x[i];
}
__global__ void fused(const float *x, float *y) {
  int i = threadIdx.x;
  y[i] = x[i] * x[i] + x[i + 1];
}
__global__ void least(const float *x, const float *y, float *out) {
  int i = threadIdx.x;
  out[2 * i] = fminf(x[i], y[i]);
  out[2 * i + 1] = fmaxf(x[i], y[i]);
}
"""
EDGES = np.array([0, 1, -1, 2, -7, 100, 2**31 - 1, -(2**31), 31, 32, 33, 12345], np.int32)


def test_integers_wrap_and_division_by_zero_ends_nothing(kernels):
    a, b = (each.ravel().copy() for each in np.meshgrid(EDGES, EDGES))
    n = len(a)
    out = np.zeros((10, n), np.int32)
    kernels(OPEN)("integers", 1, n, a, b, out)
    wide, other, shift = a.astype(object), b.astype(object), b & 63
    quotient = [-1 if y == 0 else int(abs(x) // abs(y)) * (1 if x * y >= 0 else -1)
                for x, y in zip(wide, other, strict=True)]  # fmt: skip
    expected = [
        quotient,
        [x if y == 0 else x - q * y for x, y, q in zip(wide, other, quotient, strict=True)],
        [int(x) << int(s) if s < 32 else 0 for x, s in zip(wide, shift, strict=True)],
        [int(x) >> int(min(s, 31)) for x, s in zip(wide, shift, strict=True)],
        wide + other,
        wide * other,
        -wide,
        abs(wide),
    ]
    for row, values in enumerate(expected):
        wrapped = [(int(v) + 2**31) % 2**32 - 2**31 for v in values]
        assert out[row].tolist() == wrapped, row
    bits = [int(x) % 2**32 for x in wide]
    counts = [
        bin(v).count("1") + 100 * (32 - v.bit_length()) + 10000 * ((v & -v).bit_length())
        for v in bits
    ]
    assert out[8].tolist() == counts
    assert out[9].tolist() == [int(x) * int(y) >> 32 for x, y in zip(wide, other, strict=True)]


def test_floats_become_whole_numbers_by_saturation(kernels):
    given = [0, -0.9, 1.99, -1.99, 3e9, -3e9, 1e19, -1e19, np.inf, -np.inf, np.nan, 300, 2**31]
    x = np.array(given, np.float32)
    n = len(x)
    i32, u32, i64 = np.zeros(n, np.int32), np.zeros(n, np.uint32), np.zeros(n, np.int64)
    kernels(OPEN)("floats", 1, n, x, i32, u32, i64, np.zeros(n, np.int8))
    whole = [0 if np.isnan(v) else v for v in np.trunc(x.astype(np.float64))]
    assert i32.tolist() == [int(max(-(2**31), min(2**31 - 1, v))) for v in whole]
    assert u32.tolist() == [int(max(0, min(2**32 - 1, v))) for v in whole]
    limited = [2**63 - 1 if v >= 2**63 else -(2**63) if v < -(2**63) else int(v) for v in whole]
    limited[10] = -(2**63)  # NaN, between 8-byte registers
    assert i64.tolist() == limited


def test_a_constant_is_converted_like_a_value_that_is_only_known_later(kernels):
    text = """
    __global__ void k(const double *x, int *out) {
      out[0] = (unsigned char)(-2.5);
      out[1] = (unsigned char)x[0];
      out[2] = (short)(70000.9);
      out[3] = (short)x[1];
      out[4] = (signed char)(float)(3e9);
      out[5] = (signed char)(float)x[2];
      out[6] = (unsigned)(-2.5);
      out[7] = (unsigned)x[0];
    }"""
    out = np.zeros(8, np.int32)
    kernels(text)("k", 1, 1, np.array([-2.5, 70000.9, 3e9]), out)
    assert out.tolist() == [254, 254, 4464, 4464, -1, -1, 0, 0]


@pytest.mark.parametrize(
    ("options", "once"), [((), False), (("--fmad=true",), True), (("--fmad=false",), False)]
)
def test_a_product_and_a_sum_are_rounded_as_asked(kernels, options, once):
    x = np.array([1 + 2**-12, -1.0], np.float32)
    y = np.zeros(1, np.float32)
    kernels(OPEN, *options)("fused", 1, 1, x, y)
    exact = float(x[0]) ** 2 - 1
    assert y[0] == np.float32(exact if once else float(np.float32(float(x[0]) ** 2)) - 1)
    assert np.float32(exact) != np.float32(float(np.float32(float(x[0]) ** 2)) - 1)


def test_fast_mathematics_leaves_the_rest_of_the_process_alone(kernels):
    small = np.array([1e-40], np.float32)
    y, x = np.zeros(4, np.float32), np.arange(5, dtype=np.float32)
    kernels(OPEN, "--use_fast_math")("fused", 1, 4, x, y)
    np.testing.assert_allclose(y, x[:4] ** 2 + x[1:], rtol=1e-6)
    assert (small / np.float32(2))[0] > 0, "denormals became 0"


def test_a_number_wins_over_nan_and_minus_zero_is_less(kernels):
    x = np.array([np.nan, 1, 0.0, -0.0, np.nan, -np.inf], np.float32)
    y = np.array([2, np.nan, -0.0, 0.0, np.nan, 5], np.float32)
    out = np.zeros((6, 2), np.float32)
    kernels(OPEN)("least", 1, 6, x, y, out)
    assert out[:2].tolist() == [[2, 2], [1, 1]]
    assert np.signbit(out[2:4]).tolist() == [[True, False], [True, False]]
    assert np.isnan(out[4]).all()
    assert out[5].tolist() == [-np.inf, 5]


@pytest.mark.parametrize("level", ["-O0", "-O1", "-O2", "-O3"])
def test_every_level_of_optimisation_gives_the_same(kernels, level):
    a, b = EDGES.copy(), EDGES[::-1].copy()
    out, plain = np.zeros((10, 12), np.int32), np.zeros((10, 12), np.int32)
    kernels(OPEN)("integers", 1, 12, a, b, plain)
    kernels(OPEN, level)("integers", 1, 12, a, b, out)
    assert (out == plain).all()

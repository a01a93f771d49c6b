"""Numbers in OpenCL C: what C leaves open is the same as on the CPU, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

from drivetrain.errors import CompileError
from drivetrain.hal.language.frontend import program
from drivetrain.hal.language.opencl import translate
from drivetrain.hal.language.options import Options
from drivetrain.hal.language.source import Source

INTEGERS = """
#define OPS(NAME, T) \\
  __global__ void NAME(const T *a, const T *b, T *out, int n) { \\
    int i = blockIdx.x * blockDim.x + threadIdx.x; \\
    if (i >= n) return; \\
    T x = a[i], y = b[i], z; \\
    T *o = out + 16 * i; \\
    o[0] = x + y; o[1] = x - y; o[2] = x * y; o[3] = x / y; o[4] = x % y; o[5] = x << y; \\
    o[6] = x >> y; o[7] = -x; o[8] = ~x ^ (x & y) | y; o[9] = min(x, y); o[10] = max(x, y); \\
    z = x; z += y; z *= 3; z <<= 5; z -= x--; z >>= 3; z /= y; z %= 7; o[11] = z + ++x; \\
    o[12] = x > y ? x : y; o[13] = (T)(x < y) + (T)(x == y) * 2; \\
    o[14] = (T)(signed char)x + (T)(unsigned short)y; o[15] = (T)(float)x; \\
  }
OPS(i8, signed char) OPS(u8, unsigned char) OPS(i16, short) OPS(u16, unsigned short)
OPS(i32, int) OPS(u32, unsigned) OPS(i64, long long) OPS(u64, unsigned long long)

__global__ void floats(const float *a, const double *d, long long *out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float x = a[i]; double y = d[i];
  long long *o = out + 20 * i;
  o[0] = (int)x; o[1] = (unsigned)x; o[2] = (long long)x; o[3] = (long long)(unsigned long long)x;
  o[4] = (signed char)x; o[5] = (unsigned char)x; o[6] = (short)x; o[7] = (bool)x;
  o[8] = (int)y; o[9] = (unsigned)y; o[10] = (long long)y; o[11] = (long long)(unsigned long long)y;
  o[12] = __float_as_int((float)y); o[13] = __float2int_rn(x); o[14] = __float2int_rd(x);
  o[15] = __double_as_longlong((double)x); o[16] = __float_as_int(fminf(x, -0.0f));
  o[17] = __float_as_int(fmaxf(x, 0.0f)); o[18] = (x == x) + 2 * isinf(x) + 4 * signbit(x);
  o[19] = __float_as_int(x / 3.0f + x * 1.1f - x);
}

__global__ void words(const unsigned *a, const unsigned long long *b, long long *out, int n) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  unsigned x = a[i], y = a[(i + 1) % n]; unsigned long long w = b[i], v = b[(i + 1) % n];
  long long *o = out + 20 * i;
  o[0] = __popc(x); o[1] = __clz((int)x); o[2] = __ffs((int)x); o[3] = __brev(x);
  o[4] = __popcll(w); o[5] = __clzll((long long)w); o[6] = __ffsll((long long)w);
  o[7] = (long long)__brevll(w); o[8] = __mulhi((int)x, (int)y); o[9] = __umulhi(x, y);
  o[10] = __mul64hi((long long)w, (long long)v); o[11] = (long long)__umul64hi(w, v);
  o[12] = __byte_perm(x, y, 0x5410); o[13] = __funnelshift_l(x, y, 7);
  o[14] = __funnelshift_r(x, y, 40); o[15] = __hadd((int)x, (int)y); o[16] = __sad((int)x, 5, y);
  o[17] = abs((int)x); o[18] = __mul24((int)x, (int)y); o[19] = (long long)(x << (w & 63));
}
"""

_EDGES = [0, 1, 2, 3, 5, 7, 8, 31, 32, 33, 63, 64, 100, 127, 128, 255, 256, 1000]


def edges(kind: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    info = np.iinfo(kind)
    values = {value for edge in _EDGES for value in (edge, -edge)} | {info.min, info.max}
    values |= {info.min + 1, info.max // 3}
    kept = np.array(sorted(value for value in values if info.min <= value <= info.max), kind)
    a, b = np.meshgrid(kept, kept)
    return a.ravel().copy(), b.ravel().copy()


@pytest.mark.parametrize("name", ["i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64"])
def test_whole_numbers_agree_with_the_cpu(opencl, kernels, name: str) -> None:
    a, b = edges(np.dtype(name.replace("i", "int").replace("u", "uint")))
    got, wanted = np.zeros(16 * len(a), a.dtype), np.ones(16 * len(a), a.dtype)
    grid = -(-len(a) // 64)
    opencl(INTEGERS)(name, grid, 64, a, b, got, len(a))
    kernels(INTEGERS)(name, grid, 64, a, b, wanted, len(a))
    differs = np.nonzero(got != wanted)[0]
    assert not len(differs), [
        (int(i % 16), a[i // 16], b[i // 16], got[i], wanted[i]) for i in differs[:5]
    ]


CLAMPED = """
__global__ void clamped(const unsigned *low, const unsigned *high, const unsigned *by,
                        unsigned *left, unsigned *right) {
  int i = threadIdx.x;
  left[i] = __funnelshift_lc(low[i], high[i], by[i]);
  right[i] = __funnelshift_rc(low[i], high[i], by[i]);
}
"""


def test_clamped_funnel_shifts_end_at_the_whole_word(opencl, kernels) -> None:
    shifts = (0, 1, 13, 31, 32, 33, 64, 2**32 - 1)
    low, high = 0x89ABCDEF, 0xF1234567
    both = high << 32 | low
    count = len(shifts)
    by = np.array(shifts, np.uint32)
    for compiled in (kernels, opencl):
        left, right = np.zeros(count, np.uint32), np.zeros(count, np.uint32)
        words = np.full(count, low, np.uint32), np.full(count, high, np.uint32)
        compiled(CLAMPED)("clamped", 1, count, *words, by, left, right)
        assert left.tolist() == [(both << min(n, 32)) >> 32 & 0xFFFFFFFF for n in shifts]
        assert right.tolist() == [both >> min(n, 32) & 0xFFFFFFFF for n in shifts]


def test_whole_numbers_wrap_as_cuda_says(opencl) -> None:
    low, high = -(2**31), 2**31 - 1
    a = np.array([high, low, low, 5, 5, -5, 1], np.int32)
    b = np.array([1, 1, -1, 0, 40, 40, 31], np.int32)
    out = np.zeros(16 * 7, np.int32)
    opencl(INTEGERS)("i32", 1, 64, a, b, out, 7)
    rows = out.reshape(7, 16)
    assert rows[0, 0] == low
    assert rows[1, 1] == high
    assert rows[2, [2, 3, 4, 7]].tolist() == [low, low, 0, low]
    assert rows[3, [3, 4]].tolist() == [-1, 5]
    assert rows[4, [5, 6]].tolist() == [0, 0]
    assert rows[5, [5, 6]].tolist() == [0, -1]
    assert rows[6, 5] == low


def test_floats_become_whole_numbers_and_bits_as_on_the_cpu(opencl, kernels) -> None:
    values = [
        0.0,
        -0.0,
        0.5,
        -0.5,
        1.5,
        2.5,
        -2.5,
        3e9,
        -3e9,
        5e9,
        1e19,
        -1e19,
        2e19,
        300.7,
        -300.7,
    ]
    values += [np.inf, -np.inf, np.nan, 1e-40, 2147483520.0, 2147483648.0, -2147483648.0, 70000.5]
    values += [4294967040.0, 4294967296.0, 9.2e18, -9.3e18, 1e38, 16777217.0, -129.0, 255.9, 256.0]
    x = np.array(values, np.float32)
    y = np.array([*values[:-1], 1 + 2.0**-30])
    got, wanted = np.zeros(20 * len(x), np.int64), np.ones(20 * len(x), np.int64)
    opencl(INTEGERS)("floats", 1, 64, x, y, got, len(x))
    kernels(INTEGERS)("floats", 1, 64, x, y, wanted, len(x))
    rows, others = got.reshape(-1, 20), wanted.reshape(-1, 20)
    # Which bits a NaN has is left open.
    numbers = ~np.isnan(x)
    assert rows[numbers].tolist() == others[numbers].tolist()
    plain = [c for c in range(20) if c not in (12, 15, 19)]
    assert rows[~numbers][:, plain].tolist() == others[~numbers][:, plain].tolist()
    at = values.index(5e9)
    assert rows[at, :4].tolist() == [2**31 - 1, 2**32 - 1, 5 * 10**9, 5 * 10**9]
    assert rows[values.index(-0.5), 17] == 0
    assert rows[0, 16] == -(2**31)


def test_the_functions_on_bits_agree_with_the_cpu(opencl, kernels) -> None:
    rng = np.random.default_rng(7)
    a = rng.integers(0, 2**32, 200, np.uint32)
    b = rng.integers(0, 2**64, 200, np.uint64)
    a[:4], b[:4] = [0, 1, 2**31, 2**32 - 1], [0, 1, 2**63, 2**64 - 1]
    got, wanted = np.zeros(4000, np.int64), np.ones(4000, np.int64)
    opencl(INTEGERS)("words", 4, 64, a, b, got, 200)
    kernels(INTEGERS)("words", 4, 64, a, b, wanted, 200)
    assert got.tolist() == wanted.tolist()
    assert got[20 * 3 : 20 * 3 + 3].tolist() == [32, 0, 1]


CONTRACTED = """
__global__ void k(const float *a, float *out) {
  int i = threadIdx.x;
  float x = a[3 * i], y = a[3 * i + 1], z = a[3 * i + 2];
  out[2 * i] = x * y + z;
  out[2 * i + 1] = fmaf(x, y, z);
}
"""


def test_a_product_and_a_sum_are_rounded_twice_unless_it_was_asked_for(opencl) -> None:
    rng = np.random.default_rng(1)
    given = rng.standard_normal(192).astype(np.float32)
    given[2::3] = -(given[0::3] * given[1::3])
    out = np.zeros(128, np.float32)
    opencl(CONTRACTED)("k", 1, 64, given, out)
    assert not out[0::2].any()
    exact = given[0::3].astype(float) * given[1::3].astype(float) + given[2::3].astype(float)
    assert out[1::2].tolist() == exact.astype(np.float32).tolist()
    assert out[1::2].any()


MATHEMATICS = """
#define ONE(F) o[n++] = F(x);
__global__ void unary(const float *a, float *out, int count) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= count) return;
  float x = a[i], *o = out + 40 * i;
  int n = 0;
  ONE(sqrtf) ONE(rsqrtf) ONE(cbrtf) ONE(expf) ONE(exp2f) ONE(exp10f) ONE(expm1f) ONE(logf)
  ONE(log2f) ONE(log10f) ONE(log1pf) ONE(sinf) ONE(cosf) ONE(tanf) ONE(atanf) ONE(sinhf)
  ONE(coshf) ONE(tanhf) ONE(asinhf) ONE(erff) ONE(erfcf) ONE(floorf) ONE(ceilf) ONE(truncf)
  ONE(roundf) ONE(rintf) ONE(fabsf) ONE(tgammaf) ONE(lgammaf)
  o[n++] = powf(x, 1.5f); o[n++] = atan2f(x, 2.0f); o[n++] = fmodf(x, 0.7f);
  o[n++] = hypotf(x, 3.0f); o[n++] = ldexpf(x, 3); o[n++] = remainderf(x, 0.3f);
}
"""


def test_mathematics_is_within_the_ulps_of_the_specification(opencl) -> None:
    import math

    x = np.concatenate([np.linspace(0.05, 8.0, 150), [1e-3, 20.0]]).astype(np.float32)
    out = np.zeros(40 * len(x), np.float32)
    opencl(MATHEMATICS)("unary", 3, 64, x, out, len(x))
    wide = x.astype(np.float64)
    each = np.vectorize
    third = float(np.float32(0.3))
    # (function, ulps: OpenCL 1.2, section 7.4, or those of the functions it is made of)
    table = [
        (np.sqrt, 3), (lambda v: 1 / np.sqrt(v), 5), (np.cbrt, 2), (np.exp, 3), (np.exp2, 3),
        (lambda v: 10.0**v, 3), (np.expm1, 3), (np.log, 3), (np.log2, 3), (np.log10, 3),
        (np.log1p, 2), (np.sin, 4), (np.cos, 4), (np.tan, 5), (np.arctan, 5), (np.sinh, 4),
        (np.cosh, 4), (np.tanh, 5), (np.arcsinh, 4), (each(math.erf), 16), (each(math.erfc), 16),
        (np.floor, 0), (np.ceil, 0), (np.trunc, 0), (lambda v: np.floor(v + 0.5), 0), (np.rint, 0),
        (np.abs, 0), (each(math.gamma), 1024), (each(math.lgamma), 1024),
        (lambda v: v**1.5, 16), (lambda v: np.arctan2(v, 2.0), 6),
        (lambda v: np.fmod(v, float(np.float32(0.7))), 0), (lambda v: np.hypot(v, 3.0), 4),
        (lambda v: v * 8, 0), (lambda v: v - np.rint(v / third) * third, 1),
    ]  # fmt: skip
    rows = out.reshape(len(x), 40).T
    for number, (function, ulps) in enumerate(table):
        exact = function(wide)
        unit = np.spacing(np.maximum(np.abs(exact), 1e-3).astype(np.float32))
        far = np.max(np.abs(rows[number] - exact) / unit)
        assert far <= ulps + 0.5, (number, far)


ATOMICS = """
__global__ void words(int *i, unsigned *u, float *f, int n) {
  __shared__ int si[4];
  __shared__ float sf;
  int t = threadIdx.x + blockIdx.x * blockDim.x;
  if (threadIdx.x < 4) si[threadIdx.x] = threadIdx.x == 2 ? 1 << 30 : 0;
  if (threadIdx.x == 0) sf = 0.0f;
  __syncthreads();
  atomicAdd(&i[0], t); atomicSub(&i[1], t); atomicMin(&i[2], -t); atomicMax(&i[3], t);
  atomicOr(&i[4], 1 << (t % 31)); atomicAnd(&i[5], ~(1 << (t % 7))); atomicXor(&i[6], t);
  atomicInc(&u[0], 9u); atomicDec(&u[1], 9u); atomicMax(&u[2], 0x80000000u + t);
  atomicAdd(&f[0], 0.5f); atomicAdd(&sf, 1.0f);
  atomicAdd(&si[0], 1); atomicMax(&si[1], t); atomicMin(&si[2], t); atomicExch(&si[3], 7);
  int seen = i[7], old;
  do { old = seen; seen = atomicCAS(&i[7], old, old + 2); } while (seen != old);
  float last = atomicExch(&f[2], 3.0f);
  if (last != 3.0f) f[3] = last;
  int own = 5;
  int before = atomicAdd(&own, 3);
  if (t == 0) i[9] = 10 * own + before;
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicAdd(&f[1], sf);
    atomicAdd(&i[8], si[0] + si[3]);
    i[10 + blockIdx.x] = si[1] * 1000 + si[2];
  }
}
__global__ void wide(unsigned long long *u, long long *l, double *d) {
  __shared__ unsigned long long s;
  if (threadIdx.x == 0) s = 0;
  __syncthreads();
  unsigned long long t = threadIdx.x;
  atomicAdd(&u[0], t << 33); atomicMax(&u[1], (1ull << 63) + t); atomicOr(&u[2], 1ull << t);
  atomicMin(&l[0], -((long long)t << 40)); atomicAdd(&d[0], 0.25); atomicAdd(&s, 1ull << 40);
  __syncthreads();
  if (t == 0) { u[3] = s; atomicExch(&u[4], s + 1); }
}
"""


def test_atomics_lose_nothing(opencl) -> None:
    i, u, f = np.zeros(16, np.int32), np.zeros(3, np.uint32), np.zeros(4, np.float32)
    i[5] = -1
    u[1] = 4
    opencl(ATOMICS)("words", 4, 64, i, u, f, 256)
    t = np.arange(256)
    assert i[:9].tolist() == [
        t.sum(), -t.sum(), -255, 255, 0x7FFFFFFF, -128, int(np.bitwise_xor.reduce(t)), 512,
        256 + 4 * 7,
    ]  # fmt: skip
    assert i[9] == 85
    assert i[10:14].tolist() == [(64 * b + 63) * 1000 + 64 * b for b in range(4)]
    assert u.tolist() == [256 % 10, (4 - 256) % 10, 0x80000000 + 255]
    assert f.tolist() == [128.0, 256.0, 3.0, 0.0]


def test_atomics_of_64_bits_lose_nothing(opencl) -> None:
    u, s, d = np.zeros(5, np.uint64), np.zeros(1, np.int64), np.zeros(1)
    opencl(ATOMICS)("wide", 1, 64, u, s, d)
    assert u.tolist() == [(2016 << 33) % 2**64, 2**63 + 63, 2**64 - 1, 64 << 40, (64 << 40) + 1]
    assert s[0] == -(63 << 40)
    assert d[0] == 16.0


@pytest.mark.parametrize(
    ("body", "features", "line", "words"),
    [
        ("double x = a[0];\n a[1] = (float)x;", (), 2, "double"),
        ("a[1] = a[0];\n a[0] = a[1] * 2.0;", (), 3, "double"),
        ("a[0] = 1.0f;\n a[1] = sqrt(a[0]) + (float)pow(2, 3);", (), 3, "double"),
        ("long long *p = (long long *)a;\n atomicMin(p, 3ll);", ("fp64",), 3, "64 bits"),
        ("double *p = (double *)a;\n atomicAdd(p, 3.0);", ("fp64",), 3, "64 bits"),
        ("double *p = (double *)a;\n atomicAdd(p, 3.0);", ("int64_atomics",), 2, "double"),
    ],
)
def test_what_the_device_lacks_is_named_with_the_line(
    body: str, features: tuple[str, ...], line: int, words: str
) -> None:
    text = f"__global__ void k(float *a) {{\n {body}\n}}"
    made = program(Source.cuda(text), Options())
    with pytest.raises(CompileError, match=words) as caught:
        translate(made, features)
    assert str(caught.value).startswith(f"line {line}:")
    translate(made, ("fp64", "int64_atomics"))


def test_a_minus_stands_before_negative_constants(opencl, kernels) -> None:
    text = """
    enum { LESS = -3 };
    #define ONE_LESS -1
    __global__ void k(int *o, long long *l) {
      o[0] = -(int)4294967295u; o[1] = - -2147483647; o[2] = -(-2147483647 - 1);
      o[3] = 3 - (short)-5; o[4] = -LESS - ONE_LESS; o[5] = -(long long)-7.25 == 7;
      l[0] = -(-9223372036854775807ll - 1); l[1] = - -5ll; l[2] = -(long long)(-7.25);
    }
    """
    for compiled in (opencl, kernels):
        o, wide = np.zeros(6, np.int32), np.zeros(3, np.int64)
        compiled(text)("k", 1, 1, o, wide)
        assert o.tolist() == [1, 2**31 - 1, -(2**31), 8, 4, 1]
        assert wide.tolist() == [-(2**63), 5, 7]

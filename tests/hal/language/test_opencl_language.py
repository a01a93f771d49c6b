"""The rest of the subset in OpenCL C: structs, vector types, templates, names, lines."""

from __future__ import annotations

import numpy as np
import pytest

from drivetrain.errors import CompileError
from drivetrain.hal.language.frontend import program
from drivetrain.hal.language.opencl import translate
from drivetrain.hal.language.options import Options
from drivetrain.hal.language.source import Source

FEATURES = ("fp64", "int64_atomics")

STRUCTS = """
struct Inner { char c; short s[3]; };
struct __align__(16) Outer { bool on; Inner in[2]; double d; float3 v; unsigned char tail; };
typedef struct { Outer o; float4 f; long long id; } Whole;

__device__ Inner made(int n) { Inner i = {(char)n, {1, 2}}; i.s[2] = (short)(n * 2); return i; }
__device__ Whole changed(Whole w) {
  w.o.in[1] = made(w.o.in[0].c);
  w.o.on = !w.o.on;
  w.f.y += w.o.v.z;
  return w;
}
__global__ void by_value(Whole w, Whole *out, bool flag, unsigned char u, short s, long long l) {
  __shared__ Whole kept;
  Whole mine = changed(w);
  mine.id = flag ? l : s + u;
  kept = mine;
  Whole *p = &kept;
  p->o.d *= 2;
  out[0] = *p;
  out[1] = w;
  Whole empty = {};
  out[2] = empty;
}
"""

INNER = np.dtype([("c", "i1"), ("s", "i2", 3)], align=True)
OUTER = np.dtype(
    {
        "names": ["on", "in", "d", "v", "tail"],
        "formats": ["?", (INNER, 2), "f8", ("f4", 3), "u1"],
        "offsets": [0, 2, 24, 32, 44],
        "itemsize": 48,
    }
)
WHOLE = np.dtype(
    {"names": ["o", "f", "id"], "formats": [OUTER, ("f4", 4), "i8"], "offsets": [0, 48, 64],
     "itemsize": 80}
)  # fmt: skip


@pytest.mark.parametrize("flag", [True, False])
def test_structs_have_the_layout_of_c_and_go_by_value(opencl, flag: bool) -> None:
    given = np.zeros(1, WHOLE)
    given["o"]["on"], given["o"]["d"], given["o"]["v"], given["o"]["tail"] = True, 1.5, (1, 2, 3), 9
    given["o"]["in"]["c"], given["o"]["in"]["s"] = 5, 7
    given["f"], given["id"] = (10, 20, 30, 40), 77
    out = np.zeros(3, WHOLE)
    out["f"] = 1
    opencl(STRUCTS)("by_value", 1, 1, given.tobytes(), out.view(np.uint8), flag, 200, -300, 2**40)
    assert repr(out[1]) == repr(given[0])
    assert repr(out[2]) == repr(np.zeros(1, WHOLE)[0])
    got = out[0]
    assert got["o"]["in"][1]["c"] == 5
    assert got["o"]["in"][1]["s"].tolist() == [1, 2, 10]
    assert (got["o"]["on"], got["o"]["d"], got["o"]["tail"]) == (False, 3.0, 9)
    assert got["f"].tolist() == [10, 23, 30, 40]
    assert got["id"] == (2**40 if flag else -100)


WORDS = """
#define local 3
#define square(x) ((x) * (x))
enum Kind { global = 4, constant = 5 };
struct image2d_t { int kernel; int barrier; };
__constant__ int __constant_[2] = {7, 8};
__device__ int get_global_id(int convert_int) { return convert_int + local; }
__device__ float dot(float a, float b) { return a * b; }
__device__ int v_get(int main) { int v_main = main; return v_main; }
__global__ void kernel(int *global_, int half2_, image2d_t event_t) {
  int __local = global, uchar4_ = constant, float16 = 2, sampler_t = 1, vec_step = 0, as_int = 6;
  int printf_ = 1, NULL_ = 2, M_PI_F = 3, CLK_LOCAL_MEM_FENCE_ = 4, pipe = 5, complex = 6;
  { int float16 = 100; vec_step += float16; }
  global_[0] = get_global_id(__local) + uchar4_ + float16 + sampler_t + vec_step + as_int;
  global_[1] = (int)dot(2.0f, 3.0f) + v_get(printf_ + NULL_) + square(M_PI_F) + pipe + complex;
  global_[2] = event_t.kernel * event_t.barrier + half2_ + CLK_LOCAL_MEM_FENCE_ + __constant_[1];
}
__global__ void max(int *v_a) { int a = *v_a; *v_a = a + 1; }
__global__ void barrier(int *dt_dynamic, int dt_lanes) { *dt_dynamic = dt_lanes; }
__global__ void main(int *a) { a[0] = -1; }
"""


def test_words_of_opencl_c_are_names_like_others(opencl) -> None:
    kernels = opencl(WORDS)
    out = np.zeros(3, np.int32)
    kernels("kernel", 1, 1, out, 1000, np.array([6, 7], np.int32).tobytes())
    assert out.tolist() == [7 + 5 + 2 + 1 + 100 + 6, 6 + 3 + 9 + 11, 42 + 1000 + 4 + 8]
    for name, arguments, expected in (("max", (), 1), ("barrier", (9,), 9), ("main", (), -1)):
        one = np.zeros(1, np.int32)
        kernels(name, 1, 1, one, *arguments)
        assert one[0] == expected, name


GENERIC = """
template <typename T> __device__ T clamped(T v, T low, T high) {
  return v < low ? low : v > high ? high : v;
}
template <> __device__ int clamped<int>(int v, int low, int high) { return -v; }
template <typename T, int N = 4>
__global__ void scale(T *a, T by) {
  T part[N];
  for (int i = 0; i < N; i++) part[i] = clamped<T>(a[threadIdx.x * N + i] * by, (T)0, (T)50);
  if constexpr (N == 4) a[threadIdx.x * N] = part[N - 1];
  else a[threadIdx.x * N] = part[0] + part[1];
}
template __global__ void scale<float>(float *, float);
template __global__ void scale<int, 2>(int *, int);
template __global__ void scale<double, 2>(double *, double);
"""


def test_templates_are_kernels_of_their_own(opencl) -> None:
    kernels = opencl(GENERIC)
    a = np.arange(8, dtype=np.float32)
    kernels("scale<float,4>", 1, 2, a, 10.0)
    assert a.tolist() == [30, 1, 2, 3, 50, 5, 6, 7]
    b = np.arange(4, dtype=np.int32)
    kernels("scale<int,2>", 1, 2, b, 3)
    assert b.tolist() == [-3, 1, -15, 3]
    c = np.arange(4, dtype=np.float64)
    kernels("scale<double,2>", 1, 2, c, 3.0)
    assert c.tolist() == [3, 1, 15, 3]


VECTORS = """
__constant__ float4 offsets[2] = {{1, 2, 3, 4}, make_float4(5, 6, 7, 8)};
__constant__ float odd[3] = {-INFINITY, -1e-3f, 0x1p-3f};
__device__ float4 mixed(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y * b.y, fmaxf(a.z, b.z), a.w);
}
__global__ void vectors(const float *in, float *out, int3 n, uchar4 bytes, double2 d) {
  float4 v = reinterpret_cast<const float4 *>(in)[threadIdx.x];
  __shared__ float4 tile[8];
  tile[threadIdx.x] = mixed(v, offsets[threadIdx.x & 1]);
  __syncthreads();
  float4 w = tile[threadIdx.x ^ 1];
  w.w = (&w.x)[0] + n.z + bytes.y + (float)d.y;
  ((float4 *)out)[threadIdx.x] = w;
  float3 *threes = (float3 *)(out + 32);
  threes[threadIdx.x] = make_float3(w.x, w.y, 1.0f);
  if (threadIdx.x == 0) { out[60] = odd[0]; out[61] = odd[1]; out[62] = odd[2]; }
  dim3 g = dim3(2, 3);
  if (threadIdx.x == 0) out[63] = g.x + g.y * 10 + g.z * 100 + sizeof(float3);
}
"""


def test_vector_types_have_cudas_sizes(opencl) -> None:
    given, out = np.arange(32, dtype=np.float32), np.zeros(64, np.float32)
    opencl(VECTORS)(
        "vectors", 1, 8, given, out, np.array([1, 2, 3], np.int32).tobytes(),
        np.array([1, 200, 3, 4], np.uint8).tobytes(), np.array([1, 0.5]).tobytes(),
    )  # fmt: skip
    offsets = np.array([[1, 2, 3, 4], [5, 6, 7, 8]], np.float32)[np.arange(8) & 1]
    v = given.reshape(8, 4)
    made = np.stack(
        [v[:, 0] + offsets[:, 0], v[:, 1] * offsets[:, 1], np.maximum(v[:, 2], offsets[:, 2])], 1
    )[np.arange(8) ^ 1]
    assert out[:32].reshape(8, 4)[:, :3].tolist() == made.tolist()
    assert out[:32].reshape(8, 4)[:, 3].tolist() == (made[:, 0] + 203.5).tolist()
    assert out[32:56].reshape(8, 3)[:, :2].tolist() == made[:, :2].tolist()
    assert out[60:63].tolist() == [-np.inf, np.float32(-1e-3), 0.125]
    assert out[63] == 2 + 30 + 100 + 12


CONTROL = """
__device__ int chosen(int n) {
  switch (n % 5) {
    case 0: return 1;
    case 1: n += 10;
    case 2: { int m = n; n = m * 2; break; }
    case -1: n = 7; break;
    default: n--;
  }
  return n;
}
__device__ int effects(int *a, int n) {
  int i = 0, j = 5;
  a[i++] += n; a[i++] <<= 2; a[--j] -= j; j = i++ + ++i;
  const int &r = a[1];
  int s = (i > 3 && (j++, true)) || j++ ? r : -r;
  for (int x = 0, y = 10; x < y; x++, y--) { if (x == 2) continue; if (y == 6) break; s += x * y; }
  do s ^= 1; while (s & 1);
  char c = 'a'; c += 200; c++;
  unsigned char u = 255; u++; ++u;
  bool b = n; b |= false; b = b && !(n == 3);
  return s * 1000 + c + u + b;
}
__global__ void control(int *out, int *a) {
  int t = threadIdx.x;
  out[t] = chosen(t - 2);
  if (t == 0) out[12] = effects(a, 2);
}
"""


def test_control_flow_and_effects_do_what_c_says(opencl, kernels) -> None:
    text = CONTROL
    out, a = np.zeros(13, np.int32), np.arange(10, 16, dtype=np.int32)
    opencl(text)("control", 1, 12, out, a)
    wanted, b = np.zeros(13, np.int32), np.arange(10, 16, dtype=np.int32)
    kernels(text)("control", 1, 12, wanted, b)
    assert out.tolist() == wanted.tolist()
    assert out[:12].tolist() == [-3, 7, 1, 22, 4, 2, 3, 1, 32, 14, 7, 8]
    assert a.tolist() == b.tolist() == [12, 44, 12, 13, 10, 15]


COVERED = """
__global__ void covered(long long *out, long long sign) {
  __shared__ int tile[32];
  int t = threadIdx.x, v = t - 20, w = 5;
  tile[t] = t;
  switch (v & 3) {
    case 0: w += 1; break;
    case 1: w += 5; break;
    case 2: w += 7; break;
    case 3: v ^= 77;
  }
  switch (sign * t & 1) {
    case 0: w *= 2; break;
    case 1: v += 1000;
  }
  __syncthreads();
  w += tile[t ^ 16];
  out[t] = v * 1000 + w;
}
"""


def test_no_case_is_lost_where_the_cases_are_all_that_there_can_be(opencl, kernels) -> None:
    t = np.arange(32)
    v, w = t - 20, 5 + np.array([1, 5, 7, 0])[t & 3]
    v = np.where(t & 3 == 3, v ^ 77, v)
    v, w = np.where(t & 1, v + 1000, v), np.where(t & 1, w, 2 * w)
    for compiled in (opencl, kernels):
        out = np.zeros(32, np.int64)
        compiled(COVERED)("covered", 1, 32, out, 1)
        assert out.tolist() == (v * 1000 + w + (t ^ 16)).tolist()


PLACES = """
__global__ void places(signed char *a, unsigned *u, float *f) {
  int i = 0, j = 0, k = 0;
  a[i++]++; a[i++]--; ++a[i++]; --a[(i += 2) - 2];
  u[j++]--; --u[j++];
  f[k++]++;
  a[7] = i; u[3] = j * 10 + k;
}
"""


def test_a_place_is_calculated_once_also_where_one_is_added_to_it(opencl, kernels) -> None:
    for compiled in (opencl, kernels):
        a, u, f = (
            np.array([127, -128, 5, 6, 0, 0, 0, 0], np.int8),
            np.zeros(4, np.uint32),
            np.ones(2),
        )
        u[1], f = 7, f.astype(np.float32)
        compiled(PLACES)("places", 1, 1, a, u, f)
        assert a.tolist() == [-128, 127, 6, 5, 0, 0, 0, 5]
        assert u.tolist() == [2**32 - 1, 6, 0, 21]
        assert f.tolist() == [2, 1]


def test_each_line_of_the_text_knows_the_users() -> None:
    text = "__global__ void k(int *a)\n{\n  int b = 1;\n\n#define ADD a[0] += b\n  ADD;\n}"
    made = translate(program(Source.cuda(text), Options()), FEATURES)
    rows = made.text.split("\n")
    at = next(n for n, row in enumerate(rows, 1) if "v_a[0]" in row)
    assert made.line(at) == 6
    at = next(n for n, row in enumerate(rows, 1) if "int v_b" in row)
    assert made.line(at) == 3
    assert made.line(1) == 0
    assert len(made.lines) == len(rows) - 1


def test_an_error_names_the_file_the_line_and_the_construct(opencl) -> None:
    text = "__global__ void k(int *a) {\n  int *p = a;\n  int m;\n  p = &m;\n}"
    with pytest.raises(CompileError) as caught:
        opencl(text)
    assert str(caught.value).startswith("kernel.cu cannot be compiled for opencl: kernel.cu:4: a p")
    assert caught.value.driver == "opencl"
    assert caught.value.log.startswith("kernel.cu:4: a pointer would point to both")


def test_a_long_sum_is_not_nested_too_deeply(opencl) -> None:
    terms = " + ".join(f"a[{n % 7}] * {n}" for n in range(200))
    a = np.arange(7, dtype=np.int32)
    opencl(f"__global__ void k(int *a) {{ a[0] = {terms}; }}")("k", 1, 1, a)
    assert a[0] == sum((n % 7) * n for n in range(200))


def test_what_a_launch_must_know_is_told() -> None:
    text = """
    struct S { float3 a; char b; };
    __global__ void a(float *x, S s, bool f, unsigned long long n, half h) { }
    __global__ void __launch_bounds__(96, 2) b() {
      extern __shared__ int d[]; d[0] = 1; __syncthreads();
    }
    """
    facts = translate(program(Source.cuda(text), Options()), FEATURES).kernels
    assert [(p.type, p.nbytes, p.name) for p in facts["a"].params] == [
        ("ptr", 8, "x"), ("struct", 16, "s"), ("u8", 1, "f"), ("u64", 8, "n"), ("f16", 2, "h"),
    ]  # fmt: skip
    assert (facts["a"].dynamic_shared, facts["a"].barriers) == (False, False)
    b = facts["b"]
    assert (b.dynamic_shared, b.barriers, b.launch_bounds) == (True, True, 96)


def test_halves_are_stored_and_converted(opencl) -> None:
    text = """
    #include <cuda_fp16.h>
    __global__ void k(const __half *in, __half *out, float *wide, half one) {
      int i = threadIdx.x;
      wide[i] = __half2float(in[i]) + __half2float(one);
      out[i] = __float2half(wide[i] * 3.0f);
    }
    """
    given = np.array([1.5, -0.1, 65504, 6e-8, 0, np.inf], np.float16)
    out, wide = np.zeros(6, np.float16), np.zeros(6, np.float32)
    opencl(text)("k", 1, 6, given, out, wide, 0.25)
    assert wide.tolist() == (given.astype(np.float32) + np.float32(0.25)).tolist()
    with np.errstate(over="ignore"):
        assert out.tolist() == (wide * np.float32(3)).astype(np.float16).tolist()


GLOBAL = """
__global__ void all(unsigned *a, int *b, long long *c, unsigned long long *d, long long *e, int n) {
  unsigned u = blockIdx.x * blockDim.x + threadIdx.x;
  int i = threadIdx.x + blockDim.x * blockIdx.x;
  long long l = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  unsigned long long m = threadIdx.x + (unsigned long long)blockDim.x * blockIdx.x;
  long long other = blockIdx.x * blockDim.x + threadIdx.y + 5ll * threadIdx.x;
  a[u] = u, b[u] = i, c[u] = l, d[u] = m, e[u] = other + n;
}
"""


def test_the_threads_place_in_the_grid_is_opencls_own(opencl) -> None:
    text = translate(program(Source.cuda(GLOBAL), Options()), FEATURES).text
    assert text.count("get_global_id(0)") == 4
    count = 3 * 32
    arrays = [np.zeros(count, t) for t in ("u4", "i4", "i8", "u8", "i8")]
    opencl(GLOBAL)("all", 3, 32, *arrays, 7)
    place = np.arange(count)
    for array in arrays[:4]:
        assert (array == place).all()
    assert (arrays[4] == place // 32 * 32 + 5 * (place % 32) + 7).all()

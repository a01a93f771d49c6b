"""One CUDA C pointer may point to any memory; in OpenCL C its type says to which."""

from __future__ import annotations

import numpy as np
import pytest

from drivetrain.errors import CompileError
from drivetrain.hal.language.frontend import program
from drivetrain.hal.language.opencl import translate
from drivetrain.hal.language.options import Options
from drivetrain.hal.language.source import Source

FEATURES = ("fp64", "int64_atomics")


def translated(text: str, features: tuple[str, ...] = FEATURES) -> str:
    return translate(program(Source.cuda(text), Options()), features).text


def own(text: str) -> str:
    """What was printed for the user's functions."""
    return text[text.rindex("#endif") :]


POINTERS = """
__constant__ int table[4] = {1, 10, 100, 1000};

__device__ int sum(const int *p, int n) {
  int s = 0;
  for (int i = 0; i < n; i++) s += p[i];
  return s;
}

// Called with whatever its caller has: the combination goes on down.
__device__ int twice(const int *p, int n) { return 2 * sum(p, n); }

__device__ const int *later(const int *p, int by) { return p + by; }

__device__ int *larger(int *a, int *b) { return *a < *b ? b : a; }

__device__ void exchange(int &a, int &b) { int c = a; a = b; b = c; }

__global__ void everywhere(int *out, const int *in) {
  __shared__ int tile[4];
  extern __shared__ int dynamic[];
  int mine[4] = {1, 2, 3, 4};
  int t = threadIdx.x;
  if (t < 4) {
    tile[t] = in[t] * 3;
    dynamic[t] = in[t] * 5;
  }
  __syncthreads();
  if (t == 0) {
    out[0] = twice(in, 4);
    out[1] = twice(tile, 4);
    out[2] = twice(mine, 4);
    out[3] = twice(table, 4);
    out[4] = twice(dynamic, 4);
    out[5] = *later(later(tile, 1), 1);
    out[6] = later(in, 2)[1];
    *larger(&tile[0], &tile[3]) = -7;
    out[7] = tile[3];
    *larger(&mine[0], &mine[2]) = -8;
    out[8] = mine[2];
    exchange(tile[0], tile[1]);
    out[9] = tile[0];
    exchange(mine[0], mine[1]);
    out[10] = mine[0];
    exchange(out[0], out[1]);
  }
}
"""


def test_a_function_takes_pointers_to_every_memory(opencl) -> None:
    out, given = np.zeros(11, np.int32), np.array([1, 2, 3, 4], np.int32)
    opencl(POINTERS)("everywhere", 1, 32, out, given, shared=64)
    assert out.tolist() == [60, 20, 20, 2222, 100, 9, 4, -7, -8, 6, 2]


def test_a_function_is_cloned_once_for_each_combination_that_is_called() -> None:
    text = own(translated(POINTERS))
    for space in ("__global", "__local", "__private", "__constant"):
        assert text.count(f"({space} int *v_p, int v_n)\n") == 2, space  # sum and twice
    assert "__global int * d_later" in text
    assert "__local int * d_later" in text
    assert "__constant int * d_later" not in text


LOCAL_POINTERS = """
struct View { float *data; int n; };
struct Node { int value; Node *next; };

__device__ float first(View v) { return v.data[0]; }
__device__ View after(View v) { View w = {v.data + 1, v.n - 1}; return w; }

__device__ int chain(Node *head) {
  int s = 0;
  for (Node *at = head; at; at = at->next) s = 10 * s + at->value;
  return s;
}

__global__ void structs(float *out, float *in) {
  __shared__ float tile[2];
  tile[threadIdx.x & 1] = 5.0f + (threadIdx.x & 1);
  __syncthreads();
  View far = {in, 4}, near = {tile, 2};
  View copy;
  copy = far;
  out[0] = first(copy) + first(near);
  out[1] = first(after(after(far))) * 100 + first(after(near));
  Node c = {3, nullptr}, b = {2, &c}, a = {1, &b};
  out[2] = chain(&a);
  float *rows[2] = {in, in + 2};
  float **row = rows;
  out[3] = row[1][1] + *row[0];
  float (*pair)[2] = (float (*)[2])in;
  out[4] = pair[1][0];
}

__global__ void shared_pointers(int *out, int *in) {
  __shared__ int *heads[4];
  __shared__ int tile[4];
  __shared__ int *nears[4];
  int t = threadIdx.x;
  tile[t] = 100 + t;
  heads[t] = in + t;
  nears[t] = &tile[3 - t];
  __syncthreads();
  out[t] = *heads[(t + 1) % 4] + *nears[t];
}

__global__ void picked(int *out, int *a, int *b, int which) {
  int *p = nullptr;
  if (which == 1) p = a;
  else if (which == 2) p = b;
  const void *any = p;
  out[0] = p ? *(const int *)any : -1;
  out[1] = p == a;
  out[2] = (int)(a + 3 - a);
  int *end = a + 3;
  int n = 0;
  while (end > a) { end--; n += *end; }
  out[3] = n;
}
"""


def test_pointers_inside_structs_and_arrays_have_a_memory_too(opencl) -> None:
    kernels = opencl(LOCAL_POINTERS)
    out, given = np.zeros(5, np.float32), np.array([1, 2, 3, 4], np.float32)
    kernels("structs", 1, 2, out, given)
    assert out.tolist() == [6.0, 306.0, 123.0, 5.0, 3.0]


def test_pointers_lie_in_shared_memory(opencl) -> None:
    out, given = np.zeros(4, np.int32), np.array([1, 2, 3, 4], np.int32)
    opencl(LOCAL_POINTERS)("shared_pointers", 1, 4, out, given)
    assert out.tolist() == [105, 105, 105, 101]


@pytest.mark.parametrize(("which", "expected"), [(0, [-1, 0]), (1, [5, 1]), (2, [9, 0])])
def test_null_and_void_pointers_compare(opencl, which: int, expected: list[int]) -> None:
    out = np.zeros(4, np.int32)
    a, b = np.array([5, 6, 7], np.int32), np.array([9], np.int32)
    opencl(LOCAL_POINTERS)("picked", 1, 1, out, a, b, which)
    assert out.tolist() == [*expected, 3, 18]


SHARED_IN_FUNCTIONS = """
__device__ int counted(int by) {
  __shared__ int count;
  __shared__ int each[2][3];
  if (threadIdx.x == 0) {
    count = by;
    for (int i = 0; i < 6; i++) each[i / 3][i % 3] = by + i;
  }
  __syncthreads();
  atomicAdd(&count, 1);
  __syncthreads();
  int made = count + each[1][2];
  __syncthreads();
  return made;
}

__device__ int noted(int value) {
  __shared__ int notes[64];
  extern __shared__ short more[];
  notes[threadIdx.x] = value;
  more[threadIdx.x] = (short)(value + 1);
  int *mine = &notes[threadIdx.x];
  return *mine + more[threadIdx.x];
}

__device__ int outer(int value) { return noted(value) + noted(value * 2); }

__global__ void functions(int *out) {
  extern __shared__ short raw[];
  int a = counted(10);
  int b = counted(20);
  int c = outer((int)threadIdx.x);
  out[threadIdx.x] = a * 10000 + b * 100 + c + (raw[threadIdx.x] == 2 * threadIdx.x + 1);
}
"""


def test_shared_memory_of_functions_is_the_kernels(opencl) -> None:
    out = np.zeros(8, np.int32)
    opencl(SHARED_IN_FUNCTIONS)("functions", 1, 8, out, shared=16)
    t = np.arange(8)
    assert out.tolist() == ((18 + 15) * 10000 + (28 + 25) * 100 + 6 * t + 2 + 1).tolist()


DYNAMIC = """
struct Big { double a, b; };
__global__ void parts(double *out, int n) {
  extern __shared__ unsigned char raw[];
  Big *bigs = (Big *)raw;
  float *floats = reinterpret_cast<float *>(bigs + n);
  int t = threadIdx.x;
  bigs[t].a = t;
  bigs[t].b = 2 * t;
  floats[t] = 0.5f * t;
  __syncthreads();
  int o = n - 1 - t;
  out[t] = bigs[o].a + bigs[o].b + floats[o];
}
"""


def test_dynamic_shared_memory_is_divided_by_casts(opencl) -> None:
    out = np.zeros(32)
    opencl(DYNAMIC)("parts", 1, 32, out, 32, shared=32 * 20)
    assert out.tolist() == [3.5 * (31 - t) for t in range(32)]


@pytest.mark.parametrize(
    ("body", "line", "words"),
    [
        ("__shared__ int s[4]; int *p = s;\n p = out;", 3, "both shared memory and global memory"),
        ("int m = 1; int *p = n ? &m : out;", 2, "a thread's own variables"),
        ("int m = 0; W w; w.p = out; w.p =\n&m;", 2, "a thread's own variables"),
        ("unsigned long long a = (unsigned long long)out; *(int *)(a + 4) = 1;", 2, "number"),
        ("__shared__ int s; int m; int *p[2];\n p[0] = &s;\n p[1] = &m;", 4, "shared memory"),
        ("__shared__ int s; keep(&s, out);", 2, "both shared memory and global memory"),
        ("out[0] = down(n);", 2, "down calls itself"),
    ],
)
def test_what_needs_a_generic_pointer_is_refused_with_its_line(
    body: str, line: int, words: str
) -> None:
    text = (
        "struct W { int *p; }; __device__ int down(int n) { return n ? down(n - 1) : 0; } "
        "__device__ void keep(int *a, int *b) { int *c = a; c = b; *c = 1; } __global__ void "
        f"k(int *out, int n) {{\n {body}\n}}"
    )
    with pytest.raises(CompileError, match=words) as caught:
        translated(text)
    assert str(caught.value).startswith(f"line {line}:")


@pytest.mark.parametrize("params", ["float **rows", "V view", "V *views"])
def test_a_kernel_takes_no_pointers_inside_memory(params: str) -> None:
    text = f"struct V {{ float *p; int n; }};\n__global__ void k(\n  {params}) {{ }}"
    with pytest.raises(CompileError, match=r"line 3: the kernel's parameter .* pointers inside"):
        translated(text)


def test_a_function_that_no_kernel_calls_is_not_looked_at() -> None:
    text = (
        "__device__ double never(double x) { return x * x; } __global__ void k(int *a) { *a = 1; }"
    )
    assert "double v_x" not in translated(text, features=())

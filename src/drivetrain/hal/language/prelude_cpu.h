/* Run time of kernels on the CPU. One thread of the caller runs whole blocks; a block's threads
   run as loops, or on small stacks of their own where they must wait inside what cannot be split. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
#define DT_INLINE static inline __attribute__((always_inline))
#define DT_ALWAYS __attribute__((always_inline))
#define DT_NOINLINE __attribute__((noinline))
#define DT_EXPORT extern "C" __attribute__((visibility("default")))
static_assert(sizeof(long) == 8 && sizeof(void *) == 8, "a 64-bit system whose long has 64 bits");

#define DT_AS(NAME, TO, FROM) \
  static inline TO dt_##NAME(FROM x) { TO y; __builtin_memcpy(&y, &x, sizeof y); return y; }
DT_AS(float_as_int, int, float)
DT_AS(float_as_uint, uint, float)
DT_AS(int_as_float, float, int)
DT_AS(uint_as_float, float, uint)
DT_AS(double_as_longlong, long, double)
DT_AS(longlong_as_double, double, long)
static inline float dt_inf_f32() { return __builtin_inff(); }
static inline double dt_inf_f64() { return __builtin_inf(); }
static inline float dt_nan_f32() { return __builtin_nanf(""); }
static inline double dt_nan_f64() { return __builtin_nan(""); }

#define DT_ONE(NAME) \
  static inline float dt_##NAME##_f32(float x) { return __builtin_##NAME##f(x); } \
  static inline double dt_##NAME##_f64(double x) { return __builtin_##NAME(x); }
#define DT_TWO(NAME) \
  static inline float dt_##NAME##_f32(float x, float y) { return __builtin_##NAME##f(x, y); } \
  static inline double dt_##NAME##_f64(double x, double y) { return __builtin_##NAME(x, y); }
DT_ONE(sqrt) DT_ONE(cbrt) DT_ONE(exp) DT_ONE(exp2) DT_ONE(expm1) DT_ONE(log) DT_ONE(log2)
DT_ONE(log10) DT_ONE(log1p) DT_ONE(sin) DT_ONE(cos) DT_ONE(tan) DT_ONE(asin) DT_ONE(acos)
DT_ONE(atan) DT_ONE(sinh) DT_ONE(cosh) DT_ONE(tanh) DT_ONE(asinh) DT_ONE(acosh) DT_ONE(atanh)
DT_ONE(erf) DT_ONE(erfc) DT_ONE(tgamma) DT_ONE(lgamma) DT_ONE(floor) DT_ONE(ceil) DT_ONE(trunc)
DT_ONE(round) DT_ONE(rint) DT_ONE(nearbyint) DT_ONE(fabs)
DT_TWO(pow) DT_TWO(atan2) DT_TWO(fmod) DT_TWO(hypot) DT_TWO(copysign)
DT_TWO(fdim) DT_TWO(remainder) DT_TWO(nextafter)
/* A number wins over NaN, and -0 is below +0, as in CUDA; written so that a vector unit can do it. */
#define DT_FLOAT(T, W, F, SIGN) \
  static inline T dt_fmin_##W(T x, T y) { return x != x ? y : y < x ? y : x == y && SIGN(y) ? y : x; } \
  static inline T dt_fmax_##W(T x, T y) { return x != x ? y : y > x ? y : x == y && SIGN(x) ? y : x; } \
  static inline T dt_rsqrt_##W(T x) { return (T)1 / dt_sqrt_##W(x); } \
  static inline T dt_exp10_##W(T x) { return dt_pow_##W((T)10, x); } \
  static inline bool dt_isnan_##W(T x) { return x != x; } \
  static inline bool dt_isinf_##W(T x) { return dt_fabs_##W(x) == (T)__builtin_inf(); } \
  static inline bool dt_isfinite_##W(T x) { return dt_fabs_##W(x) < (T)__builtin_inf(); } \
  static inline bool dt_signbit_##W(T x) { return SIGN(x); } \
  static inline T dt_sinpi_##W(T x) { return dt_sin_##W((T)(3.14159265358979323846 * __builtin_fmod((double)x, 2.0))); } \
  static inline T dt_cospi_##W(T x) { return dt_cos_##W((T)(3.14159265358979323846 * __builtin_fmod((double)x, 2.0))); } \
  static inline T dt_ldexp_##W(T x, int n) { return __builtin_ldexp##F(x, n); } \
  static inline T dt_fma_##W(T x, T y, T z) { return __builtin_fma##F(x, y, z); }
static inline bool dt_sign_f32(float x) { return dt_float_as_int(x) < 0; }
static inline bool dt_sign_f64(double x) { return dt_double_as_longlong(x) < 0; }
DT_FLOAT(float, f32, f, dt_sign_f32)
DT_FLOAT(double, f64, , dt_sign_f64)
@COMMON@
static inline int dt_f64_to_i32(double x) {
  return x >= 2147483648.0 ? 2147483647 : !(x > -2147483649.0) ? -2147483647 - 1 : (int)x;
}
static inline uint dt_f64_to_u32(double x) {
  return x >= 4294967296.0 ? 4294967295u : x != x ? 2147483648u : !(x > 0.0) ? 0u : (uint)x;
}
static inline long dt_f64_to_i64(double x) {
  return x >= 9223372036854775808.0 ? 9223372036854775807L
    : !(x >= -9223372036854775808.0) ? -9223372036854775807L - 1 : (long)x;
}
static inline ulong dt_f64_to_u64(double x) {
  return x >= 18446744073709551616.0 ? 18446744073709551615UL
    : x != x ? 9223372036854775808UL : !(x > 0.0) ? 0UL : (ulong)x;
}
static inline int dt_double2int_rz(double x) { return dt_f64_to_i32(x); }
static inline int dt_double2int_rn(double x) { return dt_f64_to_i32(dt_rint_f64(x)); }
static inline float dt_double2float_rn(double x) { return (float)x; }

struct dt_half { ushort bits; };
static inline float dt_half2float(dt_half h) { return dt_half_bits_to_float(h.bits); }
static inline dt_half dt_float2half(float x) { return dt_half{dt_float_to_half_bits(x)}; }

static inline void dt_fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
#define DT_ATOMICS(T, W) \
  static inline T dt_atomicAdd_##W(T *p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); } \
  static inline T dt_atomicSub_##W(T *p, T v) { return __atomic_fetch_sub(p, v, __ATOMIC_RELAXED); } \
  static inline T dt_atomicAnd_##W(T *p, T v) { return __atomic_fetch_and(p, v, __ATOMIC_RELAXED); } \
  static inline T dt_atomicOr_##W(T *p, T v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); } \
  static inline T dt_atomicXor_##W(T *p, T v) { return __atomic_fetch_xor(p, v, __ATOMIC_RELAXED); } \
  static inline T dt_atomicExch_##W(T *p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_ACQ_REL); } \
  static inline T dt_atomicCAS_##W(T *p, T old, T v) { \
    __atomic_compare_exchange_n(p, &old, v, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE); \
    return old; \
  } \
  DT_UPDATED(T, W, Min, v < old ? v : old) \
  DT_UPDATED(T, W, Max, v > old ? v : old)
#define DT_UPDATED(T, W, NAME, VALUE) \
  static inline T dt_atomic##NAME##_##W(T *p, T v) { \
    T old = __atomic_load_n(p, __ATOMIC_RELAXED), next; \
    do { next = (VALUE); } \
    while (!__atomic_compare_exchange_n(p, &old, next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)); \
    return old; \
  }
DT_ATOMICS(int, i32)
DT_ATOMICS(uint, u32)
DT_ATOMICS(long, i64)
DT_ATOMICS(ulong, u64)
DT_UPDATED(uint, u32, Inc, old >= v ? 0u : old + 1u)
DT_UPDATED(uint, u32, Dec, old == 0u || old > v ? v : old - 1u)
#define DT_FLOAT_ATOMICS(T, U, W) \
  static inline T dt_atomicAdd_##W(T *p, T v) { \
    U *q = (U *)p, old = __atomic_load_n(q, __ATOMIC_RELAXED), next; \
    T sum; \
    do { \
      __builtin_memcpy(&sum, &old, sizeof sum); \
      sum += v; \
      __builtin_memcpy(&next, &sum, sizeof sum); \
    } while (!__atomic_compare_exchange_n(q, &old, next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)); \
    __builtin_memcpy(&sum, &old, sizeof sum); \
    return sum; \
  } \
  static inline T dt_atomicExch_##W(T *p, T v) { \
    U bits; \
    __builtin_memcpy(&bits, &v, sizeof v); \
    bits = __atomic_exchange_n((U *)p, bits, __ATOMIC_ACQ_REL); \
    __builtin_memcpy(&v, &bits, sizeof v); \
    return v; \
  }
DT_FLOAT_ATOMICS(float, uint, f32)
DT_FLOAT_ATOMICS(double, ulong, f64)

/* Which lane a shuffle reads from, its own where the other is outside of its group (PTX ISA, "shfl"). */
static inline int dt_source_idx(int lane, int from, int width) {
  return (lane & -width) | (from & (width - 1));
}
static inline int dt_source_up(int lane, int delta, int width) {
  return lane - delta < (lane & -width) ? lane : lane - delta;
}
static inline int dt_source_down(int lane, int delta, int width) {
  return lane + delta > (lane | (width - 1)) ? lane : lane + delta;
}
static inline int dt_source_xor(int lane, int mask, int width) {
  return (lane ^ mask) > (lane | (width - 1)) ? lane : lane ^ mask;
}
#define DT_READ(KIND) \
  template <class T> static inline T dt_read_shfl_##KIND(const T *all, long t, long count, int by, int width) { \
    const long other = (t & ~31L) | dt_source_##KIND((int)(t & 31), by, width); \
    return all[other < count ? other : t]; \
  }
DT_READ(idx) DT_READ(up) DT_READ(down) DT_READ(xor)
static inline uint dt_read_vote_ballot(const uchar *all, long t, long count, uint mask) {
  uint out = 0;
  const long first = t & ~31L;
  for (int lane = 0; lane < 32 && first + lane < count; lane++) out |= (uint)(all[first + lane] != 0) << lane;
  return out & mask;
}
static inline int dt_read_vote_any(const uchar *all, long t, long count, uint mask) {
  return dt_read_vote_ballot(all, t, count, mask) != 0;
}
static inline int dt_read_vote_all(const uchar *all, long t, long count, uint mask) {
  const long first = t & ~31L, here = count - first;
  const uint lanes = here >= 32 ? ~0u : (1u << here) - 1u;
  return dt_read_vote_ballot(all, t, count, mask) == (mask & lanes);
}

/* Keeps a loop from being made of vectors. */
DT_INLINE void dt_serial() { __asm__ volatile(""); }

struct dt_fibers;
struct dt_block {
  uint grid[3], block[3], index[3], threads;
  char *shared, *dynamic, *scratch;
  dt_fibers *fibers;
};
extern "C" {
typedef struct {
  uint32_t grid[3], block[3], shared, reserved;
  uint64_t first, count;
} dt_cpu_range;
}
static inline char *dt_aligned(char *p) { return (char *)(((uintptr_t)p + 127) & ~(uintptr_t)127); }

/* Runs blocks first..first+count-1. ``each`` is the scratch memory of one thread. */
template <class Run>
static int dt_run(const dt_cpu_range *range, size_t fixed, size_t each, size_t arrays, Run run) {
  dt_block b;
  memset(&b, 0, sizeof b);
  uint64_t threads = 1;
  for (int i = 0; i < 3; i++) {
    b.grid[i] = range->grid[i];
    b.block[i] = range->block[i];
    threads *= b.block[i];
    if (b.block[i] == 0 || b.block[i] > 1024 || threads > 1024) return 2;
  }
  b.threads = (uint)threads;
  const size_t bytes = fixed + range->shared + each * threads + 128 * (arrays + 4);
  char *memory = (char *)malloc(bytes);
  if (!memory) return 1;
  b.shared = dt_aligned(memory);
  b.dynamic = dt_aligned(b.shared + fixed);
  b.scratch = dt_aligned(b.dynamic + range->shared);
  int code = 0;
  const uint64_t nx = b.grid[0], ny = b.grid[1];
  for (uint64_t i = range->first; i < range->first + range->count && !code; i++) {
    b.index[0] = (uint)(i % nx);
    b.index[1] = (uint)(i / nx % ny);
    b.index[2] = (uint)(i / nx / ny);
    code = run(b);
  }
  free(memory);
  return code;
}

/* A value that is `at` in lane `lo` and grows by `step`, both modulo 2^32: what it is in lane 0 if it
   never wraps. `hi` becomes the first lane in which it would have. */
template <class T> static inline long dt_linear(T at, long step, int lo, int &hi) {
  const long most = sizeof(T) == 4 && (T)-1 > 0 ? 4294967295L : 2147483647L;
  const long least = (T)-1 > 0 ? 0L : -2147483648L;
  const long steps = step > 0 ? (most - (long)at) / step : ((long)at - least) / -step;
  if (steps < hi - 1 - lo) hi = lo + (int)steps + 1;
  return (long)at - step * lo;
}
static inline long dt_bound(long n) { return n > 1L << 40 ? 1L << 40 : n < -(1L << 40) ? -(1L << 40) : n; }
static inline long dt_bound(ulong n) { return n > 1UL << 40 ? 1L << 40 : (long)n; }
static inline long dt_bound(int n) { return n; }
static inline long dt_bound(uint n) { return (long)n; }
static inline long dt_floor(long a, long b) { return a / b - (a % b < 0); }
/* Leaves the lanes from..to-1 in which at + step * lane < n. */
static inline void dt_below(long at, long step, long n, int &from, int &to) {
  if (step > 0) {
    const long end = -dt_floor(-(n - at), step);
    if (end < to) to = end < from ? from : (int)end;
  } else {
    const long first = dt_floor(at - n, -step) + 1;
    if (first > from) from = first > to ? to : (int)first;
  }
}

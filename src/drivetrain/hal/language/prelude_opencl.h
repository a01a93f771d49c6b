/* Run time of kernels in OpenCL C 1.2. Contraction is off unless it was asked for, so that a*b+c is
   rounded twice on every device, as it is on the CPU. */
#if DT_FP64
#ifdef cl_khr_fp64
#pragma OPENCL EXTENSION cl_khr_fp64 : enable
#endif
#endif
#if !DT_FMAD
#pragma OPENCL FP_CONTRACT OFF
#endif
#if DT_INT64_ATOMICS
#pragma OPENCL EXTENSION cl_khr_int64_base_atomics : enable
#endif

/* Of functions that ask which thread they run in: PoCL 3.1 tells them another's, where it keeps the
   call; there is no recursion, so it is always possible. */
#define DT_INLINED static inline __attribute__((always_inline))

/* Of what a switch asks for: where its cases are all that this can be, as PoCL 3.1's compiler finds
   out, and a barrier comes later, the last of them is lost. There it is told nothing. */
#ifdef POCL_DEVICE_ADDRESS_BITS
#define DT_SELECTOR volatile
#else
#define DT_SELECTOR
#endif

static inline int dt_float_as_int(float x) { return as_int(x); }
static inline uint dt_float_as_uint(float x) { return as_uint(x); }
static inline float dt_int_as_float(int x) { return as_float(x); }
static inline float dt_uint_as_float(uint x) { return as_float(x); }
static inline float dt_inf_f32(void) { return as_float(0x7F800000); }
static inline float dt_nan_f32(void) { return as_float(0x7FC00000); }

#define DT_ONE(T, W, NAME, CALL) static inline T dt_##NAME##_##W(T x) { return CALL; }
#define DT_TWO(T, W, NAME, CALL) static inline T dt_##NAME##_##W(T x, T y) { return CALL; }
/* A number wins over NaN, and -0 is below +0, as in CUDA. */
#define DT_FLOAT(T, W, SIGN, INF) \
  DT_ONE(T, W, sqrt, sqrt(x)) DT_ONE(T, W, cbrt, cbrt(x)) DT_ONE(T, W, exp, exp(x)) \
  DT_ONE(T, W, exp2, exp2(x)) DT_ONE(T, W, exp10, exp10(x)) DT_ONE(T, W, expm1, expm1(x)) \
  DT_ONE(T, W, log, log(x)) DT_ONE(T, W, log2, log2(x)) DT_ONE(T, W, log10, log10(x)) \
  DT_ONE(T, W, log1p, log1p(x)) DT_ONE(T, W, sin, sin(x)) DT_ONE(T, W, cos, cos(x)) \
  DT_ONE(T, W, tan, tan(x)) DT_ONE(T, W, sinpi, sinpi(x)) DT_ONE(T, W, cospi, cospi(x)) \
  DT_ONE(T, W, asin, asin(x)) DT_ONE(T, W, acos, acos(x)) DT_ONE(T, W, atan, atan(x)) \
  DT_ONE(T, W, sinh, sinh(x)) DT_ONE(T, W, cosh, cosh(x)) DT_ONE(T, W, tanh, tanh(x)) \
  DT_ONE(T, W, asinh, asinh(x)) DT_ONE(T, W, acosh, acosh(x)) DT_ONE(T, W, atanh, atanh(x)) \
  DT_ONE(T, W, erf, erf(x)) DT_ONE(T, W, erfc, erfc(x)) DT_ONE(T, W, tgamma, tgamma(x)) \
  DT_ONE(T, W, lgamma, lgamma(x)) DT_ONE(T, W, floor, floor(x)) DT_ONE(T, W, ceil, ceil(x)) \
  DT_ONE(T, W, trunc, trunc(x)) DT_ONE(T, W, round, round(x)) DT_ONE(T, W, rint, rint(x)) \
  DT_ONE(T, W, nearbyint, rint(x)) DT_ONE(T, W, fabs, fabs(x)) DT_ONE(T, W, rsqrt, (T)1 / sqrt(x)) \
  DT_TWO(T, W, pow, pow(x, y)) DT_TWO(T, W, atan2, atan2(x, y)) DT_TWO(T, W, fmod, fmod(x, y)) \
  DT_TWO(T, W, hypot, hypot(x, y)) DT_TWO(T, W, copysign, copysign(x, y)) \
  DT_TWO(T, W, fdim, fdim(x, y)) DT_TWO(T, W, remainder, remainder(x, y)) \
  DT_TWO(T, W, nextafter, nextafter(x, y)) \
  DT_TWO(T, W, fmin, x != x ? y : y < x ? y : x == y && SIGN(y) ? y : x) \
  DT_TWO(T, W, fmax, x != x ? y : y > x ? y : x == y && SIGN(x) ? y : x) \
  static inline T dt_ldexp_##W(T x, int n) { return ldexp(x, n); } \
  static inline T dt_fma_##W(T x, T y, T z) { return fma(x, y, z); } \
  static inline int dt_isnan_##W(T x) { return x != x; } \
  static inline int dt_isinf_##W(T x) { return fabs(x) == INF; } \
  static inline int dt_isfinite_##W(T x) { return fabs(x) < INF; } \
  static inline int dt_signbit_##W(T x) { return SIGN(x); }
#define DT_SIGN_F32(X) (as_int(X) < 0)
DT_FLOAT(float, f32, DT_SIGN_F32, as_float(0x7F800000))
#if DT_FP64
static inline long dt_double_as_longlong(double x) { return as_long(x); }
static inline double dt_longlong_as_double(long x) { return as_double(x); }
static inline double dt_inf_f64(void) { return as_double(0x7FF0000000000000L); }
static inline double dt_nan_f64(void) { return as_double(0x7FF8000000000000L); }
#define DT_SIGN_F64(X) (as_long(X) < 0)
DT_FLOAT(double, f64, DT_SIGN_F64, as_double(0x7FF0000000000000L))
#endif
@COMMON@
#if DT_FP64
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
static inline int dt_double2int_rn(double x) { return dt_f64_to_i32(rint(x)); }
static inline float dt_double2float_rn(double x) { return (float)x; }
#endif

struct dt_half { ushort bits; };
typedef struct dt_half dt_half;
static inline float dt_half2float(dt_half h) { return dt_half_bits_to_float(h.bits); }
static inline dt_half dt_float2half(float x) {
  dt_half h;
  h.bits = dt_float_to_half_bits(x);
  return h;
}

static inline void dt_fence(void) { mem_fence(CLK_LOCAL_MEM_FENCE | CLK_GLOBAL_MEM_FENCE); }
DT_INLINED uint dt_thread(void) {
  return (uint)(get_local_id(0) + get_local_size(0) * (get_local_id(1) + get_local_size(1) * get_local_id(2)));
}
DT_INLINED uint dt_threads(void) {
  return (uint)(get_local_size(0) * get_local_size(1) * get_local_size(2));
}

/* Which thread of the block a shuffle reads from; itself where the lane is outside of its group, or
   of the block (PTX ISA, "shfl"). Lanes put 0 or 1 for a vote, and 2 when they take no part. */
DT_INLINED uint dt_source(int other) {
  const uint thread = (dt_thread() & ~31u) | (uint)other;
  return thread < dt_threads() ? thread : dt_thread();
}
DT_INLINED uint dt_source_idx(int from, int width) {
  const int lane = (int)(dt_thread() & 31u);
  return dt_source((lane & -width) | (from & (width - 1)));
}
DT_INLINED uint dt_source_up(int delta, int width) {
  const int lane = (int)(dt_thread() & 31u);
  return dt_source(lane - delta < (lane & -width) ? lane : lane - delta);
}
DT_INLINED uint dt_source_down(int delta, int width) {
  const int lane = (int)(dt_thread() & 31u);
  return dt_source(lane + delta > (lane | (width - 1)) ? lane : lane + delta);
}
DT_INLINED uint dt_source_xor(int mask, int width) {
  const int lane = (int)(dt_thread() & 31u);
  return dt_source((lane ^ mask) > (lane | (width - 1)) ? lane : lane ^ mask);
}
#define DT_VOTES(T, BYTES) \
  DT_INLINED uint dt_votes_##BYTES(__local const T *all, uint what) { \
    const uint first = dt_thread() & ~31u, here = dt_threads() - first; \
    uint out = 0; \
    for (uint lane = 0; lane < 32 && lane < here; lane++) out |= (uint)(all[first + lane] == what) << lane; \
    return out; \
  } \
  DT_INLINED uint dt_vote_ballot_##BYTES(__local const T *all, uint mask) { return dt_votes_##BYTES(all, 1) & mask; } \
  DT_INLINED int dt_vote_any_##BYTES(__local const T *all, uint mask) { return (dt_votes_##BYTES(all, 1) & mask) != 0; } \
  DT_INLINED int dt_vote_all_##BYTES(__local const T *all, uint mask) { return (dt_votes_##BYTES(all, 0) & mask) == 0; }
DT_VOTES(uint, 4)
DT_VOTES(ulong, 8)

/* Atomics, for each memory that others see; a thread's own memory needs none. */
#define DT_LOOP(S, SPACE, T, W, NAME, U, CAS, READ, BITS, VALUE) \
  static inline T dt_atomic##NAME##_##W##_##S(volatile SPACE T *p, T v) { \
    volatile SPACE U *q = (volatile SPACE U *)p; \
    U seen = *q; \
    for (;;) { \
      const T old = READ(seen); \
      const T next = VALUE; \
      const U found = CAS(q, seen, BITS(next)); \
      if (found == seen) return old; \
      seen = found; \
    } \
  }
#define DT_PLAIN(S, SPACE, T, W, NAME, CALL) \
  static inline T dt_atomic##NAME##_##W##_##S(volatile SPACE T *p, T v) { return CALL(p, v); }
#define DT_WORDS(S, SPACE, T, W) \
  DT_PLAIN(S, SPACE, T, W, Add, atomic_add) DT_PLAIN(S, SPACE, T, W, Sub, atomic_sub) \
  DT_PLAIN(S, SPACE, T, W, Min, atomic_min) DT_PLAIN(S, SPACE, T, W, Max, atomic_max) \
  DT_PLAIN(S, SPACE, T, W, And, atomic_and) DT_PLAIN(S, SPACE, T, W, Or, atomic_or) \
  DT_PLAIN(S, SPACE, T, W, Xor, atomic_xor) DT_PLAIN(S, SPACE, T, W, Exch, atomic_xchg) \
  static inline T dt_atomicCAS_##W##_##S(volatile SPACE T *p, T old, T v) { \
    return atomic_cmpxchg(p, old, v); \
  }
#define DT_INC(OLD, V) (OLD >= V ? 0u : OLD + 1u)
#define DT_DEC(OLD, V) (OLD == 0u || OLD > V ? V : OLD - 1u)
#define DT_SELF(X) (X)
#define DT_SHARED_ATOMICS(S, SPACE) \
  DT_WORDS(S, SPACE, int, i32) DT_WORDS(S, SPACE, uint, u32) \
  DT_PLAIN(S, SPACE, float, f32, Exch, atomic_xchg) \
  DT_LOOP(S, SPACE, uint, u32, Inc, uint, atomic_cmpxchg, DT_SELF, DT_SELF, DT_INC(old, v)) \
  DT_LOOP(S, SPACE, uint, u32, Dec, uint, atomic_cmpxchg, DT_SELF, DT_SELF, DT_DEC(old, v)) \
  DT_LOOP(S, SPACE, float, f32, Add, uint, atomic_cmpxchg, as_float, as_uint, old + v)
#define DT_LONG_ATOMICS(S, SPACE, T, W) \
  DT_PLAIN(S, SPACE, T, W, Add, atom_add) DT_PLAIN(S, SPACE, T, W, Exch, atom_xchg) \
  DT_LOOP(S, SPACE, T, W, Min, T, atom_cmpxchg, DT_SELF, DT_SELF, v < old ? v : old) \
  DT_LOOP(S, SPACE, T, W, Max, T, atom_cmpxchg, DT_SELF, DT_SELF, v > old ? v : old) \
  DT_LOOP(S, SPACE, T, W, And, T, atom_cmpxchg, DT_SELF, DT_SELF, old & v) \
  DT_LOOP(S, SPACE, T, W, Or, T, atom_cmpxchg, DT_SELF, DT_SELF, old | v) \
  DT_LOOP(S, SPACE, T, W, Xor, T, atom_cmpxchg, DT_SELF, DT_SELF, old ^ v) \
  static inline T dt_atomicCAS_##W##_##S(volatile SPACE T *p, T old, T v) { \
    return atom_cmpxchg(p, old, v); \
  }
#define DT_OWN(T, W, NAME, VALUE) \
  static inline T dt_atomic##NAME##_##W##_private(__private T *p, T v) { \
    const T old = *p; \
    *p = VALUE; \
    return old; \
  }
#define DT_OWN_WORDS(T, W) \
  DT_OWN(T, W, Add, old + v) DT_OWN(T, W, Sub, old - v) DT_OWN(T, W, And, old & v) \
  DT_OWN(T, W, Or, old | v) DT_OWN(T, W, Xor, old ^ v) DT_OWN(T, W, Exch, v) \
  DT_OWN(T, W, Min, v < old ? v : old) DT_OWN(T, W, Max, v > old ? v : old) \
  static inline T dt_atomicCAS_##W##_private(__private T *p, T seen, T v) { \
    const T old = *p; \
    if (old == seen) *p = v; \
    return old; \
  }
#if DT_ATOMICS
DT_SHARED_ATOMICS(global, __global)
DT_SHARED_ATOMICS(local, __local)
DT_OWN(int, i32, Add, (int)((uint)old + (uint)v)) DT_OWN(int, i32, Sub, (int)((uint)old - (uint)v))
DT_OWN(int, i32, And, old & v) DT_OWN(int, i32, Or, old | v) DT_OWN(int, i32, Xor, old ^ v)
DT_OWN(int, i32, Exch, v) DT_OWN(int, i32, Min, v < old ? v : old)
DT_OWN(int, i32, Max, v > old ? v : old)
static inline int dt_atomicCAS_i32_private(__private int *p, int seen, int v) {
  const int old = *p;
  if (old == seen) *p = v;
  return old;
}
DT_OWN_WORDS(uint, u32)
DT_OWN(uint, u32, Inc, DT_INC(old, v))
DT_OWN(uint, u32, Dec, DT_DEC(old, v))
DT_OWN(float, f32, Add, old + v)
DT_OWN(float, f32, Exch, v)
#endif
#if DT_INT64_ATOMICS
DT_LONG_ATOMICS(global, __global, ulong, u64)
DT_LONG_ATOMICS(local, __local, ulong, u64)
DT_LONG_ATOMICS(global, __global, long, i64)
DT_LONG_ATOMICS(local, __local, long, i64)
DT_OWN_WORDS(ulong, u64)
DT_OWN(long, i64, Min, v < old ? v : old)
DT_OWN(long, i64, Max, v > old ? v : old)
#if DT_FP64
DT_LOOP(global, __global, double, f64, Add, ulong, atom_cmpxchg, as_double, as_ulong, old + v)
DT_LOOP(local, __local, double, f64, Add, ulong, atom_cmpxchg, as_double, as_ulong, old + v)
DT_OWN(double, f64, Add, old + v)
#endif
#endif

/* What both targets have in common: the operations that C leaves open, as CUDA does them.
   Integer arithmetic wraps. Division by zero gives all ones and the remainder the dividend; it is
   undefined in CUDA, and must not end the process here. Shifts by the width or more give 0, or the
   sign for signed numbers to the right. Float to integer rounds to zero and saturates; NaN gives
   0, except between 8-byte types (PTX ISA, "cvt"). */
#define DT_INT_OPS(T, U, W, BITS) \
  static inline T dt_shl_##W(T a, uint n) { return n >= BITS ? (T)0 : (T)((U)a << n); } \
  static inline T dt_shr_##W(T a, uint n) { return (T)(a >> (n >= BITS ? BITS - 1 : n)); }
#define DT_UINT_OPS(T, W, BITS) \
  static inline T dt_shl_##W(T a, uint n) { return n >= BITS ? (T)0 : (T)(a << n); } \
  static inline T dt_shr_##W(T a, uint n) { return n >= BITS ? (T)0 : (T)(a >> n); } \
  static inline T dt_div_##W(T a, T b) { return b == 0 ? ~(T)0 : (T)(a / b); } \
  static inline T dt_mod_##W(T a, T b) { return b == 0 ? a : (T)(a % b); }
DT_INT_OPS(int, uint, i32, 32)
DT_INT_OPS(long, ulong, i64, 64)
DT_UINT_OPS(uint, u32, 32)
DT_UINT_OPS(ulong, u64, 64)
static inline uint dt_count(ulong n) { return n > 255 ? 255u : (uint)n; }
static inline int dt_div_i32(int a, int b) {
  if (b == 0) return -1;
  if (b == -1) return (int)(0u - (uint)a);
  return a / b;
}
static inline int dt_mod_i32(int a, int b) { return b == 0 ? a : b == -1 ? 0 : a % b; }
static inline long dt_div_i64(long a, long b) {
  if (b == 0) return -1;
  if (b == -1) return (long)(0ul - (ulong)a);
  return a / b;
}
static inline long dt_mod_i64(long a, long b) { return b == 0 ? a : b == -1 ? 0 : a % b; }

static inline int dt_f32_to_i32(float x) {
  return x >= 2147483648.0f ? 2147483647 : x < -2147483648.0f ? -2147483647 - 1 : x != x ? 0 : (int)x;
}
static inline uint dt_f32_to_u32(float x) {
  return x >= 4294967296.0f ? 4294967295u : !(x > 0.0f) ? 0u : (uint)x;
}
static inline long dt_f32_to_i64(float x) {
  return x >= 9223372036854775808.0f ? 9223372036854775807L
    : !(x >= -9223372036854775808.0f) ? -9223372036854775807L - 1 : (long)x;
}
static inline ulong dt_f32_to_u64(float x) {
  return x >= 18446744073709551616.0f ? 18446744073709551615UL
    : x != x ? 9223372036854775808UL : !(x > 0.0f) ? 0UL : (ulong)x;
}

static inline int dt_min_i32(int a, int b) { return b < a ? b : a; }
static inline int dt_max_i32(int a, int b) { return a < b ? b : a; }
static inline uint dt_min_u32(uint a, uint b) { return b < a ? b : a; }
static inline uint dt_max_u32(uint a, uint b) { return a < b ? b : a; }
static inline long dt_min_i64(long a, long b) { return b < a ? b : a; }
static inline long dt_max_i64(long a, long b) { return a < b ? b : a; }
static inline ulong dt_min_u64(ulong a, ulong b) { return b < a ? b : a; }
static inline ulong dt_max_u64(ulong a, ulong b) { return a < b ? b : a; }
static inline int dt_abs_i32(int a) { return a < 0 ? (int)(0u - (uint)a) : a; }
static inline long dt_abs_i64(long a) { return a < 0 ? (long)(0ul - (ulong)a) : a; }

static inline int dt_popcll(ulong x) {
  x = x - ((x >> 1) & 0x5555555555555555UL);
  x = (x & 0x3333333333333333UL) + ((x >> 2) & 0x3333333333333333UL);
  x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0FUL;
  return (int)((x * 0x0101010101010101UL) >> 56);
}
static inline int dt_popc(uint x) {
  x = x - ((x >> 1) & 0x55555555u);
  x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
  x = (x + (x >> 4)) & 0x0F0F0F0Fu;
  return (int)((x * 0x01010101u) >> 24);
}
static inline int dt_clz(int v) {
  uint x = (uint)v;
  x |= x >> 1; x |= x >> 2; x |= x >> 4; x |= x >> 8; x |= x >> 16;
  return 32 - dt_popc(x);
}
static inline int dt_clzll(long v) {
  ulong x = (ulong)v;
  x |= x >> 1; x |= x >> 2; x |= x >> 4; x |= x >> 8; x |= x >> 16; x |= x >> 32;
  return 64 - dt_popcll(x);
}
static inline int dt_ffs(int v) {
  uint x = (uint)v;
  return x == 0 ? 0 : dt_popc((x & (0u - x)) - 1u) + 1;
}
static inline int dt_ffsll(long v) {
  ulong x = (ulong)v;
  return x == 0 ? 0 : dt_popcll((x & (0ul - x)) - 1ul) + 1;
}
static inline uint dt_brev(uint x) {
  x = ((x >> 1) & 0x55555555u) | ((x & 0x55555555u) << 1);
  x = ((x >> 2) & 0x33333333u) | ((x & 0x33333333u) << 2);
  x = ((x >> 4) & 0x0F0F0F0Fu) | ((x & 0x0F0F0F0Fu) << 4);
  x = ((x >> 8) & 0x00FF00FFu) | ((x & 0x00FF00FFu) << 8);
  return (x >> 16) | (x << 16);
}
static inline ulong dt_brevll(ulong x) {
  return ((ulong)dt_brev((uint)x) << 32) | (ulong)dt_brev((uint)(x >> 32));
}
static inline int dt_mulhi(int a, int b) { return (int)(((long)a * (long)b) >> 32); }
static inline uint dt_umulhi(uint a, uint b) { return (uint)(((ulong)a * (ulong)b) >> 32); }
static inline ulong dt_umul64hi(ulong a, ulong b) {
  const ulong al = (uint)a, ah = a >> 32, bl = (uint)b, bh = b >> 32;
  const ulong low = al * bl, mid = ah * bl + (low >> 32), other = al * bh + (uint)mid;
  return ah * bh + (mid >> 32) + (other >> 32);
}
static inline long dt_mul64hi(long a, long b) {
  return (long)(dt_umul64hi((ulong)a, (ulong)b) - (a < 0 ? (ulong)b : 0ul) - (b < 0 ? (ulong)a : 0ul));
}
static inline int dt_mul24(int a, int b) {
  return (int)((uint)((int)((uint)a << 8) >> 8) * (uint)((int)((uint)b << 8) >> 8));
}
static inline uint dt_umul24(uint a, uint b) { return (a & 0xFFFFFFu) * (b & 0xFFFFFFu); }
static inline uint dt_sad(int a, int b, uint c) {
  return c + (a > b ? (uint)a - (uint)b : (uint)b - (uint)a);
}
static inline uint dt_usad(uint a, uint b, uint c) { return c + (a > b ? a - b : b - a); }
static inline uint dt_byte_perm(uint x, uint y, uint s) {
  const ulong all = ((ulong)y << 32) | x;
  uint out = 0;
  for (uint i = 0; i < 4; i++) out |= (uint)((all >> (((s >> (4 * i)) & 7u) * 8)) & 255u) << (8 * i);
  return out;
}
static inline uint dt_funnelshift_l(uint low, uint high, uint n) {
  return (uint)(((((ulong)high << 32) | low) << (n & 31u)) >> 32);
}
static inline uint dt_funnelshift_r(uint low, uint high, uint n) {
  return (uint)((((ulong)high << 32) | low) >> (n & 31u));
}
static inline uint dt_funnelshift_lc(uint low, uint high, uint n) {
  return (uint)(((((ulong)high << 32) | low) << (n < 32u ? n : 32u)) >> 32);
}
static inline uint dt_funnelshift_rc(uint low, uint high, uint n) {
  return (uint)((((ulong)high << 32) | low) >> (n < 32u ? n : 32u));
}
static inline int dt_hadd(int a, int b) { return (int)(((long)a + (long)b) >> 1); }
static inline int dt_rhadd(int a, int b) { return (int)(((long)a + (long)b + 1) >> 1); }
static inline uint dt_uhadd(uint a, uint b) { return (uint)(((ulong)a + b) >> 1); }
static inline uint dt_urhadd(uint a, uint b) { return (uint)(((ulong)a + b + 1) >> 1); }

static inline float dt_fadd_f32(float a, float b) { return a + b; }
static inline float dt_fsub_f32(float a, float b) { return a - b; }
static inline float dt_fmul_f32(float a, float b) { return a * b; }
static inline float dt_fdiv_f32(float a, float b) { return a / b; }
static inline float dt_frcp_f32(float a) { return 1.0f / a; }
static inline float dt_saturate_f32(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
static inline int dt_float2int_rz(float x) { return dt_f32_to_i32(x); }
static inline uint dt_float2uint_rz(float x) { return dt_f32_to_u32(x); }
static inline long dt_float2ll_rz(float x) { return dt_f32_to_i64(x); }
static inline int dt_float2int_rn(float x) { return dt_f32_to_i32(dt_rint_f32(x)); }
static inline int dt_float2int_rd(float x) { return dt_f32_to_i32(dt_floor_f32(x)); }
static inline int dt_float2int_ru(float x) { return dt_f32_to_i32(dt_ceil_f32(x)); }
static inline uint dt_float2uint_rn(float x) { return dt_f32_to_u32(dt_rint_f32(x)); }
static inline long dt_float2ll_rn(float x) { return dt_f32_to_i64(dt_rint_f32(x)); }
static inline float dt_int2float_rn(int x) { return (float)x; }
static inline float dt_uint2float_rn(uint x) { return (float)x; }
static inline float dt_ll2float_rn(long x) { return (float)x; }

/* IEEE binary16 as bits; to half rounds to the nearest, ties to even. */
static inline float dt_half_bits_to_float(ushort h) {
  const uint sign = ((uint)h & 0x8000u) << 16, magnitude = (uint)h & 0x7FFFu;
  if (magnitude >= 0x7C00u) return dt_uint_as_float(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
  if (magnitude >= 0x400u) return dt_uint_as_float(sign | ((magnitude + 0x1C000u) << 13));
  const float small = (float)magnitude * 5.9604644775390625e-8f;
  return sign ? -small : small;
}
static inline ushort dt_float_to_half_bits(float x) {
  const uint bits = dt_float_as_uint(x), sign = (bits >> 16) & 0x8000u, m = bits & 0x7FFFFFFFu;
  if (m > 0x7F800000u) return (ushort)0x7FFFu;
  if (m >= 0x477FF000u) return (ushort)(sign | 0x7C00u);
  if (m < 0x33000001u) return (ushort)sign;
  uint value = m, shift = 13;
  if (m < 0x38800000u) {
    value = (m & 0x7FFFFFu) | 0x800000u;
    shift = 126u - (m >> 23);
  } else {
    value = m - 0x38000000u;
  }
  const uint kept = value >> shift, rest = value & ((1u << shift) - 1u), half_way = 1u << (shift - 1u);
  return (ushort)(sign | (kept + (rest > half_way || (rest == half_way && (kept & 1u)) ? 1u : 0u)));
}

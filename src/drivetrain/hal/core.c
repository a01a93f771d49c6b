#include "drivetrain_hal.h"

#include <string.h>

#if defined(__x86_64__) && defined(__SSE2__)
#include <emmintrin.h>
#define STREAMING 1
#else
#define STREAMING 0
#endif

/* From here on a copy writes past the cache: its bytes are read again only after many more. */
#define STREAM_FROM ((size_t)256 << 10)

/* The multiplier G is odd, so (i + 1) * G is even exactly when i is odd, and a_i is
 * (i + 1) * G + (i odd). Hence
 *
 *     sum w_i a_i = G * sum (i + 1) w_i  +  sum over odd i of w_i     (mod 2^64)
 *
 * and the first sum needs no multiplication per word: keep, per lane, a = sum of the words so far
 * and b = sum of the a's so far (Fletcher's trick). After n rounds, b = sum over k of (n - k) w_k,
 * so sum of k * w_k = n * a - b. Words 2l and 2l + 1 of a round are the halves of 64-bit lane l.
 */
#define G UINT64_C(0x9E3779B97F4A7C15)

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
#define LITTLE32(w) __builtin_bswap32(w)
#define VECTOR 0
#elif defined(__GNUC__)
#define LITTLE32(w) (w)
#define VECTOR 1
#else
#define LITTLE32(w) (w)
#define VECTOR 0
#endif

/* One source, several machine codes: the loader picks by CPU. Needs ifunc, hence glibc, and happens
 * before gcc's thread sanitizer is ready. */
#if VECTOR && defined(__x86_64__) && defined(__gnu_linux__) && defined(__GLIBC__) &&                \
    !defined(__SANITIZE_THREAD__)
#define FOR_EACH_CPU __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define FOR_EACH_CPU
#endif

typedef struct {
    uint64_t weighted; /* sum of (i + 1) * w_i */
    uint64_t odd;      /* sum of w_i over odd i */
} sums;

static inline void add_word(sums *s, uint32_t word, uint64_t index) {
    s->weighted += (index + 1) * word;
    s->odd += (index & 1) ? word : 0;
}

/* Words and the last partial word, one by one. */
static inline uint64_t finish(sums s, unsigned char *dst, const unsigned char *src, size_t nbytes,
                              uint64_t index) {
    while (nbytes) {
        size_t n = nbytes < 4 ? nbytes : 4;
        uint32_t word = 0;
        memcpy(&word, src, n);
        if (dst) {
            memcpy(dst, &word, n);
            dst += n;
        }
        add_word(&s, LITTLE32(word), index++);
        src += n;
        nbytes -= n;
    }
    return G * s.weighted + s.odd;
}

#if VECTOR

typedef uint64_t lanes __attribute__((vector_size(64)));
enum { ROUND_BYTES = 64, ROUND_WORDS = 16, LANES = 8, AHEAD_BYTES = 2048 };

static inline __attribute__((always_inline)) uint64_t
pass(unsigned char *dst, const unsigned char *src, size_t nbytes, uint64_t first) {
    uint64_t rounds = nbytes / ROUND_BYTES;
    lanes a_low = {0}, b_low = {0}, a_high = {0}, b_high = {0};
    for (uint64_t k = 0; k < rounds; k++) {
        lanes x;
        memcpy(&x, src, sizeof x);
        if (dst) {
            memcpy(dst, &x, sizeof x);
            dst += ROUND_BYTES;
        }
        src += ROUND_BYTES;
        __builtin_prefetch(src + AHEAD_BYTES); /* the hardware's own stops at each page's end */
        a_low += x & UINT64_C(0xFFFFFFFF);
        b_low += a_low;
        a_high += x >> 32;
        b_high += a_high;
    }
    sums s = {0, 0};
    for (int l = 0; l < LANES; l++) {
        uint64_t at = first + 1 + 2 * (uint64_t)l;
        s.weighted += at * a_low[l] + ROUND_WORDS * (rounds * a_low[l] - b_low[l]);
        s.weighted += (at + 1) * a_high[l] + ROUND_WORDS * (rounds * a_high[l] - b_high[l]);
        s.odd += (first & 1) ? a_low[l] : a_high[l];
    }
    return finish(s, dst, src, nbytes - (size_t)rounds * ROUND_BYTES, first + rounds * ROUND_WORDS);
}

#else

static inline uint64_t pass(unsigned char *dst, const unsigned char *src, size_t nbytes,
                            uint64_t first) {
    sums s = {0, 0};
    return finish(s, dst, src, nbytes, first);
}

#endif

FOR_EACH_CPU
uint64_t dt_checksum(const void *src, size_t nbytes, uint64_t first_word) {
    return pass(NULL, src, nbytes, first_word);
}

FOR_EACH_CPU
uint64_t dt_copy_checksum(void *dst, const void *src, size_t nbytes, uint64_t first_word) {
    return pass(dst, src, nbytes, first_word);
}

void dt_copy(void *dst, const void *src, size_t nbytes) {
#if STREAMING
    uintptr_t start = (uintptr_t)dst, source = (uintptr_t)src;
    int apart = start + nbytes <= source || source + nbytes <= start;
    if (nbytes >= STREAM_FROM && start % 16 == 0 && apart) {
        __m128i *to = dst;
        const __m128i *from = src;
        size_t blocks = nbytes / 64;
        for (size_t i = 0; i < blocks; i++, to += 4, from += 4) {
            __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
            __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
            _mm_stream_si128(to, a);
            _mm_stream_si128(to + 1, b);
            _mm_stream_si128(to + 2, c);
            _mm_stream_si128(to + 3, d);
        }
        _mm_sfence();
        memcpy(to, from, nbytes % 64);
        return;
    }
#endif
    if (nbytes) memmove(dst, src, nbytes);
}

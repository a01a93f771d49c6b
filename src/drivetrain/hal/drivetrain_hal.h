/* Drivetrain's hot calls. Plain C11 without Python, so that any language can stand on it.
 *
 * Chunk hash. A state image is cut in chunks of DT_CHUNK_BYTES. With w_i the little-endian 32-bit
 * words of a chunk (i = index within the chunk, bytes missing from the last word count as zero):
 *
 *     hash = sum of w_i * a_i mod 2^64,   a_i = (((i + 1) * 0x9E3779B97F4A7C15) mod 2^64) | 1
 *
 * The hash is additive: hash a piece alone, giving the index of its first word, and add the parts
 * mod 2^64. A piece starts at a multiple of 4 bytes of its chunk and lies in one chunk; its address
 * may have any alignment. All functions are safe to call from any thread and never allocate.
 */
#ifndef DRIVETRAIN_HAL_H
#define DRIVETRAIN_HAL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DT_CHUNK_BYTES ((size_t)4 << 20)
#define DT_CHUNK_WORDS ((uint64_t)1 << 20)

/* The hash of nbytes at src, whose first word has index first_word in its chunk. */
uint64_t dt_checksum(const void *src, size_t nbytes, uint64_t first_word);

/* Copies nbytes; the two ranges may overlap. */
void dt_copy(void *dst, const void *src, size_t nbytes);

/* Copies nbytes and returns what dt_checksum says of the bytes that were written, in one pass:
 * each byte is read once. The ranges must not overlap. */
uint64_t dt_copy_checksum(void *dst, const void *src, size_t nbytes, uint64_t first_word);

#ifdef __cplusplus
}
#endif

#endif

/* Threads that copy and hash memory together. Plain C11 without Python.
 *
 * A crew has a number of threads that sleep until there is a job. A job is a list of pieces; the
 * threads cut them into parts of DT_PART_BYTES and take the parts one after the other, so that
 * they finish at the same time. Jobs are served in the order in which they were begun; several may
 * be under way at once.
 */
#ifndef DRIVETRAIN_CREW_H
#define DRIVETRAIN_CREW_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define DT_PART_BYTES ((size_t)256 << 10)
#define DT_NO_HASH UINT64_MAX

typedef struct {
    void *dst;           /* NULL: nothing is copied, only hashed */
    const void *src;
    uint64_t nbytes;
    uint64_t first_word; /* as for dt_checksum; DT_NO_HASH: only copied, past the cache */
    uint64_t hash;       /* the result, complete when the job is done */
} dt_piece;

typedef struct dt_crew dt_crew;
typedef struct dt_job dt_job;

/* NULL when no thread can be started. */
dt_crew *dt_crew_new(unsigned threads);

/* Ends the threads. All jobs must be done. */
void dt_crew_free(dt_crew *crew);

/* Begin to work on the pieces, which stay the caller's and must stay until dt_job_wait. NULL when
 * there is no memory. */
dt_job *dt_crew_begin(dt_crew *crew, dt_piece *pieces, size_t count);

/* Whether the job is done. */
int dt_job_done(dt_job *job);

/* Wait for the job, and free it. The caller takes parts of it meanwhile. */
void dt_job_wait(dt_job *job);

#ifdef __cplusplus
}
#endif

#endif

#define _GNU_SOURCE /* affinity is inherited; nanosleep and the clock need POSIX */
#include "crew.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

#include "drivetrain_hal.h"

#if defined(__x86_64__) || defined(__i386__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX() ((void)0)
#endif

/* A thread that finds nothing to do looks again for this long before it sleeps: in a running
 * stream of jobs the next one comes within it, and waking a sleeper takes as long. */
#define SPIN_NS 50000

struct dt_job {
    dt_crew *crew;
    dt_job *next;
    dt_piece *pieces;
    size_t count;
    uint64_t parts;
    uint64_t *before;     /* parts before each piece */
    _Atomic uint64_t taken, finished;
    unsigned users;       /* threads that look at the job; under the crew's mutex */
    int listed;           /* the same */
};

struct dt_crew {
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
    dt_job *first, *last; /* jobs with parts that nobody took */
    _Atomic unsigned waiting;
    int stop;
    unsigned threads;
    pthread_t thread[];
};

static uint64_t now_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint64_t)at.tv_sec * UINT64_C(1000000000) + (uint64_t)at.tv_nsec;
}

static uint64_t parts_of(const dt_piece *piece) {
    uint64_t parts = (piece->nbytes + DT_PART_BYTES - 1) / DT_PART_BYTES;
    return parts ? parts : 1;
}

static void do_part(dt_job *job, uint64_t number) {
    size_t low = 0, high = job->count;
    while (high - low > 1) {
        size_t middle = (low + high) / 2;
        if (job->before[middle] <= number) low = middle;
        else high = middle;
    }
    dt_piece *piece = &job->pieces[low];
    uint64_t at = (number - job->before[low]) * DT_PART_BYTES;
    if (at >= piece->nbytes) return;
    size_t nbytes = (size_t)(piece->nbytes - at < DT_PART_BYTES ? piece->nbytes - at : DT_PART_BYTES);
    const char *src = (const char *)piece->src + at;
    char *dst = piece->dst ? (char *)piece->dst + at : NULL;
    if (piece->first_word == DT_NO_HASH) {
        dt_copy(dst, src, nbytes);
        return;
    }
    uint64_t word = piece->first_word + at / 4;
    uint64_t hash = dst ? dt_copy_checksum(dst, src, nbytes, word) : dt_checksum(src, nbytes, word);
    __atomic_fetch_add(&piece->hash, hash, __ATOMIC_RELAXED);
}

static void take_parts(dt_job *job) {
    uint64_t did = 0;
    for (;;) {
        uint64_t number = atomic_fetch_add_explicit(&job->taken, 1, memory_order_relaxed);
        if (number >= job->parts) break;
        do_part(job, number);
        did++;
    }
    if (did) atomic_fetch_add_explicit(&job->finished, did, memory_order_acq_rel);
}

/* With the mutex held: nobody needs to find this job any more. */
static void unlist(dt_crew *crew, dt_job *job) {
    if (!job->listed) return;
    dt_job **link = &crew->first, *before = NULL;
    while (*link != job) {
        before = *link;
        link = &(*link)->next;
    }
    *link = job->next;
    if (crew->last == job) crew->last = before;
    job->listed = 0;
    atomic_fetch_sub_explicit(&crew->waiting, 1, memory_order_relaxed);
}

/* With the mutex held on entry and return. */
static void serve(dt_crew *crew, dt_job *job) {
    job->users++;
    pthread_mutex_unlock(&crew->mutex);
    take_parts(job);
    pthread_mutex_lock(&crew->mutex);
    unlist(crew, job);
    job->users--;
    if (!job->users) pthread_cond_broadcast(&crew->done);
}

static void *work(void *argument) {
    dt_crew *crew = argument;
    pthread_mutex_lock(&crew->mutex);
    while (!crew->stop) {
        if (crew->first) {
            serve(crew, crew->first);
            continue;
        }
        pthread_mutex_unlock(&crew->mutex);
        uint64_t until = now_ns() + SPIN_NS;
        while (!atomic_load_explicit(&crew->waiting, memory_order_relaxed) && now_ns() < until)
            for (int i = 0; i < 32; i++) RELAX();
        pthread_mutex_lock(&crew->mutex);
        if (!crew->first && !crew->stop) pthread_cond_wait(&crew->wake, &crew->mutex);
    }
    pthread_mutex_unlock(&crew->mutex);
    return NULL;
}

dt_crew *dt_crew_new(unsigned threads) {
    dt_crew *crew = calloc(1, sizeof *crew + threads * sizeof(pthread_t));
    if (!crew) return NULL;
    pthread_mutex_init(&crew->mutex, NULL);
    pthread_cond_init(&crew->wake, NULL);
    pthread_cond_init(&crew->done, NULL);
    for (unsigned i = 0; i < threads; i++) {
        if (pthread_create(&crew->thread[i], NULL, work, crew)) break;
        crew->threads++;
    }
    if (!crew->threads) {
        dt_crew_free(crew);
        return NULL;
    }
    return crew;
}

void dt_crew_free(dt_crew *crew) {
    pthread_mutex_lock(&crew->mutex);
    crew->stop = 1;
    pthread_cond_broadcast(&crew->wake);
    pthread_mutex_unlock(&crew->mutex);
    for (unsigned i = 0; i < crew->threads; i++) pthread_join(crew->thread[i], NULL);
    pthread_cond_destroy(&crew->done);
    pthread_cond_destroy(&crew->wake);
    pthread_mutex_destroy(&crew->mutex);
    free(crew);
}

dt_job *dt_crew_begin(dt_crew *crew, dt_piece *pieces, size_t count) {
    dt_job *job = calloc(1, sizeof *job);
    uint64_t *before = malloc((count ? count : 1) * sizeof *before);
    if (!job || !before) {
        free(job);
        free(before);
        return NULL;
    }
    job->crew = crew;
    job->pieces = pieces;
    job->count = count;
    job->before = before;
    for (size_t i = 0; i < count; i++) {
        pieces[i].hash = 0;
        before[i] = job->parts;
        job->parts += parts_of(&pieces[i]);
    }
    if (!count) return job;
    pthread_mutex_lock(&crew->mutex);
    job->listed = 1;
    if (crew->last) crew->last->next = job;
    else crew->first = job;
    crew->last = job;
    atomic_fetch_add_explicit(&crew->waiting, 1, memory_order_relaxed);
    if (job->parts > 1) pthread_cond_broadcast(&crew->wake);
    else pthread_cond_signal(&crew->wake);
    pthread_mutex_unlock(&crew->mutex);
    return job;
}

int dt_job_done(dt_job *job) {
    return atomic_load_explicit(&job->finished, memory_order_acquire) == job->parts;
}

void dt_job_wait(dt_job *job) {
    dt_crew *crew = job->crew;
    if (job->count) {
        pthread_mutex_lock(&crew->mutex);
        serve(crew, job);
        while (job->users || !dt_job_done(job)) pthread_cond_wait(&crew->done, &crew->mutex);
        pthread_mutex_unlock(&crew->mutex);
    }
    free(job->before);
    free(job);
}

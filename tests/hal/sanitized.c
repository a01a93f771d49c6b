/* The C code that knows no Python, used hard by many threads, for gcc's sanitizers: free lists, the
 * pool that torch can use, the cpu device, copies with hashes. Prints "end" when all was right. */
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "drivetrain_hal.h"
#include "hot.h"
#include "native_pool.h"

#define THREADS 4
#define MUST(x) do { if (!(x)) { fprintf(stderr, "line %d: %s\n", __LINE__, #x); exit(1); } } while (0)

static int turns;

static unsigned next_of(unsigned *state) { return *state = *state * 1664525u + 1013904223u; }

static void together(void *(*work)(void *)) {
    pthread_t threads[THREADS];
    for (intptr_t i = 0; i < THREADS; i++) MUST(!pthread_create(&threads[i], NULL, work, (void *)i));
    for (int i = 0; i < THREADS; i++) pthread_join(threads[i], NULL);
}

/* -- free lists --------------------------------------------------------------------------------- */

static dt_lists *lists;
static _Atomic uint64_t fresh = 1 << 20;

static void *use_lists(void *argument) {
    unsigned state = (unsigned)(intptr_t)argument + 1;
    for (int i = 0; i < turns; i++) {
        uint64_t nbytes = next_of(&state) % 100000, stream = next_of(&state) % 3;
        uint64_t ptr = dt_lists_take(lists, nbytes, stream);
        if (!ptr) {
            ptr = atomic_fetch_add(&fresh, 512);
            dt_lists_count(lists, nbytes, 1);
        }
        dt_lists_put(lists, ptr, nbytes, stream);
        if (i % 1000 == 0) {
            dt_block blocks[16];
            dt_lists_drain(lists, stream, i % 2000 == 0, i % 3 * 512, blocks, 16);
        }
    }
    return NULL;
}

/* -- the pool, over a driver that counts ----------------------------------------------------------- */

static _Atomic long segments;
static __thread int pushed;

static int push(void *context) { MUST(context == (void *)77); pushed++; return 0; }
static int pop(void **context) { *context = NULL; pushed--; return 0; }
static int take(uint64_t *ptr, size_t nbytes) {
    MUST(pushed == 1);
    if (atomic_load(&segments) > 200) return 2;
    *ptr = (uint64_t)(uintptr_t)aligned_alloc(512, nbytes);
    atomic_fetch_add(&segments, 1);
    return *ptr ? 0 : 2;
}
static int give(uint64_t ptr) {
    MUST(pushed == 1);
    free((void *)(uintptr_t)ptr);
    atomic_fetch_sub(&segments, 1);
    return 0;
}
static int event_create(void **event, unsigned flags) { MUST(flags == 2); *event = calloc(1, sizeof(int)); return 0; }
static int event_destroy(void *event) { free(event); return 0; }
static int event_record(void *event, uint64_t stream) { *(int *)event = (int)(stream % 3); return 0; }
static int event_query(void *event) { return (*(int *)event)-- > 0 ? 600 : 0; }
static int stream_wait(uint64_t stream, void *event, unsigned flags) { (void)stream, (void)event, (void)flags; return 0; }
static int is_capturing(uint64_t stream, int *status) { *status = stream == 9; return 0; }

static dt_pool *pool;

static void *use_pool(void *argument) {
    unsigned state = (unsigned)(intptr_t)argument + 7;
    enum { MOST = 12 };
    struct { unsigned char *at; uint64_t nbytes; } held[MOST] = {0};
    uint64_t ptr;
    for (int i = 0; i < turns; i++) {
        int slot = (int)(next_of(&state) >> 8) % MOST;
        uint64_t stream = (uint64_t)(intptr_t)argument + 1;
        if (held[slot].at) {
            unsigned char mark = (unsigned char)(intptr_t)argument;
            MUST(held[slot].at[0] == mark && held[slot].at[held[slot].nbytes - 1] == mark);
            if (i % 3 == 0) MUST(!dt_pool_used_by(pool, (uintptr_t)held[slot].at, next_of(&state) % 5));
            MUST(!dt_pool_free(pool, (uintptr_t)held[slot].at, stream));
            held[slot].at = NULL;
            continue;
        }
        uint64_t nbytes = 1 + (next_of(&state) >> 8) % (i % 50 ? 60000u : 3000000u);
        int code = dt_pool_alloc(pool, nbytes, stream, &ptr);
        if (code) { MUST(code == DT_POOL_NO_MEMORY || code == DT_POOL_LIMIT); continue; }
        held[slot].at = (unsigned char *)(uintptr_t)ptr;
        held[slot].nbytes = nbytes;
        held[slot].at[0] = held[slot].at[nbytes - 1] = (unsigned char)(intptr_t)argument;
        if (i % 500 == 0) dt_pool_trim(pool, 8 << 20);
        if (i % 700 == 0) { dt_pool_counts counts; dt_pool_read(pool, &counts); MUST(counts.live > 0); }
        if (i % 900 == 0) dt_pool_forget_stream(pool, 50 + stream, stream);
    }
    MUST(dt_pool_alloc(pool, 64, 9, &ptr) == DT_POOL_CAPTURING);
    MUST(dt_pool_free(pool, 12345, 1) == DT_POOL_UNKNOWN);
    for (int i = 0; i < MOST; i++)
        if (held[i].at) MUST(!dt_pool_free(pool, (uintptr_t)held[i].at, (uintptr_t)argument + 1));
    return NULL;
}

/* -- the cpu device -------------------------------------------------------------------------------- */

static dt_cpu *device;
static dt_cpu_stream *shared;

static void *use_cpu(void *argument) {
    unsigned state = (unsigned)(intptr_t)argument + 11;
    dt_cpu_stream *stream;
    dt_cpu_event *event;
    dt_cpu_failure failure;
    MUST(!dt_cpu_stream_new(device, (int)(intptr_t)argument, &stream));
    MUST(!dt_cpu_event_new(device, 1, &event));
    for (int i = 0; i < turns / 20; i++) {
        size_t nbytes = 16 + (next_of(&state) >> 8) % (i % 40 ? 5000u : 900000u);
        void *a, *b;
        unsigned char pattern = (unsigned char)next_of(&state);
        nbytes &= ~(size_t)15;
        if (dt_cpu_alloc(device, nbytes, &a)) { dt_cpu_allow(device, 64 << 20); continue; }
        if (dt_cpu_alloc(device, nbytes, &b)) { MUST(!dt_cpu_free(device, a, stream)); continue; }
        MUST(!dt_cpu_fill(stream, a, &pattern, 1, nbytes));
        MUST(!dt_cpu_copy(stream, b, a, nbytes, 0, -1));
        MUST(!dt_cpu_event_record(event, stream));
        MUST(!dt_cpu_stream_wait(shared, event));
        MUST(!dt_cpu_event_record(event, shared));
        MUST(!dt_cpu_stream_wait(stream, event));
        if (i % 3 == 0) {
            unsigned char back[16];
            MUST(!dt_cpu_copy(stream, back, b, sizeof back, 0, -1));
            MUST(!dt_cpu_stream_synchronize(stream, -1, &failure));
            for (int k = 0; k < 16; k++) MUST(back[k] == pattern);
        }
        MUST(!dt_cpu_free(device, a, stream));
        MUST(!dt_cpu_free(device, b, stream));
        if (i % 50 == 49) {
            MUST(!dt_cpu_stream_destroy(stream));
            MUST(dt_cpu_stream_done(stream, &failure) == DT_CPU_CLOSED);
            MUST(!dt_cpu_stream_new(device, 0, &stream));
            MUST(!dt_cpu_event_destroy(event));
            MUST(!dt_cpu_event_new(device, 0, &event));
        }
    }
    MUST(!dt_cpu_synchronize(device, -1, &failure));
    MUST(!dt_cpu_event_destroy(event));
    MUST(!dt_cpu_stream_destroy(stream));
    return NULL;
}

/* -- copies and hashes ------------------------------------------------------------------------------- */

static void *use_bytes(void *argument) {
    unsigned state = (unsigned)(intptr_t)argument + 3;
    unsigned char *from = malloc(70000), *to = malloc(70000);
    for (int i = 0; i < 70000; i++) from[i] = (unsigned char)next_of(&state);
    for (int i = 0; i < turns / 20; i++) {
        size_t shift = next_of(&state) % 64, nbytes = (next_of(&state) >> 8) % 60000;
        uint64_t first = next_of(&state) % 1000;
        uint64_t hash = dt_copy_checksum(to + i % 9, from + shift, nbytes, first);
        MUST(hash == dt_checksum(to + i % 9, nbytes, first));
        MUST(!memcmp(to + i % 9, from + shift, nbytes));
        dt_copy(to, to + 5, nbytes);
    }
    free(from);
    free(to);
    return NULL;
}

int main(int count, char **words) {
    turns = count > 1 ? atoi(words[1]) : 2000;
    MUST((lists = dt_lists_new()));
    together(use_lists);
    dt_lists_free(lists);

    dt_pool_calls calls = {77, (uintptr_t)push, (uintptr_t)pop, (uintptr_t)take, (uintptr_t)give,
                           (uintptr_t)event_create, (uintptr_t)event_destroy,
                           (uintptr_t)event_record, (uintptr_t)event_query, (uintptr_t)stream_wait,
                           (uintptr_t)is_capturing};
    MUST((pool = dt_pool_new(&calls, UINT64_C(300) << 20)));
    together(use_pool);
    dt_pool_counts counts;
    dt_pool_read(pool, &counts);
    MUST(!counts.live && !counts.requested && !counts.allocated && counts.peak_reserved);
    MUST(!dt_torch_serve(0, pool));
    void *p = dt_torch_alloc(1000, 0, (void *)1);
    dt_torch_record_stream(p, (void *)2);
    dt_torch_free(p, 1000, 0, (void *)1);
    dt_torch_empty_cache();
    MUST(!dt_torch_serve(0, NULL));
    dt_pool_close(pool);
    MUST(!atomic_load(&segments));

    MUST((device = dt_cpu_open(NULL, 0, 3, 0)));
    MUST(!dt_cpu_stream_new(device, 0, &shared));
    dt_cpu_allow(device, 64 << 20);
    together(use_cpu);
    MUST(!dt_cpu_close(device, -1));

    together(use_bytes);
    puts("end");
    return 0;
}

#include "hot.h"

#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

/* -- lists of free blocks --------------------------------------------------------------------- */

typedef struct {
    uint64_t stream, nbytes;
    unsigned count;
    uint64_t ptrs[DT_BIN];
} bin;

struct dt_lists {
    atomic_flag lock; /* held for a few instructions, never across a call */
    bin **table;      /* open addressing; capacity is a power of two */
    size_t capacity, bins;
    dt_counts counts;
};

static void lock(dt_lists *lists) {
    for (unsigned turn = 1; atomic_flag_test_and_set_explicit(&lists->lock, memory_order_acquire);
         turn++)
        if (turn % 64 == 0) sched_yield(); /* who holds it may not be running */
}

static void unlock(dt_lists *lists) { atomic_flag_clear_explicit(&lists->lock, memory_order_release); }

static uint64_t rounded(uint64_t nbytes) {
    return ((nbytes ? nbytes : 1) + DT_GRAIN - 1) / DT_GRAIN * DT_GRAIN;
}

static size_t slot_of(uint64_t stream, uint64_t nbytes, size_t capacity) {
    uint64_t mixed = (stream ^ (nbytes << 17) ^ nbytes) * UINT64_C(0x9E3779B97F4A7C15);
    return (size_t)(mixed >> 32) & (capacity - 1);
}

dt_lists *dt_lists_new(void) {
    dt_lists *lists = calloc(1, sizeof *lists);
    if (!lists) return NULL;
    atomic_flag_clear(&lists->lock);
    lists->capacity = 64;
    lists->table = calloc(lists->capacity, sizeof *lists->table);
    if (!lists->table) {
        free(lists);
        return NULL;
    }
    return lists;
}

void dt_lists_free(dt_lists *lists) {
    for (size_t i = 0; i < lists->capacity; i++) free(lists->table[i]);
    free(lists->table);
    free(lists);
}

static bin **find(bin **table, size_t capacity, uint64_t stream, uint64_t nbytes) {
    size_t at = slot_of(stream, nbytes, capacity);
    while (table[at] && (table[at]->stream != stream || table[at]->nbytes != nbytes))
        at = (at + 1) & (capacity - 1);
    return &table[at];
}

/* Twice the room, without bins that are empty. 0 when there is no memory for it. */
static int grow(dt_lists *lists) {
    size_t capacity = lists->capacity * 2;
    bin **table = calloc(capacity, sizeof *table);
    if (!table) return 0;
    lists->bins = 0;
    for (size_t i = 0; i < lists->capacity; i++) {
        bin *each = lists->table[i];
        if (!each) continue;
        if (!each->count) {
            free(each);
            continue;
        }
        *find(table, capacity, each->stream, each->nbytes) = each;
        lists->bins++;
    }
    free(lists->table);
    lists->table = table;
    lists->capacity = capacity;
    return 1;
}

static void use(dt_counts *counts, uint64_t nbytes) {
    counts->live++;
    counts->requested += nbytes;
    counts->allocated += rounded(nbytes);
    if (counts->requested > counts->peak_requested) counts->peak_requested = counts->requested;
    if (counts->allocated > counts->peak_allocated) counts->peak_allocated = counts->allocated;
}

static void unuse(dt_counts *counts, uint64_t nbytes) {
    counts->live--;
    counts->requested -= nbytes;
    counts->allocated -= rounded(nbytes);
}

uint64_t dt_lists_take(dt_lists *lists, uint64_t nbytes, uint64_t stream) {
    uint64_t ptr = 0;
    lock(lists);
    bin *found = *find(lists->table, lists->capacity, stream, rounded(nbytes));
    if (found && found->count) {
        ptr = found->ptrs[--found->count];
        lists->counts.listed--;
        use(&lists->counts, nbytes);
    }
    unlock(lists);
    return ptr;
}

int dt_lists_put(dt_lists *lists, uint64_t ptr, uint64_t nbytes, uint64_t stream) {
    int kept = 0;
    uint64_t size = rounded(nbytes);
    lock(lists);
    unuse(&lists->counts, nbytes);
    bin **place = find(lists->table, lists->capacity, stream, size);
    if (!*place && (2 * lists->bins < lists->capacity || grow(lists))) {
        place = find(lists->table, lists->capacity, stream, size);
        *place = malloc(sizeof **place);
        if (*place) {
            (*place)->stream = stream;
            (*place)->nbytes = size;
            (*place)->count = 0;
            lists->bins++;
        }
    }
    if (*place && (*place)->count < DT_BIN) {
        (*place)->ptrs[(*place)->count++] = ptr;
        lists->counts.listed++;
        kept = 1;
    }
    unlock(lists);
    return kept;
}

void dt_lists_count(dt_lists *lists, uint64_t nbytes, int used) {
    lock(lists);
    if (used) use(&lists->counts, nbytes);
    else unuse(&lists->counts, nbytes);
    unlock(lists);
}

size_t dt_lists_drain(dt_lists *lists, uint64_t stream, int all, uint64_t least, dt_block *blocks,
                      size_t room) {
    size_t moved = 0;
    lock(lists);
    for (size_t i = 0; i < lists->capacity && moved < room; i++) {
        bin *each = lists->table[i];
        if (!each || (!all && each->stream != stream) || each->nbytes < least) continue;
        while (each->count && moved < room) {
            blocks[moved++] = (dt_block){each->stream, each->nbytes, each->ptrs[--each->count]};
            lists->counts.listed--;
        }
    }
    unlock(lists);
    return moved;
}

void dt_lists_counts(dt_lists *lists, dt_counts *counts) {
    lock(lists);
    *counts = lists->counts;
    unlock(lists);
}

/* -- launches ---------------------------------------------------------------------------------- */

typedef int (*cuda_launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                           unsigned, void *, void **, void **);
typedef int (*opencl_set)(void *, unsigned, size_t, const void *);
typedef int (*opencl_set_pointer)(void *, unsigned, const void *);
typedef int (*opencl_launch)(void *, void *, unsigned, const size_t *, const size_t *,
                             const size_t *, unsigned, const void *, void *);
typedef int (*get_context)(void **);
typedef int (*set_context)(void *);
typedef int (*record)(void *, void *);
typedef int (*graph_launch)(void *, void *);

/* Makes the device's context current; *before is what was, for restore. */
static int enter(const dt_calls *calls, void **before) {
    *before = NULL;
    if (!calls->get_context) return 0;
    int code = ((get_context)calls->get_context)(before);
    if (code || *before == (void *)calls->context) {
        *before = NULL;
        return code;
    }
    return ((set_context)calls->set_context)((void *)calls->context);
}

static void leave(const dt_calls *calls, void *before) {
    if (before) ((set_context)calls->set_context)(before);
}

static _Atomic uint64_t opencl_launches;

uint64_t dt_opencl_launches(void) { return opencl_launches; }

static int launch_opencl(const dt_calls *calls, void *function, const uint32_t grid[3],
                         const uint32_t block[3], uint32_t shared, void *stream, void **arguments,
                         const int32_t *sizes, unsigned count) {
    for (unsigned i = 0; i < count; i++) {
        int code;
        if (sizes[i] < 0) {
            void *pointer;
            memcpy(&pointer, arguments[i], sizeof pointer);
            code = ((opencl_set_pointer)calls->set_pointer)(function, i, pointer);
        } else {
            code = ((opencl_set)calls->set_value)(function, i, (size_t)sizes[i], arguments[i]);
        }
        if (code) return code;
    }
    if (shared) {
        int code = ((opencl_set)calls->set_value)(function, count, shared, NULL);
        if (code) return code;
    }
    size_t whole[3], local[3];
    unsigned dims = 1;
    for (int i = 0; i < 3; i++) {
        whole[i] = (size_t)grid[i] * block[i];
        local[i] = block[i];
        if (whole[i] > 1) dims = (unsigned)i + 1;
    }
    int code =
        ((opencl_launch)calls->launch)(stream, function, dims, NULL, whole, local, 0, NULL, NULL);
    atomic_fetch_add_explicit(&opencl_launches, 1, memory_order_relaxed);
    return code;
}

/* A stream of its own belongs to one context, and so does all that is queued on it: the driver
 * queues it there or says that it cannot, so that the context that is current need not be asked for
 * each time. The names of default streams (0 to 2) mean those of whatever context is current. */
static inline int own(const void *stream) { return (uintptr_t)stream > 2; }

static int queue_launch(const dt_calls *calls, void *function, const uint32_t grid[3],
                        const uint32_t block[3], uint32_t shared, void *stream, void **arguments,
                        const int32_t *sizes, unsigned count) {
    switch (calls->abi) {
    case DT_ABI_CUDA:
        return ((cuda_launch)calls->launch)(function, grid[0], grid[1], grid[2], block[0], block[1],
                                            block[2], shared, stream, arguments, NULL);
    case DT_ABI_PLAIN:
        return ((dt_plain_launch)calls->launch)(function, grid, block, shared, stream, arguments);
    case DT_ABI_OPENCL:
        return launch_opencl(calls, function, grid, block, shared, stream, arguments, sizes, count);
    }
    return -1;
}

int dt_launch(const dt_calls *calls, void *function, const uint32_t grid[3],
              const uint32_t block[3], uint32_t shared, void *stream, void **arguments,
              const int32_t *sizes, unsigned count) {
    void *before;
    int code;
    if (own(stream)) {
        code = queue_launch(calls, function, grid, block, shared, stream, arguments, sizes, count);
        if (!code || !calls->get_context) return code;
    }
    code = enter(calls, &before);
    if (code) return code;
    code = queue_launch(calls, function, grid, block, shared, stream, arguments, sizes, count);
    leave(calls, before);
    return code;
}

int dt_record(const dt_calls *calls, void *event, void *stream) {
    void *before;
    int code;
    if (own(stream)) {
        code = ((record)calls->record)(event, stream);
        if (!code || !calls->get_context) return code;
    }
    code = enter(calls, &before);
    if (code) return code;
    code = ((record)calls->record)(event, stream);
    leave(calls, before);
    return code;
}

int dt_graph_launch(const dt_calls *calls, void *graph, void *stream) {
    void *before;
    int code;
    if (own(stream)) {
        code = ((graph_launch)calls->graph_launch)(graph, stream);
        if (!code || !calls->get_context) return code;
    }
    code = enter(calls, &before);
    if (code) return code;
    code = ((graph_launch)calls->graph_launch)(graph, stream);
    leave(calls, before);
    return code;
}

#define _GNU_SOURCE
#include "native_pool.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define GRAIN UINT64_C(512)
#define SMALL (UINT64_C(1) << 20)
#define SMALL_SEGMENT (UINT64_C(2) << 20)
#define MIDDLE (UINT64_C(10) << 20)
#define MIDDLE_SEGMENT (UINT64_C(20) << 20)
#define LARGE_GRAIN (UINT64_C(2) << 20)
#define MOST_BYTES (UINT64_C(1) << 48)

#define MOST_WAIT_NS INT64_C(10000000000) /* for memory that is in use still */
#define NOT_READY 600
#define DISABLE_TIMING 2u

typedef struct block block;

typedef struct segment {
    uint64_t ptr, nbytes;
    block *first;
    int small;
    struct segment *before, *after;
} segment;

struct block {
    segment *home;
    uint64_t ptr, nbytes, requested, stream;
    block *before, *after; /* neighbours in the segment */
    int free;
    unsigned pending; /* events that must be done before it is free */
    uint64_t *users;  /* other streams */
    unsigned user_count, user_room;
    block *next; /* in the table of used blocks */
};

/* Free blocks of one stream and kind of segment, the smallest first. */
typedef struct {
    uint64_t stream;
    int small;
    block **blocks;
    size_t count, room;
} list;

typedef struct waiting {
    void *event;
    block *block;
    struct waiting *next;
} waiting;

struct dt_pool {
    pthread_mutex_t lock;
    dt_pool_calls calls;
    uint64_t limit;
    dt_pool_counts counts;
    segment *segments;
    list *lists;
    size_t list_count, list_room;
    block **table; /* used blocks by address */
    size_t table_size, used;
    waiting *first, *last;
    void **events; /* to be used again */
    size_t event_count, event_room;
    unsigned inside; /* the context was pushed */
};

/* -- the driver --------------------------------------------------------------------------------- */

typedef int (*call_p)(void *);
typedef int (*call_pp)(void **);
typedef int (*call_pu)(void **, unsigned);
typedef int (*call_alloc)(uint64_t *, size_t);
typedef int (*call_free)(uint64_t);
typedef int (*call_record)(void *, uint64_t);
typedef int (*call_wait)(uint64_t, void *, unsigned);
typedef int (*call_capturing)(uint64_t, int *);

/* Every call of the driver is between enter and leave; the context is pushed with the first. */
static void enter(dt_pool *pool) {
    if (!pool->inside) {
        int code = ((call_p)pool->calls.push)((void *)pool->calls.context);
        if (code) pool->counts.native = code;
        else pool->inside = 1;
    }
}

static void unlock(dt_pool *pool) {
    if (pool->inside) {
        void *context;
        ((call_pp)pool->calls.pop)(&context);
        pool->inside = 0;
    }
    pthread_mutex_unlock(&pool->lock);
}

static int told(dt_pool *pool, int code) {
    if (code && code != NOT_READY) pool->counts.native = code;
    return code;
}

static void *take_event(dt_pool *pool) {
    if (pool->event_count) return pool->events[--pool->event_count];
    void *event = NULL;
    enter(pool);
    if (told(pool, ((call_pu)pool->calls.event_create)(&event, DISABLE_TIMING))) return NULL;
    return event;
}

static void give_event(dt_pool *pool, void *event) {
    if (pool->event_count == pool->event_room) {
        size_t room = pool->event_room ? 2 * pool->event_room : 64;
        void **events = realloc(pool->events, room * sizeof *events);
        if (!events) {
            enter(pool);
            ((call_p)pool->calls.event_destroy)(event);
            return;
        }
        pool->events = events;
        pool->event_room = room;
    }
    pool->events[pool->event_count++] = event;
}

static int captured(dt_pool *pool, uint64_t stream) {
    int status = 0;
    if (!stream) return 0; /* the default stream is never captured */
    enter(pool);
    return !told(pool, ((call_capturing)pool->calls.is_capturing)(stream, &status)) && status;
}

/* -- the table of used blocks, by address -------------------------------------------------------- */

static size_t slot(const dt_pool *pool, uint64_t ptr) {
    return (size_t)((ptr >> 9) * UINT64_C(0x9E3779B97F4A7C15) >> 32) & (pool->table_size - 1);
}

static void note_used(dt_pool *pool, block *b) {
    if (pool->used >= pool->table_size) { /* chains get longer where there is no memory for more */
        size_t before = pool->table_size;
        block **table = calloc(2 * before, sizeof *table), **old = pool->table;
        if (table) {
            pool->table = table;
            pool->table_size = 2 * before;
            for (size_t i = 0; i < before; i++)
                for (block *each = old[i], *next; each; each = next) {
                    size_t at = slot(pool, each->ptr);
                    next = each->next;
                    each->next = table[at];
                    table[at] = each;
                }
            free(old);
        }
    }
    size_t at = slot(pool, b->ptr);
    b->next = pool->table[at];
    pool->table[at] = b;
    pool->used++;
}

static block *find_used(dt_pool *pool, uint64_t ptr) {
    block *b = pool->table[slot(pool, ptr)];
    while (b && b->ptr != ptr) b = b->next;
    return b;
}

static void note_unused(dt_pool *pool, block *b) {
    block **at = &pool->table[slot(pool, b->ptr)];
    while (*at != b) at = &(*at)->next;
    *at = b->next;
    pool->used--;
}

/* -- lists of free blocks ------------------------------------------------------------------------ */

static list *list_of(dt_pool *pool, uint64_t stream, int small, int make) {
    for (size_t i = 0; i < pool->list_count; i++)
        if (pool->lists[i].stream == stream && pool->lists[i].small == small)
            return &pool->lists[i];
    if (!make) return NULL;
    if (pool->list_count == pool->list_room) {
        size_t room = pool->list_room ? 2 * pool->list_room : 8;
        list *lists = realloc(pool->lists, room * sizeof *lists);
        if (!lists) return NULL;
        pool->lists = lists;
        pool->list_room = room;
    }
    list *made = &pool->lists[pool->list_count++];
    *made = (list){stream, small, NULL, 0, 0};
    return made;
}

/* Where the first block lies that is not smaller than (nbytes, ptr). */
static size_t place(const list *l, uint64_t nbytes, uint64_t ptr) {
    size_t low = 0, high = l->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        const block *b = l->blocks[middle];
        if (b->nbytes < nbytes || (b->nbytes == nbytes && b->ptr < ptr)) low = middle + 1;
        else high = middle;
    }
    return low;
}

static void unlist(dt_pool *pool, block *b) {
    list *l = list_of(pool, b->stream, b->home->small, 0);
    size_t at = place(l, b->nbytes, b->ptr);
    memmove(&l->blocks[at], &l->blocks[at + 1], (l->count - at - 1) * sizeof *l->blocks);
    l->count--;
    b->free = 0;
}

/* A block for which there is no room in its list is lost to the pool until its segment is. */
static void enlist(dt_pool *pool, block *b) {
    list *l = list_of(pool, b->stream, b->home->small, 1);
    if (!l) return;
    if (l->count == l->room) {
        size_t room = l->room ? 2 * l->room : 32;
        block **blocks = realloc(l->blocks, room * sizeof *blocks);
        if (!blocks) return;
        l->blocks = blocks;
        l->room = room;
    }
    size_t at = place(l, b->nbytes, b->ptr);
    memmove(&l->blocks[at + 1], &l->blocks[at], (l->count - at) * sizeof *l->blocks);
    l->blocks[at] = b;
    l->count++;
    b->free = 1;
}

/* Takes the neighbour after b into b. */
static void join(block *b) {
    block *other = b->after;
    b->nbytes += other->nbytes;
    b->after = other->after;
    if (other->after) other->after->before = b;
    free(other->users);
    free(other);
}

static void let_go(dt_pool *pool, block *b) {
    if (b->after && b->after->free && b->after->stream == b->stream) {
        unlist(pool, b->after);
        join(b);
    }
    if (b->before && b->before->free && b->before->stream == b->stream) {
        b = b->before;
        unlist(pool, b);
        join(b);
    }
    enlist(pool, b);
}

/* Takes nbytes off a free block that is in no list; what is left is listed again. */
static block *cut(dt_pool *pool, block *b, uint64_t nbytes) {
    uint64_t left = b->nbytes - nbytes;
    if (left < (b->home->small ? GRAIN : SMALL)) return b;
    block *rest = calloc(1, sizeof *rest);
    if (!rest) return b; /* the caller gets more than was asked for */
    rest->home = b->home;
    rest->ptr = b->ptr + nbytes;
    rest->nbytes = left;
    rest->stream = b->stream;
    rest->before = b;
    rest->after = b->after;
    if (b->after) b->after->before = rest;
    b->after = rest;
    b->nbytes = nbytes;
    enlist(pool, rest);
    return b;
}

static block *fitting(dt_pool *pool, list *l, uint64_t nbytes) {
    if (!l) return NULL;
    size_t at = place(l, nbytes, 0);
    if (at == l->count) return NULL;
    block *b = l->blocks[at];
    unlist(pool, b);
    return cut(pool, b, nbytes);
}

/* What another stream let go; the stream waits for that stream's work so far. */
static block *borrowed(dt_pool *pool, uint64_t nbytes, uint64_t stream) {
    int small = nbytes <= SMALL;
    for (size_t i = 0; i < pool->list_count; i++) {
        uint64_t other = pool->lists[i].stream;
        if (other == stream || pool->lists[i].small != small || !pool->lists[i].count ||
            captured(pool, other))
            continue;
        block *b = fitting(pool, &pool->lists[i], nbytes);
        if (!b) continue;
        void *event = take_event(pool);
        enter(pool);
        if (event && !told(pool, ((call_record)pool->calls.event_record)(event, other)) &&
            !told(pool, ((call_wait)pool->calls.stream_wait)(stream, event, 0))) {
            give_event(pool, event);
            b->stream = stream;
            return b;
        }
        if (event) give_event(pool, event);
        let_go(pool, b);
    }
    return NULL;
}

/* -- segments -------------------------------------------------------------------------------------- */

static uint64_t segment_bytes(uint64_t nbytes) {
    if (nbytes <= SMALL) return SMALL_SEGMENT;
    if (nbytes < MIDDLE) return MIDDLE_SEGMENT;
    return (nbytes + LARGE_GRAIN - 1) / LARGE_GRAIN * LARGE_GRAIN;
}

static void drop_segment(dt_pool *pool, segment *s) {
    for (block *b = s->first, *next; b; b = next) {
        next = b->after;
        if (b->free) unlist(pool, b);
        free(b->users);
        free(b);
    }
    if (s->before) s->before->after = s->after;
    else pool->segments = s->after;
    if (s->after) s->after->before = s->before;
    enter(pool);
    told(pool, ((call_free)pool->calls.free)(s->ptr));
    pool->counts.reserved -= s->nbytes;
    free(s);
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

/* Whether the event is done; with wait set it may take a while to become so. */
static int done(dt_pool *pool, void *event, int wait) {
    int64_t until = wait ? now_ns() + MOST_WAIT_NS : 0;
    enter(pool);
    int code = ((call_p)pool->calls.event_query)(event);
    while (code == NOT_READY && wait && now_ns() < until) {
        struct timespec pause = {0, 50000};
        nanosleep(&pause, NULL);
        code = ((call_p)pool->calls.event_query)(event);
    }
    told(pool, code); /* of a lost device: nothing runs there any more */
    return code != NOT_READY;
}

/* Waits for the streams that let something go; 0 when one of them does not come to an end. The
 * driver may wait itself when memory is freed, and does not promise it. */
static int settle(dt_pool *pool) {
    int quiet = 1;
    for (size_t i = 0; i < pool->list_count && quiet; i++) {
        uint64_t stream = pool->lists[i].stream;
        if (!pool->lists[i].count || captured(pool, stream)) continue;
        void *event = take_event(pool);
        if (!event) return 0;
        enter(pool);
        if (!told(pool, ((call_record)pool->calls.event_record)(event, stream)))
            quiet = done(pool, event, 1);
        give_event(pool, event);
    }
    return quiet;
}

static uint64_t trim(dt_pool *pool, uint64_t keep) {
    uint64_t given = 0;
    if (pool->counts.reserved > keep && !settle(pool)) return 0;
    for (segment *s = pool->segments, *next; s && pool->counts.reserved > keep; s = next) {
        next = s->after;
        int idle = 1;
        for (block *b = s->first; b && idle; b = b->after)
            idle = b->free && !captured(pool, b->stream);
        if (!idle) continue;
        given += s->nbytes;
        drop_segment(pool, s);
    }
    return given;
}

/* Blocks whose other users are done are free. With all set it is waited for the others. */
static void look_at_waiting(dt_pool *pool, int all) {
    while (pool->first) {
        waiting *w = pool->first;
        if (!done(pool, w->event, all)) return;
        pool->first = w->next;
        if (!pool->first) pool->last = NULL;
        give_event(pool, w->event);
        if (!--w->block->pending) let_go(pool, w->block);
        free(w);
    }
}

static int reserve(dt_pool *pool, uint64_t nbytes, segment **made) {
    uint64_t ptr = 0;
    segment *s = calloc(1, sizeof *s);
    block *b = calloc(1, sizeof *b);
    enter(pool);
    int code = s && b ? ((call_alloc)pool->calls.alloc)(&ptr, (size_t)nbytes) : -1;
    if (code) {
        if (s && b) told(pool, code);
        free(s);
        free(b);
        return code;
    }
    *s = (segment){ptr, nbytes, b, 0, NULL, pool->segments};
    if (s->after) s->after->before = s;
    pool->segments = s;
    b->home = s;
    b->ptr = ptr;
    b->nbytes = nbytes;
    pool->counts.reserved += nbytes;
    if (pool->counts.reserved > pool->counts.peak_reserved)
        pool->counts.peak_reserved = pool->counts.reserved;
    *made = s;
    return 0;
}

static int grow(dt_pool *pool, uint64_t nbytes, uint64_t stream, block **found) {
    uint64_t wanted = segment_bytes(nbytes), limit = pool->limit;
    segment *s;
    if (wanted > limit || pool->counts.reserved > limit - wanted) {
        look_at_waiting(pool, 0);
        trim(pool, wanted < limit ? limit - wanted : 0);
        if (wanted > limit || pool->counts.reserved > limit - wanted) wanted = nbytes;
    }
    if (wanted > limit || pool->counts.reserved > limit - wanted) return DT_POOL_LIMIT;
    if (reserve(pool, wanted, &s)) {
        pool->counts.retries++;
        look_at_waiting(pool, 1);
        trim(pool, 0);
        int code = reserve(pool, nbytes, &s);
        if (code) return code < 0 ? DT_POOL_HOST : DT_POOL_NO_MEMORY;
    }
    s->small = nbytes <= SMALL;
    s->first->stream = stream;
    *found = cut(pool, s->first, nbytes);
    return DT_POOL_OK;
}

/* -- the pool -------------------------------------------------------------------------------------- */

dt_pool *dt_pool_new(const dt_pool_calls *calls, uint64_t limit) {
    dt_pool *pool = calloc(1, sizeof *pool);
    if (!pool) return NULL;
    pool->table_size = 1024;
    pool->table = calloc(pool->table_size, sizeof *pool->table);
    if (!pool->table) {
        free(pool);
        return NULL;
    }
    pthread_mutex_init(&pool->lock, NULL);
    pool->calls = *calls;
    pool->limit = limit;
    return pool;
}

void dt_pool_close(dt_pool *pool) {
    pthread_mutex_lock(&pool->lock);
    while (pool->segments) drop_segment(pool, pool->segments);
    enter(pool);
    for (waiting *w = pool->first, *next; w; w = next) {
        next = w->next;
        ((call_p)pool->calls.event_destroy)(w->event);
        free(w);
    }
    for (size_t i = 0; i < pool->event_count; i++)
        ((call_p)pool->calls.event_destroy)(pool->events[i]);
    for (size_t i = 0; i < pool->list_count; i++) free(pool->lists[i].blocks);
    free(pool->lists);
    free(pool->events);
    free(pool->table);
    unlock(pool);
    pthread_mutex_destroy(&pool->lock);
    free(pool);
}

static int find(dt_pool *pool, uint64_t nbytes, uint64_t stream, block **found) {
    if (captured(pool, stream)) return DT_POOL_CAPTURING;
    if (nbytes > MOST_BYTES) return DT_POOL_NO_MEMORY;
    uint64_t size = ((nbytes ? nbytes : 1) + GRAIN - 1) / GRAIN * GRAIN;
    if (pool->first) look_at_waiting(pool, 0);
    *found = fitting(pool, list_of(pool, stream, size <= SMALL, 0), size);
    if (!*found) *found = borrowed(pool, size, stream);
    return *found ? DT_POOL_OK : grow(pool, size, stream, found);
}

int dt_pool_alloc(dt_pool *pool, uint64_t nbytes, uint64_t stream, uint64_t *ptr) {
    block *b = NULL;
    pthread_mutex_lock(&pool->lock);
    int code = find(pool, nbytes, stream, &b);
    dt_pool_counts *c = &pool->counts;
    if (code) {
        c->failures++;
    } else {
        b->requested = nbytes;
        note_used(pool, b);
        c->live++;
        c->requested += nbytes;
        c->allocated += b->nbytes;
        if (c->requested > c->peak_requested) c->peak_requested = c->requested;
        if (c->allocated > c->peak_allocated) c->peak_allocated = c->allocated;
        *ptr = b->ptr;
    }
    unlock(pool);
    return code;
}

/* The block is free once the work so far of each of its other users is done. */
static int wait_for_users(dt_pool *pool, block *b) {
    for (unsigned i = 0; i < b->user_count; i++) {
        uint64_t user = b->users[i];
        waiting *w = calloc(1, sizeof *w);
        void *event = w ? take_event(pool) : NULL;
        enter(pool);
        if (!event || told(pool, ((call_record)pool->calls.event_record)(event, user))) {
            int code = w ? DT_POOL_DRIVER : DT_POOL_HOST;
            if (event) give_event(pool, event);
            free(w);
            b->pending++; /* for ever: nobody will know when that user is done */
            return code;
        }
        w->event = event;
        w->block = b;
        b->pending++;
        if (pool->last) pool->last->next = w;
        else pool->first = w;
        pool->last = w;
    }
    b->user_count = 0;
    return DT_POOL_OK;
}

int dt_pool_free(dt_pool *pool, uint64_t ptr, uint64_t stream) {
    pthread_mutex_lock(&pool->lock);
    int code = DT_POOL_OK;
    block *b = find_used(pool, ptr);
    if (!b) {
        code = DT_POOL_UNKNOWN;
    } else {
        note_unused(pool, b);
        pool->counts.live--;
        pool->counts.requested -= b->requested;
        pool->counts.allocated -= b->nbytes;
        b->stream = stream;
        if (b->user_count) code = wait_for_users(pool, b);
        /* Where an event cannot be had the block is not used again: right, if wasteful. */
        if (!code && !b->pending) let_go(pool, b);
    }
    unlock(pool);
    return code;
}

int dt_pool_used_by(dt_pool *pool, uint64_t ptr, uint64_t stream) {
    pthread_mutex_lock(&pool->lock);
    block *b = find_used(pool, ptr);
    int code = b ? DT_POOL_OK : DT_POOL_UNKNOWN;
    int known = !b || b->stream == stream;
    for (unsigned i = 0; !known && i < b->user_count; i++) known = b->users[i] == stream;
    if (!known && b->user_count == b->user_room) {
        unsigned room = b->user_room ? 2 * b->user_room : 2;
        uint64_t *users = realloc(b->users, room * sizeof *users);
        if (users) {
            b->users = users;
            b->user_room = room;
        } else {
            code = DT_POOL_HOST;
        }
    }
    if (!known && !code) b->users[b->user_count++] = stream;
    unlock(pool);
    return code;
}

void dt_pool_forget_stream(dt_pool *pool, uint64_t stream, uint64_t heir) {
    pthread_mutex_lock(&pool->lock);
    for (segment *s = pool->segments; s; s = s->after)
        for (block *b = s->first; b; b = b->after) {
            for (unsigned i = 0; i < b->user_count; i++)
                if (b->users[i] == stream) b->users[i] = heir;
            if (b->stream != stream) continue;
            int listed = b->free;
            if (listed) unlist(pool, b);
            b->stream = heir;
            if (listed) enlist(pool, b);
        }
    unlock(pool);
}

uint64_t dt_pool_trim(dt_pool *pool, uint64_t keep) {
    pthread_mutex_lock(&pool->lock);
    look_at_waiting(pool, pool->counts.reserved > keep);
    uint64_t given = trim(pool, keep);
    unlock(pool);
    return given;
}

void dt_pool_read(dt_pool *pool, dt_pool_counts *counts) {
    pthread_mutex_lock(&pool->lock);
    *counts = pool->counts;
    memset(counts->largest, 0, sizeof counts->largest);
    for (size_t i = 0; i < pool->table_size; i++)
        for (block *b = pool->table[i]; b; b = b->next) {
            uint64_t nbytes = b->nbytes;
            for (int k = 0; k < DT_POOL_LARGEST; k++)
                if (nbytes > counts->largest[k]) {
                    uint64_t smaller = counts->largest[k];
                    counts->largest[k] = nbytes;
                    nbytes = smaller;
                }
        }
    unlock(pool);
}

/* -- torch ------------------------------------------------------------------------------------------- */

#define MOST_DEVICES 64

static pthread_rwlock_t serving = PTHREAD_RWLOCK_INITIALIZER;
static dt_pool *served[MOST_DEVICES];

int dt_torch_serve(int index, dt_pool *pool) {
    if (index < 0 || index >= MOST_DEVICES) return -1;
    pthread_rwlock_wrlock(&serving);
    served[index] = pool;
    pthread_rwlock_unlock(&serving);
    return 0;
}

/* std::runtime_error, thrown by the C++ library that the process has loaded; without one (then no
 * torch either) it returns. */
static void refuse(const char *text) {
    void *library = dlopen("libstdc++.so.6", RTLD_LAZY | RTLD_NOLOAD);
    void (*throw_error)(const char *) = NULL;
    if (library) {
        void *symbol = dlsym(library, "_ZSt21__throw_runtime_errorPKc");
        memcpy(&throw_error, &symbol, sizeof symbol);
    }
    if (throw_error) throw_error(text);
}

void *dt_torch_alloc(ssize_t nbytes, int index, void *stream) {
    char text[512];
    uint64_t ptr = 0;
    int code = DT_POOL_UNKNOWN;
    dt_pool_counts counts = {0};
    pthread_rwlock_rdlock(&serving);
    dt_pool *pool = index >= 0 && index < MOST_DEVICES ? served[index] : NULL;
    if (pool) {
        code = dt_pool_alloc(pool, nbytes > 0 ? (uint64_t)nbytes : 0, (uintptr_t)stream, &ptr);
        if (code) dt_pool_read(pool, &counts);
    }
    pthread_rwlock_unlock(&serving);
    if (!code) return (void *)(uintptr_t)ptr;
    if (!pool)
        snprintf(text, sizeof text, "Drivetrain's pool does not serve CUDA device %d; call "
                 "drivetrain.pytorch.allocator.use_pool before CUDA is used", index);
    else if (code == DT_POOL_CAPTURING)
        snprintf(text, sizeof text, "Drivetrain's pool gives no memory to a stream that is being "
                 "captured into a CUDA graph; use torch's own allocator for CUDA graphs");
    else
        snprintf(text, sizeof text, "CUDA out of memory. Tried to allocate %zd bytes on device %d "
                 "from Drivetrain's pool%s: it holds %llu bytes, %llu of them in %llu tensors and "
                 "buffers, the largest %llu, %llu, %llu bytes (CUDA error %lld)", nbytes, index,
                 code == DT_POOL_LIMIT ? ", which is at its limit" : "",
                 (unsigned long long)counts.reserved, (unsigned long long)counts.allocated,
                 (unsigned long long)counts.live, (unsigned long long)counts.largest[0],
                 (unsigned long long)counts.largest[1], (unsigned long long)counts.largest[2],
                 (long long)counts.native);
    refuse(text);
    return NULL;
}

void dt_torch_free(void *ptr, ssize_t nbytes, int index, void *stream) {
    (void)nbytes;
    pthread_rwlock_rdlock(&serving);
    dt_pool *pool = index >= 0 && index < MOST_DEVICES ? served[index] : NULL;
    if (pool && ptr) dt_pool_free(pool, (uintptr_t)ptr, (uintptr_t)stream);
    pthread_rwlock_unlock(&serving);
}

void dt_torch_record_stream(void *ptr, void *stream) {
    pthread_rwlock_rdlock(&serving);
    for (int i = 0; i < MOST_DEVICES; i++)
        if (served[i] && !dt_pool_used_by(served[i], (uintptr_t)ptr, (uintptr_t)stream)) break;
    pthread_rwlock_unlock(&serving);
}

void dt_torch_empty_cache(void) {
    pthread_rwlock_rdlock(&serving);
    for (int i = 0; i < MOST_DEVICES; i++)
        if (served[i]) dt_pool_trim(served[i], 0);
    pthread_rwlock_unlock(&serving);
}

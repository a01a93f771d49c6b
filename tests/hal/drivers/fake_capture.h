/* What the fakes of CUDA and of HIP share beyond fake_core.h: pools, events, captures and graphs, whose
 * rules and results are the same in both. All of it is called with the lock held and returns a result.
 */
#include "fake_core.h"

enum { OK = 0, INVALID = 1, OOM = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, INVALID_DEVICE = 101,
       INVALID_IMAGE = 200, NO_CONTEXT = 201, NO_BINARY = 209, BAD_PTX = 218, BAD_HANDLE = 400, NOT_FOUND = 500,
       NOT_READY = 600, ILLEGAL_ADDRESS = 700, PEER_ALREADY = 704, ASSERT = 710, REGISTERED = 712,
       NOT_REGISTERED = 713, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALID = 901, CAPTURE_MERGE = 902,
       CAPTURE_UNMATCHED = 903, CAPTURE_UNJOINED = 904, CAPTURE_ISOLATION = 905, CAPTURED_EVENT = 907,
       WRONG_THREAD = 908 };
#define RELAXED 2
#define GONE 256

typedef struct Node { Op *op; int index; } Node;
typedef struct Graph { Node **nodes; int count, room; Node **from, **to; int edges, edge_room; } Graph;
typedef struct Capture { Graph *graph; int invalid, refs, mode; pthread_t thread; } Capture;
typedef struct Exec { int refs; Device *device; Graph *template; Op **ops; int count; } Exec;
typedef struct Event {
    Mark *mark; int timing, destroyed; Device *device; Capture *capture; Node **deps; int count;
} Event;

static int is_lost(int code) { return code == 214 || code == 700 || code == 709 || code == 710 || code == 719; }
static int illegal(void) { return ILLEGAL_ADDRESS; }

static int visible[MOST_DEVICES], reversed;

static Device *numbered(int index) { return index < 0 || index >= device_count ? NULL : &devices[visible[index]]; }
/* What a variable like CUDA_VISIBLE_DEVICES leaves of the devices: their numbers or their names, up to
 * the first that is neither. */
static void see(const char *const *variables, int count, void (*name_of)(int, char *)) {
    int left = device_count, seen[MOST_DEVICES];
    for (int i = 0; i < left; i++) seen[i] = i;
    for (int n = 0; n < count; n++) {
        const char *text = getenv(variables[n]);
        if (!text) continue;
        char copy[1024], *save = NULL;
        int next[MOST_DEVICES], kept = 0;
        snprintf(copy, sizeof copy, "%s", text);
        for (char *p = strtok_r(copy, ",", &save); p; p = strtok_r(NULL, ",", &save)) {
            int found = -1;
            for (int i = 0; i < left; i++) {
                char name[64];
                name_of(seen[i], name);
                if (!strcmp(name, p)) found = seen[i];
            }
            if (*p >= '0' && *p <= '9' && atoi(p) < left) found = seen[atoi(p)];
            if (found < 0 || kept == MOST_DEVICES) break;
            next[kept++] = found;
        }
        memcpy(seen, next, sizeof seen), left = kept;
    }
    memcpy(visible, seen, sizeof visible), device_count = left;
}

/* -- memory ------------------------------------------------------------------------------------------------ */

static int allocate(Device *device, uint64_t *out, size_t bytes, int kind) {
    if (!bytes) return INVALID;
    if (bytes > (kind == PINNED ? memory_bytes : room(device))) return OOM;
    *out = take(device, bytes, kind);
    return OK;
}
static int give(uint64_t ptr, int host) {
    Allocation *a = whole(ptr);
    if (!a || (a->kind == PINNED) != host || a->kind == REGION) return INVALID;
    drop(a);
    return OK;
}
static int pin(Device *device, uint64_t ptr, size_t bytes) {
    if (owner(ptr) || owner(ptr + bytes - 1)) return REGISTERED;
    Allocation *a = calloc(1, sizeof *a);
    *a = (Allocation){ptr, bytes, REGION, device, allocations, NULL};
    allocations = a;
    return OK;
}
static int unpin(uint64_t ptr) {
    Allocation *a = whole(ptr);
    if (!a || a->kind != REGION) return NOT_REGISTERED;
    drop(a);
    return OK;
}

/* A device is its own pool. */
static int pool_allocate(Device *device, uint64_t *out, size_t bytes, Stream *s) {
    if (s->capture) { s->capture->invalid = 1; return CAPTURE_UNSUPPORTED; }
    if (device->used + bytes > device->reserved) {
        if (bytes > room(device) + device->reserved - device->used) return OOM;
        device->reserved = device->used + bytes;
    }
    device->used += bytes;
    *out = take(device, bytes, POOLED);
    return OK;
}
static int submit(Stream *s, Op op);
static int pool_free(uint64_t ptr, Stream *s) {
    Allocation *a = whole(ptr);
    if (!a || a->kind != POOLED) return INVALID;
    if (s->capture) { s->capture->invalid = 1; return INVALID; }
    return submit(s, (Op){.what = FREE, .memory = a});
}
static uint64_t *pool_value(Device *p, int name) {
    return name == 4 ? &p->threshold : name == 5 ? &p->reserved : name == 7 ? &p->used : NULL;
}
static int pool_set(Device *p, int name, uint64_t value) {
    if (name != 4) return INVALID;
    p->threshold = value;
    return OK;
}
static int pool_get(Device *p, int name, uint64_t *value) {
    if (!pool_value(p, name)) return INVALID;
    *value = *pool_value(p, name);
    return OK;
}
static int pool_trim(Device *p, size_t keep) {
    uint64_t least = p->used > keep ? p->used : keep;
    if (p->reserved > least) p->reserved = least;
    return OK;
}
struct Access { int type, id, flags; };
static int pool_share(Device *p, const struct Access *access, size_t count) {
    for (size_t i = 0; i < count; i++) {
        Device *with = numbered(access[i].id);
        if (access[i].type != 1 || !with) return INVALID;
        unsigned bit = 1u << with->index;
        p->shared = access[i].flags == 3 ? p->shared | bit : p->shared & ~bit;
    }
    return OK;
}

/* -- streams and events: work is queued, or noted when the stream is being captured ------------------------ */

static void let(Capture *c) { if (c && !--c->refs) free(c); }
static Capture *hold(Capture *c) { if (c) c->refs++; return c; }
static int is_bad(Stream *s) { return s->capture && s->capture->invalid ? CAPTURE_INVALID : OK; }

static int submit(Stream *s, Op op) {
    op.mark = remark(op.mark);
    if (!s->capture) {
        Op *made = malloc(sizeof *made);
        *made = op, made->next = NULL;
        queue(s, made);
        return OK;
    }
    if (is_bad(s)) return CAPTURE_INVALID;
    Graph *g = s->capture->graph;
    if (g->count == g->room) g->nodes = realloc(g->nodes, (size_t)(g->room = g->room * 2 + 16) * sizeof *g->nodes);
    Node *node = calloc(1, sizeof *node);
    node->op = malloc(sizeof op);
    *node->op = op, node->index = g->count;
    g->nodes[g->count++] = node;
    for (int i = 0; i < s->count; i++) {
        if (g->edges == g->edge_room) {
            g->edge_room = g->edge_room * 2 + 16;
            g->from = realloc(g->from, (size_t)g->edge_room * sizeof *g->from);
            g->to = realloc(g->to, (size_t)g->edge_room * sizeof *g->to);
        }
        g->from[g->edges] = s->deps[i], g->to[g->edges++] = node;
    }
    s->deps = realloc(s->deps, sizeof *s->deps);
    s->deps[0] = node, s->count = 1;
    return OK;
}
static int set(Stream *s, uint64_t dst, uint32_t value, int width, size_t count, size_t pitch, size_t rows) {
    if (!owner(dst) || dst % (unsigned)width || pitch % (unsigned)width) return INVALID;
    if (rows > 1 && pitch < count * (unsigned)width) return INVALID;
    Op op = {.what = SET, .dst = dst, .width = width, .bytes = count, .pitch = pitch, .rows = rows};
    memcpy(op.pattern, &value, 4);
    return submit(s, op);
}
static int captures_in(Device *device) {
    for (Stream *s = streams; s; s = s->next)
        if (s->device == device && s->capture) return s->capture->invalid = 1;
    return 0;
}
/* All that was queued on a device is done. */
static int drained(Device *device) {
again:
    for (Stream *s = streams; s; s = s->next)
        if (s->device == device && s->head) {
            if (device->sticky) return device->sticky;
            pthread_cond_wait(&changed, &lock);
            goto again; /* the list may have changed */
        }
    return device->sticky;
}
static int stream_state(Stream *s) {
    Device *d = s->device;
    if (s->capture) { s->capture->invalid = 1; return CAPTURE_UNSUPPORTED; }
    if (!s->head && d->reserved > d->threshold) d->reserved = d->used > d->threshold ? d->used : d->threshold;
    return s->head ? NOT_READY : OK;
}
static int capture_state(Stream *s) { return !s->capture ? 0 : s->capture->invalid ? 2 : 1; }

static int new_event(Device *device, Event **out, unsigned flags) {
    *out = calloc(1, sizeof **out);
    (*out)->device = device, (*out)->timing = flags == 0;
    live_things++;
    return OK;
}
/* What waits for it still does. The last few are kept, so that using one of them is seen. */
static int drop_event(Event *e) {
    static Event *gone[GONE];
    static int next;
    if (e->destroyed) return BAD_HANDLE;
    unmark(e->mark), let(e->capture), free(e->deps);
    *e = (Event){.destroyed = 1};
    free(gone[next]), gone[next] = e, next = (next + 1) % GONE;
    live_things--;
    return OK;
}
static int wait_event(Stream *s, Event *e) {
    if (e->destroyed) return BAD_HANDLE;
    if (e->capture) {
        if (s->capture && s->capture != e->capture) return CAPTURE_MERGE;
        if (!s->capture) s->capture = hold(e->capture);
        s->deps = realloc(s->deps, (size_t)(s->count + e->count + 1) * sizeof *s->deps);
        for (int i = 0; i < e->count; i++) s->deps[s->count++] = e->deps[i];
        return OK;
    }
    if (s->capture) { s->capture->invalid = 1; return CAPTURE_ISOLATION; }
    return submit(s, (Op){.what = WAIT, .mark = e->mark});
}
static void unrecord(Event *e) {
    unmark(e->mark), let(e->capture);
    e->capture = NULL, e->mark = calloc(1, sizeof *e->mark), e->mark->refs = 1;
}
static int record_event(Event *e, Stream *s) {
    if (e->device != s->device) return BAD_HANDLE; /* a destroyed one has none */
    if (s->capture) {
        let(e->capture);
        e->capture = hold(s->capture), e->count = s->count;
        e->deps = realloc(e->deps, (size_t)(s->count + 1) * sizeof *e->deps);
        if (s->count) memcpy(e->deps, s->deps, (size_t)s->count * sizeof *e->deps);
        return OK;
    }
    unrecord(e);
    e->mark->left = 1;
    return submit(s, (Op){.what = RECORD, .mark = e->mark});
}
static int event_state(Event *e) {
    if (e->destroyed) return BAD_HANDLE;
    if (e->capture) { e->capture->invalid = 1; return CAPTURED_EVENT; } /* seen on an H100 */
    return !e->mark || e->mark->done ? OK : NOT_READY;
}
static int elapsed(float *out, Event *a, Event *b) {
    if (!a->timing || !b->timing || !a->mark || !b->mark) return BAD_HANDLE;
    if (!a->mark->done || !b->mark->done) return NOT_READY;
    *out = (float)((b->mark->at - a->mark->at) * 1e3);
    return OK;
}

/* -- kernels ------------------------------------------------------------------------------------------------- */

static int kernel_op(Op *op, Function *f, const unsigned *dims, unsigned shared, void **params) {
    for (int i = 0; i < 6; i++) if (!dims[i]) return INVALID;
    if (shared > (unsigned)f->dynamic || (uint64_t)dims[3] * dims[4] * dims[5] > 1024) return INVALID;
    *op = (Op){.what = KERNEL, .function = f, .params = pack(f, params)};
    memcpy(op->range.grid, dims, 12), memcpy(op->range.block, dims + 3, 12);
    op->range.shared = shared, op->range.count = (uint64_t)dims[0] * dims[1] * dims[2];
    return OK;
}

/* -- captures and graphs --------------------------------------------------------------------------------------- */

static int begin_capture(Stream *s, int mode) {
    if (s->capture) return CAPTURE_UNMATCHED;
    Capture *c = calloc(1, sizeof *c);
    c->graph = calloc(1, sizeof *c->graph), c->refs = 1;
    c->mode = mode, c->thread = pthread_self();
    live_things++;
    s->capture = c, s->count = 0;
    return OK;
}
static int behind(Graph *g, Node *node, Node **ends, int count, char *seen) {
    for (int i = 0; i < count; i++) if (ends[i] == node) return 1;
    for (int i = 0; i < g->edges; i++)
        if (g->from[i] == node && !seen[g->to[i]->index] && (seen[g->to[i]->index] = 1) &&
            behind(g, g->to[i], ends, count, seen)) return 1;
    return 0;
}
static int drop_graph(Graph *g) {
    for (int i = 0; i < g->count; i++) drop_op(g->nodes[i]->op), free(g->nodes[i]);
    free(g->nodes), free(g->from), free(g->to);
    free(g);
    live_things--;
    return OK;
}
static int end_capture(Stream *s, Graph **out) {
    *out = NULL;
    Capture *c = s->capture;
    if (!c) return CAPTURE_UNMATCHED;
    if (c->mode != RELAXED && !pthread_equal(c->thread, pthread_self())) return WRONG_THREAD;
    int code = c->invalid ? CAPTURE_INVALID : OK;
    for (Stream *each = streams; each; each = each->next) {
        if (each->capture != c) continue;
        for (int i = 0; each != s && i < each->count; i++) {
            char *seen = calloc(1, (size_t)c->graph->count + 1);
            if (!behind(c->graph, each->deps[i], s->deps, s->count, seen) && !code) code = CAPTURE_UNJOINED;
            free(seen);
        }
        if (each != s) each->capture = NULL, each->count = 0, let(c);
    }
    s->capture = NULL, s->count = 0;
    if (code) drop_graph(c->graph); else *out = c->graph;
    let(c);
    return code;
}
static int instantiate(Device *device, Exec **out, Graph *g) {
    Exec *e = calloc(1, sizeof *e);
    e->refs = 1, e->device = device, e->template = g, e->count = g->count;
    e->ops = malloc((size_t)(g->count + 1) * sizeof *e->ops);
    for (int i = 0; i < g->count; i++) e->ops[i] = copied(g->nodes[i]->op);
    live_things++;
    *out = e;
    return OK;
}
static int run_ops(Device *device, Exec *exec) {
    for (int i = 0; i < exec->count; i++) {
        int code = run_op(device, exec->ops[i]);
        if (code) return code;
    }
    return OK;
}
static void drop_exec(Exec *e) {
    if (--e->refs) return;
    for (int i = 0; i < e->count; i++) drop_op(e->ops[i]);
    free(e->ops), free(e);
}
static int destroy_exec(Exec *e) { drop_exec(e), live_things--; return OK; }
static int launch_graph(Exec *e, Stream *s) {
    Exec *now = malloc(sizeof *now); /* later changes do not reach it */
    *now = *e, now->refs = 1;
    now->ops = malloc((size_t)(e->count + 1) * sizeof *now->ops);
    for (int i = 0; i < e->count; i++) now->ops[i] = copied(e->ops[i]);
    int code = submit(s, (Op){.what = RUN, .exec = now});
    if (code) drop_exec(now);
    return code;
}
static int list_nodes(Graph *g, Node **nodes, size_t *count) {
    if (nodes) for (int i = 0; i < g->count; i++) nodes[i] = g->nodes[reversed ? g->count - 1 - i : i];
    *count = (size_t)g->count;
    return OK;
}
static int list_edges(Graph *g, Node **from, Node **to, size_t *count) {
    if (from) for (int i = 0; i < g->edges; i++) from[i] = g->from[i], to[i] = g->to[i];
    *count = (size_t)g->edges;
    return OK;
}
static int replace_kernel(Exec *e, Node *node, Op op) {
    if (e->template->count <= node->index || e->template->nodes[node->index] != node) { free(op.params); return INVALID; }
    drop_op(e->ops[node->index]);
    *(e->ops[node->index] = malloc(sizeof op)) = op;
    return OK;
}

/* A driver that is one shared library: the table of drivetrain_hal.h over a chip that is made of the
 * host's memory and a thread a stream. Replace what the chip does; keep the order of the file.
 *
 *     cc -shared -fPIC -std=gnu11 -O2 -pthread -I "$(python -c 'from drivetrain.hal import shared_library as s; print(s.INCLUDE)')" \
 *        -o libtinychip.so tinychip.c
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "drivetrain_hal.h"

enum { CHIPS = 2, ALIGNMENT = 64, MOST_QUEUED = 1 << 16 };

static uint64_t chip_bytes(void) {
    const char *text = getenv("TINYCHIP_MEMORY");
    uint64_t bytes = text ? strtoull(text, NULL, 10) : 0;
    return bytes ? bytes : UINT64_C(256) << 20;
}

/* -- failures: what the last call on this thread says ------------------------------------------ */

static _Thread_local dt_failure last;

static int fail(dt_status status, const char *text) {
    memset(&last, 0, sizeof last);
    last.native = (int32_t)status;
    snprintf(last.text, sizeof last.text, "%s", text);
    return (int)status;
}

static int failure(dt_failure *failure) {
    uint32_t size = failure->size;
    memcpy(failure, &last, size < sizeof last ? size : sizeof last);
    failure->size = size;
    return DT_OK;
}

/* -- the chip ----------------------------------------------------------------------------------- */

typedef struct chip chip;
typedef struct stream stream;

/* One recording of an event. */
typedef struct {
    int refs, done;
    int64_t at_ns;
} mark;

typedef struct {
    chip *chip;
    mark *mark; /* of the last record; NULL: never recorded, which counts as done */
    int timing;
} event;

typedef struct function {
    struct function *next;
    struct module *module;
    dt_cpu_kernel kernel;
    uint32_t count;
    int32_t *sizes;
} function;

/* Loaded code. It goes with the last of who hold it: the caller, and queued launches. */
typedef struct module {
    void *library;
    function *functions;
    _Atomic int refs;
} module;

typedef struct block {
    struct block *next, *previous;
    uint64_t nbytes;
    int leaving; /* a free is queued */
} block;

typedef enum { COPY, FILL, FREE, WAIT, RECORD, LAUNCH } kind;

typedef struct command {
    struct command *next;
    kind kind;
    char *dst;
    const char *src;
    uint64_t nbytes;
    void *held; /* freed when it is done: staged host memory, arguments */
    mark *mark;
    module *module;
    dt_cpu_kernel kernel;
    dt_cpu_range range;
    uint32_t width;
    char pattern[16];
} command;

struct stream {
    chip *chip;
    stream *next;
    command *first, **end;
    uint64_t queued, completed;
    int ending, failed;
    char failure[128];
};

struct chip {
    pthread_mutex_t lock;
    pthread_cond_t changed; /* anything below changed */
    stream *streams;
    block *blocks;
    uint64_t used, total;
    int leaving;  /* frees that are queued */
    int dropping; /* what has not begun is not done any more */
};

static int64_t now_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec * INT64_C(1000000000) + at.tv_nsec;
}

/* Wait for a change, until `deadline` of CLOCK_MONOTONIC; 0 once that passed. */
static int changed(chip *chip, int64_t deadline) {
    if (deadline == INT64_MAX) return pthread_cond_wait(&chip->changed, &chip->lock) == 0;
    struct timespec at = {deadline / 1000000000, deadline % 1000000000};
    return pthread_cond_timedwait(&chip->changed, &chip->lock, &at) != ETIMEDOUT;
}

static int64_t deadline_of(int64_t limit_ns) {
    int64_t now = now_ns();
    return limit_ns > INT64_MAX - now ? INT64_MAX : now + (limit_ns < 0 ? 0 : limit_ns);
}

static void release(mark *mark) {
    if (mark && --mark->refs == 0) free(mark);
}

static void let_go(module *module) {
    if (!module || --module->refs) return;
    while (module->functions) {
        function *function = module->functions;
        module->functions = function->next;
        free(function->sizes);
        free(function);
    }
    dlclose(module->library);
    free(module);
}

static void give_back(chip *chip, block *block) {
    if (block->previous) block->previous->next = block->next;
    else chip->blocks = block->next;
    if (block->next) block->next->previous = block->previous;
    chip->used -= block->nbytes;
    free(block);
}

/* -- queues: one thread a stream does its commands in order -------------------------------------- */

/* What needs no lock. A code other than 0 is a kernel's. */
static int do_command(command *command) {
    if (command->kind == COPY) memmove(command->dst, command->src, command->nbytes);
    if (command->kind == FILL)
        for (uint64_t i = 0; i < command->nbytes; i++)
            memcpy(command->dst + i * command->width, command->pattern, command->width);
    return command->kind == LAUNCH ? command->kernel(&command->range, (void **)command->held) : 0;
}

static void *run(void *argument) {
    stream *stream = argument;
    chip *chip = stream->chip;
    pthread_mutex_lock(&chip->lock);
    for (;;) {
        command *command = stream->first;
        if (!command) {
            if (stream->ending) break;
            changed(chip, INT64_MAX);
            continue;
        }
        while (command->kind == WAIT && !command->mark->done) changed(chip, INT64_MAX);
        int drop = chip->dropping;
        pthread_mutex_unlock(&chip->lock);
        int code = drop ? 0 : do_command(command);
        let_go(command->module);
        pthread_mutex_lock(&chip->lock);
        if (code && !stream->failed) {
            stream->failed = 1;
            snprintf(stream->failure, sizeof stream->failure, "a kernel returned %d", code);
        }
        if (command->kind == FREE) {
            give_back(chip, (block *)(command->dst - ALIGNMENT));
            chip->leaving--;
        }
        if (command->kind == RECORD) {
            command->mark->at_ns = now_ns();
            command->mark->done = 1;
        }
        release(command->mark);
        stream->first = command->next;
        if (!stream->first) stream->end = &stream->first;
        free(command->held);
        free(command);
        stream->completed++;
        pthread_cond_broadcast(&chip->changed);
    }
    struct stream **at = &chip->streams;
    while (*at != stream) at = &(*at)->next;
    *at = stream->next;
    free(stream);
    pthread_cond_broadcast(&chip->changed);
    pthread_mutex_unlock(&chip->lock);
    return NULL;
}

/* Takes the command, also when it cannot be queued. With the chip's lock held. */
static int queue_locked(stream *stream, command *command) {
    while (stream->queued - stream->completed >= MOST_QUEUED) changed(stream->chip, INT64_MAX);
    *stream->end = command;
    stream->end = &command->next;
    stream->queued++;
    pthread_cond_broadcast(&stream->chip->changed);
    return DT_OK;
}

static int queue(stream *stream, command *command) {
    pthread_mutex_lock(&stream->chip->lock);
    int status = queue_locked(stream, command);
    pthread_mutex_unlock(&stream->chip->lock);
    return status;
}

static command *new_command(kind kind) {
    command *made = calloc(1, sizeof *made);
    if (made) made->kind = kind;
    return made;
}

/* -- discovery and sensors: nothing is opened ---------------------------------------------------- */

static int discover(dt_device_facts *facts, uint32_t *count) {
    for (uint32_t i = 0; i < CHIPS && i < *count; i++) {
        uint32_t size = facts[i].size;
        if (size < sizeof *facts) return fail(DT_INVALID, "the caller is older than this driver");
        memset(&facts[i], 0, sizeof *facts);
        facts[i].size = size;
        facts[i].index = i;
        facts[i].memory_bytes = chip_bytes();
        snprintf(facts[i].name, sizeof facts[i].name, "Tiny chip %u", i);
        snprintf(facts[i].vendor, sizeof facts[i].vendor, "tiny");
        snprintf(facts[i].uuid, sizeof facts[i].uuid, "TINY-%u", i);
        snprintf(facts[i].driver_version, sizeof facts[i].driver_version, "1");
        snprintf(facts[i].compute, sizeof facts[i].compute, "tiny-1");
        snprintf(facts[i].visible, sizeof facts[i].visible, "TINYCHIP_VISIBLE=%u", i);
        snprintf(facts[i].features, sizeof facts[i].features, "fake"); /* a real chip: leave it out */
    }
    *count = CHIPS;
    return DT_OK;
}

static int telemetry(uint32_t index, dt_readings *readings) {
    if (index >= CHIPS) return fail(DT_LOST, "there is no such chip");
    readings->memory_total_bytes = (int64_t)chip_bytes();
    readings->temperature_c = 40.0 + index; /* the rest stays as the caller set it: absent */
    return DT_OK;
}

/* -- open, close, limits -------------------------------------------------------------------------- */

static int open_chip(uint32_t index, void **device) {
    if (index >= CHIPS) return fail(DT_LOST, "there is no such chip");
    chip *made = calloc(1, sizeof *made);
    if (!made) return fail(DT_OUT_OF_MEMORY, "the host has no memory");
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_mutex_init(&made->lock, NULL);
    pthread_cond_init(&made->changed, &clock);
    pthread_condattr_destroy(&clock);
    made->total = chip_bytes();
    *device = made;
    return DT_OK;
}

static int close_chip(void *device) {
    chip *chip = device;
    int64_t deadline = deadline_of(INT64_C(5000000000));
    pthread_mutex_lock(&chip->lock);
    for (stream *each = chip->streams; each; each = each->next) each->ending = 1;
    pthread_cond_broadcast(&chip->changed);
    while (chip->streams)
        if (!changed(chip, deadline)) {
            if (chip->dropping) {
                pthread_mutex_unlock(&chip->lock); /* left to itself, with all it may touch */
                return fail(DT_FAILED, "a kernel has not ended within 10 s; it goes on");
            }
            chip->dropping = 1;
            deadline = deadline_of(INT64_C(5000000000));
        }
    while (chip->blocks) give_back(chip, chip->blocks);
    pthread_mutex_unlock(&chip->lock);
    pthread_cond_destroy(&chip->changed);
    pthread_mutex_destroy(&chip->lock);
    free(chip);
    return DT_OK;
}

static int limits(void *device, dt_device_limits *told) {
    (void)device;
    told->alignment = ALIGNMENT;
    told->grid[0] = 0x7fffffff, told->grid[1] = told->grid[2] = 65535;
    told->block[0] = told->block[1] = 1024, told->block[2] = 64;
    told->threads = 1024;
    told->shared_bytes = 1 << 20;
    /* Kernels come as shared objects made by the host's compiler, as those of the cpu do. */
    snprintf(told->target_kind, sizeof told->target_kind, "cpu");
    snprintf(told->target_features, sizeof told->target_features, "fp64");
    return DT_OK;
}

static int memory(void *device, uint64_t *free_bytes, uint64_t *total_bytes) {
    chip *chip = device;
    pthread_mutex_lock(&chip->lock);
    *free_bytes = chip->total - chip->used;
    *total_bytes = chip->total;
    pthread_mutex_unlock(&chip->lock);
    return DT_OK;
}

static int all_done(chip *chip) {
    for (stream *each = chip->streams; each; each = each->next)
        if (each->completed < each->queued) return 0;
    return 1;
}

static int synchronize(void *device, int64_t limit_ns) {
    chip *chip = device;
    int64_t deadline = deadline_of(limit_ns);
    pthread_mutex_lock(&chip->lock);
    int done;
    while (!(done = all_done(chip)) && changed(chip, deadline)) {}
    pthread_mutex_unlock(&chip->lock);
    return done ? DT_OK : DT_LATE;
}

/* -- memory ---------------------------------------------------------------------------------------- */

static int alloc(void *device, uint64_t nbytes, uint32_t kind, void *on, uint64_t *address) {
    (void)on;
    chip *chip = device;
    if (kind > 1) return fail(DT_UNSUPPORTED, "there is no managed memory");
    pthread_mutex_lock(&chip->lock);
    int64_t deadline = deadline_of(INT64_C(1000000000));
    while (nbytes > chip->total - chip->used && chip->leaving && changed(chip, deadline)) {}
    uint64_t free_bytes = chip->total - chip->used;
    block *block = NULL;
    if (nbytes <= free_bytes &&
        posix_memalign((void **)&block, ALIGNMENT, ALIGNMENT + (nbytes ? nbytes : 1)) == 0) {
        *block = (struct block){chip->blocks, NULL, nbytes, 0};
        if (block->next) block->next->previous = block;
        chip->blocks = block;
        chip->used += nbytes;
    } else
        block = NULL;
    pthread_mutex_unlock(&chip->lock);
    if (!block) {
        fail(DT_OUT_OF_MEMORY, "the chip is full");
        last.requested = nbytes, last.free = free_bytes, last.total = chip->total;
        return DT_OUT_OF_MEMORY;
    }
    *address = (uint64_t)(uintptr_t)block + ALIGNMENT;
    return DT_OK;
}

static int free_memory(void *device, uint64_t address, uint32_t kind, void *on) {
    (void)kind;
    chip *chip = device;
    command *command = new_command(FREE);
    if (!command) return fail(DT_OUT_OF_MEMORY, "the host has no memory");
    command->dst = (char *)(uintptr_t)address;
    pthread_mutex_lock(&chip->lock);
    block *found = chip->blocks; /* a real driver asks its vendor's library */
    while (found && (char *)found + ALIGNMENT != command->dst) found = found->next;
    int known = found && !found->leaving;
    if (known && on) {
        found->leaving = 1;
        chip->leaving++;
        queue_locked(on, command);
    } else {
        free(command);
        if (known) give_back(chip, found);
    }
    pthread_mutex_unlock(&chip->lock);
    return known ? DT_OK : fail(DT_INVALID, "there is no allocation at this address");
}

static int copy(void *device, uint64_t dst, uint64_t src, uint64_t nbytes, uint32_t way, void *on,
                int host_free) {
    (void)device;
    command *command = new_command(COPY);
    if (!command) return fail(DT_OUT_OF_MEMORY, "the host has no memory");
    command->dst = (char *)(uintptr_t)dst;
    command->src = (const char *)(uintptr_t)src;
    command->nbytes = nbytes;
    if (host_free && way <= 1 && nbytes) { /* the source is the host's, who may reuse it at once */
        command->held = malloc(nbytes);
        if (!command->held) {
            free(command);
            return fail(DT_OUT_OF_MEMORY, "the host has no memory to stage a copy");
        }
        command->src = memcpy(command->held, command->src, nbytes);
    }
    return queue(on, command);
}

static int fill(void *device, uint64_t address, const void *pattern, uint32_t width, uint64_t count,
                void *on) {
    (void)device;
    if (!width || width > 16 || width & (width - 1)) return fail(DT_INVALID, "an odd pattern");
    command *command = new_command(FILL);
    if (!command) return fail(DT_OUT_OF_MEMORY, "the host has no memory");
    command->dst = (char *)(uintptr_t)address;
    command->nbytes = count;
    command->width = width;
    memcpy(command->pattern, pattern, width);
    return queue(on, command);
}

/* -- streams ---------------------------------------------------------------------------------------- */

static int stream_create(void *device, int32_t priority, void **made) {
    (void)priority;
    chip *chip = device;
    stream *stream = calloc(1, sizeof *stream);
    if (!stream) return fail(DT_OUT_OF_MEMORY, "the host has no memory");
    stream->chip = chip;
    stream->end = &stream->first;
    pthread_mutex_lock(&chip->lock);
    stream->next = chip->streams;
    chip->streams = stream;
    pthread_mutex_unlock(&chip->lock);
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    int code = pthread_create(&thread, &attributes, run, stream);
    pthread_attr_destroy(&attributes);
    if (code) {
        pthread_mutex_lock(&chip->lock);
        struct stream **at = &chip->streams;
        while (*at != stream) at = &(*at)->next;
        *at = stream->next;
        pthread_mutex_unlock(&chip->lock);
        free(stream);
        return fail(DT_FAILED, "no thread can be started");
    }
    *made = stream;
    return DT_OK;
}

static int stream_destroy(void *on) {
    stream *stream = on;
    chip *chip = stream->chip; /* the stream may be gone once the lock is */
    pthread_mutex_lock(&chip->lock);
    stream->ending = 1; /* its thread does what is left, then frees it */
    pthread_cond_broadcast(&chip->changed);
    pthread_mutex_unlock(&chip->lock);
    return DT_OK;
}

static int stream_synchronize(void *on, int64_t limit_ns) {
    stream *stream = on;
    int64_t deadline = deadline_of(limit_ns);
    pthread_mutex_lock(&stream->chip->lock);
    uint64_t until = stream->queued;
    while (stream->completed < until && changed(stream->chip, deadline)) {}
    int status = stream->completed < until ? DT_LATE : DT_OK;
    if (status == DT_OK && stream->failed) { /* told once */
        stream->failed = 0;
        status = fail(DT_FAILED, stream->failure);
    }
    pthread_mutex_unlock(&stream->chip->lock);
    return status;
}

static int stream_done(void *on) { return stream_synchronize(on, 0); }

/* -- events ----------------------------------------------------------------------------------------- */

static int event_create(void *device, int timing, void **made) {
    event *event = calloc(1, sizeof *event);
    if (!event) return fail(DT_OUT_OF_MEMORY, "the host has no memory");
    event->chip = device;
    event->timing = timing;
    *made = event;
    return DT_OK;
}

static int event_destroy(void *of) {
    event *event = of;
    pthread_mutex_lock(&event->chip->lock);
    release(event->mark);
    pthread_mutex_unlock(&event->chip->lock);
    free(event);
    return DT_OK;
}

static int event_record(void *of, void *on) {
    event *event = of;
    command *command = new_command(RECORD);
    mark *mark = calloc(1, sizeof *mark);
    if (!command || !mark) {
        free(command);
        free(mark);
        return fail(DT_OUT_OF_MEMORY, "the host has no memory");
    }
    mark->refs = 2; /* the event's, the command's */
    command->mark = mark;
    pthread_mutex_lock(&event->chip->lock);
    release(event->mark);
    event->mark = mark;
    int status = queue_locked(on, command);
    pthread_mutex_unlock(&event->chip->lock);
    return status;
}

static int stream_wait(void *on, void *of) {
    event *event = of;
    command *command = new_command(WAIT);
    if (!command) return fail(DT_OUT_OF_MEMORY, "the host has no memory");
    pthread_mutex_lock(&event->chip->lock);
    mark *mark = event->mark;
    if (mark) {
        mark->refs++;
        command->mark = mark;
        queue_locked(on, command);
    } else
        free(command);
    pthread_mutex_unlock(&event->chip->lock);
    return DT_OK;
}

static int event_synchronize(void *of, int64_t limit_ns) {
    event *event = of;
    int64_t deadline = deadline_of(limit_ns);
    pthread_mutex_lock(&event->chip->lock);
    mark *mark = event->mark;
    int done = 1;
    if (mark) {
        mark->refs++;
        while (!(done = mark->done) && changed(event->chip, deadline)) {}
        release(mark);
    }
    pthread_mutex_unlock(&event->chip->lock);
    return done ? DT_OK : DT_LATE;
}

static int event_done(void *of) { return event_synchronize(of, 0); }

static int event_seconds(void *start, void *end, double *seconds) {
    event *first = start, *second = end;
    pthread_mutex_lock(&first->chip->lock);
    int fine = first->timing && second->timing && first->mark && first->mark->done &&
               second->mark && second->mark->done;
    if (fine) *seconds = (double)(second->mark->at_ns - first->mark->at_ns) / 1e9;
    pthread_mutex_unlock(&first->chip->lock);
    return fine ? DT_OK : fail(DT_INVALID, "both events must be made for timing, recorded and done");
}

/* -- kernels ---------------------------------------------------------------------------------------- */

static int module_load(void *device, const void *code, uint64_t nbytes, const char *form,
                       void **made) {
    (void)device;
    if (strcmp(form, "so")) return fail(DT_UNSUPPORTED, "only shared objects (form so) are taken");
    static _Atomic unsigned loaded;
    char path[160];
    int file = memfd_create("tinychip", MFD_CLOEXEC);
    module *module = calloc(1, sizeof *module);
    if (file < 0 || !module || write(file, code, nbytes) != (ssize_t)nbytes) {
        if (file >= 0) close(file);
        free(module);
        return fail(DT_OUT_OF_MEMORY, "the host has no memory");
    }
    /* The loader knows a library by its path, and numbers of files come again: make it a new one. */
    unsigned number = loaded++;
    size_t at = (size_t)snprintf(path, sizeof path, "/proc/self/fd/");
    for (int bit = 0; bit < 32; bit++)
        at += (size_t)snprintf(path + at, sizeof path - at, number >> bit & 1 ? ".//" : "./");
    snprintf(path + at, sizeof path - at, "%d", file);
    module->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    close(file);
    if (!module->library) {
        free(module);
        return fail(DT_REJECTED, dlerror());
    }
    module->refs = 1;
    *made = module;
    return DT_OK;
}

static int module_unload(void *of) {
    let_go(of); /* what was queued still runs */
    return DT_OK;
}

static int function_find(void *of, const char *symbol, void **made) {
    char name[512];
    snprintf(name, sizeof name, "dt_cpu_%s", symbol);
    module *module = of;
    void *kernel = dlsym(module->library, name);
    if (!kernel) return fail(DT_NO_SUCH_KERNEL, "the module exports no such kernel");
    function *found = calloc(1, sizeof *found);
    if (!found) return fail(DT_OUT_OF_MEMORY, "the host has no memory");
    memcpy(&found->kernel, &kernel, sizeof kernel);
    found->module = module;
    static pthread_mutex_t finding = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&finding);
    found->next = module->functions;
    module->functions = found;
    pthread_mutex_unlock(&finding);
    *made = found;
    return DT_OK;
}

static int function_arguments(void *of, const int32_t *sizes, uint32_t count) {
    function *function = of;
    int32_t *copied = malloc((count ? count : 1) * sizeof *sizes);
    if (!copied) return fail(DT_OUT_OF_MEMORY, "the host has no memory");
    memcpy(copied, sizes, count * sizeof *sizes);
    free(function->sizes);
    function->sizes = copied;
    function->count = count;
    return DT_OK;
}

static int launch(void *of, const uint32_t grid[3], const uint32_t block[3], uint32_t shared,
                  void *on, void **arguments) {
    function *function = of;
    size_t room = function->count * (sizeof(void *) + 16); /* addresses, then 16-byte slots */
    for (uint32_t i = 0; i < function->count; i++)
        if (function->sizes[i] > 16) room += (size_t)function->sizes[i];
    command *command = new_command(LAUNCH);
    char *held = command ? malloc(room + 16) : NULL;
    if (!held) {
        free(command);
        return fail(DT_OUT_OF_MEMORY, "the host has no memory");
    }
    void **addresses = (void **)held;
    char *value = held + ((function->count * sizeof(void *) + 15) & ~(size_t)15);
    for (uint32_t i = 0; i < function->count; i++) {
        int32_t size = function->sizes[i] < 0 ? -function->sizes[i] : function->sizes[i];
        addresses[i] = memcpy(value, arguments[i], (size_t)size);
        value += (size + 15) & ~15;
    }
    command->held = held;
    command->kernel = function->kernel;
    command->module = function->module;
    command->module->refs++;
    for (int i = 0; i < 3; i++) {
        command->range.grid[i] = grid[i];
        command->range.block[i] = block[i];
    }
    command->range.shared = shared;
    command->range.count = (uint64_t)grid[0] * grid[1] * grid[2];
    return queue(on, command);
}

/* -- the table -------------------------------------------------------------------------------------- */

static const dt_driver_v1 table = {
    .size = sizeof(dt_driver_v1),
    .version = 1,
    .name = "tinychip",
    .vendor = "tiny",
    .groups = "compute pinned timing",
    .install = "build libtinychip.so: see the beginning of tinychip.c",
    .failure = failure,
    .discover = discover,
    .telemetry = telemetry,
    .open = open_chip,
    .close = close_chip,
    .limits = limits,
    .memory = memory,
    .synchronize = synchronize,
    .alloc = alloc,
    .free = free_memory,
    .copy = copy,
    .fill = fill,
    .stream_create = stream_create,
    .stream_destroy = stream_destroy,
    .stream_done = stream_done,
    .stream_synchronize = stream_synchronize,
    .stream_wait = stream_wait,
    .event_create = event_create,
    .event_destroy = event_destroy,
    .event_record = event_record,
    .event_done = event_done,
    .event_synchronize = event_synchronize,
    .event_seconds = event_seconds,
    .module_load = module_load,
    .module_unload = module_unload,
    .function_find = function_find,
    .function_arguments = function_arguments,
    .launch = launch,
};

const dt_driver_v1 *drivetrain_driver_v1(void);
const dt_driver_v1 *drivetrain_driver_v1(void) { return &table; }

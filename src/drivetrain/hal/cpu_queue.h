/* What the C files of the cpu device share; users include drivetrain_hal.h.
 *
 * Locks, in the order in which they are taken: a device's `mutex`, an event's `mutex`, a mark's
 * `mutex`, a device's `memory.mutex`, the shells'. No two devices' are held at once.
 *
 * Streams and events are shells that are reused and never freed, so that a handle which was let go
 * can be told from a live one: its `device` is NULL.
 */
#ifndef DRIVETRAIN_CPU_QUEUE_H
#define DRIVETRAIN_CPU_QUEUE_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#include "drivetrain_hal.h"

#define DT_INSIDE __attribute__((visibility("hidden")))

/* -- marks: one recording of an event ---------------------------------------------------------- */

enum { MARK_OPEN = 0, MARK_AWAITED = 1, MARK_DONE = 2 };

typedef struct {
    pthread_mutex_t mutex;
    _Atomic uint32_t state;
    _Atomic uint32_t refs;
    int64_t at_ns;
    dt_cpu_stream *waiting; /* streams, by next_waiting */
} dt_mark;

DT_INSIDE void dt_mark_release(dt_mark *mark);
DT_INSIDE void dt_mark_signal(dt_mark *mark);
/* 1: done. 0: the stream was noted and will be made ready. */
DT_INSIDE int dt_mark_await(dt_mark *mark, dt_cpu_stream *stream);

/* -- memory ------------------------------------------------------------------------------------ */

typedef struct {
    char *address; /* NULL: an empty slot */
    char *base;    /* what malloc or mmap gave */
    size_t nbytes;
    size_t mapped; /* bytes of the mapping, 0 for malloc's */
    int leaving;   /* a free is queued */
} dt_allocation;

typedef struct {
    pthread_mutex_t mutex;
    dt_allocation *slots; /* open addressing, linear probing */
    size_t room, used;
    size_t leaving;                /* frees that are queued */
    _Atomic uint32_t left;         /* changes when `leaving` becomes 0; waited for */
    _Atomic uint64_t allowance;
    int guards, closed;
} dt_memory;

/* Begin to free: the allocation is gone for every other caller. Its mapped bytes in *mapped. */
DT_INSIDE int dt_memory_leave(dt_memory *memory, void *address, size_t *mapped);
DT_INSIDE void dt_memory_free(dt_memory *memory, void *address);
DT_INSIDE void dt_memory_free_all(dt_memory *memory);

/* -- kernels ----------------------------------------------------------------------------------- */

#define DT_SYMBOL_BYTES 128

struct dt_cpu_module {
    dt_cpu_module *next;
    void *library;
    _Atomic uint32_t refs; /* the owner's and one a queued launch */
    dt_cpu_function *functions;
};

struct dt_cpu_function {
    dt_cpu_function *next;
    dt_cpu_module *module;
    dt_cpu_kernel entry;
    int32_t *sizes;
    size_t values;         /* bytes of all arguments, each at a multiple of 8 or 16 */
    _Atomic int32_t count; /* -1 until the sizes are told */
    _Atomic uint64_t cost; /* ns * 256 a thread, a running mean; 0: not known */
    char symbol[DT_SYMBOL_BYTES];
};

DT_INSIDE void dt_module_release(dt_cpu_module *module);

/* -- commands ---------------------------------------------------------------------------------- */

typedef enum { DT_RUN, DT_COPY, DT_FILL, DT_FREE, DT_RECORD, DT_WAIT } dt_command_kind;

#define DT_COMMAND_ROOM 352 /* bytes of arguments that need no memory of their own */
#define DT_LINE 64          /* bytes of a cache line */

/* What the caller writes comes first and close together, and what only a worker writes stands in a
 * line of its own: a command that is used again has its lines in the worker's cache, and each that
 * the caller writes must come from there. */
typedef struct dt_command dt_command;
struct dt_command {
    _Alignas(DT_LINE) dt_command *next;
    dt_cpu_stream *stream;
    void *payload; /* malloc's, freed with the command */
    dt_command_kind kind;
    _Atomic int code;
    union {
        struct {
            dt_cpu_function *function;
            dt_cpu_range range;
            void **arguments;
        } run;
        struct {
            char *dst;
            const char *src;
            size_t nbytes;
        } copy;
        struct {
            char *dst;
            size_t nbytes;
            unsigned char pattern[16];
        } fill;
        void *address;
        dt_mark *mark;
    } as;
    _Alignas(16) unsigned char room[DT_COMMAND_ROOM];
    /* While its parts are shared out: */
    _Alignas(DT_LINE) dt_command *next_job;
    uint64_t parts, step;
    _Atomic uint64_t taken;
    unsigned users; /* workers inside; under the device's mutex */
    int listed;     /* the same */
    _Atomic uint64_t failed_at;
};

/* -- streams, events, devices ------------------------------------------------------------------ */

struct dt_cpu_stream {
    _Atomic(dt_cpu *) device;
    dt_cpu_stream *before, *after; /* of the device's streams */
    dt_cpu_stream *next_ready, *next_waiting;
    dt_command *first, *last;
    dt_command *batch; /* taken from them by whoever has the stream */
    int priority;
    int scheduled; /* ready, run, or waiting for a mark: somebody will see to it */
    int destroyed;
    unsigned users; /* callers that wait inside */
    uint64_t queued;
    _Atomic uint64_t finished;
    _Atomic uint64_t wake_at; /* the callers are woken when so many are finished */
    _Atomic uint32_t signal;
    int failed;
    dt_cpu_failure failure;
};

struct dt_cpu_event {
    pthread_mutex_t mutex;
    _Atomic(dt_cpu *) device;
    dt_cpu_event *before, *after;
    int timing;
    dt_mark *mark; /* NULL: never recorded */
};

struct dt_cpu {
    pthread_mutex_t mutex;
    _Atomic uint32_t generation; /* of the process, counted by forks */
    int closed;          /* refuses new work */
    _Atomic int dropping; /* work that has not begun is dropped */
    int stop;            /* the workers end */
    dt_cpu_stream *streams;
    dt_cpu_event *events;
    dt_cpu_module *modules;
    dt_cpu_stream *ready; /* by priority, first come first */
    dt_command *jobs;     /* commands whose parts are shared out, likewise */
    _Atomic unsigned ready_count;
    _Atomic uint32_t sequence; /* changes when there is something to do */
    _Atomic unsigned sleeping, spinning;
    unsigned busy;             /* streams that are scheduled */
    _Atomic uint32_t idle;     /* changes when `busy` becomes 0 */
    dt_command *spare;
    unsigned spares;
    int failed; /* of a stream that is gone */
    dt_cpu_failure failure;
    dt_memory memory;
    dt_cpu *next_free;
    int *cores;
    size_t core_count;
    unsigned threads, lookers;
    pthread_t *thread;
};

DT_INSIDE extern _Atomic uint32_t dt_generation;

/* Locks the device that owns the stream, with room in its queue; else says why not. */
DT_INSIDE int dt_stream_begin(dt_cpu_stream *stream, dt_cpu **device);
/* The same for what needs only a live device. */
DT_INSIDE int dt_device_begin(dt_cpu *device);
/* With the mutex held: a command to fill in, or NULL; and what gives it back. */
DT_INSIDE dt_command *dt_command_new(dt_cpu *device, dt_command_kind kind);
DT_INSIDE void dt_command_free(dt_cpu *device, dt_command *command);
/* What the command held; without the mutex, since a module may end here. */
DT_INSIDE void dt_command_release(dt_command *command);
/* With the mutex held, which it gives back: queue the command; and wait until it is done. */
DT_INSIDE void dt_stream_append(dt_cpu *device, dt_cpu_stream *stream, dt_command *command);
DT_INSIDE int dt_stream_append_and_wait(dt_cpu *device, dt_cpu_stream *stream, dt_command *command,
                                        int64_t limit_ns);
/* The caller does a small thing itself while the stream is idle; others may queue behind it. The
 * first is called with the mutex held and gives it back, the second without it. */
DT_INSIDE void dt_caller_takes(dt_cpu *device, dt_cpu_stream *stream);
DT_INSIDE void dt_caller_did(dt_cpu *device, dt_cpu_stream *stream);
DT_INSIDE void dt_fill(char *dst, size_t nbytes, const unsigned char pattern[16]);
/* A stream that waited for a mark goes on. */
DT_INSIDE void dt_stream_ready(dt_cpu_stream *stream);
/* With the mutex held: let go of every event. */
DT_INSIDE void dt_events_close(dt_cpu *device);

DT_INSIDE int64_t dt_now_ns(void);
/* Sleep while *word is `value`, at most limit_ns (below 0: no limit). */
DT_INSIDE void dt_sleep(_Atomic uint32_t *word, uint32_t value, int64_t limit_ns);
DT_INSIDE void dt_wake(_Atomic uint32_t *word, unsigned most);

/* Begin to fetch a cache line that is written soon. */
static inline void dt_fetch_to_write(const void *at) {
#if defined(__x86_64__) || defined(__i386__)
    __asm__ volatile("prefetchw %0" : : "m"(*(const char *)at));
#else
    __builtin_prefetch(at, 1);
#endif
}

#define DT_SPIN_NS 40000 /* how long a waiter looks before it sleeps */

static inline void dt_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#endif

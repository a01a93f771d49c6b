#define _GNU_SOURCE /* affinity, futex */
#include "cpu_queue.h"

#ifdef __linux__

#include <errno.h>
#include <linux/futex.h>
#include <limits.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MOST_QUEUED UINT64_C(32768) /* commands of one stream; then the caller waits */
#define PART_BYTES ((size_t)256 << 10)
#define SPLIT_FROM ((size_t)1 << 20)
#define IN_A_ROW 32             /* commands of one stream before another's turn */
#define ALONE_NS 20000          /* kernels that take less are not worth waking others for */
#define PART_NS 200000          /* the most that a part of a kernel should take */
#define PARTS_A_WORKER 8
#define STACK_BYTES ((size_t)8 << 20)
#define SHORTEST_SPIN_NS 2000

/* -- time, sleep ------------------------------------------------------------------------------- */

int64_t dt_now_ns(void) {
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (int64_t)at.tv_sec * INT64_C(1000000000) + at.tv_nsec;
}

void dt_sleep(_Atomic uint32_t *word, uint32_t value, int64_t limit_ns) {
    struct timespec limit = {limit_ns / INT64_C(1000000000), limit_ns % INT64_C(1000000000)};
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, limit_ns < 0 ? NULL : &limit, NULL, 0);
}

void dt_wake(_Atomic uint32_t *word, unsigned most) {
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, most > INT_MAX ? INT_MAX : (int)most, NULL, NULL,
            0);
}

/* -- forks, shells ----------------------------------------------------------------------------- */

_Atomic uint32_t dt_generation;

static pthread_mutex_t shells_mutex = PTHREAD_MUTEX_INITIALIZER;
static dt_cpu_stream *shells;
static dt_cpu *device_shells;

static void before_fork(void) { pthread_mutex_lock(&shells_mutex); }
static void after_fork(void) { pthread_mutex_unlock(&shells_mutex); }
static void after_fork_in_child(void) {
    atomic_fetch_add(&dt_generation, 1);
    pthread_mutex_unlock(&shells_mutex);
}
static void watch_forks(void) { pthread_atfork(before_fork, after_fork, after_fork_in_child); }

int dt_device_begin(dt_cpu *device) {
    if (!device) return DT_CPU_INVALID;
    if (atomic_load_explicit(&device->generation, memory_order_relaxed) !=
        atomic_load_explicit(&dt_generation, memory_order_relaxed))
        return DT_CPU_FORKED;
    pthread_mutex_lock(&device->mutex);
    if (!device->closed) return DT_CPU_OK;
    pthread_mutex_unlock(&device->mutex);
    return DT_CPU_CLOSED;
}

/* Locks the device of a stream that was not destroyed. */
static int stream_lock(dt_cpu_stream *stream, dt_cpu **device) {
    if (!stream) return DT_CPU_INVALID;
    dt_cpu *found = atomic_load_explicit(&stream->device, memory_order_acquire);
    if (!found) return DT_CPU_CLOSED;
    int status = dt_device_begin(found);
    if (status) return status;
    if (atomic_load_explicit(&stream->device, memory_order_relaxed) != found ||
        stream->destroyed) {
        pthread_mutex_unlock(&found->mutex);
        return DT_CPU_CLOSED;
    }
    *device = found;
    return DT_CPU_OK;
}

/* With the mutex held: a stream that was let go and that nobody looks at becomes a shell again. */
static void maybe_recycle(dt_cpu *device, dt_cpu_stream *stream) {
    if (!stream->destroyed || stream->scheduled || stream->users) return;
    if (stream->before) stream->before->after = stream->after;
    else device->streams = stream->after;
    if (stream->after) stream->after->before = stream->before;
    if (stream->failed && !device->failed) {
        device->failed = 1;
        device->failure = stream->failure;
    }
    atomic_store(&stream->device, NULL);
    pthread_mutex_lock(&shells_mutex);
    stream->after = shells;
    shells = stream;
    pthread_mutex_unlock(&shells_mutex);
}

/* -- scheduling -------------------------------------------------------------------------------- */

static void notify(dt_cpu *device, unsigned count) {
    atomic_fetch_add(&device->sequence, 1);
    unsigned spinning = atomic_load(&device->spinning);
    if (atomic_load(&device->sleeping) && spinning < count)
        dt_wake(&device->sequence, count - spinning);
}

static void push_ready(dt_cpu *device, dt_cpu_stream *stream) {
    dt_cpu_stream **link = &device->ready;
    while (*link && (*link)->priority <= stream->priority) link = &(*link)->next_ready;
    stream->next_ready = *link;
    *link = stream;
    atomic_fetch_add_explicit(&device->ready_count, 1, memory_order_relaxed);
}

static void push_job(dt_cpu *device, dt_command *job) {
    dt_command **link = &device->jobs;
    while (*link && (*link)->stream->priority <= job->stream->priority) link = &(*link)->next_job;
    job->next_job = *link;
    *link = job;
    job->listed = 1;
}

static void unlist(dt_cpu *device, dt_command *job) {
    if (!job->listed) return;
    dt_command **link = &device->jobs;
    while (*link != job) link = &(*link)->next_job;
    *link = job->next_job;
    job->listed = 0;
}

void dt_stream_ready(dt_cpu_stream *stream) {
    dt_cpu *device = atomic_load(&stream->device);
    pthread_mutex_lock(&device->mutex);
    push_ready(device, stream);
    pthread_mutex_unlock(&device->mutex);
    notify(device, 1);
}

void dt_stream_append(dt_cpu *device, dt_cpu_stream *stream, dt_command *command) {
    int idle = !stream->scheduled;
    command->stream = stream;
    if (stream->last) stream->last->next = command;
    else stream->first = command;
    stream->last = command;
    stream->queued++;
    if (idle) {
        stream->scheduled = 1;
        device->busy++;
        push_ready(device, stream);
    }
    pthread_mutex_unlock(&device->mutex);
    if (idle) notify(device, 1);
}

/* By whoever has the stream, without the mutex: one more is finished. A caller that waits says for
 * how many, looks again, and sleeps; both in this order, so that one of the two sees the other. */
static void count_finished(dt_cpu *device, dt_cpu_stream *stream) {
    uint64_t finished = atomic_load_explicit(&stream->finished, memory_order_relaxed) + 1;
    atomic_store(&stream->finished, finished);
    if (finished < atomic_load(&stream->wake_at)) return;
    pthread_mutex_lock(&device->mutex);
    atomic_store(&stream->wake_at, UINT64_MAX);
    atomic_fetch_add(&stream->signal, 1);
    pthread_mutex_unlock(&device->mutex);
    dt_wake(&stream->signal, UINT_MAX);
}

/* With the mutex held: nothing is left to do on the stream. */
static void rest(dt_cpu *device, dt_cpu_stream *stream) {
    stream->scheduled = 0;
    if (--device->busy == 0) {
        atomic_fetch_add(&device->idle, 1);
        if (device->closed) dt_wake(&device->idle, UINT_MAX);
    }
    maybe_recycle(device, stream);
}

void dt_caller_takes(dt_cpu *device, dt_cpu_stream *stream) {
    stream->scheduled = 1;
    stream->queued++;
    device->busy++;
    pthread_mutex_unlock(&device->mutex);
}

void dt_caller_did(dt_cpu *device, dt_cpu_stream *stream) {
    count_finished(device, stream);
    pthread_mutex_lock(&device->mutex);
    int more = stream->first != NULL;
    if (more) push_ready(device, stream);
    else rest(device, stream);
    pthread_mutex_unlock(&device->mutex);
    if (more) notify(device, 1);
}

/* -- doing ------------------------------------------------------------------------------------- */

static uint64_t threads_of(const dt_cpu_range *range) {
    return (uint64_t)range->block[0] * range->block[1] * range->block[2];
}

static void run_blocks(dt_command *command, uint64_t first, uint64_t count) {
    dt_cpu_function *function = command->as.run.function;
    dt_cpu_range range = command->as.run.range;
    range.first = first;
    range.count = count;
    int64_t began = dt_now_ns();
    int code = function->entry(&range, command->as.run.arguments);
    double ns = (double)(dt_now_ns() - began);
    uint64_t cost = (uint64_t)(ns * 256 / ((double)count * (double)threads_of(&range))) + 1;
    uint64_t known = atomic_load_explicit(&function->cost, memory_order_relaxed);
    atomic_store_explicit(&function->cost, known ? (3 * known + cost) / 4 : cost,
                          memory_order_relaxed);
    if (!code) return;
    int none = 0;
    if (atomic_compare_exchange_strong(&command->code, &none, code))
        atomic_store(&command->failed_at, first);
    atomic_store(&command->taken, command->parts); /* nobody begins another part */
}

static void do_parts(dt_command *command, uint64_t first, uint64_t count) {
    if (command->kind == DT_RUN) {
        run_blocks(command, first, count);
        return;
    }
    size_t whole = command->kind == DT_COPY ? command->as.copy.nbytes : command->as.fill.nbytes;
    size_t at = (size_t)first * PART_BYTES, nbytes = (size_t)count * PART_BYTES;
    if (nbytes > whole - at) nbytes = whole - at;
    if (command->kind == DT_COPY)
        dt_copy(command->as.copy.dst + at, command->as.copy.src + at, nbytes);
    else dt_fill(command->as.fill.dst + at, nbytes, command->as.fill.pattern);
}

/* How many parts there are and how many are taken at once. */
static void plan(const dt_cpu *device, dt_command *command) {
    command->step = 1;
    if (command->kind != DT_RUN) {
        size_t nbytes = command->kind == DT_COPY ? command->as.copy.nbytes : command->as.fill.nbytes;
        command->parts = (nbytes + PART_BYTES - 1) / PART_BYTES;
        if (nbytes < SPLIT_FROM) command->step = command->parts;
        return;
    }
    const dt_cpu_range *range = &command->as.run.range;
    uint64_t blocks = (uint64_t)range->grid[0] * range->grid[1] * range->grid[2];
    uint64_t cost = atomic_load_explicit(&command->as.run.function->cost, memory_order_relaxed);
    double block_ns = (double)cost * (double)threads_of(range) / 256;
    uint64_t step = blocks / (device->threads * (uint64_t)PARTS_A_WORKER);
    if (cost && block_ns * (double)blocks < ALONE_NS) step = blocks;
    else if (cost && block_ns * (double)step > PART_NS) step = (uint64_t)(PART_NS / block_ns);
    command->parts = blocks;
    command->step = step ? step : 1;
}

/* Take parts until there are none or a stream wants a worker. 1: all is done and the command is
 * this worker's; 0: others see to it. Without the mutex, on entry and return. */
static int take_parts(dt_cpu *device, dt_command *command) {
    for (;;) {
        uint64_t first = atomic_fetch_add(&command->taken, command->step);
        if (first >= command->parts) break;
        uint64_t left = command->parts - first;
        do_parts(command, first, left < command->step ? left : command->step);
        if (atomic_load_explicit(&device->ready_count, memory_order_relaxed)) break;
    }
    pthread_mutex_lock(&device->mutex);
    int none_left = atomic_load(&command->taken) >= command->parts;
    if (none_left) unlist(device, command);
    int last = --command->users == 0 && none_left;
    pthread_mutex_unlock(&device->mutex);
    return last;
}

/* 1: done, 0: others go on with it. */
static int execute(dt_cpu *device, dt_cpu_stream *stream, dt_command *command) {
    switch (command->kind) {
    case DT_RECORD:
        dt_mark_signal(command->as.mark);
        return 1;
    case DT_WAIT:
        return dt_mark_await(command->as.mark, stream);
    case DT_FREE:
        dt_memory_free(&device->memory, command->as.address);
        return 1;
    default:
        break;
    }
    if (atomic_load_explicit(&device->dropping, memory_order_relaxed)) return 1;
    plan(device, command);
    atomic_store(&command->taken, 0);
    command->users = 1;
    command->listed = 0;
    if (command->step >= command->parts) {
        do_parts(command, 0, command->parts);
        return 1;
    }
    uint64_t chunks = (command->parts + command->step - 1) / command->step;
    pthread_mutex_lock(&device->mutex);
    push_job(device, command);
    pthread_mutex_unlock(&device->mutex);
    unsigned helpers = device->threads - 1;
    if (chunks - 1 < helpers) helpers = (unsigned)(chunks - 1);
    if (helpers) notify(device, helpers);
    return take_parts(device, command);
}

/* What the codes of translated kernels mean; see prelude_cpu.h. */
static const char *meaning(int code) {
    if (code == 1) return " (out of memory)";
    if (code == 2) return " (a block of more than 1024 threads)";
    if (code == 3) return " (a barrier that not all threads of a block reach)";
    return "";
}

static void note_failure(dt_cpu_stream *stream, const dt_command *command, int code) {
    if (stream->failed) return;
    const dt_cpu_range *range = &command->as.run.range;
    stream->failed = 1;
    stream->failure.code = code;
    snprintf(stream->failure.text, sizeof stream->failure.text,
             "%s returned %d%s in or after block %llu of a grid of %ux%ux%u",
             command->as.run.function->symbol, code, meaning(code),
             (unsigned long long)atomic_load(&command->failed_at), range->grid[0], range->grid[1],
             range->grid[2]);
}

/* With the mutex held: the next few commands become the stream's batch, which belongs to whoever
 * has the stream. */
static void take_batch(dt_cpu_stream *stream) {
    dt_command *last = stream->first;
    for (int i = 1; i < IN_A_ROW && last->next; i++) last = last->next;
    stream->batch = stream->first;
    stream->first = last->next;
    if (!stream->first) stream->last = NULL;
    last->next = NULL;
}

/* With the mutex held. */
static void give_spent_back(dt_cpu *device, dt_command *spent) {
    while (spent) {
        dt_command *next = spent->next;
        dt_command_free(device, spent);
        spent = next;
    }
}

/* Do the stream's batch. 1: it is done, 0: somebody else goes on with it. `done`: its first command
 * is done already. The commands that were used up in *spent. */
static int do_batch(dt_cpu *device, dt_cpu_stream *stream, int done, dt_command **spent) {
    for (dt_command *command; (command = stream->batch); done = 0) {
        if (!done && !execute(device, stream, command)) return 0;
        if (atomic_load(&command->code)) {
            pthread_mutex_lock(&device->mutex);
            note_failure(stream, command, atomic_load(&command->code));
            pthread_mutex_unlock(&device->mutex);
        }
        dt_command_release(command);
        stream->batch = command->next;
        command->next = *spent;
        *spent = command;
        count_finished(device, stream);
    }
    return 1;
}

/* With the mutex held, which it gives back. `done`: the first command of its batch is done. */
static void run_stream(dt_cpu *device, dt_cpu_stream *stream, int done) {
    for (int again = 0;; again = 1) {
        dt_command *spent = NULL;
        if (!stream->batch) {
            if (!stream->first) {
                rest(device, stream);
                break;
            }
            if (again && (device->ready || device->jobs)) {
                push_ready(device, stream);
                break;
            }
            take_batch(stream);
        }
        pthread_mutex_unlock(&device->mutex);
        int mine = do_batch(device, stream, done, &spent);
        done = 0;
        pthread_mutex_lock(&device->mutex);
        give_spent_back(device, spent);
        if (!mine) break;
    }
    pthread_mutex_unlock(&device->mutex);
}

/* -- workers ----------------------------------------------------------------------------------- */

static void set_up_thread(const dt_cpu *device) {
    if (device->core_count) {
        int most = 0;
        for (size_t i = 0; i < device->core_count; i++)
            if (device->cores[i] > most) most = device->cores[i];
        cpu_set_t *set = CPU_ALLOC((size_t)most + 1);
        if (set) {
            size_t size = CPU_ALLOC_SIZE((size_t)most + 1);
            CPU_ZERO_S(size, set);
            for (size_t i = 0; i < device->core_count; i++)
                CPU_SET_S((size_t)device->cores[i], size, set);
            /* Cores that were taken away since discovery: then wherever the process may run. */
            sched_setaffinity(0, size, set);
            CPU_FREE(set);
        }
    }
    /* Rounding and denormals as a new process has them, whatever the opening thread set. */
#if defined(__x86_64__)
    __builtin_ia32_ldmxcsr(0x1F80);
#elif defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
#endif
    pthread_setname_np(pthread_self(), "drivetrain-cpu");
}

/* Look for a short while, then sleep. What is found while looking makes the next look longer. Few
 * look at a time: the caller and whoever else runs here need the cores. */
static void wait_for_work(dt_cpu *device, uint32_t seen, int64_t *spin_ns) {
    int found = 0;
    if (atomic_fetch_add(&device->spinning, 1) < device->lookers) {
        int64_t until = dt_now_ns() + *spin_ns;
        while (!(found = atomic_load(&device->sequence) != seen) && dt_now_ns() < until)
            for (int i = 0; i < 4; i++) dt_relax();
        if (found) *spin_ns = *spin_ns * 2 < DT_SPIN_NS ? *spin_ns * 2 : DT_SPIN_NS;
        else if (*spin_ns / 2 >= SHORTEST_SPIN_NS) *spin_ns /= 2;
    }
    atomic_fetch_sub(&device->spinning, 1);
    if (found) return;
    atomic_fetch_add(&device->sleeping, 1);
    dt_sleep(&device->sequence, seen, -1);
    atomic_fetch_sub(&device->sleeping, 1);
}

static dt_command *first_job(dt_cpu *device) {
    while (device->jobs &&
           atomic_load(&device->jobs->taken) >= device->jobs->parts)
        unlist(device, device->jobs);
    return device->jobs;
}

static void *work(void *argument) {
    dt_cpu *device = argument;
    int64_t spin_ns = DT_SPIN_NS;
    int turn = 0;
    set_up_thread(device);
    for (;;) {
        uint32_t seen = atomic_load(&device->sequence);
        pthread_mutex_lock(&device->mutex);
        dt_cpu_stream *stream = device->ready;
        dt_command *job = first_job(device);
        if (device->stop) break;
        if (!stream && !job) {
            pthread_mutex_unlock(&device->mutex);
            wait_for_work(device, seen, &spin_ns);
            continue;
        }
        if (stream && job) {
            turn = !turn;
            if (job->stream->priority < stream->priority ||
                (job->stream->priority == stream->priority && turn))
                stream = NULL;
        }
        if (stream) {
            device->ready = stream->next_ready;
            atomic_fetch_sub_explicit(&device->ready_count, 1, memory_order_relaxed);
        } else {
            job->users++;
        }
        /* Whoever takes something sees to it that the rest is found. */
        if (device->ready || (stream && job)) notify(device, 1);
        if (stream) {
            run_stream(device, stream, 0);
            continue;
        }
        pthread_mutex_unlock(&device->mutex);
        dt_cpu_stream *owner = job->stream;
        if (take_parts(device, job)) {
            pthread_mutex_lock(&device->mutex);
            run_stream(device, owner, 1);
        }
    }
    pthread_mutex_unlock(&device->mutex);
    return NULL;
}

/* -- open, close ------------------------------------------------------------------------------- */

static void stop_workers(dt_cpu *device) {
    pthread_mutex_lock(&device->mutex);
    device->stop = 1;
    pthread_mutex_unlock(&device->mutex);
    atomic_fetch_add(&device->sequence, 1);
    dt_wake(&device->sequence, UINT_MAX);
    for (unsigned i = 0; i < device->threads; i++) pthread_join(device->thread[i], NULL);
}

static void device_free(dt_cpu *device) {
    for (dt_command *each = device->spare, *next; each; each = next) {
        next = each->next;
        free(each);
    }
    dt_memory_free_all(&device->memory);
    free(device->cores);
    free(device->thread);
    device->spare = NULL;
    device->spares = 0;
    device->cores = NULL;
    device->thread = NULL;
    pthread_mutex_lock(&shells_mutex);
    device->next_free = device_shells;
    device_shells = device;
    pthread_mutex_unlock(&shells_mutex);
}

static dt_cpu *device_shell(void) {
    pthread_mutex_lock(&shells_mutex);
    dt_cpu *device = device_shells;
    if (device) device_shells = device->next_free;
    pthread_mutex_unlock(&shells_mutex);
    if (device) return device;
    device = calloc(1, sizeof *device);
    if (!device) return NULL;
    /* Held for well under a microsecond: looking again is cheaper than sleeping. */
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_settype(&attributes, PTHREAD_MUTEX_ADAPTIVE_NP);
    pthread_mutex_init(&device->mutex, &attributes);
    pthread_mutexattr_destroy(&attributes);
    pthread_mutex_init(&device->memory.mutex, NULL);
    device->closed = 1;
    return device;
}

static void start_workers(dt_cpu *device, unsigned threads) {
    pthread_attr_t attributes;
    sigset_t all, before;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK_BYTES);
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    /* The number is read by the workers that run already. */
    for (unsigned i = 0; i < threads; i++) {
        if (pthread_create(&device->thread[i], &attributes, work, device)) break;
        pthread_mutex_lock(&device->mutex);
        device->threads++;
        pthread_mutex_unlock(&device->mutex);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
}

dt_cpu *dt_cpu_open(const int *cores, size_t count, unsigned threads, int guards) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    if (!threads || threads > 4096 || count > 1 << 20) return NULL;
    for (size_t i = 0; i < count; i++)
        if (cores[i] < 0 || cores[i] >= 1 << 20) return NULL;
    dt_cpu *device = device_shell();
    if (!device) return NULL;
    device->cores = malloc((count ? count : 1) * sizeof *device->cores);
    device->thread = malloc(threads * sizeof *device->thread);
    pthread_mutex_lock(&device->mutex);
    pthread_mutex_lock(&device->memory.mutex);
    device->memory.guards = guards;
    device->memory.closed = 0;
    atomic_store(&device->memory.allowance, 0);
    pthread_mutex_unlock(&device->memory.mutex);
    atomic_store(&device->generation, atomic_load(&dt_generation));
    atomic_store(&device->dropping, 0);
    device->stop = device->failed = 0;
    device->threads = 0;
    device->core_count = count;
    device->lookers = threads / 4 ? threads / 4 : 1;
    if (device->cores && count) memcpy(device->cores, cores, count * sizeof *cores);
    pthread_mutex_unlock(&device->mutex);
    if (device->cores && device->thread) start_workers(device, threads);
    if (!device->threads) {
        device_free(device);
        return NULL;
    }
    pthread_mutex_lock(&device->mutex);
    device->closed = 0;
    pthread_mutex_unlock(&device->mutex);
    return device;
}

/* Whether no stream has anything left to do, within the limit. */
static int became_idle(dt_cpu *device, int64_t limit_ns) {
    int64_t began = dt_now_ns();
    for (;;) {
        uint32_t seen = atomic_load(&device->idle);
        pthread_mutex_lock(&device->mutex);
        unsigned busy = device->busy;
        pthread_mutex_unlock(&device->mutex);
        if (!busy) return 1;
        int64_t left = limit_ns < 0 ? -1 : limit_ns - (dt_now_ns() - began);
        if (limit_ns >= 0 && left <= 0) return 0;
        dt_sleep(&device->idle, seen, left);
    }
}

int dt_cpu_close(dt_cpu *device, int64_t limit_ns) {
    int status = dt_device_begin(device);
    if (status) return status;
    device->closed = 1;
    pthread_mutex_unlock(&device->mutex);
    if (!became_idle(device, limit_ns)) {
        atomic_store(&device->dropping, 1);
        if (!became_idle(device, limit_ns / 4)) return DT_CPU_LATE;
    }
    stop_workers(device);
    pthread_mutex_lock(&device->mutex);
    for (dt_cpu_stream *each = device->streams, *next; each; each = next) {
        next = each->after;
        each->destroyed = 1;
        maybe_recycle(device, each); /* or the last caller that waits inside does it */
    }
    dt_events_close(device);
    dt_cpu_module *modules = device->modules;
    device->modules = NULL;
    pthread_mutex_unlock(&device->mutex);
    for (dt_cpu_module *next; modules; modules = next) {
        next = modules->next;
        dt_module_release(modules);
    }
    /* Callers that wait inside still look at the device: it stays theirs. */
    for (;;) {
        pthread_mutex_lock(&device->mutex);
        int left = device->streams != NULL;
        pthread_mutex_unlock(&device->mutex);
        if (!left) break;
        sched_yield();
    }
    device_free(device);
    return DT_CPU_OK;
}

/* -- streams ----------------------------------------------------------------------------------- */

/* With the mutex held, on entry and return: wait until `target` commands are finished. */
static int wait_finished(dt_cpu *device, dt_cpu_stream *stream, uint64_t target, int64_t limit_ns) {
    if (atomic_load_explicit(&stream->finished, memory_order_acquire) >= target) return DT_CPU_OK;
    if (!limit_ns) return DT_CPU_LATE;
    int status = DT_CPU_OK;
    stream->users++;
    pthread_mutex_unlock(&device->mutex);
    int64_t began = dt_now_ns(), spin = began + DT_SPIN_NS;
    if (limit_ns > 0 && limit_ns < DT_SPIN_NS) spin = began + limit_ns;
    while (atomic_load_explicit(&stream->finished, memory_order_acquire) < target &&
           dt_now_ns() < spin)
        for (int i = 0; i < 4; i++) dt_relax();
    pthread_mutex_lock(&device->mutex);
    while (atomic_load_explicit(&stream->finished, memory_order_acquire) < target) {
        int64_t left = limit_ns < 0 ? -1 : limit_ns - (dt_now_ns() - began);
        if (limit_ns >= 0 && left <= 0) {
            status = DT_CPU_LATE;
            break;
        }
        if (target < atomic_load(&stream->wake_at)) atomic_store(&stream->wake_at, target);
        uint32_t seen = atomic_load(&stream->signal);
        pthread_mutex_unlock(&device->mutex);
        if (atomic_load(&stream->finished) < target) dt_sleep(&stream->signal, seen, left);
        pthread_mutex_lock(&device->mutex);
    }
    stream->users--;
    return status;
}

int dt_stream_append_and_wait(dt_cpu *device, dt_cpu_stream *stream, dt_command *command,
                              int64_t limit_ns) {
    uint64_t target = stream->queued + 1;
    stream->users++;
    dt_stream_append(device, stream, command);
    pthread_mutex_lock(&device->mutex);
    int status = wait_finished(device, stream, target, limit_ns);
    stream->users--;
    maybe_recycle(device, stream);
    pthread_mutex_unlock(&device->mutex);
    return status;
}

int dt_stream_begin(dt_cpu_stream *stream, dt_cpu **device) {
    int status = stream_lock(stream, device);
    if (status) return status;
    if (stream->queued - atomic_load_explicit(&stream->finished, memory_order_relaxed) <
        MOST_QUEUED)
        return DT_CPU_OK;
    wait_finished(*device, stream, stream->queued - MOST_QUEUED / 2, -1);
    if (!stream->destroyed && !(*device)->closed) return DT_CPU_OK;
    maybe_recycle(*device, stream);
    pthread_mutex_unlock(&(*device)->mutex);
    return DT_CPU_CLOSED;
}

int dt_cpu_stream_new(dt_cpu *device, int priority, dt_cpu_stream **stream) {
    int status = dt_device_begin(device);
    if (status) return status;
    pthread_mutex_lock(&shells_mutex);
    dt_cpu_stream *made = shells;
    if (made) shells = made->after;
    pthread_mutex_unlock(&shells_mutex);
    if (!made) made = calloc(1, sizeof *made);
    if (!made) {
        pthread_mutex_unlock(&device->mutex);
        return DT_CPU_NO_MEMORY;
    }
    made->first = made->last = NULL;
    made->priority = priority;
    made->scheduled = made->destroyed = made->failed = 0;
    made->users = 0;
    made->queued = 0;
    atomic_store(&made->finished, 0);
    made->batch = NULL;
    atomic_store(&made->wake_at, UINT64_MAX);
    made->before = NULL;
    made->after = device->streams;
    if (made->after) made->after->before = made;
    device->streams = made;
    atomic_store(&made->device, device);
    pthread_mutex_unlock(&device->mutex);
    *stream = made;
    return DT_CPU_OK;
}

int dt_cpu_stream_destroy(dt_cpu_stream *stream) {
    dt_cpu *device;
    int status = stream_lock(stream, &device);
    if (status) return status;
    stream->destroyed = 1;
    maybe_recycle(device, stream);
    pthread_mutex_unlock(&device->mutex);
    return DT_CPU_OK;
}

/* With the mutex held: tell a failure once. */
static int tell(dt_cpu_stream *stream, int status, dt_cpu_failure *failure) {
    if (!stream->failed) return status;
    stream->failed = 0;
    if (failure) *failure = stream->failure;
    return DT_CPU_FAILED;
}

int dt_cpu_stream_done(dt_cpu_stream *stream, dt_cpu_failure *failure) {
    return dt_cpu_stream_synchronize(stream, 0, failure);
}

int dt_cpu_stream_synchronize(dt_cpu_stream *stream, int64_t limit_ns, dt_cpu_failure *failure) {
    dt_cpu *device;
    int status = stream_lock(stream, &device);
    if (status) return status;
    status = tell(stream, wait_finished(device, stream, stream->queued, limit_ns), failure);
    maybe_recycle(device, stream);
    pthread_mutex_unlock(&device->mutex);
    return status;
}

int dt_cpu_synchronize(dt_cpu *device, int64_t limit_ns, dt_cpu_failure *failure) {
    int status = dt_device_begin(device);
    if (status) return status;
    size_t count = 0;
    for (dt_cpu_stream *each = device->streams; each; each = each->after) count++;
    struct {
        dt_cpu_stream *stream;
        uint64_t target;
    } *noted = malloc((count ? count : 1) * sizeof *noted);
    if (!noted) {
        pthread_mutex_unlock(&device->mutex);
        return DT_CPU_NO_MEMORY;
    }
    count = 0;
    for (dt_cpu_stream *each = device->streams; each; each = each->after) {
        each->users++;
        noted[count].stream = each;
        noted[count++].target = each->queued;
    }
    int64_t began = dt_now_ns();
    for (size_t i = 0; i < count; i++) {
        dt_cpu_stream *stream = noted[i].stream;
        int64_t left = limit_ns < 0 ? -1 : limit_ns - (dt_now_ns() - began);
        if (limit_ns >= 0 && left < 0) left = 0;
        int each = wait_finished(device, stream, noted[i].target, left);
        if (status != DT_CPU_FAILED) {
            each = tell(stream, each, failure);
            if (each) status = each;
        }
        stream->users--;
        maybe_recycle(device, stream);
    }
    if (status != DT_CPU_FAILED && device->failed) {
        device->failed = 0;
        if (failure) *failure = device->failure;
        status = DT_CPU_FAILED;
    }
    pthread_mutex_unlock(&device->mutex);
    free(noted);
    return status;
}


#else
typedef int dt_queue_needs_linux;
#endif

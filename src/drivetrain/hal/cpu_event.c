#define _GNU_SOURCE
#include "cpu_queue.h"

#ifdef __linux__

#include <stdlib.h>
#include <string.h>

/* -- marks ------------------------------------------------------------------------------------- */

static dt_mark *mark_new(void) {
    dt_mark *mark = calloc(1, sizeof *mark);
    if (!mark) return NULL;
    pthread_mutex_init(&mark->mutex, NULL);
    atomic_init(&mark->refs, 1);
    return mark;
}

void dt_mark_release(dt_mark *mark) {
    if (!mark || atomic_fetch_sub(&mark->refs, 1) != 1) return;
    pthread_mutex_destroy(&mark->mutex);
    free(mark);
}

void dt_mark_signal(dt_mark *mark) {
    pthread_mutex_lock(&mark->mutex);
    mark->at_ns = dt_now_ns();
    dt_cpu_stream *waiting = mark->waiting;
    mark->waiting = NULL;
    uint32_t before = atomic_exchange(&mark->state, MARK_DONE);
    pthread_mutex_unlock(&mark->mutex);
    if (before == MARK_AWAITED) dt_wake(&mark->state, UINT32_MAX);
    while (waiting) {
        dt_cpu_stream *next = waiting->next_waiting;
        dt_stream_ready(waiting);
        waiting = next;
    }
}

int dt_mark_await(dt_mark *mark, dt_cpu_stream *stream) {
    pthread_mutex_lock(&mark->mutex);
    int done = atomic_load(&mark->state) == MARK_DONE;
    if (!done) {
        stream->next_waiting = mark->waiting;
        mark->waiting = stream;
    }
    pthread_mutex_unlock(&mark->mutex);
    return done;
}

static int mark_done(const dt_mark *mark) {
    return !mark || atomic_load_explicit(&mark->state, memory_order_acquire) == MARK_DONE;
}

/* -- events ------------------------------------------------------------------------------------ */

static pthread_mutex_t shells_mutex = PTHREAD_MUTEX_INITIALIZER;
static dt_cpu_event *shells;

static void before_fork(void) { pthread_mutex_lock(&shells_mutex); }
static void after_fork(void) { pthread_mutex_unlock(&shells_mutex); }
static void watch_forks(void) { pthread_atfork(before_fork, after_fork, after_fork); }

int dt_cpu_event_new(dt_cpu *device, int timing, dt_cpu_event **event) {
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, watch_forks);
    int status = dt_device_begin(device);
    if (status) return status;
    pthread_mutex_lock(&shells_mutex);
    dt_cpu_event *made = shells;
    if (made) shells = made->after;
    pthread_mutex_unlock(&shells_mutex);
    if (!made) {
        made = calloc(1, sizeof *made);
        if (!made) {
            pthread_mutex_unlock(&device->mutex);
            return DT_CPU_NO_MEMORY;
        }
        pthread_mutex_init(&made->mutex, NULL);
    }
    pthread_mutex_lock(&made->mutex);
    made->timing = timing;
    made->mark = NULL;
    made->before = NULL;
    made->after = device->events;
    if (made->after) made->after->before = made;
    device->events = made;
    atomic_store(&made->device, device);
    pthread_mutex_unlock(&made->mutex);
    pthread_mutex_unlock(&device->mutex);
    *event = made;
    return DT_CPU_OK;
}

/* With the device's mutex held. */
static void let_go(dt_cpu *device, dt_cpu_event *event) {
    if (event->before) event->before->after = event->after;
    else device->events = event->after;
    if (event->after) event->after->before = event->before;
    pthread_mutex_lock(&event->mutex);
    dt_mark *mark = event->mark;
    event->mark = NULL;
    atomic_store(&event->device, NULL);
    pthread_mutex_unlock(&event->mutex);
    dt_mark_release(mark);
    pthread_mutex_lock(&shells_mutex);
    event->after = shells;
    shells = event;
    pthread_mutex_unlock(&shells_mutex);
}

void dt_events_close(dt_cpu *device) {
    while (device->events) let_go(device, device->events);
}

/* Locks the event, with its device alive; else says why not. */
static int begin(dt_cpu_event *event) {
    if (!event) return DT_CPU_INVALID;
    dt_cpu *device = atomic_load(&event->device);
    if (!device) return DT_CPU_CLOSED;
    if (atomic_load(&device->generation) != atomic_load(&dt_generation)) return DT_CPU_FORKED;
    pthread_mutex_lock(&event->mutex);
    if (atomic_load(&event->device)) return DT_CPU_OK;
    pthread_mutex_unlock(&event->mutex);
    return DT_CPU_CLOSED;
}

int dt_cpu_event_destroy(dt_cpu_event *event) {
    if (!event) return DT_CPU_INVALID;
    dt_cpu *device = atomic_load(&event->device);
    if (!device) return DT_CPU_CLOSED;
    int status = dt_device_begin(device);
    if (status) return status;
    if (atomic_load(&event->device) == device) let_go(device, event);
    else status = DT_CPU_CLOSED;
    pthread_mutex_unlock(&device->mutex);
    return status;
}

int dt_cpu_event_record(dt_cpu_event *event, dt_cpu_stream *stream) {
    dt_cpu *device;
    int status = dt_stream_begin(stream, &device);
    if (status) return status;
    status = begin(event);
    if (status) {
        pthread_mutex_unlock(&device->mutex);
        return status;
    }
    dt_mark *mark = event->mark, *gone = NULL;
    /* A mark that nobody else knows can be used again. */
    if (!mark || atomic_load(&mark->refs) != 1) {
        gone = mark;
        mark = mark_new();
    }
    dt_command *command = NULL;
    if (mark && stream->scheduled) {
        command = dt_command_new(device, DT_RECORD);
        if (!command && mark != event->mark) {
            dt_mark_release(mark);
            mark = NULL;
        }
    }
    if (!mark || (stream->scheduled && !command)) {
        pthread_mutex_unlock(&event->mutex);
        pthread_mutex_unlock(&device->mutex);
        return DT_CPU_NO_MEMORY;
    }
    event->mark = mark;
    if (!command) {
        mark->at_ns = event->timing ? dt_now_ns() : 0;
        atomic_store(&mark->state, MARK_DONE);
        pthread_mutex_unlock(&event->mutex);
        pthread_mutex_unlock(&device->mutex);
    } else {
        atomic_store(&mark->state, MARK_OPEN);
        atomic_fetch_add(&mark->refs, 1);
        command->as.mark = mark;
        pthread_mutex_unlock(&event->mutex);
        dt_stream_append(device, stream, command);
    }
    dt_mark_release(gone);
    return DT_CPU_OK;
}

int dt_cpu_event_done(dt_cpu_event *event) {
    int status = begin(event);
    if (status) return status;
    status = mark_done(event->mark) ? DT_CPU_OK : DT_CPU_LATE;
    pthread_mutex_unlock(&event->mutex);
    return status;
}

/* The event's mark while it is open, with a reference; NULL when it is done. */
static int open_mark(dt_cpu_event *event, dt_mark **mark) {
    int status = begin(event);
    if (status) return status;
    *mark = mark_done(event->mark) ? NULL : event->mark;
    if (*mark) atomic_fetch_add(&(*mark)->refs, 1);
    pthread_mutex_unlock(&event->mutex);
    return DT_CPU_OK;
}

int dt_cpu_event_synchronize(dt_cpu_event *event, int64_t limit_ns) {
    dt_mark *mark;
    int status = open_mark(event, &mark);
    if (status || !mark) return status;
    int64_t began = dt_now_ns(), spent = 0;
    while (!mark_done(mark)) {
        spent = dt_now_ns() - began;
        if (limit_ns >= 0 && spent >= limit_ns) {
            status = DT_CPU_LATE;
            break;
        }
        if (spent < DT_SPIN_NS) {
            for (int i = 0; i < 4; i++) dt_relax();
            continue;
        }
        uint32_t open = MARK_OPEN;
        atomic_compare_exchange_strong(&mark->state, &open, MARK_AWAITED);
        dt_sleep(&mark->state, MARK_AWAITED, limit_ns < 0 ? -1 : limit_ns - spent);
    }
    dt_mark_release(mark);
    return status;
}

int dt_cpu_event_time(dt_cpu_event *event, int64_t *at_ns) {
    int status = begin(event);
    if (status) return status;
    if (event->timing && event->mark && mark_done(event->mark)) *at_ns = event->mark->at_ns;
    else status = DT_CPU_INVALID;
    pthread_mutex_unlock(&event->mutex);
    return status;
}

int dt_cpu_stream_wait(dt_cpu_stream *stream, dt_cpu_event *event) {
    dt_mark *mark;
    dt_cpu *device;
    int status = open_mark(event, &mark);
    if (status) return status;
    status = dt_stream_begin(stream, &device);
    if (status || !mark) {
        if (!status) pthread_mutex_unlock(&device->mutex);
        dt_mark_release(mark);
        return status;
    }
    dt_command *command = dt_command_new(device, DT_WAIT);
    if (!command) {
        pthread_mutex_unlock(&device->mutex);
        dt_mark_release(mark);
        return DT_CPU_NO_MEMORY;
    }
    command->as.mark = mark;
    dt_stream_append(device, stream, command);
    return DT_CPU_OK;
}

#else
typedef int dt_event_needs_linux;
#endif

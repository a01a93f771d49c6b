#include "opencl_event.h"

#include <stdatomic.h>
#include <stdlib.h>

typedef int (*marker)(void *queue, unsigned count, const void *waits, void **event);
typedef int (*count_change)(void *event);

struct dt_cl_event {
    atomic_flag lock; /* held for a few instructions and clRetainEvent */
    void *event;      /* of the last recording */
    void *queue;      /* where, while nobody has asked for the event */
    uintptr_t marker, retain, release;
};

static void lock(dt_cl_event *self) {
    while (atomic_flag_test_and_set_explicit(&self->lock, memory_order_acquire)) {}
}

static void unlock(dt_cl_event *self) {
    atomic_flag_clear_explicit(&self->lock, memory_order_release);
}

dt_cl_event *dt_cl_event_new(uintptr_t marker, uintptr_t retain, uintptr_t release) {
    dt_cl_event *self = calloc(1, sizeof *self);
    if (!self) return NULL;
    atomic_flag_clear(&self->lock);
    self->marker = marker;
    self->retain = retain;
    self->release = release;
    return self;
}

void dt_cl_event_free(dt_cl_event *self) {
    if (self->event) ((count_change)self->release)(self->event);
    free(self);
}

int dt_cl_event_record(void *event, void *queue) {
    dt_cl_event *self = event;
    void *made = NULL;
    int code = ((marker)self->marker)(queue, 0, NULL, &made);
    if (code) return code;
    lock(self);
    void *before = self->event;
    self->event = made;
    self->queue = queue;
    unlock(self);
    if (before) ((count_change)self->release)(before);
    return 0;
}

void *dt_cl_event_take(dt_cl_event *self, void **queue) {
    lock(self);
    void *found = self->event;
    *queue = self->queue;
    self->queue = NULL;
    if (found) ((count_change)self->retain)(found);
    unlock(self);
    return found;
}

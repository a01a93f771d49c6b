/* drivetrain.hal._hot: hot.c for Python, and the part of the core's objects that is in C.
 *
 * Each fast path does what is right in the usual case. Whatever is unusual (another type, a closed
 * buffer, a stream that is being captured, a failure of the driver) goes to the Python function
 * beside it, which checks everything and says what is wrong. So no message is made here.
 *
 * Without the GIL: fields are written under their object's critical section (descriptors of members
 * do so by themselves). What is set once (a stream's pool and lists, a buffer's home and device, all
 * of a kernel) is read without it, by atomic loads; what changes (a buffer's resource, users and
 * root, a plan's buffers, a graph's steps) within it.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdatomic.h>
#include <stddef.h>
#include <structmember.h>

#include "hot.h"

#define MOST_ARGUMENTS 64

#ifndef Py_BEGIN_CRITICAL_SECTION /* before Python 3.13 the GIL is one */
#define Py_BEGIN_CRITICAL_SECTION(object) {
#define Py_END_CRITICAL_SECTION() }
#endif
#define LOAD(field) __atomic_load_n(&(field), __ATOMIC_ACQUIRE)
#define STORE(field, value) __atomic_store_n(&(field), (value), __ATOMIC_RELEASE)

/* What the Python side tells once; see bind(). */
static PyTypeObject *buffer_class;  /* drivetrain.hal.memory.Buffer */
static PyObject *device_kind;       /* MemoryKind.DEVICE */
static PyObject *slow_alloc, *slow_launch;
static PyTypeObject *buffer_core, *stream_core, *event_core, *kernel_core, *plan_core, *lists_type;
static _Atomic int watched; /* 1: launches go through Python; 2: allocations and events too */
static PyTypeObject *event_class;   /* drivetrain.hal.stream.Event */
static PyObject *name_stream, *name_kind, *name_pool, *name_shared, *name_close, *name_pop, *name_record,
    *name_give_event, *name_launch_from, *name_on;

static inline int watching(int level) {
    return __builtin_expect(atomic_load_explicit(&watched, memory_order_relaxed) >= level, 0);
}

/* Whether this is the only Python thread: then there is nobody to let go of the GIL for while the
 * driver queues something, which takes as long as a twentieth of a launch. */
static inline int alone(void) {
#ifdef Py_GIL_DISABLED
    return 0;
#else
    PyThreadState *here = PyThreadState_Get();
    return !here->prev && !here->next;
#endif
}

/* Around a call that may wait for room in a full queue. */
#define BEGIN_QUEUEING { PyThreadState *saved = alone() ? NULL : PyEval_SaveThread();
#define END_QUEUEING if (saved) PyEval_RestoreThread(saved); }

/* -- FreeLists -------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    dt_lists *lists;
} FreeLists;

static PyObject *lists_new(PyTypeObject *type, PyObject *args, PyObject *names) {
    static char *none[] = {NULL};
    if (!PyArg_ParseTupleAndKeywords(args, names, "", none)) return NULL;
    FreeLists *self = (FreeLists *)type->tp_alloc(type, 0);
    if (self && !(self->lists = dt_lists_new())) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void lists_dealloc(FreeLists *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (self->lists) dt_lists_free(self->lists);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyObject *lists_take(FreeLists *self, PyObject *args) {
    unsigned long long nbytes, stream;
    if (!PyArg_ParseTuple(args, "KK", &nbytes, &stream)) return NULL;
    return PyLong_FromUnsignedLongLong(dt_lists_take(self->lists, nbytes, stream));
}

static PyObject *lists_put(FreeLists *self, PyObject *args) {
    unsigned long long ptr, nbytes, stream;
    if (!PyArg_ParseTuple(args, "KKK", &ptr, &nbytes, &stream)) return NULL;
    return PyBool_FromLong(dt_lists_put(self->lists, ptr, nbytes, stream));
}

static PyObject *lists_count(FreeLists *self, PyObject *args) {
    unsigned long long nbytes;
    int used;
    if (!PyArg_ParseTuple(args, "Kp", &nbytes, &used)) return NULL;
    dt_lists_count(self->lists, nbytes, used);
    Py_RETURN_NONE;
}

static PyObject *lists_drain(FreeLists *self, PyObject *args) {
    unsigned long long stream = 0, least = 0;
    int all = PyTuple_GET_SIZE(args) == 0;
    if (!all && !PyArg_ParseTuple(args, "K|K", &stream, &least)) return NULL;
    PyObject *found = PyList_New(0);
    dt_block blocks[256];
    size_t count;
    while (found && (count = dt_lists_drain(self->lists, stream, all, least, blocks, 256))) {
        for (size_t i = 0; i < count; i++) {
            PyObject *each = Py_BuildValue("KKK", (unsigned long long)blocks[i].stream,
                                           (unsigned long long)blocks[i].nbytes,
                                           (unsigned long long)blocks[i].ptr);
            if (!each || PyList_Append(found, each)) {
                Py_XDECREF(each);
                Py_CLEAR(found);
                break;
            }
            Py_DECREF(each);
        }
    }
    return found;
}

static PyObject *lists_counts(FreeLists *self, PyObject *unused) {
    dt_counts c;
    dt_lists_counts(self->lists, &c);
    return Py_BuildValue("KKKKKK", (unsigned long long)c.live, (unsigned long long)c.requested,
                         (unsigned long long)c.allocated, (unsigned long long)c.peak_requested,
                         (unsigned long long)c.peak_allocated, (unsigned long long)c.listed);
}

static PyMethodDef lists_methods[] = {
    {"take", (PyCFunction)lists_take, METH_VARARGS,
     "take(nbytes, stream) -> address of a free block, counted as used; 0: none"},
    {"put", (PyCFunction)lists_put, METH_VARARGS,
     "put(ptr, nbytes, stream) -> whether it was kept; it counts as free in both cases"},
    {"count", (PyCFunction)lists_count, METH_VARARGS,
     "count(nbytes, used): a block came from elsewhere, or went there"},
    {"drain", (PyCFunction)lists_drain, METH_VARARGS,
     "drain([stream[, least]]) -> [(stream, bytes, ptr)] of that stream or all, of that size or "
     "larger, no longer kept"},
    {"counts", (PyCFunction)lists_counts, METH_NOARGS,
     "counts() -> (live, requested, allocated, peak requested, peak allocated, listed)"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot lists_slots[] = {
    {Py_tp_new, lists_new},
    {Py_tp_dealloc, lists_dealloc},
    {Py_tp_methods, lists_methods},
    {Py_tp_doc, "Free blocks by stream and size, and counts of the used ones."},
    {0, NULL},
};
static PyType_Spec lists_spec = {"drivetrain.hal._hot.FreeLists", sizeof(FreeLists), 0,
                                 Py_TPFLAGS_DEFAULT, lists_slots};

/* -- StreamCore ------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    unsigned long long handle;
    PyObject *opened, *device;
    PyObject *graph; /* NULL or None: not being captured */
    PyObject *pool;  /* the device's own pool, once something came from it */
    PyObject *lists; /* that pool's FreeLists */
    PyObject *events; /* handles of free events, a list */
    char timing;      /* whether those are made for timing */
    dt_calls calls;
} StreamCore;

static PyMemberDef stream_members[] = {
    {"handle", T_ULONGLONG, offsetof(StreamCore, handle), 0,
     "The driver's own handle, 0 once the stream is closed."},
    {"_opened", T_OBJECT, offsetof(StreamCore, opened), 0, NULL},
    {"device", T_OBJECT, offsetof(StreamCore, device), 0, "The stream's device."},
    {"_graph", T_OBJECT, offsetof(StreamCore, graph), 0, NULL},
    {"_pool", T_OBJECT, offsetof(StreamCore, pool), 0, NULL},
    {"_lists", T_OBJECT, offsetof(StreamCore, lists), 0, NULL},
    {"_events", T_OBJECT, offsetof(StreamCore, events), 0, NULL},
    {"_timing", T_BOOL, offsetof(StreamCore, timing), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static void stream_dealloc(StreamCore *self) {
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(self->opened);
    Py_XDECREF(self->device);
    Py_XDECREF(self->graph);
    Py_XDECREF(self->pool);
    Py_XDECREF(self->lists);
    Py_XDECREF(self->events);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static int read_calls(PyObject *value, dt_calls *calls) {
    unsigned long long n[9];
    if (!PyArg_ParseTuple(value, "KKKKKKKKK", &n[0], &n[1], &n[2], &n[3], &n[4], &n[5], &n[6], &n[7],
                          &n[8]))
        return -1;
    *calls = (dt_calls){(int)n[0], (uintptr_t)n[1], (uintptr_t)n[2], (uintptr_t)n[3],
                        (uintptr_t)n[4], (uintptr_t)n[5], (uintptr_t)n[6], (uintptr_t)n[7],
                        (uintptr_t)n[8]};
    return 0;
}

static PyObject *stream_calls(StreamCore *self, PyObject *value) {
    if (read_calls(value, &self->calls)) return NULL;
    Py_RETURN_NONE;
}

static inline int there(PyObject *object) { return object && object != Py_None; }

/* The handle of a stream that takes work now; 0: it is closed, or being captured. */
static inline unsigned long long queues(StreamCore *self) {
    PyObject *graph = LOAD(self->graph);
    return !graph || graph == Py_None ? LOAD(self->handle) : 0;
}

/* -- EventCore -------------------------------------------------------------------------------- */

#define MOST_FREE_EVENTS 256

typedef struct {
    PyObject_HEAD
    unsigned long long handle;
    PyObject *opened, *device;
    PyObject *free; /* the list that the handle goes back to */
    char timing;
} EventCore;

static PyMemberDef event_members[] = {
    {"_handle", T_ULONGLONG, offsetof(EventCore, handle), 0, NULL},
    {"_opened", T_OBJECT, offsetof(EventCore, opened), 0, NULL},
    {"device", T_OBJECT, offsetof(EventCore, device), 0, "The stream's device."},
    {"_free", T_OBJECT, offsetof(EventCore, free), 0, NULL},
    {"_timing", T_BOOL, offsetof(EventCore, timing), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static void event_finalize(PyObject *object) {
    EventCore *self = (EventCore *)object;
    unsigned long long handle = self->handle; /* nobody else knows it any more */
    self->handle = 0;
    if (!handle) return;
    PyObject *type, *value, *trace, *done = NULL;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *number = PyLong_FromUnsignedLongLong(handle);
    if (number && self->free && PyList_CheckExact(self->free) &&
        PyList_GET_SIZE(self->free) < MOST_FREE_EVENTS) {
        if (!PyList_Append(self->free, number)) done = Py_NewRef(Py_None);
    } else if (number && there(self->opened)) {
        done = PyObject_CallMethodObjArgs(self->opened, name_give_event, number,
                                          self->timing ? Py_True : Py_False, NULL);
    }
    if (!done) PyErr_Clear(); /* the device is closed: there is nobody to give it back to */
    Py_XDECREF(done);
    Py_XDECREF(number);
    PyErr_Restore(type, value, trace);
}

static void event_dealloc(EventCore *self) {
    PyTypeObject *type = Py_TYPE(self);
    /* For a subclass, subtype_dealloc has called the finalizer already. */
    if (type == event_core && PyObject_CallFinalizerFromDealloc((PyObject *)self)) return;
    Py_XDECREF(self->opened);
    Py_XDECREF(self->device);
    Py_XDECREF(self->free);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyType_Slot event_slots[] = {
    {Py_tp_dealloc, event_dealloc},
    {Py_tp_finalize, event_finalize},
    {Py_tp_members, event_members},
    {Py_tp_doc, "The part of an Event that is made and let go."},
    {0, NULL},
};
static PyType_Spec event_spec = {"drivetrain.hal._hot.EventCore", sizeof(EventCore), 0,
                                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, event_slots};

/* record() -> Event, with an event that was free and by a call of the driver's own function. */
static PyObject *stream_new_record(StreamCore *self, PyObject *unused) {
    unsigned long long stream = queues(self);
    if (!watching(2) && stream && self->calls.record && event_class && self->events &&
        PyList_CheckExact(self->events) && PyList_GET_SIZE(self->events)) {
        PyObject *number = PyObject_CallMethodNoArgs(self->events, name_pop);
        if (!number) PyErr_Clear(); /* another thread took the last one */
        unsigned long long handle = number ? PyLong_AsUnsignedLongLong(number) : 0;
        EventCore *made = NULL;
        if (handle && !PyErr_Occurred())
            made = (EventCore *)event_class->tp_alloc(event_class, 0);
        int code = 1;
        if (made) {
            BEGIN_QUEUEING
            code = dt_record(&self->calls, (void *)(uintptr_t)handle, (void *)(uintptr_t)stream);
            END_QUEUEING
        }
        if (!code) {
            made->handle = handle;
            made->opened = Py_XNewRef(self->opened);
            made->device = Py_XNewRef(self->device);
            made->free = Py_NewRef(self->events);
            made->timing = self->timing;
            Py_DECREF(number);
            return (PyObject *)made;
        }
        Py_XDECREF((PyObject *)made);
        if (PyErr_Occurred()) {
            Py_XDECREF(number);
            return NULL;
        }
        if (number) { /* it failed: done again, the slow way tells why */
            int lost = PyList_Append(self->events, number);
            Py_DECREF(number);
            if (lost) return NULL;
        }
    }
    return PyObject_CallMethodNoArgs((PyObject *)self, name_record);
}

/* _record(event) -> True when the event was recorded here; False: the caller must. */
static PyObject *stream_record(StreamCore *self, PyObject *event) {
    unsigned long long handle = PyLong_AsUnsignedLongLong(event);
    if (handle == (unsigned long long)-1 && PyErr_Occurred()) return NULL;
    unsigned long long stream = queues(self);
    if (watching(2) || !self->calls.record || !stream) Py_RETURN_FALSE;
    return PyBool_FromLong(!dt_record(&self->calls, (void *)(uintptr_t)handle,
                                      (void *)(uintptr_t)stream));
}

static PyMethodDef stream_methods[] = {
    {"_set_calls", (PyCFunction)stream_calls, METH_O, NULL},
    {"_record", (PyCFunction)stream_record, METH_O, NULL},
    {"record", (PyCFunction)stream_new_record, METH_NOARGS,
     "record() -> Event that is done when all that is queued on the stream so far is done."},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot stream_slots[] = {
    {Py_tp_dealloc, stream_dealloc},
    {Py_tp_members, stream_members},
    {Py_tp_methods, stream_methods},
    {Py_tp_doc, "The part of a Stream that launches read."},
    {0, NULL},
};
static PyType_Spec stream_spec = {"drivetrain.hal._hot.StreamCore", sizeof(StreamCore), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, stream_slots};

/* -- BufferCore ------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    /* What a launch reads comes first: one line of the cache. */
    unsigned long long ptr;
    PyObject *root;     /* a view's Buffer, or a wrapped memory's owner */
    PyObject *home;     /* the Stream it was allocated on */
    void *last_user;    /* one of users, or home; compared only */
    Py_ssize_t nbytes;
    PyObject *opened, *device, *kind;
    PyObject *resource; /* what gets the memory back; NULL or None: nobody */
    PyObject *users;    /* the set of other Streams that used it */
    PyObject *waits;
} BufferCore;

static PyMemberDef buffer_members[] = {
    {"ptr", T_ULONGLONG, offsetof(BufferCore, ptr), 0,
     "The address on the device; 0 once the buffer is closed."},
    {"nbytes", T_PYSSIZET, offsetof(BufferCore, nbytes), 0, "Size in bytes."},
    {"_opened", T_OBJECT, offsetof(BufferCore, opened), 0, NULL},
    {"device", T_OBJECT, offsetof(BufferCore, device), 0, "Where the bytes are."},
    {"kind", T_OBJECT, offsetof(BufferCore, kind), 0, "A MemoryKind."},
    {"_resource", T_OBJECT, offsetof(BufferCore, resource), 0, NULL},
    {"_home", T_OBJECT, offsetof(BufferCore, home), 0, NULL},
    {"_root", T_OBJECT, offsetof(BufferCore, root), 0, NULL},
    {"_users", T_OBJECT, offsetof(BufferCore, users), 0, NULL},
    {"_waits", T_OBJECT, offsetof(BufferCore, waits), 0, NULL},
    {NULL, 0, 0, 0, NULL},
};

static inline int is_buffer(PyObject *object) {
    return Py_TYPE(object) == buffer_class || PyObject_TypeCheck(object, buffer_core);
}

/* Its address; 0 when it, or what it is a view of, is closed. */
static unsigned long long address_of(BufferCore *self) {
    unsigned long long ptr = LOAD(self->ptr);
    PyObject *root = NULL;
    if (!ptr || !LOAD(self->root)) return ptr;
    Py_BEGIN_CRITICAL_SECTION(self);
    if (there(self->root) && is_buffer(self->root)) root = Py_NewRef(self->root);
    Py_END_CRITICAL_SECTION();
    if (root) {
        if (!address_of((BufferCore *)root)) ptr = 0;
        Py_DECREF(root);
    }
    return ptr;
}

/* Gives the memory back to its pool's lists. 1: done, by this thread or another; 0: the slow way
 * must. */
static int give_back(BufferCore *self) {
    StreamCore *home = (StreamCore *)self->home;
    if (watching(2) || !there(self->home)) return 0;
    PyObject *pool = LOAD(home->pool), *lists = LOAD(home->lists), *resource = NULL;
    unsigned long long stream = LOAD(home->handle), ptr = 0;
    int usual;
    if (!stream || !there(pool) || !there(lists)) return 0;
    Py_BEGIN_CRITICAL_SECTION(self);
    usual = !self->ptr || (self->resource == pool && !there(self->users) && !there(self->waits));
    if (usual && self->ptr) {
        ptr = self->ptr;
        resource = self->resource;
        STORE(self->ptr, 0);
        self->resource = NULL;
    }
    Py_END_CRITICAL_SECTION();
    if (!ptr) return usual;
    dt_lists *kept = ((FreeLists *)lists)->lists;
    if (dt_lists_put(kept, ptr, (uint64_t)self->nbytes, stream)) {
        Py_DECREF(resource);
        return 1;
    }
    dt_lists_count(kept, (uint64_t)self->nbytes, 1); /* the slow way counts it again */
    Py_BEGIN_CRITICAL_SECTION(self);
    self->resource = resource;
    STORE(self->ptr, ptr);
    Py_END_CRITICAL_SECTION();
    return 0;
}

/* _take() -> (address, resource), of which the buffer has none from here on; (0, None) when another
 * thread has taken them. */
static PyObject *buffer_take(BufferCore *self, PyObject *unused) {
    unsigned long long ptr;
    PyObject *resource, *root;
    (void)unused;
    Py_BEGIN_CRITICAL_SECTION(self);
    ptr = self->ptr;
    resource = self->resource;
    root = self->root;
    STORE(self->ptr, 0);
    self->resource = NULL;
    STORE(self->root, NULL);
    Py_END_CRITICAL_SECTION();
    Py_XDECREF(root);
    PyObject *result = Py_BuildValue("KO", ptr, resource ? resource : Py_None);
    Py_XDECREF(resource);
    return result;
}

static PyObject *buffer_close(PyObject *object, PyObject *const *args, Py_ssize_t count,
                              PyObject *names) {
    BufferCore *self = (BufferCore *)object;
    if (!count && !names) {
        if (!LOAD(self->ptr) || give_back(self)) Py_RETURN_NONE;
    }
    PyObject *slow = PyObject_GetAttr(object, name_close);
    if (!slow) return NULL;
    PyObject *result = PyObject_Vectorcall(slow, args, (size_t)count, names);
    Py_DECREF(slow);
    return result;
}

static void buffer_finalize(PyObject *object) {
    BufferCore *self = (BufferCore *)object;
    if (!self->ptr || !there(self->resource) || give_back(self)) return;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyObject *result = PyObject_CallMethodNoArgs(object, name_close);
    if (!result) PyErr_Clear(); /* closed or lost: nobody is left to give it back to */
    Py_XDECREF(result);
    PyErr_Restore(type, value, trace);
}

static void buffer_dealloc(BufferCore *self) {
    PyTypeObject *type = Py_TYPE(self);
    /* For a subclass, subtype_dealloc has called the finalizer already, and ptr is 0. */
    if (type == buffer_core && PyObject_CallFinalizerFromDealloc((PyObject *)self)) return;
    Py_XDECREF(self->opened);
    Py_XDECREF(self->device);
    Py_XDECREF(self->kind);
    Py_XDECREF(self->resource);
    Py_XDECREF(self->home);
    Py_XDECREF(self->root);
    Py_XDECREF(self->users);
    Py_XDECREF(self->waits);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyObject *buffer_closed(BufferCore *self, void *unused) {
    return PyBool_FromLong(!address_of(self));
}

static PyObject *buffer_used(BufferCore *self, PyObject *stream) {
    STORE(self->last_user, (void *)stream);
    Py_RETURN_NONE;
}

static PyMethodDef buffer_methods[] = {
    {"close", (PyCFunction)(void (*)(void))buffer_close, METH_FASTCALL | METH_KEYWORDS,
     "close(stream=None): give the memory back, after the work queued so far on the buffer's "
     "stream, on ``stream`` and on every stream that used it. Closing twice does nothing."},
    {"_last_user", (PyCFunction)buffer_used, METH_O, NULL},
    {"_take", (PyCFunction)buffer_take, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef buffer_attributes[] = {
    {"closed", (getter)buffer_closed, NULL, "Whether it, or what it is a view of, was closed.", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot buffer_slots[] = {
    {Py_tp_dealloc, buffer_dealloc},
    {Py_tp_finalize, buffer_finalize},
    {Py_tp_members, buffer_members},
    {Py_tp_methods, buffer_methods},
    {Py_tp_getset, buffer_attributes},
    {Py_tp_doc, "The part of a Buffer that launches read."},
    {0, NULL},
};
static PyType_Spec buffer_spec = {"drivetrain.hal._hot.BufferCore", sizeof(BufferCore), 0,
                                  Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, buffer_slots};

/* Device.alloc(self, nbytes, *, stream, kind=MemoryKind.DEVICE, pool=None) */
static PyObject *alloc(PyObject *module, PyObject *const *args, Py_ssize_t count, PyObject *names) {
    Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
    StreamCore *stream = NULL;
    if (count == 2 && PyLong_CheckExact(args[1])) {
        int usual = 1;
        for (Py_ssize_t i = 0; i < named; i++) {
            PyObject *name = PyTuple_GET_ITEM(names, i), *value = args[count + i];
            if (name == name_stream) {
                if (PyObject_TypeCheck(value, stream_core)) stream = (StreamCore *)value;
            } else if (name == name_kind) {
                usual &= value == device_kind;
            } else {
                usual &= name == name_pool && value == Py_None;
            }
        }
        PyObject *found = usual && stream && !watching(2) ? LOAD(stream->lists) : NULL;
        unsigned long long handle = there(found) ? queues(stream) : 0;
        if (handle && stream->device == args[0]) {
            dt_lists *lists = ((FreeLists *)found)->lists;
            unsigned long long nbytes = PyLong_AsUnsignedLongLong(args[1]);
            uint64_t ptr = 0;
            if (nbytes == (unsigned long long)-1 && PyErr_Occurred()) PyErr_Clear();
            else if (nbytes >> 48 == 0)
                ptr = dt_lists_take(lists, nbytes, handle);
            if (ptr) {
                BufferCore *made = (BufferCore *)buffer_class->tp_alloc(buffer_class, 0);
                if (!made) {
                    dt_lists_put(lists, ptr, nbytes, handle);
                    return NULL;
                }
                made->ptr = ptr;
                made->nbytes = (Py_ssize_t)nbytes;
                made->opened = Py_NewRef(stream->opened);
                made->device = Py_NewRef(stream->device);
                made->kind = Py_NewRef(device_kind);
                made->resource = Py_NewRef(stream->pool);
                made->home = Py_NewRef((PyObject *)stream);
                return (PyObject *)made;
            }
        }
    }
    return PyObject_Vectorcall(slow_alloc, args, (size_t)count, names);
}

/* -- KernelCore ------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *opened;
    void *function;
    dt_calls calls;
    uint32_t grid[3], block[3], threads, shared;
    unsigned count;
    unsigned char codes[MOST_ARGUMENTS]; /* 'P', struct's letters, 'S' for bytes, or 0: only the slow way */
    int32_t sizes[MOST_ARGUMENTS];
} KernelCore;

/* One to three positive numbers within limits; 0 when they are anything else. */
static int read_dims(PyObject *value, const uint32_t most[3], uint32_t out[3]) {
    out[1] = out[2] = 1;
    Py_ssize_t count = 1;
    PyObject *const *items = &value;
    if (PyTuple_CheckExact(value)) {
        count = PyTuple_GET_SIZE(value);
        if (count < 1 || count > 3) return 0;
        items = &PyTuple_GET_ITEM(value, 0);
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        int overflow;
        if (!PyLong_CheckExact(items[i])) return 0;
        long long number = PyLong_AsLongLongAndOverflow(items[i], &overflow);
        if (overflow || number < 1 || number > (long long)most[i]) return 0;
        out[i] = (uint32_t)number;
    }
    return 1;
}

/* Packs one argument into 8 bytes; 0 when it is unusual. */
static int pack(PyObject *value, unsigned char code, StreamCore *stream, KernelCore *kernel,
                unsigned char *out) {
    if (code == 'P') {
        if (value == Py_None) {
            memset(out, 0, 8);
            return 1;
        }
        if (!is_buffer(value)) return 0;
        BufferCore *buffer = (BufferCore *)value;
        if (buffer->opened != kernel->opened) return 0;
        if (buffer->home != (PyObject *)stream && LOAD(buffer->last_user) != (void *)stream) return 0;
        uint64_t ptr = address_of(buffer);
        memcpy(out, &ptr, 8);
        return ptr != 0;
    }
    if (code == 'f' || code == 'd') {
        double number;
        if (PyFloat_CheckExact(value)) number = PyFloat_AS_DOUBLE(value);
        else if (PyLong_CheckExact(value)) {
            number = PyLong_AsDouble(value);
            if (number == -1.0 && PyErr_Occurred()) {
                PyErr_Clear();
                return 0;
            }
        } else return 0;
        if (code == 'd') {
            memcpy(out, &number, 8);
            return 1;
        }
        float single = (float)number;
        if (Py_IS_INFINITY((double)single) && !Py_IS_INFINITY(number)) return 0;
        memcpy(out, &single, 4);
        return 1;
    }
    if (!code) return 0;
    PyObject *held = NULL;
    if (!PyLong_CheckExact(value)) {
        if (!PyIndex_Check(value)) return 0;
        value = held = PyNumber_Index(value); /* a numpy scalar */
        if (!held) {
            PyErr_Clear();
            return 0;
        }
    }
    int overflow, right = 0;
    long long number = PyLong_AsLongLongAndOverflow(value, &overflow);
    if (code == 'Q') {
        unsigned long long large = (unsigned long long)number;
        right = !overflow && number >= 0;
        if (overflow > 0) {
            large = PyLong_AsUnsignedLongLong(value);
            right = !(large == (unsigned long long)-1 && PyErr_Occurred());
            PyErr_Clear();
        }
        memcpy(out, &large, 8);
    } else if (!overflow) {
        right = 1;
        switch (code) {
        case 'q': break;
        case 'i': right = number >= INT32_MIN && number <= INT32_MAX; break;
        case 'I': right = number >= 0 && number <= (long long)UINT32_MAX; break;
        case 'h': right = number >= INT16_MIN && number <= INT16_MAX; break;
        case 'H': right = number >= 0 && number <= UINT16_MAX; break;
        case 'b': right = number >= INT8_MIN && number <= INT8_MAX; break;
        case 'B': right = number >= 0 && number <= UINT8_MAX; break;
        default: right = 0;
        }
        memcpy(out, &number, 8); /* little-endian: the low bytes come first */
    }
    Py_XDECREF(held);
    return right;
}

static int queue(KernelCore *kernel, const uint32_t grid[3], const uint32_t block[3],
                 uint32_t shared, unsigned long long stream, void **arguments) {
    int code;
    const dt_calls *calls = &kernel->calls;
    void *handle = (void *)(uintptr_t)stream;
    if (calls->abi == DT_ABI_OPENCL) { /* its arguments lie in the kernel: one thread at a time */
        Py_BEGIN_CRITICAL_SECTION(kernel);
        code = dt_launch(calls, kernel->function, grid, block, shared, handle, arguments,
                         kernel->sizes, kernel->count);
        Py_END_CRITICAL_SECTION();
        return code;
    }
    BEGIN_QUEUEING
    code = dt_launch(calls, kernel->function, grid, block, shared, handle, arguments, kernel->sizes,
                     kernel->count);
    END_QUEUEING
    return code;
}

static PyObject *kernel_call(PyObject *object, PyObject *const *args, size_t flags,
                             PyObject *names) {
    KernelCore *self = (KernelCore *)object;
    Py_ssize_t count = PyVectorcall_NARGS(flags);
    if (self->calls.abi && !watching(1) && count == (Py_ssize_t)self->count + 3 &&
        PyObject_TypeCheck(args[0], stream_core)) {
        StreamCore *stream = (StreamCore *)args[0];
        uint32_t grid[3], block[3], shared = 0;
        if (names) {
            if (PyTuple_GET_SIZE(names) != 1 || PyTuple_GET_ITEM(names, 0) != name_shared ||
                !PyLong_CheckExact(args[count]))
                goto slow;
            int overflow;
            long long number = PyLong_AsLongLongAndOverflow(args[count], &overflow);
            if (overflow || number < 0 || number > (long long)self->shared) goto slow;
            shared = (uint32_t)number;
        }
        unsigned long long handle = queues(stream);
        if (stream->opened != self->opened || !handle || !read_dims(args[1], self->grid, grid) || !read_dims(args[2], self->block, block) ||
            (uint64_t)block[0] * block[1] * block[2] > self->threads)
            goto slow;
        unsigned char values[MOST_ARGUMENTS * 8];
        void *table[MOST_ARGUMENTS];
        for (unsigned i = 0; i < self->count; i++) {
            if (self->codes[i] == 'S') { /* the caller holds it until the launch is queued */
                if (!PyBytes_CheckExact(args[3 + i]) || PyBytes_GET_SIZE(args[3 + i]) != self->sizes[i])
                    goto slow;
                table[i] = PyBytes_AS_STRING(args[3 + i]);
                continue;
            }
            table[i] = values + 8 * i;
            if (!pack(args[3 + i], self->codes[i], stream, self, values + 8 * i)) goto slow;
        }
        if (!queue(self, grid, block, shared, handle, table)) Py_RETURN_NONE;
        /* It failed: done again, the slow way tells why. */
    }
slow:;
    PyObject *slow_args[MOST_ARGUMENTS + 8];
    Py_ssize_t all = count + (names ? PyTuple_GET_SIZE(names) : 0);
    if (all > MOST_ARGUMENTS + 6) {
        PyErr_SetString(PyExc_TypeError, "too many arguments for a kernel");
        return NULL;
    }
    slow_args[0] = object;
    for (Py_ssize_t i = 0; i < all; i++) slow_args[i + 1] = args[i];
    return PyObject_Vectorcall(slow_launch, slow_args, (size_t)count + 1, names);
}

static PyObject *kernel_new(PyTypeObject *type, PyObject *args, PyObject *names) {
    KernelCore *self = (KernelCore *)type->tp_alloc(type, 0);
    if (self) self->call = kernel_call;
    return (PyObject *)self;
}

/* _bind(opened, function, calls, (grid, block, threads, shared), codes, sizes) */
static PyObject *kernel_bind(KernelCore *self, PyObject *args) {
    PyObject *opened, *calls, *sizes;
    unsigned long long function;
    const char *codes;
    Py_ssize_t count;
    unsigned limits[8];
    if (!PyArg_ParseTuple(args, "OKO!(IIIIIIII)y#O!", &opened, &function, &PyTuple_Type, &calls,
                          &limits[0], &limits[1], &limits[2], &limits[3], &limits[4], &limits[5],
                          &limits[6], &limits[7], &codes, &count, &PyTuple_Type, &sizes))
        return NULL;
    if (count > MOST_ARGUMENTS || PyTuple_GET_SIZE(sizes) != count) Py_RETURN_FALSE;
    for (Py_ssize_t i = 0; i < count; i++) {
        long size = PyLong_AsLong(PyTuple_GET_ITEM(sizes, i));
        if (size == -1 && PyErr_Occurred()) return NULL;
        self->sizes[i] = (int32_t)size;
        self->codes[i] = (unsigned char)codes[i];
    }
    if (read_calls(calls, &self->calls)) return NULL;
    memcpy(self->grid, limits, sizeof self->grid);
    memcpy(self->block, limits + 3, sizeof self->block);
    self->threads = limits[6];
    self->shared = limits[7];
    self->count = (unsigned)count;
    self->function = (void *)(uintptr_t)function;
    Py_XSETREF(self->opened, Py_NewRef(opened));
    Py_RETURN_TRUE;
}

static void kernel_dealloc(KernelCore *self) {
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(self->opened);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMemberDef kernel_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(KernelCore, call), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyMethodDef kernel_methods[] = {
    {"_bind", (PyCFunction)kernel_bind, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot kernel_slots[] = {
    {Py_tp_new, kernel_new},
    {Py_tp_dealloc, kernel_dealloc},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_members, kernel_members},
    {Py_tp_methods, kernel_methods},
    {Py_tp_doc, "The part of a Kernel that launches."},
    {0, NULL},
};
static PyType_Spec kernel_spec = {
    "drivetrain.hal._hot.KernelCore", sizeof(KernelCore), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_VECTORCALL, kernel_slots};

/* -- Plan -------------------------------------------------------------------------------------- */

typedef struct {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject *launch;  /* drivetrain.hal.kernel.Launch: owns the arguments, and is the slow way */
    StreamCore *stream;
    KernelCore *kernel;
    void **arguments;
    uint32_t grid[3], block[3], shared;
    Py_ssize_t count;
    PyObject **buffers;
} Plan;

static PyObject *plan_slow(Plan *self) {
    return PyObject_CallMethodOneArg(self->launch, name_on, (PyObject *)self->stream);
}

/* Queues it; NULL with an exception set when that failed, else None. */
static PyObject *plan_queue(Plan *self) {
    unsigned long long handle = queues(self->stream);
    int usual = !watching(1) && self->kernel->calls.abi && handle;
    if (usual) {
        Py_BEGIN_CRITICAL_SECTION(self);
        for (Py_ssize_t i = 0; i < self->count && usual; i++) {
            BufferCore *buffer = (BufferCore *)self->buffers[i];
            usual = address_of(buffer) && (buffer->home == (PyObject *)self->stream ||
                                           LOAD(buffer->last_user) == (void *)self->stream);
        }
        Py_END_CRITICAL_SECTION();
    }
    if (!usual ||
        queue(self->kernel, self->grid, self->block, self->shared, handle, self->arguments))
        return plan_slow(self);
    Py_RETURN_NONE;
}

static PyObject *plan_call(PyObject *object, PyObject *const *args, size_t flags, PyObject *names) {
    if (PyVectorcall_NARGS(flags) || (names && PyTuple_GET_SIZE(names))) {
        PyErr_SetString(PyExc_TypeError, "a plan takes no arguments; change them with set");
        return NULL;
    }
    return plan_queue((Plan *)object);
}

static void bad_input(const char *text) {
    PyObject *errors = PyImport_ImportModule("drivetrain.errors");
    PyObject *type = errors ? PyObject_GetAttrString(errors, "BadInput") : NULL;
    if (type) PyErr_SetString(type, text);
    Py_XDECREF(type);
    Py_XDECREF(errors);
}

static PyObject *launch_all(PyObject *module, PyObject *given) {
    PyObject *plans = PySequence_Tuple(given); /* a tuple itself, or one that nobody changes */
    if (!plans) {
        if (PyErr_ExceptionMatches(PyExc_TypeError)) {
            PyErr_Clear();
            bad_input("launch_all takes plans");
        }
        return NULL;
    }
    PyObject *done = Py_NewRef(Py_None);
    Py_ssize_t count = PyTuple_GET_SIZE(plans);
    for (Py_ssize_t i = 0; i < count && done; i++)
        if (!PyObject_TypeCheck(PyTuple_GET_ITEM(plans, i), plan_core)) {
            Py_CLEAR(done);
            bad_input("launch_all takes plans");
        }
    for (Py_ssize_t i = 0; i < count && done; i++)
        Py_XSETREF(done, plan_queue((Plan *)PyTuple_GET_ITEM(plans, i)));
    Py_DECREF(plans);
    return done;
}

/* _PlanCore(launch, stream, kernel, address of the arguments, grid, block, shared) */
static PyObject *plan_new(PyTypeObject *type, PyObject *args, PyObject *names) {
    PyObject *launch, *stream, *kernel;
    unsigned long long arguments;
    unsigned n[7];
    if (!PyArg_ParseTuple(args, "OO!OK(III)(III)I", &launch, stream_core, &stream, &kernel,
                          &arguments, &n[0], &n[1], &n[2], &n[3], &n[4], &n[5], &n[6]))
        return NULL;
    (void)names;
    Plan *self = (Plan *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->call = plan_call;
    self->launch = Py_NewRef(launch);
    self->stream = (StreamCore *)Py_NewRef(stream);
    self->kernel = (KernelCore *)Py_NewRef(kernel);
    self->arguments = (void **)(uintptr_t)arguments;
    memcpy(self->grid, n, sizeof self->grid);
    memcpy(self->block, n + 3, sizeof self->block);
    self->shared = n[6];
    return (PyObject *)self;
}

static void drop_buffers(PyObject **buffers, Py_ssize_t count) {
    for (Py_ssize_t i = 0; i < count; i++) Py_DECREF(buffers[i]);
    PyMem_Free(buffers);
}

/* _uses(buffers): the tuple of buffers among the arguments */
static PyObject *plan_uses(Plan *self, PyObject *buffers) {
    if (!PyTuple_Check(buffers)) {
        PyErr_SetString(PyExc_TypeError, "a tuple of buffers");
        return NULL;
    }
    Py_ssize_t count = PyTuple_GET_SIZE(buffers);
    PyObject **held = PyMem_Malloc((size_t)(count ? count : 1) * sizeof *held);
    if (!held) return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *each = PyTuple_GET_ITEM(buffers, i);
        if (!is_buffer(each)) {
            while (i--) Py_DECREF(held[i]);
            PyMem_Free(held);
            PyErr_SetString(PyExc_TypeError, "a tuple of buffers");
            return NULL;
        }
        held[i] = Py_NewRef(each);
    }
    PyObject **before;
    Py_ssize_t many;
    Py_BEGIN_CRITICAL_SECTION(self);
    before = self->buffers;
    many = self->count;
    self->buffers = held;
    self->count = count;
    Py_END_CRITICAL_SECTION();
    drop_buffers(before, many);
    Py_RETURN_NONE;
}

static void plan_dealloc(Plan *self) {
    PyTypeObject *type = Py_TYPE(self);
    drop_buffers(self->buffers, self->count);
    Py_XDECREF(self->launch);
    Py_XDECREF((PyObject *)self->stream);
    Py_XDECREF((PyObject *)self->kernel);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMemberDef plan_members[] = {
    {"__vectorcalloffset__", T_PYSSIZET, offsetof(Plan, call), READONLY, NULL},
    {"_launch", T_OBJECT, offsetof(Plan, launch), READONLY, NULL},
    {"_stream", T_OBJECT, offsetof(Plan, stream), READONLY, NULL},
    {NULL, 0, 0, 0, NULL},
};

static PyMethodDef plan_methods[] = {
    {"_uses", (PyCFunction)plan_uses, METH_O, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot plan_slots[] = {
    {Py_tp_new, plan_new},
    {Py_tp_dealloc, plan_dealloc},
    {Py_tp_call, PyVectorcall_Call},
    {Py_tp_members, plan_members},
    {Py_tp_methods, plan_methods},
    {Py_tp_doc, "The part of a Plan that launches."},
    {0, NULL},
};
static PyType_Spec plan_spec = {
    "drivetrain.hal._hot.PlanCore", sizeof(Plan), 0,
    Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE | Py_TPFLAGS_HAVE_VECTORCALL, plan_slots};

/* -- Graph ------------------------------------------------------------------------------------- */

typedef struct {
    KernelCore *kernel;
    void **arguments;
    uint32_t grid[3], block[3], shared;
} step;

typedef struct {
    PyObject_HEAD
    PyObject *opened, *buffers; /* what it is of, and the tuple of what its launches use */
    PyObject *launches;         /* owns the steps' kernels and arguments */
    dt_calls calls;
    void *graph; /* the driver's own, else NULL and steps */
    step *steps;
    Py_ssize_t count;
    char armed;
} GraphCore;

/* What the graph was armed with is what it is given, and the other way round. */
static void exchange(GraphCore *self, GraphCore *given) {
    Py_BEGIN_CRITICAL_SECTION(self);
    GraphCore before = *self;
    self->opened = given->opened;
    self->buffers = given->buffers;
    self->launches = given->launches;
    self->calls = given->calls;
    self->graph = given->graph;
    self->steps = given->steps;
    self->count = given->count;
    self->armed = given->armed;
    *given = before;
    Py_END_CRITICAL_SECTION();
}

/* _disarm(): from here on every launch goes the slow way. */
static PyObject *graph_disarm(GraphCore *self, PyObject *unused) {
    GraphCore none = {0};
    (void)unused;
    exchange(self, &none);
    PyMem_Free(none.steps);
    Py_XDECREF(none.opened);
    Py_XDECREF(none.buffers);
    Py_XDECREF(none.launches);
    Py_RETURN_NONE;
}

/* _arm(opened, calls, graph, buffers, launches, steps): steps are (kernel, address of the arguments,
 * grid, block, shared), in order, for a graph that is not the driver's own (0). Whether it took it. */
static PyObject *graph_arm(GraphCore *self, PyObject *args) {
    PyObject *opened, *calls, *buffers, *launches, *steps;
    unsigned long long graph;
    if (!PyArg_ParseTuple(args, "OO!KO!O!O!", &opened, &PyTuple_Type, &calls, &graph, &PyTuple_Type,
                          &buffers, &PyTuple_Type, &launches, &PyTuple_Type, &steps))
        return NULL;
    Py_XDECREF(graph_disarm(self, NULL));
    GraphCore armed = {0};
    if (read_calls(calls, &armed.calls)) return NULL;
    if (graph ? !armed.calls.graph_launch : !armed.calls.abi) Py_RETURN_FALSE;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(buffers); i++)
        if (!is_buffer(PyTuple_GET_ITEM(buffers, i))) Py_RETURN_FALSE;
    Py_ssize_t count = PyTuple_GET_SIZE(steps);
    step *made = PyMem_Calloc((size_t)(count ? count : 1), sizeof *made);
    if (!made) return PyErr_NoMemory();
    for (Py_ssize_t i = 0; i < count; i++) {
        PyObject *kernel;
        unsigned long long arguments;
        unsigned n[7];
        if (!PyArg_ParseTuple(PyTuple_GET_ITEM(steps, i), "O!K(III)(III)I", kernel_core, &kernel,
                              &arguments, &n[0], &n[1], &n[2], &n[3], &n[4], &n[5], &n[6])) {
            PyMem_Free(made);
            return NULL;
        }
        made[i].kernel = (KernelCore *)kernel;
        made[i].arguments = (void **)(uintptr_t)arguments;
        memcpy(made[i].grid, n, sizeof made[i].grid);
        memcpy(made[i].block, n + 3, sizeof made[i].block);
        made[i].shared = n[6];
    }
    armed.steps = made;
    armed.count = count;
    armed.graph = (void *)(uintptr_t)graph;
    armed.opened = Py_NewRef(opened);
    armed.buffers = Py_NewRef(buffers);
    armed.launches = Py_NewRef(launches);
    armed.armed = 1;
    exchange(self, &armed);
    PyMem_Free(armed.steps);
    Py_XDECREF(armed.opened);
    Py_XDECREF(armed.buffers);
    Py_XDECREF(armed.launches);
    Py_RETURN_TRUE;
}

static Py_ssize_t launch_steps(GraphCore *self, void *stream) {
    for (Py_ssize_t i = 0; i < self->count; i++) {
        step *each = &self->steps[i];
        KernelCore *kernel = each->kernel;
        const dt_calls *calls = &kernel->calls;
        int code;
        if (calls->abi == DT_ABI_PLAIN && !calls->get_context) /* as dt_launch does, without the way there */
            code = ((dt_plain_launch)calls->launch)(kernel->function, each->grid, each->block,
                                                    each->shared, stream, each->arguments);
        else
            code = dt_launch(calls, kernel->function, each->grid, each->block, each->shared, stream,
                             each->arguments, kernel->sizes, kernel->count);
        if (code) return i;
    }
    return self->count;
}

/* launch(stream) */
static PyObject *graph_launch(GraphCore *self, PyObject *object) {
    Py_ssize_t first = 0;
    int done = 0;
    if (!watching(1) && PyObject_TypeCheck(object, stream_core)) {
        StreamCore *stream = (StreamCore *)object;
        unsigned long long handle = queues(stream);
        dt_calls calls = {0};
        void *graph = NULL;
        Py_INCREF(self);
        Py_BEGIN_CRITICAL_SECTION(self);
        int usual = self->armed && handle && stream->opened == self->opened;
        for (Py_ssize_t i = 0; usual && i < PyTuple_GET_SIZE(self->buffers); i++) {
            BufferCore *buffer = (BufferCore *)PyTuple_GET_ITEM(self->buffers, i);
            usual = address_of(buffer) &&
                    (buffer->home == object || LOAD(buffer->last_user) == (void *)object);
        }
        if (usual && self->graph) {
            calls = self->calls;
            graph = self->graph;
        } else if (usual) {
            /* The steps stay as they are: no other thread changes the graph meanwhile. */
            first = launch_steps(self, (void *)(uintptr_t)handle);
            done = first == self->count;
        }
        Py_END_CRITICAL_SECTION();
        if (graph) {
            BEGIN_QUEUEING
            done = !dt_graph_launch(&calls, graph, (void *)(uintptr_t)handle);
            END_QUEUEING
        }
        Py_DECREF(self);
        if (done) Py_RETURN_NONE;
        /* It failed: from there on done again, the slow way tells why. */
    }
    PyObject *number = PyLong_FromSsize_t(first);
    if (!number) return NULL;
    PyObject *result =
        PyObject_CallMethodObjArgs((PyObject *)self, name_launch_from, object, number, NULL);
    Py_DECREF(number);
    return result;
}

static void graph_dealloc(GraphCore *self) {
    PyTypeObject *type = Py_TYPE(self);
    Py_XDECREF(graph_disarm(self, NULL));
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMethodDef graph_methods[] = {
    {"launch", (PyCFunction)graph_launch, METH_O,
     "launch(stream): queue all of it. Raises BadInput when one of its buffers is closed."},
    {"_arm", (PyCFunction)graph_arm, METH_VARARGS, NULL},
    {"_disarm", (PyCFunction)graph_disarm, METH_NOARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot graph_slots[] = {
    {Py_tp_dealloc, graph_dealloc},
    {Py_tp_methods, graph_methods},
    {Py_tp_doc, "The part of a Graph that launches."},
    {0, NULL},
};
static PyType_Spec graph_spec = {"drivetrain.hal._hot.GraphCore", sizeof(GraphCore), 0,
                                 Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE, graph_slots};

/* -- module ------------------------------------------------------------------------------------ */

/* bind(Buffer, MemoryKind.DEVICE, alloc the slow way, launch the slow way) */
static PyObject *bind(PyObject *module, PyObject *args) {
    PyObject *type, *kind, *allocate, *launch;
    if (!PyArg_ParseTuple(args, "O!OOO", &PyType_Type, &type, &kind, &allocate, &launch)) return NULL;
    if (!PyType_IsSubtype((PyTypeObject *)type, buffer_core)) {
        PyErr_SetString(PyExc_TypeError, "Buffer must be a BufferCore");
        return NULL;
    }
    Py_XSETREF(buffer_class, (PyTypeObject *)Py_NewRef(type));
    Py_XSETREF(device_kind, Py_NewRef(kind));
    Py_XSETREF(slow_alloc, Py_NewRef(allocate));
    Py_XSETREF(slow_launch, Py_NewRef(launch));
    Py_RETURN_NONE;
}

/* watch(level): from 1 on launches go through Python, from 2 on allocations and events too. */
static PyObject *watch(PyObject *module, PyObject *level) {
    long value = PyLong_AsLong(level);
    if (value == -1 && PyErr_Occurred()) return NULL;
    atomic_store_explicit(&watched, (int)value, memory_order_relaxed);
    Py_RETURN_NONE;
}

/* bind_event(Event) */
static PyObject *bind_event(PyObject *module, PyObject *type) {
    if (!PyType_Check(type) || !PyType_IsSubtype((PyTypeObject *)type, event_core)) {
        PyErr_SetString(PyExc_TypeError, "Event must be an EventCore");
        return NULL;
    }
    Py_XSETREF(event_class, (PyTypeObject *)Py_NewRef(type));
    Py_RETURN_NONE;
}

static PyMethodDef functions[] = {
    {"bind", bind, METH_VARARGS, NULL},
    {"bind_event", bind_event, METH_O, NULL},
    {"watch", watch, METH_O, NULL},
    {"launch_all", launch_all, METH_O,
     "launch_all(plans): queue the launches of an iterable of plans in their order, as calling one "
     "after the other does, without the interpreter's share of each call. Raises BadInput, before "
     "anything is queued, for what is no plan; where a plan raises, those before it are queued."},
    {"alloc", (PyCFunction)(void (*)(void))alloc, METH_FASTCALL | METH_KEYWORDS,
     "alloc(nbytes, *, stream, kind=MemoryKind.DEVICE, pool=None) -> Buffer of memory, usable on "
     "stream from here on. From the device's caching pool, or from pool. The contents are "
     "undefined. Raises BadInput, Unsupported and OutOfMemory."},
    {NULL, NULL, 0, NULL},
};

static int add(PyObject *module, const char *name, PyType_Spec *spec, PyTypeObject **kept) {
    PyObject *type = PyType_FromSpec(spec);
    if (!type || PyModule_AddObjectRef(module, name, type)) {
        Py_XDECREF(type);
        return -1;
    }
    if (kept) Py_XSETREF(*kept, (PyTypeObject *)type);
    else Py_DECREF(type);
    return 0;
}

static int exec_module(PyObject *module) {
    name_stream = PyUnicode_InternFromString("stream");
    name_kind = PyUnicode_InternFromString("kind");
    name_pool = PyUnicode_InternFromString("pool");
    name_shared = PyUnicode_InternFromString("shared");
    name_close = PyUnicode_InternFromString("_close");
    name_pop = PyUnicode_InternFromString("pop");
    name_record = PyUnicode_InternFromString("_new_record");
    name_give_event = PyUnicode_InternFromString("give_event");
    name_launch_from = PyUnicode_InternFromString("_launch_from");
    name_on = PyUnicode_InternFromString("on");
    if (!name_stream || !name_kind || !name_pool || !name_shared || !name_close || !name_pop ||
        !name_record || !name_give_event || !name_launch_from || !name_on)
        return -1;
    if (add(module, "FreeLists", &lists_spec, &lists_type) ||
        add(module, "StreamCore", &stream_spec, &stream_core) ||
        add(module, "BufferCore", &buffer_spec, &buffer_core) ||
        add(module, "EventCore", &event_spec, &event_core) ||
        add(module, "KernelCore", &kernel_spec, &kernel_core) ||
        add(module, "PlanCore", &plan_spec, &plan_core) || add(module, "GraphCore", &graph_spec, NULL))
        return -1;
    /* Bound like a method when it is found in a class. */
    PyObject *function = PyObject_GetAttrString(module, "alloc");
    PyObject *method = function ? PyInstanceMethod_New(function) : NULL;
    Py_XDECREF(function);
    if (!method || PyModule_AddObjectRef(module, "alloc_method", method)) {
        Py_XDECREF(method);
        return -1;
    }
    Py_DECREF(method);
    return 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, exec_module},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "drivetrain.hal._hot", "The hot part of the core's objects.", 0,
    functions, slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__hot(void) { return PyModuleDef_Init(&definition); }

/* drivetrain.hal._cpu: the cpu device for Python. Handles and addresses are plain integers; waits
 * let go of the GIL and listen to signals. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <string.h>

#include "drivetrain_hal.h"

#ifndef __linux__
#error "the cpu device needs Linux"
#endif

#define SLICE_NS INT64_C(100000000)    /* how long a wait stays deaf to signals */
#define LAST_WAIT_NS INT64_C(10000000000) /* for work that a forgotten device still does */

typedef struct {
    PyObject_HEAD
    dt_cpu *device;
    PyObject *name;
} Device;

static PyObject *make_error; /* drivetrain.hal.drivers.cpu_errors.error */

/* -- errors and arguments ---------------------------------------------------------------------- */

static PyObject *fail(Device *self, const char *op, int status, int native, const char *text) {
    PyObject *error = PyObject_CallFunction(make_error, "Osiis", self->name, op, status, native,
                                            text ? text : "");
    if (error) {
        PyErr_SetObject((PyObject *)Py_TYPE(error), error);
        Py_DECREF(error);
    }
    return NULL;
}

static PyObject *done_or_fail(Device *self, const char *op, int status) {
    if (status) return fail(self, op, status, 0, NULL);
    Py_RETURN_NONE;
}

static int check_count(const char *op, Py_ssize_t count, Py_ssize_t wanted) {
    if (count == wanted) return 0;
    PyErr_Format(PyExc_TypeError, "%s takes %zd arguments, got %zd", op, wanted, count);
    return -1;
}

static int as_u64(PyObject *object, uint64_t *value) {
    *value = PyLong_AsUnsignedLongLong(object);
    return *value == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
}

static int as_pointer(PyObject *object, void *pointer) {
    uint64_t value;
    if (as_u64(object, &value)) return -1;
    uintptr_t address = (uintptr_t)value;
    memcpy(pointer, &address, sizeof address);
    return 0;
}

static int as_ns(PyObject *object, int64_t *ns) {
    double seconds = PyFloat_AsDouble(object);
    if (seconds == -1.0 && PyErr_Occurred()) return -1;
    if (!(seconds > 0)) seconds = 0;
    *ns = seconds < 4e9 ? (int64_t)(seconds * 1e9) : INT64_C(4000000000000000000);
    return 0;
}

static PyObject *as_object(const void *pointer) {
    return PyLong_FromUnsignedLongLong((uint64_t)(uintptr_t)pointer);
}

#define OPEN(op)                                                                                   \
    dt_cpu *device = self->device;                                                                 \
    if (!device) return fail(self, op, DT_CPU_CLOSED, 0, NULL)

/* -- waits ------------------------------------------------------------------------------------- */

typedef int (*wait_call)(void *on, int64_t limit_ns, dt_cpu_failure *failure);

static int wait_stream(void *on, int64_t limit_ns, dt_cpu_failure *failure) {
    return dt_cpu_stream_synchronize(on, limit_ns, failure);
}
static int wait_event(void *on, int64_t limit_ns, dt_cpu_failure *failure) {
    (void)failure;
    return dt_cpu_event_synchronize(on, limit_ns);
}
static int wait_device(void *on, int64_t limit_ns, dt_cpu_failure *failure) {
    return dt_cpu_synchronize(on, limit_ns, failure);
}
static int wait_freed(void *on, int64_t limit_ns, dt_cpu_failure *failure) {
    (void)failure;
    return dt_cpu_freed(on, limit_ns);
}

/* True when done, False when the limit passed; slices, so that a Ctrl-C is heard. */
static PyObject *wait(Device *self, const char *op, wait_call call, void *on, int64_t limit_ns) {
    dt_cpu_failure failure = {0, ""};
    int status = call(on, 0, &failure);
    while (status == DT_CPU_LATE && limit_ns > 0) {
        int64_t slice = limit_ns < SLICE_NS ? limit_ns : SLICE_NS;
        Py_BEGIN_ALLOW_THREADS
        status = call(on, slice, &failure);
        Py_END_ALLOW_THREADS
        limit_ns -= slice;
        if (status == DT_CPU_LATE && PyErr_CheckSignals()) return NULL;
    }
    if (status == DT_CPU_LATE) Py_RETURN_FALSE;
    if (status) return fail(self, op, status, failure.code, failure.text);
    Py_RETURN_TRUE;
}

/* -- life -------------------------------------------------------------------------------------- */

static int as_cores(PyObject *object, int **cores, Py_ssize_t *count) {
    *cores = NULL;
    *count = 0;
    PyObject *items = PySequence_Fast(object, "cores must be a sequence of numbers");
    if (!items) return -1;
    *count = PySequence_Fast_GET_SIZE(items);
    *cores = PyMem_Malloc((size_t)(*count ? *count : 1) * sizeof **cores);
    for (Py_ssize_t i = 0; *cores && i < *count; i++)
        (*cores)[i] = (int)PyLong_AsLong(PySequence_Fast_GET_ITEM(items, i));
    Py_DECREF(items);
    if (!*cores) PyErr_NoMemory();
    if (!PyErr_Occurred()) return 0;
    PyMem_Free(*cores);
    return -1;
}

static PyObject *device_new(PyTypeObject *type, PyObject *args, PyObject *names) {
    static char *keywords[] = {"name", "cores", "threads", "guards", NULL};
    PyObject *name, *listed;
    int threads, guards, *cores;
    Py_ssize_t count;
    if (!PyArg_ParseTupleAndKeywords(args, names, "UOip", keywords, &name, &listed, &threads,
                                     &guards))
        return NULL;
    if (as_cores(listed, &cores, &count)) return NULL;
    Device *self = (Device *)type->tp_alloc(type, 0);
    if (self) {
        self->name = Py_NewRef(name);
        if (threads > 0)
            self->device = dt_cpu_open(cores, (size_t)count, (unsigned)threads, guards);
        if (!self->device) {
            fail(self, "open", DT_CPU_NO_MEMORY, 0, "no thread can be started");
            Py_CLEAR(self);
        }
    }
    PyMem_Free(cores);
    return (PyObject *)self;
}

static PyObject *device_close(Device *self, PyObject *argument) {
    int64_t limit_ns;
    int status;
    if (as_ns(argument, &limit_ns)) return NULL;
    OPEN("close");
    self->device = NULL;
    Py_BEGIN_ALLOW_THREADS
    status = dt_cpu_close(device, limit_ns);
    Py_END_ALLOW_THREADS
    if (status == DT_CPU_LATE) Py_RETURN_FALSE;
    if (status) return fail(self, "close", status, 0, NULL);
    Py_RETURN_TRUE;
}

static void device_dealloc(Device *self) {
    PyTypeObject *type = Py_TYPE(self);
    if (self->device) {
        dt_cpu *device = self->device;
        self->device = NULL;
        Py_BEGIN_ALLOW_THREADS
        dt_cpu_close(device, LAST_WAIT_NS);
        Py_END_ALLOW_THREADS
    }
    Py_XDECREF(self->name);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyObject *device_synchronize(Device *self, PyObject *argument) {
    int64_t limit_ns;
    if (as_ns(argument, &limit_ns)) return NULL;
    OPEN("synchronize");
    return wait(self, "synchronize", wait_device, device, limit_ns);
}

/* -- memory ------------------------------------------------------------------------------------ */

static PyObject *alloc(Device *self, PyObject *argument) {
    uint64_t nbytes;
    void *address;
    if (as_u64(argument, &nbytes)) return NULL;
    OPEN("alloc");
    int status = dt_cpu_alloc(device, (size_t)nbytes, &address);
    if (status == DT_CPU_ALLOWANCE) return PyLong_FromLong(0);
    if (status) return fail(self, "alloc", status, 0, NULL);
    return as_object(address);
}

static PyObject *allow(Device *self, PyObject *argument) {
    uint64_t nbytes;
    if (as_u64(argument, &nbytes)) return NULL;
    OPEN("alloc");
    dt_cpu_allow(device, nbytes);
    Py_RETURN_NONE;
}

static PyObject *untouched(Device *self, PyObject *unused) {
    (void)unused;
    uint64_t nbytes;
    OPEN("memory");
    Py_BEGIN_ALLOW_THREADS
    nbytes = dt_cpu_untouched(device);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(nbytes);
}

static PyObject *freed(Device *self, PyObject *argument) {
    int64_t limit_ns;
    if (as_ns(argument, &limit_ns)) return NULL;
    OPEN("alloc");
    return wait(self, "alloc", wait_freed, device, limit_ns);
}

static PyObject *device_free(Device *self, PyObject *const *args, Py_ssize_t count) {
    void *address, *stream;
    if (check_count("free", count, 2) || as_pointer(args[0], &address) ||
        as_pointer(args[1], &stream))
        return NULL;
    OPEN("free");
    return done_or_fail(self, "free", dt_cpu_free(device, address, stream));
}

static PyObject *check(Device *self, PyObject *argument) {
    void *address;
    size_t nbytes = 0;
    int64_t offset = 0;
    if (as_pointer(argument, &address)) return NULL;
    OPEN("free");
    int status = dt_cpu_check(device, address, &nbytes, &offset);
    if (status == DT_CPU_DAMAGED)
        return Py_BuildValue("nL", (Py_ssize_t)nbytes, (long long)offset);
    return done_or_fail(self, "free", status);
}

static PyObject *wait_for_copy(Device *self, void *stream, int64_t limit_ns) {
    dt_cpu_event *event;
    int status = dt_cpu_event_new(self->device, 0, &event);
    if (status) return fail(self, "copy", status, 0, NULL);
    status = dt_cpu_event_record(event, stream);
    PyObject *found = status ? fail(self, "copy", status, 0, NULL)
                             : wait(self, "copy", wait_event, event, limit_ns);
    dt_cpu_event_destroy(event);
    return found;
}

static PyObject *copy(Device *self, PyObject *const *args, Py_ssize_t count) {
    void *dst, *src, *stream;
    uint64_t nbytes;
    int64_t limit_ns;
    int status;
    if (check_count("copy", count, 6) || as_pointer(args[0], &dst) || as_pointer(args[1], &src) ||
        as_u64(args[2], &nbytes) || as_pointer(args[3], &stream) || as_ns(args[5], &limit_ns))
        return NULL;
    int host_free = PyObject_IsTrue(args[4]);
    if (host_free < 0) return NULL;
    OPEN("copy");
    if (!host_free) {
        status = dt_cpu_copy(stream, dst, src, (size_t)nbytes, 0, 0);
        if (status) return fail(self, "copy", status, 0, NULL);
        Py_RETURN_TRUE;
    }
    Py_BEGIN_ALLOW_THREADS
    status = dt_cpu_copy(stream, dst, src, (size_t)nbytes, 1,
                         limit_ns < SLICE_NS ? limit_ns : SLICE_NS);
    Py_END_ALLOW_THREADS
    if (status == DT_CPU_LATE && limit_ns > SLICE_NS) {
        if (!self->device) return fail(self, "copy", DT_CPU_CLOSED, 0, NULL);
        return wait_for_copy(self, stream, limit_ns - SLICE_NS);
    }
    if (status == DT_CPU_LATE) Py_RETURN_FALSE;
    if (status) return fail(self, "copy", status, 0, NULL);
    Py_RETURN_TRUE;
}

static PyObject *fill(Device *self, PyObject *const *args, Py_ssize_t count) {
    void *dst, *stream;
    char *pattern;
    Py_ssize_t width;
    uint64_t times;
    if (check_count("fill", count, 4) || as_pointer(args[0], &dst) ||
        PyBytes_AsStringAndSize(args[1], &pattern, &width) || as_u64(args[2], &times) ||
        as_pointer(args[3], &stream))
        return NULL;
    OPEN("fill");
    (void)device;
    return done_or_fail(self, "fill",
                        dt_cpu_fill(stream, dst, pattern, (size_t)width, (size_t)times));
}

/* -- streams and events ------------------------------------------------------------------------ */

static PyObject *stream_create(Device *self, PyObject *argument) {
    dt_cpu_stream *stream;
    int overflow;
    long priority = PyLong_AsLongAndOverflow(argument, &overflow);
    if (priority == -1 && PyErr_Occurred()) return NULL;
    if (overflow) priority = overflow < 0 ? INT32_MIN : INT32_MAX;
    if (priority > INT32_MAX) priority = INT32_MAX;
    if (priority < INT32_MIN) priority = INT32_MIN;
    OPEN("stream");
    int status = dt_cpu_stream_new(device, (int)priority, &stream);
    if (status) return fail(self, "stream", status, 0, NULL);
    return as_object(stream);
}

static PyObject *stream_destroy(Device *self, PyObject *argument) {
    void *stream;
    if (as_pointer(argument, &stream)) return NULL;
    OPEN("stream_destroy");
    (void)device;
    return done_or_fail(self, "stream_destroy", dt_cpu_stream_destroy(stream));
}

static PyObject *stream_done(Device *self, PyObject *argument) {
    void *stream;
    if (as_pointer(argument, &stream)) return NULL;
    OPEN("stream_done");
    (void)device;
    return wait(self, "stream_done", wait_stream, stream, 0);
}

static PyObject *stream_synchronize(Device *self, PyObject *const *args, Py_ssize_t count) {
    void *stream;
    int64_t limit_ns;
    if (check_count("stream_synchronize", count, 2) || as_pointer(args[0], &stream) ||
        as_ns(args[1], &limit_ns))
        return NULL;
    OPEN("stream_synchronize");
    (void)device;
    return wait(self, "stream_synchronize", wait_stream, stream, limit_ns);
}

static PyObject *stream_wait(Device *self, PyObject *const *args, Py_ssize_t count) {
    void *stream, *event;
    if (check_count("stream_wait", count, 2) || as_pointer(args[0], &stream) ||
        as_pointer(args[1], &event))
        return NULL;
    OPEN("stream_wait");
    (void)device;
    return done_or_fail(self, "stream_wait", dt_cpu_stream_wait(stream, event));
}

static PyObject *event_create(Device *self, PyObject *argument) {
    dt_cpu_event *event;
    int timing = PyObject_IsTrue(argument);
    if (timing < 0) return NULL;
    OPEN("event");
    int status = dt_cpu_event_new(device, timing, &event);
    if (status) return fail(self, "event", status, 0, NULL);
    return as_object(event);
}

static PyObject *event_destroy(Device *self, PyObject *argument) {
    void *event;
    if (as_pointer(argument, &event)) return NULL;
    OPEN("event_destroy");
    (void)device;
    return done_or_fail(self, "event_destroy", dt_cpu_event_destroy(event));
}

static PyObject *event_record(Device *self, PyObject *const *args, Py_ssize_t count) {
    void *event, *stream;
    if (check_count("event_record", count, 2) || as_pointer(args[0], &event) ||
        as_pointer(args[1], &stream))
        return NULL;
    OPEN("event_record");
    (void)device;
    return done_or_fail(self, "event_record", dt_cpu_event_record(event, stream));
}

static PyObject *event_done(Device *self, PyObject *argument) {
    void *event;
    if (as_pointer(argument, &event)) return NULL;
    OPEN("event_done");
    (void)device;
    return wait(self, "event_done", wait_event, event, 0);
}

static PyObject *event_synchronize(Device *self, PyObject *const *args, Py_ssize_t count) {
    void *event;
    int64_t limit_ns;
    if (check_count("event_synchronize", count, 2) || as_pointer(args[0], &event) ||
        as_ns(args[1], &limit_ns))
        return NULL;
    OPEN("event_synchronize");
    (void)device;
    return wait(self, "event_synchronize", wait_event, event, limit_ns);
}

static PyObject *event_seconds(Device *self, PyObject *const *args, Py_ssize_t count) {
    void *start, *end;
    int64_t from = 0, to = 0;
    if (check_count("event_seconds", count, 2) || as_pointer(args[0], &start) ||
        as_pointer(args[1], &end))
        return NULL;
    OPEN("event_seconds");
    (void)device;
    int status = dt_cpu_event_time(start, &from);
    if (!status) status = dt_cpu_event_time(end, &to);
    if (status)
        return fail(self, "event_seconds", status, 0,
                    "both events must be made for timing, recorded and done");
    return PyFloat_FromDouble((double)(to - from) * 1e-9);
}

/* -- kernels ----------------------------------------------------------------------------------- */

static PyObject *module_load(Device *self, PyObject *argument) {
    Py_buffer code;
    dt_cpu_module *module;
    char message[512] = "";
    int status;
    OPEN("module_load");
    if (PyObject_GetBuffer(argument, &code, PyBUF_SIMPLE)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    status = dt_cpu_module_load(device, code.buf, (size_t)code.len, &module, message,
                                sizeof message);
    Py_END_ALLOW_THREADS
    PyBuffer_Release(&code);
    if (status) return fail(self, "module_load", status, 0, message);
    return as_object(module);
}

static PyObject *module_unload(Device *self, PyObject *argument) {
    void *module;
    if (as_pointer(argument, &module)) return NULL;
    OPEN("module_unload");
    return done_or_fail(self, "module_unload", dt_cpu_module_unload(device, module));
}

static PyObject *function(Device *self, PyObject *const *args, Py_ssize_t count) {
    void *module;
    dt_cpu_function *found;
    if (check_count("function", count, 2) || as_pointer(args[0], &module)) return NULL;
    const char *symbol = PyUnicode_AsUTF8(args[1]);
    if (!symbol) return NULL;
    OPEN("function");
    int status = dt_cpu_function_find(device, module, symbol, &found);
    if (status == DT_CPU_INVALID) return PyLong_FromLong(0);
    if (status) return fail(self, "function", status, 0, NULL);
    return as_object(found);
}

static PyObject *function_arguments(Device *self, PyObject *const *args, Py_ssize_t count) {
    void *told;
    if (check_count("function_arguments", count, 2) || as_pointer(args[0], &told)) return NULL;
    OPEN("function_arguments");
    (void)device;
    PyObject *items = PySequence_Fast(args[1], "sizes must be a sequence of numbers");
    if (!items) return NULL;
    Py_ssize_t number = PySequence_Fast_GET_SIZE(items);
    int32_t *sizes = PyMem_Malloc((size_t)(number ? number : 1) * sizeof *sizes);
    if (!sizes) PyErr_NoMemory();
    for (Py_ssize_t i = 0; sizes && i < number; i++) {
        long size = PyLong_AsLong(PySequence_Fast_GET_ITEM(items, i));
        sizes[i] = size < 0 ? -8 : size > INT32_MAX ? INT32_MAX : (int32_t)size;
    }
    Py_DECREF(items);
    PyObject *answer = NULL;
    if (!PyErr_Occurred()) {
        int status = dt_cpu_function_arguments(told, sizes, (size_t)number);
        answer = status ? fail(self, "function_arguments", status, 0,
                               "the sizes are not those that were told before, or cannot be meant")
                        : Py_NewRef(Py_None);
    }
    PyMem_Free(sizes);
    return answer;
}

static int as_dims(PyObject *object, uint32_t dims[3]) {
    if (!PyTuple_Check(object) || PyTuple_GET_SIZE(object) != 3) {
        PyErr_SetString(PyExc_TypeError, "grid and block are tuples of three numbers");
        return -1;
    }
    for (Py_ssize_t i = 0; i < 3; i++) {
        unsigned long value = PyLong_AsUnsignedLong(PyTuple_GET_ITEM(object, i));
        if (value == (unsigned long)-1 && PyErr_Occurred()) return -1;
        dims[i] = value > UINT32_MAX ? UINT32_MAX : (uint32_t)value;
    }
    return 0;
}

static PyObject *launch(Device *self, PyObject *const *args, Py_ssize_t count) {
    void *called, *stream, *arguments;
    uint32_t grid[3], block[3];
    uint64_t shared;
    if (check_count("launch", count, 6) || as_pointer(args[0], &called) ||
        as_dims(args[1], grid) || as_dims(args[2], block) || as_u64(args[3], &shared) ||
        as_pointer(args[4], &stream) || as_pointer(args[5], &arguments))
        return NULL;
    OPEN("launch");
    (void)device;
    int status = DT_CPU_INVALID;
    if (shared <= UINT32_MAX)
        status = dt_cpu_launch(called, grid, block, (uint32_t)shared, stream, arguments);
    if (status)
        return fail(self, "launch", status, 0,
                    "the dimensions must be within the limits and the arguments' sizes told first");
    Py_RETURN_NONE;
}

/* -- the module -------------------------------------------------------------------------------- */

#define FAST(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL

static PyMethodDef methods[] = {
    {"close", (PyCFunction)device_close, METH_O, "close(limit_s) -> whether all work had ended"},
    {"synchronize", (PyCFunction)device_synchronize, METH_O, "synchronize(limit_s) -> bool"},
    {"alloc", (PyCFunction)alloc, METH_O, "alloc(nbytes) -> address; 0: allow more first"},
    {"allow", (PyCFunction)allow, METH_O, "allow(nbytes): what may be allocated from here on"},
    {"untouched", (PyCFunction)untouched, METH_NOARGS, "untouched() -> bytes that were never used"},
    {"freed", (PyCFunction)freed, METH_O, "freed(limit_s) -> bool: no free is queued any more"},
    {"free", FAST(device_free), "free(address, stream)"},
    {"check", (PyCFunction)check, METH_O,
     "check(address) -> None, or (bytes, offset) of the first guard byte that changed"},
    {"copy", FAST(copy), "copy(dst, src, nbytes, stream, host_free, limit_s) -> bool"},
    {"fill", FAST(fill), "fill(address, pattern, count, stream)"},
    {"stream_create", (PyCFunction)stream_create, METH_O, "stream_create(priority) -> handle"},
    {"stream_destroy", (PyCFunction)stream_destroy, METH_O, "stream_destroy(stream)"},
    {"stream_done", (PyCFunction)stream_done, METH_O, "stream_done(stream) -> bool"},
    {"stream_synchronize", FAST(stream_synchronize), "stream_synchronize(stream, limit_s) -> bool"},
    {"stream_wait", FAST(stream_wait), "stream_wait(stream, event)"},
    {"event_create", (PyCFunction)event_create, METH_O, "event_create(timing) -> handle"},
    {"event_destroy", (PyCFunction)event_destroy, METH_O, "event_destroy(event)"},
    {"event_record", FAST(event_record), "event_record(event, stream)"},
    {"event_done", (PyCFunction)event_done, METH_O, "event_done(event) -> bool"},
    {"event_synchronize", FAST(event_synchronize), "event_synchronize(event, limit_s) -> bool"},
    {"event_seconds", FAST(event_seconds), "event_seconds(start, end) -> float"},
    {"module_load", (PyCFunction)module_load, METH_O, "module_load(code) -> handle"},
    {"module_unload", (PyCFunction)module_unload, METH_O, "module_unload(module)"},
    {"function", FAST(function), "function(module, symbol) -> handle; 0: there is none"},
    {"function_arguments", FAST(function_arguments), "function_arguments(function, sizes)"},
    {"launch", FAST(launch), "launch(function, grid, block, shared, stream, arguments)"},
    {NULL, NULL, 0, NULL},
};

static PyType_Slot device_slots[] = {
    {Py_tp_new, device_new},
    {Py_tp_dealloc, device_dealloc},
    {Py_tp_methods, methods},
    {Py_tp_doc, "Device(name, cores, threads, guards): see dt_cpu_open."},
    {0, NULL},
};

static PyType_Spec device_spec = {"drivetrain.hal._cpu.Device", sizeof(Device), 0,
                                  Py_TPFLAGS_DEFAULT, device_slots};

static int exec_module(PyObject *module) {
    PyObject *errors = PyImport_ImportModule("drivetrain.hal.drivers.cpu_errors");
    if (!errors) return -1;
    Py_XSETREF(make_error, PyObject_GetAttrString(errors, "error"));
    Py_DECREF(errors);
    PyObject *type = make_error ? PyType_FromSpec(&device_spec) : NULL;
    PyObject *launcher = PyLong_FromUnsignedLongLong((uint64_t)(uintptr_t)dt_cpu_launch);
    PyObject *recorder = PyLong_FromUnsignedLongLong((uint64_t)(uintptr_t)dt_cpu_event_record);
    int bad = !type || !launcher || !recorder || PyModule_AddObjectRef(module, "Device", type) ||
              PyModule_AddObjectRef(module, "LAUNCHER", launcher) ||
              PyModule_AddObjectRef(module, "RECORDER", recorder);
    Py_XDECREF(type);
    Py_XDECREF(launcher);
    Py_XDECREF(recorder);
    return bad ? -1 : 0;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, exec_module},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "drivetrain.hal._cpu", "The cpu device: see drivetrain_hal.h.", 0, NULL,
    slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__cpu(void) { return PyModuleDef_Init(&definition); }

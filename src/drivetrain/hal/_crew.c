/* drivetrain.hal._crew: crew.c for Python. Addresses are plain integers; waits let go of the GIL. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "crew.h"
#include "drivetrain_hal.h"

typedef struct {
    PyObject_HEAD
    dt_crew *crew;
    long pid;
    long threads;
} Crew;

typedef struct {
    PyObject_HEAD
    dt_job *job;
    Crew *crew;
    dt_piece *pieces;
    Py_ssize_t count;
    int hashes;
} Job;

static PyObject *bad_input; /* drivetrain.errors.BadInput */
static PyTypeObject *job_type;

#ifdef _WIN32
#error "a crew needs POSIX threads"
#endif
#include <unistd.h>

static PyObject *crew_new(PyTypeObject *type, PyObject *args, PyObject *names) {
    static char *keywords[] = {"threads", NULL};
    int threads;
    if (!PyArg_ParseTupleAndKeywords(args, names, "i", keywords, &threads)) return NULL;
    if (threads < 1 || threads > 1024) {
        PyErr_Format(bad_input, "a crew of %d threads: give 1 to 1024", threads);
        return NULL;
    }
    Crew *self = (Crew *)type->tp_alloc(type, 0);
    if (!self) return NULL;
    self->crew = dt_crew_new((unsigned)threads);
    self->pid = (long)getpid();
    self->threads = threads;
    if (!self->crew) {
        Py_DECREF(self);
        return PyErr_NoMemory();
    }
    return (PyObject *)self;
}

static void crew_dealloc(Crew *self) {
    PyTypeObject *type = Py_TYPE(self);
    /* In a forked child the threads do not exist: there is nothing to end. */
    if (self->crew && self->pid == (long)getpid()) {
        Py_BEGIN_ALLOW_THREADS
        dt_crew_free(self->crew);
        Py_END_ALLOW_THREADS
    }
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static int check_piece(const uint64_t *piece) {
    uint64_t dst = piece[0], src = piece[1], nbytes = piece[2], first = piece[3];
    if (first != DT_NO_HASH &&
        (nbytes > DT_CHUNK_BYTES || first >= DT_CHUNK_WORDS ||
         first + (nbytes + 3) / 4 > DT_CHUNK_WORDS)) {
        PyErr_Format(bad_input,
                     "begin: %llu bytes from word %llu do not lie in one chunk of %zu bytes",
                     (unsigned long long)nbytes, (unsigned long long)first, DT_CHUNK_BYTES);
        return -1;
    }
    if (nbytes && (!src || (first == DT_NO_HASH && !dst))) {
        PyErr_SetString(bad_input, "begin: the address is 0");
        return -1;
    }
    return 0;
}

static PyObject *crew_begin(Crew *self, PyObject *argument) {
    if (self->pid != (long)getpid()) {
        PyErr_SetString(bad_input, "begin: this crew's threads are in the process that was forked");
        return NULL;
    }
    Py_buffer view;
    if (PyObject_GetBuffer(argument, &view, PyBUF_SIMPLE)) return NULL;
    Job *made = NULL;
    if (view.len % 32) {
        PyErr_SetString(bad_input, "begin takes four 64-bit numbers a piece");
        goto end;
    }
    made = (Job *)job_type->tp_alloc(job_type, 0);
    if (!made) goto end;
    made->count = view.len / 32;
    made->pieces = PyMem_Malloc((size_t)(made->count ? made->count : 1) * sizeof(dt_piece));
    if (!made->pieces) {
        PyErr_NoMemory();
        Py_CLEAR(made);
        goto end;
    }
    const uint64_t *numbers = view.buf;
    for (Py_ssize_t i = 0; i < made->count; i++, numbers += 4) {
        if (check_piece(numbers)) {
            Py_CLEAR(made);
            goto end;
        }
        made->pieces[i] = (dt_piece){(void *)(uintptr_t)numbers[0],
                                     (const void *)(uintptr_t)numbers[1], numbers[2], numbers[3],
                                     0};
        made->hashes |= numbers[3] != DT_NO_HASH;
    }
    made->job = dt_crew_begin(self->crew, made->pieces, (size_t)made->count);
    if (!made->job) {
        PyErr_NoMemory();
        Py_CLEAR(made);
        goto end;
    }
    made->crew = (Crew *)Py_NewRef(self);
end:
    PyBuffer_Release(&view);
    return (PyObject *)made;
}

static void finish(Job *self) {
    dt_job *job = self->job;
    self->job = NULL;
    if (!job) return;
    Py_BEGIN_ALLOW_THREADS
    dt_job_wait(job);
    Py_END_ALLOW_THREADS
}

static PyObject *job_wait(Job *self, PyObject *unused) {
    (void)unused;
    if (!self->pieces || !self->job) {
        PyErr_SetString(bad_input, "wait: the job was waited for before");
        return NULL;
    }
    finish(self);
    if (!self->hashes) Py_RETURN_NONE;
    PyObject *found = PyList_New(self->count);
    for (Py_ssize_t i = 0; found && i < self->count; i++) {
        PyObject *hash = PyLong_FromUnsignedLongLong(self->pieces[i].hash);
        if (!hash) Py_CLEAR(found);
        else PyList_SET_ITEM(found, i, hash);
    }
    return found;
}

static PyObject *job_done(Job *self, void *unused) {
    (void)unused;
    return PyBool_FromLong(!self->job || dt_job_done(self->job));
}

static void job_dealloc(Job *self) {
    PyTypeObject *type = Py_TYPE(self);
    finish(self);
    PyMem_Free(self->pieces);
    Py_XDECREF(self->crew);
    type->tp_free((PyObject *)self);
    Py_DECREF(type);
}

static PyMethodDef crew_methods[] = {
    {"begin", (PyCFunction)crew_begin, METH_O,
     "begin(pieces) -> Job. pieces: 64-bit numbers in native order, four a piece: destination (0: "
     "only hash), source, bytes, first word (2**64 - 1: only copy). The memory must stay until the "
     "job was waited for."},
    {NULL, NULL, 0, NULL},
};

static PyMethodDef job_methods[] = {
    {"wait", (PyCFunction)job_wait, METH_NOARGS,
     "wait() -> the pieces' hashes, or None when nothing was to be hashed. Once only."},
    {NULL, NULL, 0, NULL},
};

static PyGetSetDef job_attributes[] = {
    {"done", (getter)job_done, NULL, "whether all pieces are done", NULL},
    {NULL, NULL, NULL, NULL, NULL},
};

static PyType_Slot crew_slots[] = {
    {Py_tp_new, crew_new},
    {Py_tp_dealloc, crew_dealloc},
    {Py_tp_methods, crew_methods},
    {Py_tp_doc, "Crew(threads): threads that copy and hash memory together."},
    {0, NULL},
};

static PyType_Slot job_slots[] = {
    {Py_tp_dealloc, job_dealloc},
    {Py_tp_methods, job_methods},
    {Py_tp_getset, job_attributes},
    {Py_tp_doc, "Work that a crew does. Made by Crew.begin."},
    {0, NULL},
};

static PyType_Spec crew_spec = {"drivetrain.hal._crew.Crew", sizeof(Crew), 0, Py_TPFLAGS_DEFAULT,
                                crew_slots};
static PyType_Spec job_spec = {"drivetrain.hal._crew.Job", sizeof(Job), 0,
                               Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, job_slots};

static int exec_module(PyObject *module) {
    PyObject *errors = PyImport_ImportModule("drivetrain.errors");
    if (!errors) return -1;
    Py_XSETREF(bad_input, PyObject_GetAttrString(errors, "BadInput"));
    Py_DECREF(errors);
    if (!bad_input) return -1;
    PyObject *crew = PyType_FromSpec(&crew_spec);
    PyObject *job = PyType_FromSpec(&job_spec);
    if (!crew || !job || PyModule_AddObjectRef(module, "Crew", crew)) {
        Py_XDECREF(crew);
        Py_XDECREF(job);
        return -1;
    }
    Py_DECREF(crew);
    Py_XSETREF(job_type, (PyTypeObject *)job);
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
    PyModuleDef_HEAD_INIT, "drivetrain.hal._crew", "Threads that copy and hash memory.", 0, NULL,
    slots, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__crew(void) { return PyModuleDef_Init(&definition); }

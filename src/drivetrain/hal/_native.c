/* drivetrain.hal._native: core.c for Python, and DLPack's capsules. Addresses are plain integers; the
 * GIL is released while bytes move. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "drivetrain_hal.h"

static PyObject *bad_input; /* drivetrain.errors.BadInput */

static int as_u64(PyObject *object, uint64_t *value) {
    PyObject *index = PyNumber_Index(object);
    if (!index) return -1;
    *value = PyLong_AsUnsignedLongLong(index);
    Py_DECREF(index);
    if (*value == (uint64_t)-1 && PyErr_Occurred()) {
        if (!PyErr_ExceptionMatches(PyExc_OverflowError)) return -1;
        PyErr_Clear();
        PyErr_Format(bad_input, "%R is no address, size or word index: it must be in [0, 2^64)",
                     object);
        return -1;
    }
    return 0;
}

/* Reads (pointers..., nbytes[, first_word]) and checks them; 0 when they make sense. */
static int read_arguments(const char *name, PyObject *const *args, Py_ssize_t count, int pointers,
                          int hashes, uint64_t *out) {
    Py_ssize_t least = pointers + 1, most = least + hashes;
    if (count < least || count > most) {
        PyErr_Format(PyExc_TypeError, "%s takes %zd to %zd positional arguments, got %zd", name,
                     least, most, count);
        return -1;
    }
    out[most - 1] = 0;
    for (Py_ssize_t i = 0; i < count; i++)
        if (as_u64(args[i], &out[i])) return -1;
    uint64_t nbytes = out[pointers];
    if (hashes) {
        uint64_t first = out[pointers + 1];
        if (nbytes > DT_CHUNK_BYTES || first + (nbytes + 3) / 4 > DT_CHUNK_WORDS ||
            first >= DT_CHUNK_WORDS) {
            PyErr_Format(bad_input,
                         "%s: %llu bytes from word %llu do not lie in one chunk of %zu bytes; cut "
                         "the range at chunk borders",
                         name, nbytes, first, DT_CHUNK_BYTES);
            return -1;
        }
    }
    for (int i = 0; i < pointers; i++)
        if (nbytes && !out[i]) {
            PyErr_Format(bad_input, "%s: the address is 0", name);
            return -1;
        }
    return 0;
}

static PyObject *checksum(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    uint64_t a[3], hash;
    if (read_arguments("checksum", args, count, 1, 1, a)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    hash = dt_checksum((const void *)(uintptr_t)a[0], (size_t)a[1], a[2]);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(hash);
}

static PyObject *copy(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    uint64_t a[3];
    if (read_arguments("copy", args, count, 2, 0, a)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    dt_copy((void *)(uintptr_t)a[0], (const void *)(uintptr_t)a[1], (size_t)a[2]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *copy_checksum(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    uint64_t a[4], hash;
    if (read_arguments("copy_checksum", args, count, 2, 1, a)) return NULL;
    Py_BEGIN_ALLOW_THREADS
    hash = dt_copy_checksum((void *)(uintptr_t)a[0], (const void *)(uintptr_t)a[1], (size_t)a[2],
                            a[3]);
    Py_END_ALLOW_THREADS
    return PyLong_FromUnsignedLongLong(hash);
}

/* -- DLPack: what its header calls DLManagedTensor ---------------------------------------------- */

#define FRESH "dltensor" /* a capsule's name until a consumer takes the tensor */

typedef struct managed {
    struct {
        void *data;
        int32_t device_type, device_id, ndim;
        uint8_t code, bits;
        uint16_t lanes;
        int64_t *shape, *strides;
        uint64_t byte_offset;
    } tensor;
    void *manager;
    void (*deleter)(struct managed *);
} managed;

/* Nobody took the tensor. A consumer that refused it has its error pending, which stays: the deleter
 * is Python, which must not begin with one. */
static void unused(PyObject *capsule) {
    if (!PyCapsule_IsValid(capsule, FRESH)) return;
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    managed *tensor = PyCapsule_GetPointer(capsule, FRESH);
    if (tensor && tensor->deleter) tensor->deleter(tensor);
    PyErr_Restore(type, value, trace);
}

static PyObject *dltensor(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    uint64_t address;
    if (count != 1) return PyErr_Format(PyExc_TypeError, "dltensor takes one address");
    if (as_u64(args[0], &address)) return NULL;
    return PyCapsule_New((void *)(uintptr_t)address, FRESH, unused);
}

#define FAST(function) (PyCFunction)(void (*)(void))(function), METH_FASTCALL

static PyMethodDef methods[] = {
    {"checksum", FAST(checksum), "checksum(ptr, nbytes, first_word=0) -> int"},
    {"copy", FAST(copy), "copy(dst_ptr, src_ptr, nbytes) -> None"},
    {"copy_checksum", FAST(copy_checksum),
     "copy_checksum(dst_ptr, src_ptr, nbytes, first_word=0) -> int"},
    {"dltensor", FAST(dltensor), "dltensor(ptr) -> capsule, which calls the deleter unless used"},
    {NULL, NULL, 0, NULL},
};

static int exec_module(PyObject *module) {
    PyObject *errors = PyImport_ImportModule("drivetrain.errors");
    if (!errors) return -1;
    Py_XSETREF(bad_input, PyObject_GetAttrString(errors, "BadInput"));
    Py_DECREF(errors);
    return bad_input ? 0 : -1;
}

static PyModuleDef_Slot slots[] = {
    {Py_mod_exec, exec_module},
#ifdef Py_mod_gil
    {Py_mod_gil, Py_MOD_GIL_NOT_USED},
#endif
    {0, NULL},
};

static struct PyModuleDef definition = {
    PyModuleDef_HEAD_INIT, "drivetrain.hal._native", "Drivetrain's hot calls.", 0, methods, slots,
    NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&definition); }

#define _GNU_SOURCE /* memfd_create */
#include "cpu_queue.h"

#ifdef __linux__

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef MFD_EXEC
#define MFD_EXEC 0x0010U
#endif

static int write_all(int file, const char *bytes, size_t nbytes) {
    while (nbytes) {
        ssize_t wrote = write(file, bytes, nbytes);
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote <= 0) return -1;
        bytes += wrote;
        nbytes -= (size_t)wrote;
    }
    return 0;
}

/* A file in memory, or, where that cannot be executed, a private one without a name. */
static int memory_file(void) {
    int file = memfd_create("drivetrain-kernels", MFD_CLOEXEC | MFD_EXEC);
    if (file < 0 && errno == EINVAL) file = memfd_create("drivetrain-kernels", MFD_CLOEXEC);
    if (file >= 0) return file;
    char name[] = "/tmp/drivetrain-XXXXXX";
    file = mkostemp(name, O_CLOEXEC);
    if (file >= 0) unlink(name);
    return file;
}

/* The loader takes two files of one path for the same library, and numbers of files come again:
 * the path gets a part of its own, `number` in steps of "./" and ".//". */
static void unique_path(char *path, size_t room, int file, uint32_t number) {
    size_t at = (size_t)snprintf(path, room, "/proc/self/fd/");
    for (int bit = 0; bit < 32; bit++)
        at += (size_t)snprintf(path + at, room - at, number >> bit & 1 ? ".//" : "./");
    snprintf(path + at, room - at, "%d", file);
}

int dt_cpu_module_load(dt_cpu *device, const void *code, size_t nbytes, dt_cpu_module **module,
                       char *message, size_t room) {
    static _Atomic uint32_t loaded;
    char path[160];
    int status = dt_device_begin(device);
    if (status) return status;
    pthread_mutex_unlock(&device->mutex);
    int file = memory_file();
    if (file < 0 || write_all(file, code, nbytes)) {
        snprintf(message, room, "no file for it can be made: %s", strerror(errno));
        if (file >= 0) close(file);
        return DT_CPU_REJECTED;
    }
    dt_cpu_module *made = calloc(1, sizeof *made);
    if (!made) {
        close(file);
        return DT_CPU_NO_MEMORY;
    }
    unique_path(path, sizeof path, file, atomic_fetch_add(&loaded, 1));
    made->library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!made->library) {
        const char *said = dlerror();
        snprintf(message, room, "%s", said ? said : "the loader does not say why");
    }
    close(file);
    if (!made->library) {
        free(made);
        return DT_CPU_REJECTED;
    }
    atomic_init(&made->refs, 1);
    status = dt_device_begin(device);
    if (status) {
        dt_module_release(made);
        return status;
    }
    made->next = device->modules;
    device->modules = made;
    pthread_mutex_unlock(&device->mutex);
    *module = made;
    return DT_CPU_OK;
}

void dt_module_release(dt_cpu_module *module) {
    if (atomic_fetch_sub(&module->refs, 1) != 1) return;
    for (dt_cpu_function *each = module->functions, *next; each; each = next) {
        next = each->next;
        free(each->sizes);
        free(each);
    }
    dlclose(module->library);
    free(module);
}

static dt_cpu_module **link_to(dt_cpu *device, dt_cpu_module *module) {
    dt_cpu_module **link = &device->modules;
    while (*link && *link != module) link = &(*link)->next;
    return link;
}

int dt_cpu_module_unload(dt_cpu *device, dt_cpu_module *module) {
    int status = dt_device_begin(device);
    if (status) return status;
    dt_cpu_module **link = link_to(device, module);
    if (*link) *link = module->next;
    else status = DT_CPU_INVALID;
    pthread_mutex_unlock(&device->mutex);
    if (!status) dt_module_release(module);
    return status;
}

int dt_cpu_function_find(dt_cpu *device, dt_cpu_module *module, const char *symbol,
                         dt_cpu_function **function) {
    char name[DT_SYMBOL_BYTES + 8];
    if (!*symbol || strlen(symbol) >= DT_SYMBOL_BYTES) return DT_CPU_INVALID;
    int status = dt_device_begin(device);
    if (status) return status;
    if (!*link_to(device, module)) {
        pthread_mutex_unlock(&device->mutex);
        return DT_CPU_CLOSED;
    }
    dt_cpu_function *found = module->functions;
    while (found && strcmp(found->symbol, symbol)) found = found->next;
    if (!found) {
        snprintf(name, sizeof name, "dt_cpu_%s", symbol);
        void *entry = dlsym(module->library, name);
        if (!entry) status = DT_CPU_INVALID;
        else if (!(found = calloc(1, sizeof *found))) status = DT_CPU_NO_MEMORY;
        else {
            memcpy(&found->entry, &entry, sizeof entry);
            found->module = module;
            atomic_init(&found->count, -1);
            snprintf(found->symbol, sizeof found->symbol, "%s", symbol);
            found->next = module->functions;
            module->functions = found;
        }
    }
    pthread_mutex_unlock(&device->mutex);
    if (!status) *function = found;
    return status;
}

int dt_cpu_function_arguments(dt_cpu_function *function, const int32_t *sizes, size_t count) {
    static pthread_mutex_t telling = PTHREAD_MUTEX_INITIALIZER;
    if (!function || count > 4096) return DT_CPU_INVALID;
    int32_t *noted = malloc((count ? count : 1) * sizeof *noted);
    if (!noted) return DT_CPU_NO_MEMORY;
    size_t at = 0;
    int status = DT_CPU_OK;
    for (size_t i = 0; i < count; i++) {
        noted[i] = sizes[i] < 0 ? (int32_t)sizeof(void *) : sizes[i];
        if (noted[i] < 1 || noted[i] > 1 << 20) status = DT_CPU_INVALID;
        else at = ((at + (noted[i] > 8 ? 15 : 7)) & ~(size_t)(noted[i] > 8 ? 15 : 7)) +
                  (size_t)noted[i];
    }
    pthread_mutex_lock(&telling);
    int32_t known = atomic_load(&function->count);
    if (!status && known < 0) {
        function->sizes = noted;
        function->values = at;
        noted = NULL;
        atomic_store(&function->count, (int32_t)count);
    } else if (!status && ((size_t)known != count ||
                           memcmp(function->sizes, noted, count * sizeof *noted))) {
        status = DT_CPU_INVALID;
    }
    pthread_mutex_unlock(&telling);
    free(noted);
    return status;
}

#else
typedef int dt_module_needs_linux;
#endif

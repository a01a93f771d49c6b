/* What can be queued on a stream of the cpu device: copies, fills, frees and launches. */
#include "cpu_queue.h"

#ifdef __linux__

#include <stdlib.h>
#include <string.h>

#define MOST_SPARES 4096
#define WRITTEN ((size_t)3 * DT_LINE) /* bytes of a command that most callers write */
#define AT_ONCE ((size_t)2 << 10)   /* bytes that the caller copies with the mutex held */
#define BY_CALLER ((size_t)32 << 10) /* bytes that the caller copies when the stream is idle */
#define STAGED ((size_t)256 << 10)  /* bytes of a host source that are copied into the command */
#define FREED_BY_CALLER ((size_t)4 << 20)

/* -- commands ---------------------------------------------------------------------------------- */

dt_command *dt_command_new(dt_cpu *device, dt_command_kind kind) {
    dt_command *command = device->spare;
    if (command) {
        device->spare = command->next;
        device->spares--;
        if (command->next) /* the next caller finds it at hand */
            for (size_t at = 0; at < WRITTEN; at += DT_LINE)
                dt_fetch_to_write((const char *)command->next + at);
    } else {
        command = aligned_alloc(DT_LINE, sizeof *command);
        if (!command) return NULL;
    }
    command->next = NULL;
    command->payload = NULL;
    command->kind = kind;
    atomic_store_explicit(&command->code, 0, memory_order_relaxed);
    return command;
}

void dt_command_free(dt_cpu *device, dt_command *command) {
    if (device->spares < MOST_SPARES) {
        command->next = device->spare;
        device->spare = command;
        device->spares++;
    } else {
        free(command);
    }
}

void dt_command_release(dt_command *command) {
    free(command->payload);
    if (command->kind == DT_RUN) dt_module_release(command->as.run.function->module);
    else if (command->kind == DT_RECORD || command->kind == DT_WAIT)
        dt_mark_release(command->as.mark);
}

/* -- what is queued ---------------------------------------------------------------------------- */

void dt_fill(char *dst, size_t nbytes, const unsigned char pattern[16]) {
    unsigned char block[256];
    for (size_t at = 0; at < sizeof block; at += 16) memcpy(block + at, pattern, 16);
    if (!memcmp(block, block + 1, 15)) {
        memset(dst, block[0], nbytes);
        return;
    }
    for (; nbytes >= sizeof block; nbytes -= sizeof block, dst += sizeof block)
        memcpy(dst, block, sizeof block);
    memcpy(dst, block, nbytes);
}

int dt_cpu_copy(dt_cpu_stream *stream, void *dst, const void *src, size_t nbytes, int host_free,
                int64_t limit_ns) {
    dt_cpu *device;
    void *staged = NULL;
    int status = dt_stream_begin(stream, &device);
    if (status) return status;
    if (nbytes && (!dst || !src)) {
        pthread_mutex_unlock(&device->mutex);
        return DT_CPU_INVALID;
    }
    if (!stream->scheduled && nbytes <= BY_CALLER) {
        if (nbytes <= AT_ONCE) {
            dt_copy(dst, src, nbytes);
            pthread_mutex_unlock(&device->mutex);
            return DT_CPU_OK;
        }
        dt_caller_takes(device, stream);
        dt_copy(dst, src, nbytes);
        dt_caller_did(device, stream);
        return DT_CPU_OK;
    }
    if (host_free && nbytes <= STAGED && nbytes > DT_COMMAND_ROOM) {
        pthread_mutex_unlock(&device->mutex);
        staged = malloc(nbytes);
        if (!staged) return DT_CPU_NO_MEMORY;
        dt_copy(staged, src, nbytes);
        status = dt_stream_begin(stream, &device);
        if (status) {
            free(staged);
            return status;
        }
    }
    dt_command *command = dt_command_new(device, DT_COPY);
    if (!command) {
        pthread_mutex_unlock(&device->mutex);
        free(staged);
        return DT_CPU_NO_MEMORY;
    }
    command->payload = staged;
    command->as.copy.dst = dst;
    command->as.copy.src = staged ? staged : src;
    command->as.copy.nbytes = nbytes;
    if (host_free && nbytes <= DT_COMMAND_ROOM) {
        memcpy(command->room, src, nbytes);
        command->as.copy.src = (char *)command->room;
    }
    if (host_free && nbytes > STAGED)
        return dt_stream_append_and_wait(device, stream, command, limit_ns);
    dt_stream_append(device, stream, command);
    return DT_CPU_OK;
}

int dt_cpu_fill(dt_cpu_stream *stream, void *dst, const void *pattern, size_t width, size_t count) {
    dt_cpu *device;
    unsigned char whole[16];
    if ((width != 1 && width != 2 && width != 4 && width != 8 && width != 16) || !pattern ||
        (count && (!dst || (uintptr_t)dst % width || count > SIZE_MAX / width)))
        return DT_CPU_INVALID;
    for (size_t at = 0; at < sizeof whole; at += width) memcpy(whole + at, pattern, width);
    int status = dt_stream_begin(stream, &device);
    if (status) return status;
    size_t nbytes = count * width;
    if (!stream->scheduled && nbytes <= BY_CALLER) {
        if (nbytes <= AT_ONCE) {
            dt_fill(dst, nbytes, whole);
            pthread_mutex_unlock(&device->mutex);
            return DT_CPU_OK;
        }
        dt_caller_takes(device, stream);
        dt_fill(dst, nbytes, whole);
        dt_caller_did(device, stream);
        return DT_CPU_OK;
    }
    dt_command *command = dt_command_new(device, DT_FILL);
    if (!command) {
        pthread_mutex_unlock(&device->mutex);
        return DT_CPU_NO_MEMORY;
    }
    command->as.fill.dst = dst;
    command->as.fill.nbytes = nbytes;
    memcpy(command->as.fill.pattern, whole, sizeof whole);
    dt_stream_append(device, stream, command);
    return DT_CPU_OK;
}

int dt_cpu_free(dt_cpu *device, void *address, dt_cpu_stream *stream) {
    dt_cpu *found;
    size_t mapped;
    int status = dt_stream_begin(stream, &found);
    if (status) return status;
    if (found != device) {
        pthread_mutex_unlock(&found->mutex);
        return DT_CPU_INVALID;
    }
    dt_command *command = dt_command_new(device, DT_FREE);
    if (!command) {
        pthread_mutex_unlock(&device->mutex);
        return DT_CPU_NO_MEMORY;
    }
    status = dt_memory_leave(&device->memory, address, &mapped);
    if (status) {
        dt_command_free(device, command);
        pthread_mutex_unlock(&device->mutex);
        return status;
    }
    if (!stream->scheduled && mapped <= FREED_BY_CALLER) {
        dt_command_free(device, command);
        dt_caller_takes(device, stream);
        dt_memory_free(&device->memory, address);
        dt_caller_did(device, stream);
        return DT_CPU_OK;
    }
    command->as.address = address;
    dt_stream_append(device, stream, command);
    return DT_CPU_OK;
}

int dt_cpu_launch(void *function, const uint32_t grid[3], const uint32_t block[3], uint32_t shared,
                  void *stream, void **arguments) {
    dt_cpu_function *called = function;
    dt_cpu *device;
    if (!called || !grid[0] || !grid[1] || !grid[2] || !block[0] || !block[1] || !block[2] ||
        grid[0] > INT32_MAX || grid[1] > UINT16_MAX || grid[2] > UINT16_MAX)
        return DT_CPU_INVALID;
    int status = dt_stream_begin(stream, &device);
    if (status) return status;
    int32_t count = atomic_load_explicit(&called->count, memory_order_acquire);
    dt_command *command = count < 0 ? NULL : dt_command_new(device, DT_RUN);
    if (!command) {
        pthread_mutex_unlock(&device->mutex);
        return count < 0 ? DT_CPU_INVALID : DT_CPU_NO_MEMORY;
    }
    size_t table = ((size_t)count * sizeof(void *) + 15) & ~(size_t)15;
    unsigned char *room = command->room;
    if (table + called->values > DT_COMMAND_ROOM) {
        room = command->payload = malloc(table + called->values);
        if (!room) {
            dt_command_free(device, command);
            pthread_mutex_unlock(&device->mutex);
            return DT_CPU_NO_MEMORY;
        }
    }
    void **pointers = (void **)(void *)room;
    size_t at = table;
    for (int32_t i = 0; i < count; i++) {
        size_t nbytes = (size_t)called->sizes[i], grain = nbytes > 8 ? 15 : 7;
        at = (at + grain) & ~grain;
        pointers[i] = room + at;
        memcpy(room + at, arguments[i], nbytes);
        at += nbytes;
    }
    command->as.run.function = called;
    command->as.run.arguments = pointers;
    command->as.run.range = (dt_cpu_range){
        {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, shared, 0, 0, 0};
    atomic_fetch_add_explicit(&called->module->refs, 1, memory_order_relaxed);
    dt_stream_append(device, stream, command);
    return DT_CPU_OK;
}

#else
typedef int dt_commands_need_linux;
#endif

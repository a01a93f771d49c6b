#define _GNU_SOURCE /* mincore, MAP_ANONYMOUS, madvise */
#include "cpu_queue.h"

#ifdef __linux__

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define ALIGNMENT ((size_t)64)
#define GUARD ((size_t)64)
#define GUARD_BYTE 0xA7
#define MAPPED_FROM ((size_t)1 << 20)
#define HUGE_FROM ((size_t)4 << 20)
#define HUGE_PAGE ((size_t)2 << 20)
#define PAGE ((size_t)4096)

static size_t slot_of(const dt_memory *memory, const void *address) {
    return (size_t)(((uintptr_t)address >> 6) * UINT64_C(0x9E3779B97F4A7C15) >> 20) &
           (memory->room - 1);
}

static dt_allocation *find(dt_memory *memory, const void *address) {
    if (!memory->room || !address) return NULL;
    for (size_t i = slot_of(memory, address); memory->slots[i].address;
         i = (i + 1) & (memory->room - 1))
        if (memory->slots[i].address == address) return &memory->slots[i];
    return NULL;
}

static void place(dt_memory *memory, dt_allocation allocation) {
    size_t i = slot_of(memory, allocation.address);
    while (memory->slots[i].address) i = (i + 1) & (memory->room - 1);
    memory->slots[i] = allocation;
    memory->used++;
}

static int make_room(dt_memory *memory) {
    if (memory->room && memory->used * 2 < memory->room) return DT_CPU_OK;
    size_t old_room = memory->room, room = old_room ? old_room * 2 : 64;
    dt_allocation *old = memory->slots, *slots = calloc(room, sizeof *slots);
    if (!slots) return DT_CPU_NO_MEMORY;
    memory->slots = slots;
    memory->room = room;
    memory->used = 0;
    for (size_t i = 0; i < old_room; i++)
        if (old[i].address) place(memory, old[i]);
    free(old);
    return DT_CPU_OK;
}

/* Linear probing without tombstones: what would not be found behind the hole moves into it. */
static void take_out(dt_memory *memory, dt_allocation *allocation) {
    size_t mask = memory->room - 1, hole = (size_t)(allocation - memory->slots), i = hole;
    for (;;) {
        i = (i + 1) & mask;
        if (!memory->slots[i].address) break;
        size_t home = slot_of(memory, memory->slots[i].address);
        if (((i - home) & mask) >= ((i - hole) & mask)) {
            memory->slots[hole] = memory->slots[i];
            hole = i;
        }
    }
    memory->slots[hole].address = NULL;
    memory->used--;
}

static void give_back(const dt_allocation *allocation) {
    if (allocation->mapped) munmap(allocation->base, allocation->mapped);
    else free(allocation->base);
}

static int get(size_t nbytes, int guards, dt_allocation *made) {
    size_t before = guards ? GUARD : 0, size = nbytes ? nbytes : 1;
    if (size > SIZE_MAX / 4) return DT_CPU_NO_MEMORY;
    size_t whole = size + 2 * before;
    *made = (dt_allocation){NULL, NULL, nbytes, 0, 0};
    if (whole >= MAPPED_FROM) {
        /* Aligned to huge pages where that is a small part of it. */
        size_t extra = whole >= HUGE_FROM ? HUGE_PAGE - PAGE : 0;
        size_t mapped = ((whole + PAGE - 1) & ~(PAGE - 1)) + extra;
        char *base = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base == MAP_FAILED) return DT_CPU_NO_MEMORY;
        char *start = base;
        if (extra) {
            start = (char *)(((uintptr_t)base + HUGE_PAGE - 1) & ~(uintptr_t)(HUGE_PAGE - 1));
            size_t head = (size_t)(start - base), tail = extra - head;
            if (head) munmap(base, head);
            if (tail) munmap(base + mapped - tail, tail);
            mapped -= extra;
#ifdef MADV_HUGEPAGE
            madvise(start, mapped, MADV_HUGEPAGE);
#endif
        }
        made->base = start;
        made->mapped = mapped;
    } else {
        void *base = NULL;
        if (posix_memalign(&base, ALIGNMENT, whole)) return DT_CPU_NO_MEMORY;
        made->base = base;
    }
    made->address = made->base + before;
    if (guards) {
        memset(made->base, GUARD_BYTE, before);
        memset(made->address + nbytes, GUARD_BYTE, before);
    }
    return DT_CPU_OK;
}

int dt_cpu_alloc(dt_cpu *device, size_t nbytes, void **address) {
    int status = dt_device_begin(device);
    if (status) return status;
    pthread_mutex_unlock(&device->mutex);
    dt_memory *memory = &device->memory;
    uint64_t allowed = atomic_load(&memory->allowance);
    do {
        if (allowed < nbytes) return DT_CPU_ALLOWANCE;
    } while (!atomic_compare_exchange_weak(&memory->allowance, &allowed, allowed - nbytes));
    dt_allocation made;
    status = get(nbytes, memory->guards, &made);
    if (status) return status;
    pthread_mutex_lock(&memory->mutex);
    status = memory->closed ? DT_CPU_CLOSED : make_room(memory);
    if (!status) place(memory, made);
    pthread_mutex_unlock(&memory->mutex);
    if (status) give_back(&made);
    else *address = made.address;
    return status;
}

void dt_cpu_allow(dt_cpu *device, uint64_t nbytes) {
    atomic_store(&device->memory.allowance, nbytes);
}

static uint64_t untouched_of(char *base, size_t mapped) {
    unsigned char resident[4096];
    uint64_t untouched = 0;
    for (size_t at = 0; at < mapped; at += sizeof resident * PAGE) {
        size_t left = mapped - at;
        size_t nbytes = left < sizeof resident * PAGE ? left : sizeof resident * PAGE;
        if (mincore(base + at, nbytes, resident)) continue; /* freed meanwhile */
        for (size_t page = 0; page < nbytes / PAGE; page++)
            untouched += resident[page] & 1 ? 0 : PAGE;
    }
    return untouched;
}

uint64_t dt_cpu_untouched(dt_cpu *device) {
    dt_memory *memory = &device->memory;
    if (dt_device_begin(device)) return 0;
    pthread_mutex_unlock(&device->mutex);
    /* Looked at without the mutex: it takes a while. */
    pthread_mutex_lock(&memory->mutex);
    size_t count = 0;
    dt_allocation *noted = malloc((memory->used ? memory->used : 1) * sizeof *noted);
    for (size_t i = 0; noted && i < memory->room; i++)
        if (memory->slots[i].address && memory->slots[i].mapped) noted[count++] = memory->slots[i];
    pthread_mutex_unlock(&memory->mutex);
    uint64_t untouched = 0;
    for (size_t i = 0; i < count; i++) untouched += untouched_of(noted[i].base, noted[i].mapped);
    free(noted);
    return untouched;
}

int dt_memory_leave(dt_memory *memory, void *address, size_t *mapped) {
    pthread_mutex_lock(&memory->mutex);
    dt_allocation *found = find(memory, address);
    int known = found && !found->leaving;
    if (known) {
        found->leaving = 1;
        memory->leaving++;
        *mapped = found->mapped;
    }
    pthread_mutex_unlock(&memory->mutex);
    return known ? DT_CPU_OK : DT_CPU_INVALID;
}

void dt_memory_free(dt_memory *memory, void *address) {
    pthread_mutex_lock(&memory->mutex);
    dt_allocation *found = find(memory, address);
    dt_allocation gone = *found;
    take_out(memory, found);
    pthread_mutex_unlock(&memory->mutex);
    give_back(&gone);
    pthread_mutex_lock(&memory->mutex);
    if (--memory->leaving == 0) {
        atomic_fetch_add(&memory->left, 1);
        dt_wake(&memory->left, UINT32_MAX);
    }
    pthread_mutex_unlock(&memory->mutex);
}

int dt_cpu_freed(dt_cpu *device, int64_t limit_ns) {
    int status = dt_device_begin(device);
    if (status) return status;
    pthread_mutex_unlock(&device->mutex);
    dt_memory *memory = &device->memory;
    int64_t began = dt_now_ns();
    for (;;) {
        uint32_t seen = atomic_load(&memory->left);
        pthread_mutex_lock(&memory->mutex);
        size_t leaving = memory->leaving;
        pthread_mutex_unlock(&memory->mutex);
        if (!leaving) return DT_CPU_OK;
        int64_t rest = limit_ns < 0 ? -1 : limit_ns - (dt_now_ns() - began);
        if (limit_ns >= 0 && rest <= 0) return DT_CPU_LATE;
        dt_sleep(&memory->left, seen, rest);
    }
}

static int64_t changed(const char *bytes) {
    for (size_t i = 0; i < GUARD; i++)
        if ((unsigned char)bytes[i] != GUARD_BYTE) return (int64_t)i;
    return -1;
}

int dt_cpu_check(dt_cpu *device, void *address, size_t *nbytes, int64_t *offset) {
    int status = dt_device_begin(device);
    if (status) return status;
    pthread_mutex_unlock(&device->mutex);
    dt_memory *memory = &device->memory;
    pthread_mutex_lock(&memory->mutex);
    dt_allocation *found = find(memory, address);
    if (!found || found->leaving) status = DT_CPU_INVALID;
    else if (memory->guards) {
        *nbytes = found->nbytes;
        int64_t before = changed(found->base), behind = changed(found->address + found->nbytes);
        if (before >= 0) *offset = before - (int64_t)GUARD;
        else if (behind >= 0) *offset = (int64_t)found->nbytes + behind;
        if (before >= 0 || behind >= 0) status = DT_CPU_DAMAGED;
    }
    pthread_mutex_unlock(&memory->mutex);
    return status;
}

void dt_memory_free_all(dt_memory *memory) {
    pthread_mutex_lock(&memory->mutex);
    memory->closed = 1;
    for (size_t i = 0; i < memory->room; i++)
        if (memory->slots[i].address) give_back(&memory->slots[i]);
    free(memory->slots);
    memory->slots = NULL;
    memory->room = memory->used = memory->leaving = 0;
    atomic_fetch_add(&memory->left, 1);
    dt_wake(&memory->left, UINT32_MAX);
    pthread_mutex_unlock(&memory->mutex);
}

#else
typedef int dt_memory_needs_linux;
#endif

/* rocprofiler-sdk's device counting and hsa_init, in one library: two GPUs and a processor. It is strict
   about the order of calls: a context is made while the tool is initialised, counters are listed and
   sampled once HSA is there, one context counts at a time. FAKE_ROCP_FAULT=NAME: that call fails.
   FAKE_ROCP_VERSION: its version. FAKE_ROCP_FEW=1: the hardware counts one thing at a time.
   FAKE_ROCP_LEFT=FILE: at exit, whether it still counts. */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { uint64_t handle; } Id;
typedef struct { const char *name; uint32_t handle; } Client;
typedef struct { size_t size; int (*initialize)(void *, void *); void (*finalize)(void *); void *data; } Result;
typedef struct {
    uint64_t size; Id id; int type; uint32_t before[21]; uint16_t vendor, device; uint32_t location, domain;
    uint32_t more[64];
} Agent;
typedef struct { Id id; const char *name, *description, *block, *expression; uint8_t flags; } Info;
typedef struct { uint64_t id; double value; uint64_t dispatch, user; Id agent; } Record;
typedef int (*Set)(Id, Id);
typedef void (*Choose)(Id, Id, Set, void *);

static const char *names[] = {"SQ_WAVES", "FETCH_SIZE", "WRITE_SIZE", "GPU_UTIL", "OccupancyPercent", "VALUBusy"};
enum { COUNTERS = 6, ERROR = 1, LOCKED = 16, NO_HSA = 22, LIMIT = 37 };
static int configuring, hsa, counting, configs;
static Choose choose;
static Id taken, context_agent;
static uint64_t wanted[64][COUNTERS], width[64];

static int fails(const char *name) {
    const char *fault = getenv("FAKE_ROCP_FAULT");
    return fault && !strcmp(fault, name);
}
#define CALL if (fails(__func__)) return ERROR
static void __attribute__((destructor)) ended(void) {
    const char *path = getenv("FAKE_ROCP_LEFT");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (file) fprintf(file, "%d", counting), fclose(file);
}

int rocprofiler_force_configure(Result *(*configure)(uint32_t, const char *, uint32_t, Client *)) {
    CALL;
    static Client client;
    uint32_t version = getenv("FAKE_ROCP_VERSION") ? (uint32_t)atoi(getenv("FAKE_ROCP_VERSION")) : 10100;
    Result *result = configure(version, "fake", 0, &client);
    if (!result || result->size != sizeof *result || !client.name || strcmp(client.name, "drivetrain")) return ERROR;
    configuring = 1;
    result->initialize(NULL, result->data);
    configuring = 0;
    return 0;
}
int rocprofiler_query_available_agents(int version, int (*told)(int, const void **, size_t, void *), size_t size, void *data) {
    CALL;
    static Agent agents[3];
    const void *all[3];
    if (version != 1 || size > sizeof *agents) return ERROR;
    for (int i = 0; i < 3; i++) {
        agents[i] = (Agent){.size = sizeof *agents, .id = {100 + (uint64_t)i}, .type = i ? 2 : 1, .vendor = 0x1002};
        agents[i].location = i ? 0xc100u + 0x100u * (uint32_t)i : 0; /* c2:00.0, c3:00.0 */
        all[i] = agents + i;
    }
    return told(1, all, 3, data);
}
int rocprofiler_create_context(Id *out) {
    CALL;
    if (!configuring) return LOCKED;
    out->handle = 7;
    return 0;
}
int rocprofiler_configure_device_counting_service(Id context, Id buffer, Id agent, Choose callback, void *data) {
    CALL;
    if (!configuring) return LOCKED;
    if (context.handle != 7 || buffer.handle || data) return ERROR;
    choose = callback, context_agent = agent;
    return 0;
}
int hsa_init(void) {
    CALL;
    return hsa = 1, 0;
}
int rocprofiler_iterate_agent_supported_counters(Id agent, int (*told)(Id, Id *, size_t, void *), void *data) {
    CALL;
    if (!hsa) return NO_HSA;
    Id ids[COUNTERS];
    for (int i = 0; i < COUNTERS; i++) ids[i].handle = 1000 + (uint64_t)i;
    return told(agent, ids, COUNTERS, data);
}
int rocprofiler_query_counter_info(Id counter, int version, void *out) {
    CALL;
    if (version != 1 || counter.handle - 1000 >= COUNTERS) return ERROR;
    *(Info *)out = (Info){.id = counter, .name = names[counter.handle - 1000]};
    return 0;
}
int rocprofiler_create_counter_config(Id agent, Id *counters, size_t count, Id *out) {
    CALL;
    if (agent.handle != context_agent.handle || !count || configs >= 63) return ERROR;
    if (getenv("FAKE_ROCP_FEW") && count > 1) return LIMIT;
    out->handle = (uint64_t)++configs, width[configs] = count;
    for (size_t i = 0; i < count; i++) wanted[configs][i] = counters[i].handle;
    return 0;
}
static int take(Id context, Id config) {
    taken = config;
    return context.handle == 7 ? 0 : ERROR;
}
int rocprofiler_start_context(Id context) {
    CALL;
    if (context.handle != 7 || counting || !hsa) return ERROR;
    counting = 1, choose(context, context_agent, take, NULL);
    return 0;
}
int rocprofiler_stop_context(Id context) {
    return context.handle == 7 && counting ? (counting = 0) : ERROR;
}
int rocprofiler_sample_device_counting_service(Id context, Id user, int flags, Record *out, size_t *count) {
    CALL;
    size_t n = 0;
    if (context.handle != 7 || user.handle || flags || !counting || !taken.handle) return ERROR;
    for (size_t i = 0; i < width[taken.handle]; i++)
        for (int part = 0; part < 2; part++, n++) { /* two parts of the chip */
            if (n >= *count) return ERROR;
            uint64_t which = wanted[taken.handle][i];
            out[n] = (Record){.id = which << 8 | (uint64_t)part, .agent = context_agent};
            /* shares: 10 n % on the one, 10 n + 10 % on the other; sizes: 1,000,000 KiB on each */
            out[n].value = which < 1003 ? 1e6 : 10.0 * (double)(which - 1000) + 10.0 * part;
        }
    *count = n;
    return 0;
}
int rocprofiler_query_record_counter_id(uint64_t record, Id *out) {
    CALL;
    out->handle = record >> 8;
    return 0;
}

/* Level Zero's metrics, beside the rest of the loader in ../drivers/fake_ze.c: two groups, of which the
   second is the one sampled by time. It is strict about the order of calls: a streamer of a group that is
   active, one at a time, closed before the group is given up. FAKE_ZET_FAULT=NAME: that call fails.
   FAKE_ZET_LEFT=FILE: what was not given back at exit is written there. Of Sysman it has what lists a card
   without sensors. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GROUP_PROPERTIES = 1, METRIC_PROPERTIES = 2, STREAMER_DESC = 3 };
enum { INVALID = 0x78000004, UNAVAILABLE = 0x70020000, UNINITIALIZED = 0x78000001 };
typedef struct { int stype; void *next; char name[256], description[256]; uint32_t sampling, domain, count; } Group;
typedef struct { int stype; void *next; char name[256], description[256], component[256]; uint32_t tier; int type, result; char units[256]; } Metric;
typedef struct { int stype; const void *next; uint32_t every, period; } Desc;
typedef struct { int type; union { uint32_t u32; uint64_t u64; float f32; double f64; uint8_t b8; } value; } Typed;

static const struct { const char *name, *units; int type, result; } metrics[] = {
    {"GpuTime", "ns", 0, 1}, {"GpuBusy", "percent", 6, 2}, {"XveActive", "percent", 6, 2},
    {"GPU_MEMORY_BYTE_READ_RATE", "gbps", 3, 3}, {"GtiWriteThroughput", "bytes/s", 3, 1}, {"Odd", "", 6, 77},
};
enum { METRICS = 6, REPORTS = 4 };
static void *active;
static int open_streamers;

static int fails(const char *name) {
    const char *fault = getenv("FAKE_ZET_FAULT"), *on = getenv("ZET_ENABLE_METRICS");
    if (fault && !strcmp(fault, "hang")) for (;;) ;
    if (!on || strcmp(on, "1")) return UNINITIALIZED;
    return fault && !strcmp(fault, name) ? UNAVAILABLE : 0;
}
#define CALL int f_ = fails(__func__); if (f_) return f_
static void __attribute__((destructor)) ended(void) {
    const char *path = getenv("FAKE_ZET_LEFT");
    FILE *file = path ? fopen(path, "w") : NULL;
    if (file) fprintf(file, "%d %d", active != NULL, open_streamers), fclose(file);
}

int zetMetricGroupGet(void *device, uint32_t *count, void **out) {
    CALL;
    if (!device) return INVALID;
    for (uint32_t i = 0; out && i < *count && i < 2; i++) out[i] = (void *)(uintptr_t)(0x10 + i);
    *count = 2;
    return 0;
}
int zetMetricGroupGetProperties(void *group, Group *out) {
    CALL;
    if (out->stype != GROUP_PROPERTIES) return INVALID;
    strcpy(out->name, "ComputeBasic"), strcpy(out->description, "Compute");
    out->sampling = group == (void *)0x11 ? 2 : 1, out->domain = 0, out->count = METRICS;
    return 0;
}
int zetMetricGet(void *group, uint32_t *count, void **out) {
    CALL;
    if (group != (void *)0x11) return INVALID;
    for (uint32_t i = 0; out && i < *count && i < METRICS; i++) out[i] = (void *)(uintptr_t)(0x100 + i);
    *count = METRICS;
    return 0;
}
int zetMetricGetProperties(void *metric, Metric *out) {
    CALL;
    if (out->stype != METRIC_PROPERTIES) return INVALID;
    int n = (int)((uintptr_t)metric & 0xff);
    strcpy(out->name, metrics[n].name), strcpy(out->units, metrics[n].units);
    out->type = metrics[n].type, out->result = metrics[n].result, out->tier = 1;
    return 0;
}
int zetContextActivateMetricGroups(void *context, void *device, uint32_t count, void **groups) {
    CALL;
    if (!context || !device || (count != 0) != (groups != NULL) || open_streamers) return INVALID;
    active = count ? groups[0] : NULL;
    return 0;
}
int zetMetricStreamerOpen(void *context, void *device, void *group, Desc *desc, void *event, void **out) {
    CALL;
    if (!context || !device || group != active || desc->stype != STREAMER_DESC || !desc->period || event || open_streamers)
        return INVALID;
    open_streamers++, *out = (void *)0x99;
    return 0;
}
int zetMetricStreamerReadData(void *streamer, uint32_t most, size_t *size, uint8_t *out) {
    CALL;
    if (streamer != (void *)0x99 || !open_streamers || most != UINT32_MAX) return INVALID;
    size_t have = getenv("FAKE_ZET_EMPTY") ? 0 : REPORTS * 8;
    if (out) for (size_t i = 0; i < *size && i < have; i++) out[i] = (uint8_t)(i / 8);
    *size = have;
    return 0;
}
int zetMetricGroupCalculateMetricValues(void *group, int kind, size_t size, const uint8_t *data, uint32_t *count, Typed *out) {
    CALL;
    if (group != (void *)0x11 || kind || size != REPORTS * 8) return INVALID;
    for (uint32_t r = 0; out && r < REPORTS; r++) {
        if (data[r * 8] != r) return INVALID;
        Typed *at = out + r * METRICS;
        for (int m = 0; m < METRICS; m++) at[m].type = metrics[m].result;
        at[0].value.u64 = 5000000;
        at[1].value.f32 = 50.0f + 10 * (float)r; /* 50 60 70 80 */
        at[2].value.f32 = 25.0f;
        at[3].value.f64 = 100.0 * (r + 1);       /* 100 200 300 400 */
        at[4].value.u64 = 7000000000ull;
    }
    *count = REPORTS * METRICS;
    return 0;
}
int zesInit(uint32_t flags) { return (int)flags; }
int zesDriverGet(uint32_t *count, void **out) {
    if (out) out[0] = (void *)1;
    return *count = 1, 0;
}
int zesDeviceGet(void *driver, uint32_t *count, void **out) {
    if (out) out[0] = driver;
    return *count = 1, 0;
}
typedef struct { int stype; void *next; uint32_t domain, bus, device, function; } Pci;
int zesDevicePciGetProperties(void *device, Pci *out) {
    out->domain = 0, out->bus = 0xf9, out->device = out->function = 0;
    return device ? 0 : INVALID;
}
int zetMetricStreamerClose(void *streamer) {
    if (streamer != (void *)0x99 || !open_streamers) return INVALID;
    open_streamers--;
    return 0;
}

/* A loader with one Intel GPU, built against the vendor's own header, so that the layouts of our
   structures are the header's. FAKE_SYSMAN_LOST=1: each call of a sensor says that the device is
   lost. FAKE_SYSMAN_BARE=1: the device has no sensor. */
#include <level_zero/zes_api.h>
#include <stdlib.h>
#include <string.h>

static int lost(void) { return getenv("FAKE_SYSMAN_LOST") != NULL; }
static int bare(void) { return getenv("FAKE_SYSMAN_BARE") != NULL; }
static uint64_t looks;

static ze_result_t list(uint32_t *count, void **into, uint32_t have) {
  if (lost()) return ZE_RESULT_ERROR_DEVICE_LOST;
  if (bare()) return ZE_RESULT_ERROR_UNSUPPORTED_FEATURE;
  if (!into) { *count = have; return ZE_RESULT_SUCCESS; }
  for (uint32_t i = 0; i < *count && i < have; i++) into[i] = (void *)(uintptr_t)(0x100 + i);
  return ZE_RESULT_SUCCESS;
}
#define NUMBER(handle) ((uint32_t)((uintptr_t)(handle) & 0xff))
#define WANT(p, t) if ((p)->stype != (t)) return ZE_RESULT_ERROR_INVALID_ARGUMENT

ze_result_t zesInit(uint32_t flags) { return flags ? ZE_RESULT_ERROR_INVALID_ARGUMENT : 0; }
ze_result_t zesDriverGet(uint32_t *n, void **d) { *n = 1; if (d) d[0] = (void *)1; return 0; }
ze_result_t zesDeviceGet(void *driver, uint32_t *n, void **d) {
  *n = 1; if (d) d[0] = (void *)2; return driver == (void *)1 ? 0 : ZE_RESULT_ERROR_INVALID_ARGUMENT;
}
ze_result_t zesDevicePciGetProperties(zes_device_handle_t d, zes_pci_properties_t *p) {
  WANT(p, ZES_STRUCTURE_TYPE_PCI_PROPERTIES);
  p->address = (zes_pci_address_t){0, 0x3a, 0, 0};
  return 0;
}
ze_result_t zesDeviceEnumPowerDomains(zes_device_handle_t d, uint32_t *n, zes_pwr_handle_t *h) { return list(n, (void **)h, 2); }
ze_result_t zesDeviceEnumEngineGroups(zes_device_handle_t d, uint32_t *n, zes_engine_handle_t *h) { return list(n, (void **)h, 2); }
ze_result_t zesDeviceEnumMemoryModules(zes_device_handle_t d, uint32_t *n, zes_mem_handle_t *h) { return list(n, (void **)h, 2); }
ze_result_t zesDeviceEnumFrequencyDomains(zes_device_handle_t d, uint32_t *n, zes_freq_handle_t *h) { return list(n, (void **)h, 2); }
ze_result_t zesDeviceEnumTemperatureSensors(zes_device_handle_t d, uint32_t *n, zes_temp_handle_t *h) { return list(n, (void **)h, 3); }
ze_result_t zesDeviceEnumRasErrorSets(zes_device_handle_t d, uint32_t *n, zes_ras_handle_t *h) { return list(n, (void **)h, 2); }

ze_result_t zesPowerGetEnergyCounter(zes_pwr_handle_t h, zes_power_energy_counter_t *c) {
  looks++;
  c->energy = 1000000 + 25000000 * looks;   /* 25 J a look */
  c->timestamp = 100000 * looks;            /* 0.1 s a look: 250 W */
  return 0;
}
ze_result_t zesEngineGetProperties(zes_engine_handle_t h, zes_engine_properties_t *p) {
  WANT(p, ZES_STRUCTURE_TYPE_ENGINE_PROPERTIES);
  p->type = NUMBER(h) ? ZES_ENGINE_GROUP_COPY_ALL : ZES_ENGINE_GROUP_ALL;
  return 0;
}
ze_result_t zesEngineGetActivity(zes_engine_handle_t h, zes_engine_stats_t *s) {
  s->activeTime = (NUMBER(h) ? 10000 : 80000) * looks;
  s->timestamp = 100000 * looks;
  return 0;
}
ze_result_t zesMemoryGetState(zes_mem_handle_t h, zes_mem_state_t *s) {
  WANT(s, ZES_STRUCTURE_TYPE_MEM_STATE);
  s->size = 8ull << 30;
  s->free = 3ull << 30;
  s->health = NUMBER(h) && getenv("FAKE_SYSMAN_SICK") ? ZES_MEM_HEALTH_REPLACE : ZES_MEM_HEALTH_OK;
  return 0;
}
ze_result_t zesMemoryGetBandwidth(zes_mem_handle_t h, zes_mem_bandwidth_t *b) {
  b->readCounter = 30000000000ull * looks;
  b->writeCounter = 10000000000ull * looks;
  b->timestamp = 100000 * looks;
  return 0;
}
ze_result_t zesFrequencyGetProperties(zes_freq_handle_t h, zes_freq_properties_t *p) {
  WANT(p, ZES_STRUCTURE_TYPE_FREQ_PROPERTIES);
  p->type = NUMBER(h) ? ZES_FREQ_DOMAIN_MEMORY : ZES_FREQ_DOMAIN_GPU;
  p->max = 1e9;
  return 0;
}
ze_result_t zesFrequencyGetState(zes_freq_handle_t h, zes_freq_state_t *s) {
  WANT(s, ZES_STRUCTURE_TYPE_FREQ_STATE);
  s->request = s->tdp = s->efficient = s->currentVoltage = -1;
  s->actual = NUMBER(h) ? 3200 : 1550;
  s->throttleReasons = NUMBER(h) ? 0 : ZES_FREQ_THROTTLE_REASON_FLAG_THERMAL_LIMIT;
  return 0;
}
ze_result_t zesTemperatureGetProperties(zes_temp_handle_t h, zes_temp_properties_t *p) {
  WANT(p, ZES_STRUCTURE_TYPE_TEMP_PROPERTIES);
  p->type = NUMBER(h);
  return 0;
}
ze_result_t zesTemperatureGetState(zes_temp_handle_t h, double *t) { *t = 60.5 + NUMBER(h); return 0; }
ze_result_t zesRasGetProperties(zes_ras_handle_t h, zes_ras_properties_t *p) {
  WANT(p, ZES_STRUCTURE_TYPE_RAS_PROPERTIES);
  p->type = NUMBER(h) ? ZES_RAS_ERROR_TYPE_UNCORRECTABLE : ZES_RAS_ERROR_TYPE_CORRECTABLE;
  return 0;
}
ze_result_t zesRasGetState(zes_ras_handle_t h, ze_bool_t clear, zes_ras_state_t *s) {
  WANT(s, ZES_STRUCTURE_TYPE_RAS_STATE);
  if (clear) return ZE_RESULT_ERROR_INVALID_ARGUMENT;
  memset(s->category, 0, sizeof s->category);
  s->category[ZES_RAS_ERROR_CAT_RESET] = 99;
  s->category[ZES_RAS_ERROR_CAT_NON_COMPUTE_ERRORS] = NUMBER(h) ? 0 : 5;
  s->category[ZES_RAS_ERROR_CAT_CACHE_ERRORS] = NUMBER(h) ? 0 : 2;
  return 0;
}

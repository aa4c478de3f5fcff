/* A libnvidia-ml.so.1 for tests: answers from the file named by NVML_STAND_IN, read anew at every call.
   Lines are key=value; key.N=value is for GPU N alone; value error:CODE makes the call fail with that NVML code. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4 };
enum { UNSIGNED_INT = 1, SIGNED_INT = 5 };
typedef void *device_t;

/* The value of `key` for GPU `index` (-1: of the machine) into `out`; 0 when the file does not name it. */
static int find(const char *key, int index, char *out, size_t size) {
    const char *path = getenv("NVML_STAND_IN");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[256], own[96];
    int found = 0;
    if (!file) return 0;
    snprintf(own, sizeof own, "%s.%d", key, index);
    while (fgets(line, sizeof line, file)) {
        char *value = strchr(line, '=');
        if (!value) continue;
        *value++ = 0;
        value[strcspn(value, "\r\n")] = 0;
        if (index >= 0 && !strcmp(line, own)) { snprintf(out, size, "%s", value); found = 2; }
        else if (found < 2 && !strcmp(line, key)) { snprintf(out, size, "%s", value); found = 1; }
    }
    fclose(file);
    return found;
}

static int number(const char *key, int index, long long *out) {
    char text[96];
    if (!find(key, index, text, sizeof text)) return NOT_SUPPORTED;
    if (!strncmp(text, "error:", 6)) return atoi(text + 6);
    *out = strtoll(text, NULL, 0);
    return SUCCESS;
}

static int index_of(device_t device) { return (int)((intptr_t)device - 1); }

static int unsigned_of(const char *key, device_t device, unsigned *out) {
    long long value;
    int code = number(key, index_of(device), &value);
    if (code == SUCCESS) *out = (unsigned)value;
    return code;
}

static int text_of(const char *key, device_t device, char *out, unsigned size) {
    return find(key, index_of(device), out, size) ? SUCCESS : NOT_SUPPORTED;
}

int nvmlInit_v2(void) { long long code = 0; return number("init", -1, &code) == SUCCESS ? (int)code : SUCCESS; }
int nvmlInitWithFlags(unsigned flags) { (void)flags; return nvmlInit_v2(); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { return code == 15 ? "GPU is lost" : code == 4 ? "Insufficient Permissions" : "Error"; }
int nvmlDeviceGetCount_v2(unsigned *count) {
    long long value = 0;
    int code = number("count", -1, &value);
    *count = (unsigned)value;
    return code;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device) {
    long long value;
    int code = number("handle", (int)index, &value);
    *device = (device_t)(intptr_t)(index + 1);
    return code == NOT_SUPPORTED ? SUCCESS : code;
}
int nvmlDeviceGetName(device_t d, char *out, unsigned size) { return text_of("name", d, out, size); }
int nvmlDeviceGetUUID(device_t d, char *out, unsigned size) { return text_of("uuid", d, out, size); }
int nvmlDeviceGetTemperature(device_t d, int sensor, unsigned *out) { (void)sensor; return unsigned_of("temperature_c", d, out); }
int nvmlDeviceGetTemperatureThreshold(device_t d, int kind, unsigned *out) {
    static const char *keys[] = {"shutdown_c", "slowdown_c", "memory_maximum_c", "maximum_c"};
    return kind < 4 ? unsigned_of(keys[kind], d, out) : INVALID_ARGUMENT;
}
typedef struct { unsigned version; int margin; } margin_t;
int nvmlDeviceGetMarginTemperature(device_t d, margin_t *out) {
    long long value;
    int code = number("margin_c", index_of(d), &value);
    if (code == SUCCESS) out->margin = (int)value;
    return code;
}
int nvmlDeviceGetPowerUsage(device_t d, unsigned *out) { return unsigned_of("power_mw", d, out); }
int nvmlDeviceGetEnforcedPowerLimit(device_t d, unsigned *out) { return unsigned_of("power_limit_mw", d, out); }
int nvmlDeviceGetPowerManagementDefaultLimit(device_t d, unsigned *out) { return unsigned_of("power_default_mw", d, out); }
int nvmlDeviceGetPowerManagementLimitConstraints(device_t d, unsigned *low, unsigned *high) {
    int code = unsigned_of("power_minimum_mw", d, low);
    return code ? code : unsigned_of("power_maximum_mw", d, high);
}
/* Accepted limits are appended to the file, so the next reading has them. */
int nvmlDeviceSetPowerManagementLimit(device_t d, unsigned milliwatts) {
    long long value = NO_PERMISSION;
    FILE *file;
    number("set_limit", index_of(d), &value);
    if (value != SUCCESS) return (int)value;
    file = fopen(getenv("NVML_STAND_IN"), "a");
    if (!file) return NO_PERMISSION;
    fprintf(file, "power_limit_mw.%d=%u\n", index_of(d), milliwatts);
    fclose(file);
    return SUCCESS;
}
int nvmlDeviceGetTotalEnergyConsumption(device_t d, unsigned long long *out) {
    long long value;
    int code = number("energy_mj", index_of(d), &value);
    if (code == SUCCESS) *out = (unsigned long long)value;
    return code;
}
int nvmlDeviceGetClockInfo(device_t d, int kind, unsigned *out) { (void)kind; return unsigned_of("clock_mhz", d, out); }
static int reasons(const char *key, device_t d, unsigned long long *out) {
    long long value;
    int code = number(key, index_of(d), &value);
    if (code == SUCCESS) *out = (unsigned long long)value;
    return code;
}
int nvmlDeviceGetCurrentClocksEventReasons(device_t d, unsigned long long *out) { return reasons("event_reasons", d, out); }
int nvmlDeviceGetCurrentClocksThrottleReasons(device_t d, unsigned long long *out) { return reasons("throttle_reasons", d, out); }
typedef union { double d; int si; unsigned ui; unsigned long ul; unsigned long long ull; long long sll; } value_t;
typedef struct { unsigned id, scope; int64_t time, latency; unsigned type; int code; value_t value; } field_t;
int nvmlDeviceGetFieldValues(device_t d, int count, field_t *fields) {
    for (int i = 0; i < count; i++) {
        char key[32];
        long long value = 0;
        snprintf(key, sizeof key, "field%u", fields[i].id);
        fields[i].code = number(key, index_of(d), &value);
        fields[i].type = value < 0 ? SIGNED_INT : UNSIGNED_INT;
        if (value < 0) fields[i].value.si = (int)value;
        else fields[i].value.ui = (unsigned)value;
    }
    return SUCCESS;
}
/* Links: a card at rest tells a lower generation; NVLink N is up where nvlinkN=1; p2p_read is an nvmlGpuP2PStatus_t. */
int nvmlDeviceGetCurrPcieLinkGeneration(device_t d, unsigned *out) { return unsigned_of("pcie_generation", d, out); }
int nvmlDeviceGetCurrPcieLinkWidth(device_t d, unsigned *out) { return unsigned_of("pcie_width", d, out); }
int nvmlDeviceGetMaxPcieLinkGeneration(device_t d, unsigned *out) { return unsigned_of("pcie_most_generation", d, out); }
int nvmlDeviceGetMaxPcieLinkWidth(device_t d, unsigned *out) { return unsigned_of("pcie_most_width", d, out); }
int nvmlDeviceGetNvLinkState(device_t d, unsigned link, unsigned *out) {
    char key[32];
    snprintf(key, sizeof key, "nvlink%u", link);
    return unsigned_of(key, d, out);
}
int nvmlDeviceGetP2PStatus(device_t d, device_t other, int kind, unsigned *out) {
    (void)other; (void)kind;
    return unsigned_of("p2p_read", d, out);
}

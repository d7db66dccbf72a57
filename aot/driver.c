/* Opens the driver at the first launch, finds and loads kernels, and launches them. */

#include "kernels.h"

#include <cuda.h>
#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LARGEST_KEY 256
#define MOST_PARAMS 40
#define SHARED_BY_DEFAULT (48 << 10)

static struct {
    CUresult (*init)(unsigned);
    CUresult (*context_device)(CUdevice *);
    CUresult (*device_attribute)(int *, CUdevice_attribute, CUdevice);
    CUresult (*load)(CUlibrary *, const void *, CUjit_option *, void **, unsigned, CUlibraryOption *, void **,
                     unsigned);
    CUresult (*get_kernel)(CUkernel *, CUlibrary, const char *);
    CUresult (*set_attribute)(CUfunction_attribute, int, CUkernel, CUdevice);
    CUresult (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                       void **, void **);
    CUresult (*error_name)(CUresult, const char **);
} driver;
static pthread_once_t opened = PTHREAD_ONCE_INIT;
static int open_status = LORA_FAST_NO_DRIVER;
static pthread_mutex_t loading = PTHREAD_MUTEX_INITIALIZER;
static CUkernel *loaded; /* one for each row; a kernel of a CUlibrary is valid in every context */

static void open_driver(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL);
    if (!library) return;
    const struct {
        const char *name;
        void **function;
    } wanted[] = {
        {"cuInit", (void **)&driver.init},
        {"cuCtxGetDevice", (void **)&driver.context_device},
        {"cuDeviceGetAttribute", (void **)&driver.device_attribute},
        {"cuLibraryLoadData", (void **)&driver.load},
        {"cuLibraryGetKernel", (void **)&driver.get_kernel},
        {"cuKernelSetAttribute", (void **)&driver.set_attribute},
        {"cuLaunchKernel", (void **)&driver.launch},
        {"cuGetErrorName", (void **)&driver.error_name},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        if (!(*wanted[i].function = dlsym(library, wanted[i].name))) return;
    loaded = calloc(lora_fast_table_length, sizeof *loaded);
    if (loaded) open_status = driver.init(0);
}

static int open_once(void) {
    pthread_once(&opened, open_driver);
    return open_status;
}

static int device_attribute(CUdevice_attribute attribute, int *value) {
    CUdevice device;
    CALL(open_once());
    CALL(driver.context_device(&device));
    return driver.device_attribute(value, attribute, device);
}

int lora_fast_multiprocessors(int *count) {
    return device_attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, count);
}

/* A cubin runs on later devices of its generation up to sm_8x. From sm_90 on, a kernel is for one arch only. */
static int runs_on(int arch, int device) {
    return arch == device || (device < 90 && arch / 10 == device / 10 && arch < device);
}

/* Finds the row with this key of the latest arch that runs on the device (0: any device). shared: the bytes of shared
   memory that a block may use there; some devices have less than the first of their generation. */
static int best_row(int *row, const char *key, int device, unsigned shared) {
    int any = 0, best = -1;
    for (int i = 0; i < lora_fast_table_length; i++) {
        const lora_fast_kernel *entry = &lora_fast_public_table[i];
        if (device && !runs_on(entry->arch, device)) continue;
        any = 1;
        if (lora_fast_table[i].shared > shared || strcmp(entry->key, key)) continue;
        if (best < 0 || entry->arch > lora_fast_public_table[best].arch) best = i;
    }
    if (best < 0) return any ? LORA_FAST_NO_KERNEL : LORA_FAST_NO_ARCH;
    *row = best;
    return LORA_FAST_OK;
}

int lora_fast_find(int *row, const char *format, ...) {
    char key[LARGEST_KEY];
    va_list values;
    va_start(values, format);
    vsnprintf(key, sizeof key, format, values);
    va_end(values);
    int major, minor, shared;
    CALL(device_attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, &major));
    CALL(device_attribute(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, &minor));
    CALL(device_attribute(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, &shared));
    return best_row(row, key, 10 * major + minor, shared);
}

int lora_fast_find_any(int *row, const char *format, ...) {
    char key[LARGEST_KEY];
    va_list values;
    va_start(values, format);
    vsnprintf(key, sizeof key, format, values);
    va_end(values);
    return best_row(row, key, 0, UINT_MAX);
}

static int load(int row, CUkernel *kernel) {
    CUresult status = CUDA_SUCCESS;
    pthread_mutex_lock(&loading);
    if (!loaded[row]) {
        CUlibrary library;
        status = driver.load(&library, lora_fast_public_table[row].cubin, NULL, NULL, 0, NULL, NULL, 0);
        if (!status) status = driver.get_kernel(&loaded[row], library, lora_fast_table[row].name);
    }
    *kernel = loaded[row];
    pthread_mutex_unlock(&loading);
    return status;
}

/* Stores the value of the parameter `name` of kind p, i, l, f or d in a slot, as the kernel reads it. */
static int value_of(const char *name, size_t length, char kind, const struct argument *argument, uint64_t *slot) {
    for (; argument->name; argument++)
        if (strlen(argument->name) == length && !strncmp(argument->name, name, length)) break;
    if (!argument->name) return LORA_FAST_INTERNAL;
    *slot = 0;
    if (kind == 'p') memcpy(slot, &argument->pointer, sizeof argument->pointer);
    else if (kind == 'f') memcpy(slot, &argument->number, sizeof argument->number);
    else if (kind == 'd') memcpy(slot, &(double){argument->number}, sizeof(double));
    else memcpy(slot, &argument->integer, kind == 'l' ? 8 : 4); /* every CUDA host is little-endian */
    return LORA_FAST_OK;
}

int lora_fast_launch(int row, int64_t grid_x, int64_t grid_y, int64_t grid_z, const struct argument *arguments,
                     lora_fast_stream stream) {
    uint64_t values[MOST_PARAMS] = {0};
    void *pointers[MOST_PARAMS] = {NULL};
    int count = 0;
    for (const char *next = lora_fast_public_table[row].params; *next; count++) {
        if (count + 2 >= MOST_PARAMS) return LORA_FAST_INTERNAL;
        size_t length = strcspn(next, ":");
        CALL(value_of(next, length, next[length + 1], arguments, &values[count]));
        next += length + 2;
        if (*next == ' ') next++;
    }
    /* Triton adds two pointers to scratch memory, which no kernel here uses. */
    for (int i = 0; i < count + 2; i++) pointers[i] = &values[i];
    if (grid_x == 0 || grid_y == 0) return LORA_FAST_OK;
    if (grid_x > INT32_MAX || grid_y > UINT16_MAX || grid_z > UINT16_MAX) return LORA_FAST_BAD_ARGUMENT;
    const struct kernel *kernel = &lora_fast_table[row];
    CUkernel function;
    CUdevice device;
    CALL(load(row, &function));
    if (kernel->shared > SHARED_BY_DEFAULT) {
        CALL(driver.context_device(&device));
        CALL(driver.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel->shared, function, device));
    }
    return driver.launch((CUfunction)function, grid_x, grid_y, grid_z, kernel->threads, 1, 1, kernel->shared, stream,
                         pointers, NULL);
}

int lora_fast_check_addresses(int count, const void *const *addresses) {
    for (int i = 0; i < count; i++) {
        if (!addresses[i]) return LORA_FAST_BAD_ARGUMENT;
        if ((uintptr_t)addresses[i] % 16) return LORA_FAST_MISALIGNED;
    }
    return LORA_FAST_OK;
}

const char *lora_fast_dtype_name(lora_fast_dtype dtype) {
    static const char *const names[] = {"float32", "float16", "bfloat16"};
    return (unsigned)dtype < 3 ? names[dtype] : NULL;
}

API const lora_fast_kernel *lora_fast_kernels(int *count) {
    *count = lora_fast_table_length;
    return lora_fast_public_table;
}

API const char *lora_fast_error_name(int error) {
    static const char *const names[] = {
        "LORA_FAST_OK",      "LORA_FAST_NO_DRIVER", "LORA_FAST_BAD_ARGUMENT", "LORA_FAST_MISALIGNED",
        "LORA_FAST_NO_ARCH", "LORA_FAST_NO_KERNEL", "LORA_FAST_INTERNAL",
    };
    const char *name = "unknown error";
    if (error <= 0) return -error < (int)(sizeof names / sizeof *names) ? names[-error] : name;
    if (driver.error_name) driver.error_name((CUresult)error, &name);
    return name;
}

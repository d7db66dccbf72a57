/* SPDX-License-Identifier: Apache-2.0

   Opens the driver at the first launch, finds and loads kernels, and launches them.

   What is known of a device (its limits, and for each key the row of the table that runs there) is computed at the first
   call on it and kept, so a launch costs the host a binary search and the copy of its arguments. */

#include "kernels.h"

#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MOST_DEVICES = 64, SHARED_BY_DEFAULT = 48 << 10, LONGEST_MESSAGE = 512, SCRATCH_POINTERS = 2 };

static struct {
    CUresult (*init)(unsigned);
    CUresult (*context_device)(CUdevice *);
    CUresult (*device_attribute)(int *, CUdevice_attribute, CUdevice);
    CUresult (*retain_context)(CUcontext *, CUdevice);
    CUresult (*release_context)(CUdevice);
    CUresult (*push_context)(CUcontext);
    CUresult (*pop_context)(CUcontext *);
    CUresult (*load)(CUlibrary *, const void *, CUjit_option *, void **, unsigned, CUlibraryOption *, void **,
                     unsigned);
    CUresult (*unload)(CUlibrary);
    CUresult (*get_kernel)(CUkernel *, CUlibrary, const char *);
    CUresult (*get_function)(CUfunction *, CUkernel);
    CUresult (*set_attribute)(CUfunction_attribute, int, CUkernel, CUdevice);
    CUresult (*encode)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *, const cuuint64_t *,
                       const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                       CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    CUresult (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream,
                       void **, void **);
    CUresult (*error_name)(CUresult, const char **);
} driver;
static pthread_once_t opened = PTHREAD_ONCE_INIT;
static int open_status = LORA_FAST_NO_DRIVER;
static pthread_mutex_t changing = PTHREAD_MUTEX_INITIALIZER; /* of all that follows */

/* A kernel on all devices: a kernel of a CUlibrary is valid in every context. */
static struct {
    CUlibrary library;
    CUkernel kernel;
} *loaded; /* one for each row of the table */

struct known_device {
    struct device limits;
    int n_rows, *rows;    /* of the table, the best for each key, in the order of keys */
    atomic_uchar *ready;  /* for each row of the table: whether it is loaded and may have its shared memory here */
};
static _Atomic(struct known_device *) devices[MOST_DEVICES];

/* ---- Errors */

static _Thread_local char message[LONGEST_MESSAGE] = "no call has failed in this thread";

int lora_fast_fail(int status, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(message, sizeof message, format, values);
    va_end(values);
    return status;
}

API const char *lora_fast_error_message(void) { return message; }

API const char *lora_fast_error_name(int error) {
    static const char *const names[] = {
        "LORA_FAST_OK",      "LORA_FAST_NO_DRIVER", "LORA_FAST_BAD_ARGUMENT", "LORA_FAST_MISALIGNED",
        "LORA_FAST_NO_ARCH", "LORA_FAST_NO_KERNEL", "LORA_FAST_NO_MEMORY",
    };
    const char *name = NULL;
    if (error <= 0) {
        unsigned i = 0u - (unsigned)error;
        if (i < sizeof names / sizeof *names) name = names[i];
    } else if (driver.error_name) {
        if (driver.error_name((CUresult)error, &name)) name = NULL;
    }
    return name ? name : "unknown error";
}

/* Keeps a message for an error of the driver. */
static int check_driver(const char *function, const char *what, CUresult status) {
    if (!status) return LORA_FAST_OK;
    return lora_fast_fail((int)status, "%s: %s: %s", function, what, lora_fast_error_name((int)status));
}

int lora_fast_check_addresses(const char *function, const char *names, int count, const void *const *addresses) {
    for (int i = 0; i < count; i++) {
        int length = (int)strcspn(names, ",");
        if (!addresses[i])
            return lora_fast_fail(LORA_FAST_BAD_ARGUMENT, "%s: %.*s: expected an address, got NULL", function, length,
                                  names);
        if ((intptr_t)addresses[i] < 0) /* adding an offset could overflow */
            return lora_fast_fail(LORA_FAST_BAD_ARGUMENT, "%s: %.*s: expected an address below 2^63, got %p", function,
                                  length, names, addresses[i]);
        if ((uintptr_t)addresses[i] % 16)
            return lora_fast_fail(LORA_FAST_MISALIGNED, "%s: %.*s: expected a multiple of 16, got %p", function,
                                  length, names, addresses[i]);
        names += length + strspn(names + length, ", ");
    }
    return LORA_FAST_OK;
}

int lora_fast_check_struct(const char *function, const char *name, const void *structure, size_t known) {
    size_t size;
    if (!structure)
        return lora_fast_fail(LORA_FAST_BAD_ARGUMENT, "%s: %s: expected an address, got NULL", function, name);
    memcpy(&size, structure, sizeof size);
    if (size < known || size > known + 4096)
        return lora_fast_fail(LORA_FAST_BAD_ARGUMENT, "%s: %s.size: expected the struct's size, %zu, got %zu", function,
                              name, known, size);
    for (size_t i = known; i < size; i++)
        if (((const char *)structure)[i])
            return lora_fast_fail(LORA_FAST_BAD_ARGUMENT,
                                  "%s: %s: expected 0 in fields that are newer than this library, got a value at byte "
                                  "%zu",
                                  function, name, i);
    return LORA_FAST_OK;
}

/* ---- The driver and its devices */

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
        {"cuDevicePrimaryCtxRetain", (void **)&driver.retain_context},
        {"cuDevicePrimaryCtxRelease_v2", (void **)&driver.release_context},
        {"cuCtxPushCurrent_v2", (void **)&driver.push_context},
        {"cuCtxPopCurrent_v2", (void **)&driver.pop_context},
        {"cuLibraryLoadData", (void **)&driver.load},
        {"cuLibraryUnload", (void **)&driver.unload},
        {"cuLibraryGetKernel", (void **)&driver.get_kernel},
        {"cuKernelGetFunction", (void **)&driver.get_function},
        {"cuKernelSetAttribute", (void **)&driver.set_attribute},
        {"cuTensorMapEncodeTiled", (void **)&driver.encode},
        {"cuLaunchKernel", (void **)&driver.launch},
        {"cuGetErrorName", (void **)&driver.error_name},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        if (!(*wanted[i].function = dlsym(library, wanted[i].name))) return;
    loaded = calloc((size_t)lora_fast_table_length, sizeof *loaded);
    open_status = loaded ? (int)driver.init(0) : LORA_FAST_NO_MEMORY;
}

static int open_once(const char *function) {
    pthread_once(&opened, open_driver);
    if (open_status == LORA_FAST_NO_DRIVER)
        return lora_fast_fail(open_status, "%s: libcuda.so.1 is missing, or older than CUDA 12", function);
    if (open_status < 0) return lora_fast_fail(open_status, "%s: no memory on the host", function);
    return check_driver(function, "cuInit", (CUresult)open_status);
}

/* A cubin runs on later devices of its generation, up to sm_8x, or of its family, from sm_100 on; sm_90's on that arch
   alone. The driver compiles PTX for all later devices. */
static int runs_on(const lora_fast_kernel *entry, int device) {
    if (entry->is_ptx) return entry->arch <= device;
    return entry->arch == 90 ? device == 90 : entry->arch / 10 == device / 10 && entry->arch <= device;
}

/* Whether the row `first` is better than the row `second` on a device where both run: machine code, then later archs. */
static int is_better(int first, int second) {
    const lora_fast_kernel *a = &lora_fast_public_table[first], *b = &lora_fast_public_table[second];
    return a->is_ptx != b->is_ptx ? b->is_ptx : a->arch > b->arch;
}

static void choose_rows(struct known_device *known) {
    for (int i = 0; i < lora_fast_table_length; i++) {
        const struct kernel *kernel = &lora_fast_table[i];
        if (!runs_on(&lora_fast_public_table[i], known->limits.arch)) continue;
        if (kernel->shared > (unsigned)known->limits.shared) continue;
        int *last = known->n_rows ? &known->rows[known->n_rows - 1] : NULL;
        if (!last || lora_fast_table[*last].key != kernel->key) known->rows[known->n_rows++] = i;
        else if (is_better(i, *last)) *last = i;
    }
}

static int query_device(const char *function, CUdevice ordinal, struct device *limits) {
    int major, minor;
    const struct {
        CUdevice_attribute attribute;
        int *value;
    } wanted[] = {
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, &major},
        {CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, &minor},
        {CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, &limits->multiprocessors},
        {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, &limits->shared},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++)
        CALL(check_driver(function, "cuDeviceGetAttribute",
                          driver.device_attribute(wanted[i].value, wanted[i].attribute, ordinal)));
    limits->ordinal = ordinal, limits->arch = 10 * major + minor;
    return LORA_FAST_OK;
}

static void free_device(struct known_device *known) {
    if (!known) return;
    free(known->rows), free(known->ready), free(known);
}

/* Stores what is known of a device, under the lock. */
static int know_device(const char *function, CUdevice ordinal, struct known_device **known) {
    *known = atomic_load_explicit(&devices[ordinal], memory_order_acquire);
    if (*known) return LORA_FAST_OK;
    size_t n = (size_t)lora_fast_table_length;
    struct known_device *fresh = calloc(1, sizeof *fresh);
    if (fresh) fresh->rows = calloc(n, sizeof *fresh->rows), fresh->ready = calloc(n, sizeof *fresh->ready);
    if (!fresh || !fresh->rows || !fresh->ready) {
        free_device(fresh);
        return lora_fast_fail(LORA_FAST_NO_MEMORY, "%s: no memory on the host", function);
    }
    int status = query_device(function, ordinal, &fresh->limits);
    if (status) {
        free_device(fresh);
        return status;
    }
    choose_rows(fresh);
    atomic_store_explicit(&devices[ordinal], fresh, memory_order_release);
    *known = fresh;
    return LORA_FAST_OK;
}

static int find_device(const char *function, CUdevice ordinal, struct known_device **known) {
    if (ordinal < 0 || ordinal >= MOST_DEVICES)
        return lora_fast_fail(LORA_FAST_BAD_ARGUMENT, "%s: device: expected 0 to %d, got %d", function,
                              MOST_DEVICES - 1, ordinal);
    *known = atomic_load_explicit(&devices[ordinal], memory_order_acquire);
    if (*known) return LORA_FAST_OK;
    pthread_mutex_lock(&changing);
    int status = know_device(function, ordinal, known);
    pthread_mutex_unlock(&changing);
    return status;
}

static int current_device(const char *function, struct known_device **known) {
    CUdevice ordinal;
    CALL(open_once(function));
    CALL(check_driver(function, "the current CUDA context", driver.context_device(&ordinal)));
    return find_device(function, ordinal, known);
}

int lora_fast_current_device(const char *function, const struct device **device) {
    struct known_device *known;
    CALL(current_device(function, &known));
    *device = &known->limits;
    return LORA_FAST_OK;
}

/* ---- Kernels */

static void list_archs(char *text, size_t size) {
    int length = 0;
    for (int i = 0; i < lora_fast_n_archs; i++)
        length += snprintf(text + length, size - (size_t)length, " sm_%d", lora_fast_built_archs[i]);
}

static int find_row(const struct known_device *known, uint64_t key) {
    int low = 0, high = known->n_rows;
    while (low < high) {
        int middle = (low + high) / 2;
        if (lora_fast_table[known->rows[middle]].key < key) low = middle + 1;
        else high = middle;
    }
    return low < known->n_rows && lora_fast_table[known->rows[low]].key == key ? known->rows[low] : -1;
}

/* Tells why no row of the table has this key on a device. */
static int explain(const char *function, const struct known_device *known, uint64_t key) {
    char archs[16 * 16] = "";
    if (!known->n_rows) {
        list_archs(archs, sizeof archs);
        return lora_fast_fail(LORA_FAST_NO_ARCH, "%s: this device is sm_%d; the library was built for%s", function,
                              known->limits.arch, archs);
    }
    static const char *const dtypes[] = {"float32", "float16", "bfloat16", "?"};
    const char *dtype = dtypes[key >> 28 & 3], *adapter = dtypes[key >> 24 & 3];
    int r = (int)(key >> 8 & 0xffff), options = (int)(key & 0xff);
    for (int i = 0; i < lora_fast_table_length; i++)
        if (lora_fast_table[i].key == key && runs_on(&lora_fast_public_table[i], known->limits.arch))
            return lora_fast_fail(LORA_FAST_NO_KERNEL,
                                  "%s: %s of sm_%d needs %u bytes of shared memory a block, this device (sm_%d) has %d: "
                                  "build for its own arch, too",
                                  function, lora_fast_public_table[i].key, lora_fast_public_table[i].arch,
                                  lora_fast_table[i].shared, known->limits.arch, known->limits.shared);
    int padded = lora_fast_padded_rank(r);
    if (padded > r && find_row(known, (key & ~(0xffffull << 8)) | (uint64_t)padded << 8) >= 0)
        return lora_fast_fail(LORA_FAST_NO_KERNEL, "%s: rank %d was not built, rank %d was (lora_fast_padded_rank)",
                              function, r, padded);
    return lora_fast_fail(LORA_FAST_NO_KERNEL,
                          "%s: nothing was built for %s with %s adapters, rank %d, options %d on sm_%d "
                          "(lora_fast_kernels lists what was)",
                          function, dtype, adapter, r, options, known->limits.arch);
}

/* Loads a row of the table, under the lock. */
static int load_row(const char *function, struct known_device *known, int row) {
    const struct kernel *kernel = &lora_fast_table[row];
    if (atomic_load_explicit(&known->ready[row], memory_order_relaxed)) return LORA_FAST_OK; /* by another thread */
    if (!loaded[row].kernel) {
        CUlibrary library;
        CUkernel found;
        CALL(check_driver(function, "cuLibraryLoadData",
                          driver.load(&library, lora_fast_public_table[row].code, NULL, NULL, 0, NULL, NULL, 0)));
        int status = check_driver(function, "cuLibraryGetKernel", driver.get_kernel(&found, library, kernel->name));
        if (status) {
            driver.unload(library);
            return status;
        }
        loaded[row].library = library, loaded[row].kernel = found;
    }
    if (kernel->shared > SHARED_BY_DEFAULT)
        CALL(check_driver(function, "cuKernelSetAttribute",
                          driver.set_attribute(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)kernel->shared,
                                               loaded[row].kernel, known->limits.ordinal)));
    atomic_store_explicit(&known->ready[row], 1, memory_order_release);
    return LORA_FAST_OK;
}

static int load_once(const char *function, struct known_device *known, int row) {
    if (atomic_load_explicit(&known->ready[row], memory_order_acquire)) return LORA_FAST_OK;
    pthread_mutex_lock(&changing);
    int status = load_row(function, known, row);
    pthread_mutex_unlock(&changing);
    return status;
}

int lora_fast_prepare(const char *function, struct launch *launch, uint64_t key) {
    struct known_device *known;
    CALL(current_device(function, &known));
    int row = find_row(known, key);
    if (row < 0) return explain(function, known, key);
    CALL(load_once(function, known, row));
    *launch = (struct launch){.row = row, .tile = &lora_fast_table[row].tile, .function = loaded[row].kernel};
    return LORA_FAST_OK;
}

int lora_fast_tile_of(const char *function, const struct tile **tile, uint64_t key) {
    for (int i = 0; i < lora_fast_table_length; i++) {
        if (lora_fast_table[i].key != key) continue;
        *tile = &lora_fast_table[i].tile;
        return LORA_FAST_OK;
    }
    return lora_fast_fail(LORA_FAST_NO_KERNEL, "%s: nothing was built for this dtype and rank %d", function,
                          (int)(key >> 8 & 0xffff));
}

int lora_fast_set_grid(const char *function, struct launch *launch, int64_t x, int64_t y, int64_t z) {
    if (x < 0 || x > INT32_MAX || y < 0 || y > UINT16_MAX || z < 0 || z > UINT16_MAX)
        return lora_fast_fail(LORA_FAST_BAD_ARGUMENT,
                              "%s: sizes: expected a grid of at most 2147483647 x 65535 x 65535 blocks, got %lld x %lld "
                              "x %lld",
                              function, (long long)x, (long long)y, (long long)z);
    launch->grid[0] = (unsigned)x, launch->grid[1] = (unsigned)y, launch->grid[2] = (unsigned)z;
    return LORA_FAST_OK;
}

/* Encodes the matrices and sets the parameters that describe them. */
static int encode(const struct encoding *encodings, const struct matrix *matrices, CUtensorMap *maps,
                  union value *described) {
    for (int i = 0; i < MAPS; i++) {
        const struct encoding *encoding = &encodings[i];
        const struct matrix *matrix = &matrices[i];
        const cuuint64_t sizes[] = {(cuuint64_t)matrix->columns, (cuuint64_t)matrix->rows};
        const cuuint64_t strides[] = {(cuuint64_t)(matrix->stride * encoding->bytes)};
        const cuuint32_t box[] = {(cuuint32_t)encoding->box_columns, (cuuint32_t)encoding->box_rows};
        CALL((int)driver.encode(&maps[i], (CUtensorMapDataType)encoding->type, 2, (void *)matrix->address, sizes,
                                strides, box, (const cuuint32_t[]){1, 1}, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                (CUtensorMapSwizzle)encoding->swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
        const union value sizes_and_strides[] = {
            {.p = &maps[i]}, {.i = matrix->rows}, {.i = matrix->columns}, {.i = matrix->stride}, {.i = 1}};
        memcpy(described + 5 * i, sizes_and_strides, sizeof sizes_and_strides);
    }
    return LORA_FAST_OK;
}

int lora_fast_submit(const struct launch *launch, const union value *values, const struct matrix *matrices,
                     lora_fast_stream stream) {
    const struct kernel *kernel = &lora_fast_table[launch->row];
    CUtensorMap maps[MAPS];
    union value described[5 * MAPS];
    uint64_t scratch = 0; /* Triton adds two pointers to scratch memory, which no kernel here uses. */
    void *pointers[N_PARAMETERS + SCRATCH_POINTERS];
    if (!launch->grid[0] || !launch->grid[1] || !launch->grid[2]) return LORA_FAST_OK;
    if (kernel->maps)
        CALL(check_driver("lora_fast", "cuTensorMapEncodeTiled",
                          (CUresult)encode(kernel->maps, matrices, maps, described)));
    for (int i = 0; i < kernel->n_params; i++) {
        int id = kernel->params[i];
        if (id < P_map_left) pointers[i] = (void *)&values[id];
        else if ((id - P_map_left) % 5 == 0) pointers[i] = &maps[(id - P_map_left) / 5];
        else pointers[i] = &described[id - P_map_left];
    }
    for (int i = 0; i < SCRATCH_POINTERS; i++) pointers[kernel->n_params + i] = &scratch;
    return check_driver(kernel->name, "cuLaunchKernel",
                        driver.launch((CUfunction)launch->function, launch->grid[0], launch->grid[1], launch->grid[2],
                                      kernel->threads, 1, 1, kernel->shared, stream, pointers, NULL));
}

/* ---- Queries, loading and unloading */

API int lora_fast_version(void) { return LORA_FAST_VERSION; }

API const lora_fast_kernel *lora_fast_kernels(int *count) {
    if (count) *count = lora_fast_table_length;
    return lora_fast_public_table;
}

API const int *lora_fast_archs(int *count) {
    if (count) *count = lora_fast_n_archs;
    return lora_fast_built_archs;
}

API const lora_fast_dtype *lora_fast_dtypes(int *count) {
    if (count) *count = lora_fast_n_dtypes;
    return lora_fast_built_dtypes;
}

API const int *lora_fast_ranks(int *count) {
    if (count) *count = lora_fast_n_ranks;
    return lora_fast_built_ranks;
}

API int lora_fast_ptx_arch(void) { return lora_fast_built_ptx; }

API int lora_fast_padded_rank(int r) {
    for (int i = 0; i < lora_fast_n_ranks; i++)
        if (r > 0 && r <= lora_fast_built_ranks[i]) return lora_fast_built_ranks[i];
    return 0;
}

/* Loads every kernel of a device in the current context, which is on it. */
static int load_all(struct known_device *known) {
    if (!known->n_rows) return explain("lora_fast_load", known, 0);
    for (int i = 0; i < known->n_rows; i++) {
        CUfunction function;
        CALL(load_once("lora_fast_load", known, known->rows[i]));
        /* The driver may defer loading to the first launch; asking for the function does it now. */
        CALL(check_driver("lora_fast_load", "cuKernelGetFunction",
                          driver.get_function(&function, loaded[known->rows[i]].kernel)));
    }
    return LORA_FAST_OK;
}

API int lora_fast_load(int device) {
    struct known_device *known;
    CUdevice current;
    CUcontext context;
    CHECK(device >= -1 && device < MOST_DEVICES, "device", "-1 to 63", device);
    CALL(open_once(__func__));
    int has_context = driver.context_device(&current) == CUDA_SUCCESS;
    if (device < 0 || (has_context && current == device)) {
        CALL(current_device(__func__, &known));
        return load_all(known);
    }
    CALL(find_device(__func__, device, &known));
    CALL(check_driver(__func__, "cuDevicePrimaryCtxRetain", driver.retain_context(&context, device)));
    int status = check_driver(__func__, "cuCtxPushCurrent", driver.push_context(context));
    if (!status) {
        status = load_all(known);
        driver.pop_context(&context);
    }
    driver.release_context(device);
    return status;
}

/* Unloads every library, under the lock, and returns the first error. */
static int unload_libraries(const char *function) {
    int status = LORA_FAST_OK;
    for (int i = 0; i < MOST_DEVICES; i++) {
        struct known_device *known = atomic_load(&devices[i]);
        for (int row = 0; known && row < lora_fast_table_length; row++) atomic_store(&known->ready[row], 0);
    }
    for (int i = 0; loaded && i < lora_fast_table_length; i++) {
        int failure = 0;
        if (loaded[i].library) failure = check_driver(function, "cuLibraryUnload", driver.unload(loaded[i].library));
        if (!status) status = failure;
        loaded[i].library = NULL, loaded[i].kernel = NULL;
    }
    return status;
}

API int lora_fast_unload(void) {
    pthread_mutex_lock(&changing);
    int status = unload_libraries(__func__);
    for (int i = 0; i < MOST_DEVICES; i++) free_device(atomic_exchange(&devices[i], NULL));
    pthread_mutex_unlock(&changing);
    return status;
}

/* Runs at dlclose and at exit, where other threads may still be in a call, and where a forked child has a lock that
   nobody will release: what calls read is not freed, and the lock is not waited for. The driver may have gone before;
   its error then tells nobody anything. */
__attribute__((destructor)) static void unload_at_end(void) {
    if (pthread_mutex_trylock(&changing)) return;
    unload_libraries(__func__);
    pthread_mutex_unlock(&changing);
}

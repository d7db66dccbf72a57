/* SPDX-License-Identifier: Apache-2.0

   A libcuda.so.1 that records launches instead of making them, with the limits of real cards. It shows on any machine
   what the ahead-of-time library and Triton's own launch path request from a GPU. Host memory serves as device memory.

   It returns an error where a GPU would: for more shared memory a block than the card allows or than was requested, too
   large a block or grid, a tensor map against CUDA's rules, code of another arch, a kernel that is unloaded, a kernel
   loaded while a stream is captured, a call without a context. It reads a kernel's parameters, registers and stack from
   the cubin, as the driver does, or its parameters from PTX.

   Tests set its variables: the card (stub_arch), whether a stream is captured (stub_capturing), which call fails
   (stub_fail_after) and what every launch calls (stub_on_launch), such as an interpreter that computes its results. */

#include <cuda.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define EXPORT __attribute__((visibility("default")))
#define COUNT(counter) __atomic_fetch_add(&(counter), 1, __ATOMIC_RELAXED)
enum { MOST = 1024, SLOTS = 96, LARGEST = 128, SHARED_BY_DEFAULT = 48 << 10, DEVICES = 4, CONTEXTS = 8 };

static const struct card {
    int arch, shared, multiprocessors; /* shared: bytes a block may opt in to */
} cards[] = {
    {80, 166912, 108}, {86, 101376, 82}, {89, 101376, 128}, {90, 232448, 132}, {100, 232448, 148}, {120, 101376, 170},
    {130, 232448, 160}, /* a later one, on which PTX runs */
};
EXPORT int stub_arch = 80, stub_shared; /* stub_shared: bytes that a block may have, 0: what the card has */

/* Code that was loaded. Images and kernels are never freed, because notes point to them. */
struct image {
    const unsigned char *code;
    int is_ptx, unloaded;
    struct image *next;
};

struct kernel {
    struct image *image;
    char *name;
    int registers, stack, shared; /* shared: dynamic memory that was requested */
    unsigned count, sizes[SLOTS];
    unsigned in_contexts; /* a bit for each context in which it is loaded */
    struct kernel *next;
};
static struct image *images;
static struct kernel *kernels;
static pthread_mutex_t changing = PTHREAD_MUTEX_INITIALIZER; /* of images, kernels and notes */

struct note {
    const void *function, *code; /* function: another one each time the kernel is loaded */
    const char *name;
    unsigned grid[3], block[3], shared, count, stack;
    uint64_t stream;
    unsigned sizes[SLOTS];
    unsigned char values[SLOTS][LARGEST];
};
EXPORT struct note stub_notes[MOST];
EXPORT int stub_count, stub_noting = 1, stub_capturing;
EXPORT int stub_load_time; /* in microseconds, in which other threads run */
EXPORT unsigned long long stub_launches, stub_loads, stub_unloads; /* that succeeded */
EXPORT void (*stub_on_launch)(const struct note *);
/* Called at exit, after the destructors of libraries that were loaded later. */
EXPORT void (*stub_at_end)(void);
__attribute__((destructor)) static void end(void) {
    if (stub_at_end) stub_at_end();
}

/* The call of the driver that fails, counted from the next one; 0: none. Functions that describe an error do not count.
   stub_failed is the name of the call that failed. */
EXPORT int stub_fail_after;
EXPORT const char *stub_failed;

static int fails(const char *name) {
    if (!stub_fail_after || --stub_fail_after) return 0;
    return stub_failed = name, 1;
}
#define CALLED                                                                                                         \
    if (fails(__func__)) return CUDA_ERROR_UNKNOWN

static const struct card *card(void) {
    for (size_t i = 0; i < sizeof cards / sizeof *cards; i++)
        if (cards[i].arch == stub_arch) return &cards[i];
    static struct card other; /* an arch without kernels */
    other = (struct card){stub_arch, SHARED_BY_DEFAULT, 1};
    return &other;
}

static int shared_limit(void) { return stub_shared ? stub_shared : card()->shared; }

/* ---- Contexts: each thread has a stack of them. Unlike a real thread, it starts with the primary context of device 0,
   as if the runtime API had been used. */

enum { FIRST_CONTEXT = 0x10 };
static _Thread_local uintptr_t contexts[CONTEXTS] = {FIRST_CONTEXT};
static _Thread_local int top;
EXPORT int stub_retained; /* primary contexts that were retained and not released */

static unsigned context_bit(void) { return contexts[top] ? 1u << (contexts[top] - FIRST_CONTEXT) : 0; }

/* ---- The cubin: an ELF file with tables of attributes {format, attribute, size or value, payload} */

enum { PARAMETER = 0x17, FRAME_SIZE = 0x11, REGISTERS = 0x2f, WITH_PAYLOAD = 4 };

static uint64_t read_le(const unsigned char *at, int bytes) {
    uint64_t value = 0;
    memcpy(&value, at, bytes);
    return value;
}

static const unsigned char *section(const unsigned char *elf, const char *name, uint64_t *size) {
    const unsigned char *headers = elf + read_le(elf + 0x28, 8);
    int entry = read_le(elf + 0x3a, 2), count = read_le(elf + 0x3c, 2), names_index = read_le(elf + 0x3e, 2);
    const char *names = (const char *)elf + read_le(headers + names_index * entry + 0x18, 8);
    for (int i = 0; i < count; i++) {
        const unsigned char *header = headers + i * entry;
        if (strcmp(names + read_le(header, 4), name)) continue;
        *size = read_le(header + 0x20, 8);
        return elf + read_le(header + 0x18, 8);
    }
    *size = 0;
    return NULL;
}

static void read_attributes(struct kernel *kernel, const char *section_name) {
    uint64_t size;
    const unsigned char *at = section(kernel->image->code, section_name, &size), *end = at + size;
    while (at && at + 4 <= end) {
        int format = at[0], attribute = at[1], length = format == WITH_PAYLOAD ? read_le(at + 2, 2) : 0;
        const unsigned char *payload = at + 4;
        if (attribute == FRAME_SIZE && length == 8) kernel->stack = read_le(payload + 4, 4);
        if (attribute == REGISTERS && length == 8) kernel->registers = read_le(payload + 4, 4);
        if (attribute == PARAMETER && length == 12) {
            unsigned ordinal = read_le(payload + 4, 2), bytes = read_le(payload + 8, 4) >> 18;
            if (ordinal < SLOTS && bytes <= LARGEST) kernel->sizes[ordinal] = bytes;
            if (ordinal >= kernel->count) kernel->count = ordinal + 1;
        }
        at = payload + length;
    }
}

/* Whether the card runs a cubin: its own, or an earlier one of its generation that is not for that arch alone. */
static int runs(const unsigned char *elf) {
    enum { ABI_BEFORE_100 = 7, FOR_ITS_ARCH_ALONE = 0x800 };
    unsigned flags = (unsigned)read_le(elf + 0x30, 4), abi = elf[8];
    int arch = abi > ABI_BEFORE_100 ? flags >> 8 & 0xff : flags & 0xff;
    if (abi <= ABI_BEFORE_100 && flags & FOR_ITS_ARCH_ALONE) return arch == stub_arch;
    return arch / 10 == stub_arch / 10 && arch <= stub_arch;
}

/* ---- PTX: ".target sm_90" and ".entry name(.param .u64 name_param_0, .param .align 64 .b8 name_param_1[128])" */

static int is_ptx(const char *code) { return !memcmp(code, "//", 2) || !strncmp(code, ".version", 8); }

static int ptx_arch(const char *code) {
    const char *target = strstr(code, ".target sm_");
    return target ? atoi(target + strlen(".target sm_")) : 0;
}

static unsigned parameter_size(const char *parameter, const char *end) {
    static const struct {
        const char *type;
        unsigned bytes;
    } types[] = {{".u64", 8}, {".s64", 8}, {".b64", 8}, {".f64", 8}, {".u32", 4}, {".s32", 4}, {".b32", 4},
                 {".f32", 4}, {".u16", 2}, {".b16", 2}, {".u8", 1},  {".b8", 1}};
    const char *length = memchr(parameter, '[', (size_t)(end - parameter));
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        const char *found = strstr(parameter, types[i].type);
        if (found && found < end) return types[i].bytes * (length ? (unsigned)atoi(length + 1) : 1);
    }
    return 0;
}

static void read_ptx(struct kernel *kernel) {
    char entry[512];
    snprintf(entry, sizeof entry, ".entry %s(", kernel->name);
    const char *at = strstr((const char *)kernel->image->code, entry), *end = at ? strchr(at, ')') : NULL;
    for (at = end ? strstr(at, ".param ") : NULL; at && at < end; at = strstr(at + 1, ".param ")) {
        const char *comma = memchr(at, ',', (size_t)(end - at));
        if (kernel->count < SLOTS) kernel->sizes[kernel->count] = parameter_size(at, comma ? comma : end);
        kernel->count++;
    }
}

/* ---- Loading and launching */

static CUresult load(void **handle, const void *code) {
    if (stub_capturing) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    int ptx = is_ptx(code);
    if (!ptx && memcmp(code, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
    if (ptx ? !ptx_arch(code) || ptx_arch(code) > stub_arch : !runs(code)) return CUDA_ERROR_NO_BINARY_FOR_GPU;
    if (stub_load_time) usleep((unsigned)stub_load_time);
    struct image *image = calloc(1, sizeof *image);
    image->code = code, image->is_ptx = ptx;
    pthread_mutex_lock(&changing);
    image->next = images, images = image;
    pthread_mutex_unlock(&changing);
    COUNT(stub_loads);
    *handle = image;
    return CUDA_SUCCESS;
}

static CUresult unload(struct image *image) {
    if (image->unloaded) return CUDA_ERROR_INVALID_HANDLE;
    image->unloaded = 1;
    COUNT(stub_unloads);
    return CUDA_SUCCESS;
}

static CUresult kernel_of(struct kernel **found, struct image *image, const char *name) {
    if (image->unloaded) return CUDA_ERROR_INVALID_HANDLE;
    struct kernel *kernel = calloc(1, sizeof *kernel);
    char specific[512];
    snprintf(specific, sizeof specific, ".nv.info.%s", name);
    kernel->image = image, kernel->name = strdup(name), kernel->shared = SHARED_BY_DEFAULT;
    if (image->is_ptx) read_ptx(kernel);
    else read_attributes(kernel, ".nv.info"), read_attributes(kernel, specific);
    pthread_mutex_lock(&changing);
    kernel->next = kernels, kernels = kernel;
    pthread_mutex_unlock(&changing);
    *found = kernel;
    if (!kernel->count) return CUDA_ERROR_NOT_FOUND;
    return kernel->count <= SLOTS ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}

/* Loads a kernel in the current context, which a captured stream does not allow. */
static CUresult bring_in(struct kernel *kernel) {
    unsigned bit = context_bit();
    if (!bit) return CUDA_ERROR_INVALID_CONTEXT;
    if (kernel->image->unloaded) return CUDA_ERROR_INVALID_HANDLE;
    if (!(__atomic_load_n(&kernel->in_contexts, __ATOMIC_RELAXED) & bit) && stub_capturing)
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    __atomic_fetch_or(&kernel->in_contexts, bit, __ATOMIC_RELAXED);
    return CUDA_SUCCESS;
}

static CUresult request_shared(struct kernel *kernel, CUfunction_attribute attribute, int value) {
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
    if (value < 0 || value > shared_limit()) return CUDA_ERROR_INVALID_VALUE;
    kernel->shared = value;
    return CUDA_SUCCESS;
}

static CUresult keep(const struct note *note) {
    if (!stub_noting) return CUDA_SUCCESS;
    pthread_mutex_lock(&changing);
    int room = stub_count < MOST;
    if (room) stub_notes[stub_count++] = *note;
    pthread_mutex_unlock(&changing);
    return room ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

static CUresult launch(struct kernel *kernel, const unsigned *grid, const unsigned *block, unsigned shared,
                       CUstream stream, void **params) {
    unsigned threads = block[0] * block[1] * block[2];
    if (!threads || threads > 1024 || (unsigned)kernel->registers * threads > 65536) return CUDA_ERROR_INVALID_VALUE;
    if (shared > (unsigned)kernel->shared || shared > (unsigned)shared_limit()) return CUDA_ERROR_INVALID_VALUE;
    if (!grid[0] || !grid[1] || !grid[2] || grid[0] > INT32_MAX || grid[1] > 65535 || grid[2] > 65535)
        return CUDA_ERROR_INVALID_VALUE;
    CUresult status = bring_in(kernel);
    if (status) return status;
    struct note note;
    memset(&note, 0, sizeof note);
    note.function = kernel, note.code = kernel->image->code, note.name = kernel->name;
    note.shared = shared, note.count = kernel->count, note.stack = kernel->stack;
    note.stream = (uint64_t)stream;
    memcpy(note.grid, grid, sizeof note.grid);
    memcpy(note.block, block, sizeof note.block);
    memcpy(note.sizes, kernel->sizes, sizeof note.sizes);
    for (unsigned i = 0; i < kernel->count; i++) memcpy(note.values[i], params[i], kernel->sizes[i]);
    status = keep(&note);
    if (status) return status;
    COUNT(stub_launches);
    if (stub_on_launch) stub_on_launch(&note);
    return CUDA_SUCCESS;
}

/* ---- The driver's functions */

EXPORT CUresult cuInit(unsigned flags) {
    CALLED;
    return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

EXPORT CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }

EXPORT CUresult cuGetErrorName(CUresult error, const char **name) {
#define NAMED(error) {error, #error}
    static const struct {
        CUresult error;
        const char *name;
    } named[] = {
        NAMED(CUDA_SUCCESS), NAMED(CUDA_ERROR_INVALID_VALUE), NAMED(CUDA_ERROR_OUT_OF_MEMORY),
        NAMED(CUDA_ERROR_NO_DEVICE), NAMED(CUDA_ERROR_INVALID_DEVICE), NAMED(CUDA_ERROR_INVALID_IMAGE),
        NAMED(CUDA_ERROR_INVALID_CONTEXT), NAMED(CUDA_ERROR_NO_BINARY_FOR_GPU), NAMED(CUDA_ERROR_INVALID_HANDLE),
        NAMED(CUDA_ERROR_NOT_FOUND), NAMED(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED), NAMED(CUDA_ERROR_UNKNOWN),
    };
    *name = NULL;
    for (size_t i = 0; i < sizeof named / sizeof *named; i++)
        if (named[i].error == error) *name = named[i].name;
    return *name ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **name) { return cuGetErrorName(error, name); }

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    if (ordinal < 0 || ordinal >= DEVICES) return CUDA_ERROR_INVALID_DEVICE;
    return *device = ordinal, CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetCount(int *count) { return *count = DEVICES, CUDA_SUCCESS; }

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    CALLED;
    if (device < 0 || device >= DEVICES) return CUDA_ERROR_INVALID_DEVICE;
    COUNT(stub_retained);
    return *context = (CUcontext)((uintptr_t)FIRST_CONTEXT + (unsigned)device), CUDA_SUCCESS;
}

EXPORT CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
    CALLED;
    if (device < 0 || device >= DEVICES || stub_retained <= 0) return CUDA_ERROR_INVALID_CONTEXT;
    __atomic_fetch_sub(&stub_retained, 1, __ATOMIC_RELAXED);
    return CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)contexts[top], CUDA_SUCCESS; }

EXPORT CUresult cuCtxSetCurrent(CUcontext context) { return contexts[top] = (uintptr_t)context, CUDA_SUCCESS; }

EXPORT CUresult cuCtxPushCurrent(CUcontext context) {
    CALLED;
    if (!context || top + 1 == CONTEXTS) return CUDA_ERROR_INVALID_CONTEXT;
    return contexts[++top] = (uintptr_t)context, CUDA_SUCCESS;
}

EXPORT CUresult cuCtxPopCurrent(CUcontext *context) {
    CALLED;
    if (!top) return CUDA_ERROR_INVALID_CONTEXT;
    return *context = (CUcontext)contexts[top--], CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    CALLED;
    if (!contexts[top]) return CUDA_ERROR_INVALID_CONTEXT;
    return *device = (int)(contexts[top] - FIRST_CONTEXT), CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return (void)limit, *value = 1 << 20, CUDA_SUCCESS; }

EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return (void)limit, (void)value, CUDA_SUCCESS; }

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    CALLED;
    if (device < 0 || device >= DEVICES) return CUDA_ERROR_INVALID_DEVICE;
    switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = stub_arch / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = stub_arch % 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = card()->multiprocessors; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = shared_limit(); break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = shared_limit() + 1024; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
    case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: *value = 1; break;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuModuleLoadData(CUmodule *module, const void *code) { return load((void **)module, code); }

EXPORT CUresult cuModuleUnload(CUmodule module) { return unload((struct image *)module); }

EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    CUresult status = kernel_of((struct kernel **)function, (struct image *)module, name);
    return status ? status : bring_in(*(struct kernel **)function);
}

EXPORT CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *options, void **values,
                                  unsigned n_options, CUlibraryOption *more, void **more_values, unsigned n_more) {
    (void)options, (void)values, (void)n_options, (void)more, (void)more_values, (void)n_more;
    CALLED;
    return load((void **)library, code);
}

EXPORT CUresult cuLibraryUnload(CUlibrary library) {
    CALLED;
    return unload((struct image *)library);
}

EXPORT CUresult cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name) {
    CALLED;
    return kernel_of((struct kernel **)kernel, (struct image *)library, name);
}

/* A kernel may be launched as a function; asking for its function loads it in the current context. */
EXPORT CUresult cuKernelGetFunction(CUfunction *function, CUkernel kernel) {
    CALLED;
    *function = (CUfunction)kernel;
    return bring_in((struct kernel *)kernel);
}

EXPORT CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
    const struct kernel *kernel = (struct kernel *)function;
    switch ((int)attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = kernel->registers; break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = kernel->stack; break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = 0; break;
    default: return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
    return request_shared((struct kernel *)function, attribute, value);
}

EXPORT CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device) {
    CALLED;
    if (device < 0 || device >= DEVICES) return CUDA_ERROR_INVALID_DEVICE;
    return request_shared((struct kernel *)kernel, attribute, value);
}

EXPORT CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
    return (void)function, (void)config, CUDA_SUCCESS;
}

EXPORT CUresult cuOccupancyMaxActiveClusters(int *clusters, CUfunction function, const CUlaunchConfig *config) {
    return (void)function, (void)config, *clusters = 1, CUDA_SUCCESS;
}

EXPORT CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return CUDA_ERROR_INVALID_VALUE;
    return *(CUdeviceptr *)value = pointer, CUDA_SUCCESS;
}

EXPORT CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **values,
                                       CUdeviceptr pointer) {
    for (unsigned i = 0; i < count; i++)
        if (attributes[i] == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr *)values[i] = pointer;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
    (void)stream;
    return *status = stub_capturing ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}

/* Checks the rules of the driver API's documentation. The map holds the arguments, so that two maps can be compared. */
EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                       const cuuint64_t *sizes, const cuuint64_t *strides, const cuuint32_t *box,
                                       const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                       CUtensorMapFloatOOBfill fill) {
    CALLED;
    unsigned bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2, inner = box[0] * bytes;
    unsigned span = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 128
                    : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                    : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                                                           : 0;
    if ((uintptr_t)map % 64 || (uintptr_t)address % 16 || rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
    for (unsigned i = 0; i < rank; i++) {
        if (!sizes[i] || sizes[i] > 1ull << 32 || !box[i] || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
        if (element_strides[i] < 1 || element_strides[i] > 8) return CUDA_ERROR_INVALID_VALUE;
    }
    for (unsigned i = 0; i + 1 < rank; i++) {
        if (strides[i] % 16 || strides[i] >= 1ull << 40) return CUDA_ERROR_INVALID_VALUE;
        if (strides[i] < sizes[0] * bytes) return CUDA_ERROR_INVALID_VALUE; /* rows that overlap */
    }
    if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || inner % 16 || (span && inner > span))
        return CUDA_ERROR_INVALID_VALUE;
    uint64_t arguments[16] = {(uintptr_t)address, type, rank, swizzle, promotion, fill};
    for (unsigned i = 0; i < rank && i < 2; i++)
        arguments[6 + i] = sizes[i], arguments[8 + i] = i ? strides[i - 1] : 0, arguments[10 + i] = box[i];
    memset(map, 0, sizeof *map);
    memcpy(map, arguments, sizeof arguments < sizeof *map ? sizeof arguments : sizeof *map);
    return CUDA_SUCCESS;
}

/* ---- Memory and streams: host memory, in which all work is done at once */

EXPORT CUresult cuMemAlloc(CUdeviceptr *memory, size_t bytes) {
    if (!bytes) return CUDA_ERROR_INVALID_VALUE;
    *memory = (CUdeviceptr)aligned_alloc(256, (bytes + 255) / 256 * 256);
    return *memory ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

EXPORT CUresult cuMemFree(CUdeviceptr memory) { return free((void *)memory), CUDA_SUCCESS; }

EXPORT CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t bytes) {
    return memcpy((void *)to, from, bytes), CUDA_SUCCESS;
}

EXPORT CUresult cuMemcpyDtoH(void *to, CUdeviceptr from, size_t bytes) {
    return memcpy(to, (const void *)from, bytes), CUDA_SUCCESS;
}

EXPORT CUresult cuMemsetD8(CUdeviceptr memory, unsigned char value, size_t count) {
    return memset((void *)memory, value, count), CUDA_SUCCESS;
}

EXPORT CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
    (void)flags;
    return (*stream = malloc(1)) ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}

EXPORT CUresult cuStreamDestroy(CUstream stream) { return free(stream), CUDA_SUCCESS; }

EXPORT CUresult cuStreamSynchronize(CUstream stream) { return (void)stream, CUDA_SUCCESS; }

EXPORT CUresult cuCtxSynchronize(void) { return CUDA_SUCCESS; }

/* ---- Launches */

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                               unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **params,
                               void **extra) {
    (void)extra;
    CALLED;
    const unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
    return launch((struct kernel *)function, grid, block, shared, stream, params);
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
    (void)extra;
    const unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    const unsigned block[] = {config->blockDimX, config->blockDimY, config->blockDimZ};
    return launch((struct kernel *)function, grid, block, config->sharedMemBytes, config->hStream, params);
}

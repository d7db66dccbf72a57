/* A libcuda.so.1 that records launches instead of making them, with the limits of real cards. It shows on any machine
   what the ahead-of-time library and Triton's own launch path request from a GPU.

   It returns an error where a GPU would: for more shared memory a block than the card allows or than was requested, too
   large a block or grid, a tensor map against CUDA's rules, a module loaded while a stream is captured. It reads a
   kernel's parameters, registers and stack from the cubin, as the driver does. */

#include <cuda.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
enum { MOST = 1024, SLOTS = 96, LARGEST = 128, SHARED_BY_DEFAULT = 48 << 10 };

static const struct card {
    int arch, shared, multiprocessors; /* shared: bytes a block may opt in to */
} cards[] = {
    {80, 166912, 108}, {86, 101376, 82}, {89, 101376, 128}, {90, 232448, 132}, {100, 232448, 148}, {120, 101376, 170},
};
EXPORT int stub_arch = 80;

struct kernel {
    const unsigned char *cubin;
    char *name;
    int registers, stack, shared; /* shared: dynamic memory that was requested */
    unsigned count, sizes[SLOTS];
};

struct note {
    const void *function, *cubin; /* function: another one each time the kernel is loaded */
    const char *name;
    unsigned grid[3], block[3], shared, count, stack;
    uint64_t stream;
    unsigned sizes[SLOTS];
    unsigned char values[SLOTS][LARGEST];
};
EXPORT struct note stub_notes[MOST];
EXPORT int stub_count, stub_noting = 1, stub_capturing;
EXPORT unsigned long long stub_launches, stub_loads;

static const struct card *card(void) {
    for (size_t i = 0; i < sizeof cards / sizeof *cards; i++)
        if (cards[i].arch == stub_arch) return &cards[i];
    static struct card other; /* an arch without kernels */
    other = (struct card){stub_arch, SHARED_BY_DEFAULT, 1};
    return &other;
}

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
    const unsigned char *at = section(kernel->cubin, section_name, &size), *end = at + size;
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

static CUresult kernel_of(struct kernel **found, const void *cubin, const char *name) {
    struct kernel *kernel = calloc(1, sizeof *kernel);
    char specific[512];
    snprintf(specific, sizeof specific, ".nv.info.%s", name);
    kernel->cubin = cubin, kernel->name = strdup(name), kernel->shared = SHARED_BY_DEFAULT;
    read_attributes(kernel, ".nv.info");
    read_attributes(kernel, specific);
    *found = kernel;
    return kernel->count && kernel->count <= SLOTS ? CUDA_SUCCESS : CUDA_ERROR_INVALID_IMAGE;
}

static CUresult load(void **handle, const void *code) {
    if (stub_capturing) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (memcmp(code, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
    stub_loads++;
    *handle = (void *)code;
    return CUDA_SUCCESS;
}

static CUresult request_shared(struct kernel *kernel, CUfunction_attribute attribute, int value) {
    if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_ERROR_INVALID_VALUE;
    if (value < 0 || value > card()->shared) return CUDA_ERROR_INVALID_VALUE;
    kernel->shared = value;
    return CUDA_SUCCESS;
}

static CUresult launch(struct kernel *kernel, const unsigned *grid, const unsigned *block, unsigned shared,
                       CUstream stream, void **params) {
    stub_launches++;
    unsigned threads = block[0] * block[1] * block[2];
    if (!threads || threads > 1024 || (unsigned)kernel->registers * threads > 65536) return CUDA_ERROR_INVALID_VALUE;
    if (shared > (unsigned)kernel->shared || shared > (unsigned)card()->shared) return CUDA_ERROR_INVALID_VALUE;
    if (!grid[0] || !grid[1] || !grid[2] || grid[0] > INT32_MAX || grid[1] > 65535 || grid[2] > 65535)
        return CUDA_ERROR_INVALID_VALUE;
    if (!stub_noting) return CUDA_SUCCESS;
    if (stub_count == MOST) return CUDA_ERROR_OUT_OF_MEMORY;
    struct note *note = &stub_notes[stub_count++];
    memset(note, 0, sizeof *note);
    note->function = kernel, note->cubin = kernel->cubin, note->name = kernel->name;
    note->shared = shared, note->count = kernel->count, note->stack = kernel->stack;
    note->stream = (uint64_t)stream;
    memcpy(note->grid, grid, sizeof note->grid);
    memcpy(note->block, block, sizeof note->block);
    memcpy(note->sizes, kernel->sizes, sizeof note->sizes);
    for (unsigned i = 0; i < kernel->count; i++) memcpy(note->values[i], params[i], kernel->sizes[i]);
    return CUDA_SUCCESS;
}

/* ---- The driver's functions */

EXPORT CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }

EXPORT CUresult cuDriverGetVersion(int *version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }

EXPORT CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = error == CUDA_ERROR_INVALID_VALUE                ? "CUDA_ERROR_INVALID_VALUE"
            : error == CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
                                                             : "another error";
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorString(CUresult error, const char **name) { return cuGetErrorName(error, name); }

EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }

EXPORT CUresult cuDeviceGetCount(int *count) { return *count = 1, CUDA_SUCCESS; }

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    (void)device;
    return *context = (CUcontext)0x10, CUDA_SUCCESS;
}

EXPORT CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)0x10, CUDA_SUCCESS; }

EXPORT CUresult cuCtxSetCurrent(CUcontext context) { return (void)context, CUDA_SUCCESS; }

EXPORT CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }

EXPORT CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return (void)limit, *value = 1 << 20, CUDA_SUCCESS; }

EXPORT CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return (void)limit, (void)value, CUDA_SUCCESS; }

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    (void)device;
    switch ((int)attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = stub_arch / 10; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = stub_arch % 10; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = card()->multiprocessors; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = card()->shared; break;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = card()->shared + 1024; break;
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

EXPORT CUresult cuModuleUnload(CUmodule module) { return (void)module, CUDA_SUCCESS; }

EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
    return kernel_of((struct kernel **)function, module, name);
}

EXPORT CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *options, void **values,
                                  unsigned n_options, CUlibraryOption *more, void **more_values, unsigned n_more) {
    (void)options, (void)values, (void)n_options, (void)more, (void)more_values, (void)n_more;
    return load((void **)library, code);
}

EXPORT CUresult cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name) {
    return kernel_of((struct kernel **)kernel, library, name);
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
    (void)device;
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
    unsigned bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2, inner = box[0] * bytes;
    unsigned span = swizzle == CU_TENSOR_MAP_SWIZZLE_128B  ? 128
                    : swizzle == CU_TENSOR_MAP_SWIZZLE_64B ? 64
                    : swizzle == CU_TENSOR_MAP_SWIZZLE_32B ? 32
                                                           : 0;
    if ((uintptr_t)address % 16 || rank < 1 || rank > 5) return CUDA_ERROR_INVALID_VALUE;
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

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                               unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **params,
                               void **extra) {
    (void)extra;
    const unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
    return launch((struct kernel *)function, grid, block, shared, stream, params);
}

EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **params, void **extra) {
    (void)extra;
    const unsigned grid[] = {config->gridDimX, config->gridDimY, config->gridDimZ};
    const unsigned block[] = {config->blockDimX, config->blockDimY, config->blockDimZ};
    return launch((struct kernel *)function, grid, block, config->sharedMemBytes, config->hStream, params);
}

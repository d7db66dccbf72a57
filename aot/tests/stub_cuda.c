/* A libcuda.so.1 that notes launches instead of making them: what the library would ask of a GPU, on any machine. */

#include <cuda.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
enum { MOST = 64, SLOTS = 40 };

struct note {
    const void *cubin;
    const char *name;
    unsigned grid[3], block[3], shared, count;
    unsigned long long values[SLOTS];
};
EXPORT struct note stub_notes[MOST];
EXPORT int stub_count, stub_arch = 80, stub_multiprocessors = 2;

struct handle {
    const void *cubin;
    const char *name;
};

EXPORT CUresult cuInit(unsigned flags) { return flags ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS; }

EXPORT CUresult cuCtxGetDevice(CUdevice *device) {
    *device = 0;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    (void)device;
    if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) *value = stub_arch / 10;
    else if (attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) *value = stub_arch % 10;
    else if (attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) *value = stub_multiprocessors;
    else return CUDA_ERROR_INVALID_VALUE;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryLoadData(CUlibrary *library, const void *code, CUjit_option *options, void **values,
                                  unsigned n_options, CUlibraryOption *more, void **more_values, unsigned n_more) {
    (void)options, (void)values, (void)n_options, (void)more, (void)more_values, (void)n_more;
    if (memcmp(code, "\177ELF", 4)) return CUDA_ERROR_INVALID_IMAGE;
    struct handle *handle = calloc(1, sizeof *handle);
    handle->cubin = code;
    *library = (CUlibrary)handle;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuLibraryGetKernel(CUkernel *kernel, CUlibrary library, const char *name) {
    ((struct handle *)library)->name = name;
    *kernel = (CUkernel)library;
    return CUDA_SUCCESS;
}

EXPORT CUresult cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel kernel, CUdevice device) {
    (void)kernel, (void)device;
    return attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES && value > 0 ? CUDA_SUCCESS
                                                                                     : CUDA_ERROR_INVALID_VALUE;
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                               unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **params,
                               void **extra) {
    (void)stream, (void)extra;
    if (stub_count == MOST) return CUDA_ERROR_OUT_OF_MEMORY;
    struct handle *handle = (struct handle *)function;
    struct note *note = &stub_notes[stub_count++];
    unsigned grid[] = {grid_x, grid_y, grid_z}, block[] = {block_x, block_y, block_z};
    *note = (struct note){.cubin = handle->cubin, .name = handle->name, .shared = shared};
    memcpy(note->grid, grid, sizeof grid);
    memcpy(note->block, block, sizeof block);
    for (; params[note->count]; note->count++) note->values[note->count] = *(unsigned long long *)params[note->count];
    return CUDA_SUCCESS;
}

EXPORT CUresult cuGetErrorName(CUresult error, const char **name) {
    *name = error == CUDA_ERROR_INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE" : "another error";
    return CUDA_SUCCESS;
}

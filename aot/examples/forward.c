/* SPDX-License-Identifier: Apache-2.0

   The forward pass of one LoRA layer, as an engine would call it. It uses no device memory, so that it builds and runs
   anywhere. With a GPU, take the addresses from cudaMalloc and the stream from cudaStreamCreate. */

#include "lora_fast.h"

#include <stdio.h>

static int forward(const lora_fast_layer *layer, const void *x, const void *weight, const void *a, const void *b,
                   void *s, void *y, lora_fast_stream stream) {
    int error = lora_fast_project(layer, x, a, s, stream);
    if (!error) error = lora_fast_linear(layer, x, weight, NULL, s, b, y, stream);
    return error;
}

int main(void) {
    int count;
    const lora_fast_kernel *kernels = lora_fast_kernels(&count);
    printf("%d kernels, the first: sm_%d %s\n", count, kernels[0].arch, kernels[0].key);

    lora_fast_layer layer = {.n_tokens = 8192, .d_in = 4096, .d_out = 4096, .r = 16, .scaling = 2.0f,
                             .dtype = LORA_FAST_BFLOAT16, .adapter = LORA_FAST_FLOAT32};
    void *nowhere = (void *)256;
    int misaligned = forward(&layer, (char *)nowhere + 2, nowhere, nowhere, nowhere, nowhere, nowhere, NULL);
    printf("an address that is not a multiple of 16: %s\n", lora_fast_error_name(misaligned));
    if (misaligned != LORA_FAST_MISALIGNED) return 1;

    int error = forward(&layer, nowhere, nowhere, nowhere, nowhere, nowhere, nowhere, NULL);
    printf("a launch without a CUDA context: %s\n", lora_fast_error_name(error));
    return error == LORA_FAST_OK; /* success is impossible here */
}

/* SPDX-License-Identifier: Apache-2.0

   The forward pass of one LoRA layer, as an engine would call it. It uses no device memory, so that it builds and runs
   anywhere. With a GPU, take the addresses from cudaMalloc and the stream from cudaStreamCreate. */

#include <lora_fast.h>
#include <stdio.h>

static int forward(const lora_fast_layer *layer, const void *x, const void *weight, const void *a, const void *b,
                   void *s, void *y, lora_fast_stream stream) {
    int error = lora_fast_project(layer, x, a, s, stream);
    return error ? error : lora_fast_linear(layer, x, weight, NULL, s, b, y, stream);
}

int main(void) {
    int version = lora_fast_version(), n_kernels, n_archs, n_ranks;
    lora_fast_kernels(&n_kernels);
    const int *archs = lora_fast_archs(&n_archs), *ranks = lora_fast_ranks(&n_ranks);
    printf("lora_fast %d.%d.%d, %d kernels for", version / 10000, version / 100 % 100, version % 100, n_kernels);
    for (int i = 0; i < n_archs; i++) printf(" sm_%d", archs[i]);
    printf("\n");

    lora_fast_layer layer = {.size = sizeof layer, .n_tokens = 8192, .d_in = 4096, .d_out = 4096, .r = ranks[0],
                             .scaling = 2.0f, .dtype = LORA_FAST_BFLOAT16, .adapter = LORA_FAST_FLOAT32};
    void *nowhere = (void *)256;
    int misaligned = forward(&layer, (char *)nowhere + 2, nowhere, nowhere, nowhere, nowhere, nowhere, NULL);
    printf("%s: %s\n", lora_fast_error_name(misaligned), lora_fast_error_message());
    if (misaligned != LORA_FAST_MISALIGNED) return 1;

    int error = forward(&layer, nowhere, nowhere, nowhere, nowhere, nowhere, nowhere, NULL); /* without a context */
    printf("%s: %s\n", lora_fast_error_name(error), lora_fast_error_message());
    return error == LORA_FAST_OK; /* success is impossible here */
}

/* SPDX-License-Identifier: Apache-2.0

   Trains one LoRA pair by linear regression: 10 steps of AdamW with iLoRA, all in float32, through CUDA's driver API. It
   prints the loss of every step and, given the name of a file, writes a and b there.

   A step of the layer is project, linear, grad_s_b, grad_a; a step of the optimizer is adamw_step with Grams, imbalance,
   transform. Everything runs on the default stream, which the copies to and from the device wait for. */

#include "lora_fast.h"

#include <cuda.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

enum { N_TOKENS = 128, D_IN = 64, D_OUT = 96, R = 16, STEPS = 10 };
enum { B, A, FACTORS }; /* the results of a step have a row for each factor, those of b first */
static const float lam = 0.1f;
static const double settings[] = {0.01, 0.9, 0.999, 1e-8, 0.01}; /* lr, beta1, beta2, eps, weight decay */

static float x[N_TOKENS * D_IN], weight[D_OUT * D_IN], target[N_TOKENS * D_OUT], y[N_TOKENS * D_OUT];
static float a[R * D_IN], b[D_OUT * R]; /* b starts at 0 */

#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        int status_ = (int)(call);                                                                                     \
        if (status_) return failed(#call, status_);                                                                    \
    } while (0)

static int failed(const char *call, int status) {
    fprintf(stderr, "%s: %s\n", call, lora_fast_error_name(status));
    if (status < 0) fprintf(stderr, "%s\n", lora_fast_error_message());
    return status;
}

/* Fills an array with numbers from -scale / 2 to scale / 2, the same on every machine. */
static void fill(float *numbers, int count, float scale) {
    static uint32_t state = 1;
    for (int i = 0; i < count; i++) {
        state = 1664525u * state + 1013904223u;
        numbers[i] = ((float)(state >> 8) / (1 << 24) - 0.5f) * scale;
    }
}

static int upload_status; /* of the first upload that failed */

/* Returns device memory with a copy of host memory, or with zeros where host is NULL. */
static void *upload(const void *host, size_t bytes) {
    CUdeviceptr memory = 0;
    CUresult status = bytes ? cuMemAlloc(&memory, bytes) : CUDA_SUCCESS;
    if (!status && bytes) status = host ? cuMemcpyHtoD(memory, host, bytes) : cuMemsetD8(memory, 0, bytes);
    if (status && !upload_status) upload_status = (int)status;
    return (void *)(uintptr_t)memory;
}

static int download(void *host, const void *address, size_t bytes) {
    return (int)cuMemcpyDtoH(host, (CUdeviceptr)(uintptr_t)address, bytes);
}

/* What is on the device. */
static struct {
    float *x, *weight, *y, *dy, *s, *ds;
    float *factors[FACTORS], *gradients[FACTORS], *first[FACTORS], *second[FACTORS];
    float *steps, *rho, *grams, *matrices;
    double *hyper;
    void *workspace, *partial_grams;
} device;

static int upload_all(const lora_fast_layer *layer) {
    const size_t sizes[] = {[B] = sizeof b, [A] = sizeof a}, square = R * R * sizeof(float);
    const float rho = (float)R / D_OUT;
    size_t workspace;
    TRY(lora_fast_workspace(layer, &workspace));
    device.x = upload(x, sizeof x), device.weight = upload(weight, sizeof weight);
    device.y = upload(NULL, sizeof y), device.dy = upload(NULL, sizeof y);
    device.s = upload(NULL, N_TOKENS * R * sizeof(float)), device.ds = upload(NULL, N_TOKENS * R * sizeof(float));
    for (int i = 0; i < FACTORS; i++) {
        device.factors[i] = upload(i == A ? a : b, sizes[i]), device.gradients[i] = upload(NULL, sizes[i]);
        device.first[i] = upload(NULL, sizes[i]), device.second[i] = upload(NULL, sizes[i]);
    }
    device.hyper = upload(settings, sizeof settings), device.steps = upload(NULL, FACTORS * sizeof(float));
    device.rho = upload(&rho, sizeof rho), device.grams = upload(NULL, FACTORS * square);
    device.matrices = upload(NULL, FACTORS * square), device.workspace = upload(NULL, workspace);
    return upload_status;
}

/* Makes the table of both factors, for launches of one kind. */
static int make_group(lora_fast_group *group, lora_fast_op op) {
    const int is_step = op == LORA_FAST_STEP, lengths[] = {[B] = D_OUT, [A] = D_IN};
    lora_fast_factor factors[FACTORS] = {0};
    for (int i = 0; i < FACTORS; i++) {
        factors[i] = (lora_fast_factor){.d = lengths[i], .is_a = i == A, .index = i, .tensors = {device.factors[i]}};
        if (!is_step) continue;
        factors[i].tensors[1] = device.gradients[i];
        factors[i].tensors[2] = device.first[i], factors[i].tensors[3] = device.second[i];
    }
    *group = (lora_fast_group){.size = sizeof *group, .op = op, .dtype = LORA_FAST_FLOAT32, .r = R,
                               .n_factors = FACTORS, .n_rows = FACTORS};
    TRY(lora_fast_plan(group, factors));
    void *host = malloc(group->bytes);
    if (!host) return failed("malloc", LORA_FAST_NO_MEMORY);
    int status = lora_fast_fill(group, factors, host);
    if (!status) group->device = upload(host, group->bytes);
    free(host);
    return status ? status : upload_status;
}

/* Computes y, the loss, which is the mean square of y - target, and the gradients of a and b. */
static int run_layer(const lora_fast_layer *layer, double *loss) {
    const float scale = (float)(2.0 / (N_TOKENS * D_OUT));
    TRY(lora_fast_project(layer, device.x, device.factors[A], device.s, NULL));
    TRY(lora_fast_linear(layer, device.x, device.weight, NULL, device.s, device.factors[B], device.y, NULL));
    TRY(download(y, device.y, sizeof y));
    *loss = 0.0;
    for (int i = 0; i < N_TOKENS * D_OUT; i++) {
        float difference = y[i] - target[i];
        *loss += (double)difference * difference / (N_TOKENS * D_OUT);
        y[i] = difference * scale;
    }
    TRY(cuMemcpyHtoD((CUdeviceptr)(uintptr_t)device.dy, y, sizeof y));
    TRY(lora_fast_grad_s_b(layer, device.dy, device.s, device.factors[B], device.ds, device.gradients[B],
                           device.workspace, NULL));
    return lora_fast_grad_a(layer, device.x, device.ds, device.gradients[A], device.workspace, NULL);
}

/* Steps both factors: AdamW, then iLoRA from the Grams of the new factors. */
static int run_step(const lora_fast_group *adamw, const lora_fast_group *transform) {
    const lora_fast_work work = {.size = sizeof work, .grams = device.grams};
    const float *kb = device.grams, *ka = kb + R * R;
    TRY(lora_fast_adamw_step(adamw, device.hyper, 1, device.steps, &work, device.partial_grams, NULL));
    TRY(lora_fast_imbalance(1, R, ka, kb, device.rho, device.hyper, device.hyper, lam, device.matrices, NULL));
    return lora_fast_transform(transform, device.matrices, 1, NULL, NULL, NULL);
}

static int train(void) {
    const lora_fast_layer layer = {.size = sizeof layer, .n_tokens = N_TOKENS, .d_in = D_IN, .d_out = D_OUT, .r = R,
                                   .dtype = LORA_FAST_FLOAT32, .adapter = LORA_FAST_FLOAT32, .scaling = 2.0f};
    lora_fast_group adamw, transform;
    size_t partial_grams;
    double loss = 0.0;
    TRY(upload_all(&layer));
    TRY(make_group(&adamw, LORA_FAST_STEP));
    TRY(make_group(&transform, LORA_FAST_TRANSFORM));
    TRY(lora_fast_gram_workspace(&adamw, &partial_grams));
    device.partial_grams = upload(NULL, partial_grams);
    TRY(upload_status);
    for (int step = 0; step < STEPS; step++) {
        TRY(run_layer(&layer, &loss));
        printf("step %d: loss %.9f\n", step, loss);
        TRY(run_step(&adamw, &transform));
    }
    TRY(download(a, device.factors[A], sizeof a));
    return download(b, device.factors[B], sizeof b);
}

static int write_factors(const char *path) {
    FILE *file = fopen(path, "wb");
    if (!file) return perror(path), 1;
    int complete = fwrite(a, sizeof a, 1, file) == 1 && fwrite(b, sizeof b, 1, file) == 1;
    if (fclose(file) || !complete) return perror(path), 1;
    return 0;
}

int main(int argc, char **argv) {
    CUdevice first;
    CUcontext context;
    fill(x, N_TOKENS * D_IN, 2.0f);
    fill(weight, D_OUT * D_IN, 0.25f);
    fill(target, N_TOKENS * D_OUT, 2.0f);
    fill(a, R * D_IN, 0.25f);
    TRY(cuInit(0));
    TRY(cuDeviceGet(&first, 0));
    TRY(cuDevicePrimaryCtxRetain(&context, first));
    TRY(cuCtxSetCurrent(context));
    int status = train();
    TRY(cuDevicePrimaryCtxRelease(first)); /* frees the device memory */
    if (status) return 1;
    return argc > 1 ? write_factors(argv[1]) : 0;
}

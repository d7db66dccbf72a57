/* SPDX-License-Identifier: Apache-2.0

   Measures what a call of the library costs the host beyond its launches: the time of the call, minus that of the stub
   driver's functions, called with the arguments that the library gave them (cuLaunchKernel, and cuTensorMapEncodeTiled,
   which a launch with tensor maps needs). cuCtxGetDevice, by which the library finds the device, counts as its own.

     host_time ARCH ROUNDS

   prints a line for each function that was built, "name launches call driver own" with tabs between: nanoseconds of CPU
   time, the lower quartile of the rounds' means. Rounds of all functions take turns. */

#define _POSIX_C_SOURCE 200809L

#include "lora_fast.h"

#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SLOTS = 96, LARGEST = 128, CALLS = 500, MOST_LAUNCHES = 2, MOST_ROUNDS = 1000, R = 16, D = 4096, PAIRS = 224 };

/* Of the stub, stub_cuda.c. */
struct note {
    const void *function, *cubin;
    const char *name;
    unsigned grid[3], block[3], shared, count, stack;
    uint64_t stream;
    unsigned sizes[SLOTS];
    unsigned char values[SLOTS][LARGEST];
};
extern struct note stub_notes[];
extern int stub_arch, stub_count, stub_noting;

/* ---- The calls. No kernel runs, so every tensor may have the same address. */

#define memory ((void *)(1 << 20))
static lora_fast_layer layer = {.size = sizeof layer, .n_tokens = 4096, .d_in = D, .d_out = D, .r = R, .scaling = 2.0f,
                                .dtype = LORA_FAST_BFLOAT16, .adapter = LORA_FAST_FLOAT32};
static lora_fast_batch batch = {.size = sizeof batch, .n_rows = 64, .n_adapters = 8, .d_in = D, .d_out = D, .r = R,
                                .dtype = LORA_FAST_BFLOAT16, .adapter = LORA_FAST_BFLOAT16, .adapters = memory,
                                .rows = memory, .ends = memory};
static lora_fast_group grams, steps, flat_steps;

static void plan(lora_fast_group *group, lora_fast_op op, int flat) {
    lora_fast_factor *factors = calloc(2 * PAIRS, sizeof *factors);
    for (int i = 0; i < 2 * PAIRS; i++) {
        factors[i] = (lora_fast_factor){.d = D, .is_a = i % 2, .index = op == LORA_FAST_GRAM ? i / 2 : i};
        for (int j = 0; j < 4; j++) factors[i].tensors[j] = memory;
    }
    *group = (lora_fast_group){.size = sizeof *group, .op = op, .dtype = LORA_FAST_FLOAT32, .r = R,
                               .n_factors = 2 * PAIRS, .n_rows = op == LORA_FAST_GRAM ? PAIRS : 2 * PAIRS, .flat = flat};
    lora_fast_plan(group, factors);
    group->device = memory;
    free(factors);
}

static int project(void) { return lora_fast_project(&layer, memory, memory, memory, NULL); }
static int linear(void) { return lora_fast_linear(&layer, memory, memory, NULL, memory, memory, memory, NULL); }
static int add_to_y(void) { return lora_fast_add_to_y(&layer, memory, memory, memory, NULL); }
static int add_adapter(void) {
    return lora_fast_add_adapter(&layer, memory, memory, memory, memory, memory, memory, NULL);
}
static int grad_s_b(void) {
    return lora_fast_grad_s_b(&layer, memory, memory, memory, memory, memory, memory, NULL);
}
static int grad_a(void) { return lora_fast_grad_a(&layer, memory, memory, memory, memory, NULL); }
static int grad_x(void) { return lora_fast_grad_x(&layer, memory, memory, memory, memory, memory, NULL); }
static int add_to_dx(void) { return lora_fast_add_to_dx(&layer, memory, memory, memory, NULL); }
static int batch_project(void) { return lora_fast_batch_project(&batch, memory, memory, NULL); }
static int batch_add_to_y(void) { return lora_fast_batch_add_to_y(&batch, memory, memory, NULL); }
static int gram(void) { return lora_fast_gram(&grams, memory, memory, NULL); }
static int adamw_step(void) { return lora_fast_adamw_step(&flat_steps, memory, 1, memory, NULL, NULL, NULL); }
static int adamw_step_with_grams(void) {
    const lora_fast_work work = {.size = sizeof work, .matrices = memory, .grams = memory};
    return lora_fast_adamw_step(&steps, memory, 1, memory, &work, memory, NULL);
}
static int imbalance(void) {
    return lora_fast_imbalance(PAIRS, R, memory, memory, memory, memory, memory, 0.1f, memory, NULL);
}
static int spd_inverse(void) {
    return lora_fast_spd_inverse(PAIRS, R, memory, 1e-8f, memory, memory, memory, NULL);
}

/* ---- What the driver costs */

struct call {
    const char *name;
    int (*run)(void);
    const lora_fast_group *group; /* which it needs, or NULL */
    int launches;
    struct note notes[MOST_LAUNCHES]; /* what the stub received */
    double of_call[MOST_ROUNDS], of_driver[MOST_ROUNDS];
};

/* Encodes a tensor map again, from the arguments that the stub wrote into it. */
static void encode_again(const unsigned char *map) {
    uint64_t arguments[12];
    CUtensorMap again;
    memcpy(arguments, map, sizeof arguments);
    cuTensorMapEncodeTiled(&again, (CUtensorMapDataType)arguments[1], 2, (void *)arguments[0], arguments + 6,
                           arguments + 9, (const cuuint32_t[]){(cuuint32_t)arguments[10], (cuuint32_t)arguments[11]},
                           (const cuuint32_t[]){1, 1}, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           (CUtensorMapSwizzle)arguments[3], (CUtensorMapL2promotion)arguments[4],
                           (CUtensorMapFloatOOBfill)arguments[5]);
}

static void launch_again(struct note *note) {
    void *params[SLOTS];
    for (unsigned i = 0; i < note->count; i++) {
        params[i] = note->values[i];
        if (note->sizes[i] == sizeof(CUtensorMap)) encode_again(note->values[i]);
    }
    cuLaunchKernel((CUfunction)note->function, note->grid[0], note->grid[1], note->grid[2], note->block[0],
                   note->block[1], note->block[2], note->shared, (CUstream)note->stream, params, NULL);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return 1e9 * (double)time.tv_sec + (double)time.tv_nsec;
}

static void measure(struct call *call, int round) {
    double begin = now();
    for (int i = 0; i < CALLS; i++) call->run();
    double middle = now();
    for (int i = 0; i < CALLS; i++)
        for (int j = 0; j < call->launches; j++) launch_again(&call->notes[j]);
    call->of_call[round] = (middle - begin) / CALLS, call->of_driver[round] = (now() - middle) / CALLS;
}

static int ascending(const void *a, const void *b) {
    return *(const double *)a < *(const double *)b ? -1 : *(const double *)a > *(const double *)b;
}

static double lower_quartile(double *values, int count) {
    qsort(values, (size_t)count, sizeof *values, ascending);
    return values[count / 4];
}

/* Runs a call once and keeps its launches; returns whether its kernels were built. */
static int prepare(struct call *call) {
    if (call->group && !call->group->n_programs) return 0; /* plan found no kernel */
    stub_count = 0, stub_noting = 1;
    int status = call->run();
    stub_noting = 0;
    if (status == LORA_FAST_NO_KERNEL) return 0;
    if (status || stub_count < 1 || stub_count > MOST_LAUNCHES) {
        fprintf(stderr, "%s: %d launches, status %d: %s\n", call->name, stub_count, status, lora_fast_error_message());
        exit(1);
    }
    call->launches = stub_count;
    memcpy(call->notes, stub_notes, (size_t)stub_count * sizeof *stub_notes);
    return 1;
}

int main(int count, char **arguments) {
#define ROW(name, group) {#name, name, group, 0, {{0}}, {0}, {0}}
    static struct call calls[] = {
        ROW(project, NULL), ROW(linear, NULL), ROW(add_to_y, NULL), ROW(add_adapter, NULL), ROW(grad_s_b, NULL),
        ROW(grad_a, NULL), ROW(grad_x, NULL), ROW(add_to_dx, NULL), ROW(batch_project, NULL),
        ROW(batch_add_to_y, NULL), ROW(gram, &grams), ROW(adamw_step, &flat_steps),
        ROW(adamw_step_with_grams, &steps), ROW(imbalance, NULL), ROW(spd_inverse, NULL),
    };
    enum { N = sizeof calls / sizeof *calls };
    int rounds = count == 3 ? atoi(arguments[2]) : 0, built[N];
    if (rounds < 1 || rounds > MOST_ROUNDS) return fprintf(stderr, "host_time ARCH ROUNDS (1 to 1000)\n"), 1;
    stub_arch = atoi(arguments[1]);
    plan(&grams, LORA_FAST_GRAM, 0), plan(&steps, LORA_FAST_STEP, 0), plan(&flat_steps, LORA_FAST_STEP, 1);
    for (int i = 0; i < N; i++) built[i] = prepare(&calls[i]);
    for (int round = 0; round < rounds; round++)
        for (int i = 0; i < N; i++)
            if (built[i]) measure(&calls[i], round);
    for (int i = 0; i < N; i++) {
        if (!built[i]) continue;
        double call = lower_quartile(calls[i].of_call, rounds), driver = lower_quartile(calls[i].of_driver, rounds);
        printf("%s\t%d\t%.0f\t%.0f\t%.0f\n", calls[i].name, calls[i].launches, call, driver, call - driver);
    }
    return 0;
}

/* SPDX-License-Identifier: Apache-2.0

   The step. Tables have the layout of kernels/pointer_table.py and pairs/add_low_rank.py; grids are those of
   kernels/pairs/{gram,adamw,transform,add_low_rank}.py. */

#include "kernels.h"

#include <stdlib.h>
#include <string.h>

enum { COLUMNS = 8, MERGE_COLUMNS = 12, COUNTERS = 16, HYPER = 5, GRAMS_OF_PAIR = 5 };
enum { MOST_FACTORS = 1 << 26 }; /* kernels multiply a factor's number by COUNTERS in 32 bits */
enum { GRAM_RANK = 64 };         /* of kernels/factor_tiles.py */

/* ---- Groups and their tables */

static int check(const char *function, const lora_fast_group *group) {
    CALL(lora_fast_check_struct(function, "group", group, sizeof *group));
    CHECK_IN(function, (unsigned)group->op <= LORA_FAST_MERGE, "group.op", "a lora_fast_op", group->op);
    CHECK_DTYPE_IN(function, group->dtype, "group.dtype");
    CHECK_RANK_IN(function, group->r, "group.r");
    CHECK_IN(function, group->n_factors >= 1 && group->n_factors <= MOST_FACTORS, "group.n_factors", "1 to 2^26",
             group->n_factors);
    CHECK_SIZE_IN(function, group->n_rows, "group.n_rows", 1);
    CHECK_IN(function, group->flat == 0 || (group->flat == 1 && group->op == LORA_FAST_STEP), "group.flat",
             "0, or 1 for a STEP", group->flat);
    return LORA_FAST_OK;
}

static int n_tensors(lora_fast_op op) { return (const int[]){2, 4, 1, 4}[op]; }

static int check_factor(const char *function, const lora_fast_group *group, const lora_fast_factor *factor) {
    CHECK_SIZE_IN(function, factor->d, "factors.d", 1);
    CHECK_IN(function, (unsigned)factor->is_a <= 1, "factors.is_a", "0 or 1", factor->is_a);
    CHECK_IN(function, factor->index >= 0 && factor->index < group->n_rows, "factors.index", "0 to group.n_rows - 1",
             factor->index);
    if (group->op == LORA_FAST_MERGE) {
        CHECK_SIZE_IN(function, factor->d_in, "factors.d_in", 1);
        CHECK_MULTIPLE_IN(function, factor->d_in, "factors.d_in");
    } else {
        CHECK_MULTIPLE_IN(function, factor->d, "factors.d");
    }
    return lora_fast_check_addresses(
        function, "factors.tensors[0], factors.tensors[1], factors.tensors[2], factors.tensors[3]",
        n_tensors(group->op), (const void *const *)factor->tensors);
}

#define GROUP_KEY(kind, options) KEY(kind, group->dtype, group->dtype, group->r, options)

/* The key of one of the kernels that work on such a group. All of them have the same CHUNK. */
static uint64_t key_of_any(const lora_fast_group *group) {
    static const enum kind kinds[] = {GRAM, STEP, TRANSFORM, MERGE};
    return GROUP_KEY(kinds[group->op], group->op == LORA_FAST_STEP && !group->flat ? MATRIX : 0);
}

/* The number of programs of a factor. */
static int64_t programs_of(const lora_fast_group *group, const lora_fast_factor *factor, const struct tile *tile) {
    int64_t programs = divide_up(group->flat ? factor->d * group->r : factor->d, tile->CHUNK);
    return group->op == LORA_FAST_MERGE ? programs * divide_up(factor->d_in, tile->BLOCK_IN) : programs;
}

/* The length of a factor's row in the table. */
static int64_t columns(const lora_fast_group *group) { return group->op == LORA_FAST_MERGE ? MERGE_COLUMNS : COLUMNS; }

/* Whether a list of gradients' addresses follows the rows. */
static int has_gradients(lora_fast_op op) { return op == LORA_FAST_GRAM || op == LORA_FAST_STEP; }

/* int64 numbers before the counters, which start at a multiple of 16 bytes. */
static int64_t numbers(const lora_fast_group *group) {
    int64_t n = group->n_factors;
    return columns(group) * n + (has_gradients(group->op) ? (n + 1) / 2 * 2 : 0);
}

/* Fails where two factors have one row of the launch's other arguments, or one pair has two factors of a side. */
static int check_rows(const char *function, const lora_fast_group *group, const lora_fast_factor *factors) {
    size_t sides = group->op == LORA_FAST_GRAM ? 2 : 1;
    int64_t repeated = -1;
    if (group->op == LORA_FAST_MERGE) return LORA_FAST_OK; /* which reads its rows */
    unsigned char *seen = calloc(sides * (size_t)group->n_rows / 8 + 1, 1);
    if (!seen) return lora_fast_fail(LORA_FAST_NO_MEMORY, "%s: no memory on the host", function);
    for (int i = 0; i < group->n_factors; i++) {
        size_t row = sides * (size_t)factors[i].index + (sides == 2 ? (size_t)factors[i].is_a : 0);
        if (seen[row / 8] >> row % 8 & 1) repeated = factors[i].index;
        seen[row / 8] |= (unsigned char)(1u << row % 8);
    }
    free(seen);
    CHECK_IN(function, repeated < 0, "factors.index", sides == 2 ? "a pair's once for each side" : "each once", repeated);
    return LORA_FAST_OK;
}

/* The size of a table, whose number of programs is known. */
static size_t bytes_of(const lora_fast_group *group) {
    return (size_t)numbers(group) * sizeof(int64_t) +
           ((size_t)group->n_factors * COUNTERS + (size_t)group->n_programs * 2) * sizeof(int32_t);
}

/* Checks the factors and sets the fields that are filled in. */
static int plan(const char *function, lora_fast_group *group, const lora_fast_factor *factors,
                const struct tile **tile) {
    int64_t programs = 0;
    CALL(lora_fast_tile_of(function, tile, key_of_any(group)));
    for (int i = 0; i < group->n_factors; i++) {
        CALL(check_factor(function, group, &factors[i]));
        programs += programs_of(group, &factors[i], *tile);
        CHECK_IN(function, programs <= LARGEST_SIZE, "factors", "at most 2^30 chunks", programs);
    }
    CALL(check_rows(function, group, factors));
    group->n_programs = (int)programs, group->chunk = (*tile)->CHUNK;
    group->bytes = bytes_of(group);
    return LORA_FAST_OK;
}

static int stamp(const lora_fast_group *group) {
    return lora_fast_stamp(6, (const int[]){(int)group->op, (int)group->dtype, group->r, group->n_factors,
                                            group->n_rows, group->flat});
}

API int lora_fast_plan(lora_fast_group *group, const lora_fast_factor *factors) {
    const struct tile *tile;
    CALL(check(__func__, group));
    CHECK_POINTER(factors);
    lora_fast_group planned = *group;
    CALL(plan(__func__, &planned, factors, &tile));
    planned.planned = stamp(&planned);
    *group = planned;
    return LORA_FAST_OK;
}

API int lora_fast_fill(const lora_fast_group *group, const lora_fast_factor *factors, void *host) {
    const struct tile *tile;
    CALL(check(__func__, group));
    CHECK_POINTER(factors);
    CHECK_POINTER(host);
    CHECK_MULTIPLE_OF_8(host);
    lora_fast_group planned = *group;
    CALL(plan(__func__, &planned, factors, &tile));
    CHECK(planned.n_programs == group->n_programs && planned.chunk == group->chunk && planned.bytes == group->bytes,
          "group.bytes", "what lora_fast_plan sets for these factors", group->bytes);
    int64_t *entry = host, *gradients = entry + columns(group) * group->n_factors;
    int32_t *counters = (int32_t *)(entry + numbers(group));
    int32_t *tiles = counters + COUNTERS * (int64_t)group->n_factors;
    memset(host, 0, group->bytes);
    for (int i = 0; i < group->n_factors; i++, entry += columns(group)) {
        const lora_fast_factor *factor = &factors[i];
        int64_t count = programs_of(group, factor, tile), r = group->r, d_in = factor->d_in;
        int column = 0;
        for (int j = 0; j < n_tensors(group->op); j++) {
            int64_t address = (int64_t)(uintptr_t)factor->tensors[j];
            if (has_gradients(group->op) && j == 1) gradients[i] = address;
            else entry[column++] = address;
        }
        if (group->op == LORA_FAST_MERGE)
            memcpy(entry + 4, (const int64_t[]){factor->d, r, d_in, factor->index, d_in, 1, r, 1}, 8 * sizeof *entry);
        else memcpy(entry + 3, (const int64_t[]){factor->d, r, factor->is_a, factor->index}, 4 * sizeof *entry);
        for (int64_t j = 0; j < count; j++) *tiles++ = i, *tiles++ = (int32_t)j;
    }
    return LORA_FAST_OK;
}

/* ---- Launches on a table */

static const int32_t *counters_of(const lora_fast_group *group) {
    return (const int32_t *)((const int64_t *)group->device + numbers(group));
}

/* The parts of a table in device memory. */
#define TABLE                                                                                                          \
    [P_entries] = {group->device},                                                                                     \
    [P_gradients] = {(const int64_t *)group->device + columns(group) * group->n_factors},                              \
    [P_counters] = {counters_of(group)},                                                                               \
    [P_tiles] = {counters_of(group) + COUNTERS * (int64_t)group->n_factors}

static int check_planned(const char *function, const lora_fast_group *group) {
    CALL(check(function, group));
    CHECK_IN(function, group->n_programs >= group->n_factors && group->n_programs <= LARGEST_SIZE, "group.n_programs",
             "what lora_fast_plan sets", group->n_programs);
    CHECK_IN(function, group->bytes == bytes_of(group), "group.bytes", "what lora_fast_plan sets", group->bytes);
    CHECK_IN(function, group->planned == stamp(group), "group.planned",
             "the op, dtype, r, n_factors, n_rows and flat that lora_fast_plan was given", group->planned);
    return LORA_FAST_OK;
}

static int check_launch(const char *function, const lora_fast_group *group, lora_fast_op op) {
    static const char *const names[] = {"LORA_FAST_GRAM", "LORA_FAST_STEP", "LORA_FAST_TRANSFORM", "LORA_FAST_MERGE"};
    CALL(check_planned(function, group));
    CHECK_IN(function, group->op == op, "group.op", names[op], group->op);
    return lora_fast_check_addresses(function, "group.device", 1, (const void *[]){group->device});
}

static int prepare(const char *function, struct launch *launch, const lora_fast_group *group, uint64_t key) {
    CALL(lora_fast_prepare(function, launch, key));
    CHECK_IN(function, group->chunk == launch->tile->CHUNK, "group.chunk", "what lora_fast_plan sets", group->chunk);
    return lora_fast_set_grid(function, launch, group->n_programs, 1, 1);
}

/* Whether keys make results round stochastically: those of 16 bits. */
static int is_stochastic(const lora_fast_group *group, const int64_t *keys) {
    return keys && group->dtype != LORA_FAST_FLOAT32;
}

API int lora_fast_gram_workspace(const lora_fast_group *group, size_t *bytes) {
    CALL(check_planned(__func__, group));
    CHECK(group->op == LORA_FAST_GRAM || group->op == LORA_FAST_STEP, "group.op", "LORA_FAST_GRAM or LORA_FAST_STEP",
          group->op);
    CHECK_POINTER(bytes);
    int in_step = !group->flat && group->r <= GRAM_RANK;
    size_t partials = group->op == LORA_FAST_GRAM ? 3 : (size_t)in_step;
    *bytes = partials * (size_t)group->n_programs * (size_t)(group->r * group->r) * sizeof(float);
    return LORA_FAST_OK;
}

API int lora_fast_gram(const lora_fast_group *group, float *grams, void *workspace, lora_fast_stream stream) {
    struct launch launch;
    CALL(check_launch(__func__, group, LORA_FAST_GRAM));
    CHECK_ADDRESSES(grams, workspace);
    int64_t results = GRAMS_OF_PAIR * (int64_t)group->n_rows * group->r * group->r; /* the kernel counts in 32 bits */
    CHECK(results <= INT32_MAX, "group.n_rows", "at most 2^31 - 1 numbers in grams", results);
    CALL(prepare(__func__, &launch, group, GROUP_KEY(GRAM, 0)));
    int64_t blocks = divide_up(group->r, launch.tile->BLOCK_R);
    SET_GRID(&launch, group->n_programs, blocks * blocks, 1);
    const union value values[N_PARAMETERS] = {
        TABLE, [P_partials] = {workspace}, [P_totals] = {grams}, [P_n_pairs] = {.i = group->n_rows},
    };
    return lora_fast_submit(&launch, values, NULL, stream);
}

static int check_work(const char *function, const lora_fast_group *group, const lora_fast_work *work) {
    CALL(lora_fast_check_struct(function, "work", work, sizeof *work));
    static const char *const names[] = {"work.additive", "work.matrices", "work.scale_p",
                                        "work.scale_g",  "work.grams",    "work.keys"};
    const void *const arrays[] = {work->additive, work->matrices, work->scale_p,
                                  work->scale_g,  work->grams,    work->keys};
    for (int i = 0; i < 6; i++)
        if (arrays[i]) CALL(lora_fast_check_addresses(function, names[i], 1, &arrays[i]));
    CHECK_IN(function, !work->scale_p == !work->scale_g, "work.scale_g", "an address with work.scale_p, else NULL",
             (intptr_t)work->scale_g);
    if (work->grams && group->r > GRAM_RANK)
        return lora_fast_fail(LORA_FAST_BAD_ARGUMENT,
                              "%s: work.grams: expected NULL above rank %d, where lora_fast_gram computes them after the "
                              "step, got an address",
                              function, GRAM_RANK);
    int by_rank = work->matrices || work->scale_p || work->grams ||
                  (work->additive && is_stochastic(group, work->keys));
    CHECK_IN(function, group->flat == !by_rank, "group.flat", by_rank ? "0 for this work" : "1 for this work",
             group->flat);
    return LORA_FAST_OK;
}

API int lora_fast_adamw_step(const lora_fast_group *group, const double *hyper, int hyper_rows, float *steps,
                             const lora_fast_work *work, void *workspace, lora_fast_stream stream) {
    static const lora_fast_work none = {.size = sizeof none};
    struct launch launch;
    if (!work) work = &none;
    CALL(check_launch(__func__, group, LORA_FAST_STEP));
    CHECK_ADDRESSES(hyper, steps);
    CHECK(hyper_rows == 1 || hyper_rows == group->n_rows, "hyper_rows", "1 or group.n_rows", hyper_rows);
    CALL(check_work(__func__, group, work));
    if (work->grams) CHECK_ADDRESSES(workspace);
    int options = (work->additive ? ADD : 0) | (work->matrices ? MATRIX : 0) | (work->scale_p ? SCALE : 0) |
                  (work->grams ? GRAMS : 0) | (is_stochastic(group, work->keys) ? STOCHASTIC : 0);
    CALL(prepare(__func__, &launch, group, GROUP_KEY(STEP, options)));
    /* Python's optimizer passes the numbers of each side in place of hyper; the kernel ignores them. */
    const union value values[N_PARAMETERS] = {
        TABLE, [P_hyper] = {hyper}, [P_steps] = {steps}, [P_additive] = {work->additive},
        [P_matrices] = {work->matrices}, [P_scale_p] = {work->scale_p}, [P_scale_g] = {work->scale_g},
        [P_partials] = {workspace}, [P_totals] = {work->grams}, [P_keys] = {work->keys},
        [P_stride_hyper] = {.i = hyper_rows > 1 ? HYPER : 0},
    };
    return lora_fast_submit(&launch, values, NULL, stream);
}

API int lora_fast_transform(const lora_fast_group *group, const float *matrices, int add, const int64_t *keys,
                            const float *steps, lora_fast_stream stream) {
    struct launch launch;
    CALL(check_launch(__func__, group, LORA_FAST_TRANSFORM));
    CHECK_ADDRESSES(matrices);
    CHECK((unsigned)add <= 1, "add", "0 or 1", add);
    CHECK(add || !keys, "keys", "NULL without add", (intptr_t)keys);
    CHECK(keys || !steps, "steps", "NULL without keys", (intptr_t)steps);
    if (keys) CHECK_ADDRESSES(keys, steps);
    int options = (add ? ADD : 0) | (is_stochastic(group, keys) ? STOCHASTIC : 0);
    CALL(prepare(__func__, &launch, group, GROUP_KEY(TRANSFORM, options)));
    const union value values[N_PARAMETERS] = {
        TABLE, [P_matrices] = {matrices}, [P_steps] = {steps}, [P_keys] = {keys},
    };
    return lora_fast_submit(&launch, values, NULL, stream);
}

API int lora_fast_merge(const lora_fast_group *group, const float *scale, lora_fast_rounding rounding, int64_t seed,
                        const int64_t *device_seed, lora_fast_stream stream) {
    struct launch launch;
    CALL(check_launch(__func__, group, LORA_FAST_MERGE));
    CHECK_ADDRESSES(scale);
    CHECK((unsigned)rounding <= LORA_FAST_COMPENSATED, "rounding", "a lora_fast_rounding", rounding);
    CHECK_MULTIPLE_OF_8(device_seed);
    int options = group->dtype == LORA_FAST_FLOAT32 ? ROUNDING_NEAREST : (int)rounding; /* float32 is always nearest */
    if (options != ROUNDING_STOCHASTIC) device_seed = NULL;
    if (device_seed) options |= SEED_IN_MEMORY;
    CALL(prepare(__func__, &launch, group, GROUP_KEY(MERGE, options)));
    /* Python's ScaLoRA passes alpha and beta for 16-bit factors; the kernel ignores them. */
    const union value values[N_PARAMETERS] = {
        TABLE, [P_scale] = {scale}, [P_alpha] = {scale}, [P_beta] = {scale},
        [P_seed] = {.i = device_seed ? (int64_t)(uintptr_t)device_seed : seed},
    };
    return lora_fast_submit(&launch, values, NULL, stream);
}

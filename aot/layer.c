/* SPDX-License-Identifier: Apache-2.0

   The layer. Grids are those of kernels/linear/{project,gemm,grads}.py. Where there is one partial sum, Python's
   launcher lets the kernel write the result itself; here one partial sum is added like several, so that one kernel
   serves every size. */

#include "kernels.h"

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

int lora_fast_check_distance(const char *function, const char *argument, int64_t distance, int width) {
    CHECK_IN(function, distance == 0 || (distance >= width && distance <= LARGEST_SIZE), argument,
             "0, or the row's length to 2^30", distance);
    CHECK_MULTIPLE_IN(function, distance, argument);
    return LORA_FAST_OK;
}

int lora_fast_check_layer(const char *function, const lora_fast_layer *layer, int least_tokens) {
    CALL(lora_fast_check_struct(function, "layer", layer, sizeof *layer));
    CHECK_IN(function, layer->n_tokens >= least_tokens && layer->n_tokens <= LARGEST_SIZE, "layer.n_tokens",
             least_tokens ? "1 to 2^30" : "0 to 2^30", layer->n_tokens);
    CHECK_SHARED_IN(function, layer, "layer");
    CHECK_IN(function, layer->drop_level >= 0 && layer->drop_level <= 1 << 16, "layer.drop_level", "0 to 65536",
             layer->drop_level);
    CHECK_IN(function, (unsigned)layer->accumulate <= 1, "layer.accumulate", "0 or 1", layer->accumulate);
    CALL(lora_fast_check_distance(function, "layer.ld_dx", layer->ld_dx, layer->d_in));
    CALL(lora_fast_check_distance(function, "layer.ld_dy", layer->ld_dy, layer->d_out));
    CALL(lora_fast_check_distance(function, "layer.ld_weight", layer->ld_weight, layer->d_in));
    if ((uintptr_t)layer->device_seed % sizeof(int64_t))
        return lora_fast_fail(LORA_FAST_MISALIGNED, "%s: layer.device_seed: expected a multiple of 8, got %p", function,
                              (const void *)layer->device_seed);
    return LORA_FAST_OK;
}
#define CHECK_LAYER(least_tokens) CALL(lora_fast_check_layer(__func__, layer, least_tokens))

#define SUM_KEY(options) KEY(SUM, layer->adapter, layer->adapter, 0, options)
#define MASKED (layer->drop_level > 0 ? DROPOUT : 0)
#define MASK                                                                                                           \
    [P_seed] = {.i = layer->device_seed ? (int64_t)(uintptr_t)layer->device_seed : layer->seed},                       \
    [P_in_memory] = {.i = layer->device_seed != NULL}, [P_drop_level] = {.i = layer->drop_level}

API int lora_fast_project(const lora_fast_layer *layer, const void *x, const void *a, void *s,
                          lora_fast_stream stream) {
    struct launch launch;
    CHECK_LAYER(0);
    CHECK_ADDRESSES(x, a, s);
    PREPARE(&launch, LAYER_KEY(PROJECT, MASKED | (layer->n_tokens <= lora_fast_short_tokens ? TOKENS_SHORT : 0)));
    SET_GRID(&launch, divide_up(layer->n_tokens, launch.tile->BLOCK_T), 1, divide_up(layer->r, launch.tile->BLOCK_R));
    const union value values[N_PARAMETERS] = {
        [P_x] = {x}, [P_a] = {a}, [P_s] = {s}, MASK, [P_n_tokens] = {.i = layer->n_tokens},
        [P_d_in] = {.i = layer->d_in}, [P_stride_x] = {.i = row_distance(layer->ld_x, layer->d_in)},
        [P_stride_a] = {.i = layer->d_in}, [P_d_in_per_split] = {.i = layer->d_in},
    };
    return lora_fast_submit(&launch, values, NULL, stream);
}

/* The operands of a GEMM or an update, named for both directions as in kernels/linear/gemm.py: result (n_tokens, d_out)
   from left (n_tokens, d_in). */
struct product {
    const void *left, *weight, *bias, *thin, *factor, *result;
    int d_in, d_out;
    int64_t stride_left, stride_result, stride_factor;
    float scaling;
    int transposed;
};

static int gemm(const char *function, uint64_t key, const lora_fast_layer *layer, const struct product *product,
                lora_fast_stream stream) {
    struct launch launch;
    const struct device *device;
    CALL(lora_fast_current_device(function, &device));
    CALL(lora_fast_prepare(function, &launch, key));
    int64_t tiles = divide_up(layer->n_tokens, launch.tile->BLOCK_T) * divide_up(product->d_out, launch.tile->BLOCK_OUT);
    CHECK_IN(function, tiles <= INT32_MAX, "sizes", "at most 2^31 - 1 tiles of the result", tiles);
    CALL(lora_fast_set_grid(function, &launch, smaller(tiles, device->multiprocessors), 1, 1));
    int64_t stride_weight = row_distance(layer->ld_weight, layer->d_in);
    const union value values[N_PARAMETERS] = {
        [P_left] = {product->left}, [P_weight] = {product->weight}, [P_result] = {product->result},
        [P_bias] = {product->bias ? product->bias : product->left}, [P_thin] = {product->thin},
        [P_factor] = {product->factor}, [P_scaling] = {.f = product->scaling}, MASK,
        [P_n_tokens] = {.i = layer->n_tokens}, [P_d_in] = {.i = product->d_in}, [P_d_out] = {.i = product->d_out},
        [P_stride_left] = {.i = product->stride_left}, [P_stride_weight] = {.i = stride_weight},
        [P_stride_result] = {.i = product->stride_result}, [P_stride_factor] = {.i = product->stride_factor},
    };
    const struct matrix matrices[MAPS] = {
        {product->left, layer->n_tokens, product->d_in, product->stride_left},
        {product->weight, layer->d_out, layer->d_in, stride_weight},
        {product->result, layer->n_tokens, product->d_out, product->stride_result},
    };
    return lora_fast_submit(&launch, values, matrices, stream);
}

static int update(const char *function, uint64_t key, const lora_fast_layer *layer, const struct product *product,
                  lora_fast_stream stream) {
    struct launch launch;
    CALL(lora_fast_prepare(function, &launch, key));
    int64_t tiles = divide_up(layer->n_tokens, launch.tile->BLOCK_T) * divide_up(product->d_out, launch.tile->BLOCK_OUT);
    CALL(lora_fast_set_grid(function, &launch, tiles, 1, 1));
    const union value values[N_PARAMETERS] = {
        [P_base] = {product->result}, [P_result] = {product->result}, [P_thin] = {product->thin},
        [P_factor] = {product->factor}, [P_s] = {product->result}, [P_scaling] = {.f = product->scaling}, MASK,
        [P_n_tokens] = {.i = layer->n_tokens}, [P_d_out] = {.i = product->d_out},
        [P_stride_result] = {.i = product->stride_result}, [P_stride_factor] = {.i = product->stride_factor},
    };
    return lora_fast_submit(&launch, values, NULL, stream);
}

API int lora_fast_linear(const lora_fast_layer *layer, const void *x, const void *weight, const void *bias,
                         const void *s, const void *b, void *y, lora_fast_stream stream) {
    CHECK_LAYER(0);
    CHECK_ADDRESSES(x, weight, s, b, y);
    if (bias) CHECK_ADDRESSES(bias);
    const struct product product = {
        .left = x, .weight = weight, .bias = bias, .thin = s, .factor = b, .result = y, .d_in = layer->d_in,
        .d_out = layer->d_out, .stride_left = row_distance(layer->ld_x, layer->d_in),
        .stride_result = row_distance(layer->ld_y, layer->d_out), .stride_factor = layer->r, .scaling = layer->scaling,
    };
    return gemm(__func__, LAYER_KEY(LINEAR, bias ? BIAS : 0), layer, &product, stream);
}

API int lora_fast_grad_x(const lora_fast_layer *layer, const void *dy, const void *weight, const void *ds,
                         const void *a, void *dx, lora_fast_stream stream) {
    CHECK_LAYER(0);
    CHECK_ADDRESSES(dy, weight, ds, a, dx);
    const struct product product = {
        .left = dy, .weight = weight, .thin = ds, .factor = a, .result = dx, .d_in = layer->d_out,
        .d_out = layer->d_in, .stride_left = row_distance(layer->ld_dy, layer->d_out),
        .stride_result = row_distance(layer->ld_dx, layer->d_in), .stride_factor = layer->d_in, .scaling = 1.0f,
    };
    return gemm(__func__, LAYER_KEY(GRAD_X, MASKED), layer, &product, stream);
}

API int lora_fast_add_to_y(const lora_fast_layer *layer, const void *s, const void *b, void *y,
                           lora_fast_stream stream) {
    CHECK_LAYER(0);
    CHECK_ADDRESSES(s, b, y);
    const struct product product = {
        .thin = s, .factor = b, .result = y, .d_out = layer->d_out, .scaling = layer->scaling,
        .stride_result = row_distance(layer->ld_y, layer->d_out), .stride_factor = layer->r,
    };
    return update(__func__, LAYER_KEY(ADD_TO_Y, 0), layer, &product, stream);
}

API int lora_fast_add_to_dx(const lora_fast_layer *layer, const void *ds, const void *a, void *dx,
                            lora_fast_stream stream) {
    CHECK_LAYER(0);
    CHECK_ADDRESSES(ds, a, dx);
    const struct product product = {
        .thin = ds, .factor = a, .result = dx, .d_out = layer->d_in, .scaling = 1.0f,
        .stride_result = row_distance(layer->ld_dx, layer->d_in), .stride_factor = layer->d_in,
    };
    return update(__func__, LAYER_KEY(ADD_TO_DX, MASKED), layer, &product, stream);
}

/* ---- The gradients of the factors: a pass over dy or x, then a sum of its partial results */

/* Column chunks, token splits and tokens per split, by the rule of `splits` in kernels/tiles.py, which depends on the
   kernel but not on the device. */
struct split {
    int64_t chunks, splits, tokens;
};

static struct split split(const lora_fast_layer *layer, int64_t columns, int block_t, int block_columns) {
    int64_t n_tokens = layer->n_tokens, chunks = divide_up(columns, block_columns);
    int64_t r = layer->r, most = larger(n_tokens / (8 * r), lora_fast_partial_numbers / (r * columns));
    int64_t steps = n_tokens / ((int64_t)lora_fast_split_steps * block_t);
    int64_t wanted = larger(1, smaller(smaller(lora_fast_programs / chunks, most), steps));
    int64_t tokens = divide_up(divide_up(n_tokens, wanted), block_t) * block_t;
    return (struct split){chunks, divide_up(n_tokens, tokens), tokens};
}

/* A result, its partial sums and their number. numel is of one partial sum. */
struct sum {
    const void *partial;
    void *total;
    int64_t numel, n_partials;
};

enum { MOST_SUMMED = INT32_MAX - 0xffff }; /* the kernel rounds the number up to whole blocks in 32 bits */

/* Prepares both launches of a gradient. */
static int prepare_sum(const char *function, struct launch *launch, uint64_t key, const struct sum *first,
                       const struct sum *second) {
    int64_t numel = larger(first->numel, second->numel);
    CHECK_IN(function, numel <= MOST_SUMMED, "sizes", "at most 2^31 - 2^16 numbers in ds, da and db", numel);
    CALL(lora_fast_prepare(function, launch, key));
    int64_t block = launch->tile->BLOCK;
    return lora_fast_set_grid(function, launch, divide_up(first->numel, block) + divide_up(second->numel, block), 1, 1);
}

static int submit_sum(const struct launch *launch, const struct sum *first, const struct sum *second,
                      lora_fast_stream stream) {
    const union value values[N_PARAMETERS] = {
        [P_partial0] = {first->partial}, [P_total0] = {first->total}, [P_numel0] = {.i = first->numel},
        [P_n_partials0] = {.i = first->n_partials}, [P_partial1] = {second->partial}, [P_total1] = {second->total},
        [P_numel1] = {.i = second->numel}, [P_n_partials1] = {.i = second->n_partials},
    };
    return lora_fast_submit(launch, values, NULL, stream);
}

static int prepare_grad_s_b(const char *function, struct launch *launch, const lora_fast_layer *layer,
                            struct split *parts) {
    CALL(lora_fast_prepare(function, launch, LAYER_KEY(GRAD_S_B, 0)));
    *parts = split(layer, layer->d_out, launch->tile->BLOCK_T, launch->tile->BLOCK_OUT);
    return lora_fast_set_grid(function, launch, parts->chunks, parts->splits, 1);
}

static int prepare_grad_a(const char *function, struct launch *launch, const lora_fast_layer *layer,
                          struct split *parts) {
    CALL(lora_fast_prepare(function, launch, LAYER_KEY(GRAD_A, MASKED)));
    *parts = split(layer, layer->d_in, launch->tile->BLOCK_T, launch->tile->BLOCK_IN);
    return lora_fast_set_grid(function, launch, parts->chunks, parts->splits, 1);
}

/* The number of floats that the partial sums of dS take. Those of db follow, at a multiple of 16 bytes. */
static int64_t room_for_ds(const lora_fast_layer *layer, struct split parts) {
    return divide_up(parts.chunks * layer->n_tokens * layer->r, 4) * 4;
}

API int lora_fast_workspace(const lora_fast_layer *layer, size_t *bytes) {
    struct launch launch;
    struct split parts;
    CHECK_LAYER(0);
    CHECK_POINTER(bytes);
    if (layer->n_tokens == 0) return *bytes = 0, LORA_FAST_OK;
    CALL(prepare_grad_s_b(__func__, &launch, layer, &parts));
    int64_t s_b = room_for_ds(layer, parts) + parts.splits * layer->d_out * layer->r;
    CALL(prepare_grad_a(__func__, &launch, layer, &parts));
    int64_t a = parts.splits * layer->r * layer->d_in;
    *bytes = sizeof(float) * (size_t)larger(a, s_b);
    return LORA_FAST_OK;
}

API int lora_fast_grad_s_b(const lora_fast_layer *layer, const void *dy, const void *s, const void *b, void *ds,
                           void *db, void *workspace, lora_fast_stream stream) {
    struct launch pass, add;
    struct split parts;
    CHECK_LAYER(1); /* without tokens no kernel would set db to zero */
    CHECK_ADDRESSES(dy, s, b, ds, db, workspace);
    CALL(prepare_grad_s_b(__func__, &pass, layer, &parts));
    float *ds_parts = workspace, *db_parts = ds_parts + room_for_ds(layer, parts);
    const struct sum of_ds = {ds_parts, ds, (int64_t)layer->n_tokens * layer->r, parts.chunks};
    const struct sum of_db = {db_parts, db, (int64_t)layer->d_out * layer->r, parts.splits};
    CALL(prepare_sum(__func__, &add, SUM_KEY(layer->accumulate ? ACCUMULATE_SECOND : ACCUMULATE_NONE), &of_ds, &of_db));
    const union value values[N_PARAMETERS] = {
        [P_dy] = {dy}, [P_s] = {s}, [P_b] = {b}, [P_ds] = {ds_parts}, [P_db] = {db_parts},
        [P_scaling] = {.f = layer->scaling}, [P_n_tokens] = {.i = layer->n_tokens}, [P_d_out] = {.i = layer->d_out},
        [P_stride_dy] = {.i = row_distance(layer->ld_dy, layer->d_out)}, [P_stride_b] = {.i = layer->r},
        [P_tokens_per_split] = {.i = parts.tokens},
    };
    CALL(lora_fast_submit(&pass, values, NULL, stream));
    return submit_sum(&add, &of_ds, &of_db, stream);
}

API int lora_fast_grad_a(const lora_fast_layer *layer, const void *x, const void *ds, void *da, void *workspace,
                         lora_fast_stream stream) {
    struct launch pass, add;
    struct split parts;
    CHECK_LAYER(1);
    CHECK_ADDRESSES(x, ds, da, workspace);
    CALL(prepare_grad_a(__func__, &pass, layer, &parts));
    const struct sum of_da = {workspace, da, (int64_t)layer->r * layer->d_in, parts.splits};
    const struct sum none = {workspace, da, 0, 0};
    CALL(prepare_sum(__func__, &add, SUM_KEY(layer->accumulate ? ACCUMULATE_FIRST : ACCUMULATE_NONE), &of_da, &none));
    const union value values[N_PARAMETERS] = {
        [P_x] = {x}, [P_ds] = {ds}, [P_da] = {workspace}, MASK, [P_n_tokens] = {.i = layer->n_tokens},
        [P_d_in] = {.i = layer->d_in}, [P_stride_x] = {.i = row_distance(layer->ld_x, layer->d_in)},
        [P_tokens_per_split] = {.i = parts.tokens},
    };
    CALL(lora_fast_submit(&pass, values, NULL, stream));
    return submit_sum(&add, &of_da, &none, stream);
}

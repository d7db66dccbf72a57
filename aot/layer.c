/* The layer. Grids are those of kernels/linear/{project,gemm,grads}.py. Where there is one partial sum, Python's
   launcher lets the kernel write the result itself; here one partial sum is added like several, so that one kernel
   serves every size. */

#include "kernels.h"

static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

static int check(const lora_fast_layer *layer) {
    if (layer->n_tokens < 0 || layer->d_in < 1 || layer->d_out < 1 || layer->r < 1) return LORA_FAST_BAD_ARGUMENT;
    if (layer->drop_level < 0 || layer->drop_level > 1 << 16) return LORA_FAST_BAD_ARGUMENT;
    if (!lora_fast_dtype_name(layer->dtype) || !lora_fast_dtype_name(layer->adapter)) return LORA_FAST_BAD_ARGUMENT;
    if ((uintptr_t)layer->device_seed % sizeof(int64_t)) return LORA_FAST_MISALIGNED;
    return layer->d_in % 16 || layer->d_out % 16 ? LORA_FAST_MISALIGNED : LORA_FAST_OK;
}

#define DTYPES lora_fast_dtype_name(layer->dtype), layer->r, lora_fast_dtype_name(layer->adapter)
#define DROPOUT (layer->drop_level > 0)
#define MASK                                                                                                           \
    NAMED_INTEGER("seed", layer->device_seed ? (int64_t)(uintptr_t)layer->device_seed : layer->seed),                  \
        NAMED_INTEGER("in_memory", layer->device_seed != NULL), NAMED_INTEGER("drop_level", layer->drop_level)

API int lora_fast_project(const lora_fast_layer *layer, const void *x, const void *a, void *s,
                          lora_fast_stream stream) {
    int row;
    CALL(check(layer));
    CALL(CHECK_ADDRESSES(x, a, s));
    CALL(lora_fast_find(&row, "lora_project_kernel project %s r%d adapter=%s dropout=%d tokens=%s", DTYPES, DROPOUT,
                        layer->n_tokens <= lora_fast_short_tokens ? "short" : "many"));
    const struct tile tile = lora_fast_table[row].tile;
    return lora_fast_launch(row, divide_up(layer->n_tokens, tile.BLOCK_T), 1, divide_up(layer->r, tile.BLOCK_R),
                            (struct argument[]){POINTER(x), POINTER(a), POINTER(s), MASK,
                                                NAMED_INTEGER("n_tokens", layer->n_tokens),
                                                NAMED_INTEGER("d_in", layer->d_in),
                                                NAMED_INTEGER("stride_x", layer->d_in),
                                                NAMED_INTEGER("stride_a", layer->d_in),
                                                NAMED_INTEGER("d_in_per_split", layer->d_in), END},
                            stream);
}

/* Computes result (n_tokens, d_out) from left (n_tokens, d_in), named for both directions as in linear/gemm.py. */
static int gemm(const lora_fast_layer *layer, int row, const void *left, const void *weight, const void *bias,
                const void *thin, const void *factor, void *result, int d_in, int d_out, int stride_weight,
                int stride_factor, float scaling, lora_fast_stream stream) {
    const struct tile tile = lora_fast_table[row].tile;
    int multiprocessors, n_tokens = layer->n_tokens;
    CALL(lora_fast_multiprocessors(&multiprocessors));
    int64_t tiles = divide_up(n_tokens, tile.BLOCK_T) * divide_up(d_out, tile.BLOCK_OUT);
    return lora_fast_launch(row, smaller(tiles, multiprocessors), 1, 1,
                            (struct argument[]){POINTER(left), POINTER(weight), POINTER(result),
                                                NAMED_POINTER("bias", bias ? bias : left), POINTER(thin),
                                                POINTER(factor), NAMED_NUMBER("scaling", scaling), MASK,
                                                INTEGER(n_tokens), INTEGER(d_out), INTEGER(d_in),
                                                NAMED_INTEGER("stride_left", d_in), INTEGER(stride_weight),
                                                INTEGER(stride_factor), END},
                            stream);
}

API int lora_fast_linear(const lora_fast_layer *layer, const void *x, const void *weight, const void *bias,
                         const void *s, const void *b, void *y, lora_fast_stream stream) {
    int row;
    CALL(check(layer));
    CALL(CHECK_ADDRESSES(x, weight, s, b, y, bias ? bias : x));
    CALL(lora_fast_find(&row, "lora_linear_kernel linear %s r%d adapter=%s bias=%d", DTYPES, bias != NULL));
    return gemm(layer, row, x, weight, bias, s, b, y, layer->d_in, layer->d_out, layer->d_in, layer->r, layer->scaling,
                stream);
}

API int lora_fast_grad_x(const lora_fast_layer *layer, const void *dy, const void *weight, const void *ds,
                         const void *a, void *dx, lora_fast_stream stream) {
    int row;
    CALL(check(layer));
    CALL(CHECK_ADDRESSES(dy, weight, ds, a, dx));
    CALL(lora_fast_find(&row, "lora_linear_kernel grad_x %s r%d adapter=%s dropout=%d", DTYPES, DROPOUT));
    return gemm(layer, row, dy, weight, NULL, ds, a, dx, layer->d_out, layer->d_in, layer->d_in, layer->d_in, 1.0f,
                stream);
}

/* Column chunks, token splits and tokens per split, by the rule of `splits` in kernels/tiles.py, which depends on the
   kernel but not on the device. */
struct split {
    int64_t chunks, splits, tokens;
};

static struct split split(const lora_fast_layer *layer, int64_t columns, int block_t, int block_columns) {
    int64_t n_tokens = layer->n_tokens, chunks = divide_up(columns, block_columns);
    int64_t r = layer->r, most = larger(n_tokens / (8 * r), lora_fast_partial_numbers / (r * columns));
    int64_t steps = n_tokens / (lora_fast_split_steps * block_t);
    int64_t wanted = larger(1, smaller(smaller(lora_fast_programs / chunks, most), steps));
    int64_t tokens = divide_up(divide_up(n_tokens, wanted), block_t) * block_t;
    return (struct split){chunks, divide_up(n_tokens, tokens), tokens};
}

static int find_grad_s_b(const lora_fast_layer *layer, int *row, struct split *parts) {
    CALL(lora_fast_find(row, "lora_grad_s_b_kernel grad_s_b %s r%d adapter=%s", DTYPES));
    const struct tile tile = lora_fast_table[*row].tile;
    *parts = split(layer, layer->d_out, tile.BLOCK_T, tile.BLOCK_OUT);
    return LORA_FAST_OK;
}

static int find_grad_a(const lora_fast_layer *layer, int *row, struct split *parts) {
    CALL(lora_fast_find(row, "lora_grad_a_kernel grad_a %s r%d adapter=%s dropout=%d", DTYPES, DROPOUT));
    const struct tile tile = lora_fast_table[*row].tile;
    *parts = split(layer, layer->d_in, tile.BLOCK_T, tile.BLOCK_IN);
    return LORA_FAST_OK;
}

/* The number of floats that the partial sums of dS take. Those of db follow, at a multiple of 16 bytes. */
static int64_t room_for_ds(const lora_fast_layer *layer, struct split parts) {
    return divide_up(parts.chunks * layer->n_tokens * layer->r, 4) * 4;
}

API int lora_fast_workspace(const lora_fast_layer *layer, size_t *bytes) {
    int row;
    struct split parts;
    CALL(check(layer));
    *bytes = 0;
    if (layer->n_tokens == 0) return LORA_FAST_OK;
    CALL(find_grad_s_b(layer, &row, &parts));
    int64_t s_b = room_for_ds(layer, parts) + parts.splits * layer->d_out * layer->r;
    CALL(find_grad_a(layer, &row, &parts));
    int64_t a = parts.splits * layer->r * layer->d_in;
    *bytes = sizeof(float) * (size_t)larger(a, s_b);
    return LORA_FAST_OK;
}

static int sum_partials(int row, const float *partial0, void *total0, int64_t numel0, int64_t n_partials0,
                        const float *partial1, void *total1, int64_t numel1, int64_t n_partials1,
                        lora_fast_stream stream) {
    if (numel0 > INT32_MAX || numel1 > INT32_MAX) return LORA_FAST_BAD_ARGUMENT;
    int block = lora_fast_table[row].tile.BLOCK;
    return lora_fast_launch(row, divide_up(numel0, block) + divide_up(numel1, block), 1, 1,
                            (struct argument[]){POINTER(partial0), POINTER(total0), POINTER(partial1), POINTER(total1),
                                                INTEGER(numel0), INTEGER(n_partials0), INTEGER(numel1),
                                                INTEGER(n_partials1), END},
                            stream);
}

API int lora_fast_grad_s_b(const lora_fast_layer *layer, const void *dy, const void *s, const void *b, void *ds,
                           void *db, void *workspace, lora_fast_stream stream) {
    int row;
    struct split parts;
    CALL(check(layer));
    CALL(CHECK_ADDRESSES(dy, s, b, ds, db, workspace));
    if (layer->n_tokens == 0) return LORA_FAST_BAD_ARGUMENT; /* no kernel would set db to zero */
    CALL(find_grad_s_b(layer, &row, &parts));
    int64_t numel_s = (int64_t)layer->n_tokens * layer->r, numel_b = (int64_t)layer->d_out * layer->r;
    float *ds_parts = workspace, *db_parts = ds_parts + room_for_ds(layer, parts);
    CALL(lora_fast_launch(row, parts.chunks, parts.splits, 1,
                          (struct argument[]){POINTER(dy), POINTER(s), POINTER(b), NAMED_POINTER("ds", ds_parts),
                                              NAMED_POINTER("db", db_parts), NAMED_NUMBER("scaling", layer->scaling),
                                              NAMED_INTEGER("n_tokens", layer->n_tokens),
                                              NAMED_INTEGER("d_out", layer->d_out),
                                              NAMED_INTEGER("stride_dy", layer->d_out),
                                              NAMED_INTEGER("stride_b", layer->r),
                                              NAMED_INTEGER("tokens_per_split", parts.tokens), END},
                          stream));
    CALL(lora_fast_find(&row, "lora_sum_partials_kernel grad_s_b %s r%d adapter=%s", DTYPES));
    return sum_partials(row, ds_parts, ds, numel_s, parts.chunks, db_parts, db, numel_b, parts.splits, stream);
}

API int lora_fast_grad_a(const lora_fast_layer *layer, const void *x, const void *ds, void *da, void *workspace,
                         lora_fast_stream stream) {
    int row;
    struct split parts;
    CALL(check(layer));
    CALL(CHECK_ADDRESSES(x, ds, da, workspace));
    if (layer->n_tokens == 0) return LORA_FAST_BAD_ARGUMENT;
    CALL(find_grad_a(layer, &row, &parts));
    CALL(lora_fast_launch(row, parts.chunks, parts.splits, 1,
                          (struct argument[]){POINTER(x), POINTER(ds), NAMED_POINTER("da", workspace), MASK,
                                              NAMED_INTEGER("n_tokens", layer->n_tokens),
                                              NAMED_INTEGER("d_in", layer->d_in),
                                              NAMED_INTEGER("stride_x", layer->d_in),
                                              NAMED_INTEGER("tokens_per_split", parts.tokens), END},
                          stream));
    CALL(lora_fast_find(&row, "lora_sum_partials_kernel grad_a %s r%d adapter=%s dropout=%d", DTYPES, DROPOUT));
    return sum_partials(row, workspace, da, (int64_t)layer->r * layer->d_in, parts.splits, workspace, da, 0, 0,
                        stream);
}

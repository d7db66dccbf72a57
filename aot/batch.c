/* SPDX-License-Identifier: Apache-2.0

   Several adapters in one batch. Grids are those of kernels/batched/. */

#include "kernels.h"

#include <stdio.h>

static int check(const char *function, const lora_fast_batch *batch) {
    CALL(lora_fast_check_struct(function, "batch", batch, sizeof *batch));
    CHECK_SIZE_IN(function, batch->n_rows, "batch.n_rows", 0);
    CHECK_IN(function, batch->n_adapters >= 1 && batch->n_adapters <= lora_fast_most_adapters, "batch.n_adapters",
             "1 to 1024", batch->n_adapters);
    CHECK_SHARED_IN(function, batch, "batch");
    return LORA_FAST_OK;
}
#define CHECK_BATCH                                                                                                    \
    CALL(check(__func__, batch));                                                                                      \
    CALL(lora_fast_check_addresses(__func__, "batch.adapters, batch.rows, batch.ends", 3,                              \
                                   (const void *const[]){batch->adapters, batch->rows, batch->ends}))

/* The number of programs for the tiles of all adapters' rows, as in kernels/segments.py. */
static int64_t programs(const lora_fast_batch *batch, const struct launch *launch) {
    return batch->n_rows / launch->tile->BLOCK_T + (batch->n_rows ? batch->n_adapters : 0);
}

#define BATCH_KEY(kind, options) KEY(kind, batch->dtype, batch->adapter, batch->r, options)
#define TABLE [P_table] = {batch->adapters}, [P_rows] = {batch->rows}, [P_ends] = {batch->ends}
#define SIZES [P_n_rows] = {.i = batch->n_rows}, [P_n_adapters] = {.i = batch->n_adapters}

API int lora_fast_batch_project(const lora_fast_batch *batch, const void *x, void *s, lora_fast_stream stream) {
    struct launch launch;
    CHECK_BATCH;
    CHECK_ADDRESSES(x, s);
    PREPARE(&launch, BATCH_KEY(BATCH_PROJECT, batch->n_rows <= lora_fast_short_tokens ? TOKENS_SHORT : TOKENS_MANY));
    SET_GRID(&launch, programs(batch, &launch), divide_up(batch->r, launch.tile->BLOCK_R), 1);
    const union value values[N_PARAMETERS] = {
        [P_x] = {x}, TABLE, [P_s] = {s}, SIZES, [P_d_in] = {.i = batch->d_in},
        [P_stride_x] = {.i = row_distance(batch->ld_x, batch->d_in)},
    };
    return lora_fast_submit(&launch, values, NULL, stream);
}

API int lora_fast_batch_add_to_y(const lora_fast_batch *batch, const void *s, void *y, lora_fast_stream stream) {
    struct launch launch;
    CHECK_BATCH;
    CHECK_ADDRESSES(s, y);
    PREPARE(&launch, BATCH_KEY(BATCH_ADD, batch->n_rows <= lora_fast_few_tokens ? TOKENS_FEW : TOKENS_MANY));
    SET_GRID(&launch, programs(batch, &launch), divide_up(batch->d_out, launch.tile->BLOCK_OUT), 1);
    const union value values[N_PARAMETERS] = {
        [P_y] = {y}, [P_s] = {s}, TABLE, SIZES, [P_d_out] = {.i = batch->d_out},
        [P_stride_y] = {.i = row_distance(batch->ld_y, batch->d_out)},
    };
    return lora_fast_submit(&launch, values, NULL, stream);
}

API int lora_fast_sort_rows(int n_rows, int n_adapters, const int32_t *indices, int32_t *rows, int32_t *ends) {
    CHECK_SIZE(n_rows, "n_rows", 0);
    CHECK(n_adapters >= 1 && n_adapters <= lora_fast_most_adapters, "n_adapters", "1 to 1024", n_adapters);
    if (n_rows) {
        CHECK_POINTER(indices);
        CHECK_POINTER(rows);
        CHECK(rows != indices, "rows", "other memory than indices", (intptr_t)rows);
    }
    CHECK_POINTER(ends);
    for (int t = 0; t < n_rows; t++)
        CHECK(indices[t] >= -1 && indices[t] < n_adapters, "indices", "-1 to n_adapters - 1", indices[t]);
    /* A counting sort, which keeps the order of an adapter's rows; those of no adapter come last. */
    for (int k = 0; k < n_adapters; k++) ends[k] = 0;
    for (int t = 0; t < n_rows; t++)
        if (indices[t] >= 0) ends[indices[t]]++;
    int32_t begin = 0;
    for (int k = 0; k < n_adapters; k++) {
        int32_t count = ends[k];
        ends[k] = begin; /* of the next row to place, in the end the adapter's end */
        begin += count;
    }
    for (int t = 0; t < n_rows; t++) rows[indices[t] >= 0 ? ends[indices[t]]++ : begin++] = t;
    return LORA_FAST_OK;
}

API int lora_fast_check_adapters(const lora_fast_batch *batch, const lora_fast_adapter *adapters) {
    CALL(check(__func__, batch));
    CHECK_POINTER(adapters);
    for (int k = 0; k < batch->n_adapters; k++) {
        const lora_fast_adapter *adapter = &adapters[k];
        char name[64];
        snprintf(name, sizeof name, "adapters[%d].r", k);
        CHECK(adapter->r >= 1 && adapter->r <= batch->r, name, "1 to batch.r", adapter->r);
        snprintf(name, sizeof name, "adapters[%d].a, adapters[%d].b", k, k);
        CALL(lora_fast_check_addresses(__func__, name, 2, (const void *[]){adapter->a, adapter->b}));
    }
    return LORA_FAST_OK;
}

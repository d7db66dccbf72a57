/* SPDX-License-Identifier: Apache-2.0

   A whole adapter behind another library's product, y += scaling (x aᵀ) bᵀ. Calls of few tokens give few programs, so
   d_in is split between them where that is estimated to be faster, and the update adds the partial sums of S, as in
   kernels/linear/project.py. */

#include "kernels.h"

/* The launches, and in how many parts S is computed: 1 means whole. */
struct ways {
    struct launch project, add;
    int64_t splits, d_in_per_split;
};

static int check(const char *function, const lora_fast_layer *layer) {
    CALL(lora_fast_check_layer(function, layer, 0));
    CHECK_IN(function, layer->drop_level == 0, "layer.drop_level", "0, since a mask needs s of lora_fast_project",
             layer->drop_level);
    return LORA_FAST_OK;
}

/* Sets the parts of S by the rule of `split_of_few` in kernels/tiles.py. */
static void split(const lora_fast_layer *layer, struct ways *ways) {
    const struct tile *tile = ways->project.tile;
    int64_t rows = layer->n_tokens < tile->BLOCK_T ? layer->n_tokens : tile->BLOCK_T;
    int64_t splits = lora_fast_few_numbers / (rows * lora_fast_rank_class(layer->r, 16));
    ways->d_in_per_split = divide_up(divide_up(layer->d_in, splits > 1 ? splits : 1), tile->BLOCK_IN) * tile->BLOCK_IN;
    ways->splits = divide_up(layer->d_in, ways->d_in_per_split);
}

/* Prepares the launches of the faster way. */
static int prepare(const char *function, const lora_fast_layer *layer, struct ways *ways) {
    const struct device *device;
    struct ways parts;
    int is_short = layer->n_tokens <= lora_fast_short_tokens;
    CALL(lora_fast_current_device(function, &device));
    CALL(lora_fast_prepare(function, &ways->project, LAYER_KEY(PROJECT, is_short ? TOKENS_SHORT : TOKENS_MANY)));
    CALL(lora_fast_prepare(function, &ways->add, LAYER_KEY(ADD_TO_Y, 0)));
    ways->splits = 1, ways->d_in_per_split = layer->d_in;
    if (layer->n_tokens == 0 || layer->n_tokens > lora_fast_few_tokens) return LORA_FAST_OK;
    CALL(lora_fast_prepare(function, &parts.project, LAYER_KEY(PROJECT, TOKENS_FEW)));
    CALL(lora_fast_prepare(function, &parts.add, LAYER_KEY(ADD_TO_Y, TOKENS_FEW)));
    split(layer, &parts);
    const struct tile *tiles[] = {ways->project.tile, ways->add.tile, parts.project.tile, parts.add.tile};
    if (parts.splits > 1 && lora_fast_split_is_faster(layer, device, tiles, parts.splits)) *ways = parts;
    return LORA_FAST_OK;
}

API int lora_fast_adapter_workspace(const lora_fast_layer *layer, size_t *bytes) {
    struct ways ways;
    CALL(check(__func__, layer));
    CHECK_POINTER(bytes);
    CALL(prepare(__func__, layer, &ways));
    *bytes = ways.splits > 1 ? sizeof(float) * (size_t)(ways.splits * layer->n_tokens * layer->r) : 0;
    return LORA_FAST_OK;
}

API int lora_fast_add_adapter(const lora_fast_layer *layer, const void *x, const void *a, const void *b, void *s,
                              void *y, void *workspace, lora_fast_stream stream) {
    struct ways ways;
    CALL(check(__func__, layer));
    CHECK_ADDRESSES(x, a, b, s, y);
    CALL(prepare(__func__, layer, &ways));
    if (ways.splits > 1) CHECK_ADDRESSES(workspace);
    const struct tile *of_s = ways.project.tile, *of_y = ways.add.tile;
    SET_GRID(&ways.project, divide_up(layer->n_tokens, of_s->BLOCK_T), ways.splits, divide_up(layer->r, of_s->BLOCK_R));
    SET_GRID(&ways.add, divide_up(layer->n_tokens, of_y->BLOCK_T) * divide_up(layer->d_out, of_y->BLOCK_OUT), 1, 1);
    void *thin = ways.splits > 1 ? workspace : s;
    const union value projecting[N_PARAMETERS] = {
        [P_x] = {x}, [P_a] = {a}, [P_s] = {thin}, [P_n_tokens] = {.i = layer->n_tokens}, [P_d_in] = {.i = layer->d_in},
        [P_stride_x] = {.i = row_distance(layer->ld_x, layer->d_in)}, [P_stride_a] = {.i = layer->d_in},
        [P_d_in_per_split] = {.i = ways.d_in_per_split},
    };
    const union value adding[N_PARAMETERS] = {
        [P_base] = {y}, [P_result] = {y}, [P_thin] = {thin}, [P_factor] = {b}, [P_s] = {ways.splits > 1 ? s : y},
        [P_scaling] = {.f = layer->scaling}, [P_n_tokens] = {.i = layer->n_tokens}, [P_d_out] = {.i = layer->d_out},
        [P_n_parts] = {.i = ways.splits > 1 ? ways.splits : 0}, [P_stride_factor] = {.i = layer->r},
        [P_stride_result] = {.i = row_distance(layer->ld_y, layer->d_out)},
    };
    CALL(lora_fast_submit(&ways.project, projecting, NULL, stream));
    return lora_fast_submit(&ways.add, adding, NULL, stream);
}

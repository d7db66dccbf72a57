/* SPDX-License-Identifier: Apache-2.0

   Which way is faster: the fused GEMM or cuBLAS with an update, S whole or in parts. It is the estimate of
   kernels/linear/strategies.py, whose numbers build.py writes. ctest compares the two. */

#include "kernels.h"

#define ESTIMATE lora_fast_estimate

static double least(double a, double b) { return a < b ? a : b; }

static double most(double a, double b) { return a > b ? a : b; }

/* A GEMM from (t, k) to (t, n) with its thin product, on a device with these rates. */
struct call {
    const lora_fast_layer *layer;
    const struct device *device;
    const struct rates *rates;
    double t, k, n;
    int masked, bytes; /* bytes: of an element */
};

/* Returns the seconds of a GEMM in tiles, each on one multiprocessor, in whole waves. If there is less than one wave,
   split_k (0: no) splits the tiles along k. */
static double tiled(const struct call *call, double k, int tile_t, int tile_n, double rate, double split_k) {
    int64_t count = divide_up((int64_t)call->t, tile_t) * divide_up((int64_t)call->n, tile_n);
    double waves = (double)divide_up(count, call->device->multiprocessors);
    if (split_k > 0 && waves == 1) waves = least(1.0, (double)count / call->device->multiprocessors / split_k);
    return waves * 2.0 * tile_t * tile_n * k * call->device->multiprocessors / rate;
}

static double rate_of(const struct call *call, double share_of_single) {
    return call->bytes == 2 ? call->rates->half : share_of_single * call->rates->single;
}

/* Returns the seconds in which the memory moves the three matrices of a GEMM. */
static double moving(const struct call *call) {
    double t = call->t, k = call->k, n = call->n;
    return (t * k + k * n + t * n) * call->bytes / call->rates->bandwidth;
}

static double cublas(const struct call *call) {
    double seconds = 1e30;
    for (int i = 0; i < ESTIMATE.n_cublas_tiles; i++) {
        const double *tile = ESTIMATE.cublas_tiles[i];
        double rate = rate_of(call, 1.0) * tile[2];
        seconds = least(seconds, tiled(call, call->k, (int)tile[0], (int)tile[1], rate, ESTIMATE.split_k_share));
    }
    return ESTIMATE.launch_seconds + most(seconds, moving(call));
}

static int is_wide(const struct call *call) { return call->bytes == 2 && call->layer->adapter == LORA_FAST_FLOAT32; }

static double factor_bytes(const struct call *call) { return is_wide(call) ? 4 : call->bytes; }

/* Returns the seconds of one launch of our kernels that moves bytes from memory and, again, from L2, with as many
   programs, which multiply elements by the rank columns. */
static double passing(const struct call *call, double moved, double elements, double programs, double again) {
    double products = !is_wide(call) ? 1 : call->layer->dtype == LORA_FAST_BFLOAT16 ? 2 : 4;
    programs = least(programs, call->device->multiprocessors);
    double busy = least(1.0, ESTIMATE.l2_speedup * programs / call->device->multiprocessors);
    double reading = moved / (ESTIMATE.stream_share * call->rates->bandwidth);
    reading += again / (ESTIMATE.l2_speedup * call->rates->bandwidth) / 2; /* half of it overlaps with memory's reads */
    double multiplying = 2.0 * elements * lora_fast_rank_class(call->layer->r, 16) * products;
    double drawing = call->masked ? elements / (ESTIMATE.mask_rate * programs) : 0;
    return ESTIMATE.launch_seconds +
           most(most(reading / busy, multiplying / rate_of(call, ESTIMATE.single_share)), drawing);
}

/* Returns the seconds of the update from n_parts partial sums of S. */
static double update(const struct call *call, const struct tile *tile, int64_t n_parts) {
    double t = call->t, n = call->n, r = call->layer->r, columns = (double)divide_up((int64_t)n, tile->BLOCK_OUT);
    double parts = t * (double)n_parts * r * 4.0;
    double moved = t * 2.0 * n * call->bytes + parts + r * n * factor_bytes(call);
    return passing(call, moved, t * n, columns * (double)divide_up((int64_t)t, tile->BLOCK_T), (columns - 1) * parts);
}

/* Returns the seconds of S, or of its partial sums, by one pass over x. */
static double project(const struct call *call, const struct tile *tile, int64_t splits) {
    double t = call->t, k = call->k, r = call->layer->r, blocks = (double)divide_up((int64_t)t, tile->BLOCK_T);
    double rank_blocks = (double)divide_up(call->layer->r, tile->BLOCK_R);
    double moved = t * k * call->bytes + r * k * factor_bytes(call) + (double)splits * t * r * factor_bytes(call);
    double again = (blocks - 1) * r * k * factor_bytes(call) + (rank_blocks - 1) * t * k * call->bytes;
    return passing(call, moved, t * k, blocks * (double)splits * rank_blocks, again);
}

static double fused(const struct call *call, const struct tile *tile) {
    double rate = call->bytes == 2 ? call->rates->fused * call->rates->half : rate_of(call, ESTIMATE.single_share);
    double seconds = tiled(call, call->k + lora_fast_rank_class(call->layer->r, 16), tile->BLOCK_T, tile->BLOCK_OUT,
                           rate, 0);
    if (call->masked) seconds += call->t * call->n / (ESTIMATE.mask_rate * call->device->multiprocessors);
    return ESTIMATE.launch_seconds + most(seconds, moving(call));
}

static struct call call_of(const lora_fast_layer *layer, const struct device *device, int backward) {
    const struct rates *rates = lora_fast_rates;
    for (int i = 1; i < ESTIMATE.n_rates && lora_fast_rates[i].arch <= device->arch; i++) rates = &lora_fast_rates[i];
    return (struct call){
        .layer = layer, .device = device, .rates = rates, .t = layer->n_tokens, .masked = backward && layer->drop_level,
        .k = backward ? layer->d_out : layer->d_in, .n = backward ? layer->d_in : layer->d_out,
        .bytes = layer->dtype == LORA_FAST_FLOAT32 ? 4 : 2,
    };
}

API int lora_fast_faster(const lora_fast_layer *layer, int backward, lora_fast_strategy *strategy) {
    const struct device *device;
    struct launch gemm, add;
    CALL(lora_fast_check_layer(__func__, layer, 0));
    CHECK((unsigned)backward <= 1, "backward", "0 or 1", backward);
    CHECK_POINTER(strategy);
    CALL(lora_fast_current_device(__func__, &device));
    const struct call call = call_of(layer, device, backward);
    uint64_t options = call.masked ? DROPOUT : 0;
    PREPARE(&gemm, LAYER_KEY(backward ? GRAD_X : LINEAR, options));
    PREPARE(&add, LAYER_KEY(backward ? ADD_TO_DX : ADD_TO_Y, options));
    int is_fused = fused(&call, gemm.tile) <= cublas(&call) + update(&call, add.tile, 1);
    *strategy = is_fused ? LORA_FAST_FUSED : LORA_FAST_UPDATE;
    return LORA_FAST_OK;
}

int lora_fast_split_is_faster(const lora_fast_layer *layer, const struct device *device, const struct tile *tiles[4],
                              int64_t splits) {
    const struct call call = call_of(layer, device, 0);
    double whole = project(&call, tiles[0], 1) + update(&call, tiles[1], 1);
    return project(&call, tiles[2], splits) + update(&call, tiles[3], splits) < whole;
}

/* SPDX-License-Identifier: Apache-2.0

   Which is faster, the fused GEMM or cuBLAS with an update: the estimate of kernels/linear/strategies.py, whose numbers
   build.py writes. ctest compares the two. */

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

static double update(const struct call *call, const struct tile *tile) {
    const struct rates *rates = call->rates;
    int is_wide = call->bytes == 2 && call->layer->adapter == LORA_FAST_FLOAT32, r = call->layer->r;
    double products = !is_wide ? 1 : call->layer->dtype == LORA_FAST_BFLOAT16 ? 2 : 4;
    double factor_bytes = is_wide ? 4 : call->bytes, t = call->t, n = call->n;
    double columns = (double)divide_up((int64_t)n, tile->BLOCK_OUT);
    double programs = columns * (double)divide_up((int64_t)t, tile->BLOCK_T);
    programs = least(programs, call->device->multiprocessors);
    double busy = least(1.0, ESTIMATE.l2_speedup * programs / call->device->multiprocessors);
    double moved = t * (2.0 * n * call->bytes + r * 4.0) + r * n * factor_bytes, again = (columns - 1) * t * r * 4.0;
    double reading = moved / (ESTIMATE.stream_share * rates->bandwidth);
    reading += again / (ESTIMATE.l2_speedup * rates->bandwidth) / 2; /* half of it overlaps with reads from memory */
    double multiplying = 2.0 * t * n * lora_fast_rank_class(r, 16) * products / rate_of(call, ESTIMATE.single_share);
    double drawing = call->masked ? t * n / (ESTIMATE.mask_rate * programs) : 0;
    return ESTIMATE.launch_seconds + most(most(reading / busy, multiplying), drawing);
}

static double fused(const struct call *call, const struct tile *tile) {
    double rate = call->bytes == 2 ? call->rates->fused * call->rates->half : rate_of(call, ESTIMATE.single_share);
    double seconds = tiled(call, call->k + lora_fast_rank_class(call->layer->r, 16), tile->BLOCK_T, tile->BLOCK_OUT,
                           rate, 0);
    if (call->masked) seconds += call->t * call->n / (ESTIMATE.mask_rate * call->device->multiprocessors);
    return ESTIMATE.launch_seconds + most(seconds, moving(call));
}

API int lora_fast_faster(const lora_fast_layer *layer, int backward, lora_fast_strategy *strategy) {
    const struct device *device;
    struct launch gemm, add;
    CALL(lora_fast_check_layer(__func__, layer, 0));
    CHECK((unsigned)backward <= 1, "backward", "0 or 1", backward);
    CHECK_POINTER(strategy);
    CALL(lora_fast_current_device(__func__, &device));
    int masked = backward && layer->drop_level > 0;
    PREPARE(&gemm, KEY(backward ? GRAD_X : LINEAR, layer->dtype, layer->adapter, layer->r, masked ? DROPOUT : 0));
    PREPARE(&add, KEY(backward ? ADD_TO_DX : ADD_TO_Y, layer->dtype, layer->adapter, layer->r, masked ? DROPOUT : 0));
    const struct rates *rates = lora_fast_rates;
    for (int i = 1; i < ESTIMATE.n_rates && lora_fast_rates[i].arch <= device->arch; i++) rates = &lora_fast_rates[i];
    const struct call call = {
        .layer = layer, .device = device, .rates = rates, .t = layer->n_tokens, .masked = masked,
        .k = backward ? layer->d_out : layer->d_in, .n = backward ? layer->d_in : layer->d_out,
        .bytes = layer->dtype == LORA_FAST_FLOAT32 ? 4 : 2,
    };
    *strategy = fused(&call, gemm.tile) <= cublas(&call) + update(&call, add.tile) ? LORA_FAST_FUSED : LORA_FAST_UPDATE;
    return LORA_FAST_OK;
}

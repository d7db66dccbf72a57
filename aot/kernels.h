/* SPDX-License-Identifier: Apache-2.0

   Internal declarations: the table that build.py generates, and the functions that find, check and launch its kernels.

   A public function checks its arguments (CHECK, CHECK_ADDRESSES), prepares every launch that it makes (which finds and
   loads the kernel and checks the grid), and submits them. Only a submission changes anything. */

#ifndef LORA_FAST_KERNELS_H
#define LORA_FAST_KERNELS_H

#include "lora_fast.h"

#define API LORA_FAST_API
#define CALL(expression)                                                                                               \
    do {                                                                                                               \
        int status_ = (expression);                                                                                    \
        if (status_) return status_;                                                                                   \
    } while (0)

/* ---- The table */

/* A kernel of an op: what a key is about, besides dtypes, rank and options. */
enum kind {
    PROJECT, LINEAR, GRAD_X, ADD_TO_Y, ADD_TO_DX, GRAD_S_B, GRAD_A, SUM, BATCH_PROJECT, BATCH_ADD, GRAM,
    STEP, TRANSFORM, MERGE, CAYLEY_SUMS, CAYLEY_INVERSE, CAYLEY_BACKWARD, CAYLEY_PRODUCTS, SPD_SOLVE, SPD_INVERSE,
    SMALL_INVERSE, SCALORA_SOLVE, SCALORA_SCALES, IMBALANCE, SCALE_REG
};
/* Options of a key. Those with the value 0 are the first of several. */
enum option {
    DROPOUT = 1, BIAS = 1, BACKWARD = 1, ACCUMULATE_NONE = 0, ACCUMULATE_FIRST = 1, ACCUMULATE_SECOND = 2,
    TOKENS_MANY = 0, TOKENS_SHORT = 2, TOKENS_FEW = 4,
    ADD = 1, MATRIX = 2, SCALE = 4, GRAMS = 8, STOCHASTIC = 16,
    ROUNDING_NEAREST = 0, ROUNDING_STOCHASTIC = 1, ROUNDING_COMPENSATED = 2, SEED_IN_MEMORY = 4,
    SOLVER_NNLS = 0, SOLVER_PAPER = 1, SOLVER_COLUMN = 2, SOLVER_SCALAR = 3
};
/* dtype and adapter: of lora_fast_dtype; both the same where a kernel has one. r: 0 for a kernel of all ranks. */
#define KEY(kind, dtype, adapter, r, options)                                                                          \
    ((uint64_t)(kind) << 32 | (uint64_t)(dtype) << 28 | (uint64_t)(adapter) << 24 | (uint64_t)(r) << 8 | (options))

/* The parameters of all kernels, by name. A kernel takes its matrices by address or as tensor maps, of which Triton
   passes the map, two sizes and two strides. */
enum parameter {
    P_x, P_a, P_s, P_seed, P_in_memory, P_drop_level, P_n_tokens, P_d_in, P_d_out, P_stride_x, P_stride_a,
    P_d_in_per_split, P_left, P_weight, P_result, P_bias, P_thin, P_factor, P_scaling, P_stride_left, P_stride_weight,
    P_stride_result, P_stride_factor, P_base, P_n_parts, P_dy, P_b, P_ds, P_db, P_stride_dy, P_stride_b,
    P_tokens_per_split, P_da, P_partial0, P_total0, P_partial1, P_total1, P_numel0, P_n_partials0, P_numel1,
    P_n_partials1, P_table, P_rows, P_ends, P_y, P_n_rows, P_n_adapters, P_stride_y,
    P_entries, P_gradients, P_tiles, P_counters, P_partials, P_totals, P_n_pairs,
    P_hyper, P_p_lr_b, P_p_lr_a, P_steps, P_keys, P_additive, P_matrices, P_scale_p, P_scale_g,
    P_lr_b, P_beta1_b, P_beta2_b, P_eps_b, P_decay_b, P_lr_a, P_beta1_a, P_beta2_a, P_eps_a, P_decay_a, P_stride_hyper,
    P_scale, P_alpha, P_beta, P_addresses, P_multipliers, P_scratch, P_n, P_rhs, P_solutions, P_info, P_uppers,
    P_damping, P_r, P_k, P_inverses, P_ka, P_kb, P_kp, P_kq, P_active, P_kappa, P_low, P_high, P_residual_scale, P_size,
    P_rho, P_lam, P_entries_a, P_entries_b, P_coefficients, P_eps,
    P_map_left, P_map_left_rows, P_map_left_columns, P_map_left_stride, P_map_left_unit,
    P_map_weight, P_map_weight_rows, P_map_weight_columns, P_map_weight_stride, P_map_weight_unit,
    P_map_result, P_map_result_rows, P_map_result_columns, P_map_result_stride, P_map_result_unit,
    N_PARAMETERS
};

/* Constants that a kernel was compiled with; 0 where it has no such constant. */
struct tile {
    int BLOCK, BLOCK_T, BLOCK_OUT, BLOCK_IN, BLOCK_R, BLOCK_D, BLOCK_K, CHUNK;
};

/* How Triton encodes a matrix that a kernel takes as a tensor map: the driver's numbers, and the box that one copy
   moves. */
struct encoding {
    int swizzle, type, bytes, box_rows, box_columns;
};
enum { MAPS = 3 }; /* left, weight, result */

struct kernel {
    uint64_t key;
    const char *name; /* in the code */
    unsigned threads, shared;
    struct tile tile;
    const unsigned char *params; /* of enum parameter, in order */
    int n_params;
    const struct encoding *maps; /* MAPS of them, or NULL */
};

/* Both tables have one row for each kernel, in the same order. */
extern const lora_fast_kernel lora_fast_public_table[];
extern const struct kernel lora_fast_table[];
extern const int lora_fast_table_length;
/* What lora_fast_archs, lora_fast_dtypes and lora_fast_ranks return. */
extern const int lora_fast_built_archs[], lora_fast_n_archs, lora_fast_built_ranks[], lora_fast_n_ranks;
extern const lora_fast_dtype lora_fast_built_dtypes[];
extern const int lora_fast_n_dtypes, lora_fast_built_ptx;
/* SHORT, FEW, FEW_NUMBERS, PROGRAMS, SPLIT_STEPS and PARTIAL_NUMBERS of kernels/tiles.py. */
extern const int lora_fast_short_tokens, lora_fast_few_tokens, lora_fast_few_numbers, lora_fast_programs, lora_fast_split_steps,
    lora_fast_partial_numbers;
/* The largest number of adapters in a batch. */
extern const int lora_fast_most_adapters;
/* IN_REGISTERS of kernels/linalg/spd.py, the largest rank whose matrix fits in registers, and SLOTS, the number of
   programs above, each with a scratch matrix. */
extern const int lora_fast_in_registers, lora_fast_slots;

/* The numbers of kernels/linear/strategies.py: those of each arch, in ascending order, and those of all. */
struct rates {
    int arch;
    double bandwidth, half, single, fused;
};
struct estimate {
    int n_rates, n_cublas_tiles;
    double cublas_tiles[4][3]; /* tokens, columns, share of the rate */
    double launch_seconds, l2_speedup, mask_rate, stream_share, single_share, split_k_share;
};
extern const struct rates lora_fast_rates[];
extern const struct estimate lora_fast_estimate;

/* ---- Errors */

/* Keeps a message for lora_fast_error_message and returns the status. */
int lora_fast_fail(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Fail with "function: argument: expected …, got …". Helpers of a public function are given its name. */
#define CHECK_IN(function, condition, argument, expected, got)                                                         \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            return lora_fast_fail(LORA_FAST_BAD_ARGUMENT, "%s: %s: expected %s, got %lld", function, argument,         \
                                  expected, (long long)(got));                                                         \
    } while (0)
#define CHECK_MULTIPLE_IN(function, value, argument)                                                                   \
    do {                                                                                                               \
        if ((value) % 16)                                                                                              \
            return lora_fast_fail(LORA_FAST_MISALIGNED, "%s: %s: expected a multiple of 16, got %lld", function,       \
                                  argument, (long long)(value));                                                       \
    } while (0)
#define CHECK(condition, argument, expected, got) CHECK_IN(__func__, condition, argument, expected, got)
#define CHECK_POINTER(pointer)                                                                                         \
    do {                                                                                                               \
        if (!(pointer))                                                                                                \
            return lora_fast_fail(LORA_FAST_BAD_ARGUMENT, "%s: %s: expected an address, got NULL", __func__,           \
                                  #pointer);                                                                           \
    } while (0)
/* Fails for the first address that is NULL or no multiple of 16 bytes. names: those of the addresses, with commas. */
int lora_fast_check_addresses(const char *function, const char *names, int count, const void *const *addresses);
#define CHECK_ADDRESSES(...)                                                                                           \
    CALL(lora_fast_check_addresses(__func__, #__VA_ARGS__,                                                             \
                                   (int)(sizeof((const void *[]){__VA_ARGS__}) / sizeof(void *)),                      \
                                   (const void *[]){__VA_ARGS__}))
/* Fails for an address of a number of 64 bits that is no multiple of 8. */
#define CHECK_MULTIPLE_OF_8(pointer)                                                                                   \
    do {                                                                                                               \
        if ((uintptr_t)(pointer) % 8)                                                                                  \
            return lora_fast_fail(LORA_FAST_MISALIGNED, "%s: %s: expected a multiple of 8, got %p", __func__,          \
                                  #pointer, (const void *)(pointer));                                                  \
    } while (0)
/* Fails for a struct that is NULL, smaller than this library's, or larger with a field that is not 0. */
int lora_fast_check_struct(const char *function, const char *name, const void *structure, size_t known);
#define CHECK_STRUCT(pointer) CALL(lora_fast_check_struct(__func__, #pointer, pointer, sizeof *(pointer)))
enum { LARGEST_SIZE = 1 << 30, LARGEST_RANK = 256 };
#define CHECK_SIZE_IN(function, value, argument, least)                                                                \
    CHECK_IN(function, (value) >= (least) && (value) <= LARGEST_SIZE, argument, #least " to 2^30", value)
#define CHECK_RANK_IN(function, value, argument)                                                                       \
    CHECK_IN(function, (value) >= 1 && (value) <= LARGEST_RANK, argument, "1 to 256", value)
#define CHECK_DTYPE_IN(function, value, argument)                                                                      \
    CHECK_IN(function, (unsigned)(value) <= LORA_FAST_BFLOAT16, argument, "a lora_fast_dtype", value)
#define CHECK_SIZE(value, argument, least) CHECK_SIZE_IN(__func__, value, argument, least)
#define CHECK_RANK(value, argument) CHECK_RANK_IN(__func__, value, argument)
#define CHECK_DTYPE(value, argument) CHECK_DTYPE_IN(__func__, value, argument)

/* Fails for a distance of rows that is neither 0 nor a multiple of 16 from the row's length on. */
int lora_fast_check_distance(const char *function, const char *argument, int64_t distance, int width);
/* Check the fields that a layer and a batch have in common. name: "layer" or "batch". */
#define CHECK_SHARED_IN(function, structure, name)                                                                     \
    do {                                                                                                               \
        CHECK_SIZE_IN(function, (structure)->d_in, name ".d_in", 1);                                                   \
        CHECK_SIZE_IN(function, (structure)->d_out, name ".d_out", 1);                                                 \
        CHECK_RANK_IN(function, (structure)->r, name ".r");                                                            \
        CHECK_DTYPE_IN(function, (structure)->dtype, name ".dtype");                                                   \
        CHECK_IN(function,                                                                                             \
                 (structure)->adapter == (structure)->dtype || (structure)->adapter == LORA_FAST_FLOAT32,              \
                 name ".adapter", name ".dtype or LORA_FAST_FLOAT32", (structure)->adapter);                           \
        CHECK_MULTIPLE_IN(function, (structure)->d_in, name ".d_in");                                                  \
        CHECK_MULTIPLE_IN(function, (structure)->d_out, name ".d_out");                                                \
        CALL(lora_fast_check_distance(function, name ".ld_x", (structure)->ld_x, (structure)->d_in));                  \
        CALL(lora_fast_check_distance(function, name ".ld_y", (structure)->ld_y, (structure)->d_out));                 \
    } while (0)
/* Checks every field of a layer. */
int lora_fast_check_layer(const char *function, const lora_fast_layer *layer, int least_tokens);

/* ---- Launches */

/* The value of a parameter, in the bytes that its kernel reads: every CUDA host is little-endian. */
union value {
    const void *p;
    int64_t i;
    float f;
    double d;
};

/* A matrix that a kernel may take as a tensor map: its address and sizes, and the elements between its rows. */
struct matrix {
    const void *address;
    int64_t rows, columns, stride;
};

struct launch {
    int row; /* of the table */
    const struct tile *tile;
    void *function;
    unsigned grid[3];
};

/* Finds the kernel with this key for the current context's device and loads it. */
int lora_fast_prepare(const char *function, struct launch *launch, uint64_t key);
#define PREPARE(launch, key) CALL(lora_fast_prepare(__func__, launch, key))
/* Sets the grid, or fails where a GPU does not have so many blocks. A grid with a 0 is not launched. */
int lora_fast_set_grid(const char *function, struct launch *launch, int64_t x, int64_t y, int64_t z);
#define SET_GRID(launch, x, y, z) CALL(lora_fast_set_grid(__func__, launch, x, y, z))
/* Launches with values by enum parameter. matrices: MAPS of them for a kernel with tensor maps, else NULL. */
int lora_fast_submit(const struct launch *launch, const union value *values, const struct matrix *matrices,
                     lora_fast_stream stream);
/* Finds the constants of the kernel with this key, of any arch and without a driver, where they are the same. */
int lora_fast_tile_of(const char *function, const struct tile **tile, uint64_t key);

/* The limits of the current context's device. */
struct device {
    int ordinal, arch, multiprocessors, shared; /* shared: bytes that a block may have */
};
int lora_fast_current_device(const char *function, const struct device **device);

/* Whether S in so many parts is estimated to be faster than S whole. tiles: of project and of the update, for S whole
   and in parts. */
int lora_fast_split_is_faster(const lora_fast_layer *layer, const struct device *device, const struct tile *tiles[4],
                              int64_t splits);

/* Returns a number that stands for some others, which a plan was made for. */
static inline int lora_fast_stamp(int count, const int *numbers) {
    uint32_t stamp = 2166136261u; /* FNV-1a */
    for (int i = 0; i < count; i++) stamp = (stamp ^ (uint32_t)numbers[i]) * 16777619u;
    return (int)(stamp >> 1);
}

#define LAYER_KEY(kind, options) KEY(kind, layer->dtype, layer->adapter, layer->r, options)

/* Returns the elements between two rows: what was set, or where that is 0 the row's length. */
static inline int64_t row_distance(int64_t set, int width) { return set ? set : width; }

static inline int64_t divide_up(int64_t number, int64_t by) { return (number + by - 1) / by; }

/* Returns the smallest of least, 2 least, 4 least, … that is at least r. */
static inline int lora_fast_rank_class(int r, int least) {
    while (least < r) least *= 2;
    return least;
}

#endif

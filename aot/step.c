/* The step and the small matrices. Tables have the layout of kernels/pointer_table.py and pairs/add_low_rank.py; grids
   are those of kernels/pairs/{gram,adamw,transform,add_low_rank,scalora_system,scalora_scales}.py and of
   kernels/linalg/{spd,inverse}.py. */

#include "kernels.h"

#include <string.h>

enum { COLUMNS = 8, MERGE_COLUMNS = 12, COUNTERS = 16, HYPER = 5 };
enum { LARGEST_RANK = 256, LARGEST_SCALORA_RANK = 128, SCALORA_IN_REGISTERS = 32 };
enum { SCRATCHES = 3 }; /* scratch matrices of a program of kernels/linalg/inverse.py; spd.py takes one */

static int find_any(const lora_fast_group *group, int *row) {
    const char *dtype = lora_fast_dtype_name(group->dtype);
    if (!dtype || group->r < 1) return LORA_FAST_BAD_ARGUMENT;
    switch (group->op) {
    case LORA_FAST_GRAM: return lora_fast_find_any(row, "lora_gram_kernel gram %s r%d", dtype, group->r);
    case LORA_FAST_TRANSFORM:
        return lora_fast_find_any(row, "lora_transform_kernel transform %s r%d add=0", dtype, group->r);
    case LORA_FAST_MERGE:
        return lora_fast_find_any(row, "lora_merge_kernel merge %s r%d rounding=nearest", dtype, group->r);
    case LORA_FAST_STEP:
        return lora_fast_find_any(row, "lora_step_kernel adamw_step %s r%d add=0 matrix=%d scale=0 gram=0", dtype,
                                  group->r, !group->flat);
    }
    return LORA_FAST_BAD_ARGUMENT;
}

/* The number of programs of a factor. */
static int64_t programs_of(const lora_fast_group *group, const lora_fast_factor *factor, int block_in) {
    int64_t d = group->op == LORA_FAST_STEP && group->flat ? factor->d * group->r : factor->d;
    int64_t programs = divide_up(d, group->chunk);
    return group->op == LORA_FAST_MERGE ? programs * divide_up(factor->d_in, block_in) : programs;
}

static int n_tensors(lora_fast_op op) { return (const int[]){2, 4, 1, 4}[op]; }

/* The length of a factor's row in the table. */
static int64_t columns(const lora_fast_group *group) { return group->op == LORA_FAST_MERGE ? MERGE_COLUMNS : COLUMNS; }

/* Whether a list of gradients' addresses follows the rows. */
static int has_gradients(lora_fast_op op) { return op == LORA_FAST_GRAM || op == LORA_FAST_STEP; }

/* int64 numbers before the counters, which start at a multiple of 16 bytes. */
static int64_t numbers(const lora_fast_group *group) {
    int64_t n = group->n_factors;
    return columns(group) * n + (has_gradients(group->op) ? (n + 1) / 2 * 2 : 0);
}

API int lora_fast_plan(lora_fast_group *group, const lora_fast_factor *factors) {
    int row;
    int64_t programs = 0;
    CALL(find_any(group, &row));
    group->chunk = lora_fast_table[row].tile.CHUNK;
    if (group->n_factors < 1) return LORA_FAST_BAD_ARGUMENT;
    for (int i = 0; i < group->n_factors; i++) {
        const lora_fast_factor *factor = &factors[i];
        int merge = group->op == LORA_FAST_MERGE;
        if (factor->d < 1 || factor->index < 0 || (merge && factor->d_in < 1)) return LORA_FAST_BAD_ARGUMENT;
        if ((merge ? factor->d_in : factor->d) % 16) return LORA_FAST_MISALIGNED;
        CALL(lora_fast_check_addresses(n_tensors(group->op), factor->tensors));
        programs += programs_of(group, factor, lora_fast_table[row].tile.BLOCK_IN);
    }
    if (programs > INT32_MAX) return LORA_FAST_BAD_ARGUMENT;
    group->n_programs = (int)programs;
    group->bytes = numbers(group) * sizeof(int64_t) + group->n_factors * COUNTERS * sizeof(int32_t) +
                   group->n_programs * 2 * sizeof(int32_t);
    return LORA_FAST_OK;
}

API int lora_fast_fill(const lora_fast_group *group, const lora_fast_factor *factors, void *host) {
    int row;
    CALL(find_any(group, &row));
    int merge = group->op == LORA_FAST_MERGE;
    int64_t *entry = host, *gradients = entry + columns(group) * group->n_factors;
    int32_t *counters = (int32_t *)(entry + numbers(group));
    int32_t *tile = counters + COUNTERS * (int64_t)group->n_factors;
    memset(host, 0, group->bytes);
    for (int i = 0; i < group->n_factors; i++, entry += columns(group)) {
        const lora_fast_factor *factor = &factors[i];
        int64_t count = programs_of(group, factor, lora_fast_table[row].tile.BLOCK_IN), r = group->r;
        int column = 0;
        for (int j = 0; j < n_tensors(group->op); j++) {
            int64_t address = (int64_t)(uintptr_t)factor->tensors[j];
            if (has_gradients(group->op) && j == 1) gradients[i] = address;
            else entry[column++] = address;
        }
        if (merge) {
            int64_t sizes[] = {factor->d, r, factor->d_in, factor->index, factor->d_in, 1, r, 1};
            memcpy(entry + 4, sizes, sizeof sizes);
        } else {
            int64_t sizes[] = {factor->d, r, factor->is_a != 0, factor->index};
            memcpy(entry + 3, sizes, sizeof sizes);
        }
        for (int64_t j = 0; j < count; j++) *tile++ = i, *tile++ = (int32_t)j;
    }
    return LORA_FAST_OK;
}

/* The parts of a table in device memory. */
#define TABLE                                                                                                          \
    NAMED_POINTER("entries", group->device),                                                                           \
        NAMED_POINTER("gradients", (const int64_t *)group->device + columns(group) * group->n_factors),                \
        NAMED_POINTER("counters", counters_of(group)),                                                                 \
        NAMED_POINTER("tiles", counters_of(group) + COUNTERS * (int64_t)group->n_factors)

static const int32_t *counters_of(const lora_fast_group *group) {
    return (const int32_t *)((const int64_t *)group->device + numbers(group));
}

static int check(const lora_fast_group *group, lora_fast_op op) {
    if (group->op != op || !lora_fast_dtype_name(group->dtype) || group->r < 1) return LORA_FAST_BAD_ARGUMENT;
    return CHECK_ADDRESSES(group->device);
}

API size_t lora_fast_gram_workspace(const lora_fast_group *group) {
    size_t grams = group->op == LORA_FAST_GRAM ? 3 : 1;
    return grams * group->n_programs * group->r * group->r * sizeof(float);
}

API int lora_fast_gram(const lora_fast_group *group, int n_pairs, float *grams, void *workspace,
                       lora_fast_stream stream) {
    int row;
    CALL(check(group, LORA_FAST_GRAM));
    CALL(CHECK_ADDRESSES(grams, workspace));
    CALL(lora_fast_find(&row, "lora_gram_kernel gram %s r%d", lora_fast_dtype_name(group->dtype), group->r));
    int64_t blocks = divide_up(group->r, lora_fast_table[row].tile.BLOCK_R);
    return lora_fast_launch(row, group->n_programs, blocks * blocks, 1,
                            (struct argument[]){TABLE, NAMED_POINTER("partials", workspace),
                                                NAMED_POINTER("totals", grams), INTEGER(n_pairs), END},
                            stream);
}

API int lora_fast_adamw_step(const lora_fast_group *group, const double *hyper, int hyper_rows, float *steps,
                             const lora_fast_work *work, void *workspace, lora_fast_stream stream) {
    static const lora_fast_work none;
    int row;
    if (!work) work = &none;
    int add = work->additive != NULL, matrix = work->matrices != NULL, gram = work->grams != NULL;
    int scale = work->scale_p != NULL;
    CALL(check(group, LORA_FAST_STEP));
    CALL(CHECK_ADDRESSES(hyper, steps));
    if (scale != (work->scale_g != NULL) || group->flat == (matrix || scale || gram) || hyper_rows < 1)
        return LORA_FAST_BAD_ARGUMENT;
    if (gram) CALL(CHECK_ADDRESSES(workspace));
    CALL(lora_fast_find(&row, "lora_step_kernel adamw_step %s r%d add=%d matrix=%d scale=%d gram=%d",
                        lora_fast_dtype_name(group->dtype), group->r, add, matrix, scale, gram));
    return lora_fast_launch(
        row, group->n_programs, 1, 1,
        (struct argument[]){TABLE, POINTER(hyper), POINTER(steps), NAMED_POINTER("additive", work->additive),
                            NAMED_POINTER("matrices", work->matrices), NAMED_POINTER("scale_p", work->scale_p),
                            NAMED_POINTER("scale_g", work->scale_g), NAMED_POINTER("partials", workspace),
                            NAMED_POINTER("totals", work->grams),
                            /* Of stochastic rounding, which this library does not offer. The kernel ignores it. */
                            NAMED_POINTER("keys", steps),
                            NAMED_INTEGER("stride_hyper", hyper_rows > 1 ? HYPER : 0),
                            /* Python's optimizer passes these in place of hyper; the kernel ignores them. */
                            NAMED_POINTER("p_lr_b", steps), NAMED_POINTER("p_lr_a", steps), NAMED_NUMBER("lr_b", 0),
                            NAMED_NUMBER("beta1_b", 0), NAMED_NUMBER("beta2_b", 0), NAMED_NUMBER("eps_b", 0),
                            NAMED_NUMBER("decay_b", 0), NAMED_NUMBER("lr_a", 0), NAMED_NUMBER("beta1_a", 0),
                            NAMED_NUMBER("beta2_a", 0), NAMED_NUMBER("eps_a", 0), NAMED_NUMBER("decay_a", 0), END},
        stream);
}

API int lora_fast_transform(const lora_fast_group *group, const float *matrices, int add, lora_fast_stream stream) {
    int row;
    CALL(check(group, LORA_FAST_TRANSFORM));
    CALL(CHECK_ADDRESSES(matrices));
    CALL(lora_fast_find(&row, "lora_transform_kernel transform %s r%d add=%d", lora_fast_dtype_name(group->dtype),
                        group->r, add != 0));
    return lora_fast_launch(row, group->n_programs, 1, 1,
                            (struct argument[]){TABLE, POINTER(matrices), /* ignored: */
                                                NAMED_POINTER("steps", matrices), NAMED_POINTER("keys", matrices), END},
                            stream);
}

API int lora_fast_merge(const lora_fast_group *group, const float *scale, lora_fast_rounding rounding, int64_t seed,
                        lora_fast_stream stream) {
    static const char *const names[] = {"nearest", "stochastic", "compensated"};
    int row;
    CALL(check(group, LORA_FAST_MERGE));
    CALL(CHECK_ADDRESSES(scale));
    if ((unsigned)rounding > 2) return LORA_FAST_BAD_ARGUMENT;
    CALL(lora_fast_find(&row, "lora_merge_kernel merge %s r%d rounding=%s", lora_fast_dtype_name(group->dtype),
                        group->r, names[rounding]));
    return lora_fast_launch(row, group->n_programs, 1, 1,
                            (struct argument[]){TABLE, POINTER(scale), /* ignored: */ NAMED_POINTER("alpha", scale),
                                                NAMED_POINTER("beta", scale), INTEGER(seed), END},
                            stream);
}

static int blocked(int r) { return r > lora_fast_in_registers; }

static int slots(int n) { return n < lora_fast_slots ? n : lora_fast_slots; }

API size_t lora_fast_small_workspace(int n, int r) {
    size_t side = lora_fast_rank_class(r, 16);
    return blocked(r) ? slots(n) * SCRATCHES * side * side * sizeof(float) : 0;
}

API int lora_fast_spd_solve(int n, int r, int k, const float *matrices, const float *rhs, float damping, float *x,
                            int32_t *info, void *workspace, lora_fast_stream stream) {
    int row;
    if (n < 0 || r < 1 || r > LARGEST_RANK || k < 1) return LORA_FAST_BAD_ARGUMENT;
    CALL(CHECK_ADDRESSES(matrices, rhs, x, info, blocked(r) ? workspace : x));
    CALL(lora_fast_find(&row, "lora_spd_solve%s_kernel spd_solve float32 r%d", blocked(r) ? "_blocked" : "",
                        lora_fast_rank_class(r, 16)));
    int64_t columns = blocked(r) ? 1 : divide_up(k, lora_fast_table[row].tile.BLOCK_K);
    return lora_fast_launch(row, blocked(r) ? slots(n) : n, columns, 1,
                            (struct argument[]){POINTER(matrices), POINTER(rhs), NAMED_POINTER("solutions", x),
                                                POINTER(info), NAMED_POINTER("uppers", workspace),
                                                NAMED_NUMBER("damping", damping), INTEGER(n), INTEGER(r), INTEGER(k),
                                                END},
                            stream);
}

API int lora_fast_small_inverse(int n, int r, const float *matrices, float *inverses, void *workspace,
                                lora_fast_stream stream) {
    int row;
    if (n < 0 || r < 1 || r > LARGEST_RANK) return LORA_FAST_BAD_ARGUMENT;
    CALL(CHECK_ADDRESSES(matrices, inverses, blocked(r) ? workspace : inverses));
    CALL(lora_fast_find(&row, "lora_small_inverse%s_kernel small_inverse float32 r%d", blocked(r) ? "_blocked" : "",
                        lora_fast_rank_class(r, 16)));
    return lora_fast_launch(row, blocked(r) ? slots(n) : n, 1, 1,
                            (struct argument[]){POINTER(matrices), POINTER(inverses),
                                                NAMED_POINTER("scratch", workspace), INTEGER(n), INTEGER(r), END},
                            stream);
}

API size_t lora_fast_scalora_workspace(int n, int r) {
    return r > SCALORA_IN_REGISTERS ? sizeof(float) * n * 2 * (2 * r) * (2 * r) : 0;
}

API int lora_fast_scalora_solve(int n, int r, const float *grams, lora_fast_solver solver, float *x,
                                unsigned char *active, int32_t *info, void *workspace, lora_fast_stream stream) {
    static const char *const names[] = {"nnls", "paper", "column", "scalar"};
    int row;
    if (n < 0 || r < 1 || (unsigned)solver > 3) return LORA_FAST_BAD_ARGUMENT;
    if (r > LARGEST_SCALORA_RANK) return LORA_FAST_NO_KERNEL;
    CALL(CHECK_ADDRESSES(grams, x, active, info, r > SCALORA_IN_REGISTERS ? workspace : grams));
    CALL(lora_fast_find(&row, "lora_scalora_solve_kernel scalora float32 r%d solver=%s", lora_fast_rank_class(r, 8),
                        names[solver]));
    int64_t size = (int64_t)n * r * r;
    return lora_fast_launch(row, n, 1, 1,
                            (struct argument[]){NAMED_POINTER("ka", grams), NAMED_POINTER("kb", grams + size),
                                                NAMED_POINTER("kp", grams + 2 * size),
                                                NAMED_POINTER("kq", grams + 3 * size),
                                                NAMED_POINTER("k", grams + 4 * size), POINTER(x), POINTER(active),
                                                POINTER(info), NAMED_POINTER("scratch", workspace), INTEGER(r), END},
                            stream);
}

API int lora_fast_scalora_scales(int n, int r, const float *x, const unsigned char *active, const double *kappa,
                                 const float *scaling, float low, float high, float *scale_p, float *scale_g,
                                 float *residual_scale, lora_fast_stream stream) {
    int row;
    if (n < 0 || r < 1 || (int64_t)n * r > INT32_MAX) return LORA_FAST_BAD_ARGUMENT;
    CALL(CHECK_ADDRESSES(x, active, kappa, scaling, scale_p, scale_g, residual_scale));
    CALL(lora_fast_find(&row, "lora_scales_kernel scalora float32 r8 solver=nnls")); /* one kernel for all ranks */
    int64_t size = (int64_t)n * r;
    return lora_fast_launch(row, divide_up(size, lora_fast_table[row].tile.BLOCK), 1, 1,
                            (struct argument[]){POINTER(x), POINTER(active), POINTER(kappa), POINTER(scaling),
                                                POINTER(scale_p), POINTER(scale_g), POINTER(residual_scale),
                                                NAMED_NUMBER("low", low), NAMED_NUMBER("high", high), INTEGER(size),
                                                INTEGER(r), END},
                            stream);
}

/* SPDX-License-Identifier: Apache-2.0

   The methods' r×r algebra. Grids are those of kernels/pairs/{regularizers,scalora_system,scalora_scales}.py and of
   kernels/linalg/{spd,inverse}.py. */

#include "kernels.h"

enum { LARGEST_SCALORA_RANK = 128, SCALORA_IN_REGISTERS = 32, SMALLEST_SCALORA_CLASS = 8, SMALLEST_CLASS = 16 };
enum { SCRATCHES = 3 }; /* scratch matrices of a program of kernels/linalg/inverse.py; spd.py takes one */

#define SQUARE_KEY(kind, class, options) KEY(kind, LORA_FAST_FLOAT32, LORA_FAST_FLOAT32, class, options)
/* Checks the number and the rank of matrices, of which a call with none does nothing. */
#define CHECK_SQUARE                                                                                                   \
    do {                                                                                                               \
        CHECK_SIZE(n, "n", 0);                                                                                         \
        CHECK_RANK(r, "r");                                                                                            \
    } while (0)

API int lora_fast_imbalance(int n, int r, const float *ka, const float *kb, const float *rho, const double *lr_a,
                            const double *lr_b, float lam, float *matrices, lora_fast_stream stream) {
    struct launch launch;
    CHECK_SQUARE;
    if (!n) return LORA_FAST_OK;
    CHECK_ADDRESSES(ka, kb, rho, matrices);
    CHECK_POINTER(lr_a);
    CHECK_POINTER(lr_b);
    CHECK_MULTIPLE_OF_8(lr_a);
    CHECK_MULTIPLE_OF_8(lr_b);
    PREPARE(&launch, SQUARE_KEY(IMBALANCE, lora_fast_rank_class(r, 1), 0));
    SET_GRID(&launch, n, 1, 1);
    const union value values[N_PARAMETERS] = {
        [P_ka] = {ka}, [P_kb] = {kb}, [P_rho] = {rho}, [P_matrices] = {matrices}, [P_p_lr_a] = {lr_a},
        [P_p_lr_b] = {lr_b}, [P_lam] = {.f = lam}, [P_n_pairs] = {.i = n}, [P_r] = {.i = r},
    };
    return lora_fast_submit(&launch, values, NULL, stream);
}

API int lora_fast_scale_reg(int n, int r, const float *ka, const float *kb, const float *entries_a,
                            const float *entries_b, float lam, float eps, float *coefficients,
                            lora_fast_stream stream) {
    struct launch launch;
    CHECK_SQUARE;
    if (!n) return LORA_FAST_OK;
    CHECK_ADDRESSES(ka, kb, entries_a, entries_b, coefficients);
    PREPARE(&launch, SQUARE_KEY(SCALE_REG, lora_fast_rank_class(r, 1), 0));
    SET_GRID(&launch, n, 1, 1);
    const union value values[N_PARAMETERS] = {
        [P_ka] = {ka}, [P_kb] = {kb}, [P_entries_a] = {entries_a}, [P_entries_b] = {entries_b},
        [P_coefficients] = {coefficients}, [P_lam] = {.f = lam}, [P_eps] = {.f = eps}, [P_n_pairs] = {.i = n},
        [P_r] = {.i = r},
    };
    return lora_fast_submit(&launch, values, NULL, stream);
}

/* ---- Solutions and inverses, above IN_REGISTERS in slots of scratch memory */

static int in_memory(int r) { return r > lora_fast_in_registers; }

static int slots(int n) { return n < lora_fast_slots ? n : lora_fast_slots; }

API int lora_fast_small_workspace(int n, int r, size_t *bytes) {
    CHECK_SQUARE;
    CHECK_POINTER(bytes);
    size_t side = (size_t)lora_fast_rank_class(r, SMALLEST_CLASS);
    *bytes = in_memory(r) ? (size_t)slots(n) * SCRATCHES * side * side * sizeof(float) : 0;
    return LORA_FAST_OK;
}

/* The operands of spd.py, whose right-hand side is I where rhs is NULL. */
struct spd_system {
    int n, r, k;
    const float *matrices, *rhs;
    float damping;
    float *solutions;
    int32_t *info;
    void *workspace;
};

static int solve(const char *function, enum kind kind, const struct spd_system *system, lora_fast_stream stream) {
    struct launch launch;
    int n = system->n, r = system->r, k = system->k;
    CALL(lora_fast_prepare(function, &launch, SQUARE_KEY(kind, lora_fast_rank_class(r, SMALLEST_CLASS), 0)));
    int64_t columns = in_memory(r) ? 1 : divide_up(k, launch.tile->BLOCK_K);
    CALL(lora_fast_set_grid(function, &launch, in_memory(r) ? slots(n) : n, columns, 1));
    const union value values[N_PARAMETERS] = {
        [P_matrices] = {system->matrices}, [P_rhs] = {system->rhs ? system->rhs : system->matrices},
        [P_solutions] = {system->solutions}, [P_info] = {system->info}, [P_uppers] = {system->workspace},
        [P_damping] = {.f = system->damping}, [P_n] = {.i = n}, [P_r] = {.i = r}, [P_k] = {.i = k},
    };
    return lora_fast_submit(&launch, values, NULL, stream);
}

API int lora_fast_spd_solve(int n, int r, int k, const float *matrices, const float *rhs, float damping, float *x,
                            int32_t *info, void *workspace, lora_fast_stream stream) {
    CHECK_SQUARE;
    CHECK_SIZE(k, "k", 1);
    CHECK((int64_t)r * k <= INT32_MAX, "k", "r k at most 2^31 - 1", k); /* the kernels count in 32 bits */
    if (!n) return LORA_FAST_OK;
    CHECK_ADDRESSES(matrices, rhs, x, info);
    if (in_memory(r)) CHECK_ADDRESSES(workspace);
    const struct spd_system system = {n, r, k, matrices, rhs, damping, x, info, workspace};
    return solve(__func__, SPD_SOLVE, &system, stream);
}

API int lora_fast_spd_inverse(int n, int r, const float *matrices, float damping, float *inverses, int32_t *info,
                              void *workspace, lora_fast_stream stream) {
    CHECK_SQUARE;
    if (!n) return LORA_FAST_OK;
    CHECK_ADDRESSES(matrices, inverses, info);
    if (in_memory(r)) CHECK_ADDRESSES(workspace);
    const struct spd_system system = {n, r, r, matrices, NULL, damping, inverses, info, workspace};
    return solve(__func__, SPD_INVERSE, &system, stream);
}

API int lora_fast_small_inverse(int n, int r, const float *matrices, float *inverses, void *workspace,
                                lora_fast_stream stream) {
    struct launch launch;
    CHECK_SQUARE;
    if (!n) return LORA_FAST_OK;
    CHECK_ADDRESSES(matrices, inverses);
    if (in_memory(r)) CHECK_ADDRESSES(workspace);
    PREPARE(&launch, SQUARE_KEY(SMALL_INVERSE, lora_fast_rank_class(r, SMALLEST_CLASS), 0));
    SET_GRID(&launch, in_memory(r) ? slots(n) : n, 1, 1);
    const union value values[N_PARAMETERS] = {
        [P_matrices] = {matrices}, [P_inverses] = {inverses}, [P_scratch] = {workspace}, [P_n] = {.i = n},
        [P_r] = {.i = r},
    };
    return lora_fast_submit(&launch, values, NULL, stream);
}

/* ---- ScaLoRA */

#define CHECK_SCALORA                                                                                                  \
    do {                                                                                                               \
        CHECK_SIZE(n, "n", 0);                                                                                         \
        CHECK(r >= 1 && r <= LARGEST_SCALORA_RANK, "r", "1 to 128", r);                                                \
    } while (0)

API int lora_fast_scalora_workspace(int n, int r, size_t *bytes) {
    CHECK_SCALORA;
    CHECK_POINTER(bytes);
    size_t side = 2 * (size_t)r;
    *bytes = r > SCALORA_IN_REGISTERS ? (size_t)n * 2 * side * side * sizeof(float) : 0;
    return LORA_FAST_OK;
}

API int lora_fast_scalora_solve(int n, int r, const float *grams, lora_fast_solver solver, float *x,
                                unsigned char *active, int32_t *info, void *workspace, lora_fast_stream stream) {
    struct launch launch;
    CHECK_SCALORA;
    CHECK((unsigned)solver <= LORA_FAST_SCALAR, "solver", "a lora_fast_solver", solver);
    if (!n) return LORA_FAST_OK;
    CHECK_ADDRESSES(grams, x, active, info);
    if (r > SCALORA_IN_REGISTERS) CHECK_ADDRESSES(workspace);
    int64_t size = (int64_t)n * r * r;
    if (size % 4) /* the five parts of grams are addresses of their own */
        return lora_fast_fail(LORA_FAST_MISALIGNED, "%s: grams: expected n r^2 to be a multiple of 4, got %lld", __func__,
                              (long long)size);
    PREPARE(&launch, SQUARE_KEY(SCALORA_SOLVE, lora_fast_rank_class(r, SMALLEST_SCALORA_CLASS), (uint64_t)solver));
    SET_GRID(&launch, n, 1, 1);
    const union value values[N_PARAMETERS] = {
        [P_ka] = {grams}, [P_kb] = {grams + size}, [P_kp] = {grams + 2 * size}, [P_kq] = {grams + 3 * size},
        [P_k] = {grams + 4 * size}, [P_x] = {x}, [P_active] = {active}, [P_info] = {info}, [P_scratch] = {workspace},
        [P_r] = {.i = r},
    };
    return lora_fast_submit(&launch, values, NULL, stream);
}

API int lora_fast_scalora_scales(int n, int r, const float *x, const unsigned char *active, const double *kappa,
                                 const float *scaling, float low, float high, float *scale_p, float *scale_g,
                                 float *residual_scale, lora_fast_stream stream) {
    struct launch launch;
    CHECK_SCALORA;
    int64_t size = (int64_t)n * r;
    CHECK(size <= INT32_MAX, "n", "n r at most 2^31 - 1", n);
    if (!n) return LORA_FAST_OK;
    CHECK_ADDRESSES(x, active, kappa, scaling, scale_p, scale_g, residual_scale);
    PREPARE(&launch, SQUARE_KEY(SCALORA_SCALES, 0, 0)); /* one kernel for all ranks */
    SET_GRID(&launch, divide_up(size, launch.tile->BLOCK), 1, 1);
    const union value values[N_PARAMETERS] = {
        [P_x] = {x}, [P_active] = {active}, [P_kappa] = {kappa}, [P_scaling] = {scaling}, [P_scale_p] = {scale_p},
        [P_scale_g] = {scale_g}, [P_residual_scale] = {residual_scale}, [P_low] = {.f = low}, [P_high] = {.f = high},
        [P_size] = {.i = size}, [P_r] = {.i = r},
    };
    return lora_fast_submit(&launch, values, NULL, stream);
}

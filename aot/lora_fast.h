/* SPDX-License-Identifier: Apache-2.0

   lora_fast without Python: the kernels of LoRA layers and of their optimizer step, for CUDA engines in C or C++.
   docs/engine.md tells how to build it and which methods it has.

   Calls     Every function that launches takes device addresses, sizes and a stream (CUstream and cudaStream_t are the
             same pointer), launches on the current context's device and returns without waiting. NULL is the legacy
             default stream, as in the driver API; CU_STREAM_PER_THREAD and CU_STREAM_LEGACY mean what they mean there.
             Functions are safe to call from several threads. The library allocates no device memory. Where a launch
             needs workspace, another function returns its size. The same inputs give the same bits.
   Errors    A function returns 0, a negative lora_fast_error or a positive CUresult. Everything that can be checked is
             checked before its first launch, so a call that fails has changed nothing.
             lora_fast_error_message tells which argument was wrong, what was expected and what it was.
   Matrices  They are row-major. Rows of x, dx, y, dy and of the weight may have any distance (ld_…); all others have no
             gaps. Addresses of tensors and of workspace are multiples of 16 bytes; d_in, d_out and distances of rows
             are multiples of 16 elements; n_tokens is any number. Sizes are at most 2^30.
   Kernels   The library contains the kernels that it was built for; lora_fast_archs, lora_fast_dtypes and
             lora_fast_ranks tell which. For a rank between two of them, take the next larger one
             (lora_fast_padded_rank) and pad a with rows of zeros and b with columns of zeros: results are the same,
             but not those of lora_fast_cayley.
   Graphs    A kernel is loaded at its first launch, which a stream that is being captured does not allow, so call
             lora_fast_load before. Seeds and learning rates may be in device memory, which replays read anew.
   Structs   The first field is the struct's size in your header (`.size = sizeof(lora_fast_layer)`). A library that is
             older than your header accepts it as long as the fields that it does not know are 0.

   Not verified on a GPU. */

#ifndef LORA_FAST_H
#define LORA_FAST_H

#include <stddef.h>
#include <stdint.h>

#define LORA_FAST_VERSION_MAJOR 0
#define LORA_FAST_VERSION_MINOR 2
#define LORA_FAST_VERSION_PATCH 0
#define LORA_FAST_VERSION (LORA_FAST_VERSION_MAJOR * 10000 + LORA_FAST_VERSION_MINOR * 100 + LORA_FAST_VERSION_PATCH)

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define LORA_FAST_API __attribute__((visibility("default")))
#else
#define LORA_FAST_API
#endif

typedef enum {
    LORA_FAST_OK = 0,
    LORA_FAST_NO_DRIVER = -1,    /* libcuda.so.1 is missing, or older than CUDA 12 */
    LORA_FAST_BAD_ARGUMENT = -2, /* a size out of range, a dtype that does not fit, a null pointer */
    LORA_FAST_MISALIGNED = -3,   /* an address, a row length or a distance of rows that is not a multiple of 16 */
    LORA_FAST_NO_ARCH = -4,      /* nothing was built for this device's arch; the message names what was */
    LORA_FAST_NO_KERNEL = -5,    /* not built for this rank, dtype or combination, or only for a device with more shared
                                    memory a block; the message names the kernel */
    LORA_FAST_NO_MEMORY = -6     /* of the host */
} lora_fast_error;

typedef enum { LORA_FAST_FLOAT32, LORA_FAST_FLOAT16, LORA_FAST_BFLOAT16 } lora_fast_dtype;

typedef struct CUstream_st *lora_fast_stream;

/* Returns LORA_FAST_VERSION of the library that runs, which may be another than the header's. */
LORA_FAST_API int lora_fast_version(void);
/* Returns the name of a status: "LORA_FAST_NO_DRIVER", "CUDA_ERROR_NO_DEVICE", "unknown error". Never NULL. */
LORA_FAST_API const char *lora_fast_error_name(int error);
/* Returns what was wrong with this thread's last call that failed: "lora_fast_project: layer.r: expected 1 to 256, got
   0". It is valid until the thread's next failure. */
LORA_FAST_API const char *lora_fast_error_message(void);

/* Return what the library was built for, in ascending order, and the number of entries. They need no driver. An arch
   serves its family: 80 and 86 later devices of compute capability 8, 100 and 120 all of 10 and 12, 90 itself. */
LORA_FAST_API const int *lora_fast_archs(int *count);
LORA_FAST_API const lora_fast_dtype *lora_fast_dtypes(int *count);
LORA_FAST_API const int *lora_fast_ranks(int *count);
/* Returns the arch whose PTX is embedded, which the driver compiles for later devices; 0: none. */
LORA_FAST_API int lora_fast_ptx_arch(void);
/* Returns the smallest rank that was built and is at least r; 0: none. */
LORA_FAST_API int lora_fast_padded_rank(int r);

/* One embedded kernel. */
typedef struct {
    const char *key;       /* kernel, op, dtype, rank, options: "lora_project_kernel project bfloat16 r16 …" */
    const char *params;    /* its arguments in order with their types, "x:*bf16 n_tokens:i32 scaling:fp32" */
    const char *constants; /* what it was compiled with, "R=16 DROPOUT=0 BLOCK_T=64" */
    int arch;              /* 90 for sm_90 */
    int is_ptx;            /* 1: code is PTX, 0: a cubin */
    const unsigned char *code;
} lora_fast_kernel;
/* Returns the embedded kernels and their number. It needs no driver. */
LORA_FAST_API const lora_fast_kernel *lora_fast_kernels(int *count);

/* Loads every kernel for a device (its ordinal; -1: that of the current context), so that later launches can be
   captured. It loads in the current context if that is on the device, else in the device's primary context, which must
   be in use (cudaFree(0) creates it), since what was loaded goes with it. On a device that runs the PTX alone the driver
   compiles all of it, which takes minutes once. */
LORA_FAST_API int lora_fast_load(int device);
/* Unloads all kernels, as does dlclose. No launch may be running or be captured in a graph that is still used. */
LORA_FAST_API int lora_fast_unload(void);

/* ---- The layer: y = x weightᵀ + bias + scaling s bᵀ with s = (keep∘x) aᵀ, and its gradients ----

   x (n_tokens, d_in), weight (d_out, d_in), bias (d_out) or NULL, a (r, d_in), b (d_out, r), s and ds (n_tokens, r),
   y and dy (n_tokens, d_out), dx (n_tokens, d_in); da and db have the shapes of a and b. Forward: project, then linear,
   or your own GEMM and add_to_y; save x and s. Backward, of at least one token: grad_s_b, grad_a, then grad_x, or your
   own GEMM and add_to_dx. */
typedef struct {
    size_t size;                /* sizeof(lora_fast_layer) */
    int n_tokens, d_in, d_out, r;
    lora_fast_dtype dtype;      /* of x, weight, bias, y and of dy, dx */
    lora_fast_dtype adapter;    /* of a, b, s and of da, db, ds: dtype or float32 */
    float scaling;              /* alpha / r; with dropout, times 1 / (1 - drop_level / 65536) */
    int drop_level;             /* round(65536 p) for dropout with probability p; 0: none */
    int64_t seed;               /* of the dropout mask; backward draws the mask again and needs the same seed */
    const int64_t *device_seed; /* NULL, or the address of a seed in device memory (a multiple of 8) that replaces seed.
                                   Kernels read it at every launch, so replays of a CUDA graph can have other masks */
    int64_t ld_x, ld_y;         /* elements from one row of x, of y to the next; 0: d_in, d_out. A slice of a fused qkv
                                   has the distance of the whole */
    int64_t ld_dx, ld_dy;       /* the same of dx and dy */
    int64_t ld_weight;          /* the same of weight */
    int accumulate;             /* 1: grad_a and grad_s_b add da and db to what is there; 0: they overwrite it */
} lora_fast_layer;

LORA_FAST_API int lora_fast_project(const lora_fast_layer *layer, const void *x, const void *a, void *s,
                                    lora_fast_stream stream);
LORA_FAST_API int lora_fast_linear(const lora_fast_layer *layer, const void *x, const void *weight, const void *bias,
                                   const void *s, const void *b, void *y, lora_fast_stream stream);
/* y += scaling s bᵀ, in place, with one rounding: the adapter behind your own GEMM, of quantised weights, too. */
LORA_FAST_API int lora_fast_add_to_y(const lora_fast_layer *layer, const void *s, const void *b, void *y,
                                     lora_fast_stream stream);

/* y += scaling (x aᵀ) bᵀ, the whole adapter in two launches behind your own GEMM, without dropout. Where n_tokens is so
   small that few programs would read x and a, as in decoding, d_in is split between programs. s is stored as by
   project. workspace may be NULL where the bytes that adapter_workspace stores are 0. */
LORA_FAST_API int lora_fast_adapter_workspace(const lora_fast_layer *layer, size_t *bytes);
LORA_FAST_API int lora_fast_add_adapter(const lora_fast_layer *layer, const void *x, const void *a, const void *b,
                                        void *s, void *y, void *workspace, lora_fast_stream stream);

/* Stores the bytes of workspace that grad_s_b and grad_a need on this device; they may share it. */
LORA_FAST_API int lora_fast_workspace(const lora_fast_layer *layer, size_t *bytes);
LORA_FAST_API int lora_fast_grad_s_b(const lora_fast_layer *layer, const void *dy, const void *s, const void *b,
                                     void *ds, void *db, void *workspace, lora_fast_stream stream);
LORA_FAST_API int lora_fast_grad_a(const lora_fast_layer *layer, const void *x, const void *ds, void *da,
                                   void *workspace, lora_fast_stream stream);
LORA_FAST_API int lora_fast_grad_x(const lora_fast_layer *layer, const void *dy, const void *weight, const void *ds,
                                   const void *a, void *dx, lora_fast_stream stream);
/* dx += keep∘(ds a), in place, with one rounding. */
LORA_FAST_API int lora_fast_add_to_dx(const lora_fast_layer *layer, const void *ds, const void *a, void *dx,
                                      lora_fast_stream stream);

typedef enum { LORA_FAST_FUSED, LORA_FAST_UPDATE } lora_fast_strategy;
/* Stores which is estimated to be faster on this device: lora_fast_linear (backward 1: lora_fast_grad_x), or cuBLAS and
   lora_fast_add_to_y (lora_fast_add_to_dx). It is the rule of the Python package, an estimate and no measurement. */
LORA_FAST_API int lora_fast_faster(const lora_fast_layer *layer, int backward, lora_fast_strategy *strategy);

/* ---- Several adapters in one batch: y[t] += scaling_k (x[t] a_kᵀ) b_kᵀ for every row t of adapter k ----

   Two launches serve all adapters of a layer, whose ranks may differ: batch_project, then batch_add_to_y. Their grids
   depend on n_rows and n_adapters alone, so a CUDA graph can be replayed after adapters, rows and ends have changed in
   device memory. */
typedef struct {
    const void *a, *b;  /* device addresses, a (r, d_in) and b (d_out, r) */
    int64_t r;          /* at least 1, at most the batch's */
    float scaling;
    int reserved;       /* 0 */
} lora_fast_adapter;

typedef struct {
    size_t size;                       /* sizeof(lora_fast_batch) */
    int n_rows, d_in, d_out;
    int n_adapters;                    /* at most 1024 */
    int r;                             /* at least the rank of every adapter; one of lora_fast_ranks */
    lora_fast_dtype dtype;             /* of x and y */
    lora_fast_dtype adapter;           /* of every a and b and of s: dtype or float32 */
    int64_t ld_x, ld_y;                /* as in lora_fast_layer */
    const lora_fast_adapter *adapters; /* n_adapters of them in device memory */
    const int32_t *rows;               /* in device memory: the numbers of the rows of x and y, sorted by adapter */
    const int32_t *ends;               /* in device memory (n_adapters): where each adapter's rows end in rows. Rows
                                          from the last end on belong to no adapter, and their y is not touched */
} lora_fast_batch;

/* Sorts rows by adapter, on the host: indices (n_rows) has the adapter of each row, -1 for none. rows (n_rows) and ends
   (n_adapters) are what the fields of lora_fast_batch need. */
LORA_FAST_API int lora_fast_sort_rows(int n_rows, int n_adapters, const int32_t *indices, int32_t *rows, int32_t *ends);
/* Checks the adapters of a batch, given their copy in host memory: addresses and ranks. */
LORA_FAST_API int lora_fast_check_adapters(const lora_fast_batch *batch, const lora_fast_adapter *adapters);
/* s (n_rows, r), in the order of rows; columns beyond an adapter's rank are 0. */
LORA_FAST_API int lora_fast_batch_project(const lora_fast_batch *batch, const void *x, void *s,
                                          lora_fast_stream stream);
LORA_FAST_API int lora_fast_batch_add_to_y(const lora_fast_batch *batch, const void *s, void *y,
                                           lora_fast_stream stream);

/* ---- The step: one launch for the adapters of the whole model ----

   A group is a table in device memory of the factors that a launch works on. Fill it once, for tensors that do not
   move. */
typedef struct {
    void *tensors[4];       /* device addresses of one shape and size: GRAM: p, g; STEP: p, g, m, v; TRANSFORM: p;
                               MERGE: weight, the residual (COMPENSATED; else the weight again), a, b */
    int64_t d;              /* b: d_out; a: d_in; MERGE: d_out */
    int64_t d_in;           /* MERGE only: the weight's row length */
    int is_a;               /* 1: the tensors are (r, d), like a; 0: (d, r), like b */
    int index;              /* its row in the launch's other arguments: the pair for GRAM and MERGE, else the factor, which
                               no other factor has */
} lora_fast_factor;

typedef enum { LORA_FAST_GRAM, LORA_FAST_STEP, LORA_FAST_TRANSFORM, LORA_FAST_MERGE } lora_fast_op;

typedef struct {
    size_t size;            /* sizeof(lora_fast_group) */
    lora_fast_op op;
    lora_fast_dtype dtype;  /* of p and g; MERGE: of the weights, with a and b in float32 */
    int r;                  /* of every factor, one of lora_fast_ranks */
    int n_factors;
    int n_rows;             /* rows of the launch's other arguments: every index is below it */
    int flat;               /* 1 for a STEP without matrices, scales, Grams and (of 16 bits) keys with additive, which is
                               elementwise work; else 0 */
    int n_programs, chunk;  /* filled in */
    int planned;            /* filled in: stands for the fields above, which must not change after the plan */
    size_t bytes;           /* filled in: size of the table */
    void *device;           /* the address of its copy on the device, which launches change (counters) */
} lora_fast_group;

/* Set size, op, dtype, r, n_factors, n_rows and flat; the function sets the other fields. */
LORA_FAST_API int lora_fast_plan(lora_fast_group *group, const lora_fast_factor *factors);
/* Writes the table to group->bytes bytes of host memory. Then copy them to the device and set group->device.

   The layout is that of kernels/pointer_table.py and kernels/pairs/add_low_rank.py:
   int64 entries[n_factors][8]: three addresses (GRAM: p; STEP: p, m, v; TRANSFORM: p), d, r, is_a, index, 0; for MERGE
   entries[n_factors][12]: four addresses, d, r, d_in, index, the strides of a and of b;
   int64 gradients[n_factors], only for GRAM and STEP: the addresses of g, padded to a multiple of 16 bytes;
   int32 counters[16 n_factors]: zero before and after every launch, so launches that share a group need one stream;
   int32 tiles[n_programs][2]: factor, chunk. */
LORA_FAST_API int lora_fast_fill(const lora_fast_group *group, const lora_fast_factor *factors, void *host);

/* Stores the bytes of workspace for the partial Grams of lora_fast_gram, or of lora_fast_adamw_step with grams. */
LORA_FAST_API int lora_fast_gram_workspace(const lora_fast_group *group, size_t *bytes);
/* GRAM: grams float32 (5, n_rows, r, r) = a aᵀ, bᵀb, da daᵀ, dbᵀdb, da aᵀ of every pair. */
LORA_FAST_API int lora_fast_gram(const lora_fast_group *group, float *grams, void *workspace, lora_fast_stream stream);

/* The operations of a step besides AdamW, in this order. NULL omits one. Row i belongs to the factor with index i; n is
   the group's n_rows. docs/engine.md lists the combinations that are built. */
typedef struct {
    size_t size;                    /* sizeof(lora_fast_work) */
    const float *additive;          /* (n): g += additive p */
    const float *matrices;          /* (n, r, r): g = M g for a, g M for b */
    const float *scale_p, *scale_g; /* (n, r), both or neither: p *= scale_p, g, m *= scale_g, v *= scale_g² */
    float *grams;                   /* (n, r, r): out, p pᵀ or pᵀp of the new p */
    const int64_t *keys;            /* (n): the new 16-bit p is rounded stochastically, by these keys (any numbers, another
                                       one for each factor) and the steps */
} lora_fast_work;
/* STEP: AdamW on every factor (p, g, m, v), in place; m and v are float32. hyper: double (n, 5), or (1, 5) for all
   (hyper_rows 1), of learning rate, beta1, beta2, eps, weight decay; steps: float (n), the steps taken, incremented
   here; both on the device. work NULL: AdamW alone. workspace: only with grams, which is possible up to r = 64. Above,
   call lora_fast_gram afterwards. */
LORA_FAST_API int lora_fast_adamw_step(const lora_fast_group *group, const double *hyper, int hyper_rows, float *steps,
                                       const lora_fast_work *work, void *workspace, lora_fast_stream stream);
/* TRANSFORM: p = M p for a, p M for b, in place; with add, p += M p, p M. matrices float32 (n, r, r). keys and steps
   (n): both NULL, or with add, 16-bit results are rounded stochastically, by the keys and steps of the STEP before. */
LORA_FAST_API int lora_fast_transform(const lora_fast_group *group, const float *matrices, int add,
                                      const int64_t *keys, const float *steps, lora_fast_stream stream);

typedef enum { LORA_FAST_NEAREST, LORA_FAST_STOCHASTIC, LORA_FAST_COMPENSATED } lora_fast_rounding;
/* MERGE: weight += b diag(scale) a for every layer, in place, rounded once, float32 weights always to nearest. No weight
   may be twice in a group. scale float32 (n, r). seed: for STOCHASTIC; device_seed replaces it where it is not NULL, as
   in lora_fast_layer. COMPENSATED: the rounding error is stored in the residuals, zero at first, for the next merge. */
LORA_FAST_API int lora_fast_merge(const lora_fast_group *group, const float *scale, lora_fast_rounding rounding,
                                  int64_t seed, const int64_t *device_seed, lora_fast_stream stream);

/* ---- The methods' r×r algebra: float32, all n pairs in one launch ----

   Results that a step takes have a row for each factor, the n rows for b, then the n rows for a. */

/* Computes iLoRA's step from the Grams of the factors after AdamW, ka and kb (n, r, r): matrices (2n, r, r), which
   lora_fast_transform adds. rho (n); lr_a, lr_b: one double each in device memory, such as a row of hyper; lam: λ. */
LORA_FAST_API int lora_fast_imbalance(int n, int r, const float *ka, const float *kb, const float *rho,
                                      const double *lr_a, const double *lr_b, float lam, float *matrices,
                                      lora_fast_stream stream);
/* Computes scale regularization's coefficients (2n), the additive of a step, from the Grams before it. entries_a and
   entries_b (n): the number of entries of each factor. */
LORA_FAST_API int lora_fast_scale_reg(int n, int r, const float *ka, const float *kb, const float *entries_a,
                                      const float *entries_b, float lam, float eps, float *coefficients,
                                      lora_fast_stream stream);
/* Stores the bytes of workspace of spd_solve, spd_inverse and small_inverse for n matrices: 0 up to r = 64. */
LORA_FAST_API int lora_fast_small_workspace(int n, int r, size_t *bytes);
/* Solves (matrices + damping I) x = rhs; matrices (n, r, r) symmetric positive definite, rhs and x (n, r, k), r up to
   256. info (n): 0, or the order of the first leading minor that is not positive, where x is NaN. */
LORA_FAST_API int lora_fast_spd_solve(int n, int r, int k, const float *matrices, const float *rhs, float damping,
                                      float *x, int32_t *info, void *workspace, lora_fast_stream stream);
/* Inverts Grams (n, r, r) plus damping I: ScaledAdamW's preconditioners. From the first two Grams of lora_fast_gram, as
   twice as many, it computes the matrices of a step: from a aᵀ for b, then from bᵀb for a. A Gram that rounding left
   indefinite gets r ε tr more damping. info as in spd_solve. */
LORA_FAST_API int lora_fast_spd_inverse(int n, int r, const float *matrices, float damping, float *inverses,
                                        int32_t *info, void *workspace, lora_fast_stream stream);
/* Inverts matrices (n, r, r) whose symmetric part is at least I. */
LORA_FAST_API int lora_fast_small_inverse(int n, int r, const float *matrices, float *inverses, void *workspace,
                                          lora_fast_stream stream);

/* Solves ScaLoRA's Hadamard system of every pair. grams: the result of lora_fast_gram, (5, n, r, r), r up to 128 and
   n r² a multiple of 4. x (n, 2r): alpha² then beta² for kappa = 1; active (n, 2r): 0 where a coordinate keeps scale 1;
   info (n): 0 where the unconstrained optimum is valid. */
typedef enum { LORA_FAST_NNLS, LORA_FAST_PAPER, LORA_FAST_COLUMN, LORA_FAST_SCALAR } lora_fast_solver;
LORA_FAST_API int lora_fast_scalora_workspace(int n, int r, size_t *bytes);
LORA_FAST_API int lora_fast_scalora_solve(int n, int r, const float *grams, lora_fast_solver solver, float *x,
                                          unsigned char *active, int32_t *info, void *workspace,
                                          lora_fast_stream stream);
/* Computes the scales of lora_fast_adamw_step (scale_p, scale_g: (2n, r), n rows for b, then n for a) and of
   lora_fast_merge (residual_scale: (n, r)) from x and active. kappa: one double; scaling (n): alpha / r of each pair;
   all on the device. Scales are clamped to low … high. */
LORA_FAST_API int lora_fast_scalora_scales(int n, int r, const float *x, const unsigned char *active,
                                           const double *kappa, const float *scaling, float low, float high,
                                           float *scale_p, float *scale_g, float *residual_scale,
                                           lora_fast_stream stream);

/* ---- NB-LoRA's Cayley transform: three launches each way for the adapters of the whole model ----

   Forward, from free_a (r, d_in) and free_b (d_out, r), r at most d_in: a (r, d_in), b (d_out, r) with its columns
   times scale, and inverse (r, r). Backward, from inverse and the gradients of a and b: the gradients of free_a,
   free_b and scale. All float32, except inverse, float64, and the free parameters and their gradients. */
typedef struct {
    const void *free_a, *free_b;
    const float *scale;           /* (r); all 1 where the adapter has no scale */
    double *inverse;              /* forward writes it, backward reads it */
    void *result_a, *result_b;    /* out: forward a and b, backward the gradients of free_a and free_b */
    float *result_scale;          /* out, backward only: the gradient of scale */
    const float *grad_a, *grad_b; /* backward only: the gradients of a and b */
    int64_t d_in, d_out;
} lora_fast_cayley_pair;

typedef struct {
    size_t size;                  /* sizeof(lora_fast_cayley_group) */
    lora_fast_dtype dtype;        /* of the free parameters and their gradients */
    int r;                        /* of every pair, one of lora_fast_ranks */
    int n_pairs;
    int backward;                 /* 0: forward, 1: backward */
    int n_programs[2], chunk[2];  /* filled in */
    int planned;                  /* filled in: stands for the fields above, which must not change after the plan */
    size_t bytes;                 /* filled in: size of the table */
    size_t workspace;             /* filled in: bytes of workspace that lora_fast_cayley needs */
    void *device;                 /* the address of the table's copy on the device, which launches change */
} lora_fast_cayley_group;

/* Set size, dtype, r, n_pairs and backward; the function sets the other fields. Then fill, copy and set device as for
   lora_fast_fill, once, for tensors that do not move. Launches that share a group need one stream. */
LORA_FAST_API int lora_fast_cayley_plan(lora_fast_cayley_group *group, const lora_fast_cayley_pair *pairs);
LORA_FAST_API int lora_fast_cayley_fill(const lora_fast_cayley_group *group, const lora_fast_cayley_pair *pairs,
                                        void *host);
LORA_FAST_API int lora_fast_cayley(const lora_fast_cayley_group *group, void *workspace, lora_fast_stream stream);

#ifdef __cplusplus
}
#endif
#endif

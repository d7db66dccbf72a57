/* lora_fast without Python: the kernels of LoRA layers and of their optimizer step, for CUDA engines in C or C++.

   Every function takes device addresses, sizes and a stream (CUstream and cudaStream_t are the same pointer), launches
   on the current context's device and returns without waiting. It returns 0, a negative lora_fast_error, or a positive
   CUresult; lora_fast_error_name returns the name of each. The library allocates nothing. Where a launch needs
   workspace, another function returns its size. The same inputs give the same bits. The driver (libcuda.so.1) is opened
   at the first launch, and a kernel is loaded at its first launch, so launch once before you capture a CUDA graph.

   The library contains the kernels that it was built for. Archs, dtypes and ranks are options of the build, and
   lora_fast_kernels lists the kernels. Matrices are row-major without gaps. Addresses of tensors and of workspace are
   multiples of 16 bytes, d_in and d_out are multiples of 16 (n_tokens is any number); otherwise functions return
   LORA_FAST_MISALIGNED. Not verified on a GPU. */

#ifndef LORA_FAST_H
#define LORA_FAST_H

#include <stddef.h>
#include <stdint.h>

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
    LORA_FAST_MISALIGNED = -3,   /* an address or a row length that is not a multiple of 16 */
    LORA_FAST_NO_ARCH = -4,      /* nothing was built for this device's arch */
    LORA_FAST_NO_KERNEL = -5,    /* not built for this rank, dtype or combination (see lora_fast_kernels), or built for
                                    sm_80 where this device has less shared memory: build for its own arch, too */
    LORA_FAST_INTERNAL = -6      /* a kernel has a parameter that the library does not pass: a bug */
} lora_fast_error;

typedef enum { LORA_FAST_FLOAT32, LORA_FAST_FLOAT16, LORA_FAST_BFLOAT16 } lora_fast_dtype;

typedef struct CUstream_st *lora_fast_stream;

/* Returns the name of a status: "LORA_FAST_NO_DRIVER", "CUDA_ERROR_NO_DEVICE". */
LORA_FAST_API const char *lora_fast_error_name(int error);

/* One embedded kernel. */
typedef struct {
    const char *key;           /* kernel, op, dtype, rank, options: "lora_project_kernel project bfloat16 r16 …" */
    const char *params;        /* its arguments in order, "x:p n_tokens:i scaling:f seed:l" */
    int arch;                  /* 90 for sm_90 */
    const unsigned char *cubin;
} lora_fast_kernel;

/* Returns the embedded kernels and their number. It needs no driver. */
LORA_FAST_API const lora_fast_kernel *lora_fast_kernels(int *count);

/* ---- The layer: y = x weightᵀ + bias + scaling s bᵀ with s = (keep∘x) aᵀ, and its gradients ----

   x (n_tokens, d_in), weight (d_out, d_in), bias (d_out) or NULL, a (r, d_in), b (d_out, r), s and ds (n_tokens, r),
   y and dy (n_tokens, d_out), dx (n_tokens, d_in); da and db have the shapes of a and b. Forward: project, linear; save
   x and s. Backward, of at least one token: grad_s_b, grad_a, grad_x. */
typedef struct {
    int n_tokens, d_in, d_out, r;
    lora_fast_dtype dtype;      /* of x, weight, bias, y and of dy, dx */
    lora_fast_dtype adapter;    /* of a, b, s and of da, db, ds: dtype or float32 */
    float scaling;              /* alpha / r; with dropout, times 1 / (1 - drop_level / 65536) */
    int drop_level;             /* round(65536 p) for dropout with probability p; 0: none */
    int64_t seed;               /* of the dropout mask; backward draws the mask again and needs the same seed */
    const int64_t *device_seed; /* NULL, or the address of a seed in device memory (a multiple of 8) that replaces seed.
                                   Kernels read it at every launch, so replays of a CUDA graph can have other masks */
} lora_fast_layer;

LORA_FAST_API int lora_fast_project(const lora_fast_layer *layer, const void *x, const void *a, void *s,
                                    lora_fast_stream stream);
LORA_FAST_API int lora_fast_linear(const lora_fast_layer *layer, const void *x, const void *weight, const void *bias,
                                   const void *s, const void *b, void *y, lora_fast_stream stream);

/* Stores the bytes of workspace that grad_s_b and grad_a need on this device; they may share it. */
LORA_FAST_API int lora_fast_workspace(const lora_fast_layer *layer, size_t *bytes);
LORA_FAST_API int lora_fast_grad_s_b(const lora_fast_layer *layer, const void *dy, const void *s, const void *b,
                                     void *ds, void *db, void *workspace, lora_fast_stream stream);
LORA_FAST_API int lora_fast_grad_a(const lora_fast_layer *layer, const void *x, const void *ds, void *da,
                                   void *workspace, lora_fast_stream stream);
LORA_FAST_API int lora_fast_grad_x(const lora_fast_layer *layer, const void *dy, const void *weight, const void *ds,
                                   const void *a, void *dx, lora_fast_stream stream);

/* ---- The step: one launch for the adapters of the whole model ----

   A group is a table in device memory of the factors that a launch works on. Fill it once, for tensors that do not
   move. */
typedef struct {
    const void *tensors[4]; /* device addresses of one shape and size: GRAM: p, g; STEP: p, g, m, v; TRANSFORM: p;
                               MERGE: weight, the residual (COMPENSATED; else the weight again), a, b */
    int64_t d;              /* b: d_out; a: d_in; MERGE: d_out */
    int64_t d_in;           /* MERGE only: the weight's row length */
    int is_a;               /* 1: the tensors are (r, d), like a; 0: (d, r), like b */
    int index;              /* its row in the launch's other arguments: the pair for GRAM and MERGE, else the factor */
} lora_fast_factor;

typedef enum { LORA_FAST_GRAM, LORA_FAST_STEP, LORA_FAST_TRANSFORM, LORA_FAST_MERGE } lora_fast_op;

typedef struct {
    lora_fast_op op;
    lora_fast_dtype dtype;  /* of p and g; MERGE: of the weights, with a and b in float32 */
    int r;                  /* of every factor */
    int n_factors;
    int flat;               /* 1 for a STEP without matrices, scales and Grams, which is elementwise work; else 0 */
    int n_programs, chunk;  /* filled in */
    size_t bytes;           /* filled in: size of the table */
    const void *device;     /* the address of its copy on the device */
} lora_fast_group;

/* Set op, dtype, r, n_factors and flat; the function sets the other fields. */
LORA_FAST_API int lora_fast_plan(lora_fast_group *group, const lora_fast_factor *factors);
/* Writes the table to group->bytes bytes of host memory. Then copy them to the device and set group->device.

   The layout is that of kernels/pointer_table.py and kernels/pairs/add_low_rank.py:
   int64 entries[n_factors][8]: three addresses (GRAM: p; STEP: p, m, v; TRANSFORM: p), d, r, is_a, index, 0; for MERGE
   entries[n_factors][12]: four addresses, d, r, d_in, index, the strides of a and of b;
   int64 gradients[n_factors], only for GRAM and STEP: the addresses of g, padded to a multiple of 16 bytes;
   int32 counters[16 n_factors]: zero before and after every launch, so launches that share a group need one stream;
   int32 tiles[n_programs][2]: factor, chunk. */
LORA_FAST_API int lora_fast_fill(const lora_fast_group *group, const lora_fast_factor *factors, void *host);

/* Returns the bytes of workspace for the partial Grams of lora_fast_gram, or of lora_fast_adamw_step with grams. */
LORA_FAST_API size_t lora_fast_gram_workspace(const lora_fast_group *group);
/* GRAM: grams float32 (5, n_pairs, r, r) = a aᵀ, bᵀb, da daᵀ, dbᵀdb, da aᵀ of every pair. */
LORA_FAST_API int lora_fast_gram(const lora_fast_group *group, int n_pairs, float *grams, void *workspace,
                                 lora_fast_stream stream);

/* The operations of a step besides AdamW, in this order. NULL omits one. Row i belongs to the factor with index i. */
typedef struct {
    const float *additive;         /* (n): g += additive p */
    const float *matrices;         /* (n, r, r): g = M g for a, g M for b */
    const float *scale_p, *scale_g; /* (n, r), both or neither: p *= scale_p, g, m *= scale_g, v *= scale_g² */
    float *grams;                  /* (n, r, r): out, p pᵀ or pᵀp of the new p */
} lora_fast_work;
/* STEP: AdamW on every factor (p, g, m, v), in place; m and v are float32. hyper: double (n, 5), or (1, 5) for all, of
   learning rate, beta1, beta2, eps, weight decay; steps: float (n), the steps taken, incremented here; both on the
   device. work NULL: AdamW alone. workspace: only with grams, which is possible up to r = 64. Above, call
   lora_fast_gram afterwards. */
LORA_FAST_API int lora_fast_adamw_step(const lora_fast_group *group, const double *hyper, int hyper_rows, float *steps,
                                       const lora_fast_work *work, void *workspace, lora_fast_stream stream);
/* TRANSFORM: p = M p for a, p M for b, in place; with add, p += M p, p M. matrices float32 (n, r, r). */
LORA_FAST_API int lora_fast_transform(const lora_fast_group *group, const float *matrices, int add,
                                      lora_fast_stream stream);

typedef enum { LORA_FAST_NEAREST, LORA_FAST_STOCHASTIC, LORA_FAST_COMPENSATED } lora_fast_rounding;
/* MERGE: weight += b diag(scale) a for every layer, in place, rounded once. scale float32 (n, r). seed: for
   STOCHASTIC. COMPENSATED: the rounding error is stored in the residuals, zero at first, for the next merge. */
LORA_FAST_API int lora_fast_merge(const lora_fast_group *group, const float *scale, lora_fast_rounding rounding,
                                  int64_t seed, lora_fast_stream stream);

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
    lora_fast_dtype dtype;        /* of the free parameters and their gradients */
    int r;                        /* of every pair */
    int n_pairs;
    int backward;                 /* 0: forward, 1: backward */
    int n_programs[2], chunk[2];  /* filled in */
    size_t bytes;                 /* filled in: size of the table */
    size_t workspace;             /* filled in: bytes of workspace that lora_fast_cayley needs */
    const void *device;           /* the address of the table's copy on the device */
} lora_fast_cayley_group;

/* Set dtype, r, n_pairs and backward; the function sets the other fields. Then fill, copy and set device as for
   lora_fast_fill, once, for tensors that do not move. Launches that share a group need one stream. */
LORA_FAST_API int lora_fast_cayley_plan(lora_fast_cayley_group *group, const lora_fast_cayley_pair *pairs);
LORA_FAST_API int lora_fast_cayley_fill(const lora_fast_cayley_group *group, const lora_fast_cayley_pair *pairs,
                                        void *host);
LORA_FAST_API int lora_fast_cayley(const lora_fast_cayley_group *group, void *workspace, lora_fast_stream stream);

/* ---- Small matrices: float32, a batch in one launch ---- */

/* Returns the bytes of workspace of spd_solve and small_inverse for n matrices: 0 up to r = 64. */
LORA_FAST_API size_t lora_fast_small_workspace(int n, int r);
/* Solves (matrices + damping I) x = rhs; matrices (n, r, r) symmetric positive definite, rhs and x (n, r, k), r up to
   256. info (n): 0, or the order of the first leading minor that is not positive, where x is NaN. */
LORA_FAST_API int lora_fast_spd_solve(int n, int r, int k, const float *matrices, const float *rhs, float damping,
                                      float *x, int32_t *info, void *workspace, lora_fast_stream stream);
/* Inverts matrices (n, r, r) whose symmetric part is at least I. */
LORA_FAST_API int lora_fast_small_inverse(int n, int r, const float *matrices, float *inverses, void *workspace,
                                          lora_fast_stream stream);

/* Solves ScaLoRA's Hadamard system of every pair. grams: the result of lora_fast_gram, (5, n, r, r), r up to 128.
   x (n, 2r): alpha² then beta² for kappa = 1; active (n, 2r): 0 where a coordinate keeps scale 1; info (n): 0 where the
   unconstrained optimum is valid. */
typedef enum { LORA_FAST_NNLS, LORA_FAST_PAPER, LORA_FAST_COLUMN, LORA_FAST_SCALAR } lora_fast_solver;
LORA_FAST_API size_t lora_fast_scalora_workspace(int n, int r);
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

#ifdef __cplusplus
}
#endif
#endif

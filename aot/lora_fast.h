/* lora_fast without Python: the kernels of LoRA layers and of their optimizer step, for CUDA engines in C or C++.

   Every function takes device addresses, sizes and a stream (CUstream and cudaStream_t are the same pointer), launches
   on the current context's device and returns at once. It returns 0, a negative lora_fast_error, or a positive
   CUresult; lora_fast_error_name has the name of each. Nothing is allocated: where a function needs memory of its own,
   it says how much. The same inputs give the same bits. The driver (libcuda.so.1) is opened at the first launch, and a
   kernel is loaded at its first: launch once before you capture a CUDA graph.

   The library holds the kernels that it was built for: archs, dtypes and ranks are options of the build, and
   lora_fast_kernels lists what is there. Matrices are row-major without gaps. Addresses of tensors and of memory are
   multiples of 16 bytes, d_in and d_out are multiples of 16 (n_tokens is any number): LORA_FAST_MISALIGNED otherwise.
   Not verified on a GPU. */

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
    LORA_FAST_NO_DRIVER = -1,    /* libcuda.so.1 is not here, or older than CUDA 12 */
    LORA_FAST_BAD_ARGUMENT = -2, /* a size below its least, a dtype that does not fit, a null pointer */
    LORA_FAST_MISALIGNED = -3,   /* an address or a row length that is no multiple of 16 */
    LORA_FAST_NO_ARCH = -4,      /* nothing was built for this device's arch */
    LORA_FAST_NO_KERNEL = -5,    /* not built for this rank, dtype or combination: see lora_fast_kernels; or of sm_80,
                                    where this device has less shared memory: build for its own arch, too */
    LORA_FAST_INTERNAL = -6      /* the library does not fit its own kernels: a bug */
} lora_fast_error;

typedef enum { LORA_FAST_FLOAT32, LORA_FAST_FLOAT16, LORA_FAST_BFLOAT16 } lora_fast_dtype;

typedef struct CUstream_st *lora_fast_stream;

/* The name of what a function returned: "LORA_FAST_NO_DRIVER", "CUDA_ERROR_NO_DEVICE". */
LORA_FAST_API const char *lora_fast_error_name(int error);

/* One embedded kernel. */
typedef struct {
    const char *key;           /* what it computes: "lora_project_kernel bfloat16 r16 adapter=float32 …" */
    const char *params;        /* its arguments in order, "x:p n_tokens:i scaling:f seed:l" */
    int arch;                  /* 90 for sm_90 */
    const unsigned char *cubin;
} lora_fast_kernel;

/* The embedded kernels, `count` of them. Needs no driver. */
LORA_FAST_API const lora_fast_kernel *lora_fast_kernels(int *count);

/* ---- The layer: y = x weightᵀ + bias + scaling s bᵀ with s = (keep∘x) aᵀ, and its gradients ----

   x (n_tokens, d_in), weight (d_out, d_in), bias (d_out) or NULL, a (r, d_in), b (d_out, r), s and ds (n_tokens, r),
   y and dy (n_tokens, d_out), dx (n_tokens, d_in), da and db as a and b. Forward: project, linear; save x and s.
   Backward, of at least one token: grad_s_b, grad_a, grad_x. */
typedef struct {
    int n_tokens, d_in, d_out, r;
    lora_fast_dtype dtype;      /* of x, weight, bias, y and of dy, dx */
    lora_fast_dtype adapter;    /* of a, b, s and of da, db, ds: dtype or float32 */
    float scaling;              /* alpha / r; with dropout, times 1 / (1 - drop_level / 65536) */
    int drop_level;             /* round(65536 p) for dropout with probability p; 0: none */
    int64_t seed;               /* of the dropout mask, which is drawn again in backward: the same there */
    const int64_t *device_seed; /* NULL, or where the seed is in device memory (a multiple of 8), in place of seed: read
                                   at every launch, so that replays of a CUDA graph can have other masks */
} lora_fast_layer;

LORA_FAST_API int lora_fast_project(const lora_fast_layer *layer, const void *x, const void *a, void *s,
                                    lora_fast_stream stream);
LORA_FAST_API int lora_fast_linear(const lora_fast_layer *layer, const void *x, const void *weight, const void *bias,
                                   const void *s, const void *b, void *y, lora_fast_stream stream);

/* Bytes of device memory that grad_s_b and grad_a need, one after the other, on this device. */
LORA_FAST_API int lora_fast_workspace(const lora_fast_layer *layer, size_t *bytes);
LORA_FAST_API int lora_fast_grad_s_b(const lora_fast_layer *layer, const void *dy, const void *s, const void *b,
                                     void *ds, void *db, void *workspace, lora_fast_stream stream);
LORA_FAST_API int lora_fast_grad_a(const lora_fast_layer *layer, const void *x, const void *ds, void *da,
                                   void *workspace, lora_fast_stream stream);
LORA_FAST_API int lora_fast_grad_x(const lora_fast_layer *layer, const void *dy, const void *weight, const void *ds,
                                   const void *a, void *dx, lora_fast_stream stream);

/* ---- The step: one launch for the adapters of the whole model ----

   A group is a table in device memory: which factors a launch works on. Fill it once, for tensors that stay where they
   are: */
typedef struct {
    const void *tensors[4]; /* device addresses of one shape and size: GRAM: p, g; STEP: p, g, m, v; TRANSFORM: p;
                               MERGE: weight, weight again (or, compensated, the residual), a, b */
    int64_t d;              /* b: d_out; a: d_in; MERGE: d_out */
    int64_t d_in;           /* MERGE alone: the weight's row length */
    int is_a;               /* 1: the tensors are (r, d), as a is; 0: (d, r), as b is */
    int index;              /* its row in what else the launch takes: the pair for GRAM and MERGE, else the factor */
} lora_fast_factor;

typedef enum { LORA_FAST_GRAM, LORA_FAST_STEP, LORA_FAST_TRANSFORM, LORA_FAST_MERGE } lora_fast_op;

typedef struct {
    lora_fast_op op;
    lora_fast_dtype dtype;  /* of p and g; MERGE: of the weights, with a and b in float32 */
    int r;                  /* of every factor */
    int n_factors;
    int flat;               /* STEP without matrices, scales and Grams: set to 1 for elementwise work */
    int n_programs, chunk;  /* filled in */
    size_t bytes;           /* filled in: size of the table */
    const void *device;     /* where you copied it */
} lora_fast_group;

/* Set op, dtype, r, n_factors and flat; group->bytes comes back. */
LORA_FAST_API int lora_fast_plan(lora_fast_group *group, const lora_fast_factor *factors);
/* Then write the table to group->bytes of host memory, copy them to the device, and set group->device.

   Layout, as kernels/pointer_table.py and merge.py have it: int64 entries[n_factors][8] = three addresses (of GRAM p, of STEP
   p, m, v, of TRANSFORM p), d, r, is_a, index, 0, or of MERGE [12] = four addresses, d, r, d_in, index, strides of a and
   of b; of GRAM and STEP int64 addresses of g, to a multiple of 16 bytes; int32 counters[16 n_factors], zero before and
   after every launch, so launches that share a group go to one stream; int32 tiles[n_programs][2] = factor, chunk. */
LORA_FAST_API int lora_fast_fill(const lora_fast_group *group, const lora_fast_factor *factors, void *host);

/* Bytes of device memory for the partial Grams of lora_fast_gram, or of lora_fast_adamw_step with grams. */
LORA_FAST_API size_t lora_fast_gram_workspace(const lora_fast_group *group);
/* GRAM: grams float32 (5, n_pairs, r, r) = a aᵀ, bᵀb, da daᵀ, dbᵀdb, da aᵀ of every pair. */
LORA_FAST_API int lora_fast_gram(const lora_fast_group *group, int n_pairs, float *grams, void *workspace,
                                 lora_fast_stream stream);

/* What a step does besides AdamW, in this order; NULL: not done. Row i belongs to the factor with index i. */
typedef struct {
    const float *additive;         /* (n): g += additive p */
    const float *matrices;         /* (n, r, r): g = M g for a, g M for b */
    const float *scale_p, *scale_g; /* (n, r), both or none, per rank: p *= scale_p, g, m *= scale_g, v *= scale_g² */
    float *grams;                  /* (n, r, r): out, p pᵀ or pᵀp of the new p */
} lora_fast_work;
/* STEP: AdamW on every factor (p, g, m, v), in place; m and v are float32. hyper: double (n, 5), or (1, 5) for all, of
   learning rate, beta1, beta2, eps, weight decay; steps: float (n), steps taken, counted up here; both on the device.
   work NULL: AdamW alone. workspace: with grams. Grams up to r = 64; above, lora_fast_gram afterwards. */
LORA_FAST_API int lora_fast_adamw_step(const lora_fast_group *group, const double *hyper, int hyper_rows, float *steps,
                                       const lora_fast_work *work, void *workspace, lora_fast_stream stream);
/* TRANSFORM: p = M p for a, p M for b, in place; add: p += instead. matrices float32 (n, r, r). */
LORA_FAST_API int lora_fast_transform(const lora_fast_group *group, const float *matrices, int add,
                                      lora_fast_stream stream);

typedef enum { LORA_FAST_NEAREST, LORA_FAST_STOCHASTIC, LORA_FAST_COMPENSATED } lora_fast_rounding;
/* MERGE: weight += b diag(scale) a for every layer, in place, rounded once. scale float32 (n, r). seed: of STOCHASTIC.
   COMPENSATED: what rounding lost stays in the residuals, zero at first, for the next merge. */
LORA_FAST_API int lora_fast_merge(const lora_fast_group *group, const float *scale, lora_fast_rounding rounding,
                                  int64_t seed, lora_fast_stream stream);

/* ---- NB-LoRA's Cayley transform: three launches each way for the adapters of the whole model ----

   Forward, from free_a (r, d_in) and free_b (d_out, r), r at most d_in: a (r, d_in), b (d_out, r) with its columns
   times scale, and inverse (r, r). Backward, from inverse and the gradients of a and b: those of free_a, free_b and
   scale. float32, but for the free parameters and their gradients. */
typedef struct {
    const void *free_a, *free_b;
    const float *scale;           /* (r): of 1, where there is none */
    float *inverse;               /* forward writes it, backward reads it */
    void *made_a, *made_b;        /* out: forward a and b, backward the gradients of free_a and free_b */
    float *made_scale;            /* out, backward alone: the gradient of scale */
    const float *grad_a, *grad_b; /* backward alone: of a and b */
    int64_t d_in, d_out;
} lora_fast_cayley_pair;

typedef struct {
    lora_fast_dtype dtype;        /* of the free parameters and their gradients */
    int r;                        /* of every pair */
    int n_pairs;
    int backward;                 /* 0: forward, 1: backward */
    int n_programs[2], chunk[2];  /* filled in */
    size_t bytes;                 /* filled in: size of the table */
    size_t workspace;             /* filled in: bytes of device memory that lora_fast_cayley needs */
    const void *device;           /* where you copied the table */
} lora_fast_cayley_group;

/* Set dtype, r, n_pairs and backward; the rest comes back. Then fill, copy and set device as for lora_fast_fill: once,
   for tensors that stay where they are. Launches that share a group go to one stream. */
LORA_FAST_API int lora_fast_cayley_plan(lora_fast_cayley_group *group, const lora_fast_cayley_pair *pairs);
LORA_FAST_API int lora_fast_cayley_fill(const lora_fast_cayley_group *group, const lora_fast_cayley_pair *pairs,
                                        void *host);
LORA_FAST_API int lora_fast_cayley(const lora_fast_cayley_group *group, void *workspace, lora_fast_stream stream);

/* ---- Small matrices: float32, a batch in one launch ---- */

/* Bytes of device memory for spd_solve and small_inverse of n matrices: 0 up to r = 64. */
LORA_FAST_API size_t lora_fast_small_workspace(int n, int r);
/* x with (matrices + damping I) x = rhs; matrices (n, r, r) symmetric positive definite, rhs and x (n, r, k), r up to
   256. info (n): 0, or the order of the first minor that is not positive; that x is NaN. */
LORA_FAST_API int lora_fast_spd_solve(int n, int r, int k, const float *matrices, const float *rhs, float damping,
                                      float *x, int32_t *info, void *workspace, lora_fast_stream stream);
/* Inverses of (n, r, r) whose symmetric part is at least I. */
LORA_FAST_API int lora_fast_small_inverse(int n, int r, const float *matrices, float *inverses, void *workspace,
                                          lora_fast_stream stream);

/* ScaLoRA's Hadamard system of every pair. grams: as lora_fast_gram leaves them, (5, n, r, r), r up to 128. x (n, 2r):
   alpha² then beta² for kappa = 1; alive (n, 2r): 0 where a coordinate has no say; info (n): 0 where the unconstrained
   optimum is valid. */
typedef enum { LORA_FAST_NNLS, LORA_FAST_PAPER, LORA_FAST_COLUMN, LORA_FAST_SCALAR } lora_fast_solver;
LORA_FAST_API size_t lora_fast_scalora_workspace(int n, int r);
LORA_FAST_API int lora_fast_scalora_solve(int n, int r, const float *grams, lora_fast_solver solver, float *x,
                                          unsigned char *alive, int32_t *info, void *workspace,
                                          lora_fast_stream stream);
/* From x and alive: what lora_fast_adamw_step takes (scale_p, scale_g: (2n, r), b's rows first), and lora_fast_merge
   (rest: (n, r)). kappa: one double; scaling (n): alpha / r of each pair; all on the device. Scales stay within low …
   high. */
LORA_FAST_API int lora_fast_scalora_scales(int n, int r, const float *x, const unsigned char *alive,
                                           const double *kappa, const float *scaling, float low, float high,
                                           float *scale_p, float *scale_g, float *rest, lora_fast_stream stream);

#ifdef __cplusplus
}
#endif
#endif

/* Internal declarations: the table that build.py generates, and the functions that find and launch its kernels. */

#ifndef LORA_FAST_KERNELS_H
#define LORA_FAST_KERNELS_H

#include "lora_fast.h"

#define API LORA_FAST_API
#define CALL(expression)                                                                                               \
    do {                                                                                                               \
        int status_ = (expression);                                                                                    \
        if (status_) return status_;                                                                                   \
    } while (0)

/* Constants that a kernel was compiled with; 0 where it has no such constant. */
struct tile {
    int BLOCK, BLOCK_T, BLOCK_OUT, BLOCK_IN, BLOCK_R, BLOCK_D, BLOCK_K, CHUNK;
};

struct kernel {
    const char *name; /* in the cubin */
    unsigned threads, shared;
    struct tile tile;
};

/* Both tables have one row for each kernel, in the same order. */
extern const lora_fast_kernel lora_fast_public_table[];
extern const struct kernel lora_fast_table[];
extern const int lora_fast_table_length;
/* SHORT, PROGRAMS, SPLIT_STEPS and PARTIAL_NUMBERS of kernels/tiles.py. */
extern const int lora_fast_short_tokens, lora_fast_programs, lora_fast_split_steps, lora_fast_partial_numbers;
/* IN_REGISTERS of kernels/linalg/spd.py, the largest rank whose matrix fits in registers, and SLOTS, the number of
   programs above, each with a scratch matrix. */
extern const int lora_fast_in_registers, lora_fast_slots;

/* An argument of a launch, matched by name to the kernel's parameters. Arguments that the kernel lacks are ignored. */
struct argument {
    const char *name;
    const void *pointer;
    int64_t integer;
    float number;
};
#define POINTER(value) {.name = #value, .pointer = (value)}
#define INTEGER(value) {.name = #value, .integer = (value)}
#define NAMED_POINTER(key, value) {.name = key, .pointer = (value)}
#define NAMED_INTEGER(key, value) {.name = key, .integer = (value)}
#define NAMED_NUMBER(key, value) {.name = key, .number = (value)}
#define END {.name = NULL}

/* Finds the row of the kernel with this key (printf) for the current device. */
int lora_fast_find(int *row, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* Finds a row of any arch, without a driver, for constants that all archs share. */
int lora_fast_find_any(int *row, const char *format, ...) __attribute__((format(printf, 2, 3)));
int lora_fast_launch(int row, int64_t grid_x, int64_t grid_y, int64_t grid_z, const struct argument *arguments,
                     lora_fast_stream stream);
int lora_fast_multiprocessors(int *count);

/* Returns LORA_FAST_MISALIGNED or LORA_FAST_BAD_ARGUMENT (a null pointer) for the first address that does not fit. */
int lora_fast_check_addresses(int count, const void *const *addresses);
#define CHECK_ADDRESSES(...)                                                                                           \
    lora_fast_check_addresses(sizeof((const void *[]){__VA_ARGS__}) / sizeof(void *), (const void *[]){__VA_ARGS__})
/* Returns "bfloat16" and the like, or NULL for a number that is not a dtype. */
const char *lora_fast_dtype_name(lora_fast_dtype dtype);

static inline int64_t divide_up(int64_t number, int64_t by) { return (number + by - 1) / by; }

/* Returns the smallest of least, 2 least, 4 least, … that is at least r. */
static inline int lora_fast_rank_class(int r, int least) {
    while (least < r) least *= 2;
    return least;
}

#endif

/* NB-LoRA's Cayley transform. Tables and address lists have the layout of kernels/pointer_table.py and
   kernels/cayley/addresses.py; grids are those of kernels/cayley/{sums,algebra,products}.py. */

#include "kernels.h"

#include <string.h>

enum { COLUMNS = 8, COUNTERS = 16, LARGEST_RANK = 256 };
enum { FORWARD_ROWS = 4, BACKWARD_ROWS = 7 }; /* addresses of a pair in the list of cayley/addresses.py */
enum { SUMS, PRODUCTS }; /* the launches on all factors, each with its own tiles */

static size_t aligned(size_t bytes) { return (bytes + 15) / 16 * 16; }

static int slots(const lora_fast_cayley_group *group) {
    return group->n_pairs < lora_fast_slots ? group->n_pairs : lora_fast_slots;
}

/* The parts of a table in memory that starts at `at`. */
struct parts {
    int64_t *entries, *addresses;
    int32_t *counters, *tiles[2];
    char *end;
};

static struct parts parts_of(const lora_fast_cayley_group *group, const void *at) {
    size_t n = group->n_pairs, rows = group->backward ? BACKWARD_ROWS : FORWARD_ROWS;
    char *next = (char *)at;
    struct parts parts;
    parts.entries = (int64_t *)next, next += 2 * n * COLUMNS * sizeof(int64_t);
    parts.addresses = (int64_t *)next, next += aligned(rows * n * sizeof(int64_t));
    parts.counters = (int32_t *)next, next += 2 * n * COUNTERS * sizeof(int32_t);
    for (int i = 0; i < 2; i++) {
        parts.tiles[i] = (int32_t *)next;
        next += aligned(group->n_programs[i] * 2 * sizeof(int32_t));
    }
    parts.end = next;
    return parts;
}

/* The parts of the workspace, which the launches need besides. */
struct workspace {
    char *totals, *partials, *multipliers, *scratch, *end;
};

static struct workspace workspace_of(const lora_fast_cayley_group *group, const void *at) {
    size_t square = (size_t)group->r * group->r * sizeof(double);
    size_t side = lora_fast_rank_class(group->r, 16), slot = slots(group) * side * side * sizeof(double);
    size_t n = group->n_pairs;
    struct workspace parts = {.totals = (char *)at};
    parts.partials = parts.totals + aligned(2 * n * square);
    parts.multipliers = parts.partials + aligned(group->n_programs[SUMS] * square);
    parts.scratch = parts.multipliers + aligned((group->backward ? 3 : 2) * n * square);
    parts.end = parts.scratch + (group->backward ? 3 : 1) * slot;
    return parts;
}

/* The key of the group's kernels after their names. */
#define KEY " cayley %s r%d backward=%d"
#define OF_KEY lora_fast_dtype_name(group->dtype), group->r, group->backward

static int check(const lora_fast_cayley_group *group) {
    if (!lora_fast_dtype_name(group->dtype) || group->r < 1 || group->r > LARGEST_RANK) return LORA_FAST_BAD_ARGUMENT;
    return group->n_pairs < 1 || (unsigned)group->backward > 1 ? LORA_FAST_BAD_ARGUMENT : LORA_FAST_OK;
}

API int lora_fast_cayley_plan(lora_fast_cayley_group *group, const lora_fast_cayley_pair *pairs) {
    int rows[2];
    int64_t programs[2] = {0, 0};
    CALL(check(group));
    CALL(lora_fast_find_any(&rows[SUMS], "lora_cayley_sums_kernel" KEY, OF_KEY));
    CALL(lora_fast_find_any(&rows[PRODUCTS], "lora_cayley_products_kernel" KEY, OF_KEY));
    for (int i = 0; i < 2; i++) group->chunk[i] = lora_fast_table[rows[i]].tile.CHUNK;
    for (int i = 0; i < group->n_pairs; i++) {
        const lora_fast_cayley_pair *pair = &pairs[i];
        if (pair->d_in < group->r || pair->d_out < 1) return LORA_FAST_BAD_ARGUMENT;
        if (pair->d_in % 16 || pair->d_out % 16) return LORA_FAST_MISALIGNED;
        CALL(CHECK_ADDRESSES(pair->free_a, pair->free_b, pair->scale, pair->inverse, pair->result_a, pair->result_b));
        if (group->backward) CALL(CHECK_ADDRESSES(pair->grad_a, pair->grad_b, pair->result_scale));
        for (int j = 0; j < 2; j++)
            programs[j] += divide_up(pair->d_in, group->chunk[j]) + divide_up(pair->d_out, group->chunk[j]);
    }
    for (int i = 0; i < 2; i++) {
        if (programs[i] > INT32_MAX) return LORA_FAST_BAD_ARGUMENT;
        group->n_programs[i] = (int)programs[i];
    }
    group->bytes = (size_t)parts_of(group, NULL).end;
    group->workspace = (size_t)workspace_of(group, NULL).end;
    return LORA_FAST_OK;
}

API int lora_fast_cayley_fill(const lora_fast_cayley_group *group, const lora_fast_cayley_pair *pairs, void *host) {
    int n = group->n_pairs;
    struct parts parts = parts_of(group, host);
    CALL(check(group));
    memset(host, 0, group->bytes);
    int32_t *tiles[] = {parts.tiles[SUMS], parts.tiles[PRODUCTS]};
    for (int i = 0; i < 2 * n; i++) { /* all a, then all b */
        const lora_fast_cayley_pair *pair = &pairs[i % n];
        int64_t d = i < n ? pair->d_in : pair->d_out;
        int64_t row[COLUMNS] = {(int64_t)(uintptr_t)(i < n ? pair->free_a : pair->free_b), 0, 0, d, group->r, i < n, i};
        memcpy(parts.entries + COLUMNS * i, row, sizeof row);
        for (int kind = 0; kind < 2; kind++)
            for (int64_t j = 0; j < divide_up(d, group->chunk[kind]); j++)
                *tiles[kind]++ = i, *tiles[kind]++ = (int32_t)j;
    }
    for (int i = 0; i < n; i++) {
        const lora_fast_cayley_pair *pair = &pairs[i];
        const void *forward[] = {pair->result_a, pair->result_b, pair->inverse, pair->scale};
        const void *backward[] = {pair->result_a, pair->result_b, pair->result_scale, pair->grad_a,
                                  pair->grad_b, pair->inverse, pair->scale};
        int rows = group->backward ? BACKWARD_ROWS : FORWARD_ROWS;
        for (int row = 0; row < rows; row++)
            parts.addresses[row * n + i] = (int64_t)(uintptr_t)(group->backward ? backward : forward)[row];
    }
    return LORA_FAST_OK;
}

/* Launches the sums or the products. */
static int launch_on_factors(const lora_fast_cayley_group *group, int kind, int row, int64_t blocks,
                             const struct workspace *memory, lora_fast_stream stream) {
    struct parts parts = parts_of(group, group->device);
    return lora_fast_launch(row, group->n_programs[kind], blocks, 1,
                            (struct argument[]){NAMED_POINTER("entries", parts.entries),
                                                NAMED_POINTER("tiles", parts.tiles[kind]),
                                                NAMED_POINTER("addresses", parts.addresses),
                                                NAMED_POINTER("counters", parts.counters),
                                                NAMED_POINTER("partials", memory->partials),
                                                NAMED_POINTER("totals", memory->totals),
                                                NAMED_POINTER("multipliers", memory->multipliers),
                                                NAMED_INTEGER("n", group->n_pairs), END},
                            stream);
}

API int lora_fast_cayley(const lora_fast_cayley_group *group, void *workspace, lora_fast_stream stream) {
    int sums, algebra, products;
    CALL(check(group));
    CALL(CHECK_ADDRESSES(group->device, workspace));
    CALL(lora_fast_find(&sums, "lora_cayley_sums_kernel" KEY, OF_KEY));
    CALL(lora_fast_find(&algebra, "lora_cayley_%s_kernel" KEY, group->backward ? "backward" : "inverse", OF_KEY));
    CALL(lora_fast_find(&products, "lora_cayley_products_kernel" KEY, OF_KEY));
    struct parts parts = parts_of(group, group->device);
    struct workspace memory = workspace_of(group, workspace);
    int64_t blocks = divide_up(group->r, lora_fast_table[sums].tile.BLOCK_R);
    CALL(launch_on_factors(group, SUMS, sums, blocks * blocks, &memory, stream));
    CALL(lora_fast_launch(algebra, slots(group), 1, 1,
                          (struct argument[]){NAMED_POINTER("entries", parts.entries),
                                              NAMED_POINTER("addresses", parts.addresses),
                                              NAMED_POINTER("totals", memory.totals),
                                              NAMED_POINTER("multipliers", memory.multipliers),
                                              NAMED_POINTER("scratch", memory.scratch),
                                              NAMED_INTEGER("n", group->n_pairs), END},
                          stream));
    return launch_on_factors(group, PRODUCTS, products, 1, &memory, stream);
}

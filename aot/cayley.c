/* NB-LoRA's Cayley transform: tables as kernels/pointer_table.py and moving.py build them, grids as kernels/cayley/__init__.py and the
   files beside it choose them. */

#include "kernels.h"

#include <string.h>

enum { COLUMNS = 8, COUNTERS = 16, LARGEST_RANK = 256 };
enum { FORWARD_ROWS = 4, BACKWARD_ROWS = 7 }; /* tensors that moving.py would list, of each pair */
enum { SUMS, PRODUCTS }; /* the launches that go through all factors, each with tiles of its own */

static size_t aligned(size_t bytes) { return (bytes + 15) / 16 * 16; }

static int slots(const lora_fast_cayley_group *group) {
    return group->n_pairs < lora_fast_slots ? group->n_pairs : lora_fast_slots;
}

/* The parts of a table that starts at `at`. */
struct parts {
    int64_t *entries, *moving;
    int32_t *counters, *tiles[2];
    char *end;
};

static struct parts parts_of(const lora_fast_cayley_group *group, const void *at) {
    size_t n = group->n_pairs, rows = group->backward ? BACKWARD_ROWS : FORWARD_ROWS;
    char *next = (char *)at;
    struct parts parts;
    parts.entries = (int64_t *)next, next += 2 * n * COLUMNS * sizeof(int64_t);
    parts.moving = (int64_t *)next, next += aligned(rows * n * sizeof(int64_t));
    parts.counters = (int32_t *)next, next += 2 * n * COUNTERS * sizeof(int32_t);
    for (int i = 0; i < 2; i++) {
        parts.tiles[i] = (int32_t *)next;
        next += aligned(group->n_programs[i] * 2 * sizeof(int32_t));
    }
    parts.end = next;
    return parts;
}

/* The launches' own memory, likewise. */
struct scratch {
    char *totals, *partials, *times, *matrices, *scratch, *end;
};

static struct scratch scratch_of(const lora_fast_cayley_group *group, const void *at) {
    size_t square = (size_t)group->r * group->r, sum = group->backward ? sizeof(float) : sizeof(double);
    size_t side = lora_fast_rank_class(group->r, 16), slot = slots(group) * side * side, n = group->n_pairs;
    struct scratch parts = {.totals = (char *)at};
    parts.partials = parts.totals + aligned(2 * n * square * sum);
    parts.times = parts.partials + aligned(group->n_programs[SUMS] * square * sum);
    parts.matrices = parts.times + aligned((group->backward ? 3 : 2) * n * square * sizeof(float));
    parts.scratch = parts.matrices + (group->backward ? 0 : slot * sizeof(double));
    parts.end = parts.scratch + (group->backward ? 3 : 2) * slot * sizeof(float);
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
    CALL(lora_fast_find_any(&rows[SUMS], "lora_cayley_inner_kernel" KEY, OF_KEY));
    CALL(lora_fast_find_any(&rows[PRODUCTS], "lora_cayley_outer_kernel" KEY, OF_KEY));
    for (int i = 0; i < 2; i++) group->chunk[i] = lora_fast_table[rows[i]].tile.CHUNK;
    for (int i = 0; i < group->n_pairs; i++) {
        const lora_fast_cayley_pair *pair = &pairs[i];
        if (pair->d_in < group->r || pair->d_out < 1) return LORA_FAST_BAD_ARGUMENT;
        if (pair->d_in % 16 || pair->d_out % 16) return LORA_FAST_MISALIGNED;
        CALL(CHECK_ADDRESSES(pair->free_a, pair->free_b, pair->scale, pair->inverse, pair->made_a, pair->made_b));
        if (group->backward) CALL(CHECK_ADDRESSES(pair->grad_a, pair->grad_b, pair->made_scale));
        for (int j = 0; j < 2; j++)
            programs[j] += divide_up(pair->d_in, group->chunk[j]) + divide_up(pair->d_out, group->chunk[j]);
    }
    for (int i = 0; i < 2; i++) {
        if (programs[i] > INT32_MAX) return LORA_FAST_BAD_ARGUMENT;
        group->n_programs[i] = (int)programs[i];
    }
    group->bytes = (size_t)parts_of(group, NULL).end;
    group->workspace = (size_t)scratch_of(group, NULL).end;
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
            for (int64_t j = 0; j < divide_up(d, group->chunk[kind]); j++) *tiles[kind]++ = i, *tiles[kind]++ = (int32_t)j;
    }
    for (int i = 0; i < n; i++) {
        const lora_fast_cayley_pair *pair = &pairs[i];
        const void *forward[] = {pair->made_a, pair->made_b, pair->inverse, pair->scale};
        const void *backward[] = {pair->made_a, pair->made_b, pair->made_scale, pair->grad_a,
                                  pair->grad_b, pair->inverse, pair->scale};
        int rows = group->backward ? BACKWARD_ROWS : FORWARD_ROWS;
        for (int row = 0; row < rows; row++)
            parts.moving[row * n + i] = (int64_t)(uintptr_t)(group->backward ? backward : forward)[row];
    }
    return LORA_FAST_OK;
}

/* One of the launches that go through all factors. */
static int through_factors(const lora_fast_cayley_group *group, int kind, int row, int64_t blocks,
                           const struct scratch *own, lora_fast_stream stream) {
    struct parts parts = parts_of(group, group->device);
    return lora_fast_launch(row, group->n_programs[kind], blocks, 1,
                            (struct argument[]){NAMED_POINTER("entries", parts.entries),
                                                NAMED_POINTER("tiles", parts.tiles[kind]),
                                                NAMED_POINTER("moving", parts.moving),
                                                NAMED_POINTER("counters", parts.counters),
                                                NAMED_POINTER("partials", own->partials),
                                                NAMED_POINTER("totals", own->totals),
                                                NAMED_POINTER("factors", own->times),
                                                NAMED_INTEGER("n", group->n_pairs), END},
                            stream);
}

API int lora_fast_cayley(const lora_fast_cayley_group *group, void *workspace, lora_fast_stream stream) {
    int sums, middle, products;
    CALL(check(group));
    CALL(CHECK_ADDRESSES(group->device, workspace));
    CALL(lora_fast_find(&sums, "lora_cayley_inner_kernel" KEY, OF_KEY));
    CALL(lora_fast_find(&middle, "lora_cayley_%s_kernel" KEY, group->backward ? "backward" : "inverse", OF_KEY));
    CALL(lora_fast_find(&products, "lora_cayley_outer_kernel" KEY, OF_KEY));
    struct parts parts = parts_of(group, group->device);
    struct scratch own = scratch_of(group, workspace);
    int64_t blocks = divide_up(group->r, lora_fast_table[sums].tile.BLOCK_R);
    CALL(through_factors(group, SUMS, sums, blocks * blocks, &own, stream));
    CALL(lora_fast_launch(middle, slots(group), 1, 1,
                          (struct argument[]){NAMED_POINTER("entries", parts.entries),
                                              NAMED_POINTER("moving", parts.moving),
                                              NAMED_POINTER("totals", own.totals), NAMED_POINTER("factors", own.times),
                                              NAMED_POINTER("matrices", own.matrices),
                                              NAMED_POINTER("scratch", own.scratch),
                                              NAMED_INTEGER("n", group->n_pairs), END},
                          stream));
    return through_factors(group, PRODUCTS, products, 1, &own, stream);
}

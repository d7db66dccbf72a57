/* SPDX-License-Identifier: Apache-2.0

   NB-LoRA's Cayley transform. Tables and address lists have the layout of kernels/pointer_table.py and
   kernels/cayley/addresses.py; grids are those of kernels/cayley/{sums,algebra,products}.py. */

#include "kernels.h"

#include <string.h>

enum { COLUMNS = 8, COUNTERS = 16 };
enum { MOST_PAIRS = 1 << 25 };                /* kernels multiply a factor's number by COUNTERS in 32 bits */
enum { FORWARD_ROWS = 4, BACKWARD_ROWS = 7 }; /* addresses of a pair in the list of cayley/addresses.py */
enum { SUMS, PRODUCTS };                      /* the launches on all factors, each with its own tiles */

static size_t aligned(size_t bytes) { return (bytes + 15) / 16 * 16; }

static int slots(const lora_fast_cayley_group *group) {
    return group->n_pairs < lora_fast_slots ? group->n_pairs : lora_fast_slots;
}

/* The parts of a table in memory, as offsets from its start. */
struct parts {
    size_t entries, addresses, counters, tiles[2], end;
};

static struct parts parts_of(const lora_fast_cayley_group *group) {
    size_t n = (size_t)group->n_pairs, rows = group->backward ? BACKWARD_ROWS : FORWARD_ROWS;
    struct parts parts = {.addresses = 2 * n * COLUMNS * sizeof(int64_t)};
    parts.counters = parts.addresses + aligned(rows * n * sizeof(int64_t));
    parts.tiles[0] = parts.counters + 2 * n * COUNTERS * sizeof(int32_t);
    parts.tiles[1] = parts.tiles[0] + aligned((size_t)group->n_programs[0] * 2 * sizeof(int32_t));
    parts.end = parts.tiles[1] + aligned((size_t)group->n_programs[1] * 2 * sizeof(int32_t));
    return parts;
}

/* The parts of the workspace, which the launches need besides. */
struct workspace {
    size_t totals, partials, multipliers, scratch, end;
};

static struct workspace workspace_of(const lora_fast_cayley_group *group) {
    size_t square = (size_t)(group->r * group->r) * sizeof(double), n = (size_t)group->n_pairs;
    size_t side = (size_t)lora_fast_rank_class(group->r, 16);
    size_t slot = (size_t)slots(group) * side * side * sizeof(double);
    struct workspace parts = {.partials = aligned(2 * n * square)};
    parts.multipliers = parts.partials + aligned((size_t)group->n_programs[SUMS] * square);
    parts.scratch = parts.multipliers + aligned((group->backward ? 3 : 2) * n * square);
    parts.end = parts.scratch + (group->backward ? 3 : 1) * slot;
    return parts;
}

#define CAYLEY_KEY(kind) KEY(kind, group->dtype, group->dtype, group->r, group->backward ? BACKWARD : 0)

static int check(const char *function, const lora_fast_cayley_group *group) {
    CALL(lora_fast_check_struct(function, "group", group, sizeof *group));
    CHECK_DTYPE_IN(function, group->dtype, "group.dtype");
    CHECK_RANK_IN(function, group->r, "group.r");
    CHECK_IN(function, group->n_pairs >= 1 && group->n_pairs <= MOST_PAIRS, "group.n_pairs", "1 to 2^25",
             group->n_pairs);
    CHECK_IN(function, (unsigned)group->backward <= 1, "group.backward", "0 or 1", group->backward);
    /* the products' kernel counts in 32 bits */
    CHECK_IN(function, 3 * (int64_t)group->n_pairs * group->r * group->r <= INT32_MAX, "group.n_pairs",
             "3 n_pairs r^2 at most 2^31 - 1", group->n_pairs);
    return LORA_FAST_OK;
}

static int check_pair(const char *function, const lora_fast_cayley_group *group, const lora_fast_cayley_pair *pair) {
    CHECK_IN(function, pair->d_in >= group->r && pair->d_in <= LARGEST_SIZE, "pairs.d_in", "group.r to 2^30",
             pair->d_in);
    CHECK_SIZE_IN(function, pair->d_out, "pairs.d_out", 1);
    CHECK_MULTIPLE_IN(function, pair->d_in, "pairs.d_in");
    CHECK_MULTIPLE_IN(function, pair->d_out, "pairs.d_out");
    const void *const addresses[] = {pair->free_a,   pair->free_b, pair->scale,  pair->inverse,     pair->result_a,
                                     pair->result_b, pair->grad_a, pair->grad_b, pair->result_scale};
    return lora_fast_check_addresses(function,
                                     "pairs.free_a, pairs.free_b, pairs.scale, pairs.inverse, pairs.result_a, "
                                     "pairs.result_b, pairs.grad_a, pairs.grad_b, pairs.result_scale",
                                     group->backward ? 9 : 6, addresses);
}

/* Checks the pairs and sets the fields that are filled in. */
static int plan(const char *function, lora_fast_cayley_group *group, const lora_fast_cayley_pair *pairs) {
    const struct tile *tiles[2];
    int64_t programs[2] = {0, 0};
    CALL(lora_fast_tile_of(function, &tiles[SUMS], CAYLEY_KEY(CAYLEY_SUMS)));
    CALL(lora_fast_tile_of(function, &tiles[PRODUCTS], CAYLEY_KEY(CAYLEY_PRODUCTS)));
    for (int i = 0; i < group->n_pairs; i++) {
        CALL(check_pair(function, group, &pairs[i]));
        for (int j = 0; j < 2; j++) {
            programs[j] += divide_up(pairs[i].d_in, tiles[j]->CHUNK) + divide_up(pairs[i].d_out, tiles[j]->CHUNK);
            CHECK_IN(function, programs[j] <= LARGEST_SIZE, "pairs", "at most 2^30 chunks", programs[j]);
        }
    }
    for (int j = 0; j < 2; j++) group->n_programs[j] = (int)programs[j], group->chunk[j] = tiles[j]->CHUNK;
    group->bytes = parts_of(group).end;
    group->workspace = workspace_of(group).end;
    return LORA_FAST_OK;
}

static int stamp(const lora_fast_cayley_group *group) {
    return lora_fast_stamp(4, (const int[]){(int)group->dtype, group->r, group->n_pairs, group->backward});
}

API int lora_fast_cayley_plan(lora_fast_cayley_group *group, const lora_fast_cayley_pair *pairs) {
    CALL(check(__func__, group));
    CHECK_POINTER(pairs);
    lora_fast_cayley_group planned = *group;
    CALL(plan(__func__, &planned, pairs));
    planned.planned = stamp(&planned);
    *group = planned;
    return LORA_FAST_OK;
}

/* Writes the numbers of the factors and of the chunks that each program of a launch works on. */
static void fill_tiles(const lora_fast_cayley_group *group, const lora_fast_cayley_pair *pairs, int kind,
                       int32_t *tiles) {
    int n = group->n_pairs;
    for (int i = 0; i < 2 * n; i++) { /* all a, then all b */
        int64_t d = i < n ? pairs[i].d_in : pairs[i - n].d_out;
        for (int64_t j = 0; j < divide_up(d, group->chunk[kind]); j++) *tiles++ = i, *tiles++ = (int32_t)j;
    }
}

static int64_t number(const void *address) { return (int64_t)(uintptr_t)address; }

API int lora_fast_cayley_fill(const lora_fast_cayley_group *group, const lora_fast_cayley_pair *pairs, void *host) {
    CALL(check(__func__, group));
    CHECK_POINTER(pairs);
    CHECK_POINTER(host);
    CHECK_MULTIPLE_OF_8(host);
    lora_fast_cayley_group planned = *group;
    CALL(plan(__func__, &planned, pairs));
    CHECK(!memcmp(planned.n_programs, group->n_programs, sizeof planned.n_programs) &&
              !memcmp(planned.chunk, group->chunk, sizeof planned.chunk) && planned.bytes == group->bytes,
          "group.bytes", "what lora_fast_cayley_plan sets for these pairs", group->bytes);
    int n = group->n_pairs;
    struct parts parts = parts_of(group);
    int64_t *entries = host, *addresses = (int64_t *)((char *)host + parts.addresses);
    memset(host, 0, group->bytes);
    for (int i = 0; i < n; i++) {
        const lora_fast_cayley_pair *pair = &pairs[i];
        const int64_t a[COLUMNS] = {number(pair->free_a), 0, 0, pair->d_in, group->r, 1, i};
        const int64_t b[COLUMNS] = {number(pair->free_b), 0, 0, pair->d_out, group->r, 0, n + i};
        memcpy(entries + COLUMNS * (int64_t)i, a, sizeof a);
        memcpy(entries + COLUMNS * ((int64_t)n + i), b, sizeof b);
        const void *forward[FORWARD_ROWS] = {pair->result_a, pair->result_b, pair->inverse, pair->scale};
        const void *backward[BACKWARD_ROWS] = {pair->result_a, pair->result_b, pair->result_scale, pair->grad_a,
                                               pair->grad_b, pair->inverse, pair->scale};
        for (int row = 0; row < (group->backward ? BACKWARD_ROWS : FORWARD_ROWS); row++)
            addresses[row * (int64_t)n + i] = number((group->backward ? backward : forward)[row]);
    }
    for (int kind = 0; kind < 2; kind++)
        fill_tiles(group, pairs, kind, (int32_t *)((char *)host + parts.tiles[kind]));
    return LORA_FAST_OK;
}

API int lora_fast_cayley(const lora_fast_cayley_group *group, void *workspace, lora_fast_stream stream) {
    struct launch sums, algebra, products;
    CALL(check(__func__, group));
    CALL(lora_fast_check_addresses(__func__, "group.device, workspace", 2,
                                   (const void *[]){group->device, workspace}));
    PREPARE(&sums, CAYLEY_KEY(CAYLEY_SUMS));
    PREPARE(&algebra, CAYLEY_KEY(group->backward ? CAYLEY_BACKWARD : CAYLEY_INVERSE));
    PREPARE(&products, CAYLEY_KEY(CAYLEY_PRODUCTS));
    const struct launch *launches[] = {&sums, &products};
    for (int i = 0; i < 2; i++) {
        CHECK(group->chunk[i] == launches[i]->tile->CHUNK, "group.chunk", "what lora_fast_cayley_plan sets",
              group->chunk[i]);
        CHECK(group->n_programs[i] >= 2 * group->n_pairs && group->n_programs[i] <= LARGEST_SIZE, "group.n_programs",
              "what lora_fast_cayley_plan sets", group->n_programs[i]);
    }
    CHECK(group->bytes == parts_of(group).end, "group.bytes", "what lora_fast_cayley_plan sets", group->bytes);
    CHECK(group->planned == stamp(group), "group.planned",
          "the dtype, r, n_pairs and backward that lora_fast_cayley_plan was given", group->planned);
    int64_t blocks = divide_up(group->r, sums.tile->BLOCK_R);
    SET_GRID(&sums, group->n_programs[SUMS], blocks * blocks, 1);
    SET_GRID(&algebra, slots(group), 1, 1);
    SET_GRID(&products, group->n_programs[PRODUCTS], 1, 1);
    struct parts parts = parts_of(group);
    struct workspace memory = workspace_of(group);
    const char *table = group->device, *work = workspace;
    union value values[N_PARAMETERS] = {
        [P_entries] = {table}, [P_addresses] = {table + parts.addresses}, [P_counters] = {table + parts.counters},
        [P_tiles] = {table + parts.tiles[SUMS]}, [P_totals] = {work}, [P_partials] = {work + memory.partials},
        [P_multipliers] = {work + memory.multipliers}, [P_scratch] = {work + memory.scratch},
        [P_n] = {.i = group->n_pairs},
    };
    CALL(lora_fast_submit(&sums, values, NULL, stream));
    CALL(lora_fast_submit(&algebra, values, NULL, stream));
    values[P_tiles].p = table + parts.tiles[PRODUCTS];
    return lora_fast_submit(&products, values, NULL, stream);
}

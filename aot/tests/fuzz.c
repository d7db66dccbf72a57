/* SPDX-License-Identifier: Apache-2.0

   Calls every function of lora_fast.h with random arguments, valid and hostile, against the stub of the driver:

       fuzz [calls] [seed]

   It is built with sanitizers, from the library's sources (tests/CMakeLists.txt). A call that fails must have launched
   nothing, must leave its results as they were and must say why; one that succeeds must leave the message. Every host
   pointer that is not NULL is valid, as the header asks. Device addresses are any numbers, for nobody reads them. */

#include "lora_fast.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern int stub_arch, stub_noting, stub_fail_after, stub_retained;
extern unsigned long long stub_launches, stub_loads, stub_unloads;
extern const char *stub_failed;

enum { SECONDS = 300, NEWER = 4096 + 64, COUNT = 24, MOST_BYTES = 1 << 22, STATUSES = 9 };

static uint64_t state;
static int hostility; /* one argument of this many is hostile; 0: none */
static const char *current;
static int left_message; /* a call that prepares arguments has failed */

static uint64_t draw(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}
static int below(int n) { return (int)(draw() % (unsigned)n); }
static int hostile(void) { return hostility && below(hostility) == 0; }
#define ONE_OF(...) ((const int64_t[]){__VA_ARGS__}[below(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t))])

static void fail(const char *what) {
    fprintf(stderr, "fuzz: %s: %s; the message is \"%s\"\n", current, what, lora_fast_error_message());
    abort();
}

/* ---- Arguments */

static int integer(int valid) {
    if (!hostile()) return valid;
    return (int)ONE_OF(0, -1, -16, 1, 15, INT_MIN, INT_MAX, INT_MAX - 15, 1 << 30, (1 << 30) + 16, (int)draw());
}
static int64_t wide(int64_t valid) {
    return hostile() ? ONE_OF(-1, -16, 8, INT64_MIN, INT64_MAX, INT64_MAX - 15, 1ll << 31, (int64_t)draw()) : valid;
}
static int flag(void) { return hostile() ? (int)ONE_OF(-1, 2, INT_MAX) : below(2); }
static int width(void) { return integer(16 * (1 + below(below(8) ? 100 : 1 << 26))); }
static int count(int most) { return integer(1 + below(below(8) ? most : 1 << 30)); }
static int some(const int *numbers, int n) { return integer(numbers[below(n)]); }
static int rank(void) {
    int n;
    const int *ranks = lora_fast_ranks(&n);
    return some(ranks, n);
}
static lora_fast_dtype dtype(void) {
    int n;
    const lora_fast_dtype *dtypes = lora_fast_dtypes(&n);
    return hostile() ? (lora_fast_dtype)ONE_OF(-1, 3, INT_MAX, INT_MIN) : dtypes[below(n)];
}
static void *address(void) {
    if (!hostile()) return (void *)(uintptr_t)(16 * (1 + draw() % (1ull << 44)));
    return (void *)(uintptr_t)ONE_OF(0, 8, 24, -16, -1, 1ll << 62);
}
static void *optional(void) { return below(2) ? NULL : address(); }
static void *of_8(void) { return hostile() ? (void *)4 : (void *)(uintptr_t)(8 * (draw() % (1 << 30))); }
static float real(void) { return (float)ONE_OF(0, 1, 2, -1) / 4; }
static lora_fast_stream stream(void) { return (lora_fast_stream)(uintptr_t)(8 * below(3)); }

/* Room for a struct of a newer header, whose later fields may be set. The size is usually right. */
static void *structure(void *room, size_t size) {
    memset(room, hostile() ? below(256) : 0, size + NEWER);
    size_t wrong[] = {0, size - 8, size + 8, size + NEWER - 64, SIZE_MAX, 1};
    *(size_t *)room = hostile() ? wrong[below(6)] : size;
    if (hostile()) ((char *)room)[size + below(NEWER)] = 1;
    return room;
}
#define STRUCT(type, name)                                                                                             \
    static char room[sizeof(type) + NEWER] __attribute__((aligned(16)));                                               \
    type *name = structure(room, sizeof(type))
#define OR_NULL(pointer) (hostile() ? NULL : (pointer))

static lora_fast_layer *layer(void) {
    STRUCT(lora_fast_layer, layer);
    layer->n_tokens = below(8) ? count(5000) : integer(0), layer->d_in = width(), layer->d_out = width();
    layer->r = rank(), layer->dtype = dtype();
    layer->adapter = hostile() ? dtype() : below(2) ? layer->dtype : LORA_FAST_FLOAT32;
    layer->scaling = real(), layer->drop_level = below(2) ? 0 : integer(below(65537)), layer->seed = (int64_t)draw();
    layer->device_seed = of_8(), layer->accumulate = flag();
    int64_t *distances[] = {&layer->ld_x, &layer->ld_y, &layer->ld_dx, &layer->ld_dy, &layer->ld_weight};
    for (int i = 0; i < 5; i++) *distances[i] = below(3) ? 0 : wide(16ll * below(1 << 21));
    return OR_NULL(layer);
}

static lora_fast_batch *batch(void) {
    STRUCT(lora_fast_batch, batch);
    batch->n_rows = below(8) ? count(5000) : integer(0), batch->n_adapters = count(COUNT);
    if (batch->n_adapters > COUNT && batch->n_adapters <= 1024) batch->n_adapters = COUNT;
    batch->d_in = width(), batch->d_out = width(), batch->r = rank(), batch->dtype = dtype();
    batch->adapter = hostile() ? dtype() : below(2) ? batch->dtype : LORA_FAST_FLOAT32;
    batch->ld_x = below(3) ? 0 : wide(16ll * below(1 << 21)), batch->ld_y = below(3) ? 0 : wide(16ll * below(1 << 21));
    batch->adapters = address(), batch->rows = address(), batch->ends = address();
    return OR_NULL(batch);
}

static const lora_fast_adapter *adapters(void) {
    static lora_fast_adapter adapters[COUNT];
    for (int i = 0; i < COUNT; i++)
        adapters[i] = (lora_fast_adapter){address(), address(), wide(1 + below(8)), real(), 0};
    return OR_NULL(adapters);
}

/* A number of rows of a host array that has COUNT of them, or one that is refused. */
static int rows_of_array(void) {
    return hostile() ? (int)ONE_OF(0, -1, INT_MIN, INT_MAX, INT_MAX - 63) : 1 + below(COUNT);
}

static const lora_fast_factor *factors(lora_fast_op op, int n_rows) {
    static lora_fast_factor factors[COUNT];
    for (int i = 0; i < COUNT; i++) {
        int is_gram = op == LORA_FAST_GRAM, row = is_gram ? i / 2 : i; /* another one for each factor */
        factors[i] = (lora_fast_factor){.d = width(), .d_in = op == LORA_FAST_MERGE ? width() : 0};
        factors[i].is_a = is_gram ? i % 2 : flag(), factors[i].index = integer(n_rows > 0 ? row % n_rows : 0);
        for (int j = 0; j < 4; j++) factors[i].tensors[j] = address();
    }
    return OR_NULL(factors);
}

/* A group that was planned, if its fields allow it. */
static lora_fast_group *group(lora_fast_op op, int flat) {
    STRUCT(lora_fast_group, group);
    group->op = hostile() ? (lora_fast_op)ONE_OF(-1, 4, INT_MAX, below(4)) : op;
    group->dtype = below(4) ? dtype() : LORA_FAST_FLOAT32, group->r = rank();
    group->n_factors = rows_of_array(), group->n_rows = below(4) ? COUNT : count(COUNT), group->flat = hostile() ? flag() : flat;
    left_message |= lora_fast_plan(group, factors(op, group->n_rows));
    group->device = address();
    if (hostile()) group->n_programs = integer(0);
    if (hostile()) group->chunk = integer(0);
    return OR_NULL(group);
}

static const lora_fast_cayley_pair *pairs(void) {
    static lora_fast_cayley_pair pairs[COUNT];
    for (int i = 0; i < COUNT; i++)
        pairs[i] = (lora_fast_cayley_pair){
            address(), address(), address(), address(), address(), address(), address(), address(), address(),
            256 + (width() & ~1023), width(),
        };
    return OR_NULL(pairs);
}

static lora_fast_cayley_group *cayley_group(void) {
    STRUCT(lora_fast_cayley_group, group);
    group->dtype = below(4) ? dtype() : LORA_FAST_FLOAT32, group->r = rank(), group->n_pairs = rows_of_array();
    group->backward = flag();
    left_message |= lora_fast_cayley_plan(group, pairs());
    group->device = address();
    if (hostile()) group->n_programs[below(2)] = integer(0);
    if (hostile()) group->chunk[below(2)] = integer(0);
    return OR_NULL(group);
}

/* ---- Results in host memory, which a call that fails may not change */

static size_t bytes;
static lora_fast_strategy strategy;
enum { UNTOUCHED = 77 };

static size_t *stored(void) { return bytes = UNTOUCHED, OR_NULL(&bytes); }

static int unless_changed(int status) {
    if (status && bytes != UNTOUCHED) fail("failed and stored a size");
    return status;
}

/* ---- Calls */

#define RUN(name, ...)                                                                                                 \
    static int run_##name(void) { return lora_fast_##name(__VA_ARGS__); }

RUN(project, layer(), address(), address(), address(), stream())
RUN(linear, layer(), address(), address(), optional(), address(), address(), address(), stream())
RUN(add_to_y, layer(), address(), address(), address(), stream())
RUN(add_adapter, layer(), address(), address(), address(), address(), address(), address(), stream())
RUN(grad_s_b, layer(), address(), address(), address(), address(), address(), address(), stream())
RUN(grad_a, layer(), address(), address(), address(), address(), stream())
RUN(grad_x, layer(), address(), address(), address(), address(), address(), stream())
RUN(add_to_dx, layer(), address(), address(), address(), stream())
RUN(batch_project, batch(), address(), address(), stream())
RUN(batch_add_to_y, batch(), address(), address(), stream())
RUN(imbalance, count(COUNT), rank(), address(), address(), address(), of_8(), of_8(), real(), address(), stream())
RUN(scale_reg, count(COUNT), rank(), address(), address(), address(), address(), real(), real(), address(), stream())
RUN(spd_solve, count(COUNT), rank(), count(300), address(), address(), real(), address(), address(), address(),
    stream())
RUN(spd_inverse, count(COUNT), rank(), address(), real(), address(), address(), address(), stream())
RUN(small_inverse, count(COUNT), rank(), address(), address(), address(), stream())
RUN(scalora_solve, count(COUNT), rank(), address(), (lora_fast_solver)integer(below(4)), address(), address(),
    address(), address(), stream())
RUN(scalora_scales, count(COUNT), rank(), address(), address(), address(), address(), real(), real(), address(),
    address(), address(), stream())
RUN(gram, group(LORA_FAST_GRAM, 0), address(), address(), stream())
RUN(merge, group(LORA_FAST_MERGE, 0), address(), (lora_fast_rounding)integer(below(3)), (int64_t)draw(), of_8(),
    stream())
RUN(cayley, cayley_group(), address(), stream())
RUN(unload)

static int run_workspace(void) { return unless_changed(lora_fast_workspace(layer(), stored())); }
static int run_adapter_workspace(void) { return unless_changed(lora_fast_adapter_workspace(layer(), stored())); }
static int run_gram_workspace(void) {
    return unless_changed(lora_fast_gram_workspace(group(below(2) ? LORA_FAST_GRAM : LORA_FAST_STEP, 0), stored()));
}
static int run_small_workspace(void) {
    return unless_changed(lora_fast_small_workspace(count(COUNT), rank(), stored()));
}
static int run_scalora_workspace(void) {
    return unless_changed(lora_fast_scalora_workspace(count(COUNT), rank(), stored()));
}

static int run_faster(void) {
    strategy = (lora_fast_strategy)UNTOUCHED;
    int status = lora_fast_faster(layer(), flag(), OR_NULL(&strategy));
    if (status ? strategy != (lora_fast_strategy)UNTOUCHED : strategy > LORA_FAST_UPDATE) fail("a wrong strategy");
    return status;
}

static int run_load(void) { return lora_fast_load(hostile() ? (int)ONE_OF(-2, 4, 63, 64, INT_MAX) : below(3) - 1); }

static int run_adamw_step(void) {
    STRUCT(lora_fast_work, work);
    work->additive = optional(), work->matrices = optional(), work->scale_p = optional();
    work->scale_g = hostile() ? optional() : work->scale_p ? address() : NULL;
    work->grams = optional(), work->keys = optional();
    int none = below(3) == 0, by_rank = work->matrices || work->scale_p || work->grams;
    by_rank = by_rank || (work->additive && work->keys);
    lora_fast_group *steps = group(LORA_FAST_STEP, none || !by_rank);
    int rows = steps && below(2) ? steps->n_rows : integer(1);
    return lora_fast_adamw_step(steps, address(), rows, address(), none ? NULL : work, address(), stream());
}

static int run_transform(void) {
    int add = flag();
    void *keys = add || hostile() ? optional() : NULL;
    return lora_fast_transform(group(LORA_FAST_TRANSFORM, 0), address(), add, keys, keys ? address() : NULL, stream());
}

static int run_plan(void) {
    STRUCT(lora_fast_group, group);
    group->op = (lora_fast_op)integer(below(4)), group->dtype = dtype(), group->r = rank();
    group->n_factors = rows_of_array(), group->n_rows = count(COUNT);
    group->flat = group->op == LORA_FAST_STEP || hostile() ? flag() : 0;
    lora_fast_group before = *group;
    int status = lora_fast_plan(OR_NULL(group), factors(group->op, group->n_rows));
    if (status && memcmp(&before, group, sizeof before)) fail("failed and changed the group");
    return status;
}

/* Fills a table in memory of exactly its size. */
static int run_fill(void) {
    lora_fast_op op = (lora_fast_op)below(4);
    int hostility_of_call = hostility;
    hostility = 0;
    lora_fast_group *planned = group(op, op == LORA_FAST_STEP && below(2));
    const lora_fast_factor *table = factors(op, planned->n_rows);
    int status = lora_fast_plan(planned, table);
    hostility = hostility_of_call;
    if (status || planned->bytes > MOST_BYTES) return status;
    char *host = malloc(planned->bytes);
    if (hostile()) planned->n_factors = rows_of_array();
    if (hostile()) planned->bytes = (size_t)wide(16);
    if (hostile()) table = factors(op, planned->n_rows);
    status = lora_fast_fill(planned, OR_NULL(table), hostile() ? NULL : host);
    free(host);
    return status;
}

static int run_cayley_plan(void) {
    STRUCT(lora_fast_cayley_group, group);
    group->dtype = dtype(), group->r = rank(), group->n_pairs = rows_of_array(), group->backward = flag();
    lora_fast_cayley_group before = *group;
    int status = lora_fast_cayley_plan(OR_NULL(group), pairs());
    if (status && memcmp(&before, group, sizeof before)) fail("failed and changed the group");
    return status;
}

static int run_cayley_fill(void) {
    int hostility_of_call = hostility;
    hostility = 0;
    lora_fast_cayley_group *planned = cayley_group();
    const lora_fast_cayley_pair *table = pairs();
    int status = lora_fast_cayley_plan(planned, table);
    hostility = hostility_of_call;
    if (status || planned->bytes > MOST_BYTES) return status;
    char *host = malloc(planned->bytes);
    if (hostile()) planned->n_pairs = rows_of_array();
    if (hostile()) planned->bytes = (size_t)wide(16);
    if (hostile()) table = pairs();
    status = lora_fast_cayley_fill(planned, OR_NULL(table), hostile() ? NULL : host);
    free(host);
    return status;
}

static int run_sort_rows(void) {
    int n_rows = hostile() ? (int)ONE_OF(0, -1, INT_MIN, INT_MAX) : below(COUNT + 1);
    int n_adapters = rows_of_array(), n = n_rows > 0 && n_rows <= COUNT ? n_rows : 0;
    int32_t *indices = malloc(sizeof *indices * (size_t)(n + 1)), *rows = malloc(sizeof *rows * (size_t)(n + 1));
    int32_t ends[COUNT];
    char seen[COUNT] = {0};
    for (int i = 0; i < n; i++) indices[i] = integer(below(n_adapters > 0 && n_adapters <= COUNT ? n_adapters : 1));
    int status = lora_fast_sort_rows(n_rows, n_adapters, OR_NULL(indices), OR_NULL(rows), OR_NULL(ends));
    for (int i = 0; i < n && !status; i++) {
        if (rows[i] < 0 || rows[i] >= n || seen[rows[i]]++) fail("rows are no permutation");
        int adapter = indices[rows[i]], begin = adapter > 0 ? ends[adapter - 1] : 0;
        if (adapter >= 0 && (i < begin || i >= ends[adapter])) fail("a row is outside its adapter's");
    }
    free(indices), free(rows);
    return status;
}

static int run_check_adapters(void) {
    lora_fast_batch *checked = batch();
    return lora_fast_check_adapters(checked, adapters());
}

#define NAMED(name) {"lora_fast_" #name, run_##name}
static const struct {
    const char *name;
    int (*run)(void);
} functions[] = {
    NAMED(project), NAMED(linear), NAMED(add_to_y), NAMED(adapter_workspace), NAMED(add_adapter),
    NAMED(workspace), NAMED(grad_s_b), NAMED(grad_a), NAMED(grad_x), NAMED(add_to_dx), NAMED(faster),
    NAMED(batch_project), NAMED(batch_add_to_y), NAMED(sort_rows),
    NAMED(check_adapters), NAMED(plan), NAMED(fill), NAMED(gram_workspace), NAMED(gram), NAMED(adamw_step),
    NAMED(transform), NAMED(merge), NAMED(imbalance), NAMED(scale_reg), NAMED(small_workspace), NAMED(spd_solve),
    NAMED(spd_inverse), NAMED(small_inverse), NAMED(scalora_workspace), NAMED(scalora_solve), NAMED(scalora_scales),
    NAMED(cayley_plan), NAMED(cayley_fill), NAMED(cayley), NAMED(load), NAMED(unload),
};
enum { FUNCTIONS = sizeof functions / sizeof *functions };
static unsigned long long lost; /* libraries whose unloading failed, as the fuzz wished */
static int counts[FUNCTIONS][STATUSES]; /* by -status; the last but one: of the driver, the last: all */

/* ---- The check */

static void one_call(int which) {
    char before[1024];
    snprintf(before, sizeof before, "%s", lora_fast_error_message());
    unsigned long long launches = stub_launches;
    current = functions[which].name, stub_failed = NULL, left_message = 0;
    stub_fail_after = below(20) == 0 ? 1 + below(8) : 0;
    int status = functions[which].run(), injected = stub_failed != NULL;
    stub_fail_after = 0, lost += injected && !strcmp(stub_failed, "cuLibraryUnload");
    if (!lora_fast_error_name(status)) fail("a status without a name");
    if (status && stub_launches != launches && !(injected && !strcmp(stub_failed, "cuLaunchKernel")))
        fail("failed and launched");
    if (status > 0 && !injected && functions[which].run != run_load) fail("the driver was given what it refuses");
    if (status < 0 && strncmp(lora_fast_error_message(), "lora_fast_", 10)) fail("a message without the function");
    if (!status && !left_message && strcmp(before, lora_fast_error_message())) fail("succeeded and left a message");
    counts[which][status > 0 ? STATUSES - 2 : -status]++, counts[which][STATUSES - 1]++;
}

static void print_counts(void) {
    static const char *const names[STATUSES] = {"OK",        "no driver", "bad",      "misaligned", "no arch",
                                                "no kernel", "no memory", "driver",   "calls"};
    printf("%-30s", "");
    for (int j = 0; j < STATUSES; j++) printf("%11s", names[j]);
    for (int i = 0; i < FUNCTIONS; i++) {
        printf("\n%-30s", functions[i].name);
        for (int j = 0; j < STATUSES; j++) printf("%11d", counts[i][j]);
        if (counts[i][STATUSES - 1] > 100 && !counts[i][0]) printf("  never OK");
    }
    printf("\n%llu launches, %llu loads\n", stub_launches, stub_loads);
}

int main(int argc, char **argv) {
    int calls = argc > 1 ? atoi(argv[1]) : 20000, n_archs;
    state = 0x9e3779b97f4a7c15ull ^ (uint64_t)(argc > 2 ? atoll(argv[2]) : 1);
    const int *archs = lora_fast_archs(&n_archs);
    alarm(SECONDS); /* a call that hangs ends the process */
    stub_noting = 0, stub_arch = archs[0];
    for (int i = 0; i < calls; i++) {
        if (below(400) == 0) { /* another card */
            lora_fast_unload();
            stub_arch = below(8) ? archs[below(n_archs)] : (int)ONE_OF(70, 86, 89, 90, 121, 130);
        }
        int loads_all = below(100) == 0; /* load and unload are long calls */
        hostility = below(2) ? 0 : 4 << below(4);
        one_call(loads_all ? FUNCTIONS - 1 - below(2) : below(FUNCTIONS - 2));
    }
    lora_fast_unload();
    print_counts();
    fflush(stdout);
    if (stub_loads != stub_unloads + lost) current = "lora_fast_unload", fail("not everything was unloaded");
    if (stub_retained) current = "lora_fast_load", fail("a primary context was retained");
    return 0;
}

/* Programs that keep their norms in arrays of their own, or in a shared history of which they name each step, beside the
 * model. Random tests draw what a program does from a seed, the fuzzer from its bytes.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_TEST_ARRAYS_H
#define AUTOCLIP_TEST_ARRAYS_H

#include <float.h>

#include "stream.h"

#include "../../csrc/arrays/observe.h"

/* What a gradient may have: never below 0 nor -0.0, and now and then not finite. */
static inline float norm_draw(enum values kind, uint64_t index, source *from) {
    const float norm = fabsf((float)values_draw(kind, index, from));
    if (source_below(from, 16) == 0) return source_below(from, 2) ? INFINITY : NAN;
    return norm > 0 ? norm : 1;
}

static inline float model_threshold(const model *truth, double percentile) {
    return truth->count == 0 ? FLT_MAX : (float)model_percentile(truth, percentile);
}

static inline void model_erase(model *truth, double norm) {
    const size_t rank = model_rank(truth, norm);
    REQUIRE(rank < truth->count && test_same(truth->sorted[rank], norm), "the model does not hold %g", norm);
    truth->count -= 1;
    memmove(truth->sorted + rank, truth->sorted + rank + 1, (truth->count - rank) * sizeof(double));
}

/* --- A window ----------------------------------------------------------------------------------------------------- */

typedef struct window_program {
    float *norms; /* as much memory as the window takes, so that a sanitizer sees one place too many */
    size_t window;
    size_t recorded;
    uint64_t index;
    enum values kind;
    model truth;
    source from;
} window_program;

static inline void window_create(window_program *own, size_t window, enum values kind, source from) {
    memset(own, 0, sizeof *own);
    own->norms = test_block(2 * window * sizeof(float));
    for (size_t i = 0; i < 2 * window; ++i) own->norms[i] = FLT_MAX;
    own->window = window;
    own->kind = kind;
    own->from = from;
    model_create(&own->truth, window);
}

static inline void window_destroy(window_program *own) {
    free(own->norms);
    model_destroy(&own->truth);
}

static inline void window_judge(const window_program *own) {
    const size_t count = own->truth.count;
    for (size_t i = 0; i < own->window; ++i) {
        REQUIRE_SAME(i < count ? own->truth.sorted[i] : (double)FLT_MAX, (double)own->norms[i]);
        const size_t age = count < own->window ? i : (i + count - own->recorded % count) % count;
        REQUIRE_SAME(i < count ? own->truth.aged[age] : (double)FLT_MAX, (double)own->norms[own->window + i]);
    }
}

static inline void window_step(window_program *own) {
    const float norm = norm_draw(own->kind, own->index++, &own->from);
    const double percentile = percentile_draw(&own->from, own->truth.count);
    test_now.step += 1;
    if (!percentile_valid(percentile)) return; /* callers refuse it */
    const float threshold = autoclip_window_observe(own->norms, own->window, own->recorded, norm, percentile);
    if (isfinite(norm)) {
        model_push(&own->truth, (double)norm);
        own->recorded += 1;
    }
    REQUIRE_SAME((double)model_threshold(&own->truth, percentile), (double)threshold);
    window_judge(own);
}

/* Any bits in the arrays, which no window holds: nothing outside of them may be touched, and the norm is among them. */
static inline void window_from_anything(source *from) {
    const size_t window = 1 + (size_t)source_below(from, 40);
    float *norms = test_block(2 * window * sizeof(float));
    for (size_t i = 0; i < 2 * window; ++i) {
        const uint32_t bits = (uint32_t)source_bits(from, 4);
        memcpy(norms + i, &bits, sizeof bits);
    }
    for (int i = 0; i < 20; ++i) {
        const double percentile = percentile_draw(from, window);
        const float norm = norm_draw(VALUES_RANDOM, 0, from);
        const size_t recorded = (size_t)source_bits(from, 4);
        if (!percentile_valid(percentile)) continue;
        (void)autoclip_window_observe(norms, window, recorded, norm, percentile);
        size_t at = 0;
        while (isfinite(norm) && at < window && norms[at] != norm) ++at;
        REQUIRE(at < window, "%g did not enter", (double)norm);
    }
    free(norms);
}

/* --- A shared history --------------------------------------------------------------------------------------------- */

#ifndef AUTOCLIP_RECENT_STEPS
#define AUTOCLIP_RECENT_STEPS 4096
#endif

typedef struct tree_program {
    uint64_t id;
    uint64_t step; /* the number of the next one */
    struct {
        float norm;
        float threshold;
        double percentile;
    } taken[1024]; /* the steps before it */
    float last;    /* the norm of the last step, and of the one before it */
    float previous;
    float outcomes[8]; /* that the last step has had */
    size_t outcome_count;
    uint64_t index;
    enum values kind;
    model truth;
    source from;
} tree_program;

static inline void tree_create(tree_program *own, enum values kind, source from) {
    memset(own, 0, sizeof *own);
    own->last = own->previous = INFINITY;
    own->kind = kind;
    own->from = from;
    model_create(&own->truth, 0);
    REQUIRE_OK(autoclip_shared_create(0, &own->id));
}

static inline void tree_judge(const tree_program *own) {
    const char *reason = "";
    double *norms = test_block(own->truth.count * sizeof(double));
    size_t count = SENTINEL_SIZE;
    REQUIRE(autoclip_shared_check(own->id, &reason) == AUTOCLIP_OK, "%s", reason);
    REQUIRE_OK(autoclip_shared_values(own->id, norms, own->truth.count, &count));
    REQUIRE(count == own->truth.count, "the history holds %zu norms of %zu", count, own->truth.count);
    for (size_t i = 0; i < count; ++i) REQUIRE_SAME(own->truth.sorted[i], norms[i]);
    free(norms);
}

static inline void tree_destroy(tree_program *own) {
    tree_judge(own);
    REQUIRE_OK(autoclip_shared_destroy(own->id));
    model_destroy(&own->truth);
}

/* Take step `step` after the norm `last`, and expect this threshold, or else that nothing changes. */
static inline void tree_observe(tree_program *own, uint64_t step, float last, float norm, double percentile,
                                autoclip_status expected, float expected_threshold) {
    const float before = last;
    float threshold = 0;
    REQUIRE_STATUS(expected, autoclip_tree_observe(own->id, step, &last, norm, percentile, &threshold));
    if (expected == AUTOCLIP_OK) {
        REQUIRE_SAME((double)expected_threshold, (double)threshold);
        REQUIRE_SAME((double)(isfinite(norm) && norm > 0 ? norm : before), (double)last);
    } else {
        REQUIRE_SAME((double)before, (double)last);
    }
}

/* Step `step` has had this outcome, which the model holds: what it gives, now and when it is taken again. */
static inline void tree_take(tree_program *own, uint64_t step, float norm, double percentile) {
    const float threshold = model_threshold(&own->truth, percentile);
    REQUIRE(step < sizeof own->taken / sizeof *own->taken, "the test is too long");
    own->taken[step].norm = norm;
    own->taken[step].percentile = percentile;
    own->taken[step].threshold = threshold;
    tree_observe(own, step, step + 1 == own->step ? own->previous : own->last, norm, percentile, AUTOCLIP_OK,
                 threshold);
}

static inline void tree_step(tree_program *own) {
    const float norm = norm_draw(own->kind, own->index++, &own->from);
    const double percentile = percentile_draw(&own->from, own->truth.count);
    const uint64_t choice = own->step == 0 ? 8 : source_below(&own->from, 16);
    test_now.step += 1;
    if (!percentile_valid(percentile)) {
        if (own->truth.count > 0 || isfinite(norm)) {
            tree_observe(own, own->step, own->last, norm, percentile, AUTOCLIP_BAD_PERCENTILE, 0);
        }
    } else if (!isfinite(norm)) {
        const float threshold = model_threshold(&own->truth, percentile);
        tree_observe(own, own->step, own->last, norm, percentile, AUTOCLIP_OK, threshold);
    } else if (choice == 0) { /* an earlier step again: a replica, or a program that is computed anew */
        const uint64_t back = 1 + source_below(&own->from, own->step);
        const uint64_t step = own->step - back;
        const bool known = back <= AUTOCLIP_RECENT_STEPS;
        tree_observe(own, step, step == 0 ? INFINITY : own->taken[step - 1].norm, own->taken[step].norm,
                     own->taken[step].percentile, known ? AUTOCLIP_OK : AUTOCLIP_WRONG_STEP,
                     own->taken[step].threshold);
    } else if (choice == 1) { /* the last step with another outcome; one that it had before would only be told again */
        for (size_t i = 0; i < own->outcome_count; ++i) {
            if (own->outcomes[i] == norm) return;
        }
        if (own->outcome_count == sizeof own->outcomes / sizeof *own->outcomes) return;
        own->outcomes[own->outcome_count++] = norm;
        model_erase(&own->truth, (double)own->last);
        model_push(&own->truth, (double)norm);
        tree_take(own, own->step - 1, norm, percentile);
        own->last = norm;
        /* Go on from it: the history holds it now. */
        tree_observe(own, own->step, norm, 0, percentile, AUTOCLIP_OK, model_threshold(&own->truth, percentile));
    } else if (choice == 2) { /* a step that does not follow */
        tree_observe(own, own->step + 1, own->last, norm, percentile, AUTOCLIP_WRONG_STEP, 0);
    } else {
        model_push(&own->truth, (double)norm);
        tree_take(own, own->step, norm, percentile);
        own->step += 1;
        own->outcomes[0] = norm;
        own->outcome_count = 1;
        own->previous = own->last;
        own->last = norm;
    }
    if (test_now.step % 16 == 0) tree_judge(own);
}

#endif /* AUTOCLIP_TEST_ARRAYS_H */

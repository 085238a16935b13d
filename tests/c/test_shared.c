/* Shared histories: each function does what its namesake does, ids are never used twice, and threads and forks do no harm.
 *
 * SPDX-License-Identifier: MIT */
#if !defined(_WIN32)
#define _POSIX_C_SOURCE 200809L
#endif

#include "model.h"

#if !defined(_WIN32)
#include <pthread.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TEST_THREAD_SANITIZER true
#endif
#elif defined(__SANITIZE_THREAD__)
#define TEST_THREAD_SANITIZER true
#endif
#if !defined(TEST_THREAD_SANITIZER)
#define TEST_THREAD_SANITIZER false
#endif

#define COUNT(array) (sizeof(array) / sizeof *(array))
#define SENTINEL (-0x1.badbadbadbadp+500)
#define SENTINEL_ID UINT64_C(0xBAD0BAD0BAD0BAD0)

static uint64_t make(uint64_t window) {
    uint64_t id = 0;
    REQUIRE_OK(autoclip_shared_create(window, &id));
    REQUIRE(id != 0, "an id is 0");
    return id;
}

static void require_sound(uint64_t id) {
    const char *reason = NULL;
    autoclip_status status = autoclip_shared_check(id, &reason);
    REQUIRE(status == AUTOCLIP_OK, "check returns %d: %s", (int)status, reason);
}

/* The shared history holds the norms of the model. */
static void judge_shared(uint64_t id, const model *truth) {
    uint64_t size;
    uint64_t window;
    require_sound(id);
    REQUIRE_OK(autoclip_shared_size(id, &size));
    REQUIRE(size == truth->count, "size is %" PRIu64 " but should be %zu", size, truth->count);
    REQUIRE_OK(autoclip_shared_window(id, &window));
    REQUIRE(window == truth->window, "window is %" PRIu64 " but should be %" PRIu64, window, truth->window);
    size_t bytes_size;
    REQUIRE_OK(autoclip_shared_save_size(id, &bytes_size));
    REQUIRE(bytes_size == SNAPSHOT_SIZE(size), "save_size is %zu", bytes_size);
    unsigned char *bytes = test_block(bytes_size);
    unsigned char *expected = test_block(bytes_size);
    snapshot_write(expected, window, window > 0 ? truth->aged : truth->sorted, truth->count);
    REQUIRE_OK(autoclip_shared_save(id, bytes, bytes_size, &bytes_size));
    REQUIRE(memcmp(bytes, expected, bytes_size) == 0, "the norms are not what they should be");
    free(bytes);
    free(expected);
}

static void test_shared_functions_do_what_their_namesakes_do(void) {
    for (uint64_t window = 0; window <= 7; window += 7) {
        uint64_t id = make(window);
        uint64_t twin;
        uint64_t number;
        double value;
        double values[60];
        const double percentiles[2] = {10, 99};
        const double more[4] = {5, 1, 4, -0.0};
        unsigned char bytes[SNAPSHOT_SIZE(30)];
        size_t size;
        model truth;
        model_create(&truth, window);
        judge_shared(id, &truth);
        REQUIRE_STATUS(AUTOCLIP_EMPTY, autoclip_shared_percentile(id, 50, &value));
        for (int i = 0; i < 10; ++i) {
            REQUIRE_OK(autoclip_shared_push(id, i * 3 % 7));
            model_push(&truth, i * 3 % 7);
        }
        judge_shared(id, &truth);
        REQUIRE_OK(autoclip_shared_extend(id, more, 4));
        model_extend(&truth, more, 4);
        judge_shared(id, &truth);
        REQUIRE_OK(autoclip_shared_observe(id, 2.5, 10, &value));
        model_push(&truth, 2.5);
        REQUIRE_SAME(model_percentile(&truth, 10), value);
        REQUIRE_OK(autoclip_shared_observe_many(id, more, 4, percentiles, 2, values));
        for (size_t i = 0; i < 4; ++i) {
            model_push(&truth, more[i]);
            REQUIRE_SAME(model_percentile(&truth, 10), values[2 * i]);
            REQUIRE_SAME(model_percentile(&truth, 99), values[2 * i + 1]);
        }
        judge_shared(id, &truth);
        REQUIRE_OK(autoclip_shared_percentile(id, 33, &value));
        REQUIRE_SAME(model_percentile(&truth, 33), value);
        REQUIRE_OK(autoclip_shared_select(id, 2, &value));
        REQUIRE_SAME(truth.sorted[2], value);
        REQUIRE_OK(autoclip_shared_rank(id, 3, &number));
        REQUIRE(number == model_rank(&truth, 3), "rank is %" PRIu64, number);
        REQUIRE_OK(autoclip_shared_order_statistics(id, 1, 3, values));
        REQUIRE_SAME(truth.sorted[1], values[0]);
        REQUIRE_SAME(truth.sorted[3], values[2]);
        if (truth.window > 0) {
            REQUIRE_OK(autoclip_shared_oldest(id, 2, values));
            REQUIRE_SAME(truth.aged[0], values[0]);
            REQUIRE_SAME(truth.aged[1], values[1]);
        } else {
            REQUIRE_STATUS(AUTOCLIP_NO_WINDOW, autoclip_shared_oldest(id, 2, values));
        }
        REQUIRE_OK(autoclip_shared_values(id, values, COUNT(values), &size));
        REQUIRE(size == truth.count, "values gave %zu", size);
        for (size_t i = 0; i < size; ++i) REQUIRE_SAME(truth.sorted[i], values[i]);
        REQUIRE_OK(autoclip_shared_memory(id, &number));
        REQUIRE(number > 0, "no memory is counted");

        REQUIRE_OK(autoclip_shared_clone(id, &twin)); /* independent, with an id of its own */
        REQUIRE(twin != id && twin != 0, "the clone has id %" PRIu64, twin);
        REQUIRE_OK(autoclip_shared_push(twin, 100));
        judge_shared(id, &truth);
        REQUIRE_OK(autoclip_shared_destroy(twin));
        REQUIRE_OK(autoclip_shared_save(id, bytes, sizeof bytes, &size));
        REQUIRE_OK(autoclip_shared_load(bytes, size, &twin));
        judge_shared(twin, &truth);
        bytes[70] ^= 1;
        number = SENTINEL_ID;
        REQUIRE_STATUS(AUTOCLIP_BAD_SNAPSHOT, autoclip_shared_load(bytes, size, &number));
        REQUIRE(number == SENTINEL_ID, "an id was written");

        if (window == 0) {
            REQUIRE_OK(autoclip_shared_merge(id, twin));
            model both;
            model_create(&both, 0);
            model_copy(&both, &truth);
            model_extend(&truth, both.sorted, both.count);
            judge_shared(id, &truth);
            judge_shared(twin, &both);
            REQUIRE_OK(autoclip_shared_merge(id, id));
            model_copy(&both, &truth);
            model_extend(&truth, both.sorted, both.count);
            judge_shared(id, &truth);
            model_destroy(&both);
        } else {
            REQUIRE_STATUS(AUTOCLIP_HAS_WINDOW, autoclip_shared_merge(id, twin));
            REQUIRE_STATUS(AUTOCLIP_HAS_WINDOW, autoclip_shared_merge(id, id));
        }
        /* refusals come through, and write nothing */
        value = SENTINEL;
        REQUIRE_STATUS(AUTOCLIP_NOT_FINITE, autoclip_shared_push(id, (double)NAN));
        REQUIRE_STATUS(AUTOCLIP_NOT_FINITE, autoclip_shared_observe(id, (double)INFINITY, 10, &value));
        REQUIRE_STATUS(AUTOCLIP_BAD_PERCENTILE, autoclip_shared_observe(id, 1, 101, &value));
        REQUIRE_STATUS(AUTOCLIP_BAD_RANK, autoclip_shared_select(id, 1000, &value));
        REQUIRE_SAME(SENTINEL, value);
        judge_shared(id, &truth);
        REQUIRE_OK(autoclip_shared_clear(id));
        truth.count = 0;
        judge_shared(id, &truth);
        REQUIRE_OK(autoclip_shared_destroy(id));
        REQUIRE_OK(autoclip_shared_destroy(twin));
        model_destroy(&truth);
    }
}

/* Take a step after the last norm of the model, and remember it there. */
static void take_step(uint64_t id, model *truth, uint64_t step, double norm) {
    double threshold = SENTINEL;
    const double previous = truth->count > 0 ? truth->aged[truth->count - 1] : 0;
    REQUIRE_OK(autoclip_shared_observe_step(id, step, previous, norm, 30, &threshold));
    model_push(truth, norm);
    REQUIRE_SAME(model_percentile(truth, 30), threshold);
}

static void test_steps_follow_one_another(void) {
    for (uint64_t window = 0; window <= 7; window += 7) {
        uint64_t id = make(window);
        double threshold = SENTINEL;
        model truth;
        model_create(&truth, window);
        for (uint64_t step = 0; step < 40; ++step) {
            take_step(id, &truth, step, (double)(step * 7 % 11));
            judge_shared(id, &truth);
        }
        const double last = truth.aged[truth.count - 1];
        REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_shared_observe_step(id, 41, last, 1, 30, &threshold));
        REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_shared_observe_step(id, 40, 0.5, 1, 30, &threshold));
        REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_shared_observe_step(id, 39, 0.5, 1.5, 30, &threshold));
        REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_shared_observe_step(id, 38, last, 0.5, 30, &threshold));
        REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_shared_observe_step(id, 0, 0, 0.5, 30, &threshold));
        REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_shared_observe_step(id, UINT64_MAX, last, 1, 30, &threshold));
        REQUIRE_STATUS(AUTOCLIP_BAD_PERCENTILE, autoclip_shared_observe_step(id, 40, last, 1, 101, &threshold));
        REQUIRE_STATUS(AUTOCLIP_NOT_FINITE, autoclip_shared_observe_step(id, 40, last, (double)NAN, 30, &threshold));
        REQUIRE_SAME(SENTINEL, threshold);
        judge_shared(id, &truth);
        take_step(id, &truth, 40, 3);
        judge_shared(id, &truth);
        REQUIRE_OK(autoclip_shared_destroy(id));
        model_destroy(&truth);
    }
}

static void test_step_that_is_taken_again_counts_once(void) {
    uint64_t id = make(0);
    model truth;
    double thresholds[20];
    double again;
    model_create(&truth, 0);
    for (uint64_t step = 0; step < 20; ++step) {
        take_step(id, &truth, step, (double)(step * 7 % 11));
        thresholds[step] = model_percentile(&truth, 30);
        for (uint64_t old = 0; old <= step; ++old) {
            REQUIRE_OK(autoclip_shared_observe_step(id, old, -1, (double)(old * 7 % 11), 30, &again));
            REQUIRE_SAME(thresholds[old], again);
        }
        judge_shared(id, &truth);
    }
    REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_shared_observe_step(id, 11, -1, 0.5, 30, &again));
    /* The last one at another percentile, and then as before. */
    const double last = truth.aged[19];
    for (double percentile = 0; percentile <= 60; percentile += 30) {
        REQUIRE_OK(autoclip_shared_observe_step(id, 19, truth.aged[18], last, percentile, &again));
        REQUIRE_SAME(model_percentile(&truth, percentile), again);
        judge_shared(id, &truth);
    }
    REQUIRE_OK(autoclip_shared_destroy(id));
    model_destroy(&truth);
}

/* The outcome of a step is thrown away, and the step is taken again from where it began: any one may be kept. */
static void test_step_with_an_outcome_thrown_away_is_replaced(void) {
    for (size_t kept = 0; kept < 4; ++kept) {
        uint64_t id = make(0);
        model truth;
        double threshold;
        model_create(&truth, 0);
        for (uint64_t step = 0; step < 600; ++step) { /* through the buffer into the tree */
            const double previous = step > 0 ? truth.aged[truth.count - 1] : 0;
            for (size_t attempt = 0; attempt < 4; ++attempt) {
                const double norm = (double)((step * 31 + attempt * 17) % 101);
                REQUIRE_OK(autoclip_shared_observe_step(id, step, previous, norm, 50, &threshold));
                if (attempt == kept) {
                    model_push(&truth, norm);
                    REQUIRE_SAME(model_percentile(&truth, 50), threshold);
                }
            }
            if (kept == 0) judge_shared(id, &truth);
            uint64_t size;
            REQUIRE_OK(autoclip_shared_size(id, &size));
            REQUIRE(size == step + 1, "%" PRIu64 " norms after step %" PRIu64, size, step);
        }
        REQUIRE_OK(autoclip_shared_destroy(id));
        model_destroy(&truth);
    }
    uint64_t id = make(5);
    double threshold = SENTINEL;
    REQUIRE_OK(autoclip_shared_observe_step(id, 0, 0, 1, 50, &threshold));
    REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_shared_observe_step(id, 0, 0, 2, 50, &threshold));
    REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_shared_percentile_step(id, 0, 0, 75, &threshold));
    REQUIRE_SAME(1, threshold);
    REQUIRE_OK(autoclip_shared_destroy(id));
}

/* The percentile at each point of a run, whichever outcome the history holds. */
static void test_percentile_of_a_step_is_that_of_its_outcome(void) {
    uint64_t id = make(0);
    double threshold;
    REQUIRE_STATUS(AUTOCLIP_EMPTY, autoclip_shared_percentile_step(id, 0, 0, 50, &threshold));
    REQUIRE_STATUS(AUTOCLIP_BAD_PERCENTILE, autoclip_shared_percentile_step(id, 0, 0, 101, &threshold));
    REQUIRE_OK(autoclip_shared_observe_step(id, 0, 0, 4, 50, &threshold));
    REQUIRE_STATUS(AUTOCLIP_EMPTY, autoclip_shared_percentile_step(id, 0, 0, 50, &threshold));
    REQUIRE_OK(autoclip_shared_observe_step(id, 1, 4, 8, 50, &threshold));
    REQUIRE_OK(autoclip_shared_observe_step(id, 1, 4, 2, 50, &threshold)); /* another outcome */
    REQUIRE_SAME(3, threshold);
    REQUIRE_OK(autoclip_shared_observe_step(id, 1, 4, 2, 0, &threshold)); /* the same at another percentile */
    REQUIRE_SAME(2, threshold);
    REQUIRE_OK(autoclip_shared_observe_step(id, 1, 4, 2, 50, &threshold));
    REQUIRE_SAME(3, threshold);
    REQUIRE_STATUS(AUTOCLIP_NOT_FINITE, autoclip_shared_observe_step(id, 1, 4, (double)NAN, 50, &threshold));
    REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_shared_percentile_step(id, 1, 5, 50, &threshold));
    REQUIRE_SAME(3, threshold);
    for (double percentile = 0; percentile <= 100; percentile += 25) { /* before both of them */
        REQUIRE_OK(autoclip_shared_percentile_step(id, 1, 4, percentile, &threshold));
        REQUIRE_SAME(4, threshold);
    }
    REQUIRE_OK(autoclip_shared_percentile(id, 100, &threshold));
    REQUIRE_SAME(8, threshold);
    REQUIRE_OK(autoclip_shared_percentile_step(id, 2, 2, 100, &threshold)); /* the run goes on from the other */
    REQUIRE_SAME(4, threshold);
    REQUIRE_OK(autoclip_shared_percentile_step(id, 2, 8, 100, &threshold)); /* or not */
    REQUIRE_SAME(8, threshold);
    REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_shared_percentile_step(id, 2, 3, 100, &threshold));
    uint64_t size;
    REQUIRE_OK(autoclip_shared_size(id, &size));
    REQUIRE(size == 2, "%" PRIu64 " norms", size);
    REQUIRE_OK(autoclip_shared_destroy(id));
}

static void test_clear_forgets_the_steps(void) {
    uint64_t id = make(0);
    double threshold = SENTINEL;
    for (uint64_t step = 0; step < 3; ++step) {
        REQUIRE_OK(autoclip_shared_observe_step(id, step, (double)step, (double)step + 1, 50, &threshold));
    }
    REQUIRE_OK(autoclip_shared_clear(id));
    const double norms[2] = {5, 7};
    REQUIRE_OK(autoclip_shared_extend(id, norms, 2));
    /* Neither the answer of before, nor a step that does not follow. */
    REQUIRE_OK(autoclip_shared_observe_step(id, 2, 7, 3, 50, &threshold));
    REQUIRE_SAME(5.0, threshold);
    REQUIRE_OK(autoclip_shared_destroy(id));
}

static void test_first_step_needs_as_many_norms(void) {
    double threshold = SENTINEL;
    uint64_t id = make(0);
    const double norms[3] = {1, 2, 3};
    REQUIRE_OK(autoclip_shared_extend(id, norms, 3));
    REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_shared_observe_step(id, 4, 3, 1, 50, &threshold));
    REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_shared_observe_step(id, 3, 2.5, 1, 50, &threshold));
    REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_shared_percentile_step(id, 3, 2.5, 50, &threshold));
    REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_shared_percentile_step(id, 3, 3.5, 50, &threshold));
    REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_shared_percentile_step(id, 3, (double)NAN, 50, &threshold));
    REQUIRE_SAME(SENTINEL, threshold);
    REQUIRE_OK(autoclip_shared_percentile_step(id, 3, 3, 50, &threshold));
    REQUIRE_SAME(2, threshold);
    REQUIRE_OK(autoclip_shared_observe_step(id, 3, 3, 4, 50, &threshold));
    REQUIRE_SAME(2.5, threshold);
    uint64_t twin;
    REQUIRE_OK(autoclip_shared_clone(id, &twin)); /* the copy has its own steps */
    REQUIRE_OK(autoclip_shared_observe_step(twin, 0, 0, 5, 0, &threshold));
    REQUIRE_SAME(1, threshold);
    REQUIRE_OK(autoclip_shared_destroy(twin));
    REQUIRE_OK(autoclip_shared_destroy(id));
    id = make(0); /* in the place of one that had steps */
    REQUIRE_OK(autoclip_shared_observe_step(id, 0, 0, 7, 50, &threshold));
    REQUIRE_SAME(7, threshold);
    REQUIRE_OK(autoclip_shared_destroy(id));
    id = make(2); /* what a window held last, nobody can tell */
    REQUIRE_OK(autoclip_shared_extend(id, norms, 3));
    REQUIRE_OK(autoclip_shared_observe_step(id, 2, 2.5, 4, 50, &threshold));
    REQUIRE_SAME(3.5, threshold);
    REQUIRE_OK(autoclip_shared_destroy(id));
}

static void test_memory_of_the_steps_is_counted(void) {
    uint64_t id = make(0);
    uint64_t before;
    uint64_t after;
    double threshold;
    REQUIRE_OK(autoclip_shared_push(id, 1));
    REQUIRE_OK(autoclip_shared_memory(id, &before));
    REQUIRE_OK(autoclip_shared_observe_step(id, 1, 1, 2, 50, &threshold));
    REQUIRE_OK(autoclip_shared_memory(id, &after));
    REQUIRE(after > before + 100000, "%" PRIu64 " bytes after %" PRIu64, after, before);
    REQUIRE_OK(autoclip_shared_destroy(id));
}

/* Every function refuses this id, and writes nothing. */
static void require_unknown(uint64_t id) {
    double values[4] = {SENTINEL, SENTINEL, SENTINEL, SENTINEL};
    uint64_t number = SENTINEL_ID;
    size_t size = 77;
    unsigned char bytes[SNAPSHOT_SIZE(0)] = {7};
    const char *reason = "as it was";
    const double norm = 1;
    uint64_t known = make(0);
    REQUIRE_OK(autoclip_shared_push(known, 1));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_clone(id, &number));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_destroy(id));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_clear(id));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_size(id, &number));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_window(id, &number));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_memory(id, &number));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_push(id, 1));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_extend(id, &norm, 1));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_observe(id, 1, 50, values));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_observe_many(id, &norm, 1, &norm, 1, values));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_merge(id, known));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_merge(known, id));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_merge(id, id));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_percentile(id, 50, values));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_select(id, 0, values));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_rank(id, 1, &number));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_order_statistics(id, 0, 1, values));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_oldest(id, 1, values));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_values(id, values, 4, &size));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_save_size(id, &size));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_save(id, bytes, sizeof bytes, &size));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_check(id, &reason));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_observe_step(id, 0, 1, 1, 50, values));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_percentile_step(id, 0, 1, 50, values));
    REQUIRE(number == SENTINEL_ID && size == 77 && bytes[0] == 7, "a result was written");
    for (size_t i = 0; i < COUNT(values); ++i) REQUIRE_SAME(SENTINEL, values[i]);
    REQUIRE_OK(autoclip_shared_size(known, &number));
    REQUIRE(number == 1, "the other history of a merge has %" PRIu64 " norms", number);
    REQUIRE_OK(autoclip_shared_destroy(known));
}

static void test_unknown_ids_are_refused_by_every_function(void) {
    require_unknown(0);
    require_unknown(1);
    require_unknown(UINT32_MAX);
    require_unknown(UINT64_C(1) << 32);
    require_unknown((UINT64_C(1) << 32) - 64);
    require_unknown(UINT64_C(1) << 63);
    require_unknown(UINT64_MAX);
    uint64_t id = make(0);
    require_unknown(id + 1);
    require_unknown(id + (UINT64_C(1) << 32));
    REQUIRE_OK(autoclip_shared_destroy(id));
    for (uint64_t later = 1; later < 4; ++later) { /* guessed ids of histories that may come here one day */
        REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_push(id + (later << 32), 1));
    }
    require_unknown(id);
    uint64_t next = make(0); /* likely in the place of the destroyed one */
    require_unknown(id);
    require_sound(next);
    REQUIRE_OK(autoclip_shared_destroy(next));
}

static int compare_ids(const void *first, const void *second) {
    uint64_t a = *(const uint64_t *)first;
    uint64_t b = *(const uint64_t *)second;
    return (a > b) - (a < b);
}

static void require_distinct(uint64_t *ids, size_t count) {
    qsort(ids, count, sizeof *ids, compare_ids);
    for (size_t i = 1; i < count; ++i) REQUIRE(ids[i - 1] != ids[i], "id %" PRIu64 " was used twice", ids[i]);
}

static void test_ids_are_never_used_twice(void) {
    enum { ROUNDS = 3000 };
    static uint64_t ids[ROUNDS];
    uint64_t unused = 0;
    for (size_t i = 0; i < ROUNDS; ++i) {
        ids[i] = make(i % 3);
        REQUIRE((int64_t)ids[i] > 0, "id %" PRIu64 " does not fit into a signed integer", ids[i]);
        REQUIRE_OK(autoclip_shared_push(ids[i], (double)i));
        if (i % 7 != 0) REQUIRE_OK(autoclip_shared_destroy(ids[i]));
    }
    for (size_t i = 0; i < ROUNDS; ++i) {
        autoclip_status status = autoclip_shared_size(ids[i], &unused);
        REQUIRE(status == (i % 7 != 0 ? AUTOCLIP_NO_HISTORY : AUTOCLIP_OK), "status of id %zu is %d", i, (int)status);
        if (i % 7 == 0) {
            double norm;
            REQUIRE_OK(autoclip_shared_select(ids[i], 0, &norm));
            REQUIRE_SAME((double)i, norm);
            REQUIRE_OK(autoclip_shared_destroy(ids[i]));
        }
    }
    require_distinct(ids, ROUNDS);
}

/* --- Out of memory: these functions make histories with malloc, which the linker lets us stand before ----------------- */

#if defined(TEST_WRAPS_MALLOC)

static uint64_t malloc_calls;
static uint64_t malloc_fails_at;
static uint64_t malloc_faults;

void *__real_malloc(size_t size);
void *__wrap_malloc(size_t size);

void *__wrap_malloc(size_t size) {
    if (malloc_fails_at != 0 && ++malloc_calls == malloc_fails_at) {
        malloc_faults += 1;
        return NULL;
    }
    return __real_malloc(size);
}

int __real_posix_memalign(void **block, size_t alignment, size_t size);
int __wrap_posix_memalign(void **block, size_t alignment, size_t size);

int __wrap_posix_memalign(void **block, size_t alignment, size_t size) {
    if (malloc_fails_at != 0 && ++malloc_calls == malloc_fails_at) {
        malloc_faults += 1;
        return 12; /* ENOMEM */
    }
    return __real_posix_memalign(block, alignment, size);
}

static bool atfork_fails;

int __real_pthread_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void));
int __wrap_pthread_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void));

int __wrap_pthread_atfork(void (*prepare)(void), void (*parent)(void), void (*child)(void)) {
    return atfork_fails ? 12 : __real_pthread_atfork(prepare, parent, child);
}

/* The first history of a process asks to be told of forks. */
static void test_first_history_needs_to_follow_forks(void) {
    uint64_t id = SENTINEL_ID;
    atfork_fails = true;
    REQUIRE_STATUS(AUTOCLIP_NO_MEMORY, autoclip_shared_create(0, &id));
    REQUIRE(id == SENTINEL_ID, "an id was written");
    atfork_fails = false;
    REQUIRE_OK(autoclip_shared_create(0, &id));
    REQUIRE_OK(autoclip_shared_destroy(id));
}

static autoclip_status fail_create(uint64_t id, uint64_t *made) {
    (void)id;
    return autoclip_shared_create(5, made);
}
static autoclip_status fail_clone(uint64_t id, uint64_t *made) { return autoclip_shared_clone(id, made); }
static autoclip_status fail_load(uint64_t id, uint64_t *made) {
    static unsigned char bytes[SNAPSHOT_SIZE(300)];
    size_t size;
    REQUIRE_OK(autoclip_shared_save(id, bytes, sizeof bytes, &size));
    return autoclip_shared_load(bytes, size, made);
}
static autoclip_status fail_extend(uint64_t id, uint64_t *made) {
    double norms[300];
    (void)made;
    for (size_t i = 0; i < COUNT(norms); ++i) norms[i] = -(double)i;
    return autoclip_shared_extend(id, norms, COUNT(norms));
}
static autoclip_status fail_extend_hugely(uint64_t id, uint64_t *made) {
    static double norms[300000]; /* more than a huge page */
    (void)made;
    for (size_t i = 0; i < COUNT(norms); ++i) norms[i] = -(double)i;
    return autoclip_shared_extend(id, norms, COUNT(norms));
}
static autoclip_status fail_merge(uint64_t id, uint64_t *made) {
    (void)made;
    return autoclip_shared_merge(id, id);
}
static autoclip_status fail_step(uint64_t id, uint64_t *made) {
    double threshold;
    (void)made;
    return autoclip_shared_observe_step(id, 20, 19, 1, 50, &threshold);
}

static void test_shared_functions_survive_every_refusal(void) {
    static autoclip_status (*const calls[])(uint64_t, uint64_t *) = {
        fail_create, fail_clone, fail_load, fail_extend, fail_extend_hugely, fail_merge, fail_step};
    /* Histories are kept until the end, so that create also meets a table that has to grow. */
    enum { KEPT = 1000 };
    static uint64_t kept[KEPT];
    uint64_t faults = 0;
    for (size_t c = 0; c < COUNT(calls); ++c) {
        for (size_t round = 0; round < (c == 0 ? KEPT : 1); ++round) {
            uint64_t made = SENTINEL_ID;
            uint64_t id = make(0);
            model truth;
            model_create(&truth, 0);
            for (int i = 0; i < 20; ++i) {
                REQUIRE_OK(autoclip_shared_push(id, i));
                model_push(&truth, i);
            }
            for (uint64_t attempt = 1;; ++attempt) {
                malloc_calls = 0;
                malloc_faults = 0;
                malloc_fails_at = attempt;
                autoclip_status status = calls[c](id, &made);
                malloc_fails_at = 0;
                faults += malloc_faults;
                if (status == AUTOCLIP_OK) break;
                REQUIRE(status == AUTOCLIP_NO_MEMORY && malloc_faults > 0, "status is %d", (int)status);
                REQUIRE(made == SENTINEL_ID, "an id was written");
                judge_shared(id, &truth);
            }
            if (made != SENTINEL_ID) {
                require_sound(made);
                if (c == 0) {
                    kept[round] = made;
                } else {
                    REQUIRE_OK(autoclip_shared_destroy(made));
                }
            }
            REQUIRE_OK(autoclip_shared_destroy(id));
            model_destroy(&truth);
        }
    }
    for (size_t i = 0; i < KEPT; ++i) REQUIRE_OK(autoclip_shared_destroy(kept[i]));
    printf("  %" PRIu64 " allocations refused\n", faults);
    REQUIRE(faults > 0, "no allocation was refused");
}

/* A run goes on from another outcome, for which there is no room: the history stays as it is. */
static void test_other_outcome_may_find_no_memory(void) {
    uint64_t refused = 0;
    for (int more = 0; more < 300; ++more) { /* norms that others bring, until the buffer is full */
        uint64_t id = make(0);
        double threshold = SENTINEL;
        model truth;
        model_create(&truth, 0);
        take_step(id, &truth, 0, 1);
        REQUIRE_OK(autoclip_shared_observe_step(id, 0, 0, 2, 50, &threshold));
        for (int i = 0; i < more; ++i) {
            REQUIRE_OK(autoclip_shared_push(id, 3 + i));
            model_push(&truth, 3 + i);
        }
        malloc_calls = 0;
        malloc_fails_at = 1;
        const autoclip_status status = autoclip_shared_percentile_step(id, 1, 2, 0, &threshold);
        malloc_fails_at = 0;
        if (status != AUTOCLIP_OK) {
            REQUIRE_STATUS(AUTOCLIP_NO_MEMORY, status);
            refused += 1;
            judge_shared(id, &truth);
            REQUIRE_OK(autoclip_shared_percentile_step(id, 1, 2, 0, &threshold));
        }
        REQUIRE_SAME(2, threshold);
        REQUIRE_OK(autoclip_shared_destroy(id));
        model_destroy(&truth);
    }
#if !defined(AUTOCLIP_BUFFER) /* tiny buffers always have room for another */
    REQUIRE(refused > 0, "no outcome was refused");
#endif
    printf("  %" PRIu64 " outcomes refused\n", refused);
}

#define FIRST_TESTS TEST(test_first_history_needs_to_follow_forks),
#define MEMORY_TESTS TEST(test_shared_functions_survive_every_refusal), TEST(test_other_outcome_may_find_no_memory),
#else
#define FIRST_TESTS
#define MEMORY_TESTS
#endif

/* --- Threads and processes ---------------------------------------------------------------------------------------- */

#if !defined(_WIN32)

enum { THREADS = 8, PUSHES = 1500, ROUNDS = 150 };

typedef struct worker {
    pthread_t thread;
    uint64_t number;
    uint64_t id;
    uint64_t other;
    uint64_t made[ROUNDS];
    uint64_t done;
} worker;

static void run_workers(worker *workers, size_t count, void *(*work)(void *), uint64_t id, uint64_t other) {
    for (size_t i = 0; i < count; ++i) {
        workers[i].number = i;
        workers[i].id = id;
        workers[i].other = other;
        REQUIRE(pthread_create(&workers[i].thread, NULL, work, &workers[i]) == 0, "no thread");
    }
}

static void join_workers(worker *workers, size_t count) {
    for (size_t i = 0; i < count; ++i) REQUIRE(pthread_join(workers[i].thread, NULL) == 0, "no join");
}

static void *push_and_ask(void *context) {
    worker *own = context;
    uint64_t before = 0;
    for (uint64_t i = 0; i < PUSHES; ++i) {
        double threshold;
        double norm = (double)(own->number * PUSHES + (i * 7919 + 13) % PUSHES);
        uint64_t size;
        if (i % 3 == 0) {
            REQUIRE_OK(autoclip_shared_push(own->id, norm));
        } else if (i % 3 == 1) {
            REQUIRE_OK(autoclip_shared_extend(own->id, &norm, 1));
        } else {
            REQUIRE_OK(autoclip_shared_observe(own->id, norm, 50, &threshold));
            REQUIRE(threshold >= 0 && threshold <= THREADS * PUSHES, "a torn threshold: %g", threshold);
        }
        REQUIRE_OK(autoclip_shared_percentile(own->id, (double)(i % 101), &threshold));
        REQUIRE(threshold >= 0 && threshold <= THREADS * PUSHES, "a torn percentile: %g", threshold);
        REQUIRE_OK(autoclip_shared_size(own->id, &size));
        REQUIRE(size > before, "the size went from %" PRIu64 " to %" PRIu64, before, size);
        before = size;
        uint64_t rank;
        REQUIRE_OK(autoclip_shared_rank(own->id, norm, &rank));
        REQUIRE(rank < THREADS * PUSHES, "a torn rank: %" PRIu64, rank);
        REQUIRE_OK(autoclip_shared_select(own->id, size / 2, &threshold));
        if (i % 100 == 0) require_sound(own->id);
    }
    return NULL;
}

static void test_eight_threads_share_one_history(void) {
    static worker workers[THREADS];
    uint64_t id = make(0);
    size_t count;
    double *norms = test_block(THREADS * PUSHES * sizeof(double));
    run_workers(workers, THREADS, push_and_ask, id, 0);
    join_workers(workers, THREADS);
    REQUIRE_OK(autoclip_shared_values(id, norms, THREADS * PUSHES, &count));
    REQUIRE(count == THREADS * PUSHES, "%zu of %d norms are left", count, THREADS * PUSHES);
    for (size_t i = 0; i < count; ++i) { /* each thread brought each of its numbers once */
        REQUIRE_SAME((double)i, norms[i]);
    }
    require_sound(id);
    REQUIRE_OK(autoclip_shared_destroy(id));
    free(norms);
}

static void *create_and_destroy(void *context) {
    worker *own = context;
    for (uint64_t i = 0; i < ROUNDS; ++i) {
        uint64_t id = make(i % 2 ? 0 : 16);
        uint64_t twin;
        uint64_t size;
        double norm;
        own->made[i] = id;
        for (uint64_t j = 0; j < 40; ++j) REQUIRE_OK(autoclip_shared_push(id, (double)own->number + 0.5));
        REQUIRE_OK(autoclip_shared_push(own->id, (double)i));
        REQUIRE_OK(autoclip_shared_clone(id, &twin));
        REQUIRE_OK(autoclip_shared_destroy(id));
        REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_shared_push(id, 1));
        REQUIRE_OK(autoclip_shared_size(twin, &size));
        REQUIRE(size == (i % 2 ? 40 : 16), "%" PRIu64 " norms", size);
        for (uint64_t rank = 0; rank < size; ++rank) { /* nobody else's norm came in */
            REQUIRE_OK(autoclip_shared_select(twin, rank, &norm));
            REQUIRE_SAME((double)own->number + 0.5, norm);
        }
        REQUIRE_OK(autoclip_shared_destroy(twin));
    }
    return NULL;
}

static void test_histories_come_and_go_on_eight_threads(void) {
    static worker workers[THREADS];
    static uint64_t ids[THREADS * ROUNDS];
    uint64_t common = make(0);
    uint64_t size;
    run_workers(workers, THREADS, create_and_destroy, common, 0);
    join_workers(workers, THREADS);
    for (size_t i = 0; i < THREADS; ++i) memcpy(ids + i * ROUNDS, workers[i].made, sizeof workers[i].made);
    require_distinct(ids, COUNT(ids));
    REQUIRE_OK(autoclip_shared_size(common, &size));
    REQUIRE(size == THREADS * ROUNDS, "%" PRIu64 " norms", size);
    require_sound(common);
    REQUIRE_OK(autoclip_shared_destroy(common));
}

static void *use_until_gone(void *context) {
    worker *own = context;
    for (;;) {
        double threshold;
        autoclip_status status = own->number % 2 ? autoclip_shared_observe(own->id, 1, 50, &threshold)
                                                 : autoclip_shared_merge(own->other, own->id);
        if (status == AUTOCLIP_NO_HISTORY) return NULL;
        REQUIRE(status == AUTOCLIP_OK, "status is %d", (int)status);
        REQUIRE_OK(autoclip_shared_clear(own->other));
        own->done += 1;
    }
}

static void test_history_may_be_destroyed_under_its_users(void) {
    for (int round = 0; round < 20; ++round) {
        static worker workers[4];
        uint64_t id = make(50);
        uint64_t other = make(0);
        uint64_t size = 0;
        run_workers(workers, 4, use_until_gone, id, other);
        while (size < 50) REQUIRE_OK(autoclip_shared_size(id, &size));
        REQUIRE_OK(autoclip_shared_destroy(id));
        join_workers(workers, 4);
        require_sound(other);
        REQUIRE_OK(autoclip_shared_destroy(other));
    }
}

static void *merge_both_ways(void *context) {
    worker *own = context;
    uint64_t to = own->number % 2 ? own->id : own->other;
    uint64_t from = own->number % 2 ? own->other : own->id;
    for (int i = 0; i < 10000; ++i) { /* quick ones: what could lock up lies between two locks, not in the merge */
        REQUIRE_OK(autoclip_shared_push(from, 1));
        REQUIRE_OK(autoclip_shared_merge(to, from));
        REQUIRE_OK(autoclip_shared_clear(to));
    }
    return NULL;
}

static void test_merges_in_both_directions_do_not_lock_up(void) {
    static worker workers[4];
    uint64_t id = make(0);
    uint64_t other = make(0);
    run_workers(workers, 4, merge_both_ways, id, other);
    join_workers(workers, 4);
    require_sound(id);
    require_sound(other);
    REQUIRE_OK(autoclip_shared_destroy(id));
    REQUIRE_OK(autoclip_shared_destroy(other));
}

static void *use_a_while(void *context) {
    worker *own = context;
    uint64_t forks = UINT64_MAX;
    for (uint64_t i = 0; forks > 0; ++i) {
        double threshold;
        uint64_t id = make(0);
        REQUIRE_OK(autoclip_shared_observe(own->id, (double)(i % 100), 50, &threshold));
        REQUIRE_OK(autoclip_shared_push(id, 1));
        REQUIRE_OK(autoclip_shared_destroy(id));
        REQUIRE_OK(autoclip_shared_size(own->other, &forks)); /* cleared when the forks are over */
    }
    return NULL;
}

/* A child has its own copy of every history, and no lock stays locked in it by a thread that it does not have. */
static void test_fork_leaves_the_child_its_own_copies(void) {
    enum { FORKS = 25, MORE = 200 };
    static worker workers[3];
    uint64_t id = make(1000);
    uint64_t more[MORE] = {0};
    /* A thread sanitizer bears no thread with more than 64 locks. */
    const size_t more_count = TEST_THREAD_SANITIZER ? 0 : MORE;
    for (size_t i = 0; i < more_count; ++i) more[i] = make(0);
    uint64_t busy = make(0);
    REQUIRE_OK(autoclip_shared_push(busy, 1));
    REQUIRE_OK(autoclip_shared_push(id, 1));
    run_workers(workers, 3, use_a_while, id, busy);
    for (int i = 0; i < FORKS; ++i) {
        pid_t child = fork();
        REQUIRE(child >= 0, "no fork");
        if (child == 0) {
            alarm(30); /* a child that waits for ever ends, and not well */
            uint64_t made = make(0);
            uint64_t size;
            double threshold;
            REQUIRE_OK(autoclip_shared_push(made, 2));
            REQUIRE_OK(autoclip_shared_observe(id, 1e300, 100, &threshold));
            REQUIRE_SAME(1e300, threshold);
            REQUIRE_OK(autoclip_shared_size(id, &size));
            require_sound(id);
            require_sound(busy);
            for (size_t j = 0; j < more_count; ++j) REQUIRE_OK(autoclip_shared_push(more[j], 1));
            REQUIRE_OK(autoclip_shared_clear(busy));
            REQUIRE_OK(autoclip_shared_destroy(id));
            _exit(0);
        }
        int status = -1;
        REQUIRE(waitpid(child, &status, 0) == child, "no child");
        REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 0, "the child ended with %d", status);
    }
    REQUIRE_OK(autoclip_shared_clear(busy));
    join_workers(workers, 3);
    uint64_t rank;
    uint64_t size;
    require_sound(id);
    REQUIRE_OK(autoclip_shared_size(id, &size));
    REQUIRE_OK(autoclip_shared_rank(id, 1e299, &rank));
    REQUIRE(rank == size, "a norm of a child came back");
    for (size_t i = 0; i < more_count; ++i) {
        REQUIRE_OK(autoclip_shared_size(more[i], &size));
        REQUIRE(size == 0, "a norm of a child came back");
        REQUIRE_OK(autoclip_shared_destroy(more[i]));
    }
    REQUIRE_OK(autoclip_shared_destroy(id));
    REQUIRE_OK(autoclip_shared_destroy(busy));
}

/* The fork comes first: the table only grows, and a fork takes the lock of every place in it. */
#define THREAD_TESTS                                                                                                   \
    TEST(test_fork_leaves_the_child_its_own_copies), TEST(test_eight_threads_share_one_history),                       \
        TEST(test_histories_come_and_go_on_eight_threads), TEST(test_history_may_be_destroyed_under_its_users),        \
        TEST(test_merges_in_both_directions_do_not_lock_up),
#else
#define THREAD_TESTS
#endif

TEST_MAIN(FIRST_TESTS THREAD_TESTS MEMORY_TESTS TEST(test_shared_functions_do_what_their_namesakes_do),
          TEST(test_steps_follow_one_another), TEST(test_step_that_is_taken_again_counts_once),
          TEST(test_step_with_an_outcome_thrown_away_is_replaced), TEST(test_first_step_needs_as_many_norms),
          TEST(test_memory_of_the_steps_is_counted), TEST(test_percentile_of_a_step_is_that_of_its_outcome),
          TEST(test_clear_forgets_the_steps), TEST(test_unknown_ids_are_refused_by_every_function),
          TEST(test_ids_are_never_used_twice));

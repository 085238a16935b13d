/* Percentiles of norms in arrays that belong to a program, and of histories of which a program names each step.
 *
 * SPDX-License-Identifier: MIT */
#if !defined(_WIN32)
#define _POSIX_C_SOURCE 200809L
#endif

#include "arrays.h"

static void test_window_in_arrays_is_that_of_the_model(void) {
    static const size_t windows[] = {1, 2, 3, 8, 50};
    for (uint64_t seed = 0; seed < 5 * VALUES_KINDS; ++seed) {
        const source from = {.state = seed};
        window_program own;
        window_create(&own, windows[seed % 5], (enum values)(seed / 5), from);
        test_now.seed = seed;
        test_now.detail = values_name[seed / 5];
        for (int i = 0; i < 300; ++i) window_step(&own);
        REQUIRE(own.recorded > 200 || own.kind == VALUES_OPPOSITE || own.kind == VALUES_HUGE ||
                    own.kind == VALUES_ANY_BITS,
                "only %zu norms were recorded", own.recorded);
        window_destroy(&own);
    }
}

static void test_window_stays_inside_of_its_arrays(void) {
    for (uint64_t seed = 0; seed < 2000; ++seed) {
        source from = {.state = seed};
        test_now.seed = seed;
        window_from_anything(&from);
    }
}

static void test_tree_of_a_program_is_that_of_the_model(void) {
    for (uint64_t seed = 0; seed < 2 * VALUES_KINDS; ++seed) {
        const source from = {.state = seed};
        tree_program own;
        tree_create(&own, (enum values)(seed / 2), from);
        test_now.seed = seed;
        test_now.detail = values_name[seed / 2];
        for (int i = 0; i < 600; ++i) tree_step(&own);
        tree_destroy(&own);
    }
}

static void test_unknown_history_is_refused(void) {
    float last = 2;
    float threshold;
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_tree_observe(UINT64_MAX, 0, &last, 1, 50, &threshold));
    REQUIRE_STATUS(AUTOCLIP_NO_HISTORY, autoclip_tree_observe(UINT64_MAX, 0, &last, INFINITY, 50, &threshold));
    REQUIRE_SAME(2, (double)last);
}

static void test_tree_takes_as_many_steps_as_an_int32_counts(void) {
    uint64_t id;
    float last = 0;
    float threshold = 5;
    REQUIRE_OK(autoclip_shared_create(0, &id));
    REQUIRE_STATUS(AUTOCLIP_WRONG_STEP, autoclip_tree_observe(id, INT32_MAX, &last, 1, 50, &threshold));
    REQUIRE_SAME(5, (double)threshold);
    REQUIRE_OK(autoclip_shared_destroy(id));
}

/* They hold infinity where there is no norm. */
static void test_window_of_an_earlier_release_goes_on(void) {
    enum { WINDOW = 5 };
    for (size_t recorded = 0; recorded < WINDOW; ++recorded) {
        float now[2 * WINDOW];
        float then[2 * WINDOW];
        for (size_t i = 0; i < WINDOW; ++i) {
            now[i] = now[WINDOW + i] = i < recorded ? (float)(i + 1) : FLT_MAX;
            then[i] = then[WINDOW + i] = i < recorded ? (float)(i + 1) : INFINITY;
        }
        const float norm = recorded % 2 ? 2.5F : NAN;
        const float expected = autoclip_window_observe(now, WINDOW, recorded, norm, 40);
        REQUIRE_SAME((double)expected, (double)autoclip_window_observe(then, WINDOW, recorded, norm, 40));
        for (size_t i = 0; i < 2 * WINDOW; ++i) REQUIRE_SAME((double)now[i], (double)then[i]);
    }
}

#if !defined(_WIN32)
#include <pthread.h>

/* Replicas of one program on threads of their own, which do not wait for each other. */
enum { REPLICAS = 4, REPLICATED_STEPS = 500 };

typedef struct replica {
    pthread_t thread;
    uint64_t id;
    float thresholds[REPLICATED_STEPS];
} replica;

static void *run_replica(void *argument) {
    replica *own = argument;
    float last = INFINITY;
    for (int step = 0; step < REPLICATED_STEPS; ++step) {
        const float norm = (float)(1 + step * 7919 % 1009);
        REQUIRE_OK(autoclip_tree_observe(own->id, (uint64_t)step, &last, norm, 10, &own->thresholds[step]));
    }
    return NULL;
}

static void test_replicas_of_a_program_share_one_history(void) {
    replica replicas[REPLICAS];
    model truth;
    uint64_t id;
    uint64_t size;
    model_create(&truth, 0);
    REQUIRE_OK(autoclip_shared_create(0, &id));
    for (int i = 0; i < REPLICAS; ++i) {
        replicas[i].id = id;
        REQUIRE(pthread_create(&replicas[i].thread, NULL, run_replica, &replicas[i]) == 0, "no thread");
    }
    for (int i = 0; i < REPLICAS; ++i) REQUIRE(pthread_join(replicas[i].thread, NULL) == 0, "no join");
    for (int step = 0; step < REPLICATED_STEPS; ++step) {
        model_push(&truth, (double)(1 + step * 7919 % 1009));
        for (int i = 0; i < REPLICAS; ++i) {
            REQUIRE_SAME((double)model_threshold(&truth, 10), (double)replicas[i].thresholds[step]);
        }
    }
    REQUIRE_OK(autoclip_shared_size(id, &size));
    REQUIRE(size == REPLICATED_STEPS, "%" PRIu64 " norms of %d steps", size, REPLICATED_STEPS);
    REQUIRE_OK(autoclip_shared_destroy(id));
    model_destroy(&truth);
}

#define TESTS_OF_THREADS , TEST(test_replicas_of_a_program_share_one_history)
#else
#define TESTS_OF_THREADS
#endif

TEST_MAIN(TEST(test_window_in_arrays_is_that_of_the_model), TEST(test_window_stays_inside_of_its_arrays),
          TEST(test_tree_of_a_program_is_that_of_the_model), TEST(test_unknown_history_is_refused),
          TEST(test_tree_takes_as_many_steps_as_an_int32_counts),
          TEST(test_window_of_an_earlier_release_goes_on) TESTS_OF_THREADS);

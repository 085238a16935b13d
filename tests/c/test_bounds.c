/* Sizes where the tree changes shape, windows that drain any part of it, and the memory that all this may take.
 *
 * SPDX-License-Identifier: MIT */
#if !defined(_WIN32)
#define _POSIX_C_SOURCE 200809L
#endif

#include "stream.h"

/* Tiny nodes reach every shape within a few hundred norms, so every size is judged. Real nodes are made of whole cache
 * lines: sizes around multiples of eight lines meet every boundary. */
#if defined(AUTOCLIP_LEAF)
enum { STRIDE = 1, GROWTH = 1300, WINDOW = 100, WINDOW_STEP = 1 };
#else
enum { STRIDE = 64, GROWTH = 17000, WINDOW = 5500, WINDOW_STEP = 5499 };
#endif

static bool is_boundary(size_t count) {
    return STRIDE == 1 || count < 40 || count % STRIDE <= 1 || count % STRIDE == STRIDE - 1;
}

/* The first and last norms, the ends of every stretch, and the percentiles between: cheap enough for every size. */
static void probe(autoclip_history *history, const model *truth, uint64_t *state) {
    const size_t last = truth->count - 1;
    const size_t ranks[] = {0, last, last / 2, last / 10, (size_t)(test_random(state) % truth->count)};
    const double percentiles[] = {0, 10, 50, 99.999, 100, 100 * test_uniform(state)};
    for (size_t i = 0; i < sizeof ranks / sizeof *ranks; ++i) {
        double norm;
        uint64_t rank;
        REQUIRE_OK(autoclip_history_select(history, ranks[i], &norm));
        REQUIRE_SAME(truth->sorted[ranks[i]], norm);
        REQUIRE_OK(autoclip_history_rank(history, norm, &rank));
        REQUIRE(rank == model_rank(truth, norm), "rank of %a is %" PRIu64 ", should be %zu", norm, rank,
                model_rank(truth, norm));
    }
    for (size_t i = 0; i < sizeof percentiles / sizeof *percentiles; ++i) {
        double threshold;
        REQUIRE_OK(autoclip_history_percentile(history, percentiles[i], &threshold));
        REQUIRE_SAME(model_percentile(truth, percentiles[i]), threshold);
    }
}

static void test_history_is_sound_while_it_grows_through_every_size(void) {
    static const enum values kinds[] = {VALUES_RANDOM, VALUES_ASCENDING, VALUES_DESCENDING, VALUES_SAW_TOOTH,
                                        VALUES_EQUAL};
    for (size_t k = 0; k < sizeof kinds / sizeof *kinds; ++k) {
        source from = {NULL, 0, 0, k};
        uint64_t state = k;
        autoclip_history *history;
        model truth;
        test_now.detail = values_name[kinds[k]];
        model_create(&truth, 0);
        REQUIRE_OK(autoclip_history_create(0, NULL, &history));
        for (size_t count = 1; count <= GROWTH; ++count) {
            double norm = values_draw(kinds[k], count, &from);
            test_now.step = count;
            REQUIRE_OK(autoclip_history_push(history, norm));
            model_push(&truth, norm);
            probe(history, &truth, &state);
            if (is_boundary(count)) judge_facts(history, &truth);
            if (is_boundary(count) && (STRIDE == 1 || count % 512 <= 1)) judge(history, &truth);
        }
        judge(history, &truth);
        autoclip_history_destroy(history);
        model_destroy(&truth);
    }
}

/* Every way to have `count` norms at once, and a few pushes at both ends and in the middle of what it built. */
static void test_history_is_sound_however_it_was_filled(void) {
    enum { ASCENDING, UNSORTED, TWICE, LOADED, MERGED, CLONED, WAYS };
    for (size_t count = 0; count <= GROWTH; count += count < 300 || STRIDE == 1 ? 1 : 61) {
        uint64_t state = count;
        double *norms = test_block(count * sizeof(double));
        model filled;
        for (size_t i = 0; i < count; ++i) norms[i] = test_uniform(&state);
        model_create(&filled, 0);
        model_extend(&filled, norms, count);
        test_now.seed = count;
        for (int way = 0; way < WAYS; ++way) {
            heap own;
            autoclip_history *history = NULL;
            autoclip_history *other = NULL;
            model truth;
            test_now.step = (uint64_t)way;
            heap_create(&own);
            REQUIRE_OK(autoclip_history_create(0, &own.allocator, &history));
            switch (way) {
            case ASCENDING: REQUIRE_OK(autoclip_history_extend(history, filled.sorted, count)); break;
            case TWICE:
                REQUIRE_OK(autoclip_history_extend(history, norms, count / 3));
                REQUIRE_OK(autoclip_history_extend(history, norms + count / 3, count - count / 3));
                break;
            case LOADED: {
                unsigned char *bytes = test_block(SNAPSHOT_SIZE(count));
                snapshot_write(bytes, 0, filled.sorted, count);
                autoclip_history_destroy(history);
                REQUIRE_OK(autoclip_history_load(bytes, SNAPSHOT_SIZE(count), &own.allocator, &history));
                free(bytes);
                break;
            }
            case MERGED:
                REQUIRE_OK(autoclip_history_create(0, &own.allocator, &other));
                REQUIRE_OK(autoclip_history_extend(other, norms, count / 2));
                REQUIRE_OK(autoclip_history_extend(history, norms + count / 2, count - count / 2));
                REQUIRE_OK(autoclip_history_merge(history, other));
                autoclip_history_destroy(other);
                break;
            case CLONED:
                REQUIRE_OK(autoclip_history_extend(history, norms, count));
                REQUIRE_OK(autoclip_history_clone(history, &other));
                autoclip_history_destroy(history);
                history = other;
                break;
            default: REQUIRE_OK(autoclip_history_extend(history, norms, count)); break;
            }
            judge(history, &filled);
            model_create(&truth, 0);
            model_copy(&truth, &filled);
            for (int i = 0; i < 18; ++i) {
                double norm = i % 3 == 0 ? -1 - i : i % 3 == 1 ? 2 + i : 0.5;
                REQUIRE_OK(autoclip_history_push(history, norm));
                model_push(&truth, norm);
                if (STRIDE == 1) judge_facts(history, &truth);
            }
            judge(history, &truth);
            autoclip_history_destroy(history);
            model_destroy(&truth);
            heap_destroy(&own);
        }
        model_destroy(&filled);
        free(norms);
    }
}

/* Fill a window in one order, one by one or at once (then the last nodes hold as little as one norm), and push values
 * that all land in one place: the rest of the tree drains in the order of its filling, so that nodes empty from the
 * left, from the right, and everywhere at once. */
static void test_window_drains_in_every_order(void) {
    static const enum values kinds[] = {VALUES_ASCENDING, VALUES_DESCENDING, VALUES_RANDOM, VALUES_SAW_TOOTH,
                                        VALUES_EQUAL};
    const size_t fills = STRIDE == 1 ? 5 : 3; /* the model is slow at large windows */
    static const double floods[] = {-1e300, 10, 1e300};
    for (uint64_t window = 1; window <= WINDOW; window += WINDOW_STEP) {
        for (size_t fill = 0; fill < fills; ++fill) {
            for (size_t flood = 0; flood < 1 + 2 * (sizeof floods / sizeof *floods); ++flood) {
                const bool at_once = flood % 2 == 1;
                source from = {NULL, 0, 0, fill};
                uint64_t state = fill;
                autoclip_history *history;
                model truth;
                double *norms = test_block((size_t)window * sizeof(double));
                test_now.detail = values_name[kinds[fill]];
                test_now.seed = window;
                model_create(&truth, window);
                REQUIRE_OK(autoclip_history_create(window, NULL, &history));
                for (uint64_t i = 0; at_once && i < window; ++i) norms[i] = values_draw(kinds[fill], i, &from);
                if (at_once) {
                    REQUIRE_OK(autoclip_history_extend(history, norms, (size_t)window));
                    model_extend(&truth, norms, (size_t)window);
                }
                for (uint64_t i = at_once ? window : 0; i < 3 * window + 5; ++i) {
                    const bool filling = i < window || flood / 2 == sizeof floods / sizeof *floods;
                    double norm = filling ? values_draw(kinds[fill], i, &from) : floods[flood / 2];
                    test_now.step = i;
                    REQUIRE_OK(autoclip_history_push(history, norm));
                    model_push(&truth, norm);
                    if (STRIDE == 1 || i % 16 == 0) probe(history, &truth, &state);
                    if (STRIDE == 1 || i % 512 == 0) judge_facts(history, &truth);
                    if (i % (STRIDE == 1 ? 16 : 4096) == 0) judge(history, &truth);
                }
                judge(history, &truth);
                autoclip_history_destroy(history);
                model_destroy(&truth);
                free(norms);
            }
        }
    }
}

/* Extend of every length into a window of every fullness: what remains, and its order of age. */
static void test_window_takes_arrays_of_every_length(void) {
    static const uint64_t windows[] = {1, 2, 3, 4, 5, 9, 16, 33, 300, 700};
    for (size_t w = 0; w < sizeof windows / sizeof *windows; ++w) {
        uint64_t window = windows[w];
        for (uint64_t before = 0; before <= 2 * window; before += 1 + window / 8) {
            for (uint64_t count = 0; count <= 2 * window + 1; count += 1 + window / 16) {
                uint64_t state = before + count;
                heap own;
                autoclip_history *history;
                model truth;
                double *norms = test_block((size_t)count * sizeof(double));
                test_now.seed = window;
                test_now.step = count;
                heap_create(&own);
                model_create(&truth, window);
                REQUIRE_OK(autoclip_history_create(window, &own.allocator, &history));
                for (uint64_t i = 0; i < before; ++i) {
                    double norm = test_uniform(&state);
                    REQUIRE_OK(autoclip_history_push(history, norm));
                    model_push(&truth, norm);
                }
                for (uint64_t i = 0; i < count; ++i) norms[i] = test_uniform(&state) - 0.5;
                REQUIRE_OK(autoclip_history_extend(history, norms, (size_t)count));
                model_extend(&truth, norms, (size_t)count);
                judge(history, &truth);
                REQUIRE_OK(autoclip_history_push(history, 7)); /* and the right one leaves next */
                model_push(&truth, 7);
                judge(history, &truth);
                autoclip_history_destroy(history);
                model_destroy(&truth);
                heap_destroy(&own);
                free(norms);
            }
        }
    }
}

/* A whole run in one call, of every length, beside what is there already. */
static void test_observe_many_takes_arrays_of_every_length(void) {
    static const uint64_t windows[] = {0, 1, 7, 300};
    static const double percentiles[2] = {10, 99.9};
    for (size_t w = 0; w < sizeof windows / sizeof *windows; ++w) {
        for (size_t before = 0; before <= 600; before += 1 + before * 3) {
            for (size_t count = 0; count <= 600; count += 1 + count / 8) {
                uint64_t state = before + count;
                heap own;
                autoclip_history *history;
                model truth;
                double *norms = test_block((before + count) * sizeof(double));
                double *thresholds = test_block(2 * count * sizeof(double));
                for (size_t i = 0; i < before + count; ++i) norms[i] = test_uniform(&state);
                test_now.seed = windows[w];
                test_now.step = count;
                heap_create(&own);
                model_create(&truth, windows[w]);
                REQUIRE_OK(autoclip_history_create(windows[w], &own.allocator, &history));
                REQUIRE_OK(autoclip_history_extend(history, norms, before));
                model_extend(&truth, norms, before);
                REQUIRE_OK(autoclip_history_observe_many(history, norms + before, count, percentiles, 2, thresholds));
                for (size_t i = 0; i < count; ++i) {
                    model_push(&truth, norms[before + i]);
                    REQUIRE_SAME(model_percentile(&truth, percentiles[0]), thresholds[2 * i]);
                    REQUIRE_SAME(model_percentile(&truth, percentiles[1]), thresholds[2 * i + 1]);
                }
                judge(history, &truth);
                autoclip_history_destroy(history);
                model_destroy(&truth);
                heap_destroy(&own);
                free(thresholds);
                free(norms);
            }
        }
    }
}

/* --- Memory ------------------------------------------------------------------------------------------------------- */

static void test_empty_history_takes_at_most_a_kilobyte(void) {
    static const uint64_t windows[] = {0, 1, 1000, 1000000000, UINT64_MAX};
    for (size_t w = 0; w < sizeof windows / sizeof *windows; ++w) {
        heap own;
        autoclip_history *history;
        double norm = 1;
        heap_create(&own);
        REQUIRE_OK(autoclip_history_create(windows[w], &own.allocator, &history));
        REQUIRE(own.bytes <= 1024, "an empty history takes %" PRIu64 " bytes", own.bytes);
        uint64_t empty = own.bytes;
        for (int i = 0; i < 3000; ++i) REQUIRE_OK(autoclip_history_push(history, norm += 1));
        autoclip_history_clear(history);
        REQUIRE(own.bytes <= empty, "a cleared history takes %" PRIu64 " bytes, a new one %" PRIu64, own.bytes, empty);
        REQUIRE(autoclip_history_size(history) == 0, "clear left %" PRIu64 " norms", autoclip_history_size(history));
        REQUIRE(autoclip_history_window(history) == windows[w], "clear lost the window");
        autoclip_history_destroy(history);
        heap_destroy(&own);
    }
}

/* Only a -0.0 among ascending norms, which must be rewritten, takes memory to sort them in. */
static void test_ascending_norms_are_not_sorted_again(void) {
    enum { COUNT = 1000 };
    static const double zeros[] = {0.5, 0.0, -0.0};
    uint64_t requests[sizeof zeros / sizeof *zeros];
    for (size_t z = 0; z < sizeof zeros / sizeof *zeros; ++z) {
        heap own;
        autoclip_history *history;
        double norms[COUNT];
        for (int i = 0; i < COUNT; ++i) norms[i] = i < 3 ? -1 : i < 6 ? zeros[z] : 1 + i / 4;
        heap_create(&own);
        REQUIRE_OK(autoclip_history_create(0, &own.allocator, &history));
        heap_arm(&own, 0, false);
        REQUIRE_OK(autoclip_history_extend(history, norms, COUNT));
        requests[z] = own.requests;
        autoclip_history_destroy(history);
        heap_destroy(&own);
    }
    REQUIRE(requests[1] == requests[0], "zeros take %" PRIu64 " requests, not %" PRIu64, requests[1], requests[0]);
    REQUIRE(requests[2] > requests[0], "-0.0 takes %" PRIu64 " requests", requests[2]);
}

#if !defined(AUTOCLIP_LEAF) /* the figures are those of the real nodes */

static void test_small_history_takes_at_most_four_kilobytes(void) {
    heap own;
    autoclip_history *history;
    uint64_t state = 1;
    heap_create(&own);
    REQUIRE_OK(autoclip_history_create(0, &own.allocator, &history));
    for (int i = 1; i <= 100; ++i) {
        REQUIRE_OK(autoclip_history_push(history, test_uniform(&state)));
        REQUIRE(own.bytes <= 4096, "%d norms take %" PRIu64 " bytes", i, own.bytes);
    }
    printf("  100 norms: %" PRIu64 " bytes\n", own.bytes);
    autoclip_history_destroy(history);
    heap_destroy(&own);
}

static void test_memory_per_norm_is_bounded(void) {
    enum { MILLION = 1000000 };
    enum { PUSHED, ASCENDING, DRIFTING, OBSERVED, IN_PARTS, EXTENDED, LOADED, WINDOWED, CASES };
    static const char *const names[CASES] = {"pushed at random", "pushed ascending",        "pushed drifting",
                                             "observed at once", "extended in parts",       "extended",
                                             "loaded",           "in a window, twice round"};
    static const double most[CASES] = {13, 8.6, 13, 13, 10.5, 8.6, 8.6, 8.6 + 13};
    uint64_t state = 4;
    double *norms = test_block(MILLION * sizeof(double));
    for (int way = 0; way < CASES; ++way) {
        heap own;
        autoclip_history *history;
        test_now.detail = names[way];
        heap_create(&own);
        REQUIRE_OK(autoclip_history_create(way == WINDOWED ? MILLION : 0, &own.allocator, &history));
        for (int i = 0; i < MILLION; ++i) {
            double u = test_uniform(&state);
            norms[i] = way == ASCENDING ? i : way == DRIFTING ? (1 + u) / (1 + i * 1e-3) : u;
        }
        if (way == OBSERVED) REQUIRE_OK(autoclip_history_observe_many(history, norms, MILLION, NULL, 0, NULL));
        for (size_t done = 0; way == IN_PARTS && done < MILLION;) { /* the last is too small a part to rebuild for */
            size_t part = done < 801000 ? 267000 : MILLION - done;
            REQUIRE_OK(autoclip_history_extend(history, norms + done, part));
            done += part;
        }
        if (way == EXTENDED || way == LOADED) REQUIRE_OK(autoclip_history_extend(history, norms, MILLION));
        if (way == LOADED) {
            size_t size = autoclip_history_save_size(history);
            unsigned char *bytes = test_block(size);
            REQUIRE_OK(autoclip_history_save(history, bytes, size, &size));
            autoclip_history_destroy(history);
            REQUIRE_OK(autoclip_history_load(bytes, size, &own.allocator, &history));
            free(bytes);
        }
        for (int round = 0; round < (way == WINDOWED ? 2 : way <= DRIFTING ? 1 : 0); ++round) {
            for (int i = 0; i < MILLION; ++i) REQUIRE_OK(autoclip_history_push(history, norms[i]));
        }
        const char *reason;
        REQUIRE_OK(autoclip_history_check(history, &reason));
        double each = (double)own.bytes / MILLION;
        printf("  10^6 norms %s: %.2f bytes per norm, at most %.1f\n", names[way], each, most[way]);
        REQUIRE(each <= most[way], "%.3f bytes per norm", each);
        autoclip_history_destroy(history);
        heap_destroy(&own);
    }
    free(norms);
}

/* With the standard allocator, which aligns large blocks. */
static void test_large_history_grows_with_the_standard_allocator(void) {
    enum { LOADED = 2300000, PUSHED = 300000 };
    autoclip_history *history;
    const char *reason = "";
    double norm;
    double *norms = test_block(LOADED * sizeof(double));
    for (int i = 0; i < LOADED; ++i) norms[i] = i;
    REQUIRE_OK(autoclip_history_create(0, NULL, &history));
    REQUIRE_OK(autoclip_history_extend(history, norms, LOADED));
    for (int i = 0; i < PUSHED; ++i) REQUIRE_OK(autoclip_history_push(history, LOADED + i));
    REQUIRE(autoclip_history_check(history, &reason) == AUTOCLIP_OK, "%s", reason);
    for (int i = 0; i < LOADED + PUSHED; i += 9973) {
        REQUIRE_OK(autoclip_history_select(history, (uint64_t)i, &norm));
        REQUIRE_SAME((double)i, norm);
    }
    double each = (double)autoclip_history_memory(history) / (LOADED + PUSHED);
    REQUIRE(each <= 9.5, "%.3f bytes per norm", each);
    autoclip_history_destroy(history);
    free(norms);
}

#define MEMORY_TESTS                                                                                                   \
    TEST(test_small_history_takes_at_most_four_kilobytes), TEST(test_memory_per_norm_is_bounded),                      \
        TEST(test_large_history_grows_with_the_standard_allocator),
#else
#define MEMORY_TESTS
#endif

/* Norms that crowd together around one, and there again, with some far away: each level of the sort finds one range full. */
static void crowd(double *norms, size_t count) {
    uint64_t state = 1;
    for (size_t i = 0; i < count; ++i) {
        const int depth = (int)(test_random(&state) % 80);
        norms[i] =
            depth < 52 ? 1 + 1.0 / (double)(UINT64_C(1) << depth) : 1 + (double)(test_random(&state) % 64) * 0x1p-52;
    }
    norms[count / 2] = 1e300;
    norms[count / 3] = 0x1p-1074;
    norms[count / 4] = -1e300;
}

static void test_norms_that_crowd_together_are_sorted(void) {
    for (size_t count = 20; count <= 40000; count *= 3) {
        double *norms = test_block(count * sizeof *norms);
        for (uint64_t window = 0; window <= count; window += count) {
            autoclip_history *history;
            model truth;
            crowd(norms, count);
            model_create(&truth, window);
            model_extend(&truth, norms, count);
            REQUIRE_OK(autoclip_history_create(window, NULL, &history));
            REQUIRE_OK(autoclip_history_extend(history, norms, count));
            judge(history, &truth);
            autoclip_history_destroy(history);
            model_destroy(&truth);
        }
        free(norms);
    }
}

/* Sanitizers make frames larger. */
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(memory_sanitizer) || __has_feature(thread_sanitizer)
#define SANITIZED
#endif
#endif
#if !defined(_WIN32) && !defined(SANITIZED) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#include <limits.h>
#include <pthread.h>

enum { CROWD = 40000 };

static void *run_on_a_small_stack(void *crowded) {
    const double *norms = crowded;
    autoclip_history *history;
    autoclip_history *other;
    double thresholds[3];
    const double percentiles[3] = {0, 10, 90};
    const char *reason;
    REQUIRE_OK(autoclip_history_create(0, NULL, &history));
    REQUIRE_OK(autoclip_history_extend(history, norms, CROWD));
    for (int i = 0; i < CROWD; ++i) {
        REQUIRE_OK(autoclip_history_observe_many(history, norms + i, 1, percentiles, 3, thresholds));
    }
    REQUIRE_OK(autoclip_history_clone(history, &other));
    REQUIRE_OK(autoclip_history_merge(other, history));
    REQUIRE_OK(autoclip_history_check(other, &reason));
    size_t size = autoclip_history_save_size(other);
    void *bytes = test_block(size);
    REQUIRE_OK(autoclip_history_save(other, bytes, size, &size));
    autoclip_history_destroy(other);
    REQUIRE_OK(autoclip_history_load(bytes, size, NULL, &other));
    autoclip_history_destroy(other);
    free(bytes);
    autoclip_history_destroy(history);
    REQUIRE_OK(autoclip_history_create(CROWD / 2, NULL, &history));
    REQUIRE_OK(autoclip_history_extend(history, norms, CROWD));
    for (int i = 0; i < CROWD; ++i) REQUIRE_OK(autoclip_history_push(history, norms[i]));
    autoclip_history_destroy(history);
    return NULL;
}

static void test_stack_of_sixty_four_kilobytes_is_enough(void) {
    double *norms = test_block(CROWD * sizeof *norms);
    pthread_attr_t attributes;
    pthread_t thread;
    crowd(norms, CROWD);
    REQUIRE(pthread_attr_init(&attributes) == 0, "no attributes");
    size_t size = (64 << 10) + (8 << 10); /* the thread itself and this test take some */
    if (size < (size_t)PTHREAD_STACK_MIN) size = (size_t)PTHREAD_STACK_MIN; /* 128 kilobytes on ARM */
    REQUIRE(pthread_attr_setstacksize(&attributes, size) == 0, "no small stack");
    REQUIRE(pthread_create(&thread, &attributes, run_on_a_small_stack, norms) == 0, "no thread");
    REQUIRE(pthread_join(thread, NULL) == 0, "no join");
    (void)pthread_attr_destroy(&attributes);
    free(norms);
}

#define STACK_TESTS TEST(test_stack_of_sixty_four_kilobytes_is_enough),
#else
#define STACK_TESTS
#endif

TEST_MAIN(MEMORY_TESTS STACK_TESTS TEST(test_norms_that_crowd_together_are_sorted),
          TEST(test_empty_history_takes_at_most_a_kilobyte), TEST(test_ascending_norms_are_not_sorted_again),
          TEST(test_history_is_sound_while_it_grows_through_every_size),
          TEST(test_history_is_sound_however_it_was_filled), TEST(test_window_drains_in_every_order),
          TEST(test_window_takes_arrays_of_every_length), TEST(test_observe_many_takes_arrays_of_every_length));

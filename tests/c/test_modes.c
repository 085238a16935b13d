/* A thread that flushes subnormal numbers to zero gets the answers and the snapshots of one that does not, and keeps its
 * mode.
 *
 * SPDX-License-Identifier: MIT */
#include "stream.h"

#include "../../csrc/src/float_mode.h"

enum { NORMS = 700, SAVED = SNAPSHOT_SIZE(4 * NORMS) };

typedef struct answers {
    double thresholds[NORMS]; /* of norms observed, one at a time */
    double replayed[2 * NORMS];
    double stepped[NORMS];
    double asked[3];
    uint64_t ranks[NORMS];
    double values[4 * NORMS];
    size_t size;
    unsigned char saved[SAVED];
    unsigned char loaded[SAVED];
} answers;

/* Nothing but calls of the kernel: arithmetic of the test itself would be flushed too. */
static void ask(uint64_t window, const double *norms, answers *own) {
    static const double percentiles[2] = {10, 62.5};
    autoclip_history *history = NULL;
    autoclip_history *other = NULL;
    const char *reason = "";
    uint64_t id;
    size_t size;
    REQUIRE_OK(autoclip_history_create(window, NULL, &history));
    for (size_t i = 0; i < NORMS; ++i) {
        REQUIRE_OK(autoclip_history_observe(history, norms[i], 10, &own->thresholds[i]));
        REQUIRE(autoclip_history_check(history, &reason) == AUTOCLIP_OK, "%s", reason);
    }
    REQUIRE_OK(autoclip_history_extend(history, norms, NORMS / 7));
    REQUIRE_OK(autoclip_history_extend(history, norms, NORMS));
    REQUIRE_OK(autoclip_history_observe_many(history, norms, NORMS, percentiles, 2, own->replayed));
    REQUIRE_OK(autoclip_history_clone(history, &other));
    if (window == 0) REQUIRE_OK(autoclip_history_merge(other, history));
    REQUIRE(autoclip_history_check(other, &reason) == AUTOCLIP_OK, "%s", reason);
    autoclip_history_destroy(other);
    REQUIRE_OK(autoclip_history_percentile(history, 33, &own->asked[0]));
    REQUIRE_OK(autoclip_history_select(history, 0, &own->asked[1]));
    REQUIRE_OK(autoclip_history_order_statistics(history, 0, 1, &own->asked[2]));
    for (size_t i = 0; i < NORMS; ++i) REQUIRE_OK(autoclip_history_rank(history, norms[i], &own->ranks[i]));
    REQUIRE_OK(autoclip_history_values(history, own->values, 4 * NORMS, &size));
    REQUIRE_OK(autoclip_history_save(history, own->saved, SAVED, &own->size));
    autoclip_history_destroy(history);
    REQUIRE_OK(autoclip_history_load(own->saved, own->size, NULL, &history));
    REQUIRE_OK(autoclip_history_save(history, own->loaded, SAVED, &size));
    autoclip_history_destroy(history);
    REQUIRE_OK(autoclip_shared_create(0, &id));
    for (size_t i = 0; i < NORMS; ++i) { /* each step is taken twice, the second time with its last outcome */
        const double previous = i > 0 ? norms[i - 1] : 0.0;
        REQUIRE_OK(autoclip_shared_observe_step(id, i, previous, norms[(i + 1) % NORMS], 50, &own->stepped[i]));
        REQUIRE_OK(autoclip_shared_observe_step(id, i, previous, norms[i], 50, &own->stepped[i]));
    }
    REQUIRE_OK(autoclip_shared_destroy(id));
}

static void test_thread_that_flushes_gets_the_same_bits(void) {
    static const uint64_t windows[] = {0, 1, 40};
    static const enum values kinds[] = {VALUES_DENORMAL, VALUES_RANDOM, VALUES_ZERO};
    const float_mode standard = float_mode_get();
    const float_mode flushing = standard | float_mode_flushes;
    for (int way = 0; way < 9; ++way) {
        static answers expected;
        static answers found;
        source from = {.state = (uint64_t)way};
        double norms[NORMS];
        test_now.step = (uint64_t)way;
        for (uint64_t i = 0; i < NORMS; ++i) {
            norms[i] = values_draw(kinds[way / 3], i, &from);
            if (kinds[way / 3] == VALUES_DENORMAL && i % 3 == 0) norms[i] = -norms[i];
            if (kinds[way / 3] == VALUES_ZERO && i % 2 == 0)
                norms[i] = 0x1p-1022 * (1 + norms[i]); /* the least normal */
        }
        memset(&expected, 0, sizeof expected);
        memset(&found, 0, sizeof found);
        ask(windows[way % 3], norms, &expected);
        float_mode_set(flushing);
        ask(windows[way % 3], norms, &found);
        const float_mode kept = float_mode_get();
        float_mode_set(standard);
        REQUIRE((kept & float_mode_flushes) == float_mode_flushes, "the thread has lost its mode");
        REQUIRE((standard & float_mode_flushes) == 0, "the test began in the other mode");
        REQUIRE(memcmp(&expected, &found, sizeof found) == 0, "other answers in window %d", (int)windows[way % 3]);
        REQUIRE(memcmp(found.saved, found.loaded, found.size) == 0, "other bytes after loading");
    }
}

TEST_MAIN(TEST(test_thread_that_flushes_gets_the_same_bits));

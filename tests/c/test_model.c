/* Random streams of every operation, judged by the model; and the model itself, judged by numpy and by XXH64's authors.
 *
 * SPDX-License-Identifier: MIT */
#include "stream.h"

static void test_model_agrees_with_numpy(void) {
    /* numpy 2.4: numpy.percentile(norms[:count], percentile).hex() */
    static const double norms[] = {0.1, 0.3, 0.7, 1.3, 2.9, 17.1, 1000.3};
    static const struct {
        size_t count;
        double percentile;
        double answer;
    } known[] = {
        {1, 0, 0x1.999999999999ap-4},      {1, 50, 0x1.999999999999ap-4},
        {1, 100, 0x1.999999999999ap-4},    {2, 0, 0x1.999999999999ap-4},
        {2, 1e-300, 0x1.999999999999ap-4}, {2, 7, 0x1.d2f1a9fbe76c9p-4},
        {2, 10, 0x1.eb851eb851eb9p-4},     {2, 33.333, 0x1.5554fbdad7518p-3},
        {2, 50, 0x1.999999999999ap-3},     {2, 90, 0x1.1eb851eb851ebp-2},
        {2, 99.999, 0x1.3332acfb762d8p-2}, {2, 100, 0x1.3333333333333p-2},
        {3, 10, 0x1.1eb851eb851ecp-3},     {3, 33.333, 0x1.dddd2ae8e1d64p-3},
        {3, 50, 0x1.3333333333333p-2},     {3, 90, 0x1.3d70a3d70a3d7p-1},
        {3, 99.999, 0x1.666559f6ec5b0p-1}, {3, 100, 0x1.6666666666666p-1},
        {7, 0, 0x1.999999999999ap-4},      {7, 1e-300, 0x1.999999999999ap-4},
        {7, 7, 0x1.78d4fdf3b645ap-3},      {7, 10, 0x1.c28f5c28f5c2ap-3},
        {7, 33.333, 0x1.666559f6ec5b0p-1}, {7, 50, 0x1.4cccccccccccdp+0},
        {7, 75, 0x1.4000000000000p+3},     {7, 90, 0x1.9a6147ae147b4p+8},
        {7, 99.999, 0x1.f41ed959a3095p+9}, {7, 99.99999999999999, 0x1.f42666666665ep+9},
        {7, 100, 0x1.f426666666666p+9},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; ++i) {
        model truth;
        autoclip_history *history;
        double threshold;
        model_create(&truth, 0);
        model_extend(&truth, norms, known[i].count);
        REQUIRE_SAME(known[i].answer, model_percentile(&truth, known[i].percentile));
        REQUIRE_OK(autoclip_history_create(0, NULL, &history));
        REQUIRE_OK(autoclip_history_extend(history, norms, known[i].count));
        REQUIRE_OK(autoclip_history_percentile(history, known[i].percentile, &threshold));
        REQUIRE_SAME(known[i].answer, threshold);
        autoclip_history_destroy(history);
        model_destroy(&truth);
    }
}

static void test_model_computes_xxh64(void) {
    static const struct {
        const char *text;
        uint64_t hash;
    } known[] = {
        {"", UINT64_C(0xEF46DB3751D8E999)},
        {"a", UINT64_C(0xD24EC4F1A98C6E5B)},
        {"abc", UINT64_C(0x44BC2CF5AD770999)},
        {"Nobody inspects the spammish repetition", UINT64_C(0xFBCEA83C8A378BF1)},
    };
    for (size_t i = 0; i < sizeof known / sizeof *known; ++i) {
        uint64_t hash = xxh64((const unsigned char *)known[i].text, strlen(known[i].text));
        REQUIRE(hash == known[i].hash, "XXH64 of '%s' is %016" PRIX64, known[i].text, hash);
    }
}

static void test_history_follows_the_model_on_random_streams(void) {
    static const uint64_t windows[] = {0, 1, 2, 3, 7, 50, 1000};
    for (size_t w = 0; w < sizeof windows / sizeof *windows; ++w) {
        for (int kind = 0; kind < VALUES_KINDS; ++kind) {
            stream own;
            source from = {NULL, 0, 0, 1000 * (uint64_t)kind + windows[w]};
            test_now.seed = from.state;
            test_now.step = 0;
            stream_create(&own, windows[w], (enum values)kind, from);
            for (int i = 0; i < 400; ++i) stream_step(&own);
            stream_destroy(&own);
        }
    }
}

/* Every percentile that anyone has tripped over, at every size from 1 to a few leaves. */
static void test_percentile_agrees_at_every_size(void) {
    static const double percentiles[] = {0,
                                         0x1p-1074,
                                         1e-300,
                                         1e-5,
                                         1,
                                         5,
                                         10,
                                         25,
                                         100.0 / 3,
                                         50.0,
                                         200.0 / 3,
                                         75,
                                         90,
                                         99,
                                         99.999,
                                         99.99999,
                                         0x1.8ffffffffffffp+6,
                                         100};
    for (int kind = 0; kind < VALUES_ANY_BITS; ++kind) {
        source from = {NULL, 0, 0, (uint64_t)kind};
        autoclip_history *history;
        model truth;
        test_now.detail = values_name[kind];
        model_create(&truth, 0);
        REQUIRE_OK(autoclip_history_create(0, NULL, &history));
        for (uint64_t i = 0; i < 700; ++i) {
            double norm = values_draw((enum values)kind, i, &from);
            test_now.step = i;
            REQUIRE_OK(autoclip_history_push(history, norm));
            model_push(&truth, norm);
            for (size_t j = 0; j < sizeof percentiles / sizeof *percentiles; ++j) {
                double threshold = SENTINEL;
                REQUIRE_OK(autoclip_history_percentile(history, percentiles[j], &threshold));
                REQUIRE_SAME(model_percentile(&truth, percentiles[j]), threshold);
            }
        }
        judge(history, &truth);
        autoclip_history_destroy(history);
        model_destroy(&truth);
    }
}

/* A run as AutoClip makes it: the same percentile at every step, now and then another one, other queries between. */
static void test_observe_follows_the_model_on_long_runs(void) {
    static const uint64_t windows[] = {0, 5000};
    static const enum values kinds[] = {VALUES_RANDOM,    VALUES_DRIFTING,   VALUES_SAW_TOOTH,
                                        VALUES_ASCENDING, VALUES_DESCENDING, VALUES_TWO};
    for (size_t w = 0; w < sizeof windows / sizeof *windows; ++w) {
        for (size_t k = 0; k < sizeof kinds / sizeof *kinds; ++k) {
            source from = {NULL, 0, 0, 77 + k};
            stream own;
            double percentile = 10;
            test_now.seed = from.state;
            stream_create(&own, windows[w], kinds[k], from);
            for (uint64_t i = 0; i < 15000; ++i) {
                double norm = values_draw(kinds[k], i, &own.source);
                double threshold = SENTINEL;
                test_now.step = i;
                if (i % 1000 == 999) {
                    percentile = percentile == 10 ? 90 : percentile == 90 ? 0 : percentile == 0 ? 100 : 10;
                }
                model_push(&own.truth, norm);
                REQUIRE_OK(autoclip_history_observe(own.history, norm, percentile, &threshold));
                REQUIRE_SAME(model_percentile(&own.truth, percentile), threshold);
                if (i % 7 == 0) {
                    stream_select(&own);
                    stream_rank(&own);
                    stream_percentile(&own);
                }
                if (i % 500 == 0) stream_judge(&own);
            }
            stream_judge(&own);
            stream_destroy(&own);
        }
    }
}

/* rank(select(r)) is the first rank of an equal norm, and select(rank(x)) is x, for every r. */
static void test_rank_and_select_are_inverses(void) {
    for (int kind = 0; kind < VALUES_ANY_BITS; ++kind) {
        source from = {NULL, 0, 0, (uint64_t)kind};
        autoclip_history *history;
        test_now.detail = values_name[kind];
        REQUIRE_OK(autoclip_history_create(0, NULL, &history));
        for (uint64_t i = 0; i < 1500; ++i) {
            REQUIRE_OK(autoclip_history_push(history, values_draw((enum values)kind, i, &from)));
        }
        double before = (double)-INFINITY;
        for (uint64_t rank = 0; rank < 1500; ++rank) {
            double norm;
            double again;
            uint64_t first;
            REQUIRE_OK(autoclip_history_select(history, rank, &norm));
            REQUIRE_OK(autoclip_history_rank(history, norm, &first));
            REQUIRE(first <= rank && (norm > before) == (first == rank), "rank of norm %" PRIu64 " is %" PRIu64, rank,
                    first);
            REQUIRE_OK(autoclip_history_select(history, first, &again));
            REQUIRE_SAME(norm, again);
            before = norm;
        }
        autoclip_history_destroy(history);
    }
}

TEST_MAIN(TEST(test_model_agrees_with_numpy), TEST(test_model_computes_xxh64),
          TEST(test_history_follows_the_model_on_random_streams), TEST(test_percentile_agrees_at_every_size),
          TEST(test_observe_follows_the_model_on_long_runs), TEST(test_rank_and_select_are_inverses));

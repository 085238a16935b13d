/* Every status of the header, each at least once, and what a refused call leaves behind: nothing.
 *
 * SPDX-License-Identifier: MIT */
#include "stream.h"

static const double not_finite[] = {(double)NAN, (double)-NAN, (double)INFINITY, (double)-INFINITY};
static const double not_percentiles[] = {(double)NAN,      -0x1p-1074,       -1, 0x1.9000000000001p+6, 101,
                                         (double)INFINITY, (double)-INFINITY};
#define COUNT(array) (sizeof(array) / sizeof *(array))

/* A history of a few norms beside its model; the window may be 0. */
typedef struct subject {
    heap heap;
    autoclip_history *history;
    model truth;
} subject;

static void subject_create(subject *own, uint64_t window, size_t count) {
    memset(own, 0, sizeof *own);
    heap_create(&own->heap);
    model_create(&own->truth, window);
    REQUIRE_OK(autoclip_history_create(window, &own->heap.allocator, &own->history));
    for (size_t i = 0; i < count; ++i) {
        REQUIRE_OK(autoclip_history_push(own->history, (double)(i * 7 % 11)));
        model_push(&own->truth, (double)(i * 7 % 11));
    }
}

static void subject_destroy(subject *own) {
    judge(own->history, &own->truth); /* the end of every test: as it was */
    autoclip_history_destroy(own->history);
    model_destroy(&own->truth);
    heap_destroy(&own->heap);
}

static void test_not_finite_norms_are_refused_whole(void) {
    for (uint64_t window = 0; window <= 6; window += 3) {
        for (size_t b = 0; b < COUNT(not_finite); ++b) {
            for (size_t count = 0; count <= 20; count += 10) {
                subject own;
                double threshold = SENTINEL;
                double bad = not_finite[b];
                subject_create(&own, window, count);
                REQUIRE_STATUS(AUTOCLIP_NOT_FINITE, autoclip_history_push(own.history, bad));
                REQUIRE_STATUS(AUTOCLIP_NOT_FINITE, autoclip_history_observe(own.history, bad, 10, &threshold));
                REQUIRE_SAME(SENTINEL, threshold);
                for (size_t length = 1; length <= 40; length += 3) {
                    for (size_t at = 0; at < length; ++at) {
                        double norms[40];
                        double percentiles[2] = {0, 50};
                        double thresholds[80];
                        for (size_t i = 0; i < length; ++i) {
                            norms[i] = (double)i;
                            thresholds[2 * i] = thresholds[2 * i + 1] = SENTINEL;
                        }
                        norms[at] = bad;
                        REQUIRE_STATUS(AUTOCLIP_NOT_FINITE, autoclip_history_extend(own.history, norms, length));
                        REQUIRE_STATUS(AUTOCLIP_NOT_FINITE, autoclip_history_observe_many(own.history, norms, length,
                                                                                          percentiles, 2, thresholds));
                        for (size_t i = 0; i < 2 * length; ++i) REQUIRE_SAME(SENTINEL, thresholds[i]);
                        judge_facts(own.history, &own.truth);
                    }
                }
                uint64_t rank = SENTINEL_SIZE;
                if (isnan(bad)) {
                    REQUIRE_STATUS(AUTOCLIP_NOT_FINITE, autoclip_history_rank(own.history, bad, &rank));
                    REQUIRE(rank == SENTINEL_SIZE, "a rank was written");
                } else {
                    REQUIRE_OK(autoclip_history_rank(own.history, bad, &rank));
                    REQUIRE(rank == (bad > 0 ? own.truth.count : 0), "rank of %g is %" PRIu64, bad, rank);
                }
                subject_destroy(&own);
            }
        }
    }
}

static void test_bad_percentiles_are_refused_whole(void) {
    for (size_t b = 0; b < COUNT(not_percentiles); ++b) {
        for (size_t count = 1; count <= 20; count += 19) {
            subject own;
            double bad = not_percentiles[b];
            double threshold = SENTINEL;
            subject_create(&own, 0, count);
            REQUIRE_STATUS(AUTOCLIP_BAD_PERCENTILE, autoclip_history_percentile(own.history, bad, &threshold));
            REQUIRE_STATUS(AUTOCLIP_BAD_PERCENTILE, autoclip_history_observe(own.history, 1, bad, &threshold));
            REQUIRE_SAME(SENTINEL, threshold);
            for (size_t at = 0; at < 3; ++at) {
                const double norms[2] = {1, 2};
                double percentiles[3] = {0, 50, 100};
                double thresholds[6] = {SENTINEL, SENTINEL, SENTINEL, SENTINEL, SENTINEL, SENTINEL};
                percentiles[at] = bad;
                REQUIRE_STATUS(AUTOCLIP_BAD_PERCENTILE,
                               autoclip_history_observe_many(own.history, norms, 2, percentiles, 3, thresholds));
                for (size_t i = 0; i < 6; ++i) REQUIRE_SAME(SENTINEL, thresholds[i]);
            }
            subject_destroy(&own);
        }
    }
}

static void test_empty_history_has_no_percentile(void) {
    for (uint64_t window = 0; window <= 5; window += 5) {
        subject own;
        double value = SENTINEL;
        uint64_t rank = SENTINEL_SIZE;
        size_t count = SENTINEL_SIZE;
        subject_create(&own, window, 0);
        REQUIRE_STATUS(AUTOCLIP_EMPTY, autoclip_history_percentile(own.history, 50, &value));
        REQUIRE_STATUS(AUTOCLIP_EMPTY, autoclip_history_percentile(own.history, 0, &value));
        REQUIRE_STATUS(AUTOCLIP_BAD_RANK, autoclip_history_select(own.history, 0, &value));
        REQUIRE_STATUS(AUTOCLIP_BAD_RANK, autoclip_history_order_statistics(own.history, 0, 1, &value));
        REQUIRE_SAME(SENTINEL, value);
        REQUIRE_OK(autoclip_history_rank(own.history, 1, &rank));
        REQUIRE(rank == 0, "rank is %" PRIu64, rank);
        REQUIRE_OK(autoclip_history_values(own.history, NULL, 0, &count));
        REQUIRE(count == 0, "count is %zu", count);
        REQUIRE_OK(autoclip_history_push(own.history, 1)); /* emptied again, it is as empty as a new one */
        autoclip_history_clear(own.history);
        REQUIRE_STATUS(AUTOCLIP_EMPTY, autoclip_history_percentile(own.history, 50, &value));
        subject_destroy(&own);
    }
}

static void test_ranks_beyond_the_size_are_refused(void) {
    subject own;
    double norms[32];
    subject_create(&own, 0, 20);
    for (size_t i = 0; i < COUNT(norms); ++i) norms[i] = SENTINEL;
    const uint64_t ranks[] = {20, 21, UINT64_C(1) << 32, UINT64_C(1) << 63, UINT64_MAX};
    for (size_t i = 0; i < COUNT(ranks); ++i) {
        REQUIRE_STATUS(AUTOCLIP_BAD_RANK, autoclip_history_select(own.history, ranks[i], norms));
        REQUIRE_STATUS(AUTOCLIP_BAD_RANK, autoclip_history_order_statistics(own.history, ranks[i], 1, norms));
    }
    REQUIRE_STATUS(AUTOCLIP_BAD_RANK, autoclip_history_order_statistics(own.history, 0, 21, norms));
    REQUIRE_STATUS(AUTOCLIP_BAD_RANK, autoclip_history_order_statistics(own.history, 19, 2, norms));
    REQUIRE_STATUS(AUTOCLIP_BAD_RANK, autoclip_history_order_statistics(own.history, 5, SIZE_MAX, norms));
    REQUIRE_STATUS(AUTOCLIP_BAD_RANK, autoclip_history_order_statistics(own.history, UINT64_MAX, 2, norms));
    for (size_t i = 0; i < COUNT(norms); ++i) REQUIRE_SAME(SENTINEL, norms[i]);
    REQUIRE_OK(autoclip_history_order_statistics(own.history, 20, 0, NULL)); /* none, after the last */
    REQUIRE_OK(autoclip_history_order_statistics(own.history, 0, 20, norms));
    REQUIRE_SAME(own.truth.sorted[19], norms[19]);
    REQUIRE_SAME(SENTINEL, norms[20]);
    subject_destroy(&own);
}

/* Norms that came many at once are all in the tree: no address may be computed from the buffer, which has no memory yet
 * (even adding 0 to NULL is undefined). */
static void test_order_statistics_do_without_a_buffer(void) {
    double norms[600];
    double range[600];
    subject own;
    subject_create(&own, 0, 0);
    for (size_t i = 0; i < COUNT(norms); ++i) norms[i] = (double)i;
    REQUIRE_OK(autoclip_history_extend(own.history, norms, COUNT(norms)));
    model_extend(&own.truth, norms, COUNT(norms));
    for (size_t first = 0; first < COUNT(norms); first += 37) {
        REQUIRE_OK(autoclip_history_order_statistics(own.history, first, COUNT(norms) - first, range));
        REQUIRE_SAME(norms[first], range[0]);
        REQUIRE_SAME(norms[COUNT(norms) - 1], range[COUNT(norms) - 1 - first]);
    }
    subject_destroy(&own);
}

static void test_window_refuses_a_merge(void) {
    subject own;
    subject other;
    subject_create(&own, 5, 7);
    subject_create(&other, 0, 3);
    REQUIRE_STATUS(AUTOCLIP_HAS_WINDOW, autoclip_history_merge(own.history, other.history));
    REQUIRE_STATUS(AUTOCLIP_HAS_WINDOW, autoclip_history_merge(own.history, own.history));
    judge(own.history, &own.truth);
    REQUIRE_OK(autoclip_history_merge(other.history, own.history)); /* the other way is fine */
    model_extend(&other.truth, own.truth.aged, own.truth.count);
    subject_destroy(&own);
    subject_destroy(&other);
}

static void test_small_arrays_are_refused(void) {
    for (uint64_t window = 0; window <= 6; window += 6) {
        subject own;
        double norms[20];
        size_t count = SENTINEL_SIZE;
        subject_create(&own, window, 20);
        for (size_t i = 0; i < COUNT(norms); ++i) norms[i] = SENTINEL;
        for (size_t capacity = 0; capacity < own.truth.count; ++capacity) {
            REQUIRE_STATUS(AUTOCLIP_TOO_SMALL, autoclip_history_values(own.history, norms, capacity, &count));
        }
        REQUIRE(count == SENTINEL_SIZE, "a count was written");
        for (size_t i = 0; i < COUNT(norms); ++i) REQUIRE_SAME(SENTINEL, norms[i]);
        REQUIRE_STATUS(AUTOCLIP_TOO_SMALL, autoclip_history_save(own.history, norms, sizeof norms[0], &count));
        REQUIRE(count == SENTINEL_SIZE, "a size was written");
        REQUIRE_SAME(SENTINEL, norms[0]);
        subject_destroy(&own);
    }
}

/* A history that was just loaded, and then took so few norms that the buffer holds them: no stale copy of a norm lies
 * anywhere in its memory, so whatever looks like a norm is one. What is unused still has the heap's pattern. */
static autoclip_history *load_and_push(heap *own, uint64_t window, size_t count) {
    unsigned char bytes[SNAPSHOT_SIZE(200)];
    double norms[200];
    autoclip_history *history;
    for (size_t i = 0; i < count; ++i) norms[i] = 1000.125 + (double)i;
    snapshot_write(bytes, window, norms, count);
    REQUIRE_OK(autoclip_history_load(bytes, SNAPSHOT_SIZE(count), &own->allocator, &history));
    for (int i = 0; i < 3; ++i) REQUIRE_OK(autoclip_history_push(history, 1005.5 + 3 * i));
    return history;
}

/* Whether check notices that the word at `place` is another. */
static bool is_noticed(autoclip_history *history, unsigned char *place, uint64_t other) {
    unsigned char before[8];
    const char *reason = NULL;
    memcpy(before, place, sizeof before);
    memcpy(place, &other, sizeof other);
    autoclip_status status = autoclip_history_check(history, &reason);
    memcpy(place, before, sizeof before);
    REQUIRE(reason != NULL, "no reason was written");
    REQUIRE(status == AUTOCLIP_OK || status == AUTOCLIP_BROKEN, "status is %d", (int)status);
    REQUIRE((status == AUTOCLIP_OK) == (reason[0] == '\0'), "status %d: '%s'", (int)status, reason);
    return status == AUTOCLIP_BROKEN;
}

/* Each norm in each place where it is kept becomes another, one at a time. */
static void test_check_notices_every_wrong_norm(void) {
    static const double wrong[] = {(double)NAN, (double)INFINITY, (double)-INFINITY, -1e300, 1e300};
    for (uint64_t window = 0; window <= 200; window += 200) {
        for (size_t count = 10; count <= 190; count += 20) {
            heap own;
            size_t places = 0;
            size_t unnoticed[COUNT(wrong)] = {0};
            heap_create(&own);
            autoclip_history *history = load_and_push(&own, window, count);
            for (size_t b = 0; b < own.count; ++b) {
                for (size_t at = 0; at + 8 <= own.blocks[b].size; at += 8) {
                    double norm;
                    memcpy(&norm, own.blocks[b].address + at, sizeof norm);
                    if (!(norm >= 1000 && norm < 1200)) continue;
                    places += 1;
                    for (size_t w = 0; w < COUNT(wrong); ++w) {
                        unnoticed[w] += !is_noticed(history, own.blocks[b].address + at, test_bits(wrong[w]));
                    }
                }
            }
            REQUIRE(places >= (window > 0 ? 2 : 1) * (count + 3), "%zu norms in %zu places", count + 3, places);
            for (size_t w = 0; w < COUNT(wrong); ++w) {
                /* Without a window nothing contradicts an even lower lowest norm, or an even higher highest, of the
                 * buffer and of the tree. */
                REQUIRE(unnoticed[w] <= (window == 0 && isfinite(wrong[w]) ? 2 : 0),
                        "%zu of %zu places may hold %g unnoticed", unnoticed[w], places, wrong[w]);
            }
            autoclip_history_destroy(history);
            heap_destroy(&own);
        }
    }
}

/* Each number of the tree (norms, counts, sizes) is one too low, one at a time: with a window none can go unnoticed. */
static void test_check_notices_every_wrong_number(void) {
    if (sizeof(void *) < sizeof(uint64_t)) {
        puts("  skipped: an address and a number cannot be told apart where an address is half a word");
        return;
    }
    for (size_t count = 10; count <= 190; count += 20) {
        heap own;
        size_t places = 0;
        size_t totals = 0;
        heap_create(&own);
        autoclip_history *history = load_and_push(&own, 200, count);
        for (size_t b = 0; b < own.count; ++b) {
            unsigned char *block = own.blocks[b].address;
            for (size_t at = 0; at + 8 <= own.blocks[b].size; at += 8) {
                uint64_t word;
                bool is_address = false;
                memcpy(&word, block + at, sizeof word);
                for (size_t other = 0; other < own.count; ++other) {
                    uintptr_t first = (uintptr_t)own.blocks[other].address;
                    is_address = is_address || (word >= first && word - first <= own.blocks[other].size);
                }
                if (block == (unsigned char *)history) { /* here stand hints as well: only the sum of all bytes */
                    if (word == own.bytes) {
                        REQUIRE(is_noticed(history, block + at, word - 1), "a wrong number of bytes is not noticed");
                        totals += 1;
                    }
                } else if (word != 0 && word != UINT64_C(0xA5A5A5A5A5A5A5A5) && !is_address) {
                    REQUIRE(is_noticed(history, block + at, word - 1),
                            "%zu norms: word %zu of block %zu, %016" PRIX64 ", may be one less", count, at / 8, b,
                            word);
                    places += 1;
                }
            }
        }
        REQUIRE(totals == 1 && places > 2 * count, "%zu totals and %zu places for %zu norms", totals, places, count);
        autoclip_history_destroy(history);
        heap_destroy(&own);
    }
}

static void test_messages_are_sentences(void) {
    const char *unknown_message = autoclip_status_message((autoclip_status)-1);
    REQUIRE(unknown_message != NULL && unknown_message[0] != '\0', "what is no status has no message");
    for (int status = AUTOCLIP_OK; status <= AUTOCLIP_WRONG_STEP; ++status) {
        const char *message = autoclip_status_message((autoclip_status)status);
        REQUIRE(message != NULL && message[0] != '\0', "status %d has no message", status);
        REQUIRE(strcmp(message, unknown_message) != 0, "status %d has the message of an unknown one", status);
        for (int other = AUTOCLIP_OK; other < status; ++other) {
            REQUIRE(strcmp(message, autoclip_status_message((autoclip_status)other)) != 0,
                    "status %d and %d have one message", status, other);
        }
    }
    REQUIRE(strcmp(autoclip_status_message((autoclip_status)(AUTOCLIP_WRONG_STEP + 1)), unknown_message) == 0,
            "a status is not tested");
}

static void test_version_is_that_of_the_header(void) {
    char version[32];
    snprintf(version, sizeof version, "%d.%d.%d", AUTOCLIP_VERSION_MAJOR, AUTOCLIP_VERSION_MINOR,
             AUTOCLIP_VERSION_PATCH);
    REQUIRE(strcmp(version, autoclip_version()) == 0, "the library is %s, the header %s", autoclip_version(), version);
    REQUIRE(strstr(autoclip_build(), sizeof(void *) == 8 ? "64-bit" : "32-bit") != NULL, "%s", autoclip_build());
    REQUIRE(autoclip_abi_version() == AUTOCLIP_ABI_VERSION, "the ABI of the library is %" PRIu32,
            autoclip_abi_version());
}

static void test_nothing_may_be_null_but_what_the_header_allows(void) {
    subject own;
    double percentile = 50;
    autoclip_history_destroy(NULL);
    subject_create(&own, 0, 3);
    REQUIRE_OK(autoclip_history_extend(own.history, NULL, 0));
    REQUIRE_OK(autoclip_history_observe_many(own.history, NULL, 0, &percentile, 1, NULL));
    REQUIRE_OK(autoclip_history_observe_many(own.history, NULL, 0, NULL, 0, NULL));
    REQUIRE_OK(autoclip_history_order_statistics(own.history, 0, 0, NULL));
    REQUIRE_OK(autoclip_history_order_statistics(own.history, 3, 0, NULL));
    autoclip_history_clear(own.history);
    own.truth.count = 0;
    REQUIRE_OK(autoclip_history_extend(own.history, NULL, 0));
    REQUIRE_OK(autoclip_history_order_statistics(own.history, 0, 0, NULL));
    autoclip_history_clear(own.history);
    REQUIRE_OK(autoclip_history_merge(own.history, own.history));
    subject_destroy(&own);

    autoclip_history *standard; /* malloc and free */
    REQUIRE_OK(autoclip_history_create(0, NULL, &standard));
    REQUIRE_OK(autoclip_history_push(standard, 1));
    REQUIRE(autoclip_history_memory(standard) > 0, "no memory is counted");
    autoclip_history_destroy(standard);
}

static void test_allocator_is_copied(void) {
    heap own;
    autoclip_history *history;
    heap_create(&own);
    autoclip_allocator mine = own.allocator;
    REQUIRE_OK(autoclip_history_create(0, &mine, &history));
    memset(&mine, 0, sizeof mine);
    for (int i = 0; i < 3000; ++i) REQUIRE_OK(autoclip_history_push(history, i));
    autoclip_history_destroy(history);
    heap_destroy(&own);
}

/* A caller of a later release may bring members that this one does not know; `size` says how many. */
static void test_allocator_may_have_more_members(void) {
    for (int way = 0; way < 3; ++way) {
        struct {
            autoclip_allocator known;
            void *more[4];
        } given;
        heap own;
        autoclip_history *history;
        heap_create(&own);
        memset(&given, 0xEE, sizeof given);
        given.known = own.allocator;
        given.known.size = way == 0 ? 0 : way == 1 ? sizeof given.known : sizeof given;
        REQUIRE_OK(autoclip_history_create(0, &given.known, &history));
        for (int i = 0; i < 3000; ++i) REQUIRE_OK(autoclip_history_push(history, i));
        autoclip_history_destroy(history);
        heap_destroy(&own);
    }
}

static void test_negative_zero_is_stored_as_zero(void) {
    for (uint64_t window = 0; window <= 30; window += 30) {
        subject own;
        const double zeros[12] = {-0.0, 0.0, -0.0, -0.0, -0.0, -0.0, -0.0, -0.0, -0.0, -0.0, -0.0, -0.0};
        const double percentile = 0;
        double thresholds[12];
        double threshold;
        uint64_t rank;
        subject_create(&own, window, 0);
        REQUIRE_OK(autoclip_history_push(own.history, -0.0));
        REQUIRE_OK(autoclip_history_observe(own.history, -0.0, 0, &threshold));
        REQUIRE_SAME(0.0, threshold);
        REQUIRE_OK(autoclip_history_extend(own.history, zeros, 1));
        REQUIRE_OK(autoclip_history_extend(own.history, zeros, 12));
        REQUIRE_OK(autoclip_history_observe_many(own.history, zeros, 12, &percentile, 1, thresholds));
        REQUIRE_SAME(0.0, thresholds[0]);
        REQUIRE_OK(autoclip_history_rank(own.history, -0.0, &rank));
        REQUIRE(rank == 0, "rank of -0.0 is %" PRIu64, rank);
        model_extend(&own.truth, zeros, 3);
        model_extend(&own.truth, zeros, 12);
        model_extend(&own.truth, zeros, 12);
        subject_destroy(&own);
    }
}

TEST_MAIN(TEST(test_not_finite_norms_are_refused_whole), TEST(test_bad_percentiles_are_refused_whole),
          TEST(test_empty_history_has_no_percentile), TEST(test_ranks_beyond_the_size_are_refused),
          TEST(test_order_statistics_do_without_a_buffer), TEST(test_window_refuses_a_merge),
          TEST(test_small_arrays_are_refused), TEST(test_check_notices_every_wrong_norm),
          TEST(test_check_notices_every_wrong_number), TEST(test_messages_are_sentences),
          TEST(test_version_is_that_of_the_header), TEST(test_nothing_may_be_null_but_what_the_header_allows),
          TEST(test_allocator_is_copied), TEST(test_allocator_may_have_more_members),
          TEST(test_negative_zero_is_stored_as_zero));

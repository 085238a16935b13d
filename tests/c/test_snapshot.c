/* Snapshots: the bytes are those that the header describes, and nothing that is not one of them loads.
 *
 * The bytes are written here from the description, with a checksum of our own, so that sealed lies reach the reader.
 *
 * SPDX-License-Identifier: MIT */
#include "stream.h"

static const double five_norms[5] = {0x1p-1074, 0.5, 0.5, 3, 1e308};
static const double aged_norms[5] = {3, -2, 1e-9, 3, 0};

/* Load and expect a refusal, which must have written nothing, kept nothing, and asked for next to nothing. */
static void require_refused(autoclip_status expected, const unsigned char *bytes, size_t size) {
    heap own;
    autoclip_history *history = NULL;
    unsigned char *exact = test_block(size); /* the sanitizer sees one byte read past the end */
    memcpy(exact, bytes, size);
    heap_create(&own);
    REQUIRE_STATUS(expected, autoclip_history_load(exact, size, &own.allocator, &history));
    REQUIRE(history == NULL, "a history was made");
    heap_destroy(&own);
    free(exact);
}

static void require_loads(const unsigned char *bytes, size_t size, const model *truth) {
    heap own;
    autoclip_history *history = NULL;
    unsigned char *exact = test_block(size);
    memcpy(exact, bytes, size);
    heap_create(&own);
    REQUIRE_OK(autoclip_history_load(exact, size, &own.allocator, &history));
    judge(history, truth);
    REQUIRE(autoclip_history_memory(history) == own.bytes, "memory is %" PRIu64 " but the heap counts %" PRIu64,
            autoclip_history_memory(history), own.bytes);
    autoclip_history_destroy(history);
    heap_destroy(&own);
    free(exact);
}

static void test_snapshot_round_trip_keeps_every_byte(void) {
    static const uint64_t windows[] = {0, 1, 4, 100, 1000000, UINT64_MAX};
    for (size_t w = 0; w < sizeof windows / sizeof *windows; ++w) {
        for (size_t count = 0; count < 1500; count += 1 + count / 8) {
            uint64_t state = count;
            model truth;
            model_create(&truth, windows[w]);
            for (size_t i = 0; i < count; ++i) model_push(&truth, test_uniform(&state) - 0.25);
            size_t size = SNAPSHOT_SIZE(truth.count);
            unsigned char *bytes = test_block(size);
            test_now.step = count;
            snapshot_write(bytes, truth.window, truth.window > 0 ? truth.aged : truth.sorted, truth.count);
            require_loads(bytes, size, &truth);
            free(bytes);
            model_destroy(&truth);
        }
    }
}

/* A loaded window goes on exactly where the saved one stood. */
static void test_snapshot_of_a_window_continues(void) {
    uint64_t state = 5;
    for (size_t count = 0; count < 40; ++count) {
        heap own;
        autoclip_history *history;
        autoclip_history *loaded;
        model truth;
        unsigned char bytes[SNAPSHOT_SIZE(16)];
        size_t size;
        test_now.step = count;
        heap_create(&own);
        model_create(&truth, 16);
        REQUIRE_OK(autoclip_history_create(16, &own.allocator, &history));
        for (size_t i = 0; i < count; ++i) {
            double norm = test_uniform(&state);
            REQUIRE_OK(autoclip_history_push(history, norm));
            model_push(&truth, norm);
        }
        REQUIRE_OK(autoclip_history_save(history, bytes, sizeof bytes, &size));
        REQUIRE_OK(autoclip_history_load(bytes, size, &own.allocator, &loaded));
        for (size_t i = 0; i < 50; ++i) {
            double norm = test_uniform(&state);
            REQUIRE_OK(autoclip_history_push(loaded, norm));
            model_push(&truth, norm);
            judge(loaded, &truth);
        }
        autoclip_history_destroy(history);
        autoclip_history_destroy(loaded);
        model_destroy(&truth);
        heap_destroy(&own);
    }
}

static void test_snapshot_with_one_flipped_bit_is_refused(void) {
    static const struct {
        uint64_t window;
        size_t count;
    } cases[] = {{0, 0}, {0, 1}, {0, 5}, {5, 0}, {5, 2}, {5, 5}, {1000, 5}};
    uint64_t flips = 0;
    for (size_t c = 0; c < sizeof cases / sizeof *cases; ++c) {
        unsigned char bytes[SNAPSHOT_SIZE(5)];
        size_t size = SNAPSHOT_SIZE(cases[c].count);
        snapshot_write(bytes, cases[c].window, cases[c].window > 0 ? aged_norms : five_norms, cases[c].count);
        for (size_t bit = 0; bit < 8 * size; ++bit) {
            test_now.step = bit;
            bytes[bit / 8] ^= (unsigned char)(1u << bit % 8);
            require_refused(AUTOCLIP_BAD_SNAPSHOT, bytes, size);
            bytes[bit / 8] ^= (unsigned char)(1u << bit % 8);
            flips += 1;
        }
    }
    printf("  %" PRIu64 " flips refused\n", flips);
    REQUIRE(flips == 8 * (72 + 80 + 112 + 72 + 88 + 112 + 112), "%" PRIu64 " flips", flips);
}

static void test_snapshot_of_another_length_is_refused(void) {
    for (uint64_t window = 0; window <= 5; window += 5) {
        unsigned char bytes[SNAPSHOT_SIZE(5) + 64];
        memset(bytes, 0, sizeof bytes);
        snapshot_write(bytes, window, window > 0 ? aged_norms : five_norms, 5);
        for (size_t size = 0; size < sizeof bytes; ++size) {
            test_now.step = size;
            if (size == SNAPSHOT_SIZE(5)) continue;
            require_refused(AUTOCLIP_BAD_SNAPSHOT, bytes, size);
            if (size >= SNAPSHOT_SIZE(0)) { /* nor do right checksums help */
                unsigned char sealed[sizeof bytes];
                memcpy(sealed, bytes, sizeof bytes);
                snapshot_seal(sealed, size);
                require_refused(AUTOCLIP_BAD_SNAPSHOT, sealed, size);
            }
        }
    }
    heap own;
    autoclip_history *history = NULL;
    heap_create(&own);
    REQUIRE_STATUS(AUTOCLIP_BAD_SNAPSHOT, autoclip_history_load("", 0, &own.allocator, &history));
    heap_destroy(&own);
}

/* One field of the header is another, both checksums are right. */
static void test_snapshot_whose_header_lies_is_refused(void) {
    static const struct {
        const char *lie;
        size_t offset;
        size_t width;
        uint64_t value;
        uint64_t window; /* of the snapshot before the lie */
    } lies[] = {
        {"another magic", 0, 1, 0x88, 0},
        {"magic of a text-mode copy", 4, 4, UINT64_C(0x00000A1A0A0A0D00), 0},
        {"format major 0", 8, 2, 0, 0},
        {"a short header", 12, 4, 56, 0},
        {"a long header", 12, 4, 72, 0},
        {"an endless header", 12, 4, UINT32_MAX, 0},
        {"an empty header", 12, 4, 0, 0},
        {"an unknown flag", 16, 8, 2, 0},
        {"the highest flag", 16, 8, UINT64_C(1) << 63, 0},
        {"an unknown flag beside the window", 16, 8, 3, 5},
        {"window flag without a window", 16, 8, 1, 0},
        {"window without its flag", 16, 8, 0, 5},
        {"a window of 0", 32, 8, 0, 5},
        {"a window in a full history", 32, 8, 100, 0},
        {"more norms than the window", 32, 8, 4, 5},
        {"one norm too many", 24, 8, 6, 0},
        {"one norm too few", 24, 8, 4, 0},
        {"no norms", 24, 8, 0, 0},
        {"2^60 norms", 24, 8, UINT64_C(1) << 60, 0},
        {"2^61 norms", 24, 8, UINT64_C(1) << 61, 0},
        {"2^61 + 5 norms: eight times that overflows to the true size", 24, 8, (UINT64_C(1) << 61) + 5, 0},
        {"2^64 - 1 norms", 24, 8, UINT64_MAX, 0},
        {"2^61 + 5 norms in a window", 24, 8, (UINT64_C(1) << 61) + 5, 5},
        {"a reserved byte", 40, 8, 1, 0},
        {"the last reserved byte", 48, 8, UINT64_C(1) << 63, 0},
    };
    for (size_t i = 0; i < sizeof lies / sizeof *lies; ++i) {
        unsigned char bytes[SNAPSHOT_SIZE(5)];
        test_now.detail = lies[i].lie;
        snapshot_write(bytes, lies[i].window, lies[i].window > 0 ? aged_norms : five_norms, 5);
        bytes_put(bytes + lies[i].offset, lies[i].value, lies[i].width);
        snapshot_seal(bytes, sizeof bytes);
        require_refused(AUTOCLIP_BAD_SNAPSHOT, bytes, sizeof bytes);
    }
    /* 2^61 norms in 72 bytes: 8 * 2^61 is 0 in 64 bits */
    unsigned char empty[SNAPSHOT_SIZE(0)];
    snapshot_write(empty, 0, NULL, 0);
    bytes_put(empty + 24, UINT64_C(1) << 61, 8);
    snapshot_seal(empty, sizeof empty);
    require_refused(AUTOCLIP_BAD_SNAPSHOT, empty, sizeof empty);
    /* 2^61 - 1 norms in a header without a checksum of norms behind it: 64 - 72 is 8 * (2^61 - 1) in 64 bits */
    bytes_put(empty + 24, (UINT64_C(1) << 61) - 1, 8);
    snapshot_seal(empty, sizeof empty);
    for (size_t size = SNAPSHOT_HEADER; size < sizeof empty; ++size) {
        require_refused(AUTOCLIP_BAD_SNAPSHOT, empty, size);
    }
}

static void test_snapshot_of_a_newer_format_is_named_as_such(void) {
    static const uint64_t majors[] = {2, 3, 255, 256, 65535};
    for (size_t i = 0; i < sizeof majors / sizeof *majors; ++i) {
        unsigned char bytes[SNAPSHOT_SIZE(5)];
        snapshot_write(bytes, 0, five_norms, 5);
        bytes_put(bytes + 8, majors[i], 2);
        require_refused(AUTOCLIP_BAD_SNAPSHOT, bytes, sizeof bytes); /* not sealed: damaged, not new */
        snapshot_seal(bytes, sizeof bytes);
        require_refused(AUTOCLIP_NEW_SNAPSHOT, bytes, sizeof bytes);
    }
}

/* What a later minor adds is ignored: flags, the 16 bytes at 40, a longer header. */
static void test_snapshot_of_a_later_minor_is_read(void) {
    enum { MORE = 24 };
    for (int additions = 0; additions < 8; ++additions) {
        const size_t more = (additions & 1) != 0 ? MORE : 0;
        unsigned char bytes[SNAPSHOT_SIZE(5) + MORE];
        model truth;
        autoclip_history *history;
        test_now.step = (uint64_t)additions;
        snapshot_write(bytes, 0, five_norms, 5);
        memmove(bytes + SNAPSHOT_HEADER + more, bytes + SNAPSHOT_HEADER, 5 * sizeof(double));
        memset(bytes + SNAPSHOT_HEADER, 0xEE, more);
        bytes_put(bytes + 10, 7, 2);
        bytes_put(bytes + 12, SNAPSHOT_HEADER + more, 4);
        bytes_put(bytes + 16, (additions & 2) != 0 ? UINT64_MAX << 32 : 0, 8);
        memset(bytes + 40, (additions & 4) != 0 ? 0xEE : 0, 16);
        snapshot_seal(bytes, SNAPSHOT_SIZE(5) + more);
        REQUIRE_OK(autoclip_history_load(bytes, SNAPSHOT_SIZE(5) + more, NULL, &history));
        model_create(&truth, 0);
        model_extend(&truth, five_norms, 5);
        judge(history, &truth); /* and saved again it has our minor */
        autoclip_history_destroy(history);
        model_destroy(&truth);
        /* A flag that no reader may ignore. */
        bytes_put(bytes + 16, 2, 8);
        snapshot_seal(bytes, SNAPSHOT_SIZE(5) + more);
        require_refused(AUTOCLIP_NEW_SNAPSHOT, bytes, SNAPSHOT_SIZE(5) + more);
        /* And in this minor there are no additions. */
        bytes_put(bytes + 10, 0, 2);
        bytes_put(bytes + 16, (additions & 2) != 0 ? UINT64_MAX << 32 : 0, 8);
        snapshot_seal(bytes, SNAPSHOT_SIZE(5) + more);
        if (additions > 0) require_refused(AUTOCLIP_BAD_SNAPSHOT, bytes, SNAPSHOT_SIZE(5) + more);
    }
}

/* Headers that lie, sealed, in this minor and in a later one. */
static void test_header_that_lies_about_additions_is_refused(void) {
    static const struct {
        size_t at, size;
        uint64_t value;
    } lies[] = {{8, 2, 0},           {12, 4, 0},         {12, 4, 56}, {12, 4, 65}, {12, 4, 72},
                {12, 4, 64 + 8 * 6}, {24, 8, 4},         {24, 8, 6},  {32, 8, 9},  {12, 4, UINT32_MAX - 7},
                {16, 8, 1},          {24, 8, UINT64_MAX}};
    for (size_t i = 0; i < sizeof lies / sizeof *lies; ++i) {
        for (uint64_t minor = 0; minor < 2; ++minor) {
            unsigned char bytes[SNAPSHOT_SIZE(5) + 4];
            test_now.step = i;
            snapshot_write(bytes, 0, five_norms, 5);
            bytes_put(bytes + 10, minor, 2);
            bytes_put(bytes + lies[i].at, lies[i].value, lies[i].size);
            snapshot_seal(bytes, SNAPSHOT_SIZE(5));
            require_refused(AUTOCLIP_BAD_SNAPSHOT, bytes, SNAPSHOT_SIZE(5));
            if (i > 0) continue;
            memset(bytes + SNAPSHOT_SIZE(5), 0, 4);
            bytes_put(bytes + 8, 1, 2);
            snapshot_seal(bytes, sizeof bytes); /* of no whole number of norms */
            require_refused(AUTOCLIP_BAD_SNAPSHOT, bytes, sizeof bytes);
        }
    }
}

/* Norms that no history can hold, sealed; each at every place of small and of larger snapshots. */
static void test_snapshot_with_impossible_norms_is_refused(void) {
    static const double bad[] = {(double)NAN, (double)-NAN, (double)INFINITY, (double)-INFINITY};
    static const size_t counts[] = {1, 2, 5, 17, 300};
    for (size_t c = 0; c < sizeof counts / sizeof *counts; ++c) {
        size_t count = counts[c];
        size_t size = SNAPSHOT_SIZE(count);
        unsigned char *bytes = test_block(size);
        double *norms = test_block(count * sizeof(double));
        for (uint64_t window = 0; window <= 1000; window += 1000) {
            for (size_t at = 0; at < count; ++at) {
                for (size_t b = 0; b < sizeof bad / sizeof *bad; ++b) {
                    for (size_t i = 0; i < count; ++i) norms[i] = (double)i;
                    norms[at] = bad[b];
                    test_now.step = at;
                    snapshot_write(bytes, window, norms, count);
                    require_refused(AUTOCLIP_BAD_SNAPSHOT, bytes, size);
                }
            }
        }
        for (size_t at = 1; at < count; ++at) { /* a full history must be ascending */
            for (size_t i = 0; i < count; ++i) norms[i] = (double)i;
            norms[at] = norms[at - 1] - 0.5;
            test_now.step = at;
            snapshot_write(bytes, 0, norms, count);
            require_refused(AUTOCLIP_BAD_SNAPSHOT, bytes, size);
        }
        free(norms);
        free(bytes);
    }
}

/* A history never holds -0.0, so a snapshot that does is foreign or damaged. */
static void test_snapshot_never_brings_a_negative_zero(void) {
    static const double zeros[2] = {-0.0, -0.0};
    for (uint64_t window = 0; window <= 2; window += 2) {
        unsigned char bytes[SNAPSHOT_SIZE(2)];
        autoclip_history *history = NULL;
        snapshot_write(bytes, window, zeros, 2);
        autoclip_status status = autoclip_history_load(bytes, sizeof bytes, NULL, &history);
        if (status == AUTOCLIP_OK) {
            model truth;
            model_create(&truth, window);
            model_extend(&truth, zeros, 2);
            judge(history, &truth);
            model_destroy(&truth);
            autoclip_history_destroy(history);
        } else {
            REQUIRE(status == AUTOCLIP_BAD_SNAPSHOT && history == NULL, "status is %d", (int)status);
        }
    }
}

/* Save into an array that is too small, by any number of bytes: not a byte is written. */
static void test_save_needs_the_whole_size(void) {
    autoclip_history *history;
    REQUIRE_OK(autoclip_history_create(0, NULL, &history));
    REQUIRE_OK(autoclip_history_extend(history, five_norms, 5));
    size_t needed = autoclip_history_save_size(history);
    for (size_t capacity = 0; capacity < needed; ++capacity) {
        unsigned char *bytes = test_block(capacity);
        size_t size = SENTINEL_SIZE;
        REQUIRE_STATUS(AUTOCLIP_TOO_SMALL, autoclip_history_save(history, bytes, capacity, &size));
        REQUIRE(size == SENTINEL_SIZE, "a size was written");
        for (size_t i = 0; i < capacity; ++i) REQUIRE(bytes[i] == 0xC7, "byte %zu of %zu was written", i, capacity);
        free(bytes);
    }
    unsigned char bytes[SNAPSHOT_SIZE(5) + 3]; /* more than enough is fine, and the rest stays as it was */
    size_t size;
    memset(bytes, 0xC7, sizeof bytes);
    REQUIRE_OK(autoclip_history_save(history, bytes, sizeof bytes, &size));
    REQUIRE(size == needed, "save wrote %zu bytes of %zu", size, needed);
    REQUIRE(bytes[needed] == 0xC7 && bytes[needed + 2] == 0xC7, "save wrote past its size");
    autoclip_history_destroy(history);
}

/* Random damage of several bytes, half of it sealed: whatever loads must be a sound history that can be used. */
static void test_snapshot_with_random_damage_is_refused_or_sound(void) {
    uint64_t state = 2718;
    uint64_t loaded = 0;
    for (int round = 0; round < 20000; ++round) {
        unsigned char bytes[SNAPSHOT_SIZE(5)];
        uint64_t window = test_random(&state) % 2 ? 0 : 5 + test_random(&state) % 3;
        test_now.step = (uint64_t)round;
        snapshot_write(bytes, window, window > 0 ? aged_norms : five_norms, 5);
        for (uint64_t damage = 1 + test_random(&state) % 3; damage > 0; damage--) {
            bytes[test_random(&state) % sizeof bytes] = (unsigned char)test_random(&state);
        }
        if (round % 2) snapshot_seal(bytes, sizeof bytes);
        heap own;
        autoclip_history *history = NULL;
        heap_create(&own);
        if (autoclip_history_load(bytes, sizeof bytes, &own.allocator, &history) == AUTOCLIP_OK) {
            const char *reason = "";
            double threshold;
            REQUIRE_OK(autoclip_history_push(history, 1));
            REQUIRE_OK(autoclip_history_percentile(history, 50, &threshold));
            REQUIRE(autoclip_history_check(history, &reason) == AUTOCLIP_OK, "%s", reason);
            autoclip_history_destroy(history);
            loaded += 1;
        }
        heap_destroy(&own);
    }
    REQUIRE(loaded > 0, "nothing was loaded");
}

TEST_MAIN(TEST(test_snapshot_round_trip_keeps_every_byte), TEST(test_snapshot_of_a_window_continues),
          TEST(test_snapshot_with_one_flipped_bit_is_refused), TEST(test_snapshot_of_another_length_is_refused),
          TEST(test_snapshot_whose_header_lies_is_refused), TEST(test_snapshot_of_a_newer_format_is_named_as_such),
          TEST(test_snapshot_of_a_later_minor_is_read), TEST(test_header_that_lies_about_additions_is_refused),
          TEST(test_snapshot_with_impossible_norms_is_refused), TEST(test_snapshot_never_brings_a_negative_zero),
          TEST(test_save_needs_the_whole_size), TEST(test_snapshot_with_random_damage_is_refused_or_sound));

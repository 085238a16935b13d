/* libFuzzer: bytes become a snapshot, as they are, or with true checksums, or with a true header as well. What loads must
 * be sound, must save to the bytes it came from, and can be used.
 *
 * SPDX-License-Identifier: MIT */
#include "stream.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

/* Loading may change what an older reader ignores (what a later minor adds) and what a history never holds (-0.0), nothing
 * else. */
static bool is_canonical(const unsigned char *bytes, size_t size) {
    for (size_t at = SNAPSHOT_HEADER; at + 8 < size; at += 8) {
        if (bytes_get(bytes + at, 8) == UINT64_C(1) << 63) return false;
    }
    return bytes_get(bytes + 10, 2) == 0;
}

static void use(autoclip_history *history) {
    const char *reason = "";
    uint64_t size = autoclip_history_size(history);
    uint64_t window = autoclip_history_window(history);
    double threshold;
    uint64_t rank;
    for (int i = 0; i < 12; ++i) {
        REQUIRE_OK(autoclip_history_observe(history, i % 2 ? -1e308 : 1e308, 10.0 * (i % 11), &threshold));
        size += window == 0 || size < window;
        REQUIRE(autoclip_history_size(history) == size, "size is %" PRIu64, autoclip_history_size(history));
        REQUIRE(autoclip_history_check(history, &reason) == AUTOCLIP_OK, "%s", reason);
    }
    REQUIRE_OK(autoclip_history_rank(history, (double)INFINITY, &rank));
    REQUIRE(rank == size, "rank of infinity is %" PRIu64, rank);
}

int LLVMFuzzerTestOneInput(const uint8_t *input, size_t input_size) {
    if (input_size < 1) return 0;
    size_t size = input_size - 1;
    unsigned char *bytes = test_block(size);
    heap own;
    autoclip_history *history = NULL;
    test_now.test = "fuzz_snapshot";
    memcpy(bytes, input + 1, size);
    if (size >= SNAPSHOT_SIZE(0) && input[0] % 4 == 3) {
        size_t count = (size - SNAPSHOT_SIZE(0)) / 8;
        uint64_t window = bytes_get(bytes + 32, 8);
        unsigned char header[SNAPSHOT_SIZE(0)];
        snapshot_write(header, window, NULL, 0);
        bytes_put(header + 24, count, 8);
        memcpy(bytes, header, SNAPSHOT_HEADER);
    }
    if (size >= SNAPSHOT_SIZE(0) && input[0] % 4 >= 1) snapshot_seal(bytes, size);
    heap_create(&own);
    autoclip_status status = autoclip_history_load(bytes, size, &own.allocator, &history);
    if (status == AUTOCLIP_OK) {
        const char *reason = "";
        unsigned char *again = test_block(size);
        size_t again_size = SENTINEL_SIZE;
        REQUIRE(autoclip_history_check(history, &reason) == AUTOCLIP_OK, "%s", reason);
        REQUIRE_OK(autoclip_history_save(history, again, size, &again_size));
        const size_t more_header = (size_t)bytes_get(bytes + 12, 4) - SNAPSHOT_HEADER;
        REQUIRE(again_size == size - more_header, "%zu bytes became %zu", size, again_size);
        REQUIRE(!is_canonical(bytes, size) || memcmp(bytes, again, size) == 0, "other bytes came back");
        use(history);
        autoclip_history_destroy(history);
        free(again);
    } else {
        REQUIRE(status == AUTOCLIP_BAD_SNAPSHOT || status == AUTOCLIP_NEW_SNAPSHOT, "status is %d", (int)status);
        REQUIRE(history == NULL, "a refused snapshot gave a history");
    }
    heap_destroy(&own);
    free(bytes);
    return 0;
}

/* The reference: a sorted array with insertion and a list in order of age. Slow, short, and the judge of everything.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_TEST_MODEL_H
#define AUTOCLIP_TEST_MODEL_H

#include "test.h"

typedef struct model {
    double *sorted;
    double *aged; /* oldest first; the evicted ones stand before it, in `ages`, until room is needed */
    double *ages;
    size_t count;
    size_t capacity;
    uint64_t window;
} model;

static inline void model_create(model *own, uint64_t window) {
    memset(own, 0, sizeof *own);
    own->window = window;
}

static inline void model_destroy(model *own) {
    free(own->sorted);
    free(own->ages);
    memset(own, 0, sizeof *own);
}

static inline void model_reserve(model *own, size_t count) {
    size_t evicted = own->ages == NULL ? 0 : (size_t)(own->aged - own->ages);
    if (evicted + count <= own->capacity) return;
    if (evicted > 0) memmove(own->ages, own->aged, own->count * sizeof(double));
    if (2 * count > own->capacity) {
        own->capacity = 2 * count;
        own->sorted = realloc(own->sorted, own->capacity * sizeof(double));
        own->ages = realloc(own->ages, own->capacity * sizeof(double));
        REQUIRE(own->sorted != NULL && own->ages != NULL, "the test itself is out of memory");
    }
    own->aged = own->ages;
}

/* The number of stored norms below `norm`. */
static inline size_t model_rank(const model *own, double norm) {
    size_t low = 0;
    size_t high = own->count;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        if (own->sorted[middle] < norm) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static inline void model_push(model *own, double norm) {
    norm += 0.0; /* -0.0 becomes 0.0 */
    if (own->window > 0 && own->count == own->window) {
        size_t oldest = model_rank(own, own->aged[0]);
        own->count -= 1;
        memmove(own->sorted + oldest, own->sorted + oldest + 1, (own->count - oldest) * sizeof(double));
        own->aged += 1;
    }
    model_reserve(own, own->count + 1);
    size_t rank = model_rank(own, norm);
    memmove(own->sorted + rank + 1, own->sorted + rank, (own->count - rank) * sizeof(double));
    own->sorted[rank] = norm;
    own->aged[own->count++] = norm;
}

static inline int model_compare(const void *first, const void *second) {
    double a = *(const double *)first;
    double b = *(const double *)second;
    return (a > b) - (a < b);
}

/* As many pushes would, faster. */
static inline void model_extend(model *own, const double *norms, size_t count) {
    if (own->window > 0 || count < 16) {
        for (size_t i = 0; i < count; ++i) model_push(own, norms[i]);
        return;
    }
    model_reserve(own, own->count + count);
    for (size_t i = 0; i < count; ++i) {
        own->aged[own->count] = own->sorted[own->count] = norms[i] + 0.0;
        own->count += 1;
    }
    qsort(own->sorted, own->count, sizeof(double), model_compare);
}

static inline void model_copy(model *own, const model *other) {
    own->count = 0;
    own->window = other->window;
    model_reserve(own, other->count);
    if (other->count > 0) {
        memcpy(own->sorted, other->sorted, other->count * sizeof(double));
        memcpy(own->aged, other->aged, other->count * sizeof(double));
    }
    own->count = other->count;
}

/* numpy's linear rule. */
static inline double model_percentile(const model *own, double percentile) {
    double position = (double)(own->count - 1) * (percentile / 100);
    size_t below = (size_t)position;
    double fraction = position - (double)below;
    double low = own->sorted[below];
    double high = own->sorted[below + 1 < own->count ? below + 1 : below];
    double step = high - low;
    return fraction < 0.5 ? low + step * fraction : high - step * (1 - fraction);
}

/* --- Snapshots, written from their description in autoclip.h ----------------------------------------------------- */

static inline void bytes_put(unsigned char *bytes, uint64_t value, size_t size) {
    for (size_t i = 0; i < size; ++i) bytes[i] = (unsigned char)(value >> (8 * i));
}

static inline uint64_t bytes_get(const unsigned char *bytes, size_t size) {
    uint64_t value = 0;
    for (size_t i = 0; i < size; ++i) value |= (uint64_t)bytes[i] << (8 * i);
    return value;
}

static const uint64_t xxh_prime[5] = {UINT64_C(0x9E3779B185EBCA87), UINT64_C(0xC2B2AE3D27D4EB4F),
                                      UINT64_C(0x165667B19E3779F9), UINT64_C(0x85EBCA77C2B2AE63),
                                      UINT64_C(0x27D4EB2F165667C5)};

static inline uint64_t xxh_rotate(uint64_t value, int bits) { return (value << bits) | (value >> (64 - bits)); }

static inline uint64_t xxh_round(uint64_t lane, uint64_t input) {
    return xxh_rotate(lane + input * xxh_prime[1], 31) * xxh_prime[0];
}

/* XXH64 with seed 0, from the specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md). */
static inline uint64_t xxh64(const unsigned char *bytes, size_t size) {
    const uint64_t *p = xxh_prime;
    uint64_t hash = p[4];
    size_t at = 0;
    if (size >= 32) {
        uint64_t lane[4] = {p[0] + p[1], p[1], 0, 0 - p[0]};
        for (; size - at >= 32; at += 32) {
            for (size_t i = 0; i < 4; ++i) lane[i] = xxh_round(lane[i], bytes_get(bytes + at + 8 * i, 8));
        }
        hash = xxh_rotate(lane[0], 1) + xxh_rotate(lane[1], 7) + xxh_rotate(lane[2], 12) + xxh_rotate(lane[3], 18);
        for (size_t i = 0; i < 4; ++i) hash = (hash ^ xxh_round(0, lane[i])) * p[0] + p[3];
    }
    hash += size;
    for (; size - at >= 8; at += 8) hash = xxh_rotate(hash ^ xxh_round(0, bytes_get(bytes + at, 8)), 27) * p[0] + p[3];
    if (size - at >= 4) {
        hash = xxh_rotate(hash ^ (bytes_get(bytes + at, 4) * p[0]), 23) * p[1] + p[2];
        at += 4;
    }
    for (; at < size; ++at) hash = xxh_rotate(hash ^ (bytes[at] * p[4]), 11) * p[0];
    hash = (hash ^ (hash >> 33)) * p[1];
    hash = (hash ^ (hash >> 29)) * p[2];
    return hash ^ (hash >> 32);
}

#define SNAPSHOT_HEADER ((size_t)64)
#define SNAPSHOT_SIZE(count) (SNAPSHOT_HEADER + 8 * (size_t)(count) + 8)

/* Make both checksums of a snapshot true again, after a test has written something else into it. */
static inline void snapshot_seal(unsigned char *bytes, size_t size) {
    REQUIRE(size >= SNAPSHOT_SIZE(0), "%zu bytes hold no snapshot", size);
    bytes_put(bytes + 56, xxh64(bytes, 56), 8);
    bytes_put(bytes + size - 8, xxh64(bytes + SNAPSHOT_HEADER, size - SNAPSHOT_HEADER - 8), 8);
}

/* The snapshot of these norms as they stand, sealed; SNAPSHOT_SIZE(count) bytes. */
static inline void snapshot_write(unsigned char *bytes, uint64_t window, const double *norms, size_t count) {
    static const unsigned char magic[8] = {0x89, 'A', 'C', 'H', '\r', '\n', 0x1A, '\n'};
    memset(bytes, 0, SNAPSHOT_HEADER);
    memcpy(bytes, magic, sizeof magic);
    bytes_put(bytes + 8, 1, 2);
    bytes_put(bytes + 12, SNAPSHOT_HEADER, 4);
    bytes_put(bytes + 16, window > 0, 8);
    bytes_put(bytes + 24, count, 8);
    bytes_put(bytes + 32, window, 8);
    for (size_t i = 0; i < count; ++i) bytes_put(bytes + SNAPSHOT_HEADER + 8 * i, test_bits(norms[i]), 8);
    snapshot_seal(bytes, SNAPSHOT_SIZE(count));
}

/* --- Judgement ---------------------------------------------------------------------------------------------------- */

/* Every invariant holds, and the history has the size and window of the model. Moves nothing inside the history. */
static inline void judge_facts(const autoclip_history *history, const model *truth) {
    const char *reason = NULL;
    autoclip_status status = autoclip_history_check(history, &reason);
    REQUIRE(status == AUTOCLIP_OK, "check returns %d: %s", (int)status, reason);
    REQUIRE(reason != NULL && reason[0] == '\0', "the reason is '%s' though all invariants hold", reason);
    uint64_t size = autoclip_history_size(history);
    REQUIRE(size == truth->count, "size is %" PRIu64 ", the model has %zu norms", size, truth->count);
    REQUIRE(autoclip_history_window(history) == truth->window, "window is %" PRIu64 ", the model has %" PRIu64,
            autoclip_history_window(history), truth->window);
}

/* The history holds the norms of the model, to the bit, in the same order of size and (in a window) of age. */
static inline void judge(autoclip_history *history, const model *truth) {
    judge_facts(history, truth);
    double *norms = test_block(truth->count * sizeof(double));
    size_t count = SIZE_MAX;
    REQUIRE_OK(autoclip_history_values(history, norms, truth->count, &count));
    REQUIRE(count == truth->count, "values gave %zu norms of %zu", count, truth->count);
    for (size_t i = 0; i < count; ++i) {
        REQUIRE(test_same(truth->sorted[i], norms[i]), "norm %zu of %zu is %.17g but should be %.17g", i, count,
                norms[i], truth->sorted[i]);
    }
    free(norms);

    size_t expected_size = SNAPSHOT_SIZE(truth->count);
    unsigned char *expected = test_block(expected_size);
    unsigned char *bytes = test_block(expected_size);
    size_t size = SIZE_MAX;
    snapshot_write(expected, truth->window, truth->window > 0 ? truth->aged : truth->sorted, truth->count);
    REQUIRE(autoclip_history_save_size(history) == expected_size, "save_size is %zu but should be %zu",
            autoclip_history_save_size(history), expected_size);
    REQUIRE_OK(autoclip_history_save(history, bytes, expected_size, &size));
    REQUIRE(size == expected_size, "save wrote %zu bytes of %zu", size, expected_size);
    for (size_t i = 0; i < size; ++i) {
        REQUIRE(bytes[i] == expected[i], "byte %zu of the snapshot of %zu norms is %02x but should be %02x", i,
                truth->count, bytes[i], expected[i]);
    }
    free(expected);
    free(bytes);
}

#endif /* AUTOCLIP_TEST_MODEL_H */

/* Bytes in, bytes out: the format is drawn in autoclip.h.
 *
 * SPDX-License-Identifier: MIT */
#include <float.h>
#include <string.h>

#include "history.h"

enum { HEADER = 64, CHECKSUM = 8, NORM = 8, MAJOR = 1, MINOR = 0, HAS_WINDOW = 1 };
#define ESSENTIAL_FLAGS UINT64_C(0xFFFFFFFF) /* which no reader may ignore */

/* Where the fields of the header begin. */
enum {
    AT_MAJOR = 8,
    AT_MINOR = 10,
    AT_LENGTH = 12,
    AT_FLAGS = 16,
    AT_COUNT = 24,
    AT_WINDOW = 32,
    AT_ZERO = 40,
    AT_CHECKSUM = 56
};

static const uint8_t magic[AT_MAJOR] = {0x89, 'A', 'C', 'H', '\r', '\n', 0x1A, '\n'};

/* --- Little-endian numbers -------------------------------------------------------------------------------------- */

static void put(uint8_t *bytes, size_t size, uint64_t value) {
    for (size_t i = 0; i < size; ++i) bytes[i] = (uint8_t)(value >> (8 * i));
}

static uint64_t get(const uint8_t *bytes, size_t size) {
    uint64_t value = 0;
    for (size_t i = 0; i < size; ++i) value |= (uint64_t)bytes[i] << (8 * i);
    return value;
}

/* A word of memory as a little-endian number, and back; compilers see that most machines need nothing done. */
static uint64_t little_endian(uint64_t word) {
    const uint16_t one = 1;
    uint8_t first;
    memcpy(&first, &one, sizeof first);
    return first == 1 ? word : get((const uint8_t *)&word, sizeof word);
}

static uint64_t get8(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return little_endian(word);
}

static double get_double(const uint8_t *bytes) {
    const uint64_t bits = get8(bytes);
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void put_double(uint8_t *bytes, double value) {
    uint64_t word;
    memcpy(&word, &value, sizeof word);
    word = little_endian(word);
    memcpy(bytes, &word, sizeof word);
}

/* --- XXH64 with seed 0, for lengths that are multiples of 8, after its published specification ------------------- */

#define PRIME_1 UINT64_C(0x9E3779B185EBCA87)
#define PRIME_2 UINT64_C(0xC2B2AE3D27D4EB4F)
#define PRIME_3 UINT64_C(0x165667B19E3779F9)
#define PRIME_4 UINT64_C(0x85EBCA77C2B2AE63)
#define PRIME_5 UINT64_C(0x27D4EB2F165667C5)

static uint64_t rotate(uint64_t value, unsigned bits) { return value << bits | value >> (64 - bits); }

static uint64_t mix(uint64_t lane, uint64_t word) { return rotate(lane + word * PRIME_2, 31) * PRIME_1; }

enum { LANES = 4, STRIPE = 8 * LANES };

struct checksum {
    uint64_t lane[LANES];
    uint64_t size;
};

static const struct checksum checksum_start = {.lane = {PRIME_1 + PRIME_2, PRIME_2, 0, 0 - PRIME_1}};

/* Whole stripes. */
static void checksum_add(struct checksum *sum, const uint8_t *bytes, size_t size) {
    struct checksum local = *sum; /* in registers: `bytes` may point anywhere */
    for (const uint8_t *end = bytes + size; bytes < end; bytes += STRIPE) {
        for (int i = 0; i < LANES; ++i) local.lane[i] = mix(local.lane[i], get8(bytes + 8 * i));
    }
    local.size += size;
    *sum = local;
}

/* What is left, less than a stripe, and the end. */
static uint64_t checksum_end(const struct checksum *sum, const uint8_t *bytes, size_t size) {
    const uint64_t *lane = sum->lane;
    uint64_t hash = PRIME_5;
    if (sum->size > 0) {
        hash = rotate(lane[0], 1) + rotate(lane[1], 7) + rotate(lane[2], 12) + rotate(lane[3], 18);
        for (int i = 0; i < LANES; ++i) hash = (hash ^ mix(0, lane[i])) * PRIME_1 + PRIME_4;
    }
    hash += sum->size + size;
    for (const uint8_t *end = bytes + size; bytes < end; bytes += 8) {
        hash = rotate(hash ^ mix(0, get8(bytes)), 27) * PRIME_1 + PRIME_4;
    }
    hash = (hash ^ hash >> 33) * PRIME_2;
    hash = (hash ^ hash >> 29) * PRIME_3;
    return hash ^ hash >> 32;
}

static uint64_t checksum(const uint8_t *bytes, size_t size) {
    struct checksum sum = checksum_start;
    const size_t whole = size - size % STRIPE;
    checksum_add(&sum, bytes, whole);
    return checksum_end(&sum, bytes + whole, size - whole);
}

/* --- Save ------------------------------------------------------------------------------------------------------- */

size_t autoclip_history_save_size(const autoclip_history *history) {
    return HEADER + (size_t)history_size(history) * NORM + CHECKSUM;
}

static autoclip_status save(autoclip_history *history, void *bytes, size_t capacity, size_t *size) {
    const size_t needed = autoclip_history_save_size(history);
    if (capacity < needed) return AUTOCLIP_TOO_SMALL;
    const uint64_t count = history_size(history);
    uint8_t *header = bytes;
    memcpy(header, magic, sizeof magic);
    put(header + AT_MAJOR, 2, MAJOR);
    put(header + AT_MINOR, 2, MINOR);
    put(header + AT_LENGTH, 4, HEADER);
    put(header + AT_FLAGS, 8, history->window > 0 ? HAS_WINDOW : 0);
    put(header + AT_COUNT, 8, count);
    put(header + AT_WINDOW, 8, history->window);
    memset(header + AT_ZERO, 0, AT_CHECKSUM - AT_ZERO);
    put(header + AT_CHECKSUM, 8, checksum(header, AT_CHECKSUM));
    uint8_t *norms = header + HEADER;
    struct checksum sum = checksum_start;
    history_iterator iterator = autoclip_history_iterate(history);
    uint64_t done = 0;
    size_t rest; /* of a block, which is added while it is in the cache */
    do {
        double block[128];
        const size_t capacity = sizeof block / sizeof *block;
        const size_t part = count - done < capacity ? (size_t)(count - done) : capacity;
        if (history->window > 0) {
            for (size_t i = 0; i < part; ++i) block[i] = history_by_age(history, done + i);
        } else {
            (void)autoclip_history_read(&iterator, block, part);
        }
        for (size_t i = 0; i < part; ++i) put_double(norms + i * NORM, block[i]);
        rest = part * NORM % STRIPE;
        checksum_add(&sum, norms, part * NORM - rest);
        norms += part * NORM;
        done += part;
    } while (done < count);
    put(norms, CHECKSUM, checksum_end(&sum, norms - rest, rest));
    *size = needed;
    return AUTOCLIP_OK;
}

autoclip_status autoclip_history_save(autoclip_history *history, void *bytes, size_t capacity, size_t *size) {
    IN_STANDARD_MODE(save(history, bytes, capacity, size));
}

/* --- Load ------------------------------------------------------------------------------------------------------- */

struct decoder {
    const uint8_t *next;
    double last;
};

/* An ostree_reader that stops at a norm that is not finite or not in order. */
static bool read_ascending(void *source, double *norms, size_t count) {
    struct decoder *decoder = source;
    bool sound = true;
    double last = decoder->last;
    for (size_t i = 0; i < count; ++i) {
        const double norm = get_double(decoder->next + i * NORM) + 0.0;
        sound &= norm >= last && norm <= DBL_MAX;
        norms[i] = norm;
        last = norm;
    }
    decoder->next += count * NORM;
    decoder->last = last;
    return sound;
}

static autoclip_status load_window(autoclip_history *history, const uint8_t *bytes, size_t count) {
    if (count == 0) return AUTOCLIP_OK;
    double *norms = memory_allocate(&history->memory, count * sizeof *norms);
    if (norms == NULL) return AUTOCLIP_NO_MEMORY;
    for (size_t i = 0; i < count; ++i) norms[i] = get_double(bytes + i * NORM);
    const autoclip_status status = autoclip_history_extend(history, norms, count);
    memory_release(&history->memory, norms, count * sizeof *norms);
    return status == AUTOCLIP_NOT_FINITE ? AUTOCLIP_BAD_SNAPSHOT : status;
}

static autoclip_status load(const void *bytes, size_t size, const autoclip_allocator *allocator,
                            autoclip_history **history) {
    const uint8_t *header = bytes;
    if (size < HEADER + CHECKSUM || memcmp(header, magic, sizeof magic) != 0) return AUTOCLIP_BAD_SNAPSHOT;
    if (get(header + AT_CHECKSUM, 8) != checksum(header, AT_CHECKSUM)) return AUTOCLIP_BAD_SNAPSHOT;
    if (get(header + AT_MAJOR, 2) > MAJOR) return AUTOCLIP_NEW_SNAPSHOT;
    const uint64_t length = get(header + AT_LENGTH, 4);
    const uint64_t flags = get(header + AT_FLAGS, 8);
    const uint64_t count = get(header + AT_COUNT, 8);
    const uint64_t window = get(header + AT_WINDOW, 8);
    const size_t body_size = size - HEADER - CHECKSUM; /* of what follows the first 64 bytes: more header, the norms */
    const bool is_plain =
        length == HEADER && flags <= HAS_WINDOW && get(header + AT_ZERO, 8) == 0 && get(header + AT_ZERO + 8, 8) == 0;
    const bool is_sound = get(header + AT_MAJOR, 2) == MAJOR && (is_plain || get(header + AT_MINOR, 2) > MINOR) &&
                          length >= HEADER && length - HEADER <= body_size && length % NORM == 0 &&
                          body_size % NORM == 0;
    if (!is_sound) return AUTOCLIP_BAD_SNAPSHOT;
    if (get(header + HEADER + body_size, CHECKSUM) != checksum(header + HEADER, body_size))
        return AUTOCLIP_BAD_SNAPSHOT;
    if ((flags & ESSENTIAL_FLAGS) > HAS_WINDOW) return AUTOCLIP_NEW_SNAPSHOT;
    const bool has_window = (flags & HAS_WINDOW) != 0;
    const size_t norms_size = body_size - (size_t)(length - HEADER);
    if (has_window != (window > 0) || (has_window && count > window) || norms_size / NORM != count) {
        return AUTOCLIP_BAD_SNAPSHOT;
    }
    const uint8_t *norms = header + length;
    autoclip_history *made;
    autoclip_status status = autoclip_history_create(window, allocator, &made);
    if (status != AUTOCLIP_OK) return status;
    if (window > 0) {
        status = load_window(made, norms, (size_t)count);
    } else {
        struct decoder decoder = {.next = norms, .last = -DBL_MAX};
        status = autoclip_history_build(made, count, read_ascending, &decoder);
    }
    if (status == AUTOCLIP_OK) {
        *history = made;
    } else {
        autoclip_history_destroy(made);
    }
    return status;
}

autoclip_status autoclip_history_load(const void *bytes, size_t size, const autoclip_allocator *allocator,
                                      autoclip_history **history) {
    IN_STANDARD_MODE(load(bytes, size, allocator, history));
}

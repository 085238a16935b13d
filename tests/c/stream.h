/* A stream of operations on a history and on the model at once: every operation of the header, on values chosen by the
 * case they reach. Random tests draw it from a seed, the fuzzer from its bytes, and the fault test refuses memory to
 * each call of it.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_TEST_STREAM_H
#define AUTOCLIP_TEST_STREAM_H

#include "model.h"

/* --- Where decisions come from ------------------------------------------------------------------------------------ */

typedef struct source {
    const unsigned char *bytes; /* NULL: draw from the seed */
    size_t size;
    size_t at;
    uint64_t state;
} source;

static inline uint64_t source_bits(source *own, size_t size) {
    if (own->bytes == NULL) return test_random(&own->state) >> (64 - 8 * size);
    uint64_t bits = 0;
    for (size_t i = 0; i < size && own->at < own->size; ++i) bits = bits << 8 | own->bytes[own->at++];
    return bits;
}

static inline uint64_t source_below(source *own, uint64_t bound) {
    return source_bits(own, bound <= 256 ? 1 : own->bytes == NULL ? 8 : 2) % bound;
}

static inline double source_uniform(source *own) {
    return (double)(source_bits(own, own->bytes == NULL ? 8 : 2) >> (own->bytes == NULL ? 11 : 0)) *
           (own->bytes == NULL ? 0x1p-53 : 0x1p-16);
}

/* --- Values by the case they reach -------------------------------------------------------------------------------- */

enum values {
    VALUES_RANDOM,
    VALUES_ASCENDING,
    VALUES_DESCENDING,
    VALUES_EQUAL,
    VALUES_TWO,
    VALUES_SAW_TOOTH,
    VALUES_DRIFTING,
    VALUES_DENORMAL,
    VALUES_HUGE,
    VALUES_NEGATIVE,
    VALUES_OPPOSITE,
    VALUES_ZERO,
    VALUES_ANY_BITS,
    VALUES_KINDS
};

static const char *const values_name[VALUES_KINDS] = {"random",    "ascending", "descending", "all equal", "two values",
                                                      "saw-tooth", "drifting",  "denormal",   "huge",      "negative",
                                                      "opposite",  "zeros",     "any bits"};

/* The `index`-th value of a kind; finite but for any bits. */
static inline double values_draw(enum values kind, uint64_t index, source *from) {
    static const double zeros[4] = {-0.0, 0.0, 1.0, -1.0};
    double i = (double)index;
    uint64_t bits;
    double value;
    switch (kind) {
    case VALUES_ASCENDING: return 1 + 0.25 * i;
    case VALUES_DESCENDING: return 1e9 - 0.25 * i;
    case VALUES_EQUAL: return 3.25;
    case VALUES_TWO: return source_below(from, 2) ? 1.5 : 2.5;
    case VALUES_SAW_TOOTH: return (double)(index % 37) + i * 1e-6;
    case VALUES_DRIFTING: return 1e3 * (1 + source_uniform(from)) / (1 + 0.01 * i * i);
    case VALUES_DENORMAL: return (double)source_below(from, 2000) * 0x1p-1074;
    case VALUES_HUGE: return 1e308 * (0.5 + source_uniform(from));
    case VALUES_NEGATIVE: return -10 * source_uniform(from);
    case VALUES_OPPOSITE: /* their difference overflows, and numpy's rule then gives what it gives */
        return 1.7e308 * (source_uniform(from) < 0.5 ? -1 : 1);
    case VALUES_ZERO: return zeros[source_below(from, 4)];
    case VALUES_ANY_BITS:
        bits = source_bits(from, 8);
        memcpy(&value, &bits, sizeof value);
        return value;
    case VALUES_RANDOM:
    case VALUES_KINDS: break;
    }
    return source_uniform(from);
}

/* A percentile: the ends and their neighbours, the common ones, exact ranks, any. One in 64 is not a percentile. */
static inline double percentile_draw(source *from, size_t count) {
    static const double common[] = {0,  100, 10,     50,      10, 1e-300, 0x1p-1074, 99.999, 0x1.8ffffffffffffp+6,
                                    25, 90,  33.333, 99.99999};
    static const double bad[] = {-0x1p-1074, 0x1.9000000000001p+6, (double)NAN, (double)INFINITY, (double)-INFINITY};
    switch (source_below(from, 64)) {
    case 0: return bad[source_below(from, sizeof bad / sizeof *bad)];
    case 1:
    case 2:
    case 3:
    case 4:
    case 5:
    case 6:
    case 7:
    case 8: return count < 2 ? 0 : 100 * ((double)source_below(from, count) / (double)(count - 1));
    case 9:
    case 10:
    case 11:
    case 12:
    case 13:
    case 14:
    case 15:
    case 16: return 100 * source_uniform(from);
    default: return common[source_below(from, sizeof common / sizeof *common)];
    }
}

static inline bool percentile_valid(double percentile) { return percentile >= 0 && percentile <= 100; }

/* --- A history beside its model ----------------------------------------------------------------------------------- */

#define SENTINEL (-0x1.badbadbadbadp+500)
#define SENTINEL_SIZE ((size_t)0xBAD0BAD0)

typedef struct stream {
    heap heap;
    autoclip_history *history;
    model truth;
    source source;
    enum values kind;
    uint64_t drawn;   /* values so far */
    size_t limit;     /* forget everything above so many norms */
    bool faulty;      /* refuse memory to every call, allocation after allocation */
    uint64_t attempt; /* how often the present call was refused */
    uint64_t judgements;
    autoclip_status status; /* of the last call */
} stream;

static inline void stream_create(stream *own, uint64_t window, enum values kind, source from) {
    memset(own, 0, sizeof *own);
    heap_create(&own->heap);
    model_create(&own->truth, window);
    own->source = from;
    own->kind = kind;
    own->limit = 2000;
    test_now.detail = values_name[kind];
    REQUIRE_OK(autoclip_history_create(window, &own->heap.allocator, &own->history));
}

static inline void stream_destroy(stream *own) {
    autoclip_history_destroy(own->history);
    model_destroy(&own->truth);
    heap_destroy(&own->heap);
}

static inline void stream_check_memory(const stream *own) {
    REQUIRE(autoclip_history_memory(own->history) == own->heap.bytes,
            "memory is %" PRIu64 " but the heap counts %" PRIu64, autoclip_history_memory(own->history),
            own->heap.bytes);
}

/* Judge everything. A query may move things inside the history, and would then hide what the state before it does next:
 * two times of three a clone is judged in its place. */
static inline void stream_judge(stream *own) {
    stream_check_memory(own);
    judge_facts(own->history, &own->truth);
    if (own->judgements++ % 3 == 2) {
        judge(own->history, &own->truth);
    } else {
        autoclip_history *clone = NULL;
        REQUIRE_OK(autoclip_history_clone(own->history, &clone));
        judge(clone, &own->truth);
        autoclip_history_destroy(clone);
    }
    stream_check_memory(own);
}

static inline void stream_arm(stream *own) {
    if (own->faulty) {
        /* Many a call can do without the memory it asks for: so begin now with one refusal, now with all. */
        heap_arm(&own->heap, own->attempt / 2 + 1, (own->attempt + test_now.step) % 2 == 1);
    }
}

/* After a call: has it to be called again, for want of memory? A call that fails has changed nothing. */
static inline bool stream_refused(stream *own, bool untouched) {
    heap_disarm(&own->heap);
    if (own->status == AUTOCLIP_OK) return false;
    REQUIRE(untouched, "a result was written though the status is %d", (int)own->status);
    stream_judge(own);
    if (own->status == AUTOCLIP_NO_MEMORY && own->faulty) {
        REQUIRE(own->heap.faults > 0, "no memory, yet nothing was refused");
        own->attempt += 1;
        stream_arm(own);
        return true;
    }
    return false;
}

/* Call until memory suffices; `untouched` says that no result was written. */
#define ATTEMPT(own, call, untouched)                                                                                  \
    do {                                                                                                               \
        (own)->attempt = 0;                                                                                            \
        stream_arm(own);                                                                                               \
        do {                                                                                                           \
            (own)->status = (call);                                                                                    \
        } while (stream_refused((own), (untouched)));                                                                  \
    } while (0)

#define ATTEMPTED(own, expected) REQUIRE_STATUS(expected, (own)->status)

static inline double stream_value(stream *own) {
    static const double bad[3] = {(double)NAN, (double)INFINITY, (double)-INFINITY};
    if (source_below(&own->source, 128) == 0) return bad[source_below(&own->source, 3)];
    return values_draw(own->kind, own->drawn++, &own->source);
}

/* `count` values in the order of `shape`: 0 as they come, 1 ascending, 2 descending. */
static inline double *stream_values(stream *own, size_t count, uint64_t shape, bool *finite) {
    double *norms = test_block(count * sizeof(double));
    *finite = true;
    for (size_t i = 0; i < count; ++i) {
        /* one bad value would spoil a long array nearly always, so only the short ones get any */
        norms[i] = count < 20 ? stream_value(own) : values_draw(own->kind, own->drawn++, &own->source);
        if (count >= 20 && !isfinite(norms[i])) norms[i] = 1;
        *finite = *finite && isfinite(norms[i]);
    }
    if (shape > 0 && *finite) {
        qsort(norms, count, sizeof(double), model_compare);
        for (size_t i = 0; shape == 2 && i < count / 2; ++i) {
            double other = norms[i];
            norms[i] = norms[count - 1 - i];
            norms[count - 1 - i] = other;
        }
    }
    return norms;
}

static inline size_t stream_count(stream *own) {
    switch (source_below(&own->source, 8)) {
    case 0: return 0;
    case 1:
    case 2: return (size_t)source_below(&own->source, 400);
    default: return (size_t)source_below(&own->source, 20);
    }
}

static inline void stream_push(stream *own) {
    double norm = stream_value(own);
    ATTEMPT(own, autoclip_history_push(own->history, norm), true);
    if (isfinite(norm)) {
        ATTEMPTED(own, AUTOCLIP_OK);
        model_push(&own->truth, norm);
    } else {
        ATTEMPTED(own, AUTOCLIP_NOT_FINITE);
    }
}

static inline void stream_extend(stream *own) {
    size_t count = stream_count(own);
    bool finite;
    double *norms = stream_values(own, count, source_below(&own->source, 3), &finite);
    ATTEMPT(own, autoclip_history_extend(own->history, norms, count), true);
    ATTEMPTED(own, finite ? AUTOCLIP_OK : AUTOCLIP_NOT_FINITE);
    if (finite) model_extend(&own->truth, norms, count);
    free(norms);
}

static inline void stream_observe(stream *own) {
    double norm = stream_value(own);
    double percentile = percentile_draw(&own->source, own->truth.count);
    double threshold = SENTINEL;
    ATTEMPT(own, autoclip_history_observe(own->history, norm, percentile, &threshold), test_same(threshold, SENTINEL));
    if (isfinite(norm) && percentile_valid(percentile)) {
        ATTEMPTED(own, AUTOCLIP_OK);
        model_push(&own->truth, norm);
        REQUIRE_SAME(model_percentile(&own->truth, percentile), threshold);
    } else if (isfinite(norm)) {
        ATTEMPTED(own, AUTOCLIP_BAD_PERCENTILE);
    } else if (percentile_valid(percentile)) {
        ATTEMPTED(own, AUTOCLIP_NOT_FINITE);
    } else {
        REQUIRE(own->status == AUTOCLIP_NOT_FINITE || own->status == AUTOCLIP_BAD_PERCENTILE, "status is %d",
                (int)own->status);
    }
}

static inline void stream_observe_many(stream *own) {
    size_t count = stream_count(own);
    size_t percentile_count = (size_t)source_below(&own->source, 5);
    bool finite;
    bool valid = true;
    double percentiles[4] = {0};
    double *norms = stream_values(own, count, source_below(&own->source, 3), &finite);
    for (size_t j = 0; j < percentile_count; ++j) {
        percentiles[j] = percentile_draw(&own->source, own->truth.count);
        valid = valid && percentile_valid(percentiles[j]);
    }
    size_t cells = count * percentile_count;
    double *thresholds = test_block(cells * sizeof(double));
    for (size_t i = 0; i < cells; ++i) thresholds[i] = SENTINEL;
    ATTEMPT(own, autoclip_history_observe_many(own->history, norms, count, percentiles, percentile_count, thresholds),
            cells == 0 || (test_same(thresholds[0], SENTINEL) && test_same(thresholds[cells - 1], SENTINEL)));
    if (finite && valid) {
        ATTEMPTED(own, AUTOCLIP_OK);
        for (size_t i = 0; i < count; ++i) {
            model_push(&own->truth, norms[i]);
            for (size_t j = 0; j < percentile_count; ++j) {
                REQUIRE_SAME(model_percentile(&own->truth, percentiles[j]), thresholds[i * percentile_count + j]);
            }
        }
    } else {
        REQUIRE((!finite && own->status == AUTOCLIP_NOT_FINITE) || (!valid && own->status == AUTOCLIP_BAD_PERCENTILE),
                "status is %d", (int)own->status);
        for (size_t i = 0; i < cells; ++i) REQUIRE_SAME(SENTINEL, thresholds[i]);
    }
    free(thresholds);
    free(norms);
}

static inline void stream_percentile(stream *own) {
    double percentile = percentile_draw(&own->source, own->truth.count);
    double threshold = SENTINEL;
    ATTEMPT(own, autoclip_history_percentile(own->history, percentile, &threshold), test_same(threshold, SENTINEL));
    if (!percentile_valid(percentile)) {
        REQUIRE(own->status == AUTOCLIP_BAD_PERCENTILE || (own->truth.count == 0 && own->status == AUTOCLIP_EMPTY),
                "status is %d", (int)own->status);
    } else if (own->truth.count == 0) {
        ATTEMPTED(own, AUTOCLIP_EMPTY);
    } else {
        ATTEMPTED(own, AUTOCLIP_OK);
        REQUIRE_SAME(model_percentile(&own->truth, percentile), threshold);
    }
}

static inline void stream_select(stream *own) {
    uint64_t rank = source_below(&own->source, own->truth.count + 2);
    double norm = SENTINEL;
    ATTEMPT(own, autoclip_history_select(own->history, rank, &norm), test_same(norm, SENTINEL));
    if (rank < own->truth.count) {
        ATTEMPTED(own, AUTOCLIP_OK);
        REQUIRE_SAME(own->truth.sorted[rank], norm);
    } else {
        ATTEMPTED(own, AUTOCLIP_BAD_RANK);
    }
}

static inline void stream_rank(stream *own) {
    double norm;
    switch (source_below(&own->source, 4)) {
    case 0: norm = stream_value(own); break;
    case 1: norm = source_below(&own->source, 2) ? (double)INFINITY : (double)-INFINITY; break;
    default: /* one that is there, or a neighbour of it */
        norm = own->truth.count == 0 ? -0.0 : own->truth.sorted[source_below(&own->source, own->truth.count)];
        if (source_below(&own->source, 2)) norm *= 1 + 0x1p-52;
    }
    uint64_t rank = SENTINEL_SIZE;
    ATTEMPT(own, autoclip_history_rank(own->history, norm, &rank), rank == SENTINEL_SIZE);
    if (isnan(norm)) {
        ATTEMPTED(own, AUTOCLIP_NOT_FINITE);
    } else {
        ATTEMPTED(own, AUTOCLIP_OK);
        REQUIRE(rank == model_rank(&own->truth, norm), "rank of %a is %" PRIu64 " but should be %zu", norm, rank,
                model_rank(&own->truth, norm));
    }
}

static inline void stream_order_statistics(stream *own) {
    size_t first = (size_t)source_below(&own->source, own->truth.count + 1);
    size_t count = (size_t)source_below(&own->source, own->truth.count - first + 2);
    double *norms = test_block(count * sizeof(double));
    unsigned char *before = test_block(count * sizeof(double));
    ATTEMPT(own, autoclip_history_order_statistics(own->history, first, count, norms),
            memcmp(norms, before, count * sizeof(double)) == 0);
    if (count > 0 && first + count > own->truth.count) {
        ATTEMPTED(own, AUTOCLIP_BAD_RANK);
    } else {
        ATTEMPTED(own, AUTOCLIP_OK);
        for (size_t i = 0; i < count; ++i) REQUIRE_SAME(own->truth.sorted[first + i], norms[i]);
    }
    free(before);
    free(norms);
}

static inline void stream_values_and_save(stream *own) {
    size_t count = SENTINEL_SIZE;
    double *norms = test_block(own->truth.count * sizeof(double));
    ATTEMPT(own, autoclip_history_values(own->history, norms, own->truth.count, &count), count == SENTINEL_SIZE);
    ATTEMPTED(own, AUTOCLIP_OK);
    free(norms);
    judge(own->history, &own->truth);
}

static inline void stream_merge(stream *own) {
    static const uint64_t windows[4] = {0, 0, 5, 100};
    autoclip_history *other = NULL;
    model truth;
    bool finite;
    size_t count = stream_count(own);
    double *norms = stream_values(own, count, source_below(&own->source, 3), &finite);
    heap other_heap;
    heap_create(&other_heap);
    model_create(&truth, windows[source_below(&own->source, 4)]);
    REQUIRE_OK(autoclip_history_create(truth.window, &other_heap.allocator, &other));
    if (finite) {
        REQUIRE_OK(autoclip_history_extend(other, norms, count));
        model_extend(&truth, norms, count);
    }
    ATTEMPT(own, autoclip_history_merge(own->history, other), true);
    if (own->truth.window > 0) {
        ATTEMPTED(own, AUTOCLIP_HAS_WINDOW);
    } else {
        ATTEMPTED(own, AUTOCLIP_OK);
        model_extend(&own->truth, truth.aged, truth.count);
    }
    judge(other, &truth);
    autoclip_history_destroy(other);
    model_destroy(&truth);
    heap_destroy(&other_heap);
    free(norms);
}

static inline void stream_merge_itself(stream *own) {
    if (own->truth.window == 0 && own->truth.count > own->limit / 3) return;
    ATTEMPT(own, autoclip_history_merge(own->history, own->history), true);
    if (own->truth.window > 0) {
        ATTEMPTED(own, AUTOCLIP_HAS_WINDOW);
        return;
    }
    ATTEMPTED(own, AUTOCLIP_OK);
    model twin;
    model_create(&twin, 0);
    model_copy(&twin, &own->truth);
    model_extend(&own->truth, twin.aged, twin.count);
    model_destroy(&twin);
}

/* Clone; change one of the two; the other must not notice; go on with either. */
static inline void stream_clone(stream *own) {
    autoclip_history *clone = NULL;
    ATTEMPT(own, autoclip_history_clone(own->history, &clone), clone == NULL);
    ATTEMPTED(own, AUTOCLIP_OK);
    uint64_t memory = autoclip_history_memory(own->history) + autoclip_history_memory(clone);
    REQUIRE(memory == own->heap.bytes, "memory of both is %" PRIu64 " but the heap counts %" PRIu64, memory,
            own->heap.bytes);
    autoclip_history *kept = source_below(&own->source, 2) ? clone : own->history;
    autoclip_history *gone = kept == clone ? own->history : clone;
    for (int i = 0; i < 10; ++i) REQUIRE_OK(autoclip_history_push(gone, 0.5 * i));
    judge_facts(kept, &own->truth);
    autoclip_history_destroy(gone);
    own->history = kept;
}

static inline void stream_save_and_load(stream *own) {
    size_t capacity = autoclip_history_save_size(own->history);
    size_t size = SENTINEL_SIZE;
    unsigned char *bytes = test_block(capacity + 1);
    autoclip_history *loaded = NULL;
    /* one past the start: a snapshot needs no alignment */
    ATTEMPT(own, autoclip_history_save(own->history, bytes + 1, capacity, &size), size == SENTINEL_SIZE);
    ATTEMPTED(own, AUTOCLIP_OK);
    REQUIRE(size == capacity, "save wrote %zu bytes of %zu", size, capacity);
    ATTEMPT(own, autoclip_history_load(bytes + 1, size, &own->heap.allocator, &loaded), loaded == NULL);
    ATTEMPTED(own, AUTOCLIP_OK);
    autoclip_history_destroy(own->history);
    own->history = loaded;
    free(bytes);
}

static inline void stream_clear(stream *own) {
    autoclip_history_clear(own->history);
    own->truth.count = 0;
    REQUIRE(autoclip_history_memory(own->history) <= 1024, "%" PRIu64 " bytes are left after clear",
            autoclip_history_memory(own->history));
}

/* One operation, and the judgement after it. */
static inline void stream_oldest(stream *own) {
    size_t count = (size_t)source_below(&own->source, own->truth.count + 2);
    double *norms = test_block(count * sizeof(double));
    unsigned char *before = test_block(count * sizeof(double));
    ATTEMPT(own, autoclip_history_oldest(own->history, count, norms),
            memcmp(norms, before, count * sizeof(double)) == 0);
    if (own->truth.window == 0) {
        ATTEMPTED(own, AUTOCLIP_NO_WINDOW);
    } else if (count > own->truth.count) {
        ATTEMPTED(own, AUTOCLIP_BAD_RANK);
    } else {
        ATTEMPTED(own, AUTOCLIP_OK);
        for (size_t i = 0; i < count; ++i) REQUIRE_SAME(own->truth.aged[i], norms[i]);
    }
    free(before);
    free(norms);
}

static inline void stream_step(stream *own) {
    uint64_t operation = source_below(&own->source, 40);
    test_now.step += 1;
    if (own->truth.count > own->limit) stream_clear(own);
    switch (operation) {
    case 0: stream_clear(own); break;
    case 1: stream_merge(own); break;
    case 2: stream_merge_itself(own); break;
    case 3: stream_clone(own); break;
    case 4: stream_save_and_load(own); break;
    case 5: stream_values_and_save(own); break;
    case 6: stream_observe_many(own); break;
    case 7:
    case 8: stream_order_statistics(own); break;
    case 9: stream_oldest(own); break;
    case 10: stream_rank(own); break;
    case 11:
    case 12: stream_select(own); break;
    case 13:
    case 14:
    case 15:
    case 16: stream_percentile(own); break;
    case 17:
    case 18: stream_extend(own); break;
    case 19:
    case 20:
    case 21:
    case 22:
    case 23:
    case 24:
    case 25: stream_observe(own); break;
    default: stream_push(own); break;
    }
    judge_facts(own->history, &own->truth);
    stream_check_memory(own);
    if (test_now.step % 16 == 0) stream_judge(own);
}

#endif /* AUTOCLIP_TEST_STREAM_H */

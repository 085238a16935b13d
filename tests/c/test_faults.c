/* Out of memory, at every allocation of every function: nothing changes, nothing leaks, and the next call succeeds.
 *
 * Two ways. Streams in which every call is refused its 1st, 2nd, 3rd ... allocation (once, and from then on) before it
 * may succeed; and one function at a time, each refusal on a fresh history, with the result of an undisturbed run as
 * the truth. The refusals are counted: a sweep without any tests nothing, and fails.
 *
 * SPDX-License-Identifier: MIT */
#include "stream.h"

static void test_stream_survives_every_refusal(void) {
    static const uint64_t windows[] = {0, 1, 3, 7, 13, 50, 1000};
    uint64_t faults = 0;
    for (size_t w = 0; w < sizeof windows / sizeof *windows; ++w) {
        for (int kind = 0; kind < VALUES_KINDS; ++kind) {
            stream own;
            source from = {NULL, 0, 0, 500 * (uint64_t)kind + windows[w]};
            test_now.seed = from.state;
            test_now.step = 0;
            stream_create(&own, windows[w], (enum values)kind, from);
            own.faulty = true;
            for (int i = 0; i < 300; ++i) stream_step(&own);
            faults += own.heap.all_faults;
            stream_destroy(&own);
        }
    }
    printf("  %" PRIu64 " allocations refused\n", faults);
    REQUIRE(faults > 0, "no allocation was refused");
}

/* --- One function at a time --------------------------------------------------------------------------------------- */

/* More norms than the buffer holds, and histories of some levels. */
#if defined(AUTOCLIP_LEAF)
enum { EXTRA = 60, LARGEST = 400 };
#else
enum { EXTRA = 600, LARGEST = 1500 };
#endif
enum { RESULTS = 60 };

/* A history of some size before one call, and all that the call may write. */
typedef struct subject {
    heap heap;
    heap other_heap;
    autoclip_history *history;
    autoclip_history *other;
    autoclip_history *made; /* by create, clone or load */
    unsigned char *snapshot;
    size_t snapshot_size;
    double norms[EXTRA];
    double results[RESULTS];
    double *values;
    unsigned char *saved;
    uint64_t number;
} subject;

static const double some_percentiles[3] = {10, 50, 99.999};

static autoclip_status call_create(subject *own) {
    return autoclip_history_create(autoclip_history_window(own->history), &own->heap.allocator, &own->made);
}
static autoclip_status call_clone(subject *own) { return autoclip_history_clone(own->history, &own->made); }
static autoclip_status call_load(subject *own) {
    return autoclip_history_load(own->snapshot, own->snapshot_size, &own->heap.allocator, &own->made);
}
static autoclip_status call_push(subject *own) { return autoclip_history_push(own->history, own->norms[0]); }
static autoclip_status call_extend_one(subject *own) { return autoclip_history_extend(own->history, own->norms, 1); }
static autoclip_status call_extend_few(subject *own) { return autoclip_history_extend(own->history, own->norms, 9); }
static autoclip_status call_extend(subject *own) { return autoclip_history_extend(own->history, own->norms, EXTRA); }
static autoclip_status call_extend_ascending(subject *own) {
    double ascending[EXTRA];
    for (size_t i = 0; i < EXTRA; ++i) ascending[i] = (double)i;
    return autoclip_history_extend(own->history, ascending, EXTRA);
}
static autoclip_status call_observe(subject *own) {
    return autoclip_history_observe(own->history, own->norms[0], 10, own->results);
}
static autoclip_status call_observe_many(subject *own) {
    return autoclip_history_observe_many(own->history, own->norms, RESULTS / 3, some_percentiles, 3, own->results);
}
static autoclip_status call_observe_for_nothing(subject *own) {
    return autoclip_history_observe_many(own->history, own->norms, EXTRA, NULL, 0, NULL);
}
static autoclip_status call_merge(subject *own) { return autoclip_history_merge(own->history, own->other); }
static autoclip_status call_merge_itself(subject *own) { return autoclip_history_merge(own->history, own->history); }
static autoclip_status call_percentile(subject *own) {
    return autoclip_history_percentile(own->history, 33.3, own->results);
}
static autoclip_status call_select(subject *own) { return autoclip_history_select(own->history, 0, own->results); }
static autoclip_status call_rank(subject *own) { return autoclip_history_rank(own->history, 0.5, &own->number); }
static autoclip_status call_order_statistics(subject *own) {
    return autoclip_history_order_statistics(own->history, 0, 1, own->results);
}
static autoclip_status call_oldest(subject *own) {
    autoclip_status status = autoclip_history_oldest(own->history, 1, own->results);
    return status == AUTOCLIP_NO_WINDOW ? AUTOCLIP_OK : status;
}
static autoclip_status call_values(subject *own) {
    size_t count = SENTINEL_SIZE;
    size_t capacity = own->snapshot_size / 8; /* enough */
    autoclip_status status = autoclip_history_values(own->history, own->values, capacity, &count);
    own->number = count;
    return status;
}
static autoclip_status call_save(subject *own) {
    size_t size = SENTINEL_SIZE;
    autoclip_status status = autoclip_history_save(own->history, own->saved, own->snapshot_size, &size);
    own->number = size;
    return status;
}

typedef struct action {
    const char *name;
    autoclip_status (*call)(subject *);
    bool needs_norms;  /* an empty history has no answer */
    bool no_window;    /* refused for another reason */
    bool needs_memory; /* the call cannot do without: a sweep without a refusal is a mistake of the test */
    uint64_t faults;
} action;

static void subject_save(autoclip_history *history, unsigned char **bytes, size_t *size) {
    size_t capacity = autoclip_history_save_size(history);
    *bytes = test_block(capacity);
    REQUIRE_OK(autoclip_history_save(history, *bytes, capacity, size));
}

static void subject_create(subject *own, uint64_t window, size_t count) {
    uint64_t state = 99 + count;
    memset(own, 0, sizeof *own);
    heap_create(&own->heap);
    heap_create(&own->other_heap);
    REQUIRE_OK(autoclip_history_create(window, &own->heap.allocator, &own->history));
    REQUIRE_OK(autoclip_history_create(0, &own->other_heap.allocator, &own->other));
    for (size_t i = 0; i < count; ++i) REQUIRE_OK(autoclip_history_push(own->history, test_uniform(&state)));
    for (size_t i = 0; i < EXTRA; ++i) {
        own->norms[i] = test_uniform(&state);
        REQUIRE_OK(autoclip_history_push(own->other, own->norms[i] + 1));
    }
    for (size_t i = 0; i < RESULTS; ++i) own->results[i] = SENTINEL;
    own->number = SENTINEL_SIZE;
    /* of a clone: nothing in the history itself moves */
    autoclip_history *clone;
    REQUIRE_OK(autoclip_history_clone(own->history, &clone));
    subject_save(clone, &own->snapshot, &own->snapshot_size);
    autoclip_history_destroy(clone);
    own->values = test_block(own->snapshot_size);
    own->saved = test_block(own->snapshot_size);
}

static void subject_destroy(subject *own) {
    autoclip_history_destroy(own->history);
    autoclip_history_destroy(own->other);
    autoclip_history_destroy(own->made);
    heap_destroy(&own->heap);
    heap_destroy(&own->other_heap);
    free(own->snapshot);
    free(own->values);
    free(own->saved);
}

static void require_snapshot(autoclip_history *history, const unsigned char *expected, size_t expected_size) {
    const char *reason = "";
    unsigned char *bytes;
    size_t size;
    autoclip_status status = autoclip_history_check(history, &reason);
    REQUIRE(status == AUTOCLIP_OK, "check returns %d: %s", (int)status, reason);
    subject_save(history, &bytes, &size);
    REQUIRE(size == expected_size, "a snapshot of %zu bytes should have %zu", size, expected_size);
    REQUIRE(memcmp(bytes, expected, size) == 0, "the norms are not what they should be");
    free(bytes);
}

/* Refuse each allocation of one call in turn, on a fresh history each time. */
static void sweep(action *what, uint64_t window, size_t count) {
    subject calm;
    unsigned char *after;
    size_t after_size;
    test_now.detail = what->name;
    test_now.seed = window;
    subject_create(&calm, window, count);
    REQUIRE_OK(what->call(&calm));
    subject_save(calm.history, &after, &after_size);
    for (uint64_t attempt = 0;; ++attempt) {
        subject own;
        test_now.step = attempt;
        subject_create(&own, window, count);
        uint64_t memory = autoclip_history_memory(own.history);
        heap_arm(&own.heap, attempt / 2 + 1, attempt % 2 == 1);
        autoclip_status status = what->call(&own);
        heap_disarm(&own.heap);
        uint64_t faults = own.heap.faults;
        what->faults += faults;
        if (status != AUTOCLIP_OK) {
            REQUIRE(status == AUTOCLIP_NO_MEMORY && faults > 0, "status is %d after %" PRIu64 " refusals", (int)status,
                    faults);
            REQUIRE(own.made == NULL && own.number == SENTINEL_SIZE, "a result was written");
            for (size_t i = 0; i < RESULTS; ++i) REQUIRE_SAME(SENTINEL, own.results[i]);
            /* What was obtained before the refusal may stay, as room for the next call; but it is counted. */
            uint64_t now = autoclip_history_memory(own.history);
            REQUIRE(now == own.heap.bytes, "memory is %" PRIu64 ", the heap counts %" PRIu64, now, own.heap.bytes);
            REQUIRE(now <= memory || attempt != 1, "all was refused, yet %" PRIu64 " bytes are %" PRIu64, memory, now);
            autoclip_history *clone;
            REQUIRE_OK(autoclip_history_clone(own.history, &clone));
            require_snapshot(clone, own.snapshot, own.snapshot_size);
            autoclip_history_destroy(clone);
            REQUIRE(autoclip_history_size(own.other) == EXTRA, "the other history changed");
            REQUIRE_OK(what->call(&own));
        }
        require_snapshot(own.history, after, after_size);
        for (size_t i = 0; i < RESULTS; ++i) REQUIRE_SAME(calm.results[i], own.results[i]);
        if (own.made != NULL && what->call != call_create) require_snapshot(own.made, own.snapshot, own.snapshot_size);
        REQUIRE(own.number == calm.number, "%" PRIu64 " should be %" PRIu64, own.number, calm.number);
        uint64_t held = autoclip_history_memory(own.history);
        held += own.made != NULL ? autoclip_history_memory(own.made) : 0;
        REQUIRE(held == own.heap.bytes, "memory is %" PRIu64 ", the heap counts %" PRIu64, held, own.heap.bytes);
        subject_destroy(&own);
        if (faults == 0) break;
    }
    subject_destroy(&calm);
    free(after);
}

static void test_every_function_survives_every_refusal(void) {
    action actions[] = {
        {"create", call_create, false, false, true, 0},
        {"clone", call_clone, false, false, true, 0},
        {"load", call_load, false, false, true, 0},
        {"push", call_push, false, false, true, 0},
        {"extend by one", call_extend_one, false, false, true, 0},
        {"extend by a few", call_extend_few, false, false, true, 0},
        {"extend", call_extend, false, false, true, 0},
        {"extend, ascending", call_extend_ascending, false, false, true, 0},
        {"observe", call_observe, false, false, true, 0},
        {"observe_many", call_observe_many, false, false, true, 0},
        {"observe_many without percentiles", call_observe_for_nothing, false, false, true, 0},
        {"merge", call_merge, false, true, true, 0},
        {"merge with itself", call_merge_itself, true, true, true, 0},
        {"percentile", call_percentile, true, false, false, 0},
        {"select", call_select, true, false, false, 0},
        {"rank", call_rank, false, false, false, 0},
        {"order_statistics", call_order_statistics, true, false, false, 0},
        {"oldest", call_oldest, true, false, false, 0},
        {"values", call_values, false, false, false, 0},
        {"save", call_save, false, false, false, 0},
    };
    static const uint64_t windows[] = {0, 1, 5, 64, 700};
    uint64_t faults = 0;
    for (size_t a = 0; a < sizeof actions / sizeof *actions; ++a) {
        action *what = &actions[a];
        for (size_t w = 0; w < sizeof windows / sizeof *windows; ++w) {
            if (what->no_window && windows[w] > 0) continue;
            /* small sizes one by one, then ever fewer: a push needs memory only now and then */
            for (size_t count = what->needs_norms ? 1 : 0; count < LARGEST; count += 1 + count / 10) {
                sweep(what, windows[w], count);
            }
        }
        printf("  %-33s %6" PRIu64 " allocations refused\n", what->name, what->faults);
        REQUIRE(what->faults > 0 || !what->needs_memory, "no allocation of %s was refused", what->name);
        faults += what->faults;
    }
    REQUIRE(faults > 0, "no allocation was refused");
}

TEST_MAIN(TEST(test_stream_survives_every_refusal), TEST(test_every_function_survives_every_refusal));

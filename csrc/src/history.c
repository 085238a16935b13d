/* Buffer, tree and window as one history, and every query.
 *
 * SPDX-License-Identifier: MIT */
#include "history.h"

#include <math.h>
#include <string.h>

#include "percentile.h"
#include "sort.h"

/* --- Life ------------------------------------------------------------------------------------------------------- */

autoclip_status autoclip_history_create(uint64_t window, const autoclip_allocator *allocator,
                                        autoclip_history **history) {
    struct memory memory = autoclip_memory_from(allocator);
    autoclip_history *made = memory_allocate(&memory, sizeof *made);
    if (made == NULL) return AUTOCLIP_NO_MEMORY;
    *made = (autoclip_history){.memory = memory, .window = window};
    autoclip_tree_init(&made->tree, &made->memory);
    *history = made;
    return AUTOCLIP_OK;
}

void autoclip_history_clear(autoclip_history *history) {
    autoclip_tree_clear(&history->tree);
    memory_release(&history->memory, history->buffer, history->buffer_capacity * sizeof *history->buffer);
    memory_release(&history->memory, history->ring, (size_t)history->ring_capacity * sizeof *history->ring);
    const struct memory memory = history->memory;
    *history = (autoclip_history){.memory = memory, .window = history->window};
    autoclip_tree_init(&history->tree, &history->memory);
}

void autoclip_history_destroy(autoclip_history *history) {
    if (history == NULL) return;
    autoclip_history_clear(history);
    struct memory memory = history->memory;
    memory_release(&memory, history, sizeof *history);
}

uint64_t autoclip_history_size(const autoclip_history *history) { return history_size(history); }
uint64_t autoclip_history_window(const autoclip_history *history) { return history->window; }
uint64_t autoclip_history_memory(const autoclip_history *history) { return history->memory.bytes; }

/* --- In ascending order ----------------------------------------------------------------------------------------- */

static double least_of_tree(history_iterator *iterator) {
    if (iterator->rank - iterator->leaf.first >= iterator->leaf.size) {
        iterator->leaf = autoclip_tree_locate(iterator->tree, NULL, 0, iterator->rank);
        /* A save reads every leaf once: the next one is on its way while this one is copied. */
        if (iterator->leaf.next != NULL) prefetch(iterator->leaf.next, sizeof *iterator->leaf.next);
    }
    return iterator->leaf.keys[iterator->rank - iterator->leaf.first];
}

static history_iterator iterate_array(const double *array, size_t size) {
    return (history_iterator){.array = array, .array_left = size};
}

history_iterator autoclip_history_iterate(const autoclip_history *history) {
    history_iterator iterator = iterate_array(history->buffer, history->buffered);
    iterator.tree = &history->tree;
    return iterator;
}

bool autoclip_history_read(void *source, double *norms, size_t count) {
    history_iterator *iterator = source;
    const uint64_t tree_size = iterator->tree == NULL ? 0 : iterator->tree->size;
    while (count > 0) {
        size_t part;
        if (iterator->rank == tree_size) {
            part = count;
            memcpy(norms, iterator->array, part * sizeof *norms);
            iterator->array += part;
            iterator->array_left -= part;
        } else {
            /* All of this leaf that stands before the next norm of the array. */
            const double least = least_of_tree(iterator);
            const uint64_t offset = iterator->rank - iterator->leaf.first;
            const double *keys = iterator->leaf.keys + offset;
            part = (size_t)(iterator->leaf.size - offset);
            if (iterator->array_left > 0) {
                if (iterator->array[0] < least) {
                    *norms++ = *iterator->array++;
                    iterator->array_left -= 1;
                    count -= 1;
                    continue;
                }
                part = upper_bound(keys, part, iterator->array[0]);
            }
            if (part > count) part = count;
            memcpy(norms, keys, part * sizeof *norms);
            iterator->rank += part;
        }
        norms += part;
        count -= part;
    }
    return true;
}

/* Two iterators as one, for an autoclip_tree_build; each is read a block at a time. */
struct merged {
    struct {
        history_iterator iterator;
        uint64_t left; /* norms not yet in the block */
        size_t at, size;
        double block[64];
    } parts[2];
};

static bool merged_has(struct merged *merged, int part) {
    if (merged->parts[part].at < merged->parts[part].size) return true;
    const size_t capacity = sizeof merged->parts[part].block / sizeof(double);
    const uint64_t left = merged->parts[part].left;
    merged->parts[part].at = 0;
    merged->parts[part].size = left < capacity ? (size_t)left : capacity;
    merged->parts[part].left -= merged->parts[part].size;
    (void)autoclip_history_read(&merged->parts[part].iterator, merged->parts[part].block, merged->parts[part].size);
    return merged->parts[part].size > 0;
}

static bool merged_read(void *source, double *norms, size_t count) {
    struct merged *merged = source;
    for (size_t i = 0; i < count; ++i) {
        const bool has_first = merged_has(merged, 0);
        const bool has_second = merged_has(merged, 1);
        const int part = !has_first || (has_second && merged->parts[1].block[merged->parts[1].at] <
                                                          merged->parts[0].block[merged->parts[0].at]);
        norms[i] = merged->parts[part].block[merged->parts[part].at++];
    }
    return true;
}

/* --- Buffer and tree -------------------------------------------------------------------------------------------- */

static void forget_cursor(autoclip_history *history) { history->leaf.size = 0; }

static void replace_tree(autoclip_history *history, ostree *tree) {
    autoclip_tree_clear(&history->tree);
    history->tree = *tree;
    history->buffered = 0;
    forget_cursor(history);
}

/* Put all norms of the history and of one more source into a new tree. */
static autoclip_status rebuild(autoclip_history *history, history_iterator more, uint64_t more_size) {
    const uint64_t own_size = history_size(history);
    history_iterator own = autoclip_history_iterate(history);
    ostree tree;
    autoclip_tree_init(&tree, &history->memory);
    autoclip_status status;
    if (more_size == 0) {
        status = autoclip_tree_build(&tree, own_size, autoclip_history_read, &own);
    } else if (own_size == 0) {
        status = autoclip_tree_build(&tree, more_size, autoclip_history_read, &more);
    } else {
        struct merged all = {.parts = {{.iterator = own, .left = own_size}, {.iterator = more, .left = more_size}}};
        status = autoclip_tree_build(&tree, own_size + more_size, merged_read, &all);
    }
    if (status == AUTOCLIP_OK) replace_tree(history, &tree);
    return status;
}

autoclip_status autoclip_history_build(autoclip_history *history, uint64_t size, ostree_reader *read, void *source) {
    forget_cursor(history);
    return autoclip_tree_build(&history->tree, size, read, source);
}

static void buffer_insert(autoclip_history *history, double norm) {
    double *buffer = history->buffer;
    const size_t at = upper_bound(buffer, history->buffered, norm);
    memmove(buffer + at + 1, buffer + at, (history->buffered - at) * sizeof *buffer);
    buffer[at] = norm;
    history->buffered += 1;
    history->buffered_before += at < history->buffered_before;
}

/* Take one norm out and another in: only what stands between them moves, where two shifts would move all that
 * follows. False if the first is not there. */
static bool buffer_replace(autoclip_history *history, double leaving, double norm) {
    double *buffer = history->buffer;
    const size_t after = upper_bound(buffer, history->buffered, leaving);
    if (after == 0 || buffer[after - 1] != leaving) return false;
    const size_t from = after - 1;
    size_t to = upper_bound(buffer, history->buffered, norm);
    if (to > from) {
        to -= 1;
        memmove(buffer + from, buffer + after, (to - from) * sizeof *buffer);
    } else {
        memmove(buffer + to + 1, buffer + to, (from - to) * sizeof *buffer);
    }
    buffer[to] = norm;
    history->buffered_before -= from < history->buffered_before;
    history->buffered_before += to < history->buffered_before;
    return true;
}

void autoclip_history_erase(autoclip_history *history, double norm) {
    double *buffer = history->buffer;
    const size_t after = upper_bound(buffer, history->buffered, norm);
    if (after == 0 || buffer[after - 1] != norm) {
        (void)autoclip_tree_erase(&history->tree, &norm, 1);
        forget_cursor(history);
        return;
    }
    memmove(buffer + after - 1, buffer + after, (history->buffered - after) * sizeof *buffer);
    history->buffered -= 1;
    history->buffered_before -= after <= history->buffered_before;
}

/* Move the whole buffer into the tree. What did not fit into memory stays in the buffer. */
static autoclip_status settle(autoclip_history *history) {
    const size_t count = history->buffered;
    if (count == 0) return AUTOCLIP_OK;
    if (count > history->tree.size / 4) return rebuild(history, iterate_array(NULL, 0), 0);
    const size_t done = autoclip_tree_insert(&history->tree, history->buffer, count);
    history->buffered = count - done;
    memmove(history->buffer, history->buffer + done, history->buffered * sizeof *history->buffer);
    forget_cursor(history);
    return done == count ? AUTOCLIP_OK : AUTOCLIP_NO_MEMORY;
}

/* A full window loses its oldest norms next: move as many as half the buffer from the tree to the empty buffer. */
static void recall_oldest(autoclip_history *history) {
    uint64_t count = HISTORY_BUFFER / 2;
    if (count > history->tree.size) count = history->tree.size;
    if (count > history->buffer_capacity) count = history->buffer_capacity;
    double scratch[HISTORY_BUFFER / 2];
    for (uint64_t i = 0; i < count; ++i) history->buffer[i] = history_by_age(history, i);
    autoclip_sort(history->buffer, scratch, (size_t)count);
    history->buffered = (size_t)count;
    (void)autoclip_tree_erase(&history->tree, history->buffer, (size_t)count);
    forget_cursor(history);
}

/* --- Remember --------------------------------------------------------------------------------------------------- */

static bool grow_array(struct memory *memory, double **array, uint64_t *capacity, uint64_t size,
                       uint64_t new_capacity) {
    if (new_capacity > SIZE_MAX / sizeof **array) return false;
    double *grown = memory_allocate(memory, (size_t)new_capacity * sizeof **array);
    if (grown == NULL) return false;
    if (size > 0) memcpy(grown, *array, (size_t)size * sizeof **array);
    memory_release(memory, *array, (size_t)*capacity * sizeof **array);
    *array = grown;
    *capacity = new_capacity;
    return true;
}

static uint64_t at_least_doubled(uint64_t capacity, uint64_t needed, uint64_t limit) {
    enum { FIRST = 8 };
    uint64_t grown = capacity < FIRST / 2 ? FIRST : capacity * 2;
    if (grown > limit) grown = limit;
    return grown < needed ? needed : grown;
}

/* Everything about remembering `more` norms that can fail happens here, and changes no answer. */
static autoclip_status reserve(autoclip_history *history, uint64_t more) {
    const uint64_t size = history_size(history);
    if (more > UINT64_MAX / sizeof(double) - size) return AUTOCLIP_NO_MEMORY;
    if (history->window > 0) {
        const uint64_t needed = size + more < history->window ? size + more : history->window;
        if (needed > history->ring_capacity) {
            const uint64_t capacity = at_least_doubled(history->ring_capacity, needed, history->window);
            if (!grow_array(&history->memory, &history->ring, &history->ring_capacity, size, capacity)) {
                return AUTOCLIP_NO_MEMORY;
            }
        }
    }
    if (history->buffered + more > HISTORY_BUFFER) (void)settle(history);
    /* A window may at any later time recall half a buffer, and then remember all the others. */
    const size_t recalled = history->window > 0 && history->tree.size > 0 ? HISTORY_BUFFER / 2 : 0;
    const uint64_t needed = (history->buffered > recalled ? history->buffered : recalled) + more;
    if (needed > history->buffer_capacity) {
        uint64_t capacity = history->buffer_capacity;
        const uint64_t least = history->tree.size > 0 && needed < HISTORY_BUFFER ? HISTORY_BUFFER : needed;
        if (!grow_array(&history->memory, &history->buffer, &capacity, history->buffered,
                        at_least_doubled(capacity, least, HISTORY_BUFFER))) {
            return AUTOCLIP_NO_MEMORY;
        }
        history->buffer_capacity = (size_t)capacity;
    }
    return AUTOCLIP_OK;
}

/* Remember a finite norm for which room has been reserved. Cannot fail: moving norms to the tree is only tried. */
static void remember(autoclip_history *history, double norm) {
    norm += 0.0; /* -0.0 becomes 0.0 */
    const uint64_t size = history_size(history);
    bool placed = false;
    if (history->window > 0) {
        if (size == history->window) {
            const double oldest = history_by_age(history, 0);
            placed = buffer_replace(history, oldest, norm);
            if (!placed) {
                if (settle(history) == AUTOCLIP_OK) recall_oldest(history);
                placed = buffer_replace(history, oldest, norm);
                if (!placed) {
                    (void)autoclip_tree_erase(&history->tree, &oldest, 1);
                    forget_cursor(history);
                }
            }
            history->ring[history->ring_first] = norm;
            history->ring_first = history->ring_first + 1 < history->window ? history->ring_first + 1 : 0;
        } else {
            history->ring[size] = norm; /* a ring that is not full begins at 0 */
        }
    }
    if (placed) return;
    if (history->buffered >= HISTORY_BUFFER) (void)settle(history);
    buffer_insert(history, norm);
}

/* Give back what a reservation for many norms left over; best effort. */
static void trim_buffer(autoclip_history *history) {
    if (history->buffer_capacity <= HISTORY_BUFFER) return;
    if (history->buffered > HISTORY_BUFFER && settle(history) != AUTOCLIP_OK) return;
    uint64_t capacity = history->buffer_capacity;
    if (grow_array(&history->memory, &history->buffer, &capacity, history->buffered, HISTORY_BUFFER)) {
        history->buffer_capacity = (size_t)capacity;
    }
}

static autoclip_status push(autoclip_history *history, double norm) {
    if (!isfinite(norm)) return AUTOCLIP_NOT_FINITE;
    const autoclip_status status = reserve(history, 1);
    if (status == AUTOCLIP_OK) remember(history, norm);
    return status;
}

autoclip_status autoclip_history_push(autoclip_history *history, double norm) { IN_STANDARD_MODE(push(history, norm)); }

/* One more in the exponent of infinities and NaN carries into the sign. Without a branch: compilers make vector code. */
static bool all_finite(const double *norms, size_t count) {
    uint64_t carries = 0;
    for (size_t i = 0; i < count; ++i) {
        uint64_t bits;
        memcpy(&bits, norms + i, sizeof bits);
        carries |= (bits & UINT64_C(0x7FF) << 52) + (UINT64_C(1) << 52);
    }
    return carries >> 63 == 0;
}

static bool is_ascending(const double *norms, size_t count) {
    for (size_t i = 1; i < count; ++i) {
        if (norms[i] < norms[i - 1]) return false;
    }
    return true;
}

/* Whether some zero among ascending norms is a -0.0, which must be rewritten. */
static bool has_negative_zero(const double *ascending, size_t count) {
    size_t zero = lower_bound(ascending, count, 0.0);
    while (zero < count && ascending[zero] == 0.0 && !signbit(ascending[zero])) ++zero;
    return zero < count && ascending[zero] == 0.0;
}

/* Take in a large part of the history at once: sort, then build a new tree. */
static autoclip_status extend_by_rebuild(autoclip_history *history, const double *norms, size_t count) {
    if (is_ascending(norms, count) && !has_negative_zero(norms, count)) {
        return rebuild(history, iterate_array(norms, count), count);
    }
    struct memory *memory = &history->memory;
    double *sorted = autoclip_sorted_copy(memory, norms, count);
    if (sorted == NULL) return AUTOCLIP_NO_MEMORY;
    const autoclip_status status = rebuild(history, iterate_array(sorted, count), count);
    memory_release(memory, sorted, count * sizeof *sorted);
    return status;
}

/* The same for a window: the norms that remain, in order of age, make a new history that takes the place of the old. */
static autoclip_status extend_window_by_rebuild(autoclip_history *history, const double *norms, size_t count) {
    const uint64_t all = history_size(history) + count;
    const uint64_t size = all < history->window ? all : history->window;
    const uint64_t kept = size - count;
    const uint64_t dropped = history_size(history) - kept;
    if (size > SIZE_MAX / sizeof *norms) return AUTOCLIP_NO_MEMORY;
    double *ring = memory_allocate(&history->memory, (size_t)size * sizeof *ring);
    if (ring == NULL) return AUTOCLIP_NO_MEMORY;
    for (uint64_t i = 0; i < kept; ++i) ring[i] = history_by_age(history, dropped + i);
    for (size_t i = 0; i < count; ++i) ring[kept + i] = norms[i] + 0.0;
    autoclip_history fresh = {.memory = history->memory};
    autoclip_tree_init(&fresh.tree, &fresh.memory);
    const autoclip_status status = extend_by_rebuild(&fresh, ring, (size_t)size);
    history->memory = fresh.memory;
    if (status != AUTOCLIP_OK) {
        memory_release(&history->memory, ring, (size_t)size * sizeof *ring);
        return status;
    }
    fresh.tree.memory = &history->memory;
    replace_tree(history, &fresh.tree);
    memory_release(&history->memory, history->ring, (size_t)history->ring_capacity * sizeof *history->ring);
    history->ring = ring;
    history->ring_capacity = size;
    history->ring_first = 0;
    return AUTOCLIP_OK;
}

static autoclip_status extend(autoclip_history *history, const double *norms, size_t count) {
    if (!all_finite(norms, count)) return AUTOCLIP_NOT_FINITE;
    if (history->window > 0 && count > history->window) {
        norms += count - history->window;
        count = (size_t)history->window;
    }
    if (count > HISTORY_BUFFER && count > history_size(history) / 4) {
        return history->window > 0 ? extend_window_by_rebuild(history, norms, count)
                                   : extend_by_rebuild(history, norms, count);
    }
    const autoclip_status status = reserve(history, count);
    if (status != AUTOCLIP_OK) return status;
    for (size_t i = 0; i < count; ++i) remember(history, norms[i]);
    trim_buffer(history);
    return AUTOCLIP_OK;
}

autoclip_status autoclip_history_extend(autoclip_history *history, const double *norms, size_t count) {
    IN_STANDARD_MODE(extend(history, norms, count));
}

static autoclip_status merge(autoclip_history *history, const autoclip_history *other) {
    if (history->window > 0) return AUTOCLIP_HAS_WINDOW;
    return rebuild(history, autoclip_history_iterate(other), history_size(other));
}

autoclip_status autoclip_history_merge(autoclip_history *history, const autoclip_history *other) {
    IN_STANDARD_MODE(merge(history, other));
}

static autoclip_status clone_history(const autoclip_history *history, autoclip_history **clone) {
    autoclip_history *made;
    autoclip_status status = autoclip_history_create(history->window, &history->memory.allocator, &made);
    if (status != AUTOCLIP_OK) return status;
    const uint64_t size = history_size(history);
    if (history->window > 0 && size > 0) {
        made->ring = memory_allocate(&made->memory, (size_t)size * sizeof *made->ring);
        if (made->ring != NULL) {
            made->ring_capacity = size;
            for (uint64_t i = 0; i < size; ++i) made->ring[i] = history_by_age(history, i);
        } else {
            status = AUTOCLIP_NO_MEMORY;
        }
    }
    history_iterator iterator = autoclip_history_iterate(history);
    if (status == AUTOCLIP_OK) status = autoclip_history_build(made, size, autoclip_history_read, &iterator);
    if (status == AUTOCLIP_OK) {
        *clone = made;
    } else {
        autoclip_history_destroy(made);
    }
    return status;
}

autoclip_status autoclip_history_clone(const autoclip_history *history, autoclip_history **clone) {
    IN_STANDARD_MODE(clone_history(history, clone));
}

/* --- Ask -------------------------------------------------------------------------------------------------------- */

/* Whether the leaf that the cursor is in holds the key of this rank. */
static bool in_leaf(const autoclip_history *history, uint64_t rank) {
    return rank - history->leaf.first < history->leaf.size;
}

static double tree_key(autoclip_history *history, uint64_t rank) {
    if (!in_leaf(history, rank)) history->leaf = autoclip_tree_locate(&history->tree, NULL, 0, rank);
    return history->leaf.keys[rank - history->leaf.first];
}

static size_t clamp(size_t value, size_t low, size_t high) { return value < low ? low : value > high ? high : value; }

/* Whether at most `buffered` norms of the buffer stand among the first `rank` norms of the union. */
static bool enough_buffered(autoclip_history *history, uint64_t rank, size_t buffered) {
    const uint64_t from_tree = rank - buffered;
    return from_tree == 0 || buffered == history->buffered ||
           tree_key(history, from_tree - 1) <= history->buffer[buffered];
}

/* Find how many norms of the buffer stand among the first `rank` of the union. Where the last query ended is near, as a
 * rule: gallop away from there. Otherwise one descent finds the leaf. Then halve. */
static size_t find_buffered_before(autoclip_history *history, uint64_t rank) {
    size_t low = rank > history->tree.size ? (size_t)(rank - history->tree.size) : 0; /* every answer is low ... */
    size_t high = rank < history->buffered ? (size_t)rank : history->buffered;        /* ... to high */
    const size_t near = clamp(history->buffered_before, low, high);
    if (low == high) {
        /* all from one of the two, or nothing buffered */
    } else if (!in_leaf(history, rank - near - 1)) {
        history->leaf = autoclip_tree_locate(&history->tree, history->buffer, history->buffered, rank);
        low = clamp(history->leaf.others_low, low, high);
        high = clamp(history->leaf.others_high, low, high);
    } else if (enough_buffered(history, rank, near)) {
        high = near;
        for (size_t step = 1; low + step <= high; step *= 2) {
            if (!enough_buffered(history, rank, high - step)) {
                low = high - step + 1;
                break;
            }
            high -= step;
        }
    } else {
        low = near + 1;
        for (size_t step = 1; low + step <= high; step *= 2) {
            if (enough_buffered(history, rank, low + step - 1)) {
                high = low + step - 1;
                break;
            }
            low += step;
        }
    }
    while (low < high) {
        const size_t middle = low + (high - low) / 2;
        if (enough_buffered(history, rank, middle)) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    history->buffered_before = low;
    return low;
}

/* The norms of ranks `rank` and rank + 1, the latter only if there is one. */
static void select_pair(autoclip_history *history, uint64_t rank, double pair[2]) {
    size_t in_buffer = find_buffered_before(history, rank);
    uint64_t in_tree = rank - in_buffer;
    for (int i = 0; i < 2; ++i) {
        const bool more_buffer = in_buffer < history->buffered;
        const bool more_tree = in_tree < history->tree.size;
        if (!more_buffer && !more_tree) return;
        const double key = more_tree ? tree_key(history, in_tree) : 0.0;
        if (more_buffer && (!more_tree || history->buffer[in_buffer] < key)) {
            pair[i] = history->buffer[in_buffer++];
        } else {
            pair[i] = key;
            in_tree += 1;
        }
    }
}

static double percentile_of(autoclip_history *history, double percentile) {
    const uint64_t size = history_size(history);
    const double position = percentile_position(size, percentile);
    const uint64_t rank = (uint64_t)position;
    double pair[2];
    select_pair(history, rank, pair);
    return percentile_between(pair[0], rank + 1 < size ? pair[1] : pair[0], position - (double)rank);
}

static autoclip_status find_percentile(autoclip_history *history, double percentile, double *threshold) {
    if (!is_percentile(percentile)) return AUTOCLIP_BAD_PERCENTILE;
    if (history_size(history) == 0) return AUTOCLIP_EMPTY;
    *threshold = percentile_of(history, percentile);
    return AUTOCLIP_OK;
}

autoclip_status autoclip_history_percentile(autoclip_history *history, double percentile, double *threshold) {
    IN_STANDARD_MODE(find_percentile(history, percentile, threshold));
}

static autoclip_status observe(autoclip_history *history, double norm, double percentile, double *threshold) {
    if (!is_percentile(percentile)) return AUTOCLIP_BAD_PERCENTILE;
    const autoclip_status status = push(history, norm);
    if (status == AUTOCLIP_OK) *threshold = percentile_of(history, percentile);
    return status;
}

autoclip_status autoclip_history_observe(autoclip_history *history, double norm, double percentile, double *threshold) {
    IN_STANDARD_MODE(observe(history, norm, percentile, threshold));
}

static autoclip_status observe_many(autoclip_history *history, const double *norms, size_t count,
                                    const double *percentiles, size_t percentile_count, double *thresholds) {
    for (size_t i = 0; i < percentile_count; ++i) {
        if (!is_percentile(percentiles[i])) return AUTOCLIP_BAD_PERCENTILE;
    }
    if (!all_finite(norms, count)) return AUTOCLIP_NOT_FINITE;
    const autoclip_status status = reserve(history, count);
    if (status != AUTOCLIP_OK) return status;
    for (size_t i = 0; i < count; ++i) {
        remember(history, norms[i]);
        for (size_t j = 0; j < percentile_count; ++j) *thresholds++ = percentile_of(history, percentiles[j]);
    }
    trim_buffer(history);
    return AUTOCLIP_OK;
}

autoclip_status autoclip_history_observe_many(autoclip_history *history, const double *norms, size_t count,
                                              const double *percentiles, size_t percentile_count, double *thresholds) {
    IN_STANDARD_MODE(observe_many(history, norms, count, percentiles, percentile_count, thresholds));
}

static autoclip_status select_rank(autoclip_history *history, uint64_t rank, double *norm) {
    if (rank >= history_size(history)) return AUTOCLIP_BAD_RANK;
    double pair[2] = {0.0, 0.0};
    select_pair(history, rank, pair);
    *norm = pair[0];
    return AUTOCLIP_OK;
}

autoclip_status autoclip_history_select(autoclip_history *history, uint64_t rank, double *norm) {
    IN_STANDARD_MODE(select_rank(history, rank, norm));
}

static autoclip_status find_rank(const autoclip_history *history, double norm, uint64_t *rank) {
    if (isnan(norm)) return AUTOCLIP_NOT_FINITE;
    *rank = autoclip_tree_rank(&history->tree, norm) + lower_bound(history->buffer, history->buffered, norm);
    return AUTOCLIP_OK;
}

autoclip_status autoclip_history_rank(const autoclip_history *history, double norm, uint64_t *rank) {
    IN_STANDARD_MODE(find_rank(history, norm, rank));
}

static autoclip_status read_order_statistics(autoclip_history *history, uint64_t first, size_t count, double *norms) {
    const uint64_t size = history_size(history);
    if (first > size || count > size - first) return AUTOCLIP_BAD_RANK;
    if (count == 0) return AUTOCLIP_OK;
    const size_t in_buffer = find_buffered_before(history, first);
    history_iterator iterator = autoclip_history_iterate(history);
    if (in_buffer > 0) iterator.array += in_buffer; /* it is NULL in a loaded history, and C forbids NULL + 0 */
    iterator.array_left -= in_buffer;
    iterator.rank = first - in_buffer;
    (void)autoclip_history_read(&iterator, norms, count);
    return AUTOCLIP_OK;
}

autoclip_status autoclip_history_order_statistics(autoclip_history *history, uint64_t first, size_t count,
                                                  double *norms) {
    IN_STANDARD_MODE(read_order_statistics(history, first, count, norms));
}

autoclip_status autoclip_history_oldest(const autoclip_history *history, size_t count, double *norms) {
    if (history->window == 0) return AUTOCLIP_NO_WINDOW;
    if (count > history_size(history)) return AUTOCLIP_BAD_RANK;
    for (size_t i = 0; i < count; ++i) norms[i] = history_by_age(history, i);
    return AUTOCLIP_OK;
}

static autoclip_status read_values(autoclip_history *history, double *norms, size_t capacity, size_t *count) {
    const uint64_t size = history_size(history);
    if (size > capacity) return AUTOCLIP_TOO_SMALL;
    history_iterator iterator = autoclip_history_iterate(history);
    (void)autoclip_history_read(&iterator, norms, (size_t)size);
    *count = (size_t)size;
    return AUTOCLIP_OK;
}

autoclip_status autoclip_history_values(autoclip_history *history, double *norms, size_t capacity, size_t *count) {
    IN_STANDARD_MODE(read_values(history, norms, capacity, count));
}

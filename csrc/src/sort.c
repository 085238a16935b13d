/* Sort by the bit patterns of the doubles: deal the keys out to some thousand ranges of equal width, in one pass over
 * memory; then each range, which the nearest cache holds, in the same way again; insertion finishes what few keys a range
 * of a range holds. A range that holds many is dealt out once more, by its own least and greatest key: keys that crowd
 * together cost a pass, wherever they are. What is not sorted after some levels is merged, so that the stack is bounded.
 *
 * SPDX-License-Identifier: MIT */
#include "sort.h"

#include <string.h>

enum {
    SMALL = 16, /* keys that insertion sorts as fast as anything */
    OUTER_BITS = 12,
    INNER_BITS = 10,
    LEVELS = 3, /* of ranges of ranges: their ends stand on the stack, 8 KiB for each */
};

/* Doubles in ascending order have ascending patterns once negative ones are inverted and others get the sign bit. The
 * pattern of -0.0 is that of 0.0. */
static uint64_t pattern_of(double key) {
    uint64_t bits;
    key += 0.0;
    memcpy(&bits, &key, sizeof bits);
    return bits ^ ((0 - (bits >> 63)) | (uint64_t)1 << 63);
}

static unsigned width_of(uint64_t value) {
    unsigned width = 0;
    for (; value > 0; value >>= 1) width += 1;
    return width;
}

/* Write the keys range by range, in any order within each, and where each range ends. The number of ranges; 0 if
 * no range holds different keys. */
static size_t deal(const double *from, double *to, size_t count, size_t *ends, unsigned bits) {
    double min = from[0];
    double max = from[0];
    for (size_t i = 1; i < count; ++i) {
        min = from[i] < min ? from[i] : min;
        max = from[i] > max ? from[i] : max;
    }
    const uint64_t least = pattern_of(min);
    const uint64_t greatest = pattern_of(max);
    const unsigned enough = width_of(count);
    if (bits > enough) bits = enough;
    const unsigned width = width_of(greatest - least);
    const unsigned shift = width > bits ? width - bits : 0;
    const size_t ranges = (size_t)((greatest - least) >> shift) + 1;
    memset(ends, 0, ranges * sizeof *ends);
    for (size_t i = 0; i < count; ++i) ends[(pattern_of(from[i]) - least) >> shift] += 1;
    size_t start = 0;
    for (size_t at = 0; at < ranges; ++at) {
        const size_t size = ends[at];
        ends[at] = start;
        start += size;
    }
    for (size_t i = 0; i < count; ++i) to[ends[(pattern_of(from[i]) - least) >> shift]++] = from[i] + 0.0;
    return shift > 0 ? ranges : 0;
}

/* Merge runs of 1, 2, 4 ... keys. */
static void merge_sort(double *keys, double *scratch, size_t count) {
    double *from = keys;
    double *to = scratch;
    for (size_t run = 1; run < count; run *= 2) {
        for (size_t start = 0; start < count; start += 2 * run) {
            const size_t middle = count - start < run ? count : start + run;
            const size_t end = count - start < 2 * run ? count : start + 2 * run;
            size_t left = start;
            size_t right = middle;
            for (size_t at = start; at < end; ++at) {
                const bool take_left = left < middle && (right == end || from[left] <= from[right]);
                to[at] = from[take_left ? left++ : right++];
            }
        }
        double *last = from;
        from = to;
        to = last;
    }
    if (from != keys) memcpy(keys, from, count * sizeof *keys);
}

static void sort_levels(double *keys, double *scratch, size_t count, int levels) {
    const double *nearly = keys;
    if (count > SMALL) {
        size_t ends[1 << INNER_BITS];
        const size_t ranges = deal(keys, scratch, count, ends, INNER_BITS);
        for (size_t at = 0, start = 0; at < ranges; start = ends[at++]) {
            const size_t size = ends[at] - start;
            if (size <= SMALL) continue;
            if (levels > 1) {
                sort_levels(scratch + start, keys + start, size, levels - 1);
            } else {
                merge_sort(scratch + start, keys + start, size);
            }
        }
        nearly = scratch;
    }
    for (size_t i = 0; i < count; ++i) {
        const double key = nearly[i];
        size_t at = i;
        for (; at > 0 && keys[at - 1] > key; --at) keys[at] = keys[at - 1];
        keys[at] = key;
    }
}

void autoclip_sort(double *keys, double *scratch, size_t count) { sort_levels(keys, scratch, count, LEVELS); }

double *autoclip_sorted_copy(struct memory *memory, const double *keys, size_t count) {
    double *sorted = memory_allocate(memory, count * sizeof *keys);
    if (sorted == NULL) return NULL;
    size_t ends[1 << OUTER_BITS];
    const size_t ranges = deal(keys, sorted, count, ends, OUTER_BITS);
    if (ranges == 0) return sorted;
    size_t most = 0;
    for (size_t at = 0, start = 0; at < ranges; start = ends[at++]) {
        if (ends[at] - start > most) most = ends[at] - start;
    }
    double *scratch = memory_allocate(memory, most * sizeof *keys);
    if (scratch == NULL) {
        memory_release(memory, sorted, count * sizeof *keys);
        return NULL;
    }
    for (size_t at = 0, start = 0; at < ranges; start = ends[at++])
        autoclip_sort(sorted + start, scratch, ends[at] - start);
    memory_release(memory, scratch, most * sizeof *keys);
    return sorted;
}

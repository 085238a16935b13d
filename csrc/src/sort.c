/* Radix sort on the bit patterns of the doubles, by no more bits than tell them apart.
 *
 * The leading ones of those bits in which the patterns differ at all put nearly every key into its place: they have at
 * least four times as many values as there are keys. An insertion sort repairs the rest. Keys that crowd together, so
 * that it has too much to do, are sorted by all bits. To sort by all bits always makes an extend of 10^6 norms 1.45 times as
 * slow. */
#include "sort.h"

#include <string.h>

enum { DIGIT = 11, VALUES = 1 << DIGIT };

/* Doubles in ascending order have ascending patterns once negative ones are inverted and others get the sign bit. */
static uint64_t pattern_of(double key) {
    uint64_t bits;
    memcpy(&bits, &key, sizeof bits);
    return bits ^ ((0 - (bits >> 63)) | (uint64_t)1 << 63);
}

static unsigned width_of(uint64_t value) {
    unsigned width = 0;
    for (; value > 0; value >>= 1) width += 1;
    return width;
}

static void distribute(const double *from, double *to, size_t count, uint64_t least, unsigned shift) {
    size_t starts[VALUES] = {0};
    for (size_t i = 0; i < count; ++i) starts[(pattern_of(from[i]) - least) >> shift & (VALUES - 1)] += 1;
    size_t next = 0;
    for (size_t value = 0; value < VALUES; ++value) {
        const size_t size = starts[value];
        starts[value] = next;
        next += size;
    }
    for (size_t i = 0; i < count; ++i) to[starts[(pattern_of(from[i]) - least) >> shift & (VALUES - 1)]++] = from[i];
}

/* Insertion sort, which also turns -0.0 into 0.0; false when keys are too far from their places. */
static bool repair(double *keys, size_t count) {
    size_t moves = 0;
    for (size_t i = 0; i < count && moves <= 4 * count; ++i) {
        const double key = keys[i] + 0.0;
        size_t at = i;
        for (; at > 0 && keys[at - 1] > key; --at) keys[at] = keys[at - 1];
        keys[at] = key;
        moves += i - at;
    }
    return moves <= 4 * count;
}

double *autoclip_sorted_copy(struct memory *memory, const double *keys, size_t count) {
    const size_t bytes = count * sizeof *keys;
    double *copy[2];
    copy[0] = memory_allocate(memory, bytes);
    if (copy[0] == NULL) return NULL;
    copy[1] = memory_allocate(memory, bytes);
    if (copy[1] == NULL) {
        memory_release(memory, copy[0], bytes);
        return NULL;
    }
    uint64_t least = UINT64_MAX;
    uint64_t greatest = 0;
    for (size_t i = 0; i < count; ++i) {
        const uint64_t pattern = pattern_of(keys[i]);
        least = pattern < least ? pattern : least;
        greatest = pattern > greatest ? pattern : greatest;
    }
    const unsigned width = width_of(greatest - least);
    const unsigned enough = width_of(count) + 2;
    unsigned shift = width > enough ? width - enough : 0;
    int last = 0;
    for (;; shift = 0) {
        const double *from = keys;
        do {
            last ^= 1;
            distribute(from, copy[last], count, least, shift);
            from = copy[last];
            shift += DIGIT;
        } while (shift < width);
        if (repair(copy[last], count)) break;
    }
    memory_release(memory, copy[!last], bytes);
    return copy[last];
}

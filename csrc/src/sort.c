/* Radix sort, least significant byte first, on the bit patterns of the doubles. Bytes that are equal in all keys cost
 * nothing but the counting: norms of similar size share their exponent. */
#include "sort.h"

#include <string.h>

enum { DIGITS = sizeof(double), VALUES = 256 };

/* Doubles in ascending order have ascending patterns once negative ones are inverted and others get the sign bit. */
static uint64_t pattern_of(double key) {
    uint64_t bits;
    memcpy(&bits, &key, sizeof bits);
    return bits >> 63 ? ~bits : bits | (uint64_t)1 << 63;
}

static size_t digit_of(double key, unsigned digit) { return pattern_of(key) >> (8 * digit) & (VALUES - 1); }

bool sort_keys(struct memory *memory, double *keys, size_t count) {
    if (count < 2) return true;
    const size_t bytes = count * sizeof *keys;
    double *other = memory_allocate(memory, bytes);
    if (other == NULL) return false;
    size_t starts[DIGITS][VALUES] = {{0}};
    for (size_t i = 0; i < count; ++i) {
        const uint64_t pattern = pattern_of(keys[i]);
        for (unsigned digit = 0; digit < DIGITS; ++digit) starts[digit][pattern >> (8 * digit) & (VALUES - 1)] += 1;
    }
    double *from = keys;
    double *to = other;
    for (unsigned digit = 0; digit < DIGITS; ++digit) {
        size_t *start = starts[digit];
        if (start[digit_of(from[0], digit)] == count) continue;
        size_t next = 0;
        for (size_t value = 0; value < VALUES; ++value) {
            const size_t size = start[value];
            start[value] = next;
            next += size;
        }
        for (size_t i = 0; i < count; ++i) to[start[digit_of(from[i], digit)]++] = from[i];
        double *swap = from;
        from = to;
        to = swap;
    }
    if (from != keys) memcpy(keys, from, bytes);
    memory_release(memory, other, bytes);
    return true;
}

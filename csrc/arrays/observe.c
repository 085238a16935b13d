/* Observe a norm in arrays that belong to a program, or in a shared history.
 *
 * SPDX-License-Identifier: MIT */
#include "observe.h"

#include <float.h>
#include <math.h>
#include <stdbool.h>
#include <string.h>

#include "../src/percentile.h"

/* The number of norms below `norm` among `size` in ascending order. */
static size_t count_below(const float *sorted, size_t size, float norm) {
    size_t low = 0;
    while (size > 0) {
        const size_t half = size / 2;
        if (sorted[low + half] < norm) {
            low += half + 1;
            size -= half + 1;
        } else {
            size = half;
        }
    }
    return low;
}

/* Let `norm` take the place of what is at `from`, and move the norms between the two. */
static void replace(float *sorted, size_t size, size_t from, float norm) {
    size_t to = count_below(sorted, size, norm);
    if (to > from) {
        to -= 1;
        memmove(sorted + from, sorted + from + 1, (to - from) * sizeof *sorted);
    } else {
        memmove(sorted + to + 1, sorted + to, (from - to) * sizeof *sorted);
    }
    sorted[to] = norm;
}

static bool enters(float norm) { return isfinite(norm) && norm > 0.0F; }

float autoclip_window_observe(float *norms, size_t window, size_t recorded_steps, float norm, double percentile) {
    float *sorted = norms;
    float *ring = norms + window;
    if (isinf(sorted[window - 1])) { /* an array of earlier releases, which had infinity where there is no norm */
        for (size_t i = 0; i < 2 * window; ++i) {
            if (isinf(norms[i])) norms[i] = FLT_MAX;
        }
    }
    size_t size = recorded_steps < window ? recorded_steps : window;
    if (enters(norm)) {
        float *oldest = ring + recorded_steps % window;
        size_t from = size;
        if (size == window) {
            from = count_below(sorted, size, *oldest);
            if (from == size) from -= 1; /* only in arrays that are not a window's: the norm enters all the same */
        }
        replace(sorted, size, from, norm);
        *oldest = norm;
        if (size < window) size += 1;
    }
    if (size == 0) return FLT_MAX;
    const double position = percentile_position(size, percentile);
    const size_t rank = (size_t)position;
    const double low = (double)sorted[rank];
    const double high = rank + 1 < size ? (double)sorted[rank + 1] : low;
    return (float)percentile_between(low, high, position - (double)rank);
}

autoclip_status autoclip_tree_observe(uint64_t history, uint64_t recorded_steps, float *previous, float norm,
                                      double percentile, float *threshold) {
    if (recorded_steps >= INT32_MAX) return AUTOCLIP_WRONG_STEP;
    double found = (double)FLT_MAX;
    const double before = (double)*previous;
    autoclip_status status;
    if (enters(norm)) {
        status = autoclip_shared_observe_step(history, recorded_steps, before, (double)norm, percentile, &found);
        if (status == AUTOCLIP_OK) *previous = norm;
    } else {
        status = autoclip_shared_percentile_step(history, recorded_steps, before, percentile, &found);
        if (status == AUTOCLIP_EMPTY) status = AUTOCLIP_OK;
    }
    if (status == AUTOCLIP_OK) *threshold = found < (double)FLT_MAX ? (float)found : FLT_MAX;
    return status;
}

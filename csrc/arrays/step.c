#include "step.h"

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

float autoclip_window_observe(float *norms, size_t window, size_t remembered, float norm, double percentile) {
    float *sorted = norms;
    float *ring = norms + window;
    size_t size = remembered < window ? remembered : window;
    if (isfinite(norm)) {
        float *oldest = ring + remembered % window;
        size_t from = size;
        if (size == window) {
            from = count_below(sorted, size, *oldest);
            if (from == size) from -= 1; /* only in arrays that are not a window's: stay inside them */
        }
        replace(sorted, size, from, norm);
        *oldest = norm;
        if (size < window) size += 1;
    }
    if (size == 0) return INFINITY;
    const double position = percentile_position(size, percentile);
    const size_t rank = (size_t)position;
    const double low = (double)sorted[rank];
    const double high = rank + 1 < size ? (double)sorted[rank + 1] : low;
    return (float)percentile_between(low, high, position - (double)rank);
}

autoclip_status autoclip_tree_observe(uint64_t history, uint64_t remembered, float *last, float norm, double percentile,
                                      float *threshold) {
    double found = INFINITY;
    autoclip_status status;
    if (isfinite(norm)) {
        status = autoclip_shared_observe_step(history, remembered, (double)*last, (double)norm, percentile, &found);
        if (status == AUTOCLIP_OK) *last = norm;
    } else {
        status = autoclip_shared_percentile(history, percentile, &found);
        if (status == AUTOCLIP_EMPTY) status = AUTOCLIP_OK;
    }
    *threshold = (float)found;
    return status;
}

autoclip_status autoclip_arrays_step(const autoclip_rule *rule, float max_threshold, const int32_t *digits,
                                     float *norms, size_t norms_size, int32_t *counts, float norm, float *last) {
    double percentile = 0.0;
    for (int i = AUTOCLIP_DIGITS - 1; i >= 0; --i) percentile = percentile / 128.0 + (double)digits[i];
    if (!is_percentile(percentile)) return AUTOCLIP_BAD_PERCENTILE;

    const bool finite = isfinite(norm);
    const bool enters = finite && norm > 0.0F;
    const float remembered = enters ? norm : INFINITY;
    const uint32_t entered_before = (uint32_t)counts[AUTOCLIP_RECORDED];
    float threshold;
    if (rule->history != 0) {
        const uint64_t id = (uint64_t)rule->history;
        const autoclip_status status =
            autoclip_tree_observe(id, entered_before, norms, remembered, percentile, &threshold);
        if (status != AUTOCLIP_OK) return status;
    } else {
        threshold = autoclip_window_observe(norms, norms_size / 2, entered_before, remembered, percentile);
    }

    if (threshold > max_threshold) threshold = max_threshold;
    const bool warm = (int64_t)entered_before + enters > rule->warmup;
    const float limit = warm ? threshold : max_threshold;
    const bool clipped = finite && norm > limit;
    const float scale = clipped ? limit / norm : 1.0F;

    counts[AUTOCLIP_STEPS] += 1;
    counts[AUTOCLIP_RECORDED] += enters;
    counts[AUTOCLIP_CLIPPED] += clipped;
    counts[AUTOCLIP_NONFINITE] += !finite;
    last[AUTOCLIP_NORM] = norm;
    last[AUTOCLIP_THRESHOLD] = threshold;
    last[AUTOCLIP_SCALE] = !finite && rule->skips ? 0.0F : scale;
    last[AUTOCLIP_DID_CLIP] = clipped;
    return AUTOCLIP_OK;
}

/* numpy's "linear" percentile, operation by operation, so that the same bits come out: the one place for all that interpolate.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_PERCENTILE_H
#define AUTOCLIP_PERCENTILE_H

#include <stdbool.h>
#include <stdint.h>

#include "float_mode.h"

static inline bool is_percentile(double percentile) { return percentile >= 0.0 && percentile <= 100.0; }

/* Where the percentile of `size` norms stands, size being above 0: at its whole part counted as a rank, and so far on
 * the way to the next norm as the rest says. */
static inline double percentile_position(uint64_t size, double percentile) {
    return (double)(size - 1) * (percentile / 100.0);
}

static inline double percentile_between(double low, double high, double fraction) {
    const double difference = high - low;
    return fraction < 0.5 ? low + difference * fraction : high - difference * (1.0 - fraction);
}

#endif

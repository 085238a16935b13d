/* Ascending order for many doubles at once.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_SORT_H
#define AUTOCLIP_SORT_H

#include <stdbool.h>

#include "float_mode.h"
#include "memory.h"

/* Sort finite keys, and write -0.0 as 0.0. `scratch` holds as many. O(count). */
void autoclip_sort(double *keys, double *scratch, size_t count);

/* At least one finite key, sorted into memory of its own, which the caller releases; up to twice as much while it runs.
 * NULL when there is no memory. O(count). */
double *autoclip_sorted_copy(struct memory *memory, const double *keys, size_t count);

#endif

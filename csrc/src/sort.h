/* Ascending order for many doubles at once. */
#ifndef AUTOCLIP_SORT_H
#define AUTOCLIP_SORT_H

#include <stdbool.h>

#include "memory.h"

/* At least one finite key, copied in ascending order, -0.0 as 0.0; twice the memory while it runs. The caller releases
 * the copy; NULL when there is no memory. O(count). */
double *autoclip_sorted_copy(struct memory *memory, const double *keys, size_t count);

#endif

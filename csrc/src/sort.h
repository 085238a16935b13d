/* Ascending order for many doubles at once. */
#ifndef AUTOCLIP_SORT_H
#define AUTOCLIP_SORT_H

#include <stdbool.h>

#include "memory.h"

/* Sort finite keys in place, in O(count), with as much memory again while it runs; false when there is none. */
bool sort_keys(struct memory *memory, double *keys, size_t count);

#endif

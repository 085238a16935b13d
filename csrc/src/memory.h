/* The allocator seam: every byte that the kernel holds passes through these functions and is counted. Nothing else in the
 * kernel may call malloc.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_MEMORY_H
#define AUTOCLIP_MEMORY_H

#include "autoclip.h"

struct memory {
    autoclip_allocator allocator;
    uint64_t bytes;
};

/* NULL when there is no memory left. */
static inline void *memory_allocate(struct memory *memory, size_t size) {
    void *block = memory->allocator.allocate(memory->allocator.context, size);
    if (block != NULL) memory->bytes += size;
    return block;
}

static inline void memory_release(struct memory *memory, void *block, size_t size) {
    if (block == NULL) return;
    memory->allocator.release(memory->allocator.context, block, size);
    memory->bytes -= size;
}

/* Through this allocator, or through malloc and free if it is NULL. */
struct memory autoclip_memory_from(const autoclip_allocator *allocator);

/* malloc, but for large blocks, and free; `context` is not used. */
void *autoclip_memory_default_allocate(void *context, size_t size);
void autoclip_memory_default_release(void *context, void *block, size_t size);

#endif

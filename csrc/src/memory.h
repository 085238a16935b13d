/* The allocator seam: every byte that the kernel holds passes through these two functions and is counted.
 *
 * Nothing else in the kernel may call malloc. Blocks of two megabytes and more are aligned to that size and offered to
 * the kernel of the operating system for huge pages: a random leaf then costs one miss in memory instead of one in
 * memory and one in the page tables. */
#ifndef AUTOCLIP_MEMORY_H
#define AUTOCLIP_MEMORY_H

#include <stdlib.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "autoclip.h"

#define MEMORY_HUGE_PAGE ((size_t)2 << 20)

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

static inline void *memory_default_allocate(void *context, size_t size) {
    (void)context;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (size >= MEMORY_HUGE_PAGE) {
        void *block = NULL;
        if (posix_memalign(&block, MEMORY_HUGE_PAGE, size) != 0) return NULL;
        (void)madvise(block, size, MADV_HUGEPAGE); /* advice only: without it the block serves as well */
        return block;
    }
#endif
    return malloc(size);
}

static inline void memory_default_release(void *context, void *block, size_t size) {
    (void)context;
    (void)size;
    free(block);
}

static inline struct memory memory_from(const autoclip_allocator *allocator) {
    const autoclip_allocator standard = {memory_default_allocate, memory_default_release, NULL};
    return (struct memory){.allocator = allocator != NULL ? *allocator : standard, .bytes = 0};
}

#endif

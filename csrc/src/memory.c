/* Where memory comes from by default. Blocks of two megabytes and more are aligned to that size and offered to the kernel
 * of the operating system for huge pages: a random leaf then costs one miss in memory instead of one in memory and one in
 * the page tables.
 *
 * SPDX-License-Identifier: MIT */
#if !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE /* strict C11 hides madvise */
#endif
#include <stdlib.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "memory.h"

#define HUGE_PAGE ((size_t)2 << 20)

void *autoclip_memory_default_allocate(void *context, size_t size) {
    (void)context;
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (size >= HUGE_PAGE) {
        void *block = NULL;
        if (posix_memalign(&block, HUGE_PAGE, size) != 0) return NULL;
        (void)madvise(block, size, MADV_HUGEPAGE); /* advice only: the block is as good without it */
        return block;
    }
#endif
    return malloc(size);
}

void autoclip_memory_default_release(void *context, void *block, size_t size) {
    (void)context;
    (void)size;
    free(block);
}

struct memory autoclip_memory_from(const autoclip_allocator *allocator) {
    const autoclip_allocator standard = {autoclip_memory_default_allocate, autoclip_memory_default_release, NULL,
                                         sizeof standard};
    return (struct memory){.allocator = allocator != NULL ? *allocator : standard, .bytes = 0};
}

/* A counted B+ tree of doubles: a sorted multiset that knows how many keys stand before any place in it.
 *
 * What shaped it:
 *   - A leaf holds keys and nothing else; its size stands in its parent. Leaves and inner nodes have the same size in
 *     bytes, so that both come from one pool with one free list.
 *   - An entry of an inner node is (smallest key below, number of keys below, child). The smallest key is exact, always:
 *     insert, erase and rank then descend by one rule, duplicates included.
 *   - Nodes are refilled from their neighbours before they are split, and two full ones become three: about four fifths
 *     of every leaf is in use after random inserts. Nodes on the right edge may hold less than half, down to one entry,
 *     so that ascending keys and a bulk load fill every leaf to the brim.
 *   - Depth, fan-out and node layout are private: no snapshot contains a node.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_OSTREE_H
#define AUTOCLIP_OSTREE_H

#include <stdbool.h>

#include "float_mode.h"
#include "memory.h"

#ifndef AUTOCLIP_LEAF
#define AUTOCLIP_LEAF 128 /* keys in a leaf */
#endif
#ifndef AUTOCLIP_FANOUT
#define AUTOCLIP_FANOUT 42 /* entries of an inner node: as many as fit into the bytes of a leaf */
#endif

enum {
    OSTREE_LEAF = AUTOCLIP_LEAF,
    OSTREE_FANOUT = AUTOCLIP_FANOUT,
    OSTREE_MAX_HEIGHT = 64,
    OSTREE_ALIGNMENT = 64 /* bytes in a cache line */
};

typedef union ostree_node ostree_node;

typedef struct ostree_inner {
    uint64_t size; /* entries in use */
    double min[OSTREE_FANOUT];
    uint64_t count[OSTREE_FANOUT];
    ostree_node *child[OSTREE_FANOUT];
} ostree_inner;

union ostree_node {
    double keys[OSTREE_LEAF];
    ostree_inner inner;
    ostree_node *next_free;
};

typedef struct ostree_chunk {
    struct ostree_chunk *next;
    size_t bytes;
    size_t slots;
} ostree_chunk;

typedef struct ostree {
    struct memory *memory;
    ostree_node *root; /* NULL while the tree is empty */
    uint64_t size;
    unsigned height;         /* inner levels above the leaves */
    ostree_chunk *chunks;    /* newest first */
    ostree_node *free_nodes; /* given back, linked by next_free */
    uint64_t free_count;
    ostree_node *fresh_nodes; /* the unused end of the newest chunk */
    uint64_t fresh_count;
    uint64_t slots; /* nodes in all chunks: in use, free and fresh */
} ostree;

/* A run of neighbouring keys in memory: keys[0] has rank `first`. Valid until the tree changes. */
typedef struct ostree_span {
    const double *keys;
    uint64_t first;
    uint64_t size;
    const ostree_node *next; /* the leaf after it, NULL if that has another parent */
    size_t others_low;       /* bounds on the number of others before the rank that was asked for */
    size_t others_high;
} ostree_span;

/* Write the next `count` keys in ascending order; false stops the build. */
typedef bool ostree_reader(void *source, double *keys, size_t count);

/* Ask the processor to fetch these bytes, and do not wait for them. */
static inline void prefetch(const void *start, size_t bytes) {
#if defined(__GNUC__)
    for (size_t at = 0; at < bytes; at += OSTREE_ALIGNMENT) __builtin_prefetch((const char *)start + at);
#else
    (void)start;
    (void)bytes;
#endif
}

/* The number of keys in keys[0 .. size) that are at most `key`. One probe per cache line, then one line: all lines are
 * asked for at once, where a binary search would wait for each in turn. */
static inline size_t upper_bound(const double *keys, size_t size, double key) {
    enum { LINE = OSTREE_ALIGNMENT / sizeof(double) };
    size_t lines = 0;
    for (size_t last = LINE - 1; last < size; last += LINE) lines += keys[last] <= key;
    size_t at = lines * LINE;
    size_t found = at;
    const size_t end = at + LINE < size ? at + LINE : size;
    for (; at < end; ++at) found += keys[at] <= key;
    return found;
}

/* The number of keys in keys[0 .. size) that are below `key`. */
static inline size_t lower_bound(const double *keys, size_t size, double key) {
    enum { LINE = OSTREE_ALIGNMENT / sizeof(double) };
    size_t lines = 0;
    for (size_t last = LINE - 1; last < size; last += LINE) lines += keys[last] < key;
    size_t at = lines * LINE;
    size_t found = at;
    const size_t end = at + LINE < size ? at + LINE : size;
    for (; at < end; ++at) found += keys[at] < key;
    return found;
}

/* An empty tree that holds no memory yet. O(1). */
void autoclip_tree_init(ostree *tree, struct memory *memory);

/* Give all memory back and be empty. */
void autoclip_tree_clear(ostree *tree);

/* Fill an empty tree with `size` keys from a reader, every leaf to the brim. AUTOCLIP_NO_MEMORY, or
 * AUTOCLIP_BAD_SNAPSHOT if the reader stopped: then the tree is empty again. O(size). */
autoclip_status autoclip_tree_build(ostree *tree, uint64_t size, ostree_reader *read, void *source);

/* Insert keys, and say how many: fewer than `count` only when there is no memory left. Fastest in ascending order.
 * O(count log n). */
size_t autoclip_tree_insert(ostree *tree, const double *keys, size_t count);

/* Remove one key equal to each of `keys`, up to the first that is not there, and say how many. O(count log n). */
size_t autoclip_tree_erase(ostree *tree, const double *keys, size_t count);

/* The number of keys below `key`. O(log n). */
uint64_t autoclip_tree_rank(const ostree *tree, double key);

/* In the union of the tree, which must not be empty, and a sorted array of others: the last leaf whose first key has at
 * most this rank. Without others that is the leaf that holds the key of this rank. Of equal norms those of the tree come
 * first. O(log n). */
ostree_span autoclip_tree_locate(const ostree *tree, const double *others, size_t others_size, uint64_t rank);

#endif

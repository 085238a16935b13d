/* What a history is made of; shared by history.c, snapshot.c and check.c.
 *
 * The norms are the union of the buffer and the tree. Which of the two holds a norm can be seen by nobody: equal doubles
 * are the same norm. Three things follow, and the rest of the kernel leans on them:
 *   - Moving norms between the two changes no answer, so it may fail half-way, and it may happen in any call.
 *   - Memory is touched in bulk. A new norm costs a shift in the small sorted buffer. When that is full, its norms enter
 *     the tree in ascending order while the leaves of the next ones are already on their way from memory.
 *   - A window brings the oldest norms back from the tree into the buffer in the same way, before they leave.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_HISTORY_H
#define AUTOCLIP_HISTORY_H

#include "ostree.h"

#ifndef AUTOCLIP_BUFFER
#define AUTOCLIP_BUFFER 256 /* norms in the buffer before they move to the tree */
#endif

enum { HISTORY_BUFFER = AUTOCLIP_BUFFER };

struct autoclip_history {
    struct memory memory;
    ostree tree;
    double *buffer; /* ascending */
    size_t buffered;
    size_t buffer_capacity; /* HISTORY_BUFFER at most, but for norms that came many at once */
    /* With a window: the norms in order of age, in a ring that grows up to the window. */
    uint64_t window;
    double *ring;
    uint64_t ring_capacity;
    uint64_t ring_first; /* where the oldest is */
    /* Where the last query ended: the next one is near. */
    ostree_span leaf;
    size_t buffered_before; /* norms of the buffer before the rank asked last */
};

/* Norms in ascending order, one stretch after the other: from a sorted array, from a tree, or from the union of both. */
typedef struct history_iterator {
    const double *array;
    size_t array_left;
    const ostree *tree; /* may be NULL */
    uint64_t rank;      /* of the next key in the tree */
    ostree_span leaf;
} history_iterator;

static inline uint64_t history_size(const autoclip_history *history) { return history->tree.size + history->buffered; }

/* The norm of this age, 0 being the oldest. Only with a window. */
static inline double history_by_age(const autoclip_history *history, uint64_t age) {
    const uint64_t at = history->ring_first + age;
    return history->ring[at < history->ring_capacity ? at : at - history->ring_capacity];
}

/* An iterator over all norms of a history. */
history_iterator autoclip_history_iterate(const autoclip_history *history);

/* Write the next `count` norms, which must be there; always true: it is an ostree_reader. */
bool autoclip_history_read(void *iterator, double *norms, size_t count);

/* Forget one norm equal to `norm`, if there is one, of a history without a window. */
void autoclip_history_erase(autoclip_history *history, double norm);

/* Replace all norms of an empty history without a window by `size` of them from a reader, in ascending order. */
autoclip_status autoclip_history_build(autoclip_history *history, uint64_t size, ostree_reader *read, void *source);

#endif

/* Every invariant of a history, one sentence each. The first that does not hold is named.
 *
 * SPDX-License-Identifier: MIT */
#include <math.h>
#include <string.h>

#include "history.h"

#define MUST(condition, sentence)                                                                                      \
    do {                                                                                                               \
        if (!(condition)) return "broken: " sentence;                                                                  \
    } while (0)

/* A mark of a multiset that does not depend on the order of its members. */
static uint64_t mark_of(double norm) {
    uint64_t bits;
    memcpy(&bits, &norm, sizeof bits);
    bits = (bits ^ bits >> 32) * UINT64_C(0x9E3779B97F4A7C15);
    bits = (bits ^ bits >> 29) * UINT64_C(0xD1B54A32D192ED03);
    return bits ^ bits >> 32;
}

static const char *check_keys(const double *keys, size_t size, uint64_t *mark) {
    for (size_t i = 0; i < size; ++i) {
        MUST(isfinite(keys[i]), "every norm is finite");
        MUST(keys[i] != 0.0 || !signbit(keys[i]), "no norm is -0.0");
        MUST(i == 0 || keys[i - 1] <= keys[i], "norms stand in ascending order");
        *mark += mark_of(keys[i]);
    }
    return NULL;
}

typedef struct tree_facts {
    uint64_t nodes;
    uint64_t mark;
    double last; /* the greatest key so far */
} tree_facts;

static const char *check_node(const ostree_node *node, unsigned level, uint64_t size, bool right_edge, bool is_root,
                              tree_facts *facts) {
    facts->nodes += 1;
    if (level == 0) {
        MUST(size <= OSTREE_LEAF, "no leaf holds more keys than fit");
        MUST(size >= (right_edge ? 1 : OSTREE_LEAF / 2), "every leaf but the last is at least half full");
        MUST(facts->last <= node->keys[0], "no key is below one in an earlier leaf");
        facts->last = node->keys[size - 1];
        return check_keys(node->keys, (size_t)size, &facts->mark);
    }
    const ostree_inner *inner = &node->inner;
    MUST(inner->size <= OSTREE_FANOUT, "no inner node has more entries than fit");
    MUST(inner->size >= (is_root      ? 2
                         : right_edge ? 1
                                      : OSTREE_FANOUT / 2),
         "every inner node but the last of its level is at least half full, and the root has two entries");
    uint64_t sum = 0;
    for (size_t i = 0; i < inner->size; ++i) {
        const ostree_node *child = inner->child[i];
        const bool child_on_edge = right_edge && i + 1 == inner->size;
        MUST(child != NULL, "every entry has a child");
        const char *reason = check_node(child, level - 1, inner->count[i], child_on_edge, false, facts);
        if (reason != NULL) return reason;
        MUST(inner->min[i] == (level == 1 ? child->keys[0] : child->inner.min[0]),
             "every entry names the smallest key below it");
        sum += inner->count[i];
    }
    MUST(sum == size, "every entry names the number of keys below it");
    return NULL;
}

static const char *check_tree(const ostree *tree, uint64_t *mark, uint64_t *bytes) {
    MUST((tree->root == NULL) == (tree->size == 0), "only an empty tree has no root");
    tree_facts facts = {.last = -INFINITY};
    if (tree->root != NULL) {
        const char *reason = check_node(tree->root, tree->height, tree->size, true, tree->height > 0, &facts);
        if (reason != NULL) return reason;
    }
    uint64_t slots = 0;
    for (const ostree_chunk *chunk = tree->chunks; chunk != NULL; chunk = chunk->next) {
        slots += chunk->slots;
        *bytes += chunk->bytes;
    }
    MUST(slots == tree->slots, "the chunks hold as many nodes as the pool counts");
    uint64_t given_back = 0;
    for (const ostree_node *node = tree->free_nodes; node != NULL && given_back <= slots; node = node->next_free) {
        given_back += 1;
    }
    MUST(given_back == tree->free_count, "the free list is as long as the pool counts");
    MUST(facts.nodes + given_back + tree->fresh_count == slots, "every node is in the tree, free or fresh");
    *mark = facts.mark;
    return NULL;
}

static const char *check_history(const autoclip_history *history) {
    uint64_t mark = 0;
    uint64_t bytes = sizeof *history;
    const char *reason = check_tree(&history->tree, &mark, &bytes);
    if (reason != NULL) return reason;
    MUST(history->tree.memory == &history->memory, "the tree takes memory from its own history");
    MUST(history->buffered <= history->buffer_capacity, "the buffer holds no more norms than fit");
    reason = check_keys(history->buffer, history->buffered, &mark);
    if (reason != NULL) return reason;
    if (history->window > 0) {
        MUST(history_size(history) <= history->window, "there are no more norms than the window admits");
        MUST(history_size(history) <= history->ring_capacity, "every norm has a place in the order of age");
        uint64_t ring_mark = 0;
        for (uint64_t age = 0; age < history_size(history); ++age) ring_mark += mark_of(history_by_age(history, age));
        MUST(ring_mark == mark, "buffer and tree hold the norms of the window");
    }
    bytes += (history->buffer_capacity + history->ring_capacity) * sizeof(double);
    MUST(bytes == history->memory.bytes, "every byte from the allocator is accounted for");
    return NULL;
}

static autoclip_status check(const autoclip_history *history, const char **reason) {
    const char *broken = check_history(history);
    *reason = broken != NULL ? broken : "";
    return broken != NULL ? AUTOCLIP_BROKEN : AUTOCLIP_OK;
}

autoclip_status autoclip_history_check(const autoclip_history *history, const char **reason) {
    IN_STANDARD_MODE(check(history, reason));
}

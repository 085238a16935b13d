/* Every invariant, broken on purpose: the check must name it. And the tree alone, in the few ways in which a history never
 * uses it.
 *
 * The one test that looks inside: no call of autoclip.h can break an invariant, which is the point of having them.
 *
 * SPDX-License-Identifier: MIT */
#include "history.h"
#include "test.h"

enum { NORMS = 30000 }; /* inner nodes on two levels, of the real size as well */

static autoclip_history *make(uint64_t window) {
    autoclip_history *history;
    uint64_t state = 1;
    REQUIRE_OK(autoclip_history_create(window, NULL, &history));
    for (int i = 0; i < NORMS; ++i) REQUIRE_OK(autoclip_history_push(history, 1 + test_uniform(&state)));
    REQUIRE(history->tree.height >= 2, "the tree has %u inner levels", history->tree.height);
    REQUIRE(history->buffered > 0, "nothing is buffered");
    REQUIRE(history->buffer_capacity <= HISTORY_BUFFER, "the buffer grew to %zu norms", history->buffer_capacity);
    return history;
}

static uint64_t breaks;

/* Put `size` other bytes at `place`: the check must say `sentence`, and nothing once they are as they were. */
static void require_broken(const autoclip_history *history, void *place, const void *other, size_t size,
                           const char *sentence) {
    unsigned char before[sizeof(void *) > 8 ? sizeof(void *) : 8];
    const char *reason = NULL;
    test_now.detail = sentence;
    memcpy(before, place, size);
    memcpy(place, other, size);
    REQUIRE_STATUS(AUTOCLIP_BROKEN, autoclip_history_check(history, &reason));
    REQUIRE(strstr(reason, sentence) != NULL, "the check says '%s'", reason);
    memcpy(place, before, size);
    REQUIRE_OK(autoclip_history_check(history, &reason));
    REQUIRE(reason[0] == '\0', "the check says '%s'", reason);
    breaks += 1;
}

#define BREAK(history, type, place, value, sentence)                                                                   \
    require_broken((history), &(place), &(type){value}, sizeof(type), (sentence))

static void break_nodes(autoclip_history *history) {
    ostree_inner *root = &history->tree.root->inner;
    ostree_inner *parent = root; /* of the first leaf */
    for (unsigned level = history->tree.height; level > 1; level--) parent = &parent->child[0]->inner;
    double *keys = parent->child[0]->keys;
    double *next = parent->child[1]->keys;
    BREAK(history, double, keys[1], (double)INFINITY, "every norm is finite");
    BREAK(history, double, keys[1], -0.0, "no norm is -0.0");
    BREAK(history, double, keys[1], keys[0] - 1, "norms stand in ascending order");
    BREAK(history, double, next[0], keys[0] - 1, "no key is below one in an earlier leaf");
    BREAK(history, uint64_t, parent->count[0], OSTREE_LEAF + 1, "no leaf holds more keys than fit");
    BREAK(history, uint64_t, parent->count[0], OSTREE_LEAF / 2 - 1, "every leaf but the last is at least half full");
    BREAK(history, uint64_t, parent->size, OSTREE_FANOUT + 1, "no inner node has more entries than fit");
    BREAK(history, uint64_t, parent->size, OSTREE_FANOUT / 2 - 1, "is at least half full");
    BREAK(history, uint64_t, root->size, 1, "the root has two entries");
    BREAK(history, ostree_node *, parent->child[1], NULL, "every entry has a child");
    BREAK(history, double, parent->min[1], 0.5, "every entry names the smallest key below it");
    BREAK(history, double, root->min[1], 0.5, "every entry names the smallest key below it");
    BREAK(history, uint64_t, root->count[1], root->count[1] + 1, "every entry names the number of keys below it");
}

static void break_pool(autoclip_history *history) {
    ostree *tree = &history->tree;
    ostree_node endless = {.next_free = &endless};
    struct memory elsewhere = history->memory;
    BREAK(history, ostree_node *, tree->root, NULL, "only an empty tree has no root");
    BREAK(history, uint64_t, tree->size, 0, "only an empty tree has no root");
    BREAK(history, uint64_t, tree->slots, tree->slots + 1, "the chunks hold as many nodes as the pool counts");
    BREAK(history, uint64_t, tree->free_count, tree->free_count + 1, "the free list is as long as the pool counts");
    BREAK(history, ostree_node *, tree->free_nodes, &endless, "the free list is as long as the pool counts");
    BREAK(history, uint64_t, tree->fresh_count, tree->fresh_count + 1, "every node is in the tree, free or fresh");
    BREAK(history, struct memory *, tree->memory, &elsewhere, "the tree takes memory from its own history");
}

static void break_history(autoclip_history *history) {
    BREAK(history, size_t, history->buffered, history->buffer_capacity + 1, "the buffer holds no more norms than fit");
    BREAK(history, double, history->buffer[0], (double)NAN, "every norm is finite");
    BREAK(history, uint64_t, history->memory.bytes, history->memory.bytes + 1, "every byte from the allocator");
    if (history->window > 0) {
        BREAK(history, uint64_t, history->window, history_size(history) - 1, "no more norms than the window admits");
        BREAK(history, uint64_t, history->ring_capacity, history_size(history) - 1,
              "every norm has a place in the order");
        BREAK(history, double, history->ring[7], 1, "buffer and tree hold the norms of the window");
    }
}

static void test_check_names_every_broken_invariant(void) {
    for (uint64_t window = 0; window <= NORMS; window += NORMS) {
        autoclip_history *history = make(window);
        break_nodes(history);
        break_pool(history);
        break_history(history);
        autoclip_history_destroy(history);
    }
    printf("  %" PRIu64 " broken invariants named\n", breaks);
}

static void test_tree_alone_begins_with_an_insert(void) {
    heap own;
    heap_create(&own);
    struct memory memory = autoclip_memory_from(&own.allocator);
    ostree tree;
    autoclip_tree_init(&tree, &memory);
    const double keys[] = {1, 2, 3, 3, 3, 4};
    heap_arm(&own, 1, true);
    REQUIRE(autoclip_tree_insert(&tree, keys, 6) == 0, "a key was inserted without memory");
    heap_disarm(&own);
    REQUIRE(autoclip_tree_insert(&tree, keys, 6) == 6, "not all keys were inserted");
    REQUIRE(tree.size == 6 && autoclip_tree_rank(&tree, 3) == 2, "the keys are not there");
    autoclip_tree_clear(&tree);
    heap_destroy(&own);
}

static void test_tree_alone_erases_up_to_the_first_key_that_is_not_there(void) {
    static const struct {
        double keys[4];
        size_t erased;
    } cases[] = {{{0.5, 1, 2, 3}, 0}, {{2.5, 3, 3, 3}, 0}, {{9, 9, 9, 9}, 0},
                 {{1, 1, 2, 3}, 1},   {{3, 3, 3, 3}, 3},   {{2, 3, 3.5, 4}, 2}};
    for (size_t c = 0; c < sizeof cases / sizeof *cases; ++c) {
        heap own;
        heap_create(&own);
        struct memory memory = autoclip_memory_from(&own.allocator);
        ostree tree;
        autoclip_tree_init(&tree, &memory);
        const double keys[] = {1, 2, 3, 3, 3, 4};
        test_now.step = c;
        REQUIRE(autoclip_tree_insert(&tree, keys, 6) == 6, "not all keys were inserted");
        const size_t erased = autoclip_tree_erase(&tree, cases[c].keys, 4);
        REQUIRE(erased == cases[c].erased && tree.size == 6 - erased, "%zu keys were erased", erased);
        REQUIRE(autoclip_tree_erase(&tree, keys, 0) == 0, "nothing is something");
        autoclip_tree_clear(&tree);
        REQUIRE(autoclip_tree_erase(&tree, keys, 1) == 0, "a key was erased from nothing");
        const double equal[] = {7, 7, 7};
        REQUIRE(autoclip_tree_insert(&tree, equal, 2) == 2, "not all keys were inserted");
        REQUIRE(autoclip_tree_erase(&tree, equal, 3) == 2 && tree.root == NULL, "the tree is not empty");
        autoclip_tree_clear(&tree);
        heap_destroy(&own);
    }
}

static bool read_ascending(void *source, double *keys, size_t count) {
    double *next = source;
    for (size_t i = 0; i < count; ++i) keys[i] = (*next)++;
    return true;
}

static void test_tree_alone_is_built_of_no_more_nodes_than_it_needs(void) {
    for (uint64_t size = OSTREE_LEAF + 1; size < 40 * OSTREE_LEAF; size += OSTREE_LEAF / 4) {
        heap own;
        heap_create(&own);
        struct memory memory = autoclip_memory_from(&own.allocator);
        ostree tree;
        double next = 0;
        test_now.step = size;
        autoclip_tree_init(&tree, &memory);
        REQUIRE_OK(autoclip_tree_build(&tree, size, read_ascending, &next));
        REQUIRE(next == (double)size && tree.size == size, "%g keys were read", next);
        REQUIRE(tree.fresh_count == 0 && tree.free_count == 0, "nodes were left over");
        autoclip_tree_clear(&tree);
        heap_destroy(&own);
    }
}

static void test_tree_alone_asks_for_memory_only_when_it_lacks_nodes(void) {
    heap own;
    heap_create(&own);
    struct memory memory = autoclip_memory_from(&own.allocator);
    ostree tree;
    autoclip_tree_init(&tree, &memory);
    uint64_t state = 1;
    for (int i = 0; i < 100 * OSTREE_LEAF; ++i) {
        const double key = test_uniform(&state);
        heap_arm(&own, 1, true);
        if (autoclip_tree_insert(&tree, &key, 1) == 0) { /* to make room for a key takes two nodes at a time */
            REQUIRE(tree.free_count + tree.fresh_count < 2, "it had nodes");
            heap_disarm(&own);
            REQUIRE(autoclip_tree_insert(&tree, &key, 1) == 1, "the key was not inserted");
        }
    }
    REQUIRE(own.all_faults > 10, "no more than %" PRIu64 " requests", own.all_faults);
    autoclip_tree_clear(&tree);
    heap_destroy(&own);
}

TEST_MAIN(TEST(test_check_names_every_broken_invariant), TEST(test_tree_alone_begins_with_an_insert),
          TEST(test_tree_alone_is_built_of_no_more_nodes_than_it_needs),
          TEST(test_tree_alone_asks_for_memory_only_when_it_lacks_nodes),
          TEST(test_tree_alone_erases_up_to_the_first_key_that_is_not_there));

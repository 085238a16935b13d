/* The tree: pool, nodes, descent, insert, erase, build.
 *
 * SPDX-License-Identifier: MIT */
#include "ostree.h"

#include <string.h>

/* --- The pool: nodes from chunks that grow with the tree -------------------------------------------------------- */

void autoclip_tree_init(ostree *tree, struct memory *memory) { *tree = (ostree){.memory = memory}; }

void autoclip_tree_clear(ostree *tree) {
    for (ostree_chunk *chunk = tree->chunks; chunk != NULL;) {
        ostree_chunk *next = chunk->next;
        memory_release(tree->memory, chunk, chunk->bytes);
        chunk = next;
    }
    autoclip_tree_init(tree, tree->memory);
}

static void pool_give(ostree *tree, ostree_node *node) {
    node->next_free = tree->free_nodes;
    tree->free_nodes = node;
    tree->free_count += 1;
}

/* Make sure that `count` nodes can be taken. A new chunk adds a small share of what there is: at most that share of the
 * memory lies idle, and the number of chunks grows with the logarithm of the tree only. */
static bool pool_reserve(ostree *tree, uint64_t count) {
    enum { MIN_SLOTS = 2, SHARE = 32 };
    if (tree->free_count + tree->fresh_count >= count) return true;
    const size_t overhead = sizeof(ostree_chunk) + OSTREE_ALIGNMENT;
    uint64_t slots = tree->slots / SHARE;
    if (slots < MIN_SLOTS) slots = MIN_SLOTS;
    if (slots < count) slots = count;
    if (slots > (SIZE_MAX / 2 - overhead) / sizeof(ostree_node)) return false;
    const size_t bytes = overhead + (size_t)slots * sizeof(ostree_node);
    ostree_chunk *chunk = memory_allocate(tree->memory, bytes);
    if (chunk == NULL) return false;
    for (; tree->fresh_count > 0; tree->fresh_count -= 1) pool_give(tree, tree->fresh_nodes++);
    *chunk = (ostree_chunk){.next = tree->chunks, .bytes = bytes, .slots = (size_t)slots};
    tree->chunks = chunk;
    const uintptr_t end_of_header = (uintptr_t)(chunk + 1);
    const uintptr_t padding = (OSTREE_ALIGNMENT - end_of_header % OSTREE_ALIGNMENT) % OSTREE_ALIGNMENT;
    tree->fresh_nodes = (ostree_node *)(void *)((char *)(chunk + 1) + padding);
    tree->fresh_count = slots;
    tree->slots += slots;
    return true;
}

/* Only after pool_reserve has promised it. */
static ostree_node *pool_take(ostree *tree) {
    if (tree->free_count > 0) {
        ostree_node *node = tree->free_nodes;
        tree->free_nodes = node->next_free;
        tree->free_count -= 1;
        return node;
    }
    tree->fresh_count -= 1;
    return tree->fresh_nodes++;
}

/* --- Nodes ------------------------------------------------------------------------------------------------------ */

static size_t capacity_at(unsigned level) { return level == 0 ? OSTREE_LEAF : OSTREE_FANOUT; }

/* The size of child `at`, which stands on `level`. */
static size_t child_size(const ostree_inner *parent, size_t at, unsigned level) {
    return (size_t)(level == 0 ? parent->count[at] : parent->child[at]->inner.size);
}

/* The child where `key` belongs: the last whose smallest key is not above it. */
static size_t child_of(const ostree_inner *inner, double key) {
    const size_t at = upper_bound(inner->min, (size_t)inner->size, key);
    return at > 0 ? at - 1 : 0;
}

static void inner_insert(ostree_inner *inner, size_t at, ostree_node *child) {
    const size_t tail = (size_t)inner->size - at;
    memmove(inner->min + at + 1, inner->min + at, tail * sizeof *inner->min);
    memmove(inner->count + at + 1, inner->count + at, tail * sizeof *inner->count);
    memmove(inner->child + at + 1, inner->child + at, tail * sizeof(ostree_node *));
    inner->child[at] = child;
    inner->size += 1;
}

static void inner_remove(ostree_inner *inner, size_t at) {
    inner->size -= 1;
    const size_t tail = (size_t)inner->size - at;
    memmove(inner->min + at, inner->min + at + 1, tail * sizeof *inner->min);
    memmove(inner->count + at, inner->count + at + 1, tail * sizeof *inner->count);
    memmove(inner->child + at, inner->child + at + 1, tail * sizeof(ostree_node *));
}

/* What `parent` must know of its child `at`, an inner node. */
static void refresh_entry(ostree_inner *parent, size_t at) {
    const ostree_inner *child = &parent->child[at]->inner;
    uint64_t count = 0;
    for (size_t i = 0; i < child->size; ++i) count += child->count[i];
    parent->min[at] = child->min[0];
    parent->count[at] = count;
}

/* Deal the contents of the children first .. first + before evenly among as many as `after`, taking new nodes or giving
 * nodes back: 2 to 2 balances, 1 to 2 and 2 to 3 split, 2 to 1 merges. The nodes must have been reserved, and `parent`
 * must have room for one more entry if after > before. */
static void deal(ostree *tree, ostree_inner *parent, unsigned level, size_t first, size_t before, size_t after) {
    union {
        double keys[3 * OSTREE_LEAF];
        struct {
            double min[3 * OSTREE_FANOUT];
            uint64_t count[3 * OSTREE_FANOUT];
            ostree_node *child[3 * OSTREE_FANOUT];
        } inner;
    } all;
    size_t total = 0;
    for (size_t at = first; at < first + before; ++at) {
        const size_t size = child_size(parent, at, level);
        const ostree_node *node = parent->child[at];
        if (level == 0) {
            memcpy(all.keys + total, node->keys, size * sizeof(double));
        } else {
            memcpy(all.inner.min + total, node->inner.min, size * sizeof(double));
            memcpy(all.inner.count + total, node->inner.count, size * sizeof(uint64_t));
            memcpy(all.inner.child + total, node->inner.child, size * sizeof(ostree_node *));
        }
        total += size;
    }
    if (after > before) inner_insert(parent, first + before, pool_take(tree));
    if (after < before) {
        pool_give(tree, parent->child[first + after]);
        inner_remove(parent, first + after);
    }
    size_t done = 0;
    for (size_t at = first; at < first + after; ++at) {
        const size_t size = (total - done) / (first + after - at);
        ostree_node *node = parent->child[at];
        if (level == 0) {
            memcpy(node->keys, all.keys + done, size * sizeof(double));
            parent->min[at] = node->keys[0];
            parent->count[at] = size;
        } else {
            memcpy(node->inner.min, all.inner.min + done, size * sizeof(double));
            memcpy(node->inner.count, all.inner.count + done, size * sizeof(uint64_t));
            memcpy(node->inner.child, all.inner.child + done, size * sizeof(ostree_node *));
            node->inner.size = size;
            refresh_entry(parent, at);
        }
        done += size;
    }
}

/* --- Descent ---------------------------------------------------------------------------------------------------- */

/* From the root to a leaf: the entry followed on each level, counted from the leaves: step[1] is the leaf's parent. */
struct path {
    ostree_node *leaf;
    struct {
        ostree_inner *inner;
        size_t at;
    } step[OSTREE_MAX_HEIGHT + 1];
};

/* How many keys descend together. */
enum { TOGETHER = 12 };

/* Find the leaf of each key, level by level: while the search of one key waits for its node, those of the others go on.
 * Of a leaf two lines are asked for, and the processor streams the rest. */
static void descend(const ostree *tree, const double *keys, size_t count, struct path *paths) {
    for (size_t i = 0; i < count; ++i) paths[i].leaf = tree->root;
    for (unsigned level = tree->height; level > 0; --level) {
        for (size_t i = 0; i < count; ++i) {
            ostree_inner *inner = &paths[i].leaf->inner;
            const size_t at = child_of(inner, keys[i]);
            paths[i].step[level].inner = inner;
            paths[i].step[level].at = at;
            ostree_node *child = inner->child[at];
            paths[i].leaf = child;
            if (level > 1) {
                prefetch(child, offsetof(ostree_inner, count));
            } else {
                prefetch(child->keys, sizeof(double));
                prefetch(child->keys + OSTREE_LEAF / 2, sizeof(double));
            }
        }
    }
}

static size_t leaf_size(const ostree *tree, const struct path *path) {
    return (size_t)(tree->height == 0 ? tree->size : path->step[1].inner->count[path->step[1].at]);
}

uint64_t autoclip_tree_rank(const ostree *tree, double key) {
    const ostree_node *node = tree->root;
    uint64_t size = tree->size;
    uint64_t before = 0;
    for (unsigned level = tree->height; level > 0; --level) {
        const ostree_inner *inner = &node->inner;
        size_t at = lower_bound(inner->min, (size_t)inner->size, key);
        if (at > 0) at -= 1;
        for (size_t i = 0; i < at; ++i) before += inner->count[i];
        size = inner->count[at];
        node = inner->child[at];
    }
    return size == 0 ? 0 : before + lower_bound(node->keys, (size_t)size, key);
}

ostree_span autoclip_tree_locate(const ostree *tree, const double *others, size_t others_size, uint64_t rank) {
    const ostree_node *node = tree->root;
    const double *min = NULL; /* of this leaf and of the next, as their parents know them: the keys are far away */
    const double *next_min = NULL;
    ostree_span leaf = {.size = tree->size, .others_high = others_size};
    for (unsigned level = tree->height; level > 0; --level) {
        const ostree_inner *inner = &node->inner;
        size_t at = 0;
        for (; at + 1 < inner->size; ++at) {
            /* The others are asked only where they can decide. */
            const uint64_t next = leaf.first + inner->count[at];
            if (next > rank) break;
            if (next + others_size > rank && next + lower_bound(others, others_size, inner->min[at + 1]) > rank) break;
            leaf.first = next;
        }
        min = inner->min + at;
        if (at + 1 < inner->size) next_min = min + 1;
        if (level == 1) leaf.next = at + 1 < inner->size ? inner->child[at + 1] : NULL;
        leaf.size = inner->count[at];
        node = inner->child[at];
    }
    leaf.keys = node->keys;
    if (others_size > 0) {
        /* The key is on its way while the bounds are found, which spare the caller most of its search. */
        prefetch(leaf.keys + (rank - leaf.first) % OSTREE_LEAF, sizeof(double));
        if (min != NULL) leaf.others_low = lower_bound(others, others_size, *min);
        if (next_min != NULL) leaf.others_high = lower_bound(others, others_size, *next_min);
    }
    return leaf;
}

/* --- Insert ----------------------------------------------------------------------------------------------------- */

static bool is_on_right_edge(const ostree *tree, const struct path *path, unsigned level) {
    for (unsigned above = level + 1; above <= tree->height; ++above) {
        if (path->step[above].at + 1 != path->step[above].inner->size) return false;
    }
    return true;
}

/* The leaf on the path is full: move the tree one step towards having room for the key, then descend again. One node and a
 * new root at most are taken, and they have been reserved. */
static void make_room(ostree *tree, const struct path *path, double key) {
    unsigned level = 0;
    for (;; ++level) {
        if (level == tree->height) { /* the root itself is full: put a root above it */
            ostree_node *root = pool_take(tree);
            root->inner.size = 1;
            root->inner.child[0] = tree->root;
            root->inner.count[0] = tree->size;
            tree->root = root;
            tree->height += 1;
            deal(tree, &root->inner, level, 0, 1, 2);
            return;
        }
        ostree_inner *parent = path->step[level + 1].inner;
        const size_t at = path->step[level + 1].at;
        const size_t capacity = capacity_at(level);
        /* A neighbour must have room for two, or the node could be full again after balancing. */
        const size_t enough = capacity - 2 - capacity / 16;
        const bool has_left = at > 0;
        const bool has_right = at + 1 < parent->size;
        if (has_left && child_size(parent, at - 1, level) <= enough) {
            deal(tree, parent, level, at - 1, 2, 2);
            return;
        }
        if (has_right && child_size(parent, at + 1, level) <= enough) {
            deal(tree, parent, level, at, 2, 2);
            return;
        }
        if (parent->size == OSTREE_FANOUT) continue; /* first make room for the new entry */
        const ostree_node *leaf = path->leaf;
        if (is_on_right_edge(tree, path, level) && leaf->keys[OSTREE_LEAF - 1] <= key) {
            /* Ascending keys: leave the full leaf as it is and give the key one of its own. A full inner node gives its
             * last entry away. */
            ostree_node *node = pool_take(tree);
            ostree_node *full = parent->child[at];
            inner_insert(parent, at + 1, node);
            if (level == 0) {
                parent->min[at + 1] = key;
                parent->count[at + 1] = 0;
            } else {
                full->inner.size -= 1;
                node->inner.size = 1;
                node->inner.min[0] = full->inner.min[capacity - 1];
                node->inner.count[0] = full->inner.count[capacity - 1];
                node->inner.child[0] = full->inner.child[capacity - 1];
                refresh_entry(parent, at);
                refresh_entry(parent, at + 1);
            }
        } else if (has_left) {
            deal(tree, parent, level, at - 1, 2, 3);
        } else {
            /* Descending keys end here: the half that stays behind fills up from its left. */
            deal(tree, parent, level, at, 1, 2);
        }
        return;
    }
}

/* There is room in the leaf. */
static void insert_into_leaf(ostree *tree, const struct path *path, double key) {
    double *keys = path->leaf->keys;
    const size_t size = leaf_size(tree, path);
    const size_t at = upper_bound(keys, size, key);
    memmove(keys + at + 1, keys + at, (size - at) * sizeof *keys);
    keys[at] = key;
    tree->size += 1;
    for (unsigned level = 1; level <= tree->height; ++level) {
        ostree_inner *inner = path->step[level].inner;
        const size_t entry = path->step[level].at;
        inner->count[entry] += 1;
        if (key < inner->min[entry]) inner->min[entry] = key;
    }
}

size_t autoclip_tree_insert(ostree *tree, const double *keys, size_t count) {
    if (tree->root == NULL) {
        if (!pool_reserve(tree, 1)) return 0;
        tree->root = pool_take(tree);
    }
    struct path paths[TOGETHER];
    size_t done = 0;
    while (done < count) {
        const size_t group = count - done < TOGETHER ? count - done : TOGETHER;
        descend(tree, keys + done, group, paths);
        /* The paths of the others stay right until nodes change. */
        bool same_nodes = true;
        for (size_t i = 0; i < group && same_nodes; ++i, ++done) {
            while (leaf_size(tree, &paths[i]) == OSTREE_LEAF) {
                if (!pool_reserve(tree, 2)) return done;
                make_room(tree, &paths[i], keys[done]);
                descend(tree, &keys[done], 1, &paths[i]);
                same_nodes = false;
            }
            insert_into_leaf(tree, &paths[i], keys[done]);
        }
    }
    return done;
}

/* --- Erase ------------------------------------------------------------------------------------------------------ */

/* The only leaf of its parent, on the right edge, is to lose its last key: drop the whole single file of nodes. */
static void drop_right_edge(ostree *tree, const struct path *path) {
    unsigned level = 1;
    pool_give(tree, path->leaf);
    for (; level <= tree->height && path->step[level].inner->size == 1; ++level) {
        pool_give(tree, (ostree_node *)(void *)path->step[level].inner);
    }
    if (level > tree->height) {
        tree->root = NULL;
        tree->height = 0;
        return;
    }
    path->step[level].inner->size -= 1;
    for (unsigned above = level + 1; above <= tree->height; ++above) {
        path->step[above].inner->count[path->step[above].at] -= 1;
    }
}

static void collapse_root(ostree *tree) {
    while (tree->height > 0 && tree->root->inner.size == 1) {
        ostree_node *root = tree->root;
        tree->root = root->inner.child[0];
        tree->height -= 1;
        pool_give(tree, root);
    }
}

/* Whether all nodes stayed in their places. */
static bool erase_from_leaf(ostree *tree, const struct path *path, size_t at) {
    double *keys = path->leaf->keys;
    const size_t size = leaf_size(tree, path);
    tree->size -= 1;
    if (size == 1 && (tree->height == 0 || path->step[1].inner->size == 1)) {
        drop_right_edge(tree, path);
        collapse_root(tree);
        return false;
    }
    memmove(keys + at, keys + at + 1, (size - at - 1) * sizeof *keys);
    double min = keys[0];
    for (unsigned level = 1; level <= tree->height; ++level) {
        ostree_inner *inner = path->step[level].inner;
        const size_t entry = path->step[level].at;
        inner->count[entry] -= 1;
        inner->min[entry] = min;
        min = inner->min[0];
    }
    bool same_nodes = true;
    for (unsigned level = 0; level < tree->height; ++level) {
        ostree_inner *parent = path->step[level + 1].inner;
        const size_t entry = path->step[level + 1].at;
        const size_t capacity = capacity_at(level);
        if (child_size(parent, entry, level) >= capacity / 2 || parent->size == 1) break;
        same_nodes = false;
        const size_t left = entry > 0 ? entry - 1 : 0;
        if (child_size(parent, left, level) + child_size(parent, left + 1, level) > capacity) {
            deal(tree, parent, level, left, 2, 2);
            break;
        }
        deal(tree, parent, level, left, 2, 1);
    }
    collapse_root(tree);
    return same_nodes;
}

size_t autoclip_tree_erase(ostree *tree, const double *keys, size_t count) {
    struct path paths[TOGETHER];
    size_t done = 0;
    while (done < count && tree->root != NULL) {
        const size_t group = count - done < TOGETHER ? count - done : TOGETHER;
        descend(tree, keys + done, group, paths);
        bool same_nodes = true;
        for (size_t i = 0; i < group && same_nodes; ++i, ++done) {
            const size_t after = upper_bound(paths[i].leaf->keys, leaf_size(tree, &paths[i]), keys[done]);
            if (after == 0 || paths[i].leaf->keys[after - 1] != keys[done]) {
                if (i == 0) return done;
                break; /* the last of several equal keys has left this leaf: descend again */
            }
            same_nodes = erase_from_leaf(tree, &paths[i], after - 1);
        }
    }
    return done;
}

/* --- Build ------------------------------------------------------------------------------------------------------ */

/* A subtree on `level` with `size` keys, all children full but the last. Nodes have been reserved. */
static ostree_node *build_node(ostree *tree, unsigned level, uint64_t capacity_below, uint64_t size,
                               ostree_reader *read, void *source, bool *sound) {
    ostree_node *node = pool_take(tree);
    if (level == 0) {
        *sound = *sound && read(source, node->keys, (size_t)size);
        return node;
    }
    const uint64_t next_capacity = level == 1 ? 1 : capacity_below / OSTREE_FANOUT;
    size_t at = 0;
    for (uint64_t left = size; left > 0 && *sound; ++at) {
        const uint64_t part = left < capacity_below ? left : capacity_below;
        ostree_node *child = build_node(tree, level - 1, next_capacity, part, read, source, sound);
        node->inner.child[at] = child;
        node->inner.count[at] = part;
        node->inner.min[at] = level == 1 ? child->keys[0] : child->inner.min[0];
        left -= part;
    }
    node->inner.size = at;
    return node;
}

autoclip_status autoclip_tree_build(ostree *tree, uint64_t size, ostree_reader *read, void *source) {
    if (size == 0) return AUTOCLIP_OK;
    unsigned height = 0;
    uint64_t capacity = OSTREE_LEAF;
    uint64_t capacity_below = 1;
    uint64_t nodes = 0;
    for (uint64_t on_level = (size - 1) / OSTREE_LEAF + 1;; on_level = (on_level - 1) / OSTREE_FANOUT + 1) {
        nodes += on_level;
        if (on_level == 1) break;
        height += 1;
        capacity_below = capacity;
        capacity *= OSTREE_FANOUT;
    }
    if (!pool_reserve(tree, nodes)) return AUTOCLIP_NO_MEMORY;
    bool sound = true;
    tree->root = build_node(tree, height, capacity_below, size, read, source, &sound);
    tree->height = height;
    tree->size = size;
    if (sound) return AUTOCLIP_OK;
    autoclip_tree_clear(tree);
    return AUTOCLIP_BAD_SNAPSHOT;
}

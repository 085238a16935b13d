/* autoclip.h - an exact, growing history of norms that answers any percentile at any time.
 *
 * AutoClip (Seetharaman, Wichern, Pardo, Le Roux, MLSP 2020, arXiv:2007.14469) clips a gradient to the p-th percentile
 * of all gradient norms seen so far. This library keeps those norms and answers that percentile, bit for bit as
 * numpy.percentile(norms, p) would, in O(log n) per norm and about ten bytes of memory per norm.
 *
 * A history is a multiset of finite doubles in two parts, both sorted:
 *
 *      push x
 *        |
 *        v
 *     buffer  [ 0.3  0.9  1.1 ]         a small sorted array: the norms that have not reached the tree yet
 *        |
 *        |  when it is full: all of it at once, in order, the leaves being fetched from memory side by side
 *        v
 *      tree                 [ 0.1:5 | 1.2:4 ]               inner node: smallest norm and number of norms
 *                            /             \                below each child
 *               [ 0.1:2 | 0.7:3 ]       [ 1.2:2 | 2.5:2 ]
 *                 /          \            /          \
 *            [0.1 0.4]  [0.7 0.8 1.0]  [1.2 2.0]  [2.5 7.1]  leaves: sorted norms, nothing else
 *
 * Every answer is that of the union of the two. With a window of N the history also keeps the last N norms in the order
 * in which they came, and the oldest leaves when a new one enters.
 *
 * Contract
 *   - A call that does not return AUTOCLIP_OK has changed nothing that can be observed, running out of memory included;
 *     results are written only on AUTOCLIP_OK.
 *   - Any finite double may be stored; NaN and infinities are refused, and -0.0 is stored as 0.0. Ranks count from 0:
 *     select(rank) is the norm with exactly `rank` norms before it in ascending order, and rank(norm) is the number of
 *     stored norms below `norm`.
 *   - A percentile is a number from 0 to 100. Between two norms it is interpolated linearly, as numpy does by default.
 *   - All memory comes from the allocator given at creation and goes back to it. No function reads or writes global
 *     state, except the autoclip_shared_* functions, which say so.
 *   - autoclip_history_*: one thread at a time per history; different histories are independent. A query may move a
 *     cursor inside the history, so two queries at once are not allowed either. autoclip_shared_*: any thread.
 *   - Pointers must not be NULL unless a function says otherwise; a count of 0 allows a NULL array.
 *   - n below is the number of stored norms; times are amortised where many norms move at once.
 *   - Results do not depend on the platform: the same norms give the same bits and the same snapshot everywhere, also in a
 *     thread that flushes subnormal numbers to zero. -ffast-math and its parts are refused when the library is compiled.
 *   - No call needs more than 64 KiB of stack.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_H
#define AUTOCLIP_H

#include <stddef.h>
#include <stdint.h>

/* The version of this header. The one place where the version of the whole project is written. */
#define AUTOCLIP_VERSION_MAJOR 0
#define AUTOCLIP_VERSION_MINOR 2
#define AUTOCLIP_VERSION_PATCH 0

/* Grows by one with every change that breaks programs linked against an earlier library; it is the SONAME. */
#define AUTOCLIP_ABI_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif
#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

/* [declarations: everything up to the closing mark is also read by ffi_build.py, so plain C only] */

typedef enum autoclip_status {
    AUTOCLIP_OK = 0,
    AUTOCLIP_NO_MEMORY = 1,      /* the allocator returned NULL */
    AUTOCLIP_NOT_FINITE = 2,     /* a norm is NaN or infinite */
    AUTOCLIP_BAD_PERCENTILE = 3, /* a percentile is NaN or outside [0, 100] */
    AUTOCLIP_EMPTY = 4,          /* an empty history has no percentile */
    AUTOCLIP_BAD_RANK = 5,       /* a rank is not below the number of stored norms */
    AUTOCLIP_HAS_WINDOW = 6,     /* a history with a window has no defined order of age after a merge */
    AUTOCLIP_TOO_SMALL = 7,      /* the caller's array cannot hold the result */
    AUTOCLIP_BAD_SNAPSHOT = 8,   /* not a snapshot, or a damaged one */
    AUTOCLIP_NEW_SNAPSHOT = 9,   /* a sound snapshot of a format that this release does not know */
    AUTOCLIP_NO_HISTORY = 10,    /* no shared history has this id (any more) */
    AUTOCLIP_BROKEN = 11,        /* an invariant does not hold: memory was overwritten, or there is a bug */
    AUTOCLIP_NO_WINDOW = 12,     /* a history without a window does not know the age of its norms */
    AUTOCLIP_WRONG_STEP = 13     /* a step that does not follow from those taken before */
} autoclip_status;

/* Where memory comes from. `allocate` returns NULL when there is none left, else a block aligned for any type;
 * `release` gets back a block with the size it was asked for. Both get `context`. `size` is sizeof(autoclip_allocator);
 * 0 means these four members. A later release may add members at the end, and reads those that `size` covers. */
typedef struct autoclip_allocator {
    void *(*allocate)(void *context, size_t size);
    void (*release)(void *context, void *block, size_t size);
    void *context;
    size_t size;
} autoclip_allocator;

typedef struct autoclip_history autoclip_history;

/* --- Life ------------------------------------------------------------------------------------------------------- */

/* Make an empty history: of every norm if `window` is 0, else of the last `window` norms. The allocator is copied; NULL
 * means malloc and free. The caller owns the history. O(1). */
autoclip_status autoclip_history_create(uint64_t window, const autoclip_allocator *allocator,
                                        autoclip_history **history);

/* Give back the history and all its memory; NULL is allowed. O(n / chunk), a few hundred blocks at most. */
void autoclip_history_destroy(autoclip_history *history);

/* Forget every norm and give back their memory; the window stays. */
void autoclip_history_clear(autoclip_history *history);

/* Make an independent history with the same norms, window and allocator. O(n). */
autoclip_status autoclip_history_clone(const autoclip_history *history, autoclip_history **clone);

/* --- Facts ------------------------------------------------------------------------------------------------------ */

/* The number of stored norms. O(1). */
uint64_t autoclip_history_size(const autoclip_history *history);

/* The window given at creation, 0 if there is none. O(1). */
uint64_t autoclip_history_window(const autoclip_history *history);

/* All bytes held from the allocator, the handle included. O(1). */
uint64_t autoclip_history_memory(const autoclip_history *history);

/* --- Remember --------------------------------------------------------------------------------------------------- */

/* Remember one norm; in a full window the oldest leaves. O(log n). */
autoclip_status autoclip_history_push(autoclip_history *history, double norm);

/* Remember `count` norms, in the order in which they came; all of them or, on failure, none. Input that is already
 * ascending is not sorted again. O(count log n), and O(n + count) when count is a fair part of n. */
autoclip_status autoclip_history_extend(autoclip_history *history, const double *norms, size_t count);

/* Remember the norm, then find the percentile: one step of AutoClip in one call. O(log n). */
autoclip_status autoclip_history_observe(autoclip_history *history, double norm, double percentile, double *threshold);

/* Observe `count` norms at `percentile_count` percentiles each: thresholds[i * percentile_count + j] is percentile j of
 * the history after norm i. All or nothing. O(count * percentile_count * log n). */
autoclip_status autoclip_history_observe_many(autoclip_history *history, const double *norms, size_t count,
                                              const double *percentiles, size_t percentile_count, double *thresholds);

/* Remember every norm of `other` too, which may be the history itself and may have a window; the history may not.
 * O(n + m). */
autoclip_status autoclip_history_merge(autoclip_history *history, const autoclip_history *other);

/* --- Ask -------------------------------------------------------------------------------------------------------- */

/* The percentile of the stored norms. O(log n), and O(1) near the rank that was asked last. */
autoclip_status autoclip_history_percentile(autoclip_history *history, double percentile, double *threshold);

/* The norm with `rank` norms before it in ascending order. O(log n). */
autoclip_status autoclip_history_select(autoclip_history *history, uint64_t rank, double *norm);

/* The number of stored norms below `norm`, which may be infinite but not NaN. O(log n). */
autoclip_status autoclip_history_rank(const autoclip_history *history, double norm, uint64_t *rank);

/* The `count` norms of ranks first, first + 1, ... in ascending order. O(log n + count). */
autoclip_status autoclip_history_order_statistics(autoclip_history *history, uint64_t first, size_t count,
                                                  double *norms);

/* The `count` norms that leave a window first, the oldest one first, be the window full or not. O(count). */
autoclip_status autoclip_history_oldest(const autoclip_history *history, size_t count, double *norms);

/* Every norm in ascending order, and how many there are. AUTOCLIP_TOO_SMALL if `capacity` is below that. O(n). */
autoclip_status autoclip_history_values(autoclip_history *history, double *norms, size_t capacity, size_t *count);

/* --- Save and load ---------------------------------------------------------------------------------------------- */

/* Snapshot, little-endian: a header, the norms as float64 (ascending for a full history, oldest first for a window), and
 * a checksum.
 *
 *    offset  size  content
 *         0     8  magic: 89 41 43 48 0D 0A 1A 0A ("\x89ACH\r\n\x1a\n": a text-mode copy damages it)
 *         8     2  format major, 1
 *        10     2  format minor, 0
 *        12     4  header length h, 64
 *        16     8  flags: bit 0 = has a window; all others 0
 *        24     8  number of norms
 *        32     8  window, 0 if none
 *        40    16  0
 *        56     8  checksum (XXH64, seed 0) of the 56 bytes before it
 *         h   8 n  norms
 *   h + 8 n     8  checksum (XXH64, seed 0) of all bytes from 64 on
 *
 * The format grows as follows, and this release reads what grows so.
 *   - A greater major may change anything: AUTOCLIP_NEW_SNAPSHOT.
 *   - A greater minor may make the header longer, by multiples of 8 bytes after byte 64, use the 16 bytes at 40, and set
 *     flags. What a reader does not know it ignores, and does not write again; but the flags of bits 1 to 31 are for what
 *     no reader may ignore: one that is not known is AUTOCLIP_NEW_SNAPSHOT.
 *   - What minor 0 does not use is 0 in a snapshot of minor 0, or it is damaged. */

/* The size in bytes of a snapshot of this history. O(1). */
size_t autoclip_history_save_size(const autoclip_history *history);

/* Write a snapshot, and its size. AUTOCLIP_TOO_SMALL if `capacity` is below that. O(n). */
autoclip_status autoclip_history_save(autoclip_history *history, void *bytes, size_t capacity, size_t *size);

/* Make a history from exactly the `size` bytes of a snapshot, which may come from an untrusted source. The caller owns
 * the history. O(n). */
autoclip_status autoclip_history_load(const void *bytes, size_t size, const autoclip_allocator *allocator,
                                      autoclip_history **history);

/* --- Trust ------------------------------------------------------------------------------------------------------ */

/* Test every invariant. AUTOCLIP_BROKEN names the first broken one in `reason`, a constant string that is always
 * written: "" when all hold. O(n). */
autoclip_status autoclip_history_check(const autoclip_history *history, const char **reason);

/* One English sentence on a status; never NULL. */
const char *autoclip_status_message(autoclip_status status);

/* The version of the library at run time: "MAJOR.MINOR.PATCH". */
const char *autoclip_version(void);

/* AUTOCLIP_ABI_VERSION of the library at run time. */
uint32_t autoclip_abi_version(void);

/* How the library was built, for a bug report: "gcc 12.2.0, optimised, 64-bit". */
const char *autoclip_build(void);

/* --- Shared histories ------------------------------------------------------------------------------------------- */

/* A history that several threads and several languages hold at once: it has a lock, lives in the one table of the
 * process, and goes by an id. An id is never 0 and never used again; that of another process is not known here, but by
 * chance. Each function locks, does what its autoclip_history_* namesake does, and unlocks; AUTOCLIP_NO_HISTORY if the
 * id is unknown. After fork() the child has its own copies. */

autoclip_status autoclip_shared_create(uint64_t window, uint64_t *id);
autoclip_status autoclip_shared_load(const void *bytes, size_t size, uint64_t *id);
autoclip_status autoclip_shared_clone(uint64_t id, uint64_t *clone);
autoclip_status autoclip_shared_destroy(uint64_t id);
autoclip_status autoclip_shared_clear(uint64_t id);
autoclip_status autoclip_shared_size(uint64_t id, uint64_t *size);
autoclip_status autoclip_shared_window(uint64_t id, uint64_t *window);
autoclip_status autoclip_shared_memory(uint64_t id, uint64_t *bytes);
autoclip_status autoclip_shared_push(uint64_t id, double norm);
autoclip_status autoclip_shared_extend(uint64_t id, const double *norms, size_t count);
autoclip_status autoclip_shared_observe(uint64_t id, double norm, double percentile, double *threshold);
autoclip_status autoclip_shared_observe_many(uint64_t id, const double *norms, size_t count, const double *percentiles,
                                             size_t percentile_count, double *thresholds);
autoclip_status autoclip_shared_merge(uint64_t id, uint64_t other);
autoclip_status autoclip_shared_percentile(uint64_t id, double percentile, double *threshold);
autoclip_status autoclip_shared_select(uint64_t id, uint64_t rank, double *norm);
autoclip_status autoclip_shared_rank(uint64_t id, double norm, uint64_t *rank);
autoclip_status autoclip_shared_order_statistics(uint64_t id, uint64_t first, size_t count, double *norms);
autoclip_status autoclip_shared_oldest(uint64_t id, size_t count, double *norms);
autoclip_status autoclip_shared_values(uint64_t id, double *norms, size_t capacity, size_t *count);
autoclip_status autoclip_shared_save_size(uint64_t id, size_t *size);
autoclip_status autoclip_shared_save(uint64_t id, void *bytes, size_t capacity, size_t *size);
autoclip_status autoclip_shared_check(uint64_t id, const char **reason);

/* Observe a norm as step `step` of a run, for programs whose state is a value: replicas take a step side by side, a step
 * may be computed again, and its outcome may be thrown away. `previous` is the norm of the step before in that state;
 * at step 0 it is not looked at. A resumed run comes with its history: the first step may have any number up to that of
 * the stored norms, if `previous` is one of them. From then on steps follow one another, each from the `previous` it
 * names. A step taken again with the same norm and percentile (one of the last 4,096) gets its threshold again and is
 * remembered once. The latest step taken again with another norm, from the same `previous`, gets the threshold that is
 * its due; the history holds the norm that came first, until a step goes on from another (not in a window). All else is
 * AUTOCLIP_WRONG_STEP. autoclip_shared_clear forgets the steps too. O(log n). */
autoclip_status autoclip_shared_observe_step(uint64_t id, uint64_t step, double previous, double norm,
                                             double percentile, double *threshold);

/* Find the percentile at one point of such a run: after `step` steps, the latest of which had the norm `previous`, which
 * the history holds from then on if it held another outcome of that step. AUTOCLIP_EMPTY if nothing had been remembered.
 * O(log n). */
autoclip_status autoclip_shared_percentile_step(uint64_t id, uint64_t step, double previous, double percentile,
                                                double *threshold);

/* [end of declarations] */

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#ifdef __cplusplus
}
#endif

#endif /* AUTOCLIP_H */

/* Histories for several threads and several languages: a lock each, and one table for the whole process.
 *
 * Python, JAX and TensorFlow reach a history by its id, through interfaces and from threads of their own, and all must
 * find this one table: never link a second copy of this file into another shared object of the process.
 *
 * An id is a place in the table and the generation of that place, so that the id of a destroyed history stays unknown
 * for ever. Generations begin at random: a compiled program that was saved holds an id, and in a later process it must
 * meet no history, rather than another one. Places never move: block b holds FIRST_BLOCK * 2^b of them, so a lookup
 * needs no lock of the table.
 *
 * SPDX-License-Identifier: MIT */
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

#include "history.h"
#include "percentile.h"

/* --- A lock ----------------------------------------------------------------------------------------------------- */

#if defined(_WIN32)
#include <windows.h>
typedef SRWLOCK lock_type;
#define LOCK_INITIALIZER SRWLOCK_INIT
static void lock_init(lock_type *lock) { InitializeSRWLock(lock); }
static void lock_acquire(lock_type *lock) { AcquireSRWLockExclusive(lock); }
static void lock_release(lock_type *lock) { ReleaseSRWLockExclusive(lock); }
#else
#include <pthread.h>
typedef pthread_mutex_t lock_type;
#define LOCK_INITIALIZER PTHREAD_MUTEX_INITIALIZER
static void lock_init(lock_type *lock) { (void)pthread_mutex_init(lock, NULL); }
static void lock_acquire(lock_type *lock) { (void)pthread_mutex_lock(lock); }
static void lock_release(lock_type *lock) { (void)pthread_mutex_unlock(lock); }
#endif

/* --- The table -------------------------------------------------------------------------------------------------- */

enum { FIRST_BLOCK = 64, BLOCKS = 26 }; /* all blocks together have fewer than 2^32 places */

/* Replicas that do not wait for each other ask for steps that were taken long ago. */
#ifndef AUTOCLIP_RECENT_STEPS
#define AUTOCLIP_RECENT_STEPS 4096
#endif
enum { RECENT_STEPS = AUTOCLIP_RECENT_STEPS };
/* Outcomes of recent steps from which no run went on, or not yet. */
enum { OTHER_OUTCOMES = 8 };

/* A step as autoclip_shared_observe_step took it. */
struct step {
    uint64_t number;
    double norm;
    double percentile;
    double threshold;
};

enum { STEPS = RECENT_STEPS + OTHER_OUTCOMES };
#define STEPS_SIZE (STEPS * sizeof(struct step))

struct place {
    lock_type lock;
    autoclip_history *history; /* NULL while the place is free */
    uint32_t generation;       /* above 0; the next history here gets the next one */
    uint32_t index;
    struct place *next_free;
    /* For autoclip_shared_observe_step: */
    uint64_t next_step;    /* 0 before the first */
    double norm, previous; /* of the latest step as the history holds it, and of the one before it */
    struct step *recent;   /* NULL before the first: steps as the history holds them, each by its number; then others */
    uint32_t next_other;
};

static struct {
    lock_type lock; /* guards what follows, but for reading what is atomic */
    _Atomic(struct place *) blocks[BLOCKS];
    uint32_t block_count;
    uint32_t block_used;          /* places ever used in the newest block */
    _Atomic uint32_t place_count; /* places ever used */
    struct place *free_places;
    bool follows_forks;
    uint32_t first_generation; /* 0 before the first history */
} table = {.lock = LOCK_INITIALIZER};

static uint32_t block_size(uint32_t block) { return (uint32_t)FIRST_BLOCK << block; }

static struct place *place_at(uint32_t index) {
    uint32_t block = 0;
    for (; index >= block_size(block); ++block) index -= block_size(block);
    return atomic_load_explicit(&table.blocks[block], memory_order_acquire) + index;
}

/* The place of this id, locked; NULL if the id is unknown. */
static struct place *acquire(uint64_t id) {
    const uint32_t index = (uint32_t)id;
    /* Nobody may lock a place that was never used: a fork would not see that. */
    if (index >= atomic_load_explicit(&table.place_count, memory_order_acquire)) return NULL;
    struct place *place = place_at(index);
    lock_acquire(&place->lock);
    if (place->history != NULL && place->generation == id >> 32) return place;
    lock_release(&place->lock);
    return NULL;
}

#if !defined(_WIN32)
/* A child of fork() has one thread, and every lock that another thread held at that moment would stay locked there for
 * ever: so hold them all while forking. Locks of several places are always taken in ascending order. */
static void before_fork(void) {
    lock_acquire(&table.lock);
    for (uint32_t index = 0; index < table.place_count; ++index) lock_acquire(&place_at(index)->lock);
}

static void after_fork(void) {
    for (uint32_t index = 0; index < table.place_count; ++index) lock_release(&place_at(index)->lock);
    lock_release(&table.lock);
}

static bool follow_forks(void) { return pthread_atfork(before_fork, after_fork, after_fork) == 0; }
#else
static bool follow_forks(void) { return true; }
#endif

/* A free place, the table being locked; NULL when there is no memory. */
static struct place *take_place(void) {
    if (table.free_places != NULL) {
        struct place *place = table.free_places;
        table.free_places = place->next_free;
        return place;
    }
    if (table.block_count == 0 || table.block_used == block_size(table.block_count - 1)) {
        if (table.block_count == BLOCKS) return NULL;
        const uint32_t size = block_size(table.block_count);
        struct place *places = autoclip_memory_default_allocate(NULL, size * sizeof *places);
        if (places == NULL) return NULL;
        for (uint32_t i = 0; i < size; ++i) {
            places[i] = (struct place){.generation = table.first_generation, .index = table.place_count + i};
            lock_init(&places[i].lock);
        }
        atomic_store_explicit(&table.blocks[table.block_count], places, memory_order_release);
        table.block_count += 1;
        table.block_used = 0;
    }
    table.block_used += 1;
    return place_at(table.place_count++);
}

/* A number that another process does not draw as well: where the system has put this one, and when. */
static uint32_t draw_generation(void) {
    uint64_t drawn = (uint64_t)time(NULL) << 20 ^ (uint64_t)clock() ^ (uint64_t)(uintptr_t)&drawn;
#if defined(TIME_UTC)
    struct timespec now = {0};
    if (timespec_get(&now, TIME_UTC) == TIME_UTC) drawn ^= (uint64_t)now.tv_nsec << 32;
#endif
    drawn ^= (uint64_t)(uintptr_t)&table << 16;
    for (int i = 0; i < 2; ++i) { /* every bit has a say in those that are taken */
        drawn *= UINT64_C(0x9E3779B97F4A7C15);
        drawn ^= drawn >> 32;
    }
    return 1 + (uint32_t)drawn % (1U << 30); /* and half of all generations are left for each place */
}

static void forget_steps(struct place *place) {
    autoclip_memory_default_release(NULL, place->recent, STEPS_SIZE);
    place->recent = NULL;
    place->next_step = 0;
}

/* Give a history, which the table then owns, an id. */
static autoclip_status publish(autoclip_history *history, uint64_t *id) {
    lock_acquire(&table.lock);
    if (!table.follows_forks) table.follows_forks = follow_forks();
    if (table.first_generation == 0) table.first_generation = draw_generation();
    struct place *place = table.follows_forks ? take_place() : NULL;
    lock_release(&table.lock);
    if (place == NULL) {
        autoclip_history_destroy(history);
        return AUTOCLIP_NO_MEMORY;
    }
    lock_acquire(&place->lock);
    place->history = history;
    *id = (uint64_t)place->generation << 32 | place->index;
    lock_release(&place->lock);
    return AUTOCLIP_OK;
}

/* --- Functions -------------------------------------------------------------------------------------------------- */

autoclip_status autoclip_shared_create(uint64_t window, uint64_t *id) {
    autoclip_history *history;
    const autoclip_status status = autoclip_history_create(window, NULL, &history);
    return status == AUTOCLIP_OK ? publish(history, id) : status;
}

autoclip_status autoclip_shared_load(const void *bytes, size_t size, uint64_t *id) {
    autoclip_history *history;
    const autoclip_status status = autoclip_history_load(bytes, size, NULL, &history);
    return status == AUTOCLIP_OK ? publish(history, id) : status;
}

autoclip_status autoclip_shared_clone(uint64_t id, uint64_t *clone) {
    struct place *place = acquire(id);
    if (place == NULL) return AUTOCLIP_NO_HISTORY;
    autoclip_history *history;
    const autoclip_status status = autoclip_history_clone(place->history, &history);
    lock_release(&place->lock);
    return status == AUTOCLIP_OK ? publish(history, clone) : status;
}

autoclip_status autoclip_shared_destroy(uint64_t id) {
    struct place *place = acquire(id);
    if (place == NULL) return AUTOCLIP_NO_HISTORY;
    autoclip_history *history = place->history;
    place->history = NULL;
    forget_steps(place);
    place->generation += 1;
    const bool reusable = place->generation < INT32_MAX; /* an id fits into a signed integer of 64 bits */
    lock_release(&place->lock);
    autoclip_history_destroy(history);
    if (reusable) {
        lock_acquire(&table.lock);
        place->next_free = table.free_places;
        table.free_places = place;
        lock_release(&table.lock);
    }
    return AUTOCLIP_OK;
}

autoclip_status autoclip_shared_merge(uint64_t id, uint64_t other) {
    const bool id_first = (uint32_t)id < (uint32_t)other;
    struct place *first = acquire(id_first ? id : other);
    if (first == NULL) return AUTOCLIP_NO_HISTORY;
    autoclip_status status = AUTOCLIP_NO_HISTORY;
    if (id == other) {
        status = autoclip_history_merge(first->history, first->history);
    } else if ((uint32_t)id != (uint32_t)other) { /* else: two generations of one place, one of them unknown */
        struct place *second = acquire(id_first ? other : id);
        if (second != NULL) {
            struct place *to = id_first ? first : second;
            struct place *from = id_first ? second : first;
            status = autoclip_history_merge(to->history, from->history);
            lock_release(&second->lock);
        }
    }
    lock_release(&first->lock);
    return status;
}

/* This step with this outcome, if it is known. */
static struct step *find_step(const struct place *place, uint64_t number, double norm) {
    if (place->recent == NULL) return NULL;
    struct step *step = &place->recent[number % RECENT_STEPS];
    if (step->number == number && step->norm == norm) return step;
    for (step = place->recent + RECENT_STEPS; step < place->recent + STEPS; ++step) {
        if (step->number == number && step->norm == norm) return step;
    }
    return NULL;
}

static bool holds(autoclip_history *history, double norm) {
    uint64_t rank;
    double found;
    return autoclip_history_rank(history, norm, &rank) == AUTOCLIP_OK &&
           autoclip_history_select(history, rank, &found) == AUTOCLIP_OK && found == norm;
}

/* Find the percentile of all norms but one equal to `left_out`, which must be there and not be alone. */
static double percentile_without(autoclip_history *history, double left_out, double percentile) {
    const uint64_t size = history_size(history) - 1;
    const double position = percentile_position(size, percentile);
    uint64_t rank = (uint64_t)position;
    const double fraction = position - (double)rank;
    uint64_t gap;
    double low;
    double high;
    (void)autoclip_history_rank(history, left_out, &gap);
    (void)autoclip_history_select(history, rank + (rank >= gap), &low);
    if (rank + 1 < size) rank += 1;
    (void)autoclip_history_select(history, rank + (rank >= gap), &high);
    return percentile_between(low, high, fraction);
}

/* Find out whether a run may go on after `number` steps, the latest of which had the norm `previous`; `replaced` says
 * whether the history holds another outcome of that step. */
static bool follows(const struct place *place, uint64_t number, double previous, bool *replaced) {
    autoclip_history *history = place->history;
    *replaced = false;
    if (place->next_step == 0) {
        if (number > history_size(history)) return false;
        return number == 0 || history->window > 0 || holds(history, previous);
    }
    if (number != place->next_step) return false;
    if (previous == place->norm) return true;
    *replaced = history->window == 0 && find_step(place, number - 1, previous) != NULL;
    return *replaced;
}

/* The history has just taken in `norm`: let it be that of the latest step, in the place of another outcome. */
static void replace_outcome(struct place *place, double norm) {
    struct step *held = &place->recent[(place->next_step - 1) % RECENT_STEPS];
    struct step *kept = find_step(place, place->next_step - 1, norm);
    const struct step other = *held;
    autoclip_history_erase(place->history, place->norm);
    *held = *kept;
    *kept = other;
    place->norm = norm;
}

/* Another outcome of the latest step: the history stays as it is, until a run goes on from this one. */
static autoclip_status observe_other_outcome(struct place *place, struct step *step) {
    autoclip_history *history = place->history;
    if (step->norm == place->norm) return autoclip_history_percentile(history, step->percentile, &step->threshold);
    if (history->window > 0) return AUTOCLIP_WRONG_STEP;
    const autoclip_status status = autoclip_history_push(history, step->norm);
    if (status != AUTOCLIP_OK) return status;
    step->threshold = percentile_without(history, place->norm, step->percentile);
    autoclip_history_erase(history, step->norm);
    struct step *known = find_step(place, step->number, step->norm);
    if (known == NULL) known = &place->recent[RECENT_STEPS + place->next_other++ % OTHER_OUTCOMES];
    *known = *step;
    return AUTOCLIP_OK;
}

static autoclip_status observe_step(struct place *place, struct step *step, double previous) {
    const struct step *known = find_step(place, step->number, step->norm);
    if (known != NULL && known->percentile == step->percentile) {
        step->threshold = known->threshold;
        return AUTOCLIP_OK;
    }
    if (!is_percentile(step->percentile)) return AUTOCLIP_BAD_PERCENTILE;
    if (step->number + 1 == place->next_step && previous == place->previous) return observe_other_outcome(place, step);
    bool replaced;
    if (!follows(place, step->number, previous, &replaced)) return AUTOCLIP_WRONG_STEP;
    if (place->recent == NULL) {
        place->recent = autoclip_memory_default_allocate(NULL, STEPS_SIZE);
        if (place->recent == NULL) return AUTOCLIP_NO_MEMORY;
        for (int i = 0; i < STEPS; ++i) place->recent[i] = (struct step){.number = UINT64_MAX};
    }
    const double norms[2] = {step->norm, previous};
    const autoclip_status status = autoclip_history_extend(place->history, norms, replaced ? 2 : 1);
    if (status != AUTOCLIP_OK) return status;
    if (replaced) replace_outcome(place, previous);
    (void)autoclip_history_percentile(place->history, step->percentile, &step->threshold);
    place->recent[step->number % RECENT_STEPS] = *step;
    place->next_step = step->number + 1;
    place->previous = previous;
    place->norm = step->norm;
    return AUTOCLIP_OK;
}

autoclip_status autoclip_shared_observe_step(uint64_t id, uint64_t step, double previous, double norm,
                                             double percentile, double *threshold) {
    struct place *place = acquire(id);
    if (place == NULL) return AUTOCLIP_NO_HISTORY;
    struct step taken = {.number = step, .norm = norm, .percentile = percentile};
    const float_mode mode = float_mode_enter();
    const autoclip_status status = observe_step(place, &taken, previous);
    float_mode_leave(mode);
    lock_release(&place->lock);
    if (status == AUTOCLIP_OK) *threshold = taken.threshold;
    return status;
}

autoclip_status autoclip_shared_percentile_step(uint64_t id, uint64_t step, double previous, double percentile,
                                                double *threshold) {
    struct place *place = acquire(id);
    if (place == NULL) return AUTOCLIP_NO_HISTORY;
    const float_mode mode = float_mode_enter();
    autoclip_history *history = place->history;
    autoclip_status status = AUTOCLIP_OK;
    bool replaced;
    const struct step *known = step > 0 ? find_step(place, step - 1, previous) : NULL;
    if (!is_percentile(percentile)) {
        status = AUTOCLIP_BAD_PERCENTILE;
    } else if (follows(place, step, previous, &replaced)) {
        if (replaced) {
            status = autoclip_history_push(history, previous);
            if (status == AUTOCLIP_OK) replace_outcome(place, previous);
        }
        if (status == AUTOCLIP_OK) status = autoclip_history_percentile(history, percentile, threshold);
    } else if (known != NULL && known->percentile == percentile) {
        *threshold = known->threshold;
    } else if (step + 1 == place->next_step && previous == place->previous && history->window == 0) {
        if (history_size(history) > 1) {
            *threshold = percentile_without(history, place->norm, percentile);
        } else {
            status = AUTOCLIP_EMPTY;
        }
    } else {
        status = AUTOCLIP_WRONG_STEP;
    }
    float_mode_leave(mode);
    lock_release(&place->lock);
    return status;
}

/* Every other function is the same: lock, call, unlock. */
#define LOCKED(name, parameters, call)                                                                                 \
    autoclip_status autoclip_shared_##name parameters {                                                                \
        struct place *place = acquire(id);                                                                             \
        if (place == NULL) return AUTOCLIP_NO_HISTORY;                                                                 \
        autoclip_history *history = place->history;                                                                    \
        autoclip_status status = AUTOCLIP_OK;                                                                          \
        call;                                                                                                          \
        lock_release(&place->lock);                                                                                    \
        return status;                                                                                                 \
    }

LOCKED(clear, (uint64_t id), autoclip_history_clear(history); forget_steps(place))
LOCKED(size, (uint64_t id, uint64_t *size), *size = autoclip_history_size(history))
LOCKED(window, (uint64_t id, uint64_t *window), *window = autoclip_history_window(history))
LOCKED(memory, (uint64_t id, uint64_t *bytes),
       *bytes = autoclip_history_memory(history) + (place->recent != NULL ? STEPS_SIZE : 0))
LOCKED(push, (uint64_t id, double norm), status = autoclip_history_push(history, norm))
LOCKED(extend, (uint64_t id, const double *norms, size_t count),
       status = autoclip_history_extend(history, norms, count))
LOCKED(observe, (uint64_t id, double norm, double percentile, double *threshold),
       status = autoclip_history_observe(history, norm, percentile, threshold))
LOCKED(observe_many,
       (uint64_t id, const double *norms, size_t count, const double *percentiles, size_t percentile_count,
        double *thresholds),
       status = autoclip_history_observe_many(history, norms, count, percentiles, percentile_count, thresholds))
LOCKED(percentile, (uint64_t id, double percentile, double *threshold),
       status = autoclip_history_percentile(history, percentile, threshold))
LOCKED(select, (uint64_t id, uint64_t rank, double *norm), status = autoclip_history_select(history, rank, norm))
LOCKED(rank, (uint64_t id, double norm, uint64_t *rank), status = autoclip_history_rank(history, norm, rank))
LOCKED(order_statistics, (uint64_t id, uint64_t first, size_t count, double *norms),
       status = autoclip_history_order_statistics(history, first, count, norms))
LOCKED(oldest, (uint64_t id, size_t count, double *norms), status = autoclip_history_oldest(history, count, norms))
LOCKED(values, (uint64_t id, double *norms, size_t capacity, size_t *count),
       status = autoclip_history_values(history, norms, capacity, count))
LOCKED(save_size, (uint64_t id, size_t *size), *size = autoclip_history_save_size(history))
LOCKED(save, (uint64_t id, void *bytes, size_t capacity, size_t *size),
       status = autoclip_history_save(history, bytes, capacity, size))
LOCKED(check, (uint64_t id, const char **reason), status = autoclip_history_check(history, reason))

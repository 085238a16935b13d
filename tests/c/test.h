/* What every test of the kernel shares: a checker that aborts with the place and the values, numbers from a fixed seed,
 * and a heap that counts, remembers its blocks and can fail.
 *
 * The tests see the kernel through autoclip.h alone, so that they judge what a user gets and outlive any change of the
 * tree. Each program is built twice, with tiny nodes and with the real ones.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_TEST_H
#define AUTOCLIP_TEST_H

#include "autoclip.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__)
#define TEST_FAILURE __attribute__((format(printf, 4, 5), noreturn))
#else
#define TEST_FAILURE
#endif

/* --- A checker that cannot be ignored --------------------------------------------------------------------------- */

/* Where the test is, for the message of a failure: enough to run that one case again. */
static struct {
    const char *test;
    const char *detail;
    uint64_t seed;
    uint64_t step;
} test_now = {"", "", 0, 0};

/* Abort with a formatted message unless `condition` holds. */
#define REQUIRE(condition, ...) ((condition) ? (void)0 : test_fail(__FILE__, __LINE__, #condition, __VA_ARGS__))

/* Abort unless `call` returns the status `expected`. */
#define REQUIRE_STATUS(expected, call) test_require_status(__FILE__, __LINE__, #call, (expected), (call))
#define REQUIRE_OK(call) REQUIRE_STATUS(AUTOCLIP_OK, call)

/* Abort unless the two doubles have the same bits; any NaN equals any other. */
#define REQUIRE_SAME(expected, actual) test_require_same(__FILE__, __LINE__, #actual, (expected), (actual))

TEST_FAILURE
static inline void test_fail(const char *file, int line, const char *what, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s:%d: %s does not hold: ", file, line, what);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n  in %s (%s), seed %" PRIu64 ", step %" PRIu64 "\n", test_now.test, test_now.detail,
            test_now.seed, test_now.step);
    va_end(arguments);
    fflush(stderr);
    abort();
}

static inline void test_require_status(const char *file, int line, const char *call, autoclip_status expected,
                                       autoclip_status actual) {
    if (actual != expected) {
        test_fail(file, line, call, "status is %d (%s) but should be %d (%s)", (int)actual,
                  autoclip_status_message(actual), (int)expected, autoclip_status_message(expected));
    }
}

static inline uint64_t test_bits(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline bool test_same(double first, double second) {
    return test_bits(first) == test_bits(second) || (isnan(first) && isnan(second));
}

static inline void test_require_same(const char *file, int line, const char *what, double expected, double actual) {
    if (!test_same(expected, actual)) {
        test_fail(file, line, what, "it is %a (%.17g) but should be %a (%.17g)", actual, actual, expected, expected);
    }
}

/* --- Numbers from a seed (splitmix64: Steele, Lea, Flood, OOPSLA 2014) ------------------------------------------ */

static inline uint64_t test_random(uint64_t *state) {
    uint64_t mixed = (*state += UINT64_C(0x9E3779B97F4A7C15));
    mixed = (mixed ^ (mixed >> 30)) * UINT64_C(0xBF58476D1CE4E5B9);
    mixed = (mixed ^ (mixed >> 27)) * UINT64_C(0x94D049BB133111EB);
    return mixed ^ (mixed >> 31);
}

/* Uniform in [0, 1). */
static inline double test_uniform(uint64_t *state) { return (double)(test_random(state) >> 11) * 0x1p-53; }

/* An exact block of memory, so that a sanitizer sees one byte too many; its bytes are a sentinel. */
static inline void *test_block(size_t size) {
    void *block = malloc(size > 0 ? size : 1);
    REQUIRE(block != NULL, "the test itself is out of memory (%zu bytes)", size);
    memset(block, 0xC7, size);
    return block;
}

/* --- A heap that counts and fails -------------------------------------------------------------------------------- */

typedef struct heap_block {
    unsigned char *address;
    size_t size;
} heap_block;

typedef struct heap {
    autoclip_allocator allocator; /* hand this to the kernel */
    heap_block *blocks;           /* what the kernel holds */
    size_t count;
    size_t capacity;
    uint64_t bytes;      /* the sum of their sizes */
    uint64_t requests;   /* allocations since the heap was armed */
    uint64_t fail_at;    /* refuse the request of this number; 0 refuses none */
    bool fail_onwards;   /* refuse every later one too */
    uint64_t faults;     /* requests refused since the heap was armed */
    uint64_t all_faults; /* requests refused in its life */
} heap;

static inline void *heap_allocate(void *context, size_t size) {
    heap *own = context;
    own->requests += 1;
    REQUIRE(size > 0, "the kernel asked for an empty block, which malloc may answer with NULL");
    if (own->fail_at != 0 && (own->requests == own->fail_at || (own->fail_onwards && own->requests > own->fail_at))) {
        own->faults += 1;
        own->all_faults += 1;
        return NULL;
    }
    if (own->count == own->capacity) {
        own->capacity = own->capacity == 0 ? 64 : 2 * own->capacity;
        own->blocks = realloc(own->blocks, own->capacity * sizeof *own->blocks);
        REQUIRE(own->blocks != NULL, "the test itself is out of memory");
    }
    unsigned char *address = malloc(size);
    if (address != NULL) {
        memset(address, 0xA5, size); /* nobody may count on zeros */
        own->blocks[own->count++] = (heap_block){address, size};
        own->bytes += size;
    }
    return address;
}

static inline void heap_release(void *context, void *address, size_t size) {
    heap *own = context;
    size_t at = own->count;
    while (at > 0 && own->blocks[at - 1].address != address) at -= 1;
    REQUIRE(at > 0, "the kernel released %p (%zu bytes), which it does not hold", address, size);
    REQUIRE(own->blocks[at - 1].size == size, "the kernel released %zu bytes as %zu", own->blocks[at - 1].size, size);
    memset(address, 0xDD, size);
    free(address);
    own->blocks[at - 1] = own->blocks[--own->count];
    own->bytes -= size;
}

static inline void heap_create(heap *own) {
    memset(own, 0, sizeof *own);
    own->allocator.allocate = heap_allocate;
    own->allocator.release = heap_release;
    own->allocator.context = own;
}

/* Refuse the `at`-th allocation from now, and every later one if `onwards`. */
static inline void heap_arm(heap *own, uint64_t at, bool onwards) {
    own->requests = 0;
    own->faults = 0;
    own->fail_at = at;
    own->fail_onwards = onwards;
}

static inline void heap_disarm(heap *own) {
    own->fail_at = 0;
    own->fail_onwards = false;
}

/* Every byte must have come back. */
static inline void heap_destroy(heap *own) {
    REQUIRE(own->bytes == 0 && own->count == 0, "%" PRIu64 " bytes in %zu blocks leaked", own->bytes, own->count);
    free(own->blocks);
    memset(own, 0, sizeof *own);
}

/* --- Running ------------------------------------------------------------------------------------------------------ */

typedef struct test_case {
    const char *name;
    void (*run)(void);
} test_case;

#define TEST(function) {#function, function}

/* Run all tests, or those whose names contain the first argument. */
static inline int test_main(const test_case *tests, size_t count, int argc, char **argv) {
    size_t ran = 0;
    for (size_t i = 0; i < count; ++i) {
        if (argc > 1 && strstr(tests[i].name, argv[1]) == NULL) continue;
        memset(&test_now, 0, sizeof test_now);
        test_now.test = tests[i].name;
        test_now.detail = "";
        printf("%s\n", tests[i].name);
        fflush(stdout);
        tests[i].run();
        ran += 1;
    }
    REQUIRE(ran > 0, "no test is named like '%s'", argc > 1 ? argv[1] : "");
    printf("%zu passed\n", ran);
    return EXIT_SUCCESS;
}

#define TEST_MAIN(...)                                                                                                 \
    int main(int argc, char **argv) {                                                                                  \
        const test_case tests[] = {__VA_ARGS__};                                                                       \
        return test_main(tests, sizeof tests / sizeof *tests, argc, argv);                                             \
    }                                                                                                                  \
    typedef int test_main_needs_a_semicolon

#endif /* AUTOCLIP_TEST_H */

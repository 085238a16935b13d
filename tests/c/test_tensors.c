/* Norms of tensors, judged by long double; their scaling, and what they are
 * known by, by every bit.
 *
 * SPDX-License-Identifier: MIT */
#include "test.h"

#include <float.h>

#include "../../csrc/arrays/tensors.h"
#include "../../csrc/src/float_mode.h"

enum { SIZES = 70 }; /* beyond two rounds of all lanes, with every rest */

static double near(double left, double right) { return fabs(left - right) / right; }

static uint64_t address_of(const void *memory) { return (uint64_t)(uintptr_t)memory; }

static double measure(const void *memory, uint64_t size, size_t width) {
    const uint64_t address = address_of(memory);
    double norm = -1.0;
    REQUIRE(autoclip_tensors_measure(&address, &size, 1, width, &norm) == 1, "address %p", memory);
    return norm;
}

/* Blocks that are exactly as large as the tensor, for the sanitizers. */
static void *block_of(const double *numbers, size_t size, size_t width) {
    void *block = test_block(size * width);
    for (size_t i = 0; i < size; i++) {
        if (width == sizeof(float)) {
            ((float *)block)[i] = (float)numbers[i];
        } else {
            ((double *)block)[i] = numbers[i];
        }
    }
    return block;
}

static void norm_is_that_of_long_double(void) {
    for (size_t width = 4; width <= 8; width += 4) {
        for (size_t size = 0; size <= SIZES; size++) {
            double numbers[SIZES + 1];
            test_now.seed = size;
            uint64_t state = size;
            long double sum = 0;
            for (size_t i = 0; i < size; i++) {
                numbers[i] = (double)(float)((test_uniform(&state) - 0.5) * 1e3);
                sum += (long double)numbers[i] * (long double)numbers[i];
            }
            void *block = block_of(numbers, size, width);
            const double expected = (double)sqrtl(sum);
            const double norm = measure(block, size, width);
            REQUIRE(size == 0 ? norm == 0.0 : near(norm, expected) < 1e-15,
                    "%zu numbers of %zu bytes: %.17g, not %.17g", size, width, norm, expected);
            free(block);
        }
    }
}

static void norm_has_the_range_of_its_numbers(void) {
    static const double of_floats[] = {0x1p-149, 0x1p-126, 1e-23, 1e19, FLT_MAX};
    static const double of_doubles[] = {0x1p-1074, 0x1p-1022, 1e-200, 1e200, 0x1p1020};
    for (size_t i = 0; i < 5; i++) {
        float floats[25];
        double doubles[25];
        for (size_t j = 0; j < 25; j++) {
            floats[j] = (float)of_floats[i];
            doubles[j] = of_doubles[i];
        }
        REQUIRE_SAME(5.0 * (double)(float)of_floats[i], measure(floats, 25, 4));
        REQUIRE(near(measure(doubles, 25, 8), 5.0 * of_doubles[i]) < 1e-15, "%g", of_doubles[i]);
    }
    const double apart[] = {1e-200, 3e200, 4e200};
    REQUIRE(near(measure(apart, 3, 8), 5e200) < 1e-15, "the largest number is not the first");
    const double beyond[] = {DBL_MAX, DBL_MAX};
    REQUIRE_SAME((double)INFINITY, measure(beyond, 2, 8));
}

static void norm_finds_what_is_not_finite(void) {
    static const double bad[] = {(double)NAN, (double)INFINITY, -(double)INFINITY};
    for (size_t width = 4; width <= 8; width += 4) {
        for (size_t at = 0; at < SIZES; at++) {
            for (size_t i = 0; i < 3; i++) {
                double numbers[SIZES] = {0};
                numbers[at] = bad[i];
                void *block = block_of(numbers, SIZES, width);
                const double norm = measure(block, SIZES, width);
                REQUIRE(i == 0 ? isnan(norm) : isinf(norm) && norm > 0, "number %zu is %g, norm %g", at, bad[i], norm);
                free(block);
            }
        }
    }
}

static void norm_of_large_numbers_is_the_same_where_subnormals_are_flushed(void) {
    static const double numbers[] = {0x3p1021, 0x4p1021};
    const float_mode standard = float_mode_get();
    float_mode_set(standard | float_mode_flushes);
    const double norm = measure(numbers, 2, 8);
    float_mode_set(standard);
    REQUIRE_SAME(0x5p1021, norm);
}

static void each_tensor_has_its_own_norm(void) {
    static const double numbers[] = {3.0, 4.0, 12.0, 5.0};
    const uint64_t addresses[] = {address_of(numbers), address_of(numbers + 1), address_of(numbers + 2)};
    const uint64_t sizes[] = {2, 1, 2};
    double norms[] = {-1.0, -1.0, -1.0};
    REQUIRE(autoclip_tensors_measure(addresses, sizes, 3, 8, norms) == 1, "refused");
    REQUIRE_SAME(5.0, norms[0]);
    REQUIRE_SAME(4.0, norms[1]);
    REQUIRE_SAME(13.0, norms[2]);
}

static void address_that_is_none_is_refused(void) {
    static const double numbers[3] = {1.0, 2.0, 3.0};
    const uint64_t good = address_of(numbers);
    for (size_t width = 4; width <= 8; width += 4) {
        for (uint64_t past = 0; past < width; past++) {
            for (size_t at = 0; at < 3; at++) {
                uint64_t addresses[] = {good, good, good};
                const uint64_t sizes[] = {1, 1, 1};
                double norms[] = {-1.0, -1.0, -1.0};
                addresses[at] = past == 0 ? 0 : good + past;
                REQUIRE(autoclip_tensors_measure(addresses, sizes, 3, width, norms) == 0,
                        "tensor %zu, %" PRIu64 " bytes past", at, past);
                for (size_t i = 0; i < 3; i++) REQUIRE_SAME(-1.0, norms[i]);
            }
        }
    }
}

static void scaling_rounds_each_number_once_and_touches_no_other(void) {
    static const double factors[] = {0.3, 1.0, 0x1p-140, 0.0};
    for (size_t width = 4; width <= 8; width += 4) {
        for (size_t size = 0; size <= SIZES; size++) {
            double numbers[SIZES + 1];
            uint64_t addresses[4];
            uint64_t sizes[4];
            void *blocks[4];
            uint64_t state = size;
            for (size_t i = 0; i < size; i++) numbers[i] = (double)(float)(test_uniform(&state) - 0.5);
            for (size_t i = 0; i < 4; i++) {
                blocks[i] = block_of(numbers, size, width);
                addresses[i] = address_of(blocks[i]);
                sizes[i] = size;
            }
            autoclip_tensors_scale(addresses, sizes, 4, width, factors);
            for (size_t i = 0; i < 4; i++) {
                for (size_t j = 0; j < size; j++) {
                    if (width == sizeof(float)) {
                        const float expected = (float)numbers[j] * (float)factors[i];
                        REQUIRE_SAME((double)expected, (double)((float *)blocks[i])[j]);
                    } else {
                        REQUIRE_SAME(numbers[j] * factors[i], ((double *)blocks[i])[j]);
                    }
                }
                free(blocks[i]);
            }
        }
    }
}

static void factor_of_one_writes_nothing(void) {
    static const float constant[3] = {1.0F, 2.0F, 3.0F}; /* in memory that cannot be written to */
    const uint64_t address = address_of(constant);
    const uint64_t size = 3;
    const double factor = 1.0;
    autoclip_tensors_scale(&address, &size, 1, 4, &factor);
    REQUIRE_SAME(sqrt(14.0), measure(constant, 3, 4));
}

static uint64_t fingerprint(const void *memory, uint64_t size, size_t width) {
    const uint64_t address = address_of(memory);
    return autoclip_tensors_fingerprint(&address, &size, 1, width);
}

static void fingerprint_changes_with_each_bit_of_the_beginning(void) {
    for (size_t width = 4; width <= 8; width += 4) {
        for (size_t size = 0; size <= SIZES; size++) {
            unsigned char *block = test_block(size * width);
            memset(block, 0, size * width);
            const uint64_t before = fingerprint(block, size, width);
            REQUIRE(before == fingerprint(block, size, width), "%zu numbers of %zu bytes", size, width);
            for (size_t bit = 0; bit < size * width * 8; bit++) {
                block[bit / 8] ^= (unsigned char)(1U << bit % 8);
                REQUIRE((before == fingerprint(block, size, width)) == (bit >= (size_t)256 * 8),
                        "bit %zu of %zu numbers of %zu bytes", bit, size, width);
                block[bit / 8] ^= (unsigned char)(1U << bit % 8);
            }
            free(block);
        }
    }
}

static void fingerprint_changes_with_the_same_bit_of_two_words(void) {
    enum { WORDS = 32 }; /* 256 bytes */
    uint64_t words[WORDS] = {0};
    const uint64_t before = fingerprint(words, WORDS, 8);
    for (size_t first = 0; first < WORDS; first++) {
        for (size_t second = first + 1; second < WORDS; second++) {
            for (size_t bit = 0; bit < 64; bit++) {
                words[first] = words[second] = UINT64_C(1) << bit;
                REQUIRE(before != fingerprint(words, WORDS, 8), "bit %zu of the words %zu and %zu", bit, first, second);
                words[first] = words[second] = 0;
            }
        }
    }
}

static void fingerprint_changes_with_each_tensor(void) {
    double numbers[3] = {1.0, 2.0, 3.0};
    const uint64_t addresses[] = {address_of(numbers), address_of(numbers + 1), address_of(numbers + 2)};
    const uint64_t sizes[] = {1, 1, 1};
    const uint64_t before = autoclip_tensors_fingerprint(addresses, sizes, 3, 8);
    for (size_t i = 0; i < 3; i++) {
        numbers[i] = -numbers[i];
        REQUIRE(before != autoclip_tensors_fingerprint(addresses, sizes, 3, 8), "tensor %zu", i);
        numbers[i] = -numbers[i];
    }
}

static void fingerprint_changes_with_the_signs_of_all_and_with_their_order(void) {
    float numbers[64];
    uint64_t seen[3];
    for (size_t i = 0; i < 64; i++) numbers[i] = (float)i + 1.0F;
    seen[0] = fingerprint(numbers, 64, 4);
    for (size_t i = 0; i < 64; i++) numbers[i] = -numbers[i];
    seen[1] = fingerprint(numbers, 64, 4);
    for (size_t i = 0; i < 64; i++) numbers[i] = 64.0F - (float)i;
    seen[2] = fingerprint(numbers, 64, 4);
    REQUIRE(seen[0] != seen[1] && seen[1] != seen[2] && seen[0] != seen[2], "the same");
}

static void fingerprint_changes_with_where_tensors_are_and_how_many(void) {
    static const double numbers[6] = {1.0, 2.0, 3.0, 1.0, 2.0, 3.0};
    const uint64_t addresses[] = {address_of(numbers), address_of(numbers + 3), address_of(numbers)};
    const uint64_t sizes[] = {3, 3, 3};
    uint64_t seen[4];
    seen[0] = autoclip_tensors_fingerprint(addresses, sizes, 2, 8);
    seen[1] = autoclip_tensors_fingerprint(addresses + 1, sizes, 2, 8);
    seen[2] = autoclip_tensors_fingerprint(addresses, sizes, 1, 8);
    seen[3] = autoclip_tensors_fingerprint(addresses + 1, sizes, 1, 8);
    for (size_t i = 0; i < 4; i++) {
        for (size_t j = 0; j < i; j++) REQUIRE(seen[i] != seen[j], "%zu and %zu", i, j);
    }
}

TEST_MAIN(TEST(norm_is_that_of_long_double), TEST(norm_has_the_range_of_its_numbers),
          TEST(norm_finds_what_is_not_finite), TEST(norm_of_large_numbers_is_the_same_where_subnormals_are_flushed),
          TEST(each_tensor_has_its_own_norm), TEST(address_that_is_none_is_refused),
          TEST(scaling_rounds_each_number_once_and_touches_no_other), TEST(factor_of_one_writes_nothing),
          TEST(fingerprint_changes_with_each_bit_of_the_beginning),
          TEST(fingerprint_changes_with_the_same_bit_of_two_words), TEST(fingerprint_changes_with_each_tensor),
          TEST(fingerprint_changes_with_the_signs_of_all_and_with_their_order),
          TEST(fingerprint_changes_with_where_tensors_are_and_how_many));

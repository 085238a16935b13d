/* libFuzzer: bytes become what a program does with a window in its own arrays, with a shared history of which it names
 * each step, with arrays that hold no window, or the numbers of tensors.
 *
 * SPDX-License-Identifier: MIT */
#include "arrays.h"

#include "../../csrc/arrays/tensors.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

static double number_at(const void *tensor, size_t at, size_t width) {
    return width == sizeof(float) ? (double)((const float *)tensor)[at] : ((const double *)tensor)[at];
}

/* Tensors of any bits: their norms are those of long double, a factor multiplies each number once, and a bit more or less
 * is another fingerprint. */
static void tensors_from_anything(source *from) {
    enum { TENSORS = 3, SIZES = 80, HEAD = 256 };
    const size_t width = source_below(from, 2) ? sizeof(float) : sizeof(double);
    uint64_t addresses[TENSORS], sizes[TENSORS];
    double norms[TENSORS], factors[TENSORS];
    void *before[TENSORS];
    for (size_t i = 0; i < TENSORS; ++i) {
        sizes[i] = source_below(from, SIZES);
        unsigned char *numbers = test_block(sizes[i] * width);
        const bool any_bits = source_below(from, 2) == 0; /* else of one magnitude, which may be far from 1 */
        const int exponent = (int)source_below(from, 2200) - 1100;
        for (size_t j = 0; j < sizes[i]; ++j) {
            const uint64_t bits = any_bits ? source_bits(from, width) : 0;
            const double wide = any_bits ? 0 : ldexp(source_uniform(from) - 0.5, exponent);
            const float narrow = (float)wide;
            const void *number = any_bits                 ? (const void *)&bits
                                 : width == sizeof(float) ? (const void *)&narrow
                                                          : &wide;
            memcpy(numbers + j * width, number, width);
        }
        addresses[i] = (uint64_t)(uintptr_t)numbers;
        factors[i] = source_below(from, 4) ? source_uniform(from) : 1.0;
        before[i] = test_block(sizes[i] * width);
        memcpy(before[i], numbers, sizes[i] * width);
    }
    REQUIRE(autoclip_tensors_measure(addresses, sizes, TENSORS, width, norms) == 1, "refused");
    const uint64_t fingerprint = autoclip_tensors_fingerprint(addresses, sizes, TENSORS, width);
    const size_t changed = (size_t)source_below(from, TENSORS);
    if (sizes[changed] > 0) {
        unsigned char *byte =
            (unsigned char *)(uintptr_t)addresses[changed] + source_below(from, HEAD) % (sizes[changed] * width);
        *byte ^= 1;
        REQUIRE(fingerprint != autoclip_tensors_fingerprint(addresses, sizes, TENSORS, width), "a bit is not seen");
        *byte ^= 1;
    }
    REQUIRE(fingerprint == autoclip_tensors_fingerprint(addresses, sizes, TENSORS, width), "not known again");
    autoclip_tensors_scale(addresses, sizes, TENSORS, width, factors);
    for (size_t i = 0; i < TENSORS; ++i) {
        long double sum = 0;
        for (size_t j = 0; j < sizes[i]; ++j) {
            const double number = number_at(before[i], j, width);
            sum += (long double)number * (long double)number;
            const double scaled = number_at((void *)(uintptr_t)addresses[i], j, width);
            const double expected =
                width == sizeof(float) ? (double)((float)number * (float)factors[i]) : number * factors[i];
            REQUIRE(isnan(expected) ? isnan(scaled) : test_same(expected, scaled), "%g * %g is %g", number, factors[i],
                    scaled);
        }
        const long double expected = sqrtl(sum);
        if (isnan(sum)) {
            REQUIRE(isnan(norms[i]), "the norm is %g, not NaN", norms[i]);
        } else if (expected > (long double)DBL_MAX) {
            REQUIRE(norms[i] >= DBL_MAX, "the norm is %g, not infinite", norms[i]);
        } else {
            const long double error = fabsl((long double)norms[i] - expected);
            REQUIRE(error <= 1e-14L * expected + 0x1p-1074L, "the norm is %.17g, not %.17Lg", norms[i], expected);
        }
        free((void *)(uintptr_t)addresses[i]);
        free(before[i]);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static const size_t windows[] = {1, 2, 3, 7, 20, 50};
    if (size < 2) return 0;
    source from = {bytes + 2, size - 2, 0, 0};
    const enum values kind = (enum values)(bytes[1] % VALUES_KINDS);
    test_now.test = "fuzz_arrays";
    test_now.step = 0;
    if (bytes[0] % 8 < 6) {
        window_program own;
        window_create(&own, windows[bytes[0] % 8], kind, from);
        while (own.from.at < own.from.size) window_step(&own);
        window_destroy(&own);
    } else if (bytes[0] % 8 == 6) {
        tree_program own;
        tree_create(&own, kind, from);
        while (own.from.at < own.from.size) tree_step(&own);
        tree_destroy(&own);
    } else if (bytes[0] < 128) {
        window_from_anything(&from);
    } else {
        tensors_from_anything(&from);
    }
    return 0;
}

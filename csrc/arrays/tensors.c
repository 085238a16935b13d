/* Norms of tensors, their scaling, and what they are known by.
 *
 * SPDX-License-Identifier: MIT */
#include "tensors.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* Sums that are independent of each other: enough to hide how long an addition takes, few enough for 16 registers. */
enum { LANES = 16 };

/* Below this a sum of squares of doubles may have lost digits, because small squares have few. */
#define LEAST_SQUARES 0x1p-900

/* A power of two whose inverse is a normal double as well, and that takes any double near enough to 1 to be squared. */
enum { FURTHEST = 1000 };

/* Where compilers can make a function for processors that are newer than what the rest is built for, and ask at run time:
 * twice as fast with the same bits, since each lane adds the same numbers in the same order. */
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__)) && !defined(_WIN32) && !defined(AUTOCLIP_NO_AVX2)
#define TRIES_AVX2 /* not on Windows, where GCC misaligns the stack */
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

#define DEFINE_SQUARES(name, type)                                                                                     \
    INLINE double name(const type *numbers, size_t size, double unit) {                                                \
        double lanes[LANES] = {0};                                                                                     \
        size_t i = 0;                                                                                                  \
        for (; i + LANES <= size; i += LANES) {                                                                        \
            for (size_t lane = 0; lane < LANES; ++lane) {                                                              \
                const double number = (double)numbers[i + lane] * unit;                                                \
                lanes[lane] += number * number;                                                                        \
            }                                                                                                          \
        }                                                                                                              \
        for (size_t lane = 0; i + lane < size; ++lane) {                                                               \
            const double number = (double)numbers[i + lane] * unit;                                                    \
            lanes[lane] += number * number;                                                                            \
        }                                                                                                              \
        for (size_t half = LANES / 2; half > 0; half /= 2) {                                                           \
            for (size_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];                              \
        }                                                                                                              \
        return lanes[0];                                                                                               \
    }

#define DEFINE_SCALE(name, type)                                                                                       \
    INLINE void name(type *numbers, size_t size, type factor) {                                                        \
        for (size_t i = 0; i < size; ++i) numbers[i] *= factor;                                                        \
    }

DEFINE_SQUARES(squares_of_floats, float)
DEFINE_SQUARES(squares_of_doubles, double)
DEFINE_SCALE(scale_floats, float)
DEFINE_SCALE(scale_doubles, double)

/* The sum of the squares, each number multiplied by `unit` before. */
INLINE double squares(const void *numbers, size_t size, size_t width, double unit) {
    /* A product with 1 is no work for compilers. */
    if (width == sizeof(float)) return squares_of_floats(numbers, size, 1.0);
    return unit == 1.0 ? squares_of_doubles(numbers, size, 1.0) : squares_of_doubles(numbers, size, unit);
}

INLINE void scale(void *numbers, size_t size, size_t width, double factor) {
    if (width == sizeof(float)) {
        scale_floats(numbers, size, (float)factor);
    } else {
        scale_doubles(numbers, size, factor);
    }
}

static double squares_anywhere(const void *numbers, size_t size, size_t width, double unit) {
    return squares(numbers, size, width, unit);
}

static void scale_anywhere(void *numbers, size_t size, size_t width, double factor) {
    scale(numbers, size, width, factor);
}

typedef double sum_function(const void *numbers, size_t size, size_t width, double unit);
typedef void scale_function(void *numbers, size_t size, size_t width, double factor);

#if defined(TRIES_AVX2)
__attribute__((target("avx2"))) static double squares_with_avx2(const void *numbers, size_t size, size_t width,
                                                                double unit) {
    return squares(numbers, size, width, unit);
}

__attribute__((target("avx2"))) static void scale_with_avx2(void *numbers, size_t size, size_t width, double factor) {
    scale(numbers, size, width, factor);
}

static sum_function *fastest_squares(void) {
    return __builtin_cpu_supports("avx2") ? squares_with_avx2 : squares_anywhere;
}

static scale_function *fastest_scale(void) { return __builtin_cpu_supports("avx2") ? scale_with_avx2 : scale_anywhere; }
#else
static sum_function *fastest_squares(void) { return squares_anywhere; }
static scale_function *fastest_scale(void) { return scale_anywhere; }
#endif

static double norm_of(const void *numbers, size_t size, size_t width) {
    sum_function *const sum = fastest_squares();
    const double found = sum(numbers, size, width, 1.0);
    /* The squares of floats are doubles, with room for as many of them as there is memory. */
    if (width == sizeof(float) || (found >= LEAST_SQUARES && found <= DBL_MAX) || isnan(found)) return sqrt(found);
    const double *doubles = numbers;
    double largest = 0.0;
    for (size_t i = 0; i < size; ++i) {
        const double magnitude = fabs(doubles[i]);
        if (!(magnitude <= largest)) largest = magnitude; /* a NaN as well, of which there is none */
    }
    if (isinf(largest)) return largest;
    int exponent;
    (void)frexp(largest, &exponent);
    if (exponent > FURTHEST) exponent = FURTHEST;
    if (exponent < -FURTHEST) exponent = -FURTHEST;
    const double unit = ldexp(1.0, -exponent);
    return sqrt(sum(numbers, size, width, unit)) / unit;
}

int autoclip_tensors_measure(const uint64_t *addresses, const uint64_t *sizes, size_t count, size_t width,
                             double *norms) {
    for (size_t i = 0; i < count; ++i) {
        if (addresses[i] == 0 || addresses[i] % width != 0) return 0;
    }
    for (size_t i = 0; i < count; ++i) {
        norms[i] = norm_of((const void *)(uintptr_t)addresses[i], (size_t)sizes[i], width);
    }
    return 1;
}

void autoclip_tensors_scale(const uint64_t *addresses, const uint64_t *sizes, size_t count, size_t width,
                            const double *factors) {
    scale_function *const multiply = fastest_scale();
    for (size_t i = 0; i < count; ++i) {
        if (factors[i] != 1.0) multiply((void *)(uintptr_t)addresses[i], (size_t)sizes[i], width, factors[i]);
    }
}

/* Of the beginning of a tensor: a few lines of a cache. */
enum { HEAD = 256 };

/* Odd, so that no bit is lost, and half of its bits are set. */
#define MULTIPLIER UINT64_C(0xD6E8FEB86659FD93)

/* One to one in both arguments: a product spreads each bit upwards, and the shift brings it down again. */
static uint64_t mix(uint64_t hash, uint64_t word) {
    hash = (hash ^ word) * MULTIPLIER;
    return hash ^ hash >> 32;
}

static uint64_t fingerprint_of(const unsigned char *bytes, size_t size) {
    enum { STREAMS = 4 }; /* multiplications at a time */
    uint64_t streams[STREAMS] = {1, 2, 3, 4};
    uint64_t word = 0;
    size_t i = 0;
    for (; i + STREAMS * sizeof word <= size; i += STREAMS * sizeof word) {
        for (size_t stream = 0; stream < STREAMS; ++stream) {
            memcpy(&word, bytes + i + stream * sizeof word, sizeof word);
            streams[stream] = mix(streams[stream], word);
        }
    }
    uint64_t hash = size;
    for (; i < size; i += sizeof(float)) {
        uint32_t half;
        memcpy(&half, bytes + i, sizeof half);
        hash = mix(hash, half);
    }
    for (size_t stream = 0; stream < STREAMS; ++stream) hash = mix(hash, streams[stream]);
    return hash;
}

uint64_t autoclip_tensors_fingerprint(const uint64_t *addresses, const uint64_t *sizes, size_t count, size_t width) {
    uint64_t hash = count;
    for (size_t i = 0; i < count; ++i) {
        const size_t size = sizes[i] < HEAD / width ? (size_t)sizes[i] * width : HEAD;
        hash = mix(mix(hash, addresses[i]), fingerprint_of((const unsigned char *)(uintptr_t)addresses[i], size));
    }
    return hash;
}

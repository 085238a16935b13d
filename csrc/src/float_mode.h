/* What the arithmetic of the kernel needs from those who build it, and from the thread that calls it.
 *
 * A thread may flush subnormal numbers to zero: a program linked with -ffast-math does, and frameworks do so in their
 * threads. Two different subnormals then compare equal and a sum loses them, which would break the order of a history. So
 * every entry point that compares or computes works in the standard mode, and gives the thread its own mode back.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_FLOAT_MODE_H
#define AUTOCLIP_FLOAT_MODE_H

#include <float.h>

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || defined(_M_FP_FAST) ||        \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || defined(__NO_SIGNED_ZEROS__)
#error                                                                                                                 \
    "autoclip needs IEEE arithmetic: with -ffast-math, -Ofast or a part of them NaN enters a history, and bits change."
#endif
#if defined(__clang__)
/* Clang keeps most parts to itself. They end here, on the processors for which it knows how. */
#if __clang_major__ >= 12 && (defined(__x86_64__) || defined(__i386__))
#pragma float_control(precise, on)
#endif
#pragma STDC FP_CONTRACT OFF
#endif
#if FLT_EVAL_METHOD == 2
#error "autoclip needs doubles of 64 bits, and this unit computes in 80: build with -msse2 -mfpmath=sse."
#endif

#if defined(__SSE2__) || defined(_M_X64)

#include <xmmintrin.h>

typedef unsigned float_mode;
static const float_mode float_mode_flushes = 0x8040; /* results, and operands */
static inline float_mode float_mode_get(void) { return _mm_getcsr(); }
static inline void float_mode_set(float_mode mode) { _mm_setcsr(mode); }

#elif defined(__aarch64__) && defined(__GNUC__)

typedef unsigned long long float_mode;
static const float_mode float_mode_flushes = 1ULL << 24;
static inline float_mode float_mode_get(void) {
    float_mode mode;
    __asm__ volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
}
static inline void float_mode_set(float_mode mode) { __asm__ volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }

#elif defined(__arm__) && defined(__ARM_FP) && defined(__GNUC__)

typedef unsigned float_mode;
static const float_mode float_mode_flushes = 1U << 24;
static inline float_mode float_mode_get(void) {
    float_mode mode;
    __asm__ volatile("vmrs %0, fpscr" : "=r"(mode));
    return mode;
}
static inline void float_mode_set(float_mode mode) { __asm__ volatile("vmsr fpscr, %0" : : "r"(mode) : "memory"); }

#else /* no such mode for doubles, or none that is known */

typedef unsigned float_mode;
static const float_mode float_mode_flushes = 0;
static inline float_mode float_mode_get(void) { return 0; }
static inline void float_mode_set(float_mode mode) { (void)mode; }

#endif

/* Work in the standard mode; returns the mode of the thread, for float_mode_leave. */
static inline float_mode float_mode_enter(void) {
    const float_mode mode = float_mode_get();
    if ((mode & float_mode_flushes) != 0) float_mode_set(mode & ~float_mode_flushes);
    return mode;
}

static inline void float_mode_leave(float_mode mode) {
    if ((mode & float_mode_flushes) != 0) float_mode_set(mode);
}

/* The body of an entry point: `call` in the standard mode, which returns its status. */
#define IN_STANDARD_MODE(call)                                                                                         \
    const float_mode mode = float_mode_enter();                                                                        \
    const autoclip_status status = call;                                                                               \
    float_mode_leave(mode);                                                                                            \
    return status

#endif

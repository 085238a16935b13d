/* A step of AutoClip over arrays that belong to a program: what autoclip_core/arrays.py does, for programs on the CPU. */
#ifndef AUTOCLIP_ARRAYS_STEP_H
#define AUTOCLIP_ARRAYS_STEP_H

#include <stddef.h>
#include <stdint.h>

#include <autoclip.h>

/* What does not change from step to step. */
typedef struct autoclip_rule {
    int64_t history; /* an id of the table of shared histories; 0: the program's own arrays hold the norms */
    int64_t warmup;
    int64_t skips; /* whether a norm that is not finite makes the scale 0 */
} autoclip_rule;

enum { AUTOCLIP_STEPS, AUTOCLIP_RECORDED, AUTOCLIP_CLIPPED, AUTOCLIP_NONFINITE, AUTOCLIP_COUNTS };
enum { AUTOCLIP_NORM, AUTOCLIP_THRESHOLD, AUTOCLIP_SCALE, AUTOCLIP_DID_CLIP, AUTOCLIP_LAST };

/* The percentile as digits in base 128, the first one whole: integers that any program holds exactly. */
enum { AUTOCLIP_DIGITS = 12 };

/* Let a norm enter a window of the last norms, if it is finite, and find the percentile: infinity if there is none.
 * `norms` has 2 * `window` places: the norms ascending, and in order of age in a ring, unused places holding infinity.
 * `remembered` is the number of norms that ever entered before. O(window), a move of memory. */
float autoclip_window_observe(float *norms, size_t window, size_t remembered, float norm, double percentile);

/* The same for a shared history, in which the norm is remembered as step `remembered` after the norm `*last`. O(log n). */
autoclip_status autoclip_tree_observe(uint64_t history, uint64_t remembered, float *last, float norm, double percentile,
                                      float *threshold);

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
/* Take a step with the norm of a gradient: change `norms`, the counts and `last`, or on failure nothing. `norms` has
 * `norms_size` places: a window's, or with a history one, for the last norm remembered. O(norms_size + log n). */
autoclip_status autoclip_arrays_step(const autoclip_rule *rule, float max_threshold, const int32_t *digits,
                                     float *norms, size_t norms_size, int32_t *counts, float norm, float *last);
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif

/* The norms of a run, in an array that belongs to a program or in a shared history: one norm enters, and the percentile is
 * found. What is asked of them, and what follows from the percentile, is said in autoclip_core/arrays.py.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_ARRAYS_OBSERVE_H
#define AUTOCLIP_ARRAYS_OBSERVE_H

#include <stddef.h>
#include <stdint.h>

#include <autoclip.h>

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

/* Let a norm enter a window of the last norms, if it is finite and above 0, and find the percentile: FLT_MAX if there is
 * no norm. `norms` has 2 * `window` places: the norms ascending, and in order of age in a ring, unused places holding
 * FLT_MAX. `recorded_steps` is the number of norms that ever entered before. O(window), a move of memory. */
float autoclip_window_observe(float *norms, size_t window, size_t recorded_steps, float norm, double percentile);

/* The same for a shared history, which the norm enters as step `recorded_steps` after the norm `*previous`; then that
 * becomes the norm. Programs count to 2^31 - 1. On failure nothing has changed. O(log n). */
autoclip_status autoclip_tree_observe(uint64_t history, uint64_t recorded_steps, float *previous, float norm,
                                      double percentile, float *threshold);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif

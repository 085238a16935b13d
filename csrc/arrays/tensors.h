/* The norms of tensors in the memory of a CPU, and their scaling: all of them in one call, because for small ones a call
 * of a framework each costs more than the arithmetic.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_ARRAYS_TENSORS_H
#define AUTOCLIP_ARRAYS_TENSORS_H

#include <stddef.h>
#include <stdint.h>

/* `count` tensors of numbers of `width` bytes: 4 for float, 8 for double. Tensor i has `sizes[i]` numbers side by side,
 * from the address `addresses[i]` on, which is a multiple of the width and not 0. There is no memory to take and no lock:
 * threads may share out tensors between them. */

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

/* Find the L2 norm of each tensor, as if there were no smallest and no largest double in between: NaN or infinity only if
 * there is one among the numbers (or if the norm of doubles is beyond them), and 0 only if all are 0. The sums are of
 * doubles in a fixed order, so the same numbers have the same norm to the bit on every processor. Return 1; or 0, and do
 * nothing, if an address is not as it must be. O(numbers). */
int autoclip_tensors_measure(const uint64_t *addresses, const uint64_t *sizes, size_t count, size_t width,
                             double *norms);

/* Multiply each tensor by its factor, which is rounded to float first for floats. A factor of 1 leaves the memory
 * untouched. O(numbers). */
void autoclip_tensors_scale(const uint64_t *addresses, const uint64_t *sizes, size_t count, size_t width,
                            const double *factors);

/* Return a number by which a process knows tensors again: another one if an address, or a bit in the first 256 bytes of a
 * tensor, is another, but for one time in 2^64. O(count). */
uint64_t autoclip_tensors_fingerprint(const uint64_t *addresses, const uint64_t *sizes, size_t count, size_t width);

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

#endif

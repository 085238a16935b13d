/* libFuzzer: bytes become what a program does with a window in its own arrays, with a shared history of which it names
 * each step, or with arrays that hold no window.
 *
 * SPDX-License-Identifier: MIT */
#include "arrays.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

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
    } else {
        window_from_anything(&from);
    }
    return 0;
}

/* libFuzzer: bytes become a stream of operations, which the model judges. The first byte chooses the window and the
 * values; its highest bit refuses memory to every call, allocation after allocation.
 *
 * SPDX-License-Identifier: MIT */
#include "stream.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    static const uint64_t windows[] = {0, 1, 2, 3, 7, 50, 300, 0};
    if (size < 2) return 0;
    stream own;
    source from = {bytes + 2, size - 2, 0, 0};
    test_now.test = "fuzz_operations";
    test_now.step = 0;
    stream_create(&own, windows[bytes[0] % 8], (enum values)(bytes[1] % VALUES_KINDS), from);
    own.limit = 600;
    own.faulty = bytes[0] >= 128;
    while (own.source.at < own.source.size) stream_step(&own);
    stream_judge(&own);
    stream_destroy(&own);
    return 0;
}

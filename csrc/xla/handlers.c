/* What autoclip_jax calls inside a compiled program on the CPU.
 *
 * Both handlers take one norm and give the percentile of the norms recorded, FLT_MAX while there are none. Which norms
 * count is decided by the caller: one of 0 asks for the percentile and does not enter. The percentile is
 * given as numbers whose sum it is, because three float32 hold any double, and a program without float64 has no other.
 *
 *   autoclip_xla_window  (norms f32[2,N], recorded_steps s32, norm f32, percentile f32[] or f64[])
 *                     -> (norms, threshold f32)
 *       autoclip_window_observe for an array that belongs to the program.
 *
 *   autoclip_xla_tree    (previous f32[1], recorded_steps s32, norm f32, percentile f32[] or f64[])
 *                     -> (previous, threshold f32)
 *       autoclip_tree_observe; the attribute `history` s64 is an id of the table of shared histories.
 *
 * SPDX-License-Identifier: MIT */
#include "ffi.h"

#include <math.h>
#include <stdbool.h>
#include <string.h>

#include <autoclip.h>

#include "../arrays/observe.h"
#include "../src/percentile.h"

enum { NORMS, RECORDED_STEPS, NORM, PERCENTILE, OPERANDS }; /* the tree has the previous norm in place of norms */
enum { NORMS_AFTER, THRESHOLD, RESULTS };

static xla_error *fail(const xla_call *call, int code, const char *message) {
    xla_error_arguments arguments = {.struct_size = sizeof arguments, .message = message, .code = code};
    return call->api->create_error(&arguments);
}

static xla_error *refuse_percentile(const xla_call *call) {
    return fail(call, XLA_INVALID_ARGUMENT, autoclip_status_message(AUTOCLIP_BAD_PERCENTILE));
}

/* XLA asks once, while it compiles, for which version a handler was made. */
static bool answer_metadata(const xla_call *call) {
    xla_extension *extension = call->extensions;
    if (extension == NULL || extension->type != XLA_EXTENSION_METADATA) return false;
    xla_metadata *metadata = ((xla_metadata_extension *)extension)->metadata;
    metadata->version.major = XLA_MAJOR;
    metadata->version.minor = XLA_MINOR;
    return true;
}

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
xla_error *autoclip_xla_window(xla_call *call);
xla_error *autoclip_xla_tree(xla_call *call);
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

static bool holds(const xla_buffer *buffer, int type, int64_t count) {
    int64_t size = 1;
    for (int64_t i = 0; i < buffer->rank; ++i) size *= buffer->sizes[i];
    return buffer->type == type && size == count;
}

/* Whether these are the buffers that both handlers take, with so many numbers in place of the norms. */
static bool fits(const xla_call *call, int64_t norms_size) {
    if (call->operands.count != OPERANDS || call->results.count != RESULTS) return false;
    xla_buffer *const *operands = call->operands.buffers;
    xla_buffer *const *results = call->results.buffers;
    const xla_buffer *percentile = operands[PERCENTILE];
    return holds(operands[NORMS], XLA_F32, norms_size) && holds(operands[RECORDED_STEPS], XLA_S32, 1) &&
           holds(operands[NORM], XLA_F32, 1) && percentile->rank == 1 &&
           (percentile->type == XLA_F32 || percentile->type == XLA_F64) &&
           holds(results[NORMS_AFTER], XLA_F32, norms_size) && holds(results[THRESHOLD], XLA_F32, 1);
}

static double sum(const xla_buffer *numbers) {
    double total = 0.0;
    for (int64_t i = 0; i < numbers->sizes[0]; ++i) {
        total += numbers->type == XLA_F64 ? ((double *)numbers->data)[i] : (double)((float *)numbers->data)[i];
    }
    return total;
}

static void *operand(const xla_call *call, int at) { return call->operands.buffers[at]->data; }
static void *result(const xla_call *call, int at) { return call->results.buffers[at]->data; }

/* --- In the state ----------------------------------------------------------------------------------------------- */

xla_error *autoclip_xla_window(xla_call *call) {
    if (answer_metadata(call)) return NULL;
    const xla_buffer *norms = call->operands.count > 0 ? call->operands.buffers[NORMS] : NULL;
    if (norms == NULL || norms->rank != 2 || norms->sizes[1] < 1 || !fits(call, 2 * norms->sizes[1])) {
        return fail(call, XLA_INVALID_ARGUMENT, "autoclip_xla_window: bad call");
    }
    const size_t window = (size_t)norms->sizes[1];
    const size_t recorded_steps = *(uint32_t *)operand(call, RECORDED_STEPS);
    const float norm = *(float *)operand(call, NORM);
    const double percentile = sum(call->operands.buffers[PERCENTILE]);
    if (!is_percentile(percentile)) return refuse_percentile(call);
    float *after = result(call, NORMS_AFTER);
    /* The caller asks XLA to work in place; where it did not, there is a copy to make. */
    if (after != norms->data) memcpy(after, norms->data, 2 * window * sizeof *after);
    *(float *)result(call, THRESHOLD) = autoclip_window_observe(after, window, recorded_steps, norm, percentile);
    return NULL;
}

/* --- In the tree ------------------------------------------------------------------------------------------------ */

xla_error *autoclip_xla_tree(xla_call *call) {
    if (answer_metadata(call)) return NULL;
    const xla_attributes *attributes = &call->attributes;
    const xla_scalar *history = attributes->count == 1 ? attributes->values[0] : NULL;
    if (!fits(call, 1) || history == NULL || attributes->kinds[0] != XLA_SCALAR_ATTRIBUTE || history->type != XLA_S64) {
        return fail(call, XLA_INVALID_ARGUMENT, "autoclip_xla_tree: bad call");
    }
    const uint64_t id = *(uint64_t *)history->value;
    float previous = *(float *)operand(call, NORMS);
    const uint32_t recorded_steps = *(uint32_t *)operand(call, RECORDED_STEPS);
    const float norm = *(float *)operand(call, NORM);
    const double percentile = sum(call->operands.buffers[PERCENTILE]);
    if (!is_percentile(percentile)) return refuse_percentile(call);
    float threshold;
    const autoclip_status status = autoclip_tree_observe(id, recorded_steps, &previous, norm, percentile, &threshold);
    if (status != AUTOCLIP_OK) return fail(call, XLA_FAILED_PRECONDITION, autoclip_status_message(status));
    *(float *)result(call, NORMS_AFTER) = previous;
    *(float *)result(call, THRESHOLD) = threshold;
    return NULL;
}

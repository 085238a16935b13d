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

static xla_error *fail(const xla_call *call, int code, const char *message) {
    xla_error_arguments arguments = {.struct_size = sizeof arguments, .message = message, .code = code};
    return call->api->create_error(&arguments);
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

static bool has_types(const xla_buffers *buffers, int64_t count, const int *types) {
    if (buffers->count != count) return false;
    for (int64_t i = 0; i < count; ++i) {
        if (buffers->buffers[i]->type != types[i]) return false;
    }
    return true;
}

/* Whether these are the buffers that the handler takes; the percentile comes last and may be of two types. */
static bool fits(const xla_call *call, int64_t operands, const int *operand_types, int64_t results,
                 const int *result_types) {
    if (call->operands.count != operands + 1) return false;
    const xla_buffer *percentile = call->operands.buffers[operands];
    const xla_buffers others = {.count = operands, .buffers = call->operands.buffers};
    return percentile->rank == 1 && (percentile->type == XLA_F32 || percentile->type == XLA_F64) &&
           has_types(&others, operands, operand_types) && has_types(&call->results, results, result_types);
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
    static const int operands[] = {XLA_F32, XLA_S32, XLA_F32};
    static const int results[] = {XLA_F32, XLA_F32};
    if (answer_metadata(call)) return NULL;
    const xla_buffer *norms = call->operands.count > 0 ? call->operands.buffers[0] : NULL;
    if (!fits(call, 3, operands, 2, results) || norms->rank != 2 || norms->sizes[0] != 2 || norms->sizes[1] < 1) {
        return fail(call, XLA_INVALID_ARGUMENT, "autoclip_xla_window: bad call");
    }
    const size_t window = (size_t)norms->sizes[1];
    const size_t recorded_steps = *(uint32_t *)operand(call, 1);
    const float norm = *(float *)operand(call, 2);
    const double percentile = sum(call->operands.buffers[3]);
    if (!is_percentile(percentile)) {
        return fail(call, XLA_INVALID_ARGUMENT, autoclip_status_message(AUTOCLIP_BAD_PERCENTILE));
    }
    float *after = result(call, 0);
    /* The caller asks XLA to work in place; where it did not, there is a copy to make. */
    if (after != norms->data) memcpy(after, norms->data, 2 * window * sizeof *after);
    *(float *)result(call, 1) = autoclip_window_observe(after, window, recorded_steps, norm, percentile);
    return NULL;
}

/* --- In the tree ------------------------------------------------------------------------------------------------ */

xla_error *autoclip_xla_tree(xla_call *call) {
    static const int operands[] = {XLA_F32, XLA_S32, XLA_F32};
    static const int results[] = {XLA_F32, XLA_F32};
    if (answer_metadata(call)) return NULL;
    const xla_attributes *attributes = &call->attributes;
    const xla_scalar *history = attributes->count == 1 ? attributes->values[0] : NULL;
    if (!fits(call, 3, operands, 2, results) || history == NULL || attributes->kinds[0] != XLA_SCALAR_ATTRIBUTE ||
        history->type != XLA_S64) {
        return fail(call, XLA_INVALID_ARGUMENT, "autoclip_xla_tree: bad call");
    }
    const uint64_t id = *(uint64_t *)history->value;
    float previous = *(float *)operand(call, 0);
    const uint32_t recorded_steps = *(uint32_t *)operand(call, 1);
    const float norm = *(float *)operand(call, 2);
    const double percentile = sum(call->operands.buffers[3]);
    float threshold;
    const autoclip_status status = autoclip_tree_observe(id, recorded_steps, &previous, norm, percentile, &threshold);
    if (status != AUTOCLIP_OK) return fail(call, XLA_FAILED_PRECONDITION, autoclip_status_message(status));
    *(float *)result(call, 0) = previous;
    *(float *)result(call, 1) = threshold;
    return NULL;
}

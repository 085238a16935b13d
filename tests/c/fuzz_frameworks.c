/* libFuzzer: bytes become the calls that XLA or TensorFlow makes for a program, with a window or with a shared history.
 * Every buffer is a block of just the size that its shape says. A call that is as the entry point takes it has the answer
 * of the model; one that is not, in whatever way, is refused, and leaves history and results as they were.
 *
 * SPDX-License-Identifier: MIT */
#include "arrays.h"

#include "tensorflow.h"
#include "xla.h"

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size);

enum { MOST = 6, MOST_RANK = 3 };

/* --- Buffers ------------------------------------------------------------------------------------------------------ */

typedef struct buffer {
    int type;
    int rank;
    int64_t sizes[MOST_RANK];
    int64_t count; /* of numbers */
    size_t bytes;
    void *data; /* NULL if there are none */
} buffer;

/* With these bytes, as far as they go. */
static buffer buffer_create(int type, int rank, const int64_t *sizes, const void *data, size_t bytes) {
    buffer own = {.type = type, .rank = rank, .count = 1};
    for (int i = 0; i < rank; ++i) own.count *= own.sizes[i] = sizes[i];
    own.bytes = (size_t)own.count * (type == XLA_S64 || type == XLA_F64 ? 8 : 4);
    if (own.bytes > 0) own.data = test_block(own.bytes);
    if (own.bytes > 0 && data != NULL) memcpy(own.data, data, own.bytes < bytes ? own.bytes : bytes);
    return own;
}

/* Another shape, and any type if the framework leaves that open. */
static void buffer_change(buffer *own, bool any_type, source *from) {
    static const int types[] = {XLA_S32, XLA_S64, XLA_F32, XLA_F64};
    const buffer before = *own;
    const int type = any_type ? types[source_below(from, 4)] : own->type;
    const int rank = (int)source_below(from, MOST_RANK + 1);
    int64_t sizes[MOST_RANK];
    for (int i = 0; i < rank; ++i) sizes[i] = (int64_t)source_below(from, 5);
    *own = buffer_create(type, rank, sizes, before.data, before.bytes);
    free(before.data);
}

static bool is_of(const buffer *own, int type, size_t count) {
    return own->type == type && own->count == (int64_t)count;
}

/* --- Programs ----------------------------------------------------------------------------------------------------- */

typedef struct program {
    window_program state; /* with a shared history: a window of one, whose first place holds the previous norm */
    uint64_t history;     /* 0: a window */
    /* The call that is made now: */
    uint64_t called; /* the history that it names */
    uint32_t step;
    float norm;
    double percentile;
    buffer in[MOST];
    buffer out[MOST];
} program;

static size_t norms_count(const program *own) { return own->history != 0 ? 1 : 2 * own->state.window; }

static buffer norms_create(const program *own, const void *data) {
    const int64_t sizes[2] = {own->history != 0 ? 1 : 2, (int64_t)own->state.window};
    return buffer_create(XLA_F32, own->history != 0 ? 1 : 2, sizes, data, norms_count(own) * sizeof(float));
}

static void call_create(program *own) {
    source *from = &own->state.from;
    own->norm = norm_draw(own->state.kind, own->state.index++, from);
    own->percentile = percentile_draw(from, own->state.truth.count);
    own->step = (uint32_t)own->state.recorded;
    own->called = own->history;
    switch (source_below(from, 16)) { /* wrong for a history alone: a window takes any number of steps */
    case 0: own->step += own->history != 0 ? 1 + (uint32_t)source_bits(from, 4) % (UINT32_MAX - own->step) : 0; break;
    case 1: own->called ^= own->history != 0 ? 1 + source_bits(from, 4) : 0; break;
    default: break;
    }
    own->in[0] = norms_create(own, own->state.norms);
    own->in[1] = buffer_create(XLA_S32, 0, NULL, &own->step, sizeof own->step);
    own->in[2] = buffer_create(XLA_F32, 0, NULL, &own->norm, sizeof own->norm);
    for (int i = 3; i < MOST; ++i) own->in[i] = buffer_create(XLA_F32, 0, NULL, NULL, 0);
    own->out[0] = norms_create(own, NULL);
    for (int i = 1; i < MOST; ++i) own->out[i] = buffer_create(XLA_F32, 0, NULL, NULL, 0);
}

static void call_destroy(program *own) {
    for (int i = 0; i < MOST; ++i) {
        free(own->in[i].data);
        free(own->out[i].data);
    }
}

/* The call was taken or refused; it fits the entry point or does not, and came back with these numbers. */
static void call_judge(program *own, bool taken, bool fits, const float *norms, float threshold) {
    window_program *state = &own->state;
    fits = fits && percentile_valid(own->percentile) && own->called == own->history;
    if (own->history != 0) fits = fits && own->step == state->recorded;
    REQUIRE(taken == fits, "the call was %s", taken ? "taken" : "refused");
    if (!taken) return;
    const float previous = state->norms[0];
    if (isfinite(own->norm)) {
        model_push(&state->truth, (double)own->norm);
        state->recorded += 1;
    }
    memcpy(state->norms, norms, norms_count(own) * sizeof(float));
    REQUIRE_SAME((double)model_threshold(&state->truth, own->percentile), (double)threshold);
    if (own->history != 0) {
        REQUIRE_SAME((double)(isfinite(own->norm) ? own->norm : previous), (double)state->norms[0]);
    } else {
        window_judge(state);
    }
}

/* --- XLA ---------------------------------------------------------------------------------------------------------- */

/* Three numbers of 32 bits hold what one of 64 does, or nearly. */
static buffer parts_create(double percentile, source *from) {
    const int64_t count = (int64_t)source_below(from, 4);
    buffer own = buffer_create(count == 3 ? XLA_F32 : XLA_F64, 1, &count, NULL, 0);
    for (int64_t i = 0; i < count; ++i) {
        const float part = (float)percentile;
        if (count == 3) {
            ((float *)own.data)[i] = part;
            percentile -= (double)part;
        } else {
            ((double *)own.data)[i] = i == 0 ? percentile : 0;
        }
    }
    return own;
}

static double parts_sum(const buffer *own) {
    double sum = 0;
    for (int64_t i = 0; i < own->count; ++i) {
        sum += own->type == XLA_F32 ? (double)((float *)own->data)[i] : ((double *)own->data)[i];
    }
    return sum;
}

static void call_xla(program *own) {
    source *from = &own->state.from;
    int64_t counts[2] = {4, 2};
    frame call;
    xla_buffer shown[2][MOST];
    call_create(own);
    free(own->in[3].data);
    own->in[3] = parts_create(own->percentile, from);
    frame_create(&call);
    if (own->history != 0) frame_name_history(&call, own->called);
    if (source_below(from, 6) == 0) buffer_change(&own->in[source_below(from, MOST)], true, from);
    if (source_below(from, 6) == 0) buffer_change(&own->out[source_below(from, MOST)], true, from);
    switch (source_below(from, 32)) {
    case 0: counts[0] = (int64_t)source_below(from, MOST + 1); break;
    case 1: counts[1] = (int64_t)source_below(from, MOST + 1); break;
    case 2: call.call.attributes.count = 0; break;
    case 3: call.kind ^= 1; break;
    case 4: call.attribute.type ^= 1; break;
    default: break;
    }
    xla_buffer **lists[2];
    for (int list = 0; list < 2; ++list) {
        lists[list] = test_block((size_t)counts[list] * sizeof(xla_buffer *));
        for (int i = 0; i < counts[list]; ++i) {
            buffer *given = list == 0 ? &own->in[i] : &own->out[i];
            shown[list][i] = buffer_of(given->type, given->data, given->rank, given->sizes);
            lists[list][i] = &shown[list][i];
        }
    }
    call.call.operands = (xla_buffers){.count = counts[0], .buffers = lists[0]};
    call.call.results = (xla_buffers){.count = counts[1], .buffers = lists[1]};

    const size_t count = norms_count(own);
    const buffer *in = own->in;
    const buffer *out = own->out;
    bool fits = counts[0] == 4 && counts[1] == 2 && is_of(&in[1], XLA_S32, 1) && is_of(&in[2], XLA_F32, 1) &&
                in[3].rank == 1 && (in[3].type == XLA_F32 || in[3].type == XLA_F64) && is_of(&out[1], XLA_F32, 1);
    if (own->history != 0) {
        fits = fits && is_of(&in[0], XLA_F32, 1) && is_of(&out[0], XLA_F32, 1) && call.call.attributes.count == 1 &&
               call.kind == XLA_SCALAR_ATTRIBUTE && call.attribute.type == XLA_S64;
    } else { /* of another window there are only the bounds to keep */
        fits = fits && in[0].type == XLA_F32 && in[0].rank == 2 && in[0].sizes[0] == 2 && in[0].count > 0 &&
               is_of(&out[0], XLA_F32, (size_t)in[0].count);
    }
    if (fits) own->percentile = parts_sum(&in[3]);
    const bool taken = (own->history != 0 ? autoclip_xla_tree : autoclip_xla_window)(&call.call) == NULL;
    if (!taken) {
        for (int i = 0; i < MOST; ++i) {
            const unsigned char *bytes = out[i].data;
            for (size_t j = 0; j < out[i].bytes; ++j) REQUIRE(bytes[j] == 0xC7, "a refused call wrote result %d", i);
        }
    }
    if (!taken || is_of(&in[0], XLA_F32, count)) {
        call_judge(own, taken, fits, out[0].data, taken ? *(float *)out[1].data : 0);
    }
    free(lists[0]);
    free(lists[1]);
    call_destroy(own);
}

/* --- TensorFlow --------------------------------------------------------------------------------------------------- */

static void call_tensorflow(program *own) {
    static const int64_t digit_count = DIGITS;
    source *from = &own->state.from;
    int32_t digits[DIGITS];
    TF_OpKernelContext context;
    memset(&context, 0, sizeof context);
    context.fail_at_input = context.fail_at_output = -1;
    call_create(own);
    if (percentile_valid(own->percentile)) {
        set_percentile(digits, own->percentile);
    } else {
        for (int i = 0; i < DIGITS; ++i) digits[i] = (int32_t)(uint32_t)source_bits(from, 4);
    }
    own->percentile = 0;
    for (int i = DIGITS - 1; i >= 0; --i) own->percentile = own->percentile / 128 + digits[i];
    free(own->in[PERCENTILE].data);
    free(own->in[HISTORY].data);
    own->in[PERCENTILE] = buffer_create(XLA_S32, 1, &digit_count, digits, sizeof digits);
    own->in[HISTORY] = buffer_create(XLA_S64, 0, NULL, &own->called, sizeof own->called);
    /* The types are those of the op, which TensorFlow holds up. */
    if (source_below(from, 6) == 0) buffer_change(&own->in[source_below(from, INPUTS)], false, from);
    if (source_below(from, 32) == 0) context.fail_at_input = (int)source_below(from, INPUTS);
    if (source_below(from, 32) == 0) context.fail_at_output = (int)source_below(from, OUTPUTS);
    for (int i = 0; i < INPUTS; ++i) {
        context.inputs[i] = (TF_Tensor){own->in[i].data, own->in[i].rank, {0}, own->in[i].count};
        memcpy(context.inputs[i].sizes, own->in[i].sizes, sizeof own->in[i].sizes);
    }
    const buffer *in = own->in;
    const bool fits = in[NORMS].rank <= 2 && in[NORMS].count >= (own->history != 0 ? 1 : 2) &&
                      in[RECORDED_STEPS].count == 1 && in[NORM].count == 1 && in[PERCENTILE].count == DIGITS &&
                      in[HISTORY].count == 1 && context.fail_at_input < 0 && context.fail_at_output < 0;
    compute(&context);
    const bool taken = context.failure.code == OK;
    REQUIRE(!taken || (context.norms_dimensions == in[NORMS].rank && context.norms_bytes == in[NORMS].bytes &&
                       memcmp(context.norms_sizes, in[NORMS].sizes, (size_t)in[NORMS].rank * sizeof(int64_t)) == 0),
            "the norms come back in another shape");
    if (!taken || own->history != 0 || in[NORMS].count == (int64_t)norms_count(own)) {
        call_judge(own, taken, fits, context.norms, taken ? context.threshold[0] : 0);
    }
    call_destroy(own);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size) {
    if (size < 2) return 0;
    const bool has_history = bytes[0] & 1;
    void (*const call)(program *) = bytes[0] & 2 ? call_tensorflow : call_xla;
    program own = {.history = 0};
    test_now.test = "fuzz_frameworks";
    test_now.step = 0;
    require_op();
    window_create(&own.state, has_history ? 1 : 1 + bytes[0] / 4 % 8, (enum values)(bytes[1] % VALUES_KINDS),
                  (source){bytes + 2, size - 2, 0, 0});
    if (has_history) {
        own.state.truth.window = 0;
        REQUIRE_OK(autoclip_shared_create(0, &own.history));
    }
    while (own.state.from.at < own.state.from.size) {
        test_now.step += 1;
        call(&own);
    }
    if (has_history) {
        double *norms = test_block(own.state.truth.count * sizeof *norms);
        size_t count = 0;
        REQUIRE_OK(autoclip_shared_values(own.history, norms, own.state.truth.count, &count));
        REQUIRE(count == own.state.truth.count, "the history holds %zu norms of %zu", count, own.state.truth.count);
        for (size_t i = 0; i < count; ++i) REQUIRE_SAME(own.state.truth.sorted[i], norms[i]);
        free(norms);
        REQUIRE_OK(autoclip_shared_destroy(own.history));
    }
    window_destroy(&own.state);
    return 0;
}

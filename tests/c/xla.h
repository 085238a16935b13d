/* The part of XLA that calls the entry points for XLA: a call frame that is built here by hand.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_TEST_XLA_H
#define AUTOCLIP_TEST_XLA_H

#include "test.h"

#include "../../csrc/xla/ffi.h"

xla_error *autoclip_xla_window(xla_call *call);
xla_error *autoclip_xla_tree(xla_call *call);

typedef xla_error *handler(xla_call *call);

struct xla_error {
    int code;
    char message[200];
};

static xla_error raised;

static inline xla_error *create_error(xla_error_arguments *arguments) {
    REQUIRE(arguments->struct_size == sizeof *arguments, "struct_size is %zu", arguments->struct_size);
    raised.code = arguments->code;
    (void)snprintf(raised.message, sizeof raised.message, "%s", arguments->message);
    return &raised;
}

enum { OPERANDS = 4, RESULTS = 2, RANK = 2 };

typedef struct frame {
    xla_api api;
    xla_call call;
    xla_buffer buffers[OPERANDS + RESULTS];
    xla_buffer *operands[OPERANDS];
    xla_buffer *results[RESULTS];
    int64_t sizes[OPERANDS + RESULTS][RANK];
    xla_scalar attribute;
    int64_t history;
    int kind;
    void *value;
} frame;

static inline xla_buffer buffer_of(int type, void *data, int64_t rank, int64_t *sizes) {
    return (xla_buffer){.struct_size = sizeof(xla_buffer), .type = type, .data = data, .rank = rank, .sizes = sizes};
}

static inline void frame_create(frame *own) {
    memset(own, 0, sizeof *own);
    own->api = (xla_api){.struct_size = sizeof own->api, .create_error = create_error};
    own->call = (xla_call){.struct_size = sizeof own->call, .api = &own->api};
    for (int i = 0; i < OPERANDS; ++i) own->operands[i] = &own->buffers[i];
    for (int i = 0; i < RESULTS; ++i) own->results[i] = &own->buffers[OPERANDS + i];
    own->call.operands = (xla_buffers){.count = OPERANDS, .buffers = own->operands};
    own->call.results = (xla_buffers){.count = RESULTS, .buffers = own->results};
}

static inline void frame_set(frame *own, int at, int type, void *data, int64_t rank, int64_t first, int64_t second) {
    own->sizes[at][0] = first;
    own->sizes[at][1] = second;
    own->buffers[at] = buffer_of(type, data, rank, own->sizes[at]);
}

/* norms f32[2,N], recorded s32, norm f32, percentile -> norms, threshold */
static inline void window_frame(frame *own, float *norms, int64_t window, int32_t *recorded, float *norm,
                                double *percentile, float *after, float *threshold) {
    frame_create(own);
    frame_set(own, 0, XLA_F32, norms, 2, 2, window);
    frame_set(own, 1, XLA_S32, recorded, 0, 0, 0);
    frame_set(own, 2, XLA_F32, norm, 0, 0, 0);
    frame_set(own, 3, XLA_F64, percentile, 1, 1, 0);
    frame_set(own, 4, XLA_F32, after, 2, 2, window);
    frame_set(own, 5, XLA_F32, threshold, 0, 0, 0);
}

static inline void frame_name_history(frame *own, uint64_t history) {
    own->history = (int64_t)history;
    own->kind = XLA_SCALAR_ATTRIBUTE;
    own->attribute = (xla_scalar){.type = XLA_S64, .value = &own->history};
    own->value = &own->attribute;
    own->call.attributes = (xla_attributes){.count = 1, .kinds = &own->kind, .values = &own->value};
}

/* previous f32[1], recorded s32, norm f32, percentile; attribute `history` s64 -> previous, threshold */
static inline void tree_frame(frame *own, uint64_t history, float *previous, int32_t *recorded, float *norm,
                              double *percentile, float *previous_after, float *threshold) {
    frame_create(own);
    frame_set(own, 0, XLA_F32, previous, 1, 1, 0);
    frame_set(own, 1, XLA_S32, recorded, 0, 0, 0);
    frame_set(own, 2, XLA_F32, norm, 0, 0, 0);
    frame_set(own, 3, XLA_F64, percentile, 1, 1, 0);
    frame_set(own, 4, XLA_F32, previous_after, 1, 1, 0);
    frame_set(own, 5, XLA_F32, threshold, 0, 0, 0);
    frame_name_history(own, history);
}

#endif /* AUTOCLIP_TEST_XLA_H */

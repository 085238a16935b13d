/* The part of TensorFlow that registers and calls the op. It is made here by hand, and it can fail.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_TEST_TENSORFLOW_H
#define AUTOCLIP_TEST_TENSORFLOW_H

#include "test.h"

typedef int TF_Code;
typedef int TF_DataType;
typedef struct TF_Status TF_Status;
typedef struct TF_Tensor TF_Tensor;
typedef struct TF_OpDefinitionBuilder TF_OpDefinitionBuilder;
typedef struct TF_ShapeInferenceContext TF_ShapeInferenceContext;
typedef struct TF_ShapeHandle TF_ShapeHandle;
typedef struct TF_KernelBuilder TF_KernelBuilder;
typedef struct TF_OpKernelConstruction TF_OpKernelConstruction;
typedef struct TF_OpKernelContext TF_OpKernelContext;

#include "../../csrc/tensorflow/functions.h"

typedef void (*function)(void);
const char *autoclip_tensorflow_register(function (*find)(const char *name));

enum { OK = 0, INVALID_ARGUMENT = 3, FAILED_PRECONDITION = 9, OUT_OF_MEMORY = 8 };
enum { NORMS, RECORDED_STEPS, NORM, PERCENTILE, HISTORY, INPUTS };
enum { NORMS_AFTER, THRESHOLD, OUTPUTS };
enum { DIGITS = 12 };

struct TF_Status {
    TF_Code code;
    char message[200];
};

struct TF_Tensor {
    void *data;
    int dimensions;
    int64_t sizes[3];
    int64_t count;
};

struct TF_ShapeHandle {
    int of; /* the number of an input; -1: a scalar */
};

struct TF_ShapeInferenceContext {
    int outputs[OUTPUTS];
};

struct TF_OpKernelContext {
    TF_Tensor inputs[INPUTS];
    int fail_at_input, fail_at_output; /* the number of the one that cannot be had */
    float *norms, *threshold;          /* blocks that last until the next call */
    int64_t norms_sizes[3];
    int norms_dimensions;
    size_t norms_bytes;
    TF_Status failure;
};

struct TF_OpDefinitionBuilder {
    char text[300];
};

static struct {
    const char *missing; /* the function that is not there */
    bool refuse_op, refuse_kernel;
    int definitions, kernels, live; /* registered; handles that were not given back */
    void *outputs[OUTPUTS];
    TF_OpDefinitionBuilder op;
    void (*infer_shapes)(TF_ShapeInferenceContext *, TF_Status *);
    void (*compute)(void *, TF_OpKernelContext *);
} made;

static void *handle(size_t size) {
    void *block = calloc(1, size);
    REQUIRE(block != NULL, "the test itself is out of memory");
    made.live += 1;
    return block;
}

static void give_back(void *block) {
    free(block);
    made.live -= 1;
}

static TF_Status *TF_NewStatus(void) { return handle(sizeof(TF_Status)); }
static void TF_DeleteStatus(TF_Status *status) { give_back(status); }
static TF_Code TF_GetCode(const TF_Status *status) { return status->code; }

static void TF_SetStatus(TF_Status *status, TF_Code code, const char *message) {
    status->code = code;
    (void)snprintf(status->message, sizeof status->message, "%s", message);
}

static void add_line(const char *kind, const char *line) {
    const size_t used = strlen(made.op.text);
    (void)snprintf(made.op.text + used, sizeof made.op.text - used, "%s %s\n", kind, line);
}

static TF_OpDefinitionBuilder *TF_NewOpDefinitionBuilder(const char *name) {
    made.op.text[0] = '\0';
    add_line("op", name);
    return &made.op;
}

static void TF_OpDefinitionBuilderAddInput(TF_OpDefinitionBuilder *op, const char *line) {
    (void)op;
    add_line("in", line);
}

static void TF_OpDefinitionBuilderAddOutput(TF_OpDefinitionBuilder *op, const char *line) {
    (void)op;
    add_line("out", line);
}

static void TF_OpDefinitionBuilderSetIsStateful(TF_OpDefinitionBuilder *op, bool stateful) {
    (void)op;
    add_line("stateful", stateful ? "yes" : "no");
}

static void TF_OpDefinitionBuilderSetShapeInferenceFunction(TF_OpDefinitionBuilder *op,
                                                            void (*infer)(TF_ShapeInferenceContext *, TF_Status *)) {
    (void)op;
    made.infer_shapes = infer;
}

static void TF_RegisterOpDefinition(TF_OpDefinitionBuilder *op, TF_Status *status) {
    (void)op;
    made.definitions += 1;
    if (made.refuse_op) TF_SetStatus(status, INVALID_ARGUMENT, "refused");
}

static TF_ShapeHandle *TF_NewShapeHandle(void) {
    TF_ShapeHandle *shape = handle(sizeof(TF_ShapeHandle));
    shape->of = -2; /* unknown */
    return shape;
}
static void TF_DeleteShapeHandle(TF_ShapeHandle *shape) { give_back(shape); }

static TF_ShapeHandle *TF_ShapeInferenceContextScalar(TF_ShapeInferenceContext *context) {
    (void)context;
    TF_ShapeHandle *shape = TF_NewShapeHandle();
    shape->of = -1;
    return shape;
}

static void TF_ShapeInferenceContextGetInput(TF_ShapeInferenceContext *context, int at, TF_ShapeHandle *shape,
                                             TF_Status *status) {
    (void)context;
    (void)status;
    shape->of = at;
}

static void TF_ShapeInferenceContextSetOutput(TF_ShapeInferenceContext *context, int at, TF_ShapeHandle *shape,
                                              TF_Status *status) {
    (void)status;
    context->outputs[at] = shape->of;
}

static TF_KernelBuilder *TF_NewKernelBuilder(const char *name, const char *device,
                                             void *(*create)(TF_OpKernelConstruction *),
                                             void (*compute)(void *, TF_OpKernelContext *), void (*destroy)(void *)) {
    REQUIRE(strcmp(name, "AutoClipObserve") == 0 && strcmp(device, "CPU") == 0, "%s on %s", name, device);
    REQUIRE(create == NULL && destroy == NULL, "the op has no state of its own");
    made.compute = compute;
    return NULL;
}

static void TF_RegisterKernelBuilder(const char *name, TF_KernelBuilder *builder, TF_Status *status) {
    (void)builder;
    REQUIRE(strcmp(name, "AutoClipObserve") == 0, "%s", name);
    made.kernels += 1;
    if (made.refuse_kernel) TF_SetStatus(status, INVALID_ARGUMENT, "refused");
}

static void TF_GetInput(TF_OpKernelContext *context, int at, TF_Tensor **tensor, TF_Status *status) {
    if (at == context->fail_at_input) {
        TF_SetStatus(status, OUT_OF_MEMORY, "no input");
        return;
    }
    *tensor = handle(sizeof **tensor);
    **tensor = context->inputs[at];
}

static int TF_NumDims(const TF_Tensor *tensor) { return tensor->dimensions; }
static int64_t TF_Dim(const TF_Tensor *tensor, int at) { return tensor->sizes[at]; }
static int64_t TF_TensorElementCount(const TF_Tensor *tensor) { return tensor->count; }
static void *TF_TensorData(const TF_Tensor *tensor) { return tensor->data; }
static void TF_DeleteTensor(TF_Tensor *tensor) { give_back(tensor); }

static TF_Tensor *TF_AllocateOutput(TF_OpKernelContext *context, int at, TF_DataType type, const int64_t *sizes,
                                    int dimensions, size_t bytes, TF_Status *status) {
    REQUIRE(type == 1, "output %d has type %d", at, type); /* float */
    if (at == context->fail_at_output) {
        TF_SetStatus(status, OUT_OF_MEMORY, "no output");
        return NULL;
    }
    TF_Tensor *tensor = handle(sizeof *tensor);
    free(made.outputs[at]);
    tensor->data = made.outputs[at] = test_block(bytes);
    if (at == NORMS_AFTER) {
        context->norms_dimensions = dimensions;
        for (int i = 0; i < dimensions; ++i) context->norms_sizes[i] = sizes[i];
        context->norms_bytes = bytes;
        context->norms = tensor->data;
    } else {
        REQUIRE(dimensions == 0 && bytes == sizeof(float), "the threshold has %d dimensions", dimensions);
        context->threshold = tensor->data;
    }
    return tensor;
}

static void TF_OpKernelContext_Failure(TF_OpKernelContext *context, TF_Status *status) { context->failure = *status; }

static function find(const char *name) {
    if (made.missing != NULL && strcmp(name, made.missing) == 0) return NULL;
#define FOUND(result, known, parameters)                                                                               \
    if (strcmp(name, #known) == 0) return (function)known;
    TF_FUNCTIONS(FOUND)
    REQUIRE(false, "%s was asked for", name);
    return NULL;
}

static inline void require_op(void) {
    made.missing = NULL;
    made.refuse_op = made.refuse_kernel = false;
    REQUIRE(autoclip_tensorflow_register(find) == NULL, "the op was not registered");
}

static inline void compute(TF_OpKernelContext *context) {
    made.compute(NULL, context);
    REQUIRE(made.live == 0, "%d handles were not given back", made.live);
}

/* Between 0 and 127, as digits in base 128. */
static inline void set_percentile(int32_t *digits, double percentile) {
    for (int i = 0; i < DIGITS; ++i) {
        digits[i] = (int32_t)percentile;
        percentile = (percentile - digits[i]) * 128;
    }
}

#endif /* AUTOCLIP_TEST_TENSORFLOW_H */

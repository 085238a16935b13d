/* The op of TensorFlow, registered with and called by a TensorFlow that is made here by hand, and that can fail.
 *
 * SPDX-License-Identifier: MIT */
#include "arrays.h"

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

/* --- The part of TensorFlow --------------------------------------------------------------------------------------- */

enum { OK = 0, INVALID_ARGUMENT = 3, FAILED_PRECONDITION = 9, OUT_OF_MEMORY = 8 };
enum { NORMS, RECORDED_STEPS, NORM, PERCENTILE, HISTORY, INPUTS };
enum { NORMS_AFTER, THRESHOLD, OUTPUTS };
enum { PLACES = 20, DIGITS = 12 };

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
    float norms[PLACES], threshold[1];
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
    if (at == NORMS_AFTER) {
        context->norms_dimensions = dimensions;
        for (int i = 0; i < dimensions; ++i) context->norms_sizes[i] = sizes[i];
        context->norms_bytes = bytes;
        tensor->data = context->norms;
    } else {
        REQUIRE(dimensions == 0 && bytes == sizeof(float), "the threshold has %d dimensions", dimensions);
        tensor->data = context->threshold;
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

/* --- Tests -------------------------------------------------------------------------------------------------------- */

#define NAME(result, name, parameters) #name,
static const char *const names[] = {TF_FUNCTIONS(NAME)};

static void require_op(void) {
    made.missing = NULL;
    made.refuse_op = made.refuse_kernel = false;
    REQUIRE(autoclip_tensorflow_register(find) == NULL, "the op was not registered");
}

static void test_op_is_registered_once_and_whole(void) {
    for (size_t i = 0; i < sizeof names / sizeof *names; ++i) {
        made.missing = names[i];
        const char *obstacle = autoclip_tensorflow_register(find);
        REQUIRE(obstacle != NULL && strcmp(obstacle, names[i]) == 0, "the obstacle is %s", obstacle);
    }
    REQUIRE(made.definitions == 0, "something was registered without all functions");
    made.missing = NULL;
    for (int i = 0; i < 2; ++i) {
        made.refuse_op = i == 0;
        made.refuse_kernel = i == 1;
        REQUIRE(autoclip_tensorflow_register(find) != NULL, "a refusal was not told");
        REQUIRE(made.kernels == i, "a kernel was registered for an op that is not there");
    }
    require_op();
    const int definitions = made.definitions;
    require_op();
    REQUIRE(made.definitions == definitions, "the op was registered twice");
    const char *expected = "op AutoClipObserve\nin norms: float\nin recorded_steps: int32\nin norm: float\n"
                           "in percentile: int32\nin history: int64\nout norms_after: float\nout threshold: float\n"
                           "stateful yes\n";
    REQUIRE(strcmp(made.op.text, expected) == 0, "the op is\n%s", made.op.text);
    REQUIRE(made.live == 0, "%d handles were not given back", made.live);
}

static void test_shapes_are_those_of_the_inputs(void) {
    require_op();
    TF_ShapeInferenceContext context = {{77, 77}};
    TF_Status status = {0};
    made.infer_shapes(&context, &status);
    REQUIRE(context.outputs[NORMS_AFTER] == NORMS && context.outputs[THRESHOLD] == -1, "%d and %d", context.outputs[0],
            context.outputs[1]);
    REQUIRE(made.live == 0, "%d handles were not given back", made.live);
}

typedef struct given {
    float norms[PLACES];
    int32_t recorded_steps;
    float norm;
    int64_t history;
    int32_t digits[DIGITS]; /* at the end, so that a sanitizer sees one too many */
} given;

static void set_percentile(given *own, double percentile) {
    for (int i = 0; i < DIGITS; ++i) {
        own->digits[i] = (int32_t)percentile;
        percentile = (percentile - own->digits[i]) * 128;
    }
}

static void context_create(TF_OpKernelContext *context, given *own, int64_t window) {
    memset(context, 0, sizeof *context);
    context->fail_at_input = context->fail_at_output = -1;
    context->inputs[NORMS] =
        window == 0 ? (TF_Tensor){own->norms, 1, {1}, 1} : (TF_Tensor){own->norms, 2, {2, window}, 2 * window};
    context->inputs[RECORDED_STEPS] = (TF_Tensor){&own->recorded_steps, 0, {0}, 1};
    context->inputs[NORM] = (TF_Tensor){&own->norm, 0, {0}, 1};
    context->inputs[PERCENTILE] = (TF_Tensor){own->digits, 1, {DIGITS}, DIGITS};
    context->inputs[HISTORY] = (TF_Tensor){&own->history, 0, {0}, 1};
}

static void compute(TF_OpKernelContext *context) {
    made.compute(NULL, context);
    REQUIRE(made.live == 0, "%d handles were not given back", made.live);
}

static void follow_model(int64_t window) {
    const size_t bytes = 2 * (size_t)window * sizeof(float);
    window_program twin;
    given own = {.recorded_steps = 0};
    TF_OpKernelContext context;
    require_op();
    window_create(&twin, (size_t)window, VALUES_RANDOM, (source){.state = 1});
    for (int i = 0; i < 2 * window; ++i) own.norms[i] = INFINITY;
    for (int i = 0; i < 200; ++i) {
        const double percentile = 100 * source_uniform(&twin.from);
        own.norm = norm_draw(VALUES_RANDOM, 0, &twin.from);
        set_percentile(&own, percentile);
        context_create(&context, &own, window);
        compute(&context);
        REQUIRE(context.failure.code == OK, "%s", context.failure.message);
        REQUIRE(context.norms_dimensions == 2 && context.norms_sizes[0] == 2 && context.norms_sizes[1] == window &&
                    context.norms_bytes == bytes,
                "the norms come back in another shape");
        if (isfinite(own.norm)) {
            model_push(&twin.truth, (double)own.norm);
            own.recorded_steps += 1;
        }
        REQUIRE_SAME((double)model_threshold(&twin.truth, percentile), (double)context.threshold[0]);
        memcpy(own.norms, context.norms, bytes);
        memcpy(twin.norms, context.norms, bytes);
        twin.recorded = (size_t)own.recorded_steps;
        window_judge(&twin);
    }
    window_destroy(&twin);
}

static void test_window_of_a_graph_is_that_of_the_model(void) {
    follow_model(7);
    follow_model(1);
}

static void test_tree_of_a_graph_is_that_of_the_model(void) {
    tree_program twin;
    given own = {.norms = {INFINITY}};
    TF_OpKernelContext context;
    require_op();
    tree_create(&twin, VALUES_RANDOM, (source){.state = 2});
    own.history = (int64_t)twin.id;
    for (int i = 0; i < 300; ++i) {
        const double percentile = 100 * source_uniform(&twin.from);
        own.norm = norm_draw(VALUES_RANDOM, 0, &twin.from);
        set_percentile(&own, percentile);
        if (isfinite(own.norm)) model_push(&twin.truth, (double)own.norm);
        for (int again = 0; again < 2; ++again) { /* replicas take a step side by side */
            context_create(&context, &own, 0);
            compute(&context);
            REQUIRE(context.failure.code == OK, "%s", context.failure.message);
            REQUIRE(context.norms_dimensions == 1 && context.norms_bytes == sizeof(float), "another shape");
            REQUIRE_SAME((double)model_threshold(&twin.truth, percentile), (double)context.threshold[0]);
            REQUIRE_SAME((double)(isfinite(own.norm) ? own.norm : own.norms[0]), (double)context.norms[0]);
        }
        own.recorded_steps += isfinite(own.norm) ? 1 : 0;
        own.norms[0] = context.norms[0];
    }
    tree_destroy(&twin);
}

static void require_failure(TF_OpKernelContext *context, TF_Code code, const char *message) {
    compute(context);
    REQUIRE(context->failure.code == code, "the code is %d: %s", context->failure.code, context->failure.message);
    REQUIRE(strstr(context->failure.message, message) != NULL, "the message is '%s'", context->failure.message);
    REQUIRE(code != INVALID_ARGUMENT || context->norms_bytes == 0, "there is an output");
}

static void test_bad_calls_are_refused(void) {
    static const double bad[] = {100.5, 127, -1};
    given own = {.norm = 2, .digits = {50}};
    TF_OpKernelContext context;
    require_op();
    for (int i = 0; i < PLACES; ++i) own.norms[i] = INFINITY;
    for (int at = RECORDED_STEPS; at < INPUTS; ++at) {
        for (int64_t count = 0; count <= 13; count += 13) {
            context_create(&context, &own, 2);
            context.inputs[at].count = count;
            require_failure(&context, INVALID_ARGUMENT, "wrong size");
        }
    }
    context_create(&context, &own, 2);
    context.inputs[NORMS].dimensions = 3;
    require_failure(&context, INVALID_ARGUMENT, "no place for norms");
    for (int64_t count = 0; count < 2; ++count) {
        context_create(&context, &own, 2);
        context.inputs[NORMS].count = count;
        require_failure(&context, INVALID_ARGUMENT, "no place for norms");
    }
    own.history = 1;
    context_create(&context, &own, 0);
    context.inputs[NORMS].count = 0;
    require_failure(&context, INVALID_ARGUMENT, "no place for norms");
    own.history = 0;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; ++i) {
        set_percentile(&own, bad[i]);
        context_create(&context, &own, 2);
        require_failure(&context, INVALID_ARGUMENT, autoclip_status_message(AUTOCLIP_BAD_PERCENTILE));
    }
    set_percentile(&own, 50);
    own.history = INT64_MAX; /* nobody's */
    context_create(&context, &own, 0);
    require_failure(&context, FAILED_PRECONDITION, autoclip_status_message(AUTOCLIP_NO_HISTORY));
}

static void test_failures_of_tensorflow_are_passed_on(void) {
    given own = {.norm = 2, .digits = {50}};
    TF_OpKernelContext context;
    require_op();
    for (int i = 0; i < PLACES; ++i) own.norms[i] = INFINITY;
    for (int at = 0; at < INPUTS; ++at) {
        context_create(&context, &own, 2);
        context.fail_at_input = at;
        require_failure(&context, OUT_OF_MEMORY, "no input");
    }
    for (int at = 0; at < OUTPUTS; ++at) {
        context_create(&context, &own, 2);
        context.fail_at_output = at;
        require_failure(&context, OUT_OF_MEMORY, "no output");
    }
}

TEST_MAIN(TEST(test_op_is_registered_once_and_whole), TEST(test_shapes_are_those_of_the_inputs),
          TEST(test_window_of_a_graph_is_that_of_the_model), TEST(test_tree_of_a_graph_is_that_of_the_model),
          TEST(test_bad_calls_are_refused), TEST(test_failures_of_tensorflow_are_passed_on));

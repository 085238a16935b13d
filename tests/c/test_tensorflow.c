/* The op of TensorFlow, registered with and called by a TensorFlow that is made here by hand, and that can fail.
 *
 * SPDX-License-Identifier: MIT */
#include "arrays.h"

#include "tensorflow.h"

/* --- Tests -------------------------------------------------------------------------------------------------------- */

#define NAME(result, name, parameters) #name,
static const char *const names[] = {TF_FUNCTIONS(NAME)};

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

enum { PLACES = 20 };

typedef struct given {
    float norms[PLACES];
    int32_t recorded_steps;
    float norm;
    int64_t history;
    int32_t digits[DIGITS]; /* at the end, so that a sanitizer sees one too many */
} given;

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
        set_percentile(own.digits, percentile);
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

/* The last digit is 2^-77: it shows where the lowest norm is as good as 0 beside the next. */
static void test_percentile_has_all_its_digits(void) {
    const float low = 1e-30F;
    const float high = 3e38F;
    given own = {.norms = {low, high, low, high}, .recorded_steps = 2, .digits = {[DIGITS - 1] = 1}};
    TF_OpKernelContext context;
    require_op();
    context_create(&context, &own, 2);
    compute(&context);
    REQUIRE(context.failure.code == OK, "%s", context.failure.message);
    const double step = (double)high - (double)low;
    REQUIRE_SAME((double)(float)((double)low + step * (0x1p-77 / 100)), (double)context.threshold[0]);
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
        set_percentile(own.digits, percentile);
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
        set_percentile(own.digits, bad[i]);
        context_create(&context, &own, 2);
        require_failure(&context, INVALID_ARGUMENT, autoclip_status_message(AUTOCLIP_BAD_PERCENTILE));
    }
    set_percentile(own.digits, 50);
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
          TEST(test_window_of_a_graph_is_that_of_the_model), TEST(test_percentile_has_all_its_digits),
          TEST(test_tree_of_a_graph_is_that_of_the_model), TEST(test_bad_calls_are_refused),
          TEST(test_failures_of_tensorflow_are_passed_on));

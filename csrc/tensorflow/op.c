/* An op of TensorFlow through which a graph on the CPU observes a norm.
 *
 *   AutoClipObserve (norms float[..], recorded_steps int32, norm float, percentile int32[12], history int64)
 *                -> (norms float[..], threshold float)
 *       With history = 0 autoclip_window_observe for a copy of the norms, float[2,N]. Else autoclip_tree_observe, for a
 *       copy of the previous norm, float[1]. The percentile is given as digits in base 128, the first one whole: integers,
 *       which any program holds exactly.
 *
 * There is one table of histories per process, so this lives in the kernel's own library, which TensorFlow does not load
 * and which is not linked to TensorFlow: the program that has loaded both says where TensorFlow's functions are.
 *
 * SPDX-License-Identifier: MIT */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <autoclip.h>

#include "../arrays/observe.h"
#include "../src/percentile.h"
#include "functions.h"

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

enum { TF_OK = 0, TF_INVALID_ARGUMENT = 3, TF_FAILED_PRECONDITION = 9 };
enum { TF_FLOAT = 1 };

enum { NORMS, RECORDED_STEPS, NORM, PERCENTILE, HISTORY, INPUTS };
enum { NORMS_AFTER, THRESHOLD };
enum { DIGITS = 12 };

typedef void (*function)(void);
typedef function (*find_function)(const char *name);

#define MEMBER(result, name, parameters) result(*name) parameters;
static struct {
    TF_FUNCTIONS(MEMBER)
} tf;

static void infer_shapes(TF_ShapeInferenceContext *context, TF_Status *status) {
    TF_ShapeHandle *shape = tf.TF_NewShapeHandle();
    tf.TF_ShapeInferenceContextGetInput(context, NORMS, shape, status);
    tf.TF_ShapeInferenceContextSetOutput(context, NORMS_AFTER, shape, status);
    tf.TF_DeleteShapeHandle(shape);
    shape = tf.TF_ShapeInferenceContextScalar(context);
    tf.TF_ShapeInferenceContextSetOutput(context, THRESHOLD, shape, status);
    tf.TF_DeleteShapeHandle(shape);
}

static float *make_output(TF_OpKernelContext *context, int at, const int64_t *shape, int dimensions, size_t bytes,
                          TF_Status *status) {
    TF_Tensor *tensor = tf.TF_AllocateOutput(context, at, TF_FLOAT, shape, dimensions, bytes, status);
    if (tensor == NULL) return NULL;
    float *data = tf.TF_TensorData(tensor);
    tf.TF_DeleteTensor(tensor); /* the handle: what it shows is the context's */
    return data;
}

static void observe(TF_OpKernelContext *context, TF_Tensor *const *inputs, TF_Status *status) {
    static const int64_t sizes[INPUTS] = {[RECORDED_STEPS] = 1, [NORM] = 1, [PERCENTILE] = DIGITS, [HISTORY] = 1};
    const void *data[INPUTS];
    for (int i = 0; i < INPUTS; ++i) {
        data[i] = tf.TF_TensorData(inputs[i]);
        if (sizes[i] != 0 && tf.TF_TensorElementCount(inputs[i]) != sizes[i]) {
            tf.TF_SetStatus(status, TF_INVALID_ARGUMENT, "AutoClipObserve: an input has a wrong size");
            return;
        }
    }
    const uint64_t history = *(const uint64_t *)data[HISTORY];
    const int dimensions = tf.TF_NumDims(inputs[NORMS]);
    const int64_t norms_size = tf.TF_TensorElementCount(inputs[NORMS]);
    if (dimensions > 2 || norms_size < (history != 0 ? 1 : 2)) {
        tf.TF_SetStatus(status, TF_INVALID_ARGUMENT, "AutoClipObserve: there is no place for norms");
        return;
    }
    double percentile = 0.0;
    for (int i = DIGITS - 1; i >= 0; --i) percentile = percentile / 128.0 + ((const int32_t *)data[PERCENTILE])[i];
    if (!is_percentile(percentile)) {
        tf.TF_SetStatus(status, TF_INVALID_ARGUMENT, autoclip_status_message(AUTOCLIP_BAD_PERCENTILE));
        return;
    }
    int64_t shape[2];
    for (int i = 0; i < dimensions; ++i) shape[i] = tf.TF_Dim(inputs[NORMS], i);
    const size_t norms_bytes = (size_t)norms_size * sizeof(float);
    float *norms = make_output(context, NORMS_AFTER, shape, dimensions, norms_bytes, status);
    float *threshold = make_output(context, THRESHOLD, NULL, 0, sizeof(float), status);
    if (tf.TF_GetCode(status) != TF_OK) return;
    memcpy(norms, data[NORMS], norms_bytes);
    const uint32_t recorded_steps = *(const uint32_t *)data[RECORDED_STEPS];
    const float norm = *(const float *)data[NORM];
    if (history == 0) {
        *threshold = autoclip_window_observe(norms, (size_t)norms_size / 2, recorded_steps, norm, percentile);
        return;
    }
    const autoclip_status done = autoclip_tree_observe(history, recorded_steps, norms, norm, percentile, threshold);
    if (done != AUTOCLIP_OK) tf.TF_SetStatus(status, TF_FAILED_PRECONDITION, autoclip_status_message(done));
}

static void compute(void *kernel, TF_OpKernelContext *context) {
    (void)kernel;
    TF_Status *status = tf.TF_NewStatus();
    TF_Tensor *inputs[INPUTS];
    int found = 0;
    while (found < INPUTS && tf.TF_GetCode(status) == TF_OK) {
        tf.TF_GetInput(context, found, &inputs[found], status);
        found += tf.TF_GetCode(status) == TF_OK;
    }
    if (found == INPUTS) observe(context, inputs, status);
    while (found > 0) tf.TF_DeleteTensor(inputs[--found]);
    if (tf.TF_GetCode(status) != TF_OK) tf.TF_OpKernelContext_Failure(context, status);
    tf.TF_DeleteStatus(status);
}

static const char *register_op(void) {
    static const char *const inputs[INPUTS] = {"norms: float", "recorded_steps: int32", "norm: float",
                                               "percentile: int32", "history: int64"};
    TF_OpDefinitionBuilder *op = tf.TF_NewOpDefinitionBuilder("AutoClipObserve");
    for (int i = 0; i < INPUTS; ++i) tf.TF_OpDefinitionBuilderAddInput(op, inputs[i]);
    tf.TF_OpDefinitionBuilderAddOutput(op, "norms_after: float");
    tf.TF_OpDefinitionBuilderAddOutput(op, "threshold: float");
    tf.TF_OpDefinitionBuilderSetIsStateful(op, true);
    tf.TF_OpDefinitionBuilderSetShapeInferenceFunction(op, infer_shapes);
    TF_Status *status = tf.TF_NewStatus();
    tf.TF_RegisterOpDefinition(op, status);
    if (tf.TF_GetCode(status) == TF_OK) {
        TF_KernelBuilder *kernel = tf.TF_NewKernelBuilder("AutoClipObserve", "CPU", NULL, compute, NULL);
        tf.TF_RegisterKernelBuilder("AutoClipObserve", kernel, status);
    }
    const bool done = tf.TF_GetCode(status) == TF_OK;
    tf.TF_DeleteStatus(status);
    return done ? NULL : "TensorFlow refuses the op";
}

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif
/* Register the op with the TensorFlow whose functions `find` finds by their names, once per process. Returns NULL, or
 * what is amiss: the name of a function that is not there, and then nothing was registered. */
const char *autoclip_tensorflow_register(find_function find);
#if defined(__GNUC__)
#pragma GCC visibility pop
#endif

const char *autoclip_tensorflow_register(find_function find) {
    static bool registered;
    if (registered) return NULL;
#define FIND(result, name, parameters)                                                                                 \
    tf.name = (result(*) parameters)find(#name);                                                                       \
    if (tf.name == NULL) return #name;
    TF_FUNCTIONS(FIND)
    const char *obstacle = register_op();
    registered = obstacle == NULL;
    return obstacle;
}

/* The door into TensorFlow: an op that takes one step of AutoClip on the CPU.
 *
 *   AutoClipStep (rule int64[3], max_threshold float, percentile int32[12], norms float[..], counts int32[4], norm float)
 *             -> (norms float[..], counts int32[4], last float[4], scale float)
 *       What autoclip_arrays_step does, and says of its arguments, with copies of the norms and the counts. One op and not
 *       many, because each costs a graph one to three microseconds, one after the other.
 *
 * There is one table of histories per process, so this lives in the kernel's own library, which TensorFlow does not load
 * and which is not linked to TensorFlow: the program that has loaded both says where TensorFlow's functions are. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <autoclip.h>

#include "../arrays/step.h"
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
enum { TF_FLOAT = 1, TF_INT32 = 3 };

enum { RULE, MAX_THRESHOLD, PERCENTILE, NORMS, COUNTS, NORM, INPUTS };
enum { NORMS_AFTER, COUNTS_AFTER, LAST, SCALE };

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
    tf.TF_ShapeInferenceContextGetInput(context, COUNTS, shape, status);
    tf.TF_ShapeInferenceContextSetOutput(context, COUNTS_AFTER, shape, status);
    tf.TF_ShapeInferenceContextSetOutput(context, LAST, shape, status); /* as many as there are counts */
    tf.TF_DeleteShapeHandle(shape);
    shape = tf.TF_ShapeInferenceContextScalar(context);
    tf.TF_ShapeInferenceContextSetOutput(context, SCALE, shape, status);
    tf.TF_DeleteShapeHandle(shape);
}

static void *make_output(TF_OpKernelContext *context, int at, TF_DataType type, const int64_t *shape, int dimensions,
                         size_t bytes, TF_Status *status) {
    TF_Tensor *tensor = tf.TF_AllocateOutput(context, at, type, shape, dimensions, bytes, status);
    if (tensor == NULL) return NULL;
    void *data = tf.TF_TensorData(tensor);
    tf.TF_DeleteTensor(tensor); /* the handle: what it shows is the context's */
    return data;
}

static void take_step(TF_OpKernelContext *context, TF_Tensor *const *inputs, TF_Status *status) {
    static const int64_t sizes[INPUTS] = {3, 1, AUTOCLIP_DIGITS, 0, AUTOCLIP_COUNTS, 1};
    const void *data[INPUTS];
    for (int i = 0; i < INPUTS; ++i) {
        data[i] = tf.TF_TensorData(inputs[i]);
        if (sizes[i] != 0 && tf.TF_TensorElementCount(inputs[i]) != sizes[i]) {
            tf.TF_SetStatus(status, TF_INVALID_ARGUMENT, "AutoClipStep: an input has a wrong size");
            return;
        }
    }
    const autoclip_rule *rule = data[RULE];
    const int dimensions = tf.TF_NumDims(inputs[NORMS]);
    const int64_t norms_size = tf.TF_TensorElementCount(inputs[NORMS]);
    if (dimensions > 2 || norms_size < (rule->history != 0 ? 1 : 2)) {
        tf.TF_SetStatus(status, TF_INVALID_ARGUMENT, "AutoClipStep: there is no place for norms");
        return;
    }
    int64_t shape[2];
    for (int i = 0; i < dimensions; ++i) shape[i] = tf.TF_Dim(inputs[NORMS], i);
    const int64_t count = AUTOCLIP_COUNTS;
    const size_t norms_bytes = (size_t)norms_size * sizeof(float);
    const size_t counts_bytes = AUTOCLIP_COUNTS * sizeof(int32_t);
    const size_t last_bytes = AUTOCLIP_LAST * sizeof(float);
    float *norms = make_output(context, NORMS_AFTER, TF_FLOAT, shape, dimensions, norms_bytes, status);
    int32_t *counts = make_output(context, COUNTS_AFTER, TF_INT32, &count, 1, counts_bytes, status);
    float *last = make_output(context, LAST, TF_FLOAT, &count, 1, last_bytes, status);
    float *scale = make_output(context, SCALE, TF_FLOAT, NULL, 0, sizeof(float), status);
    if (tf.TF_GetCode(status) != TF_OK) return;
    memcpy(norms, data[NORMS], norms_bytes);
    memcpy(counts, data[COUNTS], counts_bytes);
    const float max_threshold = *(const float *)data[MAX_THRESHOLD];
    const float norm = *(const float *)data[NORM];
    const autoclip_status done =
        autoclip_arrays_step(rule, max_threshold, data[PERCENTILE], norms, (size_t)norms_size, counts, norm, last);
    if (done != AUTOCLIP_OK) {
        tf.TF_SetStatus(status, TF_FAILED_PRECONDITION, autoclip_status_message(done));
        return;
    }
    *scale = last[AUTOCLIP_SCALE];
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
    if (found == INPUTS) take_step(context, inputs, status);
    while (found > 0) tf.TF_DeleteTensor(inputs[--found]);
    if (tf.TF_GetCode(status) != TF_OK) tf.TF_OpKernelContext_Failure(context, status);
    tf.TF_DeleteStatus(status);
}

static const char *register_op(void) {
    static const char *const inputs[INPUTS] = {"rule: int64",  "max_threshold: float", "percentile: int32",
                                               "norms: float", "counts: int32",        "norm: float"};
    static const char *const outputs[] = {"norms_after: float", "counts_after: int32", "last: float", "scale: float"};
    TF_OpDefinitionBuilder *op = tf.TF_NewOpDefinitionBuilder("AutoClipStep");
    for (int i = 0; i < INPUTS; ++i) tf.TF_OpDefinitionBuilderAddInput(op, inputs[i]);
    for (int i = 0; i < 4; ++i) tf.TF_OpDefinitionBuilderAddOutput(op, outputs[i]);
    tf.TF_OpDefinitionBuilderSetIsStateful(op, true);
    tf.TF_OpDefinitionBuilderSetShapeInferenceFunction(op, infer_shapes);
    TF_Status *status = tf.TF_NewStatus();
    tf.TF_RegisterOpDefinition(op, status);
    if (tf.TF_GetCode(status) == TF_OK) {
        TF_KernelBuilder *kernel = tf.TF_NewKernelBuilder("AutoClipStep", "CPU", NULL, compute, NULL);
        tf.TF_RegisterKernelBuilder("AutoClipStep", kernel, status);
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

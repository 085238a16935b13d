/* The door into TensorFlow: an op that takes one step of a shared history, on the CPU.
 *
 *   AutoClipObserve (history int64, step int32, previous float, norm float, percentile double) -> threshold float
 *       `history` is an id of the table of shared histories, in which the norm is remembered as step `step` after the norm
 *       `previous`. The threshold is the percentile of all norms remembered, which is infinite while there are none. An
 *       infinite norm asks for it and is not remembered: which norms count is decided by the caller. O(log n).
 *
 * There is one table per process, so this lives in the kernel's own library, which TensorFlow does not load and which is
 * not linked to TensorFlow: the program that has loaded both says where TensorFlow's functions are. */
#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <autoclip.h>

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

typedef void (*function)(void);
typedef function (*find_function)(const char *name);

#define MEMBER(result, name, parameters) result(*name) parameters;
static struct {
    TF_FUNCTIONS(MEMBER)
} tf;

static void infer_shape(TF_ShapeInferenceContext *context, TF_Status *status) {
    TF_ShapeHandle *scalar = tf.TF_ShapeInferenceContextScalar(context);
    tf.TF_ShapeInferenceContextSetOutput(context, 0, scalar, status);
    tf.TF_DeleteShapeHandle(scalar);
}

/* The data of an input, which must be one number; its type was checked when the graph was made. */
static const void *input(TF_OpKernelContext *context, int at, TF_Status *status) {
    TF_Tensor *tensor;
    tf.TF_GetInput(context, at, &tensor, status);
    if (tf.TF_GetCode(status) != TF_OK) return NULL;
    const void *data = tf.TF_TensorElementCount(tensor) == 1 ? tf.TF_TensorData(tensor) : NULL;
    tf.TF_DeleteTensor(tensor); /* the handle: what it shows is the op's until the op is done */
    if (data == NULL) tf.TF_SetStatus(status, TF_INVALID_ARGUMENT, "AutoClipObserve takes scalars");
    return data;
}

static void observe(TF_OpKernelContext *context, TF_Status *status) {
    const void *inputs[5];
    for (int i = 0; i < 5; ++i) {
        inputs[i] = input(context, i, status);
        if (inputs[i] == NULL) return;
    }
    const uint64_t id = *(const uint64_t *)inputs[0];
    const uint32_t step = *(const uint32_t *)inputs[1];
    const float previous = *(const float *)inputs[2];
    const float norm = *(const float *)inputs[3];
    const double percentile = *(const double *)inputs[4];
    double threshold = INFINITY;
    autoclip_status done;
    if (isfinite(norm)) {
        done = autoclip_shared_observe_step(id, step, (double)previous, (double)norm, percentile, &threshold);
    } else {
        done = autoclip_shared_percentile(id, percentile, &threshold);
        if (done == AUTOCLIP_EMPTY) done = AUTOCLIP_OK;
    }
    if (done != AUTOCLIP_OK) {
        tf.TF_SetStatus(status, TF_FAILED_PRECONDITION, autoclip_status_message(done));
        return;
    }
    TF_Tensor *output = tf.TF_AllocateOutput(context, 0, TF_FLOAT, NULL, 0, sizeof(float), status);
    if (output == NULL) return;
    *(float *)tf.TF_TensorData(output) = (float)threshold;
    tf.TF_DeleteTensor(output);
}

static void compute(void *kernel, TF_OpKernelContext *context) {
    (void)kernel;
    TF_Status *status = tf.TF_NewStatus();
    observe(context, status);
    if (tf.TF_GetCode(status) != TF_OK) tf.TF_OpKernelContext_Failure(context, status);
    tf.TF_DeleteStatus(status);
}

static const char *register_op(void) {
    TF_OpDefinitionBuilder *op = tf.TF_NewOpDefinitionBuilder("AutoClipObserve");
    tf.TF_OpDefinitionBuilderAddInput(op, "history: int64");
    tf.TF_OpDefinitionBuilderAddInput(op, "step: int32");
    tf.TF_OpDefinitionBuilderAddInput(op, "previous: float");
    tf.TF_OpDefinitionBuilderAddInput(op, "norm: float");
    tf.TF_OpDefinitionBuilderAddInput(op, "percentile: double");
    tf.TF_OpDefinitionBuilderAddOutput(op, "threshold: float");
    tf.TF_OpDefinitionBuilderSetIsStateful(op, true);
    tf.TF_OpDefinitionBuilderSetShapeInferenceFunction(op, infer_shape);
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

/* The functions of TensorFlow's C API that op.c calls: what each returns, its name, what it takes.
 *
 * Written after the documented interface, tensorflow/c/ops.h and tensorflow/c/kernels.h of the TensorFlow project
 * (https://github.com/tensorflow/tensorflow, Apache License 2.0), of which TensorFlow ships a copy; a test compiles every
 * line of this list against that copy.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_TENSORFLOW_FUNCTIONS_H
#define AUTOCLIP_TENSORFLOW_FUNCTIONS_H

#define TF_FUNCTIONS(X)                                                                                                \
    X(TF_Status *, TF_NewStatus, (void))                                                                               \
    X(void, TF_DeleteStatus, (TF_Status *))                                                                            \
    X(void, TF_SetStatus, (TF_Status *, TF_Code, const char *))                                                        \
    X(TF_Code, TF_GetCode, (const TF_Status *))                                                                        \
    X(TF_OpDefinitionBuilder *, TF_NewOpDefinitionBuilder, (const char *))                                             \
    X(void, TF_OpDefinitionBuilderAddInput, (TF_OpDefinitionBuilder *, const char *))                                  \
    X(void, TF_OpDefinitionBuilderAddOutput, (TF_OpDefinitionBuilder *, const char *))                                 \
    X(void, TF_OpDefinitionBuilderSetIsStateful, (TF_OpDefinitionBuilder *, bool))                                     \
    X(void, TF_OpDefinitionBuilderSetShapeInferenceFunction,                                                           \
      (TF_OpDefinitionBuilder *, void (*)(TF_ShapeInferenceContext *, TF_Status *)))                                   \
    X(void, TF_RegisterOpDefinition, (TF_OpDefinitionBuilder *, TF_Status *))                                          \
    X(TF_ShapeHandle *, TF_NewShapeHandle, (void))                                                                     \
    X(TF_ShapeHandle *, TF_ShapeInferenceContextScalar, (TF_ShapeInferenceContext *))                                  \
    X(void, TF_ShapeInferenceContextGetInput, (TF_ShapeInferenceContext *, int, TF_ShapeHandle *, TF_Status *))        \
    X(void, TF_ShapeInferenceContextSetOutput, (TF_ShapeInferenceContext *, int, TF_ShapeHandle *, TF_Status *))       \
    X(void, TF_DeleteShapeHandle, (TF_ShapeHandle *))                                                                  \
    X(TF_KernelBuilder *, TF_NewKernelBuilder,                                                                         \
      (const char *, const char *, void *(*)(TF_OpKernelConstruction *), void (*)(void *, TF_OpKernelContext *),       \
       void (*)(void *)))                                                                                              \
    X(void, TF_RegisterKernelBuilder, (const char *, TF_KernelBuilder *, TF_Status *))                                 \
    X(void, TF_GetInput, (TF_OpKernelContext *, int, TF_Tensor **, TF_Status *))                                       \
    X(int, TF_NumDims, (const TF_Tensor *))                                                                            \
    X(int64_t, TF_Dim, (const TF_Tensor *, int))                                                                       \
    X(int64_t, TF_TensorElementCount, (const TF_Tensor *))                                                             \
    X(void *, TF_TensorData, (const TF_Tensor *))                                                                      \
    X(void, TF_DeleteTensor, (TF_Tensor *))                                                                            \
    X(TF_Tensor *, TF_AllocateOutput,                                                                                  \
      (TF_OpKernelContext *, int, TF_DataType, const int64_t *, int, size_t, TF_Status *))                             \
    X(void, TF_OpKernelContext_Failure, (TF_OpKernelContext *, TF_Status *))

#endif

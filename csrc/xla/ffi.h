/* The part of XLA's foreign function interface that handlers.c touches, so that the kernel builds without jaxlib.
 *
 * Written after the documented binary interface, xla/ffi/api/c_api.h of the OpenXLA project (https://github.com/openxla/xla,
 * Apache License 2.0), of which jaxlib ships a copy; a test compares every size and offset used here with that copy. The
 * interface grows at the ends of its structs only, and each struct begins with the size that its maker knew.
 *
 * SPDX-License-Identifier: MIT */
#ifndef AUTOCLIP_XLA_FFI_H
#define AUTOCLIP_XLA_FFI_H

#include <stddef.h>
#include <stdint.h>

/* The oldest version that has all of this: a newer XLA accepts it, and an older one would refuse a newer number. */
enum { XLA_MAJOR = 0, XLA_MINOR = 1 };

enum { XLA_EXTENSION_METADATA = 1 };
enum { XLA_INVALID_ARGUMENT = 3, XLA_FAILED_PRECONDITION = 9 };
enum { XLA_S32 = 4, XLA_S64 = 5, XLA_F32 = 11, XLA_F64 = 12 };
enum { XLA_SCALAR_ATTRIBUTE = 3 };

typedef struct xla_error xla_error; /* made by XLA, for XLA */

typedef struct xla_extension {
    size_t struct_size;
    int type;
    struct xla_extension *next;
} xla_extension;

typedef struct xla_version {
    size_t struct_size;
    xla_extension *extensions;
    int major;
    int minor;
} xla_version;

typedef struct xla_metadata {
    size_t struct_size;
    xla_version version;
    uint32_t traits;
} xla_metadata;

typedef struct xla_metadata_extension {
    xla_extension extension;
    xla_metadata *metadata;
} xla_metadata_extension;

typedef struct xla_error_arguments {
    size_t struct_size;
    xla_extension *extensions;
    const char *message;
    int code;
} xla_error_arguments;

typedef struct xla_api {
    size_t struct_size;
    xla_extension *extensions;
    xla_version version;
    const void *internal;
    xla_error *(*create_error)(xla_error_arguments *arguments);
} xla_api;

typedef struct xla_buffer {
    size_t struct_size;
    xla_extension *extensions;
    int type;
    void *data;
    int64_t rank;
    int64_t *sizes;
} xla_buffer;

typedef struct xla_buffers { /* the operands, or the results */
    size_t struct_size;
    xla_extension *extensions;
    int64_t count;
    int *kinds;
    xla_buffer **buffers;
} xla_buffers;

typedef struct xla_scalar {
    int type;
    void *value;
} xla_scalar;

typedef struct xla_attributes { /* by name, in alphabetical order */
    size_t struct_size;
    xla_extension *extensions;
    int64_t count;
    int *kinds;
    void **names;
    void **values;
} xla_attributes;

typedef struct xla_call {
    size_t struct_size;
    xla_extension *extensions;
    const xla_api *api;
    void *context;
    int stage;
    xla_buffers operands;
    xla_buffers results;
    xla_attributes attributes;
} xla_call;

#endif

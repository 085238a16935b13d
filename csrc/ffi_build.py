"""The cffi binding of the kernel, cut from the public header and never retyped.

A retyped declaration with a wrong integer width compiles clean and fails at run time, so the text between the two marks
of autoclip.h is the cdef, and the same header is what the binding is compiled against. CMakeLists.txt runs this file
with ``python -m cffi.gen_src exec-python``, which writes the C source of the extension module from `ffibuilder`.
"""

import re
from pathlib import Path

from cffi import FFI

header = (Path(__file__).parent / "include" / "autoclip.h").read_text(encoding="utf-8")
marked = re.search(r"/\* \[declarations:.*?\*/(.*)/\* \[end of declarations\] \*/", header, re.DOTALL)
if marked is None:
    raise SystemExit("include/autoclip.h has lost the two marks around the declarations that make the Python binding")

# To read an out-parameter takes Python long, so the calls of every training step return what they
# find. A failure is a NaN with the status in its lowest byte; that byte is 0 in a NaN that is an answer (numpy's, of
# norms whose difference is beyond a double).
RETURNING = """
#include <string.h>
#include <arrays/tensors.h>
#include <autoclip.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

static double result(autoclip_status status, double threshold)
{
    const uint64_t failure = UINT64_C(0x7FF8000000000000) | (uint64_t)status;
    if (status != AUTOCLIP_OK) memcpy(&threshold, &failure, sizeof threshold);
    return threshold;
}

static double observe(uint64_t id, double norm, double percentile)
{
    double threshold = 0;
    const autoclip_status status = autoclip_shared_observe(id, norm, percentile, &threshold);
    return result(status, threshold);
}

static double percentile(uint64_t id, double percentile)
{
    double threshold = 0;
    const autoclip_status status = autoclip_shared_percentile(id, percentile, &threshold);
    return result(status, threshold);
}

/* autoclip_shared_save to memory that nobody has touched yet. At 10^7 norms the first touch of small pages would take
   longer than all the rest. */
static autoclip_status save(uint64_t id, void *fresh, size_t capacity, size_t *size)
{
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = 4096, begin = ((uintptr_t)fresh + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)fresh + capacity) / page * page;
    /* Advice only, which is refused where pages are larger than that. */
    if (capacity >= (size_t)4 << 20) (void)madvise((void *)begin, end - begin, MADV_HUGEPAGE);
#endif
    return autoclip_shared_save(id, fresh, capacity, size);
}

/* Tensors are elsewhere: Python knows addresses of them, and of its own arrays. */
static int tensors_measure(uintptr_t addresses, uintptr_t sizes, size_t count, size_t width, uintptr_t norms)
{
    return autoclip_tensors_measure((void *)addresses, (void *)sizes, count, width, (void *)norms);
}

static void tensors_scale(uintptr_t addresses, uintptr_t sizes, size_t count, size_t width, uintptr_t factors)
{
    autoclip_tensors_scale((void *)addresses, (void *)sizes, count, width, (void *)factors);
}

static uint64_t tensors_fingerprint(uintptr_t addresses, uintptr_t sizes, size_t count, size_t width)
{
    return autoclip_tensors_fingerprint((void *)addresses, (void *)sizes, count, width);
}
"""
DECLARED = """
double observe(uint64_t id, double norm, double percentile);
double percentile(uint64_t id, double percentile);
autoclip_status save(uint64_t id, void *fresh, size_t capacity, size_t *size);
int tensors_measure(uintptr_t addresses, uintptr_t sizes, size_t count, size_t width, uintptr_t norms);
void tensors_scale(uintptr_t addresses, uintptr_t sizes, size_t count, size_t width, uintptr_t factors);
uint64_t tensors_fingerprint(uintptr_t addresses, uintptr_t sizes, size_t count, size_t width);
"""

ffibuilder = FFI()
ffibuilder.cdef(marked[1] + DECLARED)
ffibuilder.set_source("autoclip_core._kernel", RETURNING)

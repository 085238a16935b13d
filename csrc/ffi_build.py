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

ffibuilder = FFI()
ffibuilder.cdef(marked[1])
ffibuilder.set_source("autoclip_core._kernel", "#include <autoclip.h>")

"""Who may import what, and what may stand where: read from the sources.

The core imports no framework, one file reads the environment, one file each touches the compiled module and numba, and
the kernel is libc and itself. A new file has no place until it is given one in the tables below.
"""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import autoclip_core

ROOT = Path(__file__).resolve().parent.parent
CORE = ROOT / "autoclip_core"
KERNEL = ROOT / "csrc/src"

# Beside the standard library. Names in brackets may be imported inside functions or for types only: `import
# autoclip_core` is cheap.
MAY_IMPORT = {
    "autoclip_core/__init__.py": "_backend arrays clip errors history",
    "autoclip_core/__main__.py": "__version__ _backend errors history plot replay [numpy]",
    "autoclip_core/_backend.py": "errors",
    "autoclip_core/_bits.py": "numpy",
    "autoclip_core/_native.py": "_kernel errors [numpy]",
    "autoclip_core/_numba/__init__.py": "_numba.history",
    "autoclip_core/_numba/check.py": "_bits _numba.tree numpy",
    "autoclip_core/_numba/compiler.py": "llvmlite numba",
    "autoclip_core/_numba/history.py": "_bits _numba _numba.check _numba.tree errors numba numpy",
    "autoclip_core/_numba/snapshot.py": "_bits _numba.compiler _numba.tree errors numpy",
    "autoclip_core/_numba/tree.py": "_numba.compiler numpy",
    "autoclip_core/arrays.py": "clip errors history",
    "autoclip_core/clip.py": "errors history",
    "autoclip_core/errors.py": "",
    "autoclip_core/history.py": "[_bits] _backend errors [numpy]",
    "autoclip_core/logs/__init__.py": "errors logs logs.found",
    "autoclip_core/logs/binary.py": "errors logs.found [numpy] [pandas] [pyarrow]",
    "autoclip_core/logs/events.py": "logs.found",
    "autoclip_core/logs/found.py": "errors [numpy]",
    "autoclip_core/logs/messages.py": "logs.found",
    "autoclip_core/logs/records.py": "errors logs.found",
    "autoclip_core/logs/tables.py": "errors logs logs.found",
    "autoclip_core/logs/text.py": "errors logs logs.found",
    "autoclip_core/plot.py": "errors history [matplotlib] [numpy]",
    "autoclip_core/replay.py": "arrays errors history logs [numpy]",
    "adapters/autoclip_jax/__init__.py": "autoclip_jax",
    "adapters/autoclip_jax/clip.py": "autoclip_core autoclip_jax jax numpy optax",
    "adapters/autoclip_jax/demo.py": "autoclip_jax jax numpy optax [sklearn]",
    "adapters/autoclip_jax/kernel.py": "autoclip_core jax numpy",
    "adapters/autoclip_tensorflow/__init__.py": "autoclip_tensorflow [keras]",
    "adapters/autoclip_tensorflow/clip.py": "autoclip_core autoclip_tensorflow tensorflow",
    "adapters/autoclip_tensorflow/demo.py": "autoclip_core autoclip_tensorflow keras numpy [sklearn]",
    "adapters/autoclip_tensorflow/dense.py": "autoclip_core autoclip_tensorflow keras numpy torch",
    "adapters/autoclip_tensorflow/graph.py": "autoclip_core autoclip_tensorflow tensorflow",
    "adapters/autoclip_tensorflow/logger.py": "autoclip_core autoclip_tensorflow keras",
    "adapters/autoclip_tensorflow/optimizer.py": "autoclip_core autoclip_tensorflow keras numpy",
    "adapters/autoclip_tensorflow/state.py": "autoclip_core numpy",
    "adapters/autoclip_torch/__init__.py": "autoclip_core autoclip_torch",
    "adapters/autoclip_torch/agreement.py": "autoclip_core autoclip_torch torch",
    "adapters/autoclip_torch/attach.py": "autoclip_core autoclip_torch torch",
    "adapters/autoclip_torch/batches.py": "autoclip_torch torch",
    "adapters/autoclip_torch/clip.py": "autoclip_core autoclip_torch torch typing_extensions",
    "adapters/autoclip_torch/deepspeed.py": "autoclip_core autoclip_torch torch",
    "adapters/autoclip_torch/decision.py": "autoclip_core autoclip_torch torch",
    "adapters/autoclip_torch/deferred.py": "autoclip_core autoclip_torch torch",
    "adapters/autoclip_torch/devices.py": "torch",
    "adapters/autoclip_torch/engines.py": "autoclip_core torch",
    "adapters/autoclip_torch/gradients.py": "autoclip_core autoclip_torch torch",
    "adapters/autoclip_torch/groups.py": "autoclip_core torch",
    "adapters/autoclip_torch/kernel.py": "autoclip_core autoclip_torch torch",
    "adapters/autoclip_torch/layout.py": "autoclip_torch torch",
    "adapters/autoclip_torch/optimizers.py": "autoclip_core autoclip_torch torch",
    "adapters/autoclip_torch/pipeline.py": "autoclip_core autoclip_torch torch",
    "adapters/autoclip_torch/plateau.py": "",
    "adapters/autoclip_torch/repeats.py": "autoclip_core autoclip_torch torch",
    "adapters/autoclip_torch/sharing.py": "autoclip_core autoclip_torch torch",
    "adapters/autoclip_torch/watch.py": "autoclip_torch torch",
    "adapters/autoclip_torch/lightning.py": "autoclip_core autoclip_torch lightning pytorch_lightning torch",
    "adapters/autoclip_torch/fastai.py": "autoclip_core autoclip_torch fastai",
    "adapters/autoclip_torch/skorch.py": "autoclip_core autoclip_torch skorch",
    "adapters/autoclip_torch/stable_baselines3.py": "autoclip_core autoclip_torch stable_baselines3",
    "adapters/autoclip_torch/transformers.py": "autoclip_core autoclip_torch torch transformers",
    "adapters/autoclip_torch/demo.py": "autoclip_torch matplotlib torch tqdm [sklearn]",
}
IMPORTS_ARE_CHOSEN_BY = {"autoclip_core/_backend.py"}
ENVIRONMENT_IS_READ_BY = {"autoclip_core/_backend.py"}

NUMBA = [name for name in MAY_IMPORT if name.startswith("autoclip_core/_numba/")]
PRIVATE = {"autoclip_core/_backend.py", "autoclip_core/_bits.py", "autoclip_core/_native.py", *NUMBA}

# The modules of the core that adapters may use beside its names.
PUBLIC_MODULES = {"arrays"}

NEVER_AT_IMPORT = {"torch", "tensorflow", "keras", "jax", "numba", "matplotlib", "numpy", "tqdm"}

# C11 without a stream, and what the systems offer for threads and large pages.
KERNEL_MAY_INCLUDE = {
    *("assert.h", "float.h", "limits.h", "math.h", "stdalign.h", "stdbool.h", "stddef.h", "stdint.h", "string.h"),
    "autoclip.h",
}
KERNEL_MAY_INCLUDE_IN = {
    "float_mode.h": {"xmmintrin.h"},
    "memory.c": {"stdlib.h", "sys/mman.h"},
    "shared.c": {"stdatomic.h", "pthread.h", "time.h", "windows.h"},
}
ALLOCATES = re.compile(r"\b(malloc|calloc|realloc|free|posix_memalign|aligned_alloc|mmap|munmap|strdup|alloca)\b")
LOCKS = re.compile(r"\b(pthread_\w+|mtx_\w+|\w*SRW\w*|atomic_\w+|_Atomic|call_once|_Thread_local|thread_local)\b")


def package_files():
    files = [*CORE.rglob("*.py"), *(ROOT / "adapters").rglob("*.py")]
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text(encoding="utf-8"), file) for file in files}


FILES = package_files()
every_file = pytest.mark.parametrize("name", FILES)


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def imports_of(name):
    """The imports of a file as (module, names, where): in the "module", in a "function", or for "types" only."""
    package = Path(name).parent.relative_to("adapters" if name.startswith("adapters/") else ".").parts

    def visit(node, where):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, [], where
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            yield ".".join([*parents, *filter(None, [node.module])]), [alias.name for alias in node.names], where
        elif is_type_checking(node):
            for child in node.body:
                yield from visit(child, "types")
            for child in node.orelse:
                yield from visit(child, where)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, "function" if inside else where)

    return list(visit(FILES[name], "module"))


def entries_of(file, module, names):
    """What the table calls that which is imported: a module of the core itself by its name, all else by its package."""
    package, _, part = module.partition(".")
    if package == "autoclip_core" and file.startswith("autoclip_core/"):
        return [part] if part else names or [package]
    return [package]


def test_every_file_of_the_package_has_its_place_in_the_table():
    assert set(FILES) == set(MAY_IMPORT)


@every_file
def test_file_imports_only_what_it_may(name):
    words = MAY_IMPORT[name].split()
    for module, names, where in imports_of(name):
        for entry in entries_of(name, module, names):
            if entry in sys.stdlib_module_names or (entry == "numpy" and where == "types"):
                continue
            assert entry in words or (f"[{entry}]" in words and where != "module"), f"{entry} in a {where}"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("adapters/")])
def test_adapter_uses_public_names_of_the_core_only(name):
    public = {*autoclip_core.__all__, "__version__", *PUBLIC_MODULES}
    for module, names, _ in imports_of(name):
        assert not module.startswith("autoclip_core."), f"{name} imports {module}"
        if module == "autoclip_core":
            assert set(names) <= public
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "autoclip_core":
            assert node.attr in public, f"{name} uses autoclip_core.{node.attr}"


@every_file
def test_modules_are_imported_by_name_where_the_backend_is_chosen_only(name):
    called = {ast.unparse(node.func) for node in ast.walk(FILES[name]) if isinstance(node, ast.Call)}
    importing = called & {"import_module", "importlib.import_module", "__import__", "exec", "eval"}
    assert importing == ({"import_module"} if name in IMPORTS_ARE_CHOSEN_BY else set())


@every_file
def test_environment_is_read_in_one_file_only(name):
    readers = {"environ", "environb", "getenv", "getenvb", "putenv"}
    named = {node.attr for node in ast.walk(FILES[name]) if isinstance(node, ast.Attribute)}
    named |= {alias for module, names, _ in imports_of(name) if module == "os" for alias in names}
    assert not named & readers or name in ENVIRONMENT_IS_READ_BY


@pytest.mark.parametrize("name", NUMBA)
def test_numba_code_keeps_ieee_arithmetic_and_machine_types(name):
    words = {node.arg for node in ast.walk(FILES[name]) if isinstance(node, ast.keyword)}
    words |= {node.attr for node in ast.walk(FILES[name]) if isinstance(node, ast.Attribute)}
    words |= {node.id for node in ast.walk(FILES[name]) if isinstance(node, ast.Name)}
    words |= {alias for _, names, _ in imports_of(name) for alias in names}
    assert not words & {"fastmath", "error_model", "jit", "nopython", "forceobj", "objmode", "looplift"}


INTRINSICS = {"compiled", "enter_standard_mode", "leave_standard_mode", "uncounted"}


@pytest.mark.parametrize("name", NUMBA)
def test_compiled_functions_use_names_of_their_own_file_only(name):
    # Numba keeps compiled code until the file of the function changes, and looks at no other file.
    imported = {alias for _, names, _ in imports_of(name) for alias in names} - INTRINSICS
    for node in ast.walk(FILES[name]):
        if isinstance(node, ast.FunctionDef) and "compiled" in map(ast.unparse, node.decorator_list):
            used = {part.id for line in node.body for part in ast.walk(line) if isinstance(part, ast.Name)}
            assert not used & imported, f"{node.name} of {name}"


TOP_LEVEL = """
    .ci .github .gitignore .pre-commit-config.yaml CHANGELOG.md CITATION.cff LICENSE Makefile README.md adapters
    autoclip_core bench constraints.txt csrc pyproject.toml tests
"""


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_top_level_holds_what_it_should():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {path.partition("/")[0] for path in tracked.splitlines()} == set(TOP_LEVEL.split())


def test_import_of_the_core_loads_no_framework_and_no_numpy(run_python):
    # Only the names below: what .pth files of the environment load is not ours.
    code = "import sys; before = set(sys.modules); import autoclip_core; print(*set(sys.modules) - before)"
    loaded = {module.split(".")[0] for module in run_python(code).split()}
    assert "autoclip_core" in loaded
    assert not loaded & NEVER_AT_IMPORT


def test_native_run_of_autoclip_loads_no_numpy(run_python):
    try:
        autoclip_core.NormHistory(backend="native")
    except autoclip_core.BackendError as error:
        pytest.skip(str(error))
    code = """
import sys
from autoclip_core import AutoClip
clip = AutoClip()
for i in range(1000):
    clip.observe(1.0 + i % 7)
clip.load_state_dict(clip.state_dict())
print(clip.threshold, *sys.modules)
"""
    assert not set(run_python(code, AUTOCLIP_BACKEND="native").split()) & NEVER_AT_IMPORT


def test_public_names_are_those_that_the_package_lists():
    listed = autoclip_core.__all__
    assert list(listed) == sorted(set(listed))
    found = {name for name, value in vars(autoclip_core).items() if name[0] != "_" and not inspect.ismodule(value)}
    assert found == set(listed) - {"arrays"}  # a module, for the adapters
    assert all(getattr(autoclip_core, name).__module__.startswith("autoclip_core.") for name in found)


def public_definitions(tree, prefix=""):
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            if not any(decorator.endswith(".setter") or decorator == "overload" for decorator in decorators):
                yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node, f"{prefix}{node.name}.")


@pytest.mark.parametrize("name", [name for name in FILES if name not in PRIVATE])
def test_public_names_have_docstrings(name):
    assert ast.get_docstring(FILES[name]), f"{name} does not say what it is"
    for definition, node in public_definitions(FILES[name]):
        assert ast.get_docstring(node), f"{definition} of {name} does not say what it is"


def test_every_public_name_has_a_docstring_of_its_own():
    for name in autoclip_core.__all__:
        subject = getattr(autoclip_core, name)
        assert subject.__dict__.get("__doc__") if inspect.isclass(subject) else subject.__doc__, name
        for attribute, value in vars(subject).items():
            documented = callable(value) or isinstance(value, property | classmethod | staticmethod)
            if documented and not attribute.startswith("_") and attribute not in getattr(subject, "_fields", ()):
                assert inspect.getdoc(value), f"{name}.{attribute}"


def kernel_files():
    return {file.name: strip_comments(file.read_text(encoding="utf-8")) for file in KERNEL.glob("*.[ch]")}


def strip_comments(source):
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", source, flags=re.DOTALL)
    return re.sub(r'(?<!#include )"(\\.|[^"\\\n])*"', '""', text)


KERNEL_FILES = kernel_files()
every_kernel_file = pytest.mark.parametrize("name", KERNEL_FILES)


@every_kernel_file
def test_kernel_includes_libc_and_its_own_headers_only(name):
    includes = set(re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', KERNEL_FILES[name], re.MULTILINE))
    assert len(includes) == len(re.findall(r"#\s*include\b", KERNEL_FILES[name]))
    own = {header for header in KERNEL_FILES if header.endswith(".h")}
    assert includes <= KERNEL_MAY_INCLUDE | KERNEL_MAY_INCLUDE_IN.get(name, set()) | own


def test_every_c_file_names_its_licence():
    # A file of the kernel may be copied into another program; examples are too small for one.
    files = [*(ROOT / "csrc").glob("[!e]*/*.[ch]"), *(ROOT / "tests/c").glob("*.[ch]")]
    assert len(files) > 30
    for file in files:
        first, _, _ = file.read_text(encoding="utf-8").partition("*/")
        assert first.endswith("\n * SPDX-License-Identifier: MIT "), file


@every_kernel_file
def test_kernel_allocates_in_one_file_only(name):
    assert name == "memory.c" or ALLOCATES.findall(KERNEL_FILES[name]) == []


@every_kernel_file
def test_kernel_locks_in_one_file_only(name):
    assert name == "shared.c" or LOCKS.findall(KERNEL_FILES[name]) == []


def test_kernel_rules_find_what_they_forbid():
    # The files above are clean; this shows that the patterns would tell.
    assert ALLOCATES.findall("x = malloc(8); free (x); tree->free_nodes = memory_allocate(m, 8);") == ["malloc", "free"]
    assert LOCKS.findall("static pthread_mutex_t m; _Atomic int i;") == ["pthread_mutex_t", "_Atomic"]
    source = 'a /* malloc */ b // free\n#include "x.h"\nc("free")'
    assert strip_comments(source).split() == ["a", "b", "#include", '"x.h"', 'c("")']


@pytest.mark.skipif(sys.platform == "win32", reason="reads symbols with nm")
def test_kernel_has_globals_in_one_file_only(tmp_path, absent):
    # The compiler knows a global when it makes one, however it is written: data and bss, static or not.
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or shutil.which("nm") is None:
        absent("needs a C compiler and nm")
    sources = sorted(KERNEL.glob("*.c"))
    # Not position-independent, so that constant tables of pointers are constant for the linker as well.
    flags = ["-std=c11", "-O0", "-fno-pic", f"-I{ROOT / 'csrc/include'}"]
    subprocess.run([compiler, *flags, "-c", *map(str, sources)], cwd=tmp_path, check=True)
    owners = set()
    for source in sources:
        command = ["nm", "--defined-only", f"{source.stem}.o"]
        symbols = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
        if re.search(r"^[0-9a-f]+ [bBdDcCsSgG] ", symbols, re.MULTILINE):
            owners.add(source.name)
    assert owners == {"shared.c"}

"""The choice of the backend: by name or not at all, and never in silence."""

import os
import re
import shutil
import subprocess
import sys
from array import array
from pathlib import Path

import pytest

import autoclip_core
from autoclip_core import (
    AutoClip,
    AutoClipError,
    BackendError,
    NormHistory,
    kernel_error,
    kernel_functions,
    kernel_library,
)

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent

WITHOUT = {
    "native": "import sys; sys.modules['autoclip_core._kernel'] = None\n",
    "numba": "import sys; sys.modules['numba'] = None\n",
}
REMEDIES = {"native": "C compiler", "numba": 'pip install "autoclip-core[numba]"'}
TRY = """
from autoclip_core import BackendError, NormHistory
try:
    print(NormHistory({arguments}).backend)
except BackendError as error:
    assert isinstance(error, ImportError)
    print(error)
"""


def test_backend_in_use_is_the_one_that_the_environment_demands(backend):
    assert backend == (os.environ.get("AUTOCLIP_BACKEND") or backend)
    assert AutoClip().history.backend == backend
    assert NormHistory.from_bytes(NormHistory().to_bytes()).backend == backend
    assert NormHistory(backend=backend).backend == backend


def test_backend_given_by_name_overrules_the_environment(backend, other_backend, run_python):
    code = TRY.format(arguments=f"backend={other_backend!r}")
    assert run_python(code, AUTOCLIP_BACKEND=backend) == f"{other_backend}\n"


def test_backend_is_native_by_default_where_both_load(other_backend, run_python):
    assert run_python(TRY.format(arguments=""), AUTOCLIP_BACKEND="") == "native\n"


def test_backend_is_numba_where_the_kernel_is_missing(backend, other_backend, run_python):
    assert run_python(WITHOUT["native"] + TRY.format(arguments=""), AUTOCLIP_BACKEND="") == "numba\n"


@pytest.mark.parametrize("name", REMEDIES)
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_backend_that_is_demanded_and_missing_is_an_error_with_the_remedy(way, name, run_python):
    arguments = f"backend={name!r}" if way == "argument" else ""
    environment = {"AUTOCLIP_BACKEND": name if way == "environment" else ""}
    said = run_python(WITHOUT[name] + TRY.format(arguments=arguments), **environment)
    assert said.startswith(f"Backend {name}: ")
    assert REMEDIES[name] in said


def test_backend_error_names_both_remedies_where_nothing_loads(run_python):
    said = run_python(WITHOUT["native"] + WITHOUT["numba"] + TRY.format(arguments=""), AUTOCLIP_BACKEND="")
    assert said.startswith("No backend can be loaded.")
    assert all(remedy in said for remedy in REMEDIES.values())


def test_backend_error_is_an_import_error():
    assert issubclass(BackendError, ImportError)


@pytest.mark.parametrize("name", ["cuda", "Numba", " native"])
def test_environment_that_names_no_backend_is_an_error(name, run_python):
    code = """
from autoclip_core import AutoClip, AutoClipValueError
try:
    AutoClip()
except AutoClipValueError as error:
    print(error)
"""
    assert f'"native", "numba" or None, but {name!r} was given' in run_python(code, AUTOCLIP_BACKEND=name)


def test_tests_do_not_run_without_the_backend_that_is_demanded():
    command = [sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", str(HERE)]
    environment = os.environ | {"AUTOCLIP_BACKEND": "cuda"}
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "but 'cuda' was given" in done.stderr


def test_history_has_an_id_of_its_own_for_c(backend, other_backend):
    first, second = (NormHistory(backend="native") for _ in range(2))
    assert first.shared_id != second.shared_id > 0
    assert first.shared_id == first.shared_id


def test_backends_without_c_say_so(backend):
    if backend == "native":
        assert Path(kernel_library()).is_file()
        numbers, sizes, norms = array("d", [3.0, 4.0]), array("Q", [2]), array("d", [0.0])
        addresses = array("Q", [numbers.buffer_info()[0]])
        places = [memory.buffer_info()[0] for memory in (addresses, sizes, norms)]
        assert kernel_functions().tensors_measure(*places[:2], 1, 8, places[2]) == 1
        assert norms[0] == 5.0
    else:
        with pytest.raises(BackendError, match="only the native one"):
            kernel_functions()
        with pytest.raises(BackendError, match="only the native one"):
            kernel_library()
        with pytest.raises(BackendError, match=r'NormHistory\(backend="native"\)'):
            _ = NormHistory().shared_id


def test_sources_without_a_kernel_say_that_they_are_sources(run_python, tmp_path):
    package = Path(autoclip_core.__file__).parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("_kernel*", "__pycache__"))
    (tmp_path / "pyproject.toml").touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n" + TRY.format(arguments='backend="native"')
    assert f"imported from its sources in {tmp_path}" in run_python(code)


def test_numba_backend_works_where_numba_does_not_compile(backend, other_backend, run_python):
    # The switch is for debugging what uses Numba, of which AutoClip may be a small part. It is also how the coverage of
    # compiled functions is known: norms that come from all sides at first, and drift away then, go through all of them.
    code = """
from math import fsum
from autoclip_core import NormHistory
for window in (None, 1, 300, 4400):
    history = NormHistory(window, backend="numba")
    thresholds = history.observe_many([i * 7919 % 10007 for i in range(6000)], [10.0, 90.0]).ravel().tolist()
    thresholds += [history.observe(i * 7919 % 1000 + 2.0 * i, 10.0) for i in range(9000)]
    thresholds += [history.observe(-1.0, 10.0), history.percentile(50.0)]
    history.extend(range(500))
    history.extend(range(5000))
    history.check()
    print(fsum(thresholds), int(history.rank(700.0)), history.to_bytes()[-8:])  # the checksum of all norms
history.clear()
print(int(history.rank(700.0)), history.to_bytes()[-8:])
"""
    without = run_python(code, "-W", "ignore:overflow encountered in scalar", NUMBA_DISABLE_JIT="1")
    assert without == run_python(code)
    assert len(without.splitlines()) == 5


# What numba compiles, it keeps on disk. The functions used here are few, for each process compiles them anew.
KEEPING = """
import warnings
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    from autoclip_core import NormHistory
    history = NormHistory(backend="numba")
    rank = history.rank(2.0)
print(rank, *[warning.message for warning in warned])
"""
ANEW = "0 The Numba backend will be compiled anew in every process ("


def test_numba_backend_keeps_what_it_compiles_and_repairs_what_is_damaged(backend, other_backend, run_python, tmp_path):
    def run():
        assert run_python(KEEPING, NUMBA_CACHE_DIR=str(tmp_path / "kept")) == "0\n"
        return {file: file.read_bytes() for file in (tmp_path / "kept").rglob("*.nb?")}

    kept = run()
    assert {file.suffix for file in kept} == {".nbi", ".nbc"}
    for file, content in kept.items():
        file.write_bytes(content[: len(content) // 2])
    assert {file: len(content) for file, content in run().items()} == {file: len(c) for file, c in kept.items()}
    for file in kept:
        file.write_bytes(b"" if file.suffix == ".nbc" else kept[file])
    assert {file: len(content) for file, content in run().items()} == {file: len(c) for file, c in kept.items()}
    times = {file: file.stat().st_mtime_ns for file in kept}
    run()
    assert {file: file.stat().st_mtime_ns for file in kept} == times


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits on the size of files")
def test_numba_backend_works_where_the_disk_is_full(backend, other_backend, run_python, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
    said = run_python(limit + KEEPING, NUMBA_CACHE_DIR=str(tmp_path))
    assert said.startswith(ANEW)
    assert "set NUMBA_CACHE_DIR" in said


@pytest.mark.skipif(sys.platform == "win32", reason="there the user's cache is not named by the environment")
def test_numba_backend_works_where_its_code_cannot_be_kept(backend, other_backend, run_python, tmp_path):
    package = Path(autoclip_core.__file__).parent
    copied = shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    file = copied / "_numba/__pycache__"  # below a file nothing can be kept
    file.touch()
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{KEEPING}"
    said = run_python(code, NUMBA_CACHE_DIR="", XDG_CACHE_HOME=str(file), HOME=str(file))
    assert said.startswith(ANEW)
    assert "set NUMBA_CACHE_DIR" in said


STATUSES = {
    int(number): name
    for name, number in re.findall(r"(AUTOCLIP_\w+) = (\d+)", (ROOT / "csrc/include/autoclip.h").read_text("utf-8"))
}


@pytest.mark.parametrize("status", [status for status in STATUSES if status])
def test_every_status_of_the_kernel_has_an_exception(status, backend, other_backend):
    error = kernel_error(status)
    assert str(error).endswith(".")
    if STATUSES[status] == "AUTOCLIP_NO_MEMORY":
        assert type(error) is MemoryError
    else:
        assert isinstance(error, AutoClipError)
        # Only a caller that brings its own array can bring one that is too small.
        assert (type(error) is AutoClipError) == (STATUSES[status] == "AUTOCLIP_TOO_SMALL")


def test_number_that_is_no_status_is_an_error_too(backend, other_backend):
    assert type(kernel_error(max(STATUSES) + 1)) is AutoClipError

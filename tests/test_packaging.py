"""What is distributed: the sdist, the wheels, and the C library as an embedder meets it once it is installed.

Everything is built from the source tree around this file; of the package under test only the version is read.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import autoclip_core

ROOT = Path(__file__).resolve().parent.parent
HEADER = (ROOT / "csrc/include/autoclip.h").read_text(encoding="utf-8")
EXAMPLES = ROOT / "csrc/examples"
PACKAGES = [ROOT / "autoclip_core", *sorted((ROOT / "adapters").glob("autoclip_*"))]
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")


def run(*command, cwd=ROOT, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUTOCLIP_")} | variables
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{command}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def macro(name):
    return re.search(rf"^#define AUTOCLIP_{name} (\d+)$", HEADER, re.MULTILINE)[1]


def version():
    return ".".join(macro(f"VERSION_{part}") for part in ("MAJOR", "MINOR", "PATCH"))


def declared():
    return set(re.findall(r"\b(autoclip_\w+)\(", re.sub(r"/\*.*?\*/", "", HEADER, flags=re.DOTALL)))


def exported(library):
    return {line.split()[-1] for line in run("nm", "-D", "--defined-only", str(library)).splitlines()}


def dynamic(library, tag):
    return re.findall(rf"\({tag}\).*\[(.*)\]", run("readelf", "-d", str(library)))


def expected_output():
    norms = [4.0, 1.0, 3.0, 2.0]
    return "".join(f"norm {x:g} threshold {np.percentile(norms[: i + 1], 10):g}\n" for i, x in enumerate(norms))


@pytest.fixture(scope="session")
def need(absent):
    def need(program):
        if shutil.which(program) is None:
            absent(f"{program} is not installed")
        return program

    return need


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """The C library, installed and then moved: nothing in it may remember where it was built."""
    folder = tmp_path_factory.mktemp("library")
    run("cmake", "-S", "csrc", "-B", str(folder / "build"), "-DCMAKE_INSTALL_LIBDIR=lib")
    run("cmake", "--build", str(folder / "build"))
    run("cmake", "--install", str(folder / "build"), "--prefix", str(folder / "staged"))
    shutil.rmtree(folder / "build")
    return (folder / "staged").rename(folder / "installed")


def test_library_calls_itself_and_no_other_of_the_same_names(installed, need):
    # A call that is looked up by name ends in whatever library the program has loaded first.
    for library in (installed / "lib/libautoclip.so", Path(autoclip_core.kernel_library())):
        if library.suffix == ".so" and sys.platform == "linux":
            assert "autoclip_" not in run(need("readelf"), "--relocs", "--wide", str(library))


@pytest.mark.parametrize("flag", ["-Ofast", "-ffast-math", "-ffinite-math-only"])
@pytest.mark.parametrize("compiler", ["cc", "clang"])
def test_kernel_is_not_built_with_arithmetic_that_loses_nan(compiler, flag, need, tmp_path):
    for source in sorted((ROOT / "csrc/src").glob("s*.c")):
        command = [need(compiler), "-std=c11", flag, "-c", f"-I{ROOT / 'csrc/include'}", str(source), "-o", "x.o"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "autoclip needs IEEE arithmetic" in done.stderr
    done = subprocess.run(
        [
            "cmake",
            "-S",
            str(ROOT / "csrc"),
            "-B",
            "build",
            f"-DCMAKE_C_FLAGS_RELEASE={flag}",
            f"-DCMAKE_C_COMPILER={compiler}",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["cmake", "--build", "build"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "autoclip needs IEEE arithmetic" in done.stdout + done.stderr


def test_kernel_built_by_clang_is_exact_with_flags_of_which_it_is_not_told(need, tmp_path):
    if platform.machine() != "x86_64":
        pytest.skip("clang has no switch in the source on other processors")
    flags = ["-fno-honor-nans", "-funsafe-math-optimizations", "-march=haswell"]  # which has fused multiply-adds
    sources = map(str, sorted((ROOT / "csrc/src").glob("*.c")))
    command = [need("clang"), "-std=c11", "-O1", *flags, "-shared", "-fPIC", f"-I{ROOT / 'csrc/include'}", *sources]
    run(*command, "-pthread", "-o", str(tmp_path / "kernel.so"))
    kernel = ctypes.CDLL(str(tmp_path / "kernel.so"))
    history, threshold = ctypes.c_void_p(), ctypes.c_double()
    assert kernel.autoclip_history_create(ctypes.c_uint64(0), None, ctypes.byref(history)) == 0
    assert kernel.autoclip_history_push(history, ctypes.c_double(-0.0)) == 0
    assert kernel.autoclip_history_select(history, ctypes.c_uint64(0), ctypes.byref(threshold)) == 0
    assert not np.signbit(threshold.value)
    norms = np.random.default_rng(1).lognormal(size=300)
    for at, norm in enumerate(norms, 1):
        arguments = (history, ctypes.c_double(norm), ctypes.c_double(30.0), ctypes.byref(threshold))
        assert kernel.autoclip_history_observe(*arguments) == 0
        assert threshold.value == np.percentile([0.0, *norms[:at]], 30.0)
    nan, rank = ctypes.c_double(np.nan), ctypes.c_uint64()
    assert kernel.autoclip_history_push(history, nan) == int(re.search(r"NOT_FINITE = (\d+)", HEADER)[1])
    assert kernel.autoclip_history_rank(history, nan, ctypes.byref(rank)) != 0
    assert kernel.autoclip_history_percentile(history, nan, ctypes.byref(threshold)) != 0
    kernel.autoclip_history_destroy(history)


@pytest.fixture
def pkg_config(installed, need):
    def pkg_config(*arguments):
        folder = str(installed / "lib/pkgconfig")
        return run(need("pkg-config"), *arguments, "autoclip", PKG_CONFIG_PATH=folder).split()

    return pkg_config


def build(folder, *arguments, **variables):
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), *arguments, str(ROOT), **variables)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel as a packager gets it: built from the sdist alone, the kernel demanded."""
    return build(tmp_path_factory.mktemp("dist"), AUTOCLIP_REQUIRE_NATIVE="1")


@pytest.fixture(scope="session")
def kernel(wheel, tmp_path_factory):
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("autoclip_core/_kernel."))
    return zipfile.ZipFile(wheel).extract(name, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def pure_wheel(tmp_path_factory):
    """The wheel where there is no compiler."""
    return build(tmp_path_factory.mktemp("pure"), "--wheel", CC="no-such-compiler")


def files_in(wheel):
    """The files of the packages, without their metadata, which must hold the licence."""
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.startswith(f"autoclip_core-{version()}.dist-info/")}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    return names - metadata


def source_files():
    return {
        file.relative_to(package.parent).as_posix()
        for package in PACKAGES
        for file in package.rglob("*.*")
        if file.parent.name != "__pycache__"
    }


def test_wheel_holds_the_packages_and_the_kernel(wheel, kernel):
    assert files_in(wheel) == source_files() | {f"autoclip_core/{Path(kernel).name}"}
    assert {f"{package.name}/py.typed" for package in PACKAGES} <= files_in(wheel)


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="a free-threaded Python has no stable ABI"
)
def test_wheel_serves_every_python_from_3_11_on(wheel, kernel):
    assert "-cp311-abi3-" in wheel.name
    assert Path(kernel).name in {"_kernel.abi3.so", "_kernel.pyd"}


def test_sdist_and_wheel_are_the_same_bytes_when_built_again(tmp_path):
    # Each is built in a folder of its own, which the kernel must not remember, and with one date for all files.
    builds = [build(tmp_path / name, SOURCE_DATE_EPOCH="1700000000").parent for name in ("one", "other")]
    one, other = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in builds)
    assert len(one) == 2
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def test_sdist_builds_without_a_network(wheel, tmp_path):
    (sdist,) = wheel.parent.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-index", "--no-build-isolation", "--no-deps")
    nowhere = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")
    run(*pip, "--wheel-dir", str(tmp_path), str(sdist), AUTOCLIP_REQUIRE_NATIVE="1", **nowhere)
    assert [file.name for file in tmp_path.iterdir()] == [wheel.name]


def test_wheel_without_a_compiler_is_pure(pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert files_in(pure_wheel) == source_files()


def test_wheel_without_a_compiler_passes_tests_of_the_core(pure_wheel, absent, tmp_path):
    if find_spec("numba") is None:
        absent("numba is not installed")
    zipfile.ZipFile(pure_wheel).extractall(tmp_path)
    tests = [f"tests/core/test_{name}.py" for name in ("clip", "history", "percentile", "snapshot", "state")]
    command = (sys.executable, "-P", "-m", "pytest", "-p", "no:cacheprovider", *tests)
    said = run(*command, PYTHONPATH=str(tmp_path))
    assert re.search(rf"numba backend \(the automatic choice.*from {re.escape(str(tmp_path))}", said)
    assert " passed" in said


def test_wheel_without_a_compiler_fails_where_the_kernel_is_demanded(tmp_path):
    with pytest.raises(AssertionError, match="The kernel of autoclip-core was not built"):
        build(tmp_path, "--wheel", CC="no-such-compiler", AUTOCLIP_REQUIRE_NATIVE="1")


@on_linux
def test_extension_exports_the_whole_abi_and_nothing_else(kernel):
    entry_points = {
        "autoclip_tensorflow_register",
        "autoclip_tensors_fingerprint",
        "autoclip_tensors_measure",
        "autoclip_tensors_scale",
        "autoclip_tree_observe",
        "autoclip_window_observe",
        "autoclip_xla_tree",
        "autoclip_xla_window",
    }
    assert exported(kernel) == declared() | {"PyInit__kernel"} | entry_points


@on_linux
def test_library_exports_the_whole_abi_and_nothing_else(installed):
    assert exported(installed / "lib/libautoclip.so") == declared()


@on_linux
def test_static_library_brings_no_name_that_could_clash(installed):
    lines = run("nm", "-g", "--defined-only", str(installed / "lib/libautoclip.a")).splitlines()
    names = {line.split()[-1] for line in lines if len(line.split()) == 3}
    assert names >= declared()
    assert all(name.startswith("autoclip_") for name in names), names


@on_linux
def test_library_has_the_abi_version_as_its_soname_and_needs_only_libc(installed):
    library = installed / "lib/libautoclip.so"
    assert dynamic(library, "SONAME") == [f"libautoclip.so.{macro('ABI_VERSION')}"]
    assert {name.split(".")[0] for name in dynamic(library, "NEEDED")} <= {"libc", "libpthread"}


def test_version_is_the_same_everywhere_and_written_once(installed, pkg_config, wheel):
    library = ctypes.CDLL(str(installed / "lib/libautoclip.so"))
    library.autoclip_version.restype = ctypes.c_char_p
    assert library.autoclip_version().decode() == version()
    assert library.autoclip_abi_version() == int(macro("ABI_VERSION"))
    assert pkg_config("--modversion") == [version()]
    assert wheel.name.split("-")[1] == autoclip_core.__version__ == version()

    literal = re.compile(rf"(?<![\d.=]){re.escape(version())}(?![\d.])")
    places = [ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "Makefile"]
    places += [file for folder in ("csrc", "autoclip_core", "adapters") for file in (ROOT / folder).rglob("*.*")]
    assert [file for file in places if literal.search(file.read_text(encoding="utf-8", errors="replace"))] == []


@pytest.fixture
def release(need, tmp_path):
    """A repository with one commit, ready to be released; call it for the last line that `.ci/release check` says."""
    for name in (
        ".ci/release",
        "csrc/include/autoclip.h",
        "CHANGELOG.md",
        f"tests/abi/autoclip-{macro('ABI_VERSION')}.abi",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    log = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = f"## [{version()}] - "
    log = re.sub(rf"^{re.escape(heading)}.*$", f"{heading}2030-01-31", log, flags=re.MULTILINE)
    (tmp_path / "CHANGELOG.md").write_text(log, encoding="utf-8")
    git = [need("git"), "-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false"]
    run("git", "init", "-q", cwd=tmp_path)

    def release(*commands):
        for command in (["add", "."], ["commit", "-qm", "m"], *commands):
            run(*git, *command, cwd=tmp_path)
        done = subprocess.run(
            [tmp_path / ".ci/release", "check"], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        return done.returncode, (done.stdout + done.stderr).splitlines()[-1]

    return release


def test_release_is_committed_described_and_tagged(release):
    said = f"release: {version()}, ABI {macro('ABI_VERSION')}, committed, described and tagged"
    assert release(["tag", f"v{version()}"]) == (0, said)


def test_release_without_its_tag_is_refused(release):
    assert release() == (1, f"release: this commit has no tag v{version()}")


def test_release_that_the_changelog_does_not_describe_is_refused(release, tmp_path):
    (tmp_path / "CHANGELOG.md").write_text(f"## [{version()}] - unreleased\n", encoding="utf-8")
    code, said = release(["tag", f"v{version()}"])
    assert code == 1
    assert said.startswith("release: CHANGELOG.md begins with")


@pytest.mark.parametrize(
    ("compiler", "standard"),
    [
        *((compiler, standard) for compiler in ("gcc", "clang") for standard in ("c99", "c11", "c17")),
        ("g++", "c++17"),
        ("clang++", "c++17"),
    ],
)
def test_header_compiles_alone_without_a_warning(compiler, standard, need, tmp_path):
    source = tmp_path / ("alone.cpp" if "++" in standard else "alone.c")
    source.write_text("#include <autoclip.h>\n#include <autoclip.h>\n")
    run(need(compiler), f"-std={standard}", "-fsyntax-only", *WARNINGS, f"-I{ROOT / 'csrc/include'}", str(source))


@pytest.mark.parametrize("target", ["autoclip", "autoclip_static"])
def test_embed_runs_through_the_cmake_package(target, installed, tmp_path):
    (tmp_path / "CMakeLists.txt").write_text(f"""
        cmake_minimum_required(VERSION 3.21)
        project(embedder C)
        find_package(autoclip {version()} EXACT REQUIRED)
        add_executable(embed {EXAMPLES.as_posix()}/embed.c)
        target_link_libraries(embed PRIVATE autoclip::{target})
    """)
    run("cmake", "-B", "build", f"-DCMAKE_PREFIX_PATH={installed}", cwd=tmp_path)
    run("cmake", "--build", "build", cwd=tmp_path)
    assert run("build/embed", cwd=tmp_path) == expected_output()


@pytest.mark.parametrize(("compiler", "source"), [("cc", "embed.c"), ("c++", "embed.cpp")])
def test_embed_runs_through_pkg_config(compiler, source, installed, pkg_config, need, tmp_path):
    flags = pkg_config("--cflags", "--libs")
    run(need(compiler), *WARNINGS, str(EXAMPLES / source), *flags, "-o", "embed", cwd=tmp_path)
    assert run("./embed", cwd=tmp_path, LD_LIBRARY_PATH=str(installed / "lib")) == expected_output()


def test_embed_runs_from_rust(installed, need, tmp_path):
    library = str(installed / "lib")
    run(need("rustc"), "-D", "warnings", "-L", f"native={library}", str(EXAMPLES / "embed.rs"), cwd=tmp_path)
    assert run("./embed", cwd=tmp_path, LD_LIBRARY_PATH=library) == expected_output()

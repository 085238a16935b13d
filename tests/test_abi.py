"""The C ABI, against that of the last release: a program linked then must run with the library of now.

`tests/abi/autoclip-N.abi` describes ABI version N as it was when it was first released, in the words of libabigail:

    abidw --headers-dir csrc/include --no-show-locs --drop-private-types --no-corpus-path --no-comp-dir-path LIBRARY |
        sed "s|path='[^']*/csrc/|path='csrc/|" > tests/abi/autoclip-N.abi

A new function is compatible. Anything else that is reported here needs a new AUTOCLIP_ABI_VERSION and a new file.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the description is of Linux on x86-64"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("abi")
    for command in (
        ["cmake", "-S", "csrc", "-B", folder, "-DCMAKE_BUILD_TYPE=Debug"],
        ["cmake", "--build", folder, "--target", "autoclip"],
    ):
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return (folder / "libautoclip.so").resolve()


@pytest.fixture(scope="module")
def compare(library, absent):
    if shutil.which("abidiff") is None:
        absent("abidiff (Debian's abigail-tools) is not installed")

    def compare(released):
        done = subprocess.run(
            ["abidiff", "--no-added-syms", "--headers-dir2", ROOT / "csrc/include", released, library],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    return compare


def test_abi_is_that_of_the_last_release(library, compare):
    soname = (library.parent / "libautoclip.so").readlink().name  # libautoclip.so.N
    code, report = compare(ROOT / f"tests/abi/autoclip-{soname.rpartition('.')[2]}.abi")
    assert code == 0, report


def test_a_changed_abi_is_noticed(tmp_path, compare):
    released = (ROOT / "tests/abi/autoclip-1.abi").read_text(encoding="utf-8")
    assert "name='AUTOCLIP_BROKEN' value='11'" in released
    (tmp_path / "changed.abi").write_text(
        released.replace("name='AUTOCLIP_BROKEN' value='11'", "name='AUTOCLIP_BROKEN' value='12'"), encoding="utf-8"
    )
    code, report = compare(tmp_path / "changed.abi")
    assert code != 0, report

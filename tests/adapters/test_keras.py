"""The suite of AutoClipOptimizer on the three backends of Keras, which a process can have one of."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


def compiled_once(folder):
    """Have JAX keep what it compiles: most tests train the same small model. That saves a quarter of their time."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_suite_passes_on(backend, tmp_path, absent):
    for package in ("keras", "tensorboard", backend):
        if find_spec(package) is None:
            absent(f"{package} is not installed")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/adapters/keras_suite.py"],
        cwd=ROOT,
        env={**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", **compiled_once(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout

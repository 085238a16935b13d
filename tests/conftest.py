"""What all tests share: which backend is tested, what may be absent, how hard hypothesis tries.

AUTOCLIP_BACKEND names the backend under test; without it the automatic choice is tested, and the header of the run
says which that was. A backend that is demanded and cannot load ends the run before the first test.

AUTOCLIP_DEMAND_ALL=1 turns every skip for something absent (the other backend, a compiler) into a failure.

The hypothesis profile is "ci" where CI or AUTOCLIP_DEMAND_ALL is set, else "dev"; --hypothesis-profile overrules both.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings

import autoclip_core
from autoclip_core import AutoClipError, BackendError, NormHistory

DEMANDED = os.environ.get("AUTOCLIP_BACKEND") or None
DEMAND_ALL = bool(os.environ.get("AUTOCLIP_DEMAND_ALL"))

# No deadlines: the first call of a backend may compile it. "ci" repeats itself exactly, "dev" looks elsewhere each
# time.
settings.register_profile("dev", max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", settings.get_profile("dev"), max_examples=200, derandomize=True, print_blob=True)
# For mutants, of which a failure says enough: the smallest one is not looked for.
settings.register_profile(
    "hasty", settings.get_profile("dev"), derandomize=True, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("ci" if DEMAND_ALL or os.environ.get("CI") else "dev")

# Their assertions are to say as much as those of the tests.
pytest.register_assert_rewrite("tests.adapters.contract", "tests.core.reference")

# Before anything imports it: Hugging Face's hub is not to be asked, nor told.
os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")


def pytest_configure(config):
    try:
        tried = NormHistory().backend
    except AutoClipError as error:
        raise pytest.UsageError(str(error)) from None
    if tried != (DEMANDED or tried):
        raise pytest.UsageError(f"AUTOCLIP_BACKEND demands {DEMANDED}, but {tried} is what a new history uses.")


def pytest_report_header(config):
    why = "demanded by AUTOCLIP_BACKEND" if DEMANDED else "the automatic choice; AUTOCLIP_BACKEND demands one by name"
    return f"autoclip-core: {NormHistory().backend} backend ({why}), from {Path(autoclip_core.__file__).parent}"


@pytest.fixture(scope="session")
def backend():
    """The name of the backend under test."""
    return NormHistory().backend


@pytest.fixture(scope="session")
def absent():
    """Call it with a sentence on what is missing: a skip by name, or a failure where everything is demanded."""
    return pytest.fail if DEMAND_ALL else pytest.skip


@pytest.fixture(scope="session")
def other_backend(backend, absent):
    """The name of the backend that is not under test."""
    name = {"native": "numba", "numba": "native"}[backend]
    try:
        NormHistory(backend=name)
    except BackendError as error:
        absent(f"needs both backends: {error}")
    return name


@pytest.fixture(scope="session")
def trace():
    """100,000 norms like those of a real run, drifting over eight decades, with spikes, zeros, NaN and infinities."""
    steps, random = 100_000, np.random.default_rng(20200914)
    decades = np.interp(np.arange(steps), np.array([0, 0.05, 0.4, 0.7, 1]) * steps, [2, -1, -3, -6, -4])
    norms = 10.0**decades * random.lognormal(0.0, 0.6, steps)
    norms[random.random(steps) < 0.005] *= 10.0 ** random.uniform(1, 5)
    norms[10_000:10_100] = norms[10_000]  # a stalled run: the same norm again and again
    for value, share in ((0.0, 0.002), (np.nan, 0.001), (np.inf, 0.001), (-0.0, 0.0005)):
        norms[1:][random.random(steps - 1) < share] = value
    return norms.astype(np.float32).tolist()


@pytest.fixture
def run_python(tmp_path):
    """Run code in a fresh interpreter that sees the installed package only; it must end well and say nothing on stderr.

    Returns what it printed.
    """

    def run(code, *flags, timeout=120, **environment):
        done = subprocess.run(
            [sys.executable, "-P", *flags, "-c", code],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run

"""Checkpoints under fire: three kills per framework here, thirty in `make soak`."""

from importlib.util import find_spec

import pytest

from .programs.kills import survive


@pytest.mark.parametrize("framework", ["torch", "jax", "keras"])
def test_killed_training_resumes_to_the_last_bit(framework, backend, absent, tmp_path):
    for package in {"jax": ["jax", "flax"], "keras": ["keras", "tensorflow"]}.get(framework, [framework]):
        if find_spec(package) is None:
            absent(f"{package} is not installed")
    if framework == "jax" and backend != "native":
        pytest.skip("a history beside the state takes the compiled kernel")
    survive(framework, tmp_path, kills=3)

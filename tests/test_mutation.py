"""A sample of the mutants; `make soak` judges 220."""

import shutil

import pytest


def test_mutants_of_a_sample_die(backend, absent):
    pytest.importorskip("resource", reason="the time of the processor is counted as POSIX does")
    if shutil.which("cc") is None:
        absent("needs a C compiler")
    if backend != "native":
        pytest.skip("mutants choose the backend themselves")
    from .programs.mutation import campaign, report

    judged, survived = campaign(10, seed=3)
    print("\n".join(report(judged, survived)))
    assert len(judged) >= 8
    assert len(survived) <= len(judged) / 10

"""The examples in the docstrings are true."""

import doctest
from importlib import import_module
from pkgutil import iter_modules

import pytest

import autoclip_core

BACKENDS = {"native": "_native", "numba": "_numba"}
MODULES = sorted({module.name for module in iter_modules(autoclip_core.__path__)} - {"_kernel", *BACKENDS.values()})


def run_doctests(name):
    return doctest.testmod(import_module(name), raise_on_error=False, report=True, verbose=False)


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_the_module_are_true(name, capsys):
    failed, _ = run_doctests(f"autoclip_core.{name}")
    assert failed == 0, capsys.readouterr().out


def test_examples_of_the_backend_are_true(backend, capsys):
    failed, _ = run_doctests(f"autoclip_core.{BACKENDS[backend]}")
    assert failed == 0, capsys.readouterr().out


@pytest.mark.parametrize("subject", [autoclip_core.AutoClip, autoclip_core.NormHistory])
def test_class_has_an_example(subject):
    assert ">>> " in subject.__doc__

"""The one place that chooses between the native kernel and Numba, and the only reader of the environment.

A backend that is asked for by name and cannot load is an error: nothing falls back in silence. Only the automatic
choice (no name, no AUTOCLIP_BACKEND) tries one after the other, and `NormHistory.backend` tells what it took.
"""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from autoclip_core.errors import AutoClipTypeError, AutoClipValueError, BackendError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_REMEDIES = {
    "native": "the compiled kernel is missing: install a wheel of autoclip-core for this platform, or install from "
    "source where there is a C compiler",
    "numba": 'numba is missing: pip install "autoclip-core[numba]"',
}


class Backend(Protocol):
    """One history, as a backend keeps it. The arguments have been checked; arrays are contiguous float64."""

    name: ClassVar[str]
    library: ClassVar[str | None]  # the path of the compiled kernel, if it is one
    build: ClassVar[str]  # what it is made of, for a bug report

    def __init__(self, window: int | None) -> None: ...
    @classmethod
    def from_bytes(cls, snapshot: bytes | memoryview) -> Self: ...
    def to_bytes(self) -> bytes: ...
    def clone(self) -> Self: ...
    def push(self, norm: float) -> None: ...
    def extend(self, norms: NDArray[np.float64]) -> None: ...
    def observe(self, norm: float, percentile: float) -> float: ...
    def observe_many(self, norms: NDArray[np.float64], percentiles: NDArray[np.float64]) -> NDArray[np.float64]: ...
    def percentile(self, percentile: float) -> float: ...
    def select(self, rank: int) -> float: ...
    def rank(self, norm: float) -> int: ...
    def order_statistics(self, first: int, count: int) -> NDArray[np.float64]: ...
    def oldest(self, count: int) -> NDArray[np.float64]: ...
    def values(self) -> NDArray[np.float64]: ...
    def merge(self, other: Self) -> None: ...
    def clear(self) -> None: ...
    def check(self) -> None: ...
    def __len__(self) -> int: ...
    @property
    def window(self) -> int | None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def shared_id(self) -> int | None: ...


def find_backend(name: str | None) -> type[Backend]:
    """Return the class of the named backend, or of the first that loads.

    Raises:
        AutoClipTypeError, AutoClipValueError: there is no backend of that name.
        BackendError: it cannot be loaded.
    """
    if name is None:
        name = os.environ.get("AUTOCLIP_BACKEND") or None
    if name is not None and not isinstance(name, str):
        raise AutoClipTypeError(f"backend must be a name or None, but {name!r} ({type(name).__name__}) was given.")
    if name is not None and name not in _REMEDIES:
        raise AutoClipValueError(f'backend must be "native", "numba" or None, but {name!r} was given.')
    return _load(name)


def kernel_library() -> str:
    """Return the path of the shared library that holds the compiled kernel and its table of shared histories.

    For code that calls the kernel from C, as compiled programs do. It is loaded already, and opening it by this path
    finds the same one, with the functions of autoclip.h and the entry points of the other folders of csrc.

    Raises:
        BackendError: the backend of new histories is not the compiled kernel, or none can be loaded.
    """
    backend = find_backend(None)
    if backend.library is None:
        raise BackendError(f"The backend is {backend.name!r}, and only the native one has a library to call from C.")
    return backend.library


def kernel_functions() -> Any:
    """Return the functions of the compiled kernel, for Python that calls them at every step.

    Those of autoclip.h, as cffi makes them; and `tensors_measure`, `tensors_scale` and `tensors_fingerprint` of
    csrc/arrays/tensors.h, to which each array is the address of its memory.

    Raises:
        BackendError: as for `kernel_library`.
    """
    kernel_library()
    return import_module("autoclip_core._native").lib


def kernel_error(status: int) -> Exception:
    """Return the exception for a status, not 0, that a function of `kernel_library()` has returned."""
    made: Exception = import_module("autoclip_core._native").error(status)
    return made


def backends() -> dict[str, str]:
    """Return what each backend is made of, or why it cannot be loaded."""
    found = {}
    for name in _REMEDIES:
        try:
            found[name] = _load(name).build
        except BackendError as error:
            found[name] = str(error)
    return found


def why() -> str:
    """Return who chose the backend of new histories."""
    return "by AUTOCLIP_BACKEND" if os.environ.get("AUTOCLIP_BACKEND") else "the first that loads"


@cache
def _load(name: str | None) -> type[Backend]:
    failures = []
    for candidate in _REMEDIES if name is None else (name,):
        try:
            backend: type[Backend] = import_module(f"autoclip_core._{candidate}").History
            return backend
        except ImportError as error:
            failures.append((candidate, error))
    reasons = "; ".join(f"{candidate}: {_REMEDIES[candidate]} ({error})" for candidate, error in failures)
    source = Path(__file__).parent.parent
    if (source / "pyproject.toml").exists():
        reasons += (
            f". autoclip_core was imported from its sources in {source}: start Python in another folder, or with -P"
        )
    raise BackendError(f"No backend can be loaded. {reasons}." if name is None else f"Backend {reasons}.")

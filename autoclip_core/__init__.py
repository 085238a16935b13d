"""AutoClip: the threshold for gradient clipping, chosen by itself.

Norms in, thresholds out. This package imports no framework, and numpy only when arrays are asked for.
"""

from autoclip_core import arrays
from autoclip_core._backend import kernel_error, kernel_functions, kernel_library
from autoclip_core.clip import AutoClip, ClipStep
from autoclip_core.errors import (
    AutoClipError,
    AutoClipTypeError,
    AutoClipValueError,
    BackendError,
    BrokenHistoryError,
    EmptyHistoryError,
    NonFiniteNormError,
    RankError,
    SnapshotError,
    StateError,
)
from autoclip_core.history import NormHistory, check_full_history

__all__ = [
    "AutoClip",
    "AutoClipError",
    "AutoClipTypeError",
    "AutoClipValueError",
    "BackendError",
    "BrokenHistoryError",
    "ClipStep",
    "EmptyHistoryError",
    "NonFiniteNormError",
    "NormHistory",
    "RankError",
    "SnapshotError",
    "StateError",
    "arrays",
    "check_full_history",
    "kernel_error",
    "kernel_functions",
    "kernel_library",
]


def __getattr__(name: str) -> str:
    # Looked up on demand: importlib.metadata costs more time to import than this whole package.
    if name == "__version__":
        from importlib.metadata import version

        return version("autoclip-core")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

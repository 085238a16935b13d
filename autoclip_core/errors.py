"""Every exception this package raises on purpose.

Each one is an `AutoClipError` and also the builtin exception that a caller would expect, so that
`except ValueError` and `except AutoClipError` both work. The same mistake reads the same on every backend: sentences
that more than one file needs stand here, and so does the one place that turns a status of the kernel into an exception.
"""

from typing import Any


class AutoClipError(Exception):
    """Base of every error of this package."""


class AutoClipValueError(AutoClipError, ValueError):
    """An argument has the right type and a value that cannot be used."""


class AutoClipTypeError(AutoClipError, TypeError):
    """An argument has a type that cannot be used."""


class EmptyHistoryError(AutoClipError, ValueError):
    """A percentile was asked of a history that holds no norm."""


class RankError(AutoClipError, IndexError):
    """A rank is not below the number of norms in the history."""


class SnapshotError(AutoClipError, ValueError):
    """Bytes are not a snapshot, are damaged, or come from a later format."""


class StateError(AutoClipError, ValueError):
    """A state dict does not fit the object it is loaded into."""


class NonFiniteNormError(AutoClipError, FloatingPointError):
    """A gradient norm is NaN or infinite and the policy is `nonfinite="raise"`."""


class BackendError(AutoClipError, ImportError):
    """A backend cannot be loaded."""


class BrokenHistoryError(AutoClipError, RuntimeError):
    """An invariant of a history does not hold: memory was overwritten, or there is a bug."""


def bad_norm(norm: object) -> AutoClipValueError:
    """The error for a norm that a history cannot hold."""
    return AutoClipValueError(f"A history holds finite norms only, but {norm!r} was given.")


def bad_percentile(percentile: object) -> AutoClipValueError:
    """The error for a percentile outside its range."""
    return AutoClipValueError(f"percentile must be from 0 to 100, but {percentile!r} was given.")


def empty_history() -> EmptyHistoryError:
    """The error for a percentile of nothing."""
    return EmptyHistoryError("An empty history has no percentile; remember a norm first.")


def bad_rank(rank: int, size: int) -> RankError:
    """The error for a rank that no norm has."""
    return RankError(f"Ranks are below the number of norms, which is {size}, but rank {rank} was asked for.")


def bad_snapshot(size: int) -> SnapshotError:
    """The error for bytes that are no snapshot."""
    return SnapshotError(f"These {size} bytes are not a snapshot of a history, or they were damaged or cut.")


def new_snapshot() -> SnapshotError:
    """The error for a snapshot of a later format."""
    return SnapshotError("The snapshot was made by a later release of autoclip-core; install that release to read it.")


def broken_history(reason: str) -> BrokenHistoryError:
    """The error for a structure whose check fails."""
    return BrokenHistoryError(f"The history is damaged ({reason}): memory was overwritten, or there is a bug.")


_KINDS = {
    "AUTOCLIP_NO_MEMORY": MemoryError,
    "AUTOCLIP_NOT_FINITE": AutoClipValueError,
    "AUTOCLIP_BAD_PERCENTILE": AutoClipValueError,
    "AUTOCLIP_EMPTY": EmptyHistoryError,
    "AUTOCLIP_BAD_RANK": RankError,
    "AUTOCLIP_HAS_WINDOW": AutoClipValueError,
    "AUTOCLIP_BAD_SNAPSHOT": SnapshotError,
    "AUTOCLIP_NEW_SNAPSHOT": SnapshotError,
    "AUTOCLIP_NO_HISTORY": StateError,
    "AUTOCLIP_BROKEN": BrokenHistoryError,
    "AUTOCLIP_NO_WINDOW": AutoClipValueError,
    "AUTOCLIP_WRONG_STEP": StateError,
}


def of_status(status: str, message: str, **given: Any) -> Exception:
    """Return the exception for a status of the kernel.

    Args:
        status: its name in autoclip.h.
        message: what the kernel says about it; the exception says more where the caller's values are known.
        given: these values.
    """
    match status, given:
        case "AUTOCLIP_NOT_FINITE", {"norm": norm}:
            return bad_norm(norm)
        case "AUTOCLIP_BAD_PERCENTILE", {"percentile": percentile}:
            return bad_percentile(percentile)
        case "AUTOCLIP_EMPTY", _:
            return empty_history()
        case "AUTOCLIP_BAD_RANK", {"rank": rank, "size": size}:
            return bad_rank(rank, size)
        case "AUTOCLIP_BAD_SNAPSHOT", {"size": size}:
            return bad_snapshot(size)
        case "AUTOCLIP_NEW_SNAPSHOT", _:
            return new_snapshot()
        case "AUTOCLIP_BROKEN", {"reason": reason}:
            return broken_history(reason)
    return _KINDS.get(status, AutoClipError)(message)

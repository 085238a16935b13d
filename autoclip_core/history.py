"""NormHistory: arguments checked, then delegated to a backend.

The checks that the whole package shares stand here too: what counts as a number, a percentile and a count. Arrays come
in and go out as numpy arrays, and numpy is imported only by the methods that need one: `import autoclip_core` stays
cheap, and so does a run that never asks for an array.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite, isnan
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Self, SupportsIndex, cast

from autoclip_core._backend import Backend, find_backend
from autoclip_core.errors import AutoClipTypeError, AutoClipValueError, BackendError, bad_norm, bad_percentile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


def _is_a(kind: type[Real | Integral], value: Any) -> bool:
    """Tell numbers from what Python and numpy count among them: bool, and spans of time."""
    if isinstance(value, bool) or getattr(getattr(value, "dtype", None), "kind", None) == "m":
        return False
    return isinstance(value, kind)


def as_number(value: Any, name: str) -> float:
    """Return a real number as a float; refuse everything else, bool included."""
    if not _is_a(Real, value):
        remedy = "; take its value with .item()" if hasattr(value, "item") else ""
        raise AutoClipTypeError(f"{name} must be a real number, but {_describe(value)} was given{remedy}.")
    try:
        return float(value)
    except OverflowError:
        raise AutoClipValueError(
            f"{name} must be within the range of floats, but {_describe(value)} was given."
        ) from None


def as_percentile(value: Any) -> float:
    """Return a percentile as a float in [0, 100]."""
    percentile = as_number(value, "percentile")
    if not 0.0 <= percentile <= 100.0:
        raise bad_percentile(value)
    return percentile


def as_count(value: Any, name: str, *, minimum: int) -> int:
    """Return a whole number of at least `minimum` as an int."""
    if not _is_a(Integral, value):
        raise AutoClipTypeError(f"{name} must be a whole number, but {_describe(value)} was given.")
    count = int(value)
    if not minimum <= count < 2**63:
        raise AutoClipValueError(
            f"{name} must be at least {minimum} and below 2**63, but {_describe(value)} was given."
        )
    return count


def _describe(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - Python writes no integer of more than some thousand digits, others fail as well
        text = "a value that cannot be written out"
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _as_norm(value: Any) -> float:
    norm = as_number(value, "norm")
    if not isfinite(norm):
        raise bad_norm(norm)
    return norm


def _as_array(values: ArrayLike | Iterable[float], name: str) -> NDArray[np.float64]:
    import numpy as np

    if isinstance(values, str | bytes | bytearray | Mapping):
        raise AutoClipTypeError(f"{name} must be real numbers in a row, but {_describe(values)} was given.")
    if not hasattr(values, "__array__") and isinstance(values, Iterable):
        values = cast("list[float]", list(values))
        if not {bool, np.bool_}.isdisjoint(map(type, values)):  # numpy would make numbers of them
            raise AutoClipTypeError(f"{name} must be real numbers, but there is a bool among them.")
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise AutoClipValueError(
            f"{name} must be numbers, but some are masked; give those that are not: .compressed()."
        )
    try:
        array = np.asarray(values)
    except ValueError:
        raise AutoClipValueError(f"{name} must be one-dimensional, but rows of different lengths were given.") from None
    except (TypeError, RuntimeError) as error:  # of a tensor that numpy may not see, or has no type for
        raise AutoClipTypeError(
            f"{name} must be what numpy can read, but it cannot read this {type(values).__name__} ({error}); of a "
            "tensor give .detach().double().cpu()."
        ) from error
    if array.dtype.kind == "O" and array.ndim == 1:  # integers of more than 64 bits, or fractions
        array = np.array([as_number(value, name) for value in array.tolist()])
    if array.size and array.dtype.kind not in "fiu":
        raise AutoClipTypeError(f"{name} must be real numbers, but an array of {array.dtype} was given.")
    if array.ndim != 1:
        raise AutoClipValueError(f"{name} must be one-dimensional, but an array of shape {array.shape} was given.")
    with np.errstate(over="ignore"):  # what is beyond float64 becomes infinite, and is refused as such
        return np.ascontiguousarray(array, dtype=np.float64)


class NormHistory:
    """Every norm that was pushed, or the last `window` of them, sorted at all times.

    A multiset of finite floats on a counted B+ tree: O(log n) per norm, about ten bytes of memory each. It answers the
    percentile at any step, bit for bit as `numpy.percentile(norms, p)` does. Any thread may use it at any time: each
    method is one atomic step.

    Args:
        window: how many norms to remember, the oldest leaving first; None remembers all.
        backend: "native" (the compiled kernel) or "numba"; None takes the environment variable AUTOCLIP_BACKEND, else
            the first of the two that loads.

    Raises:
        AutoClipTypeError, AutoClipValueError: the window is not a whole number of at least 1, or there is no such
            backend.
        BackendError: the backend cannot be loaded; the message says what to install.

    Every method that fails leaves the history as it was; MemoryError included.

    >>> history = NormHistory()
    >>> history.extend([3.0, 1.0, 2.0])
    >>> history.observe(4.0, percentile=50.0)
    2.5
    >>> history.values()
    array([1., 2., 3., 4.])
    """

    __slots__ = ("__weakref__", "_backend", "_observe")

    # A plain float goes to the backend unchecked, which refuses a bad one: checks here would cost more than the call.
    _backend: Backend

    def __init__(self, window: int | None = None, backend: str | None = None) -> None:
        if window is not None:
            window = as_count(window, "window", minimum=1)
        self._hold(find_backend(backend)(window))

    def _hold(self, backend: Backend) -> None:
        self._backend = backend
        self._observe = backend.observe  # bound once: it is called at every training step

    @classmethod
    def _holding(cls, backend: Backend) -> Self:
        history = cls.__new__(cls)
        history._hold(backend)
        return history

    def push(self, norm: float) -> None:
        """Remember one norm; in a full window the oldest leaves. O(log n).

        Raises:
            AutoClipTypeError, AutoClipValueError: the norm is not a finite real number.
        """
        self._backend.push(norm if norm.__class__ is float else _as_norm(norm))

    def extend(self, norms: ArrayLike | Iterable[float]) -> None:
        """Remember norms, shape (n,), in the order in which they came: all of them or, on failure, none.

        O(m log m) for m norms; input that is already ascending is not sorted again.

        Raises:
            AutoClipTypeError, AutoClipValueError: they are not finite real numbers in one dimension.
        """
        array = _as_array(norms, "norms")
        if self.window is None and len(array) > 1:
            from autoclip_core._bits import ascending

            # The order of age is not kept, and numpy's vectorised sort is the fastest there is. What is not finite
            # gathers at the ends.
            ordered = ascending(array)
            if not (isfinite(ordered[0]) and isfinite(ordered[-1])):
                _check_finite(array)
            array = ordered
        else:
            _check_finite(array)
        self._backend.extend(array)

    def observe(self, norm: float, percentile: float) -> float:
        """Remember one norm and return the percentile of the history that now includes it. O(log n).

        Raises:
            AutoClipTypeError, AutoClipValueError: the norm is not a finite real number, or the percentile not from 0
                to 100.
        """
        if norm.__class__ is not float or percentile.__class__ is not float:
            norm, percentile = _as_norm(norm), as_percentile(percentile)
        return self._observe(norm, percentile)

    def observe_many(self, norms: ArrayLike | Iterable[float], percentiles: ArrayLike) -> NDArray[np.float64]:
        """Replay a run: observe norms, shape (n,), at every one of `percentiles`, shape (p,), after each norm.

        Returns:
            The thresholds, shape (n, p): row i holds the percentiles of the history after norm i. O(n p log n).

        Raises:
            AutoClipTypeError, AutoClipValueError: as for `observe`; then none of the norms is remembered.
        """
        array = _as_array(norms, "norms")
        _check_finite(array)
        ranks = _as_array(percentiles, "percentiles")
        for percentile in ranks:
            as_percentile(float(percentile))
        return self._backend.observe_many(array, ranks)

    def percentile(self, percentile: float) -> float:
        """Return the percentile, from 0 to 100, interpolated as `numpy.percentile` does by default. O(log n).

        Raises:
            AutoClipTypeError, AutoClipValueError: the percentile is not a real number from 0 to 100.
            EmptyHistoryError: there is no norm yet.
        """
        return self._backend.percentile(percentile if percentile.__class__ is float else as_percentile(percentile))

    def select(self, rank: int) -> float:
        """Return the norm with `rank` norms before it in ascending order: the inverse of `rank`. O(log n).

        Raises:
            AutoClipTypeError, AutoClipValueError: the rank is not a whole number of at least 0.
            RankError: the rank is not below `len(history)`.
        """
        return self._backend.select(as_count(rank, "rank", minimum=0))

    def rank(self, norm: float) -> int:
        """Return how many remembered norms are below `norm`, which may be infinite. O(log n).

        Raises:
            AutoClipTypeError, AutoClipValueError: the norm is not a real number, or is NaN.
        """
        number = as_number(norm, "norm")
        if isnan(number):
            raise AutoClipValueError("NaN has no rank.")
        return self._backend.rank(number)

    def order_statistics(self, first: int, count: int) -> NDArray[np.float64]:
        """Return the norms of ranks first ... first + count - 1, shape (count,), ascending. O(log n + count).

        Raises:
            AutoClipTypeError, AutoClipValueError: first or count is not a whole number of at least 0.
            RankError: first + count is above `len(history)`.
        """
        return self._backend.order_statistics(as_count(first, "first", minimum=0), as_count(count, "count", minimum=0))

    def oldest(self, count: int) -> NDArray[np.float64]:
        """Return the norms that leave the window first, shape (count,), the oldest first. O(count).

        Raises:
            AutoClipTypeError, AutoClipValueError: count is not a whole number of at least 0, or the history has no
                window: then it does not know the age of its norms.
            RankError: count is above `len(history)`.
        """
        if self.window is None:
            raise AutoClipValueError("A history without a window does not know which of its norms is the oldest.")
        return self._backend.oldest(as_count(count, "count", minimum=0))

    def values(self) -> NDArray[np.float64]:
        """Return all norms, shape (n,), ascending. O(n)."""
        return self._backend.values()

    def merge(self, other: NormHistory) -> None:
        """Remember every norm of `other` too, which stays as it is. O(n + m).

        Raises:
            AutoClipTypeError: `other` is not a NormHistory.
            AutoClipValueError: this history has a window: the merged norms would have no order of age.
        """
        if not isinstance(other, NormHistory):
            raise AutoClipTypeError(f"Only another NormHistory can be merged, but {_describe(other)} was given.")
        if self.window is not None:
            raise AutoClipValueError(
                f"A history with a window ({self.window}) cannot take in another: the norms of the two have no common "
                "order of age. Merge into one without a window."
            )
        if other.backend == self.backend:
            self._backend.merge(other._backend)
        else:
            self._backend.extend(other.values())

    def clear(self) -> None:
        """Forget every norm and give back their memory."""
        self._backend.clear()

    def to_bytes(self) -> bytes:
        """Return a snapshot: the same bytes on every backend, platform and release of one format. O(n)."""
        return self._backend.to_bytes()

    @classmethod
    def from_bytes(cls, snapshot: bytes | bytearray | memoryview, backend: str | None = None) -> Self:
        """Make a history from a snapshot, which may come from any backend and from an untrusted source. O(n).

        Raises:
            AutoClipTypeError: the argument is not bytes, nor an object that holds bytes as `bytearray` does.
            SnapshotError: it is not a snapshot, is damaged, or has a later format.
        """
        try:
            view = memoryview(snapshot)
        except TypeError:
            raise AutoClipTypeError(f"A snapshot is bytes, but {_describe(snapshot)} was given.") from None
        is_plain = view.format == "B" and view.ndim == 1 and view.contiguous
        return cls._holding(find_backend(backend).from_bytes(view if is_plain else view.tobytes()))

    def check(self) -> None:
        """Test every invariant of the structure. O(n).

        Raises:
            BrokenHistoryError: one does not hold; the message names the first.
        """
        self._backend.check()

    @property
    def window(self) -> int | None:
        """How many norms are remembered at most; None if all."""
        return self._backend.window

    @property
    def backend(self) -> str:
        """The name of the backend: "native" or "numba"."""
        return self._backend.name

    @property
    def nbytes(self) -> int:
        """All bytes held from the allocator."""
        return self._backend.nbytes

    @property
    def shared_id(self) -> int:
        """The id by which C code reaches this very history, through the autoclip_shared_* functions of autoclip.h.

        A compiled program can hold it where it could hold no object. The id is known while this object lives, in this
        process, and is never given to another history.

        Raises:
            BackendError: the backend is not the compiled kernel.
        """
        shared_id = self._backend.shared_id
        if shared_id is None:
            raise BackendError(
                f"A history of the {self.backend!r} backend cannot be reached from C; it takes the compiled kernel: "
                'NormHistory(backend="native").'
            )
        return shared_id

    def __len__(self) -> int:
        return len(self._backend)

    def __copy__(self) -> Self:
        return self._holding(self._backend.clone())

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.__copy__()

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        # Not bound to this backend: the process that unpickles may have another one.
        snapshot = self.to_bytes()
        if int(protocol) < 5:
            return type(self).from_bytes, (snapshot,)
        from pickle import PickleBuffer

        return type(self).from_bytes, (PickleBuffer(snapshot),)  # which may travel beside the pickle, without a copy

    def __repr__(self) -> str:
        window = "" if self.window is None else f" window={self.window}"
        return f"<NormHistory of {len(self)} norms,{window} backend={self.backend!r}>"


def check_full_history(history: Any, window: int | None) -> None:
    """Check what a compiled program was given to keep its norms in.

    Args:
        history: must be a NormHistory that remembers every norm.
        window: must be None; a window that was given beside the history.

    Raises:
        AutoClipTypeError, AutoClipValueError: they are not.
    """
    if not isinstance(history, NormHistory):
        raise AutoClipTypeError(f"history must be a NormHistory or None, but a {type(history).__name__} was given.")
    if history.window is not None:
        raise AutoClipValueError(
            f"history must remember every norm, but this one has window={history.window}; for a window leave out "
            f"history, and give window={history.window}."
        )
    if window is not None:
        raise AutoClipValueError(f"window={window} and a history were given; the history remembers every norm.")


def _check_finite(array: NDArray[np.float64]) -> None:
    import numpy as np

    finite = np.isfinite(array)
    if not finite.all():
        index = int(finite.argmin())
        raise AutoClipValueError(f"A history holds finite norms only, but norms[{index}] is {array[index]}.")

"""The native backend: the C kernel through cffi, by way of its locked table of shared histories.

The only file that imports the compiled module. It translates arguments and statuses, and decides nothing. cffi releases
the GIL in every call, so a history must be its own lock: that is what the autoclip_shared_* functions are.
"""

from __future__ import annotations

from math import isnan
from struct import pack
from typing import TYPE_CHECKING, Any, ClassVar, Self

from autoclip_core import _kernel, errors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ffi: Any = _kernel.ffi
lib: Any = _kernel.lib

_OK: int = lib.AUTOCLIP_OK
_TOO_SMALL: int = lib.AUTOCLIP_TOO_SMALL
_STATUSES: dict[int, str] = ffi.typeof("autoclip_status").elements
_observe: Any = lib.observe


def error(status: int, **given: Any) -> Exception:
    """The exception for a status that is not AUTOCLIP_OK."""
    message = ffi.string(lib.autoclip_status_message(status)).decode()
    return errors.of_status(_STATUSES.get(status, ""), message, **given)


def _expect_ok(status: int, **given: Any) -> None:
    if status != _OK:
        raise error(status, **given)


class History:
    """One history in the kernel's table, owned by this object."""

    __slots__ = ("__weakref__", "_id")

    name: ClassVar[str] = "native"
    library: ClassVar[str | None] = _kernel.__file__
    build: ClassVar[str] = f"ABI {lib.autoclip_abi_version()}, {ffi.string(lib.autoclip_build()).decode()}"
    _id: int

    def __init__(self, window: int | None) -> None:
        cell = ffi.new("uint64_t *")
        _expect_ok(lib.autoclip_shared_create(window or 0, cell))
        self._id = cell[0]

    @classmethod
    def _owning(cls, history_id: int) -> Self:
        history = cls.__new__(cls)
        history._id = history_id
        return history

    def __del__(self, destroy: Any = lib.autoclip_shared_destroy) -> None:
        # `destroy` is bound early: at interpreter exit the module's globals may be gone before this object.
        if hasattr(self, "_id"):
            destroy(self._id)

    @classmethod
    def from_bytes(cls, snapshot: bytes | memoryview) -> Self:
        cell = ffi.new("uint64_t *")
        _expect_ok(lib.autoclip_shared_load(ffi.from_buffer(snapshot), len(snapshot), cell), size=len(snapshot))
        return cls._owning(cell[0])

    def to_bytes(self) -> bytes:
        size = ffi.new("size_t *")
        status = _TOO_SMALL
        while status == _TOO_SMALL:  # again if another thread pushed in between
            _expect_ok(lib.autoclip_shared_save_size(self._id, size))
            snapshot = bytes(size[0])  # filled in place: nobody else has seen it yet
            status = lib.save(self._id, ffi.from_buffer(snapshot), len(snapshot), size)
        _expect_ok(status)
        return snapshot if size[0] == len(snapshot) else snapshot[: size[0]]

    def clone(self) -> Self:
        cell = ffi.new("uint64_t *")
        _expect_ok(lib.autoclip_shared_clone(self._id, cell))
        return self._owning(cell[0])

    def push(self, norm: float) -> None:
        status = lib.autoclip_shared_push(self._id, norm)
        if status != _OK:
            raise error(status, norm=norm)

    def extend(self, norms: NDArray[np.float64]) -> None:
        status = lib.autoclip_shared_extend(self._id, ffi.from_buffer("double[]", norms), len(norms))
        _expect_ok(status, norm=norms)

    def observe(self, norm: float, percentile: float) -> float:
        threshold: float = _observe(self._id, norm, percentile)
        # A NaN: csrc/ffi_build.py says which. To call isnan would cost more than to compare.
        if threshold != threshold:  # noqa: PLR0124
            _expect_ok(pack("<d", threshold)[0], norm=norm, percentile=percentile)
        return threshold

    def observe_many(self, norms: NDArray[np.float64], percentiles: NDArray[np.float64]) -> NDArray[np.float64]:
        import numpy as np

        thresholds = np.empty((len(norms), len(percentiles)))
        status = lib.autoclip_shared_observe_many(
            self._id,
            ffi.from_buffer("double[]", norms),
            len(norms),
            ffi.from_buffer("double[]", percentiles),
            len(percentiles),
            ffi.from_buffer("double[]", thresholds),
        )
        _expect_ok(status, norm=norms, percentile=percentiles)
        return thresholds

    def percentile(self, percentile: float) -> float:
        threshold: float = lib.percentile(self._id, percentile)
        if isnan(threshold):
            _expect_ok(pack("<d", threshold)[0], percentile=percentile)
        return threshold

    def select(self, rank: int) -> float:
        cell = ffi.new("double *")
        _expect_ok(lib.autoclip_shared_select(self._id, rank, cell), rank=rank, size=len(self))
        norm: float = cell[0]
        return norm

    def rank(self, norm: float) -> int:
        cell = ffi.new("uint64_t *")
        _expect_ok(lib.autoclip_shared_rank(self._id, norm, cell), norm=norm)
        rank: int = cell[0]
        return rank

    def order_statistics(self, first: int, count: int) -> NDArray[np.float64]:
        import numpy as np

        size = len(self)
        if first + count > size:  # before memory is asked for
            raise errors.bad_rank(first + count - 1, size)
        norms = np.empty(count)
        status = lib.autoclip_shared_order_statistics(self._id, first, count, ffi.from_buffer("double[]", norms))
        _expect_ok(status, rank=first + count - 1, size=size)
        return norms

    def oldest(self, count: int) -> NDArray[np.float64]:
        import numpy as np

        size = len(self)
        if count > size:  # before memory is asked for
            raise errors.bad_rank(count - 1, size)
        norms = np.empty(count)
        status = lib.autoclip_shared_oldest(self._id, count, ffi.from_buffer("double[]", norms))
        _expect_ok(status, rank=count - 1, size=size)
        return norms

    def values(self) -> NDArray[np.float64]:
        import numpy as np

        count = ffi.new("size_t *")
        status = _TOO_SMALL
        while status == _TOO_SMALL:  # again if another thread pushed in between
            norms = np.empty(len(self))
            status = lib.autoclip_shared_values(self._id, ffi.from_buffer("double[]", norms), len(norms), count)
        _expect_ok(status)
        return norms[: count[0]]

    def merge(self, other: Self) -> None:
        _expect_ok(lib.autoclip_shared_merge(self._id, other._id))

    def clear(self) -> None:
        _expect_ok(lib.autoclip_shared_clear(self._id))

    def check(self) -> None:
        reason = ffi.new("const char **")
        status = lib.autoclip_shared_check(self._id, reason)
        _expect_ok(status, reason=ffi.string(reason[0]).decode() if reason[0] else "")

    def __len__(self) -> int:
        size = ffi.new("uint64_t *")
        _expect_ok(lib.autoclip_shared_size(self._id, size))
        length: int = size[0]
        return length

    @property
    def window(self) -> int | None:
        window = ffi.new("uint64_t *")
        _expect_ok(lib.autoclip_shared_window(self._id, window))
        return window[0] or None

    @property
    def shared_id(self) -> int:
        return self._id

    @property
    def nbytes(self) -> int:
        size = ffi.new("uint64_t *")
        _expect_ok(lib.autoclip_shared_memory(self._id, size))
        nbytes: int = size[0]
        return nbytes

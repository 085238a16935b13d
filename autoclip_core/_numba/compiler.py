"""How functions are compiled, and where their code is kept.

What shaped it:

- No fastmath: the linear rule gives the bits of numpy.percentile only if each operation is rounded by itself.
- Compiled code is kept on disk, in numba's cache: in `__pycache__` beside the file of the function, or, where that
  cannot be written, in the user's cache directory, or in NUMBA_CACHE_DIR if that is set.
- Kept code is thrown away when the file of its function changes, and no other file is looked at. So a compiled function
  calls compiled functions of its own file only, and takes constants from its own file only.
- A cache may cost time and no more: one that is damaged is made anew, and one that cannot be written gives a warning.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import numba
from llvmlite import ir
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Where NUMBA_DISABLE_JIT leaves functions to Python, there is no code to keep, and an intrinsic could not be called.
_has_compiler = not numba.config.DISABLE_JIT  # type: ignore[attr-defined] # set when numba is imported

_failures: list[Exception] = []


def _cannot_keep(failure: Exception) -> None:
    if not _failures:  # the first says it for all functions
        warnings.warn(
            f"The Numba backend will be compiled anew in every process ({failure}); set NUMBA_CACHE_DIR to a directory "
            "that can be written.",
            RuntimeWarning,
            stacklevel=2,
        )
    _failures.append(failure)


class _Cache(FunctionCache):
    def load_overload(self, *key: Any) -> Any:
        try:
            return super().load_overload(*key)
        except Exception:  # noqa: BLE001 - half a file may raise anything
            with suppress(OSError):
                self.flush()  # an empty index: numba will write all of it anew
            return None

    def save_overload(self, *code: Any) -> None:
        try:
            super().save_overload(*code)
        except Exception as failure:  # noqa: BLE001 - no room, no right, or the half a file that could not be flushed
            _cannot_keep(failure)


def compiled(function: _Function) -> _Function:
    """Compile a function when it is called, once for all processes."""
    made: Any = numba.njit(function)
    if _has_compiler:
        try:
            made._cache = _Cache(function)
        except (OSError, RuntimeError) as failure:
            _cannot_keep(failure)
    return made


# A thread may flush subnormal numbers to zero: then two of them compare equal. Compiled functions that compare or
# compute do so between these two, as csrc/src/float_mode.h does; others have no such mode, or none known.
_X86 = platform.machine() in {"x86_64", "AMD64"}
_ARM = platform.machine() in {"aarch64", "arm64"}
_FLUSHES = 0x8040 if _X86 else 1 << 24


def _call(builder: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _get_mode(builder: Any) -> Any:
    if _X86:
        slot = cgutils.alloca_once(builder, ir.IntType(32))
        _call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), builder.bitcast(slot, cgutils.voidptr_t))
        return builder.zext(builder.load(slot), ir.IntType(64))
    return _call(builder, "llvm.aarch64.get.fpcr", ir.IntType(64)) if _ARM else ir.IntType(64)(0)


def _set_mode(builder: Any, mode: Any) -> None:
    if _X86:
        slot = cgutils.alloca_once_value(builder, builder.trunc(mode, ir.IntType(32)))
        _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), builder.bitcast(slot, cgutils.voidptr_t))
    elif _ARM:
        _call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), mode)


def _if_flushes(builder: Any, mode: Any) -> Any:
    return builder.if_then(cgutils.is_not_null(builder, builder.and_(mode, mode.type(_FLUSHES))), likely=False)


def _enter_standard_mode(_: Any) -> Any:
    def generate(_: Any, builder: Any, __: Any, ___: Any) -> Any:
        mode = _get_mode(builder)
        with _if_flushes(builder, mode):
            _set_mode(builder, builder.and_(mode, mode.type(~_FLUSHES)))
        return mode

    return numba.int64(), generate


def _leave_standard_mode(_: Any, __: Any) -> Any:
    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        with _if_flushes(builder, arguments[0]):
            _set_mode(builder, arguments[0])
        return context.get_dummy_value()

    return numba.void(numba.int64), generate


enter_standard_mode: Any = intrinsic(_enter_standard_mode) if _has_compiler else lambda: 0
leave_standard_mode: Any = intrinsic(_leave_standard_mode) if _has_compiler else lambda _: None


def _uncounted(_: Any, array: Any) -> Any:
    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        view = context.make_array(array)(context, builder, arguments[0])
        view.meminfo = view.meminfo.type(None)
        return view._getvalue()

    return array(array), generate


# The same array without its reference count, which every inner call would move up and down by atomic instructions. The
# caller in Python holds the array until the compiled function returns.
uncounted: Any = intrinsic(_uncounted) if _has_compiler else lambda array: array

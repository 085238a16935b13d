"""What a clipping step reads and writes, over the arrays of any library: the part that TensorFlow and Keras share.

The rule itself is the core's: `autoclip_core.arrays`, or the kernel. Here its results become the values of variables
with fixed shapes, so that graphs, XLA, every checkpoint format and distribution work with nothing to do.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import autoclip_core
from autoclip_core import AutoClipTypeError, AutoClipValueError, NormHistory, arrays

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

DEFAULT_WINDOW = 16_384

METRICS = ("grad_norm", "clip_threshold", "clip_scale", "clipped", "steps", "clipped_steps", "nonfinite_steps")


class Options(NamedTuple):
    """The arguments of an AutoClip, checked."""

    percentile: float
    window: int
    history: NormHistory | None
    warmup: int
    nonfinite: str
    max_threshold: float | None


def check_options(
    percentile: float,
    window: int,
    history: NormHistory | None,
    warmup: int,
    nonfinite: str,
    max_threshold: float | None,
) -> Options:
    """Return the arguments, or raise AutoClipTypeError or AutoClipValueError for those that cannot be used."""
    if nonfinite == "raise":
        raise AutoClipValueError(
            'nonfinite="raise" cannot be done inside a compiled program; use "skip" or "pass", and look at '
            "metrics()['nonfinite_steps'] outside of it."
        )
    if window is None:
        raise AutoClipValueError(
            "window=None needs somewhere to keep every norm: give history=NormHistory(), or a window."
        )
    checked = autoclip_core.AutoClip(
        percentile,
        window=window,
        warmup=warmup,
        nonfinite=nonfinite,  # type: ignore[arg-type] # it is checked there
        max_threshold=max_threshold,
    )
    if history is not None:
        _check_history(history, window)
    elif window > arrays.MAX_WINDOW:
        raise AutoClipValueError(
            f"window must be at most {arrays.MAX_WINDOW:,} in variables, but {window:,} was given; "
            "history=NormHistory() has no bound."
        )
    return Options(checked.percentile, window, history, warmup, nonfinite, max_threshold)


def _check_history(history: NormHistory, window: int) -> None:
    if not isinstance(history, NormHistory):
        raise AutoClipTypeError(f"history must be a NormHistory or None, but a {type(history).__name__} was given.")
    if history.window is not None:
        raise AutoClipValueError(
            f"history must remember every norm, but this one has window={history.window}; for a window leave out "
            f"history, and give window={history.window}."
        )
    if window != DEFAULT_WINDOW:
        raise AutoClipValueError(f"window={window} and a history were given; the history remembers every norm.")


def initial_state(options: Options) -> dict[str, tuple[tuple[int, ...], str, Any]]:
    """Return the shape, type and first value of each variable, by name."""
    window = 1 if options.history is not None else options.window
    state: dict[str, tuple[tuple[int, ...], str, Any]] = {
        "ascending": ((window,), "float32", inf),
        "ring": ((window,), "float32", inf),
        "steps": ((), "int32", 0),
        "recorded_steps": ((), "int32", 0),
        "clipped_steps": ((), "int32", 0),
        "nonfinite_steps": ((), "int32", 0),
        "grad_norm": ((), "float32", 0.0),
        "clip_threshold": ((), "float32", inf),
        "clip_scale": ((), "float32", 1.0),
        "clipped": ((), "bool", False),
    }
    if options.history is not None:
        del state["ascending"]  # the norms are there; the ring holds the last one
    return state


def take_step(
    xp: Any,
    options: Options,
    state: Mapping[str, Any],
    norm: Any,
    observe_history: Callable[..., Any] | None,
) -> dict[str, Any]:
    """Let the norm of a gradient enter the history, and decide its step.

    Args:
        xp: the array library, with the names that `autoclip_core.arrays` uses.
        options: what `check_options` returned.
        state: the values of the variables, by the names of `initial_state`.
        norm: the norm, float32.
        observe_history: takes the number of the step, the norm before and the norm to remember to the percentile of
            `options.history`.

    Returns:
        The new values, by the same names.
    """
    remembered = arrays.norm_to_remember(xp, norm)
    recorded_steps = state["recorded_steps"] + xp.astype(remembered < inf, xp.int32)
    new = {}
    if observe_history is None:
        new["ascending"], new["ring"], percentile = arrays.observe(
            xp, state["ascending"], state["ring"], state["recorded_steps"], remembered, options.percentile
        )
    else:
        percentile = observe_history(state["recorded_steps"], xp.take(state["ring"], 0), remembered)
        new["ring"] = xp.where(remembered < inf, remembered, state["ring"])
    threshold, scale, clipped = arrays.decide(
        xp,
        norm,
        percentile,
        recorded_steps,
        warmup=options.warmup,
        nonfinite=options.nonfinite,
        max_threshold=inf if options.max_threshold is None else options.max_threshold,
    )
    return new | {
        "steps": state["steps"] + 1,
        "recorded_steps": recorded_steps,
        "clipped_steps": state["clipped_steps"] + xp.astype(clipped, xp.int32),
        "nonfinite_steps": state["nonfinite_steps"] + xp.astype(~xp.isfinite(norm), xp.int32),
        "grad_norm": norm,
        "clip_threshold": threshold,
        "clip_scale": scale,
        "clipped": clipped,
    }

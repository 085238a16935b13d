"""What a clipping step reads and writes, over the arrays of any library: the part that TensorFlow and Keras share.

The rule itself is the core's: `autoclip_core.arrays`, or the kernel. Here its results become the values of variables
with fixed shapes, so that graphs, XLA, every checkpoint format and distribution work with nothing to do. The variables
are few, because each costs a graph some microseconds.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import autoclip_core
from autoclip_core import AutoClipValueError, NormHistory, arrays, check_full_history

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

DEFAULT_WINDOW = 16_384


class Options(NamedTuple):
    """The arguments of an AutoClip, checked; the percentile has a variable."""

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
    autoclip_core.AutoClip(
        percentile,
        window=window,
        warmup=warmup,
        nonfinite=nonfinite,  # type: ignore[arg-type] # it is checked there
        max_threshold=max_threshold,
    )
    if history is not None:
        check_full_history(history, None if window == DEFAULT_WINDOW else window)
    elif window > arrays.MAX_WINDOW:
        raise AutoClipValueError(
            f"window must be at most {arrays.MAX_WINDOW:,} in variables, but {window:,} was given; "
            "history=NormHistory() has no bound."
        )
    return Options(window, history, warmup, nonfinite, max_threshold)


def digits_of(percentile: float) -> NDArray[np.int32]:
    """Return what the variable of a percentile holds, or raise for one that cannot be used."""
    return np.array(arrays.percentile_digits(np, autoclip_core.AutoClip(percentile).percentile), np.int32)


def initial_state(options: Options, percentile: float) -> dict[str, NDArray[Any]]:
    """Return the first value of each variable, by name.

    norms: the norms of the window ascending, and in order of age in a ring, infinity where there is none yet. With a
        history, which holds them, the last one.
    counts: steps, recorded steps, clipped steps, non-finite steps.
    last: norm, threshold, scale of the last step, and whether it was clipped.
    percentile: its digits.
    """
    return {
        "norms": np.full((1,) if options.history is not None else (2, options.window), inf, np.float32),
        "counts": np.zeros(4, np.int32),
        "last": np.array([0.0, inf, 1.0, 0.0], np.float32),
        "percentile": digits_of(percentile),
    }


def metrics_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what users are told, as scalars, from the values of the variables."""
    counts, last = state["counts"], state["last"]
    return {
        "grad_norm": last[0],
        "clip_threshold": last[1],
        "clip_scale": last[2],
        "clipped": last[3] > 0.0,
        "steps": counts[0],
        "clipped_steps": counts[2],
        "nonfinite_steps": counts[3],
    }


def window_step(xp: Any, options: Options, state: Mapping[str, Any], norm: Any) -> tuple[Any, Any, Any, Any]:
    """Let the norm of a gradient enter a window, and decide its step.

    Args:
        xp: the array library, with the names that `autoclip_core.arrays` uses, and `stack`.
        options: what `check_options` returned, without a history.
        state: the values of the variables, by the names of `initial_state`.
        norm: the norm, float32.

    Returns:
        The new values of `norms`, `counts` and `last`, and the scale.
    """
    norms, counts = state["norms"], state["counts"]
    digits = [state["percentile"][place] for place in range(state["percentile"].shape[0])]
    remembered = arrays.norm_to_remember(xp, norm)
    ascending, ring, percentile = arrays.observe(xp, norms[0], norms[1], counts[1], remembered, digits)
    enters = xp.astype(remembered < inf, xp.int32)
    threshold, scale, clipped = arrays.decide(
        xp,
        norm,
        percentile,
        counts[1] + enters,
        warmup=options.warmup,
        nonfinite=options.nonfinite,
        max_threshold=inf if options.max_threshold is None else options.max_threshold,
    )
    nonfinite = xp.astype(~xp.isfinite(norm), xp.int32)
    counts = xp.stack(
        [counts[0] + 1, counts[1] + enters, counts[2] + xp.astype(clipped, xp.int32), counts[3] + nonfinite]
    )
    last = xp.stack([norm, threshold, scale, xp.astype(clipped, xp.float32)])
    return xp.stack([ascending, ring]), counts, last, scale


def rule_of(options: Options) -> tuple[NDArray[np.int64], float]:
    """Return what `autoclip_arrays_step` takes beside the variables: its rule, and the cap."""
    history = 0 if options.history is None else options.history.shared_id
    rule = np.array([history, options.warmup, options.nonfinite == "skip"], np.int64)
    return rule, inf if options.max_threshold is None else options.max_threshold

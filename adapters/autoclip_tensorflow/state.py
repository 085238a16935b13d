"""What TensorFlow's AutoClip and Keras's AutoClipOptimizer hold: options, and variables of fixed shapes.

How the variables are laid out, and what a step does with them, is said in `autoclip_core.arrays`. Graphs, XLA, every
checkpoint format and distribution work with them with nothing to do. They are few, because each costs a graph some
microseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import autoclip_core
from autoclip_core import NormHistory, arrays

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

# Shorter than JAX's, for a step costs more: TensorFlow copies the window around the kernel, and Keras on JAX passes
# over it, on the CPU as well. And what was saved with the default has to load. `python -m bench window` measures it.
DEFAULT_WINDOW = 16_384


class Options(NamedTuple):
    """The arguments of an AutoClip; the percentile has a variable."""

    window: int
    history: NormHistory | None
    warmup: int
    nonfinite: str
    max_threshold: float | None


def first_state(options: Options, percentile: float) -> dict[str, NDArray[Any]]:
    """Return the first value of each variable, by name, or raise for options that cannot be used."""
    arrays.check_options(percentile, *options, DEFAULT_WINDOW)
    state = arrays.initial_state(np, options.window if options.history is None else None)
    return {**state, "percentile": digits_of(percentile)}


def digits_of(percentile: float) -> NDArray[np.int32]:
    """Return what the variable of a percentile holds, or raise for one that cannot be used."""
    return np.array(arrays.percentile_digits(np, autoclip_core.AutoClip(percentile).percentile), np.int32)


def take_step(
    xp: Any, options: Options, state: Mapping[str, Any], total: Any, observe: Callable[..., tuple[Any, Any]]
) -> tuple[Any, Any, Any, Any]:
    """Return what `arrays.take_step` does: the new `norms`, `counts` and `last`, and the scale.

    Args:
        xp: the array library.
        options: the options.
        state: the values of the variables, by name.
        total: the square of the norm of a gradient, float32.
        observe: how norms are observed.
    """
    return arrays.take_step(
        xp,
        observe,
        state["norms"],
        state["counts"],
        state["last"],
        arrays.root(xp, total),
        warmup=options.warmup,
        nonfinite=options.nonfinite,
        max_threshold=options.max_threshold,
    )


def observe_window(xp: Any, percentile: Any, norms: Any, recorded_steps: Any, norm: Any) -> tuple[Any, Any]:
    """Do what `arrays.observe_window` does, with the percentile as its variable holds it."""
    digits = [percentile[place] for place in range(percentile.shape[0])]
    return arrays.observe_window(xp, norms, recorded_steps, norm, digits)

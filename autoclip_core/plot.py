"""Pictures of a run: norms with their threshold, their distribution, the threshold at every percentile.

Each function draws into axes that are given or made, and returns them. Colours are Okabe and Ito's, which everybody can
tell apart; in black and white the shapes and the lines still differ. Norms beyond 1e-150 and 1e150 are drawn there.
Needs matplotlib (the extra "plot").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autoclip_core.errors import AutoClipError, AutoClipValueError
from autoclip_core.history import NormHistory, as_percentile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

__all__ = ["plot_distribution", "plot_norms", "plot_thresholds"]

_NORM, _CLIPPED, _THRESHOLD, _INK = "#56B4E9", "#D55E00", "#000000", "#404040"
_MOST_POINTS = 20_000
_LOWEST, _HIGHEST = 1e-150, 1e150  # far beyond them margins and ticks of logarithmic axes overflow


def plot_norms(
    norms: ArrayLike,
    thresholds: ArrayLike,
    clipped: ArrayLike | None = None,
    *,
    label: str = "threshold",
    axes: Any = None,
) -> Any:
    """Draw the norm of each step, the threshold, and which steps were clipped.

    Args:
        norms: shape (steps,). Those that are not finite and positive have no place on the axis and are left out.
        thresholds: shape (steps,).
        clipped: shape (steps,), bool; None: where the norm is above the threshold.
        label: what the threshold is called.
        axes: where to draw; None makes a new figure.

    Above 20,000 steps, evenly chosen ones are drawn.
    """
    import numpy as np

    norms, thresholds = np.asarray(norms, dtype=np.float64), np.asarray(thresholds, dtype=np.float64)
    shapes = [norms.shape, thresholds.shape, norms.shape if clipped is None else np.shape(clipped)]
    if len({*shapes}) > 1 or norms.ndim != 1:
        raise AutoClipValueError(
            f"norms, thresholds and clipped must have one shape (steps,), but theirs are {', '.join(map(str, shapes))}."
        )
    above = norms > thresholds if clipped is None else np.asarray(clipped, dtype=bool)
    axes = _axes(axes)
    steps = np.unique(np.linspace(0, len(norms) - 1, min(len(norms), _MOST_POINTS)).astype(np.int64))
    drawn = steps[(norms[steps] > 0.0) & np.isfinite(norms[steps])]
    size = 18.0 if len(drawn) < 500 else 3.0
    for mask, color, marker, what in (
        (~above, _NORM, "o", "norm"),
        (above, _CLIPPED, "^", f"norm, clipped ({above.mean():.0%} of the steps)"),
    ):
        some = drawn[mask[drawn]]
        axes.scatter(some, _drawn(norms[some]), size, color, marker=marker, label=what, linewidths=0, rasterized=True)
    some = np.where(np.isfinite(thresholds[steps]), thresholds[steps], np.nan)
    axes.plot(steps, _drawn(some), _THRESHOLD, label=label)
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("gradient norm")
    axes.legend(edgecolor="none", markerscale=2.0 if size < 10 else 1.0)
    return axes


def plot_distribution(history: NormHistory | ArrayLike, percentile: float = 10.0, *, axes: Any = None) -> Any:
    """Draw how often each size of norm came, with the percentile marked, above which steps are clipped.

    Args:
        history: a NormHistory, or norms, shape (n,).
        percentile: from 0 to 100.
        axes: where to draw; None makes a new figure.
    """
    import numpy as np

    norms = _positive(history)
    threshold = float(np.percentile(norms, as_percentile(percentile)))
    norms, line = _drawn(norms), _drawn(threshold)
    axes = _axes(axes)
    edges = bin_edges(norms[0], norms[-1], 60) if norms[-1] > norms[0] else np.array([0.9, 1.1]) * norms[0]
    _, _, bars = axes.hist(norms, edges, color=_NORM, label="norms")
    above = [bar for bar in bars if bar.get_x() >= line]
    for bar in above:
        bar.set(facecolor=_CLIPPED, hatch="//", edgecolor="white", linewidth=0)
    if above:
        above[0].set_label("norms above it")
    axes.axvline(line, color=_THRESHOLD, label=f"percentile {percentile:g}: {threshold:.3g}")
    axes.set_xscale("log")
    axes.set_xlabel("gradient norm")
    axes.set_ylabel("steps")
    axes.legend(edgecolor="none")
    return axes


def plot_thresholds(history: NormHistory | ArrayLike, percentile: float | None = None, *, axes: Any = None) -> Any:
    """Draw the threshold that each percentile from 0 to 100 would give.

    Args:
        history: a NormHistory, or norms, shape (n,).
        percentile: one to mark; None marks none.
        axes: where to draw; None makes a new figure.
    """
    import numpy as np

    norms = _positive(history)
    axes = _axes(axes)
    percentiles = np.linspace(0.0, 100.0, 501)
    axes.plot(percentiles, _drawn(np.percentile(norms, percentiles)), color=_THRESHOLD)
    if percentile is not None:
        threshold = float(np.percentile(norms, as_percentile(percentile)))
        line = _drawn(threshold)
        axes.plot([percentile, percentile, 0.0], [_drawn(norms[0]), line, line], color=_CLIPPED, linestyle="--")
        axes.annotate(
            f"p = {percentile:g}: {threshold:.3g}",
            (percentile, line),
            (6, -4),
            textcoords="offset points",
            va="top",
            color=_CLIPPED,
        )
    axes.set_yscale("log")
    axes.set_xlim(0.0, 100.0)
    axes.set_xlabel("percentile")
    axes.set_ylabel("threshold")
    return axes


def _drawn(norms: Any) -> Any:
    import numpy as np

    return np.clip(norms, _LOWEST, _HIGHEST)


def bin_edges(low: float, high: float, bins: int) -> NDArray[np.float64]:
    """Return the edges of bins from low to high, of equal ratio if both are above 0, else of equal width.

    They ascend strictly, and the outermost are low and high themselves. There are fewer bins where there are not that
    many doubles between them; one bin without width where low is high.
    """
    import numpy as np

    along = np.linspace(0.0, 1.0, bins + 1)
    with np.errstate(over="ignore"):  # at the largest double, where high itself takes the place
        if low > 0.0:
            edges = np.exp2(np.log2(low) * (1.0 - along) + np.log2(high) * along)
        else:
            edges = low * (1.0 - along) + high * along
    edges = np.unique(np.clip(edges, low, high))
    return np.array([low, *edges[(edges > low) & (edges < high)], high])


def _positive(history: NormHistory | ArrayLike) -> NDArray[np.float64]:
    import numpy as np

    norms = history.values() if isinstance(history, NormHistory) else np.sort(np.asarray(history, dtype=np.float64))
    norms = norms[(norms > 0.0) & np.isfinite(norms)]
    if norms.ndim != 1 or not len(norms):
        raise AutoClipValueError("There is no norm above 0 to draw.")
    return norms


def panels_to_save(count: int) -> list[Any]:
    """Return axes, one below the other, of a figure that is only saved: without a window, no backend is asked for."""
    try:
        from matplotlib.figure import Figure
    except (ImportError, ValueError) as error:
        raise _no_matplotlib(error) from None
    figure = Figure(figsize=(8, 4.5 if count == 1 else 3.5 * count), layout="constrained")
    return [axes for [axes] in figure.subplots(count, squeeze=False)]


def _axes(axes: Any) -> Any:
    if axes is None:
        try:
            import matplotlib.pyplot as plt

            _, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        except (ImportError, ValueError) as error:
            raise _no_matplotlib(error) from None
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK)
    return axes


def _no_matplotlib(error: Exception) -> AutoClipError:
    if isinstance(error, ModuleNotFoundError):
        return AutoClipError(f'Pictures need matplotlib: pip install "autoclip-core[plot]" ({error}).')
    return AutoClipError(f"matplotlib does not start; is MPLBACKEND right? ({error})")

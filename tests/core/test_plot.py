"""Pictures hold what was given, and bad input is an error; how they look was looked at."""

import io
import sys

import numpy as np
import pytest

from autoclip_core import AutoClipError, AutoClipValueError, NormHistory
from autoclip_core.plot import bin_edges, panels_to_save, plot_distribution, plot_norms, plot_thresholds
from autoclip_core.replay import replay


@pytest.fixture(autouse=True)
def plt(absent):
    try:
        import matplotlib as mpl
    except ImportError:
        absent("matplotlib is not installed")
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    yield plt
    plt.close("all")


@pytest.fixture
def norms():
    return np.random.default_rng(3).lognormal(size=400)


def test_norms_are_drawn_by_whether_they_are_clipped(norms):
    norms[5:7] = np.nan, 0.0
    [result] = replay(norms, [30.0])
    axes = plot_norms(norms, result.thresholds, result.clipped, label="p = 30")
    left, clipped = (points.get_offsets() for points in axes.collections)
    assert len(left) + len(clipped) == 398
    assert clipped[:, 1].tolist() == norms[result.clipped].tolist()
    [line] = axes.lines
    np.testing.assert_array_equal(line.get_ydata(), result.thresholds)
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts == ["norm", f"norm, clipped ({result.clipped.mean():.0%} of the steps)", "p = 30"]


def test_long_runs_are_thinned_out():
    norms = np.random.default_rng(3).lognormal(size=300_000)
    axes = plot_norms(norms, np.ones(300_000))
    assert sum(len(points.get_offsets()) for points in axes.collections) == 20_000


def test_distribution_marks_the_percentile(norms):
    history = NormHistory()
    history.extend(norms)
    for source in (norms, history):
        axes = plot_distribution(source, 25.0)
        assert axes.lines[0].get_xdata() == [history.percentile(25.0)] * 2
        assert sum(bar.get_height() for bar in axes.patches) == 400
    plot_distribution([2.0, 2.0])


def test_thresholds_are_those_of_every_percentile(norms):
    axes = plot_thresholds(norms, 10.0)
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), np.percentile(norms, np.linspace(0, 100, 501)))
    assert axes.lines[1].get_ydata()[1] == np.percentile(norms, 10.0)


def test_pictures_go_where_they_are_told(norms, plt):
    _, (left, right) = plt.subplots(1, 2)
    assert plot_thresholds(norms, axes=left) is left
    assert plot_distribution(norms, axes=right) is right


@pytest.mark.parametrize(
    "norms",
    [
        *([1.0], [5e-324], [1.7976931348623157e308], [1.7e308] * 3 + [1.7976931348623157e308]),
        *(np.nextafter(1.0, 2.0) ** np.arange(4), [5e-324, 1.0, 1.7976931348623157e308], [1e-323, 5e-324]),
    ],
)
def test_norms_of_every_size_are_drawn(norms):
    for axes in (plot_distribution(norms), plot_thresholds(norms, 10.0), plot_norms(norms, norms[::-1])):
        axes.figure.savefig(io.BytesIO())  # a warning is an error here
    edges = bin_edges(min(norms), max(norms), 12)
    assert (edges[0], edges[-1]) == (min(norms), max(norms))
    assert np.histogram(norms, edges)[0].sum() == len(norms)


def test_panels_to_save_ask_for_no_window(norms, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    for count in (1, 3):
        panels = panels_to_save(count)
        assert [plot_norms(norms, norms, axes=axes) for axes in panels] == panels
        panels[0].figure.savefig(io.BytesIO())


def test_matplotlib_that_does_not_start_is_told(norms, plt, monkeypatch):
    def fail(**arguments):
        raise ImportError("no display")

    monkeypatch.setattr(plt, "subplots", fail)
    with pytest.raises(AutoClipError, match=r"MPLBACKEND right\? \(no display\)"):
        plot_thresholds(norms)


def test_matplotlib_that_is_missing_is_named_with_the_remedy(norms, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (plot_distribution, plot_thresholds, lambda norms: panels_to_save(1)):
        with pytest.raises(AutoClipError, match=r'pip install "autoclip-core\[plot\]"'):
            draw(norms)


def test_what_cannot_be_drawn_is_refused(norms):
    with pytest.raises(AutoClipValueError, match=r"\(400,\), \(3,\)"):
        plot_norms(norms, [1.0, 2.0, 3.0])
    for draw in (plot_distribution, plot_thresholds):
        with pytest.raises(AutoClipValueError, match="no norm above 0"):
            draw([0.0, np.nan])
        with pytest.raises(AutoClipValueError, match="101"):
            draw(norms, 101.0)

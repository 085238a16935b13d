"""The truth, slow and short: a list, sorted for each question, and numpy.percentile."""

from bisect import bisect_left, insort
from math import floor

import numpy as np

PERCENTILES = (0.0, 1e-300, 0.1, 10.0, 25.0, 50.0, 75.0, 99.999, np.nextafter(100.0, 0.0).item(), 100.0)

# Norms by the case they reach in a sorted structure.
SHAPES = {
    "log-normal": lambda random, n: random.lognormal(0.0, 3.0, n),
    "drifting": lambda random, n: random.lognormal(np.linspace(0.0, -20.0, n), 1.0),
    "ascending": lambda random, n: np.sort(random.lognormal(0.0, 3.0, n)),
    "descending": lambda random, n: -np.sort(-random.lognormal(0.0, 3.0, n)),
    "saw-tooth": lambda random, n: np.arange(n) * 0.1 % 3.7,
    "equal": lambda random, n: np.full(n, 0.1),
    "two values": lambda random, n: random.choice([0.1, 0.3], n),
    "denormal": lambda random, n: random.integers(0, 1000, n) * 5e-324,
    "huge": lambda random, n: random.uniform(1e308, 1.7e308, n),
    "both signs": lambda random, n: random.choice([-3.7, -1e-9, -0.0, 0.0, 1e-9, 2.3], n) * random.integers(0, 9, n),
    "every magnitude": lambda random, n: random.choice([-1.0, 1.0], n) * np.exp2(random.uniform(-1074, 1023, n)),
}


def make_norms(shape, count, seed=0):
    """So many norms of a shape, the same ones for the same seed."""
    return SHAPES[shape](np.random.default_rng([seed, count]), count)


def hostile_gradients():
    """Gradients of two float32 numbers, shape (steps, 2): each hostile number twice, beside a harmless one, and after
    harmless gradients, which the steps before must not have spoilt."""
    hostile = (np.nan, np.inf, -np.inf, 0.0, 1e-45, 1e38, *(1e-30, 1e30) * 4)
    steps = [((value, value), (1.0, value), (3.0, -4.0)) for value in hostile]
    return np.array(steps, np.float32).reshape(-1, 2)


def assert_survived(norms, history, params):
    """Judge a run over `hostile_gradients` under "skip": the norms it found, and the history and parameters it left."""
    norms = np.asarray(norms, np.float64)
    truth = np.linalg.norm(hostile_gradients().astype(np.float64), axis=1)
    # The square of a float32 may overflow, or become zero. That of no other may.
    tiny, huge = (truth > 0) & (truth < 1e-18), (truth > 1e18) & (truth < np.inf)
    np.testing.assert_allclose(norms[~tiny & ~huge], truth[~tiny & ~huge], rtol=1e-6)
    assert (norms[tiny] <= truth[tiny] * 1.000001).all()
    assert (norms[huge] >= truth[huge] * 0.999999).all()
    np.testing.assert_array_equal(np.sort(history), np.sort(norms[(norms > 0) & (norms < np.inf)]))
    assert len(history) >= len(truth) / 3
    assert np.isfinite(params).all()


class ReferenceHistory:
    """What a NormHistory must be: the norms in the order in which they came, of which a window keeps the last."""

    def __init__(self, window=None, norms=()):
        self.window = window
        self.norms = []
        self.extend(norms)

    def extend(self, norms):
        self.norms += [float(norm) + 0.0 for norm in norms]  # -0.0 is stored as 0.0
        if self.window:
            del self.norms[: -self.window]

    def observe_many(self, norms, percentiles):
        rows = []
        for norm in norms:
            self.extend([norm])
            rows.append([self.percentile(p) for p in percentiles])
        return np.array(rows).reshape(len(norms), len(percentiles))

    def percentile(self, percentile):
        with np.errstate(all="ignore"):  # the difference of two huge norms of either sign is infinite
            return np.percentile(self.norms, percentile)

    def values(self):
        return np.sort(np.array(self.norms))

    def rank(self, norm):
        return sum(x < norm for x in self.norms)


def naive_thresholds(norms, percentile, window=None):
    """The percentile after each norm, by a second way that does without numpy: a sorted list and the linear rule."""
    kept = []
    for i, norm in enumerate(norms):
        if window and i >= window:
            del kept[bisect_left(kept, norms[i - window])]
        insort(kept, norm)
        position = (len(kept) - 1) * (percentile / 100)
        k = floor(position)
        g = position - k
        a, b = kept[k], kept[min(k + 1, len(kept) - 1)]
        yield a + (b - a) * g if g < 0.5 else b - (b - a) * (1 - g)


def assert_same_bits(actual, expected):
    """Equal to the last bit, the sign of zero included; only NaNs are all the same."""
    actual, expected = (np.ascontiguousarray(values, dtype=np.float64) for values in (actual, expected))
    np.testing.assert_array_equal(actual, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(actual[numbers].view(np.uint64), expected[numbers].view(np.uint64))

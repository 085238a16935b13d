"""`torch.set_flush_denormal(True)` makes zeros of subnormal numbers; a history keeps them, and their order."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from autoclip_core import NormHistory

SUBNORMAL = np.random.default_rng(0).uniform(1e-310, 2e-308, 4000)
SUBNORMAL[::5] *= -1.0
SUBNORMAL[::7] *= 2.0  # some are normal
SUBNORMAL[::100] = 0.0


@contextmanager
def flushing():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor does not flush")
    try:
        yield
        assert torch.tensor(1e-310, dtype=torch.float64).mul(1.0).item() == 0.0
    finally:
        torch.set_flush_denormal(False)


def use(name, window):
    """Every way in and out."""
    history = NormHistory(window, backend=name)
    history.extend(SUBNORMAL[:1500])
    thresholds = [history.observe(float(norm), 10.0) for norm in SUBNORMAL[1500:2500]]
    history.extend(SUBNORMAL[2500:2600])
    thresholds += history.observe_many(SUBNORMAL[2600:3600], [10.0, 62.5]).ravel().tolist()
    history.extend(SUBNORMAL[3600:])
    ranks = [history.rank(float(norm)) for norm in SUBNORMAL[:100]]
    thresholds += [history.percentile(33.3), history.select(0)]
    history.check()
    snapshot = history.to_bytes()
    loaded = NormHistory.from_bytes(snapshot, backend=name)
    loaded.check()
    merged = NormHistory(backend=name)
    merged.extend(SUBNORMAL[:100])
    merged.merge(history)
    merged.check()
    bits = np.array(thresholds).tobytes(), history.values().tobytes(), merged.to_bytes()
    return *bits, ranks, snapshot, loaded.to_bytes()


@pytest.mark.parametrize("window", [None, 1, 1000])
@pytest.mark.parametrize("name", ["native", "numba"])
def test_thread_that_flushes_gets_the_same_bits(name, window, backend, other_backend):
    expected = use(name, window)
    with flushing():
        found = use(name, window)
    assert found == expected
    assert expected[-2] == expected[-1]
    if window is None:
        assert expected[1] == np.sort(SUBNORMAL).tobytes()

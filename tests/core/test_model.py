"""Any sequence of calls, judged after every step by the reference model."""

import copy
import pickle
from math import inf, nextafter

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from autoclip_core import AutoClipValueError, NormHistory

from .reference import PERCENTILES, SHAPES, ReferenceHistory, assert_same_bits, make_norms

LARGEST = 6_000  # two levels of inner nodes, and the checks after every step stay quick

finite = st.floats(allow_nan=False, allow_infinity=False)
norms = finite | st.sampled_from([0.0, -0.0, 1.0, 1.5, 5e-324, -1e308, 1e308])
percentiles = st.sampled_from(PERCENTILES) | st.floats(0.0, 100.0)
counts = st.sampled_from([0, 1, 127, 128, 129, 255, 256, 257, 384, 512, 5376]) | st.integers(0, 700)
bulks = st.tuples(st.sampled_from(sorted(SHAPES)), counts, st.integers(0, 9))
windows = st.none() | st.sampled_from([1, 2, 127, 128, 129, 256, 257, 600, 2**62])

DUPLICATES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda history: pickle.loads(pickle.dumps(history)),
    "bytes": lambda history: NormHistory.from_bytes(history.to_bytes()),
}


class HistoryMachine(RuleBasedStateMachine):
    """Pairs of a history and its reference; every answer of the one is asked of the other."""

    pairs = Bundle("pairs")

    def __init__(self):
        super().__init__()
        self.all_pairs = []

    def keep(self, history, reference):
        self.all_pairs.append((history, reference))
        return history, reference

    @precondition(lambda self: len(self.all_pairs) < 3)
    @rule(target=pairs, window=windows, bulk=bulks)
    def create(self, window, bulk):
        history, reference = NormHistory(window), ReferenceHistory(window)
        history.extend(make_norms(*bulk))
        reference.extend(make_norms(*bulk))
        return self.keep(history, reference)

    @precondition(lambda self: len(self.all_pairs) < 3)
    @rule(target=pairs, pair=pairs, way=st.sampled_from(sorted(DUPLICATES)))
    def duplicate(self, pair, way):
        history, reference = pair
        return self.keep(DUPLICATES[way](history), ReferenceHistory(reference.window, reference.norms))

    @rule(pair=pairs, norm=norms)
    def push(self, pair, norm):
        history, reference = pair
        history.push(norm)
        reference.extend([norm])

    @rule(pair=pairs, some=st.lists(norms, max_size=20))
    def extend(self, pair, some):
        history, reference = pair
        history.extend(some)
        reference.extend(some)

    @rule(pair=pairs, bulk=bulks)
    def extend_by_many(self, pair, bulk):
        history, reference = pair
        if len(history) <= LARGEST:
            history.extend(make_norms(*bulk))
            reference.extend(make_norms(*bulk))

    @rule(pair=pairs, norm=norms, percentile=percentiles)
    def observe(self, pair, norm, percentile):
        history, reference = pair
        reference.extend([norm])
        assert_same_bits(history.observe(norm, percentile), reference.percentile(percentile))

    @rule(pair=pairs, some=st.lists(norms, max_size=20), at=st.lists(percentiles, max_size=4))
    def observe_many(self, pair, some, at):
        history, reference = pair
        assert_same_bits(history.observe_many(some, at), reference.observe_many(some, at))

    @rule(into=pairs, other=pairs)
    def merge(self, into, other):
        if into[0].window is None and len(into[0]) + len(other[0]) <= LARGEST:
            into[0].merge(other[0])
            into[1].extend(list(other[1].norms))

    @rule(pair=pairs)
    def clear(self, pair):
        history, reference = pair
        history.clear()
        reference.norms.clear()
        assert history.nbytes == NormHistory(history.window).nbytes

    @rule(pair=pairs, percentile=percentiles)
    def percentile(self, pair, percentile):
        history, reference = pair
        if reference.norms:
            assert_same_bits(history.percentile(percentile), reference.percentile(percentile))

    @rule(pair=pairs, data=st.data())
    def select_and_rank(self, pair, data):
        history, reference = pair
        if reference.norms:
            rank = data.draw(st.integers(0, len(reference.norms) - 1))
            norm = history.select(rank)
            assert_same_bits(norm, reference.values()[rank])
            assert history.rank(norm) == reference.rank(norm) <= rank
            assert history.rank(nextafter(norm, inf)) > rank

    @rule(pair=pairs, norm=norms | st.sampled_from([-inf, inf]))
    def rank(self, pair, norm):
        history, reference = pair
        assert history.rank(norm) == reference.rank(norm)

    @rule(pair=pairs, data=st.data())
    def order_statistics(self, pair, data):
        history, reference = pair
        first = data.draw(st.integers(0, len(reference.norms)))
        count = data.draw(st.integers(0, len(reference.norms) - first))
        assert_same_bits(history.order_statistics(first, count), reference.values()[first : first + count])

    @rule(pair=pairs, data=st.data())
    def oldest(self, pair, data):
        history, reference = pair
        count = data.draw(st.integers(0, len(reference.norms)))
        if reference.window:
            assert_same_bits(history.oldest(count), reference.norms[:count])
        else:
            with pytest.raises(AutoClipValueError, match="window"):
                history.oldest(count)

    @invariant()
    def every_history_is_sound_and_equals_its_reference(self):
        for history, reference in self.all_pairs:
            history.check()
            assert (len(history), history.window) == (len(reference.norms), reference.window)
            assert_same_bits(history.values(), reference.values())


def test_history_does_what_the_reference_does():
    run_state_machine_as_test(HistoryMachine, settings=settings(stateful_step_count=40))

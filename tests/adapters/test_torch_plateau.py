"""Another clipper that runs before AutoClip is noticed, and nothing else is taken for one."""

import math
import warnings

import pytest
import torch
from autoclip_torch import AutoClip, attach
from autoclip_torch.plateau import Plateau
from torch import nn

SAID = "another clipper seems to cut the gradients"


def norms_like_a_training(steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, generator=generator).mul(0.6).exp().tolist()


def train(clip_first, *, norms=None, scope="global", mode="immediate", dtype=torch.float32, by_hand=False):
    """Record gradients of the given norms after another clipper; return the clip."""
    weights = [nn.Parameter(torch.zeros(500, dtype=dtype)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], lr=0.1)
    options = {"scope": scope, "mode": mode}
    clip = AutoClip(optimizer, **options) if by_hand else attach(optimizer, **options)
    generator = torch.Generator().manual_seed(1)
    for norm in norms_like_a_training(110) if norms is None else norms:
        for weight in weights:
            weight.grad = torch.randn(500, generator=generator).to(dtype)
        nn.utils.clip_grad_norm_(weights, norm)  # ours now have this norm
        clip_first(weights)
        if by_hand:
            clip.step()
        optimizer.step()
    _ = clip.steps  # deferred norms have arrived
    return clip


def cut(threshold):
    return lambda weights: nn.utils.clip_grad_norm_(weights, threshold)


@pytest.mark.parametrize("mode", ["immediate", "deferred"])
@pytest.mark.parametrize("scope", ["global", "group", "parameter"])
def test_clipper_that_runs_first_is_named_once(scope, mode):
    with pytest.warns(RuntimeWarning, match=SAID) as caught:
        train(cut(1.0), scope=scope, mode=mode)
    (warning,) = caught
    assert "equal to the largest of them, 1" in str(warning.message)


def test_clipper_that_runs_first_is_named_by_hand_as_well():
    with pytest.warns(RuntimeWarning, match=SAID):
        train(cut(0.5), by_hand=True)


def test_clipper_that_cuts_a_quarter_of_the_steps_is_named():
    with pytest.warns(RuntimeWarning, match=SAID):
        train(cut(1.5))


@pytest.mark.parametrize("scope", ["global", "group"])
def test_training_without_another_clipper_is_left_in_peace(scope):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip = train(lambda weights: None, norms=norms_like_a_training(450, seed=2), scope=scope)
    assert clip.steps == 450


def test_clipper_that_seldom_acts_is_left_in_peace():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(cut(sorted(norms_like_a_training(110))[-10]))


@pytest.mark.parametrize("norm", [1.0, 1e-4, 3e4])
def test_constant_gradient_is_left_in_peace(norm):
    # As a linear loss has it.
    weight = nn.Parameter(torch.zeros(4))
    clip = AutoClip([weight])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(300):
            weight.grad = torch.full((4,), norm)
            clip.step()
    assert clip.steps == 300


@pytest.mark.parametrize("change", [1.0 - 1e-7, 1.0 + 1e-7, 1.0 - 3e-6])
def test_training_that_hardly_changes_any_more_is_left_in_peace(change):
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    clip = AutoClip([weight])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(300):
            weight.grad = torch.tensor([change**step], dtype=torch.float64)
            clip.step()


def test_zeros_and_overflows_do_not_count():
    weight = nn.Parameter(torch.zeros(4))
    clip = AutoClip([weight], nonfinite="pass")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for at in range(300):
            weight.grad = torch.full((4,), [0.0, math.inf, math.nan, 1.0 + at][at % 4])
            clip.step()


# What is counted, at its bounds.

JUST_EQUAL, JUST_LESS = 1.0 - 1e-5, 1.0 - 1.5e-5


def make_hundred(equals):
    """These norms, and others that are far below until there are a hundred."""
    return [*equals, *[0.5] * (100 - len(equals))]


@pytest.mark.parametrize("before", [[], [0.1] * 100], ids=["at first", "later"])
@pytest.mark.parametrize("equals", [[1.0, JUST_EQUAL] * 10, [JUST_EQUAL, 1.0] * 40, [1.0] * 18 + [JUST_EQUAL, 1.0] * 3])
def test_plateau_of_twenty_in_a_hundred_is_named_at_their_end(equals, before):
    plateau = Plateau()
    *none, said = [plateau.see(norm) for norm in (*before, *make_hundred(equals))]
    assert not any(none)
    assert said.startswith(f"{len(equals)} of the last 100 gradient norms are equal to the largest of them, 1: ")


@pytest.mark.parametrize(
    "equals",
    [
        [1.0, JUST_EQUAL] * 9 + [1.0],  # 19
        [1.0, JUST_LESS] * 20,
        [JUST_LESS, 1.0] * 20,
        [1.0] * 20 + [JUST_EQUAL, 1.0] * 2,  # as good as constant
        [1.0] * 20 + [1.0 - 1e-6, 1.0 - 2e-6, 1.0 - 3e-6] + [1.0 - 3e-6],
        [1.0 - 1e-7 * number for number in range(60)],
        [1.0 + 1e-7 * number for number in range(60)],
        [1.0, JUST_EQUAL] * 10 + [2.0],  # begun anew
        [],
    ],
)
def test_fewer_norms_or_unequal_ones_are_no_plateau(equals):
    plateau = Plateau()
    assert not any(plateau.see(norm) for norm in make_hundred(equals) * 3)

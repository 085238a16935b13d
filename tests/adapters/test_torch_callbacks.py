"""The callbacks for Stable-Baselines3, skorch and fastai on small stand-ins; `make trainers` has the libraries."""

import copy
import importlib
import pickle
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from autoclip_core import AutoClipError, AutoClipValueError, StateError


class Plain:
    """A base class of which the callbacks use nothing."""

    order = 11

    def get_params(self, *, deep):
        return {name: value for name, value in vars(self).items() if not name.endswith("_")}


class Clipping(Plain):
    gradient_clip_value = 1.0


class CancelStepError(Exception):
    pass


NAMES = {
    "skorch.callbacks": {"Callback": Plain, "GradientNormClipping": Clipping},
    "stable_baselines3.common.callbacks": {"BaseCallback": Plain},
    "fastai.callback.core": {"Callback": Plain, "CancelStepException": CancelStepError},
    "fastai.callback.training": {"GradientClip": Clipping},
}


@pytest.fixture
def load(monkeypatch):
    """Import a module of ours with stand-ins for its library."""

    def load(library):
        for name, found in NAMES.items():
            parts = name.split(".")
            for end in range(1, len(parts) + 1):
                module = ModuleType(".".join(parts[:end]))
                monkeypatch.setitem(sys.modules, module.__name__, module)
            vars(sys.modules[name]).update(found)
        monkeypatch.delitem(sys.modules, f"autoclip_torch.{library}", raising=False)
        module = importlib.import_module(f"autoclip_torch.{library}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return module.AutoClipCallback

    return load


def make_optimizer():
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def train(model, optimizer, steps=5, factor=1.0):
    for step in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(8, 4)) * (1 + step) * factor).square().mean().backward()
        optimizer.step()


class Epochs(list):
    def __init__(self):
        self.rows = []

    def record_batch(self, *row):
        self.rows.append(row)


class Net:
    """Of a net of skorch what the callback uses."""

    def __init__(self, model, optimizer, callbacks=()):
        self.module_, self.optimizer_, self.callbacks_ = model, optimizer, callbacks
        self._optimizers, self.history = ["optimizer"], Epochs()


def test_skorch_callback_follows_the_net(load):
    callback = load("skorch")(30.0, window=100)
    assert (callback.clip, callback.state_dict()) == (None, {})
    model, optimizer = make_optimizer()
    net = Net(model, optimizer, callbacks=[("autoclip", callback)])
    callback.on_train_begin(net)
    clip = callback.clip
    train(model, optimizer)
    callback.on_batch_end(net, training=False)
    assert net.history.rows == []
    callback.on_batch_end(net, training=True)
    assert dict(net.history.rows) == clip.log()
    net.history.append({"epoch": 1})
    callback.on_train_begin(net)
    assert callback.clip is clip
    net.optimizer_ = torch.optim.SGD(model.parameters(), lr=0.01)  # as after set_params
    callback.on_train_begin(net)
    assert (callback.clip.steps, callback.clip.threshold) == (5, clip.threshold)
    callback.load_state_dict(clip.state_dict())
    net.module_, net.optimizer_ = make_optimizer()
    callback.on_train_begin(net)
    assert callback.clip.steps == 0


@pytest.mark.parametrize("through", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_skorch_callback_keeps_the_history_of_a_copied_net(load, through):
    kind = load("skorch")
    callback = kind(30.0)
    model, optimizer = make_optimizer()
    net = Net(model, optimizer)
    callback.on_train_begin(net)
    net.history.append({"epoch": 1})
    train(model, optimizer)
    copied = kind()
    vars(copied).update(through(callback.__getstate__()))
    net.module_, net.optimizer_ = make_optimizer()
    copied.on_train_begin(net)
    assert (copied.clip.steps, copied.clip.percentile, copied.clip.threshold) == (5, 30.0, callback.clip.threshold)
    later = kind(30.0)
    later.load_state_dict(callback.state_dict())
    assert later.state_dict() == callback.state_dict()


def test_skorch_callback_without_the_history_of_a_net_that_has_trained_says_so(load):
    callback, net = load("skorch")(), Net(*make_optimizer())
    net.history.append({"epoch": 1})
    with pytest.warns(RuntimeWarning, match="epochs in its history: 1"):
        callback.on_train_begin(net)
    callback.on_train_begin(net)


def test_skorch_callback_refuses_a_second_clipper_and_several_optimizers(load):
    callback = load("skorch")()
    net = SimpleNamespace(callbacks_=[("other", Clipping())], _optimizers=["optimizer"])
    with pytest.raises(AutoClipValueError, match="GradientNormClipping"):
        callback.on_train_begin(net)
    net.callbacks_, net._optimizers = [], ["first", "second"]
    with pytest.raises(AutoClipError, match="first, second"):
        callback.on_train_begin(net)


class Agent:
    def __init__(self, *names, **options):
        vars(self).update(options)
        self.policy = nn.ModuleDict()
        for name in names:
            model, optimizer = make_optimizer()
            self.policy[name] = model
            setattr(self, name, SimpleNamespace(optimizer=optimizer))

    def get_parameters(self):
        return {"policy": None, **{f"{name}.optimizer": None for name in self.policy}}


def learn(callback, agent, steps=5):
    recorded = {}
    callback.model, callback.logger = agent, SimpleNamespace(record=recorded.__setitem__)
    callback._on_training_start()
    callback._on_rollout_start()
    assert callback._on_step()
    for name, model in agent.policy.items():
        train(model, getattr(agent, name).optimizer, steps)
    callback._on_training_end()
    return recorded


def test_agents_callback_keeps_the_history_in_the_model(load):
    kind = load("stable_baselines3")
    callback, agent = kind(30.0), Agent("only", max_grad_norm=np.inf)
    recorded = learn(callback, agent)
    assert recorded["train/clip_threshold"] == callback.clip.threshold
    saved = pickle.loads(pickle.dumps(agent.autoclip))
    loaded = Agent("only", autoclip=saved)
    other = kind(30.0)
    learn(other, loaded, steps=0)
    assert (other.clip.steps, other.clip.threshold) == (5, callback.clip.threshold)
    learn(callback, agent)
    assert callback.clip.steps == 10
    train(agent.policy["only"], agent.only.optimizer)
    assert callback.clip.steps == 10  # nothing is clipped behind a training


def test_agents_callback_has_a_history_for_each_optimizer(load):
    callback, agent = load("stable_baselines3")(), Agent("actor", "critic")
    with pytest.raises(AutoClipError, match="see `clips`"):
        _ = callback.clip
    assert "train/grad_norm/critic" in learn(callback, agent)
    assert callback.clips.keys() == {"actor", "critic"}
    with pytest.raises(StateError, match="actor, critic"):
        learn(callback, Agent("actor", autoclip=agent.autoclip))
    with pytest.raises(AutoClipValueError, match=r"max_grad_norm=0\.5"):
        learn(callback, Agent("actor", max_grad_norm=0.5))
    learn(callback, Agent("only"))
    assert callback.clips.keys() == {"only"}


def fit(callback, learner, steps=5, factor=1.0, epoch=0):
    callback.learn, learner.epoch = learner, epoch
    callback.before_fit()
    callback.before_train()
    for step in range(steps):
        learner.model.zero_grad()
        (learner.model(torch.ones(8, 4)) * (1 + step) * factor).square().mean().backward()
        callback.before_step()
    callback.after_fit()


def test_learners_callback_continues_over_fits_and_forgets_what_lr_find_tries(load):
    kind = load("fastai")
    callback = kind(30.0)
    learner = SimpleNamespace(cbs=[callback], model=make_optimizer()[0])
    learner.lr_finder = True
    fit(callback, learner)
    assert (callback.clip, callback.state_dict(), callback.numbers) == (None, {}, {})
    callback.before_fit()  # and then an error
    del learner.lr_finder
    fit(callback, learner)
    fit(callback, learner, steps=3)
    assert callback.clip.steps == 8
    assert callback.numbers["clip_threshold"][-1] == callback.clip.threshold
    assert {len(numbers) for numbers in callback.numbers.values()} == {3}
    other = kind(30.0)
    other.load_state_dict(callback.state_dict())
    fit(other, learner, steps=0)
    assert other.clip.threshold == callback.clip.threshold
    other.load_state_dict(callback.state_dict())
    assert other.clip.steps == 8


def test_learners_callback_without_the_history_of_the_epochs_before_says_so(load):
    kind = load("fastai")
    learner = SimpleNamespace(cbs=[], model=make_optimizer()[0])
    callback = kind()
    with pytest.warns(RuntimeWarning, match="starts with epoch 2"):
        fit(callback, learner, epoch=2)
    fit(callback, learner, epoch=3)
    continued = kind()
    continued.load_state_dict(callback.state_dict())
    fit(continued, learner, epoch=2)
    begun = kind()
    fit(begun, learner)
    begun.before_train()  # of the next epoch
    learner.epoch = 1
    begun.before_train()


@pytest.mark.parametrize("scope", ["global", "parameter"])
def test_learners_callback_leaves_out_an_update_that_is_not_finite(load, scope):
    callback = load("fastai")(30.0, scope=scope)
    learner = SimpleNamespace(cbs=[], model=make_optimizer()[0])
    with pytest.raises(CancelStepError), pytest.warns(RuntimeWarning, match="nan"):
        fit(callback, learner, factor=np.nan)
    with pytest.raises(AutoClipValueError, match="GradientClip"):
        fit(callback, SimpleNamespace(cbs=[Clipping()]))
    with pytest.raises(AutoClipError, match="had begun"):
        load("fastai")().before_step()

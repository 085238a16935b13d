"""skorch: a callback, because every `fit` makes another optimizer; a net is pickled whole."""

import pickle
import warnings

import torch
from autoclip_torch.skorch import AutoClipCallback
from checks import HALF, PERCENTILE, STEPS, Trained, refused
from harness import examples, make_model, play, watch
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetRegressor
from skorch.callbacks import GradientNormClipping


def make_net(*more, **options):
    # page
    callbacks = [("autoclip", AutoClipCallback(PERCENTILE)), *more]
    # end of page
    return NeuralNetRegressor(
        make_model,
        optimizer=torch.optim.Adam,
        callbacks=callbacks,
        lr=0.01,
        max_epochs=1,
        batch_size=8,
        train_split=None,
        verbose=0,
        **options,
    )


def halves():
    inputs, targets = examples()
    at = 8 * HALF
    return (inputs[:at].numpy(), targets[:at].numpy()), (inputs[at:].numpy(), targets[at:].numpy())


def train(folder, *, resume):
    first, rest = halves()
    if resume:
        net = pickle.loads((folder / "net.pkl").read_bytes())
    else:
        net = make_net().partial_fit(*first)
        (folder / "net.pkl").write_bytes(pickle.dumps(net))
    net.partial_fit(*rest)
    logged = {name: net.history[-1, "batches", -1, name] for name in ("grad_norm", "clip_threshold", "clipped")}
    return Trained(STEPS - HALF if resume else STEPS, list(net.module_.parameters()), logged)


def train_from_files(folder, *, resume):
    """By skorch's own files of parameters, and the callback's state beside."""
    first, rest = halves()
    files = {f"f_{name}": folder / f"{name}.pt" for name in ("params", "optimizer")}
    net = make_net().initialize()
    callback = dict(net.callbacks_)["autoclip"]
    if resume:
        net.load_params(**files)
        callback.load_state_dict(torch.load(folder / "autoclip.pt"))
    else:
        net.partial_fit(*first)
        net.save_params(**files)
        torch.save(callback.state_dict(), folder / "autoclip.pt")
    net.partial_fit(*rest)
    return Trained(STEPS - HALF if resume else STEPS, list(net.module_.parameters()), callback.clip.log())


def check_habits():
    """What nets are put through besides."""
    first, rest = halves()
    net = make_net().fit(*first)
    clip = dict(net.callbacks_)["autoclip"].clip
    assert clip.steps == HALF
    net.set_params(optimizer__weight_decay=0.1)  # makes another optimizer
    net.partial_fit(*rest)
    assert dict(net.callbacks_)["autoclip"].clip.steps == STEPS
    net.fit(*first)
    assert dict(net.callbacks_)["autoclip"].clip.steps == HALF  # another net, another history
    net.set_params(module=torch.nn.Linear, module__in_features=4, module__out_features=1)
    net.partial_fit(*rest)
    assert dict(net.callbacks_)["autoclip"].clip.steps == STEPS - HALF
    net = make_net().fit(*first)
    others = make_net().initialize()
    others.history = net.history  # as load_params with f_history has it
    with warnings.catch_warnings(record=True, action="always") as said:
        others.partial_fit(*rest)
        others.partial_fit(*rest)
    assert ["load_state_dict" in str(each.message) for each in said] == [True], said
    search = GridSearchCV(make_net(), {"callbacks__autoclip__percentile": [10.0, 90.0]}, cv=2, scoring="r2")
    search.fit(*first)
    chosen = dict(search.best_estimator_.callbacks_)["autoclip"]
    assert chosen.clip.percentile == search.best_params_["callbacks__autoclip__percentile"]
    with refused("GradientNormClipping"):
        make_net(("clipping", GradientNormClipping(1.0))).fit(*first)
    watch.take()


if __name__ == "__main__":
    play("skorch", train, "pickled")
    play("skorch", train_from_files, "its files of parameters")
    check_habits()

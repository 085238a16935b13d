"""fastai: a callback, because its optimizers are not torch's."""

import sys
import warnings
from pathlib import Path

import torch
from autoclip_torch.fastai import AutoClipCallback
from checks import HALF, PERCENTILE, STEPS, Trained, refused
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner  # with fit_one_cycle and lr_find
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.optimizer import Adam, OptimWrapper
from harness import batches, make_model, play, watch


class Before(Callback):
    """Shows the watch what AutoClip is given, since torch's hooks see nothing."""

    order = AutoClipCallback.order - 0.5

    def before_step(self):
        watch.before(self.learn.auto_clip.clip, self.learn.model.parameters())


class After(Callback):
    order = AutoClipCallback.order + 0.5

    def before_step(self):
        watch.clipped(self.learn.auto_clip.clip)

    def after_step(self):
        watch.after(self.learn.auto_clip.clip)


def make_learner(*more, first=0, last=HALF, opt_func=Adam, path="."):
    inputs, targets = zip(*batches(first, last), strict=True)
    data = list(zip(torch.cat(inputs), torch.cat(targets), strict=True))
    # page
    callbacks = [AutoClipCallback(PERCENTILE), *more]
    # end of page
    loss = torch.nn.functional.mse_loss
    dls = DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8), device=torch.device("cpu"))
    return Learner(dls, make_model(), loss_func=loss, opt_func=opt_func, lr=0.01, cbs=callbacks, path=path)


def train_with(opt_func):
    def train(folder, *, resume):
        learner = make_learner(Before(), After(), opt_func=opt_func, path=folder)
        with learner.no_bar(), learner.no_logging():
            if resume:
                learner.create_opt()
                learner.load("half")
                learner.auto_clip.load_state_dict(torch.load(folder / "autoclip.pt"))
            else:
                learner.fit(1)
                learner.save("half")
                torch.save(learner.auto_clip.state_dict(), folder / "autoclip.pt")
            learner.fit(1)
        logged = {name: values[-1] for name, values in learner.auto_clip.numbers.items()}
        return Trained(STEPS - HALF if resume else STEPS, list(learner.model.parameters()), logged)

    return train


def adamw(params, lr):
    return OptimWrapper(params, torch.optim.AdamW, lr=lr)


def check_habits(folder):
    learner = make_learner(path=folder)
    callback = learner.auto_clip
    with learner.no_bar(), learner.no_logging():
        learner.lr_find(num_it=8, show_plot=False, suggest_funcs=None)
        assert callback.clip is None
        learner.fit_one_cycle(1)
        clip, threshold = callback.clip, callback.clip.threshold
        learner.lr_find(num_it=8, show_plot=False, suggest_funcs=None)
        assert (callback.clip, clip.steps, clip.threshold) == (clip, HALF, threshold)
        learner.fit(1)
        assert clip.steps == 2 * HALF
        assert [len(values) for values in callback.numbers.values()] == [HALF] * 5

        learner = make_learner(GradientAccumulation(16), path=folder)
        learner.fit(1)
        assert learner.auto_clip.clip.steps == HALF // 2

        learner = make_learner(path=folder)
        with warnings.catch_warnings(record=True, action="always") as said:
            learner.fit(3, start_epoch=1)
        assert ["starts with epoch 1" in str(warning.message) for warning in said].count(True) == 1
        assert learner.auto_clip.clip.steps == 2 * HALF

        learner = make_learner(path=folder, last=1)
        learner.dls.train.dataset[0][0][:] = torch.nan
        before = [param.detach().clone() for param in learner.model.parameters()]
        with warnings.catch_warnings(action="ignore"):
            learner.fit(1)
        assert learner.auto_clip.clip.nonfinite_steps == 1
        assert all(map(torch.equal, before, learner.model.parameters()))

        with refused("GradientClip"):
            make_learner(GradientClip(1.0), path=folder).fit(1)


if __name__ == "__main__":
    play("fastai", train_with(Adam), "its Adam")
    play("fastai", train_with(adamw), "a torch optimizer")
    check_habits(Path(sys.argv[2]))

"""torch.optim: `attach`, to each of its optimizers."""

import inspect

import torch
from autoclip_torch import attach
from checks import HALF, PERCENTILE, STEPS, Trained
from harness import backward, make_model, play, steps_of

LEFT_OUT = {"Optimizer", "SparseAdam"}  # the one is a base, the other takes sparse gradients alone
OPTIONS = {"LBFGS": {"max_iter": 1, "lr": 0.01}, "Adadelta": {"lr": 1.0}}


def kinds():
    found = inspect.getmembers(torch.optim, inspect.isclass)
    return [kind for name, kind in found if issubclass(kind, torch.optim.Optimizer) and name not in LEFT_OUT]


def train_with(kind, **options):
    def train(folder, *, resume):
        model = make_model()
        params = list(model.parameters())
        if kind.__name__ == "Muon":  # takes matrices alone
            params = [param for param in params if param.ndim == 2]
        optimizer = kind(params, **{"lr": 0.01, **OPTIONS.get(kind.__name__, {}), **options})
        # page
        clip = attach(optimizer, PERCENTILE)
        # end of page
        kept = {"model": model, "optimizer": optimizer, "clip": clip}
        for step in steps_of(folder, kept, resume=resume):

            def evaluate(step=step):
                optimizer.zero_grad()
                return backward(model, step)

            if kind is torch.optim.LBFGS:
                optimizer.step(evaluate)
            else:
                evaluate()
                optimizer.step()
        return Trained(STEPS - HALF * resume, params, clip.log())

    return train


if __name__ == "__main__":
    for kind in kinds():
        play("torch", train_with(kind), kind.__name__)
    for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad):
        play("torch", train_with(kind, fused=True), f"{kind.__name__} fused")

"""schedulefree: `attach` to its optimizers, and to the optimizer inside a ScheduleFreeWrapper."""

from operator import attrgetter

import schedulefree
import torch
from autoclip_torch import attach
from checks import HALF, PERCENTILE, STEPS, Trained
from harness import backward, make_model, play, watch


def train_with(make, base_of=lambda optimizer: optimizer):
    def train(folder, *, resume):
        model = make_model()
        optimizer = make(model.parameters())
        base = base_of(optimizer)
        # page
        clip = attach(base, PERCENTILE)
        # end of page
        if resume:
            saved = torch.load(folder / "half.pt")
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            clip.load_state_dict(saved["clip"])
        optimizer.train()
        for step in range(HALF if resume else 0, STEPS):
            if step == HALF and not resume:
                kept = {"model": model, "optimizer": optimizer, "clip": clip}
                torch.save({name: each.state_dict() for name, each in kept.items()}, folder / "half.pt")
                watch.mark()
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        return Trained(STEPS - HALF if resume else STEPS, list(model.parameters()), clip.log())

    return train


def wrapped(params):
    base = torch.optim.SGD(params, lr=0.01)
    return schedulefree.ScheduleFreeWrapper(base, momentum=0.9, weight_decay_at_y=0.1)


if __name__ == "__main__":
    play("schedulefree", train_with(lambda params: schedulefree.AdamWScheduleFree(params, lr=0.01)), "AdamW")
    play("schedulefree", train_with(lambda params: schedulefree.SGDScheduleFree(params, lr=0.01)), "SGD")
    # The wrapper's own state_dict lacks its weights of averages, so it goes on with others, with and without AutoClip.
    play("schedulefree", train_with(wrapped, attrgetter("base")), "ScheduleFreeWrapper", replays=False)

"""Fabric: `attach`, and the AutoClip in the state that is saved."""

import torch
from autoclip_torch import attach
from checks import HALF, PERCENTILE, STEPS, Trained
from harness import batch_of, make_model, make_optimizer, play
from lightning.fabric import Fabric


def train(folder, *, resume):
    fabric = Fabric(accelerator="cpu")
    model = make_model()
    model, optimizer = fabric.setup(model, make_optimizer(model.parameters()))
    # page
    clip = attach(optimizer, PERCENTILE)
    state = {"model": model, "optimizer": optimizer, "clip": clip}
    # end of page
    if resume:
        fabric.load(folder / "half.ckpt", state)
    for step in range(HALF if resume else 0, STEPS):
        if step == HALF and not resume:
            fabric.save(folder / "half.ckpt", state)
        inputs, targets = batch_of(step)
        optimizer.zero_grad()
        fabric.backward(torch.nn.functional.mse_loss(model(inputs), targets))
        optimizer.step()
    return Trained(STEPS - HALF * resume, list(model.parameters()), clip.log())


if __name__ == "__main__":
    play("Fabric", train, package="lightning")

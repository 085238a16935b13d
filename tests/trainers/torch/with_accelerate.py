"""Accelerate: `attach`, and the AutoClip registered for its checkpoints."""

import torch
from accelerate import Accelerator
from autoclip_torch import attach
from checks import HALF, PERCENTILE, STEPS, Trained
from harness import batch_of, make_model, make_optimizer, play


def train_with(accumulated):
    def train(folder, *, resume):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
        model = make_model()
        model, optimizer = accelerator.prepare(model, make_optimizer(model.parameters()))
        # page
        clip = attach(optimizer, PERCENTILE)
        accelerator.register_for_checkpointing(clip)
        # end of page
        if resume:
            accelerator.load_state(folder / "half")
        for step in range(HALF if resume else 0, STEPS):
            if step == HALF and not resume:
                accelerator.save_state(folder / "half")
            inputs, targets = batch_of(step)
            with accelerator.accumulate(model):
                accelerator.backward(torch.nn.functional.mse_loss(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()
        return Trained((STEPS - HALF * resume) // accumulated, list(model.parameters()), clip.log())

    return train


if __name__ == "__main__":
    play("accelerate", train_with(1), "plain")
    play("accelerate", train_with(2), "accumulation")

"""timm: `attach`, with the loss through its `NativeScaler`, whose `clip_grad` stays None."""

import sys
from pathlib import Path

import torch
from autoclip_torch import attach
from checks import HALF, PERCENTILE, STEPS, Trained
from harness import batch_of, make_model, play, stand_in, watch

stand_in("torchvision")
stand_in("timm.data")  # which reads what torchvision has

from timm.models import resume_checkpoint  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.utils import CheckpointSaver, NativeScaler  # noqa: E402


def train_with(accumulated=1, **scaled):
    def train(folder, *, resume):
        model = make_model()
        optimizer = create_optimizer_v2(model, opt="adamw", lr=0.01)
        scaler = NativeScaler(device="cpu")
        # page
        clip = attach(optimizer, PERCENTILE)
        # end of page
        file = folder / "last.pth.tar"
        if resume:
            resume_checkpoint(model, file, optimizer, scaler)
            clip.load_state_dict(torch.load(folder / "autoclip.pt"))
        for step in range(HALF if resume else 0, STEPS):
            if step == HALF and not resume:
                saver = CheckpointSaver(model, optimizer, amp_scaler=scaler, checkpoint_dir=folder, recovery_dir=folder)
                saver.save_checkpoint(0)
                torch.save(clip.state_dict(), folder / "autoclip.pt")
            inputs, targets = batch_of(step)
            loss = torch.nn.functional.mse_loss(model(inputs), targets) / accumulated
            is_last = (step + 1) % accumulated == 0
            scaler(loss, optimizer, parameters=model.parameters(), need_update=is_last, **scaled)
            if is_last:
                optimizer.zero_grad()
        return Trained((STEPS - HALF * resume) // accumulated, list(model.parameters()), clip.log())

    return train


def check_that_its_clipping_comes_first(folder):
    train_with(clip_grad=1.0)(folder, resume=False)
    (updates,) = watch.take()
    assert all(update.remembered < 1.0 + 1e-6 for update in updates), "dispatch_clip_grad clips behind AutoClip now"


if __name__ == "__main__":
    play("timm", train_with(), "plain")
    play("timm", train_with(2), "accumulation")
    check_that_its_clipping_comes_first(Path(sys.argv[2]))

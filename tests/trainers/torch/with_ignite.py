"""pytorch-ignite: `attach`, and the AutoClip in the handler's checkpoint."""

import torch
from autoclip_torch import attach
from checks import HALF, PERCENTILE, STEPS, Trained
from harness import batches, make_model, make_optimizer, play
from ignite.engine import Events, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver


def train(folder, *, resume, **options):
    model = make_model()
    optimizer = make_optimizer(model.parameters())
    trainer = create_supervised_trainer(model, optimizer, torch.nn.functional.mse_loss, **options)
    saver = DiskSaver(folder, require_empty=False)
    logged = {}
    # page
    clip = attach(optimizer, PERCENTILE)
    kept = {"model": model, "optimizer": optimizer, "trainer": trainer, "clip": clip}
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(kept, saver, n_saved=None))
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: logged.update(clip.log()))
    # end of page
    if resume:
        Checkpoint.load_objects(kept, checkpoint=torch.load(folder / f"checkpoint_{HALF}.pt"))
    trainer.run(batches(0, HALF), max_epochs=2)
    updates = (STEPS - HALF if resume else STEPS) // options.get("gradient_accumulation_steps", 1)
    return Trained(updates, list(model.parameters()), logged)


def train_scaled(folder, *, resume):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return train(folder, resume=resume, gradient_accumulation_steps=2, amp_mode="amp", scaler=scaler)


if __name__ == "__main__":
    play("pytorch-ignite", train, "plain")
    play("pytorch-ignite", train_scaled, "accumulation, a GradScaler")

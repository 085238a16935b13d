"""Lightning: `AutoClipCallback()`; its histories are in the Trainer's checkpoints."""

import lightning
import torch
from autoclip_torch.lightning import AutoClipCallback
from checks import HALF, PERCENTILE, Trained
from harness import batches, make_model, make_optimizer, play
from lightning.pytorch.callbacks import ModelCheckpoint


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = make_model()

    def training_step(self, batch):
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.model(inputs), targets)

    def configure_optimizers(self):
        return make_optimizer(self.parameters())


def train(folder, *, resume):
    module = Module()
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=HALF, save_top_k=-1)
    # page
    callbacks = [AutoClipCallback(PERCENTILE), saving]
    # end of page
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(
        module,
        torch.utils.data.DataLoader(batches(0, HALF), batch_size=None),
        ckpt_path=folder / f"step={HALF}.ckpt" if resume else None,
    )
    logged = {name: float(number) for name, number in trainer.logged_metrics.items()}
    return Trained(trainer.global_step - HALF * resume, list(module.parameters()), logged)


if __name__ == "__main__":
    play("lightning", train)

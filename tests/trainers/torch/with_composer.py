"""composer: `attach`, and a callback that saves and logs, because its Trainer saves the state of callbacks."""

import torch
from autoclip_torch import attach
from checks import HALF, PERCENTILE, Trained
from harness import examples, make_model, make_optimizer, play, stand_in, watch

stand_in("torchvision")
stand_in("mcli")  # of its makers' cloud

from composer import Callback, ComposerModel, Trainer  # noqa: E402
from composer.loggers import InMemoryLogger  # noqa: E402


# page
class KeepAutoClip(Callback):
    def __init__(self, optimizer):
        self.clip = attach(optimizer, PERCENTILE)
        self.state_dict = self.clip.state_dict
        self.load_state_dict = self.clip.load_state_dict

    def batch_end(self, state, logger):
        logger.log_metrics(self.clip.log())


# end of page


class Model(ComposerModel):
    def __init__(self):
        super().__init__()
        self.model = make_model()

    def forward(self, batch):
        return self.model(batch[0])

    def loss(self, outputs, batch):
        return torch.nn.functional.mse_loss(outputs, batch[1])


def train_with(microbatch):
    def train(folder, *, resume):
        model = Model()
        optimizer = make_optimizer(model.parameters())
        callback, logger = KeepAutoClip(optimizer), InMemoryLogger()
        trainer = Trainer(
            model=model,
            optimizers=optimizer,
            train_dataloader=torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples()), batch_size=8),
            max_duration="1ep",
            device="cpu",
            device_train_microbatch_size=microbatch,
            callbacks=[callback],
            loggers=[logger],
            progress_bar=False,
            save_folder=str(folder),
            save_interval=f"{HALF}ba",
            save_overwrite=True,
            load_path=f"{folder}/ep0-ba{HALF}-rank0.pt" if resume else None,
        )
        if resume:  # torch has made a step with gradients of zeros, when it loaded, which AutoClip does not remember
            ((step,),) = watch.take()
            assert step.norm == 0.0
            assert len(callback.clip.history.values()) == HALF
        trainer.fit()
        logged = {name: values[-1][1] for name, values in logger.data.items()}
        return Trained(trainer.state.timestamp.batch.value - HALF * resume, list(model.parameters()), logged)

    return train


if __name__ == "__main__":
    play("composer", train_with(8), "plain", package="mosaicml")
    play("composer", train_with(4), "accumulation", package="mosaicml")

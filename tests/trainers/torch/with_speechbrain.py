"""speechbrain: `attach` in `on_fit_start`, and the AutoClip among the recoverables; `max_grad_norm` is inf."""

import torch
from autoclip_torch import attach
from checks import HALF, PERCENTILE, STEPS, Trained
from harness import batches, make_model, make_optimizer, play, stand_in

stand_in("torchaudio")
from speechbrain.core import Brain  # noqa: E402
from speechbrain.utils.checkpoints import Checkpointer  # noqa: E402

UNCLIPPED = {"max_grad_norm": float("inf"), "device": "cpu", "noprogressbar": True}


class AutoClipBrain(Brain):
    # page
    def on_fit_start(self):
        self.init_optimizers()
        self.clip = attach(self.optimizer, PERCENTILE)
        save = lambda clip, path: torch.save(clip.state_dict(), path)
        load = lambda clip, path, end_of_epoch: clip.load_state_dict(torch.load(path))
        self.checkpointer.add_recoverable("clip", self.clip, custom_save_hook=save, custom_load_hook=load)
        self.checkpointer.recover_if_possible()

    # end of page

    def compute_forward(self, batch, stage):
        return self.modules.model(batch[0])

    def compute_objectives(self, predictions, batch, stage):
        return torch.nn.functional.mse_loss(predictions, batch[1])


def train_with(accumulated):
    def train(folder, *, resume):
        model = make_model()
        kept = Checkpointer(folder, recoverables={"model": model})
        options = {**UNCLIPPED, "grad_accumulation_factor": accumulated}
        brain = AutoClipBrain({"model": model}, make_optimizer, run_opts=options, checkpointer=kept)
        if not resume:
            brain.fit(range(1), batches(0, HALF))
            kept.save_checkpoint()
            brain.on_fit_start = lambda: None  # the same Brain goes on
        brain.fit(range(1), batches(HALF))
        return Trained((STEPS - HALF * resume) // accumulated, list(model.parameters()), brain.clip.log())

    return train


if __name__ == "__main__":
    play("speechbrain", train_with(1), "plain")
    play("speechbrain", train_with(2), "accumulation")

"""Hugging Face Trainer: `AutoClipMixin` in front of it; the history is in each checkpoint's folder."""

import torch
from autoclip_torch.transformers import AutoClipMixin
from harness import HALF, PERCENTILE, Trained, examples, make_model, play
from transformers import Trainer, TrainingArguments


# page
class AutoClipTrainer(AutoClipMixin, Trainer):
    pass


# end of page


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = make_model()

    def forward(self, inputs, labels):
        return {"loss": torch.nn.functional.mse_loss(self.model(inputs), labels)}


def train_with(optim, accumulated=1, **options):
    def train(folder, *, resume):
        data = [{"inputs": inputs, "labels": target} for inputs, target in zip(*examples(), strict=True)]
        args = TrainingArguments(
            folder,
            optim=optim,
            learning_rate=0.01,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=accumulated,
            num_train_epochs=1,
            logging_steps=1,
            save_steps=HALF // accumulated,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        )
        trainer = AutoClipTrainer(Model(), args, train_dataset=data, autoclip={"percentile": PERCENTILE})
        half = folder / f"checkpoint-{HALF // accumulated}"
        trainer.train(resume_from_checkpoint=half if resume else None)
        logged = next(entry for entry in reversed(trainer.state.log_history) if "clip_threshold" in entry)
        updates = trainer.state.global_step - HALF // accumulated * resume
        return Trained(updates, list(trainer.model.parameters()), logged)

    return train


if __name__ == "__main__":
    play("transformers", train_with("adamw_torch"), "adamw_torch")
    play("transformers", train_with("adamw_torch", 2), "accumulation")
    for kind in ("adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad", "schedule_free_adamw", "stable_adamw"):
        play("transformers", train_with(kind), kind)

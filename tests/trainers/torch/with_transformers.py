"""Hugging Face Trainer: `AutoClipMixin` in front of it; the history is in each checkpoint's folder."""

import torch
from autoclip_torch.transformers import AutoClipMixin
from checks import HALF, PERCENTILE, Trained
from harness import examples, make_model, play
from transformers import Trainer, TrainingArguments


# page
class AutoClipTrainer(AutoClipMixin, Trainer):
    pass


# end of page


class Model(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, inputs, labels):
        return {"loss": torch.nn.functional.mse_loss(self.model(inputs), labels)}


def settings(half, accumulated=1):
    """What all trainings here have, which save a checkpoint after half of the updates."""
    return {
        "learning_rate": 0.01,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": accumulated,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_steps": half,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def train_with(accumulated):
    def train(folder, *, resume):
        data = [{"inputs": inputs, "labels": target} for inputs, target in zip(*examples(), strict=True)]
        half = HALF // accumulated
        args = TrainingArguments(folder, **settings(half, accumulated))
        trainer = AutoClipTrainer(Model(make_model()), args, train_dataset=data, autoclip={"percentile": PERCENTILE})
        return run_trainer(trainer, half, resume=resume)

    return train


def run_trainer(trainer, half, *, resume):
    """Train to the end, or from the checkpoint after half of the updates."""
    checkpoint = f"{trainer.args.output_dir}/checkpoint-{half}"
    trainer.train(resume_from_checkpoint=checkpoint if resume else None)
    logged = next(entry for entry in reversed(trainer.state.log_history) if "clip_threshold" in entry)
    trained = [param for param in trainer.model.parameters() if param.requires_grad]
    return Trained(trainer.state.global_step - half * resume, trained, logged)


if __name__ == "__main__":
    play("transformers", train_with(1), "plain")
    play("transformers", train_with(2), "accumulation")

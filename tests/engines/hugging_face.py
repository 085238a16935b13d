"""The Trainer of Hugging Face, on DDP or DeepSpeed: `ENGINE FOLDER`, then `ENGINE FOLDER resume`."""

import sys
from pathlib import Path

import torch
from autoclip_torch.transformers import AutoClipMixin
from common import (
    PERCENTILE,
    STEPS,
    WORLD,
    Model,
    batch_of,
    leave,
    loss_of,
    make_optimizer,
    prepare_deepspeed,
    put_accelerate_on_cpu,
    report,
    train_alone,
    whole_params,
)
from transformers import Trainer, TrainingArguments


class Net(Model):
    def forward(self, inputs):
        return {"loss": loss_of(super().forward(inputs[0]))}


class Parts(torch.utils.data.Dataset):
    """The part of rank r in step t is item t * WORLD + r, as the Trainer deals them out."""

    def __len__(self):
        return STEPS * WORLD

    def __getitem__(self, index):
        return {"inputs": batch_of(index // WORLD, index % WORLD, WORLD)}


class AutoClipTrainer(AutoClipMixin, Trainer):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.thresholds = []

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(Parts())

    def create_optimizer(self, *_):
        if self.optimizer is None:
            self.optimizer = make_optimizer(self.model.parameters())
        return self.optimizer

    def on_step_end(self, *args, **options):
        super().on_step_end(*args, **options)
        self.thresholds.append(self.clip.threshold)


def main(engine, folder, *, resume):
    torch.set_num_threads(1)
    options = {"use_cpu": True, "ddp_backend": "gloo"}
    if engine != "ddp":
        prepare_deepspeed()
        put_accelerate_on_cpu()
        zero = {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0}
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
        config |= {"zero_optimization": zero, "zero_allow_untested_optimizer": True}
        options = {"deepspeed": config, "max_grad_norm": 0.0}  # the Trainer wants both to agree
    args = TrainingArguments(
        str(folder / engine),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps",
        save_steps=STEPS // 2,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **options,
    )
    if resume:  # from the middle: the checkpoint at the end is not to be found
        last = folder / engine / f"checkpoint-{STEPS}"
        resume = str(folder / engine / f"checkpoint-{STEPS // 2}")
        assert last.is_dir()
    trainer = AutoClipTrainer(Net(), args, train_dataset=Parts(), autoclip={"percentile": PERCENTILE})
    trainer.train(resume_from_checkpoint=resume or None)
    logged = [entry["clip_threshold"] for entry in trainer.state.log_history if "clip_threshold" in entry]
    assert logged[-len(trainer.thresholds) :] == trainer.thresholds
    case = "resumed" if resume else "fp32"
    report(f"Trainer {engine}", case, trainer.thresholds, whole_params(trainer.model_wrapped), train_alone())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), resume=sys.argv[3:] == ["resume"])
    leave()

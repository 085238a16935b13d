"""Every `optim=` of the Trainer: `AutoClipMixin`, as with any; what updates during `backward()` is refused."""

import sys

import torch
from apollo_torch.random_projector import GradientProjector
from checks import HALF, PERCENTILE, refused, result
from galore_torch.galore_projector import GaLoreProjector
from harness import examples, has_low_bits, make_wide_model, play, quieten, watch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames
from with_transformers import AutoClipTrainer, Model, run_trainer, settings

# What cannot be tried here, and what the Trainer says of it.
ABSENT = {
    "adamw_torch_xla": "torch_xla",
    "adamw_torch_npu_fused": "torch_npu",
    "adamw_anyprecision": "torchdistx",
    "galore_adamw_8bit": "CUDA",
    "galore_adafactor_layerwise": "relative_step",  # the Trainer gives it options that it does not take together
    "adalomo": "CUDA",
}
REFUSED = {
    "lomo": "fused_backward",
    "galore_adamw_layerwise": "_layerwise",
    "galore_adamw_8bit_layerwise": "_layerwise",
    "apollo_adamw_layerwise": "_layerwise",
}
LOW_RANK = {"optim_target_modules": "all-linear", "optim_args": "rank=4"}
OPTIONS = {
    "galore": LOW_RANK,
    "apollo": LOW_RANK,
    "grokadamw": {"optim_args": "gradient_clipping=0"},  # it clips each parameter by itself otherwise
}


def make_trainer(kind, folder):
    data = [{"inputs": inputs, "labels": target} for inputs, target in zip(*examples(), strict=True)]
    more = next((options for name, options in OPTIONS.items() if kind.startswith(name)), {})
    usual = settings(HALF) | {"learning_rate": 0.001} | more
    options = {"autoclip": {"percentile": PERCENTILE}}
    # page
    args = TrainingArguments(folder, optim=kind, **usual)
    trainer = AutoClipTrainer(Model(make_wide_model()), args, train_dataset=data, **options)
    # end of page
    return trainer  # noqa: RET504 - the page has no return


def train_with(kind):
    def train(folder, *, resume):
        trainer = make_trainer(kind, folder)
        trained = run_trainer(trainer, HALF, resume=resume)
        watch.saved = [HALF]
        if "bit" in kind and "32bit" not in kind:
            assert has_low_bits(trainer.optimizer.optimizer), f"{kind} has no low-bit state"
        return trained

    return train


if __name__ == "__main__":
    quieten()
    # Their checkpoints have objects that the Trainer does not load unasked.
    torch.serialization.add_safe_globals([GaLoreProjector, GradientProjector])
    names = [str(name.value) for name in OptimizerNames]
    for kind in names:
        if kind not in ABSENT | REFUSED:
            watch.may_rest = kind == "schedule_free_radam"  # for its first updates
            # grokadamw saves no moments that it finds again.
            play("transformers", train_with(kind), kind, replays=kind != "grokadamw")
    for kind, words in ABSENT.items():
        said = "nothing"
        try:
            make_trainer(kind, sys.argv[2]).train()
        except (AssertionError, ValueError) as error:
            said = str(error)
        assert words in said, f"{kind}: {said}"
    for kind, words in REFUSED.items():
        with refused(words):
            make_trainer(kind, sys.argv[2]).train()
        result("transformers", f"{kind}, which is refused", updates=0)

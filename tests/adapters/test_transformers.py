"""AutoClipMixin in real runs of the Hugging Face Trainer.

The reference is the Trainer itself, with its own clipping off and `attach` on its optimizer: it logs the norm that it
measures, and its parameters are to be ours to the last bit.
"""

import doctest
import pickle
from types import SimpleNamespace

import autoclip_torch.transformers
import numpy as np
import pytest
import torch
from autoclip_torch import AutoClip, attach
from autoclip_torch.transformers import AutoClipMixin
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from autoclip_core import AutoClipValueError, StateError

LOGGED = ["grad_norm", "clip_threshold", "clip_scale", "clipped", "clipped_share"]


class AutoClipTrainer(AutoClipMixin, Trainer):
    pass


class Attached(Trainer):
    def create_optimizer(self, *args):
        optimizer = super().create_optimizer(*args)
        self.clip = attach(optimizer)
        return optimizer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, inputs, labels):
        return {"loss": (self.layers(inputs) - labels).square().mean() * inputs.std().exp()}


def make_data():
    generator = torch.Generator().manual_seed(1)
    return [{"inputs": torch.randn(5, generator=generator), "labels": torch.tensor([3.0])} for _ in range(96)]


@pytest.fixture
def make_trainer(tmp_path):
    def make_trainer(kind=AutoClipTrainer, autoclip=None, callbacks=None, folder="run", **options):
        options = {"num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.05, "save_strategy": "no", **options}
        args = TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=8,
            logging_steps=1,
            log_level="error",
            use_cpu=True,
            disable_tqdm=True,
            **{"report_to": [], **options},
        )
        ours = {"autoclip": autoclip} if kind is AutoClipTrainer else {}
        data = make_data()
        return kind(model=Net(), args=args, train_dataset=data, eval_dataset=data, callbacks=callbacks, **ours)

    return make_trainer


def values_of(trainer):
    return [param.detach().clone() for param in trainer.model.parameters()]


def are_equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optim": "adamw_torch"},
        {"optim": "adamw_torch_fused"},
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
    ],
    ids=str,
)
def test_mixin_does_what_attach_does(options, make_trainer):
    reference, ours = make_trainer(Attached, max_grad_norm=0.0, **options), make_trainer(**options)
    reference.train()
    ours.train()
    assert are_equal(values_of(ours), values_of(reference))
    norms = logged(ours, "grad_norm")
    assert norms == pytest.approx(logged(reference, "grad_norm"), rel=1e-6)
    assert len(norms) == {3: 8}.get(options.get("gradient_accumulation_steps"), 24)
    assert logged(ours, "clip_threshold") == [np.percentile(norms[: n + 1], 10.0) for n in range(len(norms))]
    assert 0 < ours.clip.clipped_steps < ours.clip.steps == len(norms)
    assert max(norms) > 1.0 == ours.args.max_grad_norm  # which did not clip


def test_trainer_without_the_private_method_does_the_same(make_trainer, monkeypatch):
    ours, measures_twice = make_trainer(), make_trainer()
    ours.train()
    monkeypatch.delattr(AutoClipMixin, "_get_grad_norm")
    measures_twice.train()
    assert are_equal(values_of(ours), values_of(measures_twice))
    assert logged(ours, "grad_norm") == logged(measures_twice, "grad_norm")


def test_numbers_reach_every_log(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    seen = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            seen.append(dict(logs))

    trainer = make_trainer(report_to=["tensorboard"], callbacks=[Watch()], eval_strategy="epoch")
    trainer.train()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    for name in LOGGED:
        assert [logs[name] for logs in seen if "loss" in logs] == logged(trainer, name)
        assert [event.value for event in events.Scalars(f"train/{name}")] == pytest.approx(logged(trainer, name))
    assert not any(set(LOGGED) & set(logs) for logs in seen if "loss" not in logs)


def test_options_are_those_of_attach(make_trainer):
    trainer = make_trainer(autoclip={"percentile": 25.0, "scope": "parameter", "window": 7})
    trainer.train()
    assert trainer.clip.percentile == 25.0
    assert {history.window for history in trainer.clip.histories.values()} == {7}
    for name, _ in trainer.model.named_parameters():
        assert len(logged(trainer, f"grad_norm/{name}")) == 24


def test_checkpoint_of_parameters_without_names_is_resumed(make_trainer, tmp_path):
    options = {"autoclip": {"scope": "parameter"}, **SAVING}
    make_trainer(**options).train()
    file = tmp_path / "run/checkpoint-14/autoclip.pt"
    state = torch.load(file)
    # As it was saved once: weights before biases, as the Trainer's optimizer has them.
    names = ["layers.0.weight", "layers.2.weight", "layers.0.bias", "layers.2.bias"]
    groups = {f"{place // 2}.{place % 2}": state["groups"][name] for place, name in enumerate(names)}
    torch.save({"format": 1, "scope": "parameter", "groups": groups}, file)
    trainer = make_trainer(**options)
    trainer.train(str(file.parent))
    assert {name: len(history) for name, history in trainer.clip.histories.items()} == dict.fromkeys(names, 24)


def test_updates_that_nobody_sees_are_said(make_trainer):
    class Replace(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer, **kwargs):
            params = optimizer.optimizer.param_groups[0]["params"]
            optimizer.optimizer.step = lambda *_: [param.data.sub_(0.01) for param in params]

    trainer = make_trainer(callbacks=[Replace()])
    trainer.add_callback(Replace())
    with pytest.warns(RuntimeWarning, match="parameters of the torch.optim.sgd.SGD change, and AutoClip sees no step"):
        trainer.train()


def test_update_without_a_finite_norm_is_left_out(make_trainer):
    seen = []

    class Poison(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            seen.append([param.detach().clone() for param in model.parameters()])
            if state.global_step == 5:
                next(model.parameters()).grad[0] = torch.inf

    trainer = make_trainer(callbacks=[Poison()])
    with pytest.warns(RuntimeWarning, match="not finite|inf"):
        trainer.train()
    assert trainer.clip.nonfinite_steps == 1
    assert are_equal(seen[6], seen[5])
    assert not are_equal(seen[7], seen[6])


# Checkpoints

SAVING = {"save_strategy": "steps", "save_steps": 7, "optim": "adamw_torch"}


@pytest.mark.parametrize(("autoclip", "last"), [({}, False), ({"window": 5}, True)])
def test_resumed_run_is_the_same_to_the_last_bit(autoclip, last, make_trainer, tmp_path):
    whole = make_trainer(autoclip=autoclip, **SAVING)
    whole.train()
    folder = tmp_path / "run/checkpoint-14"
    if last:
        for later in ("checkpoint-21", "checkpoint-24"):
            (tmp_path / "run" / later).rename(tmp_path / later)
    resumed = make_trainer(autoclip=autoclip, folder="run" if last else "elsewhere", **SAVING)
    resumed.train(resume_from_checkpoint=True if last else str(folder))
    assert are_equal(values_of(resumed), values_of(whole))
    assert resumed.clip.state_dict() == whole.clip.state_dict()
    for name in LOGGED:
        assert logged(resumed, name) == logged(whole, name)
    assert not list(folder.glob("*.part"))


def test_save_that_is_cut_short_leaves_nothing_to_resume_without_its_history(make_trainer, tmp_path, monkeypatch):
    def die(self, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainerState, "save_to_json", die)  # the last that the Trainer writes
    trainer = make_trainer(**SAVING)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    saved = torch.load(tmp_path / "run/checkpoint-7/autoclip.pt")
    assert saved.pop("clipped_shares")
    assert saved == trainer.clip.state_dict()


def checkpointing(tmp_path, clip=None, **args):
    """A mixin without a Trainer, which saves into the folder of a checkpoint and trains on nothing."""

    class Trainer:
        def save_model(self, *_):
            pass

        def train(self, *_):
            self.on_train_begin(None, None, None, optimizer=self.optimizer, model=self.model)

    class Mixed(AutoClipMixin, Trainer):
        pass

    folder = tmp_path / "checkpoint-7"
    folder.mkdir()
    mixed = Mixed.__new__(Mixed)
    mixed.optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    mixed.model = nn.Module()
    mixed.model.weight = mixed.optimizer.param_groups[0]["params"][0]
    mixed.clip, mixed._autoclip_optimizer, mixed._autoclip_options = clip, None, {}
    mixed.args = SimpleNamespace(**{"max_grad_norm": 1.0, "should_save": True, "output_dir": str(folder), **args})
    return mixed, folder


def test_rank_that_does_not_save_writes_no_history(tmp_path):
    mixed, folder = checkpointing(tmp_path, AutoClip([nn.Parameter(torch.zeros(1))]), should_save=False)
    mixed.save_model(str(folder))
    assert not list(folder.iterdir())


def test_history_has_its_name_when_it_is_whole(tmp_path, monkeypatch):
    def write_half(state, file):
        file.write(b"PK")
        raise KeyboardInterrupt

    mixed, folder = checkpointing(tmp_path, AutoClip([nn.Parameter(torch.zeros(1))]))
    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(KeyboardInterrupt):
        mixed.save_model(str(folder))
    assert not (folder / "autoclip.pt").exists()


def test_history_that_would_run_code_is_not_loaded(tmp_path):
    mixed, folder = checkpointing(tmp_path)
    torch.save({"state": SimpleNamespace()}, folder / "autoclip.pt")
    with pytest.raises(pickle.UnpicklingError):
        mixed.train(str(folder))


def test_second_training_does_not_resume_the_first_again(tmp_path):
    mixed, folder = checkpointing(tmp_path)
    torch.save(AutoClip(mixed.optimizer).state_dict(), folder / "autoclip.pt")
    mixed.train(str(folder))
    mixed.optimizer.param_groups[0]["params"][0].grad = torch.ones(1)
    mixed.optimizer.step()
    mixed.train()
    assert mixed.clip.steps == 1


def test_model_that_is_saved_alone_brings_no_history(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final").is_dir()
    assert not list(tmp_path.rglob("autoclip.pt*"))


def test_checkpoint_of_other_options_is_refused(make_trainer, tmp_path):
    make_trainer(**SAVING).train()
    with pytest.raises(StateError, match="window"):
        make_trainer(autoclip={"window": 5}, **SAVING).train(str(tmp_path / "run/checkpoint-14"))


def test_checkpoint_without_a_history_is_warned_about(make_trainer, tmp_path):
    make_trainer(Trainer, **SAVING).train()
    trainer = make_trainer(**SAVING)
    with pytest.warns(RuntimeWarning, match="checkpoint-14/autoclip.pt, so AutoClip begins a new history"):
        trainer.train(str(tmp_path / "run/checkpoint-14"))
    assert trainer.clip.steps == 10


def test_clip_lives_as_long_as_its_optimizer(make_trainer):
    trainer = make_trainer()
    trainer.train()
    trainer.train()
    assert trainer.clip.steps == 48
    trainer.model_init = Net  # makes a new optimizer for each training
    trainer.train()
    assert trainer.clip.steps == 24


# max_grad_norm


def test_own_max_grad_norm_is_refused(make_trainer):
    with pytest.raises(AutoClipValueError, match=r"AutoClip replaces max_grad_norm=0\.5"):
        make_trainer(max_grad_norm=0.5)
    for nothing in (0.0, None):
        make_trainer(max_grad_norm=nothing)


def test_max_grad_norm_is_given_back(make_trainer):
    trainer = make_trainer(autoclip={"percentile": 101.0})
    with pytest.raises(AutoClipValueError, match="percentile"):
        trainer.train()
    assert trainer.args.max_grad_norm == 1.0


def test_example_in_the_docstring_is_true():
    assert doctest.testmod(autoclip_torch.transformers) == (0, 2)

"""AutoClipCallback in real fits: the parameters are those of a plain PyTorch loop with `attach`, to the last bit."""

import contextlib
import doctest

import autoclip_torch.lightning
import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from autoclip_torch import attach, attached
from autoclip_torch.lightning import AutoClipCallback
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from autoclip_core import AutoClipError, AutoClipValueError, StateError

LOGGED = {"grad_norm", "clip_threshold", "clip_scale", "clipped", "clipped_share"}

OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "lbfgs": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3),
}
every_optimizer = pytest.mark.parametrize("make_optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def make_data():
    """Batches whose gradients differ in size."""
    inputs = torch.randn(96, 5, generator=torch.Generator().manual_seed(1))
    return torch.utils.data.DataLoader(inputs, batch_size=8)


def loss_of(net, batch):
    return (net(batch) - 3.0).square().mean() * batch.std().exp()


def module_of(pl):
    """A module for one of the two packages."""

    class Module(pl.LightningModule):
        def __init__(self, make_optimizer=OPTIMIZERS["adamw"]):
            super().__init__()
            self.net = make_net()
            self.make_optimizer = make_optimizer

        def training_step(self, batch, index):
            return loss_of(self.net, batch)

        def configure_optimizers(self):
            return self.make_optimizer(self.net.parameters())

    return Module


Module = module_of(lightning.pytorch)


@pytest.fixture
def make_trainer(tmp_path):
    def make_trainer(*callbacks, pl=lightning.pytorch, **options):
        options = {"max_epochs": 2, "logger": False, "enable_checkpointing": False, "log_every_n_steps": 1, **options}
        return pl.Trainer(
            callbacks=[*callbacks],
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_model_summary=False,
            enable_progress_bar=False,
            **options,
        )

    return make_trainer


def values_of(module):
    return [param.detach().clone() for param in module.parameters()]


def are_equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def fit_by_hand(make_optimizer=OPTIMIZERS["adamw"], accumulate=1, precision=None, scaler=None):
    """The loop that Lightning runs, with `attach`."""
    net = make_net()
    optimizer = make_optimizer(net.parameters())
    clip = attach(optimizer)
    for _ in range(2):
        for batches in zip(*[iter(make_data())] * accumulate, strict=True):

            def closure(batches=batches):
                optimizer.zero_grad()
                for batch in batches:
                    with torch.autocast("cpu", precision, enabled=precision is not None, cache_enabled=False):
                        loss = loss_of(net, batch) / accumulate
                    (loss if scaler is None else scaler.scale(loss)).backward()
                return loss

            if scaler is None:
                optimizer.step(closure)
            else:
                closure()
                scaler.step(optimizer)
                scaler.update()
    return net, clip


def expect_same(module, callback, by_hand):
    net, clip = by_hand
    assert are_equal(values_of(module), values_of(net))
    (ours,) = callback.clips
    assert ours.history.values().tolist() == clip.history.values().tolist()
    assert 0 < ours.clipped_steps == clip.clipped_steps < ours.steps == clip.steps


@every_optimizer
def test_callback_does_what_attach_does(make_optimizer, make_trainer):
    callback, module = AutoClipCallback(), Module(make_optimizer)
    make_trainer(callback).fit(module, make_data())
    expect_same(module, callback, fit_by_hand(make_optimizer))


@pytest.mark.parametrize("pl", [lightning.pytorch, pytorch_lightning])
def test_callback_serves_both_packages(pl, make_trainer):
    callback, module = AutoClipCallback(), module_of(pl)()
    make_trainer(callback, pl=pl).fit(module, make_data())
    expect_same(module, callback, fit_by_hand())


def test_callback_is_that_of_the_package_that_is_there(run_python):
    code = """
import sys
sys.modules["lightning"] = None
from autoclip_torch.lightning import AutoClipCallback
import pytorch_lightning
print(issubclass(AutoClipCallback, pytorch_lightning.Callback))
"""
    assert run_python(code, "-W", "ignore") == "True\n"


def test_accumulated_gradients_are_one_step(make_trainer):
    callback, module = AutoClipCallback(), Module()
    make_trainer(callback, accumulate_grad_batches=3).fit(module, make_data())
    expect_same(module, callback, fit_by_hand(accumulate=3))
    assert callback.clips[0].steps == 8


@pytest.mark.parametrize("name", ["adamw", "adamw-fused"])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_is_measured_unscaled(name, precision, make_trainer):
    # For 16-mixed, on a CPU, the Trainer wants to be given the plugin.
    def make_scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=5) if precision == "16-mixed" else None

    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}[precision]
    callback, module = AutoClipCallback(), Module(OPTIMIZERS[name])
    scaler = make_scaler()
    make_trainer(callback, plugins=[MixedPrecision(precision, "cpu", scaler)]).fit(module, make_data())
    expect_same(module, callback, fit_by_hand(OPTIMIZERS[name], precision=dtype, scaler=make_scaler()))
    if scaler is not None:
        assert callback.clips[0].steps < 24  # some overflowed
        assert callback.clips[0].nonfinite_steps == 0


class Gan(lightning.pytorch.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.generator, self.critic = nn.Linear(5, 5), nn.Linear(5, 1)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        first, second = self.optimizers()
        self.toggle_optimizer(first)
        self.manual_backward(-self.critic(self.generator(batch)).mean())
        first.step()
        first.zero_grad()
        self.untoggle_optimizer(first)
        if index % 2:
            self.toggle_optimizer(second)
            fake = self.critic(self.generator(batch).detach())
            self.manual_backward((fake - self.critic(batch)).square().mean() * batch.std().exp())
            second.step()
            second.zero_grad()
            self.untoggle_optimizer(second)

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=0.01) for net in (self.generator, self.critic)]


def test_each_optimizer_of_a_gan_has_its_own_history(make_trainer):
    callback = AutoClipCallback()
    trainer = make_trainer(callback)
    trainer.fit(Gan(), make_data())
    assert [clip.steps for clip in callback.clips] == [24, 12]
    first, second = (clip.history.values().tolist() for clip in callback.clips)
    assert not set(first) & set(second)
    assert {f"optimizer{index}/{name}" for index in (0, 1) for name in LOGGED} <= set(trainer.callback_metrics)


def test_options_are_those_of_attach(make_trainer):
    callback = AutoClipCallback(25.0, scope="parameter", window=7)
    trainer = make_trainer(callback)
    trainer.fit(Module(), make_data())
    (clip,) = callback.clips
    assert (clip.percentile, len(clip.histories)) == (25.0, 4)
    assert {history.window for history in clip.histories.values()} == {7}
    assert {f"clip_threshold/{name}" for name in clip.histories} <= set(trainer.callback_metrics)


def test_other_callbacks_see_gradients_before_clipping(make_trainer):
    norms = []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            norms.append(nn.utils.get_total_norm([param.grad for param in module.parameters()]).item())

    callback = AutoClipCallback()
    make_trainer(callback, Watch()).fit(Module(), make_data())
    # Torch adds up squares in float32, the kernel in float64.
    assert callback.clips[0].history.values().tolist() == pytest.approx(sorted(norms), rel=1e-6)


def test_update_without_a_finite_norm_is_left_out(make_trainer):
    seen = []

    class Poison(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            if trainer.global_step == 5:
                next(module.parameters()).grad[0] = torch.nan

        def on_train_batch_end(self, trainer, module, *_):
            seen.append(values_of(module))

    callback = AutoClipCallback()
    with pytest.warns(RuntimeWarning, match="not finite|nan"):
        make_trainer(callback, Poison()).fit(Module(), make_data())
    assert callback.clips[0].nonfinite_steps == 1
    assert are_equal(seen[5], seen[4])
    assert not are_equal(seen[6], seen[5])


# Checkpoints


@pytest.mark.parametrize("options", [{}, {"scope": "parameter", "window": 5}])
def test_resumed_fit_is_the_same_to_the_last_bit(options, make_trainer, tmp_path):
    whole, module = AutoClipCallback(**options), Module()
    make_trainer(whole, max_epochs=4).fit(module, make_data())

    trainer = make_trainer(AutoClipCallback(**options), max_epochs=2)
    trainer.fit(Module(), make_data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")

    resumed, again = AutoClipCallback(**options), Module()
    make_trainer(resumed, max_epochs=4).fit(again, make_data(), ckpt_path=tmp_path / "half.ckpt")
    assert are_equal(values_of(module), values_of(again))
    assert resumed.state_dict() == whole.state_dict()


def test_each_optimizer_resumes_its_own_history(make_trainer, tmp_path):
    whole = AutoClipCallback()
    make_trainer(whole).fit(Gan(), make_data())
    trainer = make_trainer(AutoClipCallback(), max_epochs=1)
    trainer.fit(Gan(), make_data())
    trainer.save_checkpoint(tmp_path / "gan.ckpt")
    resumed = AutoClipCallback()
    make_trainer(resumed).fit(Gan(), make_data(), ckpt_path=tmp_path / "gan.ckpt")
    assert [clip.steps for clip in resumed.clips] == [24, 12]
    assert resumed.state_dict() == whole.state_dict()
    make_trainer(resumed).fit(Gan(), make_data())  # goes on with nothing
    assert resumed.state_dict() == whole.state_dict()


def test_checkpoint_with_other_optimizers_is_refused(make_trainer):
    made = AutoClipCallback()
    make_trainer(made).fit(Gan(), make_data())
    state = made.state_dict()
    for module, histories, optimizers in ((Module(), state, 1), (Gan(), {"0": state["0"]}, 2)):
        callback = AutoClipCallback()
        callback.load_state_dict(histories)
        match = f"histories of {len(histories)} optimizers, but there are {optimizers}"
        with pytest.raises(StateError, match=match):
            make_trainer(callback).fit(module, make_data())


def test_checkpoint_without_histories_is_warned_about(make_trainer, tmp_path):
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Module(), make_data())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    callback = AutoClipCallback()
    with pytest.warns(RuntimeWarning, match="AutoClip begins new ones"):
        make_trainer(callback).fit(Module(), make_data(), ckpt_path=tmp_path / "plain.ckpt")
    assert callback.clips[0].steps == 12


def test_loaded_state_is_kept_until_the_training_starts():
    callback = AutoClipCallback()
    assert callback.state_dict() == {}
    callback.load_state_dict({"0": {"a": 1}})
    assert callback.state_dict() == {"0": {"a": 1}}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("stage", ["test", "validate"])
def test_checkpoint_of_a_test_does_not_enter_a_later_fit(stage, make_trainer, tmp_path):
    class Tested(Module):
        def test_step(self, batch, index):
            pass

        validation_step = test_step

    made = make_trainer(AutoClipCallback())
    made.fit(Tested(), make_data())
    made.save_checkpoint(tmp_path / "made.ckpt")
    callback, module = AutoClipCallback(), Tested()
    trainer = make_trainer(callback)
    getattr(trainer, stage)(module, make_data(), ckpt_path=tmp_path / "made.ckpt", verbose=False)
    trainer.fit(module, make_data())
    assert callback.clips[0].steps == 24


def test_fit_with_nothing_left_to_do_keeps_what_it_loaded(make_trainer, tmp_path):
    made, again = AutoClipCallback(), AutoClipCallback()
    trainer = make_trainer(made, max_epochs=2)
    trainer.fit(Module(), make_data())
    trainer.save_checkpoint(tmp_path / "made.ckpt")
    make_trainer(again, max_epochs=2).fit(Module(), make_data(), ckpt_path=tmp_path / "made.ckpt")
    assert again.clips == []
    assert again.state_dict()["0"].keys() == made.state_dict()["0"].keys()
    later = AutoClipCallback()
    later.load_state_dict(again.state_dict())
    make_trainer(later, max_epochs=1).fit(Module(), make_data())
    assert later.clips[0].steps > made.clips[0].steps


@pytest.mark.parametrize("options", [{}, {"scope": "parameter"}])
def test_log_goes_on_after_a_resume(options, make_trainer, tmp_path):
    whole = AutoClipCallback(50.0, **options)
    make_trainer(whole, max_epochs=4).fit(Module(), make_data())
    trainer = make_trainer(AutoClipCallback(50.0, **options), max_epochs=2)
    trainer.fit(Module(), make_data())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = AutoClipCallback(50.0, **options)
    make_trainer(resumed, max_epochs=4).fit(Module(), make_data(), ckpt_path=tmp_path / "half.ckpt")
    assert resumed.clips[0].log() == whole.clips[0].log()


def test_groups_have_the_names_of_the_module_and_load_what_had_none(make_trainer):
    callback, module = AutoClipCallback(scope="parameter"), Module()
    make_trainer(callback).fit(module, make_data())
    (clip,) = callback.clips
    assert list(clip.histories) == [name for name, _ in module.named_parameters()]
    state = clip.state_dict()
    old = {**state, "groups": {f"0.{place}": group for place, group in enumerate(state["groups"].values())}}
    resumed = AutoClipCallback(scope="parameter")
    resumed.load_state_dict({"0": old})
    make_trainer(resumed, max_epochs=1, limit_train_batches=1).fit(Module(), make_data())
    assert {len(history) for history in resumed.clips[0].histories.values()} == {25}


def test_next_fit_begins_new_histories(make_trainer):
    callback = AutoClipCallback()
    for _ in range(2):
        make_trainer(callback).fit(Module(), make_data())
        assert callback.clips[0].steps == 24


# What it logs


def test_fit_logs_by_itself(make_trainer, tmp_path):
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    callback = AutoClipCallback()
    trainer = make_trainer(callback, logger=loggers)
    trainer.fit(Module(), make_data())
    expected = {name: pytest.approx(number) for name, number in callback.clips[0].log().items()}
    assert set(expected) == LOGGED
    assert {name: trainer.logged_metrics[name].item() for name in LOGGED} == expected
    header, *rows = (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    assert set(header.split(",")) >= LOGGED
    assert len(rows) == 24
    assert list((tmp_path / "lightning_logs").rglob("events.out.tfevents.*"))


def test_fit_logs_no_more_often_than_the_trainer(make_trainer, monkeypatch):
    logged = []
    monkeypatch.setattr(Module, "log_dict", lambda module, numbers: logged.append(numbers))
    make_trainer(AutoClipCallback(), log_every_n_steps=6).fit(Module(), make_data())
    assert [set(numbers) for numbers in logged] == [LOGGED] * 4


# What is refused


def test_trainer_that_clips_is_refused(make_trainer):
    with pytest.raises(AutoClipValueError, match=r"gradient_clip_val=0\.5"):
        make_trainer(AutoClipCallback(), gradient_clip_val=0.5).fit(Module(), make_data())


def test_updates_that_nobody_sees_are_said(make_trainer):
    class Own(Module):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, index):
            self.zero_grad()
            self.manual_backward(loss_of(self.net, batch))
            for param in self.parameters():
                param.data.sub_(param.grad, alpha=0.01)

    with pytest.warns(RuntimeWarning, match="parameters of the torch.optim.adamw.AdamW change, and AutoClip sees no"):
        make_trainer(AutoClipCallback(), max_epochs=1, limit_train_batches=5).fit(Own(), make_data())


def test_attaching_to_one_of_two_optimizers_is_undone(make_trainer):
    module = Gan()
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.01) for net in (module.generator, module.critic)]
    module.configure_optimizers = lambda: optimizers
    other = attach(optimizers[1])
    with pytest.raises(AutoClipError, match="attached already"):
        make_trainer(AutoClipCallback()).fit(module, make_data())
    assert [attached(optimizer) for optimizer in optimizers] == [None, other]


class Stop(Callback):
    def on_train_batch_end(self, *_):
        raise RuntimeError("stop")


@pytest.mark.parametrize("callbacks", [[], [Stop()]], ids=["end", "failure"])
def test_optimizers_are_left_as_they_were(callbacks, make_trainer):
    module = Module()
    optimizer = OPTIMIZERS["adamw"](module.parameters())
    module.make_optimizer = lambda params: optimizer
    with contextlib.suppress(RuntimeError):
        make_trainer(AutoClipCallback(), *callbacks).fit(module, make_data())
    attach(optimizer)  # which has no other any more


def test_example_in_the_docstring_is_true():
    assert doctest.testmod(autoclip_torch.lightning) == (0, 1)

"""Lightning's Trainer with one of its strategies: `STRATEGY`, which is ddp, fsdp, model_parallel, zero1 or zero2."""

import sys

import lightning
import torch
from autoclip_torch.lightning import AutoClipCallback
from common import (
    PERCENTILE,
    RANK,
    STEPS,
    WORLD,
    Model,
    batch_of,
    leave,
    loss_of,
    make_optimizer,
    prepare_deepspeed,
    put_fsdp1_on_cpu,
    report,
    train_alone,
    whole_params,
)
from lightning.pytorch import strategies
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector
from torch.distributed.fsdp import fully_shard


class Part(torch.utils.data.Dataset):
    """What this rank sees."""

    def __len__(self):
        return STEPS

    def __getitem__(self, step):
        return batch_of(step, RANK, WORLD)


class Module(lightning.LightningModule):
    def __init__(self, *, is_sharded):
        super().__init__()
        self.model = Model()
        self.is_sharded = is_sharded
        self.thresholds = []

    def configure_model(self):
        if self.is_sharded:
            for module in (self.model.first, self.model.second, self.model):
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch, index):
        return loss_of(self.model(batch[0]))

    def configure_optimizers(self):
        return make_optimizer(self.parameters())

    def on_train_batch_end(self, *_):
        (callback,) = (callback for callback in self.trainer.callbacks if isinstance(callback, AutoClipCallback))
        self.thresholds.append(callback.clips[0].threshold)

    def on_train_end(self):
        self.params = whole_params(self.trainer.model)


def make_strategy(name):
    if name == "ddp":
        return strategies.DDPStrategy(process_group_backend="gloo")
    if name == "model_parallel":
        return strategies.ModelParallelStrategy(
            data_parallel_size=WORLD, tensor_parallel_size=1, process_group_backend="gloo"
        )
    if name == "fsdp":
        allow_fsdp_on_cpu()
        return strategies.FSDPStrategy(process_group_backend="gloo")
    prepare_deepspeed()
    config = {"train_micro_batch_size_per_gpu": 8 // WORLD, "zero_allow_untested_optimizer": True}
    config["zero_optimization"] = {"stage": int(name[-1])}
    return DeepSpeedOnCPU(config=config, process_group_backend="gloo")


def allow_fsdp_on_cpu():
    """Lightning takes it for GPUs alone, like DeepSpeed. What it then does works on a CPU as well."""
    put_fsdp1_on_cpu()
    check = _AcceleratorConnector._check_strategy_and_fallback

    def check_as_if_on_gpu(self):
        flag, self._accelerator_flag = self._accelerator_flag, "cuda"
        check(self)
        self._accelerator_flag = flag

    _AcceleratorConnector._check_strategy_and_fallback = check_as_if_on_gpu


class DeepSpeedOnCPU(strategies.DeepSpeedStrategy):
    root_device = torch.device("cpu", 0)

    def setup_environment(self):
        super(strategies.DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self):
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def main(name):
    torch.set_num_threads(1)
    module = Module(is_sharded=name == "model_parallel")
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=WORLD,
        strategy=make_strategy(name),
        callbacks=[AutoClipCallback(PERCENTILE)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(Part(), batch_size=1, collate_fn=list))
    report(f"Lightning {name}", "fp32", module.thresholds, module.params, train_alone())


if __name__ == "__main__":
    main(sys.argv[1])
    leave()

"""Accelerate with one of its engines: `ENGINE`, which is ddp, fsdp1, fsdp2, or zero0 to zero3."""

import sys

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from autoclip_torch import attach
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
    put_fsdp1_on_cpu,
    report,
    train_alone,
    whole_params,
)


def make_accelerator(engine):
    if engine == "ddp":
        return Accelerator(cpu=True)
    version = int(engine[-1])
    if engine.startswith("zero"):
        prepare_deepspeed()
        put_accelerate_on_cpu()
        config = {
            "train_micro_batch_size_per_gpu": 8 // WORLD,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": version, "stage3_param_persistence_threshold": 0},
        }
        return Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config))
    put_fsdp1_on_cpu()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=version,
        reshard_after_forward="FULL_SHARD" if version == 1 else True,
        cpu_ram_efficient_loading=False,
        use_orig_params=True if version == 1 else None,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # Accelerate takes FSDP for accelerators alone. What it does then works on a CPU as well.
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = plugin
    return accelerator


def main(engine):
    torch.set_num_threads(1)
    accelerator = make_accelerator(engine)
    model = Model()
    model, optimizer = accelerator.prepare(model, make_optimizer(model.parameters()))
    options = {"process_group": model.process_group} if engine == "fsdp1" else {}
    # Without ZeRO Accelerate's wrapper of the optimizer does not know the engine, which is the model.
    clip = attach(model if engine == "zero0" else optimizer, PERCENTILE, **options)
    thresholds = []
    for step in range(STEPS):
        accelerator.backward(loss_of(model(batch_of(step))))
        optimizer.step()
        optimizer.zero_grad()
        thresholds.append(clip.threshold)
    report(f"Accelerate {engine}", "fp32", thresholds, whole_params(model), train_alone())


if __name__ == "__main__":
    main(sys.argv[1])
    leave()

"""DeepSpeed's engines: `train`; `save FOLDER`; `resume FOLDER`, with as many ranks as have saved or with others."""

import sys
import warnings
from pathlib import Path

import deepspeed
import numpy as np
import torch
from autoclip_torch.deepspeed import attach
from common import (
    PERCENTILE,
    RANK,
    STEPS,
    WORLD,
    Model,
    batch_of,
    groups_of,
    largest_error,
    leave,
    loss_of,
    make_adam,
    make_optimizer,
    prepare_deepspeed,
    report,
    train_alone,
    whole_params,
)
from deepspeed.accelerator import get_accelerator

HALF = STEPS // 2
POISONED = 5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_engine(stage, precision="fp32", *, groups=1, accumulate=1, zero=None, make=make_optimizer, **more):
    model = Model()
    params = groups_of(model) if groups == 2 else model.parameters()
    config = {
        "train_micro_batch_size_per_gpu": 8 // WORLD,
        "gradient_accumulation_steps": accumulate,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        **more,
    }
    if precision != "fp32":
        config[precision] = {"enabled": True}
    if precision == "fp16":
        config["fp16"] |= {"initial_scale_power": 8, "loss_scale_window": 1000}
    engine, *_ = deepspeed.initialize(model=model, optimizer=make(params), config=config)
    return engine


def train(engine, clip, first=0, last=STEPS, *, precision="fp32", accumulate=1, poisoned=None):
    """Return the threshold and DeepSpeed's own norm of every step."""
    thresholds, norms = [], []
    for step in range(first, last):
        for micro in range(step * accumulate, (step + 1) * accumulate):
            inputs = batch_of(micro).to(DTYPES[precision])
            if step == poisoned and RANK == 1:
                inputs = inputs * torch.nan
            engine.backward(loss_of(engine(inputs)))
            engine.step()
        thresholds.append(clip.threshold)
        norms.append(float(engine.get_global_grad_norm() or np.nan))
    return thresholds, norms


def run(stage, precision="fp32", *, poisoned=None, accumulate=1, **options):
    engine = make_engine(stage, precision, accumulate=accumulate, **options)
    clip = attach(engine, PERCENTILE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The gradient norm is")
        trained = train(engine, clip, precision=precision, accumulate=accumulate, poisoned=poisoned)
    thresholds, norms = trained
    assert (clip.steps, clip.nonfinite_steps) == (STEPS, 0 if poisoned is None else 1)
    assert clip.log()["clip_threshold"] == thresholds[-1]
    wrapper = type(engine.optimizer).__name__
    params = whole_params(engine.module)
    more = {"wrapper": wrapper, "nonfinite": clip.nonfinite_steps}
    if stage > 0:
        finite = [norm for norm in norms if np.isfinite(norm)]
        # The thresholds of the norms that DeepSpeed reports, to the last bit.
        mine = [float(np.percentile(finite[: step + 1], PERCENTILE)) for step in range(len(finite))]
        more["error_of_its_norms"] = largest_error([t for t, n in zip(*trained, strict=True) if np.isfinite(n)], mine)
    alone = train_alone(accumulate, poisoned)
    case = ", ".join([precision, *(f"{name} {value}" for name, value in options.items() if name != "zero")])
    case += "".join(f", {name}" for name in (options.get("zero") or {}))
    case += f", accumulate {accumulate}" if accumulate > 1 else ""
    case += ", NaN on one rank" if poisoned is not None else ""
    report(f"DeepSpeed ZeRO-{stage}", case, thresholds, params, alone, precision=precision, **more)
    engine.destroy()


# DeepSpeed's checkpoints for another number of ranks know Adam alone, and are converted from the usual ones.
UNIVERSAL = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


def save(stage, folder):
    engine = make_engine(stage, make=make_adam)
    clip = attach(engine, PERCENTILE)
    train(engine, clip, 0, HALF)
    state = {"autoclip": clip.state_dict(), **UNIVERSAL}
    engine.save_checkpoint(folder / f"zero{stage}", tag="half", client_state=state)
    engine.destroy()


def resume(stage, folder, *, universal):
    more = {"checkpoint": {"load_universal": True}} if universal else {}
    engine = make_engine(stage, make=make_adam, **more)
    clip = attach(engine, 90.0)  # the state brings its own percentile
    _, state = engine.load_checkpoint(folder / f"zero{stage}", tag="universal" if universal else "half")
    clip.load_state_dict(state["autoclip"])
    thresholds, _ = train(engine, clip, HALF)
    report(
        f"DeepSpeed ZeRO-{stage}",
        "resumed, saved by 2 ranks",
        thresholds,
        whole_params(engine.module),
        train_alone(make=make_adam),
    )
    engine.destroy()


def main(what, folder):
    torch.set_num_threads(1)
    prepare_deepspeed()
    get_accelerator().is_fp16_supported = lambda: True  # torch's CPU computes in fp16, DeepSpeed's does not know
    deepspeed.init_distributed("gloo")
    if what == "save":
        for stage in (1, 2, 3):
            save(stage, folder)
        return
    if what == "resume":
        for stage in (1, 2, 3):
            resume(stage, folder, universal=WORLD != 2)
        return
    run(0)
    run(0, "bf16", poisoned=POISONED)
    for stage in (1, 2, 3):
        run(stage, groups=2, accumulate=2)
        run(stage, poisoned=POISONED)
        run(stage, "bf16", groups=2, poisoned=POISONED)
        run(stage, "fp16", groups=2)
        run(stage, zero={"offload_optimizer": {"device": "cpu"}})
    run(1, "bf16", poisoned=POISONED, data_types={"grad_accum_dtype": "fp32"})
    run(3, groups=2, zero={"sub_group_size": 40})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[-1]))
    leave()

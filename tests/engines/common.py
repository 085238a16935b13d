"""What all programs of this folder train, and the training in one process that each is compared with."""

import json
import os
import sys
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

STEPS = 14
PERCENTILE = 30.0
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Model(nn.Module):
    """123 parameters, in sizes that no number of ranks divides."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, inputs):
        return self.second(self.first(inputs))


def make_optimizer(params):
    return torch.optim.SGD(params, lr=0.02, momentum=0.9)


def make_adam(params):
    return torch.optim.Adam(params, lr=0.01)


def groups_of(model):
    """Two groups of parameters: matrices, and all else."""
    params = list(model.parameters())
    return [{"params": [p for p in params if p.ndim > 1]}, {"params": [p for p in params if p.ndim <= 1]}]


def batch_of(step, rank=RANK, world=WORLD):
    """The part of a rank of the inputs of a step, which differ in size from step to step."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 6, generator=generator)
    return (inputs * float(torch.rand((), generator=generator).exp())).chunk(world)[rank]


def loss_of(outputs, targets=3.0):
    return (outputs.float() - targets).square().mean()


class Alone(NamedTuple):
    """The training in one process: AutoClip as the paper has it, in a few lines of numpy."""

    norms: list[float]
    thresholds: list[float]
    scales: list[float]
    params: dict[str, torch.Tensor]


def train_alone(accumulate=1, poisoned=None, make=make_optimizer):
    model = Model()
    optimizer = make(model.parameters())
    norms, thresholds, scales = [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for micro in range(step * accumulate, (step + 1) * accumulate):
            (loss_of(model(batch_of(micro, 0, 1))) / accumulate).backward()
        if step == poisoned:  # the update is left out, and nothing is remembered
            thresholds.append(thresholds[-1])
            continue
        grads = [param.grad for param in model.parameters()]
        norms.append(float(np.sqrt(sum(float(grad.double().square().sum()) for grad in grads))))
        thresholds.append(float(np.percentile(norms, PERCENTILE)))
        scales.append(min(thresholds[-1] / norms[-1], 1.0))
        for grad in grads:
            grad.mul_(scales[-1])
        optimizer.step()
    return Alone(norms, thresholds, scales, dict(model.named_parameters()))


def whole_params(model):
    """The parameters of a model by their names in Model, gathered from all ranks, whatever engine has spread them."""
    if "deepspeed" in sys.modules:
        context = sys.modules["deepspeed"].zero.GatheredParameters(list(model.parameters()))
    elif isinstance(model, FullyShardedDataParallel):
        context = FullyShardedDataParallel.summon_full_params(model)
    else:
        context = nullcontext()
    with context:
        return {
            name[name.rindex("first" if "first" in name else "second") :].replace("_fsdp_wrapped_module.", ""): (
                param.full_tensor() if isinstance(param, DTensor) else param
            )
            .detach()
            .float()
            .clone()
            for name, param in model.named_parameters()
        }


def prepare_deepspeed():
    """Do without the operator that DeepSpeed compiles for a minute; a run that is killed meanwhile leaves its lock."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def put_accelerate_on_cpu():
    """Have Accelerate know its ranks under DeepSpeed, which it does on accelerators alone."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.NO)


def put_fsdp1_on_cpu():
    """Have FSDP1 take the CPU, whatever Accelerate or Lightning tell it: they know it for accelerators alone."""
    init = FullyShardedDataParallel.__init__

    def init_on_cpu(self, *args, **options):
        init(self, *args, **{**options, "device_id": torch.device("cpu")})

    FullyShardedDataParallel.__init__ = init_on_cpu


def largest_error(values, expected):
    assert len(values) == len(expected), f"{len(values)} values instead of {len(expected)}"
    return max((abs(value - other) / other for value, other in zip(values, expected, strict=True)), default=0.0)


def leave():
    """End the process at once: a thread of gloo may drop its tensors later than the interpreter ends, and abort."""
    sys.stdout.flush()
    os._exit(0)


def report(engine, case, thresholds, params, alone, **more):
    """Print what became of a training, from rank 0: its thresholds against those of one process and of all ranks.

    Args:
        engine: a row of the table.
        case: what is special about it.
        thresholds: of the last steps.
        params: by their names in Model, at the end.
        alone: the same training in one process.
        more: for the record.
    """
    every = [thresholds]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, thresholds)
    if RANK == 0:
        moved = {name: float((value.cpu() - alone.params[name]).abs().max()) for name, value in params.items()}
        assert moved.keys() == alone.params.keys()
        result = {
            "engine": engine,
            "case": case,
            "ranks": len(every),
            "agree": all(of_rank == thresholds for of_rank in every),
            "error": largest_error(thresholds, alone.thresholds[-len(thresholds) :]),
            "params": max(moved.values()),
            "clipped": sum(scale < 1.0 for scale in alone.scales),
            **more,
        }
        print("RESULT", json.dumps(result), flush=True)

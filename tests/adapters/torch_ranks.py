"""What a rank does for test_torch_distributed.py: trainings in every layout that PyTorch has, and what may differ.

As a program it is a rank: it runs every scenario for worlds of its size, and leaves what they return in a file. The
same training in one process, on the whole batch, is what they are compared with.
"""

import os
import sys
import traceback
import warnings
from contextlib import suppress
from datetime import timedelta
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, NamedTuple

import torch
from autoclip_torch import AutoClip, attach
from torch import distributed as dist
from torch import nn

from autoclip_core import AutoClipError

STEPS, POISONED = 12, 5
SAVED = {2: 4, 4: 8}  # the step before which a world of this size saves: the next one goes on from there
PERCENTILE = 30.0


class Way(NamedTuple):
    """How a training clips."""

    scope: str
    mode: str
    by: str  # an attached optimizer, or a step() of its own

    def __str__(self):
        return "-".join(self)


WAYS = [
    Way("global", "immediate", "attach"),
    Way("global", "deferred", "step"),
    Way("parameter", "deferred", "attach"),
    Way("group", "immediate", "step"),
]
WAYS_OF_PROCESS_GROUPS = [Way("global", "immediate", "step"), Way("global", "deferred", "attach")]
WAYS_OF_CHECKPOINTS = [Way("global", "immediate", "attach"), Way("parameter", "deferred", "attach")]


class Model(nn.Module):
    """Two stages, with sizes that no number of ranks divides."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh())
        self.second = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, inputs):
        return self.second(self.first(inputs))


def make_optimizer(params):
    return torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=0.01, foreach=False)


def batch_of(step, rank=0, world=1):
    """The part of a rank of the inputs of a step, which differ in size from step to step."""
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(8, 6, generator=generator)
    return (inputs * float(torch.rand((), generator=generator).exp())).chunk(world)[rank]


def loss_of(outputs, targets=3.0):
    return (outputs - targets).square().mean()


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class Layout:
    """A model in one process; the others are spread over ranks."""

    make_optimizer = staticmethod(make_optimizer)
    process_group = None
    is_poisoned = True  # whether this rank's gradients get the NaN

    def __init__(self, rank=0, world=1):
        self.rank, self.world = rank, world
        self.model = Model()
        self.spread()

    def spread(self):
        pass

    def backward(self, step):
        loss_of(self.model(batch_of(step, self.rank, self.world))).backward()

    def named_parameters(self):
        return dict(self.model.named_parameters())

    def whole(self):
        """All parameters and gradients by name, as far as they are known to this rank."""
        named = self.named_parameters()
        return {name: full(p) for name, p in named.items()}, {name: full(p.grad) for name, p in named.items()}


class DDP(Layout):
    def spread(self):
        self.replica = nn.parallel.DistributedDataParallel(self.model)

    def backward(self, step):
        loss_of(self.replica(batch_of(step, self.rank, self.world))).backward()


class ZeRO(DDP):
    def make_optimizer(self, params):
        from torch.distributed.optim import ZeroRedundancyOptimizer

        options = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01}
        return ZeroRedundancyOptimizer(params, torch.optim.SGD, **options)


class FSDP2(Layout):
    def spread(self):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.mesh = init_device_mesh("cpu", self.shape(), mesh_dim_names=("outer", "inner")[-len(self.shape()) :])
        for module in (self.model.first, self.model.second, self.model):
            fully_shard(module, mesh=self.mesh)
        self.is_poisoned = self.mesh.get_local_rank("inner") == 1

    def shape(self):
        return (self.world,)


class HSDP(FSDP2):
    def shape(self):
        return (2, self.world // 2)


def parallelize(model, mesh):
    """Tensor parallel, the norm layer sequence parallel: its gradients are partial sums."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    plan = {
        "first.0": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        "first.1": SequenceParallel(sequence_dim=0),
        "first.2": ColwiseParallel(input_layouts=Shard(0)),
        "second.0": RowwiseParallel(),
        "second.2": RowwiseParallel(input_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)


class TensorParallel(Layout):
    def spread(self):
        from torch.distributed.device_mesh import init_device_mesh

        parallelize(self.model, init_device_mesh("cpu", (self.world,)))
        self.is_poisoned = self.rank == 1

    def backward(self, step):
        loss_of(self.model(batch_of(step))).backward()


class FSDP2AndTensorParallel(Layout):
    def spread(self):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.mesh = init_device_mesh("cpu", (2, self.world // 2), mesh_dim_names=("data", "tensor"))
        parallelize(self.model, self.mesh["tensor"])
        for module in (self.model.first, self.model.second, self.model):
            fully_shard(module, mesh=self.mesh["data"])
        self.is_poisoned = self.rank == 1

    def backward(self, step):
        loss_of(self.model(batch_of(step, self.mesh.get_local_rank("data"), 2))).backward()


class Mixed(Layout):
    """DTensors, and plain parameters beside them."""

    def spread(self):
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.model.first)
        self.is_poisoned = self.rank == 1

    def backward(self, step):
        super().backward(step)
        for param in self.model.second.parameters():
            dist.all_reduce(param.grad)
            param.grad /= self.world


class Pipeline(Layout):
    def spread(self):
        from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

        self.process_group = dist.group.WORLD
        self.model = (self.model.first, self.model.second)[self.rank]
        stage = PipelineStage(self.model, self.rank, self.world, torch.device("cpu"))
        self.schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss_of)
        self.is_poisoned = self.rank == 1

    def backward(self, step):
        if self.rank == 0:
            self.schedule.step(batch_of(step))
        else:
            self.schedule.step(target=torch.full((8, 1), 3.0))

    def named_parameters(self):
        stage = ("first", "second")[self.rank]
        return {f"{stage}.{name}": param for name, param in self.model.named_parameters()}


class FSDP1(Layout):
    def spread(self):
        from torch.distributed.fsdp import FullyShardedDataParallel

        self.process_group = dist.group.WORLD
        self.model = FullyShardedDataParallel(self.model, device_id=torch.device("cpu"), use_orig_params=True)
        self.is_poisoned = self.rank == 1

    def whole(self):
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(self.model, with_grads=True):
            named = [(name.replace("_fsdp_wrapped_module.", ""), p) for name, p in self.model.named_parameters()]
            return {name: full(p) for name, p in named}, {name: full(p.grad) for name, p in named}


LAYOUTS = {
    2: [DDP, ZeRO, FSDP2, TensorParallel, Mixed, Pipeline, FSDP1],
    4: [DDP, FSDP2, HSDP, FSDP2AndTensorParallel],
}


def ways_of(kind):
    return WAYS_OF_PROCESS_GROUPS if kind in {Pipeline, FSDP1} else WAYS


class Training:
    """A model that is trained with AutoClip."""

    def __init__(self, layout, way):
        self.layout, self.way = layout, way
        params = list(layout.model.parameters())
        groups = [[p for p in params if p.ndim > 1], [p for p in params if p.ndim <= 1]]
        # FSDP1 has flat parameters, of which some ranks hold nothing.
        self.optimizer = layout.make_optimizer(
            params if layout.process_group else [{"params": group} for group in groups]
        )
        make = attach if way.by == "attach" else AutoClip
        self.clip = make(self.optimizer, PERCENTILE, scope=way.scope, mode=way.mode, process_group=layout.process_group)
        self.decided = []

    def run(self, first=0, last=STEPS):
        """Train; return the decision of every step, the histories, parameters and gradients."""
        for step in range(first, last):
            self.optimizer.zero_grad()
            self.layout.backward(step)
            if step == POISONED and self.layout.is_poisoned:
                gradients = (local(param.grad) for param in self.layout.model.parameters() if param.grad is not None)
                next(grad for grad in gradients if grad.numel()).view(-1)[0] = nan
            before = [local(param).detach().clone() for param in self.layout.model.parameters()]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The gradient norm is nan")
                if self.way.by == "step":
                    decision = self.clip.step()
                    self.decided.append([decision] if self.way.scope == "global" else list(decision.values()))
                self.optimizer.step()
                if self.way.by == "attach":
                    self.decided.append(list(self.clip.thresholds.values()))
            if step == POISONED and self.way[1:] == ("immediate", "attach"):
                after = [local(param) for param in self.layout.model.parameters()]
                assert all(map(torch.equal, before, after)), "the NaN of one rank has changed the parameters"
        params, grads = self.layout.whole()
        return {
            "decided": [torch.nan_to_num(torch.tensor(decided).double()) for decided in self.decided],
            "histories": [torch.tensor(history.values()) for history in self.clip.histories.values()],
            "counts": (self.clip.steps, self.clip.nonfinite_steps),
            "params": params,
            "grads": grads,
        }


def train(rank=0, world=1, folder=None, *, kind=Layout, way):
    return Training(kind(rank, world), way).run()


# What may differ between ranks


def without_gradients(rank, world, folder, *, way, sharded):
    """Rank 1 has no gradient of the second parameter, then none at all; twice each, as step() may be called twice."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    if sharded:
        mesh = init_device_mesh("cpu", (world,))
        params = [nn.Parameter(distribute_tensor(torch.zeros(2 * world), mesh, [Shard(0)])) for _ in range(2)]
    group = None if sharded else dist.group.WORLD
    clip = AutoClip(params, PERCENTILE, scope=way.scope, mode=way.mode, process_group=group)
    decided = []
    for step, present in enumerate([(0, 1), (0,), ()]):
        for index, param in enumerate(params):
            param.grad = None
            if rank == 0 or index in present:
                param.grad = torch.zeros_like(param)
                local(param.grad).fill_(step + 1 + index)
        for _ in range(2):
            clip.step()
            decided.append(list(clip.thresholds.values()))
    return {
        "decided": decided,
        "histories": [h.values().tolist() for h in clip.histories.values()],
        "steps": clip.steps,
    }


class FailsOnce(torch.optim.SGD):
    """An optimizer whose step fails when it is told to, as one without memory for its state does."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            self.fails = False
            raise MemoryError
        return super().step(closure)


def failed_step(rank, world, folder, *, mode):
    """A step that fails on rank 0 alone, and is made again on both."""
    param = nn.Parameter(torch.zeros(4))
    optimizer = FailsOnce([param], lr=0.1)
    clip = attach(optimizer, PERCENTILE, mode=mode, process_group=dist.group.WORLD)
    for step in range(4):
        param.grad = torch.full((4,), 10.0 - step + rank)
        optimizer.fails = step == 3 and rank == 0
        with suppress(MemoryError):
            optimizer.step()
    optimizer.step()
    return clip.steps, clip.history.values().tolist()


def placed_elsewhere(rank, world, folder, *, mode):
    """A step on gradients that are not placed as their parameters are, and are no sums to be added up."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (world,))
    places = [(Shard(0), Shard(1)), (Shard(0), Replicate()), (Replicate(), Shard(0))]
    params = [nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [place])) for place, _ in places]
    clip = AutoClip(params, 0.0, mode=mode)
    norms = []
    for size in (1.0, 2.0):
        for param, (_, place) in zip(params, places, strict=True):
            param.grad = distribute_tensor(size * torch.arange(16.0).view(4, 4), mesh, [place])
        norms.append(float(clip.step().norm))
    grads = [full(param.grad) for param in params]
    return {"norms": norms, "grads": grads, "stay": [param.grad.placements == param.placements for param in params]}


def collectives(rank, world, folder):
    """How many numbers cross the network in each collective of a step, by layout and way."""
    from torch.distributed.tensor.debug import CommDebugMode

    counted = {}
    reduce = dist.all_reduce
    for kind in LAYOUTS[world]:
        for way in ways_of(kind):
            if way.by == "step":
                training = Training(kind(rank, world), way)
                training.layout.backward(0)
                sizes = []
                dist.all_reduce = lambda tensor, sizes=sizes, **options: (
                    sizes.append(tensor.numel()),
                    reduce(tensor, **options),
                )
                try:
                    with CommDebugMode() as all_collectives:
                        training.clip.step()
                finally:
                    dist.all_reduce = reduce
                counted[f"{kind.__name__} {way}"] = (sizes, all_collectives.get_total_counts())
    return counted


def errors_of(*calls):
    """What each call raises, or warns of; an empty string if it does neither."""
    messages = []
    for call in calls:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                call()
                messages.append(" ".join(str(warning.message) for warning in caught))
            except AutoClipError as error:
                messages.append(str(error))
    return messages


def parts_for_the_whole(rank, world, folder):
    """What is said where a rank would take its part of the gradient for the whole, or the whole for a part."""

    def step(layout, **options):
        optimizer = layout.make_optimizer(layout.model.parameters())
        clip = attach(optimizer, PERCENTILE, **options)
        for batch in range(4):
            optimizer.zero_grad()
            layout.backward(batch)
            optimizer.step()
        return clip

    def lose_the_state():
        layout = DDP(rank, world)
        clip = step(layout)
        again = AutoClip(layout.model, PERCENTILE, check_ranks=True)
        if rank == 0:
            again.load_state_dict(clip.state_dict())
        layout.backward(0)
        again.step()

    whole = {"process_group": dist.group.WORLD}
    return errors_of(
        lambda: step(FSDP1(rank, world)),
        lambda: AutoClip(FSDP1(rank, world).model),
        lambda: step(FSDP2(rank, world), **whole),
        lambda: step(DDP(rank, world), **whole),
        lambda: step(Pipeline(rank, world), check_ranks=True),
        lambda: step(Pipeline(rank, world), mode="deferred", check_ranks=dist.group.WORLD),
        lose_the_state,
        lambda: step(Pipeline(rank, world), check_ranks=True, **whole),
        lambda: step(FSDP2(rank, world), check_ranks=True, mode="deferred"),
        lambda: step(FSDP2(rank, world), check_ranks=True, scope="parameter"),
        lambda: step(DDP(rank, world), check_ranks=True),
    )


def overlap(rank, world, folder):
    """The error for an optimizer that does not wait for all gradients."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.parallel.DistributedDataParallel(Model())
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1, overlap_with_ddp=True)
    try:
        attach(optimizer)
    except AutoClipError as error:
        return [str(error)]
    return []


# Checkpoints: a world of 2 saves, one of 4 goes on and saves, a single process goes on


def checkpoint(rank, world, folder, *, way):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    training = Training((FSDP2 if world > 1 else Layout)(rank, world), way)
    training.clip.percentile = PERCENTILE if world == 2 else 77.0  # the state brings its own
    first, last = SAVED.get(world // 2, {1: 8, 2: 0}.get(world)), SAVED.get(world, STEPS)
    if first:
        saved = folder / f"{way}-{first}"
        model, optimizer = get_state_dict(training.layout.model, training.optimizer)
        state = {"model": model, "optimizer": optimizer, "clip": training.clip}
        dcp.load(state, checkpoint_id=saved)
        set_state_dict(
            training.layout.model,
            training.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
    result = training.run(first, last)
    if world > 1:
        model, optimizer = get_state_dict(training.layout.model, training.optimizer)
        state = {"model": model, "optimizer": optimizer, "clip": training.clip}
        dcp.save(state, checkpoint_id=folder / f"{way}-{last}")
    return result


def scenarios(world):
    """Everything that a world of this size goes through, by name."""
    found: dict[str, Any] = {}
    for kind in LAYOUTS.get(world, []):
        for way in ways_of(kind):
            found[f"{kind.__name__} {way}"] = partial(train, kind=kind, way=way)
    for way in WAYS_OF_CHECKPOINTS:
        found[f"checkpoint {way}"] = partial(checkpoint, way=way)
    if world > 1:
        found["collectives"] = collectives
    if world == 2:
        found["overlap"] = overlap
        found["parts_for_the_whole"] = parts_for_the_whole
        for mode in ("immediate", "deferred"):
            found[f"failed_step {mode}"] = partial(failed_step, mode=mode)
            found[f"placed_elsewhere {mode}"] = partial(placed_elsewhere, mode=mode)
            for scope in ("global", "parameter"):
                way = Way(scope, mode, "step")
                found[f"without_gradients sharded {way}"] = partial(without_gradients, way=way, sharded=True)
            way = Way("global", mode, "step")
            found[f"without_gradients plain {way}"] = partial(without_gradients, way=way, sharded=False)
    return found


def main(rank, world, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # what PyTorch says about PyTorch
    for message in ("No parameter has a gradient", "The gradient norm is"):
        warnings.filterwarnings("error", message=message)
    store = dist.FileStore(str(folder / f"store-{world}"), world)
    # So long may a hang take: the machine may be busy with something else.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(minutes=10))
    results = {}
    for name, scenario in scenarios(world).items():
        try:
            results[name] = scenario(rank, world, folder)
        except BaseException:  # noqa: BLE001 (a CheckpointException is no Exception)
            results[name] = traceback.format_exc()
    torch.save(results, folder / f"results-{world}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

"""Engines that spread a model over ranks in ways of their own, known by the marks that they leave.

No rank may take its part of the gradient for the whole: it would clip by a threshold of its own, and ranks would drift
apart without a word. What one rank can see is refused here, without asking the others; what it cannot see is found by
asking (agreement.py).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from autoclip_core import AutoClipError, AutoClipValueError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor
    from torch.distributed import ProcessGroup


def refuse_parts(params: Iterable[Tensor], process_group: ProcessGroup | None) -> None:
    """Raise if the gradients of these parameters are not what they look like.

    Args:
        params: those whose norms are to be measured.
        process_group: over which these norms are to be added up.

    Raises:
        AutoClipError: an engine keeps the gradients to itself, or they are parts of which nobody adds up the norms.
        AutoClipValueError: the process group would count the same gradients several times.
    """
    meshes = set()
    for param in params:
        if getattr(param, "_hp_mapping", None) is not None or hasattr(param, "ds_id"):
            raise AutoClipError(
                "These parameters belong to a DeepSpeed engine, which keeps the gradients to itself: what a rank sees "
                "of them is a part or nothing. Use autoclip_torch.deepspeed.attach(engine) after "
                "deepspeed.initialize(), and nothing before it."
            )
        if process_group is None and getattr(param, "_fsdp_flattened", False):
            raise AutoClipError(
                "These parameters belong to FullyShardedDataParallel (FSDP1), of which each rank has a part: pass "
                "process_group=model.process_group, so that the norms of the parts are added up. Parameters of FSDP2 "
                "(fully_shard) need no process_group."
            )
        if process_group is not None and (mesh := getattr(param, "device_mesh", None)) is not None:
            meshes.add(mesh)
    for mesh in meshes:
        ranks = set(torch.distributed.get_process_group_ranks(process_group)) & set(mesh.mesh.flatten().tolist())
        if len(ranks) > 1:
            raise AutoClipValueError(
                f"The ranks {sorted(ranks)} of process_group share the same DTensors, whose norms are added up over "
                "their own mesh already; they would count several times. Leave process_group out, or for a pipeline "
                "of sharded stages pass the ranks that hold the other stages, one of each."
            )


def deepspeed_in(source: Any) -> Any:
    """Return the DeepSpeed engine, or the optimizer of one, that this is or wraps; None if there is none.

    Raises:
        AutoClipError: it is Accelerate's for an engine that is not reached from here.
    """
    while source is not None:
        kind = type(source)
        if any(base.__name__ == "DeepSpeedEngine" for base in kind.__mro__):
            return source
        if kind.__module__.startswith("deepspeed.") and not isinstance(source, Optimizer):
            return source
        wrapped = getattr(source, "optimizer", None)  # by Accelerate or Fabric
        if kind.__name__ == "DeepSpeedOptimizerWrapper" and isinstance(wrapped, Optimizer):
            raise AutoClipError(
                "Without ZeRO only DeepSpeed's engine knows whether it clips by itself; use "
                "autoclip_torch.deepspeed.attach(model) with the model that accelerator.prepare() has returned."
            )
        source = wrapped
    return None


def fsdp1_group(model: Any) -> ProcessGroup | None:
    """Return the ranks that hold the parts of a model of FSDP1; None for any other."""
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None or not isinstance(model, module.FullyShardedDataParallel):
        return None
    group: ProcessGroup = model.process_group
    return group

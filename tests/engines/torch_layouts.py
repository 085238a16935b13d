"""What PyTorch itself has, in the layouts that tests/adapters/torch_ranks.py goes through as well."""

import sys
from pathlib import Path

import numpy as np
import torch
from autoclip_torch import attach
from common import PERCENTILE, RANK, STEPS, WORLD, Alone, leave, report

sys.path.append(str(Path(__file__).resolve().parent.parent / "adapters"))
from torch_ranks import LAYOUTS, Layout


def train_alone():
    layout = Layout()
    optimizer = layout.make_optimizer(layout.model.parameters())
    norms, thresholds, scales = [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        layout.backward(step)
        grads = [param.grad for param in layout.model.parameters()]
        norms.append(float(np.sqrt(sum(float(grad.double().square().sum()) for grad in grads))))
        thresholds.append(float(np.percentile(norms, PERCENTILE)))
        scales.append(min(thresholds[-1] / norms[-1], 1.0))
        for grad in grads:
            grad.mul_(scales[-1])
        optimizer.step()
    return Alone(norms, thresholds, scales, {name: p.detach() for name, p in layout.model.named_parameters()})


def main():
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    alone = train_alone()
    for kind in LAYOUTS[WORLD]:
        layout = kind(RANK, WORLD)
        optimizer = layout.make_optimizer(layout.model.parameters())
        clip = attach(optimizer, PERCENTILE, process_group=layout.process_group)
        thresholds = []
        for step in range(STEPS):
            optimizer.zero_grad()
            layout.backward(step)
            optimizer.step()
            thresholds.append(clip.threshold)
        params = [None] * WORLD  # a stage of a pipeline knows its own alone
        torch.distributed.all_gather_object(params, layout.whole()[0])
        whole = {name: param for of_rank in params for name, param in of_rank.items()}
        report(kind.__name__, "fp32", thresholds, whole, alone)


if __name__ == "__main__":
    main()
    leave()

"""torchrun restarts a training of which a rank was killed: `train.py FOLDER`, to be run by torchrun."""

import os
import signal
import sys
from pathlib import Path

import torch
from autoclip_torch import attach
from common import PERCENTILE, RANK, STEPS, Model, batch_of, leave, loss_of, make_optimizer, report, train_alone
from torch.nn.parallel import DistributedDataParallel

KILLED, SAVED_EVERY = 8, 3


def main(folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    model = DistributedDataParallel(Model())
    optimizer = make_optimizer(model.parameters())
    clip = attach(optimizer, PERCENTILE)
    checkpoint, killed = folder / "checkpoint.pt", folder / "killed"
    first, thresholds = 0, []
    if checkpoint.exists():
        saved = torch.load(checkpoint)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        clip.load_state_dict(saved["clip"])
        first, thresholds = saved["step"], saved["thresholds"]
    for step in range(first, STEPS):
        optimizer.zero_grad()
        loss_of(model(batch_of(step))).backward()
        optimizer.step()
        thresholds.append(clip.threshold)
        if RANK == 1 and step == KILLED and not killed.exists() and folder.name != "undisturbed":
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if (step + 1) % SAVED_EVERY == 0:
            if RANK == 0:
                state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"clip": clip.state_dict(), "step": step + 1, "thresholds": thresholds}
                torch.save(state, folder / "part")
                (folder / "part").replace(checkpoint)
            torch.distributed.barrier()
    params = {name: param.detach() for name, param in model.module.named_parameters()}
    restarts = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    case = "undisturbed" if folder.name == "undisturbed" else "a rank killed, resumed"
    report("torchrun", case, thresholds, params, train_alone(), restarts=restarts, resumed=first, every=thresholds)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()

"""Ray Train restarts the workers of a training of which one was killed: `FOLDER`."""

import sys
from pathlib import Path


def train(config):
    import os
    import signal
    import tempfile

    import ray.train
    import torch
    from autoclip_torch import attach
    from common import PERCENTILE, STEPS, Model, batch_of, loss_of, make_optimizer
    from ray.train.torch import prepare_model

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    model = prepare_model(Model())
    optimizer = make_optimizer(model.parameters())
    clip = attach(optimizer, PERCENTILE)
    first, thresholds, killed = 0, [], Path(config["folder"], "killed")
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder, "checkpoint.pt"))
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        clip.load_state_dict(saved["clip"])
        first, thresholds = saved["step"], saved["thresholds"]
    for step in range(first, STEPS):
        optimizer.zero_grad()
        loss_of(model(batch_of(step, rank, world))).backward()
        optimizer.step()
        thresholds.append(clip.threshold)
        if config["kill"] and rank == 1 and step == 8 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if step % 4 == 3 or step == STEPS - 1:
            metrics = {"thresholds": thresholds, "resumed": first}
            if rank == 0:
                with tempfile.TemporaryDirectory() as folder:
                    state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
                    state |= {"clip": clip.state_dict(), "step": step + 1, "thresholds": thresholds}
                    torch.save(state, Path(folder, "checkpoint.pt"))
                    ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))
            else:
                ray.train.report(metrics)


def main(folder):
    import ray
    import ray.train
    import torch
    from common import report, train_alone
    from ray.train.torch import TorchTrainer

    here = str(Path(__file__).resolve().parent)
    variables = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": here}
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, runtime_env={"env_vars": variables})
    for kill in (False, True):
        trainer = TorchTrainer(
            train,
            train_loop_config={"kill": kill, "folder": str(folder)},
            scaling_config=ray.train.ScalingConfig(num_workers=2, use_gpu=False),
            run_config=ray.train.RunConfig(
                storage_path=str(folder),
                name=f"kill-{kill}",
                failure_config=ray.train.FailureConfig(max_failures=2),
            ),
        )
        result = trainer.fit()
        with result.checkpoint.as_directory() as saved:
            params = torch.load(Path(saved, "checkpoint.pt"))["model"]
        metrics = result.metrics
        case = "a worker killed, resumed" if kill else "undisturbed"
        more = {"resumed": metrics["resumed"], "every": metrics["thresholds"]}
        report("Ray Train", case, metrics["thresholds"], params, train_alone(), **more)
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

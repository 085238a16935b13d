"""Train under every engine, compare with one process, and write down what came out: `make engines`.

Each program of this folder trains the same small model; a rank prints the thresholds' largest relative error against
the same training in one process (common.py), whose thresholds are numpy.percentile of a list. What errs more than
rounding, differs between ranks, or does not end, fails the run.
"""

import argparse
import json
import platform
import socket
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "programs"))

import matrix  # noqa: E402

RESULTS = HERE.parent.parent / "bench/results/engines"
SECONDS = 900  # for one program; Ray's alone takes one or two minutes, and many on a machine that is shared

# Rounding of gradients in each precision, as it shows in a threshold.
BOUNDS = {"fp32": 1e-6, "bf16": 0.02, "fp16": 0.002}

PARTS = {
    "torch": [(2, "torch_layouts.py"), (4, "torch_layouts.py")],
    "torchrun": [(0, "elastic.py", "{}/undisturbed"), (0, "elastic.py", "{}/killed")],
    "deepspeed": [
        (2, "deepspeed_zero.py", "train"),
        (4, "deepspeed_zero.py", "train"),
        (2, "deepspeed_zero.py", "save", "{}"),
        (2, "deepspeed_zero.py", "resume", "{}"),
        *[(1, f"{{}}/zero{stage}") for stage in (1, 2, 3)],  # converted for another number of ranks
        (4, "deepspeed_zero.py", "resume", "{}"),
    ],
    "accelerate": [(2, "accelerated.py", engine) for engine in ("ddp", "fsdp1", "fsdp2", "zero0", "zero2", "zero3")],
    "lightning": [
        (2, "lightning_trainer.py", strategy) for strategy in ("ddp", "fsdp", "model_parallel", "zero1", "zero2")
    ],
    "transformers": [
        (2, "hugging_face.py", engine, "{}", *more)
        for engine in ("ddp", "zero0", "zero2", "zero3")
        for more in ((), ("resume",))
    ],
    "ray": [(1, "ray_train.py", "{}")],
}

# The rows of the table: engines, as results name them; what they are called; what to write; whose versions.
TABLE = [
    (["DDP", "ZeRO"], "DDP, `ZeroRedundancyOptimizer`", "`attach(optimizer)`", "torch"),
    (
        ["FSDP2", "HSDP", "TensorParallel", "FSDP2AndTensorParallel", "Mixed"],
        "FSDP2, HSDP, tensor parallelism, both, plain tensors beside",
        "`attach(optimizer)` after sharding",
        "torch",
    ),
    (["Pipeline"], "pipeline", "`attach(optimizer, process_group=...)`: the ranks of the stages", "torch"),
    (["FSDP1"], "FSDP1", "`attach(optimizer, process_group=model.process_group)`", "torch"),
    (["torchrun"], "torchrun, a rank killed", "`clip.state_dict()` in the checkpoint", "torch"),
    (
        ["DeepSpeed ZeRO-0", "DeepSpeed ZeRO-1", "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3"],
        "DeepSpeed, ZeRO 0 to 3",
        "`autoclip_torch.deepspeed.attach(engine)`",
        "deepspeed",
    ),
    (["Accelerate ddp", "Accelerate fsdp2"], "Accelerate: DDP, FSDP2", "`attach(optimizer)`", "accelerate"),
    (
        ["Accelerate fsdp1"],
        "Accelerate: FSDP1",
        "`attach(optimizer, process_group=model.process_group)`",
        "accelerate",
    ),
    (["Accelerate zero2", "Accelerate zero3"], "Accelerate: DeepSpeed", "`attach(optimizer)`", "accelerate deepspeed"),
    (["Accelerate zero0"], "Accelerate: DeepSpeed without ZeRO", "`attach(model)`", "accelerate deepspeed"),
    (
        ["Lightning ddp", "Lightning fsdp", "Lightning model_parallel"],
        "Lightning: DDP, FSDP1, ModelParallel",
        "`AutoClipCallback()`",
        "lightning",
    ),
    (
        ["Lightning zero1", "Lightning zero2"],
        "Lightning: DeepSpeed",
        "`AutoClipCallback()`",
        "lightning deepspeed",
    ),
    (["Trainer ddp"], "the Trainer: DDP", "`AutoClipMixin`", "transformers"),
    (
        ["Trainer zero0", "Trainer zero2", "Trainer zero3"],
        "the Trainer: DeepSpeed",
        "`AutoClipMixin`, and `max_grad_norm=0.0`",
        "transformers deepspeed",
    ),
    (["Ray Train"], "Ray Train, a worker killed", "`clip.state_dict()` in the checkpoint", "ray"),
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def commands_of(ranks, program, arguments):
    """The command of each process, and what is in its environment."""
    python = [sys.executable, "-W", "ignore"]
    if not program.endswith(".py"):
        module = [*python, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers=1"]
        folders = [f"--input_folder={program}/half", f"--output_folder={program}/universal"]
        return [([*module, "--num_merge_workers=1", *folders], {})]
    if ranks == 0:
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2", "--monitor-interval=0.1"]
        return [([*python, *torchrun, f"--master-port={free_port()}", HERE / program, *arguments], {})]
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    command = [*python, HERE / program, *arguments]
    if program == "ray_train.py":
        return [(command, {})]
    return [(command, world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]


def run(folder, ranks, program, *arguments):
    """Run a program on that many ranks (0: two, started by torchrun); return what it reports."""
    arguments = [argument.format(folder) for argument in arguments]
    for argument in arguments if program == "elastic.py" else ():
        Path(argument).mkdir()
    commands = commands_of(ranks, program.format(folder), arguments)
    results = matrix.run(f"{program} {' '.join(arguments)}, {ranks} ranks", commands, folder, SECONDS)
    assert results or arguments[:1] == ["save"] or not program.endswith(".py"), f"{program} reports nothing"
    return results


def judge(results):
    """What is wrong, in sentences."""
    for result in results:
        name = f"{result['engine']} ({result['case']}, {result['ranks']} ranks)"
        if not result["agree"]:
            yield f"{name}: thresholds of ranks differ"
        if not result["error"] <= BOUNDS[result.get("precision", "fp32")]:
            yield f"{name}: thresholds err by {result['error']:.1e}"
        if result.get("error_of_its_norms", 0.0) > 0.0:
            yield f"{name}: thresholds are not the percentiles of the norms that the engine reports"
        if result["clipped"] == 0:
            yield f"{name}: nothing was clipped, so nothing was tried"
    for engine in ("torchrun", "Ray Train"):
        runs = [result for result in results if result["engine"] == engine]
        if runs and len({json.dumps(result["every"]) for result in runs}) != 1:
            yield f"{engine}: thresholds of the run that was killed are not to the last bit those of the other"
        if runs and sorted(result["resumed"] > 0 for result in runs) != [False, True]:
            yield f"{engine}: one run was to be killed and resumed, and the other was not"


def table_of(results):
    lines = [
        "| engine | what to write | tried with | largest error of a threshold, float32 | versions |",
        "|---|---|---|---|---|",
    ]
    for engines, name, write, packages in TABLE:
        own = [result for result in results if result["engine"] in engines]
        if not own:
            continue
        error = max(result["error"] for result in own if result.get("precision", "fp32") == "fp32")
        ranks = " and ".join(str(number) for number in sorted({result["ranks"] for result in own} - {1}) or [2])
        tried = [f"{ranks} ranks", *(found for found, word in FINDINGS if any(word in each["case"] for each in own))]
        versions = ", ".join(f"{package} {version(package)}" for package in packages.split())
        lines.append(f"| {name} | {write} | {', '.join(tried)} | {error:.0e} | {versions} |")
    return "\n".join(lines)


FINDINGS = [
    ("bfloat16", "bf16"),
    ("float16", "fp16"),
    ("two groups", "groups 2"),
    ("accumulation", "accumulate"),
    ("offload", "offload"),
    ("NaN on one rank", "NaN"),
    ("resumed", "resumed"),
    ("resumed by another number of ranks", "resumed, saved by 2 ranks"),
]


def write(parts):
    packages = ["torch", "deepspeed", "accelerate", "lightning", "transformers", "ray"]
    parts = {part: parts[part] for part in PARTS if part in parts}
    page = f"""# Engines

`make engines`: the same training of a model of 123 parameters under each engine, against one process that clips by
`numpy.percentile` of a list of norms. The error is relative. All ranks have the same thresholds to the last bit, and a
run that was killed and resumed has those of an undisturbed one. On CPUs with gloo; Python {platform.python_version()}.

{table_of([result for results in parts.values() for result in results])}
"""
    matrix.write(RESULTS, parts, page, versions={package: version(package) for package in packages})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {' '.join(PARTS)}; all if none. Figures of others stay")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := set(parts) - PARTS.keys():
        parser.error(f"no engine is called {' or '.join(sorted(unknown))}; there are {' '.join(PARTS)}")
    wrong = []
    for part in parts:
        results = []
        with tempfile.TemporaryDirectory() as folder:
            for step in PARTS[part]:
                results += run(Path(folder), *step)
        for result in results:
            print(f"{result['error']:.1e}  {result['engine']} ({result['case']}, {result['ranks']} ranks)")
        found = list(judge(results))
        print(*found, sep="\n")
        wrong += found
        if not found:
            write(matrix.known(RESULTS) | {part: results})
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

"""What a clipped step costs on an accelerator: all of `bench torch` there, launches, and whole training steps."""

import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from autoclip_torch import AutoClip, attach
from torch import nn
from torch.profiler import ProfilerActivity, profile

from bench import ROOT
from bench.common import (
    QUICK_NOTE,
    Key,
    Measurements,
    facts_table,
    machine_facts,
    parse,
    parser,
    ratio,
    say,
    shown,
    table,
)
from bench.torch import (
    AUTHORS,
    CLIP,
    FEW,
    MANY,
    NORM,
    OPTIMIZERS,
    PLAIN,
    SHAPES,
    TORCH,
    Place,
    Subject,
    fill,
    make_authors,
    make_autoclip,
    make_fused,
    make_norm,
    make_torch,
)

OPENING = """\
What this isolates: the time between `backward()` and the next forward pass, as in [the report of the
CPU](../torch/torch.md), with gradients on {device}. "Device" is the time from the first to the last of a step's
kernels, by events of the device; "host" is how long the call took, which returns before the device is done. Each number
is the median of {rounds} rounds, in microseconds per step; subjects take turns in every round. Launches are the
calls of one step by which the host has kernels, copies, fills and recorded graphs done; "kernels" are all kernels,
copies and fills. Both are counted by torch's profiler. {syncs}
A step in JAX is a hundredth of a compiled loop of a hundred steps."""

SYNCS = """Every deferred step ran
under `torch.cuda.set_sync_debug_mode("error")`: none made the host wait."""
NO_SYNCS = "This device cannot tell whether a step made the host wait."

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TRAINING, SCAN = "training", "JAX, inside lax.scan"
WINDOWS = (2**14, 2**17, 2**20, 2**24)
MOST_LAUNCHES = 36
LAUNCHING = re.compile("cu(da)?(Graph)?(Launch|Memcpy|Memset)")  # functions of CUDA, as the profiler names them
IMMEDIATE = f"{CLIP}, immediate"
ATTACHED = "AutoClip attached"
ATTACHED_IMMEDIATE = f"{ATTACHED}, immediate"
WAITING = (NORM, AUTHORS, IMMEDIATE, ATTACHED_IMMEDIATE)  # whatever they run on
BY_HAND = "AutoClip.step, then the optimizer"
JAX, OPTAX = "autoclip_jax.autoclip", "optax.clip_by_global_norm"
FUSED = f"{ATTACHED}, fused"
PLAIN_FUSED = f"{PLAIN}, fused"


@contextmanager
def never_waiting(place: Place) -> Iterator[None]:
    """Make it an error if the host waits, where torch can tell."""
    tells = place.device.type == "cuda"
    if tells:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if tells:
            torch.cuda.set_sync_debug_mode("default")


def run(subject: Subject, steps: int, place: Place, *, waits: bool) -> tuple[float, float]:
    """Microseconds per step of the device and of the host, without renewing the gradients."""
    marks = [[torch.Event(place.device, enable_timing=True) for _ in range(2)] for _ in range(steps)]
    host = 0.0
    torch.accelerator.synchronize()
    stream = torch.accelerator.current_stream()
    for begin, end in marks:
        subject.renew()
        begin.record(stream)
        start = time.perf_counter()
        if waits:
            subject.step()
        else:
            with never_waiting(place):
                subject.step()
        host += time.perf_counter() - start
        end.record(stream)
    torch.accelerator.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in marks) / steps * 1e3, host / steps * 1e6


def side_by_side(
    measured: Measurements,
    experiment: str,
    stream: str,
    subjects: dict[str, Subject],
    place: Place,
    rounds: int,
    steps: int,
) -> None:
    """Take turns; each round the same number of steps. First a few to warm up."""
    say(f"  {experiment}, {stream}")
    gc.collect()
    gc.disable()
    try:
        for count in range(1 + rounds):
            for name, subject in subjects.items():
                device, host = run(subject, steps if count else 6, place, waits=name.startswith(WAITING))
                if count:
                    measured.add(Key(experiment, stream, 0, name, "device us"), device)
                    measured.add(Key(experiment, stream, 0, name, "host us"), host)
    finally:
        gc.enable()


def launches(step: Callable[[], object], place: Place) -> tuple[int, int]:
    """How many calls of a step launch something, where the profiler tells; and how many kernels and copies it is."""
    kind = place.device.type.upper()
    torch.accelerator.synchronize()
    with profile(activities=[ProfilerActivity.CPU, getattr(ProfilerActivity, kind)], acc_events=True) as profiler:
        step()
        torch.accelerator.synchronize()
    events = profiler.events()
    done = sum(event.device_type.name == kind for event in events)
    return sum(bool(LAUNCHING.match(event.name)) for event in events) or done, done


def count_launches(measured: Measurements, device: torch.device, count: int) -> None:
    """Count the launches of a step of so many small tensors, in every form."""
    say("  launches")

    def of(name: str, stream: str, subject: Subject) -> int:
        for _ in range(50):
            subject.renew()
            subject.step()
        subject.renew()
        found, done = launches(subject.step, Place(device))
        measured.add(Key("launches", stream, count, name, "launches"), found)
        measured.add(Key("launches", stream, count, name, "kernels"), done)
        return found

    for stream, dtype in DTYPES.items():
        place = Place(device, dtype)
        of(TORCH, stream, make_torch(count, 64, place))
        of(CLIP, stream, make_autoclip(count, 64, 1000, place=place))
        windowed = Subject(count, 64, place)
        windowed.step = AutoClip(windowed.params, window=100).step
        of(f"{CLIP}, window", stream, windowed)
        grouped = Subject(count, 64, place)
        named = [(str(index % 4), param) for index, param in enumerate(grouped.params)]
        grouped.step = AutoClip(sorted(named, key=lambda pair: pair[0]), scope=lambda name: name).step
        of(f"{CLIP}, 4 groups", stream, grouped)
    for name, make in OPTIMIZERS.items():
        alone = Subject(count, 64, Place(device))
        alone.step = make(alone.params).step
        before = of(f"fused {name} alone", "float32", alone)
        attached = of(
            f"fused {name}, attached", "float32", make_fused(count, 64, name, autoclip=True, place=Place(device))
        )
        measured.add(
            Key("launches", "float32", count, f"fused {name}, more when attached", "launches"), attached - before
        )


class Training:
    """Whole training steps of one model, forward and backward pass included."""

    def __init__(self, model: nn.Module, inputs: torch.Tensor, clipping: str) -> None:
        self.params = list(model.parameters())
        fused = clipping in (FUSED, PLAIN_FUSED)
        optimizer = torch.optim.AdamW(self.params, lr=1e-4, fused=fused, foreach=not fused)
        clip = None
        if clipping.startswith(ATTACHED):
            clip = attach(optimizer, mode="immediate" if clipping == ATTACHED_IMMEDIATE else "auto")
        elif clipping == BY_HAND:
            clip = AutoClip(self.params)

        def step() -> None:
            optimizer.zero_grad()
            model(inputs).float().square().mean().backward()
            if clipping == TORCH:
                nn.utils.clip_grad_norm_(self.params, 1.0)
            elif clipping == BY_HAND:
                clip.step()
            optimizer.step()

        self.step, self.renew = step, lambda: None
        if clip is not None:
            fill(clip, 1.0, 1000)


def small_model() -> tuple[nn.Module, torch.Tensor]:
    layers = [nn.Sequential(nn.Linear(256, 256), nn.ReLU()) for _ in range(8)]
    return nn.Sequential(*layers), torch.randn(64, 256)


def large_model() -> tuple[nn.Module, torch.Tensor]:
    layer = nn.TransformerEncoderLayer(1024, 16, 4096, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 12, enable_nested_tensor=False), torch.randn(8, 256, 1024)


def train(measured: Measurements, device: torch.device, rounds: int, *, quick: bool) -> None:
    models = {"small, float32": (small_model, torch.float32), "large, bfloat16": (large_model, torch.bfloat16)}
    for stream, (make, dtype) in list(models.items())[: 1 if quick else None]:
        subjects = {}
        for clipping in (PLAIN, TORCH, BY_HAND, ATTACHED, ATTACHED_IMMEDIATE, PLAIN_FUSED, FUSED):
            torch.manual_seed(0)
            model, inputs = make()
            subjects[clipping] = Training(model.to(device, dtype), inputs.to(device, dtype), clipping)
        side_by_side(measured, TRAINING, stream, subjects, Place(device, dtype), rounds, 20)


def measure_windows(measured: Measurements, rounds: int, *, quick: bool) -> None:
    """Take steps of JAX's form for devices, over full windows, inside one compiled loop."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch has the memory
    import autoclip_jax
    import jax
    import optax
    from jax import numpy as jnp

    from bench.jax import full_state

    if jax.default_backend() == "cpu":
        say("  this JAX sees no accelerator: its windows are not measured")
        return
    coming = jnp.asarray(np.random.default_rng(1).lognormal(size=100), jnp.float32)

    def loop(tx: optax.GradientTransformation) -> Callable[[Any], Any]:
        def step(state: Any, norm: jax.Array) -> tuple[Any, jax.Array]:
            updates, state = tx.update(jnp.full(4, norm / 2), state)
            return state, updates[0]

        return jax.jit(lambda state: jax.lax.scan(step, state, coming))

    for size in WINDOWS[: 1 if quick else None]:
        say(f"  JAX, a window of {size:,}")
        norms = np.random.default_rng(0).lognormal(size=size).astype(np.float32)
        clip, constant = autoclip_jax.autoclip(window=size), optax.clip_by_global_norm(1.0)
        full = full_state(clip.init(jnp.ones(4)), norms)
        subjects = {JAX: (loop(clip), full), OPTAX: (loop(constant), constant.init(jnp.ones(4)))}
        for count in range(1 + rounds):
            for name, (run_steps, state) in subjects.items():
                start = time.perf_counter()
                jax.block_until_ready(run_steps(state))
                if count:  # the first compiles
                    microseconds = (time.perf_counter() - start) * 1e6 / len(coming)
                    measured.add(Key(SCAN, f"{size:,}", size, name, "device us"), microseconds)


def measure(device: torch.device, rounds: int, *, quick: bool) -> Measurements:
    measured = Measurements()
    steps, many = (10, 1000) if quick else (50, MANY)
    shapes = dict(list(SHAPES.items())[: 1 if quick else None])
    count_launches(measured, device, 100)
    for dtype_name, dtype in list(DTYPES.items())[:2]:
        place = Place(device, dtype)
        for stream, (count, size) in shapes.items():
            subjects = {
                CLIP: make_autoclip(count, size, many, place=place),
                IMMEDIATE: make_autoclip(count, size, many, place=place, mode="immediate"),
                TORCH: make_torch(count, size, place),
                NORM: make_norm(count, size, place),
            }
            if stream in ("10 x 1k", "100 x 10k"):
                subjects[f"{AUTHORS}, 10 norms"] = make_authors(count, size, FEW, place)
            side_by_side(measured, f"clip, {dtype_name}", stream, subjects, place, rounds, steps)
    place = Place(device)
    stream, (count, size) = list(shapes.items())[-1]
    for name in OPTIMIZERS:
        subjects = {
            CLIP: make_fused(count, size, name, autoclip=True, place=place),
            TORCH: make_fused(count, size, name, autoclip=False, place=place),
        }
        side_by_side(measured, f"fused {name}", stream, subjects, place, rounds, steps)
    count, size = (20, 100) if quick else (1000, 1000)
    subjects = {
        "global": make_autoclip(count, size, 1000, place=place),
        "parameter": make_autoclip(count, size, 1000, "parameter", place),
        TORCH: make_torch(count, size, place),
    }
    side_by_side(measured, "scopes", f"{count:,} x {size:,}", subjects, place, rounds, 10)
    train(measured, device, rounds, quick=quick)
    measure_windows(measured, rounds, quick=quick)
    return measured


def targets(measured: Measurements) -> list[list[str]]:
    rows = [
        [f"{key.metric} of {key.subject}, {key.stream}, {key.size} tensors", shown(measured.median(*key)), wanted]
        for key in measured.values
        if key.experiment == "launches"
        for wanted in [
            "-"
            if key.metric == "kernels"
            else f"at most {MOST_LAUNCHES}"
            if key.subject in (CLIP, f"{CLIP}, window")
            else "at most 34"
            if key.subject.endswith("more when attached")
            else "-"
        ]
    ]
    for key in measured.values:
        if key.subject == CLIP and key.experiment != "launches":
            reference = measured.median(*key._replace(subject=TORCH))
            wanted = "at most 2.2" if key == Key("clip, float32", "10 x 1k", 0, CLIP, "host us") else "-"
            question = f"{key.experiment}, {key.stream}, {key.metric.removesuffix(' us')}: AutoClip / clip_grad_norm_"
            rows.append([question, shown(ratio(measured.median(*key), reference)), wanted])
    return rows


def report(measured: Measurements, facts: dict[str, str], device: torch.device, *, rounds: int, quick: bool) -> str:
    times: dict[tuple[str, str, str], dict[str, str]] = {}
    for key in measured.values:
        if key.experiment != "launches":
            times.setdefault((key.experiment, key.stream, key.subject), {})[key.metric] = shown(measured.median(*key))

    def tabled(head: list[str], belongs: Callable[[str], bool]) -> list[str]:
        rows = [
            [*names, found["device us"], found.get("host us", "-")]
            for names, found in times.items()
            if belongs(names[0])
        ]
        return [table(head, rows)] if rows else ["Not measured: there was nothing to measure it with."]

    syncs = SYNCS if device.type == "cuda" else NO_SYNCS
    parts = [
        "# A clipped step on an accelerator",
        *([QUICK_NOTE] if quick else []),
        OPENING.format(device=facts["device"], rounds=rounds, syncs=syncs),
        "## Against the targets",
        table(["question", "measured", "target"], targets(measured)),
        "## A step",
        *tabled(["what", "gradients", "subject", "device", "host"], lambda name: name not in (TRAINING, SCAN)),
        "## A whole training step",
        *tabled(["what", "model", "subject", "device", "host"], lambda name: name == TRAINING),
        "## A step in JAX",
        *tabled(["what", "window", "subject", "device", "host"], lambda name: name == SCAN),
        facts_table(facts),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    arguments = parser(__doc__, rounds=7)
    arguments.add_argument("--tests", action="store_true", help="first the tests that need a device")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None or device.type not in {"cuda", "xpu"}:
        arguments.parse_args()
        say("There is no CUDA or XPU device here, so there is nothing to measure and no test of a device to run.")
        return
    options = parse(arguments)
    if options.tests:
        tests = [sys.executable, "-P", "-m", "pytest", "-q", "-m", "device", "tests/adapters/test_torch_device.py"]
        if subprocess.run(tests, cwd=ROOT, check=False).returncode != 0:
            raise SystemExit("A test of the device failed; see above.")
    device = torch.device(device.type, torch.accelerator.current_device_index())
    facts = machine_facts(["torch", "jax"])
    facts["device"] = torch.get_device_module(device).get_device_name(device)
    facts["its toolkit"] = str(torch.version.cuda or torch.version.hip or torch.version.xpu)
    say("python -m bench device")
    measured = measure(device, options.rounds, quick=options.quick)
    measured.write(options.output / "device.csv")
    page = report(measured, facts, device, rounds=options.rounds, quick=options.quick)
    (options.output / "device.md").write_text(page, encoding="utf-8")
    print(table(["question", "measured", "target"], targets(measured)))
    say(f"written: device.csv and device.md in {options.output}")


if __name__ == "__main__":
    main()

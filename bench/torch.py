"""A clipped PyTorch step beside torch's own clipping and the procedure of the paper's authors."""

import gc
import itertools
import time
from array import array
from collections.abc import Callable, Sequence
from math import hypot, inf
from typing import Any, NamedTuple

import numpy as np
import torch
from autoclip_torch import AutoClip, attach
from torch import Tensor, nn
from torch.autograd.graph import increment_version

import autoclip_core
from autoclip_core import arrays
from bench.common import (
    QUICK_NOTE,
    Key,
    Measurements,
    facts_table,
    machine_facts,
    parse,
    parser,
    power,
    ratio,
    say,
    shown,
    table,
)

OPENING = """\
What this isolates: the time between `backward()` and the next forward pass. There is no model: parameters get new
gradients before every step, outside of the timing, the same ones for every subject. The history is filled with norms as
large as theirs, so that AutoClip clips nine steps in ten, as it does at its default of the 10th percentile. Subjects
take turns in every round; each number is the median of {rounds} rounds, in microseconds per step, on the CPU with
{threads} threads. A step inside a fused optimizer has no clipping of its own to time, so it is compared with
`clip_grad_norm_` followed by the same fused optimizer. A deferred step is what the host of an accelerator has to do,
here with gradients on the CPU, where operations are done at once, so that their time is in it.

"{floor}" is what no step of ours can leave out, written in one function that can do nothing else: gather plain
gradients and see that they are like those before, measure them, ask the history, scale them, tell torch, and take what
the next step needs to know them again. Deferred, it makes the same calls of torch as a step of one group, or fewer."""

SIGMA = 0.3  # of the logarithm of the norms

CLIP = "AutoClip.step"
TORCH = "torch.nn.utils.clip_grad_norm_"
NORM = "one norm pass (get_total_norm)"
AUTHORS = "the authors' procedure"
PLAIN = "no clipping"
FLOOR = "the least that a step does"
SHAPES = {
    "10 x 1k": (10, 1_000),
    "50 x 1k": (50, 1_000),
    "200 x 1k": (200, 1_000),
    "100 x 10k": (100, 10_000),
    "100 x 100k": (100, 100_000),
    "20 x 1M": (20, 1_000_000),
}
QUICK_SHAPES = {"10 x 1k": (10, 1_000), "5 x 10k": (5, 10_000)}
# What clipping may cost at most, beside clip_grad_norm_.
MOST = {"10 x 1k": 0.25, "50 x 1k": 0.25, "200 x 1k": 0.25, "100 x 10k": 0.6, "100 x 100k": 1.0, "20 x 1M": 0.75}
AUTHORS_AT = ("100 x 10k", "10 x 1k")
ATTACHED_AT = ("10 x 1k", "50 x 1k")
FLOOR_AT = ("10 x 1k", "50 x 1k", "200 x 1k")
DEFERRED_AT = "10 x 1k"
FEW, MANY = 10, 1_000_000

UNFUSED = {
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-4),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-4),
}
OPTIMIZERS = {
    "SGD": lambda params: torch.optim.SGD(params, lr=1e-4, fused=True),
    "SGD with momentum": lambda params: torch.optim.SGD(params, lr=1e-4, momentum=0.9, fused=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True),
}


class Place(NamedTuple):
    """Where gradients are, and of what dtype."""

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32


HERE = Place()


class Subject:
    """Parameters with gradients that are renewed before every step, and the step to time."""

    def __init__(self, count: int, size: int, place: Place = HERE) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.zeros(size).to(*place)) for _ in range(count)]
        self._fresh = [torch.randn(size, generator=generator).to(*place) for _ in range(count)]
        self._sizes = itertools.cycle(np.random.default_rng(2).lognormal(sigma=SIGMA, size=997).tolist())
        self.grads = [grad.clone() for grad in self._fresh]
        for param, grad in zip(self.params, self.grads, strict=True):
            param.grad = grad
        self.norm = float(count * size) ** 0.5
        self.step: Callable[[], object] = lambda: None

    def renew(self) -> None:
        """New gradients, of another size."""
        torch._foreach_copy_(self.grads, self._fresh)
        torch._foreach_mul_(self.grads, next(self._sizes))

    def run(self, steps: int) -> float:
        """Microseconds per step, without renewing the gradients."""
        total = 0.0
        for _ in range(steps):
            self.renew()
            begin = time.perf_counter()
            self.step()
            total += time.perf_counter() - begin
        return total / steps * 1e6


def fill(clip: AutoClip, norm: float, size: int) -> None:
    """Norms around the one that the gradients have."""
    for history in clip.histories.values():
        history.extend(norm * np.random.default_rng(1).lognormal(sigma=SIGMA, size=size))


def make_autoclip(
    count: int, size: int, history: int, scope: str = "global", place: Place = HERE, mode: str = "auto"
) -> Subject:
    subject = Subject(count, size, place)
    clip = AutoClip(subject.params, scope=scope, mode=mode)
    fill(clip, subject.norm if scope == "global" else float(size) ** 0.5, history)
    subject.step = clip.step
    return subject


def make_torch(count: int, size: int, place: Place = HERE) -> Subject:
    subject = Subject(count, size, place)
    limit = 0.7 * subject.norm
    subject.step = lambda: nn.utils.clip_grad_norm_(subject.params, limit)
    return subject


def parts_of_a_least_step(subject: Subject, history: int) -> tuple[autoclip_core.AutoClip, Any, Any, "array[int]"]:
    """What both least steps are made of: the rule, a check of the gradients, the kernel, sizes."""
    clip = autoclip_core.AutoClip()
    clip.history.extend(subject.norm * np.random.default_rng(1).lognormal(sigma=SIGMA, size=history))
    guards = torch._C._dynamo.guards.TensorGuards(*subject.grads, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return clip, guards, autoclip_core.kernel_functions(), array("Q", [grad.numel() for grad in subject.grads])


def least_step(subject: Subject, history: int) -> Callable[[], None]:
    clip, guards, functions, sizes = parts_of_a_least_step(subject, history)
    measure, scale, fingerprint = functions.tensors_measure, functions.tensors_scale, functions.tensors_fingerprint
    known = {}

    def step() -> None:
        grads: list[Tensor] = [param.grad for param in subject.params]
        if not guards.check(*grads):
            raise ValueError
        addresses, norms = array("Q", list(map(Tensor.data_ptr, grads))), array("d", bytes(8 * len(grads)))
        memory = addresses.buffer_info()[0], sizes.buffer_info()[0], len(sizes), grads[0].itemsize
        measure(*memory, norms.buffer_info()[0])
        decided = clip.observe(hypot(*sorted(norms)))
        if decided.clipped:
            increment_version(grads)
            factors = array("d", [decided.scale]) * len(grads)
            scale(*memory, factors.buffer_info()[0])
        some = grads[:: len(grads) // 4 + 1]
        known["gradients"] = sum(grad._version for grad in some), fingerprint(*memory)

    return step


def least_deferred_step(subject: Subject, history: int) -> Callable[[], None]:
    """The same for a norm that is on its way to the host while the step is made."""
    rule, guards, functions, sizes = parts_of_a_least_step(subject, history)
    infinity = torch.tensor(inf, dtype=torch.float64)
    pending: list[Tensor] = []
    known = {}

    @torch.no_grad()
    def step() -> None:
        grads: list[Tensor] = [param.grad for param in subject.params]
        if not guards.check(*grads):
            raise ValueError
        addresses, norms = array("Q", list(map(Tensor.data_ptr, grads))), array("d", bytes(8 * len(grads)))
        memory = addresses.buffer_info()[0], sizes.buffer_info()[0], len(sizes), grads[0].itemsize
        functions.tensors_measure(*memory, norms.buffer_info()[0])
        if pending:
            rule.observe(*pending.pop().tolist())
        numbers = array("d", list(itertools.chain.from_iterable(arrays.deferred_table(rule, 1, rule.percentile))))
        table = torch.frombuffer(numbers, dtype=torch.float64).view(2, -1)
        norm = torch.frombuffer(array("d", [hypot(*sorted(norms))]), dtype=torch.float64)
        remembered = torch.where(norm > 0.0, norm, infinity).unsqueeze(0)
        pending.append(norm.clone())
        recorded = remembered < inf
        row = table.index_select(0, recorded.sum(1))
        near_norms = torch.cat([row[:, 5:], remembered], 1)
        ordered = torch.topk(near_norms, near_norms.shape[1], 1, largest=False)[0]
        near, far = ordered.gather(1, row[:, :2].view(torch.int64)).unbind(1)
        threshold = torch.fmin(near + (far - near) * row[:, 2], row[:, 3])
        scale = torch.clip(torch.nan_to_num(threshold / norm, nan=0.0, posinf=1.0, neginf=1.0), None, 1.0)
        torch._foreach_mul_(grads, scale[0].float())
        keep = torch.gt(scale[0], 0.0, out=torch.empty((), dtype=torch.int32))
        torch._foreach_mul_([grad.view(torch.int32) for grad in grads], keep)
        known["step"] = threshold, scale < recorded[:, 0], torch.stack([norm, scale])
        known["gradients"] = sum(grad._version for grad in grads), functions.tensors_fingerprint(*memory)

    return step


def make_floor(count: int, size: int, history: int, mode: str = "immediate") -> Subject:
    subject = Subject(count, size)
    subject.step = (least_deferred_step if mode == "deferred" else least_step)(subject, history)
    return subject


def make_norm(count: int, size: int, place: Place = HERE) -> Subject:
    subject = Subject(count, size, place)
    subject.step = lambda: nn.utils.get_total_norm([param.grad for param in subject.params]).item()
    return subject


def make_authors(count: int, size: int, history: int, place: Place = HERE) -> Subject:
    """As published: the norm tensor by tensor on the host, a list, numpy.percentile, torch's clipping."""
    subject = Subject(count, size, place)
    norms = (subject.norm * np.random.default_rng(1).lognormal(sigma=SIGMA, size=history)).tolist()

    def step() -> None:
        total = 0.0
        for param in subject.params:
            if param.grad is not None:
                total += param.grad.data.norm(2).item() ** 2
        norms.append(total**0.5)
        nn.utils.clip_grad_norm_(subject.params, np.percentile(norms, 10.0))

    subject.step = step
    return subject


def make_fused(count: int, size: int, optimizer: str, *, autoclip: bool, place: Place = HERE) -> Subject:
    subject = Subject(count, size, place)
    with_clipping(subject, OPTIMIZERS[optimizer](subject.params), CLIP if autoclip else TORCH)
    return subject


def make_unfused(count: int, size: int, optimizer: str, clipping: str) -> Subject:
    subject = Subject(count, size)
    with_clipping(subject, UNFUSED[optimizer](subject.params), clipping)
    return subject


def with_clipping(subject: Subject, optimizer: torch.optim.Optimizer, clipping: str) -> None:
    """Make the step of an optimizer that of the subject, with or without clipping."""
    subject.step = optimizer.step
    if clipping == CLIP:
        fill(attach(optimizer), subject.norm, MANY)
    elif clipping == FLOOR:
        least = least_step(subject, MANY)
        optimizer.register_step_pre_hook(lambda *_: least())
    elif clipping == TORCH:
        limit = 0.7 * subject.norm

        def step() -> None:
            nn.utils.clip_grad_norm_(subject.params, limit)
            optimizer.step()

        subject.step = step


def side_by_side(
    measured: Measurements,
    experiment: str,
    stream: str,
    subjects: dict[tuple[str, int], Subject],
    rounds: int,
    budget: float,
) -> None:
    """Take turns, each round as many steps as fit into the budget of seconds."""
    say(f"  {experiment}, {stream}")
    counts = {}
    for key, subject in subjects.items():
        subject.run(2)
        counts[key] = max(1, min(1000, int(budget * 1e6 / subject.run(2))))
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for (name, size), subject in subjects.items():
                measured.add(Key(experiment, stream, size, name, "us"), subject.run(counts[name, size]))
    finally:
        gc.enable()


def measure(shapes: dict[str, tuple[int, int]], layers: tuple[int, int], rounds: int, budget: float) -> Measurements:
    measured = Measurements()
    has_kernel = autoclip_core.NormHistory().backend == "native"
    for stream, (count, size) in shapes.items():
        subjects = {
            (CLIP, MANY): make_autoclip(count, size, MANY),
            (TORCH, 0): make_torch(count, size),
            (NORM, 0): make_norm(count, size),
        }
        if stream in FLOOR_AT and has_kernel:
            subjects[FLOOR, MANY] = make_floor(count, size, MANY)
        side_by_side(measured, "clip", stream, subjects, rounds, budget)
    for stream in filter(shapes.get, AUTHORS_AT):
        subjects = {
            (name, history): make(*shapes[stream], history)
            for name, make in ((CLIP, make_autoclip), (AUTHORS, make_authors))
            for history in (FEW, MANY)
        }
        side_by_side(measured, "authors", stream, subjects, rounds, budget)
    subjects = {
        (CLIP, MANY): make_autoclip(*shapes[DEFERRED_AT], MANY, mode="deferred"),
        (TORCH, 0): make_torch(*shapes[DEFERRED_AT]),
    }
    if has_kernel:
        subjects[FLOOR, MANY] = make_floor(*shapes[DEFERRED_AT], MANY, "deferred")
    side_by_side(measured, "deferred", DEFERRED_AT, subjects, rounds, budget)
    for stream in filter(shapes.get, ATTACHED_AT):
        for optimizer in UNFUSED:
            subjects = {
                (clipping, 0 if clipping in (TORCH, PLAIN) else MANY): make_unfused(
                    *shapes[stream], optimizer, clipping
                )
                for clipping in (CLIP, TORCH, PLAIN, *[FLOOR] * has_kernel)
            }
            side_by_side(measured, f"plain {optimizer}", stream, subjects, rounds, budget)
    stream, (count, size) = list(shapes.items())[-1]
    for optimizer in OPTIMIZERS:
        subjects = {
            (CLIP, MANY): make_fused(count, size, optimizer, autoclip=True),
            (TORCH, 0): make_fused(count, size, optimizer, autoclip=False),
        }
        side_by_side(measured, f"fused {optimizer}", stream, subjects, rounds, budget)
    count, size = layers
    side_by_side(
        measured,
        "scopes",
        f"{count:,} x {size:,}",
        {
            ("global", 1000): make_autoclip(count, size, 1000),
            ("parameter", 1000): make_autoclip(count, size, 1000, "parameter"),
            (TORCH, 0): make_torch(count, size),
        },
        rounds,
        budget,
    )
    return measured


def targets(measured: Measurements, shapes: Sequence[str], layers: str) -> list[list[str]]:
    def of(experiment: str, stream: str, name: str, size: int = 0) -> float | None:
        return measured.median(experiment, stream, size, name, "us")

    last = shapes[-1]
    rows = [
        (
            f"{CLIP} at 10^6 norms / clip_grad_norm_, {stream}",
            ratio(of("clip", stream, CLIP, MANY), of("clip", stream, TORCH)),
            f"at most {MOST.get(stream, 1.05)}",
        )
        for stream in shapes
    ]
    rows += [
        (
            f"{FLOOR} / clip_grad_norm_, {stream}",
            ratio(of("clip", stream, FLOOR, MANY), of("clip", stream, TORCH)),
            "-",
        )
        for stream in FLOOR_AT
        if stream in shapes
    ]
    rows.append(
        (
            f"host time of a deferred step / clip_grad_norm_, {DEFERRED_AT}",
            ratio(of("deferred", DEFERRED_AT, CLIP, MANY), of("deferred", DEFERRED_AT, TORCH)),
            "at most 2.2",
        )
    )
    rows.append(
        (
            f"{FLOOR}, deferred / clip_grad_norm_, {DEFERRED_AT}",
            ratio(of("deferred", DEFERRED_AT, FLOOR, MANY), of("deferred", DEFERRED_AT, TORCH)),
            "-",
        )
    )
    for stream in ATTACHED_AT:
        for name in UNFUSED:
            torchs, plain = (of(f"plain {name}", stream, subject) for subject in (TORCH, PLAIN))
            for subject, what, most in (
                (CLIP, "AutoClip attached", f"at most {MOST[stream]}"),
                (FLOOR, FLOOR, "-"),
            ):
                ours = of(f"plain {name}", stream, subject, MANY)
                if ours is not None and torchs is not None and plain is not None:
                    question = f"{name} not fused: what {what} adds / what clip_grad_norm_ adds, {stream}"
                    rows.append((question, ratio(ours - plain, torchs - plain), most))
    rows += [
        (
            f"fused {name}, AutoClip attached / clip_grad_norm_ + step, {last}",
            ratio(of(f"fused {name}", last, CLIP, MANY), of(f"fused {name}", last, TORCH)),
            f"at most {most}",
        )
        for name, most in zip(OPTIMIZERS, ("0.85", "0.90", "0.95"), strict=True)
    ]
    rows += [
        (
            f"{AUTHORS} / {CLIP}, {power(size)} norms, {stream}",
            ratio(of("authors", stream, AUTHORS, size), of("authors", stream, CLIP, size)),
            f"at least {least}",
        )
        for stream in AUTHORS_AT
        if stream in shapes
        for size, least in ((FEW, "1.6"), (MANY, "50"))
    ]
    rows.append(
        (
            f'scope="parameter" / "global", {layers}',
            ratio(of("scopes", layers, "parameter", 1000), of("scopes", layers, "global", 1000)),
            "at most 3",
        )
    )
    return [[question, shown(value), target] for question, value, target in rows]


def beside_torch(measured: Measurements, shapes: Sequence[str]) -> str:
    rows = []
    for stream in shapes:
        ours, torchs = (
            measured.median("clip", stream, size, subject, "us") for subject, size in ((CLIP, MANY), (TORCH, 0))
        )
        rows.append([stream.replace(" x ", " of "), shown(ours), shown(torchs), shown(ratio(ours, torchs))])
    return table(["gradients", "AutoClip.step, us", "clip_grad_norm_, us", "ratio"], rows)


def report(
    measured: Measurements, facts: dict[str, str], shapes: Sequence[str], layers: str, *, rounds: int, quick: bool
) -> str:
    rows = [
        [key.experiment, key.stream, power(key.size) if key.size else "-", key.subject, shown(measured.median(*key))]
        for key in measured.values
        if key.metric == "us"
    ]
    rows = [[experiment, stream, subject, size, value] for experiment, stream, size, subject, value in rows]
    parts = [
        "# A clipped PyTorch step",
        *([QUICK_NOTE] if quick else []),
        OPENING.format(rounds=rounds, threads=torch.get_num_threads(), floor=FLOOR),
        "## Against the targets",
        table(["question", "measured", "target"], targets(measured, shapes, layers)),
        "## Beside clip_grad_norm_, by the number and the size of gradients",
        beside_torch(measured, shapes),
        "## Microseconds per step",
        table(["what", "gradients", "subject", "norms stored", "us"], rows),
        facts_table(facts),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    options = parse(parser(__doc__, rounds=9))
    facts = machine_facts(["torch"])
    shapes = QUICK_SHAPES if options.quick else SHAPES
    layers = (50, 100) if options.quick else (1000, 1000)
    say("python -m bench torch")
    measured = measure(shapes, layers, options.rounds, 0.01 if options.quick else 0.15)
    measured.write(options.output / "torch.csv")
    page = report(
        measured, facts, list(shapes), f"{layers[0]:,} x {layers[1]:,}", rounds=options.rounds, quick=options.quick
    )
    (options.output / "torch.md").write_text(page, encoding="utf-8")
    print(table(["question", "measured", "target"], targets(measured, list(shapes), f"{layers[0]:,} x {layers[1]:,}")))
    say(f"written: torch.csv and torch.md in {options.output}")


if __name__ == "__main__":
    main()

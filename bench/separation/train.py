"""One network, trained with one loss, one percentile and one seed.

What may not change, or cells of the table are no longer comparable: for one seed all percentiles share the initial
weights, the mixtures, their order and the offsets of their segments. "No clipping" is p = 100, as in the paper.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from autoclip_torch import AutoClip
from torch import Tensor

from bench import ROOT
from bench.separation import corpora
from bench.separation.corpora import Waves
from bench.separation.losses import LOSSES, Targets
from bench.separation.networks import SIZES, Network, samples_of

Result = TypeVar("Result")


@dataclass(frozen=True)
class Settings:
    """All that a result depends on beside loss, percentile and seed. The defaults are the paper's."""

    corpus: str = "prompts"
    folder: str = "build/prompts"
    network: str = "paper"
    train_mixtures: int = 20_000
    validation_mixtures: int = 5_000
    test_mixtures: int = 3_000
    frames: int = 400
    batch: int = 25
    epochs: int = 100
    learning_rate: float = 1e-3

    @property
    def device(self) -> str:
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.mixtures()["train"]) // self.batch)

    def mixtures(self) -> dict[str, Sequence[Waves]]:
        """Train, validation and test; read once per process."""
        counts = (self.train_mixtures, self.validation_mixtures, self.test_mixtures)
        return _load(self.corpus, self.folder, counts)


_load = cache(lambda corpus, folder, counts: corpora.load(corpus, Path(folder), counts))


class Step(NamedTuple):
    """One step of training; `clip_seconds` of its `seconds` were AutoClip's."""

    loss_value: float
    grad_norm: float
    clip_threshold: float
    clipped: bool
    seconds: float
    clip_seconds: float


def segment(sources: Waves, samples: int, random: np.random.Generator) -> Waves:
    """So many samples from a random offset, with zeros behind what is too short."""
    offset = int(random.integers(max(sources.shape[1] - samples, 0) + 1))
    part = sources[:, offset : offset + samples]
    return np.pad(part, ((0, 0), (0, samples - part.shape[1])))


class Training:
    """A network with its loss, its optimizer and its AutoClip."""

    def __init__(self, settings: Settings, loss: str, percentile: float, seed: int) -> None:
        self.settings, self.loss, self.percentile, self.seed = settings, loss, percentile, seed
        self.steps_per_epoch = settings.steps_per_epoch
        self._device = settings.device
        self._function, embeddings, masks, _ = LOSSES[loss]
        torch.manual_seed(seed)
        made = Network(*SIZES[settings.network], embeddings=embeddings, masks=masks)
        self.network = made.to(self._device)
        self._optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.learning_rate)
        self.clip = AutoClip(self.network, percentile)

    def batches(self, part: str = "train") -> Iterator[Tensor]:
        """Waves of shape (batch, 2, samples): every mixture once per epoch, or for another part than train, once."""
        mixtures, settings = self.settings.mixtures()[part], self.settings
        random = np.random.default_rng(self.seed)
        for _ in range(settings.epochs if part == "train" else 1):
            order = random.permutation(len(mixtures))
            for some in np.split(order, range(settings.batch, len(order), settings.batch)):
                waves = np.stack([segment(mixtures[index], samples_of(settings.frames), random) for index in some])
                yield torch.from_numpy(waves).to(self._device)

    def loss_of(self, waves: Tensor) -> Tensor:
        targets = Targets.of(waves)
        return self._function(self.network(targets.mixture), targets)

    def gradient(self, waves: Tensor) -> Tensor:
        """The gradient of the loss of a batch, all parameters in one vector; changes none of them."""
        parts = torch.autograd.grad(self.loss_of(waves), list(self.network.parameters()))
        return torch.cat([part.flatten() for part in parts])

    def step(self, waves: Tensor) -> Step:
        """Learn from a batch."""
        begin = time.perf_counter()
        self._optimizer.zero_grad()
        loss = self.loss_of(waves)
        loss.backward()
        clip_begin = time.perf_counter()
        decided = self.clip.step()
        clip_end = time.perf_counter()
        if decided.scale > 0.0:  # 0.0: the norm was not finite
            self._optimizer.step()
        end = time.perf_counter()
        return Step(
            loss.item(),
            float(decided.norm),
            float(decided.threshold),
            bool(decided.clipped),
            end - begin,
            clip_end - clip_begin,
        )

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss over one segment of every validation mixture."""
        self.network.eval()
        losses = [self.loss_of(waves).item() for waves in self.batches("validation")]
        self.network.train()
        return fmean(losses)


def run_all(function: Callable[..., Result], calls: Iterable[tuple], jobs: int) -> Iterator[Result]:
    """Results of calls as they are finished, so many at a time, each in a process with its share of the processors."""
    if jobs == 1:
        yield from (function(*call) for call in calls)
        return
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
    # glibc gives large blocks back at once and asks for them again: two fifths of a step with embeddings went there.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
    sys.path.append(str(ROOT))  # new processes look for bench, behind what is installed
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, context, signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
        try:
            for future in as_completed([pool.submit(function, *call) for call in calls]):
                yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # an interrupted table does not train to the end

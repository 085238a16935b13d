"""Pairs of speakers at 8 kHz, to be separated after they have been added up.

Every corpus is a sequence of sources, float32 of shape (2, samples), for each of train, validation and test; the
mixture is always their sum. What may not change: the mixtures are known from the seed alone, and no utterance is in two
of the three parts. Voices (speaker -> utterances) are mixed as in WSJ0-2mix: two different speakers, equal levels but
for a random gain within 2.5 dB up for one and down for the other, cut to the shorter utterance, with a peak of 0.9.
"""

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.io import wavfile
from scipy.signal import resample_poly

from bench.common import say

RATE = 8000
PARTS = ("train", "validation", "test")
SHARES = (0.8, 0.1, 0.1)  # of each speaker's utterances

MOST_GAIN = 2.5  # dB
PEAK = 0.9
SILENCE = 1e-3  # root mean square, of full scale: the packages' recorded silence has 2e-5, their speech above 3e-3

Waves = NDArray[np.float32]
Voices = Mapping[str, Sequence[Waves]]


class CorpusError(ValueError):
    """There is no usable speech; the message says where it was looked for, and how to get it."""


def level(wave: Waves) -> float:
    """The root mean square, 0 for an empty wave."""
    return float(np.sqrt(np.mean(np.square(wave)))) if wave.size else 0.0


def read_wav(path: Path) -> Waves:
    """One channel at 8 kHz, between -1 and 1; other rates are resampled, with a warning.

    Raises:
        CorpusError: the file is no WAV, or has more than one channel.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks beside the samples
            rate, samples = wavfile.read(path)
    except ValueError as error:
        raise CorpusError(f"{path} cannot be read as WAV: {error}") from None
    if samples.ndim != 1:
        raise CorpusError(f"{path} has {samples.shape[1]} channels, and mixtures are made of single ones.")
    if samples.dtype.kind == "f":
        wave = samples.astype(np.float32)
    else:
        middle = 128 if samples.dtype == np.uint8 else 0
        wave = (samples.astype(np.float32) - middle) / -float(np.iinfo(samples.dtype).min - middle)
    if rate != RATE:
        warnings.warn(f"WAV files at {rate} Hz are resampled to {RATE} Hz.", stacklevel=2)
        wave = resample_poly(wave, RATE, rate).astype(np.float32)
    return wave


# --- Voices -----------------------------------------------------------------------------------------------------------

PACKAGES = " ".join(
    [
        *(f"asterisk-core-sounds-{language}-wav" for language in ("en", "es", "fr", "it", "ru")),
        "asterisk-prompt-it-menardi-wav",
    ]
)
# Allison speaks twice, in English and in Spanish: one speaker, who is never mixed with herself.
SPEAKERS = {
    "en_US_f_Allison": "Allison",
    "es_MX_f_Allison": "Allison",
    "fr_CA_f_June": "June",
    "it_IT_f_Menardi": "Menardi",
    "it_IT_m_Carlo": "Carlo",
    "ru_RU_f_IvrvoiceRU": "IvrvoiceRU",
}
SHORTEST = 1.0  # seconds: below are single letters, digits and beeps
QUIET = 0.02  # of the peak: what is quieter before and after the speech is cut away
NOT_SPEECH = {"tt-monkeys"}


def read_prompts(folder: Path) -> Voices:
    """The telephone prompts of Debian's Asterisk packages, unpacked into a folder: five speakers, five languages.

    Raises:
        CorpusError: a package is missing; the message has the command that gets it.
    """
    sounds = folder / "usr/share/asterisk/sounds"
    if absent := [name for name in SPEAKERS if not (sounds / name).is_dir()]:
        raise CorpusError(
            f"There are no voices {', '.join(absent)} in {sounds}. They are Debian packages, to be unpacked there:\n"
            f"  mkdir -p {folder} && cd {folder} && apt-get download {PACKAGES} \\\n"
            "    && ls *.deb | xargs -I{} dpkg -x {} ."
        )
    voices: dict[str, list[Waves]] = {}
    silent = 0
    for name, speaker in SPEAKERS.items():
        for path in sorted((sounds / name).rglob("*.wav")):
            wave = read_wav(path)
            if level(wave) < SILENCE:
                silent += 1
                continue
            loud = np.flatnonzero(np.abs(wave) > QUIET * np.abs(wave).max())
            wave = wave[loud[0] : loud[-1] + 1]
            if len(wave) >= SHORTEST * RATE and path.stem not in NOT_SPEECH:
                voices.setdefault(speaker, []).append(wave)
    say(f"prompts: {describe(voices)}; {silent} silent files left out")
    return voices


def make_voices(speakers: int = 6, utterances: int = 40) -> Voices:
    """Voices that are all harmonics: a pitch and a spectrum per speaker, syllables of gliding pitch per utterance."""
    random = np.random.default_rng(0)
    voices = {}
    for speaker in range(speakers):
        pitch = 90.0 * 1.25**speaker
        harmonics = np.arange(1, int(0.45 * RATE / pitch / 1.3))
        formants = random.uniform((300, 900), (900, 2500))
        frequencies = harmonics * pitch
        envelope = sum(np.exp(-np.square((frequencies - formant) / 250.0)) for formant in formants) + 0.02
        said = []
        for _ in range(utterances):
            samples = int(RATE * random.uniform(1.0, 2.0))
            syllables = np.linspace(0, samples, 2 + samples // 2000)
            glide = pitch * np.interp(np.arange(samples), syllables, random.uniform(0.85, 1.2, len(syllables)))
            phase = 2.0 * np.pi * np.cumsum(glide) / RATE
            loudness = np.interp(np.arange(samples), syllables, random.uniform(0.0, 1.0, len(syllables)) ** 2)
            said.append((loudness * (envelope @ np.sin(harmonics[:, None] * phase))).astype(np.float32))
        voices[f"synthetic {speaker}"] = said
    return voices


def describe(voices: Voices) -> str:
    count = sum(map(len, voices.values()))
    minutes = sum(len(wave) for waves in voices.values() for wave in waves) / RATE / 60
    return f"{len(voices)} speakers, {count:,} utterances, {minutes:.0f} minutes"


# --- Mixtures of voices -----------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A line of a mixture list: two speakers, the number of an utterance of each, and the first one's gain in dB."""

    first: str
    first_utterance: int
    second: str
    second_utterance: int
    gain: float


def draw_pairs(sizes: Mapping[str, int], counts: Sequence[int], seed: int) -> dict[str, list[Pair]]:
    """The mixture lists of the three parts.

    Args:
        sizes: how many utterances each speaker has.
        counts: how many mixtures to draw for train, validation and test.
        seed: the lists depend on it and on nothing else.
    """
    random = np.random.default_rng(seed)
    shares = np.cumsum((0.0, *SHARES))
    pools: dict[str, dict[str, NDArray[np.int64]]] = {part: {} for part in PARTS}
    for speaker, size in sizes.items():
        order = random.permutation(size)
        for part, (start, end) in zip(PARTS, pairwise(np.rint(shares * size).astype(int)), strict=True):
            pools[part][speaker] = order[start:end]
    lists: dict[str, list[Pair]] = {part: [] for part in PARTS}
    for part, count in zip(PARTS, counts, strict=True):
        for _ in range(count):
            first, second = random.choice(list(sizes), 2, replace=False).tolist()
            utterances = [int(random.choice(pools[part][speaker])) for speaker in (first, second)]
            gain = float(random.uniform(-MOST_GAIN, MOST_GAIN))
            lists[part].append(Pair(first, utterances[0], second, utterances[1], gain))
    return lists


def mix(first: Waves, second: Waves, gain: float) -> Waves:
    """The two sources of a mixture, shape (2, samples): first up by `gain` dB, second down by as much."""
    samples = min(len(first), len(second))
    factors = 10.0 ** (np.array([gain, -gain]) / 20.0) / (level(first), level(second))
    sources = np.stack([first[:samples], second[:samples]]) * factors[:, None]
    peak = max(np.abs(sources).max(), np.abs(sources.sum(axis=0)).max())
    return (PEAK / peak * sources).astype(np.float32)


class MixedVoices(Sequence[Waves]):
    """Voices, mixed as a list says, each mixture when it is asked for."""

    def __init__(self, voices: Voices, pairs: Sequence[Pair]) -> None:
        self._voices, self._pairs = voices, pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Waves:
        pair = self._pairs[index]
        first = self._voices[pair.first][pair.first_utterance]
        return mix(first, self._voices[pair.second][pair.second_utterance], pair.gain)


# --- Recorded mixtures ------------------------------------------------------------------------------------------------

TREES = {"train": ("tr", "train*"), "validation": ("cv", "dev*"), "test": ("tt", "test*")}  # WSJ0-2mix, LibriMix


class RecordedSources(Sequence[Waves]):
    """Sources from the folders s1 and s2, files of the same name belonging together, each read when it is asked for."""

    def __init__(self, folders: Sequence[Path], most: int) -> None:
        files: list[tuple[Path, Path]] = []
        for folder in folders:
            names = []
            for source in ("s1", "s2"):
                if not (folder / source).is_dir():
                    raise CorpusError(f"{folder} has no folder {source}; a part of a corpus has s1 and s2, with WAVs.")
                names.append({path.name for path in (folder / source).glob("*.wav")})
            if names[0] != names[1] or not names[0]:
                odd = ", ".join(sorted(names[0] ^ names[1])[:3]) or "none"
                raise CorpusError(f"s1 and s2 in {folder} must hold WAVs of the same names; in one only: {odd}.")
            files += [(folder / "s1" / name, folder / "s2" / name) for name in sorted(names[0])]
        self._files = files[:most]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Waves:
        first, second = (read_wav(path) for path in self._files[index])
        samples = min(len(first), len(second))
        return np.stack([first[:samples], second[:samples]])


def read_tree(folder: Path, counts: Sequence[int]) -> dict[str, Sequence[Waves]]:
    """A tree like WSJ0-2mix's or LibriMix's: parts tr, cv and tt, or train-*, dev and test, each with s1 and s2.

    Raises:
        CorpusError: a part is missing, or has no s1 or s2.
    """
    parts: dict[str, Sequence[Waves]] = {}
    for (part, patterns), count in zip(TREES.items(), counts, strict=True):
        folders = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_dir())
        if not folders:
            raise CorpusError(f"There is no {' or '.join(patterns)} in {folder}; the corpus needs a part for {part}.")
        parts[part] = RecordedSources(folders, count)
    return parts


# --- Any corpus -------------------------------------------------------------------------------------------------------


def load(corpus: str, folder: Path, counts: Sequence[int], seed: int = 0) -> dict[str, Sequence[Waves]]:
    """Train, validation and test of a corpus.

    Args:
        corpus: "prompts", "folder" or "synthetic".
        folder: where the files are; synthetic voices need none.
        counts: how many mixtures of each part; of recorded ones the first, or as many as there are.
        seed: of the mixture lists.

    Raises:
        CorpusError: there is no usable speech in the folder.
    """
    if corpus == "folder":
        return read_tree(folder, counts)
    voices = read_prompts(folder) if corpus == "prompts" else make_voices()
    lists = draw_pairs({speaker: len(waves) for speaker, waves in voices.items()}, counts, seed)
    return {part: MixedVoices(voices, pairs) for part, pairs in lists.items()}

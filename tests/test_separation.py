"""bench.separation: the losses against slow evaluations of the paper's equations, corpora, training, tables."""

import json
import re
import sys
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import wavfile

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind what is installed; importing bench takes it out again

from bench.separation import corpora, curves, dynamics, evaluate, networks, table, train  # noqa: E402
from bench.separation.__main__ import main  # noqa: E402
from bench.separation.corpora import CorpusError, Pair  # noqa: E402
from bench.separation.losses import LOSSES, Targets  # noqa: E402
from bench.separation.networks import BINS, EMBEDDING, Network, Outputs  # noqa: E402
from bench.separation.train import Settings, Training  # noqa: E402

TINY = Settings(
    corpus="synthetic",
    network="small",
    train_mixtures=16,
    validation_mixtures=2,
    test_mixtures=2,
    frames=24,
    batch=4,
    epochs=10,
)
TINY_OPTIONS = [
    word
    for name, value in vars(TINY).items()
    if value != getattr(Settings, name)
    for word in (f"--{name.replace('_', '-')}", str(value))
]
every_loss = pytest.mark.parametrize("loss", LOSSES)


def write_wav(path, wave, rate=8000):
    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, wave)
    return path


def tone(seconds=0.5, rate=8000, hertz=440.0):
    return (8000 * np.sin(2 * np.pi * hertz / rate * np.arange(int(seconds * rate)))).astype(np.int16)


# --- Losses -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def case():
    """Random waves and random outputs for them, few enough points for a matrix of points by points."""
    generator = torch.Generator().manual_seed(0)
    targets = Targets.of(torch.randn(3, 2, 256, generator=generator) * torch.tensor([[[1.0], [0.5]]]))
    batch, frames, _ = targets.mixture.shape
    embeddings = torch.rand(batch, frames * BINS, EMBEDDING, generator=generator)
    masks = torch.rand(batch, 2, frames, BINS, generator=generator)
    return Outputs(torch.nn.functional.normalize(embeddings, dim=-1), masks), targets


def slow_parts(outputs, targets, example):
    """Embeddings, assignments and weights of one example, in float64, point by point."""
    first, second = targets.sources[example].abs().double().numpy()
    mixture = targets.mixture[example].abs().double().numpy()
    points = [(frame, point) for frame in range(len(mixture)) for point in range(BINS)]
    louder = np.array([[float(first[at] >= second[at]), float(first[at] < second[at])] for at in points])
    weights = np.array([mixture[at] for at in points])
    return outputs.embeddings[example].double().numpy(), louder, weights / weights.sum()


def slow_dc(outputs, targets, example):
    v, y, w = slow_parts(outputs, targets, example)
    return np.linalg.norm(np.sqrt(np.outer(w, w)) * (v @ v.T - y @ y.T), "fro") ** 2


def slow_wkm(outputs, targets, example):
    v, y, w = slow_parts(outputs, targets, example)
    v, y = np.sqrt(w)[:, None] * v, np.sqrt(w)[:, None] * y
    return EMBEDDING - np.trace(np.linalg.inv(v.T @ v) @ v.T @ y @ np.linalg.inv(y.T @ y) @ y.T @ v)


def slow_mi(outputs, targets, example):
    mixture, sources = targets.mixture[example].numpy(), targets.sources[example].numpy()
    estimate = outputs.masks[example].numpy() * np.abs(mixture)
    wanted = np.clip(np.abs(sources) * np.cos(np.angle(mixture) - np.angle(sources)), 0.0, np.abs(mixture))
    return min(np.abs(estimate - wanted[list(order)]).mean() for order in permutations(range(2)))


def slow_chimera(outputs, targets, example):
    return 0.75 * slow_mi(outputs, targets, example) + 0.25 * slow_wkm(outputs, targets, example)


def slow_snr(outputs, targets, example):
    waves = targets.waves[example].double().numpy()
    masked = outputs.masks[example] * targets.mixture[example]
    estimates = networks.istft(masked, waves.shape[-1]).double().numpy()

    def snr(source, estimate):
        return 10 * np.log10((source @ source) / ((source - estimate) @ (source - estimate)))

    return min(-np.mean([snr(waves[a], estimates[b]) for a, b in enumerate(order)]) for order in permutations(range(2)))


SLOW = {"dc": slow_dc, "wkm": slow_wkm, "mi": slow_mi, "chimera": slow_chimera, "snr": slow_snr}


@every_loss
def test_loss_is_the_equation_of_the_paper(loss, case):
    expected = np.mean([SLOW[loss](*case, example) for example in range(3)])
    assert LOSSES[loss].function(*case).item() == pytest.approx(expected, rel=1e-3 if loss == "wkm" else 1e-4)


@every_loss
def test_loss_does_not_know_the_order_of_the_sources(loss, case):
    outputs, targets = case
    swapped = Targets.of(targets.waves.flip(1))
    function = LOSSES[loss].function
    assert function(outputs, swapped).item() == pytest.approx(function(outputs, targets).item(), rel=1e-5)
    if LOSSES[loss].masks:  # the permutation is chosen for each mixture by itself
        mixed = Targets.of(torch.cat([targets.waves[:1].flip(1), targets.waves[1:]]))
        assert function(outputs, mixed).item() == pytest.approx(function(outputs, targets).item(), rel=1e-5)


def test_losses_have_their_ranges(case):
    outputs, targets = case
    assert 0.0 < LOSSES["dc"].function(outputs, targets) < 1.0
    assert EMBEDDING - 2 < LOSSES["wkm"].function(outputs, targets) < EMBEDDING
    perfect = Outputs(torch.nn.functional.pad(targets.assignments(), (0, EMBEDDING - 2)), outputs.masks)
    assert LOSSES["dc"].function(perfect, targets).item() == pytest.approx(0.0, abs=1e-6)
    assert LOSSES["wkm"].function(perfect, targets).item() == pytest.approx(EMBEDDING - 2, abs=1e-4)
    # Half the sound: half of (4); (5), (6) and (8) do not care.
    quiet = Targets.of(targets.waves / 2)
    for loss, factor in (("dc", 1.0), ("wkm", 1.0), ("mi", 0.5), ("snr", 1.0)):
        function = LOSSES[loss].function
        assert function(outputs, quiet).item() == pytest.approx(factor * function(outputs, targets).item(), rel=1e-4)


@every_loss
@pytest.mark.parametrize("silent", [[0], [1], [0, 1]])
def test_loss_of_silence_is_finite(loss, silent):
    waves = torch.randn(2, 2, 640, generator=torch.Generator().manual_seed(0))
    waves[0, silent] = 0.0
    function, embeddings, masks, _ = LOSSES[loss]
    torch.manual_seed(0)
    network = Network(1, 4, embeddings=embeddings, masks=masks)
    targets = Targets.of(waves)
    value = function(network(targets.mixture), targets)
    value.backward()
    assert value.isfinite()
    assert all(param.grad.isfinite().all() for param in network.parameters())


# --- Networks ---------------------------------------------------------------------------------------------------------


def test_stft_has_the_frames_and_the_scale_of_the_paper():
    assert (networks.WINDOW, networks.HOP) == (0.032 * corpora.RATE, 0.008 * corpora.RATE)
    assert networks.samples_of(400) == 25_536
    wave = 0.6 * torch.cos(2 * torch.pi * 500 / 8000 * torch.arange(25_536))
    spectrum = networks.stft(wave)
    assert spectrum.shape == (400, BINS)
    assert spectrum[200].abs().max().item() == pytest.approx(0.3, rel=1e-3)  # half the amplitude: half is at -500 Hz


def test_istft_is_the_inverse_of_stft():
    waves = torch.randn(2, 3, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(networks.istft(networks.stft(waves), 1000), waves, atol=1e-5)


@every_loss
def test_network_gives_what_its_loss_needs(loss):
    _, embeddings, masks, _ = LOSSES[loss]
    outputs = Network(2, 8, embeddings=embeddings, masks=masks)(torch.randn(3, 10, BINS) + 0j)
    assert (outputs.embeddings is not None, outputs.masks is not None) == (embeddings, masks)
    if embeddings:
        assert outputs.embeddings.shape == (3, 10 * BINS, EMBEDDING)
        assert torch.allclose(outputs.embeddings.norm(dim=-1), torch.ones(3, 10 * BINS))
    if masks:
        assert outputs.masks.shape == (3, 2, 10, BINS)
        assert 0.0 < outputs.masks.min() < outputs.masks.max() < 1.0


def test_networks_have_the_sizes_that_the_page_says():
    for name, (layers, hidden) in {"paper": (4, 600), "figure": (2, 300), "medium": (2, 128), "small": (2, 64)}.items():
        assert networks.SIZES[name] == (layers, hidden)
        with torch.device("meta"):
            network = Network(layers, hidden, embeddings=True, masks=True)
        assert network.blstm.bidirectional
        assert network.embeddings.out_features == 20 * 129
        assert network.masks.out_features == 2 * 129


# --- Evaluation -------------------------------------------------------------------------------------------------------


def test_si_sdr_is_that_of_torchmetrics():
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

    random = np.random.default_rng(0)
    for noise in (0.01, 0.3, 2.0):
        source = random.normal(size=1000)
        estimate = 0.7 * source + noise * random.normal(size=1000) + 0.1
        expected = scale_invariant_signal_distortion_ratio(torch.tensor(estimate), torch.tensor(source)).item()
        assert evaluate.si_sdr(estimate, source) == pytest.approx(expected, abs=1e-4)


class Oracle(torch.nn.Module):
    """Says what it was told, whatever it hears."""

    def __init__(self, outputs):
        super().__init__()
        self.outputs = outputs

    def forward(self, mixture):
        return self.outputs


@pytest.mark.parametrize("by", ["masks", "embeddings"])
def test_separation_by_true_assignments_succeeds(by):
    sources = corpora.load("synthetic", None, (1, 0, 0))["train"][0]
    targets = Targets.of(torch.from_numpy(sources).unsqueeze(0))
    assignments = targets.assignments()
    masks = assignments.transpose(1, 2).view(1, 2, -1, BINS).flip(1)  # the other order: evaluation finds it
    oracle = Oracle(Outputs(None, masks) if by == "masks" else Outputs(assignments, None))
    assert evaluate.evaluate(oracle, [sources], "cpu") > 8.0


def test_evaluation_leaves_silent_sources_out(capsys):
    sources = corpora.load("synthetic", None, (1, 0, 0))["train"][0]
    masks = torch.rand(1, 2, 1 + sources.shape[1] // networks.HOP, BINS)
    oracle = Oracle(Outputs(None, masks))
    one = evaluate.evaluate(oracle, [sources], "cpu")
    assert evaluate.evaluate(oracle, [sources, sources * [[0.0], [1.0]]], "cpu") == one
    assert "1 mixtures with a silent source" in capsys.readouterr().err


# --- Corpora ----------------------------------------------------------------------------------------------------------


def test_mixture_lists_are_known_from_the_seed_alone():
    sizes = {"a": 30, "b": 10, "c": 20}
    lists = corpora.draw_pairs(sizes, (200, 30, 30), seed=1)
    assert lists == corpora.draw_pairs(dict(sizes), (200, 30, 30), seed=1)
    assert lists != corpora.draw_pairs(sizes, (200, 30, 30), seed=2)
    assert [len(lists[part]) for part in corpora.PARTS] == [200, 30, 30]
    used = []
    for pairs in lists.values():
        assert all(pair.first != pair.second and -2.5 <= pair.gain <= 2.5 for pair in pairs)
        used.append({said for pair in pairs for said in (pair[:2], pair[2:4])})
    assert not used[0] & used[1] and not used[0] & used[2] and not used[1] & used[2]  # noqa: PT018
    assert max(pair.gain for pair in lists["train"]) > 2.0 and min(pair.gain for pair in lists["train"]) < -2.0  # noqa: PT018


def test_mixture_has_its_gain_and_its_peak():
    random = np.random.default_rng(0)
    voices = {"a": [random.normal(size=900).astype(np.float32)], "b": [random.normal(size=900).astype(np.float32) / 50]}
    (sources,) = corpora.MixedVoices(voices, [Pair("a", 0, "b", 0, 1.5)])
    assert (sources.dtype, sources.shape) == (np.float32, (2, 900))
    assert 20 * np.log10(corpora.level(sources[0]) / corpora.level(sources[1])) == pytest.approx(3.0, abs=1e-3)
    assert max(np.abs(sources).max(), np.abs(sources.sum(axis=0)).max()) == pytest.approx(0.9)
    assert corpora.mix(voices["a"][0][:100], voices["b"][0], 0.0).shape == (2, 100)


def test_segment_is_a_random_part_or_padded():
    sources = np.arange(1.0, 21.0, dtype=np.float32).reshape(2, 10)
    offsets = {int(train.segment(sources, 4, np.random.default_rng(seed))[0, 0]) for seed in range(60)}
    assert offsets == {1, 2, 3, 4, 5, 6, 7}
    padded = train.segment(sources, 13, np.random.default_rng(0))
    assert np.array_equal(padded[:, :10], sources)
    assert np.array_equal(padded[:, 10:], np.zeros((2, 3)))


def make_prompts(folder):
    for name in corpora.SPEAKERS:
        sounds = folder / "usr/share/asterisk/sounds" / name
        for number in range(10):
            pause = np.full(4000, 20, np.int16)
            write_wav(sounds / f"vm-{number}.wav", np.concatenate([pause, tone(1.5), pause]))
        write_wav(sounds / "silence/1.wav", np.zeros(16_000, np.int16))
        write_wav(sounds / "is.wav", np.zeros(0, np.int16))
        write_wav(sounds / "beep.wav", tone(0.4))
        write_wav(sounds / "tt-monkeys.wav", tone(2.0))


def test_prompts_are_speech_of_five_speakers(tmp_path, capsys):
    make_prompts(tmp_path)
    voices = corpora.read_prompts(tmp_path)
    assert {speaker: len(waves) for speaker, waves in voices.items()} == {
        "Allison": 20,
        **dict.fromkeys(["June", "Menardi", "Carlo", "IvrvoiceRU"], 10),
    }
    assert "12 silent files left out" in capsys.readouterr().err
    parts = corpora.load("prompts", tmp_path, (5, 2, 1))
    assert [len(parts[part]) for part in corpora.PARTS] == [5, 2, 1]
    assert parts["test"][0].shape == (2, 12_000 - 1)  # the tone begins with a zero


def test_missing_package_is_named_with_the_command_that_gets_it(tmp_path):
    make_prompts(tmp_path)
    (tmp_path / "usr/share/asterisk/sounds/fr_CA_f_June").rename(tmp_path / "elsewhere")
    with pytest.raises(CorpusError, match=r"no voices fr_CA_f_June in .*(?s:.)*apt-get download .*-core-sounds-fr-wav"):
        corpora.read_prompts(tmp_path)


@pytest.mark.parametrize("names", [("tr", "cv", "tt"), ("train-100", "dev", "test")])
def test_folder_of_recorded_mixtures_is_read(names, tmp_path):
    for number, name in enumerate(names, 1):
        for index in range(number):
            for source in ("mix", "s1", "s2"):
                write_wav(tmp_path / name / source / f"{index}.wav", tone(0.1 * number, hertz=400.0 + index))
    parts = corpora.load("folder", tmp_path, (1, 5, 2))
    assert [len(parts[part]) for part in corpora.PARTS] == [1, 2, 2]
    assert parts["test"][1].shape == (2, 2400)
    assert parts["test"][1].max() == pytest.approx(8000 / 32768, rel=1e-2)


def test_folder_without_sources_is_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"no tr or train\*"):
        corpora.load("folder", tmp_path, (1, 1, 1))
    write_wav(tmp_path / "tr/s1/a.wav", tone())
    with pytest.raises(CorpusError, match="has no folder s2"):
        corpora.load("folder", tmp_path, (1, 1, 1))
    write_wav(tmp_path / "tr/s2/b.wav", tone())
    with pytest.raises(CorpusError, match=r"in one only: a.wav, b.wav"):
        corpora.load("folder", tmp_path, (1, 1, 1))


@pytest.mark.parametrize(
    ("wave", "expected"),
    [
        (np.array([0.5, -0.25], np.float32), [0.5, -0.25]),
        (np.array([16_384, -32_768], np.int16), [0.5, -1.0]),
        (np.array([2**30, -(2**31)], np.int32), [0.5, -1.0]),
        (np.array([192, 0], np.uint8), [0.5, -1.0]),
    ],
)
def test_wav_of_any_sample_type_is_read(wave, expected, tmp_path):
    assert corpora.read_wav(write_wav(tmp_path / "a.wav", wave)).tolist() == expected


def test_wav_at_another_rate_is_resampled_with_a_word(tmp_path):
    path = write_wav(tmp_path / "a.wav", tone(0.5, rate=16_000), rate=16_000)
    with pytest.warns(UserWarning, match="16000 Hz are resampled to 8000 Hz"):
        wave = corpora.read_wav(path)
    assert wave[500:3500] == pytest.approx(tone(0.5)[500:3500] / 32_768, abs=1e-3)


def test_wav_that_cannot_be_used_is_named(tmp_path):
    stereo = write_wav(tmp_path / "stereo.wav", np.zeros((10, 2), np.int16))
    with pytest.raises(CorpusError, match=r"stereo.wav has 2 channels"):
        corpora.read_wav(stereo)
    (tmp_path / "text.wav").write_text("no sound at all")
    with pytest.raises(CorpusError, match=r"text.wav cannot be read as WAV"):
        corpora.read_wav(tmp_path / "text.wav")


# --- Training ---------------------------------------------------------------------------------------------------------


@every_loss
def test_training_lowers_the_loss_and_clips_by_the_percentile_of_all_norms(loss):
    training = Training(TINY, loss, 10.0, 0)
    steps = [training.step(waves) for waves in training.batches()]
    assert len(steps) == TINY.epochs * training.steps_per_epoch == 40
    values = [step.loss_value for step in steps]
    assert np.mean(values[-8:]) < np.mean(values[:4])
    norms = [step.grad_norm for step in steps]
    for number, step in enumerate(steps, 1):
        assert step.clip_threshold == np.percentile(norms[:number], 10.0)
        assert step.clipped == (step.grad_norm > step.clip_threshold)
        assert 0.0 < step.clip_seconds < step.seconds
    assert any(step.clipped for step in steps)


def test_percentiles_of_a_seed_share_weights_and_batches():
    def start(percentile, seed):
        training = Training(TINY, "snr", percentile, seed)
        waves = next(training.batches())
        return waves, training.step(waves)

    (waves, step), (waves_never, step_never), (waves_other, step_other) = (
        start(10.0, 0),
        start(100.0, 0),
        start(10.0, 1),
    )
    assert torch.equal(waves, waves_never)
    assert (step.loss_value, step.grad_norm) == (step_never.loss_value, step_never.grad_norm)
    assert not torch.equal(waves, waves_other)
    assert step.loss_value != step_other.loss_value


def test_no_clipping_is_percentile_100():
    training = Training(TINY, "mi", 100.0, 0)
    assert not any(training.step(waves).clipped for waves in training.batches())


# --- Tables and pictures ----------------------------------------------------------------------------------------------


def test_table_has_its_most_useful_cells_first():
    cells = table.plan(["dc", "mi"], [0.0, 10.0, 100.0], 2)
    assert len(set(cells)) == len(cells) == 12
    assert cells[:4] == [("dc", 10.0, 0), ("mi", 10.0, 0), ("dc", 100.0, 0), ("mi", 100.0, 0)]
    assert {seed for _, _, seed in cells[:6]} == {0}
    assert cells[6][1:] == (10.0, 1)


def make_cell(loss, percentile, seed, si_sdr):
    numbers = {"steps": 10, "clipped_share": 0.5, "median_norm": 0.1, "final_threshold": 0.08}
    times = {"step_seconds": 0.1, "clip_share": 0.01, "seconds": 36.0}
    losses = {"train_loss": 0.4 if (percentile, seed) == (10.0, 1) else 0.5, "validation_loss": 0.6}
    return table.Cell(loss, percentile, seed, si_sdr, **losses, **numbers, **times, commit="abc")


def test_interrupted_table_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    trained = []

    def train_cell(settings, loss, percentile, seed, version):
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((loss, percentile, seed))
        return make_cell(loss, percentile, seed, 5.0 + seed)

    monkeypatch.setattr(table, "train_cell", train_cell)
    arguments = [
        "table",
        *TINY_OPTIONS,
        "--output",
        str(tmp_path),
        "--losses",
        "mi",
        "snr",
        "--percentiles",
        "10",
        "100",
    ]
    with pytest.raises(SystemExit, match="goes on"):
        main(arguments)
    finished = table.read_cells(tmp_path / "separation.csv")
    assert [cell[:3] for cell in finished] == sorted(trained) and len(finished) == 3  # noqa: PT018
    assert (tmp_path / "separation.md").exists()

    before, trained = trained, []
    main(arguments)
    assert len(trained) == 1 and not set(trained) & set(before)  # noqa: PT018
    trained = []
    main([*arguments, "--seeds", "2", "--losses", "mi"])
    assert trained == [("mi", 10.0, 1), ("mi", 100.0, 1)]
    assert len(table.read_cells(tmp_path / "separation.csv")) == 6
    assert (tmp_path / "separation.png").read_bytes().startswith(b"\x89PNG")
    assert "0 minutes left" in capsys.readouterr().err

    with pytest.raises(SystemExit, match=r"other settings .epochs was 10"):
        main([*arguments, "--epochs", "3"])


def test_curves_are_those_of_whole_trainings_and_go_on_where_they_were(tmp_path, monkeypatch):
    arguments = ["curves", *TINY_OPTIONS, "--losses", "mi", "--every", "4", "--output", str(tmp_path)]
    main(arguments)
    path = tmp_path / "separation_curves.csv"
    points = table.read_rows(curves.Point, path)
    assert [point[:4] for point in points] == [("mi", p, 0, step) for p in (10.0, 100.0) for step in (16, 32)]
    training = Training(TINY, "mi", 10.0, 0)
    steps = [training.step(waves) for waves, _ in zip(training.batches(), range(32), strict=False)]
    assert points[1].train_loss == pytest.approx(np.mean([step.loss_value for step in steps[16:]]), rel=1e-5)
    assert points[1].validation_loss == pytest.approx(training.validate(), rel=1e-5)
    si_sdr = evaluate.evaluate(training.network, TINY.mixtures()["test"], "cpu")
    assert points[1].si_sdr == pytest.approx(si_sdr, rel=1e-5)
    assert training.network.training

    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))  # p = 100 came half way
    page = (tmp_path / "separation_curves.md").read_text("utf-8")
    trained = []
    follow = curves.follow
    monkeypatch.setattr(curves, "follow", lambda *call: trained.append(call[1:4]) or follow(*call))
    main(arguments)
    assert trained == [("mi", 100.0, 0)]
    assert sorted(table.read_rows(curves.Point, path)) == sorted(points)
    assert (tmp_path / "separation_curves.md").read_text("utf-8") == page
    assert (tmp_path / "separation_curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match=r"other settings .batch was 4"):
        main([*arguments, "--batch", "8"])


def test_page_of_curves_compares_seeds_that_both_have():
    points = [
        curves.Point("snr", percentile, seed, step, step / 10 + seed + (percentile == 10.0), -1.0 - seed, -2.0)
        for percentile in (10.0, 100.0)
        for seed in (0, 1)
        for step in (10, 20, 30)
        if (percentile, seed, step) != (100.0, 1, 30)
    ]
    page = curves.report(points, 30, TINY, {"CPU": "some"})
    rows = [line for line in page.splitlines() if re.match(r"\| [0-9]+ \|", line)]
    assert rows == [
        "| 10 | 2.50 ± 0.71 | 1.50 ± 0.71 | +1.00, +1.00 | -1.5 | -1.5 |",
        "| 20 | 3.50 ± 0.71 | 2.50 ± 0.71 | +1.00, +1.00 | -1.5 | -1.5 |",
    ]
    assert "10.4 against 8.3 dB with SNR" in page
    assert "By percentile" not in page


def test_page_of_curves_has_all_percentiles_at_the_step_that_all_have():
    points = [
        curves.Point("mi", percentile, seed, step, percentile + step / 10, step / 100, 0.0)
        for percentile, seed, steps in ((10.0, 0, 30), (10.0, 1, 30), (100.0, 0, 30), (50.0, 0, 20))
        for step in range(10, steps + 1, 10)
    ]
    page = curves.report(points, 30, TINY, {"CPU": "some"})
    _, found = page.split("### By percentile, after 20 steps, seeds: 1\n\n")
    assert found.splitlines()[2:6] == ["| 10 | 12.00 | 0.2 |", "| 50 | 52.00 | 0.2 |", "| 100 | 102.00 | 0.2 |", ""]


def test_table_stands_beside_the_paper():
    cells = [
        make_cell("mi", percentile, seed, percentile / 50 + seed) for percentile in (10.0, 100.0) for seed in (0, 1)
    ]
    page = table.report([*cells, make_cell("dc", 0.0, 0, 3.456)], TINY, {"CPU": "some"})
    rows = {
        line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ") for line in page.splitlines() if line[:1] == "|"
    }
    assert rows["10"][5:7] == ["0.70 ± 0.71", "10.2"]
    assert rows["100"][1:7] == ["-", "10.2", "-", "10.8", "2.50 ± 0.71", "8.5"]
    assert "| 0 | 3.46 | 10.7 |" in page
    assert "| MI | -1.80 ± 0.00 | 1.7 | -1.80, -1.80 | 1 of 2 | 0 of 2 |" in page


def test_cell_is_trained_and_survives_its_csv(tmp_path):
    cell = table.train_cell(TINY, "chimera", 50.0, 3, "abc")
    assert (cell.loss, cell.percentile, cell.seed, cell.steps, cell.commit) == ("chimera", 50.0, 3, 40, "abc")
    assert -20.0 < cell.si_sdr < 30.0
    assert 0.0 < cell.clipped_share < 1.0
    table.write_cells(tmp_path / "cells.csv", [cell])
    (read,) = table.read_cells(tmp_path / "cells.csv")
    assert [type(value) for value in read] == [type(value) for value in cell]
    assert read.si_sdr == pytest.approx(cell.si_sdr, rel=1e-5)


def test_jobs_find_the_program_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
        monkeypatch.setenv(name, "1")  # so that it is put back
    assert set(train.run_all(networks.samples_of, [(400,), (2,)], jobs=2)) == {25_536, 64}


def test_dynamics_are_measured_and_do_not_disturb(tmp_path):
    run = dynamics.record_run(TINY, "mi", 10.0, 0)
    plain = Training(TINY, "mi", 10.0, 0)
    taken = []
    for waves in plain.batches():
        parameters = [param.detach().clone() for param in plain.network.parameters()]
        gradient = plain.gradient(waves)
        taken.append(plain.step(waves))
        if len(taken) == 21:
            squares = [(a - b).square().sum() for a, b in zip(plain.network.parameters(), parameters, strict=True)]
            step_size = sum(squares).sqrt().item()
            change = (plain.gradient(waves) - gradient).norm().item()
            expected = (step_size, change / step_size)
            assert gradient.norm().item() == pytest.approx(taken[-1].grad_norm, rel=1e-4)
    assert [record.step for record in run.records] == [0, 20]
    assert [record.loss_value for record in run.records] == [taken[0].loss_value, taken[20].loss_value]
    assert (run.records[1].step_size, run.records[1].smoothness) == pytest.approx(expected, rel=1e-4)

    main(["dynamics", *TINY_OPTIONS, "--output", str(tmp_path)])
    assert (tmp_path / "separation_dynamics.png").read_bytes().startswith(b"\x89PNG")
    assert "loss_value" in (tmp_path / "separation_dynamics.csv").read_text()
    assert "| SI-SDR on the test set, dB |" in (tmp_path / "separation_dynamics.md").read_text()


def test_one_network_is_trained_and_replayed(tmp_path, capsys):
    main(["one", *TINY_OPTIONS, "--loss", "snr", "--percentile", "25", "--output", str(tmp_path)])
    printed = capsys.readouterr()
    assert re.search(r"^si_sdr +-?\d", printed.out, re.MULTILINE)
    assert "epoch 10 of 10" in printed.err
    from autoclip_core.__main__ import main as autoclip

    autoclip(["replay", str(tmp_path / "snr-p25-seed0.csv")])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--corpus", "prompts", "--folder", "absent"], "apt-get download"),
        (["--corpus", "folder", "--folder", "absent"], "There is no tr or train"),
        (["--percentile", "101"], "not from 0 to 100"),
        (["--batch", "0"], "not above 0"),
        (["--loss", "sisdr"], "invalid choice"),
    ],
)
def test_command_refuses_what_it_cannot_use(arguments, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["one", "--output", "out", *arguments])
    assert says in f"{stopped.value}{capsys.readouterr().err}"


@pytest.mark.parametrize("folder", ["separation", "separation_cost", "separation_long"])
def test_committed_page_is_what_its_cells_and_settings_give(folder):
    results = ROOT / "bench/results" / folder
    begun = json.loads((results / "separation.json").read_text("utf-8"))
    cells = table.read_cells(results / "separation.csv")
    page = table.report(cells, Settings(**begun["settings"]), begun["machine"])
    assert page == (results / "separation.md").read_text("utf-8")


@pytest.mark.parametrize("folder", ["separation_curves", "separation_curves_long"])
def test_committed_curves_are_what_their_points_give(folder):
    results = ROOT / "bench/results" / folder
    begun = json.loads((results / "separation_curves.json").read_text("utf-8"))
    points = table.read_rows(curves.Point, results / "separation_curves.csv")
    page = curves.report(points, 32 * 625, Settings(**begun["settings"]), begun["machine"])
    assert page == (results / "separation_curves.md").read_text("utf-8")

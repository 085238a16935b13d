"""The JAX demo, with few steps: its rows are there, and AutoClip does the same at every scale of the loss."""

import sys

import pytest
from autoclip_jax import demo

STEPS = 200  # in every test, so that each way to clip is compiled once


def test_demo_prints_a_row_per_run(capsys):
    demo.main(["--steps", str(STEPS)])
    rate, clean, _, header, *rows, _, sentence = capsys.readouterr().out.splitlines()
    assert rate.startswith("Learning rate ")
    assert "clean batches" in clean
    assert header.split()[0] == "clipping"
    assert [row.rsplit(maxsplit=4)[:2] for row in rows] == [
        [arm, f"{scale:g}"] for arm in demo.ARMS for scale in demo.LOSS_SCALES
    ]
    assert sentence.endswith(" 2.303.")


def test_demo_shows_that_autoclip_does_not_care_about_the_unit_of_the_loss():
    data = demo.read_digits()

    def train(arm, scale):
        return demo.train(arm, scale, data, STEPS, learning_rate=0.1)

    runs = [train("AutoClip p=10", scale) for scale in demo.LOSS_SCALES]
    for run in runs:
        assert run.test < 1.0
        assert run.clipped_share == pytest.approx(runs[1].clipped_share, abs=0.05)
        assert run.threshold == pytest.approx(runs[1].threshold * run.loss_scale, rel=0.2)
    fixed = [train("fixed threshold 1", scale).clipped_share for scale in demo.LOSS_SCALES]
    assert fixed[0] < 0.1  # the spoiled batches
    assert fixed[2] == 1.0


def test_demo_spoils_the_training_without_clipping_alone():
    data = demo.read_digits()
    clean, spoiled, clipped = (
        demo.train(arm, 1.0, data, STEPS, learning_rate=0.1, spoiled_share=share).test
        for arm, share in (("no clipping", 0.0), ("no clipping", 0.01), ("AutoClip p=90", 0.01))
    )
    assert clean < 0.3
    assert clipped < 0.3
    assert not spoiled < 1.0  # or NaN


def test_demo_judges_on_digits_it_was_not_trained_on():
    parts = [[picture.tobytes() for picture in digits.pictures.__array__()] for digits in demo.read_digits()]
    assert list(map(len, parts)) == [1200, 300, 297]
    training, validation, test = map(set, parts)
    assert len(test & (training | validation)) < 5
    assert len(validation & training) < 5


@pytest.mark.parametrize("steps", ["0", "many"])
def test_demo_refuses_what_is_no_number_of_steps(steps, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--steps", steps])
    assert "--steps" in capsys.readouterr().err


def test_demo_names_the_extra_that_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(SystemExit):
        demo.main([])
    assert 'pip install "autoclip-core[demo]"' in capsys.readouterr().err

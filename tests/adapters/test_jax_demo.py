"""The JAX demo, with very few steps: its rows are there, and AutoClip does the same at every scale of the loss."""

import sys

import pytest
from autoclip_jax import demo


def test_demo_prints_a_row_per_run(capsys):
    demo.main(["--steps", "60"])
    header, *rows, _, sentence = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "clipping"
    assert [row.rsplit(maxsplit=4)[:2] for row in rows] == [
        [arm, f"{scale:g}"] for arm in demo.ARMS for scale in demo.LOSS_SCALES
    ]
    assert sentence.startswith("AutoClip's threshold")


def test_demo_shows_that_autoclip_does_not_care_about_the_unit_of_the_loss():
    digits = demo.load_digits()
    runs = [demo.train("AutoClip p=10", scale, digits, 200) for scale in demo.LOSS_SCALES]
    for run in runs:
        assert run.accuracy > 0.8
        assert run.clipped_share == pytest.approx(runs[1].clipped_share, abs=0.05)
        assert run.threshold == pytest.approx(runs[1].threshold * run.loss_scale, rel=0.2)
    fixed = [demo.train("fixed threshold 1", scale, digits, 50).clipped_share for scale in demo.LOSS_SCALES]
    assert fixed[0] == 0.0
    assert fixed[2] == 1.0


def test_demo_judges_on_digits_it_was_not_trained_on():
    digits = demo.load_digits()
    assert len(digits.labels) + len(digits.unseen_labels) == 1797
    seen = {picture.tobytes() for picture in digits.pictures.__array__()}
    assert sum(picture.tobytes() in seen for picture in digits.unseen.__array__()) < 5


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

"""torchao: `attach`, to each of its low-bit optimizers."""

from autoclip_torch import attach
from checks import HALF, PERCENTILE, STEPS, Trained
from harness import backward, has_low_bits, make_wide_model, play, steps_of
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8


def train_with(kind, **options):
    def train(folder, *, resume):
        model = make_wide_model()
        optimizer = kind(model.parameters(), lr=0.001, **options)
        # page
        clip = attach(optimizer, PERCENTILE)
        # end of page
        kept = {"model": model, "optimizer": optimizer, "clip": clip}
        for step in steps_of(folder, kept, resume=resume):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
        assert has_low_bits(optimizer)
        return Trained(STEPS - HALF * resume, list(model.parameters()), clip.log())

    return train


if __name__ == "__main__":
    for kind in (AdamW8bit, AdamW4bit, AdamWFp8):
        play("torchao", train_with(kind), kind.__name__)

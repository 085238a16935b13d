"""keras-hub: `AutoClipOptimizer` in `compile`, as with any model of Keras."""

import keras
import keras_hub
import numpy as np
from autoclip_tensorflow import AutoClipLogger, AutoClipOptimizer
from checks import HALF, PERCENTILE, STEPS, Trained
from harness import SIZE, fit, make_sgd, play, watch

BACKENDS = ["tensorflow", "jax", "torch"]
WORDS, LENGTH = 16, 6


def half(number):
    random = np.random.default_rng(number)
    words = random.integers(1, WORDS, size=(SIZE * HALF, LENGTH))
    inputs = {
        "token_ids": words.astype("int32"),
        "segment_ids": np.zeros_like(words, "int32"),
        "padding_mask": np.ones_like(words, "int32"),
    }
    return inputs, (words[:, 0] > WORDS // 2).astype("int32")


def make_classifier(*, lora):
    keras.utils.set_random_seed(0)
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16, "max_sequence_length": LENGTH}
    backbone = keras_hub.models.BertBackbone(vocabulary_size=WORDS, dropout=0.0, **sizes)
    if lora:
        backbone.enable_lora(2)
    return keras_hub.models.BertTextClassifier(backbone, num_classes=2, preprocessor=None, dropout=0.0)


def train_with(**options):
    def train(folder, *, resume):
        classifier, optimizer = make_classifier(**options), make_sgd()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        # page
        classifier.compile(AutoClipOptimizer(optimizer, PERCENTILE), loss=loss)
        classifier.optimizer.build(classifier.trainable_variables)
        # end of page
        if resume:
            classifier.load_weights(folder / "half.weights.h5")
        else:
            fit(classifier, half(0))
            classifier.save_weights(folder / "half.weights.h5")
            watch.mark()
        found = fit(classifier, half(1), AutoClipLogger())
        logged = {name: numbers[-1] for name, numbers in found.history.items()}
        return Trained(STEPS - HALF * resume, classifier.get_weights(), logged)

    return train


if __name__ == "__main__":
    play("keras-hub", train_with(lora=False), "BERT")
    # Keras adds LoRA's matrices to the kernels that it saves, so other weights go on, with and without AutoClip.
    play("keras-hub", train_with(lora=True), "BERT with LoRA", replays=False)

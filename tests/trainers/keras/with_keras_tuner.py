"""keras-tuner: `AutoClipOptimizer` in the function that builds a model; the percentile may be searched as well."""

import sys

import keras_tuner
from autoclip_tensorflow import AutoClipOptimizer
from checks import HALF, Trained
from harness import SIZE, half, make_model, make_sgd, play, watch

BACKENDS = ["tensorflow", "jax", "torch"]
TRIALS = 2


def build(hyper):
    model, optimizer = make_model(), make_sgd()
    model.layers[0].trainable = hyper.Choice("trainable", [True, False])
    # page
    percentile = hyper.Choice("percentile", [30.0])  # or several
    model.compile(AutoClipOptimizer(optimizer, percentile), loss="mse")
    # end of page
    return model


def train(folder, *, resume):
    tuner = keras_tuner.GridSearch(build, keras_tuner.Objective("loss", "min"), directory=folder, project_name="search")
    watch.data = half(0)
    options = {"epochs": 1, "batch_size": SIZE, "shuffle": False, "verbose": 0}
    tuner.search(*half(0), callbacks=[watch], **options)
    assert len(watch.streams) == TRIALS, "each trial has a history"
    return Trained(HALF * TRIALS, [])


if __name__ == "__main__":
    if sys.argv[1] == "train":  # it goes on with the next trial, which has no history yet
        play("keras-tuner", train)

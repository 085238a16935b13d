"""Keras: `AutoClipOptimizer` around the optimizer, and `AutoClipLogger()`; the history is in all that Keras saves."""

import keras
from autoclip_tensorflow import AutoClipLogger, AutoClipOptimizer
from checks import HALF, PERCENTILE, STEPS, Trained
from harness import fit, half, make_model, make_sgd, play

BACKENDS = ["tensorflow", "jax", "torch"]


def make_compiled(**options):
    model, optimizer = make_model(), make_sgd()
    # page
    model.compile(AutoClipOptimizer(optimizer, PERCENTILE, **options), loss="mse")
    callbacks = [AutoClipLogger()]
    # end of page
    return model, callbacks


def train(folder, *, resume, **options):
    model, callbacks = make_compiled(**options)
    if resume:
        model = keras.models.load_model(folder / "half.keras")
    else:
        fit(model, half(0))
        model.save(folder / "half.keras")
    found = fit(model, half(1), *callbacks)
    updates = (STEPS - HALF * resume) // options.get("gradient_accumulation_steps", 1)
    return Trained(updates, model.get_weights(), {name: numbers[-1] for name, numbers in found.history.items()})


def train_accumulated(folder, *, resume):
    return train(folder, resume=resume, gradient_accumulation_steps=2)


class Interruption(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            raise KeyboardInterrupt


def train_backed_up(folder, *, resume):
    """Interrupted in the first process, after the run that it is compared with."""
    backup = keras.callbacks.BackupAndRestore(folder / "backup")
    if not resume:
        model, _ = make_compiled()
        try:
            model.fit(*half(0), epochs=2, batch_size=8, shuffle=False, verbose=0, callbacks=[backup, Interruption()])
        except KeyboardInterrupt:
            backup = None
        assert backup is None, "not interrupted"
    model, callbacks = make_compiled()
    found = fit(model, half(0), *callbacks, *([backup] if resume else []), epochs=2)
    logged = {name: numbers[-1] for name, numbers in found.history.items()}
    return Trained(STEPS - HALF * resume, model.get_weights(), logged)


if __name__ == "__main__":
    play("keras", train, "its files")
    play("keras", train_backed_up, "BackupAndRestore")
    play("keras", train_accumulated, "accumulation")

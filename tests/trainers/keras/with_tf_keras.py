"""tf-keras: `AutoClip` in a class of an optimizer of Keras 2, and in `tf.train.Checkpoint`."""

import tensorflow as tf
import tf_keras
from autoclip_tensorflow import AutoClip
from checks import HALF, PERCENTILE, STEPS, Trained
from harness import MOMENTUM, RATE, SIZE, half, play, watch

BACKENDS = ["tensorflow"]


# page
class ClippedSGD(tf_keras.optimizers.SGD):
    def apply_gradients(self, grads_and_vars, **options):
        grads, variables = zip(*grads_and_vars, strict=True)
        return super().apply_gradients(zip(self.clip(grads), variables, strict=True), **options)


# end of page


class Eyes(tf_keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        at = slice(SIZE * batch, SIZE * (batch + 1))
        optimizer = self.model.optimizer
        watch.begin(self.model, watch.data[0][at], tf.constant(watch.data[1][at]), optimizer.clip, optimizer)

    def on_train_batch_end(self, batch, logs=None):
        optimizer = self.model.optimizer
        watch.end(optimizer.clip, optimizer)


def fit(model, number):
    watch.data = half(number)
    model.fit(*watch.data, batch_size=SIZE, shuffle=False, verbose=0, callbacks=[Eyes()])


def train(folder, *, resume):
    tf_keras.utils.set_random_seed(0)
    layers = [tf_keras.layers.Dense(3, "tanh", input_shape=(4,)), tf_keras.layers.Dense(1)]
    model = tf_keras.Sequential(layers)
    # page
    optimizer = ClippedSGD(RATE, momentum=MOMENTUM)
    optimizer.clip = AutoClip(PERCENTILE)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    # end of page
    model.compile(optimizer, loss="mse")
    optimizer.build(model.trainable_variables)  # so that its velocities can be seen before the first step
    if resume:
        checkpoint.restore(str(folder / "half-1"))
    else:
        fit(model, 0)
        checkpoint.save(str(folder / "half"))
    fit(model, 1)
    return Trained(STEPS - HALF * resume, model.get_weights(), optimizer.clip.metrics())


if __name__ == "__main__":
    play("tf-keras", train)

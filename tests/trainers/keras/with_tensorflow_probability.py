"""tensorflow-probability: the class of an optimizer of tf-keras, given to `tfp.math.minimize` or `tfp.vi`."""

import tensorflow as tf
import tensorflow_probability as tfp
from autoclip_tensorflow import AutoClip
from checks import HALF, PERCENTILE, STEPS, Trained
from harness import MOMENTUM, RATE, SIZE, examples, play, watch
from with_tf_keras import ClippedSGD

BACKENDS = ["tensorflow"]


class Regression(tf.Module):
    def __init__(self):
        super().__init__()
        self.weights, self.scale = tf.Variable(tf.ones((4, 1))), tf.Variable(1.0)

    def __call__(self, inputs):
        return tfp.distributions.Normal(inputs @ self.weights, tf.exp(self.scale))

    def compute_loss(self, inputs, targets, predicted):
        return -tf.reduce_mean(predicted.log_prob(targets))


def train(folder, *, resume):
    model = Regression()
    # page
    optimizer = ClippedSGD(RATE, momentum=MOMENTUM)
    optimizer.clip = AutoClip(PERCENTILE)
    minimize = lambda loss: tfp.math.minimize(loss, num_steps=1, optimizer=optimizer)
    # end of page
    optimizer.build(model.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
    if resume:
        checkpoint.restore(str(folder / "half-1"))
    for step in range(HALF if resume else 0, STEPS):
        if step == HALF and not resume:
            checkpoint.save(str(folder / "half"))
        inputs, targets = (part[SIZE * step : SIZE * (step + 1)] for part in examples())
        watch.begin(model, inputs, targets, optimizer.clip, optimizer)
        minimize(lambda inputs=inputs, targets=targets: model.compute_loss(inputs, targets, model(inputs)))
        watch.end(optimizer.clip, optimizer)
    return Trained(
        STEPS - HALF * resume, [each.numpy() for each in model.trainable_variables], optimizer.clip.metrics()
    )


if __name__ == "__main__":
    play("tensorflow-probability", train)

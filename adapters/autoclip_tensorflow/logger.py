"""What AutoClip did, in the logs of Keras: the History of `fit`, TensorBoard, and whatever else reads them."""

from __future__ import annotations

from typing import Any

import keras

from autoclip_core import AutoClipValueError
from autoclip_tensorflow.optimizer import AutoClipOptimizer


class AutoClipLogger(keras.callbacks.Callback):  # type: ignore[misc] # keras has no types
    """Add `grad_norm`, `clip_threshold`, `clip_scale` and `clipped` to the logs of every epoch.

    The first three are those of the epoch's last step, `grad_norm` before clipping; `clipped` is the share of the
    epoch's steps that were clipped. Put it before the callbacks that should see them, such as
    keras.callbacks.TensorBoard.

    Raises, when training begins:
        AutoClipValueError: the model was not compiled with an AutoClipOptimizer.
    """

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Look for the optimizer, and where its counts stand."""
        self._counts = self._counted()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Add to the logs."""
        if logs is None:
            return
        metrics = self._metrics()
        before, self._counts = self._counts, self._counted()
        steps, clipped_steps = (now - then for now, then in zip(self._counts, before, strict=True))
        for name in ("grad_norm", "clip_threshold", "clip_scale"):
            logs[name] = float(metrics[name])
        logs["clipped"] = clipped_steps / steps if steps else 0.0

    def _counted(self) -> tuple[int, int]:
        metrics = self._metrics()
        return int(metrics["steps"]), int(metrics["clipped_steps"])

    def _metrics(self) -> dict[str, Any]:
        optimizer = self.model.optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            optimizer = optimizer.inner_optimizer
        if not isinstance(optimizer, AutoClipOptimizer):
            raise AutoClipValueError(
                "AutoClipLogger logs what an AutoClipOptimizer does; compile the model with one, but its optimizer is "
                f"{type(optimizer).__name__}."
            )
        return optimizer.metrics()

"""AutoClip for TensorFlow and Keras 3: gradient clipping whose threshold is chosen by itself.

`AutoClip` is for loops with `tf.GradientTape`; `AutoClipOptimizer` and `AutoClipLogger` are for Keras on any of its
backends, and need no TensorFlow where Keras does not run on it: so each is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoclip_tensorflow.clip import AutoClip
    from autoclip_tensorflow.logger import AutoClipLogger
    from autoclip_tensorflow.optimizer import AutoClipOptimizer

__all__ = ["AutoClip", "AutoClipLogger", "AutoClipOptimizer"]


def __getattr__(name: str) -> Any:
    if name == "AutoClip":
        from autoclip_tensorflow.clip import AutoClip

        return AutoClip
    if name == "AutoClipOptimizer":
        from autoclip_tensorflow.optimizer import AutoClipOptimizer

        return AutoClipOptimizer
    if name == "AutoClipLogger":
        from autoclip_tensorflow.logger import AutoClipLogger

        return AutoClipLogger
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

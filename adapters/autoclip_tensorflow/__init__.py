"""AutoClip for TensorFlow and Keras 3: gradient clipping whose threshold is chosen by itself.

`AutoClip` is for loops with `tf.GradientTape`; `AutoClipOptimizer` and `AutoClipLogger` are for Keras on any of its
backends, and need no TensorFlow where Keras does not run on it: so each is imported when it is first asked for.

Where TensorFlow is in use, this import makes the kernel's op known to it: for a SavedModel, or a parameter server.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoclip_tensorflow.clip import AutoClip
    from autoclip_tensorflow.logger import AutoClipLogger
    from autoclip_tensorflow.optimizer import AutoClipOptimizer

__all__ = ["AutoClip", "AutoClipLogger", "AutoClipOptimizer"]


def _uses_tensorflow() -> bool:
    if sys.modules.get("tensorflow") is not None:
        return True
    try:
        import keras
    except ImportError:  # of which the names above will tell
        return False
    used: bool = keras.config.backend() == "tensorflow"
    return used


if _uses_tensorflow():
    import autoclip_tensorflow.graph  # noqa: F401


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

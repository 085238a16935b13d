"""AutoClip for JAX: gradient clipping whose threshold is chosen by itself, as an optax transformation."""

from autoclip_jax.clip import AutoClipState, autoclip, load_history, metrics, save_history
from autoclip_jax.kernel import backend

__all__ = ["AutoClipState", "autoclip", "backend", "load_history", "metrics", "save_history"]

"""AutoClip for PyTorch: gradient clipping whose threshold is chosen by itself."""

from autoclip_core import ClipStep
from autoclip_torch.attach import attach, attached
from autoclip_torch.clip import AutoClip

__all__ = ["AutoClip", "ClipStep", "attach", "attached"]

"""AutoClip for Lightning's Trainer.

An optimizer that clips inside its own step (attach.py) is all that is needed: Lightning hands it closures, or unscaled
gradients, or the scale with the fused ones, in automatic and in manual optimization alike. The hook
`on_before_optimizer_step` sees the gradients of fused optimizers scaled, and could not leave out a step.

The Trainer of `pytorch_lightning` takes this callback too.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]

from autoclip_core import AutoClipValueError, StateError
from autoclip_torch.attach import attach
from autoclip_torch.engines import deepspeed_in, fsdp1_group

if TYPE_CHECKING:
    from typing import Unpack

    from autoclip_torch.clip import AttachOptions, AutoClip

__all__ = ["AutoClipCallback"]


class AutoClipCallback(Callback):
    """Clip the gradients of every optimizer of a fit, each by a history of its own.

    The histories are in the Trainer's checkpoints, and `fit(ckpt_path=...)` continues them; a fit without it begins new
    ones, as its optimizers are new. Logged every `log_every_n_steps`, without waiting for the device: `grad_norm`
    (before clipping), `clip_threshold`, `clip_scale`, `clipped` and `clipped_share`; of several optimizers as
    `optimizer0/grad_norm` and so on.

    Args: as `attach`.

    Raises:
        AutoClipValueError: the Trainer clips as well (when it is set up), or an option cannot be used (when the
            training starts).
        StateError: a checkpoint was made with another number of optimizers, or with other options.

    >>> trainer = Trainer(
    ...     callbacks=[AutoClipCallback(percentile=10.0)], logger=False, enable_checkpointing=False, accelerator="cpu"
    ... )
    """

    def __init__(self, percentile: float = 10.0, **options: Unpack[AttachOptions]) -> None:
        self._options: dict[str, Any] = {"percentile": percentile, **options}
        self._loaded: dict[str, Any] | None = None  # for the next fit
        self._is_over = False  # the run that has loaded it
        self.clips: list[AutoClip[Any]] = []  # of the trainer's optimizers, in order

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a Trainer that clips as well."""
        if self._is_over:
            self._loaded = None
        if trainer.gradient_clip_val:
            raise AutoClipValueError(
                f"The Trainer has gradient_clip_val={trainer.gradient_clip_val}, and AutoClip would record norms that "
                "are clipped already; leave it out. To cap AutoClip's threshold use max_threshold."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimizers, which are as they will be used only now."""
        loaded, self._loaded = self._loaded, None
        options = {"names": pl_module, **self._options}
        if (group := fsdp1_group(trainer.model)) is not None:
            options = {"process_group": group, **options}
        engine = deepspeed_in(trainer.model)
        optimizers: list[Any] = trainer.optimizers if engine is None else [engine]
        self.clips = []
        for optimizer in optimizers:
            self.clips.append(attach(optimizer, **options))
        if loaded is None:
            if trainer.ckpt_path is not None:
                warnings.warn(
                    "The checkpoint has no histories: AutoClip begins new ones.", RuntimeWarning, stacklevel=2
                )
            return
        if len(loaded) != len(self.clips):
            raise StateError(
                f"The checkpoint has the histories of {len(loaded)} optimizers, but there are {len(self.clips)}."
            )
        for index, clip in enumerate(self.clips):
            clip.load_state_dict(loaded[str(index)])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the latest step; warn if updates are made and none is seen."""
        for clip in self.clips:
            clip._look(at_start=True)
        # Private, but as Lightning's own callbacks do it: five numbers cost a millisecond, which no step is to pay.
        if not trainer._logger_connector.should_update_logs:
            return
        for index, clip in enumerate(self.clips):
            prefix = f"optimizer{index}/" if len(self.clips) > 1 else ""
            # Lightning would move floats to the device, and wait for it.
            pl_module.log_dict({prefix + name: torch.tensor(number) for name, number in clip.log().items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the optimizers as they were."""
        for clip in self.clips:
            clip.detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the optimizers as they were."""
        self.on_train_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what was loaded for a test or a validation; a fit may have had nothing left to do, and be saved."""
        self._is_over = True
        if stage != "fit":
            self._loaded = None

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each optimizer's AutoClip, for a checkpoint."""
        return self._loaded or {str(index): clip._checkpoint() for index, clip in enumerate(self.clips)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the optimizers, which may not be there yet."""
        self._loaded, self._is_over = state_dict, False

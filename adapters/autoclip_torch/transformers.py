"""AutoClip for the Trainer of Hugging Face transformers.

A mixin and not a callback alone, because a callback logs after those that report, saves after the Trainer has, and is
not told which checkpoint is resumed. It overrides the public `train`, `save_model` and `log`; the clipping is that of
`attach`, inside the optimizer's step, where the gradients are accumulated, reduced and unscaled.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from autoclip_core import AutoClipValueError
from autoclip_torch.attach import attach

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch.optim import Optimizer
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from autoclip_torch.clip import AutoClip

__all__ = ["AutoClipMixin"]

_FILE = "autoclip.pt"  # in a checkpoint's folder


class AutoClipMixin(TrainerCallback):
    """Make a Trainer clip by AutoClip instead of by its `max_grad_norm`.

    Put it in front of any Trainer class. The default `max_grad_norm` does nothing then; another one is an error. Logged
    with the loss: `grad_norm` (before clipping), `clip_threshold`, `clip_scale`, `clipped` and `clipped_share`. The
    history is in each checkpoint's folder, and `train(resume_from_checkpoint=...)` continues it. `clip` is the AutoClip
    once training has begun; it lives as long as its optimizer.

    Args:
        autoclip: the arguments of `attach`; all others are the Trainer's.

    Raises:
        AutoClipValueError: `max_grad_norm` is not the default, or an argument cannot be used (when training begins).
        StateError: a checkpoint was made with other options.

    >>> from transformers import Trainer
    >>> class AutoClipTrainer(AutoClipMixin, Trainer):
    ...     pass
    """

    args: TrainingArguments
    clip: AutoClip[Any] | None = None

    def __init__(self, *args: Any, autoclip: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.max_grad_norm not in (None, 0.0, type(self.args).max_grad_norm):
            raise AutoClipValueError(
                f"AutoClip replaces max_grad_norm={self.args.max_grad_norm}; leave it out, or give 0. To cap "
                "AutoClip's threshold use autoclip={'max_threshold': ...}."
            )
        self._autoclip_options = dict(autoclip or {})
        self._autoclip_optimizer: Optimizer | None = None
        self._autoclip_resumes: Any = None
        self.add_callback(self)  # type: ignore[attr-defined]

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,  # noqa: FBT001 - as the Trainer has it
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Train as the Trainer does, without its own clipping."""
        self._autoclip_resumes = resume_from_checkpoint
        if resume_from_checkpoint is True:
            self._autoclip_resumes = get_last_checkpoint(self.args.output_dir)  # type: ignore[no-untyped-call]
        given, self.args.max_grad_norm = self.args.max_grad_norm, 0.0
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        finally:
            self.args.max_grad_norm = given

    def _get_grad_norm(self, *_: Any, **__: Any) -> None:
        """Do not measure the norm a second time. Where a Trainer lacks this private method, it only takes longer."""

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Save as the Trainer does, and the history if this is a checkpoint: before the Trainer's own state.

        A run that is killed while it saves leaves no checkpoint that the Trainer could resume without its history.
        """
        super().save_model(output_dir, *args, **kwargs)  # type: ignore[misc]
        folder = Path(str(output_dir or self.args.output_dir))
        if self.clip is not None and self.args.should_save and folder.name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
            part = folder / f"{_FILE}.part"
            with part.open("wb") as file:
                torch.save(self.clip._checkpoint(), file)
                file.flush()
                os.fsync(file.fileno())  # on the disk before it has its name
            part.replace(folder / _FILE)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as the Trainer does, with the latest step beside the loss."""
        if "loss" in logs and self.clip is not None:
            logs = {**logs, **self.clip.log()}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the optimizer, which is as it will be used only now."""
        if self.clip is None or kwargs["optimizer"] is not self._autoclip_optimizer:
            self._autoclip_optimizer = kwargs["optimizer"]
            engine = getattr(self, "deepspeed", None)  # the optimizer alone does not know whether it clips
            self.clip = attach(
                engine or self._autoclip_optimizer, **{"names": kwargs["model"], **self._autoclip_options}
            )
        if not self._autoclip_resumes:
            return
        file = Path(self._autoclip_resumes, _FILE)
        if file.is_file():
            self.clip.load_state_dict(torch.load(file, weights_only=True))
        else:
            warnings.warn(f"There is no {file}, so AutoClip begins a new history.", RuntimeWarning, stacklevel=2)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Warn if updates are made and none is seen."""
        if self.clip is not None:
            self.clip._look(at_start=True)

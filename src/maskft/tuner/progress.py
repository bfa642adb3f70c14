"""How far training is, which budget ramps, schedules and the noise of gates depend on."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from maskft_common.errors import UserError

from . import compiled
from .layer import MaskedLinear


def set_mask_progress(model: nn.Module, progress: float) -> None:
    """Tell the active masks of ``model`` how far training is; call it before every step with ``step / max_steps``.

    Equal progress gives equal noise, so that a resumed run is the uninterrupted one. Masks without a ramp, a schedule
    or noise do not need it. ``maskft train`` calls it; other trainers of transformers take :class:`MaskProgress`.

    Args:
        model: A model with mask adapters, maybe wrapped.
        progress: Share of training done, in [0, 1].

    Raises:
        UserError: If ``progress`` is outside [0, 1].
    """
    if not 0.0 <= progress <= 1.0:
        raise UserError(f"progress is {progress}; it is a share of training, step / max_steps, and must be in [0, 1]")
    for module in model.modules():
        if isinstance(module, MaskedLinear):
            for name in module.active_masks:
                if name in module.mask_scores and not (config := module.mask_configs[name]).copy_of:
                    config.progress = float(progress)
    compiled.refresh()


class MaskProgress(TrainerCallback):
    """Tells masks how far training is; of the global step alone, so that a resumed run knows it too."""

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """The scores of the best checkpoint, where they were loaded, make its mask only with its progress."""
        if args.load_best_model_at_end and state.best_model_checkpoint:
            step = int(state.best_model_checkpoint.rpartition("-")[2])
            set_mask_progress(model, min(1.0, step / state.max_steps))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Before what is measured and saved after a step, and before the next."""
        # transformers takes a step more than max_steps where it resumes a run that had taken all.
        set_mask_progress(model, min(1.0, state.global_step / state.max_steps))

    on_train_begin = on_step_end  # before the first step, or the first after resuming

"""The share of training done, on which ramps, schedules and the noise of gates depend."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from maskft_common.errors import UserError

from .layer import MaskedLinear


def set_mask_progress(model: nn.Module, progress: float) -> None:
    """Set the share of training done for the active masks of ``model``; call it before every step.

    Equal progress gives equal noise, so that a resumed run equals the uninterrupted one. Masks without a ramp, a
    schedule or noise do not need it. ``maskft train`` calls it; other trainers of transformers take
    :class:`MaskProgress`.

    Args:
        model: A model with mask adapters, maybe wrapped.
        progress: ``step / max_steps``, in [0, 1].

    Raises:
        UserError: If ``progress`` is outside [0, 1].
    """
    if not 0.0 <= progress <= 1.0:
        raise UserError(f"progress is {progress}; it is a share of training, step / max_steps, and must be in [0, 1]")
    layers = []
    for module in model.modules():
        if isinstance(module, MaskedLinear):
            layers.append(module)

    # In the configurations, which are saved: a loaded adapter knows how far its training was. All layers of an adapter
    # share one object, so it is set more than once.
    for layer in layers:
        for name in layer.active_masks:
            config = layer.mask_configs[name]
            # A mask without scores is not trained, nor is the reference of preference training.
            if name in layer.mask_scores and not config.copy_of:
                config.progress = float(progress)
                config.is_progress_of_file = False

    # After all layers have the new value: compiled graphs read weights that were computed before.
    for layer in layers:
        layer.masker.refresh()


class MaskProgress(TrainerCallback):
    """Calls :func:`set_mask_progress` in any trainer of transformers.

    It depends on the global step alone, so that a resumed run sets the same values.
    """

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Before the first step, or the first after resuming.

        Raises:
            UserError: If a mask has a price and the trainer scales its loss, as for float16.
        """
        if args.fp16:
            _check_no_price(model)
        self._set(model, state.global_step, state.max_steps)

    def on_step_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Before the evaluation and the checkpoint after a step, and before the next step."""
        self._set(model, state.global_step, state.max_steps)

    def on_train_end(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """The scores of the best checkpoint, if they were loaded, need the progress of its step."""
        # transformers sets the weights back to that checkpoint before this event, but not state.global_step.
        if args.load_best_model_at_end and state.best_model_checkpoint:
            _, _, step = state.best_model_checkpoint.rpartition("-")  # of "checkpoint-STEP"
            self._set(model, int(step), state.max_steps)

    @staticmethod
    def _set(model: nn.Module, step: int, max_steps: int) -> None:
        if max_steps == 0:  # as with num_train_epochs=0: nothing is trained
            return
        # transformers takes a step more than max_steps where it resumes a run that had taken all.
        progress = min(1.0, step / max_steps)
        set_mask_progress(model, progress)


def _check_no_price(model: nn.Module) -> None:
    """Raise for a price: added to gradients that fp16 has scaled by 65,536 or so, it would be divided by that."""
    for layer in model.modules():
        if not isinstance(layer, MaskedLinear):
            continue
        for name in layer.active_masks:
            if name in layer.mask_scores and layer.mask_configs[name].price:
                raise UserError("price is added to gradients that fp16 has scaled, so it would not count: use bf16")

"""Training that starts from a model without the weights that a mask removes."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from maskft_common.errors import UserError

from ..fsdp import is_sharded, local_part, rows_of
from ..masks.fingerprints import is_the_base, weights_fingerprint
from ..masks.mask_set import MaskSet, read_config
from ..tuner.targets import listed
from .method_arguments import MethodArguments


def set_removed_to_zero(model: PreTrainedModel, method: MethodArguments) -> None:
    """Zero the weights that the mask of ``keep_mask`` or ``start_mask`` removes, if one is given.

    Args:
        model: The base model of that mask.
        method: The settings that name the mask.

    Raises:
        UserError: If the mask is of another model, or its removed weights are not zero.
    """
    option = "keep_mask" if method.keep_mask else "start_mask"
    folder = getattr(method, option)
    if folder is None:
        return
    config = read_config(folder)
    masks = MaskSet.from_adapter(folder)

    if config.removed_value != "zero":
        raise UserError(
            f"{option} {folder!r} has removed_value {config.removed_value}; name a mask that removes to zero"
        )
    if config.weights_sha256:
        raise UserError(
            f"{option} {folder!r} also replaces weights of the base ({listed(config.weights_sha256)}), which {option} "
            "does not; name a mask alone, or train from the output of maskft merge"
        )
    if not masks.num_removed:
        raise UserError(f"{option} {folder!r} removes nothing; name a mask that does (--keep_worse true keeps one)")

    # Whether the mask is of this model: by name and shape first, then by content. None for a layer that is missing.
    modules = dict(model.named_modules())
    weights = {}
    for name in sorted(masks):
        weights[name] = getattr(modules.get(name), "weight", None)

    base = config.base_model_name_or_path
    for name, weight in weights.items():
        has = None
        if weight is None:
            has = "is not there"
        elif weight.shape != masks[name].shape:
            has = f"has shape {tuple(weight.shape)}"
        if has is not None:
            raise UserError(
                f"{option} {folder!r} is a mask of another model: {name} {has}; name the model it was made for ({base})"
            )

    found = weights_fingerprint((name, weight.detach()) for name, weight in weights.items())
    dtypes = {weight.dtype for weight in weights.values()}
    # Not every mask records one, such as one that was combined from others.
    if config.base_fingerprint and not is_the_base(found, dtypes, config):
        raise UserError(
            f"{option} {folder!r} is a mask of another model: it was made for {base} (fingerprint "
            f"{config.base_fingerprint[:12]}), and the weights of this one differ ({found[:12]})"
        )

    masks.apply_(model)


class RemovedStayZero(TrainerCallback):
    """Keeps removed weights at exactly zero during training."""

    def __init__(self, masks: MaskSet):
        self._masks = masks
        self._removed: list[tuple[nn.Parameter, Tensor]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Find the weights, which may have been sharded over processes since the masks were applied."""
        for name, mask in self._masks.items():
            # Full fine-tuning has no adapter, so modules have the names that the mask has.
            weight = model.get_submodule(name).weight
            removed = ~mask
            if is_sharded(weight):
                # This process's rows.
                removed = rows_of(removed, weight)
            removed = removed.to(local_part(weight).device)
            self._removed.append((weight, removed))

    def clear_gradients(self) -> None:
        """Zero the gradients of removed weights, which must not count in the norm that clips the others."""
        for weight, removed in self._removed:
            # A gradient of a layer that no row of the step went through is None.
            if weight.grad is not None:
                gradient = local_part(weight.grad)
                gradient.masked_fill_(removed, 0.0)

    def on_optimizer_step(self, args, state, control, **kwargs):
        """Zero removed weights that the optimizer moved, as the moments of a resumed run may."""
        # With max_grad_norm 0 the Trainer does not clip and gradients are not cleared: this alone keeps them at zero.
        for weight, removed in self._removed:
            values = local_part(weight)
            values.masked_fill_(removed, 0.0)

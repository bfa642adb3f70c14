"""Random, magnitude and Wanda masks: the learned mask's size, without training."""

from __future__ import annotations

from collections.abc import Sequence

from peft import PeftModel
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel

from maskft_common.errors import UserError
from maskft_common.memory import peak_memory_bytes

from ..baselines.fixed import FIXED_MASKS, fixed_masks
from ..baselines.gradients import weight_gradients
from ..baselines.wanda import input_norms
from ..data.prepared import Prepared
from ..loss import mean_nll
from ..masks.adapter import CodedMask
from ..masks.codec import encode_mask, mask_info
from ..masks.mask_set import MaskSet
from ..tuner import MaskedLinear, adapter_layers
from ..tuner.targets import listed
from .arguments import TrainConfig
from .build import heldout_loss, with_adapter
from .checks import check_size
from .method_arguments import ADAPTER, mask_config
from .record import TrainingSummary


def make_fixed_mask(
    model: PreTrainedModel, data: Prepared, run: TrainConfig, tokenizer, console: Console
) -> tuple[PeftModel, TrainingSummary]:
    """Make the mask that the method of ``run`` names.

    Norms of inputs (Wanda) and gradients are taken over the first training rows; the held-out rows choose the best of
    several random masks.

    Returns:
        The masked model and what was done.

    Raises:
        UserError: If the mask is not one of a given size, or ``match_adapter`` masks other layers, or of another shape.
    """
    method = run.method
    training = run.training
    config = mask_config(run.mask, inference_mode=True, sparsity_ramp=0.0)
    check_size(method.method, config)
    masked = with_adapter(model.to(training.device), config, run.model).eval()
    layers = list(adapter_layers(masked, ADAPTER).values())
    weights = [layer.weight.detach() for layer in layers]
    counts = _counts(method.match_adapter, layers)
    norms: Sequence[Tensor] = ()
    gradients: Sequence[Tensor] = ()
    rows = data.train.select(range(min(method.num_calibration_samples, len(data.train))))
    if FIXED_MASKS[method.method].of_inputs:
        with masked.disable_adapter():
            norms = input_norms(masked, layers, rows["input_ids"][:])
    if FIXED_MASKS[method.method].of_gradients:
        with masked.disable_adapter():
            gradients = weight_gradients(masked, layers, rows)

    measure = heldout_loss(masked, tokenizer, training)
    is_choice = method.num_candidates > 1
    history = []
    best = (0.0, config.mask_seed, list[Tensor]())
    for seed in range(config.mask_seed, config.mask_seed + method.num_candidates):
        masks = fixed_masks(method.method, weights, config.sparsity, seed, counts, norms, gradients)
        coded = [encode_mask(mask) for mask in masks]
        _set_masks(layers, coded)
        loss = mean_nll(measure(data.heldout)) if is_choice else 0.0
        history.append({"mask_seed": seed, "eval_loss": loss})
        if not best[2] or loss < best[0]:
            best = (loss if loss < float("inf") else float("inf"), seed, coded)
    loss, seed, coded = best
    _set_masks(layers, coded)
    masked.peft_config[ADAPTER].mask_seed = seed
    removed = sum(mask_info(code)["num_removed"] for code in coded)
    numel = sum(weight.numel() for weight in weights)
    console.print(f"{method.method}: removes {removed:,} of {numel:,} target weights")
    if is_choice:
        console.print(f"best of {method.num_candidates} by held-out loss: seed {seed}, {loss:.4f}")
    return masked, TrainingSummary(
        method=method.method,
        best_loss=loss if is_choice else None,
        num_target_weights=numel,
        peak_memory_bytes=peak_memory_bytes(),
        history=history if is_choice else [],
    )


def _counts(match_adapter: str | None, layers: Sequence[MaskedLinear]) -> list[int] | None:
    """How many weights the mask in an adapter folder removes from each layer; None without one."""
    if match_adapter is None:
        return None
    learned = MaskSet.from_adapter(match_adapter)
    if not learned.num_removed:
        raise UserError(f"match_adapter {match_adapter!r} removes nothing; name a mask that does")
    shapes = {layer.module_name: layer.weight.shape for layer in layers}
    if different := sorted(n for n in {*learned, *shapes} if n not in learned or learned[n].shape != shapes.get(n)):
        raise UserError(
            f"match_adapter {match_adapter!r} masks other layers than this run, or of another shape: "
            f"{listed(different)}; give the mask_target_modules and mask_layers_to_transform of that adapter"
        )
    return [int((~learned[layer.module_name]).sum()) for layer in layers]


def _set_masks(layers: Sequence[MaskedLinear], coded: Sequence[Tensor]) -> None:
    for layer, code in zip(layers, coded, strict=True):
        layer.saved_masks[ADAPTER] = CodedMask(code, layer.module_name)

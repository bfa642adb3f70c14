"""Random, magnitude and Wanda masks: the learned mask's size, without training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from datasets import Dataset
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


class _Candidate(NamedTuple):
    """A random mask among several.

    Attributes:
        loss: Held-out loss, nats per token; inf if it is not finite.
        seed: Seed of the mask.
        coded: Coded masks of the layers.
    """

    loss: float
    seed: int
    coded: list[Tensor]


def make_fixed_mask(
    model: PreTrainedModel,
    data: Prepared,
    run: TrainConfig,
    tokenizer,
    console: Console,
) -> tuple[PeftModel, TrainingSummary]:
    """Make the mask of the run's method.

    Norms of inputs (Wanda) and gradients are computed on the first training rows. Held-out rows choose the best of
    several random masks.

    Args:
        model: The base model.
        data: The rows.
        run: The run.
        tokenizer: The model's tokenizer.
        console: Where to print.

    Returns:
        The masked model and a summary of the run.

    Raises:
        UserError: If the size of the mask is not given, or ``match_adapter`` masks other layers or shapes.
    """
    # The layers, by an adapter in inference mode, which has no scores. No ramp, because no steps follow.
    method = run.method
    config = mask_config(run.mask, inference_mode=True, sparsity_ramp=0.0)
    check_size(method.method, config)
    model = model.to(run.training.device)
    masked = with_adapter(model, config, run.model)
    masked.eval()
    layers = list(adapter_layers(masked, ADAPTER).values())
    weights = [layer.weight.detach() for layer in layers]
    # Per layer; None removes the sparsity of each.
    counts = _counts(method.match_adapter, layers)

    num_rows = min(method.num_calibration_samples, len(data.train))
    rows = data.train.select(range(num_rows))
    norms, gradients = _statistics(method.method, masked, layers, rows)

    # The candidates. Layers take masks in coded form, as they are saved, and the best one is kept in it.
    measure = heldout_loss(masked, tokenizer, run.training)
    is_choice = method.num_candidates > 1
    history = []
    best: _Candidate | None = None
    for number in range(method.num_candidates):
        seed = config.mask_seed + number
        masks = fixed_masks(
            method.method,
            weights,
            config.sparsity,
            seed,
            counts,
            norms,
            gradients,
        )
        coded = [encode_mask(mask) for mask in masks]
        _set_masks(layers, coded)

        # A single mask is not measured here, because there is nothing to choose.
        loss = 0.0
        if is_choice:
            loss = mean_nll(measure(data.heldout))
        history.append({"mask_seed": seed, "eval_loss": loss})
        if best is None or loss < best.loss:
            # A loss of NaN counts as the highest, so that any later candidate is better.
            comparable_loss = loss if math.isfinite(loss) else math.inf
            best = _Candidate(comparable_loss, seed, coded)

    assert best is not None
    _set_masks(layers, best.coded)
    # Saved with the adapter: the mask can be drawn again from it.
    masked.peft_config[ADAPTER].mask_seed = best.seed

    num_removed = sum(mask_info(code)["num_removed"] for code in best.coded)
    numel = sum(weight.numel() for weight in weights)
    console.print(f"{method.method}: removes {num_removed:,} of {numel:,} target weights")
    if is_choice:
        console.print(f"best of {method.num_candidates} by held-out loss: seed {best.seed}, {best.loss:.4f}")
    summary = TrainingSummary(
        method=method.method,
        best_loss=best.loss if is_choice else None,
        num_target_weights=numel,
        peak_memory_bytes=peak_memory_bytes(run.training.device.type),
        history=history if is_choice else [],
    )
    return masked, summary


def _statistics(
    method: str,
    masked: PeftModel,
    layers: Sequence[MaskedLinear],
    rows: Dataset,
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Norms of inputs and gradients of weights, each of every layer; empty if the method does not look at them."""
    norms: Sequence[Tensor] = ()
    gradients: Sequence[Tensor] = ()
    # Without the adapter: its masks are not known yet.
    if FIXED_MASKS[method].of_inputs:
        rows_of_ids = rows["input_ids"][:]
        with masked.disable_adapter():
            norms = input_norms(masked, layers, rows_of_ids)
    if FIXED_MASKS[method].of_gradients:
        with masked.disable_adapter():
            gradients = weight_gradients(masked, layers, rows)
    return norms, gradients


def _counts(match_adapter: str | None, layers: Sequence[MaskedLinear]) -> list[int] | None:
    """Number of weights that the mask in an adapter folder removes from each layer; None without a folder."""
    if match_adapter is None:
        return None
    learned = MaskSet.from_adapter(match_adapter)
    if not learned.num_removed:
        raise UserError(f"match_adapter {match_adapter!r} removes nothing; name a mask that does")

    # Both must have the same layers, each of the same shape.
    shapes = {layer.module_name: layer.weight.shape for layer in layers}
    different = []
    for name in sorted({*learned, *shapes}):
        is_same = name in learned and learned[name].shape == shapes.get(name)
        if not is_same:
            different.append(name)
    if different:
        raise UserError(
            f"match_adapter {match_adapter!r} masks other layers than this run, or of another shape: "
            f"{listed(different)}; give the mask_target_modules and mask_layers_to_transform of that adapter"
        )

    counts = []
    for layer in layers:
        # Masks are True where a weight is kept.
        removed = ~learned[layer.module_name]
        counts.append(int(removed.sum()))
    return counts


def _set_masks(layers: Sequence[MaskedLinear], coded: Sequence[Tensor]) -> None:
    # A layer without scores uses its saved mask, as one that was loaded from a folder does.
    for layer, code in zip(layers, coded, strict=True):
        layer.saved_masks[ADAPTER] = CodedMask(code, layer.module_name)

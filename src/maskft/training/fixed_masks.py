"""Random, magnitude and Wanda masks: the learned mask's size, without training."""

from __future__ import annotations

from peft import PeftModel
from rich.console import Console

from ..adapter.mask_set import MaskSet
from ..adapter.wrap import add_adapter
from ..errors import UserError
from ..evaluation.heldout import nll_per_item
from ..runtime import peak_memory_bytes
from ..tuner import adapter_layers
from ..tuner.codec import encode_mask, mask_info
from ..tuner.fixed import fixed_masks
from .arguments import Run, TrainingSummary, named_revision
from .calibration import input_norms
from .method_arguments import ADAPTER, mask_config


def make_fixed_mask(
    run: Run, model, tokenizer, train_set, heldout_set, console: Console
) -> tuple[PeftModel, TrainingSummary]:
    """Make the mask that ``run`` names.

    Args:
        run: The configuration.
        model: The base model.
        tokenizer: Its tokenizer.
        train_set: Tokenised training rows, which Wanda's norms are taken over.
        heldout_set: Tokenised held-out rows, which choose the best of several random masks.
        console: Where to print.

    Returns:
        The masked model and what was done.

    Raises:
        UserError: If ``num_candidates`` does not fit the method.
    """
    method, num_candidates = run.method.method, run.method.num_candidates
    config = mask_config(run.mask, inference_mode=True)
    if config.selection != "topk":
        raise UserError(f"mask_selection is {config.selection!r}; {method} removes mask_sparsity of the weights")
    model = add_adapter(model.to(run.training.device), config, revision=named_revision(run)).eval()
    layers = list(adapter_layers(model, ADAPTER).values())
    counts = None
    if run.method.match_adapter is not None:
        learned = MaskSet.from_adapter(run.method.match_adapter)
        counts = [int((~learned.matching(layer.module_name)).sum()) for layer in layers]
    weights = [layer.get_base_layer().weight.detach() for layer in layers]
    norms = None
    if method == "wanda_mask":
        with model.disable_adapter():
            norms = input_norms(model, layers, train_set["input_ids"], run.method.num_calibration_samples)
    candidates = []
    for seed in range(config.mask_seed, config.mask_seed + num_candidates):
        masks = fixed_masks(method, weights, config.sparsity, config.scope, seed, counts, norms)
        coded = [encode_mask(mask) for mask in masks]
        for layer, code in zip(layers, coded, strict=True):
            layer.mask_coded[ADAPTER] = code
        loss = _mean_nll(model, heldout_set, tokenizer, run.training) if num_candidates > 1 else None
        candidates.append((loss, seed, coded))
    loss, config.mask_seed, coded = min(candidates, key=lambda candidate: candidate[:2])
    for layer, code in zip(layers, coded, strict=True):
        layer.mask_coded[ADAPTER] = code
    summary = TrainingSummary(
        method=method,
        start_loss=None,
        best_loss=loss,
        best_step=None,
        end_loss=None,
        num_steps=0,
        num_epochs=0.0,
        num_train_tokens=0,
        num_trainable=0,
        num_target_weights=sum(weight.numel() for weight in weights),
        train_time_s=0.0,
        peak_memory_bytes=peak_memory_bytes(),
        history=[{"mask_seed": seed, "eval_loss": loss} for loss, seed, _ in candidates if loss is not None],
    )
    removed = sum(mask_info(code)["num_removed"] for code in coded)
    console.print(f"{method}: removes {removed:,} of {summary.num_target_weights:,} target weights")
    if num_candidates > 1:
        console.print(f"best of {num_candidates} by held-out loss: seed {config.mask_seed}, {loss:.4f}")
    return model, summary


def _mean_nll(model, rows, tokenizer, args) -> float:
    """Held-out loss in nats per supervised token."""
    rows = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    size = args.per_device_eval_batch_size
    pairs = nll_per_item(model, rows, batch_size=size, pad_token_id=tokenizer.pad_token_id or 0)
    return sum(nll * count for nll, count in pairs) / sum(count for _, count in pairs)

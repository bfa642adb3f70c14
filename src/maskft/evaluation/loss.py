"""Held-out negative log-likelihood, item by item."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from ..generation.batching import length_sorted_batches, pad


@torch.inference_mode()
def nll_per_item(
    model,
    rows: Sequence[dict],
    *,
    batch_size: int = 16,
    pad_token_id: int = 0,
    on_loss: Callable[[int, tuple[float, int]], None] | None = None,
) -> list[tuple[float, int]]:
    """Mean negative log-likelihood of the supervised tokens of each row.

    Args:
        model: A causal language model; put into evaluation mode.
        rows: Rows with ``input_ids`` and ``labels`` (-100 where there is no loss), as ``tokenize_example`` makes them.
        batch_size: Rows per forward pass.
        pad_token_id: Padding on the right; it changes no number.
        on_loss: Called with index and numbers of each row when it is done, in the order in which they are.

    Returns:
        Per row: nats per supervised token, and the number of supervised tokens.
    """
    model.eval()
    out: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
    for indices in length_sorted_batches([len(row["input_ids"]) for row in rows], batch_size):
        batch = [rows[i] for i in indices]
        ids_BT, mask_BT = pad([row["input_ids"] for row in batch], pad_token_id, model.device)
        labels_BT, _ = pad([row["labels"] for row in batch], -100, model.device)
        for index, pair in zip(indices, _batch_nll(model, ids_BT, mask_BT, labels_BT), strict=True):
            out[index] = pair
            if on_loss:
                on_loss(index, pair)
    return out


def has_learned_positions(model, context: int) -> bool:
    """Whether the positions of a context are rows of a table, as in GPT-2 and OPT: beyond its end there is no loss."""
    return any(
        isinstance(module, nn.Embedding) and module.num_embeddings >= context and ("wpe" in name or "position" in name)
        for name, module in model.named_modules()
    )


def _batch_nll(model, ids_BT, mask_BT, labels_BT) -> Iterable[tuple[float, int]]:
    targets_BT = labels_BT[:, 1:]
    supervised_BT = targets_BT != -100
    # Logits only where there is a label: over a vocabulary of 49k the head is a third of the forward pass.
    first = int(supervised_BT.any(0).nonzero().min()) if supervised_BT.any() else 0
    positions = torch.arange(first, targets_BT.shape[1], device=ids_BT.device)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, logits_to_keep=positions, use_cache=False).logits
    targets_BT = targets_BT[:, first:]
    losses_BT = _cross_entropy(logits_BTV, targets_BT).masked_fill(~supervised_BT[:, first:], 0)
    counts = supervised_BT.sum(1)
    return [(float(s / max(int(c), 1)), int(c)) for s, c in zip(losses_BT.sum(1), counts, strict=True)]


def _cross_entropy(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each target, float64; of a target below 0 it is any number.

    Summed in float32 as torch's cross_entropy does it, 49,152 small chances are too few by 1e-5 nats (how many are
    summed at once depends on the processor), and by 1e-4 with the vocabulary in the middle.
    """
    highest_BT1 = logits_BTV.amax(-1, keepdim=True).float()
    sums_BT = (logits_BTV.float() - highest_BT1).exp_().sum(-1, dtype=torch.float64)
    chosen_BT = logits_BTV.gather(-1, targets_BT.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return sums_BT.log() + (highest_BT1.squeeze(-1).double() - chosen_BT.double())

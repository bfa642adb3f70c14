"""The held-out loss, in nats per supervised token, row by row. Training, verdicts and evaluation all measure this one.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from maskft_common import processes

from .data.tokenizing import IGNORED

# A tokenised row, with input_ids and labels.
Row = Mapping[str, Any]
# Nats per supervised token, and the number of these tokens.
RowLoss = tuple[float, int]


def mean_nll(losses: Iterable[RowLoss]) -> float:
    """Nats per token over all rows."""
    # A list, because it may be an iterator and is read twice.
    losses = list(losses)
    # A mean over tokens, in which long rows count more; a mean of the rows' means would be another number.
    total = sum(nll * count for nll, count in losses)
    num_tokens = sum(count for _, count in losses)
    return total / num_tokens


@torch.no_grad()
def nll_per_item(
    model,
    rows: Sequence[Row],
    *,
    batch_size: int = 16,
    pad_token_id: int = 0,
    on_loss: Callable[[int, RowLoss], None] | None = None,
) -> list[RowLoss]:
    """Mean negative log-likelihood of the supervised tokens of each row.

    Args:
        model: A causal language model; put into evaluation mode.
        rows: Rows with ``input_ids`` and ``labels`` (-100 where there is no loss), as ``tokenize_example`` makes them.
        batch_size: Rows per forward pass.
        pad_token_id: Padding on the right; it changes no number.
        on_loss: Called with index and loss of each row as soon as it is measured.

    Returns:
        Per row: nats per supervised token, and the number of supervised tokens.
    """
    model.eval()
    # Filled in the order of the batches, returned in the order of the rows.
    losses: list[RowLoss] = [(0.0, 0)] * len(rows)
    lengths = [len(row["input_ids"]) for row in rows]
    batches = length_sorted_batches(lengths, batch_size)
    for indices in batches:
        # The labels are padded with IGNORED, so that padding has no loss.
        batch = [rows[index] for index in indices]
        ids = [row["input_ids"] for row in batch]
        labels = [row["labels"] for row in batch]
        ids_BT, mask_BT = pad(ids, pad_token_id, model.device)
        labels_BT, _ = pad(labels, IGNORED, model.device)

        found = _batch_nll(model, ids_BT, mask_BT, labels_BT)
        for index, loss in zip(indices, found, strict=True):
            losses[index] = loss
            if on_loss:
                on_loss(index, loss)
    return losses


@dataclass(frozen=True)
class HeldoutLoss:
    """Measures rows during a run, whose processes share them; every process must call it with the same rows.

    Attributes:
        model: A causal language model, not wrapped by accelerate.
        batch_size: Rows per forward pass of a process.
        pad_token_id: Padding on the right.
        context: Makes the context to compute in, such as autocast.
    """

    model: nn.Module
    batch_size: int
    pad_token_id: int
    context: Callable[[], AbstractContextManager] = nullcontext

    def __call__(self, rows: Sequence[Row]) -> list[RowLoss]:
        """Losses of the rows, in their order."""

        def nll_of(chosen: Sequence[Row]) -> list[RowLoss]:
            return nll_per_item(
                self.model,
                chosen,
                batch_size=self.batch_size,
                pad_token_id=self.pad_token_id,
            )

        with self.context():
            return shared_rows(rows, nll_of)


def shared_rows(
    rows: Sequence[Row],
    measure: Callable[[Sequence[Row]], list[RowLoss]],
) -> list[RowLoss]:
    """Measure rows, of which each process of a run takes a share; every process must call it with the same rows.

    Args:
        rows: The rows.
        measure: Measures some of the rows, in their order.

    Returns:
        The losses of all rows, in their order, on every process.
    """
    count = len(rows)
    rank = processes.rank()
    num_processes = processes.num_processes()
    # Each process takes the same number of rows: under FSDP all have to run the same number of batches.
    # If they do not divide evenly, the last processes measure some of the first rows once more.
    num_own = math.ceil(count / num_processes)
    # Every num_processes-th row, and from the beginning again after the last one.
    own = []
    for number in range(num_own):
        position = rank + number * num_processes
        own.append(position % count)
    own_rows = [rows[index] for index in own]
    found = measure(own_rows)

    # Every process gets the indices and losses of all; a row that was measured twice has the same loss in both.
    results: list[RowLoss] = [(0.0, 0)] * count
    for indices, losses in processes.gather((own, found)):
        for index, loss in zip(indices, losses, strict=True):
            results[index] = loss
    return results


def length_sorted_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of similar length, longest first, so that a batch too large for memory fails at once."""
    indices = range(len(lengths))
    order = sorted(indices, key=lambda index: -lengths[index])
    batches = []
    for start in range(0, len(order), batch_size):
        batches.append(order[start : start + batch_size])
    return batches


def pad(
    rows: Sequence[Sequence[int]],
    value: int,
    device,
    side: str = "right",
) -> tuple[Tensor, Tensor]:
    """Pad rows of token ids to one length; returns ids (B, T) and the attention mask (B, T), both int64.

    Args:
        rows: Token ids, or labels.
        value: Padding.
        device: Device of the results.
        side: ``right`` or ``left``.
    """
    # The mask is padded in the same way as the ids, with zeros.
    ids = []
    ones = []
    for row in rows:
        ids_T = torch.tensor(list(row), dtype=torch.long)
        ids.append(ids_T)
        ones.append(torch.ones_like(ids_T))

    ids_BT = pad_sequence(
        ids,
        batch_first=True,
        padding_value=value,
        padding_side=side,
    )
    mask_BT = pad_sequence(
        ones,
        batch_first=True,
        padding_side=side,
    )
    return ids_BT.to(device), mask_BT.to(device)


def _batch_nll(
    model,
    ids_BT: Tensor,
    mask_BT: Tensor,
    labels_BT: Tensor,
) -> list[RowLoss]:
    """Losses of one padded batch, row by row."""
    # The logits at position t predict token t + 1.
    targets_BT = labels_BT[:, 1:]
    # Neither a token of the prompt nor padding.
    supervised_BT = targets_BT != IGNORED

    # Logits only where there is a label: over a vocabulary of 49k the head is a third of the forward pass.
    first = 0
    if supervised_BT.any():
        columns = supervised_BT.any(0).nonzero()
        first = int(columns.min())
    # The prediction of the last position has no target: there is one target fewer than tokens.
    num_targets = targets_BT.shape[1]
    positions = torch.arange(first, num_targets, device=ids_BT.device)
    logits_BTV = model(
        input_ids=ids_BT,
        attention_mask=mask_BT,
        logits_to_keep=positions,
        use_cache=False,
    ).logits
    targets_BT = targets_BT[:, first:]
    supervised_BT = supervised_BT[:, first:]

    # Row by row: the logits are copied in float32 and float64, and those of a whole batch take gigabytes.
    losses = []
    logits_of_rows = logits_BTV.split(1)
    targets_of_rows = targets_BT.split(1)
    pairs = zip(logits_of_rows, targets_of_rows, strict=True)
    for logits_1TV, targets_1T in pairs:
        losses.append(_cross_entropy(logits_1TV, targets_1T))
    # Filled and not multiplied by 0, which would leave NaN where a masked logit is infinite.
    losses_BT = torch.cat(losses)
    losses_BT = losses_BT.masked_fill(~supervised_BT, 0)

    totals = losses_BT.sum(1)
    counts = supervised_BT.sum(1).tolist()
    result = []
    for total, count in zip(totals, counts, strict=True):
        # A row without a supervised token has a loss of 0.
        mean = total / max(count, 1)
        result.append((float(mean), count))
    return result


def widest_float(device: torch.device) -> torch.dtype:
    """Dtype to sum many numbers in: float64, or float32 on a device that has no float64."""
    if device.type == "xpu":
        return torch.float64 if torch.xpu.get_device_properties(device).has_fp64 else torch.float32
    return torch.float32 if device.type == "mps" else torch.float64


def _cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Negative log-likelihood of each target, in :func:`widest_float`; meaningless for a target below 0.

    Summed in float32, as by torch's cross_entropy, 49,152 small probabilities are too few by 1e-5 nats (it depends on
    how many the processor sums at once), and by 1e-4 with the vocabulary in the middle.
    """
    # log(sum(exp(l))) - l[target], with the highest logit taken out of the sum against overflow.
    dtype = widest_float(logits_BTV.device)
    highest_BT1 = logits_BTV.amax(-1, keepdim=True).float()
    shifted_BTV = logits_BTV.float() - highest_BT1
    # In place, because a copy of the logits of one row is as large as many layers' activations.
    sums_BT = shifted_BTV.exp_().sum(-1, dtype=dtype)

    # gather takes no negative index; such a target has no loss, so any logit will do.
    indices_BT1 = targets_BT.clamp(min=0).unsqueeze(-1)
    chosen_BT = logits_BTV.gather(-1, indices_BT1).squeeze(-1)

    # The difference first: both are large, and their difference is small.
    highest_BT = highest_BT1.squeeze(-1)
    difference_BT = highest_BT.to(dtype) - chosen_BT.to(dtype)
    return sums_BT.log() + difference_BT

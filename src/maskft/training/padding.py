"""Batches without padding: when they are worth it, and whether a model keeps their rows apart.

With ``padding_free`` (and with packing) TRL puts the rows of a batch one behind another into a single sequence, whose
``position_ids`` start again at 0 with each row. Eager attention and torch's are computed within rows
(``row_attention.py``). Layers that carry a state from token to token need kernels that know where rows begin.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from maskft_common.errors import UserError

from ..models import without_adapter
from .arguments import TrainingArguments
from .row_attention import OF_ALL_PAIRS, attention_within_rows

# Below it, an advice is not worth a line.
_LEAST_SHARE_OF_PADDING = 0.2
# Tokens of each of two rows by which a model is tested.
_TESTED_TOKENS = 16


def padding_share(lengths: Sequence[int], batch_size: int) -> float:
    """Expected share of padding in a batch of rows drawn at random, each padded to the longest.

    Args:
        lengths: Tokens of each row, > 0.
        batch_size: Rows of a batch, >= 1.

    Returns:
        In [0, 1).
    """
    return 1 - mean_length(lengths) / expected_longest(lengths, batch_size)


def mean_length(lengths: Sequence[int]) -> float:
    """Tokens of a row."""
    return sum(lengths) / len(lengths)


def expected_longest(lengths: Sequence[int], batch_size: int) -> float:
    """Expected length of the longest of ``batch_size`` rows drawn independently."""
    # The longest of a batch is at most the k-th shortest of n rows with probability (k / n) ** batch_size, and this row
    # itself with the difference to the probability for k - 1.
    total = 0.0
    below = 0.0
    for rank, length in enumerate(sorted(lengths), start=1):
        up_to_here = (rank / len(lengths)) ** batch_size
        total += length * (up_to_here - below)
        below = up_to_here
    return total


def padding_advice(model: nn.Module, dataset: Dataset, training: TrainingArguments) -> str | None:
    """Advice to train without padding.

    Args:
        model: The model, with or without an adapter.
        dataset: Tokenised training rows.
        training: The options of the run.

    Returns:
        One line; None if padding is already avoided or rare, or for a kind of model that may not keep rows apart.
    """
    if training.padding_free or training.packing or not _may_separate_rows(model):
        return None
    # Other samplers put rows of one length together.
    if getattr(training, "train_sampling_strategy", "random") not in ("random", "sequential"):
        return None

    lengths = [len(row) for row in dataset["input_ids"]]
    batch_size = training.per_device_train_batch_size
    share = padding_share(lengths, batch_size)
    if share < _LEAST_SHARE_OF_PADDING:
        return None

    return f"{share:.0%} of a batch is padding: --padding_free true trains without it (the same loss, in less time)"


@contextmanager
def rows_kept_apart(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    training: TrainingArguments,
) -> Iterator[None]:
    """Train in this block: a model keeps apart the rows of a sequence without padding.

    Eager attention and torch's are computed within rows, if the model allows it. Before training on a GPU, only these
    two are checked: the model is still on the CPU, where other kernels do not run.

    Args:
        model: The model that trains, before it is wrapped or sharded.
        rows: Token ids of training rows.
        training: The options of the run.

    Raises:
        UserError: If a row's predictions change with the row before it.
    """
    # A wrapped packing cuts rows anywhere, and lets them see each other by design.
    # The other strategies are made of padding-free batches in TRL.
    is_packed_apart = training.packing and training.packing_strategy != "wrapped"
    option = "packing" if is_packed_apart else "padding_free"
    if not (is_packed_apart or training.padding_free) or len(rows) < 2:
        yield
        return

    is_for_cpu = training.device.type == "cpu"
    has_kernels = _has_states(model) or model.config._attn_implementation not in OF_ALL_PAIRS
    if has_kernels and not is_for_cpu:
        yield
        return

    first = rows[0][:_TESTED_TOKENS]
    second = rows[1][:_TESTED_TOKENS]
    if _may_take_positions(model):
        # Without the first one, the scores of all pairs of tokens are computed, and masked between rows.
        for attention in (attention_within_rows, nullcontext):
            with attention(model):
                if separates_rows(model, first, second):
                    yield
                    return
    kind = model.config.model_type
    raise UserError(f"{option}: models of type {kind} do not keep rows of one sequence apart; train without {option}")


@torch.no_grad()
def separates_rows(model: nn.Module, first: Sequence[int], second: Sequence[int]) -> bool:
    """Whether the second of two rows in one sequence has the logits that it has alone; True if they are not finite.

    Args:
        model: A causal language model.
        first: Token ids of a row.
        second: Token ids of another row.
    """
    device = next(model.parameters()).device
    second_1T = torch.tensor([[*second]], device=device)
    both_1T = torch.tensor([[*first, *second]], device=device)
    # TRL's own batch: beside position_ids it has the lengths and indices of rows, for the kernels that need them. No
    # padding is added, so any token will do for it.
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([{"input_ids": [*first]}, {"input_ids": [*second]}])
    inputs = {}
    for name, value in batch.items():
        if name != "labels":
            inputs[name] = value.to(device) if isinstance(value, Tensor) else value

    was_training = model.training
    model.eval()
    alone_1TV = model(input_ids=second_1T, use_cache=False).logits.float()
    apart_1TV = model(**inputs, use_cache=False).logits[:, len(first) :].float()
    one_text_1TV = model(input_ids=both_1T, use_cache=False).logits[:, len(first) :].float()
    model.train(was_training)

    # Rounding differs, by more in bfloat16. The same tokens as one text are the scale of what mixing rows would change.
    error = (apart_1TV - alone_1TV).abs().mean()
    difference_of_one_text = (one_text_1TV - alone_1TV).abs().mean()
    if not torch.isfinite(error):
        return True
    return bool(error <= 0.1 * difference_of_one_text)


def _may_separate_rows(model: nn.Module) -> bool:
    """Whether a model's kind suggests that it keeps rows apart, without computing anything."""
    # TRL has no batches without padding for rows with images.
    has_images = hasattr(model.config, "vision_config")
    return not _has_states(model) and not has_images and _may_take_positions(model)


def _has_states(model: nn.Module) -> bool:
    """Whether layers carry a state from token to token, in a recurrence or a convolution."""
    # transformers' mark of recurrent layers, which not all of them have.
    is_recurrent = getattr(without_adapter(model), "_is_stateful", False)
    return is_recurrent or any(isinstance(module, nn.Conv1d) for module in model.modules())


def _may_take_positions(model: nn.Module) -> bool:
    return "position_ids" in inspect.signature(without_adapter(model).forward).parameters

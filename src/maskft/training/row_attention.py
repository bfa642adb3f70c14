"""Attention within the rows of a batch without padding, for eager attention and torch's.

TRL puts the rows of such a batch one behind another into one sequence. Flash attention knows where each of them begins;
eager attention and torch's compute the scores of all pairs of tokens, and mask those of different rows, which are most
of them. Here queries, keys and values are padded for attention alone: the matrix products of the layers have no
padding, and attention has pairs within rows only.

transformers calls an attention function by the name in the model's configuration. The functions of this module are
registered beside its own and call them, so that what a model adds to attention (soft caps, sinks, windows) stays.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..models import attention_by, without_adapter

# Beginning of the registered names. The end is the implementation that is called.
PREFIX = "within_rows_"
# Those that compute the scores of all pairs. They run on every device.
OF_ALL_PAIRS = ("eager", "sdpa")


def attention_within_rows(model: nn.Module) -> AbstractContextManager[None]:
    """Let a model with eager attention or torch's compute attention within rows, until the end of the block.

    Batches with padding, and generation, are computed as before.

    Args:
        model: A model of transformers, with or without an adapter. One that does not choose its attention function by
            name stays as it is.
    """
    base = without_adapter(model)
    before = base.config._attn_implementation
    if before not in OF_ALL_PAIRS or not base._can_set_attn_implementation():
        return nullcontext()
    return attention_by(base, PREFIX + before)


def _attend(
    name: str,
    module: nn.Module,
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    attention_mask: Tensor | None,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention within rows, by the function ``name``.

    Args:
        name: "eager" or "sdpa".
        module: The attention layer.
        query_BHTD: Queries.
        key_BHTD: Keys, of as many heads or fewer.
        value_BHTD: Values, of as many heads as the keys.
        attention_mask: For all pairs: added to scores, or bool and True where a query may see a key; of rows without
            padding shape (1, 1, T, T). None: each token sees itself and those of its row before it.
        **kwargs: Other arguments of the function. A batch without padding has ``cu_seq_lens_q``, where each row begins
            and the last one ends, and ``max_length_q``, the tokens of the longest row, or ``position_ids`` alone.

    Returns:
        Outputs, shape (B, T, H, D), and no attention weights where rows were apart.
    """
    attend = _function(name, module)
    num_tokens = query_BHTD.shape[2]
    bounds = _bounds_of_rows(num_tokens, **kwargs)
    has_rows = bounds is not None and bounds.numel() > 2 and kwargs.get("position_bias") is None
    # With a cache there are more keys than queries.
    if not has_rows or key_BHTD.shape[2] != num_tokens:
        if attention_mask is None and name == "eager":
            attention_mask = _causal_mask(num_tokens, query_BHTD)
        return attend(module, query_BHTD, key_BHTD, value_BHTD, attention_mask, **kwargs)

    starts_R = bounds[:-1].long()
    ends_R = bounds[1:].long()
    longest = kwargs.get("max_length_q") or int(bounds.diff().max())
    # Token of each place in the padded rows. Places behind the end of a row take its last token; no query sees them.
    places_L = torch.arange(longest, device=bounds.device)
    tokens_RL = torch.minimum(starts_R[:, None] + places_L, ends_R[:, None] - 1)
    is_padding_RL = starts_R[:, None] + places_L >= ends_R[:, None]
    # And place of each token in the padded rows, counted through all of them.
    tokens_T = torch.arange(num_tokens, device=bounds.device)
    row_of_T = torch.bucketize(tokens_T, ends_R, right=True)
    place_of_T = row_of_T * longest + tokens_T - starts_R[row_of_T]

    def in_rows(states_1HTD: Tensor) -> Tensor:
        states_HRLD = states_1HTD[0][:, tokens_RL]
        return states_HRLD.transpose(0, 1)

    if attention_mask is not None:
        mask_RLL = attention_mask[0, 0][tokens_RL[:, :, None], tokens_RL[:, None, :]]
        hidden = False if mask_RLL.dtype == torch.bool else torch.finfo(mask_RLL.dtype).min
        mask = mask_RLL.masked_fill(is_padding_RL[:, None, :], hidden)[:, None]
    elif name == "eager":
        # Padding is behind the tokens of its row, which see nothing behind them.
        mask = _causal_mask(longest, query_BHTD)
    else:
        mask = None  # torch's function makes it

    output_RLHD, _ = attend(
        module,
        in_rows(query_BHTD),
        in_rows(key_BHTD),
        in_rows(value_BHTD),
        mask,
        **kwargs,
    )
    output_THD = output_RLHD.flatten(0, 1)[place_of_T]
    return output_THD[None], None


def _function(name: str, module: nn.Module) -> Callable:
    """The attention function that a layer would call."""
    if name != "eager":
        return ALL_ATTENTION_FUNCTIONS[name]
    # Each model's file has its own eager function. The layer's class may be one that FSDP or a user made of it.
    for kind in type(module).__mro__:
        function = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if function is not None:
            return function
    raise RuntimeError(f"no eager_attention_forward beside {type(module).__name__}")


def _bounds_of_rows(
    num_tokens: int,
    *,
    cu_seq_lens_q: Tensor | None = None,
    position_ids: Tensor | None = None,
    **_,
) -> Tensor | None:
    """Where each row of a sequence begins, and where the last one ends; None if that is not known."""
    if cu_seq_lens_q is not None or position_ids is None or len(position_ids) > 1:
        return cu_seq_lens_q
    # TRL 1.14 gives positions only, which start again with each row.
    starts = (position_ids[0] == 0).nonzero().flatten()
    return F.pad(starts, (0, 1), value=num_tokens)


def _causal_mask(num_tokens: int, like: Tensor) -> Tensor:
    """A mask to be added to scores, shape (1, 1, num_tokens, num_tokens)."""
    lowest = torch.finfo(like.dtype).min
    mask_TT = torch.full((num_tokens, num_tokens), lowest, dtype=like.dtype, device=like.device)
    return mask_TT.triu(diagonal=1)[None, None]


def _make_mask(
    name: str,
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs,
) -> Tensor | None:
    """The mask for all pairs of tokens; None if it follows from where rows begin.

    Of a long batch it would be large: 1 GB for 16,000 tokens in float32.

    Args:
        name: "eager" or "sdpa".
        batch_size: B; 1 for rows without padding.
        q_length: Number of queries.
        kv_length: Number of keys.
        attention_mask: False for padding.
        local_size: Of a sliding window or a chunk.
        use_vmap: Whether the model has a mask function of its own.
        **kwargs: Other arguments of transformers' function.
    """
    # transformers has this argument for causal masks only.
    is_causal = "allow_is_causal_skip" in kwargs and not use_vmap
    is_one_sequence = batch_size == 1 and q_length == kv_length and attention_mask is None
    if is_causal and is_one_sequence and (local_size is None or local_size >= q_length):
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[name](
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        **kwargs,
    )


for _name in OF_ALL_PAIRS:
    AttentionInterface.register(PREFIX + _name, partial(_attend, _name))
    AttentionMaskInterface.register(PREFIX + _name, partial(_make_mask, _name))

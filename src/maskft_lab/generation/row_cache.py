"""Keys and values of rows that share a prefix: the prefix is kept once, and attended to once for all rows.

Few-shot prompts differ in their last hundred of a thousand tokens. Here every row keeps its own part only, and one
attention function joins the two. It also reads grouped keys and values without repeating them for each query head, and
writes new tokens in place, where the usual cache copies itself at every token.

Shapes: B rows, H query heads, K key heads, G = H / K, P prefix tokens, T tokens of a row, Q new ones, D head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicLayer

ATTENTION = "maskft_rows"
# What other kinds of attention hand to their attention function, and this one does not compute.
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "head_mask")


class UnsupportedAttention(Exception):
    """The model's attention has a feature that `rows_attention` lacks."""


class _RowLayer(DynamicLayer):
    """Keys and values of one layer, (B, K, capacity, D), of which the first `length` tokens are in use."""

    def __init__(self):
        super().__init__()
        self.length = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Take in the new tokens (B, K, Q, D) and return all keys and values."""
        end = self.length + key_states.shape[2]
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        else:
            self.keys[:, :, self.length : end] = key_states
            self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_seq_length(self) -> int:
        """Tokens in use."""
        return self.length


class RowCache(Cache):
    """Right-aligned rows: the last token of every row is the last of the cache, shorter rows are padded on the left."""

    def __init__(self, num_layers: int):
        super().__init__(layers=[_RowLayer() for _ in range(num_layers)])

    @property
    def length(self) -> int:
        """Tokens in use, padding included."""
        return self.layers[0].length

    @property
    def capacity(self) -> int:
        """Tokens for which there is room."""
        return self.layers[0].keys.shape[2]

    def rebuilt(self, rows: Tensor, newcomers: RowCache | None, width: int, spare: int) -> RowCache:
        """Return a cache of ``rows`` of this one, then all of ``newcomers``, cut or padded to ``width`` tokens.

        Args:
            rows: Which rows to keep, int64.
            newcomers: Rows to add.
            width: Tokens of the longest row.
            spare: Room for this many more tokens.
        """
        out = RowCache(len(self.layers))
        for index, (layer, target) in enumerate(zip(self.layers, out.layers, strict=True)):
            parts = [(layer, rows)] if newcomers is None else [(layer, rows), (newcomers.layers[index], None)]
            target.keys = _joined([(part.keys, part.length, kept) for part, kept in parts], width, spare)
            target.values = _joined([(part.values, part.length, kept) for part, kept in parts], width, spare)
            target.length, target.is_initialized = width, True
        return out


def _joined(parts: list[tuple[Tensor, int, Tensor | None]], width: int, spare: int) -> Tensor:
    first = parts[0][0]
    counts = [tensor.shape[0] if rows is None else len(rows) for tensor, _, rows in parts]
    out = first.new_zeros(sum(counts), first.shape[1], width + spare, first.shape[3])
    start = 0
    for (tensor, length, rows), count in zip(parts, counts, strict=True):
        used = min(width, length)
        kept = tensor[:, :, length - used : length]
        out[start : start + count, :, width - used : width] = kept if rows is None else kept[rows]
        start += count
    return out


def rows_attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention of new tokens to the shared prefix (``shared_prefix``, a RowCache of one row) and to their own row.

    Args:
        module: The attention module; its ``layer_idx`` finds the prefix.
        query: (B, H, Q, D).
        key: (B, K, T, D), the row's own tokens including the new ones.
        value: Like ``key``.
        attention_mask: Bool, True = attend, (B, 1, Q, T).
        scaling: Factor on the scores; default ``D ** -0.5``.
        **kwargs: ``shared_prefix``, and what the model adds.

    Returns:
        (B, Q, H, D) and None.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(name)
    prefix = kwargs.get("shared_prefix")
    num_rows, num_heads, num_new, head_size = query.shape
    num_kv_heads = key.shape[1]
    scaling = head_size**-0.5 if scaling is None else scaling
    prefix_key = prefix_value = None
    if prefix is not None:
        layer = prefix.layers[module.layer_idx]
        prefix_key, prefix_value = layer.keys[0, :, : layer.length], layer.values[0, :, : layer.length]
    if num_new > 1:
        if prefix is not None:
            key = torch.cat([prefix_key.expand(num_rows, -1, -1, -1), key], 2)
            value = torch.cat([prefix_value.expand(num_rows, -1, -1, -1), value], 2)
            attention_mask = F.pad(attention_mask, (prefix_key.shape[1], 0), value=True)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=num_heads != num_kv_heads
        )
        return out.transpose(1, 2).contiguous(), None
    query_BKGD = query.reshape(num_rows, num_kv_heads, -1, head_size) * scaling
    scores_BKGT = (query_BKGD @ key.transpose(2, 3)).masked_fill(~attention_mask, float("-inf"))
    if prefix is None:
        out_BKGD = scores_BKGT.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    else:
        # All rows and query heads of a key head are one matrix, so the prefix is read once and not once per row.
        query_KND = query_BKGD.transpose(0, 1).reshape(num_kv_heads, -1, head_size)
        scores_KNP = query_KND @ prefix_key.transpose(1, 2)
        scores_BKGP = scores_KNP.view(num_kv_heads, num_rows, -1, prefix_key.shape[1]).transpose(0, 1)
        weights = torch.cat([scores_BKGP, scores_BKGT], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
        weights_KNP = weights[..., : prefix_key.shape[1]].transpose(0, 1).reshape(scores_KNP.shape)
        own_BKGD = weights[..., prefix_key.shape[1] :] @ value
        out_BKGD = own_BKGD + (weights_KNP @ prefix_value).view(own_BKGD.transpose(0, 1).shape).transpose(0, 1)
    return out_BKGD.reshape(num_rows, 1, num_heads, -1), None


AttentionInterface.register(ATTENTION, rows_attention)

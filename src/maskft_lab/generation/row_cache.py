"""Keys and values of rows that share a prefix: the prefix is kept once, and attended to once for all rows.

Few-shot prompts differ in their last hundred of a thousand tokens. Here a row keeps only the tokens after the prefix,
and one attention function stores keys and values and joins the two parts. It also reads grouped keys and values without
repeating them for each query head, and writes new tokens in place, where the usual cache copies itself at every token.

Shapes: B rows, H query heads, K key heads, G = H / K, P prefix tokens, T tokens of a row, Q new ones, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from maskft.loss import pad
from maskft.models import attention_by

ATTENTION = "maskft_rows"
SPARE_TOKENS = 64

# Arguments that other kinds of attention pass to their attention function, and that this one does not support.
UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "head_mask")

# Query (B, H, Q, D), key and value (B, K, Q, D) of the new tokens in one layer.
QueryKeyValue = tuple[Tensor, Tensor, Tensor]
# Called with the index of a layer, its scaling and its new tokens; returns the output of attention, (B, Q, H, D).
Attend = Callable[[int, float, QueryKeyValue], Tensor]


class RowCache:
    """Keys and values of a prefix, and of the tokens after it in each row; to be used inside `attention`.

    Args:
        model: A causal language model.
        num_rows: Room for this many rows.
        prefix: Tokens with which every row begins; may be empty.
    """

    def __init__(
        self,
        model,
        num_rows: int,
        prefix: Sequence[int],
    ):
        self._model = model
        self._num_rows = num_rows
        self._prefix_length = len(prefix)
        # Layer -> keys and values of the prefix, each (K, P, D).
        self._prefix: dict[int, list[Tensor]] = {}
        # Layer -> keys and values of the rows, each (num_rows, K, capacity, D).
        self._rows: dict[int, list[Tensor]] = {}

        # Read as one row. Each layer's keys and values are kept on the way, by `_attend_in_prefix`.
        if prefix:
            ids_1P = torch.tensor([list(prefix)], device=model.device)
            positions_P = torch.arange(len(prefix), device=model.device)
            self._forward(ids_1P, positions_P[None], self._attend_in_prefix)

    def add(
        self,
        rows: Sequence[Sequence[int]],
        first: int,
    ) -> Tensor:
        """Read prompts, and put them in the places from ``first`` on.

        Args:
            rows: Token ids of each prompt, with the prefix.
            first: Place of the first of them.

        Returns:
            The logits after each prompt, (B, V).
        """
        device = self._model.device
        num_shared = self._prefix_length
        after_prefix = [ids[num_shared:] for ids in rows]
        # On the left, so that the logits after each prompt are in the last column.
        ids_BQ, is_token_BQ = pad(after_prefix, 0, device, side="left")
        num_new = ids_BQ.shape[1]
        num_padded_B1 = (is_token_BQ == 0).sum(1, keepdim=True)

        # Columns with padding -> places after the prefix; padding itself takes place 0.
        columns_Q = torch.arange(num_new, device=device)
        places_BQ = (columns_Q - num_padded_B1).clamp(min=0)
        # Positions as the model would have seen them in the whole row: position embeddings are part of the keys.
        positions_BQ = num_shared + places_BQ

        # Padding attends to itself: with nothing to attend to it would turn NaN, and NaN times zero is NaN.
        columns_Q1 = columns_Q[:, None]
        is_earlier_QQ = columns_Q <= columns_Q1
        is_itself_QQ = columns_Q == columns_Q1
        is_token_B1Q = is_token_BQ.bool()[:, None]
        mask_BQQ = (is_token_B1Q & is_earlier_QQ) | is_itself_QQ
        # All tokens attend to the whole prefix.
        mask_BQT = F.pad(mask_BQQ, (num_shared, 0), value=True)
        mask_B1QT = mask_BQT[:, None]

        # Rows are stored without their padding: place 0 of the cache is the first token after the prefix. Behind the
        # last token of a short row its copies follow, until the steps overwrite them.
        order_BQ = (columns_Q + num_padded_B1).clamp(max=num_new - 1)
        order_B1Q1 = order_BQ[:, None, :, None]

        attend = partial(self._attend_in_prompts, first, order_B1Q1, mask_B1QT)
        return self._forward(ids_BQ, positions_BQ, attend)

    def step(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Read the last token of every row.

        Args:
            rows: Token ids of each row, with the prefix; row i is in place i.

        Returns:
            The logits after each row, (B, V).
        """
        device = self._model.device
        # Everything before the last token is in the cache already.
        last_tokens = [ids[-1:] for ids in rows]
        last_positions = [len(ids) - 1 for ids in rows]
        ids_B1 = torch.tensor(last_tokens, device=device)
        positions_B = torch.tensor(last_positions, device=device)
        places_B = positions_B - self._prefix_length

        # Rows differ in length: of a shorter one, the places behind its last token hold nothing of this row.
        width = int(places_B.max()) + 1
        places_T = torch.arange(width, device=device)
        is_later_BT = places_T > places_B[:, None]
        # For all heads, and the one query.
        is_later_B11T = is_later_BT[:, None, None]

        # Indexes (num_rows, K, capacity, D): for each row, all key heads at the row's own new place.
        rows_B = torch.arange(len(rows), device=device)
        new_places = (rows_B, slice(None), places_B)

        attend = partial(self._attend_in_step, new_places, is_later_B11T)
        return self._forward(ids_B1, positions_B[:, None], attend)

    def move(
        self,
        source: int,
        target: int,
    ) -> None:
        """Copy a row to the place of another."""
        for keys_and_values in self._rows.values():
            for tensor in keys_and_values:
                tensor[target] = tensor[source]

    def _forward(
        self,
        ids_BQ: Tensor,
        positions_BQ: Tensor,
        attend: Attend,
    ) -> Tensor:
        """Run the model with ``attend`` as the attention of every layer; returns the last logits, (B, V)."""
        # transformers passes arguments that it does not know on to the attention function: `_attend` gets ``attend``.
        # No cache of transformers, and logits of the last column only: those of a long prompt would be large.
        output = self._model(
            input_ids=ids_BQ,
            position_ids=positions_BQ,
            use_cache=False,
            logits_to_keep=1,
            attend=attend,
        )
        return output.logits[:, -1]

    # The attention of a layer in the three forward passes

    def _attend_in_prefix(
        self,
        layer: int,
        scaling: float,
        query_key_value: QueryKeyValue,
    ) -> Tensor:
        query, key, value = query_key_value
        self._prefix[layer] = [key[0], value[0]]  # there is one row
        return _attention(query, key, value, scaling, None)

    def _attend_in_prompts(
        self,
        first: int,
        order_B1Q1: Tensor,
        mask_B1QT: Tensor,
        layer: int,
        scaling: float,
        query_key_value: QueryKeyValue,
    ) -> Tensor:
        query, key, value = query_key_value
        num_rows = len(key)
        width = key.shape[2]
        last = first + num_rows
        kept_keys, kept_values = self._room(layer, key, value, width)
        # Indexes (num_rows, K, capacity, D): these rows, all key heads, and as many tokens as the longest prompt has.
        new_places = (
            slice(first, last),
            slice(None),
            slice(width),
        )
        kept_keys[new_places] = torch.take_along_dim(key, order_B1Q1, 2)
        kept_values[new_places] = torch.take_along_dim(value, order_B1Q1, 2)

        if layer in self._prefix:
            prefix_key_KPD, prefix_value_KPD = self._prefix[layer]
            # A view, without copies. The concatenation below copies it once for each row, which happens only when
            # prompts are read.
            prefix_key_BKPD = prefix_key_KPD.expand(num_rows, -1, -1, -1)
            prefix_value_BKPD = prefix_value_KPD.expand(num_rows, -1, -1, -1)
            key = torch.cat([prefix_key_BKPD, key], 2)
            value = torch.cat([prefix_value_BKPD, value], 2)
        return _attention(query, key, value, scaling, mask_B1QT)

    def _attend_in_step(
        self,
        new_places: tuple[Tensor, slice, Tensor],
        is_later_B11T: Tensor,
        layer: int,
        scaling: float,
        query_key_value: QueryKeyValue,
    ) -> Tensor:
        query, key, value = query_key_value
        num_rows, num_heads, _, head_size = query.shape
        num_kv_heads = key.shape[1]
        width = is_later_B11T.shape[-1]

        kept_keys, kept_values = self._room(layer, key, value, width)
        # One new token for each row, (B, K, D).
        kept_keys[new_places] = key[:, :, 0]
        kept_values[new_places] = value[:, :, 0]
        key_BKTD = kept_keys[:num_rows, :, :width]
        value_BKTD = kept_values[:num_rows, :, :width]

        # The query heads of a key head are rows of one matrix: keys and values are not repeated for each of them.
        query_BKGD = query.reshape(num_rows, num_kv_heads, -1, head_size) * scaling
        key_BKDT = key_BKTD.transpose(2, 3)
        scores_BKGT = query_BKGD @ key_BKDT
        # Not all of a row is masked: its own new token never is.
        scores_BKGT = scores_BKGT.masked_fill(is_later_B11T, float("-inf"))

        if layer not in self._prefix:
            weights_BKGT = _softmax(scores_BKGT, value.dtype)
            out_BKGD = weights_BKGT @ value_BKTD
            return out_BKGD.reshape(num_rows, 1, num_heads, -1)

        # All rows and query heads of a key head are one matrix, N = B x G, so the prefix is read once for all rows.
        prefix_key_KPD, prefix_value_KPD = self._prefix[layer]
        num_shared = prefix_key_KPD.shape[1]
        query_KBGD = query_BKGD.transpose(0, 1)
        query_KND = query_KBGD.reshape(num_kv_heads, -1, head_size)
        prefix_key_KDP = prefix_key_KPD.transpose(1, 2)
        scores_KNP = query_KND @ prefix_key_KDP
        scores_KBGP = scores_KNP.view(num_kv_heads, num_rows, -1, num_shared)
        scores_BKGP = scores_KBGP.transpose(0, 1)

        # One softmax over both parts, which gives the weights that attention over the whole row would have.
        scores = torch.cat([scores_BKGP, scores_BKGT], -1)
        weights = _softmax(scores, value.dtype)
        weights_BKGP = weights[..., :num_shared]
        weights_BKGT = weights[..., num_shared:]
        weights_KNP = weights_BKGP.transpose(0, 1).reshape(scores_KNP.shape)

        # The output is the sum over both parts.
        out_of_rows_BKGD = weights_BKGT @ value_BKTD
        out_of_prefix_KND = weights_KNP @ prefix_value_KPD
        value_size = value.shape[-1]
        out_of_prefix_KBGD = out_of_prefix_KND.view(num_kv_heads, num_rows, -1, value_size)
        out_BKGD = out_of_rows_BKGD + out_of_prefix_KBGD.transpose(0, 1)
        return out_BKGD.reshape(num_rows, 1, num_heads, -1)

    def _room(
        self,
        layer: int,
        key: Tensor,
        value: Tensor,
        width: int,
    ) -> list[Tensor]:
        """Keys and values of a layer, with room for at least ``width`` tokens."""
        if layer in self._rows:
            rows = self._rows[layer]
            capacity = rows[0].shape[2]
            if capacity >= width:
                return rows
        else:
            # The sizes of the heads are known from the first keys and values only.
            _, *key_shape = key.shape
            _, *value_shape = value.shape
            zero_keys = key.new_zeros(self._num_rows, *key_shape)
            zero_values = value.new_zeros(self._num_rows, *value_shape)
            rows = [zero_keys, zero_values]
            capacity = key.shape[2]

        # Growth copies everything: some spare tokens make it rare.
        num_more = width + SPARE_TOKENS - capacity
        at_end_of_tokens = (0, 0, 0, num_more)  # F.pad counts from the last dimension, D, to the one before it
        self._rows[layer] = [F.pad(tensor, at_end_of_tokens) for tensor in rows]
        return self._rows[layer]


def kept_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of keys and values in the cache, for those of ``dtype`` that a model computes.

    Under autocast the products of attention would cast float32 keys in every step, and to the same numbers each time.
    """
    if dtype == torch.float32 and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return dtype


def _softmax(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Attention weights, computed in float32 as in transformers' eager attention."""
    weights = scores.softmax(-1, dtype=torch.float32)
    return weights.to(dtype)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    mask: Tensor | None,
) -> Tensor:
    """Attention of many tokens, (B, Q, H, D); without ``mask`` each attends to itself and those before it."""
    num_groups = query.shape[1] // key.shape[1]
    is_grouped = num_groups > 1
    if is_grouped and query.device.type != "cpu":
        # A GPU's fused kernels take either a mask or grouped heads. torch would compute the plain way, which holds a
        # (Q, T) matrix of each head: for long prompts more than all that `memory_bound_rows` counts.
        key = key.repeat_interleave(num_groups, 1)
        value = value.repeat_interleave(num_groups, 1)
        is_grouped = False
    # Without a mask the fused kernels need no (Q, T) matrix.
    out_BHQD = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=is_grouped,
    )
    return out_BHQD.transpose(1, 2).contiguous()


def _attend(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask,
    scaling=None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attention in the interface of transformers, which hands on ``attend`` from `RowCache`."""
    # Raised when `greedy_generate` tries the model; transformers then generates in its own way.
    for name in UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"attention with {name}")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    attend: Attend = kwargs["attend"]
    key = key.to(kept_dtype(key.dtype, key.device))
    value = value.to(kept_dtype(value.dtype, value.device))
    output = attend(module.layer_idx, scaling, (query, key, value))
    return output, None  # no attention weights


AttentionInterface.register(ATTENTION, _attend)


def attention(model) -> AbstractContextManager[None]:
    """Let the model attend through `RowCache` inside the context, also one that raises."""
    return attention_by(model, ATTENTION)

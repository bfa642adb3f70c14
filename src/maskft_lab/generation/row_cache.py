"""Keys and values of rows that share a prefix: the prefix is kept once, and attended to once for all rows.

Few-shot prompts differ in their last hundred of a thousand tokens. Here every row keeps its own part only, and one
attention function keeps keys and values, and joins the two parts. It also reads grouped keys and values without
repeating them for each query head, and writes new tokens in place, where the usual cache copies itself at every token.

Shapes: B rows, H query heads, K key heads, G = H / K, P prefix tokens, T tokens of a row, Q new ones, D head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from maskft.loss import pad

ATTENTION = "maskft_rows"
_SPARE_TOKENS = 64
# What other kinds of attention hand to their attention function, and this one does not compute.
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias", "head_mask")


class RowCache:
    """Keys and values of a prefix and of rows, whose own tokens all begin at place 0; to be used inside `attention`.

    Args:
        model: A causal language model.
        num_rows: Room for this many rows.
        prefix: Tokens with which every row begins; may be empty.
    """

    def __init__(self, model, num_rows: int, prefix: Sequence[int]):
        self._model, self._num_rows, self._prefix_length = model, num_rows, len(prefix)
        self._prefix: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> (K, P, D)
        self._rows: dict[int, list[Tensor]] = {}  # layer -> (num_rows, K, capacity, D)
        if prefix:
            ids_1P = torch.tensor([list(prefix)], device=model.device)
            self._forward(ids_1P, torch.arange(len(prefix), device=model.device)[None], self._keep_prefix)

    def add(self, rows: Sequence[Sequence[int]], first: int) -> Tensor:
        """Read prompts, the rows from ``first`` on; returns the logits after each, (B, V)."""
        device = self._model.device
        shared = self._prefix_length
        ids_BQ, is_own_BQ = pad([ids[shared:] for ids in rows], 0, device, side="left")
        padded_B1 = (is_own_BQ == 0).sum(1, keepdim=True)
        places_Q = torch.arange(ids_BQ.shape[1], device=device)
        # Padding attends to itself: with nothing to attend to it would turn NaN, and NaN times zero is NaN.
        earlier_QQ = places_Q <= places_Q[:, None]
        itself_QQ = places_Q == places_Q[:, None]
        mask_BQQ = (is_own_BQ.bool()[:, None] & earlier_QQ) | itself_QQ
        mask_B1QT = F.pad(mask_BQQ, (shared, 0), value=True)[:, None]
        order_BQ = (places_Q + padded_B1).clamp(max=len(places_Q) - 1)  # without the padding on the left
        return self._forward(
            ids_BQ,
            shared + (places_Q - padded_B1).clamp(min=0),
            lambda *new: self._add(first, order_BQ[:, None, :, None], mask_B1QT, *new),
        )

    def step(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Read the last token of every row; returns the logits after it, (B, V)."""
        device = self._model.device
        places_B = torch.tensor([len(ids) - 1 - self._prefix_length for ids in rows], device=device)
        width = int(places_B.max()) + 1
        is_later_BT = torch.arange(width, device=device) > places_B[:, None]
        each_B = torch.arange(len(rows), device=device)
        ids_B1 = torch.tensor([ids[-1:] for ids in rows], device=device)
        return self._forward(
            ids_B1,
            (self._prefix_length + places_B)[:, None],
            lambda *new: self._step((each_B, slice(None), places_B), is_later_BT[:, None, None], *new),
        )

    def move(self, source: int, target: int) -> None:
        """Put a row in the place of another."""
        for tensors in self._rows.values():
            for tensor in tensors:
                tensor[target] = tensor[source]

    def _forward(self, ids_BQ: Tensor, positions_BQ: Tensor, attend) -> Tensor:
        return self._model(
            input_ids=ids_BQ, position_ids=positions_BQ, use_cache=False, logits_to_keep=1, attend=attend
        ).logits[:, -1]

    # What a layer does with new tokens: query (B, H, Q, D), key and value (B, K, Q, D) -> (B, Q, H, D)

    def _keep_prefix(self, layer: int, scaling: float, query_key_value: tuple[Tensor, ...]) -> Tensor:
        query, key, value = query_key_value
        self._prefix[layer] = (key[0], value[0])
        return _attention(query, key, value, scaling, None)

    def _add(self, first: int, order_B1Q1: Tensor, mask_B1QT: Tensor, layer: int, scaling: float, query_key_value):
        query, key, value = query_key_value
        count = len(key)
        width = key.shape[2]
        for kept, new in zip(self._room(layer, key, value, width), (key, value), strict=True):
            kept[first : first + count, :, :width] = torch.take_along_dim(new, order_B1Q1, 2)
        if layer in self._prefix:
            parts = zip(self._prefix[layer], (key, value), strict=True)
            key, value = (torch.cat([shared.expand(count, -1, -1, -1), own], 2) for shared, own in parts)
        return _attention(query, key, value, scaling, mask_B1QT)

    def _step(self, places, is_later_B11T: Tensor, layer: int, scaling: float, query_key_value) -> Tensor:
        query, key, value = query_key_value
        (num_rows, num_heads, _, head_size), num_kv_heads = query.shape, key.shape[1]
        width = is_later_B11T.shape[-1]
        prefix = self._prefix.get(layer)
        room = self._room(layer, key, value, width)
        for kept, new in zip(room, (key, value), strict=True):
            kept[places] = new[:, :, 0]
        key, value = (kept[:num_rows, :, :width] for kept in room)
        query_BKGD = query.reshape(num_rows, num_kv_heads, -1, head_size) * scaling
        scores = (query_BKGD @ key.transpose(2, 3)).masked_fill(is_later_B11T, float("-inf"))
        if prefix is None:
            out_BKGD = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
        else:
            # All rows and query heads of a key head are one matrix, so the prefix is read once and not once per row.
            query_KND = query_BKGD.transpose(0, 1).reshape(num_kv_heads, -1, head_size)
            scores_KNP = query_KND @ prefix[0].transpose(1, 2)
            num_shared = scores_KNP.shape[-1]
            scores_BKGP = scores_KNP.view(num_kv_heads, num_rows, -1, num_shared).transpose(0, 1)
            weights = torch.cat([scores_BKGP, scores], -1).softmax(-1, dtype=torch.float32).to(value.dtype)
            weights_KNP = weights[..., :num_shared].transpose(0, 1).reshape(scores_KNP.shape)
            own_BKGD = weights[..., num_shared:] @ value
            out_BKGD = own_BKGD + (weights_KNP @ prefix[1]).view(own_BKGD.transpose(0, 1).shape).transpose(0, 1)
        return out_BKGD.reshape(num_rows, 1, num_heads, -1)

    def _room(self, layer: int, key: Tensor, value: Tensor, width: int) -> list[Tensor]:
        """Keys and values of a layer, with room for ``width`` tokens."""
        rows = self._rows.get(layer) or [new.new_zeros(self._num_rows, *new.shape[1:]) for new in (key, value)]
        if rows[0].shape[2] < width or layer not in self._rows:
            more = width + _SPARE_TOKENS - rows[0].shape[2]
            self._rows[layer] = [F.pad(tensor, (0, 0, 0, more)) for tensor in rows]
        return self._rows[layer]


def _attention(query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None) -> Tensor:
    """Attention of many tokens; without ``mask`` to those before each."""
    how = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": query.shape[1] != key.shape[1]}
    return F.scaled_dot_product_attention(query, key, value, scale=scaling, **how).transpose(1, 2).contiguous()


def _attend(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, **kwargs):
    """Transformers' interface of attention; ``attend`` comes from `RowCache`."""
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"attention with {name}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return kwargs["attend"](module.layer_idx, scaling, (query, key, value)), None


AttentionInterface.register(ATTENTION, _attend)


@contextlib.contextmanager
def attention(model) -> Iterator[None]:
    """Let the model attend by `RowCache` inside."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    base.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        base.set_attn_implementation(before)

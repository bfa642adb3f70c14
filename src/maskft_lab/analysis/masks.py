"""Where masks remove (Figs 13 and 14)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from maskft.adapter.mask_set import MaskSet
from maskft.models import load_config
from maskft_base.errors import UserError

from .records import digest_folder, is_finished, write_record

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def layer_of(module: str) -> str:
    """Number of the layer that a module lies in, ``other`` outside the layers."""
    return next((part for part in module.split(".") if part.isdigit()), "other")


def head_shares(mask: Tensor, projection: str, num_heads: int, num_kv_heads: int) -> Tensor:
    """Share removed of the part of each attention head.

    Heads are blocks of rows of ``q_proj``, ``k_proj`` and ``v_proj``, (O, I) as a linear layer stores them, and blocks
    of columns of ``o_proj``. Where there are fewer key and value heads, each serves consecutive query heads.

    Returns:
        float32 (num_heads,); each query head has the share of the key or value head that it uses.

    Raises:
        UserError: If the matrix cannot be divided into the heads.
    """
    blocks = num_kv_heads if projection in ("k_proj", "v_proj") else num_heads
    removed = (~mask.T if projection == "o_proj" else ~mask).float()
    if removed.shape[0] % blocks or num_heads % blocks:
        raise UserError(f"{projection} of shape {tuple(mask.shape)} does not divide into {blocks} of {num_heads} heads")
    return removed.reshape(blocks, -1).mean(1).repeat_interleave(num_heads // blocks)


def shares_by_head(masks: MaskSet, num_heads: int, num_kv_heads: int) -> dict[str, dict[str, list[float]]]:
    """Layer -> projection of attention -> share removed per query head.

    ``qkv`` is the mean over Q, K and V where all three are masked: a cell of Fig. 13, a point of Fig. 14.
    """
    out: dict[str, dict[str, list[float]]] = {}
    for name, mask in masks.items():
        kind = name.rpartition(".")[2]
        if kind in _ATTENTION:
            out.setdefault(layer_of(name), {})[kind] = head_shares(mask, kind, num_heads, num_kv_heads).tolist()
    for found in out.values():
        if found.keys() >= {"q_proj", "k_proj", "v_proj"}:
            found["qkv"] = np.mean([found[kind] for kind in ("q_proj", "k_proj", "v_proj")], axis=0).tolist()
    return out


def chance_by_head(masks: MaskSet, num_heads: int, num_kv_heads: int) -> dict[str, float]:
    """Layer -> standard deviation of a head's ``qkv`` share, were the removed places of each matrix drawn at random.

    The number removed of a head's n weights, of N of which a share p is removed, is hypergeometric.
    """
    variances: dict[str, list[float]] = {}
    for name, mask in masks.items():
        kind = name.rpartition(".")[2]
        if kind in ("q_proj", "k_proj", "v_proj"):
            p, total = float((~mask).double().mean()), mask.numel()
            size = total // (num_heads if kind == "q_proj" else num_kv_heads)
            variances.setdefault(layer_of(name), []).append(p * (1 - p) / size * (total - size) / max(total - 1, 1))
    return {layer: sum(found) ** 0.5 / 3 for layer, found in variances.items() if len(found) == 3}


def describe_mask(masks: MaskSet, config) -> dict:
    """Where a mask of a model with this text configuration removes.

    Returns:
        ``num_weights``, ``num_removed``; shares in [0, 1] ``by_head``, and ``by_head_chance`` (where the configuration
        tells heads).
    """
    num_heads = getattr(config, "num_attention_heads", None)
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    return {
        "num_weights": masks.numel,
        "num_removed": masks.num_removed,
        "by_head": shares_by_head(masks, num_heads, num_kv_heads) if num_heads else {},
        "by_head_chance": chance_by_head(masks, num_heads, num_kv_heads) if num_heads else {},
    }


def analyse_masks(file: Path, adapters: Mapping[str, tuple[str, str]]) -> None:
    """Write shares of each mask (``.json``): ``masks`` NAME: `describe_mask`.

    Args:
        file: Where the record goes.
        adapters: Name -> adapter folder, and the model that it was trained over.
    """
    settings: dict[str, Any] = {"what": "masks"}
    settings["masks"] = {name: [digest_folder(folder) for folder in pair] for name, pair in adapters.items()}
    if is_finished(file, settings):
        return
    sets = {name: MaskSet.from_adapter(folder) for name, (folder, _) in adapters.items()}
    configs = {name: load_config(start).get_text_config() for name, (_, start) in adapters.items()}
    write_record(file, {"masks": {name: describe_mask(sets[name], configs[name]) for name in sets}}, settings)

"""Shares that masks remove of each attention head (Figs 13 and 14)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from maskft.masks.mask_set import MaskSet, read_config
from maskft.masks.summary import in_layer_order
from maskft.models import load_config
from maskft_common.errors import UserError

from .records import Report, digest_folder, is_finished, no_report, write_record

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def masks_of(adapter: str) -> MaskSet:
    """The masks of an adapter that only sets weights to 0.

    Raises:
        UserError: If the model with these weights at 0 is not the one that was trained.
    """
    config = read_config(adapter)
    # Analyses multiply the base's weights by the mask, which is not the trained model if removed weights have another
    # value, or other modules were trained too.
    if config.removed_value != "zero" or config.weights_sha256:
        raise UserError(
            f"{adapter!r} does not only set weights to 0 (removed_value, or modules_to_save), and this analysis is of "
            "masks that do: name another with --mask"
        )
    return MaskSet.from_adapter(adapter)


def head_shares(
    mask: Tensor,
    num_blocks: int,
    num_heads: int,
) -> Tensor:
    """Share removed of the part of each query head.

    Args:
        mask: Of ``q_proj``, ``k_proj`` or ``v_proj``, (O, I) as a linear layer stores it: heads are blocks of rows.
        num_blocks: Its heads; where there are fewer key and value heads, each serves consecutive query heads.
        num_heads: Query heads.

    Returns:
        float32 (num_heads,); each query head has the share of the key or value head that it uses.

    Raises:
        UserError: If the matrix cannot be divided into the heads.
    """
    # Output features are heads one after another, each of head_dim rows.
    num_rows = mask.shape[0]
    if num_rows % num_blocks or num_heads % num_blocks:
        raise UserError(f"a matrix of shape {tuple(mask.shape)} does not divide into {num_blocks} of {num_heads} heads")

    is_removed = ~mask
    # One row for each head.
    removed_of_blocks = is_removed.float().reshape(num_blocks, -1)
    shares_of_blocks = removed_of_blocks.mean(1)
    # With grouped-query attention, consecutive query heads share a key and a value head.
    heads_of_block = num_heads // num_blocks
    return shares_of_blocks.repeat_interleave(heads_of_block)


def shares_by_head(
    masks: MaskSet,
    num_heads: int,
    num_kv_heads: int,
) -> dict[str, dict[str, Any]]:
    """Layer -> ``shares`` removed per query head and their ``chance``, of layers whose Q, K and V are all masked.

    Layers are in the order of the model, which is that of the rows of Fig. 13.
    A share is the mean over Q, K and V: a cell of Fig. 13, a point of Fig. 14. ``chance`` is its standard deviation if
    the removed places of each matrix were drawn at random.
    """
    # Layer -> shares of each of its matrices, and the variance of each by chance.
    shares: dict[str, list[list[float]]] = {}
    variances: dict[str, list[float]] = {}
    # An adapter's file has layer 10 before layer 2.
    for name in sorted(masks, key=in_layer_order):
        mask = masks[name]
        *parts, kind = name.split(".")
        if kind not in _PROJECTIONS:
            continue
        # The 3 of model.layers.3.self_attn.q_proj.
        numbers = [part for part in parts if part.isdigit()]
        layer = numbers[0] if numbers else "other"
        # With grouped-query attention, K and V have fewer heads than Q.
        num_blocks = num_heads if kind == "q_proj" else num_kv_heads

        # Expanded to query heads, so that Q, K and V can be averaged head by head.
        shares_of_matrix = head_shares(mask, num_blocks, num_heads)
        shares_of_layer = shares.setdefault(layer, [])
        shares_of_layer.append(shares_of_matrix.tolist())

        variance = _variance_by_chance(mask, num_blocks)
        variances_of_layer = variances.setdefault(layer, [])
        variances_of_layer.append(variance)

    found: dict[str, dict[str, Any]] = {}
    for layer in shares:
        num_matrices = len(shares[layer])
        # With some of Q, K and V only, the mean would be of something else than in other layers.
        if num_matrices != len(_PROJECTIONS):
            continue
        # The standard deviation of a mean of independent shares.
        chance = sum(variances[layer]) ** 0.5 / num_matrices
        mean_shares = np.mean(shares[layer], axis=0)
        found[layer] = {
            "shares": mean_shares.tolist(),
            "chance": chance,
        }
    return found


def _variance_by_chance(mask: Tensor, num_blocks: int) -> float:
    """Variance of the share removed of a block, if the places were drawn at random.

    The number removed of a block's n weights, of N of which a share p is removed, is hypergeometric; its share has the
    variance p (1 - p) / n * (N - n) / (N - 1).
    """
    is_removed = ~mask
    # In float64: a float32 mean of millions of entries loses digits.
    p = float(is_removed.double().mean())
    total = mask.numel()
    size = total // num_blocks

    # With replacement the variance would be p (1 - p) / n. A block that is all of the matrix has no variance at all.
    with_replacement = p * (1 - p) / size
    num_others = total - size
    return with_replacement * num_others / max(total - 1, 1)


def describe_mask(masks: MaskSet, config) -> dict:
    """``num_weights``, ``num_removed``, and `shares_by_head` if the model's text configuration has heads."""
    by_head: dict[str, dict[str, Any]] = {}
    # Models without attention, such as Mamba, have no heads.
    num_heads = getattr(config, "num_attention_heads", None)
    if num_heads:
        num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads  # not set: each head has its own
        by_head = shares_by_head(masks, num_heads, num_kv_heads)
    return {
        "num_weights": masks.numel,
        "num_removed": masks.num_removed,
        "by_head": by_head,
    }


def analyse_masks(
    file: Path,
    adapters: Mapping[str, tuple[str, str]],
    report: Report = no_report,
) -> None:
    """Write shares of each mask (``.json``): ``masks`` NAME: `describe_mask`.

    Args:
        file: Where the record goes.
        adapters: Name -> adapter folder, and the model that it was trained over.
        report: Called after each mask.
    """
    digests: dict[str, list[str]] = {}
    for name, (adapter, start) in adapters.items():
        adapter_digest = digest_folder(adapter)
        start_digest = digest_folder(start)
        digests[name] = [adapter_digest, start_digest]
    # The start as well as the adapter: the number of heads is from the configuration of the start.
    settings: dict[str, Any] = {
        "what": "masks by head",
        "masks": digests,
    }
    if is_finished(file, settings):
        return

    found: dict[str, dict] = {}
    for name, (adapter, start) in adapters.items():
        config = load_config(start).get_text_config()
        masks = MaskSet.from_adapter(adapter)
        found[name] = describe_mask(masks, config)
        report(len(found), len(adapters))
    write_record(file, {"masks": found}, settings)

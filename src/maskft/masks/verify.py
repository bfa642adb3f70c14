"""Check an adapter folder: every checksum, the counts, and that it fits a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskft_common.errors import UserError

from ..masking import num_removed
from ..tuner import adapter_layers
from ..tuner.selection import current_sparsity
from ..tuner.targets import listed
from .codec import decode_mask
from .fingerprints import check_base
from .mask_set import AdapterConfig, describe, read_coded, read_config
from .merge import load_masked


def verify(adapter: str | Path, base: str | None = None) -> list[str]:
    """Check an adapter; returns one line per check that passed.

    Args:
        adapter: Adapter folder.
        base: Base model to check it against; None: only the file itself is checked.

    Raises:
        UserError: At the first check that fails.
    """
    config, coded = read_config(adapter), read_coded(adapter)
    passed = [f"format version {config.format_version}, {len(coded)} masks"]
    passed.append("masks match the configuration's mask_sha256")
    if config.weights_sha256:
        passed.append(f"replaces weights of the base, as the configuration says: {listed(config.weights_sha256)}")
    for name, data in coded.items() if base is None else ():  # else when it is loaded, each for its layer
        decode_mask(data, name)
    passed.append("sha256 of every mask matches")
    passed.append(_check_counts(describe(coded), config))
    if base is not None:
        model, _, _ = load_masked(adapter, base)
        if not config.verify_base:  # else it was checked when it was loaded
            check_base(adapter_layers(model).values(), config)
        if config.base_fingerprint is None:
            known = "match; its weights: not checked, none recorded"
        else:
            known = "and base fingerprint match"
        passed.append(f"fits {base}: names, shapes {known}")
        if config.removed_value == "base":
            is_checked = config.verify_base and config.removed_value_fingerprint
            known = "and fingerprint match" if is_checked else "match; its weights: not checked"
            passed.append(f"removed weights are those of {config.removed_value_model}: shapes {known}")
    elif config.removed_value == "base":
        passed.append(f"removed weights take their values in {config.removed_value_model}, not checked without --base")
    return passed


def _check_counts(rows: list[dict[str, Any]], config: AdapterConfig) -> str:
    total, removed = sum(row["numel"] for row in rows), sum(row["num_removed"] for row in rows)
    is_of_each = config.selection == "topk" and config.scope == "matrix"
    if is_of_each and not config.recipe.get("match_adapter"):
        sparsity = current_sparsity(config)
        for row in rows:
            if row["num_removed"] != num_removed(row["numel"], sparsity):
                raise UserError(
                    f"{row['module']} does not remove the share sparsity={sparsity} asks for; the adapter is damaged"
                )
    return f"removes {removed:,} of {total:,} weights ({removed / total:.2%})"

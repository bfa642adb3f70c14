"""Check an adapter folder: every checksum, the counts, and that it fits a base model."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from ..masking import num_removed
from ..tuner.codec import decode_mask
from .mask_set import describe, read_coded, read_config


def verify(adapter: str | Path, base: str | None = None) -> list[str]:
    """Check an adapter; returns one line per check that passed.

    Args:
        adapter: Adapter folder.
        base: Base model to check it against; None: only the file itself is checked.

    Raises:
        UserError: At the first check that fails.
    """
    from ..tuner.model import mask_fingerprint

    config, coded = read_config(adapter), read_coded(adapter)
    passed = [f"format version {config.get('format_version')}, {len(coded)} masks"]
    for name, data in coded.items():
        decode_mask(data, name)
    passed.append("sha256 of every mask matches")
    if config.get("mask_sha256") is None:
        raise UserError(f"{str(adapter)!r} has no mask_sha256 in its config; save the adapter again")
    if mask_fingerprint(coded) != config["mask_sha256"]:
        raise UserError("the masks do not match mask_sha256 in adapter_config.json; the two files are of two adapters")
    passed.append("masks match the configuration's mask_sha256")
    passed.append(_check_counts(describe(adapter), config))
    if base is not None:
        from .merge import load_masked

        load_masked(adapter, base)
        passed.append(f"fits {base}: names, shapes and base fingerprint match")
    return passed


def _check_counts(rows: list[dict], config: dict) -> str:
    recipe = config.get("recipe") or {}
    total, removed = sum(row["numel"] for row in rows), sum(row["num_removed"] for row in rows)
    if config["selection"] == "topk" and not recipe.get("match_adapter"):
        sparsity = config["sparsity"]
        if config["scope"] == "matrix":
            wrong = [row["module"] for row in rows if row["num_removed"] != num_removed(row["numel"], sparsity)]
        else:
            wrong = ["the pool"] if removed != num_removed(total, sparsity) else []
        if wrong:
            raise UserError(
                f"{wrong[0]} does not remove the share sparsity={sparsity} asks for; the adapter is damaged"
            )
    return f"removes {removed:,} of {total:,} weights ({removed / total:.2%})"

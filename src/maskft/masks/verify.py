"""Check an adapter folder: every checksum, the counts, and that it fits a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from maskft_common.errors import UserError

from ..masking import num_removed
from ..tuner import adapter_layers
from ..tuner.selection import current_sparsity
from ..tuner.targets import listed
from .adapter_file import check_scores
from .codec import decode_mask
from .fingerprints import check_base, quantisation_of
from .mask_set import AdapterConfig, read_coded, read_config, weights_file
from .merge import load_masked_model
from .summary import module_rows


def verify(adapter: str | Path, base: str | None = None) -> list[str]:
    """Check an adapter; returns one line per check that passed.

    Args:
        adapter: Adapter folder.
        base: Base model to check it against; None: only the files are checked.

    Raises:
        UserError: At the first check that fails.
    """
    config = read_config(adapter)
    coded = read_coded(adapter)
    # Both readers raise for the first mistake, so that these have passed.
    passed = [
        f"format version {config.format_version}, {len(coded)} masks",
        "masks match the configuration's mask_sha256",
    ]
    if config.weights_sha256:
        passed.append(f"replaces weights of the base, as the configuration says: {listed(config.weights_sha256)}")

    # Decoding compares the checksums. With a base, loading the adapter below decodes each mask for its layer.
    if base is None:
        for name, data in coded.items():
            decode_mask(data, name)
    passed.append("sha256 of every mask matches")
    if check_scores(weights_file(adapter)):
        passed.append("sha256 of all scores matches")
    # The counts come from the headers, which the checksums cover.
    counts = _check_counts(module_rows(coded), config)
    passed.append(counts)

    if base is not None:
        passed += _check_fit(adapter, base, config)
    elif config.removed_value == "base":
        passed.append(f"removed weights take their values in {config.removed_value_model}, not checked without --base")
    return passed


def _check_fit(adapter: str | Path, base: str, config: AdapterConfig) -> list[str]:
    """Check an adapter against a base model, by loading both; returns one line per check that passed."""
    model, _, _ = load_masked_model(adapter, base)
    layers = adapter_layers(model).values()
    if not config.verify_base:  # with verify_base loading has checked it
        check_base(layers, config)

    # Loading compares names and shapes in any case, the weights only where their fingerprint is recorded, and if they
    # are stored in another way it only warns. Each line says which.
    stored_as = quantisation_of(layers) or "floats"
    trained_over = config.base_quantisation or "floats"
    passed = []
    if config.base_fingerprint is None:
        passed.append(f"fits {base}: names, shapes match; its weights: not checked, none recorded")
    elif stored_as != trained_over:
        passed.append(
            f"fits {base}: names, shapes match; its weights: stored as {stored_as}, trained as {trained_over}"
        )
    else:
        passed.append(f"fits {base}: names, shapes and fingerprint of the masked layers match")

    if config.removed_value == "base":
        source = config.removed_value_model
        if config.verify_base and config.removed_value_fingerprint:
            passed.append(f"removed weights are those of {source}: shapes and fingerprint match")
        else:
            passed.append(f"removed weights are those of {source}: shapes match; its weights: not checked")
    return passed


def _check_counts(rows: list[dict[str, Any]], config: AdapterConfig) -> str:
    """Check that each matrix lost the share that the configuration asks for, where it asks for one.

    Masks with the counts of another adapter (``match_adapter``) and learners that cut at a value have any share.
    """
    is_of_each_matrix = config.selection == "topk" and not config.recipe.get("match_adapter")
    if is_of_each_matrix:
        # A checkpoint from the middle of a ramp has removed less than the final share.
        sparsity = current_sparsity(config)
        for row in rows:
            expected = num_removed(row["numel"], sparsity)
            if row["num_removed"] != expected:
                raise UserError(
                    f"{row['module']} does not remove the share sparsity={sparsity} asks for; the adapter is damaged"
                )

    total = sum(row["numel"] for row in rows)
    removed = sum(row["num_removed"] for row in rows)
    return f"removes {removed:,} of {total:,} weights ({removed / total:.2%})"

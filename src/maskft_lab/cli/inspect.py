"""``maskft inspect``: what an adapter removes."""

from __future__ import annotations

import json


def add_arguments(parser) -> None:
    """Options of ``maskft inspect``."""
    parser.add_argument("adapter", metavar="DIR", help="adapter folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args) -> None:
    """Print size, count and share per module and in total; then base and recipe."""
    from maskft.masks.mask_set import describe, read_coded, read_config
    from maskft_common.errors import printable

    config, rows = read_config(args.adapter), describe(read_coded(args.adapter))
    total = {key: sum(row[key] for row in rows) for key in ("numel", "num_removed", "num_bytes")}
    total["sparsity"] = total["num_removed"] / total["numel"]
    facts = {
        "base_model": config.base_model_name_or_path,
        "base_fingerprint": config.base_fingerprint,
        "removed_value_model": config.removed_value_model,
        "removed_value_fingerprint": config.removed_value_fingerprint,
        "mask_sha256": config.mask_sha256,
        "format_version": config.format_version,
        "has_scores": config.save_scores,
        "replaced_weights": sorted(config.weights_sha256) if config.weights_sha256 else None,
        **{f"recipe.{key}": value for key, value in config.recipe.items()},
    }
    if args.json:
        print(json.dumps({"modules": rows, "total": total, **facts}, indent=2))
        return
    from ..results.tables import Table, draw

    cells = [
        (
            row.get("module", "total"),
            "x".join(map(str, row.get("shape", ()))),
            f"{row['numel']:,}",
            f"{row['num_removed']:,}",
            f"{row['sparsity']:.2%}",
            f"{row['num_bytes']:,}",
            f"{8 * row['num_bytes'] / row['numel']:.3f}",
        )
        for row in (*rows, total)
    ]
    print(draw(Table(("module", "shape", "weights", "removed", "share", "bytes", "bits/weight"), cells), "terminal"))
    for key, value in facts.items():
        if value is not None:
            print(printable(f"{key}: {value}"))

"""``maskft inspect``: what an adapter removes."""

from __future__ import annotations

import json


def add_arguments(parser) -> None:
    """Options of ``maskft inspect``."""
    parser.add_argument("adapter", metavar="DIR", help="adapter folder")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args) -> None:
    """Print size, count and share per module, per layer and in all; then base and recipe."""
    from maskft.adapter.mask_set import describe, read_coded, read_config
    from maskft_base.errors import printable

    config, rows = read_config(args.adapter), describe(read_coded(args.adapter))
    total = _total(rows)
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
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("module")
    for column in ("shape", "weights", "removed", "share", "bytes", "bits/weight"):
        table.add_column(column, justify="right")
    for layer, members in _by_layer(rows).items():
        for row in members:
            _add(table, escape(printable(row["module"])), "x".join(map(str, row["shape"])), row)
        if len(members) > 1:
            _add(table, f"[bold]{escape(printable(layer))}[/bold]", "", _total(members))
    table.add_section()
    _add(table, "[bold]total[/bold]", "", total)
    # A pipe has no width; a table cut at 80 columns would lose numbers.
    console = Console(width=None if Console().is_terminal else 140)
    console.print(table)
    for key, value in facts.items():
        if value is not None:
            console.print(printable(f"{key}: {value}"), highlight=False, markup=False)


def _add(table, name: str, shape: str, row: dict) -> None:
    bits = 8 * row["num_bytes"] / row["numel"]
    table.add_row(
        name,
        shape,
        f"{row['numel']:,}",
        f"{row['num_removed']:,}",
        f"{row['sparsity']:.2%}",
        f"{row['num_bytes']:,}",
        f"{bits:.3f}",
    )


def _total(rows: list[dict]) -> dict:
    sums = {key: sum(row[key] for row in rows) for key in ("numel", "num_removed", "num_bytes")}
    return {**sums, "sparsity": sums["num_removed"] / sums["numel"]}


def _by_layer(rows: list[dict]) -> dict[str, list[dict]]:
    layers: dict[str, list[dict]] = {}
    for row in rows:
        parts = row["module"].split(".")
        index = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        layers.setdefault(".".join(parts[: index + 1]), []).append(row)
    return layers

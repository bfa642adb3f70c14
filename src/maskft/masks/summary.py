"""A saved mask in a table and a few lines, for people: ``maskft inspect``."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from maskft_common.errors import printable

from .adapter_file import holds_scores
from .codec import mask_info
from .mask_set import AdapterConfig, read_coded, read_config, weights_file

# The index of a decoder layer in a module's name. Longer numbers are names: Python takes seconds to read 5,000 digits.
_INDEX = re.compile(r"[0-9]{1,9}")
_WIDTH = 100  # columns of wrapped text
# Entries of a row that are added up in the total.
_COUNTS = ("numel", "num_removed", "num_bytes")


class AdapterSummary(NamedTuple):
    """Content of an adapter folder.

    Attributes:
        modules: A row per module, in the order of the layers, see :func:`module_rows`.
        total: ``numel``, ``num_removed``, ``num_bytes`` and ``sparsity`` over all modules.
        config: Its ``adapter_config.json``.
        has_scores: Whether the file holds scores, as in checkpoints, so that it can be trained further.
    """

    modules: list[dict[str, Any]]
    total: dict[str, Any]
    config: AdapterConfig
    has_scores: bool


def summarize(folder: str | Path) -> AdapterSummary:
    """Read an adapter folder; masks are checked by ``mask_sha256`` and not decoded."""
    config = read_config(folder)
    rows = module_rows(read_coded(folder))
    # Asked of the file: a checkpoint has scores whatever its configuration says.
    has_scores = holds_scores(weights_file(folder))
    return AdapterSummary(rows, _sum(rows), config, has_scores)


def as_json(summary: AdapterSummary) -> dict[str, Any]:
    """The summary for programs: rows, total and the fields of the configuration, the recipe's as ``recipe.NAME``."""
    config = summary.config
    replaced = sorted(config.weights_sha256) if config.weights_sha256 else None
    # The prefix keeps a recipe's names apart from the fields beside them.
    recipe = {f"recipe.{key}": value for key, value in config.recipe.items()}
    return {
        "modules": summary.modules,
        "total": summary.total,
        "base_model": config.base_model_name_or_path,
        "base_fingerprint": config.base_fingerprint,
        "removed_value_model": config.removed_value_model,
        "removed_value_fingerprint": config.removed_value_fingerprint,
        "mask_sha256": config.mask_sha256,
        "format_version": config.format_version,
        "has_scores": summary.has_scores,
        "replaced_weights": replaced,
        **recipe,
    }


def module_rows(coded: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """One row per module: module, shape, numel, num_removed, sparsity, sha256, num_bytes; layer 10 after layer 9."""
    rows = []
    for name in sorted(coded, key=in_layer_order):
        info = mask_info(coded[name], name)
        num_rows, num_columns = info["shape"]
        # Never 0: mask_info raises for an empty mask.
        numel = num_rows * num_columns
        row = {
            "module": name,
            "numel": numel,
            "sparsity": info["num_removed"] / numel,
            **info,
        }
        rows.append(row)
    return rows


def summary_lines(summary: AdapterSummary, all_modules: bool = False) -> list[str]:
    """The summary as lines of text: a table, and the facts that a reader asks for first.

    Args:
        summary: The summary.
        all_modules: A row per module; else modules of one name and shape in several layers share a row.
    """
    rows = summary.modules
    if not all_modules:
        rows = _by_kind(rows)
    # The head of the table, its rows, and the total as a row of the same form.
    cells = [("module", "shape", "weights", "removed", "share", "bits/weight")]
    for row in rows:
        cells.append(_cells(row))
    total_row = {"module": "total", **summary.total}
    cells.append(_cells(total_row))

    # Names to the left of their column, numbers to the right. A column is as wide as its longest text.
    column_widths = []
    for column in zip(*cells, strict=True):
        column_widths.append(max(map(len, column)))
    width_of_names, *widths = column_widths
    lines = []
    for name, *numbers in cells:
        padded = [name.ljust(width_of_names)]
        for number, width in zip(numbers, widths, strict=True):
            padded.append(number.rjust(width))
        lines.append("  ".join(padded))
    head, *body, total = lines
    rule = "-" * len(head)
    table = [head, rule, *body, rule, total]

    # Below the table, the facts: name and value, wrapped.
    facts = []
    for name, value in _facts(summary).items():
        fact = f"{name}: {printable(value)}"
        facts += textwrap.wrap(fact, _WIDTH, subsequent_indent="  ")
    return [*table, "", *facts]


def in_layer_order(name: str) -> list[tuple[int, str]]:
    """Sort key of a module's name: indices are compared as numbers, other parts as text."""
    key = []
    # A pair for each part, because Python cannot compare a number with a string. -1: names come before indices.
    for part in name.split("."):
        if _INDEX.fullmatch(part):
            key.append((int(part), ""))
        else:
            key.append((-1, part))
    return key


def _sum(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of several rows added up, and the sparsity over all of them."""
    total: dict[str, Any] = {}
    for key in _COUNTS:
        total[key] = sum(row[key] for row in rows)
    # The ratio of the sums: a mean of the modules' shares would count small modules as much as large ones.
    total["sparsity"] = total["num_removed"] / total["numel"]
    return total


def _by_kind(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the rows of modules that differ in the index of their layer only: ``model.layers.*.mlp.up_proj``."""
    # Name with "*" for the index, and shape -> rows of the modules.
    kinds: dict[tuple[str, tuple[int, int]], list[dict[str, Any]]] = {}
    for row in rows:
        parts = []
        for part in row["module"].split("."):
            parts.append("*" if _INDEX.fullmatch(part) else part)
        # Modules of one name may differ in shape, in models whose layers are not all of one size.
        kind = (".".join(parts), row["shape"])
        kinds.setdefault(kind, []).append(row)

    joined = []
    for (name, shape), members in kinds.items():
        # A module that is alone keeps its own name, with the index.
        if len(members) == 1:
            joined.append(members[0])
        else:
            row = {
                "module": f"{name} ({len(members)})",
                "shape": shape,
                **_sum(members),
            }
            joined.append(row)
    return joined


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table as text; the total has no shape."""
    sizes = row.get("shape", ())
    shape = " x ".join(str(size) for size in sizes)
    # The coded mask with its header; scores that a file may hold are not counted.
    bits_per_weight = 8 * row["num_bytes"] / row["numel"]
    return (
        printable(row["module"]),
        shape,
        f"{row['numel']:,}",
        f"{row['num_removed']:,}",
        f"{row['sparsity']:.2%}",
        f"{bits_per_weight:.3f}",
    )


def _facts(summary: AdapterSummary) -> dict[str, str]:
    """Facts by name, in the order in which they are printed, without those that the adapter does not have."""
    config = summary.config
    facts = {
        "base model": config.base_model_name_or_path,
        "base fingerprint": config.base_fingerprint,
        "mask sha256": config.mask_sha256,
        "size": f"{summary.total['num_bytes']:,} bytes in {len(summary.modules)} masks",
    }
    if config.removed_value_model:
        facts["removed weights take their value in"] = config.removed_value_model
    if config.weights_sha256:
        facts["replaces in full"] = ", ".join(sorted(config.weights_sha256))
    if summary.has_scores:
        facts["scores"] = "saved; it can be trained further"
    if config.recipe.get("verdict"):
        facts["on held-out rows"] = str(config.recipe["verdict"])
    settings = []
    for key, value in config.recipe.items():
        if key != "verdict":
            settings.append(f"{key}={value}")
    if settings:
        facts["made with"] = ", ".join(settings)
    # None: the adapter names no base, or records no fingerprint.
    shown = {}
    for name, value in facts.items():
        if value is not None:
            shown[name] = str(value)
    return shown

"""The page of one adapter: how much it removes of each matrix, in which rows and columns, and maps to zoom."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskft.adapter.mask_set import MaskSet, read_config
from maskft_base.files import write_text

from ..results.text import Table
from .charts import Missing
from .fig_masks import modules_chart
from .maps import mask_maps
from .methods import number
from .page import render

_SECTIONS = (("facts", "What it removes"), ("matrices", "Matrices"), ("maps", "Maps"), ("more", "More"))
_MORE = (
    ("fig13_heads", "Share removed by attention head", "heads are told by the base model's configuration", (13, 14)),
    ("masks_magnitude", "Share removed by magnitude", "magnitudes are those of the base model's weights", ()),
    ("masks_effects", "What removing does", "it is measured with the base model on held-out rows", ()),
    ("masks_agreement", "Agreement with other masks", "it needs a second mask", ()),
)


def write_adapter_page(adapter: str | Path, file: str | Path, facts: Mapping[str, Any]) -> None:
    """Write the page of an adapter, whole or not at all.

    Args:
        adapter: Its folder.
        file: The page.
        facts: What is told of it besides; what is None is left out.

    Raises:
        UserError: If the folder holds no mask of ours, or the file cannot be written.
    """
    masks, config = MaskSet.from_adapter(adapter), read_config(adapter)
    name = Path(adapter).resolve().name
    shares = {module: float((~mask).float().mean()) for module, mask in masks.items()}
    rows = [(key, str(value)) for key, value in facts.items() if value is not None]
    command = "maskft analyze STUDY --what masks"
    page = render(
        "adapter.html",
        title=name,
        kind="Mask Fine-Tuning: one mask",
        facts=[f"base model: {config.base_model_name_or_path}", f"{len(masks)} matrices"],
        sections=_SECTIONS,
        footer="",
        data={"maps": [{"name": name, "maps": mask_maps(masks)}]},
        headline=f"Removes {masks.num_removed:,} of {masks.numel:,} weights ({100 * masks.sparsity:.2f} %) in "
        f"{len(masks)} matrices.",
        facts_table=Table(("what", "value"), rows),
        modules={"columns": _COLUMNS, "rows": [_row(module, mask) for module, mask in masks.items()]},
        charts={
            "modules": [modules_chart({name: shares})],
            "more": [Missing(key, title, reason, command, numbers) for key, title, reason, numbers in _MORE],
        },
    )
    write_text(file, page)


_COLUMNS = (
    "matrix",
    "shape",
    "removed",
    "share (%)",
    "least of a row",
    "most of a row",
    "least of a column",
    "most of a column",
)


def _row(module: str, mask) -> list[dict[str, Any]]:
    """Cells of one matrix, with the numbers that they sort by; ``mask`` is bool (rows, columns), True = keep."""
    removed = ~mask
    per_row, per_column = removed.sum(1), removed.sum(0)
    counts = [int(each) for each in (per_row.min(), per_row.max(), per_column.min(), per_column.max())]
    share = float(removed.float().mean())
    total = int(removed.sum())
    return [
        {"text": module, "sort": None},
        {"text": "x".join(map(str, mask.shape)), "sort": mask.numel()},
        {"text": number(total), "sort": total},
        {"text": f"{100 * share:.2f}", "sort": share},
        *({"text": number(count), "sort": count} for count in counts),
    ]

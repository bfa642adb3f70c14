"""Curvature (Eqs 16-18) and the generalisation bound (Eqs 6-15, Table 7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..results.tables import Table
from .charts import Chart
from .evidence import Evidence
from .methods import number

_HESSIANS = {
    "start_all": "before the mask, all entries",
    "start_kept": "before the mask, kept entries (Eq. 17)",
    "mask_all": "with the mask, all entries",
    "mask_kept": "with the mask, kept entries",
}
_SIZES = ("model", "masked_matrices")


def curvature_chart(evidence: Evidence) -> Chart:
    """Trace and largest eigenvalue of the Hessians, with one standard error, as a table: the paper draws none."""
    record = evidence.record("curvature")
    rows: list[tuple[str, ...]] = []
    for text, each in ((text, record[name]) for name, text in _HESSIANS.items()):
        ends = (each["largest"]["eigenvalue"], each["largest"]["smallest"])
        rows.append((text, *_trace(each), *map(number, ends)))
        if "less_start_all" in each:
            rows.append((f"{text}, less that before the mask", *_trace(each["less_start_all"]), "–", "–"))
    text = (
        "Whether the mask's own point is flatter is the third line against the first. The second has a smaller largest "
        "eigenvalue than the first for any mask, a random one included: Eq. 17 projects the Hessian at a point where "
        "the masked model is not. Flatter does not mean better: rescaling weights changes curvature and not the model."
    )
    columns = ("Hessian", "trace", "error (probes)", "error (rows)", "largest eigenvalue", "smallest eigenvalue")
    return Chart(text, [], Table(columns, rows))


def bound_chart(evidence: Evidence) -> Chart:
    """Both upper bounds per width of a weight, as a table: a vacuous bound is no result to draw."""
    record = evidence.record("bound")
    rows = [
        (
            *(where.replace("_", " "), width, number(each["phi"]["full"]), number(each["phi"]["mask"])),
            *(number(each[name]) for name in ("delta_train", "delta_complexity", "difference")),
            "vacuous" if each["is_vacuous"] else "informative",
        )
        for where in _SIZES
        for width, each in record[where].items()
    ]
    vacuous = sum(row[-1] == "vacuous" for row in rows)
    text = (
        f"Training loss and complexity term of Eq. 6. Of {len(rows)} bounds, {vacuous} are vacuous: the complexity "
        "term alone exceeds the loss of guessing. It is the same for every mask of one sparsity, a random one too. "
        f"The adapter has {record['adapter_bytes']:,} bytes."
    )
    columns = ("over", "bits", "term, full", "term, mask", "change of training loss", "change of term", "difference")
    return Chart(text, [], Table((*columns, "verdict"), rows))


def _trace(record: Mapping[str, Any]) -> list[str]:
    return [number(record[name]) for name in ("trace", "stderr_probes", "stderr_rows")]

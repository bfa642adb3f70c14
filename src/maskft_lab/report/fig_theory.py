"""Curvature (Eqs 16-18) and the generalisation bound (Eqs 6-15, Table 7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..results.tables import Table
from .charts import Chart
from .evidence import Evidence
from .methods import number

# Key in the record -> name in the table.
_HESSIANS = {
    "start_all": "before the mask, all entries",
    "start_kept": "before the mask, kept entries (Eq. 17)",
    "mask_all": "with the mask, all entries",
    "mask_kept": "with the mask, kept entries",
}
# The bounds count the weights of the whole model, or those of the masked matrices alone.
_SIZES = ("model", "masked_matrices")


def curvature_chart(evidence: Evidence) -> Chart:
    """Trace and largest eigenvalue of the Hessians, with one standard error, as a table: the paper draws none.

    Raises:
        NotComputed: If the curvature was not computed.
    """
    record = evidence.record("curvature")
    rows = []
    for key, name in _HESSIANS.items():
        # One row for each Hessian, and one for its difference from the first.
        hessian = record[key]
        eigenvalues = hessian["largest"]
        largest = number(eigenvalues["eigenvalue"])
        smallest = number(eigenvalues["smallest"])
        rows.append((name, *_trace(hessian), largest, smallest))

        # Differences have errors of their own, smaller than those of the traces: both traces are estimated with the
        # same probes and rows.
        if "less_start_all" in hessian:
            difference = _trace(hessian["less_start_all"])
            rows.append((f"{name}, less that before the mask", *difference, "–", "–"))
    text = (
        "Whether the mask's own point is flatter is the third line against the first. The second has a smaller largest "
        "eigenvalue than the first for any mask, a random one included: Eq. 17 projects the Hessian at a point where "
        "the masked model is not. Flatter does not mean better: rescaling weights changes curvature and not the model."
    )
    columns = ("Hessian", "trace", "error (probes)", "error (rows)", "largest eigenvalue", "smallest eigenvalue")
    return Chart(text, [], Table(columns, rows))


def bound_chart(evidence: Evidence) -> Chart:
    """Both upper bounds for each width of a weight in bits, as a table: vacuous bounds are not worth a picture.

    Raises:
        NotComputed: If the bound was not computed.
    """
    # A row for each way to count weights and each width.
    record = evidence.record("bound")
    rows = []
    num_vacuous = 0
    for size in _SIZES:
        for width, bound in record[size].items():
            # In the sense that the complexity term alone does not exceed the loss of guessing.
            verdict = "informative"
            if bound["is_vacuous"]:
                verdict = "vacuous"
                num_vacuous += 1
            row = (
                size.replace("_", " "),
                width,
                number(bound["phi"]["full"]),
                number(bound["phi"]["mask"]),
                number(bound["delta_train"]),
                number(bound["delta_complexity"]),
                number(bound["difference"]),
                verdict,
            )
            rows.append(row)
    text = (
        f"Training loss and complexity term of Eq. 6. Of {len(rows)} bounds, {num_vacuous} are vacuous: the complexity "
        "term alone exceeds the loss of guessing. It is the same for every mask of one sparsity, a random one too. "
        f"The adapter has {record['adapter_bytes']:,} bytes."
    )
    columns = (
        "over",
        "bits",
        "term, full",
        "term, mask",
        "change of training loss",
        "change of term",
        "difference",
        "verdict",
    )
    return Chart(text, [], Table(columns, rows))


def _trace(record: Mapping[str, Any]) -> list[str]:
    """A trace, and its standard errors over probes and over rows."""
    return [
        number(record["trace"]),
        number(record["stderr_probes"]),
        number(record["stderr_rows"]),
    ]

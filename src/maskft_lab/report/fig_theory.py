"""Curvature (Eqs 16-18) and the generalisation bound (Eqs 6-15, Table 7)."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from ..results.text import Table
from .charts import COLOURS, ROW_HEIGHT, Chart, Panel, row_name
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
    """Trace and largest eigenvalue of the Hessians, with one standard error."""
    record = evidence.record("curvature")
    hessians = {text: record[name] for name, text in _HESSIANS.items()}
    hessians |= {f"{name}, all entries": each for name, each in record["others"].items()}

    def traces(axes: Axes) -> None:
        _bars(axes, {name: (each["trace"], _error(each)) for name, each in hessians.items()})

    def eigenvalues(axes: Axes) -> None:
        found = {name: each["largest"] for name, each in hessians.items()}
        _bars(axes, {name: (each["eigenvalue"], each["stderr_rows"] or 0.0) for name, each in found.items()})

    rows = [
        (
            text,
            number(each["trace"]),
            number(each["stderr_probes"]),
            number(each["stderr_rows"]),
            number(each["largest"]["eigenvalue"]),
            number(each["largest"]["smallest"]),
        )
        for text, each in hessians.items()
    ]
    rows += [
        (
            f"{text}, less that before the mask",
            number(each["less_start_all"]["trace"]),
            number(each["less_start_all"]["stderr_probes"]),
            number(each["less_start_all"]["stderr_rows"]),
            "–",
            "–",
        )
        for text, each in hessians.items()
        if "less_start_all" in each
    ]
    text = (
        "Whether the mask's own point is flatter is the third line against the first. The second has a smaller largest "
        "eigenvalue than the first for any mask, a random one included: Eq. 17 projects the Hessian at a point where "
        "the masked model is not. Flatter does not mean better: rescaling weights changes curvature and not the model."
    )
    columns = ("Hessian", "trace", "error (probes)", "error (rows)", "largest eigenvalue", "smallest eigenvalue")
    height = 0.7 + ROW_HEIGHT * len(hessians)
    panels = [Panel("Trace", traces, True, height), Panel("Largest eigenvalue", eigenvalues, True, height)]
    return Chart(text, panels, Table(columns, rows))


def bound_chart(evidence: Evidence) -> Chart:
    """Both upper bounds per width of a weight, as a table: a vacuous bound is no result to draw."""
    record = evidence.record("bound")
    rows = [
        (
            where.replace("_", " "),
            width,
            number(each["phi"]["full"]),
            number(each["phi"]["mask"]),
            number(each["delta_train"]),
            number(each["delta_complexity"]),
            number(each["difference"]),
            "vacuous" if each["is_vacuous"] else "informative",
        )
        for where in _SIZES
        for width, each in record[where].items()
    ]
    file = record["adapter_file"]
    vacuous = sum(row[-1] == "vacuous" for row in rows)
    text = (
        f"Training loss and complexity term of Eq. 6. Of {len(rows)} bounds, {vacuous} are vacuous: the complexity "
        "term alone exceeds the loss of guessing. It is the same for every mask of one sparsity, a random one too. "
        f"The adapter has {file['num_bytes']:,} bytes; the entropy of its places is {file['entropy_bytes']:,.0f}."
    )
    columns = ("over", "bits", "term, full", "term, mask", "change of training loss", "change of term", "difference")
    return Chart(text, [], Table((*columns, "verdict"), rows))


def _error(trace: Mapping) -> float:
    return max(trace["stderr_probes"] or 0.0, trace["stderr_rows"] or 0.0)


def _bars(axes: Axes, values: Mapping[str, tuple[float, float]]) -> None:
    for place, (value, error) in enumerate(values.values()):
        colour, marker = (("blue", "o"), ("red", "^"), ("teal", "p"))[min(place // 2, 2)]
        axes.errorbar(value, place, xerr=error, color=COLOURS[colour], marker=marker, capsize=2)
    axes.axvline(0, color=COLOURS["muted"], linewidth=0.6)
    axes.set_yticks(range(len(values)), list(map(row_name, values)))
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.grid(False, axis="y")

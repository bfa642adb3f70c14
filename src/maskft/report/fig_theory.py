"""Curvature (Eqs 16-18) and the generalisation bound (Eqs 6-15, Table 7)."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes

from ..results.text import Table
from .charts import COLOURS, Chart, Entry, Panel
from .methods import number

_HESSIANS = {
    "start_all": "before the mask, all entries",
    "start_kept": "before the mask, kept entries (Eq. 17)",
    "mask_all": "with the mask, all entries",
    "mask_kept": "with the mask, kept entries",
}
_SIZES = ("model", "masked_matrices")


def curvature_chart(record: Mapping) -> Chart:
    """Trace and largest eigenvalue of the four Hessians, with one standard error."""

    def traces(axes: Axes) -> None:
        _bars(axes, [(each["trace"], _error(each)) for each in map(record.get, _HESSIANS)])

    def eigenvalues(axes: Axes) -> None:
        found = [record[name]["largest"] for name in _HESSIANS]
        _bars(axes, [(each["eigenvalues"][0], (each["stderr_rows"] or [0.0])[0]) for each in found])

    rows = [
        (
            text,
            number(each["trace"]),
            number(each["stderr_probes"]),
            number(each["stderr_rows"]),
            number(each["largest"]["eigenvalues"][0]),
            number(each["largest"]["smallest"]),
        )
        for name, text in _HESSIANS.items()
        for each in (record[name],)
    ]
    less = record["mask_all_less_start_all"]
    rows.append(
        (
            "with the mask less before it, all entries",
            number(less["trace"]),
            number(less["stderr_probes"]),
            number(less["stderr_rows"]),
            "–",
            "–",
        )
    )
    text = (
        "Whether the mask's own point is flatter is the third line against the first. The second has a smaller largest "
        "eigenvalue than the first for any mask, a random one included: Eq. 17 projects the Hessian at a point where "
        "the masked model is not. Flatter does not mean better: rescaling weights changes curvature and not the model."
    )
    columns = ("Hessian", "trace", "error (probes)", "error (rows)", "largest eigenvalue", "smallest eigenvalue")
    panels = [Panel("Trace", traces, True, 1.5), Panel("Largest eigenvalue", eigenvalues, True, 1.5)]
    return Chart("eq16_18_curvature", "Curvature", text, panels, Table(columns, rows))


def bound_chart(record: Mapping) -> Chart:
    """Both upper bounds, as training loss and complexity term, per width of a weight."""
    bits = list(record["model"])

    def draw(axes: Axes, where: str) -> None:
        labels = []
        for width in bits:
            for name in ("full", "mask"):
                phi, loss = record[where][width]["phi"][name], record["training_loss"][name]
                axes.barh(len(labels), loss, color=COLOURS["ink"], height=0.6)
                axes.barh(len(labels), phi, left=loss, color=COLOURS["blue" if name == "full" else "red"], height=0.6)
                axes.text(loss + phi, len(labels), f" {number(loss + phi)}", va="center", fontsize=6.5)
                labels.append(f"{name}, {width} bits")
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.margins(x=0.15)
        axes.grid(False, axis="y")

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
    entries = [Entry("training loss", "ink"), Entry("term, full", "blue"), Entry("term, mask", "red")]
    panels = [Panel(f"Over the {w.replace('_', ' ')}", lambda a, w=w: draw(a, w), True, 1.6) for w in _SIZES]
    return Chart("table07_bound", "Generalisation bound", text, panels, Table((*columns, "verdict"), rows), (), entries)


def _error(trace: Mapping) -> float:
    return max(trace["stderr_probes"] or 0.0, trace["stderr_rows"] or 0.0)


def _bars(axes: Axes, values: list[tuple[float, float]]) -> None:
    for place, (value, error) in enumerate(values):
        colour = COLOURS["red" if place > 1 else "blue"]
        axes.errorbar(value, place, xerr=error, color=colour, marker="^" if place > 1 else "o", capsize=2)
    axes.axvline(0, color=COLOURS["muted"], linewidth=0.6)
    axes.set_yticks(range(len(_HESSIANS)), list(_HESSIANS.values()))
    axes.set_ylim(len(_HESSIANS) - 0.4, -0.6)
    axes.grid(False, axis="y")

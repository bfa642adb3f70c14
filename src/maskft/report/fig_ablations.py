"""A metric against one setting of the mask (Figs 3, 6, 7, 8, 10 and 11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from ..results.text import Table
from .charts import COLOURS, SERIES, Chart, Entry, Panel, plain
from .methods import number

_NAMES = {
    "mask_layers_to_transform": "masked layers",
    "mask_sparsity": "share removed",
    "max_train_samples": "training rows",
    "learning_rate": "learning rate of the scores",
}
_NUMBERS = {3: "03_08", 6: "06_10", 7: "07_11"}


def ablation_charts(record: Mapping) -> list[Chart]:
    """One chart for each varied setting, a panel for each metric."""
    groups: dict[str, list[Mapping]] = {}
    for each in record["ablations"]:
        groups.setdefault(each["setting"], []).append(each)
    return [_chart(setting, each) for setting, each in groups.items()]


def _chart(setting: str, records: Sequence[Mapping]) -> Chart:
    numbers = tuple(records[0]["figures"])
    name = _NAMES.get(setting, setting)
    fixed = list(dict.fromkeys(_fixed_text(line["fixed"]) for each in records for line in each["lines"]))
    entries = [
        Entry(text or "learned mask", SERIES[index % len(SERIES)], "-", "o^sDvP"[index % 6])
        for index, text in enumerate(fixed)
    ]
    entries.append(Entry("the model under the mask", "muted", "--"))
    table = [
        (
            f"{each['task']}/{each['metric']}",
            value_text(point["value"]),
            _fixed_text(line["fixed"]) or "–",
            number(point["mean"]),
            number(point["stderr"]),
            str(point["num_seeds"]),
        )
        for each in records
        for line in each["lines"]
        for point in line["points"]
    ]
    columns = ("measure", name, "other settings", "mean", "standard error", "seeds")
    key = f"fig{_NUMBERS[numbers[0]]}_{setting}" if numbers and numbers[0] in _NUMBERS else f"ablation_{setting}"
    text = (
        f"Test measures of learned masks against {name}, all else as the line says. Bars are one standard error, over "
        "seeds where there are several, else over items; the dashed line is the model under these masks. Points are "
        "not verdicts: those stand above, paired by item and seed."
    )
    panels = [
        Panel(f"{each['metric']} on {each['task']}", lambda axes, e=each: _draw(axes, e, name, fixed, entries))
        for each in records
    ]
    return Chart(key, f"Ablation: {name}", text, panels, Table(columns, table), numbers, entries)


def _draw(axes: Axes, record: Mapping, name: str, fixed: list[str], entries: Sequence[Entry]) -> None:
    values = list(dict.fromkeys(value_text(point["value"]) for line in record["lines"] for point in line["points"]))
    for line in record["lines"]:
        entry = entries[fixed.index(_fixed_text(line["fixed"]))]
        x = [values.index(value_text(point["value"])) for point in line["points"]]
        y = [point["mean"] for point in line["points"]]
        errors = [point["stderr"] or 0.0 for point in line["points"]]
        axes.errorbar(x, y, errors, color=COLOURS[entry.colour], marker=entry.marker, elinewidth=0.8, capsize=2)
        if line["start"]:
            axes.axhline(line["start"]["mean"], color=COLOURS["muted"], linestyle="--", linewidth=0.8)
    long = max(map(len, values)) > 8
    axes.set_xticks(range(len(values)), list(map(plain, values)), rotation=20 if long else 0)
    axes.set_xlim(-0.4, len(values) - 0.6)
    axes.set_xlabel(plain(name))
    axes.set_ylabel(plain(record["metric"]))


def value_text(value: Any) -> str:
    """A setting's value for an axis; layers 0, 1, 2, 3 as 0-3, none as ``all``."""
    if value is None:
        return "all"
    if isinstance(value, list) and len(value) > 1 and value == list(range(value[0], value[0] + len(value))):
        return f"{value[0]}-{value[-1]}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _fixed_text(fixed: Mapping[str, Any]) -> str:
    return ", ".join(f"{_NAMES.get(name, name)} {value_text(value)}" for name, value in fixed.items())

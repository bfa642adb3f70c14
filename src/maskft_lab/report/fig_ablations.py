"""A metric against one setting of the mask (Figs 3, 6, 7, 8, 10 and 11)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.axes import Axes

from ..results.text import Table
from .charts import COLOURS, SERIES, Chart, Entry, Panel, plain
from .evidence import Evidence, NotComputed
from .methods import number

_NAMES = {
    "mask_layers_to_transform": "masked layers",
    "mask_sparsity": "share removed",
    "max_train_samples": "training rows",
    "learning_rate": "learning rate of the scores",
}
_ALL = ("mask_layers_to_transform", "max_train_samples")  # settings whose default is all there is
_OF_THE_PAPER = ("mask_layers_to_transform", "mask_sparsity", "max_train_samples")


def ablation_chart(setting: str, evidence: Evidence) -> Chart:
    """One metric per panel against one setting."""
    records = [each for each in evidence.record("ablations")["ablations"] if each["setting"] == setting]
    if not records:
        raise NotComputed(f"no two evaluated masks of this study differ in {setting} alone")
    return _chart(records)


def other_ablations_chart(evidence: Evidence) -> Chart:
    """One setting and metric per panel, of settings that the paper does not vary."""
    records = [each for each in evidence.record("ablations")["ablations"] if each["setting"] not in _OF_THE_PAPER]
    if not records:
        raise NotComputed("no two evaluated masks of this study differ in one other setting alone")
    return _chart(records)


def _chart(records: Sequence[Mapping]) -> Chart:
    lines = [(each["setting"], line["fixed"]) for each in records for line in each["lines"]]
    # What is equal in all lines need not be said in each.
    varied = {name for _, fixed in lines for name in fixed if len({repr(other.get(name)) for _, other in lines}) > 1}
    looks = {
        text: Entry(text, SERIES[index % len(SERIES)], "-", "o^sDvP"[index % 6])
        for index, text in enumerate(dict.fromkeys(_fixed_text(fixed, varied) for _, fixed in lines))
    }
    entries = [*looks.values(), Entry("the model under the mask", "muted", "--")]
    table = [
        (
            f"{each['task']}/{each['metric']}",
            f"{_name(each['setting'])}: {value_text(point['value'], each['setting'])}",
            _fixed_text(line["fixed"], set(line["fixed"])),
            *(number(point["mean"]), number(point["stderr"]), str(point["num_seeds"])),
        )
        for each in records
        for line in each["lines"]
        for point in line["points"]
    ]
    text = (
        "Test measures of learned masks, all else as the line says. Bars are one standard error, over seeds where "
        "there are several, else over items; the dashed line is the model under these masks. Points are not verdicts: "
        "those stand above, paired by item and seed."
    )
    panels = [
        Panel(f"{each['metric']} on {each['task']}", partial(_draw, record=each, looks=looks, varied=varied))
        for each in records
    ]
    columns = ("measure", "setting", "other settings", "mean", "standard error", "seeds")
    return Chart(text, panels, Table(columns, table), entries)


def _draw(axes: Axes, record: Mapping, looks: Mapping[str, Entry], varied: Collection[str]) -> None:
    setting, points = record["setting"], [point for line in record["lines"] for point in line["points"]]
    values = list(dict.fromkeys(value_text(point["value"], setting) for point in _in_order(points)))
    scale = 100.0 if record["unit"] == "fraction" else 1.0
    for line in record["lines"]:
        entry = looks[_fixed_text(line["fixed"], varied)]
        for points in _connected(line["points"]):
            x = [values.index(value_text(point["value"], setting)) for point in points]
            y = [scale * point["mean"] for point in points]
            errors = [scale * (point["stderr"] or 0.0) for point in points]
            axes.errorbar(x, y, errors, color=COLOURS[entry.colour], marker=entry.marker, elinewidth=0.8, capsize=2)
        if line["start"]:
            axes.axhline(scale * line["start"]["mean"], color=COLOURS["muted"], linestyle="--", linewidth=0.8)
    long = max(map(len, values)) > 8
    axes.set_xticks(range(len(values)), list(map(plain, values)), rotation=20 if long else 0)
    axes.set_xlim(-0.4, len(values) - 0.6)
    axes.set_xlabel(plain(_name(setting)))
    axes.set_ylabel("%" if record["unit"] == "fraction" else plain(record["unit"]))


def _in_order(points: Sequence[Mapping]) -> list[Mapping]:
    """Points of several lines by their value; those that are no numbers as they come, after the numbers."""
    numbers = [point for point in points if isinstance(point["value"], int | float)]
    return sorted(numbers, key=lambda point: point["value"]) + [point for point in points if point not in numbers]


def _connected(points: Sequence[Mapping]) -> list[list[Mapping]]:
    """Points that one line connects: of groups of layers those that are as large as each other, else all."""
    groups: dict[int, list[Mapping]] = {}
    has_lists = any(isinstance(point["value"], list) for point in points)
    for point in points:
        value = point["value"]
        size = len(value) if isinstance(value, list) else 0
        groups.setdefault(size if has_lists else 0, []).append(point)
    return list(groups.values())


def value_text(value: Any, setting: str = "") -> str:
    """A setting's value for an axis; layers 0, 1, 2, 3 as 0-3, none of layers and rows as ``all``."""
    if value is None:
        return "all" if setting in _ALL else "default"
    if isinstance(value, list) and len(value) > 1 and value == list(range(value[0], value[0] + len(value))):
        return f"{value[0]}-{value[-1]}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _name(setting: str) -> str:
    return _NAMES.get(setting, setting)


def _fixed_text(fixed: Mapping[str, Any], names: Collection[str]) -> str:
    """The settings of a line that are named and are not at their defaults."""
    texts = [
        f"{_name(n)} {value_text(value, n)}"
        for n, value in fixed.items()
        if n in names and (value is not None or n in _ALL)
    ]
    return ", ".join(texts) or "learned mask"

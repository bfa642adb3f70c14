"""The report of a study as one HTML file, which loads nothing: verdict, table, charts, items, maps, recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from maskft_base import __version__

from ..analysis.runs import BEST
from ..results.comparison import BETTER, NOT_DISTINGUISHABLE, WORSE, Comparison, Difference
from ..results.schema import Result
from ..results.text import Table, difference_text, score_text, sentence, verdict_text
from .catalogue import Charts, charts_of, place_of
from .charts import Chart, Missing, figure_numbers, to_svg
from .evidence import MASK, Evidence, seeds_of
from .fig_verdict import holds_at_once
from .items import won_and_lost
from .maps import MAX_BYTES as MAX_MAP_BYTES
from .maps import maps_of_adapter
from .methods import number

MAX_MASKS = 3  # whose maps can be zoomed
MAX_CARDS = 3  # of verdicts that stand open; the others are one click away
SECTIONS = (
    ("verdict", "Verdict"),
    ("table", "Table"),
    ("curves", "Curves"),
    ("ablations", "Ablations"),
    ("items", "Items"),
    ("masks", "Masks"),
    ("landscape", "Landscape"),
    ("cost", "Curvature, bound, cost"),
    ("recipe", "Recipe"),
)


def render_report(evidence: Evidence) -> str:
    """The page as text."""
    comparison = evidence.comparison
    charts = charts_of(evidence)
    items, maps = won_and_lost(evidence), _maps(evidence)
    text = None if items else "No two models have results item by item for the same task and seed."
    notes = [*evidence.notes, *(comparison.notes if comparison else [])]
    return render(
        "report.html",
        title=evidence.name,
        kind="Mask Fine-Tuning: report of a study",
        facts=_facts(evidence),
        sections=SECTIONS,
        footer=f"Paths are those of the command that made it; {place_of(evidence)} holds all numbers.",
        data={"items": items, "maps": maps, "comparison": comparison.to_dict() if comparison else None},
        verdict=_verdict(evidence),
        notes=notes,
        scores=_scores(evidence),
        over="items" if comparison and comparison.fixed_seeds else "seeds where there are several, else over items",
        intervals=", which holds together with all others" if holds_at_once(evidence.differences) else "",
        charts=charts,
        has_texts=any(row["texts"] for record in items for row in record["rows"]),
        no_items=text,
        no_maps="The adapters are not in this folder. For one that you have: maskft inspect ADAPTER --html FILE",
        commands=_commands(evidence),
        seeds=", ".join(map(str, seeds_of(evidence))) or "none",
        settings=_settings(evidence),
    )


def render(template: str, *, sections: Iterable[tuple[str, str]], charts: Mapping[str, Charts], **context: Any) -> str:
    """A template of this package with styles, scripts and charts drawn."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["capitalize_first"] = lambda text: text[:1].upper() + text[1:]
    environment.policies["json.dumps_function"] = _dense_json
    files = resources.files(__package__) / "templates"
    return environment.get_template(template).render(
        css=(files / "style.css").read_text(encoding="utf-8"),
        js=(files / "page.js").read_text(encoding="utf-8"),
        version=__version__,
        sections=[{"key": key, "title": title} for key, title in sections],
        charts={section: [_drawn(chart) for chart in each] for section, each in charts.items()},
        **context,
    )


def _dense_json(value: Any, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _drawn(chart: Chart | Missing) -> dict[str, Any]:
    """A chart as the template wants it: panels as SVG."""
    head = {"key": chart.key, "title": chart.title, "numbers": figure_numbers(chart.numbers)}
    if isinstance(chart, Missing):
        return head | {"reason": chart.reason, "command": chart.command}
    panels = [
        {"title": panel.title, "is_wide": panel.is_wide, "svg": to_svg(panel, f"{chart.key}-{index}")}
        for index, panel in enumerate(chart.panels)
    ]
    return head | {"text": chart.text, "legend": chart.legend, "panels": panels, "table": chart.table}


def _facts(evidence: Evidence) -> list[str]:
    results = list(evidence.results.values())
    dates = sorted(result["created"][:10] for result in results)
    models = len({row["name"] for row in evidence.accounts} or {result["name"] for result in results})
    tasks = dict.fromkeys(
        f"{len(record['items']):,} items of {task}" for r in results for task, record in r["tasks"].items()
    )
    facts = [f"base model: {evidence.base}", f"{models} models, {len(results)} result files", *tasks]
    return [*facts, f"measured {dates[0]}" + ("" if dates[0] == dates[-1] else f" to {dates[-1]}")]


# The verdict

_FIXED = "Seeds are fixed: this is about these trained models on other items, and not about other training seeds."


def _verdict(evidence: Evidence) -> dict[str, Any]:
    """What is claimed, in words of the comparison."""
    comparison = evidence.comparison
    if comparison is None:
        return {
            "headline": ["There is one model only; nothing is compared, and nothing is claimed."],
            **{"masks": [], "more_masks": [], "sentences": [], "baseline": None},
        }
    masks = evidence.masks
    return {
        "headline": [*_headline(evidence, comparison, masks), *([_FIXED] if comparison.fixed_seeds else [])],
        "masks": [_card(evidence, name) for name in masks[:MAX_CARDS]],
        "more_masks": [_card(evidence, name) for name in masks[MAX_CARDS:]],
        "sentences": [sentence(row) for row in evidence.differences],
        "baseline": comparison.baseline,
    }


def _headline(evidence: Evidence, comparison: Comparison, masks: Sequence[str]) -> list[str]:
    if not masks:
        return [f"No learned mask is compared with {comparison.baseline}."]
    ours = [row for row in comparison.differences if row.method in masks and row.is_main]
    if len(ours) == 1:
        return [sentence(ours[0])]
    lines = _counted([row for row in evidence.differences if row.method in masks], comparison)
    found = [row for row in evidence.differences if row.method not in masks and row.verdict == BETTER]
    if found:
        better = "; ".join(f"{row.method} ({row.metric} on {row.task})" for row in found)
        lines.append(f"Better than {comparison.baseline} without a learned mask: {better}.")
    return lines


def _counted(rows: Sequence[Difference], comparison: Comparison) -> list[str]:
    """How many of the masks got which verdict; metrics of which the same is to be said in one sentence."""
    places: dict[str, list[str]] = {}
    for metric, task in dict.fromkeys((row.metric, row.task) for row in rows):
        found = [row.verdict for row in rows if (row.metric, row.task) == (metric, task)]
        counts = [
            f"{found.count(verdict)} {verdict}" for verdict in (BETTER, WORSE, NOT_DISTINGUISHABLE) if verdict in found
        ]
        masks = "the learned mask is " if len(found) == 1 else f"of {len(found)} learned masks, "
        places.setdefault(f"{masks}{', '.join(counts)}", []).append(f"{metric} on {task}")
    return [f"Against {comparison.baseline}, {'; '.join(where)}: {text}." for text, where in places.items()]


def _card(evidence: Evidence, name: str) -> dict[str, Any]:
    lines = [
        {
            "what": f"{row.metric} on {row.task}" + (f", {_seeds_text(row)}" if row.num_seeds > 1 else ""),
            "verdict": row.verdict,
            "words": verdict_text(row),
            "difference": difference_text(row, "points" if row.unit == "fraction" else row.unit),
        }
        for row in evidence.differences
        if row.method == name
    ]
    return {"name": name, "lines": lines}


def _seeds_text(row: Difference) -> str:
    return f"{'these ' if row.by_seed else ''}{row.num_seeds} seeds"


# The table


def _scores(evidence: Evidence) -> dict[str, Any]:
    """A row per model, a column per metric of a task; cells with what they sort by and what stands below."""
    from ..results.scores import scores

    comparison = evidence.comparison
    reached = comparison.scores if comparison else scores(list(evidence.results.values()))
    differences = {(r.method, r.task, r.metric): r for r in evidence.differences}
    places = list(dict.fromkeys((score.task, score.metric, score.unit) for score in reached))
    rows: dict[str, list[dict]] = {}
    for score in reached:
        seeds = f" ({score.num_seeds} seeds)" if score.num_seeds > 1 else ""
        row = rows.setdefault(score.model, [_cell(score.model + seeds), *(_cell("–") for _ in places)])
        cell = row[1 + places.index((score.task, score.metric, score.unit))]
        cell.update(text=score_text(score), sort=score.value)
        difference = differences.get((score.model, score.task, score.metric))
        if difference:
            cell.update(below=difference_text(difference), verdict=difference.verdict)
            cell.update(words=verdict_text(difference))
    units = ["%" if unit == "fraction" else unit for _, _, unit in places]
    names = [f"{task} {metric} ({unit})" for (task, metric, _), unit in zip(places, units, strict=True)]
    return {"columns": ["model", *names], "rows": list(rows.values())}


def _cell(text: str, sort: float | None = None) -> dict[str, Any]:
    return {"text": text, "sort": sort, "below": None, "verdict": None, "words": None}


# Masks, recipe, environment


def _maps(evidence: Evidence) -> list[dict[str, Any]]:
    """Maps of the first seed of the first learned masks, in the order of the verdict, whose adapters are there."""
    chosen: dict[str, Any] = {}
    order = [name.removesuffix(f" ({BEST})") for name in evidence.masks]
    for run in sorted(evidence.runs, key=lambda run: order.index(run.name) if run.name in order else len(order)):
        folder = run.models.get(BEST)
        if run.method == MASK and folder and Path(folder).is_dir():
            chosen.setdefault(run.name, run)
    runs = list(chosen.values())[:MAX_MASKS]
    return [
        {"name": f"{run.name}, seed {run.seed}", "maps": maps_of_adapter(run.models[BEST], MAX_MAP_BYTES // len(runs))}
        for run in runs
    ]


def _commands(evidence: Evidence) -> list[str]:
    place = place_of(evidence)
    if not evidence.runs:
        return [f"maskft report {place} -o report.html"]
    models = any(run.models for run in evidence.runs)
    analyze = [f"maskft analyze {place}"] if models else []
    study = f"maskft study RECIPE.yaml --output_dir {place if models else 'STUDY'}  # the recipe named {evidence.name}"
    return [study, *analyze, f"maskft report {place} -o report.html"]


def _settings(evidence: Evidence) -> dict[str, Table]:
    """Tables of settings, accounts and environment."""
    first: dict[str, dict] = {}
    for result in evidence.results.values():
        settings = result.get("study", {}).get("settings") or {}
        first.setdefault(result["name"], {k: v for k, v in settings.items() if k not in ("seed", "mask_seed")})
    names = list(dict.fromkeys(key for settings in first.values() for key in settings))
    trained = [settings for settings in first.values() if settings]  # a pre-trained model has none
    differ = [key for key in names if len({_text(settings.get(key)) for settings in trained}) > 1]
    rows = [(name, *(_text(settings.get(key)) for key in differ)) for name, settings in first.items()]
    same = [(key, _text(trained[0].get(key))) for key in names if key not in differ]
    same += [(f"evaluation: {key}", value) for key, value in _common(evidence.results.values(), "settings")]
    return {
        "different": Table(("model", *differ), rows),
        "same": Table(("setting", "value"), same),
        "accounts": _accounts(evidence.accounts),
        "environment": Table(("what", "value"), _environment(evidence.results.values())),
    }


def _common(results: Iterable[Mapping], block: str) -> list[tuple[str, str]]:
    values: dict[str, dict[str, None]] = {}
    for result in results:
        for key, value in result[block].items():
            if value is not None and not isinstance(value, dict):
                values.setdefault(key, {})[_text(value)] = None
    return [(key, " | ".join(found)) for key, found in values.items()]


def _environment(results: Iterable[Result]) -> list[tuple[str, str]]:
    results = list(results)
    packages: dict[str, dict[str, None]] = {}
    for result in results:
        for name, version in result["environment"]["packages"].items():
            packages.setdefault(name, {})[str(version)] = None
    return [*_common(results, "environment"), *((name, " | ".join(found)) for name, found in packages.items())]


def _accounts(rows: Sequence[Mapping]) -> Table:
    keys = ("name", "seed", "role", "best_step", "num_steps", "epochs", "tokens", "total_epochs", "total_tokens")
    columns = ("model", "seed", "checkpoint", "best step", "steps", "epochs", "tokens")
    columns += ("epochs in all", "tokens in all")
    cells = [[row[key] for key in keys] for row in rows]
    return Table(columns, [tuple(cell if isinstance(cell, str) else number(cell, 6) for cell in row) for row in cells])


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)

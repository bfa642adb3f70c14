"""The report of a study as one HTML file, which loads nothing from elsewhere.

Verdict and pictures of it come first, then curves, then tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jinja2

from maskft_common import __version__
from maskft_common.errors import printable
from maskft_common.method_options import unused_options

from ..results.render import cross_domain_table, difference_table
from ..results.scores import scores
from ..results.tables import Table
from ..results.verdict import reworded
from ..results.words import sentence
from .catalogue import FIGURES, Figure, draw_figures
from .charts import COLOURS, DARK, Chart, to_svg
from .evidence import Evidence, test_name

MAX_VERDICTS = 3  # more are behind a click
MAX_OPEN_ROWS = 40  # longer tables of numbers scroll, and say so

Values = dict[str, Any]  # for the template

# Key -> title, in the order in which readers ask.
SECTIONS = {
    "verdict": "Verdict",
    "curves": "Curves",
    "table": "Tables",
    "ablations": "Ablations",
    "masks": "Masks",
    "landscape": "Landscape",
    "theory": "Curvature and bound",
    "cost": "Cost",
    "recipe": "Recipe",
}


def render_report(evidence: Evidence) -> str:
    """The page as text.

    Raises:
        UserError: If the file of an analysis is not as ``maskft analyze`` writes it.
    """
    # Notes of the study, then those of its comparison.
    comparison = evidence.comparison
    verdicts = _verdicts(evidence)
    notes = list(evidence.notes)
    if comparison is not None:
        notes += comparison.notes

    charts, missing = _charts(evidence)

    # Leave out sections without a figure, except those that have more than figures.
    sections = {}
    for key, title in SECTIONS.items():
        if charts[key] or key in ("verdict", "table", "recipe"):
            sections[key] = title

    # The table of scores. A study that has not finished has results and no comparison yet.
    if comparison is not None:
        reached = comparison.scores
    elif evidence.results:
        reached = scores(evidence.results)
    else:
        reached = []  # only paths were published

    # For the captions of tables: what errors are over, and which intervals the tables have.
    over = "seeds where there are several, else over items"
    if comparison is not None and comparison.fixed_seeds:
        over = "items"
    interval = "simultaneous"
    if comparison is not None:
        interval = comparison.kind_of_interval

    seeds = {result["model"]["seed"] for result in evidence.results}
    seeds.discard(None)  # of a model that was not trained
    seeds_text = ", ".join(map(str, sorted(seeds)))

    return _template().render(
        palettes=_palettes(),
        version=__version__,
        title=evidence.name,
        facts=_facts(evidence),
        sections=sections,
        place=evidence.place,
        verdicts=verdicts[:MAX_VERDICTS],
        more_verdicts=verdicts[MAX_VERDICTS:],
        baseline=comparison.baseline if comparison else "nothing",
        notes=notes,
        scores=cross_domain_table(reached),
        differences=difference_table(comparison) if comparison else None,
        over=over,
        interval=interval,
        charts=charts,
        missing=missing,
        commands=_commands(evidence),
        recipe=evidence.recipe,
        seeds=seeds_text or "none",
        settings=_settings(evidence),
        max_open_rows=MAX_OPEN_ROWS,
    )


def _template() -> jinja2.Template:
    """The page without its content."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "templates"),
        # Texts come from result files, which may be anyone's: neither their HTML nor their control characters may
        # reach the page.
        autoescape=True,
        finalize=_visible,
        # The default would put an empty text where a value is missing.
        undefined=jinja2.StrictUndefined,
        # Lines that hold only a statement of the template leave no blank line.
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


def _charts(evidence: Evidence) -> tuple[dict[str, list[Values]], list[Values]]:
    """Figures for the template: those of each section, and those that cannot be drawn, with the reason."""
    drawn, missing = draw_figures(evidence, FIGURES)

    # Every section has a list, so that the template can ask for any.
    charts: dict[str, list[Values]] = {section: [] for section in SECTIONS}
    for figure, chart in drawn:
        of_section = charts[figure.section]
        of_section.append(_drawn(figure, chart))

    not_drawn = []
    for each in missing:
        head = _head(each.figure)
        not_drawn.append(head | {"reason": each.reason, "command": each.command})
    return charts, not_drawn


def _visible(value: Any) -> Any:
    """A text of any file without control characters; jinja2 escapes it for HTML afterwards."""
    # Not isinstance: Markup is a subclass of str. It is text of the template, from `safe` and macros.
    if type(value) is not str:
        return value
    # Line by line, because a recipe has line breaks, which are control characters too.
    lines = [printable(line) for line in value.split("\n")]
    return "\n".join(lines)


def _palettes() -> str:
    """The colours of figures as CSS variables, light and dark.

    Dark where the reader chose it with the button, or where the system is dark and the reader did not choose light.
    """
    light = _variables(COLOURS)
    dark = _variables(DARK)
    return (
        f":root {{ {light}; }}\n"
        f':root[data-theme="dark"] {{ {dark}; }}\n'
        f'@media (prefers-color-scheme: dark) {{ :root:not([data-theme="light"]) {{ {dark}; }} }}\n'
    )


def _variables(colours: Mapping[str, str]) -> str:
    """Declarations of CSS."""
    return "; ".join(f"--{name}: {value}" for name, value in colours.items())


def _head(figure: Figure) -> Values:
    """Key and title of a figure, and its numbers in the paper."""
    of_paper = ""
    if figure.numbers:
        word = "Figs" if len(figure.numbers) > 1 else "Fig."
        numbers = ", ".join(map(str, figure.numbers))
        of_paper = f"{word} {numbers}"
    return {
        "key": figure.key,
        "title": figure.title,
        "of_paper": of_paper,
    }


def _drawn(figure: Figure, chart: Chart) -> Values:
    """A figure for the template, with panels as SVG."""
    panels = []
    for index, panel in enumerate(chart.panels):
        record = {
            "title": panel.title,
            "is_wide": panel.is_wide,
            "svg": to_svg(panel, f"{figure.key}-{index}"),
        }
        panels.append(record)
    return _head(figure) | {
        "text": chart.text,
        "legend": chart.legend,
        "panels": panels,
        "table": chart.table,
    }


def _facts(evidence: Evidence) -> list[str]:
    """Base, models, items and dates."""
    # Models of the comparison count even if their files are missing, and the page says how many are here.
    comparison = evidence.comparison
    with_files = {result["name"] for result in evidence.results}
    compared = with_files
    if comparison:
        compared = {comparison.baseline, *comparison.methods}
    models = f"{len(compared)} models"
    if not compared <= with_files:
        num_here = len(compared & with_files)
        models += f" ({num_here} with their answers here)"

    facts = [f"base model: {evidence.base}", models, f"{len(evidence.results)} result files"]

    # The results of a study have the same items, so each test is named once.
    for result in evidence.results:
        for task, record in result["tasks"].items():
            num_items = len(record["items"])
            fact = f"{num_items:,} items of {test_name(evidence, task)}"
            if fact not in facts:
                facts.append(fact)

    # The day of an ISO date and time.
    dates = sorted(result["created"][:10] for result in evidence.results)
    if dates:
        first = dates[0]
        last = dates[-1]
        measured = f"measured {first}"
        if first != last:
            measured += f" to {last}"
        facts.append(measured)
    return facts


def _verdicts(evidence: Evidence) -> list[str]:
    """Each learned mask against its parent and the strongest control, in the words of the comparison."""
    comparison = evidence.comparison
    if comparison is None:
        return ["There are no results of two models to compare, and nothing is claimed."]
    if comparison.verdicts:
        texts = []
        for verdict in comparison.verdicts:
            text = printable(reworded(verdict))
            # In a comparison the text follows "Verdict: ". Here it begins a paragraph.
            texts.append(text[:1].upper() + text[1:])
        return texts

    # A study without controls has no verdict: its masks against the baseline.
    masks = evidence.masks
    sentences = []
    for row in comparison.differences:
        # One sentence for each task: all metrics are in the table.
        if row.method in masks and row.is_main:
            sentences.append(sentence(row))
    return sentences or [f"No learned mask is compared with {comparison.baseline}."]


def _commands(evidence: Evidence) -> list[str]:
    """Commands that make the study, its analyses and this page."""
    # Published results have no models, and their folder is not the one in which the study ran.
    has_models = any(run.models for run in evidence.runs)
    place = evidence.place if has_models else "STUDY"
    study = f"maskft study RECIPE.yaml --output_dir {place}  # the recipe named {evidence.name}"
    return [study, f"maskft analyze {place}", f"maskft report {evidence.place} -o report.html"]


def _settings(evidence: Evidence) -> Table:
    """Settings that differ between the methods that use them, of the first seed of each."""
    settings_of = {}  # name of a model -> its settings
    unused = {}  # name of a model -> names of settings that it does not use
    for result in evidence.results:
        name = result["name"]
        if name in settings_of:
            continue  # another seed
        # A setting that a method does not use has a value too, which would look like a difference.
        unused[name] = _unused(result)
        settings_of[name] = {}
        settings = result["study"]["settings"] or {}
        for key, value in settings.items():
            if key not in unused[name]:
                settings_of[name][key] = value

    # All settings, in the order of the first model that has them.
    keys = {}
    for settings in settings_of.values():
        keys |= dict.fromkeys(settings)

    # Values are compared as they are shown: lists have no hash, and 1 and 1.0 look the same.
    differing = []
    for key in keys:
        values = set()
        for name, settings in settings_of.items():
            # A pre-trained model has no settings, and differs in none.
            if settings and key not in unused[name]:
                values.add(_text(settings.get(key)))
        # Only these tell models apart; the recipe below has all settings.
        if len(values) > 1:
            differing.append(key)

    rows = []
    for name, settings in settings_of.items():
        cells = [_text(settings.get(key)) for key in differing]
        rows.append((name, *cells))
    return Table(("model", *differing), rows)


def _unused(result: dict[str, Any]) -> frozenset[str]:
    """Settings of a result that its method does not use, and the seeds, which differ in any case."""
    study = result["study"]
    of_method = unused_options(
        result["model"].get("method"),
        study["settings"] or {},
        is_trained=bool(study["num_steps"]),  # None: a fixed mask, or the base itself
        is_matched=study["match"] is not None,
    )
    return of_method | {"seed", "mask_seed"}


def _text(value: Any) -> str:
    """A setting's value for a table."""
    if value is None:
        return "–"
    # As many digits as a recipe has: a float such as 0.1 + 0.2 would have seventeen.
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return value
    # Lists, numbers and booleans as in a recipe.
    return json.dumps(value)

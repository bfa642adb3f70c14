"""The end of a study: one table over its results, with intervals. Reads result files only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from maskft_common import layout
from maskft_common.errors import UserError
from maskft_common.files import read_json, write_text

from ..results.compare import compare
from ..results.comparison import Settings
from ..results.render import render, render_scores
from ..results.schema import Result, read_result
from ..results.scores import scores
from ..results.tables import Table, draw
from .damage import is_whole_result
from .folder import Study
from .path import curves
from .recipe import PRETRAINED, Recipe
from .study_run import LAST, StudyRun, Tuned

_COUNTS = ("epochs", "tokens", "total_epochs", "total_tokens")


def summarise(study: Study, runs: Sequence[StudyRun], tunings: Sequence[Tuned]) -> str:
    """Compare all results of a study with its baseline, write summary and table; return one page: table and verdict.

    Args:
        study: Where the results are.
        runs: Its runs; those without a result yet are left out.
        tunings: The settings that were tried.
    """
    recipe = study.recipe
    _delete_old_curves(study)

    results = _results(study, runs)
    tunings = [tuned for tuned in tunings if tuned.is_settled]
    models: dict[str, Any] = {}
    text = ""
    table = [f"# {recipe.name}", ""]
    if results:
        model = results[0]["study"]["model"]
        results, notes = without_repeats(results, recipe.baseline)
        text, compared, record = _compared(results, recipe, tunings)
        for probe, curve in record.pop("curves", {}).items():
            write_text(study.folder / layout.CURVE.format(recipe.name, probe), json.dumps(curve, indent=1) + "\n")

        notes += [f"Tuned: {tuned}." for tuned in tunings]
        notes += _notes_on_forgetting(recipe, results)
        num_tried = {label: run.num_tried for run in runs for label in run.labels.values()}
        table += [f"## {model}", "", compared, _accounts_table(results, num_tried), ""]
        table += [f"- {note}" for note in notes]
        table += [""]
        if tunings:
            record["tuning"] = [tuned.to_dict() for tuned in tunings]
        models[model] = record

    summary = json.dumps({"study": recipe.name, "models": models}, indent=1) + "\n"
    write_text(study.folder / layout.SUMMARY.format(recipe.name), summary)
    write_text(study.folder / layout.STUDY_TABLE.format(recipe.name), "\n".join(table))
    return text


def _delete_old_curves(study: Study) -> None:
    """Delete this study's curves: a probe that the recipe no longer has would keep its own."""
    for file in study.folder.glob(layout.CURVE.format("*", "*")):
        with suppress(UserError, AttributeError):  # not a curve
            probe = read_json(file).get("probe")
            # The pattern matches curves of a study `NAME-2` too; the probe inside tells where the name ends.
            if file.name == layout.CURVE.format(study.recipe.name, probe):
                file.unlink()


def _results(study: Study, runs: Sequence[StudyRun]) -> list[Result]:
    results = []
    for run in runs:
        for role, label in run.labels.items():
            file = study.result_file(run, role)
            if is_whole_result(file):
                result = read_result(file) | {"name": label}  # it may have had another name
                result["study"]["result"] = file.parent.name
                results.append(result)
    return results


def _notes_on_forgetting(recipe: Recipe, results: list[Result]) -> list[str]:
    if not recipe.before:
        if len(results) < 2:
            return []
        return ["Note: forgetting was not measured beyond the tasks above (no evaluation.before)."]

    if not recipe.path:
        return []
    has_curve = recipe.path.choose and recipe.path.before.keys() & recipe.before.keys()
    if has_curve:
        return []
    return ["Note: no curve is written without path.choose and a name that both sets of `before` have."]


def _compared(results: list[Result], recipe: Recipe, tunings: Sequence[Tuned]) -> tuple[str, str, dict]:
    """Tables for a terminal, tables in Markdown, record."""
    names = list(dict.fromkeys(result["name"] for result in results))
    rows = [_row(result) for result in results]
    baseline = _baseline(results, names, recipe)
    if baseline is None or len(names) < 2:
        reached = scores(results, fixed_seeds=recipe.fixed_seeds)
        return render_scores(reached, "terminal"), render_scores(reached, "markdown"), {"runs": rows}

    settings = Settings(fixed_seeds=recipe.fixed_seeds)
    base_values = next((tuned.base for tuned in tunings if tuned.points), None)
    before = None
    if base_values is not None:
        before = next((result["name"] for result in results if result["model"]["method"] == PRETRAINED), None)

    try:
        comparison = compare(results, baseline, settings=settings)
        with_base = comparison if before in (None, baseline) else compare(results, before, settings=settings)
    except UserError as error:
        # Measured, but not comparable: the reason instead of an error keeps the numbers.
        return f"not compared: {error}\n", f"Not compared: {error}\n", {"runs": rows, "not_compared": str(error)}

    record = {"baseline": baseline, "runs": rows, "comparison": comparison.to_dict()}
    if before is not None:
        record["curves"] = curves(tunings, results, with_base, base_values)
    return render(comparison, "terminal"), render(comparison, "markdown"), record


def _baseline(results: list[Result], names: list[str], recipe: Recipe) -> str | None:
    """The recipe's baseline, in its first variant; else the best of the first full fine-tuning, else the first result.

    None if the recipe's has no result.
    """
    wanted = recipe.baseline
    if not wanted:
        full = [result for result in results if result["model"]["method"] == "full"]
        full = [result for result in full if result["study"]["role"] == "best"]
        wanted = (full or results)[0]["name"]
    return next((name for name in names if name == wanted or name.startswith(f"{wanted} [")), None)


def _row(result: Result) -> dict:
    study = result["study"]
    metrics = {
        f"{task}/{name}": metric["value"]
        for task, record in result["tasks"].items()
        for name, metric in record["metrics"].items()
    }
    row = {
        "name": result["name"],
        "method": result["model"]["method"],
        "seed": result["model"]["seed"],
        "metrics": metrics,
    }
    for key in ("run", "result", "start", "role", "best_step", "num_steps", *_COUNTS):
        row[key] = study[key]
    return row


def without_repeats(results: list[Result], baseline: str | None) -> tuple[list[Result], list[str]]:
    """Leave out an end of training that is the best checkpoint at every seed, with a note.

    A second row of the same models would count as one more comparison and make Holm's correction stricter.
    """
    is_best: dict[str, list[bool]] = {}  # name of an end of training -> for each seed, whether it is the best
    for result in results:
        study = result["study"]
        is_baseline = result["name"].partition(" [")[0] == baseline
        if study["role"] == LAST and not is_baseline:
            is_best.setdefault(result["name"], []).append(study["best_step"] == study["num_steps"])

    repeats = [name for name, same in is_best.items() if all(same)]
    notes = [f"Note: {name} is not listed: same as the best checkpoint (last step)." for name in repeats]
    return [result for result in results if result["name"] not in repeats], notes


def _accounts_table(results: list[Result], num_tried: dict[str, int]) -> str:
    """Epochs and tokens of each model, its own and with those of its start (paper, Tables 8 and 9).

    ``tuned`` is the number of settings among which held-out rows chose. ``kB`` is the size of the stored change: a mask
    entropy-coded, all other numbers in bfloat16.
    """
    has_tuning = any(num_tried.values())
    has_sizes = any(result["model"].get("num_bytes") for result in results)
    columns = ["model", "seed", "best step", "epochs", "tokens", "total epochs", "total tokens"]
    if has_tuning:
        columns.append("tuned")
    if has_sizes:
        columns.append("kB")

    rows = []
    for result in results:
        study = result["study"]
        row = [result["name"], str(result["model"]["seed"])]
        row.append(f"{study['best_step']} of {study['num_steps']}" if study["num_steps"] else "–")
        row += [f"{study['epochs']:.2f}", f"{study['tokens']:.3g}"]
        row += [f"{study['total_epochs']:.2f}", f"{study['total_tokens']:.3g}"]
        if has_tuning:
            row.append(str(num_tried.get(result["name"]) or "–"))
        if has_sizes:
            size = result["model"].get("num_bytes")
            row.append(f"{size / 1000:,.0f}" if size else "–")
        rows.append(tuple(row))
    return draw(Table(tuple(columns), rows), "markdown").rstrip("\n")

"""The end of a study: one table over its results, with intervals; reads result files only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress

from maskft_common import layout
from maskft_common.errors import UserError
from maskft_common.files import read_json, write_text

from ..results.compare import compare
from ..results.comparison import Settings
from ..results.render import render, render_scores
from ..results.schema import Result, read_result
from ..results.scores import scores
from ..results.tables import Table, draw
from .curve import curves
from .damage import is_whole_result
from .execute import Study
from .plan import Plan
from .recipe import PRETRAINED, Recipe
from .runs import LAST, Tuned

_ACCOUNTS = ("epochs", "tokens", "total_epochs", "total_tokens")


def summarise(study: Study, plan: Plan) -> str:
    """Compare all results of a study with its baseline, write summary and table; return one page: table and verdict.

    Args:
        study: Where the results are.
        plan: Its runs; those without a result yet are left out.
    """
    results = []
    for file, name in ((study.result_file(run, role), run.labels[role]) for run in plan.runs for role in run.labels):
        if is_whole_result(file):
            results.append(read_result(file) | {"name": name})  # it may have had another
            results[-1]["study"]["result"] = file.parent.name
    recipe, name, models, text, table = study.recipe, study.recipe.name, {}, "", [f"# {study.recipe.name}", ""]
    for file in study.folder.glob(layout.CURVE.format("*", "*")):
        with suppress(UserError, AttributeError):  # it is no curve
            if file.name == layout.CURVE.format(name, read_json(file).get("probe")):  # else of another study
                file.unlink()
    if results:
        model = results[0]["study"]["model"]
        results, notes = without_repeats(results, recipe.baseline)
        tunings = [tuned for tuned in plan.tunings if tuned.is_settled]
        text, compared, record = _compared(results, recipe, tunings)
        for probe, curve in record.pop("curves", {}).items():
            write_text(study.folder / layout.CURVE.format(name, probe), json.dumps(curve, indent=1) + "\n")
        notes += [f"Tuned: {tuned}." for tuned in tunings]
        if not recipe.before and len(results) > 1:
            notes.append("Note: forgetting was not measured beyond the tasks above (no evaluation.before).")
        elif recipe.path and not (recipe.path.choose and recipe.path.before.keys() & recipe.before.keys()):
            notes.append("Note: no curve is written without path.choose and a name that both sets of `before` have.")
        num_tried = {label: run.num_tried for run in plan.runs for label in run.labels.values()}
        table += [f"## {model}", "", compared, _accounts(results, num_tried), "", *(f"- {note}" for note in notes), ""]
        models[model] = record | ({"tuning": [tuned.to_dict() for tuned in tunings]} if tunings else {})
    summary = json.dumps({"study": name, "models": models}, indent=1) + "\n"
    write_text(study.folder / layout.SUMMARY.format(name), summary)
    write_text(study.folder / layout.STUDY_TABLE.format(name), "\n".join(table))
    return text


def _compared(results: list[Result], recipe: Recipe, tunings: Sequence[Tuned]) -> tuple[str, str, dict]:
    """Tables for a terminal, tables in Markdown, record."""
    names = list(dict.fromkeys(result["name"] for result in results))
    runs = [_row(result) for result in results]
    wanted = recipe.baseline or _default_baseline(results)
    baseline = next((name for name in names if name == wanted or name.startswith(f"{wanted} [")), None)
    if baseline is None or len(names) < 2:
        reached = scores(results, fixed_seeds=recipe.fixed_seeds)
        return render_scores(reached, "terminal"), render_scores(reached, "markdown"), {"runs": runs}
    base = next((tuned.base for tuned in tunings if tuned.points), None)
    before = next((r["name"] for r in results if base is not None and r["model"]["method"] == PRETRAINED), None)
    settings = Settings(fixed_seeds=recipe.fixed_seeds)
    try:
        comparison = compare(results, baseline, settings=settings)
        of_base = comparison if before in (None, baseline) else compare(results, before, settings=settings)
    except UserError as error:  # measured, and not comparable: say so instead of losing the numbers
        return f"not compared: {error}\n", f"Not compared: {error}\n", {"runs": runs, "not_compared": str(error)}
    record = {"baseline": baseline, "runs": runs, "comparison": comparison.to_dict()}
    if before is not None:
        record["curves"] = curves(tunings, results, of_base, base)
    return render(comparison, "terminal"), render(comparison, "markdown"), record


def _default_baseline(results: list[Result]) -> str:
    """The best checkpoint of the first full fine-tuning, else the first result."""
    full = [r for r in results if r["model"]["method"] == "full" and r["study"]["role"] == "best"]
    return (full or results)[0]["name"]


def _row(result: Result) -> dict:
    study, model = result["study"], result["model"]
    metrics = {
        f"{task}/{name}": metric["value"]
        for task, record in result["tasks"].items()
        for name, metric in record["metrics"].items()
    }
    named = ("run", "result", "start", "role", "best_step", "num_steps", *_ACCOUNTS)
    facts = {key: study[key] for key in named}
    return {"name": result["name"], "method": model["method"], "seed": model["seed"], "metrics": metrics, **facts}


def without_repeats(results: list[Result], baseline: str | None) -> tuple[list[Result], list[str]]:
    """Leave out ends of training that are the best checkpoint at every seed, and say so.

    A second row of the same models would count as a comparison of its own and make Holm's correction stricter.
    """
    ends = {}
    for result in results:
        if result["study"]["role"] == LAST and result["name"].partition(" [")[0] != baseline:
            study = result["study"]
            ends.setdefault(result["name"], []).append(study["best_step"] == study["num_steps"])
    repeats = [name for name, same in ends.items() if all(same)]
    notes = [f"Note: {name} is not listed: it is the best one, whose step is the last." for name in repeats]
    return [result for result in results if result["name"] not in repeats], notes


def _accounts(results: list[Result], num_tried: dict[str, int]) -> str:
    """Epochs and tokens of each model, its own and with what it was made from (paper, Tables 8 and 9).

    Where anything was tuned, ``tuned`` counts the settings of which a model's are the best on held-out rows. ``kB`` is
    what has to be kept of a change: a mask coded, all other numbers in bfloat16.
    """
    columns: tuple[str, ...] = ("model", "seed", "best step", "epochs", "tokens", "total epochs", "total tokens")
    is_tuned, has_sizes = any(num_tried.values()), any(result["model"].get("num_bytes") for result in results)
    rows = []
    for result in results:
        study = result["study"]
        step = f"{study['best_step']} of {study['num_steps']}" if study["num_steps"] else "–"
        counts = (f"{study[key]:{'.2f' if 'epochs' in key else '.3g'}}" for key in _ACCOUNTS)
        tried = [str(num_tried.get(result["name"]) or "–")] if is_tuned else []
        size = result["model"].get("num_bytes")
        tried += [f"{size / 1000:,.0f}" if size else "–"] if has_sizes else []
        rows.append((result["name"], str(result["model"]["seed"]), step, *counts, *tried))
    columns += ("tuned",) * is_tuned + ("kB",) * has_sizes
    return draw(Table(columns, rows), "markdown").rstrip("\n")

"""The end of a study: one table over its results, with intervals. Reads result files only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from maskft.training.kl_budget import excess
from maskft.training.verdict import decimals
from maskft_common import layout
from maskft_common.errors import UserError
from maskft_common.files import read_json, write_text

from ..results.compare import compare_measured
from ..results.comparison import Settings
from ..results.render import render, render_scores
from ..results.schema import Result, read_result
from ..results.scores import scores
from ..results.tables import Table, draw
from ..results.words import rounded
from .damage import is_whole_result
from .folder import Study
from .path import curves
from .recipe import PRETRAINED, Recipe
from .study_run import BEST, LAST, StudyRun, Tuned

# Keys of a result's block `study` that the summary repeats for each run.
_OF_STUDY = (
    "run",
    "result",
    "start",
    "role",
    "best_step",
    "num_steps",
    "epochs",
    "tokens",
    "total_epochs",
    "total_tokens",
)


def summarise(
    study: Study,
    runs: Sequence[StudyRun],
    tunings: Sequence[Tuned],
    notes_on_rows: Sequence[str] = (),
) -> str:
    """Compare all results of a study with its baseline, write summary and table; return one page: table and verdict.

    Args:
        study: Where the results are.
        runs: Its runs; those without a result yet are left out.
        tunings: The settings that were tried.
        notes_on_rows: Notes on the rows of the study, for the table and the page.
    """
    recipe = study.recipe
    _delete_old_curves(study)

    results = _results(study, runs)
    tunings = [tuned for tuned in tunings if tuned.is_settled]
    models: dict[str, Any] = {}  # base model -> record; a study has one base model
    text = ""
    table = [f"# {recipe.name}", ""]

    # Without any result, a table with a title alone: an older one would be taken for this study's.
    if results:
        # The comparison.
        # The name as the results have it, without a folder of this machine.
        model = results[0]["study"]["model"]
        results, notes = without_repeats(results, recipe.baseline)
        text, compared, record = _compared(results, recipe, tunings)
        _write_curves(study, record.pop("curves", {}))
        if tunings:
            record["tuning"] = [tuned.to_dict() for tuned in tunings]
        if notes_on_rows:  # for the study's page
            record["notes_on_rows"] = list(notes_on_rows)
        models[model] = record

        # The notes, and the accounts of all models.
        notes += notes_on_rows
        notes += [f"Tuned: {tuned}." for tuned in tunings]
        notes += _notes_on_forgetting(recipe, results)
        num_tried = _settings_tried(runs)
        accounts = _accounts_table(results, num_tried)
        table += [f"## {model}", "", compared, accounts, ""]
        table += [f"- {note}" for note in notes]
        # The empty text becomes the line break at the end of the file.
        table += [""]

    # The summary is for programs, the table for people.
    summary = {"study": recipe.name, "models": models}
    summary_file = study.folder / layout.SUMMARY.format(recipe.name)
    write_text(summary_file, json.dumps(summary, indent=1) + "\n")
    table_file = study.folder / layout.STUDY_TABLE.format(recipe.name)
    write_text(table_file, "\n".join(table))
    return text


def _delete_old_curves(study: Study) -> None:
    """Delete this study's curves: the file of a probe that the recipe no longer has would stay."""
    pattern = layout.CURVE.format("*", "*")
    for file in study.folder.glob(pattern):
        with suppress(UserError, AttributeError):  # not a curve
            probe = read_json(file).get("probe")
            # The pattern matches curves of other studies too; the probe inside tells where a study's name ends.
            own_name = layout.CURVE.format(study.recipe.name, probe)
            if file.name == own_name:
                file.unlink()


def _write_curves(study: Study, curves_by_probe: dict[str, dict]) -> None:
    for probe, curve in curves_by_probe.items():
        file = study.folder / layout.CURVE.format(study.recipe.name, probe)
        write_text(file, json.dumps(curve, indent=1) + "\n")


def _results(study: Study, runs: Sequence[StudyRun]) -> list[Result]:
    """All results that can be read, each under the name that this study gives its model."""
    results = []
    for run in runs:
        for role, label in run.labels.items():
            file = study.result_file(run, role)
            if not is_whole_result(file):  # of a run that failed
                continue
            result = read_result(file)
            result = result | {"name": label}  # another recipe of the same study may have had another
            result["study"]["result"] = file.parent.name
            results.append(result)
    return results


def _settings_tried(runs: Sequence[StudyRun]) -> dict[str, int]:
    """Name in tables -> number of settings that were tried for it."""
    num_tried = {}
    for run in runs:
        for label in run.labels.values():
            num_tried[label] = run.num_tried
    return num_tried


def _notes_on_forgetting(recipe: Recipe, results: list[Result]) -> list[str]:
    """Notes on measurements of forgetting that a reader may miss."""
    if not recipe.before:
        if len(results) < 2:  # a single model is compared with nothing
            return []
        return ["Note: forgetting was not measured beyond the tasks above (no evaluation.before)."]

    if not recipe.path:
        return []
    # A curve joins points along a path, measured on path.before, with chosen points, measured on evaluation.before.
    in_both = recipe.path.before.keys() & recipe.before.keys()
    if recipe.path.choose and in_both:
        return []
    return ["Note: no curve is written without path.choose and a name that both sets of `before` have."]


def _compared(
    results: list[Result],
    recipe: Recipe,
    tunings: Sequence[Tuned],
) -> tuple[str, str, dict]:
    """Tables for a terminal, tables in Markdown, record."""
    # Results of all seeds of a method have one name.
    names = list(dict.fromkeys(result["name"] for result in results))  # each once, in the order of the runs
    rows = [_row(result) for result in results]

    # One model, or no baseline: a table of scores without differences.
    baseline = _baseline(results, names, recipe)
    if baseline is None or len(names) < 2:
        reached = scores(results, fixed_seeds=recipe.fixed_seeds)
        for_terminal = render_scores(reached, "terminal")
        for_file = render_scores(reached, "markdown")
        return for_terminal, for_file, {"runs": rows}

    # Curves need the base model twice: its values on the rows of the points, and its test result.
    # All tunings have the same values of the base model.
    base_values = None
    for tuned in tunings:
        if tuned.points:
            base_values = tuned.base
            break
    base_name = None
    if base_values is not None:
        base_name = _name_of_base(results)

    settings = Settings(fixed_seeds=recipe.fixed_seeds)
    try:
        comparison = compare_measured(results, baseline, settings=settings)
        with_base = comparison
        # Curves are differences from the base model, and the study's baseline may be another model.
        if base_name not in (None, baseline):
            with_base = compare_measured(results, base_name, settings=settings)
    except UserError as error:
        # Measured, but not comparable, as with different test sets: the reason instead of an error keeps the numbers.
        record = {"runs": rows, "not_compared": str(error)}
        return f"not compared: {error}\n", f"Not compared: {error}\n", record

    record = {
        "baseline": baseline,
        "runs": rows,
        "comparison": comparison.to_dict(),
    }
    # `summarise` takes the curves out of the record again, into a file each.
    if base_name is not None:
        record["curves"] = curves(tunings, results, with_base, base_values)
    for_terminal = render(comparison, "terminal")
    for_file = render(comparison, "markdown")
    return for_terminal, for_file, record


def _name_of_base(results: list[Result]) -> str | None:
    """Name of the base model in tables; None if it was not evaluated."""
    for result in results:
        if result["model"]["method"] == PRETRAINED:
            return result["name"]
    return None


def _baseline(
    results: list[Result],
    names: list[str],
    recipe: Recipe,
) -> str | None:
    """The recipe's baseline, in its first variant; else the best of the first full fine-tuning, else the first result.

    None if the recipe's has no result.
    """
    # The name that the recipe gives or that is the default.
    wanted = recipe.baseline
    if not wanted:
        wanted = results[0]["name"]
        for result in results:
            is_full = result["model"]["method"] == "full"
            if is_full and result["study"]["role"] == BEST:
                wanted = result["name"]
                break

    # It may be the name of a method with a grid, whose variants are compared with the first of them.
    prefix_of_variants = f"{wanted} ["  # followed by values of the grid
    for name in names:
        if name == wanted or name.startswith(prefix_of_variants):
            return name
    return None


def _row(result: Result) -> dict:
    """Identity, metrics and accounts of one result, for the summary."""
    # The metrics of all tasks in one dictionary.
    metrics = {}
    for task, record in result["tasks"].items():
        for name, metric in record["metrics"].items():
            key = f"{task}/{name}"
            metrics[key] = metric["value"]

    model = result["model"]
    row = {
        "name": result["name"],
        "method": model["method"],
        "seed": model["seed"],
        "metrics": metrics,
    }

    study = result["study"]
    for key in _OF_STUDY:
        row[key] = study[key]
    return row


def without_repeats(results: list[Result], baseline: str | None) -> tuple[list[Result], list[str]]:
    """Leave out an end of training that is the best checkpoint at every seed, with a note.

    A second row of the same models would count as one more comparison and make Holm's correction stricter.
    """
    is_best: dict[str, list[bool]] = {}  # name of an end of training -> for each seed, whether it is the best
    for result in results:
        study = result["study"]
        label = result["name"]
        name, _, _ = label.partition(" [")  # without values of the grid
        if study["role"] != LAST or name == baseline:  # a baseline must stay
            continue
        best_is_last = _kept_step(study) == study["num_steps"]
        is_best.setdefault(label, []).append(best_is_last)

    # At some seeds only, the two rows differ, and both are listed.
    repeats = [name for name, same in is_best.items() if all(same)]
    notes = [f"Note: {name} is not listed: same as the best checkpoint (last step)." for name in repeats]
    others = [result for result in results if result["name"] not in repeats]
    return others, notes


def _kept_step(study: dict[str, Any]) -> int:
    """The step of a run's best checkpoint; without an evaluation during training the model of the last step is kept."""
    if study["best_step"] is None:
        return study["num_steps"]
    return study["best_step"]


def _accounts_table(results: list[Result], num_tried: dict[str, int]) -> str:
    """Epochs and tokens of each model, its own and with those of its start (paper, Tables 8 and 9).

    ``tuned`` is the number of settings among which held-out rows chose. ``KL of budget`` is KL(base || model) of the
    kept checkpoint on held-out rows, in nats per token, beside the ``kl_budget`` it was trained with. ``kB`` is the
    size of the stored change: a mask entropy-coded, all other numbers in bfloat16.
    """
    # A column without a value in any row is left out.
    has_tuning = any(num_tried.values())
    has_budgets = any("kl" in result["study"] for result in results)
    has_sizes = any(result["model"].get("num_bytes") for result in results)
    columns = [
        "model",
        "seed",
        "best step",
        "epochs",
        "tokens",
        "total epochs",
        "total tokens",
    ]
    if has_tuning:
        columns.append("tuned")
    if has_budgets:
        columns.append("KL of budget")
    if has_sizes:
        columns.append("kB")

    rows = []
    for result in results:
        study = result["study"]
        model = result["model"]
        steps = "–"  # nothing was trained
        if study["num_steps"]:
            steps = f"{_kept_step(study)} of {study['num_steps']}"
        row = [
            result["name"],
            str(model["seed"]),
            steps,
            _decimal(study["epochs"], 2),
            f"{study['tokens']:.3g}",
            _decimal(study["total_epochs"], 2),
            f"{study['total_tokens']:.3g}",
        ]
        # The optional columns, in the order of the header.
        if has_tuning:
            number = num_tried.get(result["name"])
            shown_number = str(number) if number else "–"
            row.append(shown_number)
        if has_budgets:
            row.append(_kl_of_budget(study.get("kl")))
        if has_sizes:
            num_bytes = model.get("num_bytes")
            size = _decimal(num_bytes / 1000, 0) if num_bytes else "–"
            row.append(size)
        rows.append(tuple(row))

    table = Table(tuple(columns), rows)
    return draw(table, "markdown").rstrip("\n")


def _decimal(number: float, digits: int) -> str:
    """A number with this many decimals, or with more where it would be written as zero and is not."""
    [shown], digits = rounded([number], 1.0, digits)
    return f"{shown:,.{digits}f}"


def _kl_of_budget(kl: dict[str, Any] | None) -> str:
    """A cell such as ``0.0471 of 0.05``."""
    if kl is None:
        return "–"
    budget = kl["budget"]
    reached = kl["reached"]
    if reached is None:  # of a part of the change
        return f"not measured, of {budget:g}"
    # Enough decimals to see on which side of the budget it is.
    digits = decimals(reached, reached - budget)
    text = f"{reached:.{digits}f} of {budget:g}"
    return f"{text}, missed" if excess(reached, budget) else text

"""Print the evidence of studies as Markdown: each model against several controls, and what it forgot.

python recipes/evidence.py runs/NAME --controls full "warm restart of full" "random damage of mask, 30 %, refit"
python recipes/evidence.py results/NAME results/OTHER --controls full

A folder is a study's, or one of published results (`*.json.gz`). Of several, models of one name are the seeds of one
method; those that one folder lacks are left out.

A row for each model of the study; under each control the differences in the metrics of the first task that is no probe
of earlier abilities, with their 95 % intervals over seeds and items, bold where Holm's correction leaves them
distinguishable. The intervals are unadjusted, each of its difference alone: `maskft compare` has the simultaneous ones.
Lower is better for losses, higher for accuracies.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from maskft_common import layout
from maskft_common.command_line import run_script
from maskft_common.errors import UserError
from maskft_lab.results.compare import compare
from maskft_lab.results.comparison import NOT_DISTINGUISHABLE, Difference, Score, Settings
from maskft_lab.results.schema import BEFORE, Result, read_result
from maskft_lab.results.scores import scores
from maskft_lab.results.tables import markdown_cell
from maskft_lab.results.words import rounded, score_text


def main(
    folders: list[Path],
    controls: list[str],
    fixed_seeds: bool = False,
) -> str:
    """Return the table of the results in ``folders``; with ``fixed_seeds`` of these models, over items alone."""
    results = _results_in_all(folders)
    names = list(dict.fromkeys(result["name"] for result in results))
    for control in controls:
        if control not in names:
            where = ", ".join(map(str, folders))
            raise UserError(f"no model {control!r} in {where}; there are: {', '.join(names)}")

    # The first task is the test; tasks with the prefix BEFORE measure what was forgotten.
    tasks = results[0]["tasks"]
    task = next((name for name in tasks if not name.startswith(BEFORE)), None)
    if task is None:
        raise UserError(f"the results have no task but probes ({', '.join(tasks)}): name a study that evaluates one")
    metrics = list(tasks[task]["metrics"])
    before = []  # task and metric
    for name in tasks:
        if name.startswith(BEFORE):
            for metric in tasks[name]["metrics"]:
                before.append((name, metric))
    against = list(itertools.product(controls, metrics))

    # Model, task and metric -> score; control, model and metric -> difference.
    reached = {}
    for score in scores(results, fixed_seeds=fixed_seeds):
        reached[score.model, score.task, score.metric] = score
    settings = Settings(fixed_seeds=fixed_seeds)
    compared = {}
    for control in controls:
        comparison = compare(results, control, tasks=[task], settings=settings)
        for row in comparison.differences:
            compared[control, row.method, row.metric] = row

    # Scores, differences from the controls, probes of earlier abilities, costs.
    columns = [
        *metrics,
        *(f"{metric} against {control}" for control, metric in against),
        *(f"{name}, {metric}" for name, metric in before),
        "tokens, its own",
        "adapter (bytes)",
    ]
    lines = [
        "| model | " + " | ".join(map(markdown_cell, columns)) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name in names:
        cells = []
        for metric in metrics:
            score = reached.get((name, task, metric))
            cells.append(_score(score))
        for control, metric in against:
            # None for the control itself: a model is not compared with itself.
            difference = compared.get((control, name, metric))
            cells.append(_difference(difference))
        for other, metric in before:
            score = reached.get((name, other, metric))
            cells.append(_score(score))

        # Means over the seeds.
        of_model = [result for result in results if result["name"] == name]
        num_tokens = [result["study"]["tokens"] for result in of_model]
        mean_tokens = sum(num_tokens) / len(num_tokens)
        cells.append(f"{mean_tokens:,.0f}")
        cells.append(_bytes(folders, of_model))
        lines.append(f"| {markdown_cell(name)} | " + " | ".join(cells) + " |")

    # Other tables of these results have simultaneous intervals, which are wider.
    over = "items" if fixed_seeds else "several seeds, else items"
    lines += [
        "",
        "Differences have unadjusted 95 % intervals; bold: distinguishable after Holm's correction over all models "
        f"beside the control; ± is one standard error, over {over}.",
    ]
    return "\n".join(lines)


def _results_in_all(folders: list[Path]) -> list[Result]:
    """The results of models that every folder has: the folders are the seeds of one study."""
    read = [_read(folder) for folder in folders]
    names = [{result["name"] for result in results} for results in read]
    in_all = set.intersection(*names)

    found = []
    for results in read:
        found += [result for result in results if result["name"] in in_all]
    return found


def _read(folder: Path) -> list[Result]:
    # A study's folder has its results in folders of their own, a published one has them side by side.
    found = sorted((folder / layout.RESULTS).glob(f"*/{layout.RESULT}"))
    # Interrupted evaluations, and results of an earlier recipe, are in no summary.
    names = _names_in_summaries(folder)
    if names:
        found = [file for file in found if file.parent.name in names]
    if not found:
        found = sorted(folder.glob("*.json.gz"))
    if not found:
        raise UserError(f"no results in {folder}: name a study's folder, or one with results (*.json.gz)")

    results = []
    for file in found:
        result = read_result(file)
        if "study" not in result:
            raise UserError(f"{file} is of no study: results of maskft evaluate are compared by maskft compare")
        # The file keeps the name that an earlier recipe gave the model.
        name = names.get(file.parent.name, result["name"])
        results.append(result | {"name": name})
    return results


def _names_in_summaries(folder: Path) -> dict[str, str]:
    """Folder of a result -> name of its model, of all studies that share a folder and have ended."""
    names = {}
    for file in sorted(folder.glob(layout.SUMMARY.format("*"))):
        for record in json.loads(file.read_text(encoding="utf-8"))["models"].values():
            for row in record["runs"]:
                names[row["result"]] = row["name"]
    return names


def _score(score: Score | None) -> str:
    """A score with its error; a dash for a model that was not measured there."""
    return "–" if score is None else score_text(score)


def _difference(row: Difference | None) -> str:
    """A difference with its interval, in points for shares; bold if it is distinguishable."""
    if row is None:
        return ""
    if row.unit == "fraction":
        scale = 100
        digits = 1
    else:
        scale = 1
        digits = 3
    numbers, digits = rounded((row.difference, row.unadjusted_low, row.unadjusted_high), scale, digits)
    value, low, high = numbers
    text = f"{value:+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
    if row.verdict == NOT_DISTINGUISHABLE:
        return text
    return f"**{text}**"


def _bytes(folders: list[Path], results: list[Result]) -> str:
    """Mean size of the masks' files; a dash for models that are not adapters, or whose files are not here."""
    # A run is in one of the folders. Published folders have no adapters.
    sizes = []
    for folder in folders:
        for result in results:
            run = result["study"]["run"]
            file = folder / layout.RUNS / run / layout.ADAPTER_WEIGHTS
            if file.is_file():
                sizes.append(file.stat().st_size)
    if not sizes:
        return "–"
    mean = sum(sizes) / len(sizes)
    return f"{mean:,.0f}"


def command() -> None:
    """Print the table of the folders on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders of studies, or of published results")
    parser.add_argument("--controls", nargs="+", required=True, help="models that the others are compared with")
    parser.add_argument("--fixed_seeds", action="store_true", help="claims about these models alone, over items")
    given = parser.parse_args()
    print(main(given.folders, given.controls, given.fixed_seeds))


if __name__ == "__main__":
    run_script(command)

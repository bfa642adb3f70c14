"""Print the evidence of studies as Markdown: each model against several controls, and what it forgot.

python recipes/evidence.py runs/NAME --controls full "warm restart of full" "random damage of mask, 30 %, refit"
python recipes/evidence.py results/NAME results/OTHER --controls full

A folder is a study's, or one of published results (`*.json.gz`). Of several, models of one name are the seeds of one
method; those that one folder lacks are left out.

A row for each model of the study; under each control the difference in the first task's metric (the last of it that is
measured item by item, accuracy where there is one), with its 95 % interval over seeds and items, bold where Holm's
correction over the column leaves it distinguishable. Lower is better for losses, higher for accuracies.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from maskft_common import layout
from maskft_common.errors import UserError
from maskft_lab.results.compare import compare
from maskft_lab.results.comparison import Settings
from maskft_lab.results.schema import BEFORE, Result, read_result
from maskft_lab.results.scores import scores
from maskft_lab.results.words import score_text


def main(folders: list[Path], controls: list[str], fixed_seeds: bool = False) -> str:
    """Return the table of the results in ``folders``; with ``fixed_seeds`` of these models, over items alone."""
    read = [_read(folder) for folder in folders]
    in_all = set.intersection(*({result["name"] for result in results} for results in read))
    results = [result for each in read for result in each if result["name"] in in_all]
    names = list(dict.fromkeys(result["name"] for result in results))
    for control in controls:
        if control not in names:
            raise UserError(f"no model {control!r} in {', '.join(map(str, folders))}; there are: {', '.join(names)}")
    task = next(name for name in results[0]["tasks"] if not name.startswith(BEFORE))
    metrics = list(results[0]["tasks"][task]["metrics"])
    earlier = [name for name in results[0]["tasks"] if name.startswith(BEFORE)]
    before = [(name, metric) for name in earlier for metric in results[0]["tasks"][name]["metrics"]]
    columns = [*metrics]
    columns += [f"{metric} against {control}" for control in controls for metric in metrics]
    columns += [f"{name}, {metric}" for name, metric in before]
    columns += ["tokens, its own", "adapter (bytes)"]
    reached = {(s.model, s.task, s.metric): s for s in scores(results)}
    compared = {
        (control, row.method, row.metric): row
        for control in controls
        for row in compare(results, control, tasks=[task], settings=Settings(fixed_seeds=fixed_seeds)).differences
    }
    lines = ["| model | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name in names:
        cells = [score_text(reached[name, task, metric]) for metric in metrics]
        cells += [_difference(compared.get((control, name, metric))) for control in controls for metric in metrics]
        cells += [
            score_text(reached[name, other, metric])
            for other in earlier
            for metric in results[0]["tasks"][other]["metrics"]
        ]
        of_model = [result for result in results if result["name"] == name]
        tokens = sum(result["study"]["tokens"] for result in of_model) / len(of_model)
        lines.append(f"| {name} | " + " | ".join([*cells, f"{tokens:,.0f}", _bytes(folders, of_model)]) + " |")
    return "\n".join(lines)


def _read(folder: Path) -> list[Result]:
    of_study = sorted((folder / layout.RESULTS).rglob(layout.RESULT))
    found = of_study or sorted(folder.glob("*.json.gz"))
    if not found:
        raise UserError(f"no results in {folder}: name a study's folder, or one with results (*.json.gz)")
    return [read_result(file) for file in found]


def _difference(row) -> str:
    if row is None:
        return ""
    scale, digits = (100, 1) if row.unit == "fraction" else (1, 3)
    numbers = [scale * number for number in (row.difference, row.unadjusted_low, row.unadjusted_high)]
    text = f"{numbers[0]:+.{digits}f} [{numbers[1]:.{digits}f}, {numbers[2]:.{digits}f}]"
    return text if row.verdict == "not distinguishable" else f"**{text}**"


def _bytes(folders: list[Path], results: list[Result]) -> str:
    """Mean size of the masks' files; a dash for what is no adapter, or not there."""
    runs = [result["study"]["run"] for result in results]
    found = [folder / layout.RUNS / run / layout.ADAPTER_WEIGHTS for folder in folders for run in runs]
    sizes = [file.stat().st_size for file in found if file.is_file()]
    return f"{sum(sizes) / len(sizes):,.0f}" if sizes else "–"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="folders of studies, or of published results")
    parser.add_argument("--controls", nargs="+", required=True, help="models that the others are compared with")
    parser.add_argument("--fixed_seeds", action="store_true", help="claims about these models alone, over items")
    given = parser.parse_args()
    try:
        print(main(given.folders, given.controls, given.fixed_seeds))
    except UserError as error:
        sys.exit(f"error: {error}")

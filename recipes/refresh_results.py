"""Bring published comparisons up to date with this version's statistics and words.

python recipes/refresh_results.py [results/NAME ...] [--write]

For every folder with a summary whose models all have their results beside it (of others, the words of verdicts alone):
the comparison in ``summary.json``, the
tables and sentences in ``table.md``, and those of ``against_mask*.md``, are computed again from the result files, so
that a page, a table and ``maskft compare`` say the same. Without ``--write`` changed lines are printed alone. Verdicts
that change ("better", "worse", "not distinguishable") are named, and their folder is left as it is.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

from maskft_common.errors import UserError
from maskft_lab.report.evidence import gather
from maskft_lab.results.compare import compare
from maskft_lab.results.comparison import Comparison, Settings
from maskft_lab.results.reading import read_all
from maskft_lab.results.render import render
from maskft_lab.results.verdict import reworded

ROOT = Path(__file__).parents[1]
LAST_LINE = re.compile(r"^- Differences are method - (?P<baseline>.+), with 95 % intervals of 10,000 .*$", re.MULTILINE)


def refreshed(folder: Path) -> dict[Path, str]:
    """Return the new text of each file of a published study.

    Raises:
        UserError: If there is no comparison, or a verdict would change.
    """
    summary_file = folder / "summary.json"
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    (record,) = summary["models"].values()
    if "comparison" not in record:
        raise UserError("no comparison")
    old = Comparison.from_dict(record["comparison"])
    compared = {old.baseline, *old.methods}
    results = [result for result in gather(folder).results if result["name"] in compared]
    if {result["name"] for result in results} != compared:
        # Numbers stay, words are those of this version.
        verdicts = [replace(verdict, text=reworded(verdict)) for verdict in old.verdicts]
        record["comparison"]["verdicts"] = [asdict(verdict) for verdict in verdicts]
        return {summary_file: json.dumps(summary, indent=1) + "\n"}

    settings = Settings(old.num_resamples, old.seed, old.confidence, old.fixed_seeds)
    new = compare(results, old.baseline, settings=settings)
    _check_verdicts(old, new)
    record["comparison"] = new.to_dict()
    texts = {summary_file: json.dumps(summary, indent=1) + "\n"}

    table = folder / "table.md"
    if table.is_file() and LAST_LINE.search(table.read_text(encoding="utf-8")):
        texts[table] = _with_comparison(table.read_text(encoding="utf-8"), render(new, "markdown"))
    for file in sorted(folder.glob("against_mask*.md")):
        texts[file] = _against_mask(file, folder)
    return texts


def _check_verdicts(old: Comparison, new: Comparison) -> None:
    said = {(row.method, row.task, row.metric): row.verdict for row in old.differences}
    for row in new.differences:
        before = said.get((row.method, row.task, row.metric))
        if before != row.verdict:
            raise UserError(f"{row.method}, {row.metric} on {row.task}: {before} would be {row.verdict}")


def _with_comparison(table: str, comparison: str) -> str:
    """Return a study's table with its comparison replaced: from the first table to the line that explains it."""
    start = table.index("| model |")
    found = LAST_LINE.search(table)
    assert found is not None
    return table[:start] + comparison.rstrip("\n") + table[found.end() :]


def _against_mask(file: Path, folder: Path) -> str:
    """Return what ``maskft compare FOLDER --baseline MASK --format markdown`` prints."""
    text = file.read_text(encoding="utf-8")
    found = LAST_LINE.search(text)
    if found is None or found["baseline"] not in {result["name"] for result in read_all([str(folder)])}:
        return text
    settings = Settings(fixed_seeds="seeds are fixed" in found[0])
    return render(compare(read_all([str(folder)]), found["baseline"], settings=settings), "markdown")


def main(folders: list[Path], is_written: bool) -> None:
    """Print the changed lines of each folder; write them where that is asked for."""
    for folder in folders:
        try:
            texts = refreshed(folder)
        except UserError as error:
            print(f"{folder.name}: left as it is: {error}")
            continue
        for file, text in texts.items():
            old = file.read_text(encoding="utf-8")
            if old == text:
                continue
            print(f"{folder.name}/{file.name}: changed")
            if file.suffix == ".md":
                lines = difflib.unified_diff(old.splitlines(), text.splitlines(), lineterm="", n=0)
                print("\n".join(line for line in lines if not line.startswith(("---", "+++", "@@"))))
            if is_written:
                file.write_text(text, encoding="utf-8")
        sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders of published results (default: all)")
    parser.add_argument("--write", action="store_true", help="write the files, and not the changed lines alone")
    given = parser.parse_args()
    main(given.folders or sorted(file.parent for file in (ROOT / "results").glob("*/summary.json")), given.write)

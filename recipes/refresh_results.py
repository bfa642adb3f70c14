"""Bring published comparisons up to date with this version's statistics and words.

python recipes/refresh_results.py [results/NAME ...] [--write]

For every folder with a summary, the comparison in ``summary.json``, the tables and sentences in ``table.md`` and those
of ``against_mask*.md`` are computed again from the result files, so that a page, a table and ``maskft compare`` say the
same. Where the results of a model are missing, only the words of verdicts are updated. Without ``--write`` the changed
lines are only printed. If a verdict ("better", "worse", "not distinguishable") would change, it is named and the folder
is left as it is.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

from maskft_common.command_line import run_script
from maskft_common.errors import UserError
from maskft_common.files import write_text
from maskft_lab.report.evidence import gather
from maskft_lab.results.compare import compare_measured
from maskft_lab.results.comparison import Comparison, Settings
from maskft_lab.results.reading import read_all
from maskft_lab.results.render import render
from maskft_lab.results.verdict import reworded

ROOT = Path(__file__).parents[1]
# Ends a comparison in a table; the lines below it were written by a person.
LAST_LINE = re.compile(r"^- Differences are method - (?P<baseline>.+), with 95 % intervals of [\d,]+ .*$", re.MULTILINE)


def refreshed(folder: Path) -> dict[Path, str]:
    """Return the new text of each file of a published study.

    Raises:
        UserError: If there is no comparison, or a verdict would change.
    """
    summary_file = folder / "summary.json"
    if not summary_file.is_file():
        raise UserError("no summary.json: name a folder of published results")
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    (record,) = summary["models"].values()
    if "comparison" not in record:
        raise UserError("no comparison")
    old = Comparison.from_dict(record["comparison"])

    compared = {old.baseline, *old.methods}
    results = []
    for result in gather(folder).results:
        if result["name"] in compared:
            results.append(result)
    with_results = {result["name"] for result in results}
    if with_results != compared:
        # The numbers cannot be computed again; they stay, and the words become those of this version.
        verdicts = []
        for verdict in old.verdicts:
            new_verdict = replace(verdict, text=reworded(verdict))
            verdicts.append(asdict(new_verdict))
        record["comparison"]["verdicts"] = verdicts
        return {summary_file: json.dumps(summary, indent=1) + "\n"}

    # With the same settings as before, also the seed of the bootstrap.
    settings = Settings(
        num_resamples=old.num_resamples,
        seed=old.seed,
        confidence=old.confidence,
        fixed_seeds=old.fixed_seeds,
    )
    new = compare_measured(results, old.baseline, settings=settings)
    _check_verdicts(old, new)
    record["comparison"] = new.to_dict()
    texts = {summary_file: json.dumps(summary, indent=1) + "\n"}

    # Some studies have a table in another form, written by a script; it has no such line.
    table_file = folder / "table.md"
    if table_file.is_file():
        table = table_file.read_text(encoding="utf-8")
        if LAST_LINE.search(table):
            texts[table_file] = _with_comparison(table, render(new, "markdown"))
    for file in sorted(folder.glob("against_mask*.md")):
        texts[file] = _against_mask(file, folder)
    return texts


def _check_verdicts(old: Comparison, new: Comparison) -> None:
    """Raise if a difference, or the sentence on a mask, would say something else than before."""
    before, after = _words_of(old), _words_of(new)
    # Also what is missing in one of them.
    for place in before | after:
        if before.get(place) != after.get(place):
            raise UserError(f"{', '.join(place)}: {before.get(place)} would be {after.get(place)}")


def _words_of(comparison: Comparison) -> dict[tuple[str, ...], str]:
    """What is compared -> better, worse, or not distinguishable."""
    words = {}
    for row in comparison.differences:
        words[row.method, row.metric, row.task] = row.verdict
    # A verdict on a mask has differences of its own families, with other intervals.
    for verdict in comparison.verdicts:
        for row in (verdict.parent, verdict.control):
            if row is not None:
                words["verdict on", row.method, "against", row.baseline, row.metric, row.task] = row.verdict
    return words


def _with_comparison(table: str, comparison: str) -> str:
    """Return a study's table with its comparison replaced: from the first table to the line that explains it."""
    start = table.index("| model |")
    found = LAST_LINE.search(table)
    assert found is not None
    end = found.end()
    return table[:start] + comparison.rstrip("\n") + table[end:]


def _against_mask(file: Path, folder: Path) -> str:
    """Return what ``maskft compare FOLDER --baseline MASK --format markdown`` prints."""
    text = file.read_text(encoding="utf-8")
    found = LAST_LINE.search(text)
    if found is None:
        return text
    results = read_all([str(folder)])
    names = {result["name"] for result in results}
    if found["baseline"] not in names:
        return text

    # The options of the command that wrote the file are in its last line.
    settings = Settings(fixed_seeds="seeds are fixed" in found[0])
    comparison = compare_measured(results, found["baseline"], settings=settings)
    new = render(comparison, "markdown")
    # Some compare results of several folders, and the command that wrote them is not known.
    has_same_rows = new.count("\n| ") == text.count("\n| ")
    return new if has_same_rows else text


def main(folders: list[Path], is_written: bool) -> None:
    """Print the changed lines of each folder, and write them if ``is_written``."""
    for folder in folders:
        try:
            texts = refreshed(folder)
        except UserError as error:
            # One folder must not keep the others from being refreshed.
            print(f"{folder.name}: left as it is: {error}")
            continue
        for file, text in texts.items():
            old = file.read_text(encoding="utf-8")
            if old == text:
                continue
            print(f"{folder.name}/{file.name}: changed")
            if file.suffix == ".md":
                lines = difflib.unified_diff(old.splitlines(), text.splitlines(), lineterm="", n=0)
                for line in lines:
                    # Without the names of files and the numbers of lines.
                    if not line.startswith(("---", "+++", "@@")):
                        print(line)
            if is_written:
                write_text(file, text)
        sys.stdout.flush()  # a folder may take a minute


def command() -> None:
    """Refresh the folders on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, help="folders of published results (default: all)")
    parser.add_argument("--write", action="store_true", help="also write the files")
    given = parser.parse_args()
    folders = given.folders
    if not folders:
        summaries = sorted((ROOT / "results").glob("*/summary.json"))
        folders = [file.parent for file in summaries]
    main(folders, given.write)


if __name__ == "__main__":
    run_script(command)

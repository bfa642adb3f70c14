"""README's results table and the headline of docs/evidence.md, recomputed from the published files."""

import re
from pathlib import Path
from statistics import fmean

import pytest

from maskft_lab.results.reading import read_all

ROOT = Path(__file__).parents[2]
# Row of the table -> name of the method in the study.
STUDY = "smollm2-curve-banking77-kl-seeds"
METHODS = {
    "mask": "deletion mask with KL to base",
    "full fine-tuning": "full with KL to base",
    "LoRA r 16": "LoRA r 16 with KL to base",
}


@pytest.fixture(scope="module")
def results():
    return read_all([str(ROOT / "results" / STUDY)])


def mean(results, name, task, metric):
    """Mean over the seeds of a method."""
    values = [result["tasks"][task]["metrics"][metric]["value"] for result in results if result["name"] == name]
    assert values
    return fmean(values)


def rows(page, columns):
    """Cells of the first table of a page that has these columns."""
    tables = re.findall(r"(?:^\|.*\|\n)+", (ROOT / page).read_text(), re.MULTILINE)
    table = next(table for table in tables if columns in table.splitlines()[0])
    for line in table.splitlines()[2:]:
        yield [re.sub(r"[*]", "", cell).strip() for cell in line.strip("|").split("|")]


def test_readme(results):
    shown = list(rows("README.md", "| trained | size | correct |"))
    assert [row[0] for row in shown] == list(METHODS)
    for trained, size, correct, instructions, encyclopaedia in shown:
        name = METHODS[trained]
        assert correct == f"{100 * mean(results, name, 'heldout', 'accuracy'):.0f} %"
        for cell, probe in ((instructions, "before: instructions"), (encyclopaedia, "before: wikipedia")):
            forgotten = mean(results, name, probe, "nll") - mean(results, "pre-trained", probe, "nll")
            assert cell == f"{forgotten:+.2f}", (trained, probe)
        (num_bytes,) = {r["model"]["num_bytes"] for r in results if r["name"] == name and r["model"]["seed"] == 0}
        # The mean of the seeds differs in the third digit.
        assert float(size.split()[0]) == pytest.approx(num_bytes / 1e6, rel=0.05)


def test_evidence(results):
    for method, _, accuracy, instructions, text in rows("docs/evidence.md", "| method | bytes | accuracy |"):
        name = next(full for short, full in METHODS.items() if short in method)
        assert float(accuracy.split()[0]) == round(100 * mean(results, name, "heldout", "accuracy"), 1)
        for cell, probe in ((instructions, "before: instructions"), (text, "before: wikipedia")):
            forgotten = mean(results, name, probe, "nll") - mean(results, "pre-trained", probe, "nll")
            assert float(cell.split()[0]) == round(forgotten, 3), (method, probe)

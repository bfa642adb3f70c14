"""README's results table and the headline's tables of docs/evidence.md, recomputed from the published files."""

import re
from pathlib import Path
from statistics import fmean

import pytest

from maskft_lab.results.reading import read_all

ROOT = Path(__file__).parents[2]
LONG = "smollm2-curve-banking77-long-seeds"
SHORT = "smollm2-curve-banking77-kl-seeds"
# Row of a table -> name of the method in both studies.
METHODS = {
    "mask": "deletion mask with KL to base",
    "full fine-tuning": "full with KL to base",
    "LoRA r 16": "LoRA r 16 with KL to base",
}
PROBES = ("before: instructions", "before: wikipedia")
UNITS = {"kB": 1e3, "MB": 1e6}


@pytest.fixture(scope="module", params=[LONG, SHORT])
def study(request):
    return request.param


@pytest.fixture(scope="module")
def results(study):
    return read_all([str(ROOT / "results" / study)])


def mean(results, name, task, metric):
    """Mean over the seeds of a method."""
    values = [result["tasks"][task]["metrics"][metric]["value"] for result in results if result["name"] == name]
    assert values
    return fmean(values)


def forgotten(results, name, probe):
    """Nats per token more than before training, mean over the seeds."""
    return mean(results, name, probe, "nll") - mean(results, "pre-trained", probe, "nll")


def rows(page, columns, after=""):
    """Cells of the first table behind ``after`` in a page that has these columns."""
    text = (ROOT / page).read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\|\n)+", text[text.index(after) :], re.MULTILINE)
    table = next(table for table in tables if columns in table.splitlines()[0])
    for line in table.splitlines()[2:]:
        yield [re.sub(r"[*]", "", cell).strip() for cell in line.strip("|").split("|")]


def check_size(results, name, size):
    """A size is that of seed 0; the mean of the seeds differs in the third digit."""
    (num_bytes,) = {r["model"]["num_bytes"] for r in results if r["name"] == name and r["model"]["seed"] == 0}
    number, unit = size.split()
    assert float(number) == pytest.approx(num_bytes / UNITS[unit], rel=0.05)


@pytest.mark.parametrize("study", [LONG], indirect=True)
def test_readme(results):
    shown = list(rows("README.md", "| trained | size | correct |"))
    assert [row[0] for row in shown] == list(METHODS)
    for trained, size, correct, *losses in shown:
        name = METHODS[trained]
        assert correct == f"{100 * mean(results, name, 'heldout', 'accuracy'):.1f} %"
        assert losses == [f"{forgotten(results, name, probe):+.2f}" for probe in PROBES], trained
        check_size(results, name, size)


def test_evidence(results, study):
    shown = list(rows("docs/evidence.md", "| method | bytes | accuracy |", after=f"results/{study}/table.md"))
    assert len(shown) == len(METHODS)
    for method, size, accuracy, *losses in shown:
        name = next(full for short, full in METHODS.items() if short in method)
        assert float(accuracy.split()[0]) == round(100 * mean(results, name, "heldout", "accuracy"), 1)
        for cell, probe in zip(losses, PROBES, strict=True):
            assert float(cell.split()[0]) == round(forgotten(results, name, probe), 3), (method, probe)
        check_size(results, name, size)

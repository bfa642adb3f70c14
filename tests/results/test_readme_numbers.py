"""README's tables of results and the headline's in the pages of evidence, recomputed from the published files."""

import json
import re
from pathlib import Path
from statistics import fmean

import pytest

from maskft_lab.results.reading import read_all

ROOT = Path(__file__).parents[2]
LONG = "smollm2-curve-banking77-long-seeds"
SHORT = "smollm2-curve-banking77-kl-seeds"
SHORT_GATES = "smollm2-curve-banking77-kl-gates-seeds"
SECOND_MODEL = "qwen25-05b-intents-seeds"
# How a row of a table begins -> name of the method in the studies; the longer one of two that fit goes first.
METHODS = {
    "deletion mask": "deletion mask with KL to base",
    "mask": "deletion mask with KL to base",
    "full fine-tuning of the gate projections": "full of gate_proj with KL to base",
    "full fine-tuning": "full with KL to base",
    "LoRA r 16": "LoRA r 16 with KL to base",
    "OSF": "OSF with KL to base",
    "Super-Tuning": "Super-Tuning with KL to base",
}
# Studies with more methods of a table: seed 0, and the others.
MORE = {SECOND_MODEL: ("qwen25-05b-intents-more-rivals", "qwen25-05b-intents-more-rivals-seeds")}
# The study of short training has no methods of the gate projections alone; another has that and the mask.
NUM_ROWS = {LONG: 4, SHORT: 3, SHORT_GATES: 2, SECOND_MODEL: 6}
# Where the sizes are, if not in the study itself: the studies that chose its rates.
SIZES = {SHORT_GATES: "smollm2-curve-banking77-kl-gates", SECOND_MODEL: "qwen25-05b-intents-rivals"}
# The page that has the table, if not docs/evidence.md.
PAGES = {SHORT: "docs/evidence_appendix.md", SHORT_GATES: "docs/evidence_appendix.md"}
PROBES = ("before: instructions", "before: wikipedia")
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


@pytest.fixture(scope="module", params=list(NUM_ROWS))
def study(request):
    return request.param


def with_more(study, folder):
    """The results of a folder, and those of the methods that it does not have."""
    found = read_all([str(ROOT / "results" / folder)])
    names = {result["name"] for result in found}
    for more in MORE.get(study, ()):
        found += [result for result in read_all([str(ROOT / "results" / more)]) if result["name"] not in names]
    return found


@pytest.fixture(scope="module")
def results(study):
    return with_more(study, study)


@pytest.fixture(scope="module")
def sizes(study):
    """Results that have the sizes of the methods."""
    return with_more(study, SIZES.get(study, study))


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


def method_of(row):
    """The method of a row, by its first cell."""
    return next(name for start, name in METHODS.items() if row[0].startswith(start))


def check_size(results, name, size):
    """A size is that of seed 0; the mean of the seeds differs in the third digit."""
    (num_bytes,) = {r["model"]["num_bytes"] for r in results if r["name"] == name and r["model"]["seed"] == 0}
    number, unit = size.split()
    assert float(number) == pytest.approx(num_bytes / UNITS[unit], rel=0.05)


@pytest.mark.parametrize("study", [LONG, SECOND_MODEL], indirect=True)
def test_readme(results, sizes, study):
    # The second of the two tables is behind the second model's name.
    after = "**A second model.**" if study == SECOND_MODEL else ""
    shown = list(rows("README.md", "| trained | size | correct |", after))
    assert len({method_of(row) for row in shown}) == len(shown) == NUM_ROWS[study]
    for row in shown:
        name = method_of(row)
        _, size, correct, *losses = row
        assert correct == f"{100 * mean(results, name, 'heldout', 'accuracy'):.1f} %"
        assert losses == [f"{forgotten(results, name, probe):+.2f}" for probe in PROBES], name
        check_size(sizes, name, size)


def test_evidence(results, sizes, study):
    page = PAGES.get(study, "docs/evidence.md")
    shown = list(rows(page, "| method | bytes | accuracy |", after=f"results/{study}/table.md"))
    assert len({method_of(row) for row in shown}) == len(shown) == NUM_ROWS[study]
    for row in shown:
        name = method_of(row)
        _, size, accuracy, *losses = row
        assert float(accuracy.split()[0]) == round(100 * mean(results, name, "heldout", "accuracy"), 1)
        for cell, probe in zip(losses, PROBES, strict=True):
            assert float(cell.split()[0]) == round(forgotten(results, name, probe), 3), (name, probe)
        check_size(sizes, name, size)


# The name of a method in the files of the budget's study.
OF_BUDGETS = {"deletion mask": "deletion mask", "mask": "deletion mask", "LoRA": "LoRA r 16", "full": "full"}


@pytest.mark.parametrize(
    ("page", "columns", "num_rows"),
    [("README.md", "| trained | kept near", 6), ("docs/evidence.md", "| method | penalty", 12)],
)
def test_the_tables_of_a_budget(page, columns, num_rows):
    """Means over three seeds, from the files that the recipe writes."""
    runs = [
        json.loads(file.read_text()) for file in sorted((ROOT / "results/smollm2-kl-budget").glob("intents-*.json"))
    ]
    assert [run["seed"] for run in runs] == [0, 1, 2]
    found = list(rows(page, columns))
    assert len(found) == num_rows
    for method, penalty, *cells in found:
        name = next(name for start, name in OF_BUDGETS.items() if method.startswith(start))
        budget = re.search(r"budget (?:of )?([\d.]+)", penalty)
        term = float(budget[1]) if budget else "tuned weight"
        of_term = []
        for run in runs:
            of_term += [row for row in run["rows"] if (row["method"], row["term"]) == (name, term)]
        assert len(of_term) == len(runs)
        if page != "README.md":
            reached = cells.pop(0)
            expected = f"{fmean(row['kl']['reached'] for row in of_term):.3f}" if budget else ""
            assert reached == expected
        correct, *forgotten_cells = cells
        assert f"{100 * fmean(row['accuracy'] for row in of_term):.1f}" == correct.removesuffix(" %")
        for probe, cell in zip(("instructions", "wikipedia"), forgotten_cells, strict=True):
            pairs = zip(of_term, runs, strict=True)
            value = fmean(row["probes"][probe] - run["base"]["probes"][probe] for row, run in pairs)
            num_decimals = len(cell.partition(".")[2])
            assert cell == f"{value:+.{num_decimals}f}"

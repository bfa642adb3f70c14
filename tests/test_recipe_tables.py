"""Tables that scripts in recipes/ wrote are what the committed answers give."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"


@pytest.fixture
def script(monkeypatch):
    folder = ROOT / "recipes" / "smollm2"
    monkeypatch.syspath_prepend(str(folder))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        # dataclasses look their module up.
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def copied(tmp_path):
    def copy(name):
        return Path(shutil.copytree(RESULTS / name, tmp_path / name))

    return copy


def test_exact_in_four_bits(script):
    folder = RESULTS / "smollm2-exact-in-four-bits"
    assert script("exact_in_four_bits").table(folder) == (folder / "table.md").read_text()


def test_skills_that_add_up(script, copied):
    folder = copied("smollm2-skills")
    table = (folder / "table.md").read_text()
    results = [json.loads(file.read_text()) for file in sorted(folder.glob("seed*.json"))]
    script("skills_that_add_up").write(results, folder)
    assert (folder / "table.md").read_text() == table
    # A picture of the committed results, not of others: its marks are as many.
    assert (folder / "retained.svg").read_text().count("<use ") == (
        (RESULTS / "smollm2-skills" / "retained.svg").read_text().count("<use ")
    )


def test_skills_in_sequence(script):
    script("skills_that_add_up")
    sequence = script("skills_in_sequence")
    folder = RESULTS / "smollm2-skills"
    result = json.loads((folder / "sequence-seed0.json").read_text())
    # The file begins with lines that a person wrote.
    assert (folder / "sequence.md").read_text().endswith(sequence.table(result).split("\n", 2)[2])

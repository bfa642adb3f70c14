"""Every recipe says what it is and parses; a study's expands, its runs parse, and its dry run passes offline."""

import os
from pathlib import Path

import pytest
import yaml

from maskft.arguments import MASK_METHODS, mask_config
from maskft.cli.main import main
from maskft.cli.study import check
from maskft.cli.train import parse
from maskft.study.estimates import estimate
from maskft.study.recipe import PRETRAINED, load_recipe

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
STUDIES = [path for path in RECIPES if "version" in yaml.safe_load(path.read_text())]


def name(path):
    return str(path.relative_to(ROOT))


def test_there_are_recipes():
    assert len(STUDIES) >= 30 and len(RECIPES) > len(STUDIES)


@pytest.mark.parametrize("recipe", RECIPES, ids=name)
def test_header(recipe):
    head = recipe.read_text().splitlines()
    command = "study" if recipe in STUDIES else "train --config"
    assert head[0].startswith("# What: ")
    assert any(line.startswith(f"# Launch: maskft {command} {recipe.relative_to(ROOT)}") for line in head)


@pytest.mark.parametrize("recipe", [path for path in RECIPES if path not in STUDIES], ids=name)
def test_run(recipe):
    run = parse(["--config", str(recipe)])
    if run.method.method in MASK_METHODS:
        assert mask_config(run.mask).sparsity == run.mask.mask_sparsity


@pytest.mark.parametrize("file", STUDIES, ids=name)
def test_study(file, tmp_path, capsys):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    recipe = load_recipe(file)
    plan = check(recipe)
    for run in plan.runs:
        numbers = estimate(plan, run, recipe.facts)
        trained = run.method.method != PRETRAINED and run.method.method in ("full", "lora", "mask")
        assert numbers.memory_bytes > 1e8 and (numbers.tokens > 10_000) == trained
    assert main(["study", str(file), "--dry_run", "--output_dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert all(run.id in out for run in plan.runs) and not (tmp_path / "out").exists()

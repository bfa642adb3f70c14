"""Every recipe parses, and says what it is."""

from pathlib import Path

import pytest

from maskft.arguments import MASK_METHODS, mask_config
from maskft.cli.train import parse

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def test_there_are_recipes():
    assert RECIPES


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe(recipe):
    head = recipe.read_text().splitlines()
    assert head[0].startswith("# What: ") and any(line.startswith("# Launch: maskft train --config ") for line in head)
    assert any(f"--config {recipe.relative_to(ROOT)}" in line for line in head)
    run = parse(["--config", str(recipe)])
    if run.method.method in MASK_METHODS:
        assert mask_config(run.mask).sparsity == run.mask.mask_sparsity

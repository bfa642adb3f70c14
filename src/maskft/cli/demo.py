"""``maskft demo``: the main job on a small real model, in about ten minutes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from ..errors import UserError, did_you_mean

HELP = """usage: maskft demo [--output_dir DIR] [--config FILE] [--preset paper] [--NAME VALUE ...]

Fully fine-tunes SmolLM2-135M-Instruct on generated arithmetic, learns a mask on the best checkpoint, and compares it
on the same test items with the pre-trained model, continued full fine-tuning, a random mask, an L1 mask, and a warm
restart of full fine-tuning with as many tokens. About ten minutes and 4 GB on two cores.

  --output_dir DIR      folder of the demo (default: runs/demo); an interrupted demo goes on where it stopped
  --config FILE         a recipe with the sections shared, full, mask, warm_restart (default: the one shown by --show)
  --preset paper        the mask as published: random start, ranked by magnitude, learning rate 1e-3
  --show                print the recipe and stop
  --NAME VALUE          set an option of maskft train for all stages, e.g. --model_name_or_path DIR --dataset_name FILE
  --STAGE.NAME VALUE    set it for one stage, e.g. --mask.learning_rate 3e-4 --full.num_train_epochs 2
  --mask_NAME VALUE     set an option of the masks, e.g. --mask_sparsity 0.05

maskft train --help lists the options."""

SECTIONS = ("shared", "full", "mask", "warm_restart")


def main(argv: list[str]) -> None:
    """Read the recipe, apply the flags, run."""
    if "-h" in argv or "--help" in argv:
        print(HELP)
        return
    options = _options(argv)
    text = _recipe_text(options.pop("config", None))
    if options.pop("show", None):
        print(text, end="")
        return
    output_dir = str(options.pop("output_dir", "runs/demo"))
    recipe = merge_options(_parse_recipe(text), options)
    for name in ("model_name_or_path", "dataset_name"):
        if not recipe["shared"].get(name):
            raise UserError(f"the recipe's section shared has no {name}")
    from .demo_run import demo

    demo(output_dir, recipe)


def merge_options(recipe: dict, options: dict) -> dict:
    """Apply ``NAME``, ``STAGE.NAME`` and ``mask_NAME`` options to a recipe's sections."""
    preset = options.pop("preset", None)
    if preset is not None:
        if preset != "paper":
            raise UserError(f"preset is {preset!r}; the only one is paper")
        mask = recipe["mask"]
        mask.pop("mask_init_scores", None), mask.pop("mask_rank_by", None)
        mask |= {"mask_preset": "paper", "learning_rate": 1e-3}
    for name, value in options.items():
        section, _, key = name.rpartition(".")
        section = section or ("mask" if name.startswith("mask_") else "shared")
        if section not in SECTIONS:
            raise UserError(f"unknown stage {section!r} in --{name}{did_you_mean(section, SECTIONS)}")
        recipe[section][key] = value
        if section == "shared":
            # A stage's own value must not win over what was said for all.
            for other in SECTIONS[1:]:
                recipe[other].pop(key, None)
    return recipe


def _options(argv: list[str]) -> dict:
    """``--a 1 --b.c x`` -> {"a": 1, "b.c": "x"}; values are read as YAML, as in a recipe."""
    import yaml

    options, words = {}, list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"{word!r} is not an option; see maskft demo --help")
        name, has_value, value = word[2:].partition("=")
        if not has_value:
            values = []
            while words and not words[0].startswith("--"):
                values.append(words.pop(0))
            value = values[0] if len(values) == 1 else values
        try:
            parsed = [yaml.safe_load(v) for v in value] if isinstance(value, list) else yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"the value of --{name} cannot be read: {value!r}; put it in quotes") from None
        if isinstance(parsed, list) and parsed and name in ("config", "output_dir", "preset", "show"):
            raise UserError(f"{value[-1]!r} is not an option; see maskft demo --help")
        if parsed == [] and name in ("config", "output_dir", "preset"):
            raise UserError(f"--{name} has no value; see maskft demo --help")
        # YAML reads 1e-3 as text.
        options[name] = True if parsed == [] else _number(parsed)
    return options


def _number(value):
    try:
        return float(value) if isinstance(value, str) and value[:1].isdigit() else value
    except ValueError:
        return value


def _recipe_text(path: str | None) -> str:
    if path is None:
        return (resources.files("maskft") / "recipes" / "demo.yaml").read_text()
    if not Path(path).is_file():
        raise UserError(f"recipe {path!r} does not exist")
    return Path(path).read_text()


def _parse_recipe(text: str) -> dict:
    import yaml

    try:
        recipe = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"the recipe is not YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(recipe, dict):
        raise UserError("the recipe must have the sections shared, full, mask and warm_restart")
    for section in recipe:
        if section not in SECTIONS:
            raise UserError(f"the recipe has an unknown section {section!r}{did_you_mean(str(section), SECTIONS)}")
    sections = {section: recipe.get(section) or {} for section in SECTIONS}
    for section, content in sections.items():
        if not isinstance(content, dict):
            raise UserError(f"section {section} of the recipe must be a list of `name: value` lines, not {content!r}")
    return {section: dict(content) for section, content in sections.items()}
